"""Cached images: the pixels that were read before, once for all processes of a node."""

import os

import numpy as np
import pytest
import torch
from conftest import SMALL, make_images, processes, program_of
from PIL import Image

from synco import augment, cache, checkpoint, datasets, distributed, loader
from synco.distributed import Process
from synco.errors import UserError


@pytest.fixture
def uneven(tmp_path):
    make_images(tmp_path / "train", classes=3, images=4)
    make_images(tmp_path / "train", classes=1, images=9, seed=1)
    return tmp_path


def test_cached_images_are_the_same(uneven, capsys, monkeypatch):
    whole = datasets.image_folder(uneven, "train")
    part = whole.subset([11, 3, 16])
    Image.new("RGB", (7, 90), (1, 2, 3)).save(os.path.join(uneven, "train", part.names[1]))
    before = [np.asarray(image) for image, _ in part]
    monkeypatch.setattr(distributed, "free_memory", lambda: 10**9)
    cache.keep([part], Process())
    needed = 3 * (2 * 40 * 40 + 7 * 90)
    told = f"cached images      3, {needed / 1e9:.2f} GB, of 1.00 GB that are free\n"
    assert capsys.readouterr().out == told
    for name in part.names:
        os.remove(os.path.join(uneven, "train", name))  # they are not read again
    assert all(np.array_equal(image, other) for (image, _), other in zip(part, before))
    assert np.array_equal(part.subset([2])[0][0], before[2])
    images = part.with_transform(augment.center_view(24))
    for workers in (0, 1):
        batch, labels = next(iter(loader.eval_loader(images, 3, process=Process(), workers=workers)))
        assert (
            torch.equal(batch[1], augment.center_view(24)(Image.fromarray(before[1])))
            and labels.tolist() == part.targets
        )


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(uneven, monkeypatch):
    images = datasets.image_folder(uneven, "train")
    needed = 17 * 40 * 40 * 3
    monkeypatch.setattr(distributed, "free_memory", lambda: needed / 0.9 + 1)
    cache.keep([images], Process())
    fresh = datasets.image_folder(uneven, "train")
    monkeypatch.setattr(distributed, "free_memory", lambda: needed / 0.9 - 1)
    monkeypatch.setattr(datasets.Images, "image", lambda self, position: pytest.fail("an image was read"))
    with pytest.raises(UserError, match="--cache-images: they take 0.00 GB, and 0.00"):
        cache.keep([fresh], Process())


def _keep(rank, folder, nodes):
    """What a process of several sees of images kept in memory → (pixels, those after rank 0 has written, decodings)."""
    images, decoded, place = datasets.image_folder(folder, "train"), [], distributed.node()
    distributed.node = lambda: (place, rank % nodes)
    image = datasets.Images.image
    datasets.Images.image = lambda self, position: (decoded.append(position), image(self, position))[1]
    before = set(os.listdir("/dev/shm"))
    cache.keep([images], Process(rank, 4, rank // nodes, 4 // nodes))
    left = {name for name in {*os.listdir("/dev/shm")} - before if not name.startswith(("sem.", "torch_"))}  # of others
    count, found = len(decoded), [np.asarray(images.image(i)) for i in range(len(images))]
    distributed.barrier()
    if rank == 0:
        images._read.pixels.zero_()
    distributed.barrier()
    black = [i for i in range(len(images)) if not np.asarray(images.image(i)).any()]
    return found, len(black) == len(images), count, left


@pytest.mark.parametrize("nodes", [1, 2])
def test_processes_of_a_node_share_one_copy(uneven, nodes):
    """Four on one node or on two: each node decodes every image once, and a word of one is read by all others there."""
    plain = datasets.image_folder(uneven, "train")
    wanted = [np.asarray(image) for image, _ in plain]
    found = processes(4, _keep, str(uneven), nodes)
    for pixels, _, _, left in found:
        assert all(np.array_equal(a, b) for a, b in zip(pixels, wanted, strict=True)) and not left
    assert [black for _, black, _, _ in found] == [rank % nodes == 0 for rank in range(4)]
    for node in range(nodes):
        counts = [found[rank][2] for rank in range(node, 4, nodes)]
        assert sum(counts) == 17 and max(counts) - min(counts) <= 1


def test_without_nameless_files_each_process_has_a_copy(uneven, monkeypatch, capsys):
    images = datasets.image_folder(uneven, "train")
    wanted = [np.asarray(image) for image, _ in images]
    monkeypatch.delattr(os, "memfd_create")
    needed = 17 * 40 * 40 * 3
    monkeypatch.setattr(distributed, "free_memory", lambda: needed * 2 / 0.9 - 1)
    with pytest.raises(UserError, match="--cache-images: they take 0.00 GB, 2 times on this node, and 0.00"):
        cache.keep([images], Process(0, 2, 0, 2))
    monkeypatch.setattr(distributed, "free_memory", lambda: needed * 2 / 0.9 + 1)
    cache.keep([images], Process(0, 2, 0, 2))
    assert "0.00 GB, 2 times on this node, of" in capsys.readouterr().out
    assert all(np.array_equal(image, other) for (image, _), other in zip(images, wanted))


def test_images_that_cannot_be_read(uneven):
    """One without a header and one that is cut short: named at once, or when they are asked for."""
    images = datasets.image_folder(uneven, "train")
    with open(images.where(2), "wb") as file:
        file.write(b"torn")
    with open(images.where(5), "r+b") as file:
        file.truncate(400)
    with pytest.raises(UserError, match=f"{images.names[2]}: cannot be read as an image"):
        cache.keep([images], Process())
    others = images.subset([0, 5])
    with pytest.raises(UserError, match=f"{images.names[5]}: cannot be read as an image"):
        cache.keep([others], Process())
    cache.keep([images], Process(), tolerant=True)
    for i in range(17):
        if i in (2, 5):
            with pytest.raises(UserError, match=f"{images.names[i]}: cannot be read as an image"):
                images[i]
        else:
            assert images[i][0].size == (40, 40)


def test_memory_that_may_not_be_shared_is_one_line(uneven, monkeypatch):
    images = datasets.image_folder(uneven, "train")
    monkeypatch.setattr(cache, "open", lambda *given: open("/proc/none/fd/3", "rb"), raising=False)
    with pytest.raises(UserError, match="the processes of this node may not share memory .No such file.*/fd/"):
        cache.keep([images], Process())


def test_data_sets_that_are_in_memory_need_no_cache(capsys):
    images = datasets.Images("x", ["c"], ["c/0"], [0], lambda number: Image.new("RGB", (2, 2)))
    cache.keep([images], Process())
    assert "as this data set always is" in capsys.readouterr().out and images[0][0].size == (2, 2)


def test_a_run_of_two_processes_is_the_same_with_it(data, tmp_path):
    flags = [*SMALL, "-j", 2, "--epochs", 1, "--augment-on", "device", "--knn-freq", 1]
    runs = []
    for more in ([], ["--cache-images"]):
        statuses, out, err = program_of(2, "main_synco", *flags, *more, "--save-dir", tmp_path / f"r{len(more)}", data)
        assert statuses == [0, 0], err
        runs.append(checkpoint.load(tmp_path / f"r{len(more)}" / "checkpoint_0000.pth.tar")["state_dict"])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert "cached images      31, 0.00 GB, one copy for the 2 processes of this node, of " in out
