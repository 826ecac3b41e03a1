"""The index of a data set: its images' names, their classes, and where they lie; made once, kept in a cache, shared.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from synco import checkpoint, distributed, files
from synco.errors import UserError
from synco.records import Index, joined

FORMAT = 3
ARRAYS = ("starts", "offsets", "files", "path_offsets", "paths", "spans", "sizes")  # of an `Index`
WORTH_IT = 10_000  # images; listing fewer takes a moment
SETTLED = 2_000_000_000  # ns; a folder that changed this lately may change again within its clock's tick


def cache_folder() -> str:
    """Where indices and downloaded lists are kept: $XDG_CACHE_HOME/synco, ~/.cache/synco unless that is set."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # a relative one is to be passed over (XDG Base Directory Specification)
    return os.path.join(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache"), "synco")


def open_index(folder: str, labelled: bool = True) -> Index:
    """The `Index` of a folder, see `scan`; it has changed if one of its folders has been written to or replaced."""
    return opened(folder, "" if labelled else "without labels", lambda: scan(folder, labelled))


def opened(folder: str, kind: str, make: Callable[[], tuple[Index, list]]) -> Index:
    """The `Index` of what lies in a folder: the stored one where that has not changed since, else a new one.

    kind: tells it from others of the same folder; make: → (the new index, the states that tell a change, see `state`).
    Rank 0 alone looks at the images, and the others read what it has found: every process must call this. Of several
    programs that ask at once, one makes the index and the others wait.
    Raises UserError, in all processes, where `make` does.
    """
    found = told = None
    if distributed.rank() == 0:
        try:
            found = _load(_store(folder, kind), folder, kind) or _make(folder, kind, make)
            told = found.sum()
        except UserError as error:
            told = str(error)
    told = distributed.from_rank_0(told)
    if isinstance(told, str):
        raise UserError(told)
    if distributed.rank() != 0:
        found = _load(_store(folder, kind), folder, kind, told)
    if not all(distributed.from_all(found is not None)):  # a small one, or a node without the cache of rank 0's
        sent = distributed.broadcast(found if distributed.rank() == 0 else None)
        found = sent if found is None else found
    return found


def _make(folder, kind, make):
    """A new index, which is stored if it is worth that."""
    store = _store(folder, kind)
    with _alone(store) as writable:
        found = _load(store, folder, kind) if writable else None  # another program may have made it meanwhile
        if found:
            return found
        began = time.time_ns()
        index, states = make()
        settled = all(mtime < began - SETTLED for _, mtime, _ in states)
        if writable and settled and len(index) >= WORTH_IT:
            _save(store, folder, kind, index, states)
    return index


def scan(folder: str, labelled: bool = True) -> tuple[Index, list[tuple[str, int, int]]]:
    """(the `Index` of a folder as it is now, [(folder within it, its mtime in ns, its inode)]).

    Its folders are the classes, unless `labelled` is false or images lie beside them: the images, at any depth, are
    then without labels. Links to folders are followed, but a folder that is there under two names counts once, under
    the first: a link to a class, or to a folder that holds this one, would multiply its images.
    Raises UserError where the folder holds no images, or one of its classes none.
    """
    try:
        root = os.stat(folder)
        around = {_identity(root), *(_identity(os.stat(place)) for place in pathlib.Path(folder).resolve().parents)}
        with os.scandir(folder) as entries:
            below = [(entry.name, _is_folder(entry)) for entry in entries]
        classes = sorted(name for name, is_folder in below if is_folder)
        loose = sorted(name for name, is_folder in below if not is_folder and is_image(name))
        labelled = labelled and not loose
        if labelled and not classes:
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
    listed, states = [], [("", root.st_mtime_ns, root.st_ino)]
    for name, walk in zip(classes, walks):
        below = []
        for place, status, images in walk:
            if place != name and _identity(status) in known:  # of another class already
                continue
            known.add(_identity(status))
            states.append((place, status.st_mtime_ns, status.st_ino))
            below += [f"{place}/{image}"[len(name) + 1 :] for image in images]
        listed.append(below)
    empty = [name for name, images in zip(classes, listed) if not images]
    if labelled and empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(
            f"{folder}: Found no valid file for the classes {', '.join(empty[:3])}{more}; it should hold CLASS/IMAGE"
        )
    groups = [(name, images) for name, images in [("", loose), *zip(classes, listed)] if images]
    if not groups:
        raise UserError(f"{folder}: holds no images")
    offsets, files = joined(name for _, images in groups for name in images)
    starts = np.cumsum([0, *(len(images) for _, images in groups)], dtype=np.int64)
    return Index([name for name, _ in groups], starts, offsets, files, root=folder, labelled=labelled), states


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
                elif is_image(entry.name):
                    images.append(entry.name)
        waiting += sorted(folders, reverse=True)
        found.append((place, status, sorted(images)))
    return sorted(found, key=lambda entry: entry[0])


def is_image(name: str) -> bool:
    """Whether a file of that name is taken for an image."""
    return name.lower().endswith(IMG_EXTENSIONS)


def _is_folder(entry):
    """Whether an entry of a folder is a folder itself. Raises UserError for a link to nothing, which may have been one.

    A link with an image's name is taken for an image; reading it says that it is missing.
    """
    try:
        if entry.is_symlink() and not is_image(entry.name):
            entry.stat()
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"{entry.path}: is a link that leads nowhere ({error.strerror}); mend or remove it") from error


