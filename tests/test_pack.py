"""Packing: what the shards hold, that they are the same each time, and that a packing that was killed goes on."""

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile

import forms
import numpy as np
import pytest
from PIL import Image
from test_imagenet import FORMS, flags, held

from synco import datasets, index, pack, tars


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packing(tool):
    """packing(args, out, "flags ...") packs what `flags` names → (exit status, stdout, stderr)."""

    def run(args, out, *more):
        lists = ["--train-list", args.train_list, "--val-list", args.val_list] if args.train_list else []
        return tool(pack, args.data, out, "--dataset", args.dataset, "--images-per-shard", 5, *lists, *more)

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def same_images(folder, monkeypatch):
    """Whether the shards in a folder are read, by the index beside them alone, as the images of `forms`."""
    with monkeypatch.context() as patch:
        patch.setattr(tars, "samples", lambda path: pytest.fail("a shard was scanned"))
        for split, expected in forms.images().items():
            found = datasets.load(flags(folder, "shards"), split)
            assert list(found.names) == sorted(expected) and found.classes == sorted(forms.WNIDS)
            assert [found.content(i) for i in range(len(found))] == [expected[name] for name in found.names]
            assert [found.classes[y] for y in found.targets] == [name.partition("/")[0] for name in found.names]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_the_same_shards(tmp_path, packing, monkeypatch, form):
    if form == "archives":
        pytest.importorskip("scipy")
    forms.folder(tmp_path / "plain")
    status, out, err = packing(flags(tmp_path / "plain", "imagefolder"), tmp_path / "expected")
    assert status == 0, err
    assert "train: 24 images in 5 shards, 0.00 GB" in out and "val: 9 images in 2 shards" in out
    same_images(tmp_path / "expected", monkeypatch)
    status, _, err = packing(held(form, tmp_path / form), tmp_path / "out", "-j", 3)
    assert status == 0, err
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_parquet_becomes_shards(tmp_path, packing, monkeypatch):
    pytest.importorskip("pyarrow")
    forms.parquet(tmp_path / "hf")
    status, out, err = packing(flags(tmp_path / "hf", "imagefolder"), tmp_path / "out")
    assert status == 0 and "train: 24 images in 5 shards" in out, err
    same_images(tmp_path / "out", monkeypatch)


def test_parquet_without_images_is_refused(tmp_path, packing, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hf").mkdir()
    path = tmp_path / "hf" / "train-0.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), path)
    status, _, err = packing(flags(tmp_path / "hf"), tmp_path / "out")
    assert status == 2 and "train-0.parquet: has no column of images, with bytes and path; it has text, label" in err
    path.write_bytes(b"no parquet")
    status, _, err = packing(flags(tmp_path / "hf"), tmp_path / "out")
    assert status == 2 and "train-0.parquet: cannot be read as a parquet file" in err and err.count("\n") == 1
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    status, _, err = packing(flags(tmp_path / "hf"), tmp_path / "out")
    assert status == 2 and "train-0.parquet: to read it takes pyarrow: pip install pyarrow" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "cell, label, message",
    [
        ({"bytes": None, "path": "1.jpg"}, 1, "an image has no bytes in it, but at most a path"),
        (None, 1, "an image has no bytes in it, but at most a path"),
        ({"bytes": b"x", "path": "1.jpg"}, -1, "its label -1 is none of its classes'"),
        ({"bytes": b"x", "path": "1.jpg"}, None, "its label None is none of its classes'"),
        ({"bytes": b"x", "path": "1.tensor"}, 1, "'b/1.tensor' can be no image's name in a shard"),
        ({"bytes": b"x", "path": "../1.jpg"}, 1, "'b/../1.jpg' can be no image's name in a shard"),
    ],
)
def test_parquet_that_lacks_something_is_refused(tmp_path, packing, cell, label, message):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hf").mkdir()
    cells = [{"bytes": b"x", "path": "0.jpg"}, cell]
    names = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": cells, "label": [0, label]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    parquet.write_table(table, tmp_path / "hf" / "train-0.parquet")
    status, _, err = packing(flags(tmp_path / "hf", "imagefolder"), tmp_path / "out")
    assert status == 2 and message in err and err.count("\n") == 1, err


