"""The program as a user runs it: whole runs, resumed runs, several processes, and bad input."""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ARCH, SMALL, cut_at, free_port, make_images, program_of, script

import main_synco
from synco import checkpoint, metrics
from synco.errors import UserError


def final(folder, epoch=1):
    return checkpoint.load(os.path.join(folder, f"checkpoint_{epoch:04d}.pth.tar"))


def numbered(folder):
    """[(number, path)] of the checkpoints of epochs, oldest first."""
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(r"checkpoint_\d{4}\.pth\.tar", name))
    return [(int(name[11:15]), os.path.join(folder, name)) for name in names]


def equal(a, b):
    """Two checkpoints hold the same weights, queue and optimiser, bit for bit."""
    assert a["state_dict"].keys() == b["state_dict"].keys()
    same = all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    momentum = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values())
    return same and all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in momentum)


def test_a_run(undisturbed, data):
    folder, run = undisturbed
    assert run.returncode == 0 and run.stderr == ""
    for fact in (
        "SynCo: 14 synthetic negatives a query (4 interpolated, 3 extrapolated, 2 mixed, 2 noisy, 2 perturbed, "
        "1 adversarial), made from the 16 hardest of 64 queue rows, from epoch 1 on",
        "device             cpu",
        "world size         1",
        "batch per process  8",
        "global batch       8",
        "steps per epoch    3",
        "seed               3",
    ):
        assert fact in run.stdout
    lines = [line for line in run.stdout.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 4  # two print steps in each epoch of three steps
    pattern = r"Epoch 1 \[3/3\]  loss \d+\.\d+  acc@1 .* images/s  data \d+%  ETA 0:0\d:\d\d"
    assert re.fullmatch(pattern, lines[-1])
    knn = [line for line in run.stdout.splitlines() if line.startswith("kNN after")]
    assert [line[:18] for line in knn] == ["kNN after 0 epochs", "kNN after 1 epochs", "kNN after 2 epochs"]
    assert all(re.fullmatch(r"kNN after . epochs: \d+\.\d\d % \(projection \d+\.\d\d %\)", line) for line in knn)

    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 3 and config["global_batch"] == 8 and config["method"].startswith("SynCo")
    assert (
        config["command"].startswith("main_synco.py -a shufflenet") and config["versions"]["torch"] == torch.__version__
    )
    content = final(folder)
    assert content["epoch"] == 2 and content["arch"] == "shufflenet_v2_x0_5" and content["step"] == 6
    assert all(name.startswith("module.") for name in content["state_dict"])
    assert sorted(os.path.basename(path) for _, path in numbered(str(folder))) == [
        "checkpoint_0000.pth.tar",
        "checkpoint_0001.pth.tar",
    ]
    assert content["state_dict"]["module.queue_ptr"].item() == 6 * 8 % 64


def test_the_log_shows_what_makes_a_negative_hard(undisturbed):
    folder, _ = undisturbed
    lines = metrics.read_log(folder / "log.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("knn", 0), ("train", 1), ("train", 3), ("knn", 3), ("train", 4), ("train", 6), ("knn", 6)
    ]  # fmt: skip
    before, after = lines[1], lines[-2]
    kinds = {"interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial"}
    assert {name.split("/")[1] for name in before if "/" in name} == {"positive", "queue", "hardest"}
    assert {name.split("/")[1] for name in after if "/" in name} == {"positive", "queue", "hardest"} | kinds
    assert {"loss", "acc1", "acc5", "acc1_real", "lr", "images_per_second", "data_share"} <= set(after)
    assert after["similarity/interpolated"] > after["similarity/hardest"] > after["similarity/queue"]
    assert math.isclose(sum(after[f"mass/{name}"] for name in kinds | {"positive", "queue"}), 1, abs_tol=1e-4)
    assert math.isclose(sum(after[f"gradient/{name}"] for name in kinds | {"positive", "queue"}), 1, abs_tol=1e-4)
    for what in ("leakage", "cosine"):
        assert {name for name in after if name.startswith(what)} == {f"{what}/{kind}" for kind in kinds}
    for what in ("own_class", "own_image"):  # of the first step's queue no image is known
        assert {name for name in after if name.startswith(what)} == {
            f"{what}/{k}" for k in kinds | {"queue", "hardest"}
        }
        assert not [name for name in before if name.startswith(what)]
    assert 0 < after["own_class/queue"] < 1 and 0 <= after["own_image/queue"] < 2 / 24

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/lr", "knn/top1", "train/mass/noisy"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["pairs"]
    last = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert {e.step: pytest.approx(e.value) for e in board.Scalars("train/loss")} == last


def test_loss_and_learning_rate_are_the_recipes(undisturbed):
    folder, _ = undisturbed
    rates = {line["epoch"]: line["lr"] for line in metrics.read_log(folder / "log.jsonl") if line["kind"] == "train"}
    assert rates == {0: 0.03, 1: pytest.approx(0.015)}

    args = recipe()
    rates = [main_synco.learning_rate(7 * epoch, 7, args) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    args.cos = True
    rates = [main_synco.learning_rate(7 * epoch + 6, 7, args) for epoch in (0, 100, 150)]  # the same in a whole epoch
    assert rates == pytest.approx([0.03, 0.015, 0.0043934], rel=1e-4)


def recipe(**settings):
    """The flags that `learning_rate` looks at, at their defaults."""
    defaults = {"lr": 0.03, "cos": False, "schedule": [120, 160], "epochs": 200, "steps": None, "lr_min": 0.0}
    return argparse.Namespace(**defaults | {"lr_warmup_epochs": 0, "lr_warmup": 0.0} | settings)


def test_a_warm_up_is_linear_and_the_cosine_takes_the_rest():
    """A published trainer's: 2.5e-7 to 2e-4 in 2,500 steps, then a cosine to 2.5e-6 at 25,000."""
    args = recipe(lr=2e-4, cos=True, steps=25_000, lr_min=2.5e-6, lr_warmup_epochs="2500s", lr_warmup=2.5e-7)
    rates = [main_synco.learning_rate(done, 382, args) for done in (0, 1250, 2500, 13_750, 25_000)]
    assert rates == pytest.approx([2.5e-7, 1.00125e-4, 2e-4, 1.0125e-4, 2.5e-6])
    args = recipe(cos=True, epochs=11, lr_warmup_epochs=1)  # in epochs: a step of the cosine an epoch, as MoCo's
    rates = [main_synco.learning_rate(done, 10, args) for done in (0, 5, 10, 19, 60, 109)]
    expected = [0.03 * 0.5 * (1 + np.cos(np.pi * part)) for part in (0, 0, 0.5, 0.9)]
    assert rates == pytest.approx([0, 0.015, *expected])


def test_the_number_of_workers_does_not_change_a_bit(undisturbed, data, tmp_path, program):
    folder, _ = undisturbed
    status, _, err = program(*SMALL, "-j", 2, "--save-dir", tmp_path / "r", data)
    assert status == 0, err
    assert equal(final(folder), final(tmp_path / "r"))


def test_an_interrupted_run_ends_bit_identical(undisturbed, data, tmp_path, program):
    folder, _ = undisturbed
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    os.remove(again / "checkpoint_0001.pth.tar")
    status, out, err = program(*SMALL, "--knn-freq", 1, "--resume", "auto", "--save-dir", again, data)
    assert status == 0 and "checkpoint_0000.pth.tar, 1 epochs done" in out, err
    assert equal(final(folder), final(again))

    def numbers(path):
        timed = ("time", "images_per_second", "data_share")
        return [{k: v for k, v in line.items() if k not in timed} for line in metrics.read_log(path / "log.jsonl")]

    assert numbers(again) == numbers(folder)  # each step once


def test_resume_from_a_path_and_of_a_finished_run(undisturbed, data, tmp_path, program):
    folder, _ = undisturbed
    path = folder / "checkpoint_0000.pth.tar"
    status, out, _ = program(*SMALL[:-4], "-p", 2, "--resume", path, "--save-dir", tmp_path / "r", data)  # no --seed
    assert status == 0 and "seed               3" in out
    assert equal(final(folder), final(tmp_path / "r"))
    before = (tmp_path / "r" / "checkpoint_0001.pth.tar").read_bytes()
    status, out, _ = program(*SMALL, "--resume", "auto", "--save-dir", tmp_path / "r", data)
    assert status == 0 and "2 epochs done" in out and "Epoch" not in out
    assert (tmp_path / "r" / "checkpoint_0001.pth.tar").read_bytes() == before
    flags = [*SMALL, "--resume", "auto", "--lr", 0.5, "--epochs", 3, "--save-dir", tmp_path / "r", data]
    refused(program(*flags), "settings: epochs 2 → 3; lr 0.03 → 0.5 (--force-resume lets epochs, lr change)")
    status, out, _ = program(*flags, "--force-resume")
    assert status == 0 and "changed            epochs 2 → 3; lr 0.03 → 0.5" in out


def test_resume_auto_in_an_empty_folder_starts_afresh(data, tmp_path, program):
    status, out, _ = program(*SMALL, "--epochs", 1, "--resume", "auto", "--save-dir", tmp_path / "new", data)
    assert status == 0 and "resumed" not in out and os.path.exists(tmp_path / "new" / "checkpoint_0000.pth.tar")


def test_another_runs_folder_is_left_alone(undisturbed, data, tmp_path, program):
    folder = tmp_path / "r"
    shutil.copytree(undisturbed[0], folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    status, _, err = program(*SMALL, "--save-dir", folder, data)
    assert status == 2 and f"--save-dir {folder} holds another run (checkpoint_0001.pth.tar): --resume auto" in err
    outside = tmp_path / "outside.pth.tar"
    shutil.copy(folder / "checkpoint_0000.pth.tar", outside)
    assert program(*SMALL, "--resume", outside, "--save-dir", folder, data)[0] == 2
    inside = folder / "checkpoint_0000.pth.tar"
    status, _, err = program(*SMALL, "--resume", inside, "--overwrite", "--save-dir", folder, data)
    assert status == 2 and "--overwrite would remove" in err
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before

    status, _, err = program(*SMALL, "--epochs", 1, "--overwrite", "--save-dir", folder, data)
    assert status == 0, err
    assert [number for number, _ in numbered(str(folder))] == [0]
    assert {line["step"] for line in metrics.read_log(folder / "log.jsonl")} == {1, 3}


def test_save_freq_and_keep(data, tmp_path, program):
    flags = [*SMALL, "--epochs", 5]
    assert program(*flags, "--save-freq", 2, "--save-dir", tmp_path / "a", data)[0] == 0
    assert [number for number, _ in numbered(str(tmp_path / "a"))] == [1, 3, 4]
    status, _, _ = program(*flags, "--keep", 2, "--log-dir", tmp_path / "logs", "--save-dir", tmp_path / "b", data)
    assert status == 0 and [number for number, _ in numbered(str(tmp_path / "b"))] == [3, 4]
    assert sorted(os.listdir(tmp_path / "b"))[-1] == "config.json" and os.path.exists(tmp_path / "logs" / "log.jsonl")


def test_spawn_and_torchrun_are_the_same_run(undisturbed, data, tmp_path):
    """torchrun's part is its environment here; test_survival.py and test_slurm.py have the whole of it."""
    flags = [*SMALL, "--knn-freq", "2", data]
    url = f"tcp://localhost:{free_port()}"
    published = f"--dist-url {url} --multiprocessing-distributed --world-size 1 --rank 0 --nproc-per-node 2".split()
    spawn = script("main_synco", *published, "--save-dir", tmp_path / "spawn", *flags)
    assert spawn.returncode == 0 and spawn.stderr == "", spawn.stderr
    statuses, out, err = program_of(2, "main_synco", "--save-dir", tmp_path / "torchrun", *flags)
    assert statuses == [0, 0], err
    for printed in (spawn.stdout, out):
        assert "world size         2" in printed and "batch per process  4" in printed
        assert printed.count("kNN after 0 epochs") == 1  # rank 0 alone speaks
        first = next(line for line in printed.splitlines() if line.startswith("kNN after 0"))
        assert first in undisturbed[1].stdout  # the same start, and the accuracy of one process
    assert equal(final(tmp_path / "spawn"), final(tmp_path / "torchrun"))
    # every process draws views, shuffles and synthesises from the one seed of the command line
    lines = [metrics.read_log(tmp_path / name / "log.jsonl") for name in ("spawn", "torchrun")]
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]


def test_a_seed_is_drawn_and_stored_when_none_is_given(data, tmp_path, program):
    flags = [*SMALL[:-4], "--epochs", 1, data]
    assert program(*flags, "--save-dir", tmp_path / "a")[0] == 0
    assert program(*flags, "--save-dir", tmp_path / "b")[0] == 0
    seeds = [json.loads((tmp_path / name / "config.json").read_text())["seed"] for name in "ab"]
    assert seeds[0] != seeds[1]
    assert program(*flags, "--seed", seeds[0], "--save-dir", tmp_path / "c")[0] == 0
    assert equal(final(tmp_path / "a", 0), final(tmp_path / "c", 0))


@pytest.mark.parametrize("flags", ["--bn-splits 2", "--n1 0 --n2 0 --n3 0 --n4 0 --n5 0 --n6 0", "--cooldown-epochs 1"])
def test_other_settings_run(data, tmp_path, program, flags):
    status, out, err = program(*SMALL, *flags.split(), "--save-dir", tmp_path / "r", data)
    assert status == 0, err
    if "n1" in flags:
        assert "MoCo (no synthetic negatives)" in out
    if "cooldown" in flags:
        assert "in no epoch: all are warm-up or cool-down" in out


def test_a_network_with_dropout_resumes_exactly(data, tmp_path, program):
    flags = [*SMALL, "-a", "mobilenet_v3_small", data]
    assert program(*flags, "--save-dir", tmp_path / "a")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.remove(tmp_path / "b" / "checkpoint_0001.pth.tar")
    assert program(*flags, "--resume", "auto", "--save-dir", tmp_path / "b")[0] == 0
    assert equal(final(tmp_path / "a"), final(tmp_path / "b"))


def test_each_type_starts_at_its_own_epoch_or_step(data, tmp_path, program):
    """The log has a line for each step, and in it the types that the step made negatives of."""
    flags = [*SMALL, "-p", 1, "--epochs", 3, "--warmup-epochs", "0,0.5,1,4s,2,2.4", "--save-dir", tmp_path / "r", data]
    status, out, err = program(*flags)
    assert status == 0, err
    starts = {"interpolated": 0, "extrapolated": 0.5, "mixed": 1, "noisy": 4 / 3, "perturbed": 2, "adversarial": 2.4}
    told = "0 (interpolated), 0.5 (extrapolated), 1 (mixed), 4s (noisy), 2 (perturbed), 2.4 (adversarial)"
    assert f"from epoch {told} on" in out
    lines = metrics.read_log(tmp_path / "r" / "log.jsonl")
    assert len(lines) == 9  # three epochs of three steps
    for done, line in enumerate(lines):
        types = {name.removeprefix("mass/") for name in line if name.startswith("mass/")}
        assert types & starts.keys() == {name for name, start in starts.items() if done / 3 >= start}


def parsed(*flags):
    """What main_synco makes of these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main_synco.py", *map(str, flags)])
        return main_synco.parse()


def test_a_length_in_steps(undisturbed, data, tmp_path, program, monkeypatch):
    """Seven steps of three an epoch: two epochs and a step, each with a learning rate of its own; ten seconds each."""
    clock, step = [0.0], torch.optim.SGD.step

    def ten_seconds(*args):
        clock[0] += 10
        return step(*args)

    monkeypatch.setattr(torch.optim.SGD, "step", ten_seconds)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    flags = [*SMALL, "-p", 1, "--knn-freq", 1, "--save-dir", tmp_path / "r", data]
    flags[flags.index("--epochs") : flags.index("--epochs") + 2] = ["--steps", 7]
    status, out, err = program(*flags)
    assert status == 0, err
    lines = [line for line in metrics.read_log(tmp_path / "r" / "log.jsonl") if line["kind"] == "train"]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (2, 7)]
    assert [line["lr"] for line in lines] == pytest.approx([0.015 * (1 + np.cos(np.pi * i / 7)) for i in range(7)])
    saved = final(tmp_path / "r", 2)
    assert (saved["epoch"], saved["step"], saved["state_dict"]["module.queue_ptr"].tolist()) == (3, 7, [7 * 8 % 64])
    assert re.findall(r"^Epoch (\d) \[(\d)/3\] .* ETA (.*)$", out, re.M) == [
        (str(i // 3), str(i % 3 + 1), f"0:0{left // 6}:{left % 6}0") for i, left in enumerate(range(6, -1, -1))
    ]
    assert "kNN after 3 epochs" in out

    shutil.copytree(tmp_path / "r", tmp_path / "again")
    os.remove(tmp_path / "again" / "checkpoint_0002.pth.tar")
    flags[flags.index(tmp_path / "r")] = tmp_path / "again"
    assert program(*flags, "--resume", "auto")[0] == 0
    assert equal(saved, final(tmp_path / "again", 2))
    status, _, err = program(*flags, "--resume", "auto", "--epochs", 9)
    assert status == 2 and "--steps" in err and err.count("\n") == 1
    flags[flags.index(tmp_path / "again")] = tmp_path / "none"
    refused(
        program(*flags, "--start-epoch", 3), "--start-epoch 3 must be below 3, which --steps 7 make", tmp_path / "none"
    )
    flags[flags.index(7)] = 603  # 201 epochs, and so more than --epochs is by default
    args = parsed(*flags, "--start-epoch", 200)
    assert (args.start_epoch, args.steps) == (200, 603)


@pytest.mark.parametrize(
    "flags",
    [
        "--mask-same-image --warmup-epochs 0 --knn-freq 1 --knn-train --save-best",
        "--optimizer adamw --lr 1e-3 --wd 0.1 --clip-grad 0.5 --lr-warmup-epochs 1 --lr-warmup 1e-6 --lr-min 1e-5",
        "--symmetric --aug-heavy -a resnet18 --stem cifar --img-size 16 --stats cifar10 --crop-scale 0.08,1",
    ],
)
def test_extras_resume_exactly(data, tmp_path, program, flags):
    words = [word for word in SMALL if word != "--aug-plus"] + flags.split()
    status, out, err = program(*words, "--save-dir", tmp_path / "a", data)
    assert status == 0, err
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.remove(tmp_path / "b" / "checkpoint_0001.pth.tar")
    assert program(*words, "--resume", "auto", "--save-dir", tmp_path / "b", data)[0] == 0
    a, b = final(tmp_path / "a"), final(tmp_path / "b")
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    log = metrics.read_log(tmp_path / "a" / "log.jsonl")
    if "mask" in flags:
        assert torch.equal(a["queue_index"], b["queue_index"])
        assert sorted(a["queue_index"].tolist()) == sorted(2 * list(range(24)) + [-1] * 16)  # 48 keys in 64 rows
        found = {line["epoch"]: line for line in log if line["kind"] == "knn"}
        keys = {"top1", "top1_projection", "train_top1", "train_top1_projection"}
        assert all(keys <= line.keys() for line in found.values()) and list(found) == [0, 1, 2]
        best = checkpoint.load(tmp_path / "a" / main_synco.FILES.best)
        assert found[best["epoch"]]["top1"] == max(found[1]["top1"], found[2]["top1"])
        a["queue_index"] = a["queue_index"][1:]
        torch.save(a, tmp_path / "x.pth.tar")
        run = program(*words, "--resume", tmp_path / "x.pth.tar", "--save-dir", tmp_path / "c", data)
        refused(run, "x.pth.tar: --mask-same-image: it does not say of which images its 64 rows are", tmp_path / "c")
        del a["queue_index"]
        torch.save(a, tmp_path / "x.pth.tar")
        run = program(*words, "--resume", tmp_path / "x.pth.tar", "--save-dir", tmp_path / "c", data)
        refused(run, "x.pth.tar: --mask-same-image: it does not say of which images its 64 rows are", tmp_path / "c")
    if "adamw" in flags:
        decays = [group["weight_decay"] for group in a["optimizer"]["param_groups"]]
        encoder = {name: w for name, w in a["state_dict"].items() if name.startswith("module.encoder_q.")}
        wide = [name for name, w in encoder.items() if w.ndim > 1]
        assert decays == [0.1, 0.0] and len(a["optimizer"]["param_groups"][0]["params"]) == len(wide)
        rates = [line["lr"] for line in log if line["kind"] == "train"]  # of steps 0, 2, 3 and 5
        assert rates == pytest.approx([1e-6, 1e-6 + 2 / 3 * (1e-3 - 1e-6), 1e-3, 1e-3])
        assert all(line["grad_norm"] > 0 for line in log if line["kind"] == "train")
    if "stem" in flags:
        assert a["state_dict"]["module.encoder_q.conv1.weight"].shape == (64, 3, 3, 3)
        assert a["state_dict"]["module.queue_ptr"].tolist() == [2 * 48 % 64] and a["config"]["stem"] == "cifar"


def test_a_checkpoint_that_does_not_say_whose_its_rows_are(data, tmp_path, program):
    """As all were before the queue kept its images' numbers: it goes on as it would, and they have no share."""
    status, _, err = program(*SMALL, "--save-dir", tmp_path / "a", data)
    assert status == 0, err
    (tmp_path / "b").mkdir()
    old = final(tmp_path / "a", 0)
    assert sorted(old.pop("queue_index").tolist()) == [-1] * 40 + list(range(24))
    torch.save(old, tmp_path / "b" / "checkpoint_0000.pth.tar")
    status, _, err = program(*SMALL, "--resume", "auto", "--save-dir", tmp_path / "b", data)
    assert status == 0 and equal(final(tmp_path / "a"), final(tmp_path / "b")), err
    whole, rest = final(tmp_path / "a")["queue_index"], final(tmp_path / "b")["queue_index"]
    assert torch.equal(whole[24:], rest[24:]) and (rest[:24] == -1).all()
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(64), torch.full((64,), 24), torch.full((64,), -2), [0]):
        torch.save(old | {"queue_index": wrong}, tmp_path / "x.pth.tar")
        run = program(*SMALL, "--resume", tmp_path / "x.pth.tar", "--save-dir", tmp_path / "c", data)
        refused(run, "x.pth.tar: it does not say of which images its 64 rows are", tmp_path / "c")


def test_the_control(data, tmp_path, program):
    start = SMALL.index("--n-hard")
    flags = [*SMALL[:start], *SMALL[start + 14 :], "--method", "copied", "--n-copied", 5, "--warmup-epochs", 0]
    status, out, err = program(*flags, "--n-hard", 3, "--save-dir", tmp_path / "r", data)
    assert (
        status == 0
        and (
            "MoCo with repeated hard negatives: for a query the 3 hardest of 64 queue rows, 5 of them over again, "
            "unchanged: a control that is not part of SynCo, from epoch 0 on"
        )
        in out
    ), err
    line = metrics.read_log(tmp_path / "r" / "log.jsonl")[-1]
    assert {name for name in line if "copied" in name} == {
        f"{what}/copied" for what in ("similarity", "mass", "leakage", "gradient", "cosine", "own_class", "own_image")
    }
    run = program(*flags, "--n-hard", 65, "--save-dir", tmp_path / "none", data)
    refused(run, "--n-hard 65 is larger than the queue: --moco-k is 64", tmp_path / "none")
    run = program(*flags, "--n-hard", 0, "--save-dir", tmp_path / "none", data)
    refused(run, "argument --n-hard: '0' is not a whole number >= 1", tmp_path / "none")


def test_images_of_one_class_have_no_labels(tmp_path, program):
    make_images(tmp_path / "data" / "train", classes=1, images=16)
    status, out, err = program(*SMALL, "--save-dir", tmp_path / "r", tmp_path / "data")
    assert status == 0 and err == "" and out.count("images without labels") == 1
    lines = metrics.read_log(tmp_path / "r" / "log.jsonl")
    assert "own_image/hardest" in lines[-1] and not [name for name in lines[-1] if name.startswith("own_class")]


def test_flags_that_would_do_nothing():
    words = [word for word in SMALL if word not in ("--cos", "--aug-plus")]
    for flags, message in (
        (["--lr-min", 0.01], "--lr-min 0.01 goes with --cos"),
        (["--lr-warmup", 0.01, "--lr-warmup-epochs", "0s"], "--lr-warmup 0.01 goes with --lr-warmup-epochs N"),
        (["--blur"], "--blur goes with --aug-plus or --aug-heavy"),
    ):
        with pytest.raises(UserError, match=message):
            parsed(*words, *flags, "data")


def test_the_best_epoch_is_the_same_after_a_stop(data, tmp_path, program, monkeypatch):
    """Untrained features may be the best of all; they are of no epoch, and keep none from being the best."""
    accuracies = iter([90.0, 30.0, 40.0, 40.0])  # before the first epoch, and after the first and the second, twice
    monkeypatch.setattr(
        main_synco.knn, "accuracy", lambda *given, **more: {"top1": next(accuracies), "top1_projection": 0.0}
    )
    flags, best = (
        [*SMALL, "--knn-freq", 1, "--save-best", "--save-dir", tmp_path / "r", data],
        tmp_path / "r" / main_synco.FILES.best,
    )
    status, _, err = program(*flags)
    assert status == 0 and checkpoint.load(best)["epoch"] == 2, err
    os.remove(tmp_path / "r" / "checkpoint_0001.pth.tar")  # as if the second epoch had not ended
    os.remove(best)
    status, _, err = program(*flags, "--resume", "auto")
    assert status == 0 and checkpoint.load(best)["epoch"] == 2, err


def test_a_best_epoch_that_was_not_saved_is_evaluated_again(data, tmp_path, program, monkeypatch):
    flags = [*SMALL, "--knn-freq", 2, "--save-best", "--save-dir", tmp_path / "r", data]
    with monkeypatch.context() as patch:
        cut_at(patch, main_synco.FILES.best)
        assert program(*flags)[0] == 130
    assert program(*flags, "--resume", "auto")[0] == 0
    assert checkpoint.load(tmp_path / "r" / main_synco.FILES.best)["epoch"] == 2
    log = metrics.read_log(tmp_path / "r" / "log.jsonl")
    assert [line["epoch"] for line in log if line["kind"] == "knn"] == [0, 2]


def test_processes_agree_on_the_best_epoch_of_a_resumed_run(data, tmp_path):
    """Rank 0 alone has the log; a save that some take for due and others not would never end."""
    flags = [*SMALL, "--knn-freq", 1, "--save-best", "--resume", "auto", "--save-dir", tmp_path / "r", data]
    statuses, _, err = program_of(2, "main_synco", *flags)
    assert statuses == [0, 0], err
    os.remove(tmp_path / "r" / "checkpoint_0001.pth.tar")
    log = tmp_path / "r" / "log.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    for line in lines:
        line |= {"top1": 101.0} if (line["kind"], line["epoch"]) == ("knn", 1) else {}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = tmp_path / "r" / main_synco.FILES.best
    before = best.read_bytes()
    statuses, out, err = program_of(2, "main_synco", *flags)
    assert statuses == [0, 0] and "kNN after 2 epochs" in out, err
    assert best.read_bytes() == before  # 101 was not to be beaten


def test_clipping_bounds_the_gradient(data, tmp_path, program, monkeypatch):
    """The norm of what reaches the optimiser, computed anew."""
    norms, step = [], torch.optim.SGD.step

    def watch(self, *args, **kwargs):
        gradients = [w.grad.double() for group in self.param_groups for w in group["params"] if w.grad is not None]
        norms.append(float(sum(g.square().sum() for g in gradients)) ** 0.5)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watch)
    for limit in (1e-3, 1e6):
        status, _, err = program(*SMALL, "--clip-grad", limit, "-p", 1, "--save-dir", tmp_path / str(limit), data)
        assert status == 0, err
    log = metrics.read_log(tmp_path / "1000000.0" / "log.jsonl")
    told = [line["grad_norm"] for line in log if line["kind"] == "train"]
    assert norms[:6] == pytest.approx([1e-3] * 6, rel=1e-2) and norms[6:] == pytest.approx(told, rel=1e-4)


