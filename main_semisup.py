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

import math

import torch

from synco import distributed, options, subsets
from synco.options import number
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
    flag("--train-percent", default=100, type=int, choices=(1, 10, 100), help="of the labels")
    flag("--subset-file", metavar="FILE", help="list of the images to train on: class/file or wnid_N.JPEG, one a line")
    flag("--write-subset", metavar="FILE", help="write that list, as --subset-file reads it")
    flag("--weights", default="freeze", choices=("freeze", "finetune"), help="train the last layer alone, or all")
    flag("--lr-backbone", default=0.0, type=number(float, 0), help="the backbone's learning rate")
    flag("--lr-classifier", default=0.3, type=number(float, 0), help="the last layer's learning rate")
    flag("--wd", "--weight-decay", default=1e-6, type=number(float, 0), dest="weight_decay", help="weight decay")
    args = parser.parse_args()
    check_flags(args)
    return args


def run(process, args):
    finetune = args.weights == "finetune"
    rates = f"lr{args.lr_backbone:g}-{args.lr_classifier:g}"
    trial = Trial(process, args, "semisup", f"semisup-{args.train_percent}percent-{args.weights}-{rates}")
    trial.read_images(lambda images: labelled(images, args))
    network, last_layer = trial.make_network()
    network.requires_grad_(finetune)
    last_layer.requires_grad_(True)
    groups = [{"params": list(last_layer.parameters()), "lr": args.lr_classifier}]
    if finetune:
        inside = {id(parameter) for parameter in last_layer.parameters()}
        backbone = [parameter for parameter in network.parameters() if id(parameter) not in inside]
        groups.append({"params": backbone, "lr": args.lr_backbone})
        trial.check_batch_norm()
    optimizer = torch.optim.SGD(
        groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=trial.precision.fused
    )
    trial.begin(optimizer)
    if args.evaluate:
        return trial.evaluate()
    if args.write_subset and process.rank == 0:
        subsets.write_list(trial.train_images, args.write_subset)
    if finetune != (args.lr_backbone > 0):
        effect = "the backbone's weights will not move" if finetune else "the backbone stays frozen"
        distributed.warn(f"--weights {args.weights} with --lr-backbone {args.lr_backbone:g}: {effect}")

    learner = distributed.parallel(network, process.device)
    for epoch in range(trial.start_epoch, args.epochs):
        for group, lr in zip(optimizer.param_groups, (args.lr_classifier, args.lr_backbone)):
            group["lr"] = lr * cosine(epoch, args.epochs)
        network.train(finetune)
        trial.train(learner, optimizer, epoch, scheduler=scheduler_state(args, epoch))
        if not finetune and epoch in (trial.start_epoch, args.epochs - 1):
            trial.check_frozen()
        trial.conclude(epoch, optimizer, scheduler=scheduler_state(args, epoch + 1))
    trial.finish()


def labelled(images, args):
    """The part of the training images whose labels are used."""
    part, source = subsets.subset(images, args.train_percent, args.seed, args.subset_file)
    args.subset_sha256 = subsets.digest(part)
    distributed.say(f"{'labels':18} {len(part)} of {len(images)} images: {source}")
    return part


def cosine(epoch, epochs):
    """The part of the first learning rate that is left at this epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def scheduler_state(args, done):
    """The published key `scheduler`: what torch's CosineAnnealingLR would hold after that many epochs."""
    rates = [args.lr_classifier] + [args.lr_backbone] * (args.weights == "finetune")
    return {
        "T_max": args.epochs,
        "eta_min": 0.0,
        "base_lrs": rates,
        "last_epoch": done,
        "_step_count": done + 1,
        "_last_lr": [lr * cosine(done, args.epochs) for lr in rates],
    }


if __name__ == "__main__":
    distributed.launch(run, parse)
