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
    names, means = averages.take(lambda x: x)
    assert names == ["loss", "acc"] and means.tolist() == [3.0, 30.0]
    averages.add(loss=torch.tensor(5.0))
    assert averages.take(lambda x: x * 2)[1].tolist() == [10.0]


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


def test_notes_are_read_as_they_are():
    notes = metrics.Notes()
    assert notes.read() == ({}, {})
    big = 2**53 - 1
    notes.add(a=torch.tensor(0.1), b=torch.tensor(3))
    notes.count(
        lambda table, row: {"sum": table.sum().item(), "big": row[1].item()},
        torch.arange(6).view(2, 3),
        torch.tensor([0, big]),
    )
    notes.count(lambda rows: {"rows": rows.dtype == torch.float32 and rows[0, 1].item()}, torch.tensor([[0.0, 0.1]]))
    notes.add(c=torch.tensor(-torch.inf))
    found, others = notes.read(means=torch.tensor([[0.1], [2.0]]), scale=torch.tensor(4.0))
    assert found == {"a": torch.tensor(0.1).item(), "b": 3, "c": -np.inf, "sum": 15, "big": big, "rows": found["a"]}
    assert others == {"means": [[torch.tensor(0.1).item()], [2.0]], "scale": 4.0}


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
    assert [line["step"] for line in log.kept] == [1, 2]
    log.write("train", 3, epoch=0, loss=9.0)
    log.close()
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert len(metrics.Log(tmp_path, steps_done=3).kept) == 3


def test_other_ranks_write_nothing(tmp_path):
    log = metrics.Log(tmp_path / "none", active=False)
    log.write("train", 1, epoch=0, loss=1.0)
    log.images("pairs", None, 0)
    log.close()
    assert not (tmp_path / "none").exists() and log.kept == []


def test_a_board_that_cannot_be_written_is_given_up(tmp_path, capsys):
    log = metrics.Log(str(tmp_path))

    def full(*args):
        raise OSError("no space")

    log.board.add_scalar = full
    log.write("train", 1, loss=1.0)
    log.write("train", 2, loss=2.0)
    log.close()
    _, text = capsys.readouterr().err.split(": warning: ")  # one, as all others are printed
    assert text == "TensorBoard's file cannot be written (no space); given up\n"
    assert [line["loss"] for line in metrics.read_log(tmp_path / "log.jsonl")] == [1.0, 2.0]


def test_duration():
    assert metrics.duration(59.6) == "0:01:00"
    assert metrics.duration(3 * 3600 + 125) == "3:02:05"
    assert metrics.duration(2 * 86400 + 3661) == "2 d 01:01:01"


def test_averages_go_on_where_they_were():
    values = torch.rand(2, 5, 3)  # processes, steps, names
    undisturbed = values.mean(dim=(0, 1))
    first = []
    for rank in range(2):
        averages = metrics.Averages()
        for step in range(3):
            averages.add(**dict(zip("abc", values[rank, step])))
        first.append(averages)
    states = [torch.stack(list(averages.sums.values())) for averages in first]
    state = first[0].state(lambda mine: states)
    for count in (1, 2):  # processes that go on
        found = []
        for rank in range(count):
            averages = metrics.Averages()
            averages.restore(state, rank, count, "cpu")
            for step in (3, 4):
                averages.add(**dict(zip("abc", values[rank, step] if count == 2 else values[:, step].mean(dim=0))))
            found.append([averages.sums[name] / averages.steps for name in "abc"])
        torch.testing.assert_close(torch.tensor(found).mean(dim=0), undisturbed)


@pytest.mark.parametrize(
    "sums, steps",
    [(torch.ones(1, 1).expand(10**13, 1), 1), (torch.ones(1, 1, 4), 1), (torch.ones(1, 1), -1), (torch.ones(1), 1)],
)
def test_averages_of_no_run_are_refused(sums, steps):
    with pytest.raises(ValueError, match="not the averages of a run"):
        metrics.Averages().restore({"names": ["loss"], "sums": sums, "steps": steps}, 0, 1, "cpu")


def test_a_log_that_cannot_be_written_waits(tmp_path, capsys):
    log = metrics.Log(str(tmp_path))
    log.write("train", 1, loss=1.0)
    file, wrote = log.lines, []

    class Full:
        def write(self, data):
            wrote.append(file.write(data[:10]))  # a part fits
            return wrote[-1]

        def fileno(self):
            return file.fileno()

    log.lines = Full()
    log.write("train", 2, loss=2.0)
    assert wrote == [10] and "log.jsonl: cannot be written (No space left on device)" in capsys.readouterr().err
    log.lines = file
    log.sync()  # there is room again when a checkpoint is written: what it takes for written is
    assert [line["step"] for line in metrics.read_log(tmp_path / "log.jsonl")] == [1, 2]
    log.write("train", 3, loss=3.0)
    log.close()
    assert [line["step"] for line in metrics.read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_log_may_hold_anything(tmp_path):
    good = '{"kind": "train", "step": 1, "loss": 2}\n'
    lines = [
        "[1]\n",
        "3\n",
        "{}\n",
        '{"kind": 3, "step": 1}\n',
        '{"kind": "x", "step": "1"}\n',
        "[" * 100_000 + "\n",
        "\0\n",
    ]
    (tmp_path / "log.jsonl").write_text(good + "".join(lines) + good[:-1])
    metrics.Log(str(tmp_path), steps_done=1).close()
    assert (tmp_path / "log.jsonl").read_text() == good
