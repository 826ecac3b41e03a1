#!/usr/bin/env python3
"""Predict the step of many GPUs from one GPU's compute time and the speed of the links: on paper, nothing is trained.

  python benchmarks/scale.py                          # ResNet-50, 32 images a GPU, 8 to 512 GPUs
  python benchmarks/scale.py --images 128 --compute-ms 170 --network 50 --amp bf16
  python benchmarks/scale.py --check                  # the bytes of the formulas beside those of real gloo processes

W GPUs, g a node, N images a GPU, of e bytes a number; P weights; C numbers a key. A GPU receives in a step

  gradients   2 (W - 1) / W · 4 P            all-reduce in a ring (Patarasuk and Yuan, JPDC 2009)
  shuffle     (W - 1) / W · N · 3 S² e       each image to one process at random, which is itself with 1 / W
  keys        (W - 1) · N · 4 C              all-gather

and a node from other nodes the gradients' 2 (W - 1) / W · 4 P once, g (W - g) / W · N · 3 S² e, and (W - g) · N · 4 C.
A collective takes the longer of both at their link's speed, and a latency: 2 log2 W messages for the tree of an
all-reduce, W - 1 for the others (Thakur, Rabenseifner, Gropp, IJHPCA 2005). Gradients travel during the backward pass,
half of the compute time here, but for the last of DDP's buckets of 25 MiB (Li and others, VLDB 2020); shuffle and keys
are waited for. The plan of a shuffle is the host's: it is measured here, in a group of W of which one process is real.
The agreement on saves and stops is of 3 bytes and asked for a step later; the guard's signs of life are requests to
one store. Every step's time is an upper bound: none of it hides behind another.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.comm import Counted  # noqa: E402
from synco import distributed, options  # noqa: E402
from synco.agreement import Agreement  # noqa: E402
from synco.builder import SynCo  # noqa: E402
from synco.errors import UserError  # noqa: E402
from synco.guard import Guard  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.networks import network_of  # noqa: E402
from synco.options import Parser, number  # noqa: E402

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time
BACKWARD = 0.5  # of the compute time: a forward pass of each encoder, and a backward pass of twice that of one
ADVICE = {
    "gradients": "more images a GPU",
    "shuffle": "--amp bf16, then a faster network",
    "keys": "fewer GPUs",
    "host": "more images a GPU",
}


def parse():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("-w", "--worlds", nargs="+", type=number(int, 2), default=[8, 16, 32, 64, 128, 256, 512], help="GPUs")
    flag("--node", type=number(int, 1), default=8, help="GPUs of a node")
    flag("--images", type=number(int, 1), default=32, help="of a GPU, in a step")
    flag("--compute-ms", type=number(float, above=0), default=50.0, help="of such a step on one GPU (an assumption)")
    flag("--link", type=number(float, above=0), default=200.0, help="GB/s that a GPU receives within a node")
    flag("--network", type=number(float, above=0), default=25.0, help="GB/s that a node receives")
    flag("--latency-us", type=number(float, 0), default=5.0, help="of a message")
    flag("-a", "--arch", default="resnet50", type=options.architecture, help="network")
    flag("--img-size", type=number(int, 8), default=224, help="side of the images")
    flag("--dim", type=number(int, 1), default=128, help="width of the keys")
    flag("--moco-k", type=number(int, 1), default=65536, help="rows of the queue")
    flag("--amp", default="off", choices=("off", "bf16", "fp16"), help="in whose type the images travel")
    flag("--symmetric", action="store_true", help="twice the images and keys")
    flag("--check", action="store_true", help="count what 3 and 4 gloo processes send each other")
    flag("--steps", type=number(int, 1), default=50, help="with --check: steps of each")
    flag("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    wrong = [W for W in args.worlds if W % min(W, args.node)]
    if wrong:
        raise UserError(f"--worlds {wrong[0]}: no whole nodes of --node {args.node}")
    return args


def received(W: int, *, images: int, size: int, bytes_each: int, weights: int, dim: int) -> dict[str, float]:
    """Bytes that each of W processes receives in a step, in the mean."""
    return {
        "gradients": 2 * (W - 1) / W * 4 * weights,
        "shuffle": (W - 1) / W * images * 3 * size**2 * bytes_each,
        "keys": (W - 1) * images * dim * 4,
    }


def entering(W: int, node: int, here: dict[str, float]) -> dict[str, float]:
    """Bytes that a node receives from others, from what each of its processes does (`received`)."""
    outside = (W - node) / (W - 1)  # of what a process receives from any other
    return {
        "gradients": here["gradients"] if outside else 0.0,
        "shuffle": node * outside * here["shuffle"],
        "keys": outside * here["keys"],
    }


def requests(W: int, seconds: float = 40.0) -> float:
    """Requests a second to the store of the guard, from all W processes; seconds: --peer-timeout."""
    return W / Guard.INTERVAL + W * 2 / (max(1, int(seconds / 8 / Guard.INTERVAL)) * Guard.INTERVAL)


def predict(W: int, args, weights: int, host: float) -> dict:
    """A step of W GPUs: {part: its milliseconds} and what follows. host: seconds of the plan of a shuffle."""
    ways, each = 1 + args.symmetric, 4 if args.amp == "off" else 2
    sizes = {"images": args.images, "size": args.img_size, "bytes_each": each, "weights": weights, "dim": args.dim}
    here = received(W, **sizes)
    there = entering(W, min(args.node, W), here)
    messages = {"gradients": 2 * math.log2(W), "shuffle": W - 1, "keys": W - 1}
    ms = {
        name: 1e3 * max(here[name] / (args.link * 1e9), there[name] / (args.network * 1e9))
        + 1e-3 * args.latency_us * messages[name]
        for name in here
    }
    last = min(1.0, BUCKET / (4 * weights)) * ms["gradients"]
    parts = {
        "gradients": max(last, ms["gradients"] - BACKWARD * args.compute_ms),
        "shuffle": ways * ms["shuffle"],
        "keys": ways * ms["keys"],
        "host": ways * 1e3 * host,
    }
    step = args.compute_ms + sum(parts.values())
    limit = max(parts, key=parts.get)
    return {
        "ms": {"compute": args.compute_ms, **parts, "step": step},
        "megabytes": {name: size / 1e6 for name, size in here.items()},
        "efficiency": args.compute_ms / step,
        "limit": limit if parts[limit] > 0.05 * step else "compute",
        "queue": W * args.images * ways / args.moco_k,
        "requests": requests(W),
    }


def plan_seconds(W: int, images: int) -> float:
    """What a shuffle takes the host among W processes, of which this is the one that is real: CPU seconds."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a back end that sends nothing

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=W)
    try:
        order, x, times = torch.randperm(W * images), torch.zeros(images, 1), []
        for _ in range(9):
            began = time.process_time()  # CPU seconds: another program's load does not count
            distributed.shuffle(x, order)
            times.append(time.process_time() - began)
        return statistics.median(times[2:])
    finally:
        dist.destroy_process_group()


