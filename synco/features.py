"""Backbone features of images: one way to compute them, and a store of files in which they are computed once.

A store is a folder with a folder for each (network's weights, images, view) in it: features.npy (M, D), as the network
gives them; names.npy (M,); labels.npy (M,), where the images have labels; and features.json, which says of what they
are. NumPy reads them: np.load("features.npy", mmap_mode="r").
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from synco import augment, backbone, datasets, distributed, export, files, loader, options, signals
from synco.distributed import Process, say
from synco.errors import Failure, Preempted, UserError
from synco.networks import encode, head_name, network_errors_as_user_errors, network_of, try_images
from synco.workers import Loader

FORMAT = 1
DTYPES = ("float32", "float16")
TOLD_EVERY = 30  # seconds
STATED = 256  # files that a thread looks at in one go


@dataclass(frozen=True)
class Backbone:
    """A network on its device, in eval mode, and how images are shown to it.

    head: the name of its last layer, what enters which are the features; source: where its weights are from, in words;
    saved: the checkpoint as a dict, {} for random weights.
    """

    network: nn.Module
    head: str
    arch: str
    stem: str
    img_size: int
    stats: str
    source: str
    saved: dict

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights and buffers without the head, whatever file they are from."""
        digest = hashlib.sha256()
        for name, tensor in export.without_head(self.network, self.head).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def center_view(self) -> transforms.Compose:
        """The transform that shows it an image's centre."""
        return augment.center_view(self.img_size, self.stats)


def open_backbone(args: argparse.Namespace, path: str, device: torch.device) -> Backbone:
    """The backbone in a checkpoint, or with the path "random" an untrained one; what it is good for is tried.

    args: arch, stem, img_size, stats and dataset of `options.add_data`, all but the last unset where the checkpoint
    decides; and seed, of random weights. Raises UserError if the checkpoint or the network cannot be used.
    """
    if path == "random":
        settings, saved = options.resolve_image_settings(args), {}
        arch, size = args.arch or "resnet50", settings["img_size"]
        torch.manual_seed(args.seed)
        with network_errors_as_user_errors(arch, size):
            network = network_of(arch, size, settings["stem"])(num_classes=1000)
            head = head_name(network, 1000)
        source = f"random weights, seed {args.seed}"
    else:
        network, head, saved = export.load(path, args.arch, args.stem)
        settings = options.resolve_image_settings(args, path, saved["config"])
        arch, size = saved["arch"], settings["img_size"]
        source = backbone.summary(saved, path, len(export.without_head(network, head)))
    network.to(device)
    try_images(network, arch, size)
    return Backbone(network, head, arch, **settings, source=source, saved=saved)


