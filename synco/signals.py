"""Signals that warn a run before it is ended: heard, passed on to the processes it started, held back meanwhile."""

import contextlib
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

# what schedulers warn with, and a terminal that closes; Windows knows the first alone
WARNINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
HELD_BACK = (*WARNINGS, signal.SIGINT)  # from processes that are not ready to hear them

_heard = []  # the warnings of this process since `listening` began: signals are the whole process's


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take SIGTERM, SIGUSR1 and SIGHUP as warnings, see `warned`, in place of being ended by them."""
    _heard.clear()
    if threading.current_thread() is not threading.main_thread():  # where Python lets no one set a handler
        yield
        return
    before = _handle(lambda number, frame: _heard.append(number)) | {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    try:
        _mask(signal.SIG_UNBLOCK)  # those that a parent held back until this process could hear them
        yield
    finally:
        _restore(before)


def warned() -> str | None:
    """The name of the first warning that this process has heard, or None."""
    return signal.Signals(_heard[0]).name if _heard else None


@contextlib.contextmanager
def passing_on(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Start these processes and pass warnings on to them meanwhile.

    None is lost: a warning is held back while they start, and the children hold it back until they are `listening`.
    """
    _hold_back()

    def forward(number, frame):
        _heard.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {}
    try:
        for process in processes:
            process.start()
        before = _handle(forward)
        for number in list(_heard):  # by this process alone, when there were no others yet
            forward(number, None)
        _mask(signal.SIG_UNBLOCK)
        yield
    finally:
        _mask(signal.SIG_UNBLOCK)
        _restore(before)


def ignore_interrupts() -> None:
    """Take no further Ctrl-C: this process is about to end, and one in the midst of that would leave others behind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold warnings and Ctrl-C back from this thread meanwhile, and for good from the processes that it starts.

    A loading worker begins with handlers of torch's that end it, and a scheduler warns it with all the others.
    """
    before = _mask(signal.SIG_BLOCK, ())
    _hold_back()
    try:
        yield
    finally:
        _mask(signal.SIG_SETMASK, before)


def _handle(handler) -> dict:
    """Set the handler of each warning → those before. A SIGHUP that nohup has the program ignore stays ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    return {
        number: signal.signal(number, handler)
        for number in WARNINGS
        if number != hangup or signal.getsignal(number) is not signal.SIG_IGN
    }


def _restore(handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _hold_back() -> None:
    """Hold signals back, also from Python's process that tracks semaphores: SIGUSR1 would end it."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, which has neither
        _mask(signal.SIG_BLOCK)
        multiprocessing.resource_tracker.ensure_running()  # lets SIGTERM and SIGINT through when it is started
        _mask(signal.SIG_BLOCK)


def _mask(how, numbers=HELD_BACK):
    """Change which signals are held back from this thread → those that were before."""
    return signal.pthread_sigmask(how, numbers) if hasattr(signal, "pthread_sigmask") else set()


def worker_of(trainer: int, _worker: int | None = None) -> None:
    """What a loading worker of the process `trainer` begins with.

    It ignores warnings, see `held_back`, since the trainer needs it yet. It ends if the trainer has gone while it
    started: torch's worker then takes whoever has inherited it for the trainer, and never ends. If the trainer goes
    later, the worker removes the temporary folder that both had.
    """
    for number in HELD_BACK:
        signal.signal(number, signal.SIG_IGN)

    def inherit():
        if os.getppid() != trainer:
            shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)

    multiprocessing.util.Finalize(None, inherit, exitpriority=-100)
    if os.getppid() != trainer:
        inherit()
        os._exit(1)
