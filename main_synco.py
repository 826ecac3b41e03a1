#!/usr/bin/env python3
"""Pretrain an encoder with SynCo: MoCo v2 and synthetic hard negatives (arXiv 2410.02401).

On all GPUs of this machine, in the published settings:

  python main_synco.py -a resnet50 --lr 0.03 --batch-size 256 --multiprocessing-distributed --world-size 1 --rank 0 \\
    --mlp --moco-t 0.2 --aug-plus --cos --save-dir runs/synco IMAGENET

On one GPU, or on a CPU for trying it out (torchrun --nproc-per-node N works too):

  python main_synco.py -a resnet18 --img-size 32 --epochs 5 --warmup-epochs 1 -b 128 --moco-k 4096 --n-hard 64 \\
    --n1 16 --n2 16 --n3 16 --n4 4 --n5 4 --n6 4 --mlp --moco-t 0.2 --aug-plus --cos \\
    --knn-freq 1 --save-dir runs/try FOLDER

DATA holds train/CLASS/IMAGE and, for --knn-freq, val/CLASS/IMAGE. Writes checkpoint_0000.pth.tar ..., config.json,
log.jsonl and TensorBoard files.
"""

import copy
import math
import os

import torch
import torch.nn.functional as F
import torchvision

from synco import checkpoint, distributed, knn, loader, metrics, options
from synco.builder import SynCo, fitting, torchvision_network, try_images
from synco.distributed import say
from synco.negatives import TYPES
from synco.options import UserError, number

# flags that may differ between a run and its continuation without a word
UNRELATED = options.UNRELATED | {"save_freq", "keep", "knn_freq", "knn_k", "counts"}


def parse():
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_run(parser, epochs=200, batch_size=256, save_dir="./")
    options.add_distributed(parser)
    flag = parser.add_argument
    flag("--lr", "--learning-rate", default=0.03, type=number(float, 0), help="learning rate")
    flag("--schedule", default=[120, 160], nargs="*", type=number(int, 0), help="epochs that divide the lr by 10")
    flag("--cos", action="store_true", help="cosine schedule in place of --schedule")
    flag("--momentum", default=0.9, type=number(float, 0), help="momentum of SGD")
    flag("--wd", "--weight-decay", default=1e-4, type=number(float, 0), dest="weight_decay", help="weight decay")
    flag("--aug-plus", action="store_true", help="MoCo v2's augmentation in place of v1's")
    flag("--blur", action="store_true", help="with --aug-plus: blur crops below 64 pixels too")
    flag("--save-freq", default=1, type=number(int, 1), help="epochs between checkpoints; the last is always written")
    flag("--keep", default=0, type=number(int, 0), help="how many numbered checkpoints stay; 0: all")
    flag("--knn-freq", default=0, type=number(int, 0), help="epochs between kNN evaluations, train vs. val; 0: none")
    flag("--knn-k", default=200, type=number(int, 1), help="neighbours that vote; at most all")
    flag("--sync-bn", action="store_true", help="BatchNorm statistics over all GPUs")
    flag("--bn-splits", default=1, type=number(int, 1), help="BatchNorm in that many splits, which stand in for GPUs")

    flag("--moco-dim", default=128, type=number(int, 1), help="width of the embedding")
    flag("--moco-k", default=65536, type=number(int, 1), help="rows of the queue")
    flag("--moco-m", default=0.999, type=number(float, 0, 1), help="momentum of the key encoder")
    flag("--moco-t", default=0.07, type=number(float, above=0), help="temperature")
    flag("--mlp", action="store_true", help="two-layer head, as in MoCo v2")

    flag("--n-hard", default=1024, type=number(int, 1), help="hardest queue rows to draw from")
    for i, (name, count) in enumerate(zip(TYPES, (256, 256, 256, 64, 64, 64)), 1):
        flag(f"--n{i}", default=count, type=number(int, 0), help=f"{name} negatives a query")
    flag("--alpha", default=0.5, type=number(float, high=1, above=0), help="type 1: weight of the query ~ U(0, alpha)")
    flag("--beta", default=1.5, type=number(float, above=1), help="type 2: extrapolation ~ U(1, beta)")
    flag("--gamma", default=1.0, type=number(float, high=1, above=0), help="type 3: weight of a row ~ U(0, gamma)")
    flag("--sigma", default=0.01, type=number(float, 0), help="type 4: standard deviation of the noise")
    flag("--delta", default=0.01, type=number(float, 0), help="type 5: step along the similarity's gradient")
    flag("--eta", default=0.01, type=number(float, 0), help="type 6: step along the gradient's sign")
    flag("--warmup-epochs", default=10, type=number(int, 0), help="first epochs without synthesis")
    flag("--cooldown-epochs", default=0, type=number(int, 0), help="last epochs without synthesis")

    args = parser.parse_args()
    args.log_dir = args.log_dir or args.save_dir
    args.counts = {name: getattr(args, f"n{i}") for i, name in enumerate(TYPES, 1)}
    if any(args.counts.values()) and args.n_hard > args.moco_k:
        raise UserError(f"--n-hard {args.n_hard} is larger than the queue: --moco-k is {args.moco_k}")
    if args.sync_bn and args.bn_splits > 1:
        raise UserError(f"--sync-bn and --bn-splits {args.bn_splits} contradict each other")
    options.check_run(args)
    return args


