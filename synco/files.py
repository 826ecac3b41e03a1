"""Files: written whole or not at all, read with care, hashed, and folders locked for one run."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import shlex
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from synco.errors import UserError

StrPath = str | os.PathLike[str]

LOCK = ".lock"

# ----------------------------------------------------------------------------------------------- writing and reading


@contextlib.contextmanager
def atomic_write(path: StrPath) -> Iterator[BinaryIO]:
    """A binary file to write to, in the same folder; flushed to disk and renamed: `path` is whole at every moment.

    Raises OSError if it cannot be written. After that, or any other error within, what was there is as it was.
    """
    temporary = _temporary(path)
    file = open(temporary, "xb")  # x: a new file, never one that is there, nor one that a link there points to
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _temporary(path: StrPath) -> str:
    return f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"


def open_regular(path: StrPath) -> BinaryIO:
    """A file open for reading bytes. Raises OSError, and does not wait, where it is a pipe, a socket or a device."""
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return file


def _sync_folder(folder: StrPath) -> None:
    """Flush a folder's entries to disk, where the system lets a folder be opened: a rename is one of them."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_json(path: StrPath, content: Any) -> None:
    """Write a JSON file, whole or not at all. Raises OSError if it cannot be written."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: StrPath) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file. What the object holds is for the caller to check.

    Raises UserError if the file cannot be read, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object, but a {type(content).__name__}")
    return content


def csv_text(header: Iterable, rows: Iterable[Iterable]) -> str:
    """A table as CSV, a line for the header and for each row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write_csv(path: StrPath, header: Iterable, rows: Iterable[Iterable]) -> None:
    """Write a table, whole or not at all. Raises OSError if it cannot be written."""
    with atomic_write(path) as file:
        file.write(csv_text(header, rows).encode(errors="surrogateescape"))  # file names may be no UTF-8


def set_aside(path: StrPath) -> None:
    """Rename a file, if it is there, to the first free of name-1.ext, name-2.ext, ... Raises OSError if it cannot."""
    stem, ending = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}-{number}{ending}"):
        number += 1
    if os.path.exists(path):
        os.rename(path, f"{stem}-{number}{ending}")


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file, as hexadecimal digits. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- what can be written


def check_writable(*folders: StrPath) -> None:
    """Raise UserError that names one of these folders in which no file can be made, or that cannot itself be made."""
    for folder in folders:
        there = os.path.abspath(folder)
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(1 << 16))  # a disk that is full lets files be made
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def make_folders(*folders: StrPath) -> None:
    """Make these folders, or none if one of them cannot be written.

    Raises UserError that names one which cannot be written, made, or listed: a run must see what its folder holds.
    """
    check_writable(*folders)
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            os.scandir(folder).close()
        except OSError as error:
            raise UserError(f"{folder}: cannot be made or listed ({error.strerror})") from error


def check_output(path: str, name: str | None = None) -> None:
    """Raise UserError unless `atomic_write` can write a file of that path; name: what the message calls it."""
    name = name or path
    if "\0" in path:
        raise UserError(f"{name!r}: no file can have that name")
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise UserError(f"{name}: is a folder")
    if not os.path.isdir(folder):
        raise UserError(f"{name}: there is no folder {folder}")
    check_writable(folder)
    try:
        os.lstat(_temporary(path))
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long
        raise UserError(f"{name}: cannot be written ({error.strerror})") from error


# ------------------------------------------------------------------------------------------------------- the lock


class FolderLock:
    """A folder locked for this process, until `release`, the end of a `with`, or the process's end, however it comes.

    A lock of the process (POSIX), not of the open file: it dies with its owner, and the loading workers, which
    inherit open files, do not keep it. For the same reason a process makes no second one of a folder while it has one.
    Where the file system or the machine knows no locks there is none.
    patience: seconds to wait for an owner that is about to end, such as one whose launcher was killed just now;
    flag: what names the folder, for the message.
    Raises UserError that names the process which holds it, or a symbolic link in its place; OSError if the folder
    cannot be written.
    """

    def __init__(self, folder: StrPath, patience: float = 10.0, flag: str = "--save-dir") -> None:
        self._file = None  # open while this holds the lock
        try:
            import fcntl
        except ImportError:  # Windows
            return
        folder = os.path.realpath(folder)
        path, until = os.path.join(folder, LOCK), time.monotonic() + patience
        while True:
            file = _open_lock(path)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    break
                file.close()  # its owner has removed it since
            except (BlockingIOError, PermissionError) as error:
                owner = file.read(200).decode(errors="replace").strip() or "a process that does not say its name"
                file.close()
                if time.monotonic() > until:
                    raise UserError(f"{flag} {folder}: another run is using it ({owner}); give another") from error
                time.sleep(0.2)
            except OSError:  # no locks here
                file.close()
                return
        self._file = file
        with contextlib.suppress(OSError):  # on a full disk the lock is as good without its owner's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)[:150]}\n".encode())

    def release(self) -> None:
        """Give up the lock and remove its file; of a killed owner the file stays, without a lock on it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.remove(self._file.name)
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _open_lock(path: str) -> io.FileIO:
    """Open a lock's file, or make it. Raises UserError if it is a symbolic link: what that leads to is not ours."""
    try:
        file = open(path, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if os.path.islink(path):
            raise UserError(f"{path}: is a symbolic link, which no lock is; remove it") from error
        raise
    file.seek(0)
    return file


def _is_at(file: io.FileIO, path: str) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
