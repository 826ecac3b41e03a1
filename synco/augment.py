"""Augmentation in two halves: the loading workers' and, for a batch at once, the device's.

The recipe is the PIL pipeline's (`augmentation`), whose steps are taken apart here. Views travel in uint8, a quarter of
what floats take: with --augment-on cpu workers do all of it in 8 bits, and the device normalises (`Pixels`,
`Normalized`); with device they only decode, crop and resize (`Crop`, `Finish`). Then a worker draws the
parameters of the other steps by the very calls of the PIL pipeline, in its order: a view has the
parameters of the PIL pipeline's view of the same seed, epoch and image. They travel beside the crop as a few numbers,
and `Finish` applies them to whole batches. The host has them, so it knows which images a step concerns without asking
the device.

Each step is torchvision's (transforms.v2.functional on float tensors), up to rounding. PIL rounds to 8 bits after
each step, turns hues by whole 256ths, and blurs by three box filters in place of a Gaussian kernel.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from synco import decode, loader
from synco.distributed import to_device
from synco.errors import UserError
from synco.options import STATS

BLUR_TAPS = 13  # the blur's kernel size: three standard deviations to both sides at the recipe's largest, 2 pixels


class GaussianBlur:
    """PIL's Gaussian blur with a radius (its σ, in pixels) drawn uniformly from a range, as in SimCLR."""

    def __init__(self, low: float = 0.1, high: float = 2.0) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = torch.empty(1).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def to_tensor(stats: str = "imagenet") -> transforms.Compose:
    """PIL image → float tensor (3, H, W), normalised with the `options.STATS` of that name."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(*STATS[stats])])


def augmentation(
    size: int,
    kind: str = "v2",
    *,
    blur: bool = False,
    crop_scale: Sequence[float] | None = None,
    stats: str = "imagenet",
) -> transforms.Compose:
    """The augmentation of one view. PIL image → (3, size, size).

    kind: MoCo's "v2" (arXiv 2003.04297) or "v1" (arXiv 1911.05722), or "heavy", with RandAugment and random erasing,
    of a published MoCHi trainer. Below 64 pixels the blur of "v2" and "heavy" is left out, as in MoCo's recipe for
    CIFAR-10, unless `blur` asks for it.
    crop_scale: least and greatest part of the image's area in a crop; None: (0.2, 1), of "heavy" (0.5, 1).
    """
    crop = transforms.RandomResizedCrop(
        size,
        scale=crop_scale or ((0.5, 1.0) if kind == "heavy" else (0.2, 1.0)),
        interpolation=InterpolationMode.BICUBIC if kind == "heavy" else InterpolationMode.BILINEAR,
    )
    flip = transforms.RandomHorizontalFlip()
    blurs = [transforms.RandomApply([GaussianBlur()], p=0.5)] if blur or size >= 64 else []
    if kind == "heavy":
        operations = transforms.RandAugment(num_ops=2, magnitude=9)
        erasing = transforms.RandomErasing(p=0.25)
        return transforms.Compose([crop, flip, operations, *blurs, to_tensor(stats), erasing])
    grayscale = transforms.RandomGrayscale(p=0.2)
    if kind == "v2":
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        return transforms.Compose([crop, jitter, grayscale, *blurs, flip, to_tensor(stats)])
    return transforms.Compose([crop, grayscale, transforms.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, to_tensor(stats)])


def classifier_augmentation(size: int, stats: str = "imagenet") -> transforms.Compose:
    """A training view of the linear probe and of fine-tuning: a random crop and flip. PIL image → (3, size, size)."""
    crop, flip = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, to_tensor(stats)])


def center_view(size: int, stats: str = "imagenet") -> transforms.Compose:
    """The centre of an image: resized to 256/224 of `size` (below 64 pixels to `size`), centre-cropped.

    PIL image → (3, size, size).
    """
    resized = size if size < 64 else round(size * 256 / 224)
    return transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size), to_tensor(stats)])


def halves(augmentation: transforms.Compose, device: torch.device, on: str) -> tuple[Callable, "Finish | None"]:
    """An augmentation as what workers do, image → a view, and what the device does, see `Finished`; None: nothing.

    on: "cpu", whose views are the augmentation's own bit for bit, on every device, or "device".
    """
    if on == "device":
        return Crop(augmentation), Finish(augmentation, device)
    *steps, last = augmentation.transforms
    if not isinstance(last, transforms.Compose):  # RandomErasing comes after the normalisation
        return augmentation, None
    return Pixels(steps), Normalized(last.transforms[-1], device)


class Pixels:
    """The workers' half of an augmentation by PIL: image → (view uint8 (3, S, S),). steps: those before `to_tensor`."""

    def __init__(self, steps: Sequence[Callable]) -> None:
        self.steps = transforms.Compose(steps)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor]:
        return (decode.to_uint8(self.steps(image)),)


