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

import torch

from synco import distributed, options
from synco.options import UserError, number
from synco.trial import Trial, check_flags


def parse():
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_run(parser, epochs=100, batch_size=256, save_dir=None)
    options.add_classifier(parser)
    options.add_skipping(parser)
    options.add_distributed(parser)
    options.add_speed(parser)
    flag = parser.add_argument
    flag("--lr", "--learning-rate", default=30.0, type=number(float, 0), help="learning rate")
    flag("--schedule", default=[60, 80], nargs="*", type=number(int, 0), help="epochs that divide the lr by 10")
    flag("--cos", action="store_true", help="cosine schedule in place of --schedule")
    flag("--lr-min", default=0.0, type=number(float, 0), help="with --cos: where the learning rate ends")
    flag("--wd", "--weight-decay", default=0.0, type=number(float, 0), dest="weight_decay", help="weight decay")
    args = parser.parse_args()
    check_flags(args)
    if args.lr_min and not args.cos:
        raise UserError(f"--lr-min {args.lr_min:g} goes with --cos")
    return args


def run(process, args):
    trial = Trial(process, args, "lincls", f"lincls-lr{args.lr:g}")
    trial.read_images()
    network, last_layer = trial.make_network()
    network.eval().requires_grad_(False)  # for good: BatchNorm's running statistics are part of the backbone
    last_layer.requires_grad_(True)
    optimizer = torch.optim.SGD(
        last_layer.parameters(),
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=trial.precision.fused,
    )
    trial.begin(optimizer)
    if args.evaluate:
        return trial.evaluate()

    learner = distributed.parallel(network, process.device)
    for epoch in range(trial.start_epoch, args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args)
        trial.train(learner, optimizer, epoch)
        if epoch in (trial.start_epoch, args.epochs - 1):
            trial.check_frozen()
        trial.conclude(epoch, optimizer)
    trial.finish()


def learning_rate(epoch, args):
    """Per epoch: cosine to --lr-min, or a tenth at each milestone."""
    if args.cos:
        return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


if __name__ == "__main__":
    distributed.launch(run, parse)
