#!/usr/bin/env python3
"""Linear probe: a linear classifier on the frozen features of a backbone (MoCo's protocol, arXiv 1911.05722).

On all GPUs of this machine, in the published settings:

  python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained FOLDER/checkpoint_0199.pth.tar \\
    --multiprocessing-distributed --world-size 1 --rank 0 IMAGENET

What the same network reaches without pretraining, on one GPU or a CPU (torchrun --nproc-per-node N works too):

  python main_lincls.py -a resnet18 --img-size 32 --epochs 10 --schedule 6 8 --pretrained random FOLDER

DATA holds train/CLASS/IMAGE and val/CLASS/IMAGE. Writes checkpoint_lincls.pth.tar (the last epoch),
model_best_lincls.pth.tar, result.json, per_class.csv, config.json, log.jsonl and TensorBoard files.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from synco import distributed, metrics, options
from synco.classifier import Classifier, check_flags, run_files
from synco.errors import UserError
from synco.folder import default_folder
from synco.launch import launch
from synco.options import number
from synco.precision import Precision
from synco.run import Run


def probe(process: distributed.Process, args) -> None:
    """One process of a linear probe."""
    folder = default_folder(args, f"lincls-lr{args.lr:g}")
    run = Run(process, args, flags().kinds, run_files("lincls"), save_dir=folder, evaluate=args.evaluate)
    precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    task = Classifier(run, args, precision, frozen=True)
    if args.evaluate:
        return task.evaluate()
    network, last_layer = task.network, task.last_layer
    network.eval().requires_grad_(False)  # for good: BatchNorm's running statistics are part of the backbone
    last_layer.requires_grad_(True)
    weights = list(last_layer.parameters())
    optimizer = torch.optim.SGD(
        weights, args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=precision.fused
    )
    run.begin(
        task.batches,
        args.epochs * len(task.batches),
        {"state_dict": network, "optimizer": optimizer, "scaler": precision},
        facts=task.facts(),
        identity=task.identity(),
        results=task.results,
    )
    learner = distributed.parallel(network, process.device)

    for epoch in run.epochs():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args)
        for step in run.steps(epoch):
            images, labels = precision.place(step.batch)
            with precision.autocast():
                logits = learner(images)  # (N, C)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            norm = precision.backward(loss, optimizer, weights)
            precision.step(optimizer)
            step.record(loss, norm, **metrics.accuracy(logits, labels))
        if epoch in (run.first_epoch, args.epochs - 1):
            task.check_frozen()
        task.end_epoch(epoch)
    task.finish()


def learning_rate(epoch: int, args) -> float:
    """Per epoch: cosine to --lr-min, or a tenth at each milestone."""
    if args.cos:
        return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def flags() -> options.Parser:
    """The command line: `identity` is what a run is, `schedule` how it learns, `free` may change when it goes on."""
    parser = options.Parser(__doc__)
    identity, schedule = parser.identity, parser.schedule
    options.add_data(parser)
    options.add_run(parser, epochs=100, batch_size=256, save_dir=None)
    options.add_classifier(parser)
    options.add_skipping(parser)
    options.add_distributed(parser)
    options.add_speed(parser)
    schedule("--lr", "--learning-rate", default=30.0, type=number(float, 0), help="learning rate")
    schedule("--schedule", default=[60, 80], nargs="*", type=number(int, 0), help="epochs that divide the lr by 10")
    schedule("--cos", action="store_true", help="cosine schedule in place of --schedule")
    schedule("--lr-min", default=0.0, type=number(float, 0), help="with --cos: where the learning rate ends")
    identity("--wd", "--weight-decay", default=0.0, type=number(float, 0), dest="weight_decay", help="weight decay")
    return parser


def parse():
    """The flags of the command line, checked."""
    args = flags().parse_args()
    check_flags(args)
    if args.lr_min and not args.cos:
        raise UserError(f"--lr-min {args.lr_min:g} goes with --cos")
    return args


main = partial(launch, probe, parse)  # what synco-lincls calls where this is installed

if __name__ == "__main__":
    main()