def run(process, args):
    device = process.device
    path, saved = find_checkpoint(args)
    before = saved["config"] if saved else {}
    args.deterministic = args.seed is not None or before.get("deterministic") is True
    args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, path, before))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic

    batch = batch_of_each(args, process)
    batches, monitor, classes = load_data(args, process, batch)
    steps = len(batches)
    model = make_model(args, device)
    # both encoders' parameters, as in the published checkpoints; the key encoder's get no gradient and so do not move
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)

    start_epoch = checkpoint.resume(saved, path, model, optimizer, args.arch) if saved else args.start_epoch
    if start_epoch > args.epochs:
        raise UserError(f"{path}: holds {start_epoch} epochs and --epochs is {args.epochs}")
    if process.rank == 0:
        checkpoint.prepare_folders(args, own_checkpoints(args), own=[], fresh=not path)
        describe(args, process, batch, steps, start_epoch, path, before)
    saved = None  # its memory
    log = metrics.Log(args.log_dir, steps_done=start_epoch * steps, active=process.rank == 0)

    learner = distributed.parallel(model, device)

    def evaluate(epoch):
        top1 = knn.accuracy(model.encoder_q, model.head, *monitor, device, classes=classes, k=args.knn_k)
        log.write("knn", epoch * steps, epoch=epoch, top1=top1)
        say(f"kNN after {epoch} epochs: {top1:.2f} %")

    due = args.knn_freq and (start_epoch % args.knn_freq == 0 or start_epoch == args.epochs)
    if due and not distributed.from_rank_0(log.holds("knn", start_epoch)):
        evaluate(start_epoch)
    for epoch in range(start_epoch, args.epochs):
        batches.batch_sampler.sampler.set_epoch(epoch)
        lr = learning_rate(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        train(batches, learner, model, optimizer, epoch, steps, lr, log, process, args)
        done = epoch + 1
        if process.rank == 0 and (done % args.save_freq == 0 or done == args.epochs):
            save(model, optimizer, done, done * steps, args)
        if args.knn_freq and (done % args.knn_freq == 0 or done == args.epochs):
            evaluate(done)
    log.close()
    say(f"Done. Checkpoints: {args.save_dir}  Logs: {args.log_dir}")


def batch_of_each(args, process):
    """How many images a process takes in a step: its share of --batch-size, which is that of a node."""
    if args.sync_bn and process.device.type == "cpu":
        raise UserError("--sync-bn needs GPUs, and this machine has none")
    batch = loader.batch_each(args.batch_size, process.local_size)
    if batch % args.bn_splits or batch // args.bn_splits < 2:
        raise UserError(
            f"--batch-size {args.batch_size} --bn-splits {args.bn_splits}: the {batch} images of a process "
            "do not divide into equal splits of at least 2"
        )
    if args.moco_k < batch * process.world_size:
        raise UserError(f"--moco-k {args.moco_k} is smaller than the {batch * process.world_size} keys of a step")
    return batch


def load_data(args, process, batch):
    """(training batches, kNN's (bank, queries) or None, number of classes)."""
    images = loader.image_folder(args.data, "train")
    step = batch * process.world_size
    if len(images) < step:
        raise UserError(f"--batch-size {args.batch_size}: a step takes {step} images, {images.root} has {len(images)}")
    workers = loader.workers_each(args.workers, process.local_size)
    pairs = loader.TwoCrops(images, loader.augmentation(args.img_size, args.aug_plus, args.blur), args.seed)
    batches = loader.train_loader(pairs, batch, process=process, workers=workers, seed=args.seed)
    if not args.knn_freq:
        return batches, None, len(images.classes)

    val = loader.image_folder(args.data, "val")
    loader.same_classes(images, val, args.data)
    bank = copy.copy(images)  # the same index, other views
    bank.transform = val.transform = loader.center_view(args.img_size)
    monitor = [loader.eval_loader(part, batch, process=process, workers=workers) for part in (bank, val)]
    return batches, monitor, len(images.classes)


def make_model(args, device):
    """The model on its device; sees that the network takes images of --img-size."""
    torch.manual_seed(args.seed)  # the same start in every process
    with fitting(args.arch, args.img_size):
        model = SynCo(
            torchvision_network(args.arch, args.img_size),
            args.moco_dim,
            args.moco_k,
            args.moco_m,
            args.moco_t,
            args.mlp,
            n_hard=args.n_hard,
            **{f"n{i}": getattr(args, f"n{i}") for i in range(1, 7)},
            **{name: getattr(args, name) for name in ("alpha", "beta", "gamma", "sigma", "delta", "eta")},
            warmup_epochs=args.warmup_epochs,
            stop_epoch=args.epochs - args.cooldown_epochs,
            bn_splits=args.bn_splits,
            seed=args.seed,
        )
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()):
            raise UserError(f"--sync-bn: {args.arch} has no BatchNorm")
    model.to(device).eval()
    try_images(model.encoder_q, args.arch, args.img_size)
    return model.train()


