"""Fine-tuning as a user runs it: what is trained and how fast, label splits, several processes, and bad input."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import ARCH, cut_at, make_images, program_of, script
from PIL import Image
from test_main_lincls import equal, lines_of, refused, result

from synco import augment, checkpoint, datasets, subsets

FLAGS = f"-a {ARCH} --img-size 32 -j 0 -b 8 --epochs 3 --seed 3 -p 2 --lr-classifier 0.5".split()
TUNE = [*FLAGS, "--weights", "finetune", "--lr-backbone", "0.02"]
LAST, BEST = "checkpoint_semisup.pth.tar", "model_best_semisup.pth.tar"


@pytest.fixture(scope="module")
def tuned(data, pretrained, tmp_path_factory):
    """A fine-tuning of three epochs through the real command line → (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    return folder, script("main_semisup", *TUNE, "--pretrained", pretrained, "--save-dir", folder, data)


def backbone(path):
    return {n: w for n, w in checkpoint.load(str(path))["state_dict"].items() if not n.startswith("module.fc.")}


def test_fine_tuning_moves_everything_at_two_rates(tuned, pretrained):
    folder, run = tuned
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert "labels             24 of 24 images: all training images" in run.stdout
    last, before = checkpoint.load(str(folder / LAST)), torch.load(pretrained, weights_only=True)["state_dict"]
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "scheduler"} <= set(last)
    moved = {n for n, w in backbone(folder / LAST).items() if not torch.equal(w, before[n.replace("e.", "e.encoder_q.", 1)])}  # fmt: skip # noqa: E501
    assert moved == set(backbone(folder / LAST))  # weights, running statistics and their counter
    groups = last["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in groups] == [2, 168] and groups[0]["weight_decay"] == 1e-6
    rates = [(line["lr"], line["lr_backbone"]) for line in lines_of(folder) if line["kind"] == "train"]
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in (0, 0, 1, 1, 2, 2)]
    assert [lr for lr, _ in rates] == pytest.approx([0.5 * c for c in cosine])
    assert [lr for _, lr in rates] == pytest.approx([0.02 * c for c in cosine])
    assert result(folder)["top1"] == last["best_acc1"] and BEST in os.listdir(folder)


def test_freezing_moves_the_last_layer_alone(data, pretrained, tmp_path, programs):
    status, out, err = programs("main_semisup", *FLAGS, "--pretrained", pretrained, "--save-dir", tmp_path / "r", data)
    assert status == 0 and err == "", err
    before = torch.load(pretrained, weights_only=True)["state_dict"]
    for name, tensor in backbone(tmp_path / "r" / LAST).items():
        assert torch.equal(tensor, before[name.replace("e.", "e.encoder_q.", 1)]), name
    assert len(checkpoint.load(str(tmp_path / "r" / LAST))["optimizer"]["param_groups"]) == 1


def test_one_step_of_fine_tuning_is_plain_sgd(data, pretrained, tmp_path, programs):
    """The whole batch in one step, against a plain loop over torchvision's network and autograd."""
    import torchvision

    from synco import loader
    from synco.distributed import Process

    flags = [*TUNE, "--epochs", 2, "-b", 24, "--pretrained", pretrained, "--save-dir", tmp_path / "r", data]
    assert programs("main_semisup", *flags)[0] == 0
    torch.manual_seed(3)
    net = torchvision.models.get_model(ARCH, num_classes=3)
    torch.nn.init.normal_(net.fc.weight, std=0.01)
    torch.nn.init.zeros_(net.fc.bias)
    state = torch.load(pretrained, weights_only=True)["state_dict"]
    own = {n.removeprefix("module.encoder_q."): w for n, w in state.items() if "encoder_q" in n and ".fc." not in n}
    net.load_state_dict(own, strict=False)
    net.train()
    views = loader.Augmented(datasets.image_folder(data, "train"), augment.classifier_augmentation(32), 3)
    batches = loader.train_loader(views, 24, process=Process(), workers=0, seed=3, keep_last=True)
    velocity = {}
    for epoch in range(2):
        batches.batch_sampler.sampler.set_epoch(epoch)
        ((x, label),) = batches
        logs = net(x).log_softmax(dim=1)
        net.zero_grad()
        (-logs[torch.arange(24), label].mean()).backward()
        factor = 0.5 * (1 + math.cos(math.pi * epoch / 2))
        with torch.no_grad():
            for name, w in net.named_parameters():
                lr = factor * (0.5 if name.startswith("fc.") else 0.02)
                velocity[name] = 0.9 * velocity.get(name, 0) + w.grad + 1e-6 * w
                w -= lr * velocity[name]
    found = checkpoint.load(str(tmp_path / "r" / LAST))["state_dict"]
    for name, w in net.state_dict().items():
        torch.testing.assert_close(found["module." + name], w, rtol=1e-3, atol=1e-5, msg=name)


