"""Runs that are stopped, killed, starved and lied to: how they end, beside runs that nobody disturbed."""

import argparse
import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCH, LAUNCHERS, ROOT, SMALL, command, make_images, processes

from benchmarks import survival as interrupted
from synco import checkpoint, distributed, loader, metrics, survival
from synco.options import UserError

WITHIN = "checkpoint_step.pth.tar"
TRIAL = f"-a {ARCH} --img-size 32 -j 0 -b 4 --epochs 2 --seed 3 -p 3".split()
PROBE = [*TRIAL, "--lr", "1", "--schedule", "1"]
TUNING = [*TRIAL, "--weights", "finetune", "--lr-backbone", "0.02", "--lr-classifier", "0.2"]


@pytest.fixture
def signal_after(monkeypatch):
    """signal_after(n): this process gets SIGTERM in its n-th gradient step from now, once."""
    step = torch.optim.SGD.step

    def arm(count, number=signal.SIGTERM):
        left = [count]

        def counting(self, *args):
            found = step(self, *args)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return found

        monkeypatch.setattr(torch.optim.SGD, "step", counting)

    return arm


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """An undisturbed pretraining of two epochs of three steps → its folder."""
    folder = tmp_path_factory.mktemp("calm") / "r"
    run = command("main_synco.py", *SMALL, "--knn-freq", 1, "--save-dir", folder, data)
    assert run.returncode == 0, run.stderr
    return str(folder)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_warning_saves_and_stops_and_the_run_ends_as_if_nothing_had_been(
    calm, data, tmp_path, program, signal_after, steps
):
    flags = [*SMALL, "--knn-freq", 1, "--resume", "auto", "--save-dir", tmp_path / "r", data]
    signal_after(steps, signal.SIGUSR1 if steps == 2 else signal.SIGTERM)
    status, out, err = program(*flags)
    assert status == 75 and err == ""
    name = "checkpoint_0000.pth.tar" if steps == 3 else WITHIN  # the epoch's own where it ends there
    assert out.splitlines()[-1] == f"Told to stop: {tmp_path / 'r' / name} holds {steps} steps."
    marker = json.loads((tmp_path / "r" / "preempted.json").read_text())
    assert marker == {"signal": "SIGUSR1" if steps == 2 else "SIGTERM", "step": steps, "checkpoint": name}
    content = checkpoint.load(str(tmp_path / "r" / name))
    assert (content["epoch"], content["step"], content["steps_per_epoch"]) == (steps // 3, steps, 3)

    status, out, err = program(*flags)
    assert status == 0, err
    told = f"{steps // 3} epochs" + (f" and {steps % 3} steps of the next" if steps % 3 else "") + " done"
    assert f"resumed            {tmp_path / 'r' / name}, {told}\n" in out
    assert interrupted.differences(calm, str(tmp_path / "r")) == []
    assert not os.path.exists(tmp_path / "r" / WITHIN) and not os.path.exists(tmp_path / "r" / "preempted.json")


def test_the_comparison_sees_a_single_bit(calm, tmp_path):
    """What all these tests rest on."""
    other = str(tmp_path / "r")
    shutil.copytree(calm, other)
    assert interrupted.differences(calm, other) == []
    path = os.path.join(other, "checkpoint_0001.pth.tar")
    content = torch.load(path, weights_only=True)
    queue = content["state_dict"]["module.queue"]
    queue[5, 5] = torch.nextafter(queue[5, 5], torch.tensor(9.0))
    torch.save(content, path)
    with open(os.path.join(other, "log.jsonl"), "a") as file:
        file.write('{"kind": "train", "step": 6}\n')
    assert interrupted.differences(calm, other) == ["checkpoint_0001.pth.tar: state_dict.module.queue", "log.jsonl"]


@pytest.mark.parametrize("steps", [2, 4, 6])
@pytest.mark.parametrize("name, flags", [("main_lincls", PROBE), ("main_semisup", TUNING)])
def test_a_trial_stops_and_goes_on(data, pretrained, tmp_path, programs, signal_after, name, flags, steps):
    """Six steps an epoch: within the first, and at its end, where it is not yet validated."""
    flags = [*flags, "--pretrained", pretrained, "--resume", "auto", data, "--save-dir"]
    assert programs(name, *flags, tmp_path / "calm")[0] == 0
    signal_after(steps)
    status, out, err = programs(name, *flags, tmp_path / "r")
    kind = name.removeprefix("main_")
    assert status == 75 and f"checkpoint_{kind}_step.pth.tar holds {steps} steps." in out, err
    status, out, err = programs(name, *flags, tmp_path / "r")
    assert status == 0 and f"0 epochs and {steps} steps of the next done" in out, err
    assert interrupted.differences(str(tmp_path / "calm"), str(tmp_path / "r")) == []
    for result in ("result.json", "per_class.csv"):
        calm, again = ((tmp_path / place / result).read_text() for place in ("calm", "r"))
        assert re.sub('"command".*', "", calm) == re.sub('"command".*', "", again)


@pytest.mark.parametrize("cut", ["model_best_lincls", "checkpoint_lincls"])
def test_a_validation_is_logged_once_wherever_the_trial_was_cut(data, pretrained, tmp_path, programs, monkeypatch, cut):
    """Saved within the epoch after its last step; ended when validation is logged and that name is to be written."""
    flags = [*PROBE, "--save-steps", 6, "--pretrained", pretrained, "--resume", "auto", data, "--save-dir"]
    assert programs("main_lincls", *flags, tmp_path / "calm")[0] == 0
    with monkeypatch.context() as patch:
        save = checkpoint.save

        def ending(content, path):
            if os.path.basename(path) == f"{cut}.pth.tar":
                raise KeyboardInterrupt
            save(content, path)

        patch.setattr(checkpoint, "save", ending)
        assert programs("main_lincls", *flags, tmp_path / "r")[0] == 130
    assert [x["kind"] for x in metrics.read_log(tmp_path / "r" / "log.jsonl")][-1] == "val"
    status, out, err = programs("main_lincls", *flags, tmp_path / "r")
    assert status == 0 and "0 epochs and 6 steps of the next done" in out, err
    assert interrupted.differences(str(tmp_path / "calm"), str(tmp_path / "r")) == []


def test_saves_by_steps_and_by_time(data, tmp_path, program, monkeypatch):
    written = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda c, path: (written.append((os.path.basename(path), c["step"])), save(c, path))
    )
    flags = [*SMALL, "--save-dir", tmp_path / "r", data, "--overwrite"]
    assert program(*flags, "--save-steps", 2)[0] == 0
    assert written == [(WITHIN, 2), ("checkpoint_0000.pth.tar", 3), (WITHIN, 4), ("checkpoint_0001.pth.tar", 6)]
    assert not os.path.exists(tmp_path / "r" / WITHIN)
    written.clear()
    assert program(*flags, "--save-minutes", 1e-9, "--save-freq", 2)[0] == 0
    assert written == [(WITHIN, step) for step in (1, 2, 3, 4, 5)] + [("checkpoint_0001.pth.tar", 6)]


