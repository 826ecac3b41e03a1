"""What the negatives of one step are like: how hard, how often wrong, and where they pull the query.

All are functions of that step's own tensors, and computed at print steps alone. N queries, K rows in the queue, S
synthetic negatives of each query; counts: {kind: negatives a query}, in the order of the logits' last S columns.
"""

import numpy as np
import torch
import torch.nn.functional as F

from synco import distributed, measures
from synco.builder import Inspection, SynCo, full_precision
from synco.datasets import Images
from synco.run import Step


def note(step: Step, logits: torch.Tensor, model: SynCo, counts: dict[str, int], labels: torch.Tensor | None) -> None:
    """Note all that follows for the log's line of this print step, whose `model.inspection` was asked for.

    logits (N, 1 + K + S), without gradient; labels (M,): the images' classes on the host, None: they have none.
    """
    seen, K = model.inspection, model.K
    step.note(**hardness(logits, counts, K=K, T=model.T, n_hard=model.n_hard), **leakage(logits, counts, K=K))
    step.notes.count(measures.signs_of_collapse, seen.q)  # of its singular values a device would make the host wait
    with full_precision(logits.device):
        step.note(**directions(gradient_parts(logits, seen, counts, T=model.T)))
    if seen.index is not None:
        rows = {"hardest": logits[:, 1 : 1 + K].topk(min(model.n_hard, K), dim=1).indices, **seen.sources}

        def count(index, queue_index, *tables):
            masked = model.mask_same_image
            return wrong_negatives(index, queue_index, dict(zip(rows, tables)), labels, masked=masked)

        step.notes.count(count, seen.index, seen.queue_index, *rows.values())


def labels_of(images: Images) -> torch.Tensor | None:
    """The class of each image (M,), or None where they have none: all are of one, or some are of none.

    It says so, as the diagnostics then lack what takes labels. Every process may call this.
    """
    labels = torch.from_numpy(np.array(images.targets, dtype=np.int64))
    if len(images.classes) > 1 and (labels >= 0).all():
        return labels
    distributed.say(
        f"{images.root}: images without labels; the log leaves out how many negatives are of the query's class"
    )
    return None


