"""The SynCo model: two encoders, the queue of past keys, and the logits of the contrastive loss."""

import contextlib
import copy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.autograd.function import once_differentiable

from synco import distributed
from synco.negatives import TYPES, hardest, synthesize
from synco.options import UserError


class SynCo(nn.Module):
    """MoCo v2 (arXiv 2003.04297) with synthetic hard negatives (SynCo, arXiv 2410.02401).

    base_encoder: a callable that takes `num_classes` and returns a network whose last layer is linear, any of
    torchvision's classification networks for instance; inputs are whatever that network takes.
    dim: width C of the embedding; K: rows of the queue; m: momentum of the key encoder, in [0, 1];
    T: temperature, > 0; mlp: a two-layer head as in MoCo v2 in place of a linear one.
    n_hard: hardest queue rows to draw from; n1 ... n6: negatives of each of `negatives.TYPES` a query gets, all 0
    for plain MoCo; alpha, beta, gamma, sigma, delta, eta: see `negatives.synthesize`.
    Synthesis is on while warmup_epochs <= epoch < stop_epoch (None: to the end).
    bn_splits: BatchNorm in that many splits of the batch, see `SplitBatchNorm2d`.
    seed: with a step's number it determines that step's draws.

    Raises ValueError that names the value when a setting is out of range.

    Buffers: `queue` (K, C), unit rows from the start, and `queue_ptr` (1,), the row that is overwritten next.
    """

    def __init__(
        self,
        base_encoder,
        dim=128,
        K=65536,
        m=0.999,
        T=0.07,
        mlp=True,
        *,
        n_hard=1024,
        n1=256,
        n2=256,
        n3=256,
        n4=64,
        n5=64,
        n6=64,
        alpha=0.5,
        beta=1.5,
        gamma=1.0,
        sigma=0.01,
        delta=0.01,
        eta=0.01,
        warmup_epochs=10,
        stop_epoch=None,
        bn_splits=1,
        seed=0,
    ):
        super().__init__()
        self.counts = (n1, n2, n3, n4, n5, n6)
        for name, value, good, wanted in (
            ("dim", dim, dim >= 1, ">= 1"),
            ("K", K, K >= 1, ">= 1"),
            ("m", m, 0 <= m <= 1, "in [0, 1]"),
            ("T", T, T > 0, "> 0"),
            *((f"n{i}", n, n >= 0, ">= 0") for i, n in enumerate(self.counts, 1)),
            ("n_hard", n_hard, not any(self.counts) or 1 <= n_hard <= K, f"in 1..{K}, the queue's rows"),
            ("alpha", alpha, 0 < alpha <= 1, "in (0, 1]"),
            ("beta", beta, beta > 1, "> 1"),
            ("gamma", gamma, 0 < gamma <= 1, "in (0, 1]"),
            ("sigma", sigma, sigma >= 0, ">= 0"),
            ("delta", delta, delta >= 0, ">= 0"),
            ("eta", eta, eta >= 0, ">= 0"),
            ("warmup_epochs", warmup_epochs, warmup_epochs >= 0, ">= 0"),
            ("bn_splits", bn_splits, bn_splits >= 1, ">= 1"),
        ):
            if not good:
                raise ValueError(f"{name} is {value}: must be {wanted}")

        self.K, self.m, self.T, self.n_hard = K, m, T, n_hard
        self.ranges = {"alpha": alpha, "beta": beta, "gamma": gamma, "sigma": sigma, "delta": delta, "eta": eta}
        self.warmup_epochs, self.stop_epoch = warmup_epochs, float("inf") if stop_epoch is None else stop_epoch
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
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

        self.register_buffer("queue", F.normalize(torch.randn(K, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def counts_at(self, epoch):
        """How many negatives of each type a query gets at this epoch (int, fraction, or None: synthesise)."""
        if epoch is None or self.warmup_epochs <= epoch < self.stop_epoch:
            return self.counts
        return (0,) * len(TYPES)

    def forward(self, im_q, im_k, epoch=None, *, step=None):
        """One training step's logits; moves the key encoder and puts the keys into the queue.

        im_q, im_k: two views of each of N images, (N, 3, H, W); epoch: see `counts_at`; step: seeds the draws
        (None: one more than the last).
        Returns logits (N, 1 + K + S) / T: the positive, the queue, the synthetic negatives in the order of
        `negatives.TYPES`; and labels (N,), all 0. Raises ValueError if the keys of all processes outnumber the queue.
        """
        step = self.next_step if step is None else step
        self.next_step = step + 1
        N, rank = im_q.shape[0], distributed.rank()

        q = F.normalize(self.encoder_q(im_q), dim=1)  # (N, C)
        keys = self._keys(im_k, step)  # (W·N, C), of all processes
        if len(keys) > self.K:
            raise ValueError(f"the keys of a step are {len(keys)} and the queue has {self.K} rows")
        k = keys[rank * N : (rank + 1) * N]  # (N, C)

        slots = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.K  # computed on the device
        generator = torch.Generator(q.device).manual_seed(distributed.seed_of("negatives", self.seed, step, rank))
        logits = self.logits(q, k, slots, self.counts_at(epoch), generator)
        labels = torch.zeros(N, dtype=torch.long, device=q.device)

        self.queue.index_copy_(0, slots, keys)
        self.queue_ptr.copy_((slots[-1:] + 1) % self.K)
        return logits, labels

    def logits(self, q, k, slots, counts, generator=None):
        """The loss head: q, k (N, C) unit rows → (N, 1 + K + S), see `forward`; the gradient flows to q alone.

        slots: the queue rows that will be overwritten before backward; counts: see `negatives.synthesize`.
        """
        S = sum(counts)

        def synthetic(similarity):
            hard = hardest(similarity, self.n_hard)  # (N, n_hard)
            return synthesize(q, self.queue, hard, counts, **self.ranges, generator=generator)  # (N, S, C)

        # a division of (N, C) instead of one of the logits
        return _Logits.apply(q / self.T, k, self.queue, slots, S, synthetic)

    @torch.no_grad()
    def _keys(self, im_k, step):
        """Move the key encoder, and encode the key views of all processes with shuffled BatchNorm → (W·N, C)."""
        update_ema(self.encoder_k, self.encoder_q, self.m)
        W, N = distributed.world_size(), im_k.shape[0]
        if W == 1 and self.bn_splits == 1:  # one batch, one set of statistics: its order is of no consequence
            return F.normalize(self.encoder_k(im_k), dim=1)
        generator = torch.Generator().manual_seed(distributed.seed_of("shuffle", self.seed, step))
        permutation = torch.randperm(W * N, generator=generator)  # the same in all processes
        shuffled = distributed.gather(F.normalize(self.encoder_k(distributed.shuffle(im_k, permutation)), dim=1))
        keys = torch.empty_like(shuffled)
        keys[distributed.to_device(permutation, keys.device)] = shuffled
        return keys


class _Logits(torch.autograd.Function):
    """[q·k, q·queue, q·synthetic] (N, 1 + K + S), written into one tensor, with the gradient to q alone.

    q (N, C) is divided by T already; k (N, C); queue (K, C); synthetic: a function of the similarity to the queue
    (N, K) that returns the S negatives of each query (N, S, C).

    Between forward and backward the queue's rows `slots` are overwritten with new keys. Autograd would have the
    whole queue cloned for that; here only those rows are kept, and backward puts their part right:

        dq = g @ queue_old = g @ queue_new + g[:, slots] @ (queue_old - queue_new)[slots]
    """

    @staticmethod
    def forward(ctx, q, k, queue, slots, S, synthetic):
        (N, C), K = q.shape, len(queue)
        logits = q.new_empty(N, 1 + K + S)
        positive, similarity, rest = logits.split([1, K, S], dim=1)
        torch.sum(q * k, dim=1, keepdim=True, out=positive)
        torch.mm(q, queue.T, out=similarity)
        negatives = synthetic(similarity) if S else q.new_empty(N, 0, C)
        torch.bmm(negatives, q[:, :, None], out=rest[:, :, None])
        ctx.queue, ctx.version = queue, queue._version
        ctx.save_for_backward(k, slots, queue[slots], negatives)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.queue._version > ctx.version + 1:
            raise RuntimeError("the queue has moved on by more than one step: call backward before the next forward")
        k, slots, rows, negatives = ctx.saved_tensors
        positive, similarity, rest = g.split([1, len(ctx.queue), negatives.shape[1]], dim=1)
        dq = _wide_mm(similarity, ctx.queue)
        dq.addcmul_(positive, k)
        dq.addmm_(similarity[:, slots], rows - ctx.queue[slots])
        dq += torch.bmm(rest[:, None], negatives).squeeze(1)
        return dq, None, None, None, None, None


def _wide_mm(a, b):
    """a (N, K) @ b (K, C) for K far above N and C, in 16 parts side by side: 3.8 ms in place of 4.8 on two cores."""
    K = len(b)
    if K % 16:
        return a @ b
    return torch.bmm(a.unflatten(1, (16, K // 16)).transpose(0, 1), b.view(16, K // 16, -1)).sum(dim=0)


@torch.no_grad()
def update_ema(slow, fast, m):
    """slow ← m · slow + (1 − m) · fast, in place.

    Parameters only: as in MoCo, the key encoder keeps its own BatchNorm statistics.
    """
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - m)


def head_name(network, dim):
    """The name of a network's last linear layer with `dim` outputs: its head, by what it is and not by its name.

    Raises ValueError if there is none.
    """
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == dim]
    if not names:
        raise ValueError(f"{type(network).__name__} has no linear layer with {dim} outputs to serve as its head")
    return names[-1]


def replace(network, name, module):
    """Put `module` in the place of the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` equal parts of the batch, each with its own statistics: k GPUs on one (MoCo's demo).

    Part s holds the images s, s + k, s + 2k, ...: taking every k-th image needs no copy. In train mode the running
    statistics move by the mean of what each part alone would move them by; in eval mode this is BatchNorm.
    x (N, C, H, W); raises ValueError if `splits` does not divide N.
    """

    def __init__(self, *args, splits, **kwargs):
        super().__init__(*args, **kwargs)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        N, C, H, W = x.shape
        k = self.splits
        if N % k:
            raise ValueError(f"a batch of {N} cannot be normalised in {k} equal splits")
        mean, var = self.running_mean.repeat(k), self.running_var.repeat(k)
        y = F.batch_norm(
            x.reshape(N // k, k * C, H, W),
            mean,
            var,
            self.weight.repeat(k),
            self.bias.repeat(k),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(k, C).mean(0))
        self.running_var.copy_(var.view(k, C).mean(0))
        self.num_batches_tracked.add_(1)
        return y.view(N, C, H, W)


def split_batch_norm(network, splits):
    """Put a `SplitBatchNorm2d` in the place of every BatchNorm2d. Raises ValueError if the network has none."""
    norms = [(name, m) for name, m in network.named_modules() if type(m) is nn.BatchNorm2d]
    if not norms:
        raise ValueError(f"bn_splits is {splits}: {type(network).__name__} has no BatchNorm2d")
    for name, norm in norms:
        split = SplitBatchNorm2d(norm.num_features, norm.eps, norm.momentum, splits=splits)
        split.load_state_dict(norm.state_dict())
        replace(network, name, split)


def torchvision_network(arch, img_size):
    """A callable that takes `num_classes` and returns torchvision's network of that name, randomly initialised."""
    options = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # one output, and torchvision's own initialisation
    elif arch.startswith("vit_"):
        options = {"image_size": img_size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (img_size, img_size)}
    return partial(torchvision.models.get_model, arch, weights=None, **options)


@contextlib.contextmanager
def fitting(arch, img_size):
    """Around the building and the first use of a network: what it cannot do becomes a UserError of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"-a {arch} --img-size {img_size}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def try_images(network, arch, img_size):
    """Raise UserError if a network cannot take images of that size. It is left in eval mode."""
    network.eval()
    device = next(network.parameters()).device
    with fitting(arch, img_size):
        network(torch.zeros(2, 3, img_size, img_size, device=device))


def features(network, head, images):
    """What enters the head: the backbone's features. images (N, 3, H, W) → (N, D)."""
    caught = []
    hook = network.get_submodule(head).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    return caught[0].flatten(1)