# ------------------------------------------------------------------------------------- several processes, real ends


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of 60 images, with an undisturbed run of two gloo processes on it → the folder of both."""
    folder = tmp_path_factory.mktemp("several")
    interrupted.make_data(str(folder / "data"), each=20)
    interrupted.finish(interrupted.words("pretraining", str(folder / "data"), str(folder / "calm"), 2), folder / "out")
    return folder


def test_two_processes_killed_and_warned_end_identical(place):
    """First SIGKILL to all while the first checkpoints are written, then SIGTERM to all, as schedulers do."""
    folder = str(place / "r")
    words = interrupted.words("pretraining", str(place / "data"), folder, 2)
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = interrupted.start(words, place / "r.txt")
        before = os.listdir(folder) if os.path.exists(folder) else []
        while not any(name not in before for name in (os.listdir(folder) if os.path.exists(folder) else [])):
            assert run.poll() is None
            time.sleep(0.01)
        while number == signal.SIGTERM and "Epoch" not in (place / "r.txt").read_text().rpartition("resumed")[2]:
            time.sleep(0.01)
        os.killpg(run.pid, number)
        assert run.wait(60) == (75 if number == signal.SIGTERM else -9)
    interrupted.finish(words, place / "r.txt")
    assert interrupted.differences(str(place / "calm"), folder) == []
    assert interrupted.left_behind(folder, run.pid) == []


def test_torchrun_restarts_a_run_whose_rank_was_killed(place):
    """Without --resume auto: that the folder holds this very run, torchrun's own store tells."""
    folder = str(place / "restarted")
    words = interrupted.words("pretraining", str(place / "data"), folder, 2, torchrun=True)
    words.remove("--resume")
    words.remove("auto")
    run = interrupted.start(words, place / "restarted.txt")
    while not os.path.exists(os.path.join(folder, WITHIN)):
        assert run.poll() is None
        time.sleep(0.02)
    ranks = [pid for pid in interrupted.left_behind(folder) if interrupted.state(pid)[1] == run.pid]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait(120) == 0, (place / "restarted.txt").read_text()
    assert (place / "restarted.txt").read_text().count("resumed   ") == 1
    assert interrupted.differences(str(place / "calm"), folder) == []


