"""The backbone for others: as a file under torchvision's names, through torch.hub, and refusals that change nothing."""

import importlib.util
import os
import shutil

import pytest
import torch
import torchvision
from conftest import ROOT

from synco import export, files
from synco.networks import features

ARCHS = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_of(network):
    return features(network.eval(), "fc", images())


def same(found, wanted):
    """Whether two state dicts have the same names in the same order, and the same bits."""
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def without_head(network):
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}


@pytest.mark.parametrize("arch", ARCHS)
def test_round_trip(pretrained_of, tool, tmp_path, arch):
    """Names, bits and features are the query encoder's, in a torchvision network made here."""
    path, encoder = pretrained_of(arch)
    out = tmp_path / "backbone.pth"
    status, told, err = tool(export, path, out)
    assert (status, err) == (0, "") and os.listdir(tmp_path) == ["backbone.pth"]
    assert arch in told and files.sha256(path) in told and "200" in told
    weights = torch.load(out, weights_only=True)
    assert same(weights, without_head(encoder))
    network = torchvision.models.get_model(arch)
    assert list(weights) == list(without_head(network))
    loaded = network.load_state_dict(weights, strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert torch.equal(features_of(network), features_of(encoder))


def test_with_head(pretrained_of, tool, tmp_path):
    """The head's own names, so that the whole encoder comes back; and no more bytes than the numbers need."""
    path, encoder = pretrained_of("resnet18")
    assert tool(export, path, tmp_path / "all.pth", "--with-head")[0] == 0
    weights = torch.load(tmp_path / "all.pth", weights_only=True)
    assert same(weights, encoder.state_dict()) and {"fc.0.weight", "fc.2.bias"} < set(weights)
    bytes_needed = sum(w.numel() * w.element_size() for w in weights.values())
    assert bytes_needed < (tmp_path / "all.pth").stat().st_size < bytes_needed + 100_000


def test_safetensors(pretrained_of, tool, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path, encoder = pretrained_of("resnet18")
    out = tmp_path / "backbone.safetensors"
    assert tool(export, path, out, "--with-head")[0] == 0
    with safetensors.safe_open(out, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    wanted = encoder.state_dict()
    assert same({name: weights[name] for name in wanted}, wanted) and len(weights) == len(wanted)
    assert facts == {"arch": "resnet18", "epoch": "200", "checkpoint_sha256": files.sha256(path)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_other_sources(tool, tmp_path, prefix):
    """torchvision's weights, which need --arch, and a classifier's checkpoint."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    torch.save({"state_dict": state, "arch": "resnet18", "epoch": 3, "best_acc1": 50.0}, tmp_path / "lincls.pth.tar")
    assert tool(export, tmp_path / "weights.pth", tmp_path / "a.pth", "-a", "resnet18")[0] == 0
    assert tool(export, tmp_path / "lincls.pth.tar", tmp_path / "b.pth", "--with-head")[0] == 0
    assert same(torch.load(tmp_path / "a.pth", weights_only=True), without_head(network))
    assert same(torch.load(tmp_path / "b.pth", weights_only=True), network.state_dict())


def test_networks_that_depend_on_the_image_size(tool, tmp_path):
    """A pretraining on small images: its vision transformer has fewer positions than torchvision's at 224."""
    torch.manual_seed(0)
    encoder = torchvision.models.get_model("vit_b_32", image_size=64, num_classes=16)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    content = {"epoch": 1, "arch": "vit_b_32", "state_dict": state, "config": {"img_size": 64}}
    torch.save(content, tmp_path / "vit.pth.tar")
    assert tool(export, tmp_path / "vit.pth.tar", tmp_path / "vit.pth")[0] == 0
    backbone = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("heads.head.")}
    assert same(torch.load(tmp_path / "vit.pth", weights_only=True), backbone)


def test_networks_with_indices(tool, tmp_path):
    """Whole numbers that are the network's own, such as the places of a Swin transformer, are no mistake."""
    network = torchvision.models.swin_t(num_classes=2)
    torch.save({"arch": "swin_t", "state_dict": network.state_dict()}, tmp_path / "swin.tar")
    assert tool(export, tmp_path / "swin.tar", tmp_path / "swin.pth")[0] == 0
    found = torch.load(tmp_path / "swin.pth", weights_only=True)
    backbone = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    assert same(found, backbone) and any(tensor.dtype == torch.int64 for tensor in found.values())


def test_force_writes_over(pretrained_of, tool, tmp_path):
    path, encoder = pretrained_of("resnet18")
    (tmp_path / "x.pth").write_text("mine")
    assert tool(export, path, tmp_path / "x.pth", "--force")[0] == 0
    assert same(torch.load(tmp_path / "x.pth", weights_only=True), without_head(encoder))


def test_old_weights_without_counters(tool, tmp_path):
    """BatchNorm counts batches since torch 0.4.1 only; what torchvision wants is complete all the same."""
    network = torchvision.models.resnet18()
    weights = {name: w for name, w in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth")
    assert tool(export, tmp_path / "old.pth", tmp_path / "new.pth", "-a", "resnet18")[0] == 0
    assert same(torch.load(tmp_path / "new.pth", weights_only=True), without_head(network))


# ------------------------------------------------------------------------------------------------------- bad input


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def foreign(folder):
    """Write what is no checkpoint of a backbone → {name: (path, words of the message)}."""
    encoder = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": {}, "arch": "resnet18", "x": Hostile()}, folder / "hostile.tar")
    key = {f"module.encoder_k.{name}": tensor for name, tensor in encoder.items()}
    torch.save({"arch": "resnet18", "state_dict": key}, folder / "key.tar")
    query = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.items()}
    torch.save({"arch": "resnet18", "state_dict": query}, folder / "whole.tar")
    (folder / "cut.tar").write_bytes((folder / "whole.tar").read_bytes()[:5_000_000])
    torch.save({"arch": "resnet50", "state_dict": query}, folder / "other.tar")
    torch.save({"state_dict": query}, folder / "nameless.tar")
    torch.save({"arch": "vit_small", "state_dict": query}, folder / "strange.tar")
    lacking = {name: tensor for name, tensor in query.items() if "layer3" not in name}
    torch.save({"arch": "resnet18", "state_dict": lacking}, folder / "lacking.tar")
    broken = query | {"module.encoder_q.bn1.bias": torch.full((64,), float("nan"))}
    torch.save({"arch": "resnet18", "state_dict": broken}, folder / "broken.tar")
    for name, tensor in (
        ("sparse", encoder["conv1.weight"].to_sparse()),
        ("meta", encoder["conv1.weight"].to("meta")),
        ("complex", encoder["conv1.weight"].to(torch.complex64)),
        ("whole_numbers", encoder["conv1.weight"].to(torch.int32)),
    ):
        state = query | {"module.encoder_q.conv1.weight": tensor}
        torch.save({"arch": "resnet18", "state_dict": state}, folder / f"{name}.tar")
    vit = {"module.encoder_q.conv_proj.weight": torch.ones(1)}
    for name, size in (("uneven", 33), ("vast", 10**12)):
        torch.save({"arch": "vit_b_32", "config": {"img_size": size}, "state_dict": vit}, folder / f"{name}.tar")
    (folder / "text.tar").write_text("hello\n" * 100)
    return {
        "missing.tar": "no such checkpoint file",
        "text.tar": "not a",
        "hostile.tar": "not a checkpoint of tensors and plain values",
        "cut.tar": "truncated",
        "key.tar": "has no backbone: neither a pretraining's encoder_q.* nor the names of a resnet18",
        "other.tar": "do not fit this network",
        "nameless.tar": "does not say of which network it is; give --arch",
        "strange.tar": "'vit_small' is not a torchvision classification network\n",
        "sparse.tar": "conv1.weight is a tensor of torch.float32, torch.sparse_coo; weights are dense",
        "meta.tar": "conv1.weight is a tensor without numbers (meta)",
        "complex.tar": "conv1.weight is a tensor of torch.complex64",
        "whole_numbers.tar": "conv1.weight is a tensor of torch.int32",
        "uneven.tar": "its network cannot be built: -a vit_b_32 --img-size 33: ",
        "vast.tar": "its img_size is 1000000000000, not a number of pixels",
        "lacking.tar": "missing: layer3.0.conv1.weight",
        "broken.tar": "bn1.bias holds values that are not finite",
    }


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("error")  # a warning would be a second line
def test_bad_checkpoints_are_refused(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = foreign(tmp_path)
    (tmp_path / "out.pth").write_text("mine")
    before = tree(tmp_path)
    for name, message in cases.items():
        status, out, err = tool(export, name, "out.pth", "--force")
        assert (status, out, err.count("\n")) == (2, "", 1), name
        assert err.startswith(f"export.py: error: {name}: ") and message in err
    assert tree(tmp_path) == before and not os.path.exists("executed")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, ".", "there/x", os.fsdecode(b"\xff")], ids=range(5))
def test_names_that_no_checkpoint_has(tool, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("mine")
    status, out, err = tool(export, name, "x.pth")
    assert (status, out, err.count("\n")) == (2, "", 1) and err.endswith(
        f": {'is not a file' if name == '.' else 'no such checkpoint file'}\n"
    )
    assert os.listdir(tmp_path) == ["there"]


def test_names_that_are_no_utf8(pretrained_of, tool, tmp_path):
    path, encoder = pretrained_of("resnet18")
    for ending in (".pth", ".safetensors") if importlib.util.find_spec("safetensors") else (".pth",):
        made = tmp_path / os.fsdecode(b"\xe9" + ending.encode())
        shutil.copy(path, tmp_path / os.fsdecode(b"\xff.tar"))
        status, told, err = tool(export, tmp_path / os.fsdecode(b"\xff.tar"), made)
        assert (status, err) == (0, "") and f"/?{ending}" in told and made.exists()
    with open(tmp_path / os.fsdecode(b"\xe9.pth"), "rb") as file:
        assert same(torch.load(file, weights_only=True), without_head(encoder))


def test_bad_outputs_are_refused(pretrained_of, tool, tmp_path, monkeypatch):
    path, _ = pretrained_of("resnet18")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "link.pth").symlink_to(path)
    before = tree(tmp_path)
    for words, message in (
        (["there.pth"], "there.pth: is there already; --force writes over it"),
        (["none/x.pth"], "none/x.pth: there is no folder none"),
        (["x.pkl"], "x.pkl: the file to write must end in .pth or .safetensors"),
        (["x\0.pth"], "'x\\x00.pth': no file can have that name"),
        (["folder.pth", "--force"], "folder.pth: is a folder"),
        (["x" * 300 + ".pth"], "x.pth: cannot be written (File name too long)"),
        (["there.pth/x.pth"], "there.pth/x.pth: there is no folder there.pth"),
        (["link.pth", "--force"], "link.pth: is the checkpoint itself"),
        (["x.pth", "-a", "resnet50"], "is a checkpoint of 'resnet18', not of 'resnet50'"),
        (["x.pth", "-a", "resnet5"], "'resnet5' is not a torchvision classification network"),
        ([], "the following arguments are required: OUT"),
    ):
        status, out, err = tool(export, path, *words)
        assert (status, out, err.count("\n")) == (2, "", 1), words
        assert message in err
    assert tree(tmp_path) == before


def test_the_checkpoint_may_have_any_name(pretrained_of, tool, tmp_path):
    """Files beside the output stay, whatever they are called."""
    path, encoder = pretrained_of("resnet18")
    (tmp_path / "x.pth.tmp").write_bytes(path.read_bytes())
    assert tool(export, tmp_path / "x.pth.tmp", tmp_path / "x.pth")[0] == 0
    assert (tmp_path / "x.pth.tmp").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["x.pth", "x.pth.tmp"]
    assert same(torch.load(tmp_path / "x.pth", weights_only=True), without_head(encoder))


def test_a_head_of_another_kind(tool, tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state | {"fc.weight": state["fc.weight"].to_sparse()}, tmp_path / "a.pth")
    status, _, err = tool(export, tmp_path / "a.pth", tmp_path / "b.pth", "-a", "resnet18", "--with-head")
    assert (status, err.count("\n")) == (2, 1) and "fc.weight is a tensor of" in err
    assert os.listdir(tmp_path) == ["a.pth"]


def test_no_head_to_add(tool, tmp_path):
    torch.save(without_head(torchvision.models.resnet18()), tmp_path / "bare.pth")
    status, _, err = tool(export, tmp_path / "bare.pth", tmp_path / "x.pth", "-a", "resnet18", "--with-head")
    assert status == 2 and "there is no head (fc.*) in it" in err and os.listdir(tmp_path) == ["bare.pth"]


def test_without_safetensors(pretrained_of, tool, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name))
    status, out, err = tool(export, pretrained_of("resnet18")[0], tmp_path / "x.safetensors")
    assert (status, out, err.count("\n")) == (2, "", 1) and "pip install safetensors" in err
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(pretrained_of, tool, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    (tmp_path / "x.pth").write_text("mine")
    monkeypatch.setattr(os, "fsync", full)
    status, _, err = tool(export, pretrained_of("resnet18")[0], tmp_path / "x.pth", "--force")
    assert (status, err.count("\n")) == (2, 1) and "cannot be written (No space left on device)" in err
    assert os.listdir(tmp_path) == ["x.pth"] and (tmp_path / "x.pth").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- torch.hub


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_hub(pretrained_of, arch):
    path, encoder = pretrained_of(arch)
    network = torch.hub.load(str(ROOT), arch, source="local", checkpoint=str(path)).eval()
    assert isinstance(network.fc, torch.nn.Identity)
    with torch.no_grad():
        assert torch.equal(network(images()), features_of(encoder))
    network = torch.hub.load(str(ROOT), arch, source="local", checkpoint=str(path), num_classes=5)
    assert network.fc.out_features == 5 and same(without_head(network), without_head(encoder))


def test_hub_without_a_checkpoint_and_with_a_wrong_one(pretrained_of):
    network = torch.hub.load(str(ROOT), "resnet34", source="local")
    assert network(images()).shape == (2, 512)
    with pytest.raises(ValueError, match="is a checkpoint of 'resnet18', not of 'resnet34'"):
        torch.hub.load(str(ROOT), "resnet34", source="local", checkpoint=str(pretrained_of("resnet18")[0]))
    network = torch.hub.load(str(ROOT), "resnet18", source="local", num_classes=0)
    assert isinstance(network.fc, torch.nn.Identity)
    with pytest.raises(ValueError, match="num_classes is -1"):
        torch.hub.load(str(ROOT), "resnet18", source="local", num_classes=-1)


def test_timm_loads_it(pretrained_of, tool, tmp_path):
    timm = pytest.importorskip("timm")
    path, encoder = pretrained_of("resnet50")
    assert tool(export, path, tmp_path / "resnet50.pth")[0] == 0
    network = timm.create_model("resnet50", num_classes=0)
    network.load_state_dict(torch.load(tmp_path / "resnet50.pth", weights_only=True))  # strict
    with torch.no_grad():
        assert torch.allclose(network.eval()(images()), features_of(encoder), rtol=1e-4, atol=1e-5)
