"""Averages, diagnostics and the log, against NumPy."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synco import metrics


def test_averages_are_read_once_and_cleared():
    averages = metrics.Averages()
    for value in (1.0, 2.0, 6.0):
        averages.add(loss=torch.tensor(value, requires_grad=True), acc=torch.tensor(10 * value))
    assert averages.read(lambda x: x) == {"loss": 3.0, "acc": 30.0}
    averages.add(loss=torch.tensor(5.0))
    assert averages.read(lambda x: x * 2) == {"loss": 10.0}


def random_logits():
    torch.manual_seed(0)
    return torch.randn(6, 1 + 20 + 7) * 3


def test_contrastive_accuracy():
    logits = random_logits()
    logits[0, 0] = 50  # first of all
    logits[1, 0] = logits[1, 1:21].max() + 0.01  # first of the real ones
    logits[1, 25] = logits[1, 0] + 1
    found = metrics.contrastive_accuracy(logits, K=20)
    table = logits.double().numpy()
    rank = (-table).argsort(axis=1).argsort(axis=1)[:, 0]
    real = (-table[:, :21]).argsort(axis=1).argsort(axis=1)[:, 0]
    expected = {"acc1": 100 * (rank < 1).mean(), "acc5": 100 * (rank < 5).mean(), "acc1_real": 100 * (real < 1).mean()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].item(), value, rtol=1e-6)
    assert expected["acc1_real"] > expected["acc1"] > 0


def test_hardness():
    logits, T = random_logits(), 0.2
    counts = {"interpolated": 3, "extrapolated": 0, "mixed": 4}
    found = metrics.hardness(logits, counts, K=20, T=T, n_hard=5)
    table = logits.double().numpy()
    mass = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    hardest = np.argsort(-table[:, 1:21], axis=1)[:, :5] + 1
    expected = {
        "positive": (table[:, 0], mass[:, :1]),
        "queue": (table[:, 1:21], mass[:, 1:21]),
        "hardest": (np.take_along_axis(table, hardest, 1), np.take_along_axis(mass, hardest, 1)),
        "interpolated": (table[:, 21:24], mass[:, 21:24]),
        "mixed": (table[:, 24:28], mass[:, 24:28]),
    }
    assert found.keys() == expected.keys()
    for name, (similarity, share) in expected.items():
        np.testing.assert_allclose(found[name][0].item(), similarity.mean() * T, atol=1e-5)
        np.testing.assert_allclose(found[name][1].item(), share.sum(axis=1).mean(), atol=1e-6)
    total = sum(found[name][1].item() for name in ("positive", "queue", "interpolated", "mixed"))
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_masked_rows_have_no_say_in_the_hardness():
    logits = random_logits()
    logits[0, 3] = logits[1, 1:18] = -torch.inf
    found = metrics.hardness(logits, {"mixed": 7}, K=20, T=0.2, n_hard=5)
    rows = logits[:, 1:21].double().numpy()
    hardest = -np.sort(-rows, axis=1)[:, :5]
    for name, values in (("queue", rows), ("hardest", hardest)):
        assert found[name][0].item() == pytest.approx(values[np.isfinite(values)].mean() * 0.2, abs=1e-5)
    assert all(np.isfinite(value.item()) for pair in found.values() for value in pair)


def test_log_writes_the_same_numbers_twice(tmp_path):
    log = metrics.Log(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, epoch=0, loss=step / 2)
    log.write("knn", 3, epoch=1, top1=50.0)
    log.close()
    lines = metrics.read_log(tmp_path / "log.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("train", 3), ("knn", 3)]
    assert lines[1]["loss"] == 1.0 and lines[3]["top1"] == 50.0 and "time" in lines[0]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert board.Scalars("knn/top1")[0].value == 50.0

    # a run that was killed in the middle of a line goes on from step 2: later lines are written again
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "tr')
    log = metrics.Log(tmp_path, steps_done=2)
    assert not log.holds("knn", 1)
    log.write("train", 3, epoch=0, loss=9.0)
    log.close()
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert metrics.Log(tmp_path, steps_done=3).holds("train", 0)


def test_other_ranks_write_nothing(tmp_path):
    log = metrics.Log(tmp_path / "none", active=False)
    log.write("train", 1, epoch=0, loss=1.0)
    log.images("pairs", None, 0)
    log.close()
    assert not (tmp_path / "none").exists() and not log.holds("train", 0)


def test_duration():
    assert metrics.duration(59.6) == "0:01:00"
    assert metrics.duration(3 * 3600 + 125) == "3:02:05"
    assert metrics.duration(2 * 86400 + 3661) == "2 d 01:01:01"
