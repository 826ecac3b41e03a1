"""What a run needs in order not to be lost: warnings heard, one decision in all processes, signs of life, a lock.

A process group's own collectives hang or fail when a process has gone, so what happens then is told through the
key-value store where the processes met.
"""

import contextlib
import dataclasses
import datetime
import math
import multiprocessing.resource_tracker
import os
import shlex
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from synco.options import UserError

PREEMPTED = 75  # the exit status of a run that saved and stopped when it was told to; sysexits.h: try again later
MARKER = "preempted.json"  # left in the save folder by such a run until it goes on
LOCK = ".lock"

# what schedulers warn with; SIGUSR1 is unknown to Windows
WARNINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(Exception):
    """Raised in every process when a run was told to stop and its checkpoint is safe."""


# ------------------------------------------------------------------------------------------------- warnings

_heard = []  # the warnings of this process since `listening` began: signals are the whole process's


@contextlib.contextmanager
def listening():
    """Take SIGTERM and SIGUSR1 as warnings, see `warned`, in place of being ended by them."""
    _heard.clear()
    if threading.current_thread() is not threading.main_thread():  # where Python lets no one set a handler
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: _heard.append(number)) for number in WARNINGS}
    _mask(signal.SIG_UNBLOCK)  # those that a parent held back until this process could hear them
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warned():
    """The name of the first warning that this process has heard, or None."""
    return signal.Signals(_heard[0]).name if _heard else None


@contextlib.contextmanager
def passing_on(start):
    """Start processes with start() → their list, and pass warnings on to them meanwhile; yields what start() returns.

    None is lost: a warning is held back while they start, and the children hold it back until they are `listening`.
    """
    _hold_back()
    started = start()

    def forward(number, frame):
        _heard.append(number)
        for child in started.processes:
            if child.is_alive():
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in WARNINGS}
    for number in list(_heard):  # by this process alone, when there were no others yet
        forward(number, None)
    _mask(signal.SIG_UNBLOCK)
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back():
    """Hold warnings back from this thread meanwhile, and for good from the processes that it starts.

    A loading worker begins with handlers of torch's that end it, and a scheduler warns it with all the others.
    """
    before = _mask(signal.SIG_BLOCK, ())
    _hold_back()
    try:
        yield
    finally:
        _mask(signal.SIG_SETMASK, before)


def _hold_back():
    """Hold warnings back, also from Python's process that tracks semaphores: SIGUSR1 would end it."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, which has neither
        _mask(signal.SIG_BLOCK)
        multiprocessing.resource_tracker.ensure_running()  # lets SIGTERM through when it is started
        _mask(signal.SIG_BLOCK)


def _mask(how, numbers=WARNINGS):
    """Change which signals are held back from this thread → those that were before."""
    return signal.pthread_sigmask(how, numbers) if hasattr(signal, "pthread_sigmask") else set()


def worker_of(trainer, _worker=None):
    """What a loading worker of the process `trainer` begins with.

    It ignores warnings, see `held_back`, since the trainer needs it yet. It ends if the trainer has gone while it
    started: torch's worker then takes whoever has inherited it for the trainer, and never ends.
    """
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != trainer:
        os._exit(1)


# ------------------------------------------------------------------------------------- one decision for all


@dataclasses.dataclass(frozen=True)
class Due:
    """What all processes do after a step: save, stop after having saved, hear each other's news."""

    save: bool = False
    stop: bool = False
    news: bool = False


class Saves:
    """When to save and when to stop, the same in every process of the run.

    every: steps between saves, minutes: time between them by rank 0's clock, 0: never. Each step every process gives
    its word to an all-reduce on the CPU, which runs while the next step is computed and is asked for after that; so a
    warning to one process is acted on by all after the same step, at most two steps later.
    timeout: seconds until a missing word is an error, or None for torch's own.
    """

    def __init__(self, every=0, minutes=0.0, timeout=None):
        self.every, self.minutes = every, minutes
        self.saved_at = time.monotonic()
        self.stopping, self.pending, self.group = False, None, None
        if dist.is_initialized():
            seconds = None if timeout is None else datetime.timedelta(seconds=timeout)
            self.group = dist.new_group(backend="gloo", timeout=seconds)

    def after(self, step, *, news=False, at_once=False):
        """What is due after this step (counted from 1), as `Due`.

        news: whether this process has some; at_once: wait for the others' word of this very step.
        """
        rank = dist.get_rank() if self.group is not None else 0
        late = rank == 0 and bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        said = [late, bool(_heard), news]
        if self.group is not None:
            word = torch.tensor(said, dtype=torch.uint8)
            said = self._wait()
            self.pending = word, dist.all_reduce(word, dist.ReduceOp.MAX, group=self.group, async_op=True)
            if at_once:
                said = [max(pair) for pair in zip(said, self._wait())]
        late, stop, news = map(bool, said)
        self.stopping = self.stopping or stop
        return Due(late or self.stopping or bool(self.every) and step % self.every == 0, self.stopping, news)

    def _wait(self):
        if self.pending is None:
            return [0, 0, 0]
        (word, work), self.pending = self.pending, None
        work.wait()
        return word.tolist()

    def done(self):
        """A checkpoint was written just now: the clock of `minutes` starts again."""
        self.saved_at = time.monotonic()

    def together(self):
        """Wait for all processes: none may leave while rank 0 still writes, or a launcher ends them all."""
        if self.group is not None:
            dist.barrier(group=self.group)


