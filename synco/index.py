"""The index of a folder of images: which files it holds, of which classes; made once, kept in a cache, shared.

Listing 1.28 million files takes seconds on a local disk and minutes on a network's. The index of such a folder is
kept in the user's cache folder, never in the data's, and is mapped into memory: the processes of a node and their
workers hold it once, and no list of a million strings is copied.
"""

import contextlib
import hashlib
import os
import pathlib
import pickle
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from synco import checkpoint, files
from synco.errors import UserError

FORMAT = 2
WORTH_IT = 10_000  # images; listing fewer takes a moment
SETTLED = 2_000_000_000  # ns; a folder that changed this lately may change again within its clock's tick


def cache_folder() -> str:
    """Where indices and downloaded lists are kept: $XDG_CACHE_HOME/synco, ~/.cache/synco unless that is set."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # a relative one is to be passed over (XDG Base Directory Specification)
    return os.path.join(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache"), "synco")


class Index(Sequence):
    """The images of a folder as a sequence of names "class/file", in the order of torchvision's ImageFolder.

    classes: their names, sorted; starts (C + 1,): class c has the images starts[c] to starts[c + 1] - 1;
    files: each image's path below its class's folder, one after the other, uint8; offsets (N + 1,): where they begin.
    NumPy arrays, the last one of which may be far larger than a list of these names should be.
    """

    def __init__(self, classes: list[str], starts: np.ndarray, offsets: np.ndarray, files: np.ndarray):
        self.classes, self.starts, self.offsets, self.files = classes, starts, offsets, files

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        name = self.classes[int(np.searchsorted(self.starts, i, side="right")) - 1]
        return f"{name}/{os.fsdecode(self.files[self.offsets[i] : self.offsets[i + 1]].tobytes())}"

    def __iter__(self) -> Iterator[str]:
        for c, name in enumerate(self.classes):
            ends = self.offsets[self.starts[c] : self.starts[c + 1] + 1]
            part, ends = self.files[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
            for start, end in zip(ends, ends[1:]):
                yield f"{name}/{os.fsdecode(part[start:end])}"

    def checksum(self) -> int:
        """CRC-32 of all that the index says."""
        found = zlib.crc32(os.fsencode("\0".join(self.classes)))
        for array in (self.starts, self.offsets, self.files):
            found = zlib.crc32(array, found)
        return found

    def targets(self) -> np.ndarray:
        """(N,) int64: the class of every image."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))


def open_index(folder: str) -> Index:
    """The `Index` of a folder: the stored one where the folder has not changed since, else a new one, which is stored.

    It has changed if one of its folders has been written to (a file or folder added, removed or renamed) or replaced.
    Of several processes that ask for it at once, one makes it and the others wait. Raises UserError where the folder
    holds no classes, or a class no images.
    """
    store = _store(folder)
    found = _load(store, folder)
    if found:
        return found
    with _alone(store) as writable:
        found = _load(store, folder) if writable else None  # another process may have made it meanwhile
        if found:
            return found
        began = time.time_ns()
        index, folders = scan(folder)
        settled = all(mtime < began - SETTLED for _, mtime, _ in folders)
        if writable and settled and len(index) >= WORTH_IT:
            _save(store, folder, index, folders)
    return index


def scan(folder: str) -> tuple[Index, list[tuple[str, int, int]]]:
    """(the `Index` of a folder as it is now, [(folder within it, its mtime in ns, its inode)]).

    Links to folders are followed, but a folder that is there under two names counts once, under the first: a link to
    a class, or to a folder that holds this one, would multiply its images.
    """
    try:
        root = os.stat(folder)
        around = {_identity(root), *(_identity(os.stat(place)) for place in pathlib.Path(folder).resolve().parents)}
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if _is_folder(entry))
        if not classes:
            raise UserError(f"{folder}: Couldn't find any class folder; it should hold CLASS/IMAGE")
        with ThreadPoolExecutor(16) as threads:  # while one waits for a network's disk, others ask on
            tops = list(threads.map(lambda name: _identity(os.stat(os.path.join(folder, name))), classes))
            first = dict(zip(reversed(tops), reversed(classes)))
            for name, top in zip(classes, tops):
                if top in around:
                    raise UserError(f"{folder}: the class {name} is a link to a folder that holds it; remove it")
                if first[top] != name:
                    raise UserError(f"{folder}: the classes {first[top]} and {name} are one folder; remove one of them")
            known = around.union(tops)
            walks = list(threads.map(lambda name: _walk(folder, name, known), classes))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be listed ({error.strerror})") from error
    listed, states = [], [_state("", root)]
    for name, walk in zip(classes, walks):
        below = []
        for place, status, images in walk:
            if place != name and _identity(status) in known:  # of another class already
                continue
            known.add(_identity(status))
            states.append(_state(place, status))
            below += [f"{place}/{image}"[len(name) + 1 :] for image in images]
        listed.append(below)
    empty = [name for name, images in zip(classes, listed) if not images]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(
            f"{folder}: Found no valid file for the classes {', '.join(empty[:3])}{more}; it should hold CLASS/IMAGE"
        )
    names = [os.fsencode(name) for images in listed for name in images]
    index = Index(
        classes,
        starts=np.cumsum([0, *map(len, listed)], dtype=np.int64),
        offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        files=np.frombuffer(b"".join(names), dtype=np.uint8),
    )
    return index, states


