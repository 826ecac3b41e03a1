"""The index of a folder of images: which files it holds, of which classes; made once, kept in a cache, shared.

Listing 1.28 million files takes seconds on a local disk and minutes on a network's. The index of such a folder is
kept in the user's cache folder, never in the data's, and is mapped into memory: the processes of a node and their
workers hold it once, and no list of a million strings is copied.
"""

import contextlib
import hashlib
import os
import pickle
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from synco import checkpoint
from synco.options import UserError

FORMAT = 1
WORTH_IT = 10_000  # images; listing fewer takes a moment
SETTLED = 2_000_000_000  # ns; a folder that changed this lately may change again within its clock's tick


def cache_folder():
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

    def __init__(self, classes, starts, offsets, files):
        self.classes, self.starts, self.offsets, self.files = classes, starts, offsets, files

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        name = self.classes[int(np.searchsorted(self.starts, i, side="right")) - 1]
        return f"{name}/{os.fsdecode(self.files[self.offsets[i] : self.offsets[i + 1]].tobytes())}"

    def __iter__(self):
        for c, name in enumerate(self.classes):
            ends = self.offsets[self.starts[c] : self.starts[c + 1] + 1]
            part, ends = self.files[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
            for start, end in zip(ends, ends[1:]):
                yield f"{name}/{os.fsdecode(part[start:end])}"

    def checksum(self):
        """CRC-32 of all that the index says."""
        found = zlib.crc32(os.fsencode("\0".join(self.classes)))
        for array in (self.starts, self.offsets, self.files):
            found = zlib.crc32(array, found)
        return found

    def targets(self):
        """(N,) int64: the class of every image."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))


def of(folder):
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


def scan(folder):
    """(the `Index` of a folder as it is now, [(folder within it, its mtime in ns, its inode)])."""
    try:
        root = _state(folder, "")
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not classes:
        raise UserError(f"{folder}: Couldn't find any class folder; it should hold CLASS/IMAGE")
    try:
        with ThreadPoolExecutor(16) as threads:  # while one waits for a network's disk, others ask on
            listed = list(threads.map(lambda name: _images(folder, name), classes))
    except OSError as error:  # a folder that vanished meanwhile
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    empty = [name for name, (files, _) in zip(classes, listed) if not files]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(
            f"{folder}: Found no valid file for the classes {', '.join(empty[:3])}{more}; it should hold CLASS/IMAGE"
        )
    names = [os.fsencode(file) for files, _ in listed for file in files]
    index = Index(
        classes,
        starts=np.cumsum([0, *(len(files) for files, _ in listed)], dtype=np.int64),
        offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        files=np.frombuffer(b"".join(names), dtype=np.uint8),
    )
    return index, [root, *(state for _, states in listed for state in states)]


def _images(folder, name):
    """(the images of a class as paths below its folder, [state of each folder]), as torchvision lists them."""
    top = os.path.join(folder, name)
    files, states = [], []
    for place, _, found in sorted(os.walk(top, followlinks=True)):
        states.append(_state(folder, os.path.relpath(place, folder)))
        below = "" if place == top else os.path.relpath(place, top).replace(os.sep, "/") + "/"
        files += [below + file for file in sorted(found) if file.lower().endswith(IMG_EXTENSIONS)]
    return files, states


def _state(folder, below):
    there = os.stat(os.path.join(folder, below))
    return below, there.st_mtime_ns, there.st_ino


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
    with contextlib.suppress(OSError), checkpoint.whole(store) as file:  # a full disk: the index is there all the same
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
        return index if whole and all(_state(folder, below) == (below, *state) for below, *state in states) else None
    except (*checkpoint.DAMAGED, pickle.UnpicklingError):
        return None
