"""Validation against a plain loop in one process and in several, the frozen check, and one epoch against NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import ARCH, processes
from torch.utils.data import TensorDataset

import main_lincls
from synco import augment, checkpoint, classifier, datasets, distributed, loader
from synco.distributed import Process
from synco.networks import features


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 7)

    def forward(self, x):
        return self.fc(self.body(x))


def network(rank=0):
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.body[1].running_mean += 0.3 * rank  # in fine-tuning the processes' statistics differ
    return net.train()


def images(count):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 6), torch.randint(7, (count,)))


COUNTS = (2, 37)  # images


def _validate(rank, world_size):
    found = []
    for count in COUNTS:
        net = network(rank)
        batches = loader.eval_loader(images(count), 4, process=Process(rank, world_size), workers=0)
        [(numbers, confusion)] = classifier.validate(net, batches, torch.device("cpu"), 7)
        found.append((numbers, confusion.tolist(), net.training, net.body[1].running_mean.tolist()))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_a_plain_loop_whatever_the_number_of_processes(world_size):
    for results in processes(world_size, _validate, world_size):
        for count, (numbers, confusion, training, mean) in zip(COUNTS, results, strict=True):
            net = network().eval()
            top1 = top5 = loss = 0
            expected = np.zeros((7, 7), dtype=int)
            for x, label in images(count):
                logits = net(x[None])[0].double().detach().numpy()
                order = np.argsort(-logits)
                top1 += order[0] == label
                top5 += label in order[:5]
                expected[label, order[0]] += 1
                loss += math.log(np.exp(logits - logits[label]).sum())
            assert numbers["top1"] == 100 * top1 / count and numbers["top5"] == 100 * top5 / count
            assert numbers["loss"] == pytest.approx(loss / count, rel=1e-6)
            assert confusion == expected.tolist()
            assert training and mean == [0.0] * 8  # the mode as it was, rank 0's statistics


def test_top5_of_few_classes():
    net = nn.Linear(2, 3)
    data = TensorDataset(torch.randn(5, 2), torch.randint(3, (5,)))
    batches = loader.eval_loader(data, 4, process=Process(), workers=0)
    assert classifier.validate(net, batches, torch.device("cpu"), 3)[0][0]["top5"] == 100


@torch.no_grad()
def forward_in_train_mode(net, images):
    net.train()
    net(images)


@torch.no_grad()
def nudge(net, _):
    """The least that a weight can move."""
    weight = net.conv5[0].weight
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


SPOILED = {
    "statistics": (
        forward_in_train_mode,
        "168 tensors, such as conv1.1.running_mean, conv1.1.running_var, conv1.1.num",
    ),
    "one bit": (nudge, "1 tensors, such as conv5.0.weight$"),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED)
def test_a_frozen_backbone_that_moves_ends_the_probe(monkeypatch, data, tmp_path, spoil, message):
    """The published recipe broken on purpose, by a bit of a weight or by statistics while every weight stays."""
    parallel = distributed.parallel

    def spoiling(network, device):
        learner = parallel(network, device)
        spoil(network.network, torch.randn(4, 3, 32, 32))
        network.eval()
        return learner

    monkeypatch.setattr(distributed, "parallel", spoiling)
    flags = f"-a {ARCH} --img-size 32 -j 0 -b 8 --epochs 1 --lr 1 --pretrained random --save-dir".split()
    monkeypatch.setattr("sys.argv", ["main_lincls.py", *flags, str(tmp_path / "r"), data])
    with pytest.raises(RuntimeError, match=f"the frozen backbone has changed in {message}"):
        main_lincls.probe(Process(), main_lincls.parse())
    assert not (tmp_path / "r" / "checkpoint_lincls.pth.tar").exists()


def test_the_probe_is_softmax_regression_on_the_features(programs, pretrained, data, tmp_path):
    """Two epochs in NumPy float64: features of plain torchvision's network, cross-entropy, SGD with momentum."""
    flags = ["-a", ARCH, "--img-size", 32, "-j", 0, "-b", 7, "--epochs", 2, "--lr", 0.7, "--schedule", 1, "--wd", 0.01]
    status, _, err = programs(
        "main_lincls", *flags, "--seed", 5, "--pretrained", pretrained, "--save-dir", tmp_path / "r", data
    )
    assert status == 0, err
    found = checkpoint.load(str(tmp_path / "r" / "checkpoint_lincls.pth.tar"))["state_dict"]

    state = torch.load(pretrained, weights_only=True)["state_dict"]
    net = torchvision.models.get_model(ARCH, num_classes=3)
    own = {n.removeprefix("module.encoder_q."): w for n, w in state.items() if "encoder_q" in n and ".fc." not in n}
    assert set(net.load_state_dict(own, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    net.eval()

    train = datasets.image_folder(data, "train")
    views = loader.Augmented(train, augment.classifier_augmentation(32), 5)
    W = found["module.fc.weight"].numpy().astype(np.float64) * 0
    b = np.zeros(3)
    torch.manual_seed(5)
    start = torchvision.models.get_model(ARCH, num_classes=3)  # draws what the program drew before the last layer
    W += nn.init.normal_(start.fc.weight, std=0.01).detach().numpy()
    vW, vb = np.zeros_like(W), np.zeros_like(b)
    batches = loader.train_loader(views, 7, process=Process(), workers=0, seed=5, keep_last=True)
    for epoch, lr in ((0, 0.7), (1, 0.07)):
        batches.batch_sampler.sampler.set_epoch(epoch)
        for x, label in batches:
            with torch.no_grad():
                f = features(net, "fc", x).double().numpy()
            z = f @ W.T + b
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(label)), label.numpy()] -= 1
            vW = 0.9 * vW + p.T @ f / len(label) + 0.01 * W
            vb = 0.9 * vb + p.mean(0) + 0.01 * b
            W, b = W - lr * vW, b - lr * vb
    assert len(batches) == 4  # 24 images in sevens: the last three are kept
    np.testing.assert_allclose(found["module.fc.weight"], W, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["module.fc.bias"], b, rtol=1e-3, atol=1e-5)


def test_the_learning_rates_of_the_probe():
    class Args:
        lr_min, cos, schedule, epochs = 0.0, False, [60, 80], 100

    assert [main_lincls.learning_rate(30.0, e, Args) for e in (0, 59, 60, 79, 80)] == pytest.approx([30, 30, 3, 3, 0.3])
    Args.lr_min, Args.cos, Args.epochs = 5e-7, True, 200  # the Imagenette probe
    assert [main_lincls.learning_rate(0.03, e, Args) for e in (0, 100, 200)] == pytest.approx([0.03, 0.01500025, 5e-7])


def test_default_folders():
    class Args:
        resume, evaluate, pretrained, arch = "", False, "runs/a/checkpoint_0199.pth.tar", "resnet50"

    assert main_lincls.default_folder(Args, "lincls-lr30") == "runs/a/checkpoint_0199-lincls-lr30"
    Args.pretrained = "moco_v2.800ep.pth"
    assert main_lincls.default_folder(Args, "lincls-lr30") == "moco_v2.800ep-lincls-lr30"
    Args.pretrained = "random"
    assert main_lincls.default_folder(Args, "lincls-lr30") == "random-resnet50-lincls-lr30"
    Args.resume = "runs/p/checkpoint_lincls.pth.tar"
    assert main_lincls.default_folder(Args, "lincls-lr30") == "runs/p"
    Args.evaluate = True
    assert main_lincls.default_folder(Args, "lincls-lr30") == "runs/p/checkpoint_lincls-evaluated"
