"""Tar files of images, read in place: what they hold and where, never unpacked; WebDataset's samples among them."""

import collections
import json
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from synco.errors import UserError
from synco.files import open_regular
from synco.index import is_image
from synco.records import Place

BLOCK = 512  # bytes; a tar file consists of such


class Member(NamedTuple):
    """A file in a tar file: its name there, where its bytes begin, and how many they are."""

    name: str
    start: int
    count: int


def members(path: str, within: Member | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar file, or of one that lies `within` it, by their places in the outer one.

    Raises UserError that names a file which is none, is cut short, or has a member that would lie outside its folder.
    """
    name = f"{path}: {within.name}" if within else path
    try:
        with open_regular(path) as file:
            file.seek(within.start if within else 0)
            yield from _members(file, name, within.start + within.count if within else os.fstat(file.fileno()).st_size)
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name}: cannot be read as an uncompressed tar file ({why})") from error


def _members(file: BinaryIO, name, end):
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isreg() and not member.issparse():
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise UserError(f"{name}: its member {member.name!r} would lie outside the folder; it is not read")
                if member.offset_data + member.size > end:
                    raise UserError(f"{name}: is cut short, in {member.name}")
                yield Member(member.name.removeprefix("./"), member.offset_data, member.size)
            archive.members.clear()  # it would keep them all
        file.seek(archive.offset)
        if file.read(BLOCK) != bytes(BLOCK):  # the end that each tar file has; the library does without
            raise UserError(f"{name}: is cut short, or damaged, at byte {archive.offset}")


class Sample(NamedTuple):
    """An image in a shard: its place, and its label as the files beside it say, None without."""

    image: Member
    label: str | None


def samples(path: str) -> list[Sample]:
    """The images of a shard in WebDataset's convention: key.jpg and its kind, with key.cls or key.json beside it.

    The key is the path up to the first dot of the file's name; a .json's label is its "label", "cls" or "class".
    Raises UserError as `members` does, and for a label that cannot be read.
    """
    images, labels = [], collections.defaultdict(dict)
    with open_regular(path) as file:
        for member in members(path):
            folder, slash, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            key = folder + slash + stem
            if stem and is_image(name):
                images.append((key, member))
            elif ending in ("cls", "json"):
                content = os.pread(file.fileno(), member.count, member.start)
                labels[key][ending] = _label(content, ending, f"{path}: {member.name}")
    return [Sample(member, labels[key].get("cls", labels[key].get("json"))) for key, member in images]


def _label(content, ending, name):
    """The label in a .cls or .json file, None where it has none."""
    try:
        text = content.decode()
        if ending == "cls":
            return text.strip()
        found = json.loads(text)
        labels = [found[key] for key in ("label", "cls", "class") if isinstance(found.get(key), (int, str))]
        return str(labels[0]) if labels else None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: holds no label that can be read ({error})") from error


def plain(member: str) -> str:
    """The name of an image whose member in a shard has that name: its dots are written as %2E, see `quoted`."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.replace("%2E", ".").replace("%25", "%")


def quoted(name: str) -> str:
    """The name of an image's member in a shard, whose only dot is before the ending: there WebDataset's key ends."""
    stem, ending = os.path.splitext(name)
    folder, slash, stem = stem.rpartition("/")
    return folder + slash + stem.replace("%", "%25").replace(".", "%2E") + ending


class Reader:
    """Reads members of tar files by their places. It keeps the files open, as far as a process may have many."""

    MOST = 400

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read(self, place: Place) -> bytes:
        """The bytes there, by `os.pread`: threads, and processes that were forked, may share the open file.

        Raises OSError if they cannot be read, and where the file has another size than when it was indexed.
        """
        file = self._open.get(place.path)
        if file is None:
            file = os.open(place.path, os.O_RDONLY)
            try:
                if os.fstat(file).st_size != place.size:
                    raise OSError(f"the tar file has changed since it was indexed, when it had {place.size} bytes")
                content = os.pread(file, place.count, place.start)
                if len(self._open) < self.MOST:
                    self._open.setdefault(place.path, file)
            finally:
                if self._open.get(place.path) != file:
                    os.close(file)
        else:
            content = os.pread(file, place.count, place.start)
        if len(content) < place.count:
            raise OSError("the tar file is cut short")
        return content

    def __getstate__(self) -> dict:
        return {"_open": {}}  # a spawned process has none of these files
