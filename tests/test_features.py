"""The store of features: what is in it, that it is made once, goes on, and is never taken for another's."""

import argparse
import errno
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ARCH, ROOT, features_by_torchvision, make_images, processes

from synco import augment, datasets, features
from synco.distributed import Process, seed_of
from synco.errors import Failure, UserError

LOAD = {"workers": 0, "timeout": 0}


def opened(path):
    settings = {"arch": None, "stem": None, "img_size": 32, "stats": None, "dataset": "imagefolder", "seed": 0}
    return features.open_backbone(argparse.Namespace(**settings), path, torch.device("cpu"))


def store(folder, rank=0, world_size=1, dtype="float32", batch=5):
    process = Process(rank, world_size, rank, world_size)
    return features.Store(str(folder), process, batch=batch, dtype=dtype, load=LOAD)


@pytest.fixture
def computed(monkeypatch):
    """How many images were encoded since."""
    counts, encode = [0], features.encode

    def counting(network, head, images):
        counts[0] += len(images) if images.any() else 0
        return encode(network, head, images)

    monkeypatch.setattr(features, "encode", counting)
    return counts


def test_what_is_in_it(pretrained, data, tmp_path):
    images = datasets.image_folder(data, "train")
    found = store(tmp_path).features(opened(pretrained), images, "train")
    views = torch.stack([augment.center_view(32)(images.image(i)) for i in range(24)])
    np.testing.assert_allclose(found, features_by_torchvision(pretrained, views), rtol=1e-4, atol=1e-5)
    (place,) = tmp_path.iterdir()
    assert place.name.startswith("train-") and sorted(os.listdir(place)) == [
        "checks.npy", "features.json", "features.npy", "labels.npy", "names.npy",
    ]  # fmt: skip
    assert np.array_equal(np.load(place / "features.npy"), found) and found.dtype == np.float32
    assert np.load(place / "names.npy").tolist() == list(images.names)
    assert np.load(place / "labels.npy").tolist() == list(images.targets)
    facts = json.loads((place / "features.json").read_text())
    assert (facts["arch"], facts["count"], facts["classes"], facts["img_size"]) == (ARCH, 24, images.classes, 32)


def test_augmented_views_are_the_loaders(pretrained, data, tmp_path):
    images, view = datasets.image_folder(data, "val"), augment.augmentation(32, "v2")
    for crop in (0, 1):
        found = store(tmp_path).features(opened(pretrained), images, "view", crop=crop, seed=4)
        views = []
        for i in range(len(images)):
            torch.manual_seed(seed_of("crops", 4, crop, i))
            views.append(view(images.image(i)))
        np.testing.assert_allclose(found, features_by_torchvision(pretrained, torch.stack(views)), rtol=1e-4, atol=1e-5)


def _extract(rank, world_size, pretrained, data, folder):
    found = store(folder, rank, world_size).features(opened(pretrained), datasets.image_folder(data, "train"), "train")
    return np.array(found)


def test_the_same_bits_whatever_the_number_of_processes(pretrained, data, tmp_path):
    alone = _extract(0, 1, pretrained, data, tmp_path / "1")
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        for found in processes(world_size, _extract, world_size, pretrained, data, folder):
            assert np.array_equal(found, alone)


def test_it_is_made_once(pretrained, data, tmp_path, computed, capsys):
    images = datasets.image_folder(data, "train")
    first = np.array(store(tmp_path).features(opened(pretrained), images, "train"))
    assert computed == [24]
    second = store(tmp_path).features(opened(pretrained), images, "train")
    assert computed == [24] and np.array_equal(first, second) and "there already" in capsys.readouterr().out
    half = store(tmp_path, dtype="float16").features(opened(pretrained), images, "train")
    assert computed == [48] and half.dtype == np.float16
    np.testing.assert_array_equal(half, first.astype(np.float16))


