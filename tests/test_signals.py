"""Signals: which of them are warnings, and who hears them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command

from benchmarks import survival as interrupted
from synco import signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_warning_is_heard_and_the_handlers_are_those_of_before(name):
    number = getattr(signal, name)
    before = [signal.getsignal(each) for each in signals.HELD_BACK]
    with signals.listening():
        assert signals.warned() is None
        os.kill(os.getpid(), number)
        assert signals.warned() == name
        signals.ignore_interrupts()
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(each) for each in signals.HELD_BACK] == before


def test_a_hang_up_that_the_program_is_to_ignore_is_ignored(tmp_path):
    code = (
        "import os, signal; from synco import signals\n"
        "with signals.listening(): os.kill(os.getpid(), signal.SIGHUP); print(signals.warned())"
    )
    for words, heard in (([], "SIGHUP\n"), (["nohup"], "None\n")):
        done = subprocess.run([*words, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == heard, done.stderr


STARTING = """
import os, signal, sys, time
import torch.utils.data._utils.signal_handling as handling
from multiprocessing import resource_tracker
from synco import loader, options
from synco.launch import launch

begin = handling._set_worker_signal_handlers

def warned_at_once():  # before worker_init_fn, in the worker
    begin()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)

handling._set_worker_signal_handlers = warned_at_once

def parse():
    parser = options.Parser("test")
    options.add_distributed(parser)
    return parser.parse_args()

def run(process, args):
    more = {"process": process, "workers": 1}
    print(sum(len(batch) for batch in loader.eval_loader(range(10), 2, **more)), "images")
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    tracker = resource_tracker._resource_tracker._pid
    os.kill(tracker, signal.SIGUSR1)
    time.sleep(0.2)
    resource_tracker.ensure_running()  # a new one where that one has gone
    print(held, resource_tracker._resource_tracker._pid == tracker)

if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method(sys.argv.pop())
    launch(run, parse)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_warning_to_a_loading_worker_that_is_starting_is_lost_on_it(tmp_path, method):
    """And on Python's own helper process. forkserver: what Python 3.14 starts processes with."""
    (tmp_path / "program.py").write_text(STARTING)
    run = command(tmp_path / "program.py", method, env={"PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (0, "10 images\nset() True\n"), run.stderr


ORPHAN = """
import os, time
import torch.utils.data._utils.signal_handling as handling
from synco import loader
from synco.distributed import Process

def starting():  # in the worker, before it looks at its parent
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(2)

handling._set_worker_signal_handlers = starting
list(loader.eval_loader(range(4), 2, process=Process(), workers=1))
"""


def test_a_worker_that_was_still_starting_ends_when_its_trainer_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(ORPHAN)
    words, env = [sys.executable, str(tmp_path / "program.py")], os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 20
    while worker in interrupted.left_behind(str(tmp_path), trainer.pid) and time.monotonic() < until:
        time.sleep(0.1)
    left = worker in interrupted.left_behind(str(tmp_path), trainer.pid)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left
