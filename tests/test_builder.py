"""The model: its head, queue, logits, gradient and key encoder, against plain computations."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from synco import distributed, metrics
from synco.builder import SynCo, update_ema
from synco.negatives import hardest, synthesize
from synco.networks import network_of

FEW = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1}


def vectors(num_classes):
    """A base encoder for vectors: inputs need not be images."""
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, num_classes))


def small(**settings):
    torch.manual_seed(0)
    return SynCo(
        vectors, **{"dim": 4, "K": 20, "m": 0.9, "T": 0.2, "mlp": False, "warmup_epochs": 0, **FEW, **settings}
    )


def test_defaults_are_the_published_ones():
    model = SynCo(vectors)
    assert (model.K, model.m, model.T, model.n_hard) == (65536, 0.999, 0.07, 1024)
    assert model.counts == (256, 256, 256, 64, 64, 64) and model.warmup_epochs == 10
    assert model.ranges == {"alpha": 0.5, "beta": 1.5, "gamma": 1.0, "sigma": 0.01, "delta": 0.01, "eta": 0.01}
    assert model.queue.shape == (65536, 128) and model.queue_ptr.tolist() == [0]


def test_a_fresh_queue_has_unit_rows():
    """The reference normalises along the wrong axis, which leaves rows of norm 0.044."""
    norms = SynCo(vectors, n_hard=1).queue.double().norm(dim=1)
    assert (norms - 1).abs().max() < 1e-6


def test_state_dict_names_are_the_published_ones():
    model = SynCo(network_of("resnet18", 32), K=64, n_hard=8)
    names = set(model.state_dict())
    resnet = set(torchvision.models.resnet18().state_dict()) - {"fc.weight", "fc.bias"}
    resnet |= {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}
    assert names == {f"encoder_{x}.{name}" for x in "qk" for name in resnet} | {"queue", "queue_ptr"}
    assert model.encoder_q.fc[0].weight.shape == (512, 512) and model.encoder_q.fc[2].weight.shape == (128, 512)
    # the order that the published optimiser states rely on: the query encoder's parameters, then the key encoder's
    order = [name for name, _ in model.named_parameters()]
    assert order == sorted(order, key=lambda name: not name.startswith("encoder_q"))
    linear = SynCo(network_of("resnet18", 32), K=64, n_hard=8, mlp=False)
    assert linear.encoder_q.fc.weight.shape == (128, 512)


@pytest.mark.parametrize(
    "setting, value, wanted",
    [
        ("dim", 0, ">= 1"),
        ("K", 0, ">= 1"),
        ("m", 1.5, r"in \[0, 1\]"),
        ("m", -0.1, r"in \[0, 1\]"),
        ("T", 0.0, "> 0"),
        ("n_hard", 70000, r"in 1\.\.65536"),
        ("n3", -1, ">= 0"),
        ("n_copied", -1, ">= 0"),
        ("sigma", -0.1, ">= 0"),
        ("alpha", 0.0, r"in \(0, 1\]"),
        ("alpha", 1.1, r"in \(0, 1\]"),
        ("beta", 1.0, "> 1"),
        ("gamma", 2.0, r"in \(0, 1\]"),
        ("warmup_epochs", -1, ">= 0"),
        ("bn_splits", 0, ">= 1"),
        ("T", float("nan"), "> 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, value, wanted):
    with pytest.raises(ValueError, match=f"{setting} is {value}: must be {wanted}"):
        SynCo(vectors, **{setting: value})


def test_n_hard_may_be_smaller_than_the_counts():
    """Rows are drawn with replacement, so the reference's check of n_hard against the counts is needless."""
    model = small(n_hard=2, n1=30)
    logits, _ = model(torch.randn(3, 6), torch.randn(3, 6))
    assert logits.shape == (3, 1 + 20 + 30 + 7)


def test_no_n_hard_is_asked_for_without_synthesis():
    model = SynCo(vectors, 4, 20, n1=0, n2=0, n3=0, n4=0, n5=0, n6=0)  # n_hard stays 1,024, K is 20
    assert model(torch.randn(3, 6), torch.randn(3, 6))[0].shape == (3, 21)


