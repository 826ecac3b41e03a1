"""The backbone in anybody's file: a pretraining's of ours, SynCo's or MoCo's, torchvision's weights, a classifier's."""

import copy
import zipfile

import pytest
import torch
import torchvision

from synco import backbone, checkpoint
from synco.builder import SynCo
from synco.errors import UserError
from synco.networks import network_of


@pytest.fixture(scope="module")
def published():
    """A pretraining's checkpoint in the reference's format, and its model."""
    torch.manual_seed(0)
    few = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1}
    model = SynCo(network_of("resnet18", 32), 16, 48, mlp=True, **few)
    state = {"module." + name: value for name, value in model.state_dict().items()}
    return {"epoch": 7, "arch": "resnet18", "state_dict": state, "optimizer": {}}, model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


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
    found = backbone.weights_of(checkpoint.load(path), path)
    own = {name: w for name, w in network.state_dict().items() if not name.startswith("fc.")}
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


def names_of(network):
    return {name for name in network.state_dict() if not name.startswith("fc.")}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_the_backbone_of_torchvisions_weights(tmp_path, prefix, bare):
    torch.manual_seed(3)
    source, network = torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=7)
    weights = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save(weights if bare else {"state_dict": weights}, tmp_path / "x.pth")
    found = backbone.weights_of(checkpoint.load(tmp_path / "x.pth"), "x.pth", arch="resnet18")
    assert backbone.load_backbone(network, "fc", found, "x.pth") == len(names_of(source)) == 120
    assert all(torch.equal(network.state_dict()[name], source.state_dict()[name]) for name in names_of(source))


def test_the_backbone_of_a_pretraining_is_the_query_encoder(published):
    content, model = published
    found = backbone.weights_of(content, "x")
    encoder = model.encoder_q.state_dict()
    assert set(found) == names_of(torchvision.models.resnet18())
    assert all(torch.equal(found[name], encoder[name]) for name in found)
    old = {name: w for name, w in found.items() if not name.endswith("num_batches_tracked")}  # before torch 0.4.1
    network = torchvision.models.resnet18()
    assert backbone.load_backbone(network, "fc", old, "x") == 100
    assert all(torch.equal(network.state_dict()[name], old[name]) for name in old)
    # weights in half precision, and the auxiliary classifiers of torchvision's own files
    half = {name: w.half() if w.is_floating_point() else w for name, w in found.items()}
    assert backbone.load_backbone(network, "fc", half, "x") == 120 and network.conv1.weight.dtype == torch.float32
    assert backbone.weights_of({"state_dict": {"conv.w": 1, "aux1.fc1.weight": 2, "fc.weight": 3}}, "x") == {
        "conv.w": 1
    }


def test_a_backbone_that_does_not_fit_is_refused_with_the_names(published):
    content, _ = published
    with pytest.raises(UserError, match="x: is a checkpoint of 'resnet18'; --arch is 'resnet50'"):
        backbone.weights_of(content, "x", arch="resnet50")
    classifier = {"state_dict": torchvision.models.resnet18().state_dict(), "best_acc1": 12.5, "arch": "resnet18"}
    with pytest.raises(UserError, match="x: is a classifier's checkpoint; --pretrained takes a pretraining's"):
        backbone.weights_of(classifier, "x")
    assert set(backbone.weights_of(classifier, "x", classifier=True)) == names_of(torchvision.models.resnet18())

    network = torchvision.models.resnet18()
    before = copy.deepcopy(network)
    good = backbone.weights_of(content, "x")
    for change, message in (
        ({"conv1.weight": None}, r"missing: conv1\.weight$"),
        ({"conv1.weight": None, "bn1.weight": None, "bn1.bias": None, "layer4.0.conv1.weight": None}, "and 1 more$"),
        ({"layer5.weight": torch.ones(2)}, r"unknown: layer5\.weight$"),
        ({"bn1.bias": torch.ones(32)}, r"of another shape: bn1\.bias \(\(32,\) where \(64,\) is wanted\)$"),
        ({"bn1.running_var": torch.full((64,), float("nan"))}, "bn1.running_var holds values that are not finite"),
    ):
        weights = {name: w for name, w in {**good, **change}.items() if w is not None}
        with pytest.raises(UserError, match=message):
            backbone.load_backbone(network, "fc", weights, "x")
        assert same(network, before)
    deeper = backbone.weights_of({"state_dict": torchvision.models.resnet152().state_dict()}, "x")
    with pytest.raises(UserError, match="unknown: layer2.4.conv1.weight, "):  # every name of resnet50 is in it
        backbone.load_backbone(torchvision.models.resnet50(), "fc", deeper, "x")
    with pytest.raises(UserError, match="missing: conv1.weight, .*; unknown: encoder_k.conv1.weight, .* and 117 more"):
        keys = {"encoder_k." + name: w for name, w in good.items()}
        backbone.load_backbone(network, "fc", backbone.weights_of({"state_dict": keys}, "x"), "x")


def test_what_a_file_is_and_what_was_taken_of_it_are_told(published):
    content, _ = published
    plain = {"state_dict": torchvision.models.resnet18().state_dict()}
    classifier = {**plain, "best_acc1": 12.5}
    assert [backbone.is_pretraining(x) for x in (content, plain, classifier)] == [True, False, False]
    assert [backbone.is_classifier(x) for x in (content, plain, classifier)] == [False, False, True]
    assert backbone.summary(content, "x.tar", 120) == "x.tar, resnet18, 7 epochs: 120 tensors of the query encoder"
    assert backbone.summary(plain, "x.tar", 120) == "x.tar: 120 tensors of the network"
