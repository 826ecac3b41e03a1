"""From an image's bytes to its pixels: RGB by PIL, or uint8 tensors; what cannot be read is named."""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
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

    JPEG files go through torchvision's decoder: it is libjpeg-turbo, as PIL's is, and makes the tensor without a copy.
    Raises UserError that names what cannot be read. name, when_scaled: as for `read_image`.
    """
    try:
        with open_image(content, name) as image:  # refuses monstrous sizes
            # the decoder is deprecated since torchvision 0.29: PIL does as well, at 0.9 of the speed
            if image.format == "JPEG" and hasattr(torchvision.io, "decode_jpeg"):
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    except UNREADABLE:
        pass  # PIL's word decides whether the file is good, and which is its fault
    return to_uint8(read_image(content, name, when_scaled))


def to_uint8(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """A PIL image, or the uint8 tensor (3, H, W) that it is already, as a uint8 tensor (3, H, W)."""
    return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)
