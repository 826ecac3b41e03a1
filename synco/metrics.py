"""What a run tells: averages that stay on the device, diagnostics of the negatives, TensorBoard, JSON lines."""

import glob
import json
import math
import os
import platform
import shlex
import sys
import time

import torch
import torchvision


class Averages:
    """Means of per-step numbers; nothing is read from the device until `read`."""

    def __init__(self):
        self.sums, self.steps = {}, 0

    def add(self, **values):
        """values: 0-dim tensors on the device, the same names in every step and process."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.steps += 1

    def read(self, reduce):
        """{name: mean since the last read}, with one read from the device; then cleared.

        reduce: (names,) tensor of this process → that of all, such as `distributed.mean`.
        """
        means = reduce(torch.stack(list(self.sums.values())).float() / self.steps).tolist()
        found = dict(zip(self.sums, means))
        self.sums, self.steps = {}, 0
        return found


class Pace:
    """How fast an epoch goes: images a second, the share of the time spent waiting for them, and what is left."""

    def __init__(self):
        self.began = self.since = time.perf_counter()
        self.waited = 0.0
        self.steps = self.images = 0

    def watch(self, batches):
        """The batches and their numbers, (0, batch), (1, batch), ..., while measuring the wait for each."""
        asked = time.perf_counter()
        for i, batch in enumerate(batches):
            self.waited += time.perf_counter() - asked
            self.steps += 1
            self.images += len(batch[0])
            yield i, batch
            asked = time.perf_counter()

    def read(self, processes):
        """{"images_per_second" (of that many processes), "data_share"} since the last read."""
        now = time.perf_counter()
        passed = now - self.since
        found = {"images_per_second": self.images * processes / passed, "data_share": self.waited / passed}
        self.since, self.waited, self.images = now, 0.0, 0
        return found

    def left(self, steps, more=0.0):
        """Time for that many further steps, and `more` seconds for other things, as "h:mm:ss"."""
        return duration((time.perf_counter() - self.began) / self.steps * steps + more)


@torch.no_grad()
def contrastive_accuracy(logits, K):
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
def ranked(logits):
    """A classifier's five best classes, best first: logits (N, C) → (N, min(5, C))."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


@torch.no_grad()
def hardness(logits, counts, *, K, T, n_hard):
    """How hard the negatives are, by kind.

    logits (N, 1 + K + S): positive, queue (-inf where a row is masked), synthetic negatives, divided by T;
    counts: {type name: negatives a query}.
    Returns {name: (mean similarity to the query, share of the softmax mass)}, 0-dim tensors, for "positive", "queue",
    "hardest" (the n_hard hardest queue rows, or all if there are fewer), and each type with a count > 0.
    """
    mass = logits.softmax(dim=1)  # (N, 1 + K + S)
    top, where = logits[:, 1 : 1 + K].topk(min(n_hard, K), dim=1)
    found = {
        "positive": (logits[:, 0].mean() * T, mass[:, 0].mean()),
        "queue": (_unmasked_mean(logits[:, 1 : 1 + K]) * T, mass[:, 1 : 1 + K].sum(dim=1).mean()),
        "hardest": (_unmasked_mean(top) * T, mass.gather(1, 1 + where).sum(dim=1).mean()),
    }
    start = 1 + K
    for name, count in counts.items():
        if count:
            part = slice(start, start + count)
            found[name] = (logits[:, part].mean() * T, mass[:, part].sum(dim=1).mean())
            start += count
    return found


def _unmasked_mean(logits):
    masked = logits == -torch.inf
    return logits.masked_fill(masked, 0).sum() / (~masked).sum()


class Log:
    """JSON lines and TensorBoard in one folder; both hold the same numbers. Other ranks' logs write nothing.

    Steps count those done: 0 before the first. Lines and points beyond `steps_done` are dropped: a resumed run writes
    them again.
    """

    def __init__(self, folder, *, steps_done=0, active=True):
        self.active, self.kept = active, []
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and only rank 0 needs it

        path = os.path.join(folder, "log.jsonl")
        if os.path.exists(path):
            self.kept = [line for line in read_log(path) if line.get("step", math.inf) <= steps_done]
        with open(path + ".tmp", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.kept)
        os.replace(path + ".tmp", path)
        self.lines = open(path, "a")
        self.board = SummaryWriter(folder, purge_step=steps_done + 1 if steps_done else None)

    def holds(self, kind, epoch):
        """Whether a line of that kind and epoch was there when the log was opened."""
        return any(line["kind"] == kind and line["epoch"] == epoch for line in self.kept)

    def write(self, kind, step, **numbers):
        """One line {"kind", "step", "time", numbers...}; all but the epoch go to TensorBoard as kind/name."""
        if not self.active:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **numbers}
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        for name, value in numbers.items():
            if name != "epoch":
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.board.flush()

    def images(self, name, grid, step):
        """grid (3, H, W) in [0, 1] → TensorBoard."""
        if self.active:
            self.board.add_image(name, grid, step)

    def close(self):
        """Flush and close both."""
        if self.active:
            self.lines.close()
            self.board.close()


def log_files(folder):
    """The files that a `Log` in this folder has written."""
    patterns = ("log.jsonl", "events.out.tfevents.*")
    return [path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))]


def read_log(path, damaged=None):
    """The lines of a log.jsonl as dicts; an incomplete last line (a run that was killed) is left out.

    A line that is no JSON object raises ValueError; with `damaged` it is left out, and damaged(its number) is called.
    """
    lines = []
    with open(path, errors="replace") as file:
        for i, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError(f"{path}: line {i} is not a JSON object")
                lines.append(line)
            except ValueError:
                if damaged is None:
                    raise
                damaged(i)
    return lines


def tell(facts):
    """Print {name: value}, a line each."""
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):18} {value}", flush=True)


def device_name(device):
    """ "cpu", or "cuda:0 (NVIDIA ...)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def origin():
    """The command line and the versions of Python and the packages, to be stored with what they made."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"command": shlex.join(sys.argv), "versions": versions}


def write_json(path, content):
    """Write a JSON file that is whole at every moment."""
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(path + ".tmp", path)


def duration(seconds):
    """Seconds → "1 d 02:03:04" or "2:03:04"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02}:{m:02}:{s:02}" if days else f"{h}:{m:02}:{s:02}"
