"""What is said of the negatives, against NumPy in float64, autograd, loops, and cases whose answer is known."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from synco import diagnostics
from synco.builder import Inspection, SynCo
from synco.negatives import KINDS

T, K = 0.2, 20


def random_logits():
    torch.manual_seed(0)
    return torch.randn(6, 1 + 20 + 7) * 3


def test_hardness():
    logits, T = random_logits(), 0.2
    counts = {"interpolated": 3, "extrapolated": 0, "mixed": 4}
    found = diagnostics.hardness(logits, counts, K=20, T=T, n_hard=5)
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
    assert list(found) == [f"{what}/{name}" for name in expected for what in ("similarity", "mass")]
    for name, (similarity, share) in expected.items():
        np.testing.assert_allclose(found[f"similarity/{name}"].item(), similarity.mean() * T, atol=1e-5)
        np.testing.assert_allclose(found[f"mass/{name}"].item(), share.sum(axis=1).mean(), atol=1e-6)
    total = sum(found[f"mass/{name}"].item() for name in ("positive", "queue", "interpolated", "mixed"))
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_masked_rows_have_no_say_in_the_hardness():
    logits = random_logits()
    logits[0, 3] = logits[1, 1:18] = -torch.inf
    found = diagnostics.hardness(logits, {"mixed": 7}, K=20, T=0.2, n_hard=5)
    rows = logits[:, 1:21].double().numpy()
    hardest = -np.sort(-rows, axis=1)[:, :5]
    for name, values in (("queue", rows), ("hardest", hardest)):
        assert found[f"similarity/{name}"].item() == pytest.approx(values[np.isfinite(values)].mean() * 0.2, abs=1e-5)
    assert all(np.isfinite(value.item()) for value in found.values())


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


COUNTS = dict(zip(KINDS, (3, 0, 4, 2, 0, 1, 2)))
S = sum(COUNTS.values())


def a_step(N=6, C=8, synthetic=None):
    """(q that wants a gradient, its logits, Inspection) of random unit vectors in float64, without the model."""
    torch.manual_seed(3)
    q, k, queue = unit(N, C).requires_grad_(), unit(N, C), unit(K, C)
    synthetic = unit(N, S, C) if synthetic is None else synthetic(q.detach(), k, queue)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T, torch.einsum("nc,nsc->ns", q, synthetic)], dim=1) / T
    return q, logits, Inspection(q, k, queue, torch.arange(K), torch.arange(N), synthetic)


def test_leakage():
    _, logits, _ = a_step()
    table = logits.detach().numpy()
    found = diagnostics.leakage(logits, COUNTS, K=K)
    ends = np.cumsum([1 + K, *COUNTS.values()])
    expected = {
        f"leakage/{kind}": (table[:, low:high] > table[:, :1]).mean()
        for kind, low, high in zip(COUNTS, ends, ends[1:])
        if high > low
    }
    assert {name: pytest.approx(value.item()) for name, value in found.items()} == expected
    assert 0 < np.mean(list(expected.values())) < 1
    for kind, part in (
        ("mixed", slice(24, 28)),
        ("adversarial", slice(30, 31)),
    ):  # all of one kind, and none of another
        logits[:, part] = logits[:, :1] + (1e-3 if kind == "mixed" else 0)
    found = diagnostics.leakage(logits, COUNTS, K=K)
    assert found["leakage/mixed"] == 1 and found["leakage/adversarial"] == 0, "as near is not nearer"
    assert diagnostics.leakage(logits[:, : 1 + K], dict.fromkeys(KINDS, 0), K=K) == {}


def test_gradient_parts_equal_autograd_and_numpy():
    q, logits, seen = a_step()
    parts = diagnostics.gradient_parts(logits, seen, COUNTS, T=T)
    assert list(parts) == ["positive", "queue", *(kind for kind, count in COUNTS.items() if count)]
    F.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="sum").backward()
    torch.testing.assert_close(sum(parts.values()), q.grad, atol=1e-12, rtol=0)
    table = logits.detach().numpy()
    p = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    k, queue, synthetic = (x.numpy() for x in (seen.k, seen.queue, seen.synthetic))
    for i in range(6):
        np.testing.assert_allclose(parts["positive"][i], -(1 - p[i, 0]) * k[i] / T, atol=1e-12)
        np.testing.assert_allclose(parts["queue"][i], sum(p[i, 1 + j] * queue[j] for j in range(K)) / T, atol=1e-12)
        start = 0
        for kind, count in COUNTS.items():
            part = sum((p[i, 1 + K + s] * synthetic[i, s] for s in range(start, start + count)), np.zeros(8)) / T
            np.testing.assert_allclose(parts.get(kind, torch.zeros(6, 8))[i], part, atol=1e-12)
            start += count


def test_gradient_of_the_model_itself():
    """In float32, with a masked queue, after the step's keys have overwritten a part of it: to 1e-5 of autograd's."""
    torch.manual_seed(1)
    names = ("n1", "n2", "n3", "n4", "n5", "n6", "n_copied")
    counts = dict(zip(names, (3, 2, 4, 2, 1, 1, 2)))
    model = SynCo(lambda num_classes: nn.Linear(6, num_classes), 8, K, T=T, mlp=False, n_hard=5, **counts,
                  mask_same_image=True)  # fmt: skip
    model.queue_index.copy_(torch.arange(K) // 2)
    kept = []
    model.encoder_q.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits, labels = model(torch.randn(6, 6), torch.randn(6, 6), index=torch.arange(6), inspect=True)
    unit_rows = F.normalize(kept[0], dim=1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), kept[0])
    parts = diagnostics.gradient_parts(logits.detach(), model.inspection, dict(zip(KINDS, model.counts)), T=T)
    (expected,) = torch.autograd.grad(unit_rows, kept[0], sum(parts.values()))  # of q = normalize(output)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_directions():
    parts = {
        name: unit(6, 8) * torch.rand(6, 1, dtype=torch.float64) for name in ("positive", "queue", "noisy", "mixed")
    }
    found = diagnostics.directions(parts)
    tables = {name: part.numpy() for name, part in parts.items()}
    whole = sum(tables.values())
    length = np.linalg.norm(whole, axis=1)
    for name, part in tables.items():
        expected = np.mean([part[i] @ whole[i] / length[i] for i in range(6)]) / length.mean()
        assert found[f"gradient/{name}"].item() == pytest.approx(expected)
    assert sum(value for name, value in found.items() if name.startswith("gradient/")).item() == pytest.approx(1)
    for name in ("noisy", "mixed"):
        a, b = tables[name], tables["queue"]
        cosines = [a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i]) for i in range(6)]
        assert found[f"cosine/{name}"].item() == pytest.approx(np.mean(cosines))
    assert [name for name in found if name.startswith("cosine/")] == ["cosine/noisy", "cosine/mixed"]


def test_a_type_that_equals_the_real_rows_adds_no_direction():
    """All rows of the queue once more: cosine 1, and the same share; rows at right angles to all of them: cosine 0."""
    counts = {"copied": K}
    q, logits, seen = a_step(synthetic=lambda q, k, queue: queue.expand(6, K, 8))
    found = diagnostics.directions(diagnostics.gradient_parts(logits, seen, counts, T=T))
    assert found["cosine/copied"].item() == pytest.approx(1, abs=1e-12)
    assert found["gradient/copied"].item() == pytest.approx(found["gradient/queue"].item(), abs=1e-12)

    def apart(q, k, queue):
        queue[:, 4:] = 0
        return F.normalize(torch.cat([torch.zeros(6, K, 4), torch.randn(6, K, 4)], dim=2).double(), dim=2)

    q, logits, seen = a_step(synthetic=apart)
    found = diagnostics.directions(diagnostics.gradient_parts(logits, seen, counts, T=T))
    assert found["cosine/copied"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_wrong_negatives_equal_a_plain_loop(masked, labelled):
    torch.manual_seed(5)
    M, N = 12, 7
    index, queue_index, labels = torch.randint(M, (N,)), torch.randint(-1, M, (K,)), torch.randint(3, (M,))
    queue_index[:4] = -1
    rows = {"hardest": torch.randint(K, (N, 6)), "mixed": torch.randint(K, (N, 9))}
    given = labels if labelled else None
    found = diagnostics.wrong_negatives(index, queue_index, rows, given, masked=masked)
    assert len(found) == (6 if labelled else 3)
    for kind, table in {"queue": torch.arange(K).expand(N, K), **rows}.items():
        images, classes, count = 0, 0, 0
        for i in range(N):
            for row in table[i].tolist():
                number = queue_index[row].item()
                if number < 0 or masked and number == index[i]:
                    continue
                count += 1
                images += number == index[i].item()
                classes += labels[number].item() == labels[index[i]].item()
        assert found[f"own_image/{kind}"] == pytest.approx(images / count) and count > 10
        if labelled:
            assert found[f"own_class/{kind}"] == pytest.approx(classes / count)


def test_wrong_negatives_whose_share_is_known():
    rows, numbers = {"hardest": torch.tensor([[0, 1], [2, 3]])}, torch.tensor([0, 0, 1, 1, 2, 3])
    index, labels = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1])
    found = diagnostics.wrong_negatives(index, numbers, rows, labels, masked=False)
    assert found["own_image/hardest"] == found["own_class/hardest"] == 1, "all are of the query's image"
    assert found["own_image/queue"] == 1 / 3 and found["own_class/queue"] == 1 / 2
    found = diagnostics.wrong_negatives(index, numbers, {"noisy": torch.tensor([[4], [5]])}, labels, masked=True)
    assert (found["own_image/noisy"], found["own_class/noisy"]) == (0, 1), "of its class, and not of its image"
    assert (found["own_image/queue"], found["own_class/queue"]) == (0, 1 / 4)
    assert diagnostics.wrong_negatives(index, torch.full((6,), -1), rows, labels, masked=False) == {}, "none is known"


def test_images_without_labels_are_left_out(capsys):
    def images(classes, targets):
        return argparse.Namespace(root="DATA", classes=classes, targets=targets)

    assert diagnostics.labels_of(images(["a", "b"], [0, 1, 1])).tolist() == [0, 1, 1]
    assert diagnostics.labels_of(images(["a", "b"], np.array([1, 0], dtype=np.int32))).dtype == torch.int64
    assert capsys.readouterr().out == ""
    for none in (images(["unlabeled"], [0, 0]), images(["a", "b"], [0, -1])):
        assert diagnostics.labels_of(none) is None
        assert capsys.readouterr().out.startswith("DATA: images without labels; the log leaves out ")
