#!/usr/bin/env python3
"""Time the loss head, from q and k to the gradient of q: MoCo v2, SynCo, and SynCo as in a textbook.

  python benchmarks/head.py                     # N = 32, K = 65,536, C = 128, default counts
  python benchmarks/head.py -n 256 --json

The versions take turns within each repetition, so that a noisy machine disturbs all alike; medians are compared. The
peak is that of the tensors which exist at one time from q to its gradient, but for q, k and the queue.
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import textbook  # noqa: E402
from synco.builder import SynCo  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.options import Parser, number  # noqa: E402


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are alive, on a CPU; `most` of them at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := StorageWeakRef(x.untyped_storage())) not in given:
                self.alive.setdefault(storage, x.untyped_storage().nbytes())
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return result


def parse():
    parser = Parser(__doc__)
    parser.add_argument("-n", type=number(int, 1), default=32, help="queries")
    parser.add_argument("-k", type=number(int, 1024), default=65536, help="rows of the queue, n_hard or more")
    parser.add_argument("-c", type=number(int, 1), default=128, help="width of the embedding")
    parser.add_argument("--repeat", type=number(int, 1), default=15, help="repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    model = SynCo(lambda num_classes: nn.Linear(8, num_classes), args.c, args.k, T=0.2, mlp=False).to(device)
    q, k = (F.normalize(torch.randn(args.n, args.c, device=device), dim=1) for _ in range(2))
    labels = torch.zeros(args.n, dtype=torch.long, device=device)
    slots = torch.arange(args.n, device=device)
    versions = {
        "MoCo v2": lambda q: model.logits(q, k, slots, (0,) * 6),
        "SynCo": lambda q: model.logits(q, k, slots, model.counts),
        "SynCo, textbook": lambda q: textbook.logits(
            q, k, model.queue, model.counts, n_hard=model.n_hard, T=model.T, **model.ranges
        ),
    }

    def step(head):
        variable = q.clone().requires_grad_()
        began = time.perf_counter()
        F.cross_entropy(head(variable), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak(head):
        step(head)
        if device.type == "cpu":
            with Peak() as counted:
                step(head)
            return counted.most
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(head)
        return torch.cuda.max_memory_allocated() - before

    peaks = {name: peak(head) / 2**20 for name, head in versions.items()}
    times = {name: [] for name in versions}
    for repetition in range(args.repeat + 2):
        for name, head in versions.items():
            seconds = step(head)
            if repetition >= 2:  # the first ones warm up
                times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    base = median["SynCo, textbook"]
    if args.json:
        results = {name: {"ms": 1e3 * t, "ratio": t / base, "peak_mib": peaks[name]} for name, t in median.items()}
        facts = {"n": args.n, "k": args.k, "c": args.c, "device": str(device), "torch": torch.__version__}
        print(json.dumps(facts | {"ratio": median["SynCo"] / base, "results": results}))
        return
    print(f"N = {args.n}, K = {args.k}, C = {args.c}, {device}, torch {torch.__version__}, median of {args.repeat}")
    print(f"{'head':18}{'ms':>10}{'of textbook':>14}{'peak, MiB':>12}")
    for name, seconds in median.items():
        print(f"{name:18}{1e3 * seconds:10.1f}{seconds / base:14.2f}{peaks[name]:12.1f}")


if __name__ == "__main__":
    command(main, parse)
