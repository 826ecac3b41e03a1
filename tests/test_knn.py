"""The kNN monitor against a plain loop, in one process and in several."""

import math
import os
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ARCH, make_images, processes
from torch.utils.data import TensorDataset

from synco import augment, datasets, knn, loader
from synco.distributed import Process


def by_loop(bank, labels, query, k, t, classes):
    similarity = sorted(((float(query @ row), int(c)) for row, c in zip(bank, labels)), reverse=True)[:k]
    votes = [0.0] * classes
    for s, c in similarity:
        votes[c] += math.exp(s / t)
    return int(np.argmax(votes))


@pytest.mark.parametrize("k, t", [(1, 0.1), (7, 0.1), (200, 0.1), (20, 1.0)])
def test_predict_equals_a_plain_loop(k, t):
    torch.manual_seed(0)
    bank, queries = F.normalize(torch.randn(60, 5)), F.normalize(torch.randn(30, 5))
    labels = torch.randint(4, (60,))
    found = knn.predict(bank, labels, queries, classes=4, k=k, t=t)
    expected = [by_loop(bank.double().numpy(), labels, q, k, t, 4) for q in queries.double().numpy()]
    assert found.tolist() == expected


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def network(rank):
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.body[1].running_mean += 0.3 * rank  # in training the processes' statistics differ
    return net.train()


def sets():
    torch.manual_seed(1)
    bank = TensorDataset(torch.randn(41, 6), torch.randint(3, (41,)))
    return bank, TensorDataset(torch.randn(17, 6), torch.randint(3, (17,)))


def _accuracy(rank, world_size):
    parts = [loader.eval_loader(s, 4, process=Process(rank, world_size), workers=0) for s in sets()]
    net = network(rank)
    found = knn.accuracy(net, "fc", *parts, torch.device("cpu"), classes=3, k=5)["top1"]
    return found, net.training


def test_accuracy_is_that_of_a_plain_loop_whatever_the_number_of_processes():
    bank, queries = sets()
    net = network(0).eval()
    with torch.no_grad():
        rows = F.normalize(net.body(bank.tensors[0]), dim=1).double().numpy()
        asked = F.normalize(net.body(queries.tensors[0]), dim=1).double().numpy()
    hits = sum(by_loop(rows, bank.tensors[1], q, 5, 0.1, 3) == int(c) for q, c in zip(asked, queries.tensors[1]))
    expected = (100 * hits / 17, True)
    assert _accuracy(0, 1) == expected
    assert processes(3, _accuracy, 3) == [expected] * 3


def _both(rank, world_size):
    """Everything that `accuracy` finds, with a bank whose shares differ."""
    parts = [loader.eval_loader(s, 4, process=Process(rank, world_size), workers=0) for s in sets()]
    return knn.accuracy(network(0), "fc", *parts, torch.device("cpu"), classes=3, k=5, train=True)


def test_projection_and_training_images_equal_a_plain_loop():
    """Each training image is voted by the others; one that voted for itself would always win at k = 1."""
    bank, queries = sets()
    net, expected = network(0).eval(), {}
    with torch.no_grad():
        for suffix, encode in (("", net.body), ("_projection", net)):
            rows, asked = (F.normalize(encode(s.tensors[0]), dim=1).double().numpy() for s in (bank, queries))
            labels = bank.tensors[1].numpy()
            hits = [by_loop(rows, labels, q, 5, 0.1, 3) == int(c) for q, c in zip(asked, queries.tensors[1])]
            expected["top1" + suffix] = 100 * np.mean(hits)
            others = [np.arange(41) != i for i in range(41)]
            hits = [by_loop(rows[o], labels[o], rows[i], 5, 0.1, 3) == labels[i] for i, o in enumerate(others)]
            expected["train_top1" + suffix] = 100 * np.mean(hits)
    assert _both(0, 1) == pytest.approx(expected)
    assert processes(3, _both, 3) == [pytest.approx(expected)] * 3


def test_no_image_votes_for_itself():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]))
    labels, own = torch.tensor([0, 1, 1, 0]), torch.arange(4)
    assert knn.predict(bank, labels, bank, classes=2, k=1).tolist() == [0, 1, 1, 0]
    assert knn.predict(bank, labels, bank, classes=2, k=1, own=own).tolist() == [1, 0, 0, 1]
    assert knn.predict(bank, labels, bank, classes=2, k=9, own=own).shape == (4,)


def _tiny(rank):
    bank = TensorDataset(torch.eye(6), torch.arange(6) % 3)
    queries = TensorDataset(torch.eye(6)[:2], torch.arange(2))
    parts = [loader.eval_loader(s, 4, process=Process(rank, 3), workers=0) for s in (bank, queries)]
    return knn.accuracy(network(0), "fc", *parts, torch.device("cpu"), classes=3, k=1)["top1"]


