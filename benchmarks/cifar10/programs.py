"""Runs the repository's programs, several at a time; what was interrupted goes on with the same command."""

import concurrent.futures
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

from synco.distributed import usable_cpus
from synco.errors import PREEMPTED

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Ended(Exception):
    """What ends the study, in one line."""


class TimeOver(Exception):
    """What ends the study for this time, in one line."""


class Stopped(Exception):
    """Raised by `Programs.start` where a program was told to stop, or was not started for that reason."""


class Programs:
    """`jobs` programs at a time, each with its share of the cores, `cores`; on_cpu: without GPUs."""

    def __init__(self, jobs, *, on_cpu):
        self.jobs, self.running, self.stopped = jobs, set(), threading.Event()
        self.cores = max(1, usable_cpus() // jobs)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(self.cores)}
        if on_cpu:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def all(self, what, tasks, minutes=None):
        """Call what(*task) for every task.

        Raises Ended where one fails, or at Ctrl-C and SIGTERM, and TimeOver after that many minutes: programs that are
        running save and stop, and no other is started.
        """
        before, interrupted = signal.signal(signal.SIGTERM, signal.default_int_handler), False
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            calls = [pool.submit(what, *task) for task in tasks]
            try:
                concurrent.futures.wait(calls, minutes and 60 * minutes, concurrent.futures.FIRST_EXCEPTION)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                self.stopped.set()
                for process in list(self.running):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                signal.signal(signal.SIGTERM, before)
        if interrupted:
            raise Ended("interrupted; the same command goes on")
        errors = [Stopped() if call.cancelled() else call.exception() for call in calls]
        for error in errors:
            if isinstance(error, Ended):
                raise Ended(f"{error}; the same command goes on") from error
            if error and not isinstance(error, Stopped):
                raise error
        if any(errors):
            done = f"{errors.count(None)} of {len(errors)} runs are done"
            raise TimeOver(f"{minutes:g} minutes are over, {done}; the same command goes on")

    def start(self, words, log):
        """Run a program to its end; its output goes to the end of `log`. Raises Ended if it fails, or Stopped."""
        if self.stopped.is_set():
            raise Stopped
        os.makedirs(os.path.dirname(log), exist_ok=True)
        command, began = [sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])], time.time()
        with open(log, "a") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
            self.running.add(process)
            if self.stopped.is_set():  # meanwhile
                process.terminate()
            status = process.wait()
            self.running.discard(process)
            print(f"# {time.time() - began:.0f} s, status {status}", file=file)
        if self.stopped.is_set() and status in (PREEMPTED, -signal.SIGTERM):  # the latter while it was starting
            raise Stopped
        if status:
            with open(log) as file:
                told = [line.strip() for line in file if line.strip()][-2]
            self.stopped.set()
            raise Ended(f"{words[0]} ended with status {status}: {told} ({log})")
