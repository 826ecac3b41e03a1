#!/usr/bin/env python3
"""Time to the first batch on a folder as large as ImageNet: the first start, which lists it, and the second.

And on as many images in tar shards with their index beside them, as synco.pack leaves them.

  python benchmarks/startup.py                   # 1,281,167 files in 1,000 classes
  python benchmarks/startup.py --files 100000 --json

The files are links to one tiny image in each class, in a temporary folder (--where), which is removed at the end, as is
the cache that is used. All starts are timed in this process, with the folder in the system's cache.
"""

import functools
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from synco import augment, datasets, distributed, index, layouts, loader, records  # noqa: E402
from synco.errors import UserError  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.options import Parser, number  # noqa: E402


def parse():
    parser = Parser(__doc__)
    parser.add_argument("--files", type=number(int, 1), default=1281167, help="how many files")
    parser.add_argument("--classes", type=number(int, 1), default=1000, help="in how many classes")
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images in the first batch")
    parser.add_argument("--repeat", type=number(int, 1), default=3, help="second starts; their median counts")
    parser.add_argument(
        "--where", default=None, metavar="FOLDER", help="where to make the folder (unset: the system's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if args.files < args.classes:
        raise UserError(f"--files {args.files} --classes {args.classes}: a class without files is none")
    if args.where and not os.path.isdir(args.where):
        raise UserError(f"--where {args.where}: no such folder")
    return args


def make(folder, files, classes):
    """Files like folder/n00000007/n00000007_3.JPEG, of one age that is long past."""
    each, more = divmod(files, classes)
    for c in range(classes):
        name = f"n{c:08}"
        place = Path(folder, name)
        place.mkdir(parents=True)
        first = None
        for i in range(each + (c < more)):
            file = place / f"{name}_{i}.JPEG"
            if i % 50000 == 0:  # a file system has a limit of links to one file
                first = file
                Image.new("RGB", (16, 16), (c % 256, 0, 0)).save(file)
            else:
                os.link(first, file)
        os.utime(place, (1.5e9, 1.5e9))
    os.utime(folder, (1.5e9, 1.5e9))


def make_shards(folder, names):
    """100 shards of one image each, and an index by which the images of all these names are there."""
    content, paths = io.BytesIO(), [f"train-{i:06}.tar" for i in range(100)]
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    for path in paths:
        with tarfile.open(os.path.join(folder, path), "w") as shard:
            member = tarfile.TarInfo("image.jpg")
            member.size = len(content.getvalue())
            shard.addfile(member, io.BytesIO(content.getvalue()))
    spans = [(i % len(paths), tarfile.BLOCKSIZE, len(content.getvalue())) for i in range(len(names))]
    index.write(os.path.join(folder, "train.index"), records.of_names(folder, names, paths=paths, spans=spans))


def start(places, args):
    """(seconds until the images are known, seconds until the first batch is there). places: gives their index."""
    began = time.perf_counter()
    images = datasets.stored(places())
    listed = time.perf_counter() - began
    pairs = loader.TwoCrops(images, augment.augmentation(16), seed=0)
    batches = loader.train_loader(pairs, args.batch, process=distributed.Process(), workers=0, seed=0)
    next(iter(batches))
    return listed, time.perf_counter() - began


def main(args):
    with tempfile.TemporaryDirectory(dir=args.where) as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        index.WORTH_IT = 1
        make(os.path.join(folder, "train"), args.files, args.classes)
        torchvision.datasets.folder.make_dataset(os.path.join(folder, "train"), extensions=(".jpeg",))  # warms up
        places = functools.partial(layouts.folder, folder, "train")
        began = time.perf_counter()
        torchvision.datasets.ImageFolder(os.path.join(folder, "train"))
        found = {"ImageFolder": (time.perf_counter() - began, None), "first start": start(places, args)}
        seconds = [start(places, args) for _ in range(args.repeat)]
        found["second start"] = tuple(statistics.median(column) for column in zip(*seconds))
        os.mkdir(os.path.join(folder, "shards"))
        make_shards(os.path.join(folder, "shards"), list(places()))
        shards = functools.partial(layouts.shards, os.path.join(folder, "shards"), "train")
        seconds = [start(shards, args) for _ in range(args.repeat)]
        found["packed shards"] = tuple(statistics.median(column) for column in zip(*seconds))
        size = os.path.getsize(index._store(os.path.join(folder, "train")))
    first, second = found["first start"], found["second start"]
    facts = {
        "files": args.files,
        "classes": args.classes,
        "seconds": {name: {"index": listed, "first_batch": batch} for name, (listed, batch) in found.items()},
        "ratio": first[0] / second[0],
        "ratio_first_batch": first[1] / second[1],
        "cache_bytes": size,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if args.json:
        print(json.dumps(facts))
        return
    print(f"{args.files} files in {args.classes} classes; the cache has {size / 1e6:.1f} MB")
    print(f"{'':14}{'index, s':>12}{'ratio':>8}{'first batch, s':>18}{'ratio':>8}")
    for name, (listed, batch) in found.items():
        text = f"{name:14}{listed:12.3f}{first[0] / listed:8.1f}"
        print(text + (f"{batch:18.3f}{first[1] / batch:8.1f}" if batch else ""))


if __name__ == "__main__":
    command(main, parse)