def _identity(status):
    """What a folder is recognised by, whatever its path."""
    return status.st_dev, status.st_ino


def state(folder: str, path: str) -> tuple[str, int, int]:
    """What a file or folder, `path` relative to `folder`, is known by: of one that has not changed it is the same."""
    status = os.stat(os.path.join(folder, path))
    return path, status.st_mtime_ns, status.st_ino


def _store(folder, kind=""):
    """The file in the cache that holds this folder's index."""
    key = os.fsencode(os.path.realpath(folder)) + (kind and f"\0{kind}").encode(errors="surrogateescape")
    return os.path.join(cache_folder(), f"images-{hashlib.sha256(key).hexdigest()[:24]}.index")


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


def _save(store, folder, kind, index, states):
    paths, mtimes, inodes = zip(*states)
    content = {
        "folder": os.path.realpath(folder),
        "kind": kind,
        "folders": list(paths),
        "mtimes": torch.tensor(mtimes),
        "inodes": [int(inode) for inode in inodes],
    }
    with contextlib.suppress(OSError):  # a full disk: the index is there all the same
        write(store, index, content)


def write(path: str, index: Index, more: dict | None = None) -> None:
    """Write an index, and what else its file is to say. Raises OSError if it cannot be written."""
    content = {
        "format": FORMAT,
        "classes": index.groups,
        "labelled": index.labelled,
        "sum": index.sum(),
        **(more or {}),
    }
    content |= {name: torch.from_numpy(np.array(getattr(index, name))) for name in ARRAYS}
    with files.atomic_write(path) as file:
        torch.save(content, file)


def read(path: str, root: str) -> tuple[Index, dict] | None:
    """(the index in a file, what else it says); None where there is none, or a damaged one."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if content["format"] != FORMAT:
            return None
        arrays = {name: content.pop(name).numpy() for name in ARRAYS}
        arrays["paths"] = arrays.pop("path_offsets"), arrays["paths"]
        found = Index(content["classes"], root=root, labelled=content["labelled"], **arrays)
        return (found, content) if content["sum"] == found.sum() else None  # a wrong bit would name no file
    except (*checkpoint.DAMAGED, pickle.UnpicklingError):
        return None


def _load(store, folder, kind="", known=None):
    """The stored `Index`, or None where there is none, it is damaged, or what it is of has changed since.

    known: the sum of the one that is wanted, whose states rank 0 has compared.
    """
    found, content = read(store, folder) or (None, {})
    try:
        if found is None or (content["folder"], content["kind"]) != (os.path.realpath(folder), kind):
            return None
        if known is not None:
            return found if content["sum"] == known else None
        states = zip(content["folders"], content["mtimes"].tolist(), content["inodes"])
        return found if all(state(folder, path) == (path, *seen) for path, *seen in states) else None
    except checkpoint.DAMAGED:
        return None
