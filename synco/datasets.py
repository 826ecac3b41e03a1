"""Data sets: a folder in ImageNet's layout, or one of torchvision's by name, all as `Images`."""

import argparse
import collections
import concurrent.futures
import copy
import hashlib
import http.client
import lzma
import os
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from synco import decode, distributed, index
from synco.decode import open_image, unreadable_named
from synco.distributed import usable_cpus
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
    ):
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
        if isinstance(self.names, index.Index):  # of a million names, in no time
            return self.names.checksum()
        return zlib.crc32("\0".join(self.names).encode(errors="surrogateescape"))

    def with_transform(self, transform: Callable) -> "Images":
        """The same images through that transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def as_uint8(self) -> "Images":
        """The same images as uint8 tensors (3, H, W), as far as they lie in files of their own."""
        other = copy.copy(self)
        if isinstance(self._read, _Files):
            other._read = copy.copy(self._read)
            other._read.decode = decode.read_uint8
        return other

    def file(self, position: int) -> str | None:
        """The path of an image's file, None where images do not lie in files of their own."""
        path = getattr(self._read, "path", None)
        return path(self._numbers[position]) if path else None


class _Files:
    """Reads the images of a folder by their names in it; says once if images of more than 8 bits are among them.

    decode: the function of (a file's bytes, its name for messages, what to call of an image of more than 8 bits).
    """

    def __init__(self, folder, names, decode=decode.read_image):
        self.folder, self.names, self.decode = folder, names, decode
        self.said = torch.zeros(1, dtype=torch.bool).share_memory_()  # by any worker

    def path(self, number):
        """The file of image `number`."""
        return os.path.join(self.folder, self.names[number])

    def __call__(self, number):
        path = self.path(number)
        return self.decode(decode.content_of(path), path, self._say_scaled)

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


class _Cached:
    """Reads images from one tensor that holds their pixels: worker processes share it without a copy."""

    def __init__(self, pixels, starts, sizes, errors):
        self.pixels, self.starts, self.sizes, self.errors = pixels, starts, sizes, errors

    def __call__(self, number):
        if number in self.errors:
            raise UserError(self.errors[number])
        width, height = self.sizes[number].tolist()
        start = self.starts[number]
        return Image.fromarray(self.pixels[start : start + 3 * width * height].view(height, width, 3).numpy())


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


def load(args: argparse.Namespace, split: str) -> Images:
    """The images of a split, "train", "val" or "pretrain", as far as --limit-images lets them → Images.

    "pretrain" is "train" but for STL-10, whose unlabelled images it is. With --hold-out N, "val" is N of the training
    images, which the others then lack: for choosing settings without a look at the images that are reported.
    Raises UserError where the data set is missing or damaged, or has no N images to spare.
    """
    source = "train" if args.hold_out and split == "val" else split
    if args.dataset == "imagefolder":
        images = image_folder(args.data, "train" if source == "pretrain" else source)
    else:
        images = _named(args, source)
    if args.hold_out and not (split == "pretrain" and args.dataset == "stl10"):  # whose unlabelled images are others
        images = _held_out(images, split == "val", args.hold_out, args.split_seed)
    return limited(images, args.limit_images, args.split_seed) if args.limit_images else images


def image_folder(root: str | os.PathLike, split: str) -> Images:
    """The images under root/split/CLASS/ → Images. Raises UserError where a folder or the images are missing."""
    root = os.fspath(root)
    folder = os.path.join(root, split)
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; it should hold {split}/CLASS/IMAGE")
    if not os.path.isdir(folder):
        raise UserError(f"{root}: has no folder {split!r} in it; it should hold {split}/CLASS/IMAGE")
    names = index.open_index(folder)
    return Images(folder, names.classes, names, names.targets(), _Files(folder, names))


def same_classes(train: Images, val: Images, root: str | os.PathLike) -> None:
    """Raise UserError that lists the classes which only one of two `Images` under `root` has."""
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
        images = Images(folder, found.categories, names, list(found.y), _Files(folder, names))
        _count(args, images, 30607)
        return _fifth(images, split == "val", args.split_seed)
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


# ------------------------------------------------------------------------------------------------------ parts of them


def by_class(images: Images, purpose: str) -> list[list[int]]:
    """The positions of each class's images, [[...], ...], in an order that `purpose` and the names alone determine."""
    of_class = collections.defaultdict(list)
    for position, label in enumerate(images.targets):
        of_class[label].append(position)

    def key(position):
        return hashlib.sha256(os.fsencode(f"{purpose}/{images.names[position]}")).digest()

    return [sorted(of_class[label], key=key) for label in sorted(of_class)]