@torch.no_grad()
def hardness(
    logits: torch.Tensor, counts: dict[str, int], *, K: int, T: float, n_hard: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """How hard the negatives are, by kind.

    logits (N, 1 + K + S): positive, queue (-inf where a row is masked), synthetic negatives, divided by T.
    Returns {"similarity/KIND": mean similarity to the query, "mass/KIND": share of the softmax mass}, 0-dim tensors,
    for the kinds "positive", "queue", "hardest" (the n_hard hardest queue rows, or all if there are fewer), and each
    type with a count > 0.
    """
    mass = logits.softmax(dim=1)  # (N, 1 + K + S)
    top, where = logits[:, 1 : 1 + K].topk(min(n_hard, K), dim=1)
    kinds = {
        "positive": (logits[:, 0].mean() * T, mass[:, 0].mean()),
        "queue": (_unmasked_mean(logits[:, 1 : 1 + K]) * T, mass[:, 1 : 1 + K].sum(dim=1).mean()),
        "hardest": (_unmasked_mean(top) * T, mass.gather(1, 1 + where).sum(dim=1).mean()),
    }
    for name, part in columns(counts, 1 + K).items():
        kinds[name] = (logits[:, part].mean() * T, mass[:, part].sum(dim=1).mean())
    return {
        f"{what}/{name}": value for name, pair in kinds.items() for what, value in zip(("similarity", "mass"), pair)
    }


def _unmasked_mean(logits):
    masked = logits == -torch.inf
    return logits.masked_fill(masked, 0).sum() / (~masked).sum()


def columns(counts: dict[str, int], start: int = 0) -> dict[str, slice]:
    """{kind: where its negatives are}, of each with a count > 0, the first at `start`."""
    ends = np.cumsum([start, *counts.values()]).tolist()
    return {name: slice(low, high) for name, low, high in zip(counts, ends, ends[1:]) if high > low}


@torch.no_grad()
def leakage(logits: torch.Tensor, counts: dict[str, int], *, K: int) -> dict[str, torch.Tensor]:
    """{"leakage/KIND": share of its negatives that are nearer to the query than its positive}, 0-dim tensors."""
    nearer = logits > logits[:, :1]  # (N, 1 + K + S)
    return {f"leakage/{name}": nearer[:, part].float().mean() for name, part in columns(counts, 1 + K).items()}


@torch.no_grad()
def gradient_parts(
    logits: torch.Tensor, seen: Inspection, counts: dict[str, int], *, T: float
) -> dict[str, torch.Tensor]:
    """What each kind contributes to the gradient of a query's loss with respect to the query, in closed form.

        g = ((p_0 - 1) k + sum_j p_j n_j) / T,   p = softmax(logits)

    Returns {kind: (N, C)}, which add up to g: "positive", "queue" and each kind with a count > 0.
    """
    mass, K = logits.softmax(dim=1) / T, len(seen.queue)  # (N, 1 + K + S)
    parts = {"positive": (mass[:, :1] - 1 / T) * seen.k, "queue": mass[:, 1 : 1 + K] @ seen.queue}
    for name, part in columns(counts).items():
        parts[name] = torch.einsum("ns,nsc->nc", mass[:, 1 + K :][:, part], seen.synthetic[:, part])
    return parts


@torch.no_grad()
def directions(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the kinds pull the queries, from `gradient_parts`; 0-dim tensors.

    "gradient/KIND": the share of the gradient's length that a kind brings, along the gradient; they add up to 1.
    "cosine/KIND", of synthetic negatives: between their part and that of the real ones, the mean over the queries.
    Near 1 they give more weight to what is there, else they add a direction.
    """
    whole = sum(parts.values())
    lengths = whole.norm(dim=1).mean()
    along = F.normalize(whole, dim=1)
    found = {f"gradient/{name}": (part * along).sum(dim=1).mean() / lengths for name, part in parts.items()}
    for name, part in parts.items():
        if name not in ("positive", "queue"):
            found[f"cosine/{name}"] = F.cosine_similarity(part, parts["queue"], dim=1).mean()
    return found


def wrong_negatives(
    index: torch.Tensor,
    queue_index: torch.Tensor,
    rows: dict[str, torch.Tensor],
    labels: torch.Tensor | None,
    *,
    masked: bool,
) -> dict[str, float]:
    """How many negatives are of the query's own image, and of its own class; on the host.

    index (N,): the queries' images; queue_index (K,): those of the queue's rows, -1: not known, which have no say;
    rows: {kind: (N, rows)} of the queue; labels (M,): the images' classes, or None; masked: whether rows of a query's
    own image are no negatives of it.
    Returns {"own_image/KIND": share, "own_class/KIND": share}, for each kind of which some rows are known, and for
    "queue", which is what chance would give: all rows that are negatives.
    """
    found = {}
    classes = torch.zeros(1 + max(index.max(), queue_index.max()), dtype=torch.long) if labels is None else labels

    def add(kind, rows, own_image, own_class):
        if rows:
            found[f"own_image/{kind}"] = own_image / rows
            if labels is not None:
                found[f"own_class/{kind}"] = own_class / rows

    known = queue_index[queue_index >= 0]
    images = int(torch.bincount(known, minlength=len(classes))[index].sum())  # pairs of a query and a row of its image
    pairs = int(torch.bincount(classes[known], minlength=int(classes.max()) + 1)[classes[index]].sum())
    hidden = images * masked
    add("queue", len(index) * len(known) - hidden, images - hidden, pairs - hidden)
    for kind, table in rows.items():
        numbers = queue_index[table]  # (N, rows)
        same_image = numbers == index[:, None]
        shown = (numbers >= 0) & ~same_image if masked else numbers >= 0
        same_class = classes[numbers] == classes[index][:, None]  # of the last image where it is not known
        add(kind, int(shown.sum()), int((same_image & shown).sum()), int((same_class & shown).sum()))
    return found