def test_logits_equal_a_plain_computation():
    model, im_q, im_k = small(seed=5), torch.randn(3, 6), torch.randn(3, 6)
    queue, slow = model.queue.clone(), copy.deepcopy(model.encoder_k)
    with torch.no_grad():
        update_ema(slow, model.encoder_q, 0.9)
        q = F.normalize(copy.deepcopy(model.encoder_q)(im_q), dim=1)
        k = F.normalize(slow(im_k), dim=1)
    logits, labels = model(im_q, im_k, step=7)

    from synco.distributed import seed_of

    generator = torch.Generator().manual_seed(seed_of("negatives", 5, 7, 0))
    s = synthesize(q, queue, hardest(q @ queue.T, 8), model.counts, **model.ranges, generator=generator)
    q, k, queue, s = (x.double().numpy() for x in (q, k, queue, s))
    expected = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T, np.einsum("nc,nsc->ns", q, s)], axis=1) / 0.2
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)
    assert labels.tolist() == [0, 0, 0] and labels.dtype == torch.long


def test_gradient_equals_that_of_constant_negatives():
    """The head's own backward, after the enqueue, against autograd through a copy of the old queue; in float64."""
    model = small(seed=5).double()
    model.queue_ptr.fill_(18)  # the enqueue wraps around
    im_q, im_k = torch.randn(2, 3, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    model(im_q, im_k, step=1)[0].sum().backward()  # sum: every logit, replaced rows included, counts

    old = twin.queue.clone()
    q = F.normalize(twin.encoder_q(im_q), dim=1)
    with torch.no_grad():
        update_ema(twin.encoder_k, twin.encoder_q, 0.9)
        k = F.normalize(twin.encoder_k(im_k), dim=1)
        from synco.distributed import seed_of

        g = torch.Generator().manual_seed(seed_of("negatives", 5, 1, 0))
        s = synthesize(q, old, hardest(q @ old.T, 8), twin.counts, **twin.ranges, generator=g)
    plain = torch.cat([(q * k).sum(1, keepdim=True), q @ old.T, (s @ q[:, :, None]).squeeze(2)], dim=1) / 0.2
    plain.sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        if name.startswith("encoder_k"):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("K, counts", [(20, (2, 2, 2, 1, 1, 1)), (48, (2, 2, 2, 1, 1, 1)), (48, (0,) * 6)])
def test_gradient_of_any_function_of_the_logits(K, counts, masked):
    """Weights of their own for all logits, in float64; both ways to multiply with the queue, and masked rows."""
    model = small(K=K, mask_same_image=True).double()
    model.queue_index.copy_(torch.arange(K) // 2)
    q, k = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    index = torch.tensor([0, 3, 3, 50, 9]) if masked else None
    weights = torch.randn(5, 1 + K + sum(counts), dtype=torch.float64)
    slots = torch.tensor([4, 5, K - 1, 0, 1])
    new = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)
    old, variable, twin = model.queue.clone(), q.clone().requires_grad_(), q.clone().requires_grad_()

    logits = model.logits(variable, k, slots, counts, torch.Generator().manual_seed(1), index)
    model.queue.index_copy_(0, slots, new)
    hidden = torch.zeros(5, K, dtype=torch.bool) if index is None else model.queue_index == index[:, None]
    found = logits.masked_fill(logits == -torch.inf, 0)  # the loss leaves infinity out, as a softmax does
    assert (logits == -torch.inf).sum() == hidden.sum()
    (found * weights).sum().backward()

    similarity = twin @ old.T / 0.2
    columns = [(twin * k).sum(1, keepdim=True) / 0.2, similarity.masked_fill(hidden, 0)]
    if any(counts):
        hard = hardest(similarity.detach().masked_fill(hidden, -torch.inf), 8)
        s = synthesize(q, old, hard, counts, **model.ranges, generator=torch.Generator().manual_seed(1))
        columns.append((s @ twin[:, :, None]).squeeze(2) / 0.2)
    plain = torch.cat(columns, dim=1)
    (plain * weights).sum().backward()
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(variable.grad, twin.grad, atol=1e-12, rtol=1e-12)


def test_backward_that_comes_too_late_is_an_error():
    model = small()
    first, _ = model(torch.randn(3, 6), torch.randn(3, 6))
    model(torch.randn(3, 6), torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="backward before the next forward"):
        first.sum().backward()


def test_queue_is_first_in_first_out_and_wraps_around():
    """K = 20 is not divisible by the batch of 6, which the reference refuses."""
    model = small(n1=0, n2=0, n3=0, n4=0, n5=0, n6=0).eval()
    expected, pointer = model.queue.clone(), 0
    for step in range(9):
        im_k = torch.randn(6, 6)
        model(torch.randn(6, 6), im_k)
        with torch.no_grad():
            keys = F.normalize(model.encoder_k(im_k), dim=1)
        for key in keys:
            expected[pointer] = key
            pointer = (pointer + 1) % 20
        torch.testing.assert_close(model.queue, expected)
        assert model.queue_ptr.tolist() == [pointer], step
    with pytest.raises(ValueError, match="keys of a step are 21 and the queue has 20 rows"):
        model(torch.randn(21, 6), torch.randn(21, 6))


@pytest.mark.parametrize("symmetric", [False, True])
def test_filling_puts_in_the_keys_of_a_batch_and_moves_no_encoder(symmetric):
    """In float64, with BatchNorm by the batch's statistics, which leave no trace; the queue wraps around."""
    model = small(symmetric=symmetric, mask_same_image=True).double()
    model.queue_ptr.fill_(18)
    im_q, im_k = torch.randn(2, 3, 6, dtype=torch.float64)
    before, linear, norm, _, head = copy.deepcopy(model), *model.encoder_k
    assert model.fill(im_q, im_k, torch.tensor([7, 8, 9]), step=0) == (6 if symmetric else 3)

    rows = []
    for images in (im_k, im_q)[: 1 + symmetric]:
        hidden = images.numpy() @ linear.weight.numpy().T + linear.bias.numpy()
        hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + norm.eps)
        keys = np.maximum(hidden, 0) @ head.weight.numpy().T + head.bias.numpy()
        rows += list(keys / np.linalg.norm(keys, axis=1, keepdims=True))
    places = [(18 + i) % 20 for i in range(len(rows))]
    np.testing.assert_allclose(model.queue[places], rows, atol=1e-12)
    others = [row for row in range(20) if row not in places]
    assert torch.equal(model.queue[others], before.queue[others]) and model.queue_ptr.item() == (18 + len(rows)) % 20
    assert model.queue_index[places].tolist() == [7, 8, 9] * (1 + symmetric)
    assert (model.queue_index[others] == -1).all()
    left = [name for name in before.state_dict() if name not in ("queue", "queue_ptr")]
    assert all(torch.equal(model.state_dict()[name], before.state_dict()[name]) for name in left)
    with pytest.raises(ValueError, match="the keys of a step are 22 and the queue has 20 rows"):
        many = torch.randn(11 if symmetric else 22, 6, dtype=torch.float64)
        model.fill(many, many, torch.arange(len(many)), step=1)


