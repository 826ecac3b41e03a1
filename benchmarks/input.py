#!/usr/bin/env python3
"""Time the input pipeline on a folder of images: what a loading worker does for --augment-on cpu and for device.

  python benchmarks/input.py FOLDER              # FOLDER/CLASS/IMAGE
  python benchmarks/input.py FOLDER --json

Each mode makes two views of every image (MoCo v2's augmentation) and collates them, in this process and one thread.
The modes take turns over parts of the folder, CPU seconds are counted, and medians are compared, so that a noisy
machine disturbs all alike. So do the same images in tar shards, copied and with a shorter side of 256 pixels (see
synco.pack). Then reading alone, the ways to decode a JPEG file, how far the two modes' views are apart, and the
device's half of the work.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time

import torch
import torchvision
from torch.utils.data import default_collate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from synco import augment, datasets, decode, layouts, loader, options, pack  # noqa: E402
from synco.errors import UserError  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.options import Parser, number  # noqa: E402


def parse():
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="images in FOLDER/CLASS/IMAGE")
    parser.add_argument("--img-size", type=number(int, 8), default=224, help="side of the crops")
    parser.add_argument("--images", type=number(int, 1), default=160, help="how many to take, at random")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="images in a batch")
    parser.add_argument("--repeat", type=number(int, 1), default=3, help="times to go over them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    if not os.path.isdir(args.folder):
        raise UserError(f"{args.folder}: no such folder; it should hold CLASS/IMAGE")
    return args


def decoders():
    """The ways to decode a JPEG that keep PIL's pixels, if they are installed: {name: (bytes, name) → pixels}."""
    found = {
        "PIL": decode.read_image,
        "synco.decode.read_uint8": decode.read_uint8,
    }
    for name, package in (("torchvision.io", "torchvision.io"), ("TorchCodec", "torchcodec.decoders")):
        with contextlib.suppress(ImportError, AttributeError):
            package = importlib.import_module(package)
            rgb = functools.partial(package.decode_jpeg, mode=package.ImageReadMode.RGB)
            found[name] = lambda content, _, rgb=rgb: rgb(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    with contextlib.suppress(ImportError):
        import simplejpeg

        found["simplejpeg"] = lambda content, _: simplejpeg.decode_jpeg(content)
    return found


def packed(images, chosen, out, *flags):
    """The chosen images in tar shards, by synco.pack; in the order of their names."""
    with open(f"{out}.txt", "wb") as file:
        file.write(b"".join(os.fsencode(images.where(i)) + b"\n" for i in chosen))
    words = ["--train-list", file.name, "--splits", "train", "--images-per-shard", "50", *flags]
    with contextlib.redirect_stdout(sys.stderr):
        pack.run(pack.parse([images.root, out, *words]))
        return datasets.stored(layouts.shards(out, "train"))


def take_turns(versions, parts, repeat):
    """{name: function of a part} → {name: median seconds for one item}; each part goes through all versions in turn."""
    times = {name: [] for name in versions}
    for part in parts[:1] + parts * repeat:
        for name, version in versions.items():
            began = time.process_time()  # CPU seconds: another program's load does not count
            version(part)
            times[name].append((time.process_time() - began) / len(part))
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first one warms up


def some_images(args, scratch):
    """{source: some of the folder's images}: files, the same in tar shards, and there with shorter sides."""
    folder, split = os.path.split(os.path.abspath(args.folder))
    pil = datasets.image_folder(folder, split)
    chosen = random.Random(0).sample(range(len(pil)), min(args.images, len(pil)))
    pil = pil.subset(sorted(chosen, key=lambda i: pil.where(i)))
    sources = {"files": pil, "shards": packed(pil, range(len(pil)), os.path.join(scratch, "copied"))}
    sources["short side"] = packed(pil, range(len(pil)), os.path.join(scratch, "256"), "--short-side", "256")
    return sources


def modes(sources, augmentation):
    """{mode: function of some images' numbers → their batch, as a worker makes it}; device's with each source."""
    pairs = {"cpu": loader.TwoCrops(sources["files"], augmentation, seed=0)}
    for source, images in sources.items():
        mode = "device" if source == "files" else f"device, {source}"
        pairs[mode] = loader.TwoCrops(images.as_uint8(), augment.Crop(augmentation), seed=0)
    return {
        mode: lambda part, pairs=pairs: default_collate([pairs[0, i] for i in part]) for mode, pairs in pairs.items()
    }


def time_decoding(pil, chosen, args):
    """{decoder: median seconds for an image} of the JPEG files among the chosen; {} if there are none."""
    jpegs = [(pil.content(i), pil.where(i)) for i in chosen if pil.names[i].lower().endswith((".jpg", ".jpeg"))]
    if not jpegs:
        return {}
    rounds = [jpegs[i : i + args.batch] for i in range(0, len(jpegs), args.batch)]
    each = {
        name: lambda part, decode=decode: [decode(*encoded) for encoded in part] for name, decode in decoders().items()
    }
    return take_turns(each, rounds, args.repeat)


def time_device(collated, parts, augmentation, device):
    """The device's half → (median seconds for a view, how far each number of it is from the CPU's, of 255)."""
    finish = augment.Finish(augmentation, device)
    std = torch.tensor(options.STATS["imagenet"][1], device=device).view(3, 1, 1)
    apart, seconds = [], []
    for part in parts:
        (crops, parameters), _, _ = collated["device"](part)
        if device.type == "cuda":
            crops = crops.pin_memory()
        for _ in range(3):
            began = time.perf_counter()
            views = finish(crops, parameters)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / len(part))
        expected = collated["cpu"](part)[0].to(device)
        apart.append(((views - expected) * std * 255).abs().flatten())
    return statistics.median(seconds), torch.cat(apart)


