"""ImageNet in each of its forms: the same names, labels and bytes, and the same run."""

import argparse
import itertools
import os
import re

import forms
import pytest
import torch
from conftest import SMALL, processes

from synco import datasets, imagenet
from synco.errors import UserError


def flags(data, dataset="imagenet", **given):
    defaults = {"download": False, "limit_images": None, "hold_out": None, "split_seed": 0}
    defaults |= {"train_list": None, "val_list": None}
    return argparse.Namespace(data=str(data), dataset=dataset, **defaults | given)


def held(form, root):
    """The flags of ImageNet in a form, which is written to root."""
    if form == "list":
        forms.folder(root / "data")
        forms.lists(root, root / "data")
        return flags(root / "data", "imagefolder", train_list=str(root / "train.csv"), val_list=str(root / "val.csv"))
    getattr(forms, form)(root)
    return flags(root)


FORMS = ("folder", "list", "archives", "kaggle", "shards")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", FORMS)
def test_names_labels_and_bytes_are_the_same_in_each_form(tmp_path, form):
    if form == "archives":
        pytest.importorskip("scipy")
    args, checksums = held(form, tmp_path / form), {}
    forms.folder(tmp_path / "plain")
    for split, expected in forms.images().items():
        found = datasets.load(args, split)
        assert list(found.names) == sorted(expected) and found.classes == sorted(forms.WNIDS)
        assert [found.names[i] for i in range(len(found))] == list(found.names)
        assert [found.classes[label] for label in found.targets] == [name.partition("/")[0] for name in found.names]
        assert [found.content(i) for i in range(len(found))] == [expected[name] for name in found.names]
        assert found.checksum() == datasets.image_folder(tmp_path / "plain", split).checksum()
        checksums[split] = found.checksum()
    assert len(set(checksums.values())) == 2


def weights(folder, name="checkpoint_0001.pth.tar"):
    return torch.load(folder / name, weights_only=True)["state_dict"]


def words(args):
    lists = ["--train-list", args.train_list, "--val-list", args.val_list] if args.train_list else []
    return [*SMALL, "--knn-freq", "2", "--knn-k", "3", "--dataset", args.dataset, *lists, args.data]


def test_a_run_goes_on_in_another_form_and_ends_the_same(tmp_path, program, signal_after):
    """From a folder to shards, and on to a list."""
    plain = words(held("folder", tmp_path / "folder"))
    status, out, err = program(*plain, "--save-dir", tmp_path / "whole")
    assert status == 0, err
    expected = weights(tmp_path / "whole")
    moving = ["--save-dir", tmp_path / "moved", "--resume", "auto"]
    signal_after(2)
    assert program(*plain, *moving)[0] == 75
    signal_after(2)
    assert program(*words(held("shards", tmp_path / "shards")), *moving)[0] == 75
    status, out, err = program(*words(held("list", tmp_path / "list")), *moving)
    assert status == 0, err
    found = weights(tmp_path / "moved")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_images_are_no_continuation(tmp_path, program):
    args = held("folder", tmp_path / "folder")
    assert program(*words(args), "--epochs", 1, "--save-dir", tmp_path / "run")[0] == 0
    os.rename(
        tmp_path / "folder/train/n00000007/n00000007_3.JPEG", tmp_path / "folder/train/n00000007/n00000007_9.JPEG"
    )
    resumed = ["--epochs", 2, "--force-resume", "--resume", "auto", "--save-dir", tmp_path / "run"]
    status, _, err = program(*words(args), *resumed)
    assert status == 2 and "other training images (by their names)" in err


def _seen(rank, forms_flags, cache):
    """What a process makes of ImageNet in several forms, and whether it has listed or scanned anything."""
    from synco import index, layouts, loader, tars
    from synco.distributed import Process, world_size

    os.environ["XDG_CACHE_HOME"] = cache
    looked = []
    for module, name in ((index, "scan"), (tars, "members"), (layouts, "_lines"), (imagenet, "_flat")):
        function = getattr(module, name)

        def watched(*given, function=function):
            looked.append(function)
            return function(*given)

        setattr(module, name, watched)
    process, found = Process(rank=rank, world_size=world_size()), []
    index.SETTLED = -(10**18)  # as if all had been left alone for long
    for index.WORTH_IT, args in itertools.product((10_000, 1), forms_flags):  # sent by rank 0, then in its cache
        images = datasets.load(args, "pretrain")
        order = [index for _, index in loader.EpochSampler(len(images), process, seed=1)]
        found.append((list(images.names), [images.names[i] for i in order]))
    return found, len(looked)


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_process_looks_and_all_see_the_same(tmp_path, world_size):
    several = [held(form, tmp_path / form) for form in ("folder", "list", "kaggle", "shards")]
    found = processes(world_size, _seen, several, str(tmp_path / "cache"))
    expected = sorted(forms.images()["train"])
    for form in range(2 * len(several)):
        assert all(seen[form][0] == expected for seen, _ in found)
        assert sorted(name for seen, _ in found for name in seen[form][1]) == expected
        assert [seen[form] for seen, _ in found] == [seen[0] for seen, _ in found]
    looks = [count for _, count in found]
    assert looks[0] > 0 and not any(looks[1:])


@pytest.mark.parametrize(
    "member, name",
    [
        ("n01440764_10026.JPEG", "n01440764/n01440764_10026.JPEG"),
        ("a/b/n01440764_10026.jpg", "n01440764/n01440764_10026.JPEG"),
        ("n01440764_10026_n01440764.JPEG", "n01440764/n01440764_10026.JPEG"),
        ("ILSVRC2012_val_00000293_n01751748.JPEG", "n01751748/ILSVRC2012_val_00000293.JPEG"),
        ("ILSVRC2012_val_00000001.JPEG", "n00000007/ILSVRC2012_val_00000001.JPEG"),
        ("ILSVRC2012_val_00000002.JPEG", None),
        ("photo.jpg", None),
    ],
)
def test_canonical_names(member, name):
    assert imagenet.canonical(member, {"ILSVRC2012_val_00000001": "n00000007"}) == name


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        imagenet.find(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: holds ImageNet's train in no form that is known: tra")):
        imagenet.find(str(tmp_path), "train")
    forms.archives(tmp_path, devkit=False)
    with pytest.raises(UserError, match="has no labels of the val images: put ILSVRC2012_devkit_t12.tar.gz or LOC_val"):
        imagenet.find(str(tmp_path), "val")
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n00000012 1 2 3 4\n")
    with pytest.raises(UserError, match="the classes of 8 images are not known, such as ILSVRC2012_val_0000000"):
        imagenet.find(str(tmp_path), "val")
    table.unlink()
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="ILSVRC2012_devkit_t12.tar.gz: (is not the devkit|to read it takes scipy)"):
        imagenet.find(str(tmp_path), "val")


def test_an_archive_that_is_cut_short_is_refused(tmp_path):
    forms.archives(tmp_path, devkit=False)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    for size in (len(whole) // 2, 700, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="ILSVRC2012_img_train.tar: "):
            imagenet.find(str(tmp_path), "train")
