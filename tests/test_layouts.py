"""Folders without labels, lists, and tar shards: what they hold, and what is refused."""

import json
import os
import re

import forms
import pytest
import torch
from conftest import SMALL
from test_imagenet import flags, weights

from synco import datasets, layouts, tars
from synco.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def loose(tmp_path):
    """Twelve images at several depths, without class folders."""
    names = (
        [f"{i}.jpg" for i in range(4)] + [f"2020/{i}.jpg" for i in range(4)] + [f"2021/may/{i}.png" for i in range(4)]
    )
    for i, name in enumerate(names):
        forms.put(tmp_path / "photos" / name, forms.jpeg(i))
    forms.put(tmp_path / "photos" / "2022" / "notes.txt")
    return tmp_path / "photos", sorted(names, key=lambda name: (os.path.dirname(name), name))


# ----------------------------------------------------------------------------------------------------- without labels


def test_images_at_any_depth_need_no_labels_to_pretrain_on(loose, program, tmp_path, capsys):
    data, names = loose
    images = datasets.load(flags(data, "imagefolder"), "pretrain")
    assert list(images.names) == names and images.classes == [] and set(images.targets) == {0}
    assert images.content(1) == (data / names[1]).read_bytes() and images.where(1) == str(data / names[1])
    assert f"{'images':18} 12 in {data}, without labels\n" in capsys.readouterr().out
    status, out, err = program(*SMALL, "--save-dir", tmp_path / "run", data)
    assert status == 0 and f"12 in {data}, without labels" in out, err
    os.rename(data, tmp_path / "train")
    status, out, err = program(*SMALL, "--save-dir", tmp_path / "again", tmp_path)  # DATA/train
    assert status == 0 and "4 beside class folders, such as 0.jpg" in out, err
    before, after = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_images_beside_class_folders_make_all_without_labels(tmp_path, capsys):
    forms.folder(tmp_path)
    forms.put(tmp_path / "train" / "cover.jpg", forms.jpeg(0))
    images = datasets.load(flags(tmp_path, "imagefolder"), "pretrain")
    assert len(images) == 25 and images.names[0] == "cover.jpg" and not images.classes
    assert "1 beside class folders, such as cover.jpg: all are without labels" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["main_lincls", "main_semisup", "synco.knn"])
def test_what_needs_labels_says_so(program, programs, tmp_path, loose):
    data = tmp_path / "data"
    forms.folder(data)
    os.rename(loose[0], data / "val2")
    os.rename(data / "val", data / "val3")
    os.rename(data / "val2", data / "val")
    words = ["-a", "shufflenet_v2_x0_5", "--img-size", "32", "-j", "0", data]
    words += ["random"] if program == "synco.knn" else ["--pretrained", "random", "--save-dir", tmp_path / "run"]
    words = [words[-1], *words[:-1]] if program == "synco.knn" else words
    status, _, err = programs(program, *words)
    assert status == 2 and err.count("\n") == 1
    assert f"{data / 'val'}: its val images have no labels, which kNN, probes and maps need" in err
    assert not (tmp_path / "run").exists()


def test_knn_of_unlabelled_training_images_is_refused(loose, program, tmp_path):
    data = tmp_path / "data"
    forms.folder(data)
    (data / "train").rename(data / "gone")
    loose[0].rename(data / "train")
    status, _, err = program(*SMALL, "--knn-freq", 1, "--save-dir", tmp_path / "run", data)
    assert status == 2 and f"{data / 'train'}: its images have no labels, which kNN, probes and maps need" in err
    assert not (tmp_path / "run").exists()


def test_parts_of_unlabelled_images_are_drawn_by_their_names(loose):
    data, names = loose
    held = datasets.load(flags(data, "imagefolder", hold_out=3), "pretrain")
    assert len(held) == 9 and set(held.names) < set(names)
    few, more = (datasets.load(flags(data, "imagefolder", limit_images=n), "pretrain").names for n in (4, 7))
    assert len(few) == 4 and set(few) < set(more) and len(more) == 7
    (data / "0.jpg").unlink()
    assert set(datasets.load(flags(data, "imagefolder", limit_images=4), "pretrain").names) >= set(few) - {"0.jpg"}


