"""What a run tells: averages that stay on the device, TensorBoard, JSON lines."""

import contextlib
import errno
import functools
import glob
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torchvision

import synco
from synco import distributed, files, track
from synco.errors import UserError


class Averages:
    """Means of per-step numbers, or tensors of them of this shape; nothing is read from the device until `read`."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.sums, self.steps, self.shape = {}, 0, shape

    def add(self, **values: torch.Tensor) -> None:
        """values: tensors on the device, the same names in every step and process."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.steps += 1

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[str], torch.Tensor]:
        """(names, means since the last time (names, ...), on the device); then cleared.

        reduce: (names, ...) tensor of this process → that of all, such as `distributed.mean`.
        """
        names, means = list(self.sums), reduce(torch.stack(list(self.sums.values())).float() / self.steps)
        self.sums, self.steps = {}, 0
        return names, means

    def state(self, from_all: Callable[[torch.Tensor], list[torch.Tensor]]) -> dict:
        """What a run that goes on from here needs, as plain values and one tensor (processes, names, ...).

        from_all: this process's value → the list of all processes' values, such as `distributed.from_all`.
        What is not finite, which is of heads that are dropped, becomes 0.
        """
        mine = torch.stack(list(self.sums.values())) if self.sums else torch.empty(0, *self.shape)
        mine = mine.nan_to_num(0, 0, 0).cpu()
        return {"names": list(self.sums), "sums": torch.stack(from_all(mine)), "steps": self.steps}

    def restore(self, state: dict, rank: int, processes: int, device: torch.device) -> None:
        """Go on from a `state`; of another number of processes each takes their mean. Raises ValueError."""
        try:
            names, sums, steps = state["names"], state["sums"], state["steps"]
            fits = sums.shape[1:] == (len(names), *self.shape) and sums.is_floating_point()
            fits = fits and sums.is_contiguous() and bool(sums.isfinite().all())
            fits = fits and all(isinstance(name, str) for name in names)
            if not fits or not isinstance(steps, int) or steps < 0:
                raise ValueError("its averages are not the averages of a run")
            mine = sums[rank] if len(sums) == processes else sums.mean(dim=0)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError("its averages are not the averages of a run") from error
        self.sums, self.steps = dict(zip(names, mine.to(device).unbind())), steps


