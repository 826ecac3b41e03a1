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

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Ended(Exception):
    """What ends the study, in one line."""


class Programs:
    """`jobs` programs at a time; on_cpu: without GPUs, the cores shared among them."""

    def __init__(self, jobs, *, on_cpu):
        self.jobs, self.running, self.stopped = jobs, set(), threading.Event()
        self.environment = dict(os.environ)
        if on_cpu:
            threads = max(1, usable_cpus() // jobs)
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}

    def all(self, what, tasks):
        """Call what(*task) for every task.

        Raises Ended where one fails, or at Ctrl-C and SIGTERM: programs that are running save and stop, and no other is
        started.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(lambda task: what(*task), tasks))
            except (Ended, KeyboardInterrupt) as error:
                self.stopped.set()
                for process in list(self.running):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise Ended(f"{str(error) or 'interrupted'}; the same command goes on") from error
            finally:
                signal.signal(signal.SIGTERM, before)

    def start(self, words, log):
        """Run a program to its end; its output goes to the end of `log`. Raises Ended if it fails."""
        if self.stopped.is_set():
            raise Ended("interrupted")
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
        if status:
            with open(log) as file:
                told = [line.strip() for line in file if line.strip()][-2]
            self.stopped.set()
            raise Ended(f"{words[0]} ended with status {status}: {told} ({log})")