def test_a_warm_up_longer_than_the_run_is_said(data, tmp_path, program):
    flags = ["--lr-warmup-epochs", "7s", "--save-dir", tmp_path / "r", data]  # the run takes six steps
    status, _, err = program(*SMALL, *flags)
    assert status == 0 and err.count("\n") == 1
    assert "warning: --lr-warmup-epochs 7s: longer than the run, which never reaches --lr" in err


def test_images_limited_and_cached(data, tmp_path, program):
    flags = [*SMALL, "--limit-images", 17, "--cache-images", "--knn-freq", 2, "--save-dir", tmp_path / "r", data]
    status, out, err = program(*flags)
    assert status == 0, err
    assert "steps per epoch    2" in out and re.search(r"cached images +24, 0.00 GB, of .* GB that are free", out)
    same = program(*[flag for flag in flags if flag != "--cache-images"], "--overwrite")
    assert same[0] == 0 and [x for x in same[1].splitlines() if x.startswith("kNN")] == [
        x for x in out.splitlines() if x.startswith("kNN")
    ]


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, program):
    flags = [*SMALL, "--lr", 1e30, "-p", 1, "--save-dir", tmp_path / "r", data]
    status, _, err = program(*flags)
    assert status == 1 and err.count("\n") == 1
    pattern = (
        r"error: the loss or its gradient is not finite from step 1 of epoch 0 on \(lr 1e\+30; noticed at step 1\)"
    )
    assert re.search(rf"{pattern}; its images: {tmp_path}/r/nonfinite.json; last good checkpoint: none$", err)
    assert numbered(str(tmp_path / "r")) == []


