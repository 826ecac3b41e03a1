"""A tracker of experiments beside TensorBoard: Weights & Biases, MLflow or Trackio, each an optional package.

Where it keeps a run and whether it reaches a server is its own affair, by its variables in the environment and its
login; the project is "synco" unless they name another.
"""

import argparse
import functools
import importlib.util
import os
import queue
import secrets
import threading
from collections.abc import Callable
from typing import Any

from synco import distributed, files
from synco.errors import UserError

FILE = "tracker.json"  # in the log's folder: which run of the tracker it is, and what that has been given
PROJECT = "synco"
PATIENCE = 30.0  # seconds that a run waits for its tracker to begin, and to end


class _Wandb:
    """A run of Weights & Biases, which is begun, or gone on with where there is an id."""

    def __init__(self, title, folder, settings, run_id):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        place = {"project": project, "name": title, "id": run_id, "dir": folder}
        self.run = wandb.init(resume="allow", config=settings, **place)
        self.id = self.run.id

    def log(self, step, numbers):
        self.run.log(numbers, step=step)

    def finish(self):
        self.run.finish()


class _MLflow:
    """The same of MLflow."""

    def __init__(self, title, folder, settings, run_id):
        import mlflow

        if run_id is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = mlflow.start_run(run_id=run_id, run_name=None if run_id else title).info.run_id
        if run_id is None:  # they are for good
            mlflow.log_params(settings)
        self.log = lambda step, numbers: mlflow.log_metrics(numbers, step=step)
        self.finish = mlflow.end_run


class _Trackio:
    """The same of Trackio, whose runs are known by their names."""

    def __init__(self, title, folder, settings, run_id):
        import trackio

        self.id = run_id or f"{title}-{secrets.token_hex(4)}"
        self.run = trackio.init(PROJECT, self.id, config=settings, resume="allow")

    def log(self, step, numbers):
        self.run.log(numbers, step=step)

    def finish(self):
        self.run.finish()


TRACKERS = {"wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}
INSTALL = "pip install '.[track]' has them all"


def tracker(name: str) -> str:
    """An argparse type: the name of a tracker whose package is installed."""
    if name not in TRACKERS:
        raise argparse.ArgumentTypeError(f"{name!r} is no tracker; choose one of {', '.join(TRACKERS)} ({INSTALL})")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as wandb makes
        raise argparse.ArgumentTypeError(f"{name!r} is not installed: pip install {name} ({INSTALL})")
    return name


class Tracker:
    """A run in a tracker, which gets each number of the log once. What goes wrong there is a warning.

    name: one of TRACKERS; folder: the log's; title: what the tracker is to call the run; settings: stored with it;
    run_id: the run to go on with, None: a new one. id: that of the run, None where none was begun.

    All happens in a thread of its own: a server that does not answer holds nothing up for longer than PATIENCE.
    """

    def __init__(
        self, name: str, folder: str, *, title: str, settings: dict[str, Any], run_id: str | None = None
    ) -> None:
        self.name, self.id, self.path = name, run_id, os.path.join(folder, FILE)
        self.sent = _sent(self.path, run_id)  # {kind of line: the last step that was sent}
        self.lines, self.failed = queue.SimpleQueue(), False
        begin, begun = functools.partial(TRACKERS[name], title, folder, settings, run_id), threading.Event()
        self.thread = threading.Thread(target=self._work, args=(begin, begun), daemon=True)
        self.thread.start()
        if not begun.wait(PATIENCE):
            distributed.warn(f"--track {name}: has not begun within {PATIENCE:g} seconds; the run does not wait for it")

    def _work(self, begin, begun):
        """The thread: begin, send the lines that come, finish."""
        run = self._attempt(begin)
        if run:
            self.id = run.id
        begun.set()
        for kind, step, numbers in iter(self.lines.get, None) if run else ():
            if step > self.sent.get(kind, -1):
                self._attempt(self._send, run, kind, step, numbers)
        if run:
            self._attempt(run.finish)

    def _send(self, run, kind, step, numbers):
        self.sent[kind] = step  # before: a kill in between loses a point there, and doubles none
        files.write_json(self.path, {"tracker": self.name, "id": self.id, "sent": self.sent})
        run.log(step, {f"{kind}/{name}": number for name, number in numbers.items() if name != "epoch"})

    def _attempt(self, act: Callable, *args):
        """act(*args); where it raises, None and a warning, the first time."""
        try:
            return act(*args)
        except Exception as error:  # another's package may raise anything, and must not end a run
            if not self.failed:
                lost = "some of its points will be missing there" if self.id else "given up"
                first = (str(error).strip().splitlines() or [""])[0]
                distributed.warn(f"--track {self.name}: {type(error).__name__}: {first} ({lost}; log.jsonl has all)")
            self.failed = True

    def log(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """A line of the log, after so many steps; it is sent soon."""
        if self.thread.is_alive():
            self.lines.put((kind, step, numbers))

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        self.lines.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            distributed.warn(f"--track {self.name}: has not taken everything within {PATIENCE:g} seconds")


def _sent(path, run_id):
    """What a run of the tracker has been given before, {} if nothing is known of it."""
    try:
        known = files.read_json(path)
    except UserError:  # a file may hold anything
        return {}
    sent = known.get("sent") if known.get("id") == run_id else None
    return {kind: step for kind, step in sent.items() if isinstance(step, int)} if isinstance(sent, dict) else {}
