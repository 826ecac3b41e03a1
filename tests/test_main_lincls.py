"""The linear probe as a user runs it: whole trials, several processes, resumed ones, -e, and bad input."""

import csv
import errno
import hashlib
import importlib
import json
import os
import shutil

import pytest
import torch
import torchvision
from conftest import ARCH, cut_at, make_images, program_of, script

from synco import checkpoint, classifier, metrics

FLAGS = f"-a {ARCH} --img-size 32 -j 0 -b 8 --epochs 3 --lr 1 --schedule 2 --seed 3 -p 2".split()
LAST, BEST = "checkpoint_lincls.pth.tar", "model_best_lincls.pth.tar"
WITHIN = "checkpoint_lincls_step.pth.tar"


def result(folder):
    with open(os.path.join(folder, "result.json")) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def probe(data, pretrained, tmp_path_factory):
    """A probe of three epochs through the real command line → (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("runs") / "probe"
    flags = [*FLAGS, "--save-confusion", "--eval-train", "--pretrained", pretrained, "--save-dir", folder, data]
    return folder, script("main_lincls", *flags)


def lines_of(folder):
    timed = ("time", "images_per_second", "data_share")
    lines = metrics.read_log(os.path.join(folder, "log.jsonl"))
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def test_validations_may_be_rare(probe, data, pretrained, tmp_path, programs):
    """They change nothing else: not the weights, nor what a validation that does take place says."""
    often = [line for line in lines_of(probe[0]) if line["kind"] == "val"]
    for freq, epochs in ((2, [2, 3]), (0, [3])):
        folder = tmp_path / str(freq)
        flags = [*FLAGS, "--val-freq", freq, "--pretrained", pretrained, "--save-dir", folder, data]
        status, out, err = programs("main_lincls", *flags)
        assert status == 0 and err == "", err
        shown = [line for line in lines_of(folder) if line["kind"] == "val"]
        assert shown == [line for line in often if line["epoch"] in epochs]
        states = [checkpoint.load(str(place / LAST))["state_dict"] for place in (probe[0], folder)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        found = result(folder)
        assert found["last"]["top1"] == shown[-1]["top1"]
        assert found["epoch"] == max(shown, key=lambda line: line["top1"])["epoch"]
        assert checkpoint.load(str(folder / BEST))["epoch"] == found["epoch"]


def test_a_trial_that_is_not_validated_at_its_end_says_so(data, pretrained, tmp_path, programs, monkeypatch):
    flags = [*FLAGS, "--val-freq", 0, "--pretrained", pretrained, "--resume", "auto", "--save-dir", tmp_path, data]
    with monkeypatch.context() as patch:
        cut_at(patch, LAST, nth=2)
        assert programs("main_lincls", *flags)[0] == 130
    assert not os.path.exists(tmp_path / BEST) and not [x for x in lines_of(tmp_path) if x["kind"] == "val"]
    status, _, err = programs("main_lincls", *flags, "--epochs", 1, "--force-resume")
    assert status == 2 and "holds 1 epochs, the last not validated; --epochs must be more" in err
    status, _, err = programs("main_lincls", *flags)
    assert status == 0 and result(tmp_path)["epoch"] == 3, err


def test_an_epoch_whose_weights_could_not_be_kept_is_not_the_best(data, pretrained, tmp_path, programs, monkeypatch):
    """What result.json calls the best is what model_best_lincls.pth.tar holds."""
    tops, validate, replace, saves = iter((10.0, 30.0, 20.0)), classifier.validate, os.replace, [0]

    def better_and_worse(*args, **settings):
        [(numbers, confusion)] = validate(*args, **settings)
        return [(numbers | {"top1": next(tops)}, confusion)]

    def full_at_times(source, target):
        saves[0] += os.path.basename(target) == BEST
        if os.path.basename(target) == BEST and saves[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(classifier, "validate", better_and_worse)
    monkeypatch.setattr(os, "replace", full_at_times)
    status, out, err = programs("main_lincls", *FLAGS, "--pretrained", pretrained, "--save-dir", tmp_path, data)
    assert status == 0 and f"{BEST}: cannot be written (No space left" in err, err
    assert "warning: epoch 1 is not kept as the best\n" in err
    found, best = result(tmp_path), checkpoint.load(str(tmp_path / BEST))
    assert (found["epoch"], found["top1"]) == (best["epoch"], best["best_acc1"]) == (3, 20.0)


def equal(a, b):
    """Two classifiers' checkpoints hold the same weights, momentum and results, bit for bit."""
    a, b = (checkpoint.load(str(path)) for path in (a, b))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    same = all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    momentum = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    same = same and all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in momentum)
    rest = ("epoch", "best_acc1", "best", "last", "scheduler")
    return same and [a.get(key) for key in rest] == [b.get(key) for key in rest]


