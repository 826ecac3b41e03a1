"""Images: reading, augmentation, two crops, samplers and loaders.

Every draw is a function of (seed, epoch, image index), so neither the number of workers nor what ran before matters.
"""

import contextlib
import copy
import functools
import itertools
import math
import multiprocessing
import os
import sys

import torch
from PIL import Image, ImageFilter
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, get_worker_info
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from synco import distributed, survival
from synco.options import STATS, Failure, UserError, usable_cpus


def read_image(path):
    """The image in a file, as RGB. Raises UserError that names a file which cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # what PIL's decoders raise on damaged or hostile files
    except (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from error


class GaussianBlur:
    """PIL's Gaussian blur with a radius (its σ, in pixels) drawn uniformly from a range, as in SimCLR."""

    def __init__(self, low=0.1, high=2.0):
        self.low, self.high = low, high

    def __call__(self, image):
        radius = torch.empty(1).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def to_tensor(stats="imagenet"):
    """PIL image → float tensor (3, H, W), normalised with the `options.STATS` of that name."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(*STATS[stats])])


def augmentation(size, kind="v2", *, blur=False, crop_scale=None, stats="imagenet"):
    """The augmentation of one view. PIL image → (3, size, size).

    kind: MoCo's "v2" (arXiv 2003.04297) or "v1" (arXiv 1911.05722), or "heavy", with RandAugment and random erasing,
    of a published MoCHi trainer. Below 64 pixels the blur of "v2" and "heavy" is left out, as in MoCo's recipe for
    CIFAR-10, unless `blur` asks for it.
    crop_scale: least and greatest part of the image's area in a crop; None: (0.2, 1), of "heavy" (0.5, 1).
    """
    crop = transforms.RandomResizedCrop(
        size,
        scale=crop_scale or ((0.5, 1.0) if kind == "heavy" else (0.2, 1.0)),
        interpolation=InterpolationMode.BICUBIC if kind == "heavy" else InterpolationMode.BILINEAR,
    )
    flip = transforms.RandomHorizontalFlip()
    blurs = [transforms.RandomApply([GaussianBlur()], p=0.5)] if blur or size >= 64 else []
    if kind == "heavy":
        operations = transforms.RandAugment(num_ops=2, magnitude=9)
        erasing = transforms.RandomErasing(p=0.25)
        return transforms.Compose([crop, flip, operations, *blurs, to_tensor(stats), erasing])
    grayscale = transforms.RandomGrayscale(p=0.2)
    if kind == "v2":
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        return transforms.Compose([crop, jitter, grayscale, *blurs, flip, to_tensor(stats)])
    return transforms.Compose([crop, grayscale, transforms.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, to_tensor(stats)])


def classifier_augmentation(size, stats="imagenet"):
    """A training view of the linear probe and of fine-tuning: a random crop and flip. PIL image → (3, size, size)."""
    crop, flip = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, to_tensor(stats)])


def center_view(size, stats="imagenet"):
    """The centre of an image: resized to 256/224 of `size` (below 64 pixels to `size`), centre-cropped.

    PIL image → (3, size, size).
    """
    resized = size if size < 64 else round(size * 256 / 224)
    return transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size), to_tensor(stats)])


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

    def __init__(self, dataset, limit=0):
        self.dataset, self.limit = dataset, limit
        self.bad = torch.zeros(len(dataset) if limit else 0, dtype=torch.uint8).share_memory_()
        self.found = multiprocessing.Value("q", 0)  # bad images as they were found
        self.reading = torch.full((256,), -1, dtype=torch.long).share_memory_()  # by each worker
        self.told, self.known = 0, set()

    def __len__(self):
        return len(self.dataset)

    def read(self, index):
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

    def news(self):
        """Whether a bad image has been found here since `exchange`."""
        return self.found.value != self.told

    def exchange(self):
        """Tell all processes the bad images of each. Every process must call this, see `survival.Saves`.

        Raises UserError if they are too many together.
        """
        self.told = self.found.value
        found = set().union(*distributed.from_all(self.bad.nonzero().flatten().tolist()))
        for index in sorted(found - self.known):
            distributed.warn(f"{name_of(self.dataset, index)}: cannot be read; the next image takes its place")
        self.learn(found)

    def learn(self, found):
        """Take these numbers for those of bad images. Raises UserError if they are too many."""
        self.known |= set(found)
        if self._too_many(len(self.known)):
            names = ", ".join(name_of(self.dataset, index) for index in sorted(self.known)[:3])
            raise UserError(f"{len(self.known)} images cannot be read, such as {names}; --skip-bad-images {self.limit}")
        if self.known:
            self.bad[list(self.known)] = 1

    def _too_many(self, count):
        """Whether so many bad images end the run: more than `limit`, or all there are."""
        return count > self.limit or count >= len(self.dataset)

    def tell(self):
        """Say which images were replaced, if any. Every process must call this."""
        if self.limit:
            self.exchange()  # what was found in the last step, or by an evaluation after it
        if self.known:
            names = ", ".join(name_of(self.dataset, index) for index in sorted(self.known))
            distributed.say(f"{len(self.known)} images could not be read and were replaced: {names}")

    @contextlib.contextmanager
    def watched(self):
        """Around the training on these images: a loading worker that dies or is stuck becomes a `Failure` that says at
        which files."""
        try:
            yield
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            survival.end_workers()
            busy = [name_of(self.dataset, index) for index in self.reading.tolist() if index >= 0]
            why = str(error).strip().splitlines()[0].rstrip(". ")
            at = f"; the workers were reading {', '.join(busy[:4])}" if busy else ""
            raise Failure(f"{why}{at}; the run can go on from its last checkpoint") from error


def name_of(dataset, index):
    """The path of one of the `datasets.Images`, or its name where it has no file of its own."""
    return dataset.file(index) or f"{dataset.root}: {dataset.names[index]}"


class Readable(Dataset):
    """A data set under its own transform, for evaluation, with the replacements of a `Reader` of the same images."""

    def __init__(self, dataset, reader):
        self.reader = copy.copy(reader)  # the same shared memory
        self.reader.dataset = dataset

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        return self.reader.read(index)[:2]


class Augmented(Dataset):
    """One augmented view of each image and its label, drawn from (seed, epoch, image index).

    dataset: a `Reader`, or items (PIL image, label); keys are pairs (epoch, index), as `EpochSampler` gives them.
    Items: image (3, H, W), label.
    """

    def __init__(self, dataset, transform, seed):
        self.reader = dataset if isinstance(dataset, Reader) else Reader(dataset)
        self.dataset, self.transform, self.seed = self.reader.dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        image, label, _ = self.reader.read(index)
        with _drawing(self.seed, epoch, index):
            return self.transform(image), label


class TwoCrops(Augmented):
    """Two augmented views of each image. Items: im_q (3, H, W), im_k (3, H, W), index of the image that was read."""

    def __getitem__(self, key):
        epoch, index = key
        image, _, read = self.reader.read(index)
        with _drawing(self.seed, epoch, index):
            return self.transform(image), self.transform(image), read


class EpochSampler(DistributedSampler):
    """This process's part of an epoch's permutation, as keys (epoch, index): workers that live on learn the epoch."""

    def __iter__(self):
        return ((self.epoch, index) for index in super().__iter__())


class Batches(BatchSampler):
    """A sampler's keys in batches, from batch `start` of the epoch on; the length is the whole epoch's.

    Each batch of all processes together is the next part of the epoch's permutation, so another number of processes
    with batches of the same total goes on with the images that are left.
    """

    start = 0

    def set_epoch(self, epoch, start=0):
        """Which epoch the next iteration is of, and how many of its batches are left out."""
        self.sampler.set_epoch(epoch)
        self.start = start

    def __iter__(self):
        return itertools.islice(self.whole_epoch(), self.start, None)

    def whole_epoch(self):
        """All batches of the epoch."""
        return super().__iter__()


class WholeBatches(Batches):
    """All keys of a sampler in batches, the last one smaller; a single key left over joins the batch before.

    In train mode BatchNorm cannot take one image by itself.
    """

    def __init__(self, sampler, batch_size):
        super().__init__(sampler, batch_size, drop_last=False)

    def __len__(self):
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 1 or full == 0)

    def whole_epoch(self):
        keys, count = list(self.sampler), len(self)
        for i in range(count):
            yield keys[i * self.batch_size : (i + 1) * self.batch_size if i < count - 1 else None]


def workers_each(total, local_size):
    """Loading workers of one process of `local_size`, from those of the node, capped at its CPUs."""
    return math.ceil(min(total, usable_cpus()) / local_size)


def batch_each(total, local_size):
    """Images a step of one process of `local_size`, from those of the node. Raises UserError if that is no number."""
    batch, rest = divmod(total, local_size)
    if rest or not batch:
        raise UserError(f"--batch-size {total} is not divisible by a node's {local_size} processes")
    return batch


class Loader(DataLoader):
    """A DataLoader whose workers no warning ends, see `survival.held_back`."""

    def __init__(self, dataset, *, process, workers, timeout, **settings):
        super().__init__(
            dataset,
            num_workers=workers,
            pin_memory=process.device.type == "cuda",
            timeout=timeout if workers else 0,
            worker_init_fn=functools.partial(survival.worker_of, os.getpid()),
            # a spawned process and Python 3.14 have other defaults; so a worker starts at once, and its parent is this
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            **settings,
        )

    def __iter__(self):
        with survival.held_back() if self.num_workers else contextlib.nullcontext():
            return super().__iter__()


def train_loader(dataset, batch_size, *, process, workers, seed, keep_last=False, timeout=0):
    """Shuffled batches of `batch_size` for this process; call `.batch_sampler.set_epoch` first.

    Without keep_last the incomplete last batch is left out, and the images that do not divide among the processes.
    With it every image is seen (see `WholeBatches`); up to one a process twice, so that all processes have as many.
    timeout: seconds to wait for a batch, 0: for ever.
    """
    sampler = EpochSampler(dataset, process.world_size, process.rank, shuffle=True, seed=seed, drop_last=not keep_last)
    batches = WholeBatches(sampler, batch_size) if keep_last else Batches(sampler, batch_size, drop_last=True)
    more = {"batch_sampler": batches, "persistent_workers": workers > 0}
    return Loader(dataset, process=process, workers=workers, timeout=timeout, **more)


def images_of(batches, epoch, i):
    """The paths of the images of step i of an epoch, in every process, by rank; `batches` then stands there."""
    batches.batch_sampler.set_epoch(epoch, i)
    keys = next(iter(batches.batch_sampler))
    return distributed.from_all([name_of(batches.dataset.dataset, index) for _, index in keys])


def eval_loader(dataset, batch_size, *, process, workers, timeout=0):
    """This process's share of a data set in order: every image in exactly one process, the last batch kept."""
    share = Subset(dataset, range(process.rank, len(dataset), process.world_size))
    return Loader(share, batch_size=batch_size, process=process, workers=workers, timeout=timeout)
