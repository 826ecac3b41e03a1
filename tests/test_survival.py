"""Runs that are stopped, killed, starved and lied to: how they end, beside runs that nobody disturbed."""

import collections
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCH, ROOT, SMALL, left_behind, processes, program_of, start_ranks, without_launcher

from benchmarks import survival as interrupted
from synco import checkpoint, files, loader, metrics
from synco.errors import UserError

WITHIN = "checkpoint_step.pth.tar"
TRIAL = f"-a {ARCH} --img-size 32 -j 0 -b 4 --epochs 2 --seed 3 -p 3".split()
PROBE = [*TRIAL, "--lr", "1", "--schedule", "1"]
TUNING = [*TRIAL, "--weights", "finetune", "--lr-backbone", "0.02", "--lr-classifier", "0.2"]


@pytest.fixture(scope="module")
def calm(undisturbed):
    """The undisturbed pretraining's folder."""
    folder, run = undisturbed
    assert run.returncode == 0, run.stderr
    return str(folder)


@pytest.mark.parametrize("steps", [2, 3])  # test_run.py has them all
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


@pytest.fixture(scope="module")
def calm_trials(tmp_path_factory):
    """{name of the program: folder of an undisturbed run}, as the tests have run them."""
    return collections.defaultdict(lambda: tmp_path_factory.mktemp("calm") / "r")


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("name, flags", [("main_lincls", PROBE), ("main_semisup", TUNING)])
def test_a_trial_stops_and_goes_on(data, pretrained, tmp_path, calm_trials, programs, signal_after, name, flags, steps):
    """Six steps an epoch: within the first, and at its end, where it is not yet validated."""
    flags = [*flags, "--pretrained", pretrained, "--resume", "auto", data, "--save-dir"]
    calm = calm_trials[name]
    assert calm.exists() or programs(name, *flags, calm)[0] == 0
    signal_after(steps)
    status, out, err = programs(name, *flags, tmp_path / "r")
    kind = name.removeprefix("main_")
    assert status == 75 and f"checkpoint_{kind}_step.pth.tar holds {steps} steps." in out, err
    status, out, err = programs(name, *flags, tmp_path / "r")
    assert status == 0 and f"0 epochs and {steps} steps of the next done" in out, err
    assert interrupted.differences(str(calm), str(tmp_path / "r")) == []
    for result in ("result.json", "per_class.csv"):
        texts = [(place / result).read_text() for place in (calm, tmp_path / "r")]
        assert len({re.sub('"command".*', "", text) for text in texts}) == 1


# ------------------------------------------------------------------------------------- several processes, real ends


