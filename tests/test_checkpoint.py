"""Checkpoint files: the published formats, written whole or not at all, and never executed."""

import copy
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
import torchvision

from synco import checkpoint
from synco.builder import SynCo, network_of
from synco.options import UserError

FEW = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1}


def resnet(seed=0, K=48):
    torch.manual_seed(seed)
    model = SynCo(network_of("resnet18", 32), 16, K, mlp=True, **FEW)
    return model, torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)


def step(model, optimizer):
    g = torch.Generator().manual_seed(5)
    logits, labels = model(*torch.randn(2, 4, 3, 32, 32, generator=g), step=0)
    optimizer.zero_grad()
    F.cross_entropy(logits, labels).backward()
    optimizer.step()


@pytest.fixture(scope="module")
def published():
    """A checkpoint in the reference's format, put together from facts about the format and not by `save`."""
    model, optimizer = resnet()
    step(model, optimizer)
    content = {
        "epoch": 7,
        "arch": "resnet18",
        "state_dict": {"module." + name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    return content, model, optimizer


def test_names_and_keys_are_the_published_ones(published):
    content, model, optimizer = published
    names = list(checkpoint.prefixed(model))
    assert all(name.startswith(("module.encoder_q.", "module.encoder_k.", "module.queue")) for name in names)
    assert {"module.encoder_q.conv1.weight", "module.encoder_k.fc.2.bias", "module.queue", "module.queue_ptr"} < set(
        names
    )
    assert content["state_dict"]["module.queue"].shape == (48, 16)
    state = optimizer.state_dict()
    assert len(state["param_groups"]) == 1 and len(state["param_groups"][0]["params"]) == 128
    assert sorted(state["state"]) == list(range(64))  # momentum for the query encoder's parameters alone


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_that_is_fused_reads_the_state_of_one_that_is_not(fused):
    """A fused AdamW wants its counts of steps on the device and in float32, the other one leaves them as they are."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    saved = torch.optim.AdamW(weights[:1], 0.1, fused=not fused)
    weights[0].sum().backward()
    saved.step()
    state = saved.state_dict()
    state["state"][0]["step"] = state["state"][0]["step"].double()
    optimizer = torch.optim.AdamW(weights[1:], 0.2, fused=fused)
    checkpoint.load_optimizer({"optimizer": state}, "x", optimizer)
    assert optimizer.state[weights[1]]["step"].dtype == (torch.float32 if fused else torch.float64)
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["lr"]) == (fused, 0.2)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("moco_queue", [True, False])
def test_the_references_checkpoint_resumes_with_its_optimizer(published, tmp_path, prefix, moco_queue):
    content, trained, trained_optimizer = published
    state = content["state_dict"] if prefix else checkpoint.unprefixed(content["state_dict"])
    if moco_queue:  # MoCo's queue is (C, K)
        name = "module.queue" if prefix else "queue"
        state = {**state, name: state[name].T.contiguous()}
    path = str(tmp_path / "checkpoint_0006.pth.tar")
    torch.save({**content, "state_dict": state}, path)

    model, optimizer = resnet(seed=1)
    optimizer.param_groups[0]["weight_decay"] = 5e-4
    assert checkpoint.resume(checkpoint.load(path), path, model, optimizer, "resnet18") == 7
    assert same(model, trained)
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4  # the command line's, not the file's
    twin, twin_optimizer = copy.deepcopy((trained, trained_optimizer))
    twin_optimizer.param_groups[0]["weight_decay"] = 5e-4
    step(model, optimizer)
    step(twin, twin_optimizer)
    assert same(model, twin)  # the momentum came along


@pytest.mark.parametrize("old_format", [True, False])
def test_moco_published_weights_load(tmp_path, old_format):
    """MoCo's published files: the query encoder alone, in torch's format of 2020."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=128)
    path = str(tmp_path / "moco_v1_200ep_pretrain.pth.tar")
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    assert zipfile.is_zipfile(path) != old_format
    found = checkpoint.backbone(checkpoint.load(path), path)
    backbone = {name: w for name, w in network.state_dict().items() if not name.startswith("fc.")}
    assert found.keys() == backbone.keys() and all(torch.equal(found[name], backbone[name]) for name in backbone)
    model, optimizer = resnet()
    with pytest.raises(UserError, match="not a pretraining checkpoint that can be resumed: it has no optimizer"):
        checkpoint.resume(checkpoint.load(path), path, model, optimizer, "resnet18")


def names_of(network):
    return {name for name in network.state_dict() if not name.startswith("fc.")}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_the_backbone_of_torchvisions_weights(tmp_path, prefix, bare):
    torch.manual_seed(3)
    source, network = torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=7)
    weights = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save(weights if bare else {"state_dict": weights}, tmp_path / "x.pth")
    found = checkpoint.backbone(checkpoint.load(tmp_path / "x.pth"), "x.pth", arch="resnet18")
    assert checkpoint.load_backbone(network, "fc", found, "x.pth") == len(names_of(source)) == 120
    assert all(torch.equal(network.state_dict()[name], source.state_dict()[name]) for name in names_of(source))


def test_the_backbone_of_a_pretraining_is_the_query_encoder(published):
    content, model, _ = published
    found = checkpoint.backbone(content, "x")
    encoder = model.encoder_q.state_dict()
    assert set(found) == names_of(torchvision.models.resnet18())
    assert all(torch.equal(found[name], encoder[name]) for name in found)
    old = {name: w for name, w in found.items() if not name.endswith("num_batches_tracked")}  # before torch 0.4.1
    network = torchvision.models.resnet18()
    assert checkpoint.load_backbone(network, "fc", old, "x") == 100
    assert all(torch.equal(network.state_dict()[name], old[name]) for name in old)
    # weights in half precision, and the auxiliary classifiers of torchvision's own files
    half = {name: w.half() if w.is_floating_point() else w for name, w in found.items()}
    assert checkpoint.load_backbone(network, "fc", half, "x") == 120 and network.conv1.weight.dtype == torch.float32
    assert checkpoint.backbone({"state_dict": {"conv.w": 1, "aux1.fc1.weight": 2, "fc.weight": 3}}, "x") == {
        "conv.w": 1
    }


def test_a_backbone_that_does_not_fit_is_refused_with_the_names(published):
    content, _, _ = published
    with pytest.raises(UserError, match="x: is a checkpoint of 'resnet18'; --arch is 'resnet50'"):
        checkpoint.backbone(content, "x", arch="resnet50")
    classifier = {"state_dict": torchvision.models.resnet18().state_dict(), "best_acc1": 12.5, "arch": "resnet18"}
    with pytest.raises(UserError, match="x: is a classifier's checkpoint; --pretrained takes a pretraining's"):
        checkpoint.backbone(classifier, "x")
    assert set(checkpoint.backbone(classifier, "x", classifier=True)) == names_of(torchvision.models.resnet18())

    network = torchvision.models.resnet18()
    before = copy.deepcopy(network)
    good = checkpoint.backbone(content, "x")
    for change, message in (
        ({"conv1.weight": None}, r"missing: conv1\.weight$"),
        ({"conv1.weight": None, "bn1.weight": None, "bn1.bias": None, "layer4.0.conv1.weight": None}, "and 1 more$"),
        ({"layer5.weight": torch.ones(2)}, r"unknown: layer5\.weight$"),
        ({"bn1.bias": torch.ones(32)}, r"of another shape: bn1\.bias \(\(32,\) where \(64,\) is wanted\)$"),
        ({"bn1.running_var": torch.full((64,), float("nan"))}, "bn1.running_var holds values that are not finite"),
    ):
        weights = {name: w for name, w in {**good, **change}.items() if w is not None}
        with pytest.raises(UserError, match=message):
            checkpoint.load_backbone(network, "fc", weights, "x")
        assert same(network, before)
    deeper = checkpoint.backbone({"state_dict": torchvision.models.resnet152().state_dict()}, "x")
    with pytest.raises(UserError, match="unknown: layer2.4.conv1.weight, "):  # every name of resnet50 is in it
        checkpoint.load_backbone(torchvision.models.resnet50(), "fc", deeper, "x")
    with pytest.raises(UserError, match="missing: conv1.weight, .*; unknown: encoder_k.conv1.weight, .* and 117 more"):
        keys = {"encoder_k." + name: w for name, w in good.items()}
        checkpoint.load_backbone(network, "fc", checkpoint.backbone({"state_dict": keys}, "x"), "x")


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert checkpoint.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arch": "resnet50"}, "is a checkpoint of 'resnet50'; --arch is 'resnet18'"),
        ({"optimizer": None}, "its optimizer state does not fit"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "its optimizer state does not fit"),
        ({"epoch": "seven"}, "its epoch is 'seven'"),
        ({"epoch": -1}, "its epoch is -1"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(published, change, message):
    content, _, _ = published
    model, optimizer = resnet(seed=1)
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=message):
        checkpoint.resume({**content, **change}, "x.pth.tar", model, optimizer, "resnet18")
    assert same(model, before) and not optimizer.state


def test_missing_unknown_and_misshapen_tensors_are_named(published):
    content, _, _ = published
    model, optimizer = resnet(seed=1, K=96)
    with pytest.raises(UserError, match=r"of another shape: queue \(\(48, 16\) where \(96, 16\) is wanted\)"):
        checkpoint.resume(content, "x", model, optimizer, "resnet18")
    state = dict(content["state_dict"])
    del state["module.encoder_q.conv1.weight"]
    state["module.extra"] = torch.zeros(1)
    model, optimizer = resnet(seed=1)
    with pytest.raises(UserError, match="missing: encoder_q.conv1.weight; unknown: extra$"):
        checkpoint.resume({**content, "state_dict": state}, "x", model, optimizer, "resnet18")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Hostile()}, "hostile.pth.tar")
    torch.save({"state_dict": {}, "x": Hostile()}, "old.pth.tar", _use_new_zipfile_serialization=False)
    with open("pickle.pth.tar", "wb") as file:
        pickle.dump({"state_dict": {}, "x": Hostile()}, file)
    for name in ("hostile", "old", "pickle"):
        with pytest.raises(UserError, match=f"{name}.pth.tar: not a"):
            checkpoint.load(f"{name}.pth.tar")
    assert not os.path.exists("executed")
    torch.save([1, 2], "list.pth.tar")
    torch.save({"state_dict": {"w": 3}}, "number.pth.tar")
    torch.save({0: torch.ones(2)}, "nameless.pth.tar")
    with open("text.pth.tar", "w") as file:
        file.write("hello\n" * 100)
    open("empty.pth.tar", "w").close()
    with zipfile.ZipFile("zip.pth.tar", "w") as file:
        file.writestr("a.txt", "a")
    for name in ("list", "number", "nameless", "text", "empty", "zip"):
        with pytest.raises(UserError, match=f"{name}.pth.tar: ") as error:
            checkpoint.load(f"{name}.pth.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.pth.tar: no such checkpoint file"):
        checkpoint.load("none.pth.tar")


