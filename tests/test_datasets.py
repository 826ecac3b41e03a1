"""Data sets by name, their parts, and the cache: against what was written into the files."""

import argparse
import http.client
import os
import pickle
import tarfile
import time
import urllib.error

import numpy as np
import pytest
import torchvision
from conftest import make_images, processes
from PIL import Image

from synco import datasets
from synco.distributed import Process
from synco.errors import UserError

CATEGORIES = ("001.ak47", "002.american-flag", "257.clutter")


def flags(data, dataset="imagefolder", **given):
    defaults = {"download": False, "limit_images": None, "hold_out": None, "split_seed": 0}
    defaults |= {"train_list": None, "val_list": None}
    return argparse.Namespace(data=str(data), dataset=dataset, **defaults | given)


def pixels(count, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def cifar(folder, monkeypatch, fine=False):
    """CIFAR's files with a few images of noise → {train: (pixels, labels)}; torchvision's checksums are taken off."""
    made = torchvision.datasets.CIFAR100 if fine else torchvision.datasets.CIFAR10
    monkeypatch.setattr(made, "_check_integrity", lambda self: os.path.isdir(os.path.join(self.root, self.base_folder)))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.exists(path))
    (folder / made.base_folder).mkdir(parents=True)
    whole = {}
    for train, files in ((True, made.train_list), (False, made.test_list)):
        parts = [pixels(4, seed=i + 10 * train) for i, _ in enumerate(files)]
        labels = [[(i + j) % 10 for j in range(4)] for i, _ in enumerate(files)]
        for (name, _), part, label in zip(files, parts, labels):
            content = {"data": part.transpose(0, 3, 1, 2).reshape(4, -1), "fine_labels" if fine else "labels": label}
            (folder / made.base_folder / name).write_bytes(pickle.dumps(content))
        whole[train] = np.concatenate(parts), sum(labels, [])
    names = [f"class{i}" for i in range(100 if fine else 10)]
    (folder / made.base_folder / made.meta["filename"]).write_bytes(pickle.dumps({made.meta["key"]: names}))
    return whole


def stl10(folder, monkeypatch):
    """STL-10's files → {split: (pixels (N, 96, 96, 3), labels from 0 or None)}."""
    made = torchvision.datasets.STL10
    monkeypatch.setattr(made, "_check_integrity", lambda self: os.path.isdir(os.path.join(self.root, self.base_folder)))
    base = folder / made.base_folder
    base.mkdir(parents=True)
    (base / made.class_names_file).write_text("\n".join(f"c{i}" for i in range(10)))
    whole = {}
    for split, count in (("train", 3), ("test", 2), ("unlabeled", 5)):
        part = pixels(count, (96, 96, 3), seed=count)
        part.transpose(0, 3, 2, 1).tofile(base / f"{split}_X.bin")  # column by column, as STL-10 stores them
        labels = None
        if split != "unlabeled":
            labels = [9 - i for i in range(count)]
            (np.array(labels, dtype=np.uint8) + 1).tofile(base / f"{split}_y.bin")
        whole[split] = part, labels
    return whole


def caltech256(folder, counts=(10, 5, 7)):
    for category, count in zip(CATEGORIES, counts):
        place = folder / "caltech256" / "256_ObjectCategories" / category
        place.mkdir(parents=True)
        for i in range(1, count + 1):
            label = CATEGORIES.index(category) + 1
            Image.new("RGB", (20 + i, 30), (label, i, 0)).save(place / f"{label:03}_{i:04}.jpg")


def imagenette(folder):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            for wnid in ("n01440764", "n02102040"):
                place = folder / "imagenette2-320" / split / wnid
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 20)).save(place / f"{wnid}_{i}.JPEG")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    whole = cifar(tmp_path, monkeypatch, fine=name == "cifar100")
    for split in ("pretrain", "train", "val"):
        images = datasets.load(flags(tmp_path, name), split)
        found, labels = whole[split != "val"]
        assert images.targets == labels and len(images.classes) == (10 if name == "cifar10" else 100)
        assert [np.array_equal(images[i][0], found[i]) for i in range(len(found))] == [True] * len(found)
        assert len(set(images.names)) == len(images) and images.names[1].split("/")[0] == images.classes[labels[1]]


