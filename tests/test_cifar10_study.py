"""The study on CIFAR-10, with networks and images that are small enough for a test: what it runs, gathers and says."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import types

import pytest
from conftest import ARCH, ROOT

from benchmarks.cifar10 import study
from synco import options

TINY = study.Scale(
    common=f"-a {ARCH} --img-size 32 -j 0 -b 8",
    pretrain="--epochs 2 --moco-k 64 --moco-dim 16 --mlp --knn-freq 1 --knn-k 5 --warmup-epochs 0 --keep 1 -p 3",
    counts={"mocov2": (16, 0, 0, 0, 0, 0, 0), "mochi": (16, 2, 0, 4, 0, 0, 0), "synco": (16, 4, 3, 2, 2, 2, 1)},
    probe="--epochs 1 --lr 1 --val-freq 0",
    semi=dict.fromkeys(study.PERCENTS, "--epochs 1 --lr-backbone 0.01 --lr-classifier 0.1 -b 2"),
    hold_out=6,
    candidates={"a queue of 64": ("mocov2", ""), "a queue of 32": ("synco", "--moco-k 32 --epochs 1")},
    trials={"probe, lr 2": ("probe", "--lr 2"), "1 %, less": ("semi1", "--lr-backbone 0.001")},
    why="Small.",
)


@pytest.fixture
def small(monkeypatch, data, tmp_path, programs):
    """small("flags ...") runs the study on the tests' images, its programs in this process → those that it started."""
    monkeypatch.setitem(study.SCALES, "cpu", TINY)
    monkeypatch.setattr(study, "HERE", str(tmp_path))

    def run(*flags, fail_at=None):
        started = []

        def start(self, words, log):
            if len(started) == fail_at:
                raise study.Ended("interrupted")
            started.append(list(map(str, words)))
            status, _, err = programs(words[0].removesuffix(".py"), *words[1:])
            assert status == 0, err
            os.makedirs(os.path.dirname(log), exist_ok=True)
            with open(log, "a") as file:
                file.write("# 90 s, status 0\n")

        with monkeypatch.context() as patch:
            patch.setattr(study.Programs, "start", start)
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


