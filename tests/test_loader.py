"""Reading, augmentation and sampling: what the views are drawn from, and that nothing else has a say."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image, ImageFilter
from torchvision import transforms

from synco import datasets, loader
from synco.distributed import Process, seed_of
from synco.options import UserError


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
            loader.read_image(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.jpg: cannot be read"):
        loader.read_image(str(tmp_path / "none.jpg"))
    assert loader.read_image(str(whole)).mode == "RGB"
    Image.new("LA", (30, 30)).save(tmp_path / "gray.png")
    assert loader.read_image(str(tmp_path / "gray.png")).mode == "RGB"


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
    v2, v1 = loader.augmentation(224, "v2"), loader.augmentation(224, "v1")
    assert list(names(v2)) == [
        "RandomResizedCrop", "ColorJitter p=0.8", "RandomGrayscale", "GaussianBlur p=0.5", "RandomHorizontalFlip",
        "ToTensor", "Normalize",
    ]  # fmt: skip
    assert list(names(v1)) == [
        "RandomResizedCrop", "RandomGrayscale", "ColorJitter", "RandomHorizontalFlip", "ToTensor", "Normalize"
    ]  # fmt: skip
    small, asked = loader.augmentation(32), loader.augmentation(32, blur=True)
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
    blurred = loader.GaussianBlur()(image)
    torch.manual_seed(4)
    radius = 0.1 + 1.9 * torch.rand(1).item()
    np.testing.assert_allclose(blurred, image.filter(ImageFilter.GaussianBlur(radius)), atol=1)
    assert not np.array_equal(blurred, image)


@pytest.mark.parametrize("size, resized", [(32, 32), (63, 63), (64, 73), (96, 110), (224, 256)])
def test_center_view(size, resized):
    view = loader.center_view(size)
    assert view.transforms[0].size == resized and view.transforms[1].size == (size, size)
    assert view(Image.new("RGB", (300, 200))).shape == (3, size, size)


@pytest.fixture
def pairs(tmp_path):
    make_images(tmp_path / "train", classes=3, images=5)
    return loader.TwoCrops(datasets.image_folder(str(tmp_path), "train"), loader.augmentation(24), seed=9)


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
    images.transform = loader.center_view(24)
    count = 0
    labels = torch.zeros(3, dtype=torch.long)
    for rank in range(world_size):
        for _, label in loader.eval_loader(images, 4, process=Process(rank, world_size), workers=0):
            count += len(label)
            labels += label.bincount(minlength=3)
    assert count == 15 and labels.tolist() == [5, 5, 5]


def test_workers_are_capped_and_shared(monkeypatch):
    monkeypatch.setattr(loader, "usable_cpus", lambda: 6)
    assert [loader.workers_each(32, n) for n in (1, 2, 4)] == [6, 3, 2]
    assert loader.workers_each(0, 4) == 0 and loader.workers_each(3, 1) == 3


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
    views = loader.Augmented(pairs.dataset, loader.classifier_augmentation(24), 3)
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
        return loader.Augmented(pairs.dataset, loader.classifier_augmentation(24), seed)[epoch, index][0]

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
