"""The images of a data set in a few arrays: their names, their labels, and where their bytes lie."""

import collections
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from synco.errors import UserError


class Place(NamedTuple):
    """Where an image's bytes lie: `count` bytes from `start` on of a file of `size` bytes; None: the whole file."""

    path: str
    start: int = 0
    count: int | None = None
    size: int | None = None


class Index(Sequence):
    """The images of a data set as a sequence of names "group/file", in the order of torchvision's ImageFolder.

    A name's group is its first folder, "" where it has none. groups: their names, sorted; starts (G + 1,): group g has
    the images starts[g] to starts[g + 1] - 1; files: each image's path below its group, one after the other, uint8;
    offsets (N + 1,): where they begin. labelled: whether the groups are the images' classes.
    root: the folder whose files root/name they are; unless `paths` (see `joined`) names the file of each, or `spans`
    (N, 3) says which of the paths, from which byte on, and how many bytes; sizes: of the paths, in bytes, with spans.
    NumPy arrays, which may be far larger than a list of these names should be.
    """

    def __init__(
        self,
        groups: list[str],
        starts: np.ndarray,
        offsets: np.ndarray,
        files: np.ndarray,
        *,
        root: str = "",
        labelled: bool = True,
        paths: tuple[np.ndarray, np.ndarray] | None = None,
        spans: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.groups, self.starts, self.offsets, self.files = groups, starts, offsets, files
        self.root, self.labelled = root, labelled
        self.path_offsets, self.paths = joined([]) if paths is None else paths
        self.spans = np.empty((0, 3), dtype=np.int64) if spans is None else spans
        self.sizes = np.empty(0, dtype=np.int64) if sizes is None else sizes

    @property
    def classes(self) -> list[str]:
        """The names of the classes, [] of images without labels."""
        return self.groups if self.labelled else []

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        group = self.groups[int(np.searchsorted(self.starts, i, side="right")) - 1]
        return (group and f"{group}/") + _string(self.offsets, self.files, i)

    def __iter__(self) -> Iterator[str]:
        for g, group in enumerate(self.groups):
            head = group and f"{group}/"
            ends = self.offsets[self.starts[g] : self.starts[g + 1] + 1]
            part, ends = self.files[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
            for start, end in zip(ends, ends[1:]):
                yield head + os.fsdecode(part[start:end])

    def place(self, i: int) -> Place:
        """Where image i lies."""
        if not len(self.spans):
            return Place(os.path.join(self.root, self.path(i) if len(self.paths) else self[i]))
        path, start, count = self.spans[i].tolist()
        return Place(os.path.join(self.root, self.path(path)), start, count, int(self.sizes[path]))

    def path(self, i: int) -> str:
        """One of the paths, relative to the root."""
        return _string(self.path_offsets, self.paths, i)

    def checksum(self) -> int:
        """CRC-32 of the names, whatever is known of where the images lie."""
        found = zlib.crc32(os.fsencode("\0".join(self.groups)))
        for array in (self.starts, self.offsets, self.files):
            found = zlib.crc32(array, found)
        return found

    def sum(self) -> int:
        """CRC-32 of all that the index says."""
        found = zlib.crc32(bytes([self.labelled]), self.checksum())
        for array in (self.path_offsets, self.paths, self.spans, self.sizes):
            found = zlib.crc32(np.ascontiguousarray(array), found)
        return found

    def targets(self) -> np.ndarray:
        """(N,) int64: the class of every image, 0 of images without labels."""
        counts = np.diff(self.starts) if self.labelled else [len(self)]
        return np.repeat(np.arange(len(counts)), counts)


def joined(strings: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """M strings as two arrays: where each begins (M + 1,), and their bytes, one after the other."""
    encoded = [os.fsencode(string) for string in strings]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8)


def _string(offsets, content, i):
    """One of the strings that were `joined`."""
    return os.fsdecode(content[offsets[i] : offsets[i + 1]].tobytes())


def of_names(
    root: str,
    names: Sequence[str],
    *,
    labelled: bool = True,
    paths: Sequence[str] = (),
    spans: Sequence = (),
    source: str | None = None,
) -> Index:
    """The `Index` of images with these names, in any order. paths: one for each, or with `spans` the files of those.

    source: what messages name in place of root. Raises UserError that counts and names those that come twice.
    """
    keys = [(name.rpartition("/")[0].partition("/")[0], *name.rpartition("/")[::2]) for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    names, heads = [names[i] for i in order], [keys[i][0] for i in order]
    twice = [name for name, following in zip(names, names[1:]) if name == following]
    if twice:
        raise UserError(f"{source or root}: {len(twice)} images have the name of another, such as {twice[0]}")
    counts = collections.Counter(heads)  # in the order of the names
    offsets, files = joined(name[len(head and f"{head}/") :] for name, head in zip(names, heads))
    starts = np.cumsum([0, *counts.values()], dtype=np.int64)
    places = {}
    if len(spans):
        sizes = np.array([os.stat(os.path.join(root, path)).st_size for path in paths], dtype=np.int64)
        places = {"paths": joined(paths), "spans": np.array(spans, dtype=np.int64)[order], "sizes": sizes}
    elif paths:
        places = {"paths": joined(paths[i] for i in order)}
    return Index(list(counts), starts, offsets, files, root=root, labelled=labelled, **places)
