#!/usr/bin/env python3
"""Semi-supervised evaluation: train on 1 % or 10 % of the labels (Barlow Twins' protocol, arXiv 2103.03230).

On all GPUs of this machine, the whole network on 1 % of ImageNet's labels:

  python main_semisup.py -a resnet50 --epochs 60 --batch-size 1024 --lr-backbone 0.02 --lr-classifier 0.5 \\
    --train-percent 1 --weights finetune --pretrained FOLDER/checkpoint_0199.pth.tar \\
    --multiprocessing-distributed --world-size 1 --rank 0 IMAGENET

On one GPU or a CPU (torchrun --nproc-per-node N works too):

  python main_semisup.py -a resnet18 --img-size 32 --epochs 20 --lr-backbone 0.02 --lr-classifier 0.5 \\
    --train-percent 10 --weights finetune --pretrained FOLDER/checkpoint_0004.pth.tar FOLDER

DATA holds train/CLASS/IMAGE and val/CLASS/IMAGE. On ImageNet the labelled images are SimCLR's lists, elsewhere a
class-balanced draw. Writes checkpoint_semisup.pth.tar (the last epoch), model_best_semisup.pth.tar, result.json,
per_class.csv, config.json, log.jsonl and TensorBoard files.
"""

import argparse
import math
from functools import partial

import torch

from synco import distributed, options, subsets
from synco.classifier import Classifier, check_flags, run_files
from synco.errors import UserError
from synco.folder import default_folder
from synco.launch import launch
from synco.options import number
from synco.precision import Precision
from synco.run import Run


def train(process: distributed.Process, args: argparse.Namespace) -> None:
    """One process of a training on few labels."""
    finetune = args.weights == "finetune"
    rates = "-".join(f"{lr:g}" for lr in [args.lr_backbone, *options.listed(args.lr_classifier)])
    folder = default_folder(args, f"semisup-{args.train_percent}percent-{args.weights}-lr{rates}")
    run = Run(process, args, flags().kinds, run_files("semisup"), save_dir=folder, evaluate=args.evaluate)
    precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    choose = partial(subsets.labelled, percent=args.train_percent, seed=run.seed, file=args.subset_file)
    task = Classifier(run, args, precision, frozen=not finetune, choose=choose)
    if args.evaluate:
        return task.evaluate()
    heads = task.add_heads("--lr-classifier", args.lr_classifier)
    task.network.requires_grad_(finetune)
    heads.layers.requires_grad_(True)
    groups, weights = heads.groups(), heads.weights
    if finetune:
        inside = {id(weight) for weight in weights}
        backbone = [weight for weight in task.network.parameters() if id(weight) not in inside]
        groups.append({"params": backbone, "lr": args.lr_backbone, "weight_decay": args.weight_decay})
        weights = weights + backbone
        task.check_batch_norm()
    base = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum, fused=precision.fused)
    if args.write_subset and process.rank == 0:
        subsets.write_list(task.images, args.write_subset)  # before a run that --overwrite gives up is removed
    run.begin(
        task.batches,
        args.epochs * len(task.batches),
        {"state_dict": task.network, "optimizer": optimizer, "scaler": precision, "heads": heads},
        facts=task.facts(),
        identity=task.identity() | {"subset_sha256": subsets.digest(task.images)},
        rates=(*heads.rate_names, "lr_backbone"),
        # not `run`, which would be kept by itself
        results=lambda: {**task.results(), "scheduler": scheduler_state(base, task.run.epoch, args.epochs)},
    )
    if finetune != (args.lr_backbone > 0):
        effect = "the backbone's weights will not move" if finetune else "the backbone stays frozen"
        distributed.warn(f"--weights {args.weights} with --lr-backbone {args.lr_backbone:g}: {effect}")
    learner = distributed.parallel(heads.module, process.device)

    for epoch in run.epochs():
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * cosine(epoch, args.epochs)
        heads.module.train(finetune)
        for step in run.steps(epoch):
            images, labels = precision.place(step.batch)
            with precision.autocast():
                logits = learner(images)  # of each head (N, C)
            losses = heads.losses(logits, labels)  # (heads,)
            optimizer.zero_grad()
            norms = precision.backward(losses, optimizer, weights)
            precision.step(optimizer)
            heads.record(step, losses, norms, logits, labels)
        if not finetune and epoch in (run.first_epoch, args.epochs - 1):
            task.check_frozen()
        task.end_epoch(epoch)
    task.finish()


def cosine(epoch: int, epochs: int) -> float:
    """The part of the first learning rate that is left at this epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def scheduler_state(base: list[float], done: int, epochs: int) -> dict:
    """The published key `scheduler`: what torch's CosineAnnealingLR would hold after `done` epochs. base: the rates."""
    return {
        "T_max": epochs,
        "eta_min": 0.0,
        "base_lrs": base,
        "last_epoch": done,
        "_step_count": done + 1,
        "_last_lr": [lr * cosine(done, epochs) for lr in base],
    }


def flags() -> options.Parser:
    """The command line: `identity` is what a run is, `schedule` how it learns, `free` may change when it goes on."""
    parser = options.Parser(__doc__, normal="data --pretrained -a --train-percent --weights --epochs -b --lr-backbone "
                            "--lr-classifier --wd --amp --multiprocessing-distributed --save-dir --resume")  # fmt: skip
    identity, schedule, free = parser.identity, parser.schedule, parser.free
    options.add_data(parser)
    options.add_run(parser, epochs=100, batch_size=256, save_dir=None)
    for add in (options.add_classifier, options.add_skipping, options.add_distributed, options.add_speed):
        add(parser)
    with parser.group("data and network"):
        identity("--train-percent", default=100, type=int, choices=(1, 10, 100), help="of the labels")
        free("--subset-file", metavar="FILE", help="the images to train on: class/file or wnid_N.JPEG, one a line")
        free("--write-subset", metavar="FILE", help="write that list, as --subset-file reads it")
    with parser.group("method"):
        identity("--weights", default="freeze", choices=("freeze", "finetune"), help="train the last layer, or all")
    several = {"nargs": "+", "action": options.Several, "type": number(float, 0)}
    with parser.group("optimisation"):
        schedule("--lr-backbone", default=0.0, type=number(float, 0), help="the backbone's learning rate")
        rates = "the last layer's learning rate, or with --weights freeze several: a head for each, all in one pass"
        schedule("--lr-classifier", default=0.3, **several, help=rates)
        decay = {"dest": "weight_decay", "help": "weight decay, or several"}
        identity("--wd", "--weight-decay", default=1e-6, **several, **decay)
    return parser


def parse() -> argparse.Namespace:
    """The flags of the command line, checked."""
    args = flags().parse_args()
    check_flags(args)
    for flag, given in (("--lr-classifier", args.lr_classifier), ("--wd", args.weight_decay)):
        if args.weights == "finetune" and len(options.listed(given)) > 1:
            raise UserError(f"{flag} {' '.join(map(str, given))}: several go with --weights freeze alone")
    return args


main = partial(launch, train, parse)  # what synco-semisup calls where this is installed

if __name__ == "__main__":
    main()
