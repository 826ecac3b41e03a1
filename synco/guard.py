"""Signs of life between the processes of a run, told through the key-value store where they met.

A process group's own collectives hang or fail when a process has gone, and NCCL's wait for one that comes later.
"""

import itertools
import multiprocessing
import os
import threading
import time
from typing import NoReturn

import torch.distributed as dist

from synco import signals
from synco.distributed import Process
from synco.exits import leave, report

ARRIVED = "arrived"  # the ranks that have come, as "3 0 "
FAILED = "failed"  # the first rank that failed and its status, as "1 2"


class Guard(threading.Thread):
    """Ends this process when its launcher or another process has gone or failed, even while it waits for them.

    launched: whether the parent process is a launcher, without which this process must not go on; seconds: without a
    sign of life until a process counts as gone. Time is counted in looks: one that was suspended with all the others
    takes none of them for gone. It guards until the process ends.
    """

    INTERVAL = 1.0  # seconds between two looks at the launcher, and at what has failed
    NOTICE = 2.0  # for the launcher to see the end of the process that failed first
    GRACE = 45.0  # for the checkpoint of a process that was warned when its launcher was ended
    PATIENCE = 1800.0  # for a process that has not come yet, as a process group's own

    def __init__(self, process: Process, launched: bool, seconds: float) -> None:
        super().__init__(daemon=True, name="guard")
        self.process, self.launched, self.seconds = process, launched, seconds
        self.pulse = max(1, int(seconds / 8 / self.INTERVAL))  # intervals between two signs of life
        parent = multiprocessing.parent_process()  # the one that spawned this, even if it has gone meanwhile
        self.parent = (parent.pid if parent else os.getppid()) if launched else None
        self.store, self.unanswered = None, 0  # intervals that a request to the store has taken

    def watch(self, store: dist.Store) -> None:
        """Give signs of life and watch the other processes' from now on. store: a connection of the guard's own."""
        store.set(_life(self.process.rank), "0")
        store.append(ARRIVED, f"{self.process.rank} ")
        self.store = store
        threading.Thread(target=self._watch_others, daemon=True, name="guard of peers").start()

    def run(self) -> None:
        while True:
            time.sleep(self.INTERVAL)
            if self._is_orphan():
                time.sleep(2 * self.INTERVAL)  # a warning to launcher and processes alike may come a little later
                if signals.warned():
                    time.sleep(self.GRACE)
                _end("the launcher has gone" if self.process.local_rank == 0 else None)
            self.unanswered += self.store is not None
            if self.unanswered > self.seconds / self.INTERVAL + 2 * self.NOTICE:
                _end("lost the process that holds the others together: it does not answer")

    def _watch_others(self) -> None:
        try:
            seen = {}  # rank → its last sign of life, and looks since it changed
            for beat in itertools.count(1):
                for _ in range(self.pulse):
                    time.sleep(self.INTERVAL)
                    if self.store.check([FAILED]):
                        status = self._failure()[1]
                        time.sleep(self.NOTICE)
                        leave(status)
                    self.unanswered = 0
                self._look(seen, beat)
        except RuntimeError:  # the process with the store may simply be done; then this one is about to be
            time.sleep(self.NOTICE)
            if not self._is_orphan():  # then the store has gone with the launcher, which `run` says
                _end("lost the process that holds the others together")

    def _is_orphan(self) -> bool:
        return self.launched and os.getppid() != self.parent

    def _look(self, seen: dict[int, tuple[bytes, int]], beat: int) -> None:
        self.store.set(_life(self.process.rank), str(beat))
        world = range(self.process.world_size)
        known = sorted(seen) if len(seen) == len(world) else sorted(map(int, self.store.get(ARRIVED).split()))
        for rank, life in zip(known, self.store.multi_get([_life(rank) for rank in known])):
            last, looks = seen.get(rank, (None, 0))
            seen[rank] = (life, looks + 1 if life == last else 0)
        seconds = self.pulse * self.INTERVAL
        lost = [rank for rank, (_, looks) in seen.items() if looks * seconds > self.seconds]
        late = [rank for rank in world if rank not in seen] if beat * seconds > self.PATIENCE else []
        if lost or late:
            first = self.process.rank == min(set(seen) - set(lost))
            why = f"{ranks(lost)}: no sign of life for {self.seconds:g} s" if lost else f"{ranks(late)}: never came"
            _end(f"lost {why}" if first else None)

    def _failure(self) -> tuple[int, int]:
        rank, status = map(int, self.store.get(FAILED).split())
        return rank, status

    def claim(self, status: int) -> int | None:
        """Say that this process fails, with that status → the status of another one that failed before, or None.

        As long as processes have not met the first of a node counts as the one before.
        """
        if self.store is None:
            return status if self.process.local_rank else None
        try:
            self.store.compare_set(FAILED, "", f"{self.process.rank} {status}")
            rank, status = self._failure()
        except RuntimeError:  # nobody is left to say it to
            return None
        return None if rank == self.process.rank else status

    def settle(self) -> None:
        """After a collective has failed: wait until the guard ends this process, because another one has gone.

        Returns where nobody is missing: then it is a bug.
        """
        until = time.monotonic() + self.seconds + 3 * self.pulse * self.INTERVAL
        while time.monotonic() < until:
            if signals.warned():  # by a launcher, which says what happened once it has seen the other one's end
                time.sleep(2 * self.NOTICE)
                leave(1)
            time.sleep(0.2)


def _life(rank: int) -> str:
    return f"alive/{rank}"


def ranks(numbers: list[int]) -> str:
    """ "rank 1", "ranks 1, 2"."""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _end(line: str | None) -> NoReturn:
    try:
        if line:
            report(line)
    finally:  # who read stderr may have gone with the launcher
        leave(1)
