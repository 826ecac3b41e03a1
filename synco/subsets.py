"""Label splits: SimCLR's lists of 1 % and 10 % of ImageNet, a class-balanced draw elsewhere, or any list in a file."""

import collections
import hashlib
import http.client
import os
import re
import time
import urllib.request
from collections.abc import Collection

from synco import datasets, distributed, files, layouts, parts
from synco.errors import UserError
from synco.index import cache_folder

# https://github.com/google-research/simclr (arXiv 2002.05709): {percent: (name, SHA-256)}
URL = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/"
LISTS = {
    1: ("1percent.txt", "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17"),
    10: ("10percent.txt", "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091"),
}
SECONDS = 60  # for a download
WNID = re.compile(r"n\d{8}")  # the name of one of ImageNet's classes


def labelled(images: datasets.Images, *, percent: int, seed: int, file: str | None = None) -> datasets.Images:
    """`subset`, which says how many images it takes and where the list is from."""
    part, source = subset(images, percent, seed, file)
    distributed.say(f"{'labels':18} {len(part)} of {len(images)} images: {source}")
    return part


def subset(images: datasets.Images, percent: int, seed: int, file: str | None = None) -> tuple[datasets.Images, str]:
    """The labelled part of a training folder → (`Images`, where the list is from, in words).

    images: `datasets.Images`; percent: 1, 10 or 100; file: a list to use in place of the percent's.
    On ImageNet 1 and 10 are SimCLR's lists, elsewhere a class-balanced draw, see `balanced`.
    Raises UserError for a list that cannot be had or that is not this folder's. Every process must call this.
    """
    if file:
        return restricted(images, read_list(file), file), file
    if percent == 100:
        return images, "all training images"
    if not is_imagenet(images.classes):
        return restricted(images, balanced(images, percent, seed)), f"class-balanced draw, seed {seed}"
    found = distributed.from_rank_0(published_list(percent) if distributed.rank() == 0 else None)
    return restricted(images, *found), f"SimCLR's {LISTS[percent][0]}"


def is_imagenet(classes: Collection[str]) -> bool:
    """Whether these are ImageNet's 1,000 classes, by number and form; the list itself tells whether it fits them."""
    return len(classes) == 1000 and all(WNID.fullmatch(name) for name in classes)


def balanced(images: datasets.Images, percent: int, seed: int) -> list[str]:
    """Draw `percent` of each class's images, rounded, at least one → their names, sorted.

    Those with the smallest SHA-256 of (seed, percent, name): neither the machine nor the order of reading matters.
    """
    chosen = []
    for positions in parts.by_class(images, f"{seed}/{percent}"):
        chosen += positions[: max(1, round(len(positions) * percent / 100))]
    return sorted(images.names[i] for i in chosen)


def read_list(path: str) -> list[str]:
    """The names in a list, one a line: "class/file", or as in SimCLR's "wnid_N.JPEG", whose class is the wnid."""
    return parse(layouts.content_of(path), path)


def parse(content: bytes, path: str) -> list[str]:
    """The lines of a list, as bytes → names "class/file". A file name may hold any byte but 0 and the line's end."""
    if b"\0" in content:
        raise UserError(f"{path}: not a list of images: it is no text file")
    names = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        name = os.fsdecode(line.removesuffix(b"\r"))
        group, separator, _ = name.rpartition("_")
        if not name.strip():
            continue
        if "/" not in name and not separator:
            raise UserError(f"{path}: {name[:80]!r} is neither class/file nor a name like n04235860_14959.JPEG")
        names.append(name if "/" in name else f"{group}/{name}")
    if not names:
        raise UserError(f"{path}: the list names no image")
    twice = [name for name, times in collections.Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} images are listed more than once, such as {twice[0]}")
    return names


def restricted(images: datasets.Images, names: Collection[str], path: str = "the draw") -> datasets.Images:
    """The images with these names, sorted by them, as `Images` with all their classes.

    Raises UserError that counts and names those that are not there; `path` is where the names are from.
    """
    known = {name: position for position, name in enumerate(images.names)}
    strange = sorted({name.split("/")[0] for name in names} - set(images.classes))
    if strange:
        raise UserError(
            f"{path}: a list of other images: {len(strange)} of its classes are not in {images.root}, "
            f"such as {', '.join(strange[:3])}"
        )
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its {len(names)} images are not in {images.root}, "
            f"such as {', '.join(missing[:3])}"
        )
    return images.subset([known[name] for name in sorted(names)])


def list_of(images: datasets.Images) -> bytes:
    """The names of the images, sorted, as `parse` reads them: "wnid_N.JPEG" where that tells the class."""
    lines = []
    for name in sorted(images.names):
        group, _, file = name.partition("/")
        short = WNID.fullmatch(group) and file.rpartition("_")[0] == group
        lines.append(os.fsencode(file if short else name) + b"\n")
    return b"".join(lines)


def digest(images: datasets.Images) -> str:
    """The SHA-256 of `list_of`."""
    return hashlib.sha256(list_of(images)).hexdigest()


def write_list(images: datasets.Images, path: str) -> None:
    """Write `list_of`. Raises UserError if the file is there and says something else, or could not be read back."""
    for name in images.names:
        if "\n" in name or name.endswith("\r"):
            raise UserError(f"--write-subset {path}: a list has one name a line, and {name} holds a line break")
    content = list_of(images)
    try:
        if os.path.exists(path):
            with files.open_regular(path) as file:
                if file.read() != content:
                    raise UserError(f"--write-subset {path}: is there and holds something else; give another name")
        with files.atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"--write-subset {path}: cannot be written ({error.strerror})") from error


def published_list(percent: int) -> tuple[list[str], str]:
    """SimCLR's list of 1 or 10 percent of ImageNet, from the cache folder or downloaded → (names, its file).

    Raises UserError that says where to put the file if it cannot be had.
    """
    name, digest = LISTS[percent]
    path = os.path.join(cache_folder(), name)
    if os.path.isfile(path):
        content = layouts.content_of(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{path}: not SimCLR's list (its SHA-256 differs): remove it, and it is downloaded again")
        return parse(content, path), path
    by_hand = f"put {URL}{name} at {path}, or name it with --subset-file"
    try:
        content = download(URL + name)
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own are OSErrors
        why = str(error).strip() or type(error).__name__
        raise UserError(f"SimCLR's list {name} cannot be downloaded ({why}): {by_hand}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"what {URL}{name} sent is not SimCLR's list (its SHA-256 differs): {by_hand}")
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        with files.atomic_write(path) as file:  # several jobs may start at once
            file.write(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name the list with --subset-file") from error
    return parse(content, path), path


def download(url: str) -> bytes:
    """What a URL sends, at most 16 MiB within `SECONDS`. Raises OSError or HTTPException."""
    end = time.monotonic() + SECONDS
    content = b""
    with urllib.request.urlopen(url, timeout=10) as answer:
        while block := answer.read1(1 << 16):
            content += block
            if time.monotonic() > end or len(content) > 16 << 20:
                raise TimeoutError(f"not done after {SECONDS} s")
    return content