def test_an_interrupted_one_goes_on(pretrained, data, tmp_path, computed, monkeypatch, capsys):
    """Ctrl-C in the midst of a batch's rows, and a signal between two."""
    images = datasets.image_folder(data, "train")
    whole = np.array(store(tmp_path / "whole").features(opened(pretrained), images, "train"))
    write, left = features._write, [4]

    def cutting(file, position, content):
        left[0] -= 1
        if left[0] == 0:  # the rows of the third batch are half written
            write(file, position, content[: len(content) // 2])
            raise KeyboardInterrupt
        write(file, position, content)

    monkeypatch.setattr(features, "_write", cutting)
    left[0], computed[0] = 5, 0
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "cut").features(opened(pretrained), images, "train")
    monkeypatch.setattr(features, "_write", write)
    (place,) = (tmp_path / "cut").iterdir()
    assert "features.npy" not in os.listdir(place) and computed == [15]
    monkeypatch.setattr(features.signals, "warned", lambda: "SIGTERM")
    with pytest.raises(features.Preempted, match="stopped by SIGTERM; what has been computed stays in"):
        store(tmp_path / "cut").features(opened(pretrained), images, "train")
    monkeypatch.undo()
    assert computed == [20]
    capsys.readouterr()
    found = store(tmp_path / "cut").features(opened(pretrained), images, "train")
    assert "15 of 24 are there; 9 are computed" in capsys.readouterr().out
    assert np.array_equal(found, whole)


def test_two_programs_do_not_write_the_same_features(pretrained, data, tmp_path, monkeypatch):
    images = datasets.image_folder(data, "train")
    with monkeypatch.context() as patch:
        patch.setattr(features.signals, "warned", lambda: "SIGTERM")
        with pytest.raises(features.Preempted):
            store(tmp_path).features(opened(pretrained), images, "train")
    (place,) = tmp_path.iterdir()
    monkeypatch.setattr(features.files, "FolderLock", functools.partial(features.files.FolderLock, patience=0))
    holder = (
        "import sys\nfrom synco import files\nwith files.FolderLock(sys.argv[1]):\n print('held', flush=True)\n input()"
    )
    words = [sys.executable, "-c", holder, place]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"--features {place}: another run is using it .process {other.pid} on "):
            store(tmp_path).features(opened(pretrained), images, "train")
        other.communicate("\n")
    found = np.array(store(tmp_path).features(opened(pretrained), images, "train"))
    assert found.any() and ".lock" not in os.listdir(place)


def test_a_changed_bit_is_seen(pretrained, data, tmp_path, computed):
    images = datasets.image_folder(data, "train")
    first = np.array(store(tmp_path).features(opened(pretrained), images, "train"))
    (place,) = tmp_path.iterdir()
    with open(place / "features.npy", "r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"x")
    computed[0] = 0
    assert np.array_equal(store(tmp_path).features(opened(pretrained), images, "train"), first)
    assert computed == [4]  # the last batch
    (place / "features.npy").write_bytes(b"no array")
    assert np.array_equal(store(tmp_path).features(opened(pretrained), images, "train"), first)


def test_other_weights_or_images_are_others(pretrained, tmp_path, computed, capsys):
    make_images(tmp_path / "d" / "train", classes=2, images=3)
    folder = tmp_path / "f"
    folder.mkdir()

    def ask():
        computed[0] = 0
        store(folder).features(opened(path), datasets.image_folder(tmp_path / "d", "train"), "train")
        return computed[0], "of other weights, images or settings, computed beside them" in capsys.readouterr().out

    path = pretrained
    assert ask() == (6, False) and ask() == (0, False)
    saved = torch.load(pretrained, weights_only=True)
    saved["epoch"] = 7
    path = str(tmp_path / "same.pth.tar")
    torch.save(saved, path)
    assert ask() == (0, False)  # another file with the same weights
    saved["state_dict"]["module.encoder_q.conv1.0.weight"][0, 0, 0, 0] += 1
    path = str(tmp_path / "other.pth.tar")
    torch.save(saved, path)
    assert ask() == (6, True)
    os.utime(tmp_path / "d" / "train" / "c1" / "0.jpg", ns=(1, 1))  # written to, under the same name
    assert ask() == (6, True)
    os.rename(tmp_path / "d" / "train" / "c1" / "0.jpg", tmp_path / "d" / "train" / "c1" / "9.jpg")
    assert ask() == (6, True)


def test_a_full_disk(pretrained, data, tmp_path, monkeypatch):
    images = datasets.image_folder(data, "train")

    def full(file, position, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(features, "_write", full)
        with pytest.raises(Failure, match=r"features.npy.part: cannot be written \(No space left on device\); what"):
            store(tmp_path).features(opened(pretrained), images, "train")
    (place,) = tmp_path.iterdir()
    assert "features.npy" not in os.listdir(place)
    with monkeypatch.context() as patch:
        patch.setattr(features.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
        with pytest.raises(UserError, match=r"train-\w+: the features take 0.00 GB, and 0.00 GB are free"):
            store(tmp_path / "other").features(opened(pretrained), images, "train")


def test_features_that_are_no_numbers(pretrained, data, tmp_path):
    images, model = datasets.image_folder(data, "train"), opened(pretrained)
    with torch.no_grad():
        model.network.conv5[1].bias += 1e6
    with pytest.raises(UserError, match="from 0 on are beyond float16's range; take float32"):
        store(tmp_path, dtype="float16").features(model, images, "train")
    with torch.no_grad():
        model.network.conv5[1].bias += torch.inf
    with pytest.raises(UserError, match="from 0 on are not finite"):
        store(tmp_path).features(model, images, "train")


def test_evenly_spread():
    assert features.spread(5, 9).tolist() == [0, 1, 2, 3, 4] and features.spread(10, 3).tolist() == [0, 3, 6]
