"""A run from step to step: stopped, killed and starved anywhere, it ends as one that nobody disturbed."""

import errno
import json
import os
import re
import shutil
import signal

import pytest
import torch
import toy
from conftest import cut_at

from benchmarks.survival import differences, unequal
from synco import checkpoint, metrics
from synco.run import Run

WITHIN = "checkpoint_step.pth.tar"
FLAGS = ["--seed", 3, "-p", 2]


@pytest.fixture
def run(programs, data, tmp_path):
    """run(folder in tmp_path, flags ...) runs the toy on the tests' images → (exit status, stdout, stderr)."""
    return lambda folder, *flags: programs("toy", *FLAGS, *flags, "--save-dir", tmp_path / folder, data)


def content(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    """The lines of a run's log without what depends on the clock."""
    timed = ("time", "images_per_second", "data_share")
    lines = metrics.read_log(folder / "log.jsonl")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.fixture
def written(monkeypatch):
    """[(name, step in it)] of each checkpoint that is written, in order."""
    replace, found = os.replace, []

    def watch(source, target):
        replace(source, target)
        if str(target).endswith(".pth.tar"):
            found.append((os.path.basename(target), content(target)["step"]))

    monkeypatch.setattr(os, "replace", watch)
    return found


def full_from(monkeypatch, first, last=10**9):
    """Have the disk be full from the n-th write of a checkpoint on, until the m-th."""
    save, count = torch.save, [0]

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 1000

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


# ------------------------------------------------------------------------------------------------ stopped and killed


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("kind", ["numbered", "one", "best"])
def test_a_warning_after_any_step_changes_nothing_in_the_end(run, tmp_path, signal_after, kind, step):
    """Two epochs of three steps and one of two."""
    flags = [*{"numbered": [], "one": ["--save-freq", 0], "best": ["--save-freq", 0, "--best"]}[kind], "--steps", 8]
    assert run("calm", *flags)[0] == 0
    signal_after(step, signal.SIGUSR1 if step == 2 else signal.SIGTERM)
    status, out, err = run("r", *flags, "--resume", "auto")
    assert (status, err) == (75, "")
    files, ended = (toy.NUMBERED, step % 3 == 0) if kind == "numbered" else (toy.ONE, False)
    name = files.epoch.format(step // 3 - 1) if ended else files.within  # the epoch's own where it ends there
    path = tmp_path / "r" / name
    assert out.splitlines()[-1] == f"Told to stop: {path} holds {step} steps."
    marker = json.loads((tmp_path / "r" / "preempted.json").read_text())
    assert marker == {"signal": "SIGUSR1" if step == 2 else "SIGTERM", "step": step, "checkpoint": name}
    epochs = step // 3 if kind == "numbered" else (step - 1) // 3  # here an epoch ends with its evaluation
    saved = checkpoint.load(str(path))
    assert (saved["epoch"], saved["step"], saved["steps_per_epoch"]) == (epochs, step, 3)

    status, out, err = run("r", *flags, "--resume", "auto")
    assert (status, err) == (0, "")
    rest = step - 3 * epochs
    assert f"resumed            {path}, {epochs} epochs{f' and {rest} steps of the next' * bool(rest)} done\n" in out
    assert differences(str(tmp_path / "calm"), str(tmp_path / "r")) == []
    assert not {files.within, "preempted.json"} & set(os.listdir(tmp_path / "r"))


def test_a_print_step_reads_from_the_device_once(run, tmp_path, monkeypatch):
    """Averages, notes, the scaler's state and whether all was finite; no other step reads."""
    reads, report = [], Run._report

    def counted(name, function):
        def call(tensor, *args):
            reads.append(name)
            return function(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, call)

    def reporting(run, step):
        reads.append("print")
        report(run, step)
        reads.append("done")

    monkeypatch.setattr(Run, "_report", reporting)
    for name in ("tolist", "item", "cpu", "__bool__", "__float__", "__int__"):
        counted(name, getattr(torch.Tensor, name))
    assert run("r", "--epochs", 1)[0] == 0
    prints = [reads[i : reads.index("done", i)] for i, word in enumerate(reads) if word == "print"]
    assert prints == [["print", "cpu"]] * 2
    assert {"loss", "noise", "largest", "lr"} < log_of(tmp_path / "r")[0].keys()


@pytest.mark.parametrize("cut", ["model_best_toy.pth.tar", "checkpoint_toy.pth.tar"])
def test_an_evaluation_is_logged_once_wherever_the_run_was_cut(run, tmp_path, monkeypatch, cut):
    """Saved after the epoch's last step; ended when the evaluation is logged and that name is to be written."""
    flags = ["--save-freq", 0, "--best", "--save-steps", 3, "--resume", "auto"]
    assert run("calm", *flags)[0] == 0
    with monkeypatch.context() as patch:
        cut_at(patch, cut)
        assert run("r", *flags)[0] == 130
    assert [line["kind"] for line in log_of(tmp_path / "r")][-1] == "val"
    status, out, err = run("r", *flags)
    assert status == 0 and "0 epochs and 3 steps of the next done" in out, err
    assert differences(str(tmp_path / "calm"), str(tmp_path / "r")) == []
    lines = [line["epoch"] for line in log_of(tmp_path / "r") if line["kind"] == "val"]
    assert lines == [1, 2, 3]


def test_saves_by_steps_and_by_time(run, tmp_path, written):
    assert run("r", "--epochs", 2, "--save-steps", 2)[0] == 0
    assert written == [(WITHIN, 2), ("checkpoint_0000.pth.tar", 3), (WITHIN, 4), ("checkpoint_0001.pth.tar", 6)]
    assert not os.path.exists(tmp_path / "r" / WITHIN)
    written.clear()
    assert run("r", "--epochs", 2, "--save-minutes", 1e-9, "--save-freq", 2, "--overwrite")[0] == 0
    assert written == [(WITHIN, step) for step in (1, 2, 3, 4, 5)] + [("checkpoint_0001.pth.tar", 6)]
    written.clear()
    assert run("e", "--steps", 7, "--save-freq", 2)[0] == 0  # the last epoch's is written in any case
    assert written == [("checkpoint_0001.pth.tar", 6), ("checkpoint_0002.pth.tar", 7)]


def test_one_checkpoint_too_many_is_removed_at_the_next_start(run, tmp_path, monkeypatch):
    """Killed after the last checkpoint was written, and before those that it replaces were removed."""
    flags = ["--keep", 2, "--save-steps", 2, "--resume", "auto"]
    remove = os.remove

    def stay(path):
        if str(path).endswith("checkpoint_0000.pth.tar"):
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", stay)
        assert run("r", *flags)[0] == 130
    held = [f"checkpoint_{i:04}.pth.tar" for i in range(3)]
    assert set(held) <= set(os.listdir(tmp_path / "r"))
    status, out, _ = run("r", *flags)  # which has nothing left to do
    assert status == 0 and "3 epochs done" in out
    assert sorted(name for name in os.listdir(tmp_path / "r") if name.endswith("tar")) == held[1:]


def test_a_damaged_checkpoint_of_a_higher_number_is_no_reason_to_remove_a_good_one(run, tmp_path):
    flags = ["--keep", 1, "--resume", "auto"]
    assert run("r", "--epochs", 1, *flags)[0] == 0
    (tmp_path / "r" / "checkpoint_0007.pth.tar").write_bytes(b"damaged")
    status, _, err = run("r", *flags, "--force-resume")
    assert status == 0 and err.count("\n") == 1 and "checkpoint_0007.pth.tar: not a " in err
    held = sorted(name for name in os.listdir(tmp_path / "r") if name.endswith("tar"))
    assert held == ["checkpoint_0002.pth.tar", "checkpoint_0007.pth.tar"]
    assert content(tmp_path / "r" / held[0])["epoch"] == 3


def test_what_a_kill_has_left_is_removed_at_the_next_start(run, tmp_path):
    """Half-written files of a run's own names, and none that could be somebody's."""
    assert run("r", "--save-freq", 0, "--epochs", 1)[0] == 0
    own = ["checkpoint_toy.pth.tar", "checkpoint_toy_step.pth.tar", "model_best_toy.pth.tar", "result.json"]
    own += ["config.json", "preempted.json", "nonfinite.json"]
    for name in own:
        (tmp_path / "r" / f"{name}.0123abcd.tmp").write_bytes(b"half")
    others = ["config.json.tmp", "config.json.backup00.tmp.gz", "mine.0123abcd.tmp", "checkpoint.0123abcd.tmp"]
    for name in others:
        (tmp_path / "r" / name).write_bytes(b"mine")
    assert run("r", "--save-freq", 0, "--resume", "auto", "--force-resume")[0] == 0
    assert sorted(name for name in os.listdir(tmp_path / "r") if ".tmp" in name) == sorted(others)


# --------------------------------------------------------------------------------------------- disks, numbers, images


def test_a_full_disk_does_not_end_a_run(run, tmp_path, monkeypatch):
    assert run("calm", "--epochs", 2)[0] == 0
    flags = ["--epochs", 2, "--save-steps", 1]
    with monkeypatch.context() as patch:
        full_from(patch, first=2, last=4)  # all that follows the first checkpoint, but for the last epoch's
        status, _, err = run("r", *flags)
    assert status == 0 and err.count("cannot be written (No space left on device)") == 3 and err.count("\n") == 3
    assert content(tmp_path / "r" / "checkpoint_0001.pth.tar")["step"] == 6

    shutil.rmtree(tmp_path / "r")
    with monkeypatch.context() as patch:
        full_from(patch, first=5)
        status, out, err = run("r", *flags)
    assert status == 1 and err.splitlines()[-1].startswith("toy.py: error: ") and "Epoch 1 [3/3]" in out
    assert "checkpoint_0001.pth.tar: cannot be written (No space left" in err.splitlines()[-1]
    left = checkpoint.load(str(tmp_path / "r" / WITHIN))
    assert left["step"] == 4 and not [name for name in os.listdir(tmp_path / "r") if name.endswith(".tmp")]
    assert run("r", *flags, "--resume", "auto")[0] == 0
    assert differences(str(tmp_path / "calm"), str(tmp_path / "r")) == []


def test_a_run_that_is_told_to_stop_and_cannot_save_fails(run, tmp_path, monkeypatch, signal_after):
    """75 would say that nothing is lost."""
    with monkeypatch.context() as patch:
        full_from(patch, first=1)
        signal_after(2)
        status, out, err = run("r")
    assert status == 1 and f"{WITHIN}: cannot be written (No space left" in err and "Told to stop" not in out
    assert not (tmp_path / "r" / "preempted.json").exists()


def test_the_first_bad_step_and_its_images_are_named(run, data, tmp_path, monkeypatch):
    """A gradient that is not finite while the loss is, between two print steps; noticed at a save."""
    loss_of = toy.loss_of

    def spoiled(logits, labels, step):
        more = (logits.sum() * 0).sqrt() if step.i == 1 else 0.0  # 0, with a slope that is none
        return loss_of(logits, labels, step) + more

    monkeypatch.setattr(toy, "loss_of", spoiled)
    status, _, err = run("r", "-p", 100, "--save-steps", 2)
    assert status == 1 and err.count("\n") == 1
    assert "not finite from step 1 of epoch 0 on (lr 0.1; noticed at step 1)" in err
    assert err.endswith(f"its images: {tmp_path}/r/nonfinite.json; last good checkpoint: none\n")
    report = json.loads((tmp_path / "r" / "nonfinite.json").read_text())
    assert report["step"] == 1 and len(report["images"]) == 1 and len(set(report["images"][0])) == 8
    every = {os.path.join(data, "train", f"c{c}", f"{i}.jpg") for c in range(3) for i in range(8)}
    assert set(report["images"][0]) < every
    assert not [name for name in os.listdir(tmp_path / "r") if name.startswith("checkpoint")]


def test_the_images_of_a_step_are_those_of_its_report(run, tmp_path, monkeypatch, capsys):
    """The file names those that step 1 of epoch 1 read."""
    from synco import datasets

    seen, image = [], datasets.Images.image
    monkeypatch.setattr(
        datasets.Images, "image", lambda self, position: (seen.append(self.where(position)), image(self, position))[1]
    )
    monkeypatch.setattr(toy, "loss_of", lambda logits, *_: logits.sum() * (torch.nan if len(seen) > 32 else 1))
    status, _, err = run("r", "-p", 100, "--save-steps", 2)
    assert status == 1 and "not finite from step 1 of epoch 1 on" in err, err
    assert json.loads((tmp_path / "r" / "nonfinite.json").read_text())["images"] == [seen[32:40]]


# ------------------------------------------------------------------------------------------------- what is told


def test_print_steps_and_their_averages(run, tmp_path, monkeypatch):
    """Every third step and the last of an epoch; the average is of all steps since, the note of the step itself."""
    losses, loss_of = [], toy.loss_of

    def watched(*given):
        losses.append(loss_of(*given))
        return losses[-1]

    monkeypatch.setattr(toy, "loss_of", watched)
    status, out, err = run("r", "-b", 5, "-p", 3, "--epochs", 2)
    assert (status, err) == (0, "")
    told = [line for line in out.splitlines() if line.startswith("Epoch")]
    pattern = r"Epoch {} \[{}/4\]  loss \d+\.\d{{4}}  \d+ images/s  data \d+%  ETA \d:\d\d:\d\d"
    for line, (epoch, done) in zip(told, [(0, 1), (0, 4), (1, 1), (1, 4)], strict=True):
        assert re.fullmatch(pattern.format(epoch, done), line)
    lines = log_of(tmp_path / "r")
    assert [(line["kind"], line["epoch"], line["step"]) for line in lines] == [
        ("train", 0, 1), ("train", 0, 4), ("train", 1, 5), ("train", 1, 8)
    ]  # fmt: skip
    means = [torch.stack(losses[a:b]).mean().item() for a, b in ((0, 1), (1, 4), (4, 5), (5, 8))]
    assert [line["loss"] for line in lines] == pytest.approx(means)
    assert all({"lr", "noise", "largest"} <= line.keys() for line in lines)
    for fact in ("network            linear", "device             cpu", "world size         1", "batch per process  5",
                 "global batch       5", "steps per epoch    4", "seed               3"):  # fmt: skip
        assert f"{fact}\n" in out
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["network"], config["seed"], config["global_batch"], config["epochs"]) == ("linear", 3, 5, 2)
    assert config["command"].startswith("toy.py --seed 3") and config["versions"]["torch"] == torch.__version__


def test_the_draws_of_a_step_do_not_depend_on_those_before(run, tmp_path):
    """What the network draws, here its dropout and the number beside it, is a function of seed and step."""
    assert run("a", "-p", 1)[0] == run("b", "-p", 1, "--start-epoch", 1)[0] == 0
    noise = [[line["noise"] for line in log_of(tmp_path / name)] for name in "ab"]
    assert noise[0][3:] == noise[1] and len(set(noise[0])) == 9


def test_a_finished_run_is_left_as_it_is(run, tmp_path):
    assert run("r")[0] == 0
    before = {name: (tmp_path / "r" / name).read_bytes() for name in ("config.json", "checkpoint_0002.pth.tar")}
    status, out, _ = run("r", "--resume", "auto", "-p", 1)
    assert status == 0 and "3 epochs done" in out and "Epoch" not in out
    assert {name: (tmp_path / "r" / name).read_bytes() for name in before} == before


def test_a_seed_is_drawn_and_stored_when_none_is_given(programs, data, tmp_path):
    seeds = []
    for name in "ab":
        assert programs("toy", "--epochs", 1, "--save-dir", tmp_path / name, data)[0] == 0
        seeds.append(json.loads((tmp_path / name / "config.json").read_text())["seed"])
    assert seeds[0] != seeds[1]
    assert programs("toy", "--epochs", 1, "--seed", seeds[0], "--save-dir", tmp_path / "c", data)[0] == 0
    states = [content(tmp_path / name / "checkpoint_0000.pth.tar")["state_dict"] for name in "ac"]
    assert unequal(*states) == []


# ------------------------------------------------------------------------------------------------ what is gone on from


def test_what_may_change_and_what_may_not(run, data, tmp_path, programs):
    """Identity never, the schedule with --force-resume, the rest at will."""
    assert run("calm")[0] == 0
    path = tmp_path / "calm" / "checkpoint_0001.pth.tar"

    def settings(*flags, status=2):
        found, out, err = run("r", "--resume", path, *flags)
        assert found == status, err
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        if status == 0:
            return "".join(line[19:] for line in out.splitlines() if line.startswith("changed "))
        assert err.count("\n") == 1
        return err.partition("is of a run with other settings: ")[2].strip()

    assert settings("--lr", 1, "--img-size", 48) == ("img_size None → 48; lr 0.1 → 1.0 (--force-resume lets lr change)")
    assert settings("--img-size", 48, "--force-resume") == "img_size None → 48"
    assert settings("-b", 4) == "global_batch 8 → 4"
    assert settings("--epochs", 4) == "epochs 3 → 4 (--force-resume lets epochs change)"
    assert settings("--epochs", 4, "--lr", 1, "--force-resume", status=0) == "epochs 3 → 4; lr 0.1 → 1.0"
    free = "-p 1 --save-freq 2 --keep 1 --save-steps 1 --worker-timeout 60 --peer-timeout 9 --skip-bad-images 2"
    assert settings(*free.split(), status=0) == ""
    refused = run("r", "--seed", 4, "--resume", path)
    assert refused[0] == 2 and f"--seed 4: {path} was run with seed 3; leave --seed out to go on" in refused[2]

    shutil.copytree(data, tmp_path / "moved")  # the same images in another place are the same
    moved = ["toy", *FLAGS, "--resume", path, "--save-dir", tmp_path / "r", tmp_path / "moved"]
    assert programs(*moved)[0] == 0
    shutil.rmtree(tmp_path / "r")
    image = min((tmp_path / "moved" / "train").glob("*/*"))
    image.rename(image.with_name(f"another-{image.name}"))
    assert programs(*moved)[2].endswith("other settings: other training images (by their names)\n")
    image.with_name(f"another-{image.name}").unlink()
    assert programs(*moved)[2].endswith("other settings: train_images 24 → 23\n")
    assert not (tmp_path / "r").exists()


def hostile(change):
    def apply(saved):
        saved.update(change)

    return apply


HOSTILE = {
    "its optimizer state does not fit": lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(2)),
    "its optimizer state does not fit (momentum_buffer 1 has": lambda c: c["optimizer"]["state"][1].update(
        momentum_buffer=torch.ones(1).expand(10**6, 10**6)
    ),
    "momentum_buffer 0 holds values that are not finite": lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(
        float("nan")
    ),
    "2.bias holds values that are not finite": lambda c: c["state_dict"]["module.2.bias"].fill_(float("inf")),
    "2.bias is a tensor of torch.complex64": lambda c: c["state_dict"].update(
        {"module.2.bias": torch.ones(3, dtype=torch.complex64)}
    ),
    "does not fit this model (dim, K, mlp?): missing: 2.bias": lambda c: c["state_dict"].pop("module.2.bias"),
    "its epoch is 'one', not a number of epochs done": hostile({"epoch": "one"}),
    "its epoch is -1, not a number of epochs done": hostile({"epoch": -1}),
    "its step is 'x' after 1 epochs of 3 steps": hostile({"step": "x"}),
    "its step is 99 after 1 epochs of 3 steps": hostile({"step": 99}),
    "was stopped within an epoch of 4 steps; here an epoch has 3": hostile({"step": 5, "steps_per_epoch": 4}),
    "holds 9 epochs and --epochs is 3": hostile({"epoch": 9, "step": 27}),
    "its averages are not the averages of a run": hostile({"averages": {"names": ["a"], "sums": 3, "steps": 1}}),
    "its list of replaced images is none": hostile({"skipped": [-1]}),
    "not a toy checkpoint that can be resumed: it has no optimizer": lambda c: c.pop("optimizer"),
    "is a checkpoint of 'vgg11'; --arch is 'resnet50'": hostile({"arch": "vgg11"}),
    "is of a run with other settings: lr tensor(": lambda c: c["config"].update(lr=torch.ones(2)),
}


