"""Weighted k-nearest-neighbour accuracy of backbone features: a probe that needs no training.

  python -m synco.knn CHECKPOINT DATA

CHECKPOINT: of SynCo, MoCo, a classifier or torchvision's own weights, or 'random' for untrained ones. DATA holds
train/CLASS/IMAGE, which vote, and val/CLASS/IMAGE, which are classified. Several processes: torchrun -m synco.knn ...
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from synco import augment, backbone, cache, datasets, distributed, export, loader, options
from synco.distributed import Process
from synco.launch import launch
from synco.networks import encode, head_name, network_errors_as_user_errors, network_of, try_images
from synco.options import number


@torch.no_grad()
def extract(
    network: nn.Module, head: str, loader: DataLoader, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the loader's images become: (M, D) backbone features, (M, C) outputs, both unit rows, and (M,) labels.

    All on `device`. The network is put in eval mode.
    """
    was_training = network.training
    network.eval()
    rows, outputs, labels = [], [], []
    for images, label in loader:
        found, output = encode(network, head, images.to(device, non_blocking=True))
        rows.append(F.normalize(found.float(), dim=1))
        outputs.append(F.normalize(output.float(), dim=1))
        labels.append(label.to(device, non_blocking=True))
    if not rows:  # more processes than images: one image's shape, no rows
        image = loader.dataset.dataset[0][0]
        found, output = encode(network, head, image[None].to(device))
        rows.append(found[:0].float())
        outputs.append(output[:0].float())
        labels.append(torch.empty(0, dtype=torch.long, device=device))
    network.train(was_training)
    return torch.cat(rows), torch.cat(outputs), torch.cat(labels)


def predict(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    classes: int,
    k: int = 200,
    t: float = 0.1,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted kNN (Wu et al., arXiv 1805.01978, sec. 3.4): neighbours vote with exp(cosine / t).

    bank (M, D), queries (Q, D): unit rows; bank_labels (M,); k is the number of voters if that is smaller.
    own (Q,): the bank's row that each query is itself, and that does not vote on it.
    Returns (Q,) the class with the most votes.
    """
    k = min(k, len(bank) - (own is not None))
    classes_of = []
    for start in range(0, len(queries), 256):  # bounds the (Q, M) similarities
        similarity = queries[start : start + 256] @ bank.T
        if own is not None:
            similarity.scatter_(1, own[start : start + 256, None], -torch.inf)
        similarity, neighbours = similarity.topk(k, dim=1)  # (q, k)
        votes = torch.zeros(len(similarity), classes, device=bank.device)
        # of one query all votes are divided by its largest: a small t would otherwise overflow
        votes.scatter_add_(1, bank_labels[neighbours], ((similarity - similarity[:, :1]) / t).exp())
        classes_of.append(votes.argmax(dim=1))
    return torch.cat(classes_of) if classes_of else bank_labels.new_empty(0)


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
    own_features, own_outputs, own_labels = extract(network, head, bank_loader, device)
    features, outputs, labels = extract(network, head, query_loader, device)
    found = {}
    for suffix, own_rows, rows in (("", own_features, features), ("_projection", own_outputs, outputs)):
        bank, bank_labels = gather_uneven(own_rows, own_labels)
        predicted = predict(bank, bank_labels, rows, classes=classes, k=k, t=t)
        found["top1" + suffix] = _percent(predicted == labels)
        if train:
            sizes = distributed.gather(torch.tensor([len(own_rows)], device=device)).tolist()
            first = sum(sizes[: distributed.rank()])
            own = torch.arange(first, first + len(own_rows), device=device)
            predicted = predict(bank, bank_labels, own_rows, classes=classes, k=k, t=t, own=own)
            found["train_top1" + suffix] = _percent(predicted == own_labels)
    return found


def _percent(hits):
    """hits (M,), booleans of this process → the share of all processes' that are true, in percent."""
    count, total = distributed.total(torch.stack([hits.sum(), torch.tensor(len(hits), device=hits.device)])).tolist()
    return 100 * count / total


def gather_uneven(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    if args.checkpoint == "random":
        settings = options.resolve_image_settings(args)
        arch, size = args.arch or "resnet50", settings["img_size"]
        torch.manual_seed(args.seed)
        with network_errors_as_user_errors(arch, size):
            network = network_of(arch, size, settings["stem"])(num_classes=1000)
            head = head_name(network, 1000)
        source = f"random weights, seed {args.seed}"
    else:
        network, head, saved = export.load(args.checkpoint, args.arch, args.stem)
        settings = options.resolve_image_settings(args, args.checkpoint, saved["config"])
        arch, size = saved["arch"], settings["img_size"]
        source = backbone.summary(saved, args.checkpoint, len(export.without_head(network, head)))
    network.to(process.device)
    try_images(network, arch, size)
    distributed.say(f"{source}; {arch} at {size} pixels")

    if args.cache_images:
        cache.keep([train, val], process)
    batch = loader.batch_each(args.batch_size, process.local_size)
    workers = loader.workers_each(args.workers, process.local_size)
    shown = [part.with_transform(augment.center_view(size, settings["stats"])) for part in (train, val)]
    load = {"process": process, "workers": workers, "timeout": args.worker_timeout}
    parts = [loader.eval_loader(part, batch, **load) for part in shown]
    top1 = accuracy(network, head, *parts, process.device, classes=len(train.classes), k=args.k, t=args.t)["top1"]
    distributed.say(f"kNN (k = {min(args.k, len(train))}, {len(train)} images vote) on {len(val)} images: {top1:.2f} %")


if __name__ == "__main__":
    launch(run, parse)
