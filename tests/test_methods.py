"""Methods by name: their counts, scaled to the queue, and the words for what runs."""

import sys

import pytest

import main_synco
from synco import methods
from synco.errors import UserError


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["main_synco.py", *map(str, flags), "DATA"])
    return main_synco.parse()


def counts(args):
    return args.n_hard, *methods.counts(args)


@pytest.mark.parametrize(
    "method, K, expected",
    [
        ("synco", 65536, (1024, 256, 256, 256, 64, 64, 64, 0)),
        ("synco", 4096, (64, 16, 16, 16, 4, 4, 4, 0)),
        ("synco", 512, (8, 2, 2, 2, 1, 1, 1, 0)),  # at least 1
        ("synco", 32, (1, 1, 1, 1, 1, 1, 1, 0)),
        ("synco", 131072, (2048, 512, 512, 512, 128, 128, 128, 0)),
        ("mochi", 65536, (1024, 128, 0, 1024, 0, 0, 0, 0)),
        ("mochi", 512, (8, 1, 0, 8, 0, 0, 0, 0)),
        ("mocov2", 4096, (64, 0, 0, 0, 0, 0, 0, 0)),
        ("mocov1", 4096, (64, 0, 0, 0, 0, 0, 0, 0)),
        ("copied", 65536, (1024, 0, 0, 0, 0, 0, 0, 960)),
        ("copied", 512, (8, 0, 0, 0, 0, 0, 0, 9)),  # as many as SynCo's there
    ],
)
def test_presets_are_scaled_to_the_queue(monkeypatch, method, K, expected):
    assert counts(parsed(monkeypatch, "--moco-k", K, "--method", method)) == expected


def test_flags_win_over_the_preset_wherever_they_stand(monkeypatch):
    words = ["--n3", 7, "--method", "mocov2", "--n-hard", 5, "--moco-k", 4096, "--n-copied", 0]
    args = parsed(monkeypatch, *words)
    assert counts(args) == (5, 0, 0, 7, 0, 0, 0, 0)
    assert methods.describe(args, 10, 2000).startswith(
        "MoCHi: 7 synthetic negatives a query (7 mixed), made from the 5 "
    )
    args = parsed(monkeypatch, "--method", "synco", "--n1", 256)  # what the flag is without it, too
    assert counts(args) == counts(parsed(monkeypatch))
    args = parsed(monkeypatch, "--method", "synco", "--moco-k", 4096, "--n1", 256)
    assert counts(args) == (64, 256, 16, 16, 4, 4, 4, 0)
    with pytest.raises(UserError, match="argument --method: invalid choice: 'simclr'.*mocov2"):
        parsed(monkeypatch, "--method", "simclr")
    with pytest.raises(UserError, match="--n-hard 65 is larger than the queue: --moco-k is 64"):
        parsed(monkeypatch, "--method", "copied", "--moco-k", 64, "--n-hard", 65)


def test_the_method_in_words(monkeypatch):
    def words(*flags, steps=10, total=2000):
        return methods.describe(parsed(monkeypatch, "--moco-k", 512, *flags), steps, total)

    assert words("--method", "mocov2") == words("--method", "mocov1") == "MoCo (no synthetic negatives)"
    assert words("--method", "mochi") == (
        "MoCHi: 9 synthetic negatives a query (1 interpolated, 8 mixed), made from the 8 hardest of 512 queue rows, "
        "from epoch 10 on"
    )
    assert words("--method", "copied") == (
        "MoCo with repeated hard negatives: for a query the 8 hardest of 512 queue rows, 9 of them over again, "
        "unchanged: a control that is not part of SynCo, from epoch 10 on"
    )
    both = words("--method", "synco", "--n-copied", 4, "--cooldown-epochs", 20)
    assert both.startswith("SynCo: 9 synthetic negatives a query (2 interpolated, ")
    assert both.endswith(
        "from epoch 10 on, before epoch 180; and 4 of them over again, unchanged: a control that is not part of SynCo"
    )
    starts = words("--method", "copied", "--n6", 1, "--warmup-epochs", "3,4,15s,5,6,7")
    assert "from epoch 7 (adversarial), 15s (copied) on" in starts, "the control begins with the first of all types"
    assert "in no epoch: all are warm-up or cool-down" in words("--method", "copied", "--cooldown-epochs", 190)