def test_key_encoder_is_the_moving_average():
    model = small(m=0.75)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in model.encoder_k.parameters()]
    statistics = model.encoder_k[1].running_mean.clone()
    im_k = torch.randn(5, 6)
    model(torch.randn(5, 6), im_k)
    for old, slow, fast in zip(before, model.encoder_k.parameters(), model.encoder_q.parameters()):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)
        assert not slow.requires_grad
    # its BatchNorm statistics follow its own forward pass, not the query encoder's
    inner = model.encoder_k[0](im_k).mean(0)
    torch.testing.assert_close(model.encoder_k[1].running_mean, 0.9 * statistics + 0.1 * inner)


def test_synthesis_begins_and_ends_at_its_epochs():
    model = small(warmup_epochs=2, stop_epoch=4)
    columns = {e: model(torch.randn(3, 6), torch.randn(3, 6), e)[0].shape[1] for e in (0, 1, 1.9, 2, 3.99, 4, 9, None)}
    assert columns == {0: 21, 1: 21, 1.9: 21, 2: 30, 3.99: 30, 4: 21, 9: 21, None: 30}


def test_each_type_begins_at_its_own_epoch():
    starts, counts = (0, 0.5, 1, 2, 2.5, 2), {"n1": 1, "n2": 2, "n3": 4, "n4": 8, "n5": 16, "n6": 32}
    model = small(**counts, warmup_epochs=starts, stop_epoch=3)
    for epoch in (0, 0.25, 0.5, 1, 1.99, 2, 2.5, 2.99, 3, None):
        on = [n for n, start in zip(counts.values(), starts) if epoch is None or start <= epoch < 3]
        assert model(torch.randn(3, 6), torch.randn(3, 6), epoch)[0].shape[1] == 21 + sum(on)
    for wrong in ((1, 2), (0, 0, 0, -1, 0, 0)):
        with pytest.raises(ValueError, match="warmup_epochs is .*must be six numbers >= 0"):
            small(warmup_epochs=wrong)


