"""Synthetic hard negatives: the six formulas of SynCo, the mining of hard rows, and the draw.

Source: SynCo, arXiv 2410.02401, sec. 3; types 1 and 3 are MoCHi's, arXiv 2010.01028, sec. 4.

The six functions are formulas only: they draw nothing, take any float dtype, and return unit rows that are constants
for the gradient, written to `out` if it is given; torch.lerp(a, b, w) is a + w * (b - a). `synthesize` does the
drawing. N queries, S negatives a query, C dimensions, K rows in the queue.

Beside the six types there is a control, no part of SynCo: hard negatives as they are, over again. They add the weight
of synthetic negatives without the synthesis.
"""

import torch
import torch.nn.functional as F

TYPES = ("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial")
CONTROL = "copied"
KINDS = (*TYPES, CONTROL)  # in the order of counts and columns


def _unit(x):
    """x (..., C), a tensor that nobody else holds, with its rows normalised in place."""
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def interpolated(q, n, alpha, out=None):
    """Type 1: a point between the query and a hard negative.

        s = normalize(alpha * q + (1 - alpha) * n)

    q (N, C), n (N, S, C), alpha (N, S, 1) in (0, 0.5) → (N, S, C), unit rows.
    """
    return _unit(torch.lerp(n, q[:, None], alpha, out=out))


@torch.no_grad()
def extrapolated(q, n, beta, out=None):
    """Type 2: a point beyond the hard negative, on the line from the query through it.

        s = normalize(q + beta * (n - q))

    q (N, C), n (N, S, C), beta (N, S, 1) in (1, 1.5) → (N, S, C), unit rows.
    """
    return _unit(torch.lerp(q[:, None], n, beta, out=out))


@torch.no_grad()
def mixed(n_i, n_j, gamma, out=None):
    """Type 3: a mixture of two hard negatives.

        s = normalize(gamma * n_i + (1 - gamma) * n_j)

    n_i, n_j (N, S, C), gamma (N, S, 1) in (0, 1) → (N, S, C), unit rows.
    """
    return _unit(torch.lerp(n_j, n_i, gamma, out=out))


@torch.no_grad()
def noisy(n, noise, out=None):
    """Type 4: a hard negative with Gaussian noise added.

        s = normalize(n + noise)

    n (N, S, C), noise (N, S, C) already scaled by sigma → (N, S, C), unit rows.
    """
    return _unit(torch.add(n, noise, out=out))


@torch.no_grad()
def perturbed(q, n, delta, out=None):
    """Type 5: a hard negative moved a step towards the query.

        s = normalize(n + delta * grad_n <q, n>),   grad_n <q, n> = q

    The similarity is the dot product, so its gradient is known and autograd has no part in it.
    q (N, C), n (N, S, C), delta a float → (N, S, C), unit rows.
    """
    return _unit(torch.add(n, delta * q[:, None], out=out))


@torch.no_grad()
def adversarial(q, n, eta, out=None):
    """Type 6: a hard negative moved by the sign of the similarity's gradient, as in FGSM.

        s = normalize(n + eta * sign(grad_n <q, n>)),   grad_n <q, n> = q

    q (N, C), n (N, S, C), eta a float → (N, S, C), unit rows.
    """
    return _unit(torch.add(n, eta * q.sign()[:, None], out=out))


