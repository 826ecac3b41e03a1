"""The networks: their heads and stems, and BatchNorm in splits or over all processes."""

import pytest
import torch
import torch.nn as nn
import torchvision

from synco.builder import SynCo
from synco.networks import (
    SplitBatchNorm2d,
    casts_images,
    features,
    head_name,
    network_of,
    split_batch_norm,
    sync_batch_norm,
)


@pytest.mark.parametrize(
    "arch, head, size",
    [
        ("resnet18", "fc", 32),
        ("vgg11", "classifier.6", 32),
        ("densenet121", "classifier", 32),
        ("mobilenet_v3_small", "classifier.3", 32),
        ("efficientnet_b0", "classifier.1", 32),
        ("convnext_tiny", "classifier.2", 32),
        ("regnet_y_400mf", "fc", 32),
        ("mnasnet0_5", "classifier.1", 32),
        ("googlenet", "fc", 32),
        ("inception_v3", "fc", 96),
        ("vit_b_16", "heads.head", 32),
        ("swin_t", "head", 32),
    ],
)
def test_the_head_is_found_by_what_it_is(arch, head, size):
    network = network_of(arch, size)(num_classes=12)
    assert head_name(network, 12) == head
    model = SynCo(network_of(arch, size), 12, 16, n_hard=4, n1=1, n2=1, n3=1, n4=1, n5=1, n6=1)
    images = torch.randn(2, 3, size, size)
    logits, _ = model.eval()(images, images)
    assert logits.shape == (2, 1 + 16 + 6)
    width = model.encoder_q.get_submodule(head)[0].in_features
    assert features(model.encoder_q, head, images).shape == (2, width)


@pytest.mark.parametrize(
    "arch",
    "resnet18 densenet121 mobilenet_v3_small efficientnet_b0 convnext_tiny regnet_y_400mf shufflenet_v2_x0_5 "
    "mnasnet0_5 googlenet swin_t timm:resnet18 timm:efficientnet_b0 timm:vit_tiny_patch16_224".split(),
)
def test_networks_begin_with_a_convolution_of_the_images_themselves(arch):
    """What autocast casts first are they, and nothing that was computed of them in float32."""
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    size = 224 if arch.endswith("_224") else 32
    network, first = network_of(arch, size)(num_classes=12).eval(), []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda module, inputs: first.append((module, inputs[0])))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        network(images)
    assert isinstance(first[0][0], nn.Conv2d) and first[0][1] is images and casts_images(network)


def test_a_network_that_begins_otherwise_gets_its_images_as_they_are():
    assert not casts_images(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))


def test_a_network_without_a_linear_head_is_refused():
    with pytest.raises(ValueError, match="SqueezeNet has no linear layer with 128 outputs"):
        SynCo(network_of("squeezenet1_1", 32))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "timm:resnet18"])
def test_the_small_stem(arch):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = network_of(arch, 32, "cifar")(num_classes=10)
    conv = network.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    seen = []
    network.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    network.eval()(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]  # neither the convolution nor a pool made it smaller
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # He's, fan-out
    plain = network_of(arch, 32)(num_classes=10).state_dict()
    found = network.state_dict()
    assert list(plain) == list(found)
    assert [name for name in plain if plain[name].shape != found[name].shape] == ["conv1.weight"]


@pytest.mark.parametrize("arch", ["vgg11", "densenet121", "shufflenet_v2_x0_5", "vit_b_32"])
def test_networks_without_such_a_stem(arch):
    with pytest.raises(ValueError, match="has no ResNet's stem to replace"):
        network_of(arch, 32, "cifar")(num_classes=10)


@pytest.mark.parametrize("name, size", [("efficientnet_b0", 64), ("vit_tiny_patch16_224", 32)])
def test_networks_of_timm(name, size):
    pytest.importorskip("timm")
    model = SynCo(network_of(f"timm:{name}", size), 12, 16, mlp=True, n_hard=4, n1=1, n2=1, n3=1, n4=1, n5=1, n6=1)
    images = torch.randn(2, 3, size, size)
    logits, _ = model.eval()(images, images)
    assert logits.shape == (2, 1 + 16 + 6)


@pytest.mark.parametrize("k", [2, 4])
def test_split_batch_norm_equals_separate_ones(k):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5, requires_grad=True)
    split = SplitBatchNorm2d(3, splits=k)
    nn.init.normal_(split.weight), nn.init.normal_(split.bias)
    norms = [nn.BatchNorm2d(3) for _ in range(k)]
    for norm in norms:
        norm.load_state_dict(split.state_dict())
    twin = x.detach().clone().requires_grad_()
    weights = torch.randn(8, 3, 5, 5)

    for _ in range(3):
        ours = split(x)
        theirs = torch.empty_like(ours)
        for s, norm in enumerate(norms):
            theirs[s::k] = norm(twin[s::k])
    torch.testing.assert_close(ours, theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(split.weight.grad, sum(norm.weight.grad for norm in norms))
    torch.testing.assert_close(split.running_mean, torch.stack([n.running_mean for n in norms]).mean(0))
    torch.testing.assert_close(split.running_var, torch.stack([n.running_var for n in norms]).mean(0))
    assert split.num_batches_tracked == 3

    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match=f"batch of 9 cannot be normalised in {k} equal splits"):
        split.train()(torch.randn(9, 3, 5, 5))


def test_split_batch_norm_replaces_every_batch_norm():
    network = torchvision.models.resnet18()
    names = list(network.state_dict())
    split_batch_norm(network, 2)
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {SplitBatchNorm2d} and list(network.state_dict()) == names
    with pytest.raises(ValueError, match="has no BatchNorm2d"):
        split_batch_norm(nn.Sequential(nn.Linear(2, 2)), 2)
    with pytest.raises(ValueError, match="has BatchNorm1d, which cannot be split"):  # and not the one without the other
        split_batch_norm(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2)), 2)


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet18", "timm:efficientnet_b0"])
def test_synchronised_statistics_change_nothing_else(arch):
    """timm's BatchNormAct2d has the activation inside, which torch's own conversion drops."""
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    model = SynCo(network_of(arch, 64), 12, 16, n_hard=4, n1=1, n2=1, n3=1, n4=1, n5=1, n6=1).eval()
    images, names = torch.randn(2, 3, 64, 64), list(model.state_dict())
    expected = model.encoder_q(images), model.encoder_k(images)
    model = sync_batch_norm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert torch.equal(model.encoder_q(images), expected[0]) and torch.equal(model.encoder_k(images), expected[1])
    assert list(model.state_dict()) == names and not any(w.requires_grad for w in model.encoder_k.parameters())


def test_statistics_that_cannot_be_synchronised():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="has Doubled, which cannot be synchronised"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm2d(2), Doubled(2)))
    with pytest.raises(ValueError, match="has no BatchNorm"):
        sync_batch_norm(nn.Sequential(nn.Linear(2, 2)))
