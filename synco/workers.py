"""Loading workers: how they start, what is said when one dies or is stuck, and that none outlives its trainer."""

import contextlib
import functools
import multiprocessing.connection
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from synco import distributed, signals
from synco.distributed import Process
from synco.errors import Failure, UserError

# what workers say, or the system of them, where there is no room for the batches that they hand over
SHARED_MEMORY = re.compile(r"shared memory|No space left|Bus error", re.IGNORECASE)
ROOM = "/dev/shm"  # where Linux keeps what processes share
# bytes of a temporary folder's path: a socket's in it may have 107 (elsewhere 103), of which 18 are its own name
LONGEST = 89 if sys.platform == "linux" else 85
MORE_ROOM = "enlarge it (Docker: --shm-size 8g), or take fewer workers (-j) or smaller batches"


class Loader(DataLoader):
    """A DataLoader whose workers no warning ends (see `signals.held_back`), and whose end is one line.

    timeout: seconds to wait for a batch, 0: for ever; batch_bytes: what a batch takes, 0: unknown. Raises `Failure`
    where a worker dies or is stuck, which names the files that were being read, and what a worker raises otherwise, a
    UserError as its one line.
    ahead: in words, what is prepared ahead of the training, and how much memory of the node that takes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        process: Process,
        workers: int,
        timeout: int = 0,
        batch_bytes: int = 0,
        **settings: Any,
    ) -> None:
        if workers:  # each would have a temporary folder of its own, which stays if it is killed; `exits.leave`
            folder = multiprocessing.util.get_temp_dir()
            if len(os.fsencode(folder)) > LONGEST:  # a worker would lose its batches, and the trainer wait for them
                raise UserError(
                    f"{folder}: too long a path for the loading workers' sockets; set TMPDIR to a shorter one"
                )
        all_workers = workers * process.local_size
        each = _batches_ahead(batch_bytes, all_workers)
        needed = batch_bytes * each * all_workers
        self.ahead = f"{each * all_workers} batches, {needed / 1e6:.1f} MB (workers: {all_workers})"
        super().__init__(
            dataset,
            num_workers=workers,
            prefetch_factor=each if workers else None,
            pin_memory=process.device.type == "cuda",
            worker_init_fn=functools.partial(signals.worker_of, os.getpid()),
            # a spawned process and Python 3.14 have other defaults; so a worker starts at once, and its parent is this
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            **settings,
        )
        # torch's own timeout does not cover the wait for a worker that has announced a batch and then hands it over
        self.patience, self.waiting_since, self.why = timeout, None, None
        self.workers = []

    def __iter__(self) -> Iterator:
        return self._from_workers() if self.num_workers else super().__iter__()

    def _from_workers(self):
        done = threading.Event()
        if self.patience:
            threading.Thread(target=self._end_stuck_workers, args=(done,), daemon=True, name="patience").start()
        try:
            batches = self._wait(self._start)
            while (batch := self._wait(next, batches, None)) is not None:
                yield batch
        finally:
            done.set()

    def _start(self):
        """DataLoader's iterator. Its handler for the end of children is taken off.

        It would raise wherever this process stands, while it writes a checkpoint, say, or where nobody hears it.
        Without it a worker's end is seen within torch's 5 seconds of the wait for what that worker owes.
        """
        first = not self.workers
        others = multiprocessing.active_children()
        on_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        handler = signal.getsignal(signal.SIGCHLD) if on_main else None
        with signals.held_back():
            batches = super().__iter__()
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        if first or not self.persistent_workers:
            self.workers = [child for child in multiprocessing.active_children() if child not in others]
        return batches

    def _wait(self, function, *args):
        """function(*args), which waits for workers; errors go on without the frames that hold DataLoader's iterator.

        These form a circle, whose parts Python removes in no order: the iterator would end its workers through pipes
        that are closed already, and threads of it print tracebacks.
        """
        self.waiting_since = time.monotonic()
        try:
            return function(*args)
        except UserError as error:  # with the worker's traceback in front
            line = str(error).rpartition(f"{UserError.__name__}: ")[2].removesuffix("\\n")
            raise UserError(line) from error.with_traceback(None)
        except (EOFError, OSError, RuntimeError) as error:
            if str(error).startswith("Caught ") and not SHARED_MEMORY.search(str(error)):
                raise  # a bug in what the worker did
            raise self._failure(error) from error.with_traceback(None)
        finally:
            self.waiting_since = None

    def _end_stuck_workers(self, done):
        """Kill the workers, which ends every wait for them, once a batch has been waited for too long."""
        while not done.wait(0.5):
            since = self.waiting_since
            if since is not None and time.monotonic() - since > self.patience:
                self.why = self._dead() or f"DataLoader timed out after {self.patience} seconds"
                for worker in self.workers:
                    worker.kill()
                return

    def _dead(self):
        """What the first worker that has ended died of, in words, or None."""
        for worker in self.workers:
            if worker.exitcode:
                if worker.exitcode > 0:
                    return f"DataLoader worker (pid {worker.pid}) exited unexpectedly"
                return f"DataLoader worker (pid {worker.pid}) is killed by signal: {signal.strsignal(-worker.exitcode)}"
        return None

    def _failure(self, error):
        """What an error in the wait for a batch says of the workers; they are ended."""
        ended = multiprocessing.connection.wait([worker.sentinel for worker in self.workers], timeout=5)
        for worker in self.workers:
            if worker.sentinel in ended:
                worker.join()  # its sentinel is there a moment before its exit status
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        why = self.why or self._dead() or f"the workers of the DataLoader were lost ({last})"
        for worker in self.workers:
            worker.kill()
        if SHARED_MEMORY.search(f"{error} {why}"):
            return Failure(
                f"{ROOM} is full ({self._dead() or last}): {MORE_ROOM}; the run can go on from its last checkpoint"
            )
        images = self.dataset.dataset if isinstance(self.dataset, Subset) else self.dataset
        reader = getattr(images, "reader", None)
        busy = reader.being_read()[:4] if reader else []
        at = f"; the workers were reading {', '.join(busy)}" if busy else ""
        return Failure(f"{why}{at}; the run can go on from its last checkpoint")


def _batches_ahead(batch_bytes, workers):
    """How many batches each of a node's workers may prepare: two, or one where there is no room for two.

    Raises UserError where there is no room for one.
    """
    rooms = {"the memory": distributed.free_memory() // 2}
    with contextlib.suppress(OSError):  # no such place, as on a Mac
        rooms[ROOM] = shutil.disk_usage(ROOM).free
    place = min(rooms, key=rooms.get)
    for each in (2, 1):
        if batch_bytes * each * workers <= rooms[place]:
            return each
    raise UserError(
        f"{place}: has room for {rooms[place] / 1e6:.3f} MB of batches, and {workers} loading workers prepare "
        f"{batch_bytes * workers / 1e6:.3f} MB: {MORE_ROOM.replace('(-j)', f'(-j {rooms[place] // batch_bytes})')}"
    )


def bytes_of(batch: torch.Tensor | Sequence) -> int:
    """What the tensors in nested lists take."""
    return batch.nbytes if hasattr(batch, "nbytes") else sum(map(bytes_of, batch))
