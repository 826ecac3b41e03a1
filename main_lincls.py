#!/usr/bin/env python3
"""Linear probe: a linear classifier on the frozen features of a backbone (MoCo's protocol, arXiv 1911.05722).

On all GPUs of this machine, in the published settings:

  python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained FOLDER/checkpoint_0199.pth.tar \\
    --multiprocessing-distributed --world-size 1 --rank 0 IMAGENET

What the same network reaches without pretraining, at the best of several learning rates, which take one pass, on one
GPU or a CPU (torchrun --nproc-per-node N works too):

  python main_lincls.py -a resnet18 --img-size 32 --epochs 10 --schedule 6 8 --lr 0.1 0.3 1 3 --pretrained random FOLDER

DATA holds train/CLASS/IMAGE and val/CLASS/IMAGE. Writes checkpoint_lincls.pth.tar (the last epoch),
model_best_lincls.pth.tar, result.json, per_class.csv, config.json, log.jsonl and TensorBoard files.
"""

import argparse
import math
from functools import partial

import torch

from synco import distributed, options
from synco.classifier import Classifier, check_flags, run_files
from synco.errors import UserError
from synco.folder import default_folder
from synco.launch import launch
from synco.options import number
from synco.precision import Precision
from synco.run import Run


def probe(process: distributed.Process, args: argparse.Namespace) -> None:
    """One process of a linear probe."""
    folder = default_folder(args, "lincls-lr" + "-".join(f"{lr:g}" for lr in options.listed(args.lr)))
    run = Run(process, args, flags().kinds, run_files("lincls"), save_dir=folder, evaluate=args.evaluate)
    precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    task = Classifier(run, args, precision, frozen=True)
    if args.evaluate:
        return task.evaluate()
    heads = task.add_heads("--lr", args.lr)
    heads.module.eval().requires_grad_(False)  # for good: BatchNorm's running statistics are part of the backbone
    heads.layers.requires_grad_(True)
    optimizer = torch.optim.SGD(heads.groups(), momentum=args.momentum, fused=precision.fused)
    run.begin(
        task.batches,
        args.epochs * len(task.batches),
        {"state_dict": task.network, "optimizer": optimizer, "scaler": precision, "heads": heads},
        facts=task.facts(),
        identity=task.identity(),
        rates=heads.rate_names,
        results=task.results,
    )
    learner = distributed.parallel(heads.module, process.device)

    for epoch in run.epochs():
        for group, (lr, _) in zip(optimizer.param_groups, heads.settings):
            group["lr"] = learning_rate(lr, epoch, args)
        for step in run.steps(epoch):
            images, labels = precision.place(step.batch)
            with precision.autocast():
                logits = learner(images)  # of each head (N, C)
            losses = heads.losses(logits, labels)  # (heads,)
            optimizer.zero_grad()
            norms = precision.backward(losses, optimizer, heads.weights)
            precision.step(optimizer)
            heads.record(step, losses, norms, logits, labels)
        if epoch in (run.first_epoch, args.epochs - 1):
            task.check_frozen()
        task.end_epoch(epoch)
    task.finish()


def learning_rate(lr: float, epoch: int, args: argparse.Namespace) -> float:
    """Of a head whose --lr is `lr`, per epoch: cosine to --lr-min, or a tenth at each milestone."""
    if args.cos:
        return args.lr_min + (lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def flags() -> options.Parser:
    """The command line: `identity` is what a run is, `schedule` how it learns, `free` may change when it goes on."""
    parser = options.Parser(__doc__, normal="data --pretrained -a --epochs -b --lr --schedule --cos --wd --amp "
                            "--multiprocessing-distributed --save-dir --resume")  # fmt: skip
    identity, schedule = parser.identity, parser.schedule
    options.add_data(parser)
    options.add_run(parser, epochs=100, batch_size=256, save_dir=None)
    for add in (options.add_classifier, options.add_skipping, options.add_distributed, options.add_speed):
        add(parser)
    several = {"nargs": "+", "action": options.Several, "type": number(float, 0)}
    with parser.group("optimisation"):
        rates = "learning rate, or several: a head for each, all in one pass"
        schedule("--lr", "--learning-rate", default=30.0, **several, help=rates)
        milestones = "epochs that divide the lr by 10"
        schedule("--schedule", default=[60, 80], nargs="*", type=number(int, 0), help=milestones)
        schedule("--cos", action="store_true", help="cosine schedule in place of --schedule")
        schedule("--lr-min", default=0.0, type=number(float, 0), help="with --cos: where the learning rate ends")
        decay = {"dest": "weight_decay", "help": "weight decay, or several"}
        identity("--wd", "--weight-decay", default=0.0, **several, **decay)
    return parser


def parse() -> argparse.Namespace:
    """The flags of the command line, checked."""
    args = flags().parse_args()
    check_flags(args)
    if args.lr_min and not args.cos:
        raise UserError(f"--lr-min {args.lr_min:g} goes with --cos")
    return args


main = partial(launch, probe, parse)  # what synco-lincls calls where this is installed

if __name__ == "__main__":
    main()