def test_the_control_comes_with_the_first_of_the_types():
    model = small(n_copied=5, warmup_epochs=(4, 3, 2, 4, 4, 4), stop_epoch=5)
    columns = {epoch: model(torch.randn(3, 6), torch.randn(3, 6), epoch)[0].shape[1] for epoch in (1.9, 2, 4, 5, None)}
    assert columns == {1.9: 21, 2: 21 + 2 + 5, 4: 21 + 9 + 5, 5: 21, None: 21 + 9 + 5}
    none = {f"n{i}": 0 for i in range(1, 7)}
    with pytest.raises(ValueError, match=r"n_hard is 21: must be in 1\.\.20"):
        small(**none, n_copied=1, n_hard=21)


def test_the_control_weights_the_hard_rows_as_often_as_they_are_drawn():
    """With one hard row, n copies of it in the softmax are that row with n + 1 times its weight."""
    none = {f"n{i}": 0 for i in range(1, 7)}
    model = small(**none, n_copied=4, n_hard=1).eval()
    queue, im_q, im_k = model.queue.clone(), torch.randn(3, 6), torch.randn(3, 6)
    logits, labels = model(im_q, im_k)
    q = F.normalize(model.encoder_q(im_q), dim=1)
    weights = torch.ones(3, 20).scatter(1, (q @ queue.T).argmax(dim=1, keepdim=True), 5.0)
    positive = (logits[:, :1]).exp()
    expected = -(positive / (positive + (weights * (q @ queue.T / 0.2).exp()).sum(1, keepdim=True))).log().mean()
    torch.testing.assert_close(F.cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_queue_keeps_its_images_numbers(symmetric):
    """Masked or not; -1 where nobody said them; and outside of the state dict."""
    model, times = small(symmetric=symmetric), 1 + symmetric
    assert model.queue_index.tolist() == [-1] * 20 and "queue_index" not in model.state_dict()
    expected = []
    for numbers in ([7, 0, 9], None, [5, 3, 3]):
        index = None if numbers is None else torch.tensor(numbers)
        model(torch.randn(3, 6), torch.randn(3, 6), index=index)
        expected += (numbers or [-1] * 3) * times
        assert model.queue_index.tolist() == expected + [-1] * (20 - len(expected))


def test_an_inspection_is_what_the_step_was_made_of():
    """And stays it, when the queue has moved on; without being asked for there is none, and nothing else changes."""
    model, twin = small(symmetric=True, n_copied=2).eval(), small(symmetric=True, n_copied=2).eval()
    queue, numbers = model.queue.clone(), torch.arange(20)
    for one in (model, twin):
        one.queue_index.copy_(numbers)
    im_1, im_2, index = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([3, 1, 4, 30])
    logits, _ = model(im_1, im_2, step=5, index=index, inspect=True)
    seen = model.inspection
    assert torch.equal(logits, twin(im_1, im_2, step=5, index=index)[0]) and twin.inspection is None
    assert torch.equal(seen.queue, queue) and torch.equal(seen.queue_index, numbers)
    assert seen.index.tolist() == 2 * index.tolist()
    q = F.normalize(model.encoder_q(torch.cat([im_1, im_2])), dim=1)
    torch.testing.assert_close((q * seen.k).sum(dim=1) / 0.2, logits[:, 0])
    torch.testing.assert_close(torch.einsum("nc,nsc->ns", q, seen.synthetic) / 0.2, logits[:, 21:])
    assert torch.equal(seen.synthetic[:, -2:], queue[seen.sources["copied"]])
    assert not (seen.k.requires_grad or seen.synthetic.requires_grad)
    model(im_1, im_2, step=6)
    assert model.inspection is None and torch.equal(seen.queue, queue)


def test_masking_equals_a_plain_loop():
    """In a queue that holds some images several times, and rows of no image."""
    model = small(mask_same_image=True, K=12, n_hard=8, n1=0, n2=0, n3=40, n4=0, n5=0, n6=0).eval()
    numbers = torch.tensor([5, 7, 5, -1, 3, 5, 9, 7, -1, 3, 5, 5])
    model.queue_index.copy_(numbers)
    queue, index = model.queue.clone(), torch.tensor([5, 3, 100])
    im_q, im_k = torch.randn(3, 6), torch.randn(3, 6)
    logits, _ = model(im_q, im_k, step=0, index=index)

    q = F.normalize(model.encoder_q(im_q), dim=1).detach()
    k = F.normalize(model.encoder_k(im_k), dim=1).detach()
    for i in range(3):
        assert logits[i, 0].item() == pytest.approx(float(q[i] @ k[i]) / 0.2, abs=1e-5)
        others = [row for row in range(12) if numbers[row] != index[i]]
        for row in range(12):
            expected = float(q[i] @ queue[row]) / 0.2 if row in others else -np.inf
            assert logits[i, 1 + row].item() == pytest.approx(expected, abs=1e-5)
    assert model.queue_index[:3].tolist() == [5, 3, 100] and model.queue_index[3:].tolist() == numbers[3:].tolist()
    assert "queue_index" not in model.state_dict()
    F.cross_entropy(logits, torch.zeros(3, dtype=torch.long)).backward()
    assert all(w.grad.isfinite().all() for w in model.encoder_q.parameters())
    with pytest.raises(ValueError, match="index is None: mask_same_image needs the images' numbers"):
        model(im_q, im_k)


def test_a_query_mines_other_images_alone():
    """The hardest rows by a loop, with fewer others than n_hard: those over again."""
    model = small(mask_same_image=True, K=12, n_hard=8)
    model.queue_index.copy_(torch.tensor([5, 7, 5, -1, 3, 5, 9, 7, -1, 3, 5, 5]))
    index, similarity = torch.tensor([5, 3, 100]), torch.randn(3, 12)
    masked = similarity.masked_fill(model.queue_index == index[:, None], -torch.inf)
    found = model._others(hardest(masked, 8), index)
    for i in range(3):
        rows = [row for row in range(12) if model.queue_index[row] != index[i]]
        rows.sort(key=lambda row: -similarity[i, row])
        assert found[i].tolist() == [rows[place % len(rows)] for place in range(8)]


@pytest.mark.parametrize("masked", [False, True])
def test_the_symmetric_loss_is_the_mean_of_two_with_the_queue_frozen(masked):
    """Parameters, queue and its numbers afterwards: those of the two halves one after the other."""
    settings = {"K": 16, "n1": 0, "n2": 0, "n3": 0, "n4": 0, "n5": 0, "n6": 0, "mask_same_image": masked}
    both, one, other = small(symmetric=True, **settings), small(**settings), small(**settings)
    im_1, im_2, index = torch.randn(5, 6), torch.randn(5, 6), torch.tensor([4, 8, 1, 0, 2])
    if masked:
        for model in (both, one, other):
            model.queue_index[:3] = torch.tensor([8, 8, 2])
    logits, labels = both(im_1, im_2, step=3, index=index)
    assert logits.shape == (10, 17) and labels.tolist() == [0] * 10
    loss = F.cross_entropy(logits, labels)
    halves = [model(*images, step=3, index=index) for model, images in ((one, (im_1, im_2)), (other, (im_2, im_1)))]
    expected = sum(F.cross_entropy(*half) for half in halves) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for ours, *theirs in zip(*(model.encoder_q.parameters() for model in (both, one, other))):
        torch.testing.assert_close(ours.grad, theirs[0].grad + theirs[1].grad)
    torch.testing.assert_close(both.queue[:10], torch.cat([one.queue[:5], other.queue[:5]]))
    assert both.queue_ptr.item() == 10
    if masked:
        assert both.queue_index[:10].tolist() == 2 * index.tolist()
    for ours, theirs in zip(both.encoder_k.parameters(), one.encoder_k.parameters()):
        torch.testing.assert_close(ours, theirs)  # moved once


def test_symmetric_queries_have_negatives_of_their_own():
    model = small(symmetric=True, K=20)
    images = torch.randn(4, 6)
    logits, _ = model(images, images)
    assert logits.shape == (8, 1 + 20 + 9)
    assert not torch.isclose(logits[:4, 21:27], logits[4:, 21:27]).any()  # the same queries, other coefficients
    with pytest.raises(ValueError, match="keys of a step are 22 and the queue has 20 rows"):
        model(torch.randn(11, 6), torch.randn(11, 6))


def test_draws_depend_on_seed_and_step_alone():
    def logits(seed, step, before=0):
        model = small(seed=seed).eval()
        torch.manual_seed(99)
        im_q, im_k = torch.randn(3, 6), torch.randn(3, 6)
        torch.rand(before)
        return model(im_q, im_k, step=step)[0]

    assert torch.equal(logits(1, 4), logits(1, 4, before=17))
    assert not torch.equal(logits(1, 4), logits(1, 5))
    assert not torch.equal(logits(1, 4), logits(2, 4))
    model, images = small(), torch.randn(3, 6)
    assert not torch.equal(model(images, images)[0][:, 21:], model(images, images)[0][:, 21:])  # unnamed steps differ


class _CountReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(monkeypatch):
    """The reference reads the queue pointer and the loss back in every step."""
    model, images = small(), torch.randn(3, 6)
    for name in ("tolist", "numpy", "cpu", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"Tensor.{name} was called"))
    averages = metrics.Averages()
    with _CountReads() as counter:
        logits, labels = model(images, images, step=3)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        averages.add(loss=loss, **metrics.contrastive_accuracy(logits, model.K))
    assert counter.reads == 0
    monkeypatch.undo()
    with _CountReads() as counter:
        loss.item()
    assert counter.reads == 1  # the counter counts


