import numpy as np
import pytest
import torch

from synco import measures


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


def test_spread_is_numpys():
    torch.manual_seed(0)
    q = unit(torch.randn(12, 5) @ torch.randn(5, 5))
    found = {name: value.item() for name, value in measures.spread(q).items()}
    rows = q.double().numpy()
    assert found["spread"] == pytest.approx(rows.std(axis=0).mean() * 5**0.5, rel=1e-5)
    sigma = np.sqrt(np.linalg.eigvalsh(rows.T @ rows))  # by another way than the singular values themselves
    p = sigma / sigma.sum() + 1e-7
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_spread_in_closed_form():
    """Rows that are the same; two opposite ones; a basis and its opposite: each axis has one of C of the variance."""
    for rows, spread, rank in (
        (torch.eye(8)[:1].repeat(6, 1), 0, 1),
        (torch.cat([torch.eye(8)[:1], -torch.eye(8)[:1]]), 8**0.5 / 8, 1),
        (torch.cat([torch.eye(8), -torch.eye(8)]), 1, 8),
    ):
        found = measures.spread(rows)
        assert found["spread"].item() == pytest.approx(spread, abs=1e-5)
        assert found["effective_rank"].item() == pytest.approx(rank, abs=1e-4)
    assert measures.spread(unit(torch.randn(20_000, 16)))["spread"].item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "course, told",
    [
        ([(0, 0.3, 20.0), (0, 0.001, 1.0), (1, 0.02, 2.0), (2, 0.5, 30.0), (3, 0.4, 25.0)], ""),
        ([(1, 0.5, 30.0), (2, 0.1, 20.0), (3, 0.05, 1.0)], "spread is 0.1 after at most 0.5"),
        ([(1, 0.5, 30.0), (2, 0.4, 7.0)], "effective rank is 7 after at most 30"),
        ([(0, 0.3, 20.0), (1, 0.004, 1.0)], "spread is 0.004 after at most 0.004"),
    ],
    ids=["a good run", "it falls", "its rank falls", "it never rises"],
)
def test_a_fall_towards_collapse_is_told_once(capsys, course, told):
    collapse = measures.Collapse()
    for epoch, spread, rank in course:
        collapse.watch(epoch, {"loss": 1.0, "spread": spread, "effective_rank": rank})
    collapse.watch(9, {"loss": 1.0})
    err = capsys.readouterr().err
    assert err.count("fall towards collapse") == bool(told) and told in err