def test_a_probe(probe, data, pretrained):
    folder, run = probe
    assert run.returncode == 0 and run.stderr == "", run.stderr
    for fact in (
        "images             24 to train, 7 to validate, 3 classes",
        f"backbone           {pretrained}, {ARCH}, 200 epochs: 336 tensors of the query encoder",
        "global batch       8",
        "steps per epoch    3",
        "seed               3",
    ):
        assert fact in run.stdout
    assert run.stdout.splitlines()[-1].startswith("Done. Best top-1 ")
    assert sorted(os.listdir(folder))[:2] == [LAST, "config.json"]
    assert {"confusion.csv", BEST, "per_class.csv", "result.json", "log.jsonl"} <= set(os.listdir(folder))

    last, best = (checkpoint.load(str(folder / name)) for name in (LAST, BEST))
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= set(last) and "scheduler" not in last
    assert last["epoch"] == 3 and last["arch"] == ARCH
    assert {n.removeprefix("module.") for n in last["state_dict"]} == set(
        torchvision.models.get_model(ARCH, num_classes=3).state_dict()
    )
    assert all(name.startswith("module.") for name in last["state_dict"])
    pretraining = torch.load(pretrained, weights_only=True)["state_dict"]
    for name, tensor in last["state_dict"].items():  # bit for bit, running statistics included
        if not name.startswith("module.fc."):
            assert torch.equal(tensor, pretraining[name.replace("module.", "module.encoder_q.")]), name

    lines = metrics.read_log(folder / "log.jsonl")
    assert [(line["kind"], line["step"]) for line in lines[:4]] == [
        ("train", 1), ("train", 3), ("val", 3), ("eval_train", 3)
    ]  # fmt: skip
    assert [line["lr"] for line in lines if line["kind"] == "train"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1])
    tops = [line["top1"] for line in lines if line["kind"] == "val"]
    found = result(folder)
    assert found["top1"] == max(tops) == best["best_acc1"] == last["best_acc1"]
    assert found["epoch"] == tops.index(max(tops)) + 1 == best["epoch"]  # the first of the best
    assert found["last"]["top1"] == tops[-1] and found["last"]["epoch"] == 3
    with open(pretrained, "rb") as file:
        assert found["checkpoint_sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert found["checkpoint"] == pretrained and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith(f"main_lincls.py -a {ARCH}") and found["top5"] == 100 and "train_top1" in found

    with open(folder / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["images"]) for row in rows] == [("c0", "3"), ("c1", "2"), ("c2", "2")]
    assert 100 * sum(int(row["right"]) for row in rows) / 7 == found["top1"]
    with open(folder / "confusion.csv") as file:
        table = list(csv.reader(file))
    assert table[0] == ["class", "c0", "c1", "c2"] and [row[0] for row in table[1:]] == ["c0", "c1", "c2"]
    assert [row[1:][i] for i, row in enumerate(table[1:])] == [row["right"] for row in rows]


