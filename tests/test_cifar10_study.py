"""The study of CIFAR-10, on the tests' images: that it runs, goes on, and says what its runs have measured."""

import concurrent.futures
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import statistics
import sys
import time
import types

import numpy as np
import pytest
from conftest import ARCH, ROOT, Fork, without_launcher

from benchmarks.cifar10 import report, study
from benchmarks.cifar10.programs import Ended, Programs, Stopped, TimeOver
from synco import options
from synco.distributed import usable_cpus
from synco.negatives import KINDS, TYPES

TINY = study.Scale(
    common=f"-a {ARCH} --img-size 32 -j 0 -b 8",
    pretrain="--epochs 2 --moco-k 64 --moco-dim 16 --mlp --knn-freq 1 --knn-k 5 --warmup-epochs 0 --keep 1 -p 3",
    evaluations={
        "probe": "main_lincls.py --epochs 1 --lr 1 --val-freq 0",
        "semi10": "main_semisup.py --train-percent 10 --epochs 1 --lr-backbone 0.01 --lr-classifier 0.1 -b 2",
    },
)


@pytest.fixture
def small(monkeypatch, data, tmp_path, programs):
    """small("flags ...") runs the study on the tests' images, its programs in this process → those that it started."""
    monkeypatch.setitem(study.SCALES, "cpu", TINY)
    monkeypatch.setattr(study, "HERE", str(tmp_path))

    def run(*flags, fail_at=None, stop_at=None):
        started = []

        def start(self, words, log):
            if len(started) == fail_at:
                raise study.Ended("interrupted")
            if len(started) == stop_at:
                assert self.stopped.wait(60)
                raise Stopped
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
    flags = ["--methods", "mocov2,noisy-alone,copied,synco,random", "--seeds", "0,1"]
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        small(*flags, fail_at=7)
    started = small(*flags)
    assert len(started) == 2 * 2 + 8 * 3 - 7, "what is done is not done again"
    with open(tmp_path / "cpu.json") as file:
        found = json.load(file)
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for method in ("random", "mocov2", "copied", "synco", "noisy-alone") for seed in (0, 1)
    ]
    for run in found["runs"]:
        folder = tmp_path / "runs" / f"{run['method']}-{run['seed']}"
        for name in ("probe", "semi10"):
            with open(folder / name / "result.json") as file:
                assert run[name] == json.load(file)["last"]["top1"]
        if run["method"] == "random":
            assert run["knn"] == found["runs"][2 + run["seed"]]["curve"][0][1]
            continue
        assert run["minutes"] == 1.5 and [epoch for epoch, _, _ in run["curve"]] == [0, 1, 2]
        assert run["curve"][-1][1:] == [run["knn"], run["knn_projection"]] and run["train_images"] == 24
        last = run["negatives"][-1]
        kinds = {name.removeprefix("mass/") for name in last if name.startswith("mass/")}
        made = {"mocov2": set(), "synco": set(TYPES), "noisy-alone": {"noisy"}, "copied": {"copied"}}[run["method"]]
        assert last["epoch"] == 2 and kinds == {"positive", "queue", "hardest"} | made
        with open(folder / "pretrain" / "log.jsonl") as file:
            lines = [line for line in map(json.loads, file) if line["kind"] == "train" and line["epoch"] == 1]
        mean = statistics.mean(line["own_class/hardest"] for line in lines)
        assert len(lines) == 2 and last["own_class/hardest"] == pytest.approx(mean, abs=6e-5)
    with open(tmp_path / "cpu.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"

    text = (tmp_path / "README.md").read_text()
    small_part, _, rest = text.partition("## On a CPU")
    cpu, _, gpu = rest.partition("## On a GPU")
    assert "Not measured. The command:" in gpu and "Not measured" not in cpu and "Not measured" in small_part
    command = "--scale cpu --methods random,mocov2,copied,synco,noisy-alone --seeds 0,1 --dataset imagefolder DATA"
    for told in (
        "| noisy alone | 2 |",
        "took 1.5 minutes",
        report.accuracies(found),
        command,
        report.differences(found),
    ):
        assert told in cpu
    assert report.negatives(found) in cpu and "| copied: copied |" in cpu and "probe: main_lincls.py" in cpu

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

    monkeypatch.setitem(study.SCALES, "cpu", dataclasses.replace(TINY, pretrain=TINY.pretrain + " --cos"))
    with pytest.raises(SystemExit, match=r"holds runs with other settings \(settings\); give another"):
        small(*flags)


def test_all_methods_run_alike_but_for_their_negatives(tmp_path, monkeypatch, data):
    """And what differs are the counts alone, of which a type alone and the control take as many as all six together."""
    pretrained = [method for method in study.METHODS if method != "random"]
    for name, scale in study.SCALES.items():
        if "timm:" in scale.common:
            pytest.importorskip("timm")
        started, words = [], {}
        programs = types.SimpleNamespace(start=lambda given, log, started=started: started.append(given), cores=3)
        for method in pretrained:
            args = types.SimpleNamespace(out=str(tmp_path / name), dataset="imagefolder", data=str(data))
            study.run(args, scale, programs, method, 1)
        for call in started:
            words.setdefault(call[0], []).append(call)
        assert len(words["main_synco.py"]) == 10 and len(started) == 10 * (1 + len(scale.evaluations))
        parsed = {}
        for program, calls in words.items():
            for call in calls:
                for dataset in ("cifar10", "imagefolder"):
                    call = [dataset if before == "--dataset" else word for before, word in zip(["", *call], call)]
                    monkeypatch.setattr(sys, "argv", list(map(str, call)))
                    args = importlib.import_module(program.removesuffix(".py")).parse()
                    vars(args).update(options.resolve_image_settings(args))
                    assert (args.img_size, args.stats, args.seed) == (32, "cifar10", 1)
                    # runs that share a GPU have their part of the cores, and lose at most a minute
                    assert (args.workers, args.save_minutes) == (3, 1) if name == "gpu" else args.workers == 0
                    parsed.setdefault((program, dataset, getattr(args, "train_percent", 0)), []).append(vars(args))
        counts = ["n1", "n2", "n3", "n4", "n5", "n6", "n_copied"]
        for group in parsed.values():
            assert len(group) == 10
            differ = {key for key in group[0] if len({str(args[key]) for args in group}) > 1}
            assert differ <= {*counts, "preset", "counts", "save_dir", "log_dir", "pretrained"}
        of = dict(zip(pretrained, parsed["main_synco.py", "imagefolder", 0]))
        total = sum(of["synco"][n] for n in counts)
        assert total == {4096: 60, 512: 9}[of["synco"]["moco_k"]] and of["copied"]["n_copied"] == total
        assert [of[f"{kind}-alone"][n] for kind in TYPES for n in counts] == [
            total * (kind == own) for kind in TYPES for own in KINDS
        ]


def content(**methods):
    runs = [(method, seed, value) for method, numbers in methods.items() for seed, value in enumerate(numbers)]
    return {"runs": [{"method": m, "seed": seed, "knn": value, "knn_projection": value} for m, seed, value in runs]}


def test_paired_comparisons():
    """Student's interval of the differences seed by seed; with what SciPy says of 5 and 3 seeds: t = 2.7764, 4.3027."""
    rng = np.random.default_rng(0)
    for n, t in ((5, 2.7764), (3, 4.3027)):
        one, other = rng.normal(30, 3, n), rng.normal(31, 3, n)
        mean, half = report.paired(dict(enumerate(one)), dict(enumerate(other)) | {99: 0.0})
        assert mean == pytest.approx((one - other).mean())
        assert half == pytest.approx(t * (one - other).std(ddof=1) / np.sqrt(n), rel=1e-3)
    assert report.paired({0: 1.0}, {0: 2.0, 1: 3.0}) is None, "one seed has no spread"

    found = content(random=[0, 0, 0], mocov2=[1, 2, 3], copied=[1, 2, 3.1], synco=[5, 6, 7], mochi=[1])
    assert list(report.comparisons(found)) == [("copied", "mocov2"), ("synco", "mocov2"), ("synco", "copied")]
    text = report.differences(found)
    assert "| SynCo − MoCo v2 | +4.00 ± 0.00 * | +4.00 ± 0.00 * |" in text
    assert "| copied − MoCo v2 | +0.03 ± 0.14 | +0.03 ± 0.14 |" in text
    assert "without 0: 4 of 6, where chance alone would leave 0.3 of as many" in text
    assert report.differences(content(mocov2=[1, 2])) == ""
    assert "| SynCo | 3 | 6.00 (5.00 to 7.00) | 6.00 (5.00 to 7.00) |" in report.accuracies(found)


def test_the_committed_results_are_those_of_the_readme(tmp_path):
    """README.md says what the JSON files and the template say."""
    folder = ROOT / "benchmarks" / "cifar10"
    for scale in study.SCALES:
        if (folder / f"{scale}.json").exists():
            (tmp_path / f"{scale}.json").write_bytes((folder / f"{scale}.json").read_bytes())
    report.write(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


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
    (tmp_path / "program.py").write_text(code)
    run = Fork(tmp_path / "program.py", *flags, data, env=without_launcher())
    log = out / "mocov2-0" / "pretrain.txt"
    while not log.exists() or "Epoch 0" not in log.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[1] == "study.py: interrupted; the same command goes on\n" and run.returncode == 1
    assert "Told to stop: " in log.read_text() and log.read_text().endswith(" s, status 75\n")


def test_a_study_in_pieces(small, tmp_path, capsys):
    """When its time is over it ends with a line and a status of its own; called again it goes on."""
    pytest.importorskip("matplotlib")
    flags = ["--methods", "mocov2,random", "--seeds", "0"]
    with pytest.raises(SystemExit) as end:
        small(*flags, "--minutes", 0.001, stop_at=1)
    assert end.value.code == 75 and not (tmp_path / "cpu.json").exists()
    told = "study.py: 0.001 minutes are over, 0 of 2 runs are done; the same command goes on\n"
    assert capsys.readouterr().err.endswith(told)
    assert len(small(*flags, "--minutes", 10)) == 2 + 3 - 1 and (tmp_path / "cpu.json").exists()


PATIENT = """
import signal, sys, time
if int(sys.argv[1]) > 0:
    signal.signal(signal.SIGTERM, lambda *_: print("told to stop") or sys.exit(int(sys.argv[1])))
open(sys.argv[2], "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize(
    "status, error, told",
    [
        (75, TimeOver, "3 minutes are over, 1 of 4 runs are done; the same command goes on"),
        (-15, TimeOver, "3 minutes are over, 1 of 4 runs are done; the same command goes on"),
        (3, Ended, "patient.py ended with status 3: told to stop "),
    ],
)
def test_programs_are_stopped_when_the_time_is_over(tmp_path, monkeypatch, status, error, told):
    """Those that have saved, or had not begun, have not failed; those that end otherwise have; no other is started."""
    (tmp_path / "patient.py").write_text(PATIENT)
    programs, waited = Programs(2, on_cpu=False), []

    def over(calls, seconds, when):
        """The time is over as soon as two programs are at work."""
        waited.append(seconds)
        while not all((tmp_path / f"started{i}").exists() for i in (1, 2)):
            assert not any(call.done() and call.exception() for call in calls)
            time.sleep(0.01)

    def task(i):
        if i:
            log = str(tmp_path / f"{i}.txt")
            programs.start([tmp_path / "patient.py", status, tmp_path / f"started{i}"], log)

    monkeypatch.setattr(concurrent.futures, "wait", over)
    with pytest.raises(error, match=told):
        programs.all(task, [(i,) for i in range(4)], minutes=3)
    assert waited == [180] and not (tmp_path / "3.txt").exists()
    assert (tmp_path / "1.txt").read_text().endswith(f" s, status {status}\n")


@pytest.mark.parametrize("on_cpu", [True, False])
def test_programs_share_the_cores(on_cpu, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for jobs in (1, 2, 10_000):
        programs = Programs(jobs, on_cpu=on_cpu)
        assert programs.cores == int(programs.environment["OMP_NUM_THREADS"]) == max(1, usable_cpus() // jobs)
        assert programs.environment.get("CUDA_VISIBLE_DEVICES") == ("" if on_cpu else None)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--scale cpu --jobs 0 x", "--jobs 0: must be 1 or more"),
        ("--scale cpu --minutes 0 x", "argument --minutes: '0' is not a number > 0"),
        ("--scale cpu --minutes nan x", "argument --minutes: 'nan' is not a number > 0"),
        ("--scale cpu --seeds 0,a x", "'0,a' are not whole numbers >= 0 with commas, such as 0,1,2"),
        ("--scale cpu --seeds=-1 x", "'-1' are not whole numbers"),
        ("--scale cpu --dataset imagefolder nowhere", "nowhere: no such folder"),
        ("--scale cpu --methods mocov2,simclr x", "'simclr' is not one of random, mocov2, copied, mochi, synco, "),
        ("--scale cpu --report-only --out {}/none x", "study.py: no finished run below "),
        ("--scale cpu x", "the figure needs matplotlib: pip install matplotlib"),
        (
            "--scale cpu --out {0} --dataset imagefolder {0}",
            "{0}: holds runs with other settings (settings); ",
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
    (tmp_path / "study.json").write_text('{"dataset": "imagefolder", "settings": {}}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "study.json").write_text("[" * 100_000)
    monkeypatch.setattr(sys, "argv", ["study.py", *flags.format(tmp_path).split()])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert message.format(tmp_path) in capsys.readouterr().err + str(end.value.code)