class Crop:
    """The workers' half of an augmentation: image → (crop uint8 (3, S, S), parameters (P,) of the other steps).

    augmentation: from `augment.augmentation`; image: PIL, or uint8 (3, H, W). Draws from torch's default generator.
    Raises UserError that names a step of the augmentation which the device does not have.
    """

    def __init__(self, augmentation: transforms.Compose) -> None:
        self.crop, self.steps = _apart(augmentation)

    def __call__(self, image: Image.Image | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, crop = decode.to_uint8(image), self.crop
        box = crop.get_params(image, crop.scale, crop.ratio)
        view = F.resized_crop(image, *box, crop.size, crop.interpolation, antialias=True)  # v2's, which stays in uint8
        return view, torch.tensor([number for step in self.steps for number in step.draw()])


class Finish:
    """The device's half: (crops, parameters), batches of what `Crop` makes → views (N, 3, S, S), normalised float32.

    crops: uint8 (N, 3, S, S), on the CPU or the device already; parameters (N, P), on the CPU.
    """

    def __init__(self, augmentation: transforms.Compose, device: torch.device) -> None:
        self.steps, self.device = _apart(augmentation)[1], device

    def __call__(self, crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        x = crops.to(self.device, non_blocking=True).float()
        # on a GPU a division by a number is a product with its reciprocal, which rounds otherwise than a CPU's
        x.div_(torch.full((), 255.0, device=self.device))
        for step, part in zip(self.steps, parameters.split([len(step.neutral) for step in self.steps], dim=1)):
            x = step(x, part)
        return x


class Normalized(Finish):
    """The device's half of an augmentation by PIL: views uint8 (N, 3, S, S) → normalised float32, as `to_tensor`."""

    def __init__(self, normalize: transforms.Normalize, device: torch.device) -> None:
        self.steps, self.device = [Normalize(normalize)], device

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        return super().__call__(views, torch.empty(len(views), 0))


class Finished:
    """A loader of pairs of views that are half done as one of pairs that are finished, both in one call.

    Items: im_q, im_k (N, 3, S, S) on the device, index.
    """

    def __init__(self, batches: loader.Loader, finish: Finish) -> None:
        self.batches, self.finish = batches, finish
        self.batch_sampler, self.dataset, self.ahead = batches.batch_sampler, batches.dataset, batches.ahead

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for q, k, index in self.batches:
            (crops, *parameters) = zip(q, k)
            there = [part.to(self.finish.device, non_blocking=True) for part in crops]  # from pinned memory
            yield *self.finish(torch.cat(there), *map(torch.cat, parameters)).chunk(2), index


def _apart(augmentation):
    """An augmentation's RandomResizedCrop, and its other steps as those of this file."""
    crop, *others = _flat(augmentation)
    if not isinstance(crop, transforms.RandomResizedCrop):
        raise UserError(f"--augment-on device: the augmentation begins with {type(crop).__name__}, not with a crop")
    steps = []
    for step in others:
        p, inner = (step.p, step.transforms[0]) if isinstance(step, transforms.RandomApply) else (None, step)
        if type(inner) not in STEPS or (p is not None and len(step.transforms) > 1):
            raise UserError(f"--augment-on device cannot do {type(inner).__name__}; leave it to --augment-on cpu")
        made = STEPS[type(inner)](inner)
        steps.append(made if p is None else _Sometimes(made, p))
    return crop, steps


def _flat(augmentation):
    """The steps of nested Composes, but for ToTensor, which has been done."""
    for step in augmentation.transforms:
        if isinstance(step, transforms.Compose):
            yield from _flat(step)
        elif not isinstance(step, transforms.ToTensor):
            yield step


class _Sometimes:
    """RandomApply: the step with probability p, else its neutral parameters."""

    def __init__(self, step: Callable, p: float):
        self.step, self.p, self.neutral = step, p, step.neutral

    def draw(self) -> Sequence[float]:
        """The step's parameters, or its neutral ones."""
        return self.neutral if self.p < torch.rand(1) else self.step.draw()

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return self.step(x, parameters)


class Jitter:
    """ColorJitter; parameters: the factors of brightness, contrast and saturation, the turn of the hue, the order."""

    neutral = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0)
    HUE = 3

    def __init__(self, jitter: transforms.ColorJitter) -> None:
        self.jitter = jitter

    def draw(self) -> Sequence[float]:
        """Four factors, then the order of the four parts: eight numbers."""
        j = self.jitter
        order, *drawn = j.get_params(j.brightness, j.contrast, j.saturation, j.hue)
        return [kept if new is None else new for kept, new in zip(self.neutral, drawn)] + order.tolist()

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        factors, order = parameters[:, :4], parameters[:, 4:].long()
        for part in order.unbind(1):  # (N,): which of the four comes now
            factor = factors.gather(1, part[:, None]).squeeze(1)
            own = torch.where(part == self.HUE, 1.0, factor)
            x = mixed_with_gray(x, own, torch.where(part == 2, 1 - own, 0.0), torch.where(part == 1, 1 - own, 0.0))
            x = _only(x, (part == self.HUE) & (factor != 0), turned_hue, factor)
        return x


class Grayscale:
    """RandomGrayscale; parameter: 1 for gray, 0."""

    neutral = (0.0,)

    def __init__(self, grayscale: transforms.RandomGrayscale) -> None:
        self.p = grayscale.p

    def draw(self) -> Sequence[float]:
        """1 with probability p, else 0."""
        return (float(torch.rand(1) < self.p),)

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        gray = parameters[:, 0]
        return mixed_with_gray(x, 1 - gray, gray, torch.zeros_like(gray))


class Blur:
    """GaussianBlur; parameter: the standard deviation in pixels, 0 for none."""

    neutral = (0.0,)

    def __init__(self, blur: GaussianBlur) -> None:
        self.low, self.high = blur.low, blur.high

    def draw(self) -> Sequence[float]:
        """A standard deviation from the range, uniformly."""
        return (torch.empty(1).uniform_(self.low, self.high).item(),)

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        sigma = parameters[:, 0]
        return _only(x, sigma > 0, blurred, sigma)


class Flip:
    """RandomHorizontalFlip; parameter: 1 for flipped, 0."""

    neutral = (0.0,)

    def __init__(self, flip: transforms.RandomHorizontalFlip) -> None:
        self.p = flip.p

    def draw(self) -> Sequence[float]:
        """1 with probability p, else 0."""
        return (float(torch.rand(1) < self.p),)

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return _only(x, parameters[:, 0] > 0, lambda chosen: chosen.flip(3))


class Normalize:
    """Normalize; no parameters."""

    neutral = ()

    def __init__(self, normalize: transforms.Normalize) -> None:
        self.mean, self.std = (torch.as_tensor(v).view(3, 1, 1) for v in (normalize.mean, normalize.std))

    def draw(self) -> Sequence[float]:
        """Nothing: there is nothing to draw."""
        return ()

    def __call__(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return x.sub_(to_device(self.mean, x.device)).div_(to_device(self.std, x.device))


STEPS = {
    transforms.ColorJitter: Jitter,
    transforms.RandomGrayscale: Grayscale,
    GaussianBlur: Blur,
    transforms.RandomHorizontalFlip: Flip,
    transforms.Normalize: Normalize,
}


def _only(x, chosen, function, *parameters):
    """x (N, 3, H, W) with function(images, their parameters) in the place of the chosen images alone.

    chosen (N,), a mask, and parameters (N,) each, on the CPU.
    """
    index = chosen.nonzero().squeeze(1)
    if not len(index):
        return x
    there = to_device(index, x.device)
    parts = [to_device(p[index], x.device) for p in parameters]
    return x.index_copy_(0, there, function(x.index_select(0, there), *parts))


def mixed_with_gray(x: torch.Tensor, own: torch.Tensor, gray: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """own · x + gray · L + mean · (mean of L), clamped to [0, 1], in place; L is the image in gray.

    Brightness, contrast, saturation and grayscale are all of this form. x (N, 3, H, W) in [0, 1]; own, gray, mean
    (N,), on the CPU.
    """
    own, gray, mean = to_device(torch.stack([own, gray, mean]), x.device)[:, :, None, None, None]  # (N, 1, 1, 1) each
    L = (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)  # (N, 1, H, W)
    average = L.mean(dim=(1, 2, 3), keepdim=True)
    return x.mul_(own).add_(L.mul_(gray).add_(mean * average)).clamp_(0, 1)


def turned_hue(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Hues turned by a part of the circle in [-0.5, 0.5]; x (N, 3, H, W) in [0, 1], turn (N,).

    Saturation and value of HSV stay: with h in sixths of the circle, and k = 5, 3, 1 for red, green, blue,

        channel = max - (max - min) · clamp(min(j, 4 - j), 0, 1),   j = (k + h) mod 6
    """
    r, g, b = x.unbind(1)  # (N, H, W)
    high = x.amax(dim=1)
    range_ = high - x.amin(dim=1)
    below = range_ + (range_ == 0)
    h = torch.where(high == r, (g - b) / below, torch.where(high == g, 2 + (b - r) / below, 4 + (r - g) / below))
    h += 6 * turn[:, None, None]
    k = torch.tensor([5.0, 3.0, 1.0])
    j = (to_device(k, x.device)[:, None, None] + h[:, None]).remainder_(6)  # (N, 3, H, W)
    return high[:, None] - range_[:, None] * torch.minimum(j, 4 - j).clamp_(0, 1)


def blurred(x: torch.Tensor, sigma: torch.Tensor, taps: int = BLUR_TAPS) -> torch.Tensor:
    """Gaussian blur with a kernel of taps × taps and reflected borders; x (N, 3, H, W), sigma (N,) in pixels.

    Blurring a row of pixels is a product with a matrix, and so is blurring a column: two batched products in all.
    """
    N, C, H, W = x.shape
    x = torch.bmm(x.reshape(N, C * H, W), _blur_matrix(W, sigma, taps))
    x = x.view(N, C, H, W).transpose(2, 3).reshape(N, C * W, H)
    return torch.bmm(x, _blur_matrix(H, sigma, taps)).view(N, C, W, H).transpose(2, 3)


def _blur_matrix(size, sigma, taps):
    """(N, size, size): how much of pixel i is in blurred pixel j: directly, and by reflection at both ends."""
    reach = taps // 2
    if size <= reach:
        raise ValueError(f"{size} pixels cannot be blurred with a kernel of {taps}")
    s = sigma[:, None, None]

    def weight(distance):
        return torch.exp(-((distance / s) ** 2) / 2) * (distance.abs() <= reach)

    i = torch.arange(size, device=sigma.device, dtype=sigma.dtype)[:, None]
    j = i.T
    total = weight(torch.arange(-reach, reach + 1, device=sigma.device)[None]).sum(dim=2, keepdim=True)
    mirrored = weight(i + j) * (i > 0) + weight(2 * (size - 1) - i - j) * (i < size - 1)
    return (weight(i - j) + mirrored) / total