@pytest.mark.parametrize(
    "cut, nth, more, left",
    [
        (LAST, 2, [], f"{LAST}, 1 epochs done"),  # of the second epoch, which is validated
        (LAST, 3, [], f"{LAST}, 2 epochs done"),
        (BEST, 1, ["--save-steps", 3], f"{WITHIN}, 0 epochs and 3 steps of the next done"),
    ],
)
def test_an_interrupted_probe_ends_bit_identical(
    probe, data, pretrained, tmp_path, programs, monkeypatch, cut, nth, more, left
):
    """Ended when an epoch's validation is logged and that checkpoint is to be written."""
    flags = [*FLAGS, *more, "--eval-train", "--pretrained", pretrained, "--resume", "auto"]
    flags += ["--save-dir", tmp_path / "r", data]
    with monkeypatch.context() as patch:
        cut_at(patch, cut, nth)
        assert programs("main_lincls", *flags)[0] == 130
    assert lines_of(tmp_path / "r")[-1]["kind"] == "eval_train"
    status, out, err = programs("main_lincls", *flags)
    assert status == 0 and f"resumed            {tmp_path / 'r' / left}\n" in out, err
    assert equal(tmp_path / "r" / LAST, probe[0] / LAST) and equal(tmp_path / "r" / BEST, probe[0] / BEST)
    assert lines_of(tmp_path / "r") == lines_of(probe[0])
    assert {k: v for k, v in result(tmp_path / "r").items() if k != "command"} == {
        k: v for k, v in result(probe[0]).items() if k != "command"
    }


def test_a_finished_probe_says_its_result_again(probe, data, tmp_path, programs):
    folder = tmp_path / "r"
    shutil.copytree(probe[0], folder)
    before = (folder / LAST).read_bytes()
    status, out, err = programs("main_lincls", *FLAGS[:-4], "--resume", "auto", "--save-dir", folder, data)
    assert status == 0 and "Done. Best top-1" in out and "Epoch" not in out, err  # neither --seed nor --pretrained
    assert (folder / LAST).read_bytes() == before
    assert result(folder) == result(probe[0])  # its own command's


def test_a_probe_goes_on_in_another_folder_with_all_that_is_its_own(probe, data, pretrained, tmp_path, programs):
    """Resumed elsewhere, before and after its end: best and last checkpoint and the tables are there in any case."""
    folder = tmp_path / "r"
    os.mkdir(folder)
    content = torch.load(probe[0] / LAST, weights_only=True)
    best = {"top1": 99.0, "top5": 100.0, "epoch": 1}  # so that no later epoch is better
    content |= {"epoch": 2, "best": best, "best_acc1": 99.0}
    torch.save(content, folder / LAST)
    torch.save(content, folder / BEST)
    (folder / "per_class.csv").write_text("of the best epoch")
    flags = [*FLAGS, "--resume", folder / LAST, "--save-dir", tmp_path / "on", data]
    status, out, err = programs("main_lincls", *flags)
    assert status == 0 and "Done. Best top-1 99.00 %" in out, err
    assert (tmp_path / "on" / BEST).read_bytes() == (folder / BEST).read_bytes()
    assert (tmp_path / "on" / "per_class.csv").read_text() == "of the best epoch"
    assert checkpoint.load(str(tmp_path / "on" / LAST))["epoch"] == 3 and result(tmp_path / "on")["epoch"] == 1
    assert checkpoint.load(str(folder / LAST))["epoch"] == 2  # the old folder is as it was

    flags = [*FLAGS, "--resume", probe[0] / LAST, "--save-dir", tmp_path / "end", data]
    assert programs("main_lincls", *flags)[0] == 0
    for name in (LAST, BEST, "per_class.csv", "result.json"):
        assert (tmp_path / "end" / name).read_bytes() == (probe[0] / name).read_bytes()


def test_the_references_own_classifier_goes_on(probe, data, pretrained, tmp_path, programs):
    """Without our further keys: the best accuracy is known, its epoch is not, the command line says the settings."""
    content = torch.load(probe[0] / LAST, weights_only=True)
    group = {**content["optimizer"]["param_groups"][0], "momentum": 0.1, "weight_decay": 7.0}
    theirs = {name: content[name] for name in ("arch", "state_dict")}
    theirs |= {
        "epoch": 2,
        "best_acc1": torch.tensor(99.0),
        "optimizer": {**content["optimizer"], "param_groups": [group]},
    }
    torch.save(theirs, tmp_path / LAST)
    status, out, err = programs("main_lincls", *FLAGS, "--resume", tmp_path / LAST, "--pretrained", pretrained, data)
    assert status == 0 and "Done. Best top-1 99.00 %, " in out, err
    assert (result(tmp_path)["top1"], result(tmp_path)["epoch"]) == (99, None)
    now = checkpoint.load(str(tmp_path / LAST))["optimizer"]["param_groups"][0]
    assert (now["momentum"], now["weight_decay"]) == (0.9, 0)
    for change, message in (
        ({"epoch": "7"}, "its epoch is '7', not a number of epochs done"),
        ({"epoch": 9}, "holds 9 epochs and --epochs is 3"),
        ({"best_acc1": "x"}, "its best_acc1 is 'x', not a number"),
    ):
        torch.save({**theirs, **change}, tmp_path / LAST)
        refused(
            programs("main_lincls", *FLAGS, "--resume", tmp_path / LAST, "--save-dir", tmp_path / "s", data), message
        )


