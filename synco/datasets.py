"""Data sets: images of one's own in any layout, or one of torchvision's by name, all as `Images`."""

import argparse
import copy
import http.client
import lzma
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from synco import decode, distributed, imagenet, layouts, options, parts, records, tars
from synco.decode import unreadable_named
from synco.errors import UserError

IMAGENETTE = "imagenette2-320"  # the folder of the version whose shorter sides have 320 pixels
# what torchvision's data sets raise on archives and folders that are missing, damaged or cannot be fetched
BROKEN = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError, tarfile.TarError,
    zlib.error, lzma.LZMAError, http.client.HTTPException,
)  # fmt: skip


class Images(Dataset):
    """The labelled images of one split. Items: image (PIL, or what `transform` makes of it), label.

    root: where they are, for messages; classes: their names; names: "class/file" of each image, without repetition,
    any sequence; targets: the label of each, any sequence; read: a picklable callable, number of an image → PIL image.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        classes: Iterable[str],
        names: Sequence[str],
        targets: Sequence[int],
        read: Callable[[int], Image.Image | torch.Tensor],
    ) -> None:
        self.root, self.classes, self.names, self.targets = str(root), list(classes), names, targets
        self.transform = None
        self._read, self._numbers = read, range(len(names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image = self.image(position)
        return image if self.transform is None else self.transform(image), self.targets[position]

    def image(self, position: int) -> Image.Image | torch.Tensor:
        """The image as PIL reads it. Raises UserError that names a file which cannot be read."""
        return self._read(self._numbers[position])

    def subset(self, positions: Iterable[int]) -> "Images":
        """Those images alone, in that order, with all the classes."""
        part = copy.copy(self)
        part.names = [self.names[i] for i in positions]
        part.targets = [int(self.targets[i]) for i in positions]
        part._numbers = [self._numbers[i] for i in positions]
        return part

    def checksum(self) -> int:
        """CRC-32 of the images' names and their order; it says nothing of the files' contents."""
        if isinstance(self.names, records.Index):  # of a million names, in no time
            return self.names.checksum()
        return zlib.crc32("\0".join(self.names).encode(errors="surrogateescape"))

    def with_transform(self, transform: Callable) -> "Images":
        """The same images through that transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def as_uint8(self) -> "Images":
        """The same images as uint8 tensors (3, H, W), as far as they are encoded somewhere."""
        other = copy.copy(self)
        if self.has_bytes():
            other._read = copy.copy(self._read)
            other._read.decode = decode.read_uint8
        return other

    def where(self, position: int) -> str:
        """What messages call an image: its path, or that of a tar file or of the data set with its name."""
        number = self._numbers[position]
        return self._read.where(number) if self.has_bytes() else f"{self.root}: {self.names[position]}"

    def has_bytes(self) -> bool:
        """Whether the images are encoded somewhere, in files of their own or in others."""
        return isinstance(self._read, _Stored)

    def read_by(self, read: Callable[[int], Image.Image]) -> None:
        """Have the images read by another function, of their position here."""
        self._read, self._numbers = read, range(len(self))

    def file(self, position: int) -> str | None:
        """The path of the file that an image lies in, by itself or in a tar file; None where there is none."""
        return self._read.index.place(self._numbers[position]).path if self.has_bytes() else None

    def content(self, position: int) -> bytes:
        """An image's bytes, where it has some. Raises UserError that names a file which cannot be read."""
        return self._read.content(self._numbers[position])


class _Stored:
    """Reads the images of an index where they lie; says once if images of more than 8 bits are among them.

    decode: the function of (a file's bytes, its name for messages, what to call of an image of more than 8 bits).
    """

    def __init__(self, index, decode=decode.read_image):
        self.index, self.decode = index, decode
        self.said = torch.zeros(1, dtype=torch.bool).share_memory_()  # by any worker
        self.tars = tars.Reader()

    def where(self, number):
        """What messages call image `number`: the path of its file, or a tar file's with its own name."""
        place = self.index.place(number)
        return place.path if place.count is None else f"{place.path}: {self.index[number]}"

    def content(self, number):
        """The bytes of image `number`. Raises UserError that names a file which cannot be read."""
        place = self.index.place(number)
        if place.count is None:
            return decode.content_of(place.path)
        with unreadable_named(self.where(number)):
            return self.tars.read(place)

    def __call__(self, number):
        return self.decode(self.content(number), self.where(number), self._say_scaled)

    def _say_scaled(self, name):
        if not self.said:
            self.said[0] = True
            distributed.warn(f"{name}: has more than 8 bits a pixel; it and its like are scaled to 8 (decode.to_rgb)")