def train(batches, learner, model, optimizer, epoch, steps, lr, log, process, args):
    """One epoch. Numbers are read back from the device at print steps only."""
    device, first = process.device, epoch * steps
    averages, pace, printed = metrics.Averages(), metrics.Pace(), -1
    for i, (im_q, im_k, _) in pace.watch(batches):
        im_q, im_k = (im.to(device, non_blocking=True) for im in (im_q, im_k))
        if first + i == 0:
            log.images("pairs", pair_grid(im_q, im_k) if process.rank == 0 else None, 0)

        # what a network with dropout draws is a function of the step, too
        torch.manual_seed(distributed.seed_of("dropout", args.seed, first + i, process.rank))
        logits, labels = learner(im_q, im_k, epoch + i / steps, step=first + i)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        averages.add(loss=loss, **metrics.contrastive_accuracy(logits, args.moco_k))
        if i % args.print_freq == 0 or i == steps - 1:
            numbers = averages.read(distributed.mean)
            if not math.isfinite(numbers["loss"]):
                saved = own_checkpoints(args)
                raise FloatingPointError(
                    f"the loss is {numbers['loss']} between steps {printed + 1} and {i} of epoch {epoch} (lr {lr:g}); "
                    f"last good checkpoint: {saved[-1] if saved else 'none'}"
                )
            printed = i
            numbers |= {"lr": lr, **pace.read(process.world_size)}
            if process.rank == 0:
                counts = dict(zip(TYPES, model.counts_at(epoch + i / steps)))
                left = pace.left((args.epochs - epoch) * steps - i - 1)
                report(log, numbers, logits.detach(), counts, epoch, i, steps, left, args)


