"""Pack a data set into tar shards that are read in place: few large files in place of a million small ones.

  python -m synco.pack SOURCE OUT                        # then: --dataset shards OUT, in every program
  python -m synco.pack --dataset imagenet --short-side 256 SOURCE OUT
  python -m synco.pack --verify OUT

SOURCE is what DATA may be, or holds Hugging Face's parquet files (pip install pyarrow). OUT gets train-000000.tar ...
in WebDataset's convention, train.index, so that no scan is ever needed, train.sha256, as sha256sum -c reads it, and
train.pack.json, what they were packed with; so for val. A packing that was killed goes on when it is called again.
"""

import argparse
import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

from PIL import Image

from synco import datasets, decode, distributed, files, index, layouts, metrics, options, parquet, records, tars
from synco.errors import Failure, UserError
from synco.launch import command
from synco.options import number

SECONDS = 10  # between progress lines


class Stored:
    """The images of one of the layouts, in the order of their names, as what is to be packed.

    names: "label/..." of labelled images, else any; classes: the labels' names, [] without; labels: each one's number.
    """

    def __init__(self, args: argparse.Namespace, split: str) -> None:
        self.images = datasets.load(args, split, labelled=False)
        if not self.images.has_bytes():
            raise UserError(f"--dataset {args.dataset}: its images are not files, and --cache-images holds them anyway")
        self.names, self.classes = list(self.images.names), self.images.classes
        self.labels = [int(label) for label in self.images.targets]

    def contents(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of the images `start` to `stop` - 1."""
        return map(self.images.content, range(start, stop))


def write_shard(
    path: str,
    source: Stored | parquet.Source,
    start: int,
    stop: int,
    encode: Callable[[bytes, str], bytes],
    tick: Callable[[], None],
) -> None:
    """Write one shard, whole or not at all: the same bytes each time.

    encode(content, name) → the bytes to write; tick: called after each image.
    """
    with files.atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as shard:
        for i, content in zip(range(start, stop), source.contents(start, stop)):
            member = tars.quoted(source.names[i])
            _add(shard, member, encode(content, source.names[i]))
            if source.classes:
                _add(shard, os.path.splitext(member)[0] + ".cls", str(source.labels[i]).encode())
            shard.members.clear()  # it would keep them all
            tick()


def _add(shard, name, content):
    member = tarfile.TarInfo(name)  # of nobody, from 1970
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def shortened(content: bytes, name: str, side: int, quality: int) -> bytes:
    """An image as a JPEG whose shorter side has `side` pixels; as it is, if it has no more. Raises UserError."""
    with decode.unreadable_named(name), decode.open_image(content, name) as image:
        width, height = image.size
        if min(width, height) <= side:
            return content
        scale = side / min(width, height)
        size = max(side, int(width * scale)), max(side, int(height * scale))
        small, encoded = decode.to_rgb(image).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
        small.save(encoded, "JPEG", quality=quality)
        return encoded.getvalue()


def source_of(args: argparse.Namespace, split: str) -> Stored | parquet.Source:
    """What is to be packed of a split. Raises UserError where there is nothing, or not what a shard can hold."""
    source = parquet.Source(args.data, split) if parquet.files_of(args.data, split) else Stored(args, split)
    for name in source.names:
        if not index.is_image(name) or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{args.data}: {name!r} can be no image's name in a shard: .jpg, .png or so at the end")
    return source


def splits_of(args: argparse.Namespace) -> list[str]:
    """The splits that are to be packed: those that --splits names, or train, and val if it is there."""
    if args.splits:
        return args.splits
    found = args.dataset not in ("imagefolder", "shards") or args.val_list is not None
    found = found or os.path.isdir(os.path.join(args.data, "val")) or layouts.files_of(args.data, "val")
    return ["train", "val"] if found or parquet.files_of(args.data, "val") else ["train"]


def pack(args: argparse.Namespace, split: str, source: Stored | parquet.Source) -> None:
    """Write the shards of a split and what goes beside them; those that are there already stay."""
    count, out = len(source.names), args.out
    expected = records.of_names(args.data, source.names, labelled=bool(source.classes)).checksum()
    settings = {"images": count, "images_per_shard": args.images_per_shard, "names_crc32": expected}
    settings |= {"classes": source.classes or None, "short_side": args.short_side}
    settings |= {"quality": args.quality if args.short_side else None}
    shards = [f"{split}-{i:06}.tar" for i in range(-(-count // args.images_per_shard))]
    files.make_folders(out)
    with files.FolderLock(out, patience=0, flag="OUT"):
        _claim(out, split, settings, shards)
        digests = _write_shards(args, split, source, shards)
        found, _ = layouts.scan_shards(out, shards, layouts.generic_names, source.classes)
        if found.checksum() != expected:
            raise UserError(f"{out}: holds other images than {args.data}; remove its {split} shards, and pack anew")
        try:
            with files.atomic_write(os.path.join(out, f"{split}.sha256")) as file:
                file.write("".join(f"{digest}  {name}\n" for digest, name in zip(digests, shards)).encode())
            index.write(os.path.join(out, f"{split}.index"), found)
        except OSError as error:
            raise Failure(f"{out}: cannot be written ({error.strerror})") from error
    size = sum(found.sizes.tolist()) / 1e9
    images = f"{count} images" + ("" if source.classes else " without labels")
    distributed.say(f"{split}: {images} in {len(shards)} shards, {size:.2f} GB, in {out}, from {shards[0]} on")


def _write_shards(args, split, source, shards):
    """Write the shards that are not there yet → the SHA-256 of each."""
    count, each = len(source.names), args.images_per_shard
    missing = [i for i, shard in enumerate(shards) if not os.path.exists(os.path.join(args.out, shard))]
    progress = _Progress(split, sum(min(count, (i + 1) * each) - i * each for i in missing), len(shards))

    def encode(content, name):
        return shortened(content, name, args.short_side, args.quality) if args.short_side else content

    def work(i):
        path = os.path.join(args.out, shards[i])
        if i in missing:
            try:
                write_shard(path, source, i * each, min(count, (i + 1) * each), encode, lambda: progress.tick(i))
            except OSError as error:
                raise Failure(f"{path}: cannot be written ({error.strerror})") from error
        return files.sha256(path)

    with ThreadPoolExecutor(args.workers) as pool:  # PIL works without Python's lock
        futures = [pool.submit(work, i) for i in range(len(shards))]
        try:
            while True:
                done, waiting = wait(futures, timeout=SECONDS, return_when="FIRST_EXCEPTION")
                if not waiting or any(future.exception() for future in done):
                    break
                progress.say()
        finally:
            progress.stopped.set()
            pool.shutdown(cancel_futures=True)
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error and not isinstance(error, CancelledError):
            raise error
    return [future.result() for future in futures]


def _claim(out, split, settings, names):
    """Note what is packed into a folder. Raises UserError if it holds another packing, or shards of unknown origin."""
    path = os.path.join(out, f"{split}.pack.json")
    there = {name for name in os.listdir(out) if re.fullmatch(rf"{split}-.*\.tar", name)}
    known = files.read_json(path)
    differ = [name for name, value in settings.items() if known and known.get(name) != value]
    if differ or there - set(names) or (there and not known):
        what = f"{differ[0]} is another" if differ else f"it has {min(there - set(names) or there)}"
        raise UserError(f"{out}: holds another packing of {split} ({what}); give another folder")
    for name in os.listdir(out):  # of one that was killed
        if re.fullmatch(rf"{split}(-\d{{6}}\.tar|\.pack\.json|\.sha256|\.index)\.[0-9a-f]{{8}}\.tmp", name):
            os.remove(os.path.join(out, name))
    if not known:
        files.write_json(path, settings)


class _Progress:
    """How far a packing is, by shards, as threads tell; `stopped` ends them at their next image."""

    def __init__(self, split, images, shards):
        self.split, self.images, self.done, self.began = split, images, [0] * shards, time.monotonic()
        self.stopped = threading.Event()

    def tick(self, shard):
        self.done[shard] += 1
        if self.stopped.is_set():
            raise CancelledError

    def say(self):
        done, seconds = sum(self.done), time.monotonic() - self.began
        if done:
            left = metrics.duration((self.images - done) * seconds / done)
            distributed.say(f"{self.split}: {done} of {self.images} images, {done / seconds:.0f} images/s, ETA {left}")


def verify(folder: str) -> None:
    """Compare the shards of a folder with their checksums. Raises UserError that counts and names what differs."""
    lists = [name for name in ("train.sha256", "val.sha256") if os.path.isfile(os.path.join(folder, name))]
    if not lists:
        raise UserError(f"{folder}: has no train.sha256 or val.sha256, which a packing ends with")
    for name in lists:
        text = os.fsdecode(layouts.content_of(os.path.join(folder, name)))
        lines = re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.M)
        if not lines or len(lines) != len(text.splitlines()):
            raise UserError(f"{os.path.join(folder, name)}: is no list of checksums, such as a packing ends with")
        bad = []
        for digest, shard in lines:
            path = os.path.join(folder, shard)
            if not os.path.isfile(path) or files.sha256(path) != digest:
                bad.append(shard if os.path.isfile(path) else f"{shard} (missing)")
        if bad:
            raise UserError(f"{folder}: {len(bad)} of {len(lines)} shards are not as packed, such as {bad[0]}")
        distributed.say(f"{name}: {len(lines)} shards are as they were packed")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m synco.pack`; words: unset, the program's own."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("data", metavar="SOURCE", help="what to pack, or with --verify a folder of shards")
    flag("out", metavar="OUT", nargs="?", help="folder for the shards")
    flag("--verify", action="store_true", help="compare the shards in a folder with their checksums")
    flag("--dataset", default="imagefolder", choices=(*options.LAYOUTS, "imagenette", "caltech256"), help="of SOURCE")
    flag("--train-list", metavar="FILE", help="list of the train images, as the programs take it")
    flag("--val-list", metavar="FILE", help="list of the val images")
    flag("--splits", nargs="+", choices=("train", "val"), help="what to pack (unset: train, and val if it is there)")
    flag("--images-per-shard", default=10_000, type=number(int, 1), help="images in a shard; the last has fewer")
    flag("--short-side", type=number(int, 8, options.LARGEST), metavar="PIXELS", help="re-encode larger images as JPEG "
         "with this many pixels at the shorter side (unset: their bytes are copied)")  # fmt: skip
    flag("--quality", default=90, type=number(int, 1, 100), help="of the JPEGs of --short-side")
    flag("-j", "--workers", default=distributed.usable_cpus(), type=number(int, 1), help="shards at a time")
    parser.set_defaults(download=False, limit_images=None, hold_out=None, split_seed=0)
    args = parser.parse_args(words)
    if args.verify == (args.out is not None):
        raise UserError("--verify takes one folder" if args.verify else "OUT is needed: the folder for the shards")
    options.check_data(args)
    if args.out and os.path.realpath(args.out) == os.path.realpath(args.data):
        raise UserError(f"{args.out}: is SOURCE itself; give another folder for the shards")
    return args


def run(args: argparse.Namespace) -> None:
    """Pack, or verify what was packed."""
    if args.verify:
        return verify(args.data)
    sources = {split: source_of(args, split) for split in splits_of(args)}  # all, before anything is written
    for split, source in sources.items():
        pack(args, split, source)


if __name__ == "__main__":
    command(run, parse)
