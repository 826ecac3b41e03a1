"""A map of a backbone's features: two coordinates for each val image, for `python -m synco.plot --embedding`."""

import argparse
import os
from dataclasses import dataclass

import torch

from synco import cache, datasets, distributed, features, loader
from synco.errors import UserError


@dataclass(frozen=True)
class Map:
    """Images as points of a plane: places (M, 2) and labels (M,), as lists; axes: what the two coordinates are."""

    places: list[list[float]]
    labels: list[int]
    classes: list[str]
    axes: tuple[str, str]
    title: str


def feature_map(args: argparse.Namespace) -> Map:
    """The map of args.data's val images by the backbone in args.checkpoint, to their `principal` components or `tsne`.

    args: those of `python -m synco.plot --embedding`, of which the checkpoint decides stem, image size and statistics
    where they are unset. Raises UserError if checkpoint or images cannot be used.
    """
    process = distributed.Process(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    datasets.fetch(args, process)
    images = datasets.load(args, "val")
    if len(images) < 3:
        raise UserError(f"{args.data}: val has {len(images)} images, and a map needs 3")
    model = features.open_backbone(args, args.checkpoint, process.device)
    if args.cache_images:
        cache.keep([images], process)
    view = images.with_transform(model.center_view())
    workers = loader.workers_each(args.workers, process.local_size)
    load = {"process": process, "workers": workers, "timeout": args.worker_timeout}
    batches = loader.eval_loader(view, args.batch_size, **load)
    rows, _, labels = features.extract(model.network, model.head, batches, process.device)
    if args.method == "tsne":
        places, axes = tsne(rows), ("t-SNE, first coordinate", "t-SNE, second coordinate")
    else:
        places, shares = principal(rows)
        axes = tuple(f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1))
    name = os.path.basename(os.path.abspath(args.data)) if args.dataset == "imagefolder" else args.dataset
    title = f"{model.arch}, val of {name}: {len(places)} images"
    return Map(places.tolist(), labels.tolist(), images.classes, axes, title)


def principal(features: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """The first two principal components of features (M, D) → (M, 2), and their shares of the variance.

    The sign of each, which is arbitrary, is such that its largest loading is positive. Float64, on the CPU.
    """
    centred = features.double().cpu()
    centred = centred - centred.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -2:].flip(1)  # (D, 2)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    shares = variances[-2:].flip(0).clamp(min=0) / variances.clamp(min=0).sum().clamp(min=1e-300)
    return centred @ (directions * largest.sign()), shares.tolist()


def tsne(features: torch.Tensor) -> torch.Tensor:
    """scikit-learn's t-SNE of features (M, D), M >= 3 → (M, 2); the same each time. Raises ImportError without it."""
    from sklearn.manifold import TSNE  # an optional package

    method = TSNE(init="pca", random_state=0, perplexity=min(30, (len(features) - 1) / 3))
    return torch.from_numpy(method.fit_transform(features.cpu().numpy()))