class _Arrays:
    """Reads the images of one of torchvision's data sets that are in memory."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, number):
        return self.dataset[number][0].convert("RGB")


# ------------------------------------------------------------------------------------------------------ opening them


def fetch(args: argparse.Namespace, process: distributed.Process) -> None:
    """Download the data set that --dataset names, where --download asks for it.

    Rank 0 does, and then one process of each other node, which finds it there where the nodes share DATA.
    Raises UserError if that fails. Every process must call this.
    """
    if not args.download:
        return
    for turn in (process.rank == 0, process.rank > 0 and process.local_rank == 0):
        for split in ("pretrain", "train", "val") if turn else ():
            try:
                _torchvision(args, split, download=True)
            except BROKEN as error:
                raise UserError(f"--dataset {args.dataset} --download: {_why(error)}") from error
        distributed.barrier()


def load(args: argparse.Namespace, split: str, *, labelled: bool | None = None) -> Images:
    """The images of a split, "train", "val" or "pretrain", as far as --limit-images lets them → Images.

    "pretrain" is "train" but for STL-10, whose unlabelled images it is. With --hold-out N, "val" is N of the training
    images, which the others then lack: for choosing settings without a look at the images that are reported.
    labelled: whether the images must have labels; None: all but "pretrain" must.
    Raises UserError where the data set is missing or damaged, or has no N images to spare.
    """
    source = "train" if args.hold_out and split == "val" else split
    labelled = split != "pretrain" if labelled is None else labelled
    if args.dataset in options.LAYOUTS:
        images = stored(_find(args, "val" if source == "val" else "train", labelled))
    else:
        images = _named(args, source)
    if args.hold_out and not (split == "pretrain" and args.dataset == "stl10"):  # whose unlabelled images are others
        images = parts.held_out(images, split == "val", args.hold_out, args.split_seed)
    return parts.limited(images, args.limit_images, args.split_seed) if args.limit_images else images


def _find(args, split, labelled):
    """The index of a split's images in the layout that the flags name. labelled: whether labels are needed."""
    lists = {"train": args.train_list, "val": args.val_list}
    try:
        if lists[split]:
            found = layouts.listed(args.data, split, lists.pop(split), *lists.values())
        elif args.dataset == "imagenet":
            found = imagenet.find(args.data, split)
        elif args.dataset == "shards":
            found = layouts.shards(args.data, split)
        else:
            found = layouts.folder(args.data, split, labelled)
    except OSError as error:  # a folder that may not be listed
        raise UserError(f"{error.filename or args.data}: cannot be read ({error.strerror})") from error
    if not found.labelled:
        if labelled:
            raise UserError(f"{found.root}: its {split} images have no labels, which kNN, probes and maps need")
        distributed.say(f"{'images':18} {len(found)} in {found.root}, without labels")
    return found


def stored(places: records.Index) -> Images:
    """The images of an index, read where they lie."""
    return Images(places.root, places.classes, places, places.targets(), _Stored(places))


def image_folder(root: str | os.PathLike, split: str) -> Images:
    """The images under root/split/CLASS/ → Images. Raises UserError where a folder or the images are missing."""
    return stored(layouts.folder(os.fspath(root), split))


def same_classes(train: Images, val: Images, root: str | os.PathLike) -> None:
    """Raise UserError that lists the classes which only one of two `Images` under `root` has, or if one has none."""
    for images in (train, val):
        if not images.classes:
            raise UserError(f"{images.root}: its images have no labels, which kNN, probes and maps need")
    one_sided = [(name, "train") for name in set(train.classes) - set(val.classes)]
    one_sided += [(name, "val") for name in set(val.classes) - set(train.classes)]
    if one_sided:
        named = ", ".join(f"{name} (in {split} only)" for name, split in sorted(one_sided)[:5])
        more = f" and {len(one_sided) - 5} more" if len(one_sided) > 5 else ""
        raise UserError(f"{root}: train and val hold different classes: {named}{more}")


def _torchvision(args, split, download):
    """One of torchvision's data sets; whether it is there whole is torchvision's to say."""
    sets, root = torchvision.datasets, args.data
    if args.dataset in ("cifar10", "cifar100"):
        make = sets.CIFAR10 if args.dataset == "cifar10" else sets.CIFAR100
        return make(root, train=split != "val", download=download)
    if args.dataset == "stl10":
        return sets.STL10(root, {"pretrain": "unlabeled", "train": "train", "val": "test"}[split], download=download)
    if args.dataset == "imagenette":
        # some versions refuse to download what is there
        download = download and not os.path.isdir(os.path.join(root, IMAGENETTE))
        return sets.Imagenette(root, "val" if split == "val" else "train", "320px", download=download)
    if not download and not os.path.isdir(os.path.join(root, "caltech256")):
        raise RuntimeError("not found")  # torchvision's class would make the folder
    return sets.Caltech256(root, download=download)


def _named(args, split):
    """A split of one of torchvision's data sets → Images."""
    name, root = args.dataset, args.data
    try:
        found = _torchvision(args, split, download=False)
    except BROKEN as error:
        raise UserError(
            f"--dataset {name}: {root} does not hold it, or not whole ({_why(error)}); --download fetches it"
        ) from error
    if name == "imagenette":
        images = image_folder(os.path.join(root, IMAGENETTE), "val" if split == "val" else "train")
        _count(args, images, 3925 if split == "val" else 9469)
        return images
    if name == "caltech256":
        folder = os.path.join(found.root, "256_ObjectCategories")
        names = [f"{found.categories[y]}/{y + 1:03}_{i:04}.jpg" for y, i in zip(found.y, found.index)]
        places = records.of_names(folder, names)  # in the same order
        images = Images(folder, found.categories, names, list(found.y), _Stored(places))
        _count(args, images, 30607)
        return parts.fifth(images, split == "val", args.split_seed)
    if split == "pretrain" and name == "stl10":
        classes, targets = ["unlabeled"], [0] * len(found)
    else:
        classes = found.classes
        targets = [int(label) for label in (found.labels if name == "stl10" else found.targets)]
    names = [f"{classes[label]}/{i:06}" for i, label in enumerate(targets)]
    return Images(root, classes, names, targets, _Arrays(found))


def _why(error):
    """The first line of torchvision's error, without its advice on its own arguments."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(" You can use download=True")[0].rstrip(".")


def _count(args, images, wanted):
    """Warn of a folder that lacks images: what a download that was cut short leaves."""
    if len(images) < wanted:
        remedy = "to fetch it whole, remove it and give --download"
        distributed.warn(f"--dataset {args.dataset}: {images.root} holds {len(images)} of {wanted} images; {remedy}")