def test_a_process_may_have_no_images_at_all():
    assert processes(3, _tiny) == [100.0] * 3


def test_a_small_temperature_does_not_overflow():
    """exp(1 / 0.005) is beyond float32: the votes are those of float64 all the same."""
    torch.manual_seed(3)
    bank, queries = F.normalize(torch.randn(60, 5)), F.normalize(torch.randn(30, 5))
    labels = torch.randint(4, (60,))
    found = knn.predict(bank, labels, queries, classes=4, k=20, t=0.005)
    expected = [by_loop(bank.double().numpy(), labels, q, 20, 0.005, 4) for q in queries.double().numpy()]
    assert found.tolist() == expected


def test_the_command_line(programs, data, tmp_path):
    """Of every kind of checkpoint the same backbone, against a plain loop over torchvision's own network."""
    torch.manual_seed(7)
    net = torchvision.models.get_model(ARCH)
    net.fc = nn.Identity()
    images = datasets.image_folder(data, "train")
    images.transform = augment.center_view(32)
    with torch.no_grad():  # statistics of these images, without which an untrained network's features are all alike
        for _ in range(30):
            net.train()(torch.stack([x for x, _ in images]))
    net.eval()
    state = {f"module.encoder_q.{name}": w for name, w in net.state_dict().items()}
    torch.save({"epoch": 5, "arch": ARCH, "state_dict": state, "config": {"img_size": 32}}, tmp_path / "ours.pth.tar")
    pretrained = tmp_path / "ours.pth.tar"
    sets = []
    for split in ("train", "val"):
        images = datasets.image_folder(data, split)
        images.transform = augment.center_view(32)
        with torch.no_grad():
            rows = [(F.normalize(net(x[None]).double(), dim=1)[0].numpy(), label) for x, label in images]
        sets.append(rows)
    bank, labels = [row for row, _ in sets[0]], [label for _, label in sets[0]]
    right = sum(by_loop(bank, labels, row, 5, 0.1, 3) == label for row, label in sets[1])

    plain = net.state_dict() | {"fc.weight": torch.ones(1000, 1024), "fc.bias": torch.ones(1000)}
    torch.save(plain, tmp_path / "plain.pth")
    torch.save({"arch": ARCH, "state_dict": plain, "best_acc1": 1.0}, tmp_path / "classifier.pth.tar")
    flags = ["-a", ARCH, "--img-size", 32, "-j", 0, "-k", 5]
    for path in (pretrained, tmp_path / "plain.pth", tmp_path / "classifier.pth.tar"):
        status, out, err = programs("synco.knn", path, data, *flags)
        assert status == 0 and out.endswith(f"24 images vote) on 7 images: {100 * right / 7:.2f} %\n"), err
        assert "336 tensors of " in out
    status, out, _ = programs("synco.knn", pretrained, data, *flags[4:])  # the file says arch and size
    assert status == 0 and f"{ARCH} at 32 pixels" in out and f"{100 * right / 7:.2f} %" in out
    status, out, _ = programs("synco.knn", "random", data, *flags)
    assert status == 0 and "random weights, seed 0" in out


def test_bad_input_of_the_command_line(programs, pretrained, data, tmp_path):
    torch.save(torchvision.models.get_model(ARCH).state_dict(), tmp_path / "plain.pth")
    make_images(tmp_path / "d" / "train", classes=2, images=3)
    make_images(tmp_path / "d" / "val", classes=2, images=2)
    (tmp_path / "d" / "train" / "c1" / "2.jpg").write_bytes(b"no image")
    for words, message in (
        (["nowhere.pth", data], "nowhere.pth: no such checkpoint file"),
        ([pretrained, tmp_path], "has no folder 'train' in it"),
        ([tmp_path / "plain.pth", data], "plain.pth: does not say of which network it is"),
        ([pretrained, data, "-a", "resnet18"], f"is a checkpoint of '{ARCH}', not of 'resnet18'"),
        ([pretrained, data, "-k", 0], "'0' is not a whole number >= 1"),
        ([pretrained, tmp_path / "d", "--img-size", 32, "-j", 0], "2.jpg: cannot be read as an image"),
        ([pretrained, tmp_path / "d", "--img-size", 32, "-j", 1], "2.jpg: cannot be read as an image"),
    ):
        status, out, err = programs("synco.knn", *words)
        assert status == 2 and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, ".", os.fsdecode(b"\xff")], ids=range(4))
