"""The kNN monitor against a plain loop, in one process and in several."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import processes
from torch.utils.data import TensorDataset

from synco import knn, loader
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
    found = knn.accuracy(net, "fc", *parts, torch.device("cpu"), classes=3, k=5)
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


def _tiny(rank):
    bank = TensorDataset(torch.eye(6), torch.arange(6) % 3)
    queries = TensorDataset(torch.eye(6)[:2], torch.arange(2))
    parts = [loader.eval_loader(s, 4, process=Process(rank, 3), workers=0) for s in (bank, queries)]
    return knn.accuracy(network(0), "fc", *parts, torch.device("cpu"), classes=3, k=1)


def test_a_process_may_have_no_images_at_all():
    assert processes(3, _tiny) == [100.0] * 3