def test_an_interrupted_fine_tuning_ends_bit_identical(tuned, data, pretrained, tmp_path, programs, monkeypatch):
    flags = [*TUNE, "--pretrained", pretrained, "--resume", "auto", "--save-dir", tmp_path / "r", data]
    with monkeypatch.context() as patch:
        cut_at(patch, LAST, nth=3)
        assert programs("main_semisup", *flags)[0] == 130
    status, out, err = programs("main_semisup", *flags)
    assert status == 0 and "2 epochs done" in out, err
    assert equal(tmp_path / "r" / LAST, tuned[0] / LAST) and equal(tmp_path / "r" / BEST, tuned[0] / BEST)
    assert lines_of(tmp_path / "r") == lines_of(tuned[0])


def test_two_processes(data, pretrained, tmp_path, programs):
    """Uneven batches (24 labels in batches of 7 a process), one speaker, and a classifier that one process confirms."""
    flags = [*TUNE, "-b", 14, "--pretrained", pretrained, "--save-dir", tmp_path / "r", data]
    statuses, out, err = program_of(2, "main_semisup", *flags)
    assert statuses == [0, 0] and out.count("Done. Best top-1") == 1, err
    assert "steps per epoch    2" in out
    flags = [*FLAGS, "-e", "--resume", tmp_path / "r" / BEST, "--save-dir", tmp_path / "e", data]
    status, _, err = programs("main_semisup", *flags)
    assert status == 0 and result(tmp_path / "e")["top1"] == result(tmp_path / "r")["top1"], err


