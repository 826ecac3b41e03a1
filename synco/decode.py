"""From an image's bytes to its pixels: RGB by PIL, or uint8 tensors; what cannot be read is named."""

import contextlib
import functools
import io
import struct
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from synco import files
from synco.errors import UserError

# what PIL's decoders raise on damaged or hostile files
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


def read_image(content: bytes, name: str, when_scaled: Callable[[str], None] | None = None) -> Image.Image:
    """The image in a file's content, as RGB. Raises UserError that names what cannot be read.

    name: of the file, or what else messages call it; when_scaled: called with the name of an image whose pixels have
    more than 8 bits, see `to_rgb`.
    """
    with unreadable_named(name), open_image(content, name) as image:
        if when_scaled and image.mode in DEEP:
            when_scaled(name)
        return to_rgb(image)


def content_of(path: str) -> bytes:
    """The content of an image's file. Raises UserError that names a file which cannot be read."""
    with unreadable_named(path), files.open_regular(path) as file:
        return file.read()


@contextlib.contextmanager
def unreadable_named(name: str) -> Iterator[None]:
    """What is raised in reading an image becomes a UserError that names it."""
    try:
        yield
    except UNREADABLE as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be read as an image ({why})") from error


@contextlib.contextmanager
def open_image(content: bytes, name: str) -> Iterator[Image.Image]:
    """PIL's image of a file's content, of which it has read the header. Raises any of `UNREADABLE`."""
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"cannot identify image file {name!r}") from None
    with image:
        yield image


def size_of(content: bytes, name: str) -> tuple[int, int]:
    """(width, height) of the image in a file's content, by its header. Raises UserError that names one without."""
    with unreadable_named(name), open_image(content, name) as image:
        return image.size


DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # PIL's modes of one channel of more than 8 bits


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as RGB; pixels of more than 8 bits are scaled to 8, where PIL would cut them off at 255.

    16 bits are divided by 257. Integers of 32 bits and floats have no agreed range: an image's least and greatest
    value, of those that are finite, become 0 and 255.
    """
    if image.mode not in DEEP:
        return image.convert("RGB")
    pixels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or image.format == "PNG":  # which older versions of PIL widen to 32 bits
        low, high = 0, 65535
    else:
        finite = pixels[np.isfinite(pixels)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0, 1)
    scaled = np.nan_to_num(pixels - low, posinf=high - low, neginf=0) * (255 / ((high - low) or 1))
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def read_uint8(content: bytes, name: str, when_scaled: Callable[[str], None] | None = None) -> torch.Tensor:
    """The image in a file's content as a uint8 tensor (3, H, W), with the pixels of `read_image`.

    JPEG files go through `jpeg_decoder`, which makes the tensor without a copy.
    Raises UserError that names what cannot be read. name, when_scaled: as for `read_image`.
    """
    try:
        with open_image(content, name) as image:  # refuses monstrous sizes
            if image.format == "JPEG" and (decode := jpeg_decoder()):
                return decode(content, image)
    except UNREADABLE:
        pass  # PIL's word decides whether the file is good, and which is its fault
    return to_uint8(read_image(content, name, when_scaled))


def _by_torchvision(content, image):
    """Deprecated since torchvision 0.29, of which it warns at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torchvision.io.decode_jpeg(_tensor(content), mode=torchvision.io.ImageReadMode.RGB)


def _by_torchcodec(content, image):
    """Raises ValueError for an image that TorchCodec would turn as its EXIF data say, which PIL does not."""
    from torchcodec.decoders import decode_jpeg  # an optional package, used where torchvision has no decoder

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise ValueError("it is to be turned")
    return decode_jpeg(_tensor(content), mode="RGB")


def _tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# functions of (a JPEG file's content, PIL's image of it) → uint8 (3, H, W); they use libjpeg-turbo, as PIL does
JPEG_DECODERS = {"torchvision.io": _by_torchvision, "TorchCodec": _by_torchcodec}


@functools.cache
def jpeg_decoder() -> Callable[[bytes, Image.Image], torch.Tensor] | None:
    """The first of `JPEG_DECODERS` that is installed and has PIL's pixels; None: PIL itself is to decode."""
    return next(filter(has_pils_pixels, JPEG_DECODERS.values()), None)


def has_pils_pixels(decode: Callable[[bytes, Image.Image], torch.Tensor]) -> bool:
    """Whether a decoder is installed and makes of a small image what PIL does; its library may be another."""
    file, ramp = io.BytesIO(), Image.linear_gradient("L").resize((24, 24))
    Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)]).save(file, "JPEG")
    with Image.open(file) as image:
        try:
            return torch.equal(decode(file.getvalue(), image), to_uint8(image))
        except (ImportError, AttributeError, *UNREADABLE):  # it is not there, or its own libraries are not
            return False


def to_uint8(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """A PIL image, or the uint8 tensor (3, H, W) that it is already, as a uint8 tensor (3, H, W)."""
    return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)