# --------------------------------------------------------------------------------------------- signs of life


class Guard(threading.Thread):
    """Ends this process when its launcher or another process of the run has gone, even while it waits for them.

    store: a connection of the guard's own to where the processes met, or None for a single process; launched: whether
    the parent process is a launcher, without which this process must not go on; seconds: without a sign of life until a
    process counts as gone; report: prints the one line that says why.
    """

    INTERVAL = 1.0
    GRACE = 45.0  # for the checkpoint of a process that was warned when its launcher was ended

    def __init__(self, process, store, launched, seconds, report):
        super().__init__(daemon=True, name="guard")
        self.process, self.store, self.seconds, self.report = process, store, seconds, report
        self.pulse = max(self.INTERVAL, seconds / 8)
        parent = multiprocessing.parent_process()  # the one that spawned this, even if it has gone meanwhile
        self.parent = (parent.pid if parent else os.getppid()) if launched else None
        self.ended = threading.Event()

    def run(self):
        beats = 0
        others = [rank for rank in range(self.process.world_size) if rank != self.process.rank]
        seen, beat_at = {rank: (None, time.monotonic()) for rank in others}, -math.inf
        while not self.ended.wait(self.INTERVAL):
            if self.parent is not None and os.getppid() != self.parent:
                self._orphaned()
            now = time.monotonic()
            if self.store is None or not others or now - beat_at < self.pulse:
                continue
            beats, beat_at = beats + 1, now
            try:
                self.store.set(_life(self.process.rank), str(beats))
                for rank in list(seen):
                    value = self.store.get(_life(rank)) if self.store.check([_life(rank)]) else None
                    if value == b"done":
                        del seen[rank]
                    elif value != seen[rank][0]:
                        seen[rank] = value, now
            except RuntimeError:  # the process with the store may simply be done; then this one is about to be
                if not self.ended.wait(20):
                    self._end("lost the process that holds the others together")
                return
            lost = [rank for rank, (_, since) in seen.items() if now - since > self.seconds]
            if lost and not self.ended.is_set():
                first = self.process.rank == min({self.process.rank, *others} - set(lost))
                self._end(f"lost {ranks(lost)}: no sign of life for {self.seconds:g} s" if first else None)

    def _orphaned(self):
        self.ended.wait(2 * self.INTERVAL)  # a warning to launcher and processes alike may come a little later
        if _heard and self.ended.wait(self.GRACE):
            return
        self._end("the launcher has gone" if self.process.local_rank == 0 else None)

    def _end(self, line):
        if self.ended.is_set():
            return
        try:
            if line:
                self.report(line)
            end_workers()
            sys.stdout.flush()
        finally:  # whatever fails: who read stdout and stderr may have gone with the launcher
            os._exit(1)

    def settle(self, failures):
        """After a collective has failed: wait until the guard ends this process, because another one has gone.

        Returns True where the others or the launcher say what happened: failures() counts the processes that reported
        an error, None where the store has gone; a launcher warns. False if nobody is missing: then it is a bug.
        """
        until = time.monotonic() + self.seconds + 3 * self.pulse
        while time.monotonic() < until:
            if _heard or failures() != 0:
                return True
            time.sleep(0.2)
        return False

    def finish(self, done):
        """Stop guarding. done: the others need no further sign of life from here, and none is missing."""
        self.ended.set()
        if done and self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(_life(self.process.rank), "done")


def _life(rank):
    return f"alive/{rank}"


def ranks(numbers):
    """ "rank 1", "ranks 1, 2"."""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def end_workers():
    """Kill this process's children, which are loading workers: one that is stuck would keep it from ending."""
    children, handler = multiprocessing.active_children(), None
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take them for a failure
    for child in children:
        child.kill()
    for child in children:
        child.join(1)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


# ------------------------------------------------------------------------------------------------------ lock


_locks = {}  # what holds this process's locks, by folder


def lock(folder, patience=10.0):
    """Lock a folder for this process until `unlock` or the process's end, however that comes.

    A lock of the process (POSIX), not of the open file: it dies with its owner, and the loading workers, which
    inherit open files, do not keep it. Where the file system or the machine knows no locks there is none.
    patience: seconds to wait for an owner that is about to end, such as one whose launcher was killed just now.
    Raises UserError that names the process which holds it, OSError if the folder cannot be written.
    """
    folder = os.path.realpath(folder)
    if folder in _locks:
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path, until = os.path.join(folder, LOCK), time.monotonic() + patience
    file = open(path, "a+b", buffering=0)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
            file.close()  # its owner has removed it since
            file = open(path, "a+b", buffering=0)
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read(200).decode(errors="replace").strip() or "a process that does not say its name"
                file.close()
                raise UserError(f"--save-dir {folder}: another run is using it ({owner}); give another") from error
            time.sleep(0.2)
        except OSError:  # no locks here
            file.close()
            return
    with contextlib.suppress(OSError):  # on a full disk the lock is as good without its owner's name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)[:150]}\n".encode())
    _locks[folder] = file


def unlock():
    """Give up this process's locks and remove their files; of a killed one the file stays, without a lock on it."""
    while _locks:
        folder, file = _locks.popitem()
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, LOCK))
        file.close()