def test_other_tools_read_the_shards(tmp_path, packing):
    args = held("folder", tmp_path / "data")
    packing(args, tmp_path / "out")
    names = []
    for i in range(5):
        with tarfile.open(tmp_path / "out" / f"train-{i:06}.tar") as shard:
            names += shard.getnames()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in shard} == {(0, 0, 0, "", 0o644)}
    assert names[:3] == ["n00000007/n00000007_0.JPEG", "n00000007/n00000007_0.cls", "n00000007/n00000007_1.JPEG"]
    assert sorted(name for name in names if name.endswith("JPEG")) == sorted(forms.images()["train"])
    for line in (tmp_path / "out" / "train.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    webdataset = pytest.importorskip("webdataset")
    shards = str(tmp_path / "out" / "train-{000000..000004}.tar")
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpeg", "cls"))
    assert [label for _, label in samples] == [0] * 8 + [1] * 8 + [2] * 8
    first = np.asarray(Image.open(io.BytesIO(forms.images()["train"]["n00000007/n00000007_0.JPEG"])))
    assert np.array_equal(samples[0][0], first)


@pytest.mark.parametrize(
    "cut", ["train-000002.tar", "train.pack.json", "train.sha256", "train.index", "val-000001.tar"]
)
def test_a_packing_that_was_killed_goes_on(tmp_path, packing, monkeypatch, cut):
    from conftest import cut_at

    args = held("folder", tmp_path / "data")
    assert packing(args, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        cut_at(patch, cut)
        assert packing(args, tmp_path / "out", "-j", 1)[0] == 130
    assert not (tmp_path / "out" / cut).exists()
    (tmp_path / "out" / "train-000004.tar.0123abcd.tmp").write_bytes(b"of a killed one")
    there = {name: os.stat(tmp_path / "out" / name).st_ino for name in os.listdir(tmp_path / "out")}
    assert packing(args, tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for name in there:
        if name.endswith(".tar"):  # was not written again
            assert os.stat(tmp_path / "out" / name).st_ino == there[name]


def test_another_packing_is_not_mixed_in(tmp_path, packing):
    args = held("folder", tmp_path / "data")
    assert packing(args, tmp_path / "out")[0] == 0
    before = contents(tmp_path / "out")
    status, _, err = packing(args, tmp_path / "out", "--short-side", 16)
    assert status == 2 and "out: holds another packing of train (short_side is another); give another folder" in err
    forms.put(tmp_path / "data" / "train" / forms.WNIDS[0] / "more.jpg", forms.jpeg(9))
    status, _, err = packing(args, tmp_path / "out")
    assert status == 2 and "holds another packing of train (images is another)" in err
    status, _, err = packing(args, tmp_path / "data")
    assert status == 2 and err.endswith("data: is SOURCE itself; give another folder for the shards\n")
    assert contents(tmp_path / "out") == before
    forms.tar(tmp_path / "theirs" / "train-000000.tar", {"a.jpg": b""})
    status, _, err = packing(args, tmp_path / "theirs")
    assert status == 2 and "holds another packing of train (it has train-000000.tar)" in err


def test_verify_names_what_has_changed(tmp_path, packing, tool):
    args = held("folder", tmp_path / "data")
    packing(args, tmp_path / "out")
    status, out, _ = tool(pack, "--verify", tmp_path / "out")
    assert status == 0 and "train.sha256: 5 shards are as they were packed" in out and "val.sha256: 2" in out
    path = tmp_path / "out" / "train-000001.tar"
    whole = bytearray(path.read_bytes())
    whole[700] ^= 1
    path.write_bytes(whole)
    status, _, err = tool(pack, "--verify", tmp_path / "out")
    assert status == 2 and "1 of 5 shards are not as packed, such as train-000001.tar" in err
    path.unlink()
    status, _, err = tool(pack, "--verify", tmp_path / "out")
    assert status == 2 and "such as train-000001.tar (missing)" in err
    for text in ("", "no checksum\n", "0123  train-000000.tar\n"):
        (tmp_path / "out" / "train.sha256").write_text(text)
        status, _, err = tool(pack, "--verify", tmp_path / "out")
        assert status == 2 and "train.sha256: is no list of checksums" in err and err.count("\n") == 1
    assert tool(pack, "--verify", tmp_path / "data")[0] == 2
    assert tool(pack, "--verify", tmp_path / "out", "again")[0] == 2 and tool(pack, tmp_path / "out")[0] == 2


def test_a_shard_that_has_changed_since_is_refused(tmp_path, packing, capsys):
    args = held("folder", tmp_path / "data")
    packing(args, tmp_path / "out")
    path = tmp_path / "out" / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match=r"train-000001.tar: has changed since train.index was made: it has \d+ bytes"):
        datasets.load(flags(tmp_path / "out", "shards"), "train")
    path.unlink()
    capsys.readouterr()
    assert len(datasets.load(flags(tmp_path / "out", "shards"), "train")) == 19
    assert "train-000001.tar is missing from the sequence" in capsys.readouterr().err
    path.write_bytes(whole)
    (tmp_path / "out" / "train-000004.tar").unlink()  # the last, which leaves no gap
    assert len(datasets.load(flags(tmp_path / "out", "shards"), "train")) == 20
    assert "its train shards hold 20 of the 24 images of train.pack.json" in capsys.readouterr().err


def test_shards_without_their_index_are_scanned_to_the_same(tmp_path, packing):
    packing(held("folder", tmp_path / "data"), tmp_path / "out")
    expected = datasets.load(flags(tmp_path / "out", "shards"), "train")
    sum_, names = expected.names.sum(), list(expected.names)
    os.remove(tmp_path / "out" / "train.index")
    found = datasets.load(flags(tmp_path / "out", "shards"), "train")
    assert list(found.names) == names and found.names.sum() == sum_
    assert index.read(str(tmp_path / "out" / "train.index"), "") is None


def test_a_short_side_is_what_larger_images_get(tmp_path, packing, capsys):
    rng = np.random.default_rng(0)
    sizes = {"a/wide.jpg": (90, 40), "a/tall.png": (40, 61), "b/small.jpg": (30, 20), "b/exact.jpg": (64, 32)}
    for name, (width, height) in sizes.items():
        content = io.BytesIO()
        pixels = np.tile(rng.integers(0, 256, (1, 1, 3)), (height, width, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(content, "PNG" if name.endswith("png") else "JPEG")
        forms.put(tmp_path / "data" / "train" / name, content.getvalue())
    args = flags(tmp_path / "data", "imagefolder")
    status, _, err = packing(args, tmp_path / "out", "--short-side", 32, "--quality", 80, "--splits", "train")
    assert status == 0, err
    found = datasets.load(flags(tmp_path / "out", "shards"), "train")
    assert "train: re-encoded when they were packed (short side 32, JPEG quality 80)" in capsys.readouterr().out
    expected = {"a/wide.jpg": (72, 32), "a/tall.png": (32, 48), "b/small.jpg": (30, 20), "b/exact.jpg": (64, 32)}
    original = datasets.load(args, "train")
    for i, name in enumerate(found.names):
        image = found[i][0]
        assert image.size == expected[name]
        difference = np.asarray(image, dtype=int) - np.asarray(original[i][0], dtype=int)[:1, :1]
        assert np.abs(difference).max() <= 6
        assert (found.content(i) == original.content(i)) == (sizes[name] == expected[name])


def test_an_image_that_cannot_be_shortened_is_named(tmp_path, packing):
    forms.put(tmp_path / "train" / "a" / "1.jpg", b"no image")
    args = flags(tmp_path, "imagefolder")
    status, _, err = packing(args, tmp_path / "out", "--short-side", 32, "--splits", "train")
    assert status == 2 and "a/1.jpg: cannot be read as an image" in err and err.count("\n") == 1
    assert packing(args, tmp_path / "copied", "--splits", "train")[0] == 0  # its bytes are nobody's business


def test_what_is_not_to_be_packed_is_said_before_anything_is_written(tmp_path, packing):
    for name in ("1.jpg", "2.jpg", "3.unknown"):
        forms.put(tmp_path / "data" / name, b"")
    (tmp_path / "list").write_text("1.jpg\n3.unknown\n")
    (tmp_path / "good").write_text("1.jpg\n2.jpg\n")
    args = flags(tmp_path / "data", "imagefolder", train_list=tmp_path / "good", val_list=tmp_path / "list")
    status, _, err = packing(args, tmp_path / "out")
    assert status == 2 and "data: '3.unknown' can be no image's name in a shard" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_progress_has_an_eta(tmp_path, packing, monkeypatch):
    import time

    write = pack.write_shard
    monkeypatch.setattr(pack, "SECONDS", 0.02)
    monkeypatch.setattr(pack, "write_shard", lambda *given: (write(*given), time.sleep(0.1)))
    _, out, _ = packing(held("folder", tmp_path / "data"), tmp_path / "out", "-j", 1)
    assert re.search(r"^train: \d+ of 24 images, \d+ images/s, ETA 0:00:0\d$", out, re.M)


def test_unlabelled_images_and_odd_names(tmp_path, packing):
    for name in ("x.y.jpg", "é/ü 100%.png", "deep/er/.hidden.jpg"):
        forms.put(tmp_path / "data" / name, forms.jpeg(len(name)))
    args = flags(tmp_path / "data", "imagefolder")
    status, out, err = packing(args, tmp_path / "out")  # there is no val
    assert status == 0 and "train: 3 images without labels in 1 shards" in out and "val" not in out, err
    before, after = datasets.load(args, "pretrain"), datasets.load(flags(tmp_path / "out", "shards"), "pretrain")
    assert list(before.names) == list(after.names) and after.classes == [] and after.checksum() == before.checksum()
    assert [after.content(i) for i in range(3)] == [before.content(i) for i in range(3)]
    assert json.loads((tmp_path / "out" / "train.pack.json").read_text())["classes"] is None
    listed = subprocess.run(["tar", "-tf", tmp_path / "out" / "train-000000.tar"], capture_output=True, check=False)
    assert listed.returncode == 0 and listed.stdout.count(b"\n") == 3
