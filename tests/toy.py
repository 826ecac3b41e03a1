"""The smallest program around a `Run`: a linear network on small images, started as the scripts are.

It has no evaluation: with --best the epoch's number is its accuracy, so that each epoch is the best so far.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from synco import augment, datasets, loader, options
from synco.folder import RunFiles
from synco.options import number
from synco.precision import Precision
from synco.run import Run

SIDE = 6
REQUIRED = ("epoch", "arch", "optimizer")
# as a pretraining's and as a classifier's
NUMBERED = RunFiles(
    kind="toy",
    required=REQUIRED,
    epoch="checkpoint_{:04}.pth.tar",
    within="checkpoint_step.pth.tar",
    best="model_best_toy.pth.tar",
)
ONE = RunFiles(
    kind="toy",
    required=REQUIRED,
    epoch="checkpoint_toy.pth.tar",
    within="checkpoint_toy_step.pth.tar",
    best="model_best_toy.pth.tar",
    results=("result.json",),
)


def loss_of(logits, labels, step):
    """A step's loss; a test may put another in its place."""
    return F.cross_entropy(logits, labels)


def run(process, args):
    """One process of a run."""
    one = not args.save_freq
    run = Run(process, args, flags().kinds, ONE if one else NUMBERED)
    precision = Precision(process.device)
    reader = loader.Reader(datasets.image_folder(args.data, "train"), args.skip_bad_images)
    views = loader.Augmented(reader, augment.classifier_augmentation(SIDE), run.seed)
    batches = loader.train_loader(views, args.batch_size, process=process, workers=0, seed=run.seed)
    torch.manual_seed(run.seed)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * SIDE**2, 3))
    optimizer = torch.optim.SGD(network.parameters(), args.lr, momentum=0.9)
    best = []
    run.begin(
        batches,
        total=args.steps or args.epochs * len(batches),
        state={"state_dict": network, "optimizer": optimizer, "scaler": precision},
        facts={"network": "linear"},
        save_freq=None if one else args.save_freq,
        results=lambda: {"best": list(best)},
    )
    for epoch in run.epochs():
        for step in run.steps(epoch):
            images, labels = step.batch
            logits = network(images)
            loss = loss_of(logits, labels, step)
            optimizer.zero_grad()
            norm = precision.backward(loss, optimizer, list(network.parameters()))
            optimizer.step()
            step.record(loss, norm, noise=torch.rand(()))
            if step.prints:
                step.note(largest=logits.detach().max())
        if args.best:
            if not run.is_logged("val", epoch + 1):
                run.log("val", epoch=epoch + 1, top1=float(epoch))
            best[:] = [epoch]
            run.save_best()
        run.end_epoch(epoch)
    run.finish()


def flags():
    """The command line, with the kinds of its flags."""
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_run(parser, epochs=3, batch_size=8, save_dir="./", steps=True)
    options.add_skipping(parser)
    options.add_distributed(parser)
    parser.schedule("--lr", default=0.1, type=number(float, 0))
    parser.free("--save-freq", default=1, type=number(int, 0))
    parser.free("--keep", default=0, type=number(int, 0))
    parser.free("--best", action="store_true")
    return parser


def parse():
    """The flags of the command line, checked."""
    args = flags().parse_args()
    options.check_run(args)
    return args
