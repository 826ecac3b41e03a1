"""Maps of features: their numbers against NumPy's, the pictures by what is in them."""

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import features_by_torchvision

from synco import augment, datasets, embedding, plot


def table_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_principal_components_equal_numpys(tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 6)) * [5, 1, 3, 1, 1, 1] + 7
    places, shares = embedding.principal(torch.from_numpy(features).float())
    centred = features - features.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(shares, sizes[:2] ** 2 / (sizes**2).sum(), rtol=1e-5)
    for i in range(2):
        expected = centred @ directions[i] * np.sign(directions[i][np.abs(directions[i]).argmax()])
        np.testing.assert_allclose(places[:, i], expected, atol=1e-4)


def test_a_map_of_val(tool, pretrained, data, tmp_path):
    """The table is NumPy's of features from torchvision's own network; the picture has each class once."""
    words = ["--embedding", pretrained, data, "--img-size", 32, "-j", 0, "-b", 3]
    status, out, err = tool(plot, *words, "--csv")
    assert (status, err) == (0, "")
    rows = table_of(out)
    images = datasets.image_folder(data, "val").with_transform(augment.center_view(32))
    assert [row["class"] for row in rows] == [images.classes[label] for label in images.targets]
    features = features_by_torchvision(pretrained, torch.stack([x for x, _ in images])).astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centred = features - features.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * sizes[:2]
    found = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3 * np.abs(expected).max())

    pytest.importorskip("matplotlib")
    assert tool(plot, *words, "-o", tmp_path / "map.png")[0] == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    labels = images.targets
    figure = plot.scatter(embedding.Map(found.tolist(), labels, images.classes, ("x", "y"), "title"))
    sizes = [len(points.get_offsets()) for points in figure.axes[0].collections]
    assert sizes == np.bincount(labels).tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == images.classes


def test_tsne(tool, pretrained, data, monkeypatch):
    words = ["--embedding", pretrained, data, "--img-size", 32, "-j", 0, "--method", "tsne", "--csv"]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, out, err = tool(plot, *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and "pip install scikit-learn" in err
    monkeypatch.undo()
    pytest.importorskip("sklearn")
    status, out, err = tool(plot, *words)
    assert status == 0 and len(table_of(out)) == 7