BAD = {
    "--epochs 0": "argument --epochs: '0' is not a whole number >= 1",
    "-a resnet51": "'resnet51' is not a torchvision classification network; did you mean 'resnet50'?",
    "-a squeezenet1_1": "SqueezeNet has no linear layer with 16 outputs",
    "-a vit_b_16 --img-size 33": "-a vit_b_16 --img-size 33: ",
    "-a alexnet --img-size 8": "-a alexnet --img-size 8: ",
    "--seed 99999999999": "argument --seed: '99999999999' is not a whole number >= 0 and <= 4294967295",
    "-b 25": "--batch-size 25: a step takes 25 images, ",
    "-b 1": "--batch-size 1: a process takes 1, and BatchNorm needs 2 at least",
    "-b 9 --bn-splits 2": "--batch-size 9 --bn-splits 2: the 9 images",
    "--moco-k 7 --n-hard 4": "--moco-k 7 is smaller than the 8 keys of a step",
    "--n-hard 65": "--n-hard 65 is larger than the queue: --moco-k is 64",
    "--n3 -1": "argument --n3: '-1' is not a whole number >= 0",
    "--sigma -0.1": "argument --sigma: '-0.1' is not a number >= 0",
    "--alpha 0": "argument --alpha: '0' is not a number > 0 and <= 1",
    "--alpha 1.2": "argument --alpha: '1.2' is not a number > 0 and <= 1",
    "--moco-t 0": "argument --moco-t: '0' is not a number > 0",
    "--moco-m 1.1": "argument --moco-m: '1.1' is not a number >= 0 and <= 1",
    "--lr nan": "argument --lr/--learning-rate: 'nan' is not a number",
    "--gpu 3": "--gpu 3: this machine has 0 GPUs",
    "--dist-backend nccl": "--dist-backend nccl needs GPUs",
    "--rank 1": "--world-size -1 --rank 1: ",
    "--sync-bn": "--sync-bn needs GPUs",
    "--sync-bn --bn-splits 2": "--sync-bn and --bn-splits 2 contradict each other",
    "--start-epoch 2": "--start-epoch 2 must be below --epochs 2",
    "--overwrite --resume auto": "--overwrite starts anew and --resume auto goes on",
    "--resume nowhere.pth.tar": "nowhere.pth.tar: no such checkpoint file",
    "--dataset cifar12": "argument --dataset: invalid choice: 'cifar12' (choose from",
    "--dataset cifar10": "does not hold it, or not whole (Dataset not found or corrupted); --download fetches it",
    "--download": "--download: name what to fetch with --dataset {cifar10,cifar100,stl10,imagenette,caltech256}",
    "--stem cifar": f"-a {SMALL[1]} --img-size 32: ShuffleNetV2 has no ResNet's stem to replace",
    "--warmup-epochs 0,1,2,-3,4,5": "argument --warmup-epochs/--synth-start: '-3' is not a number of epochs >= 0",
    "--warmup-epochs 1,2": "argument --warmup-epochs/--synth-start: '1,2' are 2 numbers, where 1 or 6 are wanted",
    "--crop-scale 0.5,0.2": "argument --crop-scale: '0.5,0.2' is not MIN,MAX with 0 < MIN <= MAX <= 1",
    "--aug-heavy": "--aug-plus and --aug-heavy contradict each other",
    "--symmetric -b 24 --moco-k 47": "--moco-k 47 is smaller than the 48 keys of a step",
    "--steps 5": "argument --steps: not allowed with argument --epochs",
    "--save-best": "--save-best goes with --knn-freq N",
    "--knn-train": "--knn-train goes with --knn-freq N",
    "--lr-min 1": "--lr-min 1 is larger than --lr 0.03",
    "--lr-warmup 0.1": "--lr-warmup 0.1 goes with --lr-warmup-epochs N",
    "--clip-grad 0": "argument --clip-grad: '0' is not a number > 0",
    "--limit-images 7": "--batch-size 8: a step takes 8 images, ",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(flags, data, tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = program(*SMALL, *flags.split(), "--save-dir", tmp_path / "r", data)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("main_synco.py: error: ") and BAD[flags] in err
    assert os.listdir(tmp_path) == []  # nothing was written


def test_a_batch_that_the_processes_cannot_share_is_refused(data, tmp_path):
    statuses, out, err = program_of(3, "main_synco", *SMALL, "--save-dir", tmp_path / "r", data)
    assert statuses == [2, 2, 2] and out == ""  # one of them says it
    assert err == "main_synco.py: error: --batch-size 8 is not divisible by a node's 3 processes\n"
    assert os.listdir(tmp_path) == []


def refused(run, message, folder=None):
    status, out, err = run
    assert status == 2 and err.count("\n") == 1 and message in err, err
    assert folder is None or not os.path.exists(folder)
    return err


def test_bad_data(data, tmp_path, program):
    flags = [*SMALL, "--save-dir", tmp_path / "r"]
    refused(program(*flags, tmp_path / "none"), "none: no such folder", tmp_path / "r")
    refused(program(*flags, tmp_path), "has no folder 'train' in it", tmp_path / "r")
    refused(program(*flags), "the following arguments are required: DATA", tmp_path / "r")
    (tmp_path / "e" / "train").mkdir(parents=True)
    refused(program(*flags, tmp_path / "e"), "e/train: ", tmp_path / "r")
    (tmp_path / "e" / "train" / "c0").mkdir()
    refused(program(*flags, tmp_path / "e"), "it should hold CLASS/IMAGE", tmp_path / "r")
    make_images(tmp_path / "d" / "train", classes=2, images=4)
    refused(program(*flags, "--knn-freq", 1, tmp_path / "d"), "has no folder 'val' in it", tmp_path / "r")
    make_images(tmp_path / "d" / "val", classes=3, images=1)
    message = "train and val hold different classes: c2"
    refused(program(*flags, "--knn-freq", 1, tmp_path / "d"), message, tmp_path / "r")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(data, tmp_path, program, workers):
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "train" / "c1" / "3.jpg").write_bytes(b"\xff\xd8\xff torn")
    run = program(*SMALL, "-j", workers, "--save-dir", tmp_path / "r", tmp_path / "d")
    err = refused(run, "c1/3.jpg: cannot be read as an image")
    assert err.startswith(f"main_synco.py: error: {tmp_path}/d/train/c1/3.jpg: ")


def test_an_unreadable_image_is_named_by_one_process(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "train" / "c1" / "3.jpg").write_bytes(b"torn")
    statuses, _, err = program_of(2, "main_synco", *SMALL, "--save-dir", tmp_path / "r", tmp_path / "d")
    assert statuses == [2, 2]
    assert err.count("main_synco.py: error: ") == 1 and "c1/3.jpg: cannot be read as an image" in err


def test_bad_checkpoints(undisturbed, data, tmp_path, program):
    whole = (undisturbed[0] / "checkpoint_0000.pth.tar").read_bytes()
    flags = [*SMALL, "--save-dir", tmp_path / "r", data]
    cut, foreign, good = (tmp_path / f"{name}.pth.tar" for name in ("cut", "foreign", "good"))
    cut.write_bytes(whole[: len(whole) // 2])
    good.write_bytes(whole)
    torch.save({"weights": [1, 2]}, foreign)
    refused(program(*flags, "--resume", cut), "cut.pth.tar: not a whole checkpoint file", tmp_path / "r")
    refused(program(*flags, "--resume", foreign), "foreign.pth.tar: not a checkpoint", tmp_path / "r")
    message = f"good.pth.tar: is of a run with other settings: arch {ARCH} → resnet18; moco_k 64 → 32\n"
    refused(program(*flags, "--resume", good, "-a", "resnet18", "--moco-k", 32), message, tmp_path / "r")
    torch.save({**checkpoint.load(str(good)), "config": {}}, foreign)  # as the published ones, which store no settings
    message = f"foreign.pth.tar: is a checkpoint of '{ARCH}'; --arch is 'resnet18'"
    refused(program(*flags, "--resume", foreign, "-a", "resnet18"), message, tmp_path / "r")
    message = "of another shape: queue ((64, 16) where (32, 16) is wanted)"
    refused(program(*flags, "--resume", foreign, "--moco-k", 32), message, tmp_path / "r")
    message = f"--seed 4: {good} was run with seed 3"
    refused(program(*flags, "--resume", good, "--seed", 4), message, tmp_path / "r")
    ours = checkpoint.load(str(good))
    for change, message in (
        # one number that pretends to be a tensor of 4 TB
        ({"module.queue": torch.ones(1).expand(10**6, 10**6)}, "of another shape: queue"),
        ({"module.queue": torch.full((64, 16), float("inf"))}, "queue holds values that are not finite"),
        ({"module.queue": torch.ones(64, 16, dtype=torch.complex64)}, "queue is a tensor of torch.complex64"),
    ):
        torch.save({**ours, "state_dict": ours["state_dict"] | change}, foreign)
        refused(program(*flags, "--resume", foreign), message, tmp_path / "r")
    weights = {name: w for name, w in ours["state_dict"].items() if "encoder_q." in name}  # as MoCo's published files
    torch.save({"epoch": 200, "arch": ARCH, "state_dict": weights}, foreign)
    message = "foreign.pth.tar: not a pretraining checkpoint that can be resumed: it has no optimizer"
    refused(program(*flags, "--resume", foreign), message, tmp_path / "r")
    weights = {name.replace("encoder_q.", ""): w for name, w in weights.items()}  # as a probe's
    torch.save({**ours, "state_dict": weights, "best_acc1": 1.0}, foreign)
    message = "foreign.pth.tar: is a classifier's checkpoint; --init-from takes it"
    refused(program(*flags, "--resume", foreign), message, tmp_path / "r")
    torch.save({**ours, "epoch": 9, "step": 27}, good)
    refused(program(*flags, "--resume", good), "holds 9 epochs and --epochs is 2", tmp_path / "r")


def test_contradicting_settings_are_listed(undisturbed, data, tmp_path, program):
    flags = [*SMALL, "--resume", undisturbed[0] / "checkpoint_0000.pth.tar", "--save-dir", tmp_path / "r"]
    for more, message in (
        ("--moco-k 128 --moco-dim 8 --n2 9", "n2 3 → 9; moco_dim 16 → 8; moco_k 64 → 128\n"),
        ("--lr 1 --n2 9 --force-resume", "n2 3 → 9; lr 0.03 → 1.0 (--force-resume lets lr change)\n"),
        ("--moco-t 0.1 --force-resume", "moco_t 0.07 → 0.1\n"),
    ):
        message = f"is of a run with other settings: {message}"
        refused(program(*flags, *more.split(), data), message, tmp_path / "r")
    # none of these is the run's own
    free = "-j 1 -p 1 --save-freq 2 --keep 1 --knn-freq 2 --knn-k 3 --save-steps 1 --worker-timeout 60 --peer-timeout 9"
    status, out, err = program(*flags, *free.split(), data)
    assert status == 0 and "changed" not in out, err
    assert equal(final(undisturbed[0]), final(tmp_path / "r"))


def test_a_save_folder_that_cannot_be_written(data, tmp_path, program):
    (tmp_path / "file").write_text("mine")
    refused(program(*SMALL, "--save-dir", tmp_path / "file", data), "file: is not a folder")
    refused(program(*SMALL, "--save-dir", tmp_path / "file" / "below", data), "below: cannot be written (")
    refused(program(*SMALL, "--save-dir", "/proc/no", data), "/proc/no: cannot be written (")
    refused(
        program(*SMALL, "--save-dir", tmp_path / "new", "--log-dir", "/proc/no", data), "/proc/no", tmp_path / "new"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_going_back_in_a_folder_is_refused(undisturbed, data, tmp_path, program):
    """The newer checkpoints would be left, and taken for this run's by --keep and --resume auto."""
    folder = tmp_path / "r"
    shutil.copytree(undisturbed[0], folder)
    flags = [*SMALL, "--keep", 1, "--resume", folder / "checkpoint_0000.pth.tar"]
    refused(program(*flags, "--save-dir", folder, data), "checkpoint_0001.pth.tar, which would be left")
    assert len(numbered(str(folder))) == 2


def test_another_runs_log_is_left_alone(data, tmp_path, program):
    flags = [*SMALL, "--epochs", 1, "--log-dir", tmp_path / "logs", data]
    assert program(*flags, "--save-dir", tmp_path / "a")[0] == 0
    before = (tmp_path / "logs" / "log.jsonl").read_bytes()
    refused(program(*flags, "--save-dir", tmp_path / "b"), "logs holds the log of another run", tmp_path / "b")
    assert (tmp_path / "logs" / "log.jsonl").read_bytes() == before


def test_the_references_own_checkpoint_resumes(undisturbed, data, tmp_path, program):
    """Only the published keys, no settings and no step of ours; a config that is none of ours is left aside."""
    ours = checkpoint.load(str(undisturbed[0] / "checkpoint_0000.pth.tar"))
    theirs = {key: ours[key] for key in ("epoch", "arch", "state_dict", "optimizer")}
    for name, content in (
        ("plain", theirs),
        ("odd", {**theirs, "config": "x"}),
        ("seed", {**theirs, "config": {"seed": "x"}}),
    ):
        torch.save(content, tmp_path / "theirs.pth.tar")
        run = program(*SMALL, "--resume", tmp_path / "theirs.pth.tar", "--save-dir", tmp_path / name, data)
        assert run[0] == 0, run[2]
        assert equal(final(undisturbed[0]), final(tmp_path / name))