def test_a_study(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--methods", "mocov2,noisy-alone,synco,random", "--seeds", "0,1"]
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        small(*flags, fail_at=9)
    started = small(*flags)
    assert len(started) == 6 + 8 * 3 - 9, "what is done is not done again"
    with open(tmp_path / "cpu.json") as file:
        found = json.load(file)
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for method in ("random", "mocov2", "synco", "noisy-alone") for seed in (0, 1)
    ]
    for run in found["runs"]:
        folder = tmp_path / "runs" / f"{run['method']}-{run['seed']}"
        for name in ("probe", "semi1", "semi10"):
            with open(folder / name / "result.json") as file:
                assert run[name] == json.load(file)["last"]["top1"]
        images = {"val": 7, "probe": 24, "semi1": 3, "semi10": 3}  # of each class at least one
        assert run["images"] == images | ({} if run["method"] == "random" else {"pretrain": 24})
        if run["method"] == "random":
            assert run["knn"] == found["runs"][2 + run["seed"]]["curve"][0][1]
            continue
        assert run["minutes"] == 1.5 and [epoch for epoch, _, _ in run["curve"]] == [0, 1, 2]
        assert run["curve"][-1][1:] == [run["knn"], run["knn_projection"]]
        kinds = {name.removeprefix("mass/") for name in run["hardness"][-1] if name.startswith("mass/")}
        extra = {"mocov2": set(), "synco": set(study.TYPES), "noisy-alone": {"noisy"}}[run["method"]]
        assert kinds == {"positive", "queue", "hardest"} | extra
    with open(tmp_path / "cpu.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"

    text = (tmp_path / "README.md").read_text()
    gpu, _, cpu = text.partition("## On a CPU")
    assert "Not measured. The command:" in gpu and "Not measured" not in cpu
    for told in (
        "| SynCo, noisy alone | 2 |", "Small.", "lossy if they are JPEG", "took 1.5 minutes", study.table(found),
        "--methods random,mocov2,synco,noisy-alone --seeds 0,1 --dataset imagefolder DATA", study.verdicts(found),
        "24 for pretraining and kNN, 24 for the probe, 3 and 3 with labels for fine-tuning, 7 to validate",
    ):  # fmt: skip
        assert told in cpu

    # a run that ended before its last evaluation is not done
    log = tmp_path / "runs" / "synco-1" / "pretrain" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    small("--report-only", "--jobs", 9)
    assert f"not finished, and left out: {tmp_path / 'runs' / 'synco-1'}\n" in capsys.readouterr().err
    with open(tmp_path / "cpu.json") as file:
        assert json.load(file)["machines"] == found["machines"], "those of the runs, not of the report"
    assert [words[0] for words in small(*flags)] == ["main_synco.py"]
    with open(tmp_path / "cpu.json") as file:
        assert json.load(file)["runs"] == [
            run | ({"minutes": 3.0} if (run["method"], run["seed"]) == ("synco", 1) else {}) for run in found["runs"]
        ]

    monkeypatch.setitem(study.SCALES, "cpu", dataclasses.replace(TINY, probe="--epochs 2 --lr 1"))
    with pytest.raises(SystemExit, match=r"holds runs with other settings \(settings\); give another"):
        small(*flags)


def test_all_methods_run_alike_but_for_their_negatives(tmp_path, monkeypatch, data):
    """And what differs are the counts alone, of which a type alone takes as many as all six together."""
    for scale in study.SCALES.values():
        started, words = [], {}
        programs = types.SimpleNamespace(start=lambda given, log, started=started: started.append(given))
        for method in study.METHODS + study.ALONE:
            args = types.SimpleNamespace(out=str(tmp_path), dataset="imagefolder", data=str(data))
            study.run(args, scale, programs, (method, 1))
        for call in started:
            words.setdefault(call[0], []).append(call)
        assert {name: len(calls) for name, calls in words.items()} == {
            "main_synco.py": 9, "main_lincls.py": 9, "main_semisup.py": 18
        }  # fmt: skip
        parsed = {}
        for name, calls in words.items():
            for call in calls:
                for dataset in ("cifar10", "imagefolder"):
                    call = [dataset if before == "--dataset" else word for before, word in zip(["", *call], call)]
                    monkeypatch.setattr(sys, "argv", list(map(str, call)))
                    args = importlib.import_module(name.removesuffix(".py")).parse()
                    vars(args).update(options.resolve_image_settings(args))
                    assert (args.img_size, args.stats, args.seed) == (32, "cifar10", 1)
                    parsed.setdefault((name, dataset, getattr(args, "train_percent", 0)), []).append(vars(args))
        for group in parsed.values():
            assert len(group) == 9
            differ = {key for key in group[0] if len({str(args[key]) for args in group}) > 1}
            assert differ <= {"n1", "n2", "n3", "n4", "n5", "n6", "counts", "save_dir", "log_dir", "pretrained"}
        for six, alone in zip(study.TYPES, study.ALONE):
            n_hard, *counts = study.counts_of(scale, alone)
            assert n_hard == scale.counts["synco"][0] and sum(counts) == sum(scale.counts["synco"][1:])
            assert counts[study.TYPES.index(six)] == sum(counts)


def test_settings_are_chosen_on_training_images_alone(small, tmp_path):
    started = small("--choose")
    assert [words[0] for words in started] == ["main_synco.py", "main_synco.py", "main_lincls.py", "main_semisup.py"]
    for words in started:
        assert words[words.index("--hold-out") + 1] == "6"
    with open(tmp_path / "cpu-choice.json") as file:
        choice = json.load(file)
    found = choice["candidates"]
    assert [one["name"] for one in found] == list(TINY.candidates)
    assert [one["name"] for one in choice["trials"]] == list(TINY.trials)
    weights = tmp_path / "runs" / "choose" / "a-queue-of-64" / "pretrain" / "checkpoint_0001.pth.tar"
    assert all(str(weights) in words for words in started[2:])
    assert started[2][started[2].index("main_lincls.py") :].count("--lr") == 2  # of which the last one counts
    text = (tmp_path / "README.md").read_text()
    assert f"| a queue of 64 | {found[0]['knn']:.2f} | {found[0]['knn_projection']:.2f} |" in text
    assert f"| 1 %, less | {choice['trials'][1]['top1']:.2f} |" in text
    assert "The candidates, on 6 training images that were held out" in text
    assert not os.path.exists(tmp_path / "cpu.json")


def content(**methods):
    runs = [(method, seed, value) for method, numbers in methods.items() for seed, value in enumerate(numbers)]
    keys = [key for key, _ in study.MEASURES]
    return {"runs": [{"method": m, "seed": seed} | dict.fromkeys(keys, value) for m, seed, value in runs]}


def test_what_the_tables_say():
    assert study.cell([50.0, 52.0, 51.5]) == "51.17 (50.00 to 52.00)" and study.cell([50.0]) == "50.00"
    low, high, touching = ({0: 1.0, 1: 2.0, 2: 2.5}, {0: 3.0, 1: 4.0, 2: 5.0}, {0: 2.5, 1: 4.0, 2: 5.0})
    assert study.verdict(high, low) == "+2.17 (+2.00 to +2.50), ranges apart"
    assert study.verdict(low, high) == "-2.17 (-2.50 to -2.00), ranges apart"
    assert study.verdict(touching, low) == "+2.00 (+1.50 to +2.50), within the spread"
    assert study.verdict(high, low | {3: 9.0}) == "+2.17 (+2.00 to +2.50), ranges apart", "seeds in common alone"
    found = content(random=[0.0, 0.5], mocov2=[1.0, 2.0], mochi=[9.0], synco=[3.0, 4.0])
    assert study.verdicts(found).splitlines()[2:] == [
        "| SynCo − MoCo v2 |" + " +2.00 (+2.00 to +2.00), ranges apart |" * 5
    ], "one run has no spread"
    assert "in one of 3 comparisons" in study.by_chance(found) and "hold 5 comparisons" in study.by_chance(found)
    three = content(mocov2=[1.0, 2.0, 3.0], mochi=[1.0, 2.0, 3.0], synco=[1.0, 2.0, 3.0])
    assert [line.split(" |")[0] for line in study.verdicts(three).splitlines()[2:]] == [
        "| MoCHi − MoCo v2", "| SynCo − MoCo v2", "| SynCo − MoCHi"
    ]  # fmt: skip
    assert "in one of 10 comparisons" in study.by_chance(three) and "hold 15 comparisons" in study.by_chance(three)
    assert study.verdicts(content(mocov2=[1.0], synco=[3.0])) == study.by_chance(content(mocov2=[1.0])) == ""
    curve = [[epoch, 0.0, 40.0 + epoch / 10] for epoch in range(0, 201, 10)]
    table = study.beside_published({"runs": [{"method": "mocov2", "seed": 0, "curve": curve}]})
    assert table[2] == ["here", "41.00", "42.00", "45.00", "60.00"]


def test_a_program_that_fails_ends_the_study(data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
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
    assert log.read_text().startswith("$ ") and log.read_text().endswith(" s, status 2\n")
    assert sorted(os.listdir(tmp_path / "runs")) == ["mocov2-0", "study.json"], "no other is started"


def test_a_study_that_is_told_to_stop_takes_its_programs_along(data, tmp_path):
    """SIGTERM to the study alone; the program saves what it has, and the same command goes on."""
    pytest.importorskip("matplotlib")
    code = (
        f"import dataclasses, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from benchmarks.cifar10 import study; from test_cifar10_study import TINY\n"
        "long = TINY.pretrain.replace('--epochs 2', '--epochs 999')\n"
        "study.SCALES['cpu'] = dataclasses.replace(TINY, pretrain=long)\n"
        "study.main()"
    )
    out = tmp_path / "runs"
    flags = ["--scale", "cpu", "--dataset", "imagefolder", "--methods", "mocov2", "--jobs", "1", "--out", str(out)]
    run = subprocess.Popen([sys.executable, "-c", code, *flags, str(data)], stderr=subprocess.PIPE, text=True)
    log = out / "mocov2-0" / "pretrain.txt"
    while not log.exists() or "Epoch 0" not in log.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    run.terminate()
    assert run.communicate(timeout=60)[1] == "study.py: interrupted; the same command goes on\n" and run.returncode == 1
    assert "Told to stop: " in log.read_text() and log.read_text().endswith(" s, status 75\n")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--scale cpu --jobs 0 x", "--jobs 0: must be 1 or more"),
        ("--scale cpu --seeds 0,a x", "'0,a' are not whole numbers >= 0 with commas, such as 0,1,2"),
        ("--scale cpu --seeds=-1 x", "'-1' are not whole numbers"),
        ("--scale cpu --dataset imagefolder nowhere", "nowhere: no such folder"),
        ("--scale cpu --methods mocov2,simclr x", "'simclr' is not one of random, mocov2, mochi, synco, "),
        ("--scale cpu --report-only --out {}/none x", "study.py: no finished run below "),
        ("--scale cpu x", "the figure needs matplotlib: pip install matplotlib"),
        ("--scale cpu --report-only --choose x", "--choose starts runs and --report-only none; give one"),
        (
            "--scale cpu --out {0} --dataset imagefolder {0}",
            "{0}: holds runs with other settings (settings, counts, fine-tuning); ",
        ),
        (
            "--scale cpu --out {0}/deep --dataset imagefolder {0}",
            "study.py: {0}/deep/study.json: not a whole JSON file",
        ),
        ("--scale cpu --out {0}/deep --report-only x", "study.py: {0}/deep/study.json: not a whole JSON file"),
    ],
)
def test_mistakes(flags, message, tmp_path, monkeypatch, capsys):
    there = not message.startswith("the figure")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there or None)
    (tmp_path / "study.json").write_text('{"dataset": "imagefolder", "fine-tuning": {}}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "study.json").write_text("[" * 100_000)
    monkeypatch.setattr(sys, "argv", ["study.py", *flags.format(tmp_path).split()])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert message.format(tmp_path) in capsys.readouterr().err + str(end.value.code)
