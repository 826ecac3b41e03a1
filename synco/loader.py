"""Images: reading, augmentation, two crops, samplers and loaders.

Every draw is a function of (seed, epoch, image index), so neither the number of workers nor what ran before matters.
"""

import contextlib
import copy
import itertools
import math
import multiprocessing.connection
import multiprocessing.util
from collections.abc import Callable, Collection, Iterable, Iterator
from fractions import Fraction
from typing import Any

import torch
from PIL import Image
from torch.utils.data import BatchSampler, Dataset, Sampler, Subset, get_worker_info

from synco import distributed
from synco.distributed import Process
from synco.errors import UserError
from synco.workers import Loader, bytes_of


@contextlib.contextmanager
def _drawing(seed, epoch, index):
    """Lend torch's default generator, which torchvision's transforms draw from, this image's own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(distributed.seed_of("crops", seed, epoch, index))
        yield


class Reader:
    """Reads a data set's training images: replaces those that cannot be read, and knows which are being read.

    An image that cannot be read is replaced by the next one that can, so the replacement depends on the image alone.
    More than `limit` such images end the run. What the loading workers find out lies in memory shared with them.
    dataset: items (image, label), reading item i raises UserError if that file is bad.
    """

    def __init__(self, dataset: Dataset, limit: int = 0) -> None:
        self.dataset, self.limit = dataset, limit
        self.bad = torch.zeros(len(dataset) if limit else 0, dtype=torch.uint8).share_memory_()
        self.found = multiprocessing.Value("q", 0)  # bad images as they were found
        self.reading = torch.full((256,), -1, dtype=torch.long).share_memory_()  # by each worker
        self.told, self.unreadable = 0, set()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, int, int]:
        """Image, label and number of image `index`, or of the one that replaces it."""
        worker = get_worker_info()
        place = worker.id % len(self.reading) if worker else 0
        while True:
            if not self.limit or not self.bad[index]:
                self.reading[place] = index
                try:
                    found = self.dataset[index]
                    self.reading[place] = -1
                    return (*found[:2], index)
                except UserError as error:
                    if not self.limit:
                        raise
                    self.bad[index] = 1
                    with self.found.get_lock():
                        self.found.value += 1
                    if self._too_many(self.bad.sum()):
                        raise UserError(f"{error}; --skip-bad-images {self.limit} allows no more") from error
            index = (index + 1) % len(self.dataset)

    def found_unreadable(self) -> bool:
        """Whether a bad image has been found here since `share_unreadable`."""
        return self.found.value != self.told

    def share_unreadable(self) -> None:
        """Tell all processes the bad images of each. Every process must call this, see `agreement.Due`.

        Raises UserError if they are too many together.
        """
        self.told = self.found.value
        found = set().union(*distributed.from_all(self.bad.nonzero().flatten().tolist()))
        for index in sorted(found - self.unreadable):
            distributed.warn(f"{self.dataset.where(index)}: cannot be read; the next image takes its place")
        self.mark_unreadable(found)

    def mark_unreadable(self, indices: Iterable[int]) -> None:
        """Take these numbers for those of bad images. Raises UserError if they are too many."""
        self.unreadable |= set(indices)
        if self._too_many(len(self.unreadable)):
            names = ", ".join(self.dataset.where(index) for index in sorted(self.unreadable)[:3])
            raise UserError(
                f"{len(self.unreadable)} images cannot be read, such as {names}; --skip-bad-images {self.limit}"
            )
        if self.unreadable:
            self.bad[list(self.unreadable)] = 1

    def _too_many(self, count):
        """Whether so many bad images end the run: more than `limit`, or all there are."""
        return count > self.limit or count >= len(self.dataset)

    def report_unreadable(self) -> None:
        """Say which images were replaced, if any. Every process must call this."""
        if self.limit:
            self.share_unreadable()  # what was found in the last step, or by an evaluation after it
        if self.unreadable:
            names = ", ".join(self.dataset.where(index) for index in sorted(self.unreadable))
            distributed.say(f"{len(self.unreadable)} images could not be read and were replaced: {names}")

    def being_read(self) -> list[str]:
        """The paths of the images that the workers are reading, or were when they ended."""
        return [self.dataset.where(index) for index in self.reading.tolist() if index >= 0]


class Readable(Dataset):
    """A data set under its own transform, for evaluation, with the replacements of a `Reader` of the same images."""

    def __init__(self, dataset: Dataset, reader: Reader) -> None:
        self.reader = copy.copy(reader)  # the same shared memory
        self.reader.dataset, self.transform = dataset, dataset.transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.reader.read(index)[:2]


class Augmented(Dataset):
    """One augmented view of each image and its label, drawn from (seed, epoch, image index).

    dataset: a `Reader`, or items (PIL image, label); keys are pairs (epoch, index), as `EpochSampler` gives them.
    Items: image (3, H, W), label.
    """

    def __init__(self, dataset: Reader | Dataset, transform: Callable, seed: int) -> None:
        self.reader = dataset if isinstance(dataset, Reader) else Reader(dataset)
        self.dataset, self.transform, self.seed = self.reader.dataset, transform, seed

    views = 1  # of an image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        image, label, _ = self.reader.read(index)
        with _drawing(self.seed, epoch, index):
            return self.transform(image), label


class TwoCrops(Augmented):
    """Two augmented views of each image. Items: im_q (3, H, W), im_k (3, H, W), index of the image that was read."""

    views = 2

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int]:
        epoch, index = key
        image, _, read = self.reader.read(index)
        with _drawing(self.seed, epoch, index):
            return self.transform(image), self.transform(image), read


ORDER = 2  # the rule by which a new run draws the order of an epoch, see `EpochSampler`


class EpochSampler(Sampler):
    """This process's part of an epoch's permutation, as keys (epoch, index): workers that live on learn the epoch.

    The permutation is a function of (seed, epoch). keep_last: the images that do not divide among the processes are
    kept, too, and the first ones of the permutation once more, so that all processes have as many; else left out.
    order: 1 draws from seed + epoch, as runs did that go on: seed 0's epoch 1 is then seed 1's epoch 0.
    """

    def __init__(self, count: int, process: Process, *, seed: int, keep_last: bool = False, order: int = ORDER) -> None:
        self.count, self.process, self.seed, self.order, self.epoch = count, process, seed, order, 0
        self.length = (count + keep_last * (process.world_size - 1)) // process.world_size

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seed = self.seed + self.epoch if self.order == 1 else distributed.seed_of("order", self.seed, self.epoch)
        permutation = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        step = self.process.world_size
        places = torch.arange(self.length) * step + self.process.rank
        for part in places.split(1 << 16):  # a list of all of a data set's numbers takes ten times a tensor's memory
            for index in permutation[part % self.count].tolist():
                yield self.epoch, index


class Batches(BatchSampler):
    """A sampler's keys in batches, from batch `start` of the epoch on; the length is the whole epoch's.

    Each batch of all processes together is the next part of the epoch's permutation, so another number of processes
    with batches of the same total goes on with the images that are left.
    """

    start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Which epoch the next iteration is of, and how many of its batches are left out."""
        self.sampler.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[list]:
        return itertools.islice(self.whole_epoch(), self.start, None)

    def whole_epoch(self) -> Iterator[list]:
        """All batches of the epoch."""
        return super().__iter__()