def test_a_folder_with_val_alone_is_not_taken_for_photographs(tmp_path):
    forms.put(tmp_path / "val" / "a" / "1.jpg")
    with pytest.raises(UserError, match="has no folder 'train' in it; it should hold train/CLASS/IMAGE"):
        datasets.load(flags(tmp_path, "imagefolder"), "pretrain")
    os.rename(tmp_path / "val", tmp_path / "photos")
    with pytest.raises(UserError, match="has no folder 'val' in it; it should hold val/CLASS/IMAGE"):
        datasets.load(flags(tmp_path, "imagefolder"), "val", labelled=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        datasets.load(flags(tmp_path / "empty", "imagefolder"), "pretrain")


# ------------------------------------------------------------------------------------------------------------- lists


def listed(folder, text, split="train", other=None):
    (folder / "list").write_text(text)
    return layouts.listed(str(folder), split, str(folder / "list"), other and str(other))


@pytest.fixture
def photos(tmp_path):
    for name in ("train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/x, y.jpg"):
        forms.put(tmp_path / name, name.encode())
    return tmp_path


@pytest.mark.parametrize(
    "text, names",
    [
        ("train/b/1.jpg\ntrain/a/1.jpg\n", ["a/1.jpg", "b/1.jpg"]),  # as in the folder train
        ("train/b/1.jpg\tb\r\ntrain/a/1.jpg\ta\r\n\r\n", ["a/1.jpg", "b/1.jpg"]),
        ("\ufefffile,class\ntrain/b/1.jpg,b\ntrain/a/1.jpg,a", ["a/1.jpg", "b/1.jpg"]),
        ('image\tlabel\n"train/b/x, y.jpg"\tb\ntrain/a/1.jpg\ta\n', ["a/1.jpg", "b/x, y.jpg"]),
        ('"train/b/x, y.jpg",b\ntrain/a/1.jpg,a\n', ["a/1.jpg", "b/x, y.jpg"]),
        ("train/b/x, y.jpg\ntrain/a/1.jpg\n", ["a/1.jpg", "b/x, y.jpg"]),
        ("train/b/1.jpg,0\ntrain/a/1.jpg,1\n", ["0/train/b/1.jpg", "1/train/a/1.jpg"]),
        ("ABSOLUTE/train/b/1.jpg,b\ntrain/a/1.jpg,a\n", ["a/1.jpg", "b/1.jpg"]),
    ],
)
def test_lists(photos, text, names):
    found = listed(photos, text.replace("ABSOLUTE", str(photos)))
    assert list(found) == names
    assert found.labelled == (re.search("[,\t][ab01]$", text.strip(), re.M) is not None)
    for i, name in enumerate(names):
        with open(found.place(i).path, "rb") as file:
            assert file.read().decode().endswith(name.split("/", 1)[1].removeprefix("train/"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("train/a/1.jpg\ntrain/a/9.jpg\ntrain/c/1.jpg\n", "2 of its 3 images are not in .*: train/a/9.jpg is first"),
        ("train/a/1.jpg\ntrain/a/2.jpg\ntrain/a/1.jpg\n", "list: 1 images have the name of another, such as a/1.jpg"),
        ("train/a/1.jpg,a\ntrain/a/2.jpg\n", "line 2 has no label, unlike the first"),
        ("train/a/1.jpg\ntrain/a/2.jpg,a\n", "line 2 has a label, unlike the first"),
        ("train/a/1.jpg,a,b\n", "line 1, 'train/a/1.jpg,a,b', is not a path, or a path and a label"),
        ("train/a/1.jpg,\n", "line 1, .* is not a path, or a path and a label"),
        ("train/a/1.jpg,a/b\n", "the label 'a/b' could be no folder's name"),
        ("path,label\n", "the list names no image"),
        ("", "the list names no image"),
        ("train/a/1.jpg\0", "it is no text file"),
    ],
)
def test_lists_that_are_refused(photos, text, message):
    with pytest.raises(UserError, match=message):
        listed(photos, text)


def test_two_lists_have_labels_or_none(photos):
    (photos / "val.txt").write_text("train/a/1.jpg\n")
    with pytest.raises(
        UserError, match="list has labels and .*val.txt has none; give both a column of labels, or neither"
    ):
        listed(photos, "train/b/1.jpg,b\n", other=photos / "val.txt")
    with pytest.raises(UserError, match="gone.txt: the list of images cannot be read"):
        layouts.listed(str(photos), "train", str(photos / "gone.txt"))


@pytest.mark.parametrize("dataset", ["imagenet", "shards"])
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch, dataset):
    forms.folder(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}/train: cannot be read .Permission denied"):
        datasets.load(flags(tmp_path, dataset), "train")


def test_a_list_goes_with_files_of_ones_own(program, tmp_path):
    status, _, err = program(*SMALL, "--dataset", "cifar10", "--train-list", "x.txt", tmp_path)
    assert status == 2 and "--train-list x.txt: lists files of one's own; --dataset cifar10 does without" in err
    status, _, err = program(*SMALL, "--val-list", "", tmp_path)  # of a variable that is not set
    assert status == 2 and "--val-list '': must name a list" in err


# ------------------------------------------------------------------------------------------------------------ shards


