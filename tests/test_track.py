"""Trackers: each number of the log once, whatever happens to run and tracker; with the real packages, where they are.

The real ones keep their runs on this machine, without a network, and what they kept is read back.
"""

import contextlib
import glob
import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import ROOT, SMALL

from synco import metrics, track

# what stands in for Weights & Biases: its runs are lines of a file
FAKE = """
    import json, os, time

    def init(*, project, name, id, dir, resume, config):
        assert resume == "allow"
        if os.environ.get("FAKE") == "no start":
            raise ConnectionError("no server\\nmore")
        time.sleep(float(os.environ.get("FAKE_WAIT", 0)))
        return Run(id or f"{project}-{name}-{config['seed']}")

    class Run:
        def __init__(self, id):
            self.id = id

        def log(self, numbers, step):
            if os.environ.get("FAKE") == f"no {step}":
                raise RuntimeError("not now")
            self.write([self.id, step, numbers])

        def finish(self):
            self.write([self.id, "finished", {}])

        def write(self, line):
            with open(os.environ["FAKE_FILE"], "a") as file:
                file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package `wandb` that is none → read(), all its lines so far: [run's id, step or "finished", numbers]."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("FAKE_FILE", str(tmp_path / "kept"))
    yield lambda: [json.loads(line) for line in open(tmp_path / "kept")] if (tmp_path / "kept").exists() else []
    sys.modules.pop("wandb", None)


def points(lines):
    """{(number's name, step): its values} of lines [id, step, numbers]."""
    found = {}
    for _, step, numbers in lines:
        for name, value in numbers.items():
            found.setdefault((name, step), []).append(value)
    return found


def logged(folder):
    """The same of a log.jsonl."""
    lines = metrics.read_log(os.path.join(folder, "log.jsonl"))
    rest = ("kind", "step", "time", "epoch")
    return points([[None, x["step"], {f"{x['kind']}/{k}": v for k, v in x.items() if k not in rest}] for x in lines])


def opened(folder, steps_done=0, stored=None, seed=1):
    log = metrics.Log(str(folder), steps_done=steps_done)
    log.track("wandb", {"save_dir": f"{folder}/runs/a", "seed": seed}, stored)
    return log


def test_each_number_once_however_often_a_run_is_killed(tmp_path, fake):
    log = opened(tmp_path)
    assert log.tracked == {"name": "wandb", "id": "synco-a-1"}
    for step in range(1, 6):
        log.write("train", step, epoch=0, loss=step / 2)
    log.write("knn", 4, epoch=0, top1=9.0)
    log.close()
    for last in (4, 8):  # it goes on from step 2 twice
        log = opened(tmp_path, 2, {"name": "wandb", "id": "synco-a-1"}, seed=2)
        for step in range(3, last + 1):
            log.write("train", step, epoch=0, loss=step / 2)
            if step == 6:
                log.write("knn", 6, epoch=0, top1=8.0)
        log.close()
    kept = [line for line in fake() if line[1] != "finished"]
    assert {name for name, _, _ in kept} == {"synco-a-1"}
    expected = {("train/loss", step): [step / 2] for step in range(1, 9)}
    assert points(kept) == expected | {("knn/top1", 4): [9.0], ("knn/top1", 6): [8.0]}


@pytest.mark.parametrize(
    "stored", [None, {"name": "mlflow", "id": "x"}, {"name": "wandb", "id": 3}, {"name": "wandb"}, "x"]
)
def test_what_is_no_run_of_this_tracker_begins_a_new_one(tmp_path, fake, stored):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / track.FILE).write_text('{"id": "x", "sent": {"train": 99}}')
    log = opened(tmp_path, 1, stored)
    log.write("train", 2, loss=1.0)
    log.close()
    assert fake()[0] == ["synco-a-1", 2, {"train/loss": 1.0}]


def test_a_new_log_is_a_new_run(tmp_path, fake):
    """A run that goes on in another folder may be one of several that do."""
    log = opened(tmp_path, 1, {"name": "wandb", "id": "other"})
    log.close()
    assert log.tracked["id"] == "synco-a-1"


@pytest.mark.parametrize("content", ["", "[]", '{"id": "other", "sent": {"train": []}}', '{"id": "other", "sent": 3}'])
def test_the_trackers_file_may_hold_anything(tmp_path, fake, content):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / track.FILE).write_text(content)
    log = opened(tmp_path, 1, {"name": "wandb", "id": "other"})
    log.write("train", 2, loss=1.0)
    log.close()
    assert fake()[0] == ["other", 2, {"train/loss": 1.0}]


def test_a_tracker_that_does_not_begin_is_given_up(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "no start")
    log = opened(tmp_path)
    for step in (1, 2):
        log.write("train", step, loss=1.0)
    log.close()
    _, text = capsys.readouterr().err.split(": warning: ")
    assert text == "--track wandb: ConnectionError: no server (given up; log.jsonl has all)\n"
    assert not fake() and log.tracked is None and len(metrics.read_log(log.path)) == 2


def test_a_tracker_that_fails_once_misses_a_point(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "no 2")
    log = opened(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, loss=1.0)
    log.close()
    assert capsys.readouterr().err.endswith(
        "--track wandb: RuntimeError: not now (some of its points will be missing there; log.jsonl has all)\n"
    )
    assert [step for _, step, _ in fake()] == [1, 3, "finished"]


