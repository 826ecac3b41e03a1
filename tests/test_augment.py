import copy
import io

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_images
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from synco import augment, datasets, decode, loader
from synco.distributed import Process, seed_of
from synco.errors import UserError
from synco.options import STATS

HALF_STEP = 0.5 / 255


@pytest.fixture
def images():
    """Twelve images (12, 3, 20, 28) in [0, 1], with pure, gray, black and white pixels among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 20, 28, generator=generator)
    x[:, :, 0, :8] = torch.tensor([[1.0, 1, 0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 0, 1]])
    x[:, :, 1] = x[:, :1, 1]
    x[:, :, 2] = (x[:, :, 2] * 3).round() / 3  # many pixels with two equal channels
    return x


def jitter_parameters(seed, count=12):
    rng = np.random.default_rng(seed)
    factors = rng.uniform([0.6, 0.6, 0.6, -0.4], [1.4, 1.4, 1.4, 0.4], (count, 4))
    order = np.stack([rng.permutation(4) for _ in range(count)])
    return torch.tensor(np.concatenate([factors, order], axis=1), dtype=torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_jitter_is_torchvisions_in_each_images_own_order(images, seed):
    parameters = jitter_parameters(seed)
    parameters[3] = torch.tensor(augment.Jitter.neutral)
    found = augment.Jitter(None)(images.clone(), parameters)
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for image, result, numbers in zip(images, found, parameters.tolist()):
        for part in map(int, numbers[4:]):
            image = functions[part](image, numbers[part])
        torch.testing.assert_close(result, image, atol=HALF_STEP, rtol=0)
    assert torch.equal(found[3], images[3])


@pytest.mark.parametrize("part", range(4))
def test_each_part_of_the_jitter_by_itself(images, part):
    function = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[part]
    parameters = torch.tensor(augment.Jitter.neutral).repeat(12, 1)
    parameters[:, part] = jitter_parameters(7)[:, part]
    found = augment.Jitter(None)(images.clone(), parameters)
    for image, result, factor in zip(images, found, parameters[:, part].tolist()):
        torch.testing.assert_close(result, function(image, factor), atol=1e-5, rtol=0)
        assert not torch.equal(result, image)


def test_hues_turn_by_any_part_of_the_circle(images):
    turn = torch.linspace(-0.5, 0.5, 12)
    found = augment.turned_hue(images, turn)
    for image, result, part in zip(images, found, turn.tolist()):
        torch.testing.assert_close(result, F.adjust_hue(image, part), atol=1e-5, rtol=0)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(3, 3, 1, 1)
    thirds = augment.turned_hue(red, torch.tensor([0, 1 / 3, -1 / 3])).flatten(1)
    torch.testing.assert_close(thirds, torch.eye(3), atol=1e-5, rtol=0)  # red, green, blue


def test_grayscale_flip_and_normalisation_are_torchvisions(images):
    chosen = torch.arange(12) % 3 == 0
    gray = augment.Grayscale(transforms.RandomGrayscale())(images.clone(), chosen[:, None].float())
    flipped = augment.Flip(transforms.RandomHorizontalFlip())(images.clone(), chosen[:, None].float())
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    normal = augment.Normalize(transforms.Normalize(mean, std))(images.clone(), images.new_empty(12, 0))
    for i, image in enumerate(images):
        expected = F.rgb_to_grayscale(image, num_output_channels=3) if chosen[i] else image
        torch.testing.assert_close(gray[i], expected, atol=1e-6, rtol=0)
        assert torch.equal(flipped[i], F.horizontal_flip(image) if chosen[i] else image)
        torch.testing.assert_close(normal[i], F.normalize(image, mean, std))


@pytest.mark.parametrize("taps", [augment.BLUR_TAPS, 3])
def test_blur_is_torchvisions_with_each_images_own_deviation(images, taps):
    sigma = torch.linspace(0.1, 2, 12)
    found = augment.blurred(images, sigma, taps)
    for image, result, s in zip(images, found, sigma.tolist()):
        torch.testing.assert_close(result, F.gaussian_blur(image, [taps, taps], [s, s]), atol=1e-5, rtol=0)
    step = augment.Blur(augment.GaussianBlur())
    some = step(images.clone(), torch.where(torch.arange(12) % 2 == 0, 0, sigma)[:, None])
    assert torch.equal(some[::2], images[::2])  # 0: none
    torch.testing.assert_close(some[1::2], augment.blurred(images, sigma)[1::2], atol=1e-6, rtol=0)


def test_blur_of_an_image_that_hardly_holds_the_kernel():
    x = torch.rand(2, 3, 8, 7)
    found = augment.blurred(x, torch.tensor([1.0, 2.0]))
    for image, result, s in zip(x, found, (1.0, 2.0)):
        torch.testing.assert_close(result, F.gaussian_blur(image, [13, 13], [s, s]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="6 pixels cannot be blurred"):
        augment.blurred(torch.rand(1, 3, 6, 9), torch.ones(1))


def smooth(seed, size=(90, 70)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)


@pytest.mark.parametrize("kind, size", [("v2", 64), ("v2", 32), ("v1", 40)])
def test_a_view_is_the_pil_pipelines_view_but_for_rounding(kind, size):
    """Equal draws: one other crop, flip, factor or deviation would show at once."""
    pil = augment.augmentation(size, kind)
    crop, finish = augment.Crop(pil), augment.Finish(pil, torch.device("cpu"))
    std = torch.tensor(STATS["imagenet"][1]).view(3, 1, 1)
    for seed in range(30):
        image = smooth(seed)
        torch.manual_seed(seed)
        expected = pil(image)
        after = torch.rand(3)
        torch.manual_seed(seed)
        view, parameters = crop(image)
        assert torch.equal(torch.rand(3), after)  # as many draws, so that a second view is the same, too
        assert view.dtype == torch.uint8 and view.shape == (3, size, size)
        found = finish(view[None], parameters[None])[0]
        difference = ((found - expected) * std).abs()
        assert difference.mean() < 3 / 255 and difference.max() < 0.1
        assert ((found.flip(2) - expected) * std).abs().mean() > 10 / 255  # what a wrong draw looks like


def test_parameters_are_spread_as_in_the_recipe():
    """Frequencies within four standard deviations, means and ends of the ranges."""
    crop = augment.Crop(augment.augmentation(64))
    torch.manual_seed(0)
    image, count = torch.zeros(3, 8, 8, dtype=torch.uint8), 3000
    found = torch.stack([crop(image)[1] for _ in range(count)])
    jitter, gray, sigma, flip = found[:, :8], found[:, 8], found[:, 9], found[:, 10]
    assert found.shape[1] == 11
    jittered = jitter[:, 0] != 1
    for share, p in ((jittered, 0.8), (gray, 0.2), (sigma > 0, 0.5), (flip, 0.5)):
        assert abs(share.float().mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    for values, low, high in [(jitter[jittered, i], 0.6, 1.4) for i in range(3)] + [
        (jitter[jittered, 3], -0.1, 0.1),
        (sigma[sigma > 0], 0.1, 2.0),
    ]:
        width = high - low
        assert low <= values.min() < low + width / 50 and high - width / 50 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * width / (12 * len(values)) ** 0.5
    _, counts = jitter[jittered, 4:].unique(dim=0, return_counts=True)
    n = int(jittered.sum())
    assert len(counts) == 24 and counts.min() > n / 24 - 5 * (n / 24) ** 0.5
    assert torch.equal(jitter[~jittered], torch.tensor(augment.Jitter.neutral).expand(int((~jittered).sum()), -1))


@pytest.mark.parametrize("kind, size", [("v2", 64), ("v2", 32), ("v1", 40), ("heavy", 32)])
def test_views_by_pil_are_the_same_to_the_bit_though_they_travel_in_8(tmp_path, kind, size):
    """Both of all images, from workers and without; erasing comes after the normalisation, in floats."""
    make_images(tmp_path / "train", classes=3, images=5)
    images, whole = datasets.image_folder(str(tmp_path), "train"), augment.augmentation(size, kind, stats="cifar10")
    begin, finish = augment.halves(whole, torch.device("cpu"), "cpu")
    expected = loader.TwoCrops(images, whole, seed=9)
    pairs = loader.TwoCrops(images, begin, seed=9)
    for workers in (0, 1):
        batches = loader.train_loader(pairs, 7, process=Process(), workers=workers, seed=9)
        (view, *none), _, _ = (batch := next(iter(batches)))
        if kind == "heavy":
            assert finish is None and view.dtype == torch.float32
        else:
            assert view.dtype == torch.uint8 and not none
            batch = next(iter(augment.Finished(batches, finish)))
        im_q, im_k, index = batch
        for q, k, i in zip(im_q, im_k, index.tolist()):
            assert torch.equal(q, expected[0, i][0]) and torch.equal(k, expected[0, i][1])


def test_both_views_of_a_batch_are_finished_in_one_call(crops, monkeypatch):
    finish, calls = augment.Finish(augment.augmentation(24, blur=True), torch.device("cpu")), []
    call = augment.Finish.__call__
    batches = loader.train_loader(crops, 4, process=Process(), workers=0, seed=9)
    expected = [(finish(*q), finish(*k), index) for q, k, index in batches]
    monkeypatch.setattr(augment.Finish, "__call__", lambda *given: calls.append(1) or call(*given))
    found = list(augment.Finished(batches, finish))
    assert len(calls) == len(found) == len(expected) == 3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.fixture
def crops(tmp_path):
    make_images(tmp_path / "train", classes=3, images=5)
    images = datasets.image_folder(str(tmp_path), "train").as_uint8()
    return loader.TwoCrops(images, augment.Crop(augment.augmentation(24, blur=True)), seed=9)


def test_views_do_not_depend_on_workers_and_batch(crops):
    finish = augment.Finish(augment.augmentation(24, blur=True), torch.device("cpu"))
    found = []
    for workers, size in ((0, 4), (2, 4), (1, 6)):
        batches = augment.Finished(loader.train_loader(crops, size, process=Process(), workers=workers, seed=9), finish)
        batches.batch_sampler.sampler.set_epoch(1)
        views = {}
        for im_q, im_k, index in batches:
            assert im_q.shape == im_k.shape == (size, 3, 24, 24) and im_q.dtype == torch.float32
            views |= {i: (q, k) for q, k, i in zip(im_q, im_k, index.tolist())}
        assert len(views) == 12 and len(batches) == 12 // size
        found.append(views)
    for other in found[1:]:
        for i, (q, k) in found[0].items():
            assert not torch.equal(q, k)
            torch.testing.assert_close((q, k), other[i], atol=1e-5, rtol=0)
    torch.manual_seed(seed_of("crops", 9, 1, 7))  # the same, done by hand
    image = crops.dataset[7][0]
    for crop, parameters in (crops[1, 7][0], crops[1, 7][1]):
        view, numbers = crops.transform(image)
        assert torch.equal(crop, view) and torch.equal(parameters, numbers)
    other = copy.copy(crops)
    other.seed = 10
    assert not torch.equal(other[1, 7][0][1], crops[1, 7][0][1])


@pytest.mark.parametrize(
    "mode, format", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF")]
)
def test_files_are_read_with_pils_pixels(tmp_path, mode, format):
    path = str(tmp_path / "image")
    smooth(1, (61, 47)).convert(mode).save(path, format)
    content = decode.content_of(path)
    expected = np.asarray(decode.read_image(content, path)).transpose(2, 0, 1)
    found = decode.read_uint8(content, path)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("decoder", [*decode.JPEG_DECODERS, None])
def test_each_decoder_keeps_pils_pixels(tmp_path, monkeypatch, recwarn, decoder):
    """Photographs have other sizes than multiples of 8, and may say that they are to be turned, which nobody does."""
    if decoder and not decode.has_pils_pixels(decode.JPEG_DECODERS[decoder]):
        pytest.skip(f"{decoder} is not installed")
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: decode.JPEG_DECODERS.get(decoder))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    for mode, more in (("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}), ("L", {}), ("CMYK", {}),
                       ("RGB", {"exif": exif})):  # fmt: skip
        path = str(tmp_path / "x.jpg")
        smooth(2, (61, 47)).convert(mode).save(path, "JPEG", **more)
        content = decode.content_of(path)
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode.read_uint8(content, path), expected)
    assert not recwarn


def test_a_decoder_that_is_not_there_or_differs_is_passed_over(monkeypatch):
    """torchvision's may be a stub without its library, or gone; another's pixels may be other ones."""

    def gone(content, image):
        raise AttributeError("'_OpNamespace' 'image' object has no attribute 'decode_jpeg'")

    def turned(content, image):
        return decode.to_uint8(image.transpose(Image.Transpose.ROTATE_90))

    def right(content, image):
        return decode.to_uint8(image)

    for decoders, found in (([gone, turned, right], right), ([gone, turned], None)):
        monkeypatch.setattr(decode, "JPEG_DECODERS", dict(enumerate(decoders)))
        assert decode.jpeg_decoder.__wrapped__() is found
    monkeypatch.undo()
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    assert not decode.has_pils_pixels(decode._by_torchvision)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no image", lambda b: b[:150]]
)
def test_damaged_files_are_named(tmp_path, damage):
    whole = io.BytesIO()
    smooth(1).save(whole, "JPEG")
    path = tmp_path / "bad.jpg"
    path.write_bytes(damage(whole.getvalue()))
    with pytest.raises(UserError, match="bad.jpg: cannot be read as an image"):
        decode.read_uint8(path.read_bytes(), str(path))
    with pytest.raises(UserError, match="none.jpg: cannot be read as an image"):
        decode.content_of(str(tmp_path / "none.jpg"))


def test_what_the_device_cannot_do_is_named():
    heavy = augment.augmentation(32, "heavy")
    with pytest.raises(UserError, match="--augment-on device cannot do RandAugment; leave it to --augment-on cpu"):
        augment.Crop(heavy)
    with pytest.raises(UserError, match="begins with CenterCrop, not with a crop"):
        augment.Finish(transforms.Compose([transforms.CenterCrop(32)]), torch.device("cpu"))