def report(log, numbers, logits, counts, epoch, i, steps, left, args):
    """A progress line, and the same numbers with the negatives' hardness as a log line."""
    print(
        f"Epoch {epoch} [{i + 1:{len(str(steps))}}/{steps}]  loss {numbers['loss']:.4f}  acc@1 {numbers['acc1']:5.2f}  "
        f"acc@5 {numbers['acc5']:5.2f}  real acc@1 {numbers['acc1_real']:5.2f}  "
        f"{numbers['images_per_second']:.0f} images/s  data {numbers['data_share']:.0%}  ETA {left}",
        flush=True,
    )
    found = metrics.hardness(logits, counts, K=args.moco_k, T=args.moco_t, n_hard=args.n_hard)
    values = torch.stack([v for pair in found.values() for v in pair]).tolist()
    names = [f"{what}/{name}" for name in found for what in ("similarity", "mass")]
    log.write("train", epoch * steps + i + 1, epoch=epoch, **numbers, **dict(zip(names, values)))


def learning_rate(epoch, args):
    """MoCo's rule, per epoch: cosine to 0, or a tenth at each milestone."""
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def find_checkpoint(args):
    """What --resume asks for: (path, the loaded checkpoint), or (None, None) for a fresh start."""
    path = distributed.from_rank_0(
        checkpoint.resume_path(args, own_checkpoints(args), own=[]) if distributed.rank() == 0 else None
    )
    return (path, checkpoint.load(path)) if path else (None, None)


def own_checkpoints(args):
    """The checkpoints in --save-dir, oldest first."""
    return [path for _, path in checkpoint.numbered(args.save_dir)]


def method(args):
    """The method in words."""
    if not any(args.counts.values()):
        return "MoCo (no synthetic negatives)"
    kinds = ", ".join(f"{count} {name}" for name, count in args.counts.items() if count)
    mochi = not any(args.counts[name] for name in TYPES if name not in ("interpolated", "mixed"))
    end = args.epochs - args.cooldown_epochs
    when = f"in epochs {args.warmup_epochs} to {end - 1}"
    if end <= args.warmup_epochs:
        when = "in no epoch: all are warm-up or cool-down"
    return (
        f"{'MoCHi' if mochi else 'SynCo'}: {sum(args.counts.values())} synthetic negatives a query ({kinds}), "
        f"made from the {args.n_hard} hardest of {args.moco_k} queue rows, {when}"
    )


def describe(args, process, batch, steps, start_epoch, path, before):
    """Print what is about to run, and store it as config.json."""
    facts = {
        "method": method(args),
        "device": metrics.device_name(process.device),
        "world_size": process.world_size,
        "batch_per_process": batch,
        "global_batch": batch * process.world_size,
        "steps_per_epoch": steps,
        "seed": args.seed,
    }
    metrics.tell(facts)
    if path:
        metrics.tell({"resumed": f"{path}, {start_epoch} epochs done"})
        changed = options.changed(before, args, UNRELATED)
        if changed:
            metrics.tell({"changed": "; ".join(changed)})
        if start_epoch == args.epochs:  # nothing left to train: config.json stays what it says of the run
            return
    metrics.write_json(os.path.join(args.save_dir, "config.json"), vars(args) | facts | metrics.origin())


def save(model, optimizer, done, step, args):
    """The published names and keys, and the settings beside them; then prune what --keep does not keep."""
    content = {
        "epoch": done,
        "arch": args.arch,
        "state_dict": checkpoint.prefixed(model),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": vars(args),
    }
    checkpoint.save(content, os.path.join(args.save_dir, f"checkpoint_{done - 1:04d}.pth.tar"))
    if args.keep:
        for path in own_checkpoints(args)[: -args.keep]:
            os.remove(path)


def pair_grid(im_q, im_k, pairs=8):
    """The first query views above their key views, as one picture (3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (loader.IMAGENET_MEAN, loader.IMAGENET_STD))
    views = torch.cat([im_q[:pairs], im_k[:pairs]]).cpu() * std + mean
    return torchvision.utils.make_grid(views.clamp(0, 1), nrow=min(pairs, len(im_q)))


if __name__ == "__main__":
    distributed.launch(run, parse)