def test_a_tracker_that_does_not_answer_is_not_waited_for(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_WAIT", "600")
    monkeypatch.setattr(track, "PATIENCE", 0.1)
    began = time.monotonic()
    log = opened(tmp_path)
    log.write("train", 1, loss=1.0)
    log.close()
    assert time.monotonic() - began < 60
    first, second = capsys.readouterr().err.splitlines()
    assert "has not begun within 0.1 seconds" in first and "has not taken everything within 0.1 seconds" in second


def test_a_run_that_is_stopped_and_goes_on(programs, data, tmp_path, fake, signal_after):
    words = ["--save-dir", tmp_path / "run", "--track", "wandb", "--seed", "5", "-p", "2", "--resume", "auto", data]
    signal_after(4)
    assert programs("toy", *words)[0] == 75
    [(name, _, _), *_] = fake()
    saved = torch.load(tmp_path / "run" / "checkpoint_step.pth.tar", weights_only=True)
    assert saved["tracker"] == {"name": "wandb", "id": "synco-run-5"} and name == "synco-run-5"
    assert fake()[-1] == [name, "finished", {}]  # it has all before the process goes
    assert programs("toy", *words)[0] == 0
    assert {run for run, _, _ in fake()} == {name}
    kept = [line for line in fake() if line[1] != "finished"]
    assert points(kept) == logged(tmp_path / "run") and len(kept) == 6
    assert programs("toy", *words[:-3], "--overwrite", data)[0] == 0
    assert len(fake()) == 2 * 6 + 3  # from the first step anew


def test_a_name_of_no_tracker(programs, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "mlflow" else None)
    for name, message in (
        ("comet", "'comet' is no tracker; choose one of wandb, mlflow, trackio (pip install '.[track]' has them all)"),
        ("trackio", "'trackio' is not installed: pip install trackio (pip install '.[track]' has them all)"),
        *([] if find("mlflow").origin else [("mlflow", "'mlflow' is not installed: pip install mlflow")]),
    ):
        status, out, err = programs("toy", "--track", name, data)
        assert (status, out, err.count("\n")) == (2, "", 1) and f"argument --track: {message}" in err
    assert os.listdir(tmp_path) == ["mlflow"]


# ------------------------------------------------------------------------------------------------ the real packages


def kept_by_wandb(folder, name):
    """Lines [id, step, numbers] out of the files that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2 as format

    lines = []
    for path in glob.glob(f"{folder}/run/wandb/offline-run-*-{name}*/run-{name}.wandb"):
        data, at, record = open(path, "rb").read(), 7, b""
        while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, in which records may begin, go on, and end
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, part = struct.unpack("<IHB", data[at : at + 7])
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if part in (1, 4):  # whole, or its end
                found = format.Record.FromString(record)
                assert not found.HasField("run") or found.run.run_id == name
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in found.history.item}
                numbers = {key: value for key, value in items.items() if not key.startswith("_")}
                lines.append([name, found.history.step.num, numbers])
                record = b""
    return lines


def kept_by_mlflow(folder, name):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [run] = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert run.info.run_id == name and run.data.params["moco_k"] == "64"
    return [[name, x.step, {key: x.value}] for key in run.data.metrics for x in client.get_metric_history(name, key)]


def kept_by_trackio(folder, name):
    [path] = glob.glob(f"{folder}/trackio/*.db")
    with contextlib.closing(sqlite3.connect(path)) as file:
        rows = file.execute("select run_name, step, metrics from metrics").fetchall()
    assert {row[0] for row in rows} == {name}
    return [[name, step, json.loads(text)] for _, step, text in rows]


KEPT = {"wandb": kept_by_wandb, "mlflow": kept_by_mlflow, "trackio": kept_by_trackio}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_the_real_one(data, tmp_path, name, how):
    """A run that is stopped, or killed and then repeats steps: one run there, no point twice, and a stop loses none."""
    pytest.importorskip(name)
    env = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "CUDA_VISIBLE_DEVICES": ""}
    words = [
        sys.executable,
        ROOT / "main_synco.py",
        *SMALL,
        "-p",
        "1",
        "--epochs",
        "6",
        "--knn-freq",
        "1",
        "--knn-k",
        "3",
    ]
    words += ["--save-dir", "run", "--track", name, "--resume", "auto", data]
    first = subprocess.Popen(map(str, words), cwd=tmp_path, env=env)
    log = tmp_path / "run" / "log.jsonl"
    while first.poll() is None and (not log.exists() or log.read_text().count('"train"') < 5):
        time.sleep(0.02)
    first.send_signal(how)
    assert first.wait(120) == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    before = logged(tmp_path / "run").keys()
    subprocess.run(map(str, words), cwd=tmp_path, env=env, check=True, timeout=300)
    saved = torch.load(tmp_path / "run" / "checkpoint_0005.pth.tar", weights_only=True)
    assert saved["tracker"]["name"] == name
    kept, wanted = points(KEPT[name](tmp_path, saved["tracker"]["id"])), logged(tmp_path / "run")
    assert not {key: values for key, values in kept.items() if len(values) > 1}
    lost = wanted.keys() - kept.keys()
    assert kept.keys() <= wanted.keys() and (not lost if how == signal.SIGTERM else lost <= before), lost
    timed = ("train/images_per_second", "train/data_share")
    same = {key: values for key, values in kept.items() if key[0] not in timed}
    assert same == {key: pytest.approx(wanted[key]) for key in same}