class CountedSteps(Counted):
    """Counts what is handed to all-reduces, too: gradients, and the agreement's word."""

    def __init__(self):
        super().__init__()
        self.kinds = {"shuffle": 0, "keys": 0, "gradients": 0, "agreement": 0}
        self.all_reduce, dist.all_reduce = dist.all_reduce, self.reduced

    def exchanged(self, *args, **more):
        before = self.received
        work = super().exchanged(*args, **more)
        self.kinds["shuffle"] += self.received - before
        return work

    def gathered(self, *args):
        before = self.received
        work = super().gathered(*args)
        self.kinds["keys"] += self.received - before
        return work

    def reduced(self, tensor, *args, **more):
        self.kinds["gradients" if tensor.is_floating_point() else "agreement"] += tensor.nbytes
        return self.all_reduce(tensor, *args, **more)


def count(rank: int, W: int, store: str, steps: int, results) -> None:
    """One gloo process of several that take steps as the program does, and count what travels: float32, then bf16."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=W)
    torch.manual_seed(0)
    network = lambda num_classes: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(64, num_classes)
    )
    model = SynCo(network, 16, 96, mlp=False, n_hard=8)
    learner, agreement, counted = distributed.parallel(model, torch.device("cpu")), Agreement(), CountedSteps()
    means = []
    for amp in (False, True):
        counted.kinds = dict.fromkeys(counted.kinds, 0)
        for step in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                logits, labels = learner(*torch.randn(2, 8, 3, 16, 16), step=step)
            F.cross_entropy(logits, labels).backward()
            agreement.after(step + 1)
        everyone = distributed.from_all(counted.kinds)
        means.append({name: statistics.mean(one[name] for one in everyone) / steps for name in counted.kinds})
    if rank == 0:
        results.put((means, sum(weight.numel() for weight in model.encoder_q.parameters())))
    dist.barrier()
    dist.destroy_process_group()


def check(W: int, steps: int) -> dict[str, dict[str, tuple[float, float]]]:
    """{--amp: {part: (bytes by the formula, bytes counted)}} of a process and step, over W gloo processes.

    Of gradients what is counted is what DDP hands over, to which the ring's factor is applied.
    """
    context, compared = mp.get_context("forkserver"), {}
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        words = W, os.path.join(folder, "store"), steps, results
        mp.start_processes(count, words, nprocs=W, start_method="forkserver")
    means, weights = results.get()
    for amp, found in zip(("off", "bf16"), means):
        expected = received(W, images=8, size=16, bytes_each=4 if amp == "off" else 2, weights=weights, dim=16)
        found["gradients"] *= 2 * (W - 1) / W
        compared[amp] = {name: (size, found[name]) for name, size in (expected | {"agreement": 3}).items()}
    return compared


def main(args):
    if args.check:
        found = {f"{W}, {amp}": parts for W in (3, 4) for amp, parts in check(W, args.steps).items()}
        if args.json:
            print(json.dumps(found))
            return
        print(f"{'processes, --amp':18}{'bytes of':12}{'formula':>12}{'counted':>12}{'ratio':>8}")
        for name, parts in found.items():
            for part, (expected, counted) in parts.items():
                print(f"{name:18}{part:12}{expected:12.1f}{counted:12.1f}{counted / expected:8.3f}")
        return
    with torch.device("meta"):
        model = SynCo(network_of(args.arch, args.img_size), args.dim, 1, n_hard=1)
    weights = sum(weight.numel() for weight in model.encoder_q.parameters())
    found = {W: predict(W, args, weights, plan_seconds(W, args.images)) for W in args.worlds}
    facts = {name: value for name, value in vars(args).items() if name not in ("json", "check", "steps", "worlds")}
    if args.json:
        print(json.dumps(facts | {"weights": weights, "predicted": found}))
        return
    print(", ".join(f"{name} {value}" for name, value in (facts | {"weights": weights}).items()))
    print("ms beside compute that a step waits for; bytes that a GPU receives")
    print(
        f"{'GPUs':>5}{'gradients':>11}{'shuffle':>9}{'keys':>7}{'host':>7}{'step':>8}{'efficiency':>12}{'MB':>8}"
        f"{'of queue':>10}{'requests/s':>12}  limit"
    )
    for W, one in found.items():
        ms, limit = one["ms"], one["limit"]
        told = limit if limit == "compute" else f"{limit}: {ADVICE[limit]}"
        told = f"--moco-k: {one['queue']:.1f} queues of keys in a step" if one["queue"] > 1 else told
        print(
            f"{W:5}{ms['gradients']:11.2f}{ms['shuffle']:9.2f}{ms['keys']:7.2f}{ms['host']:7.2f}{ms['step']:8.1f}"
            f"{one['efficiency']:12.2f}{sum(one['megabytes'].values()):8.1f}{one['queue']:10.3f}"
            f"{one['requests']:12.0f}  {told}"
        )


if __name__ == "__main__":
    command(main, parse)
