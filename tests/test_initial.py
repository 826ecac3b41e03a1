"""What a pretraining begins with: weights of anybody's, taken as far as they fit, and a queue of real images' keys."""

import json
import os
import shutil
import urllib.error

import pytest
import torch
import torchvision
from conftest import ARCH, SMALL, program_of

from synco import builder, checkpoint, export, initial
from synco.builder import SynCo
from synco.networks import network_of
from synco.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A pretraining's checkpoint in the published format whose key encoder and queue are whole → (path, its model)."""
    torch.manual_seed(5)
    model = SynCo(network_of(ARCH, 32), 16, 64, n_hard=8)
    model(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))  # its statistics are of some images
    for weight in model.encoder_k.parameters():
        weight.data += 1  # the key encoder is another
    state = {"module." + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": ARCH, "state_dict": state, "optimizer": {}}, path)
    return path, model


@pytest.fixture
def begun(program, monkeypatch):
    """begun("flags ...") → (status, stdout, stderr, state dict as the first step finds it)."""
    seen, forward = [], SynCo.forward

    def watch(self, *given, **more):
        seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
        return forward(self, *given, **more)

    monkeypatch.setattr(SynCo, "forward", watch)

    def run(*flags):
        seen.clear()
        return *program(*flags), seen[0] if seen else None

    return run


def part(state, encoder):
    return {n.removeprefix(encoder + "."): tensor for n, tensor in state.items() if n.startswith(encoder + ".")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_pretrainings_weights(weights, data, tmp_path, begun):
    """The query encoder with its head and statistics, and the key encoder a copy of it; nothing else of the file."""
    path, model = weights
    folder = tmp_path / "r"
    status, out, err, state = begun(*SMALL, "--init-from", path, "--save-dir", folder, data)
    assert status == 0 and err == "", err
    words = f"backbone: 336 of 336 tensors from {path} ({ARCH}, 200 epochs); head: taken"
    assert f"initial weights    {words}\n" in out and "resumed" not in out and "Epoch 0 [1/3]" in out
    wanted = model.encoder_q.state_dict()
    assert same(part(state, "encoder_q"), wanted) and same(part(state, "encoder_k"), wanted)
    assert not torch.equal(state["queue"], model.queue) and (folder / "checkpoint_0001.pth.tar").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["init_from"] == str(path) and len(config["init_sha256"]) == 64 and config["initial_weights"] == words


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--moco-dim 8", "not taken (1024-1024-16 there, 1024-1024-8 here)"),
        ("", "not taken (1024-1024-16 there, 1024-16 here)"),
    ],
)
def test_a_head_that_does_not_fit_is_left(weights, data, tmp_path, begun, flags, told):
    path, model = weights
    words = [word for word in SMALL if word != "--mlp" or flags]
    status, out, err, state = begun(*words, *flags.split(), "--init-from", path, "--save-dir", tmp_path / "r", data)
    assert status == 0 and f"; head: {told}\n" in out, err
    query, wanted = part(state, "encoder_q"), model.encoder_q.state_dict()
    backbone = {name for name in wanted if not name.startswith("fc.")}
    assert all(torch.equal(query[name], wanted[name]) for name in backbone)
    assert same(part(state, "encoder_k"), query)  # in its new head, too


def test_other_files(weights, data, tmp_path, begun, tool):
    """Exports with and without a head, in both formats, torchvision's, a fine-tuned classifier, MoCo's published."""
    pytest.importorskip("safetensors")
    path, model = weights
    torch.manual_seed(7)
    network = torchvision.models.get_model(ARCH)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": network.state_dict(), "arch": ARCH, "best_acc1": 3.0, "epoch": 9}, tmp_path / "tuned.tar")
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in model.encoder_q.state_dict().items()}
    torch.save({"epoch": 200, "arch": ARCH, "state_dict": moco}, tmp_path / "moco.pth.tar")
    assert tool(export, path, tmp_path / "bare.pth")[0] == 0
    assert tool(export, path, tmp_path / "whole.safetensors", "--with-head")[0] == 0
    for name, source, known, head in (
        ("plain.pth", network, "", "not taken (1024-1000 there, 1024-1024-16 here)"),
        ("tuned.tar", network, f" ({ARCH}, 9 epochs)", "not taken (a classifier's)"),
        ("moco.pth.tar", model.encoder_q, f" ({ARCH}, 200 epochs)", "taken"),
        ("bare.pth", model.encoder_q, "", "not taken (there is none)"),
        ("whole.safetensors", model.encoder_q, f" ({ARCH}, 200 epochs)", "taken"),
    ):
        flags = ["--epochs", 1, "--init-from", tmp_path / name, "--save-dir", tmp_path / f"from-{name}", data]
        status, out, err, state = begun(*SMALL, *flags)
        assert status == 0, err
        assert f"backbone: 336 of 336 tensors from {tmp_path / name}{known}; head: {head}\n" in out
        wanted, found = source.state_dict(), part(state, "encoder_q")
        taken = {key for key in wanted if head == "taken" or not key.startswith("fc.")}
        assert all(torch.equal(found[key], wanted[key]) for key in taken)


