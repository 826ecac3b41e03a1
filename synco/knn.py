"""Weighted k-nearest-neighbour accuracy of backbone features: a probe that needs no training.

  python -m synco.knn CHECKPOINT DATA

CHECKPOINT: of SynCo, MoCo, a classifier or torchvision's own weights, or 'random' for untrained ones. DATA holds
train/CLASS/IMAGE, which vote, and val/CLASS/IMAGE, which are classified. Several processes: torchrun -m synco.knn ...
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from synco import cache, datasets, distributed, features, loader, options
from synco.distributed import Process
from synco.launch import launch
from synco.options import number

GRID = 2.0**26  # coordinates of unit rows are rounded to whole multiples of 1 / GRID, see `on_grid`
PLACE_BITS = 12
CHUNK = 1 << PLACE_BITS  # rows of the bank that are compared at a time
ROUND = 1024  # queries of all processes that are answered at a time
SCALE = 2.0**50  # scores are similarities in whole multiples of 1 / SCALE
NONE = -(1 << 51)  # the score of no row: below any that two unit rows have


def on_grid(rows: torch.Tensor) -> torch.Tensor:
    """Unit rows (M, D) to the nearest multiples of 2^-26, in float64; of rows in float32, float32 holds them, too.

    Products of two such numbers are multiples of 2^-52, and so are sums of products of two unit rows, of which none
    exceeds 1 by more than rounding: float64 holds them all exactly. Similarities are therefore the same bits in
    whatever order, in whatever parts and on whatever device they are summed, and equal where they should be equal.
    """
    return rows.double().mul_(GRID).round_().div_(GRID)


def nearest(
    bank: torch.Tensor, numbers: torch.Tensor, queries: torch.Tensor, k: int, own: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The k rows of the bank that are most similar to each query, most similar first, of equal ones the lower number.

    The bank is that of all processes, each of which holds a share of it, (m, D), with the rows' numbers (m,),
    ascending; queries (n, D): this process's; both unit rows, m and n as they come. The queries travel, and the k best
    of each share come back, so that what is found depends in no way on the number of processes.
    own (n,): the number of the row that each query is itself, and that is not to be found.
    Every process must run through it. Yields, for some of this process's queries at a time, in their order,
    the similarities (q, k) in float64 and the numbers (q, k); k is at most the number of rows there are to be found.
    """
    world, sizes = distributed.world_size(), distributed.from_all((len(bank), len(queries)))
    k = min(k, sum(rows for rows, _ in sizes) - (own is not None))
    most, step = max(count for _, count in sizes), max(1, ROUND // world)
    for start in range(0, most, step):
        size, mine = min(step, most - start), queries[start : start + step]
        asked = distributed.gather(_padded(mine, size))  # (world · size, D)
        left_out = None if own is None else distributed.gather(_padded(own[start : start + step], size))
        scores, found = _best_of_share(on_grid(asked), bank, numbers, k, left_out)
        if world > 1:  # (world, size, k): what each share has for this process's queries
            scores, found = (distributed.exchange(x).view(world, size, k).transpose(0, 1) for x in (scores, found))
            scores, found = _best(scores.flatten(1), found.flatten(1), k)
        yield scores[: len(mine)].double() / SCALE, found[: len(mine)]


def unit_rows(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Stored features (M, D) on the device, with norm 1, in float64; rows of zeros stay so."""
    rows = torch.from_numpy(np.array(rows)).to(device).double()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def search(
    bank: np.ndarray, queries: np.ndarray, k: int, process: Process, own: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest` among stored features (M, D), for stored queries (Q, D) → this process's share of the answers.

    That are those to the queries from Q·rank/W on, to Q·(rank + 1)/W; own (Q,): as for `nearest`.
    Every process must call this.
    """
    start, end = (len(bank) * r // process.world_size for r in (process.rank, process.rank + 1))
    numbers = torch.arange(start, end, device=process.device)
    mine = slice(*(len(queries) * r // process.world_size for r in (process.rank, process.rank + 1)))
    left_out = None if own is None else torch.from_numpy(own[mine]).to(process.device)
    share, asked = _units(bank[start:end], process.device), _units(queries[mine], process.device)
    k = min(k, len(bank) - (own is not None))
    similarity, found = asked.new_empty(len(asked), k, dtype=torch.float64), numbers.new_empty(len(asked), k)
    done = 0
    for some, rows in nearest(share, numbers, asked, k, left_out):
        similarity[done : done + len(rows)], found[done : done + len(rows)] = some, rows
        done += len(rows)
    return similarity, found


def _units(rows, device):
    """`unit_rows` in float32, made a part at a time."""
    units = torch.empty(rows.shape, device=device)
    for i in range(0, len(rows), CHUNK):
        units[i : i + CHUNK] = unit_rows(rows[i : i + CHUNK], device)
    return units


def _padded(rows, size):
    """rows (n, ...) → (size, ...), with zeros at the end."""
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def _best_of_share(queries, bank, numbers, k, own):
    """This share's k best rows for each query → (scores (Q, k), see SCALE; numbers (Q, k))."""
    scores = numbers.new_full((len(queries), k), NONE)
    found = numbers.new_full((len(queries), k), torch.iinfo(torch.int64).max)
    for start in range(0, len(bank), CHUNK):
        chunk = numbers[start : start + CHUNK]
        score = (queries @ on_grid(bank[start : start + CHUNK]).T).mul_(SCALE).long()  # (Q, CHUNK)
        if own is not None:
            score.masked_fill_(chunk == own[:, None], NONE)
        # score and place in one whole number: no two are equal, and of equal scores the first is the largest
        last = CHUNK - 1 - torch.arange(len(chunk), device=score.device)
        best = (score << PLACE_BITS).bitwise_or_(last).topk(min(k, len(chunk)), dim=1).values
        places = CHUNK - 1 - (best & (CHUNK - 1))
        both = torch.cat([scores, best >> PLACE_BITS], dim=1), torch.cat([found, chunk[places]], dim=1)
        scores, found = _best(*both, k)
    return scores, found


def _best(scores, numbers, k):
    """The k highest scores (Q, n) and their numbers (Q, n), of equal ones those with the lowest numbers."""
    order = numbers.sort(dim=1, stable=True).indices
    order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices[:, :k])
    return scores.gather(1, order), numbers.gather(1, order)


def vote(similarity: torch.Tensor, labels: torch.Tensor, *, classes: int, t: float) -> torch.Tensor:
    """Weighted kNN (Wu et al., arXiv 1805.01978, sec. 3.4): neighbours vote with exp(similarity / t).

    similarity, labels (q, k), most similar first → (q,) the class with the most votes, of equal ones the lower.
    """
    # of one query all votes are divided by its largest, as a small t would overflow, and rounded to 2^-36: their sums
    # are then exact, so that the order in which a device adds them decides nothing
    votes = ((similarity - similarity[:, :1]) / t).exp_().mul_(2.0**36).round_()
    return votes.new_zeros(len(votes), classes).scatter_add_(1, labels, votes).argmax(dim=1)


def predict(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    classes: int,
    k: int = 200,
    t: float = 0.1,
    own: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """The classes (n,) that the bank's rows vote for, see `vote` and `nearest`, which explains bank, queries and own.

    bank_labels (m,): those of this process's share; numbers (m,): of its rows, of all processes together 0, 1, 2, ...;
    None: they follow those of the lower ranks. k is the number of voters if that is smaller.
    """
    if numbers is None:
        first = sum(distributed.from_all(len(bank))[: distributed.rank()])
        numbers = torch.arange(first, first + len(bank), device=bank.device)
    everyone, labels = gather_uneven(numbers, bank_labels)
    labels = torch.empty_like(labels).scatter_(0, everyone, labels)
    blocks = nearest(bank, numbers, queries, k, own)
    predicted = [vote(similarity, labels[found], classes=classes, t=t) for similarity, found in blocks]
    return torch.cat([*predicted, bank_labels.new_empty(0)])


def accuracy(
    network: nn.Module,
    head: str,
    bank_loader: DataLoader,
    query_loader: DataLoader,
    device: torch.device,
    *,
    classes: int,
    k: int = 200,
    t: float = 0.1,
    train: bool = False,
) -> dict[str, float]:
    """Top-1 accuracy in percent of the queries' classes, voted by the bank; the work is spread over the processes.

    The loaders are `loader.eval_loader`s. Every process evaluates with rank 0's buffers and gets the same numbers:
    {"top1": by backbone features, "top1_projection": by the head's outputs, and with train "train_top1" and
    "train_top1_projection": the bank's own images, each voted by all others}.
    """
    distributed.share_buffers(network)
    own_features, own_outputs, own_labels = features.extract(network, head, bank_loader, device)
    rows, outputs, labels = features.extract(network, head, query_loader, device)
    numbers = torch.arange(len(own_labels), device=device) * distributed.world_size() + distributed.rank()
    settings = {"classes": classes, "k": k, "t": t, "numbers": numbers}
    found = {}
    for suffix, bank, queries in (("", own_features, rows), ("_projection", own_outputs, outputs)):
        found["top1" + suffix] = _percent(predict(bank, own_labels, queries, **settings) == labels)
        if train:
            predicted = predict(bank, own_labels, bank, own=numbers, **settings)
            found["train_top1" + suffix] = _percent(predicted == own_labels)
    return found


def _percent(hits):
    """hits (M,), booleans of this process → the share of all processes' that are true, in percent."""
    count, total = distributed.total(torch.stack([hits.sum(), torch.tensor(len(hits), device=hits.device)])).tolist()
    return 100 * count / total


def gather_uneven(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (M, ...) and labels (M,) of all processes, whose M may differ → (sum M, ...), (sum M,)."""
    if distributed.world_size() == 1:
        return rows, labels
    sizes = distributed.from_all(len(rows))
    rows, labels = (distributed.gather(_padded(x, max(sizes))).split(max(sizes)) for x in (rows, labels))
    return tuple(torch.cat([part[:size] for part, size in zip(parts, sizes)]) for parts in (rows, labels))


def parse() -> argparse.Namespace:
    """The command line of `python -m synco.knn`."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="what to evaluate, or 'random'")
    options.add_data(parser)
    options.add_distributed(parser)
    flag("-k", default=200, type=number(int, 1), help="neighbours that vote; at most all")
    flag("-t", default=0.1, type=number(float, above=0), help="temperature of the votes")
    flag("-b", "--batch-size", default=256, type=number(int, 1), help="per node, shared by its processes")
    flag("--seed", default=0, type=number(int, 0, 2**32 - 1), help="of random weights")
    # what the checkpoint was trained with
    parser.set_defaults(arch=None)
    args = parser.parse_args()
    options.check_data(args)
    return args


def run(process: Process, args: argparse.Namespace) -> None:
    """Load the backbone, evaluate it, say what it reaches."""
    datasets.fetch(args, process)
    train, val = datasets.load(args, "train"), datasets.load(args, "val")
    datasets.same_classes(train, val, args.data)
    model = features.open_backbone(args, args.checkpoint, process.device)
    distributed.say(f"{model.source}; {model.arch} at {model.img_size} pixels")

    if args.cache_images:
        cache.keep([train, val], process)
    batch = loader.batch_each(args.batch_size, process.local_size)
    workers = loader.workers_each(args.workers, process.local_size)
    shown = [part.with_transform(model.center_view()) for part in (train, val)]
    load = {"process": process, "workers": workers, "timeout": args.worker_timeout}
    parts = [loader.eval_loader(part, batch, **load) for part in shown]
    settings = {"classes": len(train.classes), "k": args.k, "t": args.t}
    top1 = accuracy(model.network, model.head, *parts, process.device, **settings)["top1"]
    distributed.say(f"kNN (k = {min(args.k, len(train))}, {len(train)} images vote) on {len(val)} images: {top1:.2f} %")


if __name__ == "__main__":
    launch(run, parse)
