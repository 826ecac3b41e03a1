"""Weighted k-nearest-neighbour accuracy of backbone features: a probe that needs no training."""

import torch
import torch.nn.functional as F

from synco import distributed
from synco.builder import features


@torch.no_grad()
def extract(network, head, loader, device):
    """Unit features and labels of the loader's images: (M, D), (M,), on `device`. The network is put in eval mode."""
    was_training = network.training
    network.eval()
    rows, labels = [], []
    for images, label in loader:
        out = features(network, head, images.to(device, non_blocking=True))
        rows.append(F.normalize(out.float(), dim=1))
        labels.append(label.to(device, non_blocking=True))
    if not rows:  # more processes than images: one image's shape, no rows
        image = loader.dataset.dataset[0][0]
        rows.append(features(network, head, image[None].to(device))[:0].float())
        labels.append(torch.empty(0, dtype=torch.long, device=device))
    network.train(was_training)
    return torch.cat(rows), torch.cat(labels)


def predict(bank, bank_labels, queries, *, classes, k=200, t=0.1):
    """Weighted kNN (Wu et al., arXiv 1805.01978, sec. 3.4): neighbours vote with exp(cosine / t).

    bank (M, D), queries (Q, D): unit rows; bank_labels (M,); k is the bank's size if that is smaller.
    Returns (Q,) the class with the most votes.
    """
    k = min(k, len(bank))
    classes_of = []
    for part in queries.split(256):  # bounds the (Q, M) similarities
        similarity, neighbours = (part @ bank.T).topk(k, dim=1)  # (q, k)
        votes = torch.zeros(len(part), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / t).exp())
        classes_of.append(votes.argmax(dim=1))
    return torch.cat(classes_of) if classes_of else bank_labels.new_empty(0)


def accuracy(network, head, bank_loader, query_loader, device, *, classes, k=200, t=0.1):
    """Top-1 accuracy in percent of the queries' classes, voted by the bank; the work is spread over the processes.

    The loaders are `loader.eval_loader`s. Every process evaluates with rank 0's buffers and gets the same number.
    """
    distributed.share_buffers(network)
    bank, bank_labels = gather_uneven(*extract(network, head, bank_loader, device))
    queries, labels = extract(network, head, query_loader, device)
    hits = (predict(bank, bank_labels, queries, classes=classes, k=k, t=t) == labels).sum()
    hits, count = distributed.total(torch.stack([hits, torch.tensor(len(labels), device=device)])).tolist()
    return 100 * hits / count


def gather_uneven(rows, labels):
    """Rows (M, D) and labels (M,) of all processes, whose M may differ → (sum M, D), (sum M,)."""
    if distributed.world_size() == 1:
        return rows, labels
    sizes = distributed.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    most = max(sizes)
    pad = most - len(rows)
    rows = distributed.gather(F.pad(rows, (0, 0, 0, pad))).split(most)
    labels = distributed.gather(F.pad(labels, (0, pad))).split(most)
    return (
        torch.cat([part[:size] for part, size in zip(rows, sizes)]),
        torch.cat([part[:size] for part, size in zip(labels, sizes)]),
    )
