"""The study on CIFAR-10, with networks and images that are small enough for a test: what it runs, gathers and says."""

import dataclasses
import json
import os
import sys

import pytest
from conftest import ARCH

from benchmarks.cifar10 import study

TINY = study.Scale(
    common=f"-a {ARCH} --img-size 32 -j 0 -b 8",
    pretrain="--epochs 2 --moco-k 64 --moco-dim 16 --mlp --knn-freq 1 --knn-k 5 --warmup-epochs 0 --keep 1 -p 3",
    counts={"mocov2": (16, 0, 0, 0, 0, 0, 0), "mochi": (16, 2, 0, 4, 0, 0, 0), "synco": (16, 4, 3, 2, 2, 2, 1)},
    probe="--epochs 1 --lr 1 --val-freq 0",
    semi=dict.fromkeys(study.PERCENTS, "--epochs 1 --lr-backbone 0.01 --lr-classifier 0.1 -b 2"),
    hold_out=6,
    candidates={"a queue of 64": ("mocov2", ""), "a queue of 32": ("synco", "--moco-k 32 --epochs 1")},
    why="Small.",
)


@pytest.fixture
def small(monkeypatch, data, tmp_path, programs):
    """small("flags ...") runs the study on the tests' images, its programs in this process → those that it started."""
    monkeypatch.setitem(study.SCALES, "cpu", TINY)
    monkeypatch.setattr(study, "HERE", str(tmp_path))

    def run(*flags, expected=0):
        started = []

        def start(args, words, log):
            started.append(list(map(str, words)))
            status, _, err = programs(words[0].removesuffix(".py"), *words[1:])
            assert status == 0, err

        with monkeypatch.context() as patch:
            patch.setattr(study, "start", start)
            given = [
                "--scale",
                "cpu",
                "--dataset",
                "imagefolder",
                "--jobs",
                1,
                "--out",
                tmp_path / "runs",
                *flags,
                data,
            ]
            patch.setattr(sys, "argv", ["study.py", *map(str, given)])
            study.main()
        return started

    return run