def flags_of(place, folder):
    """The flags of a pretraining in this folder that goes on by itself, as two processes have them from a launcher."""
    return interrupted.words("pretraining", str(place / "data"), str(folder))[2:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of 60 images, with an undisturbed run of two gloo processes on it → the folder of both."""
    folder = tmp_path_factory.mktemp("several")
    interrupted.make_data(str(folder / "data"), each=20)
    statuses, _, err = program_of(2, "main_synco", *flags_of(folder, folder / "calm"))
    assert statuses == [0, 0], err
    return folder


def wait_for(path, *running):
    """Until this file is there, which these processes write."""
    while not os.path.exists(path):
        assert {one.poll() for one in running} == {None}
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(place):
    """The same, as SIGKILL to both and their workers leaves it, while they write their first checkpoints → folder."""
    ranks = start_ranks(2, "main_synco", *flags_of(place, place / "killed"))
    wait_for(place / "killed" / WITHIN, *ranks)
    for one in ranks:
        os.killpg(one.pid, signal.SIGKILL)
    for one in ranks:
        one.communicate()
        assert one.returncode == -signal.SIGKILL
    return place / "killed"


def test_two_processes_killed_and_warned_end_identical(place, killed):
    """After the SIGKILL a SIGTERM, to the launcher and all its processes, as schedulers do."""
    folder, printed = str(place / "r"), place / "r.txt"
    shutil.copytree(killed, folder)
    run = interrupted.start(interrupted.words("pretraining", str(place / "data"), folder, 2), printed)
    while "Epoch" not in printed.read_text().rpartition("resumed")[2]:
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 75 and "resumed  " in printed.read_text()
    assert left_behind(folder, run.pid) == []
    statuses, _, err = program_of(2, "main_synco", *flags_of(place, folder))
    assert statuses == [0, 0] and interrupted.differences(str(place / "calm"), folder) == [], err


def ranks_of(run, folder):
    """{rank: process id} of the processes that torchrun has started."""
    ranks = [pid for pid in interrupted.left_behind(folder) if interrupted.state(pid)[1] == run.pid]
    texts = {pid: pathlib.Path(f"/proc/{pid}/environ").read_bytes() for pid in ranks}
    return {rank: pid for rank in range(2) for pid in ranks if b"\0RANK=%d\0" % rank in texts[pid]}


def test_torchrun_restarts_a_run_whose_rank_was_killed_but_none_that_was_preempted(place):
    """Without --resume auto: that the folder holds this very run, torchrun's own store tells."""
    folder, printed = str(place / "restarted"), place / "restarted.txt"
    words = interrupted.words("pretraining", str(place / "data"), folder, 2, torchrun=True)
    words.remove("--resume")
    words.remove("auto")
    words[words.index("--max-restarts") + 1] = "2"  # one after the kill, one that shall not go on
    run = interrupted.start(words, printed)
    wait_for(os.path.join(folder, WITHIN), run)
    first = ranks_of(run, folder)
    os.kill(first[1], signal.SIGKILL)
    while "Epoch" not in printed.read_text().partition("resumed  ")[2]:
        assert run.poll() is None
        time.sleep(0.01)
    second = ranks_of(run, folder)
    assert first.keys() == second.keys() == {0, 1} and not set(first.values()) & set(second.values())
    os.kill(second[1], signal.SIGUSR1)
    assert run.wait(120) == 1
    out = printed.read_text()
    assert "exitcode  : 75" in out and "Told to stop: " in out and out.count("resumed  ") == 1
    marker = json.loads((place / "restarted" / "preempted.json").read_text())
    assert marker["step"] > 0 and marker["signal"] == "SIGUSR1"  # which rank 0 has not heard itself
    statuses, _, err = program_of(2, "main_synco", *flags_of(place, folder))
    assert statuses == [0, 0] and interrupted.differences(str(place / "calm"), folder) == [], err


def started(path, *flags):
    env = without_launcher() | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- processes, loading workers


def test_another_number_of_processes_goes_on_with_the_images_that_are_left(place, killed, tmp_path, program):
    """Of a checkpoint of two processes within an epoch: allowed, and said, if a step still takes as many images."""
    folder = str(tmp_path / "r")
    shutil.copytree(killed, folder)
    flags = flags_of(place, folder)
    status, out, err = program(*flags)
    assert status == 0, err
    assert "processes          2 → 1: the same images in each step, but not the same numbers" in out
    assert "steps of the next done" in out or "checkpoint_0000" in out
    steps = [line["step"] for line in metrics.read_log(os.path.join(folder, "log.jsonl")) if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 2 * (60 // 8)
    status, _, err = program(*flags, "-b", 4)
    assert status == 2 and "global_batch 8 → 4" in err


HOLDER = """
import sys, time
from synco import files
lock = files.FolderLock(sys.argv[1])
print("held", flush=True)
time.sleep(99)
"""


def test_a_folder_in_use_is_refused_and_a_killed_owner_holds_it_no_longer(data, tmp_path, program, monkeypatch):
    (tmp_path / "r").mkdir()
    monkeypatch.setattr(files, "FolderLock", functools.partial(files.FolderLock, patience=0.5))
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
    told = reader.found_unreadable()
    try:
        (reader.report_unreadable if at_end else reader.share_unreadable)()
    except UserError as error:
        return told, sorted(reader.unreadable), str(error)
    return told, sorted(reader.unreadable), reader.found_unreadable()


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
