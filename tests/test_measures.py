"""Measures of features against closed forms and NumPy in float64, the logistic regression against scikit-learn's."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from synco import measures


def unit(seed, count, width):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_rankme_of_known_spectra():
    """k equal singular values: k directions, but for the paper's 1e-7, of which each of the D values gets one."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)))[0]  # orthonormal columns
    for k in (1, 3, 8):
        rows = torch.from_numpy(basis * (np.arange(8) < k))
        assert measures.rankme(7 * rows) == pytest.approx(k, rel=1e-4)
    with pytest.raises(ValueError, match="all features are 0"):
        measures.rankme(torch.zeros(4, 3))


def test_rankme_is_numpys():
    rows = np.random.default_rng(1).normal(size=(60, 9)) * np.geomspace(1, 1e-3, 9) + 2
    s = np.linalg.svd(rows, compute_uv=False)
    p = s / s.sum() + 1e-7
    assert measures.rankme(torch.from_numpy(rows)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-12)


def test_alignment_and_uniformity():
    one, other = unit(2, 1500, 6), unit(3, 1500, 6)  # more rows than are taken at a time
    z, w = torch.from_numpy(one), torch.from_numpy(other)
    assert measures.alignment(z, w) == pytest.approx(((one - other) ** 2).sum(axis=1).mean(), rel=1e-12)
    assert measures.alignment(z, z) == 0 and measures.alignment(z, -z) == pytest.approx(4)
    squares = ((one[:, None] - one) ** 2).sum(axis=2)[~np.eye(1500, dtype=bool)]
    assert measures.uniformity(z) == pytest.approx(np.log(np.exp(-2 * squares).mean()), rel=1e-9)
    # closed forms: all the same; two opposite points; the corners of a cross, at distances 2 once and root 2 twice
    assert measures.uniformity(torch.ones(5, 1)) == pytest.approx(0, abs=1e-12)
    assert measures.uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)
    cross = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert measures.uniformity(cross) == pytest.approx(np.log((np.exp(-8) + 2 * np.exp(-4)) / 3))


def test_spread_and_collapse():
    rows = unit(4, 300, 5)
    assert measures.spread(torch.from_numpy(rows)) == pytest.approx(1 - (rows.mean(axis=0) ** 2).sum())
    assert measures.spread(torch.ones(4, 1)) == 0
    assert "collapsed: they are nearly the same" in measures.collapse_in_words(0.001, 100, 512)
    assert "few directions: about 3 of 512" in measures.collapse_in_words(0.5, 3.2, 512)
    assert measures.collapse_in_words(0.5, 100, 512) == "The features have not collapsed."


def test_the_bootstrap_is_that_of_drawing_images():
    """Its mean and deviation are those that are known, and its percentiles those of drawing one image after another."""
    values = np.array([1.0] * 30 + [0.0] * 60 + [-1.0] * 10)
    means = measures.bootstrap(values, 40_000, np.random.default_rng(0))
    assert means.mean() == pytest.approx(0.2, abs=0.002) and means.std() == pytest.approx(0.6 / 10, rel=0.02)
    drawn = np.random.default_rng(1).choice(values, size=(40_000, 100)).mean(axis=1)
    low, high = measures.interval(values, 40_000, np.random.default_rng(0))
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.011)  # steps of a hundredth
    assert measures.interval(np.ones(9), 100, np.random.default_rng(0)) == (1, 1)


def problem(count=400, width=12, classes=4):
    rng = np.random.default_rng(5)
    labels = rng.integers(classes, size=count)
    rows = rng.normal(size=(classes, width))[labels] + 1.5 * rng.normal(size=(count, width))
    return rows * rng.uniform(0.1, 10, width) + rng.normal(size=width), labels


def test_logistic_regression_is_at_its_minimum():
    """The gradient of the loss, by NumPy, is 0, and the loss is as NumPy has it lower than around."""
    rows, labels = problem()
    fit = measures.logistic(torch.from_numpy(rows), torch.from_numpy(labels), [0.03])
    x = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    weight, bias = fit.weight.numpy(), fit.bias.numpy()
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(4)[labels]) / len(rows)
    assert np.abs(error.T @ x + 0.03 * weight).max() < 1e-4 and np.abs(error.sum(axis=0)).max() < 1e-4
    assert fit.predict(torch.from_numpy(rows)).tolist() == logits.argmax(axis=1).tolist()


def test_classes_may_lack_and_columns_may_be_constant():
    rows, labels = problem()
    rows[:, 3] = 7
    labels[labels == 2] = 9
    fit = measures.logistic(torch.from_numpy(rows), torch.from_numpy(labels), [0.1])
    assert set(fit.predict(torch.from_numpy(rows)).tolist()) <= {0, 1, 3, 9} and fit.weight.isfinite().all()


def test_the_strength_is_the_best_on_the_held_out():
    rows, labels = (torch.from_numpy(x) for x in problem())
    held_out = torch.arange(400) % 4 == 0
    strengths = (10.0, 0.1, 0.001)
    hits = []
    for strength in strengths:
        fit = measures.logistic(rows[~held_out], labels[~held_out], [strength])
        hits.append((fit.predict(rows[held_out]) == labels[held_out]).sum().item())
    fit, chosen = measures.choose_strength(rows, labels, held_out, strengths)
    assert chosen == strengths[int(np.argmax(hits))]
    alone = measures.logistic(rows, labels, [chosen])
    assert torch.allclose(fit.weight, alone.weight, atol=1e-3)


def test_logistic_regression_agrees_with_scikit_learns():
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression

    rows, labels = problem(1500)
    for strength in (1.0, 0.01, 1e-4):
        fit = measures.logistic(torch.from_numpy(rows[:1000]), torch.from_numpy(labels[:1000]), [strength])
        x = (rows - rows[:1000].mean(axis=0)) / rows[:1000].std(axis=0)
        theirs = LogisticRegression(C=1 / (1000 * strength), tol=1e-8, max_iter=5000).fit(x[:1000], labels[:1000])
        assert np.allclose(theirs.coef_, fit.weight.numpy(), atol=1e-3 * np.abs(theirs.coef_).max())
        found = fit.predict(torch.from_numpy(rows[1000:])).numpy()
        assert abs((found == labels[1000:]).mean() - theirs.score(x[1000:], labels[1000:])) <= 0.002


def test_spread_is_numpys():
    torch.manual_seed(0)
    q = normalize(torch.randn(12, 5) @ torch.randn(5, 5))
    found = measures.signs_of_collapse(q)
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
        found = measures.signs_of_collapse(rows)
        assert found["spread"] == pytest.approx(spread, abs=1e-5)
        assert found["effective_rank"] == pytest.approx(rank, abs=1e-4)
    assert measures.signs_of_collapse(normalize(torch.randn(20_000, 16)))["spread"] == pytest.approx(1, abs=0.02)
    for wrong in (torch.nan, torch.inf):
        found = measures.signs_of_collapse(torch.tensor([[wrong, 1.0], [0.0, 1.0]]))
        assert np.isnan(list(found.values())).all(), "which the run then says in a line"


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