def test_torchvisions_own_download(data, tmp_path, begun, monkeypatch):
    """torch keeps what it has fetched under $TORCH_HOME; here it finds such a file, and then none and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(7)
    network = torchvision.models.get_model(ARCH)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision.models.get_model_weights(ARCH)["IMAGENET1K_V1"].url
    kept = tmp_path / "hub" / "checkpoints" / os.path.basename(url)
    torch.save(network.state_dict(), kept)
    flags = [*SMALL, "--epochs", 1, "--init-from", "torchvision:IMAGENET1K_V1", "--save-dir", tmp_path / "r", data]
    status, out, err, state = begun(*flags)
    assert status == 0 and f"from torchvision:IMAGENET1K_V1 ({ARCH}); head: not taken (a classifier's)\n" in out, err
    wanted, found = network.state_dict(), part(state, "encoder_q")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if not name.startswith("fc."))

    def refused(*given, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refused)
    flags[flags.index(tmp_path / "r")] = tmp_path / "none"
    for content, why in ((b"torn", ""), (None, "no network")):
        kept.unlink() if content is None else kept.write_bytes(content)
        status, out, err, _ = begun(*flags)
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "none").exists()
        assert "--init-from torchvision:IMAGENET1K_V1: cannot be fetched (" in err and why in err


def test_weights_are_not_read_again(weights, data, tmp_path, program):
    """A run of them that is stopped goes on with its checkpoint, its file gone, and ends as one that never stopped."""
    there = tmp_path / "there.pth.tar"
    shutil.copy(weights[0], there)
    flags = [*SMALL, "--init-from", there, "--mask-same-image", "--resume", "auto", data]
    assert program(*flags, "--save-dir", tmp_path / "a")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.remove(tmp_path / "b" / "checkpoint_0001.pth.tar")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    os.remove(there)
    for name in "bc":  # with the flag and without
        words = [word for word in flags if name == "b" or word not in ("--init-from", there)]
        status, out, err = program(*words, "--save-dir", tmp_path / name)
        assert status == 0 and "1 epochs done" in out and "initial weights" not in out and "queue  " not in out, err
        a, b = (checkpoint.load(str(tmp_path / x / "checkpoint_0001.pth.tar")) for x in ("a", name))
        assert same(a["state_dict"], b["state_dict"]) and torch.equal(a["queue_index"], b["queue_index"])
        assert b["config"]["init_from"] == str(there) and b["config"]["init_sha256"] == a["config"]["init_sha256"]
    os.remove(tmp_path / "b" / "checkpoint_0001.pth.tar")
    flags[flags.index(there)] = "other.tar"
    status, _, err = program(*flags, "--save-dir", tmp_path / "b")
    message = f"--init-from other.tar: {tmp_path}/b/checkpoint_0000.pth.tar is of a run that began with {there}; leave"
    assert status == 2 and err.count("\n") == 1 and message in err


def test_bad_weights(weights, data, tmp_path, program):
    path, _ = weights
    broken = checkpoint.load(str(path))
    broken["state_dict"]["module.encoder_q.fc.0.bias"][3] = float("nan")
    torch.save(broken, tmp_path / "nan.tar")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for flags, message in (
        (["--init-from", tmp_path / "none.tar"], "none.tar: no such checkpoint file"),
        (["--init-from", tmp_path / "nan.tar"], "nan.tar: fc.0.bias holds values that are not finite"),
        (["--init-from", tmp_path / "resnet.pth"], "resnet.pth: its weights do not fit this network: missing: conv1"),
        (["--init-from", tmp_path / "torn.safetensors"], "torn.safetensors: not a whole .safetensors file ("),
        (["--init-from", path, "-a", "resnet18"], f"is a checkpoint of '{ARCH}'; --arch is 'resnet18'"),
        (["--init-from", path, "--resume", "x.tar"], f"--init-from {path} begins a run, and --resume x.tar goes on"),
        (["--init-from", ""], "--init-from '': must name weights"),
        (["--init-from", "torchvision:IMAGENET1K_V7"], f"torchvision's weights of {ARCH} are IMAGENET1K_V1, DEFAULT"),
    ):
        status, out, err = program(*SMALL, *flags, "--save-dir", tmp_path / "r", data)
        assert status == 2 and out == "" and err.count("\n") == 1 and message in err, err
        assert not (tmp_path / "r").exists()
    pytest.importorskip("timm")
    flags = ["-a", "timm:resnet18", "--init-from", "torchvision:X", "--save-dir", tmp_path / "r", data]
    status, _, err = program(*SMALL, *flags)
    assert status == 2 and "--init-from torchvision:X: -a timm:resnet18 is none of torchvision's networks" in err

    (tmp_path / "r").mkdir()
    inside = tmp_path / "r" / "checkpoint_0199.pth.tar"
    shutil.copy(path, inside)
    status, _, err = program(*SMALL, "--init-from", inside, "--overwrite", "--save-dir", tmp_path / "r", data)
    assert status == 2 and f"--overwrite would remove {inside}, which --init-from names" in err and inside.exists()


def test_other_statistics_are_said(weights, data, tmp_path, program):
    content = checkpoint.load(str(weights[0])) | {"config": {"stats": "cifar10"}}
    torch.save(content, tmp_path / "x.tar")
    flags = ["--epochs", 1, "--init-from", tmp_path / "x.tar", "--save-dir", tmp_path / "r", data]
    status, _, err = program(*SMALL, *flags)
    assert status == 0 and f"--stats imagenet: {tmp_path}/x.tar is of a run with cifar10" in err
    status, _, err = program(*SMALL, *flags, "-a", "resnet18", "--overwrite")
    assert (status, err.count("\n")) == (2, 1) and "; --arch is 'resnet18'" in err  # of a mistake, nothing else


# ---------------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("more", ["", "--symmetric --mask-same-image", "--bn-splits 2 -a mobilenet_v3_small"])
def test_a_filled_queue_changes_no_batch_and_no_encoder(data, tmp_path, begun, monkeypatch, more):
    """With a learning rate of 0 and a momentum of 1 the only difference to a run without it is in the queue."""
    views, forward = [], builder.SynCo.forward

    def watch(self, im_q, im_k, *given, **rest):
        views.append((im_q.clone(), im_k.clone(), rest["index"].clone()))
        return forward(self, im_q, im_k, *given, **rest)

    monkeypatch.setattr(builder.SynCo, "forward", watch)
    flags, seen = [*SMALL, "--epochs", 1, "--lr", 0, "--moco-m", 1, *more.split(), data], {}
    for way in ("--fill-queue", "--no-fill-queue", "again"):
        views.clear()
        fill = "--fill-queue" if way == "again" else way
        status, out, err, state = begun(*flags, fill, "--save-dir", tmp_path / way)
        assert status == 0, err
        assert ("before the first step, going through them" in out) == (fill == "--fill-queue")
        seen[way] = list(views), state, checkpoint.load(str(tmp_path / way / "checkpoint_0000.pth.tar"))
    filled, plain, again = seen.values()
    assert all(torch.equal(x, y) for a, b in zip(filled[0], plain[0], strict=True) for x, y in zip(a, b))
    queues = [before.pop("queue") for _, before, _ in seen.values()]
    assert same(filled[1], plain[1])  # encoders, BatchNorm's statistics and, as 64 is a multiple of 8, the pointer
    assert torch.equal(queues[0], queues[2]) and not torch.isclose(queues[0], queues[1]).all(dim=1).any()
    assert same(filled[2]["state_dict"], again[2]["state_dict"])
    if "mask" in more:
        assert (filled[2]["queue_index"] >= 0).all() and (plain[2]["queue_index"] == -1).any()


class Batches:
    """A loader of three batches of two vectors, which notes the epochs that it is asked for."""

    def __init__(self):
        self.batch_sampler, self.batch_size, self.epochs = self, 2, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return 3

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epochs[-1])
        for i in range(3):
            yield *torch.randn(2, 2, 6, generator=generator), torch.tensor([2 * i, 2 * i + 1])


def test_the_queue_is_the_keys_of_the_images(capsys):
    """Five rows, by batches of two: the third comes round to the first row. And fifteen, of six images."""

    def linear(num_classes):
        return torch.nn.Linear(6, num_classes)

    for K in (5, 15):
        torch.manual_seed(0)
        model, batches = SynCo(linear, 4, K, n_hard=1, mlp=False, mask_same_image=True), Batches()
        initial.fill_queue(model, batches, Precision(CPU))
        first = initial.UNREACHED
        assert batches.epochs == list(range(first, first + (1 if K == 5 else 3)))
        assert ("going through them 3 times" in capsys.readouterr().out) == (K == 15)
        again, rows, images = Batches(), [], []
        for epoch in batches.epochs:
            again.set_epoch(epoch)
            for _, im_k, index in again:
                rows += list(im_k.double() @ model.encoder_k.weight.double().T + model.encoder_k.bias.double())
                images += index.tolist()
        count = 6 if K == 5 else 16
        assert model.queue_ptr.item() == count % K
        for row in range(count - K, count):  # the last to be put into each row
            wanted = rows[row] / rows[row].norm()
            torch.testing.assert_close(model.queue[row % K].double(), wanted, atol=1e-6, rtol=1e-5)
            assert model.queue_index[row % K].item() == images[row]


def test_two_processes_begin_alike(weights, data, tmp_path):
    """Whoever goes on from their first checkpoint has one queue; and they are the same started again."""
    flags = [*SMALL, "--epochs", 1, "--init-from", weights[0], "--mask-same-image"]
    for name in "ab":
        statuses, out, err = program_of(2, "main_synco", *flags, "--save-dir", tmp_path / name, data)
        assert statuses == [0, 0], err
        assert out.count("initial weights") == out.count("queue   ") == 1
    a, b = (checkpoint.load(str(tmp_path / name / "checkpoint_0000.pth.tar")) for name in "ab")
    assert same(a["state_dict"], b["state_dict"]) and torch.equal(a["queue_index"], b["queue_index"])
    assert (a["queue_index"] >= 0).all()
