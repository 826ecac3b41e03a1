"""The SynCo model: two encoders, the queue of past keys, and the logits of the contrastive loss."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from synco import distributed
from synco.negatives import TYPES, hardest, synthesize
from synco.networks import casts_images, head_name, replace, split_batch_norm

_SYNTHESIS = inspect.signature(synthesize).parameters  # the one place of its settings' defaults


@dataclass
class Inspection:
    """What the logits of one step were made of, for `diagnostics`: N queries, S synthetic negatives of each.

    No later step writes to these tensors; `sources` has, of each kind of negative that there was, the queue rows that
    it was made from, see `negatives.synthesize`.
    """

    q: torch.Tensor  # (N, C) the queries, unit rows without gradient
    k: torch.Tensor  # (N, C) the positives
    queue: torch.Tensor  # (K, C) as the queries met it
    queue_index: torch.Tensor  # (K,) the number of each row's image, -1: unknown
    index: torch.Tensor | None  # (N,) those of the queries' images
    synthetic: torch.Tensor | None = None  # (N, S, C)
    sources: dict[str, torch.Tensor] = field(default_factory=dict)


class SynCo(nn.Module):
    """MoCo v2 (arXiv 2003.04297) with synthetic hard negatives (SynCo, arXiv 2410.02401).

    base_encoder: a callable that takes `num_classes` and returns a network whose last layer is linear, any of
    torchvision's classification networks for instance; inputs are whatever that network takes.
    dim: width C of the embedding; K: rows of the queue; m: momentum of the key encoder, in [0, 1];
    T: temperature, > 0; mlp: a two-layer head as in MoCo v2 in place of a linear one.
    n_hard: hardest queue rows to draw from; n1 ... n6: negatives of each of `negatives.TYPES` a query gets, all 0
    for plain MoCo; n_copied: of the control, which begins with the first of them; alpha, beta, gamma, sigma,
    delta, eta: see `negatives.synthesize`.
    Synthesis is on while warmup_epochs <= epoch < stop_epoch (None: to the end); six warm-ups are one for each type.
    symmetric: each view is query and key in turn, see `forward`.
    mask_same_image: a query's own image is no negative of it; `forward` then wants the images' numbers.
    bn_splits: BatchNorm in that many splits of the batch, see `SplitBatchNorm2d`.
    seed: with a step's number it determines that step's draws.

    Raises ValueError that names the value when a setting is out of range.

    Buffers: `queue` (K, C), unit rows from the start; `queue_ptr` (1,), the row that is overwritten next; `queue_index`
    (K,), the number of each row's image, -1 where it is not known. That one is not in the state dict, whose names are
    the published ones.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = True,
        *,
        n_hard: int = 1024,
        n1: int = 256,
        n2: int = 256,
        n3: int = 256,
        n4: int = 64,
        n5: int = 64,
        n6: int = 64,
        n_copied: int = 0,
        alpha: float = _SYNTHESIS["alpha"].default,
        beta: float = _SYNTHESIS["beta"].default,
        gamma: float = _SYNTHESIS["gamma"].default,
        sigma: float = _SYNTHESIS["sigma"].default,
        delta: float = _SYNTHESIS["delta"].default,
        eta: float = _SYNTHESIS["eta"].default,
        warmup_epochs: float | Sequence[float] = 10,
        stop_epoch: float | None = None,
        symmetric: bool = False,
        mask_same_image: bool = False,
        bn_splits: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.counts = (n1, n2, n3, n4, n5, n6, *[n_copied] * (n_copied != 0))
        several = "six numbers " if isinstance(warmup_epochs, (list, tuple)) else ""
        starts = tuple(warmup_epochs) if several else (warmup_epochs,) * len(TYPES)
        for name, value, good, wanted in (
            ("dim", dim, dim >= 1, ">= 1"),
            ("K", K, K >= 1, ">= 1"),
            ("m", m, 0 <= m <= 1, "in [0, 1]"),
            ("T", T, T > 0, "> 0"),
            *((f"n{i}", n, n >= 0, ">= 0") for i, n in enumerate(self.counts[: len(TYPES)], 1)),
            ("n_copied", n_copied, n_copied >= 0, ">= 0"),
            ("n_hard", n_hard, not any(self.counts) or 1 <= n_hard <= K, f"in 1..{K}, the queue's rows"),
            ("alpha", alpha, 0 < alpha <= 1, "in (0, 1]"),
            ("beta", beta, beta > 1, "> 1"),
            ("gamma", gamma, 0 < gamma <= 1, "in (0, 1]"),
            ("sigma", sigma, sigma >= 0, ">= 0"),
            ("delta", delta, delta >= 0, ">= 0"),
            ("eta", eta, eta >= 0, ">= 0"),
            ("warmup_epochs", warmup_epochs, len(starts) == len(TYPES) and min(starts) >= 0, several + ">= 0"),
            ("bn_splits", bn_splits, bn_splits >= 1, ">= 1"),
        ):
            if not good:
                raise ValueError(f"{name} is {value}: must be {wanted}")

        self.K, self.m, self.T, self.n_hard = K, m, T, n_hard
        self.ranges = {"alpha": alpha, "beta": beta, "gamma": gamma, "sigma": sigma, "delta": delta, "eta": eta}
        self.warmup_epochs, self.starts = warmup_epochs, starts
        self.stop_epoch = float("inf") if stop_epoch is None else stop_epoch
        self.symmetric, self.mask_same_image = symmetric, mask_same_image
        self.bn_splits, self.seed = bn_splits, seed
        self.next_step = 0  # used where forward is not told the step

        self.encoder_q = base_encoder(num_classes=dim)
        self.head = head_name(self.encoder_q, dim)
        if mlp:
            width = self.encoder_q.get_submodule(self.head).in_features
            head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
            replace(self.encoder_q, self.head, head)
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.casts_images = casts_images(self.encoder_q)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

        self.register_buffer("queue", F.normalize(torch.randn(K, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_index", torch.full((K,), -1), persistent=False)
        self.inspection = None  # of the last step, if it was asked for

    def counts_at(self, epoch: float | None) -> tuple[int, ...]:
        """How many negatives of each of `negatives.KINDS` a query gets at this epoch (None: synthesise)."""
        if epoch is None:
            return self.counts
        starts = (*self.starts, min(self.starts))
        return tuple(n if start <= epoch < self.stop_epoch else 0 for n, start in zip(self.counts, starts))

    def forward(
        self,
        im_q: torch.Tensor,
        im_k: torch.Tensor,
        epoch: float | None = None,
        *,
        step: int | None = None,
        index: torch.Tensor | None = None,
        inspect: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step's logits; moves the key encoder and puts the keys into the queue.

        im_q, im_k: two views of each of N images, (N, 3, H, W); epoch: see `counts_at`; step: seeds the draws
        (None: one more than the last); index (N,): the images' numbers >= 0, for mask_same_image and `queue_index`;
        inspect: keep an `Inspection` of this step in `self.inspection`, which else is None.
        Returns logits (N, 1 + K + S) / T: the positive, the queue, the synthetic negatives in the order of
        `negatives.KINDS`; and labels (N,), all 0. With mask_same_image the queue rows of a query's own image have -inf.
        Symmetric: (2N, 1 + K + S) and (2N,), first with im_q's queries and im_k's keys, then the other way round; all
        2N meet the queue as it was, so cross-entropy is the mean of the two losses.
        Raises ValueError if the keys of all processes outnumber the queue, or mask_same_image lacks `index`.
        """
        step = self.next_step if step is None else step
        self.next_step = step + 1
        if self.mask_same_image and index is None:
            raise ValueError("index is None: mask_same_image needs the images' numbers")
        N, rank = im_q.shape[0], distributed.rank()
        ways = [(im_q, im_k), (im_k, im_q)] if self.symmetric else [(im_q, im_k)]

        q = torch.cat(
            [F.normalize(self.encoder_q(queries).to(self.queue), dim=1) for queries, _ in ways]
        )  # (N, C), or (2N, C)
        update_ema(self.encoder_k, self.encoder_q, self.m)
        keys = [self._keys(images, step, way) for way, (_, images) in enumerate(ways)]  # (W·N, C) each
        k = torch.cat([part[rank * N : (rank + 1) * N] for part in keys])  # this process's, one for each row of q
        keys = torch.cat(keys)
        slots = self._next_slots(len(keys))
        numbers = None if index is None else index.repeat(len(ways))  # of each row of q
        before = (self.queue.clone(), self.queue_index.clone()) if inspect else ()
        self.inspection = Inspection(q.detach(), k, *before, numbers) if inspect else None
        own = numbers if self.mask_same_image else None
        generator = torch.Generator(q.device).manual_seed(distributed.seed_of("negatives", self.seed, step, rank))
        logits = self.logits(q, k, slots, self.counts_at(epoch), generator, own)
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
        self._enqueue(keys, slots, index)
        return logits, labels

    @torch.no_grad()
    def fill(self, im_q: torch.Tensor, im_k: torch.Tensor, index: torch.Tensor, *, step: int) -> int:
        """Put the keys of a batch into the queue as `forward` does, but move no encoder → how many those are.

        BatchNorm takes the statistics of the batch, as for the keys that a query meets later, and its running ones stay
        as they are. im_q, im_k, index: as for `forward`; step: seeds the shuffling. Every process must call this.
        Raises ValueError if the keys of all processes outnumber the queue.
        """
        buffers = list(self.encoder_k.buffers())
        before = [buffer.clone() for buffer in buffers]
        views = (im_k, im_q) if self.symmetric else (im_k,)
        keys = torch.cat([self._keys(images, step, way) for way, images in enumerate(views)])
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        self._enqueue(keys, self._next_slots(len(keys)), index)
        return len(keys)

    def _next_slots(self, count):
        """The queue rows that the next `count` keys go to, computed on the device (count,)."""
        if count > self.K:
            raise ValueError(f"the keys of a step are {count} and the queue has {self.K} rows")
        return (self.queue_ptr + torch.arange(count, device=self.queue_ptr.device)) % self.K

    def _enqueue(self, keys, slots, index):
        """keys (W·N, C), of each view once, take their rows of the queue; index (N,): this process's images."""
        self.queue.index_copy_(0, slots, keys)
        self.queue_ptr.copy_((slots[-1:] + 1) % self.K)
        new = torch.full_like(slots, -1) if index is None else distributed.gather(index).repeat(1 + self.symmetric)
        self.queue_index.index_copy_(0, slots, new)

    def logits(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        slots: torch.Tensor,
        counts: Sequence[int],
        generator: torch.Generator | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss head: q, k (N, C) unit rows → (N, 1 + K + S), see `forward`; the gradient flows to q alone.

        It computes in float32 under autocast, too, and without TensorFloat-32.
        slots: the queue rows that will be overwritten before backward; counts: see `negatives.synthesize`;
        index (N,): the queries' images, whose rows in the queue are masked; None: no row is.
        """
        own = None if index is None else self.queue_index == index[:, None]  # (N, K)

        def synthetic(similarity):
            hard = hardest(similarity, self.n_hard)  # (N, n_hard)
            if index is not None:
                hard = self._others(hard, index)
            seen = self.inspection
            sources = seen.sources if seen else None
            made = synthesize(q, self.queue, hard, counts, **self.ranges, generator=generator, sources=sources)
            if seen:
                seen.synthetic = made
            return made  # (N, S, C)

        with full_precision(q.device):
            # a division of (N, C) instead of one of the logits
            return _Logits.apply(q / self.T, k, self.queue, slots, own, sum(counts), synthetic)

    def _others(self, hard, index):
        """hard (N, n_hard) without the rows of the query's own image index (N,): the others, over again in their place.

        Masked rows are the least similar, so they stand at the end, if there are not n_hard others.
        """
        others = (self.queue_index[hard] != index[:, None]).sum(dim=1, keepdim=True)  # (N, 1)
        places = torch.arange(self.n_hard, device=hard.device) % others.clamp(min=1)  # (N, n_hard)
        return hard.gather(1, places)

    @torch.no_grad()
    def _keys(self, images, step, way=0):
        """Encode the key views of all processes with shuffled BatchNorm → (W·N, C). way: which, if there are two."""
        W, N = distributed.world_size(), images.shape[0]
        if W == 1 and self.bn_splits == 1:  # one batch, one set of statistics: its order is of no consequence
            return F.normalize(self.encoder_k(images).to(self.queue), dim=1)
        generator = torch.Generator().manual_seed(distributed.seed_of("shuffle", self.seed, step, *[way] * (way > 0)))
        permutation = torch.randperm(W * N, generator=generator)  # the same in all processes
        kind = images.device.type
        if self.casts_images and torch.is_autocast_enabled(kind) and images.dtype == torch.float32:
            images = images.to(torch.get_autocast_dtype(kind))  # as the encoder's first layer does: half the traffic
        shuffled = self.encoder_k(distributed.shuffle(images, permutation))
        shuffled = distributed.gather(F.normalize(shuffled.to(self.queue), dim=1))
        keys = torch.empty_like(shuffled)
        keys[distributed.to_device(permutation, keys.device)] = shuffled
        return keys


class _Logits(torch.autograd.Function):
    """[q·k, q·queue, q·synthetic] (N, 1 + K + S), written into one tensor, with the gradient to q alone.

    q (N, C) is divided by T already; k (N, C); queue (K, C); own (N, K): rows that are no negatives and get -inf, or
    None; synthetic: makes the S negatives of each query (N, S, C) from the similarity to the queue (N, K).

    Between forward and backward the queue's rows `slots` are overwritten with new keys. Autograd would have the
    whole queue cloned for that; here only those rows are kept, and backward puts their part right:

        dq = g @ queue_old = g @ queue_new + g[:, slots] @ (queue_old - queue_new)[slots]
    """

    @staticmethod
    def forward(ctx, q, k, queue, slots, own, S, synthetic):
        (N, C), K = q.shape, len(queue)
        logits = q.new_empty(N, 1 + K + S)  # mm writes its part itself: no copy of the largest tensor here
        positive, similarity, rest = logits.split([1, K, S], dim=1)
        torch.sum(q * k, dim=1, keepdim=True, out=positive)
        torch.mm(q, queue.T, out=similarity)
        if own is not None:
            similarity.masked_fill_(own, -torch.inf)
        negatives = synthetic(similarity) if S else q.new_empty(N, 0, C)
        torch.bmm(q[:, None], negatives.transpose(1, 2), out=rest[:, None])
        ctx.queue, ctx.version = queue, queue._version
        ctx.save_for_backward(k, slots, queue[slots], own, negatives)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.queue._version > ctx.version + 1:
            raise RuntimeError("the queue has moved on by more than one step: call backward before the next forward")
        k, slots, rows, own, negatives = ctx.saved_tensors
        positive, similarity, rest = g.split([1, len(ctx.queue), negatives.shape[1]], dim=1)
        if own is not None:
            similarity = similarity.masked_fill(own, 0)
        with full_precision(g.device):
            dq = _wide_mm(similarity, ctx.queue)
            dq.addcmul_(positive, k)
            dq.addmm_(similarity[:, slots], rows - ctx.queue[slots])
            dq += torch.bmm(rest[:, None], negatives).squeeze(1)
        return dq, None, None, None, None, None, None


def _wide_mm(a, b):
    """a (N, K) @ b (K, C) for K far above N and C, in 16 parts side by side: 3.8 ms in place of 4.8 on two cores."""
    K = len(b)
    if K % 16:
        return a @ b
    return torch.bmm(a.unflatten(1, (16, K // 16)).transpose(0, 1), b.view(16, K // 16, -1)).sum(dim=0)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with products in float32 proper; afterwards torch's settings are what they were.

    From torch 2.9 on there are two interfaces to them. The older one sets both; where they differ it refuses to be
    read, and some versions to compute. What torch.compile has compiled is good for the settings of then alone.
    """
    both = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    newer = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if both else []
    newer_before = [products.fp32_precision for products in newer]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # they differ: the newer one alone was set
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for products, precision in zip(newer, newer_before):
            products.fp32_precision = precision


@torch.no_grad()
def update_ema(slow: nn.Module, fast: nn.Module, m: float) -> None:
    """slow ← m · slow + (1 − m) · fast, in place.

    Parameters only: as in MoCo, the key encoder keeps its own BatchNorm statistics.
    """
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - m)


class QueueIndex:
    """A model's `queue_index` as a part of a run's state that is kept beside the published state dict.

    images: how many there are.
    """

    def __init__(self, model: SynCo, images: int) -> None:
        self.index, self.is_needed, self.images = model.queue_index, model.mask_same_image, images

    def state_dict(self) -> torch.Tensor:
        """(K,) the number of each row's image."""
        return self.index

    def load_state_dict(self, index: torch.Tensor) -> None:
        """Raises ValueError if that is nothing of the kind, or there is none ({}) and rows are masked by it."""
        if isinstance(index, dict) and not index and not self.is_needed:
            return  # a checkpoint of another program, or from before the queue kept them
        fits = isinstance(index, torch.Tensor) and index.dtype == torch.int64 and index.shape == self.index.shape
        if not fits or index.min() < -1 or index.max() >= self.images:
            why = "--mask-same-image: " if self.is_needed else ""
            raise ValueError(f"{why}it does not say of which images its {len(self.index)} rows are")
        self.index.copy_(index)
