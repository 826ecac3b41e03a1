"""Decoded images in memory (--cache-images): one copy, which the processes of a node share."""

import copy
import itertools
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from synco import decode, distributed
from synco.datasets import Images
from synco.distributed import Process
from synco.errors import UserError


class _Cached:
    """Reads the images of a split from memory that holds their pixels, as far as they have been put in.

    memory: uint8 (8 (2 N + 1) + pixels,): of N images where the pixels of each begin and, after the last, end, and each
    one's width, as int64 and 0 before it is put in; then the pixels. source: the `Images` as they were read before,
    which say why one cannot be.
    """

    def __init__(self, memory: torch.Tensor, source: Images):
        count, self.source = len(source), source
        numbers, self.pixels = memory.split([_table(count), len(memory) - _table(count)])
        self.starts, self.widths = numbers.view(torch.int64).split([count + 1, count])

    def __call__(self, position):
        width = int(self.widths[position])
        if not width:
            return self.source.image(position)
        return Image.fromarray(self._place(position).view(-1, width, 3).numpy())

    def put(self, position: int, tolerant: bool) -> None:
        """Decode an image and put it in, unless it cannot be read and that is tolerated."""
        try:
            pixels = np.asarray(self.source.image(position))
        except UserError:
            if not tolerant:
                raise
            return
        self._place(position).copy_(torch.from_numpy(pixels.reshape(-1).copy()))
        self.widths[position] = pixels.shape[1]

    def _place(self, position):
        start, end = self.starts[position : position + 2].tolist()
        return self.pixels[start:end]


def _table(count):
    """Bytes of the numbers that precede the pixels of so many images."""
    return 8 * (2 * count + 1)


def keep(splits: Iterable[Images], process: Process, tolerant: bool = False) -> None:
    """Keep the decoded pixels of these `Images` in memory that the processes of a node share. All must call this.

    The memory is a file without a name (memfd), which is gone with the last process that has it open, however that
    ends; where the system has none, as on a Mac, each process has its own copy. Each process of a node decodes a part.
    tolerant: an image that cannot be read is no error before it is asked for.
    Says how much that is. Raises UserError, before it reads them, if more than nine tenths of the free memory.
    """
    splits = [images for images in splits if images.has_bytes()]
    if not splits:
        distributed.say(f"{'cached images':18} all, as this data set always is")
        return
    shared = hasattr(os, "memfd_create")
    mates = _mates() if shared else [process.rank]
    place = mates.index(process.rank)
    with ThreadPoolExecutor(max(1, distributed.usable_cpus() // len(mates))) as pool:  # PIL leaves Python's lock
        sizes, memories, files = [], [], []
        if place == 0:
            sizes = [_sizes(images, pool, tolerant) for images in splits]
            _check_room(sizes, len(mates), 1 if shared else process.local_size)
            needed = [_table(len(size)) + 3 * int(size.prod(axis=1).sum()) for size in sizes]
            if shared:
                files = [_nameless_file(count) for count in needed]
            else:
                memories = [torch.zeros(count, dtype=torch.uint8) for count in needed]
        distributed.barrier()  # however long the sizes take
        if shared:
            paths = distributed.from_all([f"/proc/{os.getpid()}/fd/{file}" for file in files])[mates[0]]
            memories = [_map(path) for path in paths]
        readers = [_Cached(memory, copy.copy(images)) for memory, images in zip(memories, splits)]
        for reader, size in zip(readers, sizes):
            reader.starts[1:] = torch.from_numpy(np.cumsum(3 * size.prod(axis=1)))
        distributed.barrier()
        for reader, images in zip(readers, splits):
            mine = range(place, len(images), len(mates))
            list(pool.map(reader.put, mine, itertools.repeat(tolerant)))
            images.read_by(reader)
    distributed.barrier()
    for file in files:
        os.close(file)


def _mates():
    """The ranks of the processes that can open this one's files: those of one kernel with the same numbers."""
    here = distributed.node(), os.stat("/proc/self/ns/pid").st_ino
    return [rank for rank, place in enumerate(distributed.from_all(here)) if place == here]


def _nameless_file(count):
    """The descriptor of a file of so many zeros that is in memory alone."""
    file = os.memfd_create("images")
    os.truncate(file, count)
    return file


def _map(path):
    """A file as a tensor (bytes,), shared with all that do the same. Raises UserError where that is not allowed."""
    try:
        with open(path, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    except OSError as error:
        raise UserError(
            f"--cache-images: the processes of this node may not share memory ({error.strerror} {path})"
        ) from error


def _sizes(images, pool, tolerant):
    """(N, 2) width and height of each image, by its header; 0 of one that cannot be read, if that is tolerated."""

    def size_of(position):
        try:
            return decode.size_of(images.content(position), images.where(position))
        except UserError:
            if not tolerant:
                raise
            return 0, 0

    return np.array(list(pool.map(size_of, range(len(images)))))


def _check_room(sizes, mates, copies):
    """Say how much memory images of these sizes take. Raises UserError if it is more than nine tenths of the free."""
    needed, free = sum(3 * int(size.prod(axis=1).sum()) for size in sizes), distributed.free_memory()
    each = f", one copy for the {mates} processes of this node" if mates > 1 else ""
    each = f", {copies} times on this node" if copies > 1 else each
    if needed * copies > 0.9 * free:
        raise UserError(f"--cache-images: they take {_gigabytes(needed)}{each}, and {_gigabytes(free)} are free")
    count = sum(map(len, sizes))
    distributed.say(f"{'cached images':18} {count}, {_gigabytes(needed)}{each}, of {_gigabytes(free)} that are free")


def _gigabytes(count):
    return f"{count / 1e9:.2f} GB"
