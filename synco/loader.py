"""Images: reading, augmentation, two crops, samplers and loaders.

Every draw is a function of (seed, epoch, image index), so neither the number of workers nor what ran before matters.
"""

import contextlib
import math

import torch
from PIL import Image, ImageFilter
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from synco import distributed
from synco.options import STATS, UserError, usable_cpus


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


class Augmented(Dataset):
    """One augmented view of each image and its label, drawn from (seed, epoch, image index).

    dataset: items (PIL image, label); keys are pairs (epoch, index), as `EpochSampler` gives them.
    Items: image (3, H, W), label.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.dataset[index]
        with _drawing(self.seed, epoch, index):
            return self.transform(image), label


class TwoCrops(Augmented):
    """Two augmented views of each image. Items: im_q (3, H, W), im_k (3, H, W), index."""

    def __getitem__(self, key):
        epoch, index = key
        image, _ = self.dataset[index]
        with _drawing(self.seed, epoch, index):
            return self.transform(image), self.transform(image), index


class EpochSampler(DistributedSampler):
    """This process's part of an epoch's permutation, as keys (epoch, index): workers that live on learn the epoch."""

    def __iter__(self):
        return ((self.epoch, index) for index in super().__iter__())


class WholeBatches(BatchSampler):
    """All keys of a sampler in batches, the last one smaller; a single key left over joins the batch before.

    In train mode BatchNorm cannot take one image by itself.
    """

    def __init__(self, sampler, batch_size):
        super().__init__(sampler, batch_size, drop_last=False)

    def __len__(self):
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 1 or full == 0)

    def __iter__(self):
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


def train_loader(dataset, batch_size, *, process, workers, seed, keep_last=False):
    """Shuffled batches of `batch_size` for this process; call `.batch_sampler.sampler.set_epoch` first.

    Without keep_last the incomplete last batch is left out, and the images that do not divide among the processes.
    With it every image is seen (see `WholeBatches`); up to one a process twice, so that all processes have as many.
    """
    sampler = EpochSampler(dataset, process.world_size, process.rank, shuffle=True, seed=seed, drop_last=not keep_last)
    batches = WholeBatches(sampler, batch_size) if keep_last else BatchSampler(sampler, batch_size, drop_last=True)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=process.device.type == "cuda",
    )


def eval_loader(dataset, batch_size, *, process, workers):
    """This process's share of a data set in order: every image in exactly one process, the last batch kept."""
    share = Subset(dataset, range(process.rank, len(dataset), process.world_size))
    return DataLoader(share, batch_size, num_workers=workers, pin_memory=process.device.type == "cuda")