def test_a_preempted_worker_is_not_tried_again(place):
    folder = str(place / "preempted")
    run = interrupted.start(
        interrupted.words("pretraining", str(place / "data"), folder, 2, torchrun=True), place / "preempted.txt"
    )
    while not os.path.exists(os.path.join(folder, WITHIN)):
        assert run.poll() is None
        time.sleep(0.02)
    ranks = [pid for pid in interrupted.left_behind(folder) if interrupted.state(pid)[1] == run.pid]
    other = [pid for pid in ranks if b"\0RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(other[0], signal.SIGUSR1)
    assert run.wait(120) == 1
    out = (place / "preempted.txt").read_text()
    assert "exitcode  : 75" in out and "Told to stop: " in out and "resumed  " not in out
    marker = json.loads((place / "preempted" / "preempted.json").read_text())
    assert marker["step"] > 0 and marker["signal"] == "SIGUSR1"  # which rank 0 has not heard itself


def test_a_killed_launcher_leaves_nobody_behind(place):
    folder = str(place / "orphans")
    run = interrupted.start(interrupted.words("pretraining", str(place / "data"), folder, 2), place / "orphans.txt")
    while not os.path.exists(os.path.join(folder, WITHIN)):
        assert run.poll() is None
        time.sleep(0.02)
    assert len(interrupted.left_behind(folder, run.pid)) > 2
    run.kill()
    run.wait()
    until = time.monotonic() + 30
    while interrupted.left_behind(folder, run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert interrupted.left_behind(folder, run.pid) == []


def test_a_launcher_that_is_killed_before_its_processes_have_met_leaves_nobody_behind(place):
    """They would wait for each other for minutes, at a store that has gone."""
    run = interrupted.start(interrupted.words("pretraining", str(place / "data"), str(place / "x"), 2), place / "x.txt")
    while len(interrupted.left_behind(str(place / "x"), run.pid)) < 4:  # launcher, Python's helper, two processes
        assert run.poll() is None
        time.sleep(0.005)
    run.kill()
    run.wait()
    until = time.monotonic() + 45
    while interrupted.left_behind(str(place / "x"), run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert interrupted.left_behind(str(place / "x"), run.pid) == []


ENDLESS = """
import os, sys, time
from synco import distributed, options

def parse():
    parser = options.Parser("test")
    options.add_distributed(parser)
    return parser.parse_args()

def run(process, args):
    os.write(1, f"{process.rank} {os.getpid()}\\n".encode())
    if process.rank == 0:
        import torch
        distributed.total(torch.ones(1))  # waits for the others
    time.sleep(120)

if __name__ == "__main__":
    distributed.launch(run, parse)
"""


def started(path, *flags):
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
    )  # fmt: skip


ORPHAN = """
import os, time
import torch.utils.data._utils.signal_handling as handling
from synco import loader
from synco.distributed import Process

def starting():  # in the worker, before it looks at its parent
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(2)

handling._set_worker_signal_handlers = starting
list(loader.eval_loader(range(4), 2, process=Process(), workers=1))
"""


def test_a_worker_that_was_still_starting_ends_when_its_trainer_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(ORPHAN)
    trainer = started(tmp_path / "program.py")
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 20
    while worker in interrupted.left_behind(str(tmp_path), trainer.pid) and time.monotonic() < until:
        time.sleep(0.1)
    left = worker in interrupted.left_behind(str(tmp_path), trainer.pid)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left


ORPHANED = """
import os, time
from synco import distributed, survival
guard = survival.Guard(distributed.Process(), None, True, 40, distributed._report)
guard.parent = -1  # another one than it has now
print("waiting", flush=True)
guard.start()
time.sleep(20)
os._exit(0)
"""


def test_a_process_ends_that_cannot_even_say_that_its_launcher_has_gone():
    """Who read its output has gone as well, so that the line it prints is an error."""
    process = started("-c", ORPHANED)
    assert process.stdout.readline() == "waiting\n"
    process.stderr.close()
    assert process.wait(60) == 1


def test_processes_started_by_hand_name_the_one_that_has_gone(tmp_path):
    """No launcher tells them: rank 1 is killed, and the others are in a collective, and asleep."""
    from conftest import free_port

    (tmp_path / "program.py").write_text(ENDLESS)
    common = ("--world-size", 3, "--dist-url", f"tcp://localhost:{free_port()}", "--peer-timeout", 8)
    ranks = [started(tmp_path / "program.py", *common, "--rank", rank) for rank in range(3)]
    for one in ranks:
        assert one.stdout.readline()
    began = time.monotonic()
    ranks[1].kill()
    errors = [one.communicate(timeout=60)[1] for one in ranks]
    assert time.monotonic() - began < 40 and [one.returncode for one in ranks] == [1, -9, 1]
    assert errors[0].endswith("program.py: error: lost rank 1: no sign of life for 8 s\n")
    assert "Traceback (most recent" not in errors[0] + errors[2] and "lost rank" not in errors[2]
    # rank 2 found out by itself and leaves the line to rank 0, or it found rank 0 gone, which holds the store
    told = [line for line in errors[2].splitlines() if line.startswith("program.py: error: ")]
    assert told in ([], ["program.py: error: lost the process that holds the others together"])


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("whole") / "checkpoint_0000.pth.tar")
    state = {f"w{i}": torch.randn(40, 7) for i in range(20)}
    checkpoint.save({"epoch": 1, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


@pytest.mark.parametrize("kind", interrupted.KINDS)
def test_every_damaged_file_is_refused_in_one_line(whole, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with open(whole, "rb") as file:
        content = file.read()
    rng = random.Random(kind)
    for _ in range(40):
        interrupted.damage("bad.pth.tar", content, kind, rng)
        with open("bad.pth.tar", "rb") as file:
            if file.read() == content:  # zeros in place of zeros
                continue
        with pytest.raises(UserError, match="^bad.pth.tar: not a ") as error:
            checkpoint.load("bad.pth.tar")
        assert "\n" not in str(error.value)
    assert os.listdir() == ["bad.pth.tar"]


def test_a_flipped_bit_in_any_of_the_last_bytes_is_seen(whole, tmp_path):
    with open(whole, "rb") as file:
        content = bytearray(file.read())
    path = str(tmp_path / "x.pth.tar")
    for place in range(1, 110):
        content[-place] ^= 16
        with open(path, "wb") as file:
            file.write(content)
        content[-place] ^= 16
        with pytest.raises(UserError, match="not a whole checkpoint file"):
            checkpoint.check_whole(path)


def test_other_readers_take_a_sealed_file_and_foreign_ones_are_checked_by_their_own_sums(whole, tmp_path):
    import zipfile

    plain = torch.load(whole, weights_only=True)
    assert torch.load(whole, weights_only=True, mmap=True)["epoch"] == 1
    with zipfile.ZipFile(whole) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"synco sha256 ")
    path = tmp_path / "foreign.pth.tar"
    torch.save(plain, path)
    assert torch.equal(checkpoint.load(path)["state_dict"]["w3"], plain["state_dict"]["w3"])
    content = bytearray(path.read_bytes())
    where = content.index(plain["state_dict"]["w3"].numpy().tobytes())
    content[where + 100] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["epoch"] == 1  # torch itself does not notice
    with pytest.raises(UserError, match="foreign.pth.tar: not a whole checkpoint file"):
        checkpoint.load(path)
    with zipfile.ZipFile(tmp_path / "packed.pth.tar", "w", zipfile.ZIP_DEFLATED) as archive:  # 1000 times its size
        archive.writestr("x/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="packed.pth.tar: not a whole checkpoint file"):
        checkpoint.load(tmp_path / "packed.pth.tar")


def damage(path):
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    open(path, "wb").write(content)


def test_resume_auto_falls_back_to_the_newest_whole_checkpoint(calm, data, tmp_path, program):
    folder = tmp_path / "r"
    shutil.copytree(calm, folder)
    damage(folder / "checkpoint_0001.pth.tar")
    flags = [*SMALL, "--knn-freq", 1, "--save-dir", folder, data, "--resume"]
    status, _, err = program(*flags, folder / "checkpoint_0001.pth.tar")
    assert status == 2 and "checkpoint_0001.pth.tar: not a whole checkpoint file" in err
    status, out, err = program(*flags, "auto")
    assert status == 0 and f"going on from {folder / 'checkpoint_0000.pth.tar'}\n" in err
    assert "warning: " in err and "checkpoint_0001.pth.tar: not a whole checkpoint file" in err and err.count("\n") == 1
    assert interrupted.differences(calm, str(folder)) == []
    for name in ("checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"):
        damage(folder / name)
    before = (folder / "log.jsonl").read_bytes()
    status, _, err = program(*flags, "auto")  # and does not start anew over them
    assert status == 2 and f"--resume auto: no checkpoint in {folder} is whole" in err
    assert (folder / "log.jsonl").read_bytes() == before


class Disk:
    """A disk that is full from the n-th write of a checkpoint on, until the m-th."""

    def __init__(self, monkeypatch, first, last=10**9):
        save, count = torch.save, [0]

        class Full:
            def __init__(self, file):
                self.file, self.room = file, 10_000

            def write(self, data):
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

            def flush(self):
                self.file.flush()

        def limited(content, file):
            count[0] += 1
            if first <= count[0] <= last:
                file.file = Full(file.file)
            return save(content, file)

        monkeypatch.setattr(torch, "save", limited)


def test_a_full_disk_does_not_end_a_run(calm, data, tmp_path, program, monkeypatch):
    folder = tmp_path / "r"
    flags = [*SMALL, "--knn-freq", 1, "--save-steps", 1, "--save-dir", folder, data]
    with monkeypatch.context() as patch:
        Disk(patch, first=2, last=4)  # all that follows the first checkpoint, but for the last epoch's
        status, out, err = program(*flags)
    assert status == 0 and err.count("cannot be written (No space left on device)") == 3 and err.count("\n") == 3
    assert torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)["step"] == 6

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        Disk(patch, first=5)
        status, out, err = program(*flags)
    assert status == 1 and err.splitlines()[-1].startswith("main_synco.py: error: ")
    assert "checkpoint_0001.pth.tar: cannot be written (No space left" in err.splitlines()[-1]
    assert "Epoch 1 [3/3]" in out
    left = checkpoint.load(str(folder / WITHIN))
    assert left["step"] == 4 and not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    status, _, err = program(*flags, "--resume", "auto")
    assert status == 0 and interrupted.differences(calm, str(folder)) == [], err


def test_a_disk_that_is_full_from_the_start_is_said_before_anything_is_written(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # files can be made, and hold next to nothing
    try:
        with pytest.raises(UserError, match="r: cannot be written "):
            checkpoint.make_folders(str(tmp_path / "r"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_log_that_cannot_be_written_waits(tmp_path, capsys):
    log = metrics.Log(str(tmp_path))
    log.write("train", 1, loss=1.0)
    file, wrote = log.lines, []

    class Full:
        def write(self, data):
            wrote.append(file.write(data[:10]))  # a part fits
            return wrote[-1]

        def fileno(self):
            return file.fileno()

    log.lines = Full()
    log.write("train", 2, loss=2.0)
    assert wrote == [10] and "log.jsonl: cannot be written (No space left on device)" in capsys.readouterr().err
    log.lines = file
    log.sync()  # there is room again when a checkpoint is written: what it takes for written is
    assert [line["step"] for line in metrics.read_log(tmp_path / "log.jsonl")] == [1, 2]
    log.write("train", 3, loss=3.0)
    log.close()
    assert [line["step"] for line in metrics.read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_log_may_hold_anything(tmp_path):
    good = '{"kind": "train", "step": 1, "loss": 2}\n'
    lines = [
        "[1]\n",
        "3\n",
        "{}\n",
        '{"kind": 3, "step": 1}\n',
        '{"kind": "x", "step": "1"}\n',
        "[" * 100_000 + "\n",
        "\0\n",
    ]
    (tmp_path / "log.jsonl").write_text(good + "".join(lines) + good[:-1])
    metrics.Log(str(tmp_path), steps_done=1).close()
    assert (tmp_path / "log.jsonl").read_text() == good


def test_nothing_that_is_not_finite_replaces_a_checkpoint(tmp_path):
    path = str(tmp_path / "x.pth.tar")
    content = {"state_dict": {"w": torch.ones(3)}, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}
    assert checkpoint.try_to_save(content, path) == ""
    before = open(path, "rb").read()
    for place in (content["state_dict"], content["optimizer"]["state"][0]):
        name = next(iter(place))
        place[name] = torch.tensor([1.0, float("inf"), 0.0])
        with pytest.raises(FloatingPointError, match=f"{name}.* is not finite"):
            checkpoint.try_to_save(content, path)
        place[name] = torch.ones(3)
        assert open(path, "rb").read() == before


HOSTILE = {
    "its optimizer state does not fit": lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(2)),
    "its optimizer state does not fit (momentum_buffer 1 has": lambda c: c["optimizer"]["state"][1].update(
        momentum_buffer=torch.ones(1).expand(10**6, 10**6)
    ),
    "momentum_buffer 0 holds values that are not finite": lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(
        float("nan")
    ),
    "holds values that are not finite": lambda c: c["state_dict"]["module.queue"].fill_(float("inf")),
    "is a tensor of torch.complex64": lambda c: c["state_dict"].update(
        {"module.queue": torch.ones(64, 16, dtype=torch.complex64)}
    ),
    "its step is 'x' after 1 epochs": lambda c: c.update(step="x"),
    "its step is 99 after 1 epochs of 3 steps": lambda c: c.update(step=99),
    "was stopped within an epoch of 4 steps; here an epoch has 3": lambda c: c.update(step=5, steps_per_epoch=4),
    "its averages are not the averages of a run": lambda c: c.update(averages={"names": ["a"], "sums": 3, "steps": 1}),
    "its list of replaced images is none": lambda c: c.update(skipped=[-1]),
    "is of a run with other settings: moco_k tensor": lambda c: c["config"].update(moco_k=torch.ones(2)),
    # one number that pretends to be a tensor of 4 TB
    "of another shape: queue": lambda c: c["state_dict"].update({"module.queue": torch.ones(1).expand(10**6, 10**6)}),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_what_is_read_is_checked_before_it_is_used(calm, data, tmp_path, program, message):
    content = torch.load(os.path.join(calm, "checkpoint_0000.pth.tar"), weights_only=True)
    HOSTILE[message](content)
    torch.save(content, tmp_path / "x.pth.tar")
    status, out, err = program(*SMALL, "--resume", tmp_path / "x.pth.tar", "--save-dir", tmp_path / "r", data)
    assert (
        status == 2
        and err.count("\n") == 1
        and f"x.pth.tar: {message}"
        in err.replace("does not fit this model (dim, K, mlp?): ", "")
        .replace("queue holds", "holds")
        .replace("queue is a tensor", "is a tensor")
    ), err
    assert not os.path.exists(tmp_path / "r")


# ------------------------------------------------------------------------------------------- settings, folders


def test_contradicting_settings_are_listed(calm, data, tmp_path, program):
    path = os.path.join(calm, "checkpoint_0000.pth.tar")
    flags = [*SMALL, "--resume", path, "--save-dir", tmp_path / "r"]

    def refused(*more, folder=data):
        status, _, err = program(*flags, *more, folder)
        assert status == 2 and err.count("\n") == 1 and not os.path.exists(tmp_path / "r"), err
        return err.partition("is of a run with other settings: ")[2].strip()

    assert refused("--moco-k", 128, "--moco-dim", 8, "--n2", 9) == "moco_dim 16 → 8; moco_k 64 → 128; n2 3 → 9"
    assert refused("-b", 4) == "global_batch 8 → 4"
    assert refused("--lr", 1, "--n2", 9, "--force-resume") == "lr 0.03 → 1.0; n2 3 → 9 (--force-resume lets lr change)"
    assert refused("--moco-t", 0.1, "--force-resume") == "moco_t 0.07 → 0.1"
    make_images(tmp_path / "more" / "train", classes=3, images=9)
    assert refused(folder=tmp_path / "more") == "train_images 24 → 27"
    shutil.copytree(data, tmp_path / "moved")  # the same images in another place are the same
    assert program(*flags, tmp_path / "moved")[0] == 0
    shutil.rmtree(tmp_path / "r")
    image = min((tmp_path / "moved" / "train").glob("*/*"))
    image.rename(image.with_name(f"another-{image.name}"))
    assert refused(folder=tmp_path / "moved") == "other training images (by their names)"
    # none of these is the run's own
    free = "-j 1 -p 1 --save-freq 2 --keep 1 --knn-freq 2 --knn-k 3 --save-steps 1 --worker-timeout 60 --peer-timeout 9"
    status, out, err = program(*flags, *free.split(), data)
    assert status == 0 and "changed" not in out, err
    last = [torch.load(os.path.join(x, "checkpoint_0001.pth.tar"), weights_only=True) for x in (calm, tmp_path / "r")]
    assert interrupted.unequal(last[0]["state_dict"], last[1]["state_dict"]) == []


def test_another_number_of_processes_goes_on_with_the_images_that_are_left(place, tmp_path, program):
    """Of a checkpoint of two processes within an epoch: allowed, and said, if a step still takes as many images."""
    folder, data = str(tmp_path / "r"), str(place / "data")
    run = interrupted.start(interrupted.words("pretraining", data, folder, 2), tmp_path / "out")
    while not os.path.exists(os.path.join(folder, WITHIN)):
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    flags = interrupted.words("pretraining", data, folder)[2:]
    status, out, err = program(*flags)
    assert status == 0, err
    assert "processes          2 → 1: the same images in each step, but not the same numbers" in out
    assert "steps of the next done" in out or "checkpoint_0000" in out
    steps = [line["step"] for line in metrics.read_log(os.path.join(folder, "log.jsonl")) if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 2 * (60 // 8)
    status, _, err = program(*flags, "-b", 4)
    assert status == 2 and "global_batch 8 → 4" in err


STARTING = """
import os, signal, sys, time
import torch.utils.data._utils.signal_handling as handling
from multiprocessing import resource_tracker
from synco import distributed, loader, options

begin = handling._set_worker_signal_handlers

def warned_at_once():  # before worker_init_fn, in the worker
    begin()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)

handling._set_worker_signal_handlers = warned_at_once

def parse():
    parser = options.Parser("test")
    options.add_distributed(parser)
    return parser.parse_args()

def run(process, args):
    more = {"process": process, "workers": 1}
    print(sum(len(batch) for batch in loader.eval_loader(range(10), 2, **more)), "images")
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    tracker = resource_tracker._resource_tracker._pid
    os.kill(tracker, signal.SIGUSR1)
    time.sleep(0.2)
    resource_tracker.ensure_running()  # a new one where that one has gone
    print(held, resource_tracker._resource_tracker._pid == tracker)

if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method(sys.argv.pop())
    distributed.launch(run, parse)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_warning_to_a_loading_worker_that_is_starting_is_lost_on_it(tmp_path, method):
    """And on Python's own helper process. forkserver: what Python 3.14 starts processes with."""
    (tmp_path / "program.py").write_text(STARTING)
    run = command(tmp_path / "program.py", method, env={"PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (0, "10 images\nset() True\n"), run.stderr


def settings(folder, **more):
    given = {"save_dir": str(folder), "log_dir": str(folder), "resume": "", "overwrite": False, "restarted": False}
    return argparse.Namespace(**given | more)


def test_a_run_that_came_first_meanwhile_is_not_written_over(tmp_path):
    """Both found the folder empty; the other had it while this one waited."""
    args = settings(tmp_path / "r")
    assert checkpoint.resume_path(args, [], []) is None
    (tmp_path / "r").mkdir()
    for name in ("checkpoint_0000.pth.tar", "log.jsonl"):
        (tmp_path / "r" / name).write_text("the other's")
    with pytest.raises(UserError, match="r: another run has used it meanwhile"):
        checkpoint.prepare_folders(args, [], [], fresh=True)
    survival.unlock()
    assert sorted(os.listdir(tmp_path / "r")) == ["checkpoint_0000.pth.tar", "log.jsonl"]


def test_a_run_restarted_before_its_first_checkpoint_takes_its_own_log_for_its_own(tmp_path):
    args = settings(tmp_path / "r", log_dir=str(tmp_path / "log"))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="log holds the log of another run"):
        checkpoint.resume_path(args, [], [])
    args.restarted = True
    assert checkpoint.resume_path(args, [], []) is None


def test_where_checkpoints_of_before_stopped():
    """They tell the steps, and not those of an epoch; with --steps the last epoch was cut short."""
    found = [
        checkpoint.position({"epoch": 4, **more}, "x", 3) for more in ({"step": 10}, {"step": 12}, {}, {"step": "a"})
    ]
    assert found == [10, 12, 12, 12]


HOLDER = """
import sys, time
from synco import survival
survival.lock(sys.argv[1])
print("held", flush=True)
time.sleep(99)
"""


def test_a_folder_in_use_is_refused_and_a_killed_owner_holds_it_no_longer(data, tmp_path, program, monkeypatch):
    (tmp_path / "r").mkdir()
    lock = survival.lock
    monkeypatch.setattr(survival, "lock", lambda folder: lock(folder, patience=0.5))
    holder = started("-c", HOLDER, tmp_path / "r")
    assert holder.stdout.readline() == "held\n"
    flags = [*SMALL, "--epochs", 1, "--resume", "auto", "--save-dir", tmp_path / "r", data]
    status, _, err = program(*flags)
    assert status == 2 and err.count("\n") == 1
    assert f"--save-dir {tmp_path / 'r'}: another run is using it (process {holder.pid} on " in err
    holder.kill()
    holder.wait()
    status, _, err = program(*flags)
    assert status == 0 and not os.path.exists(tmp_path / "r" / ".lock"), err


# ---------------------------------------------------------------------------------------- numbers, images, workers


def test_the_first_bad_step_and_its_images_are_named(data, tmp_path, program, monkeypatch):
    """A gradient that is not finite while the loss is, between two print steps; noticed at a save."""
    watch = metrics.Finite.watch
    monkeypatch.setattr(
        metrics.Finite, "watch", lambda self, i, loss, norm: watch(self, i, loss, norm / 0 if i == 1 else norm)
    )
    flags = [*SMALL, "--save-dir", tmp_path / "r", data]
    seen = []
    item = loader.TwoCrops.__getitem__
    monkeypatch.setattr(loader.TwoCrops, "__getitem__", lambda self, key: (seen.append(key[1]), item(self, key))[1])
    status, _, err = program(*flags, "-p", 100, "--save-steps", 2)
    assert status == 1 and err.count("\n") == 1
    assert "not finite from step 1 of epoch 0 on (lr 0.03; noticed at step 1)" in err
    report = json.loads((tmp_path / "r" / "nonfinite.json").read_text())
    files = sorted(os.path.join(data, "train", f"c{c}", f"{i}.jpg") for c in range(3) for i in range(8))
    assert report["images"] == [[files[index] for index in seen[8:16]]] and report["step"] == 1
    assert not [name for name in os.listdir(tmp_path / "r") if name.startswith("checkpoint")]


def spoiled(data, folder, names):
    """The data with these images torn: the first before its end, the others within their header."""
    shutil.copytree(data, folder)
    for name in names:
        content = (folder / "train" / name).read_bytes()
        (folder / "train" / name).write_bytes(content[: -len(content) // 8] if name == names[0] else content[:20])
    return folder


@pytest.mark.parametrize("reading", ["-j 0", "-j 2", "-j 1 --cache-images", "-j 1 --augment-on device"])
def test_bad_images_are_replaced_by_the_next_and_listed(data, tmp_path, program, reading):
    bad = spoiled(data, tmp_path / "bad", ["c0/3.jpg", "c0/4.jpg", "c2/7.jpg"])
    mended = tmp_path / "mended"  # the same, with copies of what takes their place
    shutil.copytree(data, mended)
    for name, other in (("c0/3.jpg", "c0/5.jpg"), ("c0/4.jpg", "c0/5.jpg"), ("c2/7.jpg", "c0/0.jpg")):
        shutil.copy(mended / "train" / other, mended / "train" / name)
    flags = [*SMALL, *reading.split(), "--knn-freq", 2, "--save-dir"]
    status, out, err = program(*flags, tmp_path / "a", "--skip-bad-images", 3, bad)
    assert status == 0 and err.count("cannot be read; the next image takes its place") == 3, err
    listed = out.splitlines()[-2]
    assert listed.startswith("3 images could not be read and were replaced: ") and listed.count(".jpg") == 3
    assert program(*flags, tmp_path / "b", mended)[0] == 0
    weights = [torch.load(tmp_path / x / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"] for x in "ab"]
    assert interrupted.unequal(*weights) == []
    status, _, err = program(*flags, tmp_path / "c", "--skip-bad-images", 2, bad)
    assert status == 2 and "--skip-bad-images 2" in err.splitlines()[-1] and ".jpg" in err.splitlines()[-1]


def test_replaced_images_are_known_to_a_run_that_goes_on(data, tmp_path, program, signal_after):
    bad = spoiled(data, tmp_path / "bad", ["c0/3.jpg"])
    flags = [*SMALL, "--skip-bad-images", 1, "--resume", "auto", "--save-dir", tmp_path / "r", bad]
    signal_after(4)
    assert program(*flags)[0] == 75
    assert checkpoint.load(str(tmp_path / "r" / WITHIN))["skipped"] == [3]
    status, out, err = program(*flags)
    assert status == 0 and "1 images could not be read and were replaced: " in out and err == ""


def test_replaced_images_of_other_data_are_no_traceback(data, tmp_path, program):
    bad = spoiled(data, tmp_path / "bad", ["c2/7.jpg"])
    flags = [*SMALL, "--epochs", 1, "--save-dir", tmp_path / "r"]
    assert program(*flags, "--skip-bad-images", 1, bad)[0] == 0
    path = tmp_path / "r" / "checkpoint_0000.pth.tar"
    (bad / "train" / "c2" / "7.jpg").unlink()
    (bad / "train" / "c2" / "6.jpg").unlink()
    status, _, err = program(*flags, "--skip-bad-images", 1, "--resume", path, bad)
    assert status == 2 and err.count("\n") == 1 and "train_images 24 → 22" in err
    content = torch.load(path, weights_only=True)
    content["skipped"] = [24]
    torch.save(content, path)
    status, _, err = program(*flags, "--skip-bad-images", 1, "--resume", path, data)
    assert status == 2 and err.endswith("checkpoint_0000.pth.tar: its list of replaced images is none\n")
    content["skipped"] = [3, 4]
    torch.save(content, path)
    status, _, err = program(*flags, "--skip-bad-images", 1, "--resume", path, data)
    assert status == 2 and "2 images cannot be read, such as " in err and err.endswith("; --skip-bad-images 1\n")


def test_a_data_set_without_any_good_image_ends_however_many_are_allowed(data, tmp_path):
    from synco import datasets

    names = [f"c{c}/{i}.jpg" for c in range(3) for i in range(8)]
    images = datasets.image_folder(spoiled(data, tmp_path / "bad", names), "train")
    with pytest.raises(UserError, match="c0/4.jpg: cannot be read .*; --skip-bad-images 99 allows no more"):
        loader.Reader(images, limit=99).read(5)


def _exchange(rank, folder, at_end):
    from synco import datasets

    images = datasets.image_folder(folder, "train")
    reader = loader.Reader(images, limit=2)
    for index in ((3, 4), (4, 20))[rank]:
        reader.read(index)
    told = reader.news()
    try:
        (reader.tell if at_end else reader.exchange)()
    except UserError as error:
        return told, sorted(reader.known), str(error)
    return told, sorted(reader.known), reader.news()


@pytest.mark.parametrize("at_end", [False, True])
def test_all_processes_count_bad_images_together(data, tmp_path, at_end):
    two = spoiled(data, tmp_path / "two", ["c0/4.jpg", "c2/4.jpg"])
    assert processes(2, _exchange, str(two), at_end) == [(True, [4, 20], False)] * 2
    three = spoiled(data, tmp_path / "three", ["c0/3.jpg", "c0/4.jpg", "c2/4.jpg"])
    for told, known, message in processes(2, _exchange, str(three), at_end):
        assert told and known == [3, 4, 20] and message.startswith("3 images cannot be read, such as ")


@pytest.mark.parametrize("end", ["killed", "stuck"])
def test_a_worker_that_dies_or_is_stuck_is_said_with_its_file(data, tmp_path, program, monkeypatch, end):
    from synco import datasets

    image = datasets.Images.image

    def strange(self, position):
        if self.names[position] == "c1/3.jpg" and torch.utils.data.get_worker_info():
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        return image(self, position)

    monkeypatch.setattr(datasets.Images, "image", strange)
    began = time.monotonic()
    status, _, err = program(*SMALL, "-j", 1, "--worker-timeout", 3, "--save-dir", tmp_path / "r", data)
    assert status == 1 and err.count("\n") == 1 and time.monotonic() - began < 30
    why = "(is killed by signal: Killed|exited unexpectedly)" if end == "killed" else "timed out after 3 seconds"
    assert re.search(why, err) and f"; the workers were reading {data}/train/c1/3.jpg; the run can go on" in err, err


# ------------------------------------------------------------------------------------------------- agreement


def _agree(rank, after):
    """Rank 1 hears a warning before its step `after` → the step in which each process is told to stop."""
    saves = survival.Saves(every=5)
    found = []
    with survival.listening():
        for step in range(1, 12):
            if rank == 1 and step == after:
                os.kill(os.getpid(), signal.SIGTERM)
            due = saves.after(step, at_once=step == 11)
            found.append((due.save, due.stop, due.news))
            if due.stop:
                break
    saves.together()
    return step, found


@pytest.mark.parametrize("after", [1, 4, 11])
def test_all_processes_stop_at_one_step(after):
    (step, found), other = processes(2, _agree, after)
    assert other == (step, found) and step == min(after + 1, 11)
    assert [save for save, _, _ in found[:-1]] == [i % 5 == 0 for i in range(1, step)] and found[-1][:2] == (True, True)


def test_one_process_decides_by_itself():
    saves = survival.Saves(every=2, minutes=0)
    assert [saves.after(step).save for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert saves.after(5, news=True) == survival.Due(news=True)
    saves = survival.Saves(minutes=0.001)
    time.sleep(0.1)
    assert saves.after(1).save
    saves.done()
    assert not saves.after(2).save


def test_averages_go_on_where_they_were():
    values = torch.rand(2, 5, 3)  # processes, steps, names
    undisturbed = values.mean(dim=(0, 1))
    first = []
    for rank in range(2):
        averages = metrics.Averages()
        for step in range(3):
            averages.add(**dict(zip("abc", values[rank, step])))
        first.append(averages)
    states = [torch.stack(list(averages.sums.values())) for averages in first]
    state = first[0].state(lambda mine: states)
    for count in (1, 2):  # processes that go on
        found = []
        for rank in range(count):
            averages = metrics.Averages()
            averages.restore(state, rank, count, "cpu")
            for step in (3, 4):
                averages.add(**dict(zip("abc", values[rank, step] if count == 2 else values[:, step].mean(dim=0))))
            found.append([averages.sums[name] / averages.steps for name in "abc"])
        torch.testing.assert_close(torch.tensor(found).mean(dim=0), undisturbed)


@pytest.mark.parametrize(
    "sums, steps",
    [(torch.ones(1, 1).expand(10**13, 1), 1), (torch.ones(1, 1, 4), 1), (torch.ones(1, 1), -1), (torch.ones(1), 1)],
)
def test_averages_of_no_run_are_refused(sums, steps):
    with pytest.raises(ValueError, match="not the averages of a run"):
        metrics.Averages().restore({"names": ["loss"], "sums": sums, "steps": steps}, 0, 1, "cpu")


def test_ranks_are_told_in_words():
    assert survival.ranks([1]) == "rank 1" and survival.ranks([1, 3]) == "ranks 1, 3"
    assert distributed.from_all("x") == ["x"]