@torch.no_grad()
def hardest(similarity, n_hard):
    """The queue rows that are most similar to each query, most similar first.

    similarity (N, K), n_hard <= K → (N, n_hard) row indices. The order is part of the result: draws pick
    positions in it, so it must not depend (but for ties) on how a device happens to select.

    In three stages, which took less than half of topk's time on a CPU: columns fall into groups of 4, and these into
    groups of 4. The n_hard most similar columns lie in the n_hard groups with the largest maxima (any other group has
    n_hard larger values before it), at each level.
    """
    N, K = similarity.shape
    if K % 16 or 16 * n_hard >= K:
        return similarity.topk(n_hard, dim=1).indices
    fours = similarity.unflatten(1, (4, K // 4)).amax(dim=1)  # group g: the columns g, g + K/4, ... g + 3K/4
    sixteens = fours.unflatten(1, (4, K // 16)).amax(dim=1)
    columns = sixteens.topk(n_hard, dim=1, sorted=False).indices  # (N, n_hard)
    for level in (fours, similarity):
        columns = torch.cat([columns + i * (level.shape[1] // 4) for i in range(4)], dim=1)  # (N, 4 n_hard)
        best = level.gather(1, columns).topk(n_hard, dim=1, sorted=level is similarity).indices
        columns = columns.gather(1, best)
    return columns


@torch.no_grad()
def synthesize(
    q,
    queue,
    hard,
    counts,
    *,
    alpha=0.5,
    beta=1.5,
    gamma=1.0,
    sigma=0.01,
    delta=0.01,
    eta=0.01,
    generator=None,
    sources=None,
):
    """Draw hard rows and coefficients, and make the synthetic negatives of every query.

    Rows are drawn from `hard` uniformly, with replacement, independently for each negative and type.

    q (N, C) unit rows; queue (K, C) unit rows; hard (N, n_hard) row indices from `hardest`;
    counts: six integers, how many negatives of each of `TYPES` a query gets; a seventh, if any, of the `CONTROL`.
    alpha, beta, gamma: upper ends of the coefficients' ranges U(0, alpha), U(1, beta), U(0, gamma); sigma: the noise's
    standard deviation; delta, eta: step lengths; generator: on q's device; None draws from torch's default one;
    sources: a dict that gets {kind: (N, rows) the queue rows that its negatives were made from}, two a mixed one.
    Returns (N, sum of counts, C), unit rows, in the order of `KINDS`, constant for the gradient.
    """
    n1, n2, n3, n4, n5, n6, n_copied = (*counts, 0)[: len(KINDS)]
    q, N = q.detach(), len(q)

    def uniform(low, high, count):
        return torch.empty(N, count, 1, dtype=q.dtype, device=q.device).uniform_(low, high, generator=generator)

    # One draw serves all types; indexing copies, so later enqueues cannot reach the rows.
    draws = (n1, n2, n3, n3, n4, n5, n6)
    parts = _draw(hard, sum(draws), generator).split(draws, dim=1)

    def rows(i):
        return F.embedding(parts[i], queue)  # (N, draws[i], C)

    made = q.new_empty(N, sum(counts), q.shape[1])  # each type writes its own part
    s1, s2, s3, s4, s5, s6, copied = made.split((n1, n2, n3, n4, n5, n6, n_copied), dim=1)
    if n1:
        interpolated(q, rows(0), uniform(0, alpha, n1), out=s1)
    if n2:
        extrapolated(q, rows(1), uniform(1, beta, n2), out=s2)
    if n3:
        mixed(rows(2), rows(3), uniform(0, gamma, n3), out=s3)
    if n4:
        noise = torch.randn(N, n4, q.shape[1], dtype=q.dtype, device=q.device, generator=generator)
        noisy(rows(4), sigma * noise, out=s4)
    if n5:
        perturbed(q, rows(5), delta, out=s5)
    if n6:
        adversarial(q, rows(6), eta, out=s6)
    if n_copied:  # drawn last: the six types are what they are without it
        parts = (*parts, _draw(hard, n_copied, generator))
        copied.copy_(rows(7))
    if sources is not None:
        sources.update(_by_kind(*parts))
    return made


def _draw(hard, count, generator):
    """hard (N, n_hard) → (N, count) of its row indices."""
    pick = torch.randint(hard.shape[1], (len(hard), count), device=hard.device, generator=generator)
    return hard.gather(1, pick)


def _by_kind(first, second, i, j, *others):
    """The rows of all draws → {kind: (N, rows)}, of each that there are some of; i, j: those of the mixed ones."""
    parts = zip(KINDS, (first, second, torch.cat([i, j], dim=1), *others))
    return {kind: rows for kind, rows in parts if rows.shape[1]}