def test_a_study(small, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--methods", "mocov2,noisy-alone,synco,random", "--seeds", "0,1"]
    started = small(*flags)
    assert [words[0] for words in started].count("main_synco.py") == 6 and len(started) == 6 + 8 * 3
    budgets = {tuple(words[1:-20]) for words in started if words[0] == "main_synco.py"}
    assert len(budgets) == 2, "all methods run alike but for the seed"

    with open(tmp_path / "cpu.json") as file:
        found = json.load(file)
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for method in ("random", "mocov2", "synco", "noisy-alone") for seed in (0, 1)
    ]
    for run in found["runs"]:
        assert {key for key, _ in study.MEASURES[2:]} <= run.keys()
        with open(tmp_path / "runs" / f"{run['method']}-{run['seed']}" / "semi10" / "result.json") as file:
            assert run["semi10"] == json.load(file)["last"]["top1"]
        if run["method"] != "random":
            assert [epoch for epoch, _, _ in run["curve"]] == [0, 1, 2]
            assert run["curve"][-1][1:] == [run["knn"], run["knn_projection"]]
            kinds = {name.removeprefix("mass/") for name in run["hardness"][-1] if name.startswith("mass/")}
            extra = {"mocov2": set(), "synco": set(study.TYPES), "noisy-alone": {"noisy"}}[run["method"]]
            assert kinds == {"positive", "queue", "hardest"} | extra
    assert study.method_flags(TINY, "noisy-alone")[-6:] == ["--n4", 14, "--n5", 0, "--n6", 0]  # as many as all six
    with open(tmp_path / "cpu.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"

    text = (tmp_path / "README.md").read_text()
    gpu, _, cpu = text.partition("## On a CPU")
    assert "Not measured. The command:" in gpu and "Not measured" not in cpu
    assert "| SynCo, noisy alone | 2 |" in cpu and "Small." in cpu and "lossy" in cpu
    assert study.table(found) in cpu and study.verdicts(found) in cpu
    assert small(*flags) == [], "what is done is not done again"


def test_settings_are_chosen_on_training_images_alone(small, tmp_path):
    started = small("--choose")
    assert [words[0] for words in started] == ["main_synco.py"] * 2
    for words in started:
        assert words[words.index("--hold-out") + 1] == "6"
    with open(tmp_path / "cpu-choice.json") as file:
        found = json.load(file)["candidates"]
    assert [one["name"] for one in found] == list(TINY.candidates)
    text = (tmp_path / "README.md").read_text()
    assert f"| a queue of 64 | {found[0]['knn']:.2f} | {found[0]['knn_projection']:.2f} |" in text
    assert "kNN on 6 training images" in text and not os.path.exists(tmp_path / "cpu.json")


def content(**methods):
    runs = [{"method": m, "seed": s, "knn": value} for m, values in methods.items() for s, value in enumerate(values)]
    return {"runs": [run | {key: run["knn"] for key, _ in study.MEASURES} for run in runs]}


def test_what_the_tables_say():
    assert study.cell([50.0, 52.0, 51.5]) == "51.17 (50.00 to 52.00)" and study.cell([50.0]) == "50.00"
    assert study.verdict([3.0, 4.0, 5.0], [1.0, 2.0, 2.5]) == "+2.17, ranges apart"
    assert study.verdict([1.0, 2.0, 2.5], [3.0, 4.0, 5.0]) == "-2.17, ranges apart"
    assert study.verdict([2.5, 4.0, 5.0], [1.0, 2.0, 2.5]) == "+2.00, within the spread"
    text = study.verdicts(content(mocov2=[1.0, 2.0], synco=[3.0, 4.0], mochi=[9.0], random=[0.0, 0.5]))
    assert text.splitlines()[2:] == ["| SynCo |" + " +2.00, ranges apart |" * 5], "one run has no spread"
    assert study.verdicts(content(mocov2=[1.0], synco=[3.0])) == ""
    curve = [[epoch, 0.0, 40.0 + epoch / 10] for epoch in range(0, 201, 10)]
    table = study.beside_published({"runs": [{"method": "mocov2", "curve": curve}]})
    assert table[2] == ["here", "41.00", "42.00", "45.00", "60.00"]


def test_a_program_that_fails_ends_the_study(data, tmp_path, monkeypatch, capsys):
    wrong = dataclasses.replace(TINY, common=TINY.common.replace(ARCH, "resnet19"))
    monkeypatch.setitem(study.SCALES, "cpu", wrong)
    monkeypatch.setattr(study, "HERE", str(tmp_path))
    flags = f"--scale cpu --dataset imagefolder --methods mocov2,synco --jobs 1 --out {tmp_path / 'runs'} {data}"
    monkeypatch.setattr(sys, "argv", ["study.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        study.main()
    log = tmp_path / "runs" / "mocov2-0" / "pretrain.txt"
    assert "main_synco.py ended with status 2: main_synco.py: error: argument -a/--arch: 'resnet19'" in end.value.code
    assert end.value.code.endswith(f"({log}); the same command goes on")
    assert log.read_text().startswith("$ ") and os.listdir(tmp_path / "runs") == ["mocov2-0"], "no other is started"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--scale cpu --jobs 0 x", "--jobs 0: must be 1 or more"),
        ("--scale cpu --seeds 0,a x", "'0,a' are not whole numbers >= 0 with commas, such as 0,1,2"),
        ("--scale cpu --seeds=-1 x", "'-1' are not whole numbers"),
        ("--scale cpu --dataset imagefolder nowhere", "nowhere: no such folder"),
        ("--scale cpu --methods mocov2,simclr x", "'simclr' is not one of random, mocov2, mochi, synco, "),
        ("--scale cpu --report-only --out {}/none x", "study.py: no finished run below "),
    ],
)
def test_mistakes(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", *flags.format(tmp_path).split()])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert message in capsys.readouterr().err + str(end.value.code)