@torch.no_grad()
def extract(
    network: nn.Module, head: str, batches: DataLoader, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the loader's images become: (M, D) backbone features, (M, C) outputs, both unit rows, and (M,) labels.

    All on `device`. The network is put in eval mode.
    """
    was_training = network.training
    network.eval()
    rows, outputs, labels = [], [], []
    for images, label in batches:
        found, output = encode(network, head, images.to(device, non_blocking=True))
        rows.append(F.normalize(found.float(), dim=1))
        outputs.append(F.normalize(output.float(), dim=1))
        labels.append(label.to(device, non_blocking=True))
    if not rows:  # more processes than images: one image's shape, no rows
        image = batches.dataset.dataset[0][0]
        found, output = encode(network, head, image[None].to(device))
        rows.append(found[:0].float())
        outputs.append(output[:0].float())
        labels.append(torch.empty(0, dtype=torch.long, device=device))
    network.train(was_training)
    return torch.cat(rows), torch.cat(outputs), torch.cat(labels)


# ------------------------------------------------------------------------------------------------------- the store


class _Shown(Dataset):
    """Images through one view alone: their centre, or the n-th augmented one, drawn from the seed and their number."""

    def __init__(self, images, model, crop, seed):
        self.views = images.with_transform(model.center_view())
        if crop is not None:
            self.views = loader.Augmented(images, augment.augmentation(model.img_size, "v2", stats=model.stats), seed)
        self.crop = crop

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        return self.views[index if self.crop is None else (self.crop, index)][0]


class Store:
    """A folder of features. Every process must make it, and ask it for the same features in the same order.

    process: this one; batch: images that a process takes at a time; dtype: of `DTYPES`, of new files;
    load: workers and timeout of the `Loader`; kept: whether it is there for longer than this run, and to be told of.
    """

    def __init__(self, folder: str, process: Process, *, batch: int, dtype: str, load: dict, kept: bool = True) -> None:
        self.folder, self.process, self.batch, self.dtype = folder, process, batch, dtype
        self.load, self.kept, self.asked = load, kept, set()  # asked: the folders of this run's features

    def features(
        self, model: Backbone, images: datasets.Images, name: str, *, crop: int | None = None, seed: int = 0
    ) -> np.ndarray:
        """The features of images, (M, D), mapped into memory: those that are there, and otherwise they are computed.

        name: of the folder, before the digest of what they are of; crop: 0, 1, ...: of that augmented view (MoCo
        v2's), drawn from `seed`, in place of the centre. What a run that was interrupted has computed is not computed
        again. Raises UserError where they do not fit on the disk, `Failure` where the disk gets full, `Preempted` when
        the run was told to stop.
        """
        view = "centre" if crop is None else f"augmented view {crop}, seed {seed}"
        facts = {"format": FORMAT, "weights_sha256": model.sha256, "arch": model.arch, "stem": model.stem}
        facts |= {"img_size": model.img_size, "stats": model.stats, "view": view, "dtype": self.dtype}
        facts |= {"batch": self.batch, "count": len(images)}
        digest = distributed.from_rank_0(_digest(images) if self.process.rank == 0 else None)
        facts |= {"images_sha256": digest, "root": os.path.realpath(images.root), "classes": list(images.classes or [])}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        place = os.path.join(self.folder, f"{name}-{key}")
        self.asked.add(os.path.basename(place))
        width = self._width(model)
        with contextlib.ExitStack() as held:
            if self.process.rank == 0:
                self._prepare(place, facts, images, width, held)
            distributed.barrier()
            return self._fill(place, model, _Shown(images, model, crop, seed), name, width)

    @torch.no_grad()
    def _width(self, model):
        image = torch.zeros(1, 3, model.img_size, model.img_size, device=self.process.device)
        return encode(model.network, model.head, image)[0].shape[1]

    def _prepare(self, place, facts, images, width, held):
        """Make the files of features that are not there; `held` then gets the lock of their folder. Rank 0 alone."""
        rows, checks = (os.path.join(place, name) for name in ("features.npy", "checks.npy"))
        shape, blocks = (len(images), width), -(-len(images) // self.batch)

        def are_there(*paths):
            return _is_array(checks, (blocks,), "int64") and any(_is_array(path, shape, self.dtype) for path in paths)

        if are_there(rows):  # perhaps where nothing can be written
            return
        try:
            os.makedirs(place, exist_ok=True)
            held.enter_context(files.FolderLock(place, flag="--features"))
            if are_there(rows, rows + ".part"):
                return
            stem = os.path.basename(place)[:-16]
            others = [one for one in os.listdir(self.folder) if one.startswith(stem) and one[len(stem) :].isalnum()]
            if others := sorted({*others} - self.asked)[:3]:
                say(f"{self.folder}: {', '.join(others)}: of other weights, images or settings, computed beside them")
            if (needed := np.dtype(self.dtype).itemsize * np.prod(shape)) > (free := shutil.disk_usage(place).free):
                raise UserError(f"{place}: the features take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
            _make_array(checks, (blocks,), "int64")
            _make_array(rows + ".part", shape, self.dtype)
            with contextlib.suppress(FileNotFoundError):
                os.remove(rows)
            _save_array(os.path.join(place, "names.npy"), np.array(list(images.names)))
            if (labels := labels_of(images)) is not None:
                _save_array(os.path.join(place, "labels.npy"), labels)
            files.write_json(os.path.join(place, "features.json"), facts)
        except OSError as error:
            raise UserError(f"{place}: cannot be written ({error.strerror})") from error

    def _fill(self, place, model, shown, name, width):
        """Compute what is missing, each process its share of the batches → the features, mapped into memory.

        checks.npy has for each batch 1 + the CRC-32 of its rows, and 0 for one that has not been computed: whatever was
        cut short, or has changed since, is seen.
        """
        process, path = self.process, os.path.join(place, "features.npy")
        began, count = time.perf_counter(), len(shown)
        there = path if os.path.exists(path) else path + ".part"
        missing = self._missing(there, place, count)
        if not missing and there == path:
            if self.kept:
                say(f"{name + ' features':18} {count} × {width}, {self.dtype}: there already, in {place}")
            return np.load(path, mmap_mode="r")
        distributed.barrier()
        if process.rank == 0 and there == path:
            os.replace(path, path + ".part")
        distributed.barrier()
        left = sum(min(self.batch, count - block * self.batch) for block in missing)
        if left < count and self.kept:
            say(f"{name + ' features':18} {count - left} of {count} are there; {left} are computed")
        self._compute(place, model, shown, missing, name)
        leave_if_warned(f"what has been computed stays in {place}" if self.kept else "nothing was written")
        if process.rank == 0:
            os.replace(path + ".part", path)
        distributed.barrier()
        pace = f"{(seconds := time.perf_counter() - began):.1f} s, {left / seconds:.0f} images/s"
        pace += f", in {place}" if self.kept else ""
        say(f"{name + ' features':18} {count} × {width}, {self.dtype}: {pace}")
        return np.load(path, mmap_mode="r")

    def _missing(self, there, place, count):
        """The batches whose rows are not what their checks say, the same list in every process."""
        process, rows = self.process, np.load(there, mmap_mode="r")
        checks = np.load(os.path.join(place, "checks.npy"))
        mine = range(process.rank, len(checks), process.world_size)
        bad = [i for i in mine if not checks[i] or checks[i] != _check(rows[i * self.batch : (i + 1) * self.batch])]
        return sorted(sum(distributed.from_all(bad), []))

    @torch.no_grad()
    def _compute(self, place, model, shown, missing, name):
        """Encode this process's share of the missing batches, and write each in its place.

        A batch holds the same images however many processes there are, so its features are the same to the last bit.
        """
        process, count = self.process, len(shown)
        mine = missing[process.rank :: process.world_size]
        batches = [range(i * self.batch, min((i + 1) * self.batch, count)) for i in mine]
        rows, checks = os.path.join(place, "features.npy.part"), os.path.join(place, "checks.npy")
        told, began = time.monotonic(), time.monotonic()
        if not batches:
            return
        batched = Loader(shown, process=process, batch_sampler=batches, **self.load)
        with open(rows, "r+b") as file, open(checks, "r+b") as ledger:
            starts = [np.load(path, mmap_mode="r").offset for path in (rows, checks)]
            for done, (i, images) in enumerate(zip(mine, batched), 1):
                found = encode(model.network, model.head, images.to(process.device, non_blocking=True))[0]
                block = found.to(getattr(torch, self.dtype)).cpu().numpy()
                if not np.isfinite(block).all():
                    what = "not finite" if not found.isfinite().all() else "beyond float16's range; take float32"
                    raise UserError(f"{model.source}: features of {name}'s images from {i * self.batch} on are {what}")
                try:
                    _write(file, starts[0] + i * self.batch * block.nbytes // len(block), block.tobytes())
                    _write(ledger, starts[1] + 8 * i, np.int64(_check(block)).tobytes())
                except OSError as error:
                    kept = "; what has been computed stays, and the same command goes on with it" * self.kept
                    raise Failure(f"{rows}: cannot be written ({error.strerror}){kept}") from error
                if signals.warned():
                    return
                if time.monotonic() - told > TOLD_EVERY:
                    told, left = time.monotonic(), (time.monotonic() - began) / done * (len(mine) - done)
                    say(f"{name + ' features':18} {done / len(mine):.0%}, {left:.0f} s left")


@contextlib.contextmanager
def open_store(args: argparse.Namespace, process: Process) -> Iterator[Store]:
    """The `Store` in --features, or one in a temporary folder that goes at the end. args: see `add_features`.

    Raises UserError if there can be none. Every process must call this.
    """
    load = {"workers": loader.workers_each(args.workers, process.local_size), "timeout": args.worker_timeout}
    settings = {"batch": args.batch_size, "dtype": args.features_dtype, "load": load}
    if args.features == "":
        raise UserError("--features '': must name a folder")
    if args.features is not None:
        if process.rank == 0 and not os.path.isdir(args.features):  # of one that is there it may only be read
            files.make_folders(args.features)
        distributed.barrier()
        yield Store(args.features, process, **settings)
        return
    if process.world_size > process.local_size:
        raise UserError("several nodes need --features FOLDER, on a disk that they share")
    folder = distributed.from_rank_0(tempfile.mkdtemp(prefix="synco-features-") if process.rank == 0 else None)
    try:
        yield Store(folder, process, **settings, kept=False)
    finally:
        if process.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def add_features(parser: options.Parser) -> None:
    """The flags of `open_store`, and of `open_backbone` what `options.add_data` lacks."""
    free = parser.free
    free("--features", metavar="FOLDER", help="keep the features there as .npy files, and take those that are there")
    free("--features-dtype", default="float32", choices=DTYPES, help="of new features; float16 halves the files")
    free("-b", "--batch-size", default=256, type=options.number(int, 1), help="images a process takes at a time")
    free("--seed", default=0, type=options.number(int, 0, 2**32 - 1), help="of random weights and of all draws")
    parser.set_defaults(arch=None)  # what the checkpoint was trained with


def labels_of(images: datasets.Images) -> np.ndarray | None:
    """(M,) int64 the images' labels, or None where they have none."""
    return np.asarray(images.targets, dtype=np.int64) if images.classes and images.targets is not None else None


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread and ascending: of images in the order of classes."""
    return np.arange(min(count, most)) * count // min(count, most)


def leave_if_warned(what: str) -> None:
    """Raise `Preempted` in every process if one of them was told to stop. Every process must call this."""
    distributed.barrier()  # however long the others take
    warning = next(filter(None, distributed.from_all(signals.warned())), None)
    if warning:
        raise Preempted(f"stopped by {warning}; {what}")


def _digest(images):
    """SHA-256 of what the images are: names and labels, and of those in files of their own size and time of change."""
    digest = hashlib.sha256()
    for name in images.names:
        digest.update(os.fsencode(name) + b"\0")
    labels = labels_of(images)
    digest.update(b"" if labels is None else labels.tobytes())

    def states(start):
        found = np.zeros((min(STATED, len(images) - start), 2), dtype=np.int64)
        for i in range(len(found)):
            with contextlib.suppress(OSError):  # reading it will say so
                if path := images.file(start + i):
                    status = os.stat(path)
                    found[i] = status.st_size, status.st_mtime_ns
        return found

    with ThreadPoolExecutor(16) as threads:  # while one waits for a network's disk, others ask on
        for found in threads.map(states, range(0, len(images), STATED)):
            digest.update(found)
    return digest.hexdigest()


def _check(block):
    return 1 + zlib.crc32(np.ascontiguousarray(block))


def _is_array(path, shape, dtype):
    """Whether a file is a .npy of that shape and type, as long as it should be."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return array.shape == shape and array.dtype == np.dtype(dtype)


def _make_array(path, shape, dtype):
    """A .npy of zeros, which take no room before they are written."""
    with files.atomic_write(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)


def _save_array(path, array):
    with files.atomic_write(path) as file:
        np.save(file, array)


def _write(file, position, content):
    """Write all of it there, and raise what goes wrong: a page that is mapped would end the process on a full disk."""
    file.seek(position)
    file.write(content)
    file.flush()
