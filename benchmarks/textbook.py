"""The loss head as one would first write it from the paper: slow, and the oracle of the fast one's tests.

Types 5 and 6 ask autograd for the gradient of every negative by itself; each type's logits are made and concatenated
by themselves; the queue is cloned for the backward pass. It draws what `synco.negatives.synthesize` draws, in the
same order, so that with equal generators both give equal numbers.
"""

import torch
import torch.nn.functional as F


def logits(q, k, queue, counts, *, n_hard, T, alpha, beta, gamma, sigma, delta, eta, generator=None):
    """q, k (N, C), queue (K, C), counts of the six types → (N, 1 + K + S), with the gradient to q."""
    n1, n2, n3, n4, n5, n6 = counts
    queue = queue.clone()
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
    negative = torch.einsum("nc,kc->nk", q, queue)
    out = torch.cat([positive, negative], dim=1)
    if not any(counts):
        return out / T

    constant = q.detach()
    hard = negative.detach().topk(n_hard, dim=1).indices
    draws = (n1, n2, n3, n3, n4, n5, n6)
    pick = torch.randint(n_hard, (len(q), sum(draws)), device=q.device, generator=generator)
    rows = [queue[hard.gather(1, part)] for part in pick.split(draws, dim=1)]

    def uniform(low, high, count):
        return torch.empty(len(q), count, 1, dtype=q.dtype, device=q.device).uniform_(low, high, generator=generator)

    def append(out, synthetic):
        return torch.cat([out, torch.einsum("nc,nsc->ns", q, F.normalize(synthetic, dim=2))], dim=1)

    def gradient(row):
        row = row.clone().requires_grad_()
        return torch.autograd.grad((constant * row).sum(), row)[0]

    if n1:
        a = uniform(0, alpha, n1)
        out = append(out, a * constant.unsqueeze(1) + (1 - a) * rows[0])
    if n2:
        b = uniform(1, beta, n2)
        out = append(out, constant.unsqueeze(1) + b * (rows[1] - constant.unsqueeze(1)))
    if n3:
        g = uniform(0, gamma, n3)
        out = append(out, g * rows[2] + (1 - g) * rows[3])
    if n4:
        noise = torch.randn(rows[4].shape, dtype=q.dtype, device=q.device, generator=generator)
        out = append(out, rows[4] + sigma * noise)
    if n5:
        out = append(out, torch.stack([row + delta * gradient(row) for row in rows[5].unbind(1)], dim=1))
    if n6:
        out = append(out, torch.stack([row + eta * gradient(row).sign() for row in rows[6].unbind(1)], dim=1))
    return out / T