def test_stl10_pretrains_on_its_unlabelled_images(tmp_path, monkeypatch):
    whole = stl10(tmp_path, monkeypatch)
    for split, part in (("pretrain", "unlabeled"), ("train", "train"), ("val", "test")):
        images = datasets.load(flags(tmp_path, "stl10"), split)
        found, labels = whole[part]
        assert images.targets == (labels or [0] * 5) and len(images.classes) == (10 if labels else 1)
        assert all(np.array_equal(images[i][0], found[i]) for i in range(len(found)))


def test_caltech256_holds_a_fifth_of_every_class_out(tmp_path):
    caltech256(tmp_path)
    train, val = (datasets.load(flags(tmp_path, "caltech256"), split) for split in ("pretrain", "val"))
    assert sorted(train.names + val.names) == sorted(
        f"{category}/{label:03}_{i:04}.jpg"
        for label, (category, count) in enumerate(zip(CATEGORIES, (10, 5, 7)), 1)
        for i in range(1, count + 1)
    )
    assert [val.targets.count(label) for label in range(3)] == [2, 1, 1]  # a fifth of 10, 5 and 7
    assert train.names == datasets.load(flags(tmp_path, "caltech256"), "train").names
    other = datasets.load(flags(tmp_path, "caltech256", split_seed=1), "val")
    assert other.names != val.names and [other.targets.count(label) for label in range(3)] == [2, 1, 1]
    for images in (train, val):
        for i, name in enumerate(images.names):
            label, number = (int(part) for part in name.split("/")[1].removesuffix(".jpg").split("_"))
            image, target = images[i]
            assert target == label - 1 and image.size == (20 + number, 30)


def test_imagenette_and_images_that_lack(tmp_path, capsys):
    imagenette(tmp_path)
    train, val = (datasets.load(flags(tmp_path, "imagenette"), split) for split in ("pretrain", "val"))
    assert (len(train), len(val), train.classes) == (6, 4, ["n01440764", "n02102040"])
    assert train[5][0].size == (30, 20) and train[5][1] == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "holds 6 of 9469 images" in told[0] and "holds 4 of 3925 images" in told[1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "imagenette", "caltech256"])
def test_a_data_set_that_is_not_there(tmp_path, name, monkeypatch):
    for split in ("pretrain", "val"):
        with pytest.raises(UserError, match=f"--dataset {name}: .*not hold it.*--download fetches it") as error:
            datasets.load(flags(tmp_path / "x", name), split)
        assert "\n" not in str(error.value) and "download=True" not in str(error.value)
    assert not (tmp_path / "x").exists()  # and nothing was made

    for broken, words in ((urllib.error.URLError("no network"), "no network"), (http.client.IncompleteRead(b""), "0 ")):

        def refused(*given, broken=broken, **more):
            raise broken

        for module in ("cifar", "stl10", "imagenette", "caltech"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refused)
        with pytest.raises(UserError, match=f"--dataset {name} --download: .*{words}") as error:
            datasets.fetch(flags(tmp_path / "x", name, download=True), Process())
        assert "\n" not in str(error.value)