def test_what_is_read_is_checked_before_it_is_used(run, tmp_path):
    assert run("calm", "--epochs", 3)[0] == 0
    for message, change in HOSTILE.items():
        saved = content(tmp_path / "calm" / "checkpoint_0000.pth.tar")
        change(saved)
        torch.save(saved, tmp_path / "x.pth.tar")
        status, out, err = run("r", "--resume", tmp_path / "x.pth.tar")
        assert status == 2 and err.count("\n") == 1 and f"x.pth.tar: {message}" in err, err
        assert not os.path.exists(tmp_path / "r")


def test_resume_auto_falls_back_to_the_newest_whole_checkpoint(run, tmp_path):
    """Past a damaged file, a folder and a link that leads nowhere; and does not start anew where none is whole."""
    assert run("calm")[0] == 0
    shutil.copytree(tmp_path / "calm", tmp_path / "r")
    for number, spoil in (
        (2, lambda p: p.write_bytes(p.read_bytes()[:-50])),
        (7, os.mkdir),
        (8, lambda p: p.symlink_to("none")),
    ):
        spoil(tmp_path / "r" / f"checkpoint_{number:04}.pth.tar")
    status, out, err = run("r", "--resume", tmp_path / "r" / "checkpoint_0008.pth.tar")
    assert status == 2 and "checkpoint_0008.pth.tar: no such checkpoint file" in err
    status, out, err = run("r", "--resume", "auto")
    assert status == 0 and "checkpoint_0001.pth.tar, 2 epochs done" in out
    why = [
        "0008.pth.tar: no such checkpoint file",
        "0007.pth.tar: is not a file",
        "0002.pth.tar: not a whole checkpoint file",
    ]
    for line, reason in zip(err.splitlines(), why, strict=True):
        assert line.startswith("toy.py: warning: ") and reason in line
        assert line.endswith(f"; going on from {tmp_path / 'r' / 'checkpoint_0001.pth.tar'}")
    saved = [content(tmp_path / name / "checkpoint_0002.pth.tar") for name in ("calm", "r")]
    assert [x for x in unequal(*saved) if not x.startswith("config.")] == []

    for number in range(3):
        (tmp_path / "r" / f"checkpoint_{number:04}.pth.tar").write_bytes(b"damaged")
    before = (tmp_path / "r" / "log.jsonl").read_bytes()
    status, _, err = run("r", "--resume", "auto")
    assert status == 2 and f"--resume auto: no checkpoint in {tmp_path / 'r'} is whole, the newest: " in err
    assert (tmp_path / "r" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"], ["--overwrite"]])
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoint_0000.pth.tar"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_of_a_files_name_is_one_line(run, tmp_path, name, flags, begun):
    """In a folder of nobody's, and in one that holds a run."""
    if begun:
        assert run("r", "--epochs", 2)[0] == 0
        os.remove(tmp_path / "r" / name)
    (tmp_path / "r" / name).mkdir(parents=True)
    (tmp_path / "r" / name / "mine").write_text("mine")
    status, _, err = run("r", "--epochs", 2, *flags)
    assert (tmp_path / "r" / name / "mine").read_text() == "mine"
    if begun and flags == ["--resume", "auto"] and name.startswith("checkpoint"):
        assert status == 0  # the newer one is whole
    else:
        assert status == 2 and err.count("\n") == 1, err
        assert name in err or begun and not flags and "holds another run (checkpoint_0001.pth.tar)" in err


def test_a_run_that_never_saved_does_not_stand_in_the_way(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_at(patch, "checkpoint_0000.pth.tar")
        assert run("r")[0] == 130
    assert {"config.json", "log.jsonl"} <= set(os.listdir(tmp_path / "r"))
    status, out, err = run("r", "--epochs", 2)
    assert (status, err) == (0, "") and "resumed" not in out
    assert [line["step"] for line in log_of(tmp_path / "r")] == [1, 3, 4, 6]


def test_a_path_that_lies_elsewhere_is_gone_on_from_in_a_new_folder(run, tmp_path):
    """A classifier's best and results go along, since there is one file for all epochs."""
    assert run("calm", "--save-freq", 0, "--best")[0] == 0
    shutil.copytree(tmp_path / "calm", tmp_path / "old")
    for name in ("checkpoint_toy.pth.tar", "model_best_toy.pth.tar"):
        saved = content(tmp_path / "old" / name)
        torch.save(saved | {"best": ["marked"]}, tmp_path / "old" / name)
    (tmp_path / "old" / "result.json").write_text("of the old run")
    status, out, _ = run("new", "--save-freq", 0, "--resume", tmp_path / "old" / "checkpoint_toy.pth.tar")
    assert status == 0 and "3 epochs done" in out
    for name in ("checkpoint_toy.pth.tar", "model_best_toy.pth.tar", "result.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