def test_shards_with_keys_in_folders_and_labels_in_json(tmp_path):
    members = {}
    for i in range(4):
        key = f"{'cat' if i % 2 else 'dog'}/photo%2E{i}"
        label = json.dumps({"label": "cat" if i % 2 else "dog", "size": i}).encode()
        members |= {f"./{key}.png": forms.jpeg(i), f"./{key}.json": label, f"./{key}.txt": b"a caption"}
    forms.tar(tmp_path / "train" / "all.tar", members)
    found = datasets.load(flags(tmp_path, "shards"), "train")
    assert list(found.names) == ["cat/photo.1.png", "cat/photo.3.png", "dog/photo.0.png", "dog/photo.2.png"]
    assert found.classes == ["cat", "dog"] and found.targets.tolist() == [0, 0, 1, 1]
    assert [found.content(i) for i in range(4)] == [forms.jpeg(i) for i in (1, 3, 0, 2)]
    assert found.where(0) == f"{tmp_path}/train/all.tar: cat/photo.1.png"


def test_shards_that_each_count_from_nothing(tmp_path):
    for shard in range(2):
        forms.tar(tmp_path / f"train-{shard}.tar", {f"00{i}.jpg": forms.jpeg(10 * shard + i) for i in range(2)})
    found = datasets.load(flags(tmp_path, "shards"), "pretrain")
    assert list(found.names) == ["train-0/000.jpg", "train-0/001.jpg", "train-1/000.jpg", "train-1/001.jpg"]
    assert found.classes == [] and found.content(2) == forms.jpeg(10)


@pytest.mark.parametrize(
    "members, message",
    [
        ({"../a.jpg": b"x"}, r"0.tar: its member '../a.jpg' would lie outside the folder; it is not read"),
        ({"/etc/a.jpg": b"x"}, r"0.tar: its member '/etc/a.jpg' would lie outside"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x"}, "0.tar: b.jpg has no label, unlike others"),
        ({"a.jpg": b"x", "a.json": b"{"}, "0.tar: a.json: holds no label that can be read"),
        ({"a.jpg": b"x", "a.cls": b"x/y"}, "0.tar: the label 'x/y' could be no folder's name"),
        ({"a.txt": b"x"}, "0.tar: holds no images"),
    ],
)
def test_shards_that_are_refused(tmp_path, members, message):
    forms.tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        layouts.shards(str(tmp_path), "train")


def test_missing_and_damaged_shards_are_named(tmp_path, capsys):
    with pytest.raises(UserError, match=r"has no shards train-\*.tar or train/\*.tar"):
        layouts.shards(str(tmp_path), "train")
    for i in (0, 1, 3, 6):
        forms.tar(tmp_path / f"train-{i:03}.tar", {f"{i}.jpg": forms.jpeg(i)})
    assert len(layouts.shards(str(tmp_path), "train")) == 4
    assert "train-002.tar and 2 more are missing from the sequence of 4 shards" in capsys.readouterr().err
    path = tmp_path / "train-003.tar"
    whole = path.read_bytes()
    for content in (whole[:900], whole[:512], b"", b"no tar", os.urandom(2000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="train-003.tar: "):
            layouts.shards(str(tmp_path), "train")


@pytest.mark.parametrize(
    "names, missing",
    [
        ("a-00000-of-00003 a-00002-of-00003", "a-00001-of-00003.tar is missing"),
        ("a-00000-of-00003 a-00001-of-00003", "a-00002-of-00003.tar is missing"),
        ("a-1 a-2 a-3", None),
        ("n01440764 n01443537", None),
        ("a b", None),
    ],
)
def test_gaps(names, missing, capsys):
    layouts.warn_of_gaps([f"{name}.tar" for name in names.split()])
    err = capsys.readouterr().err
    assert missing in err if missing else not err


def test_an_unreadable_image_names_shard_and_member(tmp_path):
    forms.tar(tmp_path / "train-0.tar", {"a.jpg": b"no image", "b.jpg": forms.jpeg(0)})
    images = datasets.load(flags(tmp_path, "shards"), "pretrain")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/train-0.tar: a.jpg: cannot be read as an image")):
        images[0]
    assert images[1][0].size == (24, 20)
    with open(tmp_path / "train-0.tar", "ab") as file:
        file.write(bytes(512))
    fresh = datasets.stored(images.names)
    with pytest.raises(UserError, match="train-0.tar: b.jpg: .*the tar file has changed since it was indexed"):
        fresh[1]


def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch):
    for i in range(5):
        forms.tar(tmp_path / f"train-{i}.tar", {f"{i}.jpg": forms.jpeg(i)})
    images = datasets.load(flags(tmp_path, "shards"), "pretrain")
    monkeypatch.setattr(tars.Reader, "MOST", 2)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [images.content(i) for i in range(5)] * 2 == [images.content(i) for i in range(5)] * 2
    assert not before or len(os.listdir("/proc/self/fd")) == before + 2


@pytest.mark.parametrize("name", ["a/b.jpg", "a.b/c.d.e.jpg", ".hidden.png", "100%.x%2E.jpg"])
def test_names_survive_as_keys(name):
    key = tars.quoted(name)
    assert tars.plain(key) == name and os.path.basename(key).count(".") == 1