def test_damaged_archives(tmp_path, monkeypatch):
    """Files whose checksums torchvision does not like, and an archive that breaks off while it is unpacked."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (base / "data_batch_1").write_bytes(b"\x80\x04junk")
    with pytest.raises(UserError, match="--dataset cifar10: .*not whole"):
        datasets.load(flags(tmp_path, "cifar10"), "train")

    archive = tmp_path / "there" / "imagenette2-320.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        (tmp_path / "x").write_bytes(os.urandom(30_000))
        tar.add(tmp_path / "x")
    archive.write_bytes(archive.read_bytes()[:10_000])
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", {"320px": ("http://x/" + archive.name, None)})
    with pytest.raises(UserError, match="--dataset imagenette --download: ") as error:
        datasets.fetch(flags(tmp_path / "there", "imagenette", download=True), Process())
    assert "\n" not in str(error.value)


def _fetch(rank, folder):
    """Two processes of one node: the second finds what the first has fetched."""

    def download(args, split, download):
        with open(os.path.join(folder, f"{rank}-{split}"), "w") as file:
            file.write("fetched")

    datasets._torchvision = download
    datasets.fetch(flags(folder, "cifar10", download=True), Process(rank, 2, rank, 2))
    return sorted(os.listdir(folder))


def test_one_process_of_a_node_downloads(tmp_path):
    files = [f"0-{split}" for split in ("pretrain", "train", "val")]
    assert processes(2, _fetch, str(tmp_path)) == [files, files]


def _fetch_on_a_node_each(rank, folder):
    """Two nodes that share a folder → what a process finds there when it is its turn to download."""
    seen = []

    def download(args, split, download):
        seen.append(sorted(os.listdir(folder)))
        if rank == 0:
            time.sleep(0.3)  # long enough for the other to be there, if it did not wait
            with open(os.path.join(folder, split), "w") as file:
                file.write("fetched")

    datasets._torchvision = download
    datasets.fetch(flags(folder, "stl10", download=True), Process(rank, 2, 0, 1))
    return seen


def test_nodes_do_not_write_the_same_files_at_a_time(tmp_path):
    first, second = processes(2, _fetch_on_a_node_each, str(tmp_path))
    assert first == [[], ["pretrain"], ["pretrain", "train"]]
    assert second == [["pretrain", "train", "val"]] * 3


# ------------------------------------------------------------------------------------------------------ parts


@pytest.fixture
def uneven(tmp_path):
    make_images(tmp_path / "train", classes=3, images=4)
    make_images(tmp_path / "train", classes=1, images=9, seed=1)
    return tmp_path


def test_limits_are_balanced_and_nested(uneven):
    whole = datasets.image_folder(uneven, "train")
    found = {n: datasets.load(flags(uneven, limit_images=n), "train") for n in range(1, 20)}
    for n in range(1, 18):
        parts = [found[n].targets.count(label) for label in range(3)]
        assert sum(parts) == min(n, 17) and max(parts[1:]) - min(parts[1:]) <= 1
        assert parts[0] <= parts[1] + 1 or parts[1:] == [4, 4]  # more only where the others have no more
        assert set(found[n].names) <= set(found[n + 1].names) <= set(whole.names)
        assert found[n].names == sorted(found[n].names) and found[n].classes == whole.classes
    assert len(found[19]) == 17
    other = datasets.load(flags(uneven, limit_images=6, split_seed=5), "train")
    assert other.names != found[6].names and [other.targets.count(label) for label in range(3)] == [2, 2, 2]


def test_held_out_images_are_balanced_and_not_trained_on(uneven, tmp_path, monkeypatch):
    whole = datasets.image_folder(uneven, "train")
    found = {split: datasets.load(flags(uneven, hold_out=6), split) for split in ("pretrain", "train", "val")}
    assert sorted(found["train"].names + found["val"].names) == sorted(whole.names)
    assert found["pretrain"].names == found["train"].names
    assert [found["val"].targets.count(label) for label in range(3)] == [2, 2, 2]
    assert datasets.load(flags(uneven, hold_out=6, split_seed=1), "val").names != found["val"].names
    fewer = datasets.load(flags(uneven, hold_out=6, limit_images=3), "val")
    assert set(fewer.names) < set(found["val"].names) and len(fewer) == 3
    with pytest.raises(UserError, match="--hold-out 17: .* has 17 images to train on and hold out of"):
        datasets.load(flags(uneven, hold_out=17), "train")
    stl10(tmp_path / "stl", monkeypatch)
    held = {
        s: len(datasets.load(flags(tmp_path / "stl", "stl10", hold_out=1), s)) for s in ("pretrain", "train", "val")
    }
    assert held == {"pretrain": 5, "train": 2, "val": 1}  # of three labelled images


def test_a_part_keeps_names_labels_and_images_together(uneven):
    whole = datasets.image_folder(uneven, "train")
    part = whole.subset([11, 3, 16]).subset([2, 0])
    for position, before in enumerate((16, 11)):
        assert part.names[position] == whole.names[before] and part.targets[position] == whole.targets[before]
        assert np.array_equal(part[position][0], whole[before][0])
        assert part.where(position) == os.path.join(uneven, "train", whole.names[before])