@pytest.mark.parametrize("old_format", [True, False])
def test_truncated_files_are_refused(tmp_path, old_format):
    whole = str(tmp_path / "whole.pth.tar")
    state = {f"w{i}": torch.randn(50) for i in range(6)}
    torch.save({"epoch": 1, "state_dict": state}, whole, _use_new_zipfile_serialization=not old_format)
    content = open(whole, "rb").read()
    for length in range(0, len(content) - 1, max(1, len(content) // 60)):
        path = str(tmp_path / "cut.pth.tar")
        with open(path, "wb") as file:
            file.write(content[:length])
        with pytest.raises(UserError, match="cut.pth.tar: not a"):
            checkpoint.load(path)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "checkpoint_0000.pth.tar")
    checkpoint.save({"state_dict": {"w": torch.ones(3)}}, path)
    first = open(path, "rb").read()

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"state_dict": {"w": torch.ones(1000)}, "x": Unwritable()}, path)
    assert open(path, "rb").read() == first and os.listdir(tmp_path) == ["checkpoint_0000.pth.tar"]

    order = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (order.append("fsync"), real(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (order.append("replace"), real(a, b)))
    checkpoint.save({"state_dict": {"w": torch.zeros(3)}}, path)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_saving_makes_an_ordinary_file_and_leaves_others_alone(tmp_path):
    """The permissions are those of open(), and a file that happens to have a temporary file's name stays."""
    (tmp_path / "x.tmp").write_text("mine")
    (tmp_path / "ordinary").touch()
    checkpoint.save({"state_dict": {}}, str(tmp_path / "x"))
    assert sorted(os.listdir(tmp_path)) == ["ordinary", "x", "x.tmp"] and (tmp_path / "x.tmp").read_text() == "mine"
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_numbered_sorts_by_number_and_ignores_other_files(tmp_path):
    for name in ("0002", "0010", "0001", "12345", "lincls", "002", "0003.pth.tar"):
        (tmp_path / f"checkpoint_{name}.pth.tar").touch()
    assert [number for number, _ in checkpoint.numbered(str(tmp_path))] == [1, 2, 10, 12345]
    assert checkpoint.numbered(str(tmp_path / "none")) == []


def test_a_save_removes_what_a_killed_one_has_left(tmp_path):
    for name in ("a.pth.tar.0123abcd.tmp", "b.pth.tar.0123abcd.tmp", "a.pth.tar.tmp"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save({"epoch": 1}, str(tmp_path / "a.pth.tar"))
    assert sorted(os.listdir(tmp_path)) == ["a.pth.tar", "a.pth.tar.tmp", "b.pth.tar.0123abcd.tmp"]
