"""The six formulas, the mining and the draw against NumPy in float64, autograd, and plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import textbook
from synco.negatives import (
    KINDS,
    TYPES,
    adversarial,
    extrapolated,
    hardest,
    interpolated,
    mixed,
    noisy,
    perturbed,
    synthesize,
)

N, S, C, K = 5, 7, 16, 50
RANGES = {"alpha": 0.5, "beta": 1.5, "gamma": 1.0, "sigma": 0.01, "delta": 0.01, "eta": 0.01}


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def case():
    torch.manual_seed(0)
    return {
        "q": unit(N, C),
        "n": unit(N, S, C),
        "other": unit(N, S, C),
        "u": torch.rand(N, S, 1),
        "noise": 0.01 * torch.randn(N, S, C),
    }


def in_numpy(name, case):
    """The formulas of the paper's table, in float64."""
    q, n, other, u, noise = (case[key].double().numpy() for key in ("q", "n", "other", "u", "noise"))
    q = q[:, None]
    return normalized(
        {
            "interpolated": 0.5 * u * q + (1 - 0.5 * u) * n,
            "extrapolated": q + (1 + 0.5 * u) * (n - q),
            "mixed": u * n + (1 - u) * other,
            "noisy": n + noise,
            "perturbed": n + 0.3 * q,
            "adversarial": n + 0.3 * np.sign(q),
        }[name]
    )


def ours(name, case):
    q, n, other, u, noise = (case[key] for key in ("q", "n", "other", "u", "noise"))
    return {
        "interpolated": lambda: interpolated(q, n, 0.5 * u),
        "extrapolated": lambda: extrapolated(q, n, 1 + 0.5 * u),
        "mixed": lambda: mixed(n, other, u),
        "noisy": lambda: noisy(n, noise),
        "perturbed": lambda: perturbed(q, n, 0.3),
        "adversarial": lambda: adversarial(q, n, 0.3),
    }[name]()


