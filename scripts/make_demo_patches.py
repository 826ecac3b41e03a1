#!/usr/bin/env python3
"""Cut the photographs in scikit-image's wheel into JPEG patches: a small real data set that needs no download.

  python scripts/make_demo_patches.py FOLDER

The class of a patch is its photograph. Training patches come from the left three quarters of a photograph and may
overlap each other; validation patches come from its right quarter, so no pixel is in both. Writes
FOLDER/{train,val}/PHOTOGRAPH/NNN.jpg; existing files of these names are written again, with the same pixels.
"""

import argparse
import os
import sys

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
    "grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()


def cut(photograph, left, right, size, count, rng):
    """`count` square patches at random places between two columns."""
    for _ in range(count):
        x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, photograph.height - size + 1))
        yield photograph.crop((x, y, x + size, y + size))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=48, help="side of a patch in pixels (default: %(default)s)")
    parser.add_argument("--train", type=int, default=200, help="training patches a photograph (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="validation patches a photograph (default: %(default)s)")
    args = parser.parse_args()
    try:
        import skimage
    except ImportError:
        sys.exit("scikit-image ships the photographs: pip install scikit-image")

    source = os.path.join(os.path.dirname(skimage.__file__), "data")
    for number, name in enumerate(PHOTOGRAPHS):
        rng = np.random.default_rng(number)
        photograph = Image.open(os.path.join(source, name)).convert("RGB")
        border = photograph.width * 3 // 4
        parts = (("train", 0, border, args.train), ("val", border, photograph.width, args.val))
        for split, left, right, count in parts:
            folder = os.path.join(args.folder, split, os.path.splitext(name)[0])
            os.makedirs(folder, exist_ok=True)
            for i, patch in enumerate(cut(photograph, left, right, args.size, count, rng)):
                patch.save(os.path.join(folder, f"{i:03}.jpg"), quality=95)
    print(f"{args.folder}: {args.train} training and {args.val} validation patches of each photograph")


if __name__ == "__main__":
    main()
