"""The evaluation's table against NumPy from the stored features, in one process and in several."""

import errno
import json
import os
import shutil
import unittest.mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import know_images, make_images, make_pretrained, processes

from synco import augment, card, datasets, evaluate
from synco.distributed import Process

FLAGS = "--img-size 32 -j 0 -b 16".split()
ARCH = "resnet18"  # of half as many features as the other tests' network


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A data folder of 60 images to train and 21 to validate."""
    folder = tmp_path_factory.mktemp("many")
    make_images(folder / "train", classes=3, images=20)
    make_images(folder / "val", classes=3, images=7, seed=1)
    return folder


@pytest.fixture(scope="module")
def pretrained(many, tmp_path_factory):
    """A checkpoint whose BatchNorm knows these images."""
    torch.manual_seed(7)
    net = torchvision.models.get_model(ARCH)
    images = datasets.image_folder(many, "train").with_transform(augment.center_view(32))
    know_images(net, torch.stack([x for x, _ in images]))
    state = {f"module.encoder_q.{name}": w for name, w in net.state_dict().items()}
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth.tar"
    torch.save({"epoch": 5, "arch": ARCH, "state_dict": state}, path)
    return str(path)


def stored(folder, name):
    """A split's (unit rows float64, labels) from the files in a store."""
    (place,) = folder.glob(f"{name}-*")
    rows = np.load(place / "features.npy").astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.load(place / "labels.npy")


def by_sorting(train, val, k, t):
    """Which val images weighted kNN gets right."""
    similarity = val[0] @ train[0].T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(val[0]), 3))
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1)) / t)
    np.add.at(votes, (np.arange(len(votes))[:, None], train[1][nearest]), weights)
    return votes.argmax(axis=1) == val[1]


def test_the_table(programs, pretrained, many, tmp_path):
    words = [pretrained, many, *FLAGS, "--features", tmp_path / "f", "-o", tmp_path / "e.json"]
    status, out, err = programs("synco.evaluate", *words)
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "e.json").read_text())
    (one,) = found["checkpoints"]
    train, val = (stored(tmp_path / "f", name) for name in ("train", "val"))
    for k in (10, 20, 100, 200):
        for t in (0.07, 0.1):
            entry = one["accuracies"][f"knn k={k} t={t}"]
            hits = by_sorting(train, val, k, t)
            assert entry["top1"] == pytest.approx(100 * hits.mean())
            drawn = np.random.default_rng(0).choice(hits, size=(20_000, 21)).mean(axis=1)
            low, high = 100 * np.quantile(drawn, [0.025, 0.975])
            assert abs(entry["low"] - low) < 4.8 and abs(entry["high"] - high) < 4.8  # one image of 21
            assert f"kNN, k = {k}, t = {t}".ljust(24) in out and f"{entry['top1']:.2f} [{entry['low']:.2f}" in out
    squares = ((val[0][:, None] - val[0]) ** 2).sum(axis=2)[~np.eye(21, dtype=bool)]
    assert one["uniformity"] == pytest.approx(np.log(np.exp(-2 * squares).mean()), rel=1e-6)
    views = [np.load(next((tmp_path / "f").glob(f"view{i}-*")) / "features.npy").astype(np.float64) for i in (0, 1)]
    views = [view / np.linalg.norm(view, axis=1, keepdims=True) for view in views]
    assert one["alignment"] == pytest.approx(((views[0] - views[1]) ** 2).sum(axis=1).mean(), rel=1e-6)
    assert one["accuracies"]["logistic 100 %"]["l2"] in evaluate.measures.STRENGTHS
    results = card.read_results([tmp_path / "e.json"], pretrained, one["checkpoint_sha256"])
    expected = {(evaluate.measures.in_words(name), entry["top1"]) for name, entry in one["accuracies"].items()}
    assert {(row["kind"], row["top1"]) for row in results} == expected
    assert "k = 100 and 200: train has 60 images, and all of them vote" in out
    assert "not the published linear probe" in out and one["collapse"] in out
    status, again, _ = programs("synco.evaluate", *words)
    assert status == 0 and again.count("there already") == 5
    assert json.loads((tmp_path / "e.json").read_text()) == found


