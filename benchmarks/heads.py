#!/usr/bin/env python3
"""Time a step of the linear probe with one learning rate and with several, on random images already on the device.

  python benchmarks/heads.py                     # ResNet-18 at 32 pixels, batch 256, ten classes; rates 0.3 ... 30
  python benchmarks/heads.py --lr 1 3 --json

The two take turns, so that a noisy machine disturbs both alike, and the median of the ratios is told. Decoding and
augmenting, which several rates share as well, are left out: with them the ratio is smaller.
"""

import json
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from synco import metrics, options  # noqa: E402
from synco.heads import Heads  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.networks import head_name, network_of  # noqa: E402
from synco.options import number  # noqa: E402
from synco.precision import Precision  # noqa: E402


def parse():
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("-a", "--arch", default="resnet18", type=options.architecture)
    flag("--img-size", default=32, type=number(int, 8))
    flag("-b", "--batch-size", default=256, type=number(int, 1))
    flag("--classes", default=10, type=number(int, 2))
    flag("--lr", nargs="+", action=options.Several, type=number(float, 0), default=[0.3, 1.0, 3.0, 10.0, 30.0])
    flag("--repeat", default=15, type=number(int, 1), help="repetitions")
    flag("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_args()


def make(rates, precision, args):
    """A function that makes one step of a probe at these rates → its seconds."""
    torch.manual_seed(0)
    network = precision.place(network_of(args.arch, args.img_size)(num_classes=args.classes))
    heads = Heads(network, head_name(network, args.classes), rates)
    heads.module.eval().requires_grad_(False)
    heads.layers.requires_grad_(True)
    optimizer = torch.optim.SGD(heads.groups(), momentum=0.9, fused=precision.fused)
    images = precision.place(torch.randn(args.batch_size, 3, args.img_size, args.img_size))
    labels = precision.place(torch.randint(args.classes, (args.batch_size,)))

    class Accounts:
        averages, finite = metrics.Averages(heads.shape), metrics.Finite(precision.device)

        def record(self, loss, norm, **numbers):
            self.averages.add(loss=loss, bad=self.finite.watch(0, loss, norm), **numbers)

    def step():
        began = time.perf_counter()
        logits = heads.module(images)
        losses = heads.losses(logits, labels)
        optimizer.zero_grad()
        norms = precision.backward(losses, optimizer, heads.weights)
        precision.step(optimizer)
        heads.record(Accounts(), losses, norms, logits, labels)
        if precision.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main(args):
    precision = Precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rates = options.listed(args.lr)
    one, several = make(rates[:1], precision, args), make(rates, precision, args)
    pairs = [(one(), several()) for _ in range(args.repeat + 2)][2:]  # the first ones warm up
    found = {"one_ms": 1e3 * statistics.median(a for a, _ in pairs), "heads": len(rates)}
    found |= {"ratio": statistics.median(b / a for a, b in pairs), "device": str(precision.device)}
    if args.json:
        print(json.dumps(found | {"torch": torch.__version__}))
    else:
        print(
            f"{len(rates)} rates cost {found['ratio']:.3f} of one ({found['one_ms']:.1f} ms a step, {found['device']})"
        )


if __name__ == "__main__":
    command(main, parse)