def test_several_processes_validate_as_one(data, pretrained, tmp_path, programs, processes=3):
    flags = [*FLAGS, "-b", 12, "--eval-train", "--pretrained", pretrained]
    folder = tmp_path / "several"
    statuses, out, err = program_of(processes, "main_lincls", *flags, "--save-dir", folder, data)
    # torch may say that rank 0, which ends first, has taken its store along
    assert statuses == [0] * processes and "main_lincls.py:" not in err, err
    assert out.count("Epoch 2 val") == out.count("Done. Best top-1") == 1  # rank 0 alone speaks
    status, out, err = programs("main_lincls", *flags, "--save-dir", tmp_path / "one", data)
    assert status == 0, err

    weights = [checkpoint.load(str(tmp_path / name / LAST))["state_dict"] for name in ("several", "one")]
    for name in weights[0]:  # the same global batches: the sums differ in their order alone
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    both = [[line for line in lines_of(tmp_path / name) if line["kind"] != "train"] for name in ("several", "one")]
    for several, one in zip(*both, strict=True):
        assert (several["kind"], several["top1"], several["top5"]) == (one["kind"], one["top1"], one["top5"])
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-4)

    # the same classifier, validated by one process and by several
    alone = programs("main_lincls", *FLAGS[:4], "-e", "--resume", folder / LAST, "--save-dir", tmp_path / "e1", data)
    assert alone[0] == 0, alone[2]
    flags = [*FLAGS[:4], "-b", 12, "-e", "--resume", folder / LAST, "--save-dir", tmp_path / "e2", data]
    statuses, _, err = program_of(processes, "main_lincls", *flags)
    assert statuses == [0] * processes, err
    found = [result(tmp_path / name) for name in ("e1", "e2")]
    assert found[0]["top1"] == found[1]["top1"] == lines_of(folder)[-2]["top1"] and found[0]["top5"] == found[1]["top5"]
    assert (tmp_path / "e1" / "per_class.csv").read_text() == (tmp_path / "e2" / "per_class.csv").read_text()


def test_evaluate(probe, data, pretrained, tmp_path, programs):
    flags = ["-a", ARCH, "--img-size", 32, "-j", 0, "-e", "--resume", probe[0] / BEST]
    before = {name: (probe[0] / name).read_bytes() for name in os.listdir(probe[0])}
    for more in ([], ["--pretrained", pretrained], ["--eval-train"]):
        status, out, err = programs("main_lincls", *flags, *more, "--save-dir", tmp_path / "e", data)
        assert status == 0 and "val: top-1" in out and "Epoch" not in out, err  # the same file may be validated again
        found = result(tmp_path / "e")
        assert (found["top1"], found["top5"]) == (result(probe[0])["top1"], 100)
        assert found["checkpoint"] == str(probe[0] / BEST)
        assert found["checkpoint_sha256"] == hashlib.sha256(before[BEST]).hexdigest()
    assert found["train_top1"] == result(probe[0])["train_top1"]
    assert sorted(os.listdir(tmp_path / "e")) == ["per_class.csv", "result.json"]
    assert {name: (probe[0] / name).read_bytes() for name in os.listdir(probe[0])} == before

    only_val = tmp_path / "data"
    shutil.copytree(os.path.join(data, "val"), only_val / "val")
    shutil.copy(probe[0] / BEST, tmp_path / "mine.pth.tar")
    flags[-1] = tmp_path / "mine.pth.tar"
    assert programs("main_lincls", *flags, only_val)[0] == 0  # neither a train folder nor a --save-dir
    assert result(tmp_path / "mine-evaluated")["top1"] == found["top1"]