def test_a_store_that_can_only_be_read(programs, pretrained, many, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(evaluate, "PERCENTS", (1,))
    words = [pretrained, many, *FLAGS, "--features", tmp_path / "f"]
    assert programs("synco.evaluate", *words)[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # files can be made, and hold little
    try:
        status, out, err = programs("synco.evaluate", *words)
        refusal = programs("synco.evaluate", *words, "--img-size", 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, err) == (0, "") and out.count("there already") == 5
    assert refusal[0] == 2 and refusal[2].count("\n") == 1 and "cannot be written" in refusal[2]


def test_numbers_are_found_once(programs, pretrained, many, tmp_path, monkeypatch):
    """And anew where anything that they depend on is another, or where what is kept of them is damaged."""
    counts, compute = [0], evaluate.compute

    def counting(*settings):
        counts[0] += 1
        return compute(*settings)

    monkeypatch.setattr(evaluate, "compute", counting)
    regression = {}, {"logistic 1 %": np.arange(21) % 3 == 0}, {"logistic 1 %": 0.1}  # without the time it takes
    monkeypatch.setattr(evaluate, "regression", lambda *settings: lambda: regression)

    def ask(checkpoint=pretrained, data=many, seed=0):
        """The table, and how often the numbers were computed for it."""
        counts[0] = 0
        words = [checkpoint, data, *FLAGS, "--features", tmp_path / "f", "-o", tmp_path / "e.json", "--seed", seed]
        status, out, err = programs("synco.evaluate", *words)
        assert (status, err) == (0, "") and out.count("numbers            there already") == 1 - counts[0]
        return json.loads((tmp_path / "e.json").read_text()), counts[0]

    first, times = ask()
    assert times == 1 and ask() == (first, 0)
    (path,) = (tmp_path / "f").glob("result-*.json")
    saved = path.read_bytes()
    for damaged in (saved[:-40], saved.replace(b"rankme", b"rankmi"), b"[1]"):
        path.write_bytes(damaged)
        assert ask() == (first, 1) and path.read_bytes() == saved

    same = tmp_path / "same.pth.tar"  # another file with the same weights
    torch.save(torch.load(pretrained, weights_only=True) | {"epoch": 7}, same)
    found, times = ask(same)
    assert times == 0 and found["checkpoints"][0].pop("path") == str(same)
    assert "7 epochs" in found["checkpoints"][0]["checkpoint"]
    state = torch.load(pretrained, weights_only=True)
    state["state_dict"]["module.encoder_q.conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, tmp_path / "other.pth.tar")
    assert ask(tmp_path / "other.pth.tar")[1] == 1
    assert ask(seed=1)[1] == 1
    images = shutil.copytree(many, tmp_path / "images")
    assert ask(data=images)[1] == 1 and ask(data=images)[1] == 0
    for split in ("train", "val"):
        (images / split / "c1" / "0.jpg").touch()
        assert ask(data=images)[1] == 1
    with monkeypatch.context() as patch:
        (tmp_path / "measures.py").write_text("STRENGTHS = 1.0, 0.1")
        patch.setattr(evaluate.measures, "__file__", str(tmp_path / "measures.py"))
        assert ask()[1] == 1
        patch.setattr(evaluate.subsets, "balanced", lambda images, percent, seed: list(images.names)[:7])
        assert ask()[1] == 1
    assert ask() == (first, 0)


def test_numbers_that_cannot_be_kept(programs, pretrained, many, tmp_path, monkeypatch):
    def full(*settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate.Result, "save", full)
    monkeypatch.setattr(evaluate, "PERCENTS", (1,))
    words = [pretrained, many, *FLAGS, "--features", tmp_path / "f", "-o", tmp_path / "e.json"]
    status, out, err = programs("synco.evaluate", *words)
    assert status == 0 and "RankMe" in out and (tmp_path / "e.json").exists()
    assert err.count("\n") == 1 and "cannot be written (No space left on device); the next call" in err


def test_two_checkpoints(programs, pretrained, many, tmp_path):
    """The difference's interval is that of the paired hits; two of the same weights do not differ."""
    words = [pretrained, many, *FLAGS, "--features", tmp_path / "f", "-o", tmp_path / "e.json", "--compare"]
    status, out, _ = programs("synco.evaluate", *words, pretrained)
    assert status == 0 and "they differ" not in out
    same = json.loads((tmp_path / "e.json").read_text())["differences"].values()
    assert all((d["difference"], d["low"], d["high"], d["differ"]) == (0, 0, 0, False) for d in same)
    status, out, err = programs("synco.evaluate", *words, "random")
    assert status == 0 and f"random weights, seed 0; {ARCH} at 32 pixels" in out, err
    found = json.loads((tmp_path / "e.json").read_text())
    one, other = (checkpoint["accuracies"] for checkpoint in found["checkpoints"])
    for name, d in found["differences"].items():
        assert d["difference"] == pytest.approx(other[name]["top1"] - one[name]["top1"])
        assert d["low"] <= d["difference"] <= d["high"] and d["differ"] == (d["low"] > 0 or d["high"] < 0)


def test_features_that_are_all_0(programs, pretrained, many, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PERCENTS", (10,))
    state = torch.load(pretrained, weights_only=True)
    for name, tensor in state["state_dict"].items():
        if "encoder_q.layer4." in name:
            tensor.zero_()
    torch.save(state, tmp_path / "dead.pth.tar")
    status, out, err = programs("synco.evaluate", tmp_path / "dead.pth.tar", many, *FLAGS)
    assert (status, err) == (0, "") and "0.0 of 512" in out and "The features have collapsed: they are nearly" in out


def test_one_image_of_the_labels_is_too_few(programs, pretrained, tmp_path):
    for split in ("train", "val"):
        make_images(tmp_path / split, classes=1, images=20)
    status, out, err = programs("synco.evaluate", pretrained, tmp_path, *FLAGS)
    assert (status, err) == (0, "") and "1 % of the labels  left out: 1 image, and one is to be held out" in out
    assert "k = 100 and 200: train has 20 images, and all of them vote" in out


def test_each_network_at_its_own_size(programs, many, tmp_path):
    paths = [tmp_path / "a.pth.tar", tmp_path / "b.pth.tar"]
    for path, size in zip(paths, (32, 40)):
        make_pretrained(ARCH, path)
        torch.save(torch.load(path, weights_only=True) | {"config": {"img_size": size}}, path)
    status, out, _ = programs("synco.evaluate", paths[0], many, "-j", 0, "--compare", paths[1])
    assert status == 0 and "image sizes        differ: each network sees the images at its own" in out
    assert f"{ARCH} at 32 pixels" in out and f"{ARCH} at 40 pixels" in out and "beside them" not in out


def _evaluate(rank, world_size, words, output):
    with unittest.mock.patch("sys.argv", ["evaluate.py", *words, "-o", output]):
        args = evaluate.parse()
    evaluate.run(Process(rank, world_size, rank, world_size), args)
    if rank == 0:
        with open(output) as file:
            return json.load(file)["checkpoints"]
    return None


def _twice(*settings):
    """Computed, and taken from what is kept."""
    return [_evaluate(*settings) for _ in range(2)]


def test_the_same_numbers_whatever_the_number_of_processes(pretrained, many, tmp_path):
    words = [str(word) for word in (pretrained, many, *FLAGS)]
    alone = _evaluate(0, 1, words, str(tmp_path / "1.json"))
    for world_size in (2, 3):
        kept = [*words, "--features", str(tmp_path / str(world_size))]
        assert processes(world_size, _twice, world_size, kept, str(tmp_path / "n.json"))[0] == [alone, alone]


def test_features_for_other_programs(programs, pretrained, many, tmp_path):
    words = [pretrained, many, *FLAGS, "--features-only", "--features", tmp_path / "f"]
    status, out, _ = programs("synco.evaluate", *words, "--features-dtype", "float16")
    assert status == 0 and "kNN" not in out and len(list((tmp_path / "f").iterdir())) == 2
    (place,) = (tmp_path / "f").glob("val-*")
    assert np.load(place / "features.npy").dtype == np.float16
    assert np.load(place / "names.npy").tolist() == list(datasets.image_folder(many, "val").names)


def test_classes_without_images(programs, pretrained, many):
    """Two images are of two classes at most."""
    status, out, _ = programs("synco.evaluate", pretrained, many, *FLAGS, "--limit-images", 2)
    assert status == 0 and "train classes      1 of 3 have no images: c2" in out


def test_without_labels(programs, pretrained, many, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(many / split / "c1", tmp_path / split)
    status, out, err = programs("synco.evaluate", pretrained, tmp_path, *FLAGS)
    assert (status, err) == (0, "") and "20 to train, 7 to validate, without labels: no accuracies" in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("CHECKPOINT DATA --features-only", "--features-only writes into --features FOLDER"),
        ("CHECKPOINT DATA --features=", "--features '': must name a folder"),
        ("CHECKPOINT DATA --features F --features-only -o x.json", "-o x.json: --features-only makes no table"),
        ("CHECKPOINT DATA -o nowhere/x.json", "-o nowhere/x.json: there is no folder nowhere"),
        ("CHECKPOINT DATA --compare nowhere.tar", "nowhere.tar: no such checkpoint file"),
        ("CHECKPOINT DATA --features CHECKPOINT", "cannot be "),
        ("CHECKPOINT DATA --features-dtype float8", "invalid choice: 'float8'"),
        ("CHECKPOINT nowhere", "nowhere: no such folder"),
    ],
)
def test_bad_input(programs, pretrained, many, words, message):
    words = words.replace("CHECKPOINT", pretrained).replace("DATA", str(many)).split()
    status, out, err = programs("synco.evaluate", *words, *FLAGS)
    assert status == 2 and err.count("\n") == 1 and message in err, err