def test_ten_percent_and_its_list(data, pretrained, tmp_path, programs):
    listed = tmp_path / "list.txt"
    base = [*TUNE, "--epochs", 1, "--pretrained", pretrained]
    first = [*base, "--train-percent", 10, "--write-subset", listed, "--save-dir", tmp_path / "a", data]
    status, out, err = programs("main_semisup", *first)
    assert status == 0 and "labels             3 of 24 images: class-balanced draw, seed 3" in out, err
    lines = listed.read_text().splitlines()
    assert len(lines) == 3 and [line.split("/")[0] for line in lines] == ["c0", "c1", "c2"]
    listed.write_text("\n".join(reversed(lines)))  # the order of a list has no say
    status, out, err = programs("main_semisup", *base, "--subset-file", listed, "--save-dir", tmp_path / "b", data)
    assert status == 0 and f"3 of 24 images: {listed}" in out, err
    states = [checkpoint.load(str(tmp_path / name / LAST))["state_dict"] for name in "ab"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    listed.write_text("\n".join(lines[:2]))
    flags = [*base, "--subset-file", listed, "--resume", "auto", "--save-dir", tmp_path / "b", data]
    refused(programs("main_semisup", *flags), "subset_sha256")


def test_a_list_that_cannot_be_written_costs_no_run(tuned, data, pretrained, tmp_path, programs):
    """--overwrite gives the old run up for a new one, and there is none yet."""
    folder, listed = tmp_path / "r", tmp_path / "list.txt"
    shutil.copytree(tuned[0], folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    listed.write_text("mine")
    flags = [*TUNE, "--overwrite", "--pretrained", pretrained, "--save-dir", folder, data, "--write-subset"]
    for path, why in (
        (listed, "is there and holds something else"),
        (tmp_path / "none" / "list.txt", "cannot be written"),
    ):
        refused(programs("main_semisup", *flags, path), f"--write-subset {path}: {why}")
        assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert listed.read_text() == "mine"


def test_evaluating_on_the_training_images_takes_those_of_the_run(data, pretrained, tmp_path, programs):
    percent = ["--train-percent", 10]
    flags = [*TUNE, "--epochs", 1, *percent, "--eval-train", "--pretrained", pretrained, "--save-dir", tmp_path / "r"]
    assert programs("main_semisup", *flags, data)[0] == 0
    base = [*FLAGS[:6], "-e", "--resume", tmp_path / "r" / LAST, "--eval-train", "--save-dir", tmp_path / "e", data]
    status, out, err = programs("main_semisup", *base, *percent)  # the seed is the run's
    assert status == 0 and result(tmp_path / "e")["train_top1"] == result(tmp_path / "r")["last"]["train_top1"], err
    for more in ([], ["--train-percent", 1]):
        run = programs("main_semisup", *base, *more)
        assert run[0] == 2 and "was trained on other images (3) than the " in run[2]


def test_a_start_epoch_has_its_own_rate(data, tmp_path, programs):
    flags = [*TUNE, "--epochs", 4, "--start-epoch", 3, "--pretrained", "random", "--save-dir", tmp_path / "r", data]
    assert programs("main_semisup", *flags)[0] == 0
    rates = [line["lr"] for line in lines_of(tmp_path / "r") if line["kind"] == "train"]
    assert rates == pytest.approx([0.5 * 0.5 * (1 + math.cos(math.pi * 3 / 4))] * len(rates)) and rates


def test_the_published_scheduler_key_is_torchs(tuned):
    """torch's own scheduler takes it and goes on as if it had made the steps itself."""
    found = checkpoint.load(str(tuned[0] / LAST))["scheduler"]

    def scheduler(epochs=5):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.5, 0.02)]
        return torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(groups), epochs)

    theirs = scheduler(3)
    for _ in range(3):
        theirs.optimizer.step()
        theirs.step()
    state = theirs.state_dict()
    for name in ("T_max", "eta_min", "base_lrs", "last_epoch", "_step_count"):
        assert found[name] == state[name], name
    assert found["_last_lr"] == pytest.approx(state["_last_lr"], abs=1e-12)
    scheduler().load_state_dict(found)


def test_file_names_of_any_bytes(pretrained, tmp_path, programs):
    make_images(tmp_path / "d" / "train", classes=2, images=3)
    make_images(tmp_path / "d" / "val", classes=2, images=2)
    folder = os.fsencode(tmp_path / "d" / "train" / "c0")
    os.rename(folder + b"/0.jpg", folder + b"/caf\xe9 .jpg")
    listed = tmp_path / "list"
    flags = [*TUNE, "--epochs", 1, "--pretrained", pretrained]
    status, out, err = programs(
        "main_semisup", *flags, "--write-subset", listed, "--save-dir", tmp_path / "a", tmp_path / "d"
    )
    assert status == 0 and b"c0/caf\xe9 .jpg\n" in listed.read_bytes(), err
    status, out, err = programs(
        "main_semisup", *flags, "--subset-file", listed, "--save-dir", tmp_path / "b", tmp_path / "d"
    )
    assert status == 0 and "6 of 6 images" in out, err


def test_a_last_batch_of_one_image_does_not_crash_batch_norm(data, pretrained, tmp_path, programs):
    for batch, status in ((23, 0), (500, 0), (1, 2)):
        flags = [*TUNE, "--epochs", 1, "-b", batch, "--pretrained", pretrained, "--save-dir", tmp_path / f"{batch}"]
        found, out, err = programs("main_semisup", *flags, data)
        assert found == status, err
    assert "BatchNorm needs two when the backbone is fine-tuned" in err and err.count("\n") == 1
    flags = [*FLAGS, "--epochs", 1, "-b", 1, "--pretrained", pretrained, "--save-dir", tmp_path / "frozen", data]
    assert programs("main_semisup", *flags)[0] == 0