def test_evaluate_keeps_other_results(probe, data, tmp_path, programs):
    folder = tmp_path / "r"
    shutil.copytree(probe[0], folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    flags = ["-a", ARCH, "--img-size", 32, "-j", 0, "-e", "--resume", folder / LAST, "--save-dir", folder, data]
    for _ in range(2):  # the second time it is the same result
        assert programs("main_lincls", *flags)[0] == 0
        now = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        assert set(now) ^ set(before) == {"result-1.json", "per_class-1.csv", "confusion-1.csv", "confusion.csv"}
        assert now["result-1.json"] == before["result.json"] and now["per_class-1.csv"] == before["per_class.csv"]
        assert now["confusion-1.csv"] == before["confusion.csv"] and now[LAST] == before[LAST]
    assert result(folder)["checkpoint"] == str(folder / LAST)
    status, _, err = programs("main_lincls", *flags, "--img-size", 48)
    assert status == 0 and err == (f"main_lincls.py: warning: --img-size 48: {folder / LAST} is of a run with 32\n")
    assert (folder / "result-2.json").read_bytes() == now["result.json"] and result(folder)["img_size"] == 48
    (folder / "result.json").write_text("[" * 100_000)  # which no reader of JSON takes
    assert programs("main_lincls", *flags)[0] == 0
    assert (folder / "result-3.json").read_text() == "[" * 100_000 and result(folder)["img_size"] == 32

    (tmp_path / "unfinished").mkdir()
    shutil.copy(probe[0] / LAST, tmp_path / "unfinished" / "checkpoint_semisup.pth.tar")
    flags[-2] = tmp_path / "unfinished"
    refused(programs("main_lincls", *flags), "holds a run (checkpoint_semisup.pth.tar); give another")
    flags[-2] = tmp_path / "a file"
    flags[-2].write_text("")
    refused(programs("main_lincls", *flags), "a file: is not a folder")


def forms(path, folder):
    """The published forms of a checkpoint: {name: path}."""
    whole = torch.load(path, weights_only=True)
    encoder = {name: w for name, w in whole["state_dict"].items() if "encoder_q." in name}
    plain = {n.removeprefix("module.encoder_q."): w for n, w in encoder.items() if ".fc." not in n}
    old = {"epoch": 200, "arch": ARCH, "state_dict": encoder}
    contents = {
        "published": {"epoch": 200, "arch": ARCH, "state_dict": encoder},
        "without_ddp": {**old, "state_dict": {n.removeprefix("module."): w for n, w in encoder.items()}},
        "torchvision": {**plain, "fc.weight": torch.ones(1000, 1024), "fc.bias": torch.ones(1000)},
    }
    for name, content in contents.items():
        torch.save(content, folder / name, _use_new_zipfile_serialization=name != "published")
    return [folder / name for name in contents]


def test_every_form_of_checkpoint_gives_the_same_probe(probe, data, pretrained, tmp_path, programs):
    for path in forms(pretrained, tmp_path):
        flags = [*FLAGS, "--pretrained", path, "--save-dir", tmp_path / f"{path.name}-run", data]
        status, out, err = programs("main_lincls", *flags)
        assert status == 0 and "336 tensors" in out, err
        ours = checkpoint.load(str(tmp_path / f"{path.name}-run" / LAST))["state_dict"]
        theirs = checkpoint.load(str(probe[0] / LAST))["state_dict"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert ("200 epochs" in out) == (path.name != "torchvision")


def test_random_is_another_backbone(probe, data, tmp_path, programs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = programs("main_lincls", *FLAGS, "--pretrained", "random", data)
    folder = tmp_path / f"random-{ARCH}-lincls-lr1"  # its own, where none is given
    assert status == 0 and "backbone           random weights, seed 3" in out, err
    assert result(folder)["checkpoint_sha256"] is None
    state = checkpoint.load(str(folder / LAST))["state_dict"]
    assert not torch.equal(state["module.conv1.0.weight"], checkpoint.load(str(probe[0] / LAST))["state_dict"]["module.conv1.0.weight"])  # fmt: skip # noqa: E501


def test_a_folder_of_its_own_beside_the_checkpoint(data, pretrained, tmp_path, programs):
    shutil.copy(pretrained, tmp_path / "checkpoint_0004.pth.tar")
    flags = [*FLAGS, "--epochs", 1, "--pretrained", tmp_path / "checkpoint_0004.pth.tar", data]
    assert programs("main_lincls", *flags)[0] == 0
    folder = tmp_path / "checkpoint_0004-lincls-lr1"
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    status, _, err = programs("main_lincls", *flags)
    refused((status, "", err), f"--save-dir {folder} holds another run ({LAST})")
    os.mkdir(tmp_path / "r")
    shutil.copy(folder / "result.json", tmp_path / "r")
    refused(programs("main_lincls", *flags, "--save-dir", tmp_path / "r"), "holds another run (result.json)")
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert programs("main_lincls", *flags, "--lr", 2)[0] == 0  # another learning rate, another folder
    (folder / "confusion.csv").write_text("of the old run")
    status, _, err = programs("main_lincls", *flags, "--seed", 4, "--overwrite")
    assert not (folder / "confusion.csv").exists()
    assert status == 0 and checkpoint.load(str(folder / LAST))["config"]["seed"] == 4, err


@pytest.mark.parametrize("name", ["checkpoint_0004.pth.tar", "checkpoint_semisup.pth.tar"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_run_of_another_program_is_left_alone(data, pretrained, tmp_path, programs, name, more):
    """Its log and settings would be lost: the folder of the pretraining is the first that comes to mind."""
    shutil.copy(pretrained, tmp_path / name)
    (tmp_path / "log.jsonl").write_text("{}\n")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    run = programs("main_lincls", *FLAGS, *more, "--pretrained", pretrained, "--save-dir", tmp_path, data)
    refused(run, f"--save-dir {tmp_path} holds a run of another program ({name}); give another")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_another_image_size_than_the_pretrainings_is_said(data, pretrained, tmp_path, programs):
    content = torch.load(pretrained, weights_only=True) | {"config": {"img_size": 64}}
    torch.save(content, tmp_path / "x.pth.tar")
    flags = [*FLAGS, "--epochs", 1, "--pretrained", tmp_path / "x.pth.tar", data]
    status, _, err = programs("main_lincls", *flags)
    assert status == 0
    assert err == f"main_lincls.py: warning: --img-size 32: {tmp_path / 'x.pth.tar'} is of a run with 64\n"


def test_sizes_of_batches(data, pretrained, tmp_path, programs):
    """More than the data set, one image, and a last batch of one image: 24 = 23 + 1."""
    for batch, steps in ((500, 1), (1, 24), (23, 1)):
        flags = [*FLAGS, "--epochs", 1, "-b", batch, "--pretrained", pretrained, "--save-dir", tmp_path / str(batch)]
        status, out, err = programs("main_lincls", *flags, data)
        assert status == 0 and f"steps per epoch    {steps}\n" in out, err


def refused(run, message, folder=None):
    status, out, err = run
    assert status == 2 and err.count("\n") == 1 and message in err and "Epoch" not in out, err
    assert folder is None or not os.path.exists(folder)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--pretrained is needed: a checkpoint's path, or 'random'"),
        ("-e", "-e validates a saved classifier: name it with --resume"),
        ("--resume auto", "holds no run yet, and a new one needs --pretrained"),
        ("--pretrained nowhere.pth.tar", "nowhere.pth.tar: no such checkpoint file"),
        ("-e --resume nowhere.pth.tar", "nowhere.pth.tar: no such checkpoint file"),
        ("-e --resume auto", "r holds no classifier"),
        ("--pretrained random --lr -1", "'-1' is not a number >= 0"),
        ("--pretrained random --lr-min 0.1", "--lr-min 0.1 goes with --cos"),
        ("--pretrained random --start-epoch 3", "--start-epoch 3 must be below --epochs 3"),
        ("--pretrained random -b 0", "'0' is not a whole number >= 1"),
        ("--pretrained random --train-percent 1", "unrecognized arguments: --train-percent"),
        ("--pretrained random --img-size 7", "'7' is not a whole number >= 8"),
        ("--pretrained random -a resnet5", "did you mean 'resnet50'"),
    ],
)
def test_bad_flags(data, tmp_path, programs, flags, message):
    refused(
        programs("main_lincls", *FLAGS, *flags.split(), "--save-dir", tmp_path / "r", data), message, tmp_path / "r"
    )


def test_auto_needs_a_folder(data, programs):
    refused(programs("main_lincls", *FLAGS, "--resume", "auto", data), "--resume auto looks in --save-dir: give it, or")


def test_bad_checkpoints(probe, data, pretrained, tmp_path, programs):
    folder = tmp_path / "r"

    def run(*flags):
        return programs("main_lincls", *FLAGS, *flags, "--save-dir", folder, data)

    message = f"is a checkpoint of '{ARCH}'; --arch is 'resnet18'"
    refused(run("-a", "resnet18", "--pretrained", pretrained), message, folder)
    refused(run("-a", "resnet18", "-e", "--resume", probe[0] / LAST), message, folder)
    message = f"{LAST}: is a classifier's checkpoint; --pretrained takes a pretraining's"
    refused(run("--pretrained", probe[0] / LAST), message, folder)
    for flags in (["-e", "--resume", pretrained], ["--pretrained", "random", "--resume", pretrained]):
        refused(run(*flags), "is a pretraining checkpoint; --pretrained takes it", folder)
    message = f"{LAST}: started from {pretrained}, which is not --pretrained's file"
    refused(run("--resume", probe[0] / LAST, "--pretrained", "random"), message, folder)
    refused(run("--resume", probe[0] / LAST, "--lr", 2, "-b", 4), "lr 1.0 → 2.0; global_batch 8 → 4", folder)
    refused(run("--resume", probe[0] / LAST, "--seed", 4), "was run with seed 3", folder)

    content = torch.load(pretrained, weights_only=True)
    del content["state_dict"]["module.encoder_q.conv5.0.weight"]
    torch.save(content, tmp_path / "lacks.pth.tar")
    refused(run("--pretrained", tmp_path / "lacks.pth.tar"), "missing: conv5.0.weight", folder)
    (tmp_path / "cut.pth.tar").write_bytes((probe[0] / LAST).read_bytes()[:20000])
    refused(run("--pretrained", tmp_path / "cut.pth.tar"), "cut.pth.tar: not a whole checkpoint file", folder)
    refused(run("-e", "--resume", tmp_path / "cut.pth.tar"), "cut.pth.tar: not a whole checkpoint file", folder)

    other = torch.load(probe[0] / LAST, weights_only=True)
    for change, message in (
        ({"best": 3}, "its best result is '3'"),
        ({"best": {"top1": "high"}}, "its best result is "),
        ({"last": [1.0]}, "its last result is '[1.0]'"),
        ({"last": {"top1": 1.0, "top5": 2.0, "epoch": "three"}}, "its last result is "),
        ({"best_acc1": [1.0]}, "its best_acc1 is [1.0], not a number"),
        ({"best_acc1": torch.ones(2)}, "its best_acc1 is tensor([1., 1.]), not a number"),
    ):
        torch.save(other | change, tmp_path / "other.pth.tar")
        refused(run("--resume", tmp_path / "other.pth.tar"), f"other.pth.tar: {message}", folder)
    other["config"] = {}  # as the reference's files, which say nothing of their settings
    other["state_dict"]["module.conv5.0.weight"] += 1
    torch.save(other, tmp_path / "other.pth.tar")
    message = f"other.pth.tar: its frozen backbone is not that of --pretrained {pretrained}"
    refused(run("--pretrained", pretrained, "--resume", tmp_path / "other.pth.tar"), message, folder)
    other["scheduler"] = {}
    torch.save(other, tmp_path / "other.pth.tar")
    refused(run("--resume", tmp_path / "other.pth.tar"), "is a checkpoint of main_semisup.py", folder)
    torch.save({"state_dict": other["state_dict"]}, tmp_path / "other.pth.tar")
    refused(run("--resume", tmp_path / "other.pth.tar"), "it has no epoch, best_acc1, optimizer", folder)


def test_bad_data(probe, data, pretrained, tmp_path, programs):
    def run(folder, *flags):
        return programs("main_lincls", *FLAGS, *(flags or ("--pretrained", pretrained)), "--save-dir", tmp_path / "r", folder)  # fmt: skip # noqa: E501

    make_images(tmp_path / "a" / "train", classes=3, images=2)
    make_images(tmp_path / "a" / "val", classes=4, images=2)
    refused(run(tmp_path / "a"), "train and val hold different classes: c3 (in val only)", tmp_path / "r")
    os.rename(tmp_path / "a" / "val" / "c3", tmp_path / "a" / "train" / "c3")
    for name in os.listdir(tmp_path / "a" / "train" / "c3"):
        os.remove(tmp_path / "a" / "train" / "c3" / name)
    os.mkdir(tmp_path / "a" / "val" / "c3")
    refused(run(tmp_path / "a"), "Found no valid file for the classes c3", tmp_path / "r")
    refused(run(tmp_path), "has no folder 'val' in it", tmp_path / "r")
    make_images(tmp_path / "b" / "val", classes=2, images=2)
    message = "knows other classes than"
    refused(run(tmp_path / "b", "-e", "--resume", probe[0] / LAST), message, tmp_path / "r")
    make_images(tmp_path / "c" / "train", classes=2, images=4)
    make_images(tmp_path / "c" / "val", classes=2, images=4)
    (tmp_path / "c" / "train" / "c1" / "2.jpg").write_bytes(b"not an image")
    status, _, err = run(tmp_path / "c")
    assert status == 2 and err.count("\n") == 1 and "2.jpg: cannot be read as an image" in err


def test_of_several_processes_one_speaks(data, pretrained, tmp_path):
    flags = [*FLAGS, "-a", "resnet18", "--pretrained", pretrained, "--save-dir", tmp_path / "r", data]
    statuses, _, err = program_of(2, "main_lincls", *flags)
    assert statuses == [2, 2] and err.count("main_lincls.py: error: ") == err.count("\n") == 1


def test_stem_and_statistics_come_from_the_checkpoint(program, programs, tool, data, tmp_path):
    """A ResNet with the small stem through pretraining, probe, fine-tuning, kNN, export and the converter."""
    flags = "-a resnet18 --stem cifar --stats cifar10 --epochs 1 --moco-dim 8 -b 8 -j 0 --img-size 16 --moco-k 16"
    off = "--n1 0 --n2 0 --n3 0 --n4 0 --n5 0 --n6 0"
    status, _, err = program(*flags.split(), *off.split(), "--save-dir", tmp_path / "pre", data)
    assert status == 0, err
    path = tmp_path / "pre" / "checkpoint_0000.pth.tar"
    common = ["-a", "resnet18", "-j", 0, "-b", 8, "--epochs", 1, "--pretrained", path]
    for name, more in (("main_lincls", ["--lr", 0.001]), ("main_semisup", ["--lr-classifier", 0.001])):
        status, out, err = programs(name, *common, *more, "--save-dir", tmp_path / name, data)
        # the features of so few steps may be far too large for any rate, which is told
        assert status == 0 and all("the loss has grown" in line for line in err.splitlines()), err
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["stem"], config["stats"], config["img_size"]) == ("cifar", "cifar10", 16)
    more = ["--lr", 0.001, "--stats", "imagenet"]
    status, _, err = programs("main_lincls", *common, *more, "--save-dir", tmp_path / "x", data)
    assert status == 0 and f"main_lincls.py: warning: --stats imagenet: {path} is of a run with cifar10\n" in err
    status, _, err = programs("main_lincls", *common, "--stem", "imagenet", "--save-dir", tmp_path / "y", data)
    assert status == 2 and err.count("\n") == 1 and "conv1.weight" in err and "(64, 3, 3, 3)" in err

    status, out, err = programs("synco.knn", path, data, "-j", 0)
    assert status == 0 and "resnet18 at 16 pixels" in out, err
    status, out, err = tool(importlib.import_module("synco.export"), path, tmp_path / "x.pth")
    assert status == 0 and "stem               cifar\nstats              cifar10\n" in out, err
    probe = tmp_path / "main_lincls" / "checkpoint_lincls.pth.tar"
    assert tool(importlib.import_module("synco.export"), probe, tmp_path / "y.pth")[0] == 0
