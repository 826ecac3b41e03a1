#!/usr/bin/env python3
"""Time a whole training step on one device, from images in its memory: MoCo v2, SynCo, and SynCo as in a textbook.

  python benchmarks/step.py                      # GPU: ResNet-50, 224 pixels, batch 256, bf16, channels-last
  python benchmarks/step.py -b 32 --amp off --json

On a CPU the default is a ResNet-18 at 64 pixels and a batch of 32, in float32. The textbook's step is float32 in the
usual layout, with the loss head of `textbook.py`, whatever the flags, but for --tf32, which is the whole process's. The
versions take turns; medians are compared. One that the device's memory is too small for is told, and left out.
"""

import json
import os
import statistics
import sys
import time
import types

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import textbook  # noqa: E402
from synco import metrics, options  # noqa: E402
from synco.builder import SynCo  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.networks import network_of  # noqa: E402
from synco.options import Parser, number  # noqa: E402
from synco.precision import Precision, compile_encoders  # noqa: E402
from synco.run import Step  # noqa: E402

NONE = {f"n{i}": 0 for i in range(1, 7)}


class Textbook(SynCo):
    """SynCo with the loss head of `textbook.py`."""

    def logits(self, q, k, slots, counts, generator=None, index=None):
        return textbook.logits(
            q, k, self.queue, counts, n_hard=self.n_hard, T=self.T, **self.ranges, generator=generator
        )


def parse():
    gpu = torch.cuda.is_available()
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("-a", "--arch", default="resnet50" if gpu else "resnet18", type=options.architecture, help="network")
    flag("--img-size", default=224 if gpu else 64, type=number(int, 8), help="side of the images")
    flag("-b", "--batch-size", default=256 if gpu else 32, type=number(int, 2), help="images in a step")
    flag("--moco-k", default=65536, type=number(int, 1024), help="rows of the queue")
    flag("--repeat", default=30 if gpu else 10, type=number(int, 1), help="repetitions")
    flag("--compile", action="store_true", help="compile the encoders of the two fast versions")
    flag("--json", action="store_true", help="print one JSON object instead of a table")
    options.add_speed(parser)
    parser.set_defaults(amp="bf16" if gpu else "off", channels_last=gpu)
    return parser.parse_args()


def make(kind, counts, precision, args):
    """A function that runs one step of a model of that kind."""
    torch.manual_seed(0)
    model = kind(network_of(args.arch, args.img_size), K=args.moco_k, T=0.2, **counts)
    precision.place(model)
    if args.compile and kind is SynCo:
        compile_encoders(model, precision.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=precision.fused)
    parameters = list(model.encoder_q.parameters())
    run = types.SimpleNamespace(averages=metrics.Averages(), finite=metrics.Finite(precision.device))
    accounts = Step(run, epoch=0, i=0, batch=None, is_printed=False)  # those of the program's own step
    size = (args.batch_size, 3, args.img_size, args.img_size)
    im_q, im_k = (precision.place(torch.randn(size, device=precision.device)) for _ in range(2))

    def step():
        began = time.perf_counter()
        with precision.autocast():
            logits, labels = model(im_q, im_k)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        norm = precision.backward(loss, optimizer, parameters)
        precision.step(optimizer)
        accounts.record(loss, norm, **metrics.contrastive_accuracy(logits, args.moco_k))
        if precision.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    fast = Precision(device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    versions = {
        "MoCo v2": make(SynCo, NONE, fast, args),
        "SynCo": make(SynCo, {}, fast, args),
        "SynCo, textbook": make(Textbook, {}, Precision(device), args),
    }
    times, too_large = {name: [] for name in versions}, []
    for repetition in range(args.repeat + 3):
        for name in [name for name in versions if name not in too_large]:
            try:
                seconds = versions[name]()
            except torch.OutOfMemoryError:
                too_large.append(name)
                continue
            if repetition >= 3:  # the first ones warm up
                times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items() if name not in too_large}
    facts = {"arch": args.arch, "img_size": args.img_size, "batch_size": args.batch_size, "amp": args.amp}
    facts |= {"channels_last": args.channels_last, "tf32": args.tf32, "compile": args.compile, "device": str(device)}
    facts |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    results = {name: {"out_of_memory": f"lower --batch-size {args.batch_size}"} for name in too_large}
    for name, t in median.items():
        results[name] = {"ms": 1e3 * t, "images_per_second": args.batch_size / t}
        for key, base in (("of_moco", "MoCo v2"), ("of_textbook", "SynCo, textbook")):
            results[name][key] = t / median[base] if base in median else None
    if args.json:
        print(json.dumps(facts | {"results": results}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'step':18}{'ms':>10}{'of MoCo v2':>14}{'of textbook':>14}{'images/s':>12}")
    for name, found in results.items():
        if name in too_large:
            print(f"{name:18}  out of memory: {found['out_of_memory']}")
            continue
        ratios = "".join(f"{found[key] or float('nan'):14.3f}" for key in ("of_moco", "of_textbook"))
        print(f"{name:18}{found['ms']:10.1f}{ratios}{found['images_per_second']:12.0f}")


if __name__ == "__main__":
    command(main, parse)