def test_warnings(data, tmp_path, programs):
    for flags, message in (
        ("--lr-backbone 0.1", "--weights freeze with --lr-backbone 0.1: the backbone stays frozen"),
        ("--weights finetune", "--weights finetune with --lr-backbone 0: the backbone's weights will not move"),
    ):
        more = [*flags.split(), "--epochs", 1, "--pretrained", "random", "--save-dir", tmp_path / flags[:5], data]
        status, _, err = programs("main_semisup", *FLAGS, *more)
        assert status == 0 and err == f"main_semisup.py: warning: {message}\n"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """1,000 classes with ImageNet's kind of name, an image each."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for i in range(1000):
            (folder / split / f"n{i:08}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / split / f"n{i:08}" / f"n{i:08}_7.JPEG")
    return folder


def test_imagenets_lists(imagenet, tmp_path, programs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subsets, "URL", "http://localhost:9/")
    base = [*FLAGS, "--train-percent", 1, "--pretrained", "random", "--save-dir", tmp_path / "r", imagenet]
    refused(programs("main_semisup", *base), "SimCLR's list 1percent.txt cannot be downloaded", tmp_path / "r")
    listed = tmp_path / "other.txt"
    listed.write_text("n90000001_1.JPEG\nn90000002_1.JPEG\n")
    message = f"{listed}: a list of other images: 2 of its classes are not in"
    refused(programs("main_semisup", *base, "--subset-file", listed), message, tmp_path / "r")
    listed.write_text("n00000001_7.JPEG\nn00000002_8.JPEG\n")
    message = f"{listed}: 1 of its 2 images are not in"
    refused(programs("main_semisup", *base, "--subset-file", listed), message, tmp_path / "r")
    listed.write_text("n00000001_7.JPEG\nn00000002_7.JPEG\n")
    more = ["--epochs", 1, "--subset-file", listed, "--write-subset", tmp_path / "again.txt"]
    status, out, err = programs("main_semisup", *base, *more)
    assert status == 0 and "labels             2 of 1000 images" in out, err
    assert (tmp_path / "again.txt").read_text() == listed.read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--train-percent 5", "invalid choice: 5"),
        ("--weights thaw", "invalid choice: 'thaw'"),
        ("--lr-backbone -1", "'-1' is not a number >= 0"),
        ("--subset-file nowhere.txt", "nowhere.txt: the list of images cannot be read (No such file or directory)"),
    ],
)
def test_bad_flags(data, tmp_path, programs, flags, message):
    run = programs("main_semisup", *FLAGS, *flags.split(), "--pretrained", "random", "--save-dir", tmp_path / "r", data)
    refused(run, message, tmp_path / "r")


def test_bad_checkpoints(tuned, data, pretrained, tmp_path, programs):
    probe = torch.load(tuned[0] / LAST, weights_only=True)
    del probe["scheduler"]
    torch.save(probe, tmp_path / "checkpoint_lincls.pth.tar")
    for flags, message in (
        (["--resume", tmp_path / "checkpoint_lincls.pth.tar"], "is a checkpoint of main_lincls.py"),
        (["--resume", tuned[0] / LAST, "--weights", "freeze"], "weights finetune → freeze"),
        (["--resume", tuned[0] / LAST, "--lr-backbone", 0.1, "--epochs", 9], "epochs 3 → 9; lr_backbone 0.02 → 0.1"),
        (["--pretrained", tuned[0] / BEST], "is a classifier's checkpoint"),
        (["--resume", pretrained], "is a pretraining checkpoint; --pretrained takes it"),
    ):
        refused(programs("main_semisup", *TUNE, *flags, "--save-dir", tmp_path / "r", data), message, tmp_path / "r")


def test_a_fine_tuned_classifier_is_evaluated_by_either_script(tuned, data, tmp_path, programs):
    for name in ("main_lincls", "main_semisup"):
        flags = [*FLAGS[:6], "-e", "--resume", tuned[0] / BEST, "--save-dir", tmp_path / name, data]
        assert programs(name, *flags)[0] == 0
        assert result(tmp_path / name)["top1"] == result(tuned[0])["top1"]


def test_another_number_of_images_is_another_run(tuned, data, tmp_path, programs):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    make_images(folder / "train", classes=3, images=9)
    shutil.copytree(tuned[0], tmp_path / "r")
    flags = [*TUNE, "--resume", "auto", "--save-dir", tmp_path / "r", folder]
    refused(programs("main_semisup", *flags), "train_images 24 → 27")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["train_images"] == 24