def test_names_that_no_checkpoint_has(programs, data, name):
    status, out, err = programs("synco.knn", name, data, "-j", 0)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.endswith(
        f": {'is not a file' if name == '.' else 'no such checkpoint file'}\n"
    )


def test_a_worker_that_is_stuck_ends_the_command(programs, pretrained, data, monkeypatch):
    monkeypatch.setattr(datasets.Images, "image", lambda self, position: time.sleep(99))
    flags = [pretrained, data, "--img-size", 32, "-j", 1, "--worker-timeout", 1]
    status, _, err = programs("synco.knn", *flags)
    assert status == 1 and err.count("\n") == 1 and "timed out after 1 seconds" in err, err


def tied(seed=6):
    """Rows on a few directions, so that many are equal, and labels: coordinates are exact in any precision."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [-1, 1, 1, 1], [1, 1, 1, -1]]) / 2
    bank = directions[torch.randint(5, (5000,), generator=generator)]  # more than are compared at a time
    queries = directions[torch.randint(5, (2100,), generator=generator)]
    return bank, torch.randint(7, (5000,), generator=generator), queries


def by_sorting(bank, queries, k, own=None):
    """NumPy in float64: the k most similar rows, of equal ones the first."""
    similarity = queries.double().numpy() @ bank.double().numpy().T
    if own is not None:
        similarity[np.arange(len(own)), own] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def _nearest(rank, world_size, strided):
    bank, labels, queries = tied()
    numbers = torch.arange(5000)
    share = slice(rank, None, world_size) if strided else slice(5000 * rank // 7, 5000 * (rank + 1) // 7)
    share = slice(5000 * rank // 7, None) if not strided and rank == world_size - 1 else share
    mine = slice(rank, None, world_size)
    found = [rows for _, rows in knn.nearest(bank[share], numbers[share], queries[mine], 90)]
    settings = {"classes": 7, "k": 90, "numbers": numbers[share]}
    return torch.cat(found).numpy(), knn.predict(bank[share], labels[share], queries[mine], **settings).numpy()


def test_of_equal_neighbours_the_first_however_the_bank_is_shared():
    bank, labels, queries = tied()
    expected = by_sorting(bank, queries, 90)
    votes = np.zeros((len(queries), 7))
    # equal votes are counted, so that no rounding decides between classes
    similarity = np.take_along_axis(queries.double().numpy() @ bank.double().numpy().T, expected, axis=1)
    np.add.at(votes, (np.arange(len(queries))[:, None], labels.numpy()[expected]), similarity == similarity[:, :1])
    assert (similarity == similarity[:, :1]).all()  # 90 of about 1,000 equal ones
    assert np.array_equal(_nearest(0, 1, True)[0], expected)
    assert np.array_equal(_nearest(0, 1, True)[1], votes.argmax(axis=1))
    for world_size, strided in ((2, True), (3, False)):
        for rank, (found, predicted) in enumerate(processes(world_size, _nearest, world_size, strided)):
            assert np.array_equal(found, expected[rank::world_size])
            assert np.array_equal(predicted, votes.argmax(axis=1)[rank::world_size])


def test_no_row_finds_itself_among_its_equals():
    bank, labels, _ = tied()
    own = torch.arange(5000)
    found = torch.cat([rows for _, rows in knn.nearest(bank, own, bank, 40, own=own)])
    assert np.array_equal(found, by_sorting(bank, bank, 40, own=own.numpy()))


def test_similarities_are_the_same_bits_however_they_are_summed():
    """Of rows on the grid: by integers of any size, and with the columns in another order."""
    torch.manual_seed(8)
    rows = knn.on_grid(F.normalize(torch.randn(40, 300) * torch.logspace(0, -3, 300), dim=1))
    assert torch.equal(rows, rows.float().double())  # what travels is what was rounded
    whole = (rows * knn.GRID).long().tolist()
    expected = [[sum(a * b for a, b in zip(one, other)) for other in whole] for one in whole]
    order = torch.randperm(300)
    for found in (
        rows @ rows.T,
        rows[:, order] @ rows[:, order].T,
        torch.cat([rows @ row[:, None] for row in rows], 1),
    ):
        assert (found * knn.GRID**2).long().tolist() == expected


def test_the_memory_beside_the_bank():
    """50,000 queries of 2,048 numbers would be answered in rounds of this size, whatever their number."""
    bank, queries = (F.normalize(torch.randn(n, 2048)) for n in (5000, 1500))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in knn.nearest(bank, torch.arange(5000), queries, 200):
            pass
    total = most = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.name == "[memory]":
            total += event.cpu_memory_usage
            most = max(most, total)
    assert 0 < most < 1e9 / 2