def _fifth(images, val, seed):
    """A fifth of every class, which is Caltech-256's val here, or all the others."""
    chosen = []
    for positions in by_class(images, f"{seed}/val"):
        count = round(len(positions) / 5)
        chosen += positions[:count] if val else positions[count:]
    return images.subset(sorted(chosen))


def _held_out(images, val, count, seed):
    """`count` of the images, class-balanced, or all the others."""
    if count >= len(images):
        raise UserError(f"--hold-out {count}: {images.root} has {len(images)} images to train on and hold out of")
    chosen = _in_turn(images, f"{seed}/hold-out")[:count]
    return images.subset(sorted(chosen if val else set(range(len(images))) - set(chosen)))


def limited(images: Images, count: int, seed: int) -> Images:
    """The first `count` images of a class-balanced order that is drawn from `seed`: one of each class in turn.

    A smaller count gives a part of what a larger one gives. Of fewer images, all.
    """
    return images.subset(sorted(_in_turn(images, f"{seed}/limit")[:count]))


def _in_turn(images, purpose):
    """All positions, one of each class in turn, as `by_class` orders them."""
    orders = by_class(images, purpose)
    turns = sorted((turn, label) for label, positions in enumerate(orders) for turn in range(len(positions)))
    return [orders[label][turn] for turn, label in turns]


# ------------------------------------------------------------------------------------------------------ in memory


def cache(splits: Iterable[Images], local_size: int, tolerant: bool = False) -> None:
    """Keep the decoded pixels of these `Images` in memory, one copy for each of a node's processes.

    tolerant: an image that cannot be read is no error before it is asked for.
    Says how much that is. Raises UserError, before it reads them, if more than nine tenths of the free memory.
    """

    def size_of(path):
        try:
            return _size(decode.content_of(path), path)
        except UserError:
            if not tolerant:
                raise
            return 0, 0

    splits = [images for images in splits if isinstance(images._read, _Files)]
    if not splits:
        distributed.say(f"{'cached images':18} all, as this data set always is")
        return
    with concurrent.futures.ThreadPoolExecutor(usable_cpus()) as pool:  # PIL decodes without Python's lock
        sizes = [np.array(list(pool.map(size_of, map(images.file, range(len(images)))))) for images in splits]
        needed = sum(3 * int(size.prod(axis=1).sum()) for size in sizes)
        free = distributed.from_rank_0(free_memory())  # one verdict, from before any process has filled its own
        each = f", {local_size} times on this node" if local_size > 1 else ""
        if needed * local_size > 0.9 * free:
            raise UserError(f"--cache-images: they take {_gigabytes(needed)}{each}, and {_gigabytes(free)} are free")
        count = sum(map(len, splits))
        distributed.say(
            f"{'cached images':18} {count}, {_gigabytes(needed)}{each}, of {_gigabytes(free)} that are free"
        )
        for images, size in zip(splits, sizes):
            ends = np.cumsum(3 * size.prod(axis=1))
            starts = ends - 3 * size.prod(axis=1)
            pixels, errors = torch.empty(int(ends[-1]), dtype=torch.uint8), {}

            def keep(position, images=images, pixels=pixels, starts=starts, ends=ends, errors=errors):
                try:
                    found = np.asarray(images.image(position))
                except UserError as error:
                    if not tolerant:
                        raise
                    errors[position] = str(error)
                    return
                pixels[starts[position] : ends[position]] = torch.from_numpy(found.reshape(-1).copy())

            list(pool.map(keep, range(len(images))))
            images._read, images._numbers = _Cached(pixels, starts, size, errors), range(len(images))


def _size(content, name):
    """(width, height) of the image in a file's content, from its header. Raises UserError that names one without."""
    with unreadable_named(name), open_image(content, name) as image:
        return image.size


def free_memory(root: str | os.PathLike = "/") -> int:
    """Bytes of memory that are free for this process: the machine's, or those of a control group that has fewer.

    A batch system may limit any group above the process's own. root: of the file system, where /proc and /sys are.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    root = pathlib.Path(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        own = pathlib.PurePosixPath((root / "proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/"))
    except OSError:  # not Linux
        return min(found)
    for group in (own, *own.parents):
        folder = root / "sys/fs/cgroup" / group
        try:
            used = int((folder / "memory.stat").read_text().split()[1])  # "anon": what is not the cache of files
            found.append(int((folder / "memory.max").read_text()) - used)
        except (OSError, ValueError):  # no such group here, or "max": no limit
            pass
    return min(found)


def _gigabytes(count):
    return f"{count / 1e9:.2f} GB"
