"""Reading, augmentation and sampling: what the views are drawn from, and that nothing else has a say."""

import contextlib
import copy
import gc
import multiprocessing.util
import os
import shutil
import signal
import socket
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image, ImageFilter
from torch.utils.data import DistributedSampler
from torchvision import transforms

from synco import augment, datasets, decode, distributed, exits, loader, subsets
from synco.distributed import Process, seed_of
from synco.errors import Failure, UserError


def read(path, reader=decode.read_image):
    return reader(decode.content_of(path), path)


def test_unreadable_images_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    damaged = {"cut.jpg": content[: len(content) // 2], "empty.jpg": b"", "text.png": b"no image"}
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    damaged["cut.png"] = (tmp_path / "x.png").read_bytes()[:50]
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: cannot be read as an image") as error:
            read(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.jpg: cannot be read"):
        read(str(tmp_path / "none.jpg"))
    assert read(str(whole)).mode == "RGB"
    Image.new("LA", (30, 30)).save(tmp_path / "gray.png")
    assert read(str(tmp_path / "gray.png")).mode == "RGB"


def test_formats_that_pil_cannot_decode_are_named(tmp_path):
    """It raises NotImplementedError for a damaged DDS, and RuntimeError for a damaged AVIF."""
    path = tmp_path / "x.jpg"
    Image.new("RGBA", (8, 8)).save(path, "DDS")
    content = bytearray(path.read_bytes())
    content[80:88] = b"\4\0\0\0ABCD"  # flags: what follows is a compression's name
    path.write_bytes(content)
    for reader in (decode.read_image, decode.read_uint8, decode.size_of):
        with pytest.raises(UserError, match="x.jpg: cannot be read as an image"):
            read(str(path), reader)


@pytest.mark.parametrize("name", ["pipe.jpg", "/dev/zero"])
def test_what_is_no_regular_file_is_neither_an_image_nor_a_list(tmp_path, name):
    path = os.path.join(tmp_path, name)
    if name == "pipe.jpg":
        os.mkfifo(path)  # whose reader waits for a writer
    for reader in (decode.content_of, subsets.read_list):
        with pytest.raises(UserError, match=f"{name}: .*not a regular file"):
            reader(path)


def test_a_message_has_one_line_whatever_the_name(tmp_path):
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "a\nb\x1b[2Jc\u2028.jpg"))
    assert rf"{tmp_path}/a\nb\x1b[2Jc\u2028.jpg: cannot be read as an image" in str(error.value)


def deep(kind):
    """(pixels of more than 8 bits, what they are in 8)."""
    noise = np.random.default_rng(0).random((20, 30))
    if kind == "16 bits":
        pixels = (noise * 65536).astype(np.uint16)
        return pixels, pixels / 257
    pixels = (noise * 3e6 - 1e6).astype(np.int32) if kind == "32 bits" else noise.astype(np.float32) - 0.25
    low, high = float(pixels.min()), float(pixels.max())
    return pixels, (pixels.astype(np.float64) - low) / (high - low) * 255


@pytest.mark.parametrize("kind", ["16 bits", "32 bits", "float"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_more_than_8_bits_are_scaled_to_8(tmp_path, kind, format):
    if format == "PNG" and kind != "16 bits":
        pytest.skip("PNG has no such pixels")
    pixels, expected = deep(kind)
    path = str(tmp_path / "x.png")
    Image.fromarray(pixels).save(path, format)
    found = np.asarray(read(path))
    np.testing.assert_allclose(found, np.repeat(expected[:, :, None], 3, axis=2), atol=0.51)
    assert np.array_equal(read(path, decode.read_uint8), found.transpose(2, 0, 1))


def test_floats_without_a_range_are_images_all_the_same():
    nothing = np.full((2, 2), np.nan, dtype=np.float32)
    assert np.asarray(decode.to_rgb(Image.fromarray(nothing))).max() == 0
    some = np.array([[np.inf, -np.inf], [np.nan, 1], [3, 2]], dtype=np.float32)
    assert np.asarray(decode.to_rgb(Image.fromarray(some)))[:, :, 0].tolist() == [[255, 0], [0, 0], [255, 128]]


def test_scaling_is_said_once(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "train" / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(deep("16 bits")[0]).save(tmp_path / "train" / "c" / f"{i}.png")
    images = datasets.image_folder(tmp_path, "train")
    for part in (images, images.as_uint8(), images.subset([1])):
        for workers in (0, 1):
            list(loader.eval_loader(part.with_transform(np.asarray), 1, process=Process(), workers=workers))
    assert capsys.readouterr().err.count("c/0.png: has more than 8 bits a pixel") == 1


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        datasets.image_folder(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="has no folder 'train'"):
        datasets.image_folder(str(tmp_path), "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train: .*it should hold CLASS/IMAGE"):
        datasets.image_folder(str(tmp_path), "train")
    (tmp_path / "train" / "c0").mkdir()
    with pytest.raises(UserError, match="train: .*c0.*it should hold CLASS/IMAGE"):
        datasets.image_folder(str(tmp_path), "train")


def names(compose):
    for step in compose.transforms:
        if isinstance(step, transforms.RandomApply):
            yield f"{type(step.transforms[0]).__name__} p={step.p}"
        elif isinstance(step, transforms.Compose):
            yield from names(step)
        else:
            yield type(step).__name__


def test_the_augmentations_are_the_published_ones():
    v2, v1 = augment.augmentation(224, "v2"), augment.augmentation(224, "v1")
    assert list(names(v2)) == [
        "RandomResizedCrop", "ColorJitter p=0.8", "RandomGrayscale", "GaussianBlur p=0.5", "RandomHorizontalFlip",
        "ToTensor", "Normalize",
    ]  # fmt: skip
    assert list(names(v1)) == [
        "RandomResizedCrop", "RandomGrayscale", "ColorJitter", "RandomHorizontalFlip", "ToTensor", "Normalize"
    ]  # fmt: skip
    small, asked = augment.augmentation(32), augment.augmentation(32, blur=True)
    assert "GaussianBlur p=0.5" not in names(small) and list(names(asked)) == list(names(v2))
    for view in (v1, v2):
        assert view.transforms[0].scale == (0.2, 1.0) and view.transforms[0].size == (224, 224)
        normalize = view.transforms[-1].transforms[1]
        assert tuple(normalize.mean) == (0.485, 0.456, 0.406) and tuple(normalize.std) == (0.229, 0.224, 0.225)
    jitter2, jitter1 = v2.transforms[1].transforms[0], v1.transforms[2]
    assert (jitter2.brightness, jitter2.contrast, jitter2.saturation, jitter2.hue) == (*3 * ((0.6, 1.4),), (-0.1, 0.1))
    assert (jitter1.brightness, jitter1.contrast, jitter1.saturation, jitter1.hue) == (*3 * ((0.6, 1.4),), (-0.4, 0.4))
    assert v2.transforms[2].p == v1.transforms[1].p == 0.2


def test_blur_is_pils_with_a_radius_from_the_range():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    torch.manual_seed(4)
    blurred = augment.GaussianBlur()(image)
    torch.manual_seed(4)
    radius = 0.1 + 1.9 * torch.rand(1).item()
    np.testing.assert_allclose(blurred, image.filter(ImageFilter.GaussianBlur(radius)), atol=1)
    assert not np.array_equal(blurred, image)


@pytest.mark.parametrize("size, resized", [(32, 32), (63, 63), (64, 73), (96, 110), (224, 256)])
def test_center_view(size, resized):
    view = augment.center_view(size)
    assert view.transforms[0].size == resized and view.transforms[1].size == (size, size)
    assert view(Image.new("RGB", (300, 200))).shape == (3, size, size)


@pytest.fixture
def pairs(tmp_path):
    make_images(tmp_path / "train", classes=3, images=5)
    return loader.TwoCrops(datasets.image_folder(str(tmp_path), "train"), augment.augmentation(24), seed=9)


def test_views_are_a_function_of_seed_epoch_and_index(pairs):
    im_q, im_k, index = pairs[2, 7]
    assert index == 7 and im_q.shape == im_k.shape == (3, 24, 24) and not torch.equal(im_q, im_k)
    torch.manual_seed(123)
    for other in range(5):
        pairs[2, other]
    before = torch.get_rng_state()
    again = pairs[2, 7]
    assert torch.equal(im_q, again[0]) and torch.equal(im_k, again[1])
    assert torch.equal(torch.get_rng_state(), before)  # the process's own generator is left alone
    assert not torch.equal(im_q, pairs[3, 7][0])
    reseeded = copy.copy(pairs)
    reseeded.seed = 10
    assert not torch.equal(im_q, reseeded[2, 7][0])
    torch.manual_seed(seed_of("crops", 9, 2, 7))  # the same, done by hand
    image = pairs.dataset[7][0]
    assert torch.equal(im_q, pairs.transform(image)) and torch.equal(im_k, pairs.transform(image))


def test_the_number_of_workers_changes_nothing(pairs):
    found = []
    for workers in (0, 1, 3):
        batches = loader.train_loader(pairs, 4, process=Process(), workers=workers, seed=9)
        epochs = []
        for epoch in (0, 1):
            batches.batch_sampler.sampler.set_epoch(epoch)
            epochs.append(list(batches))
        found.append(epochs)
    for other in found[1:]:
        for ours, theirs in zip(found[0], other):
            assert len(ours) == len(theirs) == 3  # 15 images: the incomplete batch is left out
            for batch, twin in zip(ours, theirs):
                assert all(torch.equal(a, b) for a, b in zip(batch, twin))
    first, second = (torch.cat([batch[2] for batch in epoch]).tolist() for epoch in found[0])
    assert first != second and len(set(first)) == len(first) == 12


def test_processes_share_an_epoch_without_overlap(pairs):
    seen = []
    for rank in range(3):
        batches = loader.train_loader(pairs, 2, process=Process(rank, 3), workers=0, seed=9)
        batches.batch_sampler.sampler.set_epoch(5)
        seen += [i for batch in batches for i in batch[2].tolist()]
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_image_once(pairs, world_size):
    images = pairs.dataset
    images.transform = augment.center_view(24)
    count = 0
    labels = torch.zeros(3, dtype=torch.long)
    for rank in range(world_size):
        for _, label in loader.eval_loader(images, 4, process=Process(rank, world_size), workers=0):
            count += len(label)
            labels += label.bincount(minlength=3)
    assert count == 15 and labels.tolist() == [5, 5, 5]


@pytest.mark.parametrize("length, refused", [(89, False), (90, True)])
def test_a_temporary_folder_with_too_long_a_path_for_sockets_is_refused(monkeypatch, length, refused):
    """A worker cannot send batches from there: the run would wait for them for ever."""
    folder = "/tmp/" + "x" * (length - 5)
    os.mkdir(folder)
    try:
        if not refused:  # the longest in which a socket can be made
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(f"{folder}/listener-12345678")
        monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: folder)
        with pytest.raises(UserError, match="set TMPDIR") if refused else contextlib.nullcontext():
            loader.eval_loader(range(4), 2, process=Process(), workers=1)
    finally:
        shutil.rmtree(folder)


def test_workers_are_capped_and_shared(monkeypatch):
    for n, share in ((1, 6), (2, 3), (4, 2)):  # of 6 CPUs that all may run on
        monkeypatch.setattr(distributed, "cpu_share", lambda n=n: Fraction(6, n))
        assert loader.workers_each(32, n) == share
        assert loader.workers_each(None, n) == share
    assert loader.workers_each(0, 4) == 0 and loader.workers_each(2, 1) == 2 and loader.workers_each(3, 2) == 2


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 8, 13, 22])
def test_whole_batches_leave_nothing_out_and_no_image_alone(count, batch):
    found = loader.WholeBatches(range(count), batch)
    batches = list(found)
    assert [key for keys in batches for key in keys] == list(range(count)) and len(found) == len(batches)
    assert all(len(keys) == batch for keys in batches[:-1]) and len(batches[-1]) <= batch + 1
    if count > 1 and batch > 1:
        assert min(map(len, batches)) > 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_a_classifier_sees_every_image(pairs, world_size):
    views = loader.Augmented(pairs.dataset, augment.classifier_augmentation(24), 3)
    seen, steps = [], set()
    for rank in range(world_size):
        process = Process(rank, world_size)
        batches = loader.train_loader(views, 4, process=process, workers=0, seed=9, keep_last=True)
        batches.batch_sampler.sampler.set_epoch(1)
        seen += [index for keys in batches.batch_sampler for _, index in keys]
        steps.add(len(batches))
    assert set(seen) == set(range(15)) and len(seen) - 15 < world_size and len(steps) == 1


def test_a_view_depends_on_seed_epoch_and_image_alone(pairs):
    def view(seed, epoch, index):
        torch.rand(3)
        return loader.Augmented(pairs.dataset, augment.classifier_augmentation(24), seed)[epoch, index][0]

    first = view(3, 1, 2)
    assert first.shape == (3, 24, 24) and torch.equal(first, view(3, 1, 2))
    assert not any(torch.equal(first, view(*other)) for other in ((4, 1, 2), (3, 2, 2)))


def test_batch_each():
    assert loader.batch_each(256, 8) == 32
    for total, processes in ((10, 4), (3, 4)):
        with pytest.raises(UserError, match=f"--batch-size {total} is not divisible by a node's {processes} processes"):
            loader.batch_each(total, processes)


def test_different_classes_are_listed(tmp_path):
    for name in ("train/a", "train/b", "val/b", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.jpg")
    train, val = (datasets.image_folder(tmp_path, split) for split in ("train", "val"))
    with pytest.raises(UserError, match=r"different classes: a \(in train only\), c \(in val only\)$"):
        datasets.same_classes(train, val, tmp_path)
    datasets.same_classes(train, train, tmp_path)


def test_many_classes_are_compared_in_no_time():
    names = [f"n{i:08}" for i in range(20_000)]
    images = datasets.Images("x", names, ["n00000000/0"], [0], None)
    began = time.process_time()
    datasets.same_classes(images, images, "x")
    assert time.process_time() - began < 1


# -------------------------------------------------------------------------------------------------- orders of epochs


def orders(count, world_size, **settings):
    """[keys of each process] of epoch 1."""
    found = []
    for rank in range(world_size):
        sampler = loader.EpochSampler(count, Process(rank, world_size), **settings)
        sampler.set_epoch(1)
        found.append([index for epoch, index in sampler if epoch == 1])
        assert len(found[-1]) == len(sampler)
    return found


@pytest.mark.parametrize("count, world_size", [(15, 1), (15, 2), (16, 4), (2, 3), (7, 16)])
@pytest.mark.parametrize("keep_last", [False, True])
def test_the_older_order_is_torchs(count, world_size, keep_last):
    found = orders(count, world_size, seed=6, keep_last=keep_last, order=1)
    for rank, keys in enumerate(found):
        theirs = DistributedSampler(range(count), world_size, rank, seed=6, drop_last=not keep_last)
        theirs.set_epoch(1)
        assert keys == list(theirs)
    newer = orders(count, world_size, seed=6, keep_last=keep_last)
    assert [len(keys) for keys in newer] == [len(keys) for keys in found]
    seen = [index for keys in newer for index in keys]
    assert set(seen) == set(range(count)) if keep_last else len(set(seen)) == len(seen)


def test_no_seeds_epoch_is_another_seeds(pairs):
    def order(seed, epoch, **more):
        batches = loader.train_loader(pairs, 1, process=Process(), workers=0, seed=seed, **more)
        batches.batch_sampler.set_epoch(epoch)
        return [index for ((_, index),) in batches.batch_sampler]

    assert order(0, 1) != order(1, 0) and order(0, 1) == order(0, 1)
    assert order(0, 1, order=1) == order(1, 0, order=1)
    by_hand = torch.randperm(15, generator=torch.Generator().manual_seed(seed_of("order", 4, 2)))
    assert order(4, 2) == by_hand.tolist()


def test_an_epochs_order_is_no_list_of_all_images():
    for world_size, batches in ((1, loader.Batches), (2, loader.Batches), (1, loader.WholeBatches)):
        sampler = loader.EpochSampler(1_000_000, Process(0, world_size), seed=0)
        more = {"drop_last": True} if batches is loader.Batches else {}
        tracemalloc.start()
        next(iter(batches(sampler, 256, **more)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6  # a list of a million numbers takes 40 MB


# ---------------------------------------------------------------------------------------------------------- workers


class Numbers(torch.utils.data.Dataset):
    """Ten tensors; what is to happen to the third comes from `strange`."""

    def __init__(self, strange=lambda: None):
        self.strange = strange

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 2:
            self.strange()
        return torch.full((1000,), index)


@pytest.mark.parametrize(
    "number, why", [(signal.SIGKILL, "is killed by signal: Killed"), (signal.SIGSTOP, "timed out")]
)
def test_a_worker_that_is_gone_or_frozen_is_a_failure(number, why):
    """While it has batches to hand over, which it does when they are asked for."""
    batches = loader.eval_loader(Numbers(), 1, process=Process(), workers=2, timeout=2)
    found = iter(batches)
    next(found)
    time.sleep(0.3)
    for worker in batches.workers:
        os.kill(worker.pid, number)
    time.sleep(0.3)  # a worker's end interrupts nothing but the wait for it
    began = time.monotonic()
    with pytest.raises(Failure, match=why):
        list(found)
    assert time.monotonic() - began < 9


def raises(error):
    def strange():
        raise error

    return strange


def test_an_unreadable_image_is_one_line_and_leaves_no_worker():
    """The error's frames hold no circle: Python removes the loader's iterator, and it its workers, at once."""
    batches = loader.eval_loader(Numbers(raises(UserError("x.jpg: bad"))), 10, process=Process(), workers=2)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(UserError) as error:
            list(batches)
        assert str(error.value) == "x.jpg: bad"
        del error
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_shared_memory_that_is_full_is_said_with_a_cure():
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")
    with pytest.raises(Failure, match="^/dev/shm is full .*No space left.*: enlarge it .*--shm-size"):
        list(loader.eval_loader(Numbers(raises(full)), 1, process=Process(), workers=1))
    with pytest.raises(RuntimeError, match="Original Traceback"):  # a bug keeps its own
        list(loader.eval_loader(Numbers(raises(RuntimeError("a bug"))), 1, process=Process(), workers=1))
    exits.end_workers()  # as every program does: the traceback keeps the iterator, whose end would wait for them


@pytest.mark.parametrize("free, ahead", [(400_000, 2), (399_999, 1), (200_000, 1), (199_999, None), (90_000, None)])
@pytest.mark.parametrize("short", ["/dev/shm", "the memory"])
def test_batches_ahead_are_as_many_as_there_is_room_for(pairs, monkeypatch, free, ahead, short):
    """Two workers in two processes, batches of 25,000 bytes: said, bounded, or refused before the first step."""
    pairs.transform = lambda image: torch.zeros(3125, dtype=torch.uint8)
    usage = shutil.disk_usage("/")._replace(free=free if short == "/dev/shm" else 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(distributed, "free_memory", lambda: 2 * free if short == "the memory" else 10**9)
    load = {"process": Process(0, 2, 0, 2), "seed": 9}
    if ahead is None:
        room = f"{short}: has room for {free / 1e6:.3f} MB of batches, and 8 loading workers prepare 0.200 MB"
        with pytest.raises(UserError) as error:
            loader.train_loader(pairs, 4, workers=4, **load)
        assert str(error.value).startswith(f"{room}: enlarge it") and f"(-j {free // 25_000})" in str(error.value)
    else:
        batches = loader.train_loader(pairs, 4, workers=4, **load)
        assert batches.prefetch_factor == ahead
        assert batches.ahead == f"{8 * ahead} batches, {0.2 * ahead:.1f} MB (workers: 8)"
    assert loader.train_loader(pairs, 4, workers=0, **load).ahead == "0 batches, 0.0 MB (workers: 0)"


def test_what_a_batch_takes_is_known_beforehand(pairs):
    """Two views of 24 pixels in floats, and in 8 bits; no draw is taken from what follows."""
    begin, _ = augment.halves(pairs.transform, torch.device("cpu"), "cpu")
    for transform, size in ((pairs.transform, 4), (begin, 1)):
        pairs.transform = transform
        before = torch.get_rng_state()
        batches = loader.train_loader(pairs, 4, process=Process(), workers=1, seed=9)
        assert torch.equal(torch.get_rng_state(), before)
        im_q, im_k, _ = next(iter(batches))
        taken = loader.bytes_of([im_q, im_k])
        assert taken == 4 * 2 * 3 * 24 * 24 * size and f"2 batches, {2 * taken / 1e6:.1f} MB" in batches.ahead