def test_synthesis_runs_no_autograd(monkeypatch):
    """The reference calls autograd once for each negative of types 5 and 6."""
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("autograd.grad was called"))
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("autograd.backward was called"))
    model, images = small(), torch.randn(3, 6)
    model(images, images)


def images_only(num_classes):
    return nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes))


def test_with_splits_the_key_batch_is_permuted_in_one_process_too():
    """Query and key would share their statistics otherwise; the keys come back in the images' order."""
    torch.manual_seed(0)
    model = SynCo(images_only, 4, 20, mlp=False, **FEW, bn_splits=2)
    seen = []
    model.encoder_k[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten().clone()))
    im = torch.arange(8.0).view(8, 1, 1, 1)
    model(im, im, step=0)
    order = seen[0].long()
    assert sorted(order.tolist()) == list(range(8)) and order.tolist() != list(range(8))
    assert {frozenset(order[s::2].tolist()) for s in (0, 1)} != {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}

    with torch.no_grad():
        keys = torch.empty(8, 4)
        twin = copy.deepcopy(model.encoder_k)
        keys[order] = F.normalize(twin(im[order]), dim=1)
    torch.testing.assert_close(model.queue[:8], keys)


@pytest.mark.parametrize("amp", [False, True])
def test_key_images_travel_as_the_encoder_casts_them(monkeypatch, amp):
    """In the autocast's type, which changes no bit, as convolutions begin with that cast."""
    keys, kinds, shuffle = [], [], distributed.shuffle
    monkeypatch.setattr(distributed, "shuffle", lambda x, order: kinds.append(x.dtype) or shuffle(x, order))
    im_q, im_k = torch.randn(2, 8, 3, 32, 32)
    for casts in (True, False):
        torch.manual_seed(0)
        model = SynCo(torchvision.models.resnet18, 16, 32, bn_splits=2, n_hard=4)
        model.casts_images &= casts
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(im_q, im_k, step=3)
        keys.append(model.queue)
    assert torch.equal(*keys)
    assert kinds == [torch.bfloat16 if amp else torch.float32, torch.float32]