class Notes:
    """Numbers of one print step, all read from the device at once."""

    def __init__(self) -> None:
        self.numbers, self.counts = {}, []

    def add(self, **numbers: torch.Tensor) -> None:
        """numbers: 0-dim tensors."""
        self.numbers |= numbers

    def count(self, function: Callable[..., dict[str, float]], *tables: torch.Tensor) -> None:
        """function: what the host makes of these tables, tensors on the device → {name: number}."""
        self.counts.append((function, tables))

    def read(self, **others: torch.Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """({name: number} of all, {name: number or list} of others, tensors of any shape)."""
        tensors = [*others.values(), *self.numbers.values(), *(table for _, tables in self.counts for table in tables)]
        if not tensors:
            return {}, {}
        host = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu().numpy()  # which holds them exactly
        parts = iter(np.split(host, np.cumsum([tensor.numel() for tensor in tensors[:-1]])))
        read = {name: next(parts).reshape(tensor.shape).tolist() for name, tensor in others.items()}
        found = {name: next(parts).item() for name in self.numbers}
        for function, tables in self.counts:
            found |= function(*(torch.from_numpy(next(parts)).view(table.shape).to(table.dtype) for table in tables))
        return found, read


class Finite:
    """Whether losses and gradients are finite, of one head or of several (heads,).

    Where the first was not stays on the device until `first_bad`.
    """

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), -1, dtype=torch.long, device=device)

    @torch.no_grad()
    def watch(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """In every step; norm: the gradient's → whether one has not been finite so far, a tensor of 0 or 1 of each."""
        bad = ~(loss.detach() + norm).isfinite() & (self.first < 0)
        self.first = torch.where(bad, step, self.first)
        return (self.first >= 0).float()

    def first_bad(self, from_all: Callable[[list], list[list]]) -> list[int | None]:
        """Of each head the first step that was not finite in any process, or None. from_all: see `Averages.state`."""
        of_each = zip(*from_all(self.first.view(-1).tolist()))
        return [min((step for step in steps if step >= 0), default=None) for steps in of_each]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of all gradients together, as a 0-dim tensor."""
    return torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])


class Pace:
    """How fast an epoch goes: images a second, the share of the time spent waiting for them, and what is left."""

    def __init__(self) -> None:
        self.began = self.since = time.perf_counter()
        self.waited = 0.0
        self.steps = self.images = 0

    def watch(self, batches: Iterable, start: int = 0) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The batches and their numbers, (start, batch), (start + 1, batch), ..., while measuring each wait."""
        asked = time.perf_counter()
        for i, batch in enumerate(batches, start):
            self.waited += time.perf_counter() - asked
            self.steps += 1
            self.images += len(batch[0])
            yield i, batch
            asked = time.perf_counter()

    def read(self, processes: int) -> dict[str, float]:
        """{"images_per_second" (of that many processes), "data_share"} since the last read."""
        now = time.perf_counter()
        passed = now - self.since
        found = {"images_per_second": self.images * processes / passed, "data_share": self.waited / passed}
        self.since, self.waited, self.images = now, 0.0, 0
        return found

    def left(self, steps: int, more: float = 0.0) -> str:
        """Time for that many further steps, and `more` seconds for other things, as "h:mm:ss"."""
        return duration((time.perf_counter() - self.began) / self.steps * steps + more)


def progress(numbers: dict[str, float]) -> str:
    """The loss, the accuracies that a run has, and the speed of a print step, in words."""
    titles = {"acc1": "acc@1", "acc5": "acc@5", "acc1_real": "real acc@1"}
    columns = "".join(f"{title} {numbers[name]:5.2f}  " for name, title in titles.items() if name in numbers)
    speed = f"{numbers['images_per_second']:.0f} images/s  data {numbers['data_share']:.0%}"
    return f"loss {numbers['loss']:.4f}  {columns}{speed}"


@torch.no_grad()
def contrastive_accuracy(logits: torch.Tensor, K: int) -> dict[str, torch.Tensor]:
    """How often the positive scores highest (acc1) or among the five highest (acc5), in percent.

    logits (N, 1 + K + S), the positive in column 0. acc1_real leaves the S synthetic negatives out: an interpolated
    negative lies nearer to the query than most positives do, so acc1 falls when synthesis begins.
    Returns 0-dim tensors.
    """
    higher = logits > logits[:, :1]  # (N, 1 + K + S)
    real = higher[:, : 1 + K].sum(dim=1)  # (N,)
    above = real + higher[:, 1 + K :].sum(dim=1)
    counts = {"acc1": above < 1, "acc5": above < 5, "acc1_real": real < 1}
    return {name: 100 * count.float().mean() for name, count in counts.items()}


@torch.no_grad()
def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"acc1", "acc5"} in percent of a classifier, 0-dim tensors, or of several (heads,).

    logits (N, C), or (heads, N, C); labels (N,).
    """
    right = 100.0 * (ranked(logits) == labels[:, None])  # (..., N, min(5, C))
    return {"acc1": right[..., 0].mean(dim=-1), "acc5": right.sum(dim=-1).mean(dim=-1)}


@torch.no_grad()
def ranked(logits: torch.Tensor) -> torch.Tensor:
    """A classifier's five best classes, best first: logits (..., C) → (..., min(5, C))."""
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


