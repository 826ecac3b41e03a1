"""The same small ImageNet in every form that people hold it in, written with tarfile, csv and SciPy alone."""

import io
import os
import pathlib
import random
import tarfile

import numpy as np
from PIL import Image

WNIDS = ("n00000012", "n00000034", "n00000007")


def jpeg(seed, size=(24, 20)):
    """The bytes of an image of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(content, "JPEG")
    return content.getvalue()


def images():
    """{split: {canonical name: bytes}}: 8 a class to train, 3 to validate."""
    train = [(f"{wnid}/{wnid}_{i}.JPEG") for wnid in WNIDS for i in range(8)]
    val = [f"{WNIDS[i % 3]}/ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(9)]
    return {
        "train": {name: jpeg(i) for i, name in enumerate(train)},
        "val": {name: jpeg(100 + i) for i, name in enumerate(val)},
    }


def put(path, content=b""):
    """Write a file, and the folders above it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar(path, members, mode="w"):
    """Write a tar file of {name: bytes}, at a path or into a file."""
    where = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    if "name" in where:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with tarfile.open(mode=mode, **where) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def folder(root):
    """train/WNID/IMAGE and val/WNID/IMAGE."""
    for split, found in images().items():
        for name, content in found.items():
            put(root / split / name, content)


def archives(root, devkit=True):
    """The two archives, and the devkit, which needs SciPy."""
    train, val = images().values()
    inner = {}
    for wnid in WNIDS:
        content = io.BytesIO()
        tar(content, {os.path.basename(name): train[name] for name in reversed(train) if name.startswith(wnid)})
        inner[f"{wnid}.tar"] = content.getvalue()
    tar(root / "ILSVRC2012_img_train.tar", inner)
    tar(root / "ILSVRC2012_img_val.tar", {os.path.basename(name): val[name] for name in sorted(val)})
    if devkit:
        import scipy.io

        synsets = np.zeros((3, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
        for i, wnid in enumerate(WNIDS):
            synsets[i, 0] = (i + 1, wnid, "a thing")
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": synsets})
        truth = "".join(f"{i % 3 + 1}\n" for i in range(9)).encode()
        parts = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
        kit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in parts.items()}
        tar(root / "ILSVRC2012_devkit_t12.tar.gz", kit, "w:gz")


def kaggle(root):
    """Kaggle's tree: val is flat, and a table has its classes and boxes."""
    train, val = images().values()
    for name, content in train.items():
        put(root / "ILSVRC/Data/CLS-LOC/train" / name, content)
    lines = ["ImageId,PredictionString"]
    for name, content in val.items():
        put(root / "ILSVRC/Data/CLS-LOC/val" / os.path.basename(name), content)
        lines.append(f"{os.path.basename(name)[:-5]},{name.partition('/')[0]} 12 3 40 50 ")
    put(root / "LOC_val_solution.csv", "\n".join(lines).encode())


def shards(root):
    """WebDataset's shards as they are found: keys without folders, classes as numbers, in no order."""
    classes = sorted(WNIDS)
    for split, found in images().items():
        names = list(found)
        random.Random(0).shuffle(names)
        for i in range(3):
            members = {}
            for name in names[i::3]:
                key = os.path.basename(name)[:-5]
                members |= {f"{key}.jpg": found[name], f"{key}.cls": b"%d" % classes.index(name.partition("/")[0])}
            tar(root / f"{split}-{i:04}.tar", members)


def lists(root, data):
    """train.csv and val.csv in no order, of a `folder`."""
    for split, found in images().items():
        names = list(found)
        random.Random(1).shuffle(names)
        lines = ["path,label"] + [f"{split}/{name},{name.partition('/')[0]}" for name in names]
        put(root / f"{split}.csv", "\n".join(lines).encode())


def parquet(root):
    """Hugging Face's files: the class is at the end of each path, and once more as a number."""
    import pyarrow
    import pyarrow.parquet

    classes = sorted(WNIDS)
    for split, called in (("train", "train"), ("val", "validation")):
        found = images()[split]
        names = list(found)
        random.Random(2).shuffle(names)
        for i in range(2):
            rows = [(name, name.partition("/")[0]) for name in names[i::2]]
            cells = [
                {"bytes": found[name], "path": f"{os.path.basename(name)[:-5]}_{wnid}.JPEG"} for name, wnid in rows
            ]
            table = pyarrow.table({"image": cells, "label": [classes.index(wnid) for _, wnid in rows]})
            path = root / "data" / f"{called}-{i:05}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, path, row_group_size=5)
