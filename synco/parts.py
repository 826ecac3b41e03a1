"""Parts of a data set, drawn from the images' names and a seed alone: the same on every machine and in every layout.

Images without labels count as those of one class.
"""

import collections
import hashlib
import os
from typing import TYPE_CHECKING

from synco.errors import UserError

if TYPE_CHECKING:
    from synco.datasets import Images


def by_class(images: "Images", purpose: str) -> list[list[int]]:
    """The positions of each class's images, [[...], ...], in an order that `purpose` and the names alone determine."""
    of_class = collections.defaultdict(list)
    for position, label in enumerate(images.targets):
        of_class[label].append(position)

    def key(position):
        return hashlib.sha256(os.fsencode(f"{purpose}/{images.names[position]}")).digest()

    return [sorted(of_class[label], key=key) for label in sorted(of_class)]


def fifth(images: "Images", val: bool, seed: int) -> "Images":
    """A fifth of every class, which is Caltech-256's val here, or all the others."""
    chosen = []
    for positions in by_class(images, f"{seed}/val"):
        count = round(len(positions) / 5)
        chosen += positions[:count] if val else positions[count:]
    return images.subset(sorted(chosen))


def held_out(images: "Images", val: bool, count: int, seed: int) -> "Images":
    """`count` of the images, class-balanced, or all the others. Raises UserError where there are not more."""
    if count >= len(images):
        raise UserError(f"--hold-out {count}: {images.root} has {len(images)} images to train on and hold out of")
    chosen = _in_turn(images, f"{seed}/hold-out")[:count]
    return images.subset(sorted(chosen if val else set(range(len(images))) - set(chosen)))


def limited(images: "Images", count: int, seed: int) -> "Images":
    """The first `count` images of a class-balanced order that is drawn from `seed`: one of each class in turn.

    A smaller count gives a part of what a larger one gives. Of fewer images, all.
    """
    return images.subset(sorted(_in_turn(images, f"{seed}/limit")[:count]))


def _in_turn(images, purpose):
    """All positions, one of each class in turn, as `by_class` orders them."""
    orders = by_class(images, purpose)
    turns = sorted((turn, label) for label, positions in enumerate(orders) for turn in range(len(positions)))
    return [orders[label][turn] for turn, label in turns]