def measure(args, sources):
    """All that is measured, as --json prints it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pil, augmentation = sources["files"], augment.augmentation(args.img_size)
    chosen = random.Random(1).sample(range(len(pil)), len(pil))
    parts = [chosen[i : i + args.batch] for i in range(0, len(chosen), args.batch)]
    collated = modes(sources, augmentation)
    workers = take_turns(collated, parts, args.repeat)
    contents = {
        source: lambda part, images=images: [images.content(i) for i in part] for source, images in sources.items()
    }
    read = take_turns(contents, parts, 10 * args.repeat)
    decoded = time_decoding(pil, chosen, args)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds, apart = time_device(collated, parts, augmentation, device)
    return {
        "images": len(chosen),
        "img_size": args.img_size,
        "ratio": workers["cpu"] / workers["device"],
        "workers_images_per_second_and_core": {mode: 1 / s for mode, s in workers.items()},
        "read_images_per_second_and_core": {source: 1 / s for source, s in read.items()},
        "decoded_images_per_second_and_core": {name: 1 / s for name, s in decoded.items()},
        "views_apart_of_255": {"mean": apart.mean().item(), "max": apart.max().item()},
        "device": str(device),
        "device_views_per_second": 1 / seconds,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def print_tables(facts):
    """What `measure` found, for a reader."""
    versions = f"torch {facts['torch']}, torchvision {facts['torchvision']}"
    print(f"{facts['images']} images, {facts['img_size']} pixels, {versions}")
    for title, kind, first in (
        ("--augment-on", "workers", "cpu"),
        ("reading alone", "read", "files"),
        ("decoding alone", "decoded", "PIL"),
    ):
        print(f"\n{title:22}{'images/s and core':>20}{'ratio':>8}")
        speeds = facts[f"{kind}_images_per_second_and_core"]
        for name, speed in speeds.items():
            print(f"{name:22}{speed:20.0f}{speed / speeds[first]:8.2f}")
    apart = facts["views_apart_of_255"]
    print(f"\nthe two modes' views are {apart['mean']:.2f} of 255 apart in the mean, {apart['max']:.0f} at most")
    speed = facts["device_views_per_second"]
    print(f"the device's half, {facts['device']}: {speed:.0f} views/s (an image is two views)")


def main(args):
    with tempfile.TemporaryDirectory() as scratch:
        facts = measure(args, some_images(args, scratch))
    if args.json:
        print(json.dumps(facts))
    else:
        print_tables(facts)


if __name__ == "__main__":
    command(main, parse)