class WholeBatches(Batches):
    """All keys of a sampler in batches, the last one smaller; a single key left over joins the batch before.

    In train mode BatchNorm cannot take one image by itself.
    """

    def __init__(self, sampler: Collection, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 1 or full == 0)

    def whole_epoch(self) -> Iterator[list]:
        """The batches of an epoch, without a last one of a single image."""
        keys = iter(self.sampler)
        for _ in range(len(self) - 1):
            yield list(itertools.islice(keys, self.batch_size))
        yield list(keys)


def workers_each(total: int | None, local_size: int) -> int:
    """Loading workers of one process of `local_size`, from those of the node, capped at its CPUs; None: its CPUs.

    Those are its `distributed.cpu_share`, so every process must call this.
    """
    share = distributed.cpu_share()
    return math.ceil(share if total is None else min(Fraction(total, local_size), share))


def batch_each(total: int, local_size: int) -> int:
    """Images a step of one process of `local_size`, from those of the node. Raises UserError if that is no number."""
    batch, rest = divmod(total, local_size)
    if rest or not batch:
        raise UserError(f"--batch-size {total} is not divisible by a node's {local_size} processes")
    return batch


def train_loader(
    dataset: Augmented,
    batch_size: int,
    *,
    process: Process,
    workers: int,
    seed: int,
    keep_last: bool = False,
    timeout: int = 0,
    order: int = ORDER,
) -> Loader:
    """Shuffled batches of `batch_size` for this process; call `.batch_sampler.set_epoch` first.

    Without keep_last the incomplete last batch is left out, and the images that do not divide among the processes.
    With it every image is seen (see `WholeBatches`); up to one a process twice, so that all processes have as many.
    timeout: seconds to wait for a batch, 0: for ever; order: the rule of the epochs' order, see `EpochSampler`.
    """
    sampler = EpochSampler(len(dataset), process, seed=seed, keep_last=keep_last, order=order)
    batches = WholeBatches(sampler, batch_size) if keep_last else Batches(sampler, batch_size, drop_last=True)
    more = {"batch_sampler": batches, "persistent_workers": workers > 0}
    size = batch_size * dataset.views * _bytes_of_view(dataset.transform)
    return Loader(dataset, process=process, workers=workers, batch_bytes=size, timeout=timeout, **more)


def _bytes_of_view(transform):
    """What a view of any image takes: of a blank one, as all have the same size."""
    with torch.random.fork_rng(devices=[]):
        return bytes_of(transform(Image.new("RGB", (16, 16))))


def paths_of(batches: Loader, epoch: int, i: int) -> list[list[str]]:
    """The paths of the images of step i of an epoch, in every process, by rank; `batches` then stands there."""
    batches.batch_sampler.set_epoch(epoch, i)
    keys = next(iter(batches.batch_sampler))
    return distributed.from_all([batches.dataset.dataset.where(index) for _, index in keys])


def eval_loader(dataset: Dataset, batch_size: int, *, process: Process, workers: int, timeout: int = 0) -> Loader:
    """This process's share of a data set in order: every image in exactly one process, the last batch kept."""
    share = Subset(dataset, range(process.rank, len(dataset), process.world_size))
    transform = getattr(dataset, "transform", None)
    size = batch_size * _bytes_of_view(transform) if transform else 0
    return Loader(share, batch_size=batch_size, process=process, workers=workers, batch_bytes=size, timeout=timeout)