@pytest.mark.parametrize("name", TYPES)
def test_formula_equals_numpy(name, case):
    made = ours(name, case)
    assert made.shape == (N, S, C) and made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), in_numpy(name, case), atol=1e-6, rtol=0)
    np.testing.assert_allclose(made.norm(dim=-1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_formula_keeps_the_dtype_and_gives_no_gradient(name, dtype, case):
    case = {key: value.to(dtype).requires_grad_() for key, value in case.items()}
    made = ours(name, case)
    assert made.dtype == dtype and not made.requires_grad
    exact = in_numpy(name, {key: value.detach() for key, value in case.items()})
    tolerance = {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    np.testing.assert_allclose(made.double().numpy(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("function, of_gradient", [(perturbed, lambda g: g), (adversarial, torch.sign)])
def test_gradient_types_equal_autograd_exactly(function, of_gradient, case):
    q, n = case["q"], case["n"]
    leaf = n.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((q[:, None] * leaf).sum(), leaf)
    by_autograd = F.normalize(n + 0.01 * of_gradient(gradient), dim=-1)
    assert torch.equal(function(q, n, 0.01), by_autograd)


@pytest.mark.parametrize("K, n_hard", [(50, 9), (50, 50), (64, 3), (64, 4), (64, 64), (4096, 1), (4096, 255)])
def test_hardest_finds_the_most_similar_rows(K, n_hard):
    torch.manual_seed(1)
    for similarity in (
        torch.randn(N, K),
        torch.arange(N * K).view(N, K).float(),
        -torch.arange(N * K).view(N, K).float(),
    ):
        by_sorting = np.argsort(-similarity.numpy(), axis=1)[:, :n_hard]
        np.testing.assert_array_equal(hardest(similarity, n_hard).numpy(), by_sorting)
    tied = torch.randint(3, (N, K)).float()
    found = hardest(tied, n_hard)
    assert all(len(set(row)) == n_hard for row in found.tolist())
    assert torch.equal(tied.gather(1, found), tied.sort(dim=1, descending=True).values[:, :n_hard])


def queue_and_hard():
    torch.manual_seed(2)
    q, queue = unit(N, C), unit(K, C)
    return q, queue, hardest(q @ queue.T, 12)


def draw(counts, q, queue, hard, seed=7, **ranges):
    generator = torch.Generator().manual_seed(seed)
    return synthesize(q, queue, hard, counts, **{**RANGES, **ranges}, generator=generator)


ALONE = [tuple(9 * (i == number) for i in range(6)) for number in range(6)]


@pytest.mark.parametrize("counts", [(4, 5, 6, 3, 2, 1), (0, 5, 0, 3, 0, 1), *ALONE])
def test_synthesize_equals_numpy(counts):
    """The same draws, read off the generator in the documented order, through the formulas in float64.

    Each type is there when its own count says so, and alone when the others are 0: the reference switches types 4 and
    5 on by each other's counts.
    """
    q, queue, hard = queue_and_hard()
    made = draw(counts, q, queue, hard)

    g = torch.Generator().manual_seed(7)
    n1, n2, n3, n4, n5, n6 = counts
    splits = (n1, n2, n3, n3, n4, n5, n6)
    pick = torch.randint(hard.shape[1], (N, sum(splits)), generator=g)
    rows = np.take_along_axis(hard.numpy(), pick.numpy(), axis=1)
    a, b, c, d, e, f, h = np.split(queue.double().numpy()[rows], np.cumsum(splits)[:-1], axis=1)
    alpha = torch.empty(N, n1, 1).uniform_(0, 0.5, generator=g).double().numpy()
    beta = torch.empty(N, n2, 1).uniform_(1, 1.5, generator=g).double().numpy()
    gamma = torch.empty(N, n3, 1).uniform_(0, 1.0, generator=g).double().numpy()
    noise = torch.randn(N, n4, C, generator=g).double().numpy()
    x = q.double().numpy()[:, None]
    expected = [
        alpha * x + (1 - alpha) * a,
        x + beta * (b - x),
        gamma * c + (1 - gamma) * d,
        e + 0.01 * noise,
        f + 0.01 * x,
        h + 0.01 * np.sign(x),
    ]
    np.testing.assert_allclose(made.numpy(), normalized(np.concatenate(expected, axis=1)), atol=1e-6, rtol=0)


def test_sigma_delta_and_eta_reach_their_own_type():
    q, queue, hard = queue_and_hard()
    counts = (0, 0, 0, 8, 8, 8)
    base = draw(counts, q, queue, hard)
    for setting, own in (("sigma", 0), ("delta", 1), ("eta", 2)):
        moved = (draw(counts, q, queue, hard, **{setting: 0.5}) - base).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.view(3, 8).any(dim=1).tolist() == [i == own for i in range(3)]


def test_draws_are_uniform_independent_and_with_replacement():
    q, queue, hard = unit(1, C), unit(K, C), torch.arange(4)[None]
    made = draw((0, 0, 0, 4000, 4000, 0), q, queue, hard, sigma=0.0, delta=0.0)[0]
    which = (made @ queue[:4].T).argmax(dim=1).view(2, 4000)  # row of each negative, of two types
    for kind in which:
        frequency = kind.bincount(minlength=4) / 4000
        assert (frequency - 0.25).abs().max() < 0.03
    same = (which[0] == which[1]).float().mean()
    assert abs(same - 0.25) < 0.03  # the two types do not share their rows


def test_coefficients_fill_their_ranges():
    """Recovered from the negatives themselves: with one row, s = normalize(a q + b n) gives the coefficient back."""
    q = F.normalize(torch.tensor([[1.0, 0.0, 0.0]]))
    queue = F.normalize(torch.tensor([[0.0, 1.0, 0.0]]))
    hard = torch.zeros(1, 1, dtype=torch.long)
    for counts, low, high, settings in (
        ((5000, 0, 0, 0, 0, 0), 0.0, 0.3, {"alpha": 0.3}),
        ((0, 5000, 0, 0, 0, 0), 1.0, 1.7, {"beta": 1.7}),
    ):
        made = draw(counts, q, queue, hard, **settings)[0]
        weight_q, weight_n = made[:, 0], made[:, 1]
        share = weight_n / (weight_q + weight_n)  # beta itself, or 1 - alpha
        coefficient = 1 - share if counts[0] else share
        assert low <= coefficient.min() < low + 0.01 and high - 0.01 < coefficient.max() <= high + 1e-5
        assert abs(coefficient.mean() - (low + high) / 2) < 0.01


def test_synthesize_is_constant_and_leaves_the_queue_alone():
    q, queue, hard = queue_and_hard()
    before = queue.clone()
    made = draw((2,) * 6, q.requires_grad_(), queue, hard)
    assert not made.requires_grad and torch.equal(queue, before)
    queue.zero_()
    assert (made.norm(dim=-1) - 1).abs().max() < 1e-6  # a copy: a later enqueue cannot reach it


def test_the_control_repeats_hard_rows_and_leaves_the_types_as_they_are():
    q, queue, hard = queue_and_hard()
    counts = (4, 5, 6, 3, 2, 1)
    with_control = draw((*counts, 4000), q, queue, hard)
    assert torch.equal(with_control[:, : sum(counts)], draw(counts, q, queue, hard))
    for i in range(N):
        equal = (with_control[i, sum(counts) :, None] == queue[hard[i]]).all(dim=2)  # (4000, n_hard)
        assert (equal.sum(dim=1) == 1).all(), "a row, to the bit"
        assert (equal.float().mean(dim=0) - 1 / hard.shape[1]).abs().max() < 0.03, "drawn uniformly"
    alone = draw((0,) * 6 + (9,), q, queue, hard)
    assert alone.shape == (N, 9, C) and not torch.equal(alone[:, 0], alone[:, 1])


def test_sources_are_the_rows_that_negatives_were_made_from():
    """With coefficients that leave the rows as they are, the negatives tell their sources themselves."""
    q, queue, hard = queue_and_hard()
    counts, sources = (3, 4, 5, 2, 2, 2, 6), {}
    none = {"alpha": 1e-9, "beta": 1 + 1e-7, "gamma": 1e-9, "sigma": 0.0, "delta": 0.0, "eta": 0.0}
    generator = torch.Generator().manual_seed(7)
    made = synthesize(q, queue, hard, counts, **none, generator=generator, sources=sources)
    assert list(sources) == list(KINDS) and torch.equal(made, draw(counts, q, queue, hard, **none))
    for (kind, rows), part in zip(sources.items(), made.split(counts, dim=1)):
        if kind == "mixed":  # gamma 0: the second row of each
            assert rows.shape == (N, 10)
            rows = rows[:, 5:]
        torch.testing.assert_close(queue[rows], part, atol=1e-6, rtol=0)
    some = {}
    synthesize(q, queue, hard, (0, 0, 4, 0, 1, 0), sources=some)
    assert {kind: rows.shape for kind, rows in some.items()} == {"mixed": (N, 8), "perturbed": (N, 1)}
    assert all((rows[:, :, None] == hard[:, None]).any(dim=2).all() for rows in some.values())


def test_no_types_make_no_negatives():
    q, queue, hard = queue_and_hard()
    assert synthesize(q, queue, hard, (0,) * 6).shape == (N, 0, C)


def test_textbook_draws_the_same():
    """The slow version, with autograd for each negative, gives the same logits and the same gradient."""
    from synco.builder import SynCo

    torch.manual_seed(3)
    counts = dict(zip(("n1", "n2", "n3", "n4", "n5", "n6"), (5, 4, 3, 2, 3, 2)))
    model = SynCo(lambda num_classes: torch.nn.Linear(4, num_classes), C, K, T=0.2, mlp=False, n_hard=12, **counts)
    q, k = unit(N, C), unit(N, C)
    slots = torch.arange(N)
    found = []
    for head in (
        lambda q, g: model.logits(q, k, slots, model.counts, g),
        lambda q, g: textbook.logits(q, k, model.queue, model.counts, n_hard=12, T=0.2, **model.ranges, generator=g),
    ):
        leaf = q.clone().requires_grad_()
        logits = head(leaf, torch.Generator().manual_seed(5))
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.long)).backward()
        found.append((logits.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)