class Log:
    """JSON lines and TensorBoard in one folder, and perhaps a tracker: all hold the same numbers.

    Other ranks' logs write nothing.

    Steps count those done: 0 before the first. Lines and points beyond `steps_done` are dropped: a resumed run writes
    them again.
    """

    def __init__(self, folder: str, *, steps_done: int = 0, active: bool = True) -> None:
        self.active, self.kept = active, []  # the lines that stay
        self.tracker: track.Tracker | None = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and only rank 0 needs it

        path = os.path.join(folder, "log.jsonl")
        try:
            if os.path.exists(path):
                self.kept = [line for line in read_log(path) if line["step"] <= steps_done]
            with files.atomic_write(path) as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in self.kept)
            self.path, self.lines, self.waiting = path, open(path, "ab", buffering=0), b""
            self.board = SummaryWriter(folder, purge_step=steps_done + 1 if steps_done else None)
        except OSError as error:
            raise UserError(f"{path}: the log cannot be read or written ({error.strerror or error})") from error

    def track(self, name: str, settings: dict, stored: object) -> None:
        """Give what is written from now on to a tracker, too, under the name of the run's "save_dir" in its settings.

        stored: the `tracked` of the checkpoint that the run goes on from. Where its log goes on, so does its run in the
        tracker; in a new folder both are new.
        """
        known = isinstance(stored, dict) and stored.get("name") == name and isinstance(stored.get("id"), str)
        self.tracker = track.Tracker(
            name,
            os.path.dirname(self.path),
            title=os.path.basename(os.path.abspath(settings["save_dir"])),
            settings=settings,
            run_id=stored["id"] if known and self.kept else None,
        )

    @property
    def tracked(self) -> dict | None:
        """The run in the tracker, {"name", "id"}, for the checkpoint; None without one."""
        return {"name": self.tracker.name, "id": self.tracker.id} if self.tracker and self.tracker.id else None

    def write(self, kind: str, step: int, **numbers: float | None) -> None:
        """One line {"kind", "step", "time", numbers...}; all but the epoch go to TensorBoard as kind/name.

        A line that cannot be written, on a full disk for instance, waits for the next; TensorBoard is then given up.
        """
        if not self.active:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **numbers}
        self.waiting += json.dumps(line).encode() + b"\n"
        self._write_waiting()
        self._show(lambda board: [board.add_scalar(f"{kind}/{k}", v, step) for k, v in numbers.items() if k != "epoch"])
        if self.tracker:
            self.tracker.log(kind, step, numbers)

    def _write_waiting(self):
        end = os.fstat(self.lines.fileno()).st_size
        try:
            if self.lines.write(self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = b""
        except OSError as error:
            os.ftruncate(self.lines.fileno(), end)  # no half lines
            distributed.warn(f"{self.path}: cannot be written ({error.strerror}); its lines wait")

    def _show(self, add):
        if self.board is None:
            return
        try:
            add(self.board)
            self.board.flush()
        except OSError as error:  # its thread's, of this write or the one before
            self.board = None
            distributed.warn(f"TensorBoard's file cannot be written ({error}); given up")

    def images(self, name: str, grid: torch.Tensor | None, step: int) -> None:
        """grid (3, H, W) in [0, 1] → TensorBoard; where the log is not active it may be None."""
        if self.active:
            self._show(lambda board: board.add_image(name, grid, step))

    def sync(self) -> None:
        """Flush the lines to disk: called before a checkpoint, whose run takes them for written."""
        if self.active:
            if self.waiting:
                self._write_waiting()
            with contextlib.suppress(OSError):
                os.fsync(self.lines.fileno())

    def close(self) -> None:
        """Flush and close all of them."""
        if self.active:
            if self.waiting:
                self._write_waiting()
            self.lines.close()
            self._show(lambda board: board.close())
        if self.tracker:
            self.tracker.close()


def log_files(folder: str) -> list[str]:
    """The files that a `Log` in this folder has written."""
    patterns = ("log.jsonl", "events.out.tfevents.*", track.FILE)
    return [path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))]


def read_log(path: str, damaged: Callable[[int], None] | None = None) -> list[dict]:
    """The lines of a log.jsonl as dicts with a "kind" and a whole "step".

    What else is in the file is left out: the incomplete last line of a run that was killed, and damaged lines, of which
    damaged(line number) is told, if it is given.
    """
    lines = []
    with open(path, errors="replace") as file:
        for i, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict) and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int):
                lines.append(line)
            elif damaged:
                damaged(i)
    return lines


def print_facts(facts: dict[str, object]) -> None:
    """Print {name: value}, a line each."""
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):18} {value}", flush=True)


def device_name(device: torch.device) -> str:
    """ "cpu", or "cuda:0 (NVIDIA ...)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def origin() -> dict:
    """The command line and the versions of Python and the packages, to be stored with what they made."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}  # a class of torch's own
    versions |= {"torchvision": torchvision.__version__, "synco": _version()}
    program, spec = [os.path.basename(sys.argv[0])], sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("synco."):  # python -m
        program = ["python", "-m", spec.name]
    return {"command": shlex.join([*program, *sys.argv[1:]]), "versions": versions}


@functools.cache
def _version():
    """This package's version and, in a clone, the commit, with "-dirty" where its files differ from that."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = ["git", "--no-optional-locks", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        if os.path.exists(os.path.join(root, ".git")):  # not that of a repository in which an environment lies
            commit = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            return f"{synco.__version__}, commit {commit}"
    except (OSError, subprocess.SubprocessError):  # no git, or a clone of another user's
        pass
    return synco.__version__


def duration(seconds: float) -> str:
    """Seconds → "1 d 02:03:04" or "2:03:04"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02}:{m:02}:{s:02}" if days else f"{h}:{m:02}:{s:02}"


def pair_grid(
    im_q: torch.Tensor, im_k: torch.Tensor, stats: tuple[Sequence[float], Sequence[float]], pairs: int = 8
) -> torch.Tensor:
    """The first query views above their key views (N, 3, H, W), as one picture (3, H', W') in [0, 1].

    stats: mean and deviation of the three channels, with which the views are normalised.
    """
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in stats)
    views = torch.cat([im_q[:pairs], im_k[:pairs]]).cpu() * std + mean
    return torchvision.utils.make_grid(views.clamp(0, 1), nrow=min(pairs, len(im_q)))