def _walk(folder, name, known):
    """[(place, its status, its images' names)] of a class's folder and those below, in torchvision's order.

    known: other folders not to go into, by `_identity`.
    """
    found, waiting, seen = [], [name], set()
    while waiting:
        place = waiting.pop()
        path = os.path.join(folder, place)
        status, images, folders = os.stat(path), [], []
        if place != name and (_identity(status) in known or _identity(status) in seen):
            continue
        seen.add(_identity(status))
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.append(f"{place}/{entry.name}")
                elif _is_image(entry.name):
                    images.append(entry.name)
        waiting += sorted(folders, reverse=True)
        found.append((place, status, sorted(images)))
    return sorted(found, key=lambda entry: entry[0])


def _is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS)


def _is_folder(entry):
    """Whether an entry of a folder is a folder itself. Raises UserError for a link to nothing, which may have been one.

    A link with an image's name is taken for an image; reading it says that it is missing.
    """
    try:
        if entry.is_symlink() and not _is_image(entry.name):
            entry.stat()
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"{entry.path}: is a link that leads nowhere ({error.strerror}); mend or remove it") from error


def _identity(status):
    """What a folder is recognised by, whatever its path."""
    return status.st_dev, status.st_ino


def _state(below, status):
    """What a folder's place, age and inode were: of one that has not changed they are the same."""
    return below, status.st_mtime_ns, status.st_ino


def _store(folder):
    """The file in the cache that holds this folder's index."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]
    return os.path.join(cache_folder(), f"images-{name}.index")


@contextlib.contextmanager
def _alone(store):
    """Whether the cache can be written, one process at a time; where the system has no locks, several at a time."""
    try:
        os.makedirs(os.path.dirname(store), exist_ok=True)
        # sixteen locks for all folders: none can be removed safely, and one would make a small folder wait for a large
        lock = open(store[: store.rindex("-") + 2] + ".lock", "w")
    except OSError:
        yield False
        return
    with lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, by the end of the process at the latest
        yield True


def _save(store, folder, index, folders):
    paths, mtimes, inodes = zip(*folders)
    content = {
        "format": FORMAT,
        "folder": os.path.realpath(folder),
        "classes": index.classes,
        "folders": list(paths),
        "mtimes": torch.tensor(mtimes),
        "inodes": [int(inode) for inode in inodes],
        "starts": torch.from_numpy(index.starts),
        "offsets": torch.from_numpy(index.offsets),
        "files": torch.from_numpy(index.files.copy()),
        "sum": index.checksum(),
    }
    with (
        contextlib.suppress(OSError),
        files.atomic_write(store) as file,
    ):  # a full disk: the index is there all the same
        torch.save(content, file)


def _load(store, folder):
    """The stored `Index`, or None where there is none, it is damaged, or the folder has changed since."""
    try:
        content = torch.load(store, map_location="cpu", mmap=True, weights_only=True)
        if content["format"] != FORMAT or content["folder"] != os.path.realpath(folder):
            return None
        index = Index(content["classes"], *(content[name].numpy() for name in ("starts", "offsets", "files")))
        states = zip(content["folders"], content["mtimes"].tolist(), content["inodes"])
        whole = content["sum"] == index.checksum()  # a wrong bit would make a file's name one of no file
        return (
            index
            if whole
            and all(_state(below, os.stat(os.path.join(folder, below))) == (below, *state) for below, *state in states)
            else None
        )
    except (*checkpoint.DAMAGED, pickle.UnpicklingError):
        return None
