"""How a program ends: what it prints never raises, its error is told once, and it leaves at once, with its children."""

import contextlib
import gc
import io
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from synco import signals
from synco.errors import INTERRUPTED, Failure, UserError

NO_MEMORY = re.compile(r"out of memory|can't allocate memory")  # a device's, the host's


def exit_with(status_of: Callable[..., int], *args: object) -> NoReturn:
    """End this program with the exit status that status_of(*args) returns; nothing that it prints raises."""
    open_output()
    try:
        status = status_of(*args)
    except KeyboardInterrupt:  # a second one, while the first was told
        status = INTERRUPTED
    leave(status)


class _Unfailing(io.FileIO):
    """A file whose writes never raise: a reader that has gone and a full disk are no reason to end a run."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_output() -> None:
    """Let nothing that is printed on stdout or stderr raise: closed, full, gone, or without a character for it."""
    for name, number, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this program: no other file may get its number
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.fstat(number)
                number = null  # one has it already
            except OSError:
                os.dup2(null, number)
            encoding, at_once = "utf-8", False
        elif not isinstance(stream, io.TextIOWrapper):  # another program's, in which this one runs
            continue
        else:
            with contextlib.suppress(OSError):
                stream.flush()
            number, encoding, at_once = stream.fileno(), stream.encoding, stream.line_buffering or stream.write_through
        raw = _Unfailing(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=at_once))


def outcome(error: BaseException) -> tuple[int, str | None]:
    """The exit status of a program that this error ends, and its one line: None for a bug, which has a traceback."""
    if isinstance(error, SystemExit):
        return (error.code or 0, "") if isinstance(error.code, int | None) else (1, str(error.code))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, UserError | FloatingPointError | Failure):
        return 2 if isinstance(error, UserError) else 1, str(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return 1, f"{str(error).strip().splitlines()[0]} The run can go on from its last checkpoint."
    if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
        sentences = " ".join(str(error).rpartition("DefaultCPUAllocator: ")[2].split()).split(". ")
        what = ". ".join(sentences[:3]).rstrip(".")  # how much of how much
        return 1, f"{what}: lower --batch-size or --img-size; --amp bf16 takes about half"
    return 1, None


def tell(error: BaseException) -> int:
    """Say on stderr why the program ends, in one line or with a bug's traceback → its exit status."""
    status, line = outcome(error)
    if line is None:
        traceback.print_exception(error)
    elif line:
        report(line)
    return status


def report(line: str) -> None:
    """Print the one line on stderr that says why the program ends."""
    # An error that comes from a loading worker carries that worker's traceback: its last line is the error's own.
    line = line.strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End this process now, with its children.

    Python's own end waits for children and threads, and a process group's for peers that have gone: seen with gloo in
    torch 2.6 to hang in every fourth run or so that went well.
    """
    try:
        signals.ignore_interrupts()
        end_workers()
        gc.collect()  # what cycles keep has semaphores, which Python's tracker would report as leaked
        shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)  # Python's own end would do so
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def end_workers() -> None:
    """Kill this process's children, which are loading workers: one that is stuck would keep it from ending."""
    children, handler = multiprocessing.active_children(), None
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take them for a failure
    for child in children:
        child.kill()
    until = time.monotonic() + 2
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
