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

from synco import checkpoint, distributed, knn, loader, metrics, options, survival
from synco.builder import SynCo, fitting, torchvision_network, try_images
from synco.distributed import say
from synco.negatives import TYPES
from synco.options import Failure, UserError, number

# flags that may differ between a run and its continuation without a word
UNRELATED = options.UNRELATED | {"save_freq", "keep", "knn_freq", "knn_k", "counts"}
WITHIN = "checkpoint_step.pth.tar"  # where the run stands within an epoch; until that epoch's own is written


def parse():
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_run(parser, epochs=200, batch_size=256, save_dir="./")
    options.add_skipping(parser)
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
    path, saved = checkpoint.find(args, own_checkpoints(args), own=[])
    before = saved["config"] if saved else {}
    args.deterministic = args.seed is not None or before.get("deterministic") is True
    args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, path, before))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic

    batch = batch_of_each(args, process)
    batches, monitor, classes = load_data(args, process, batch, checkpoint.skipped(saved, path))
    steps, reader = len(batches), batches.dataset.reader
    changed = options.compare(before, args, path, UNRELATED)
    model = make_model(args, device)
    # both encoders' parameters, as in the published checkpoints; the key encoder's get no gradient and so do not move
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)

    start_epoch, start, averages = args.start_epoch, 0, metrics.Averages()
    if saved:
        start_epoch = checkpoint.resume(saved, path, model, optimizer, args.arch)
        start = checkpoint.position(saved, path, steps)
        checkpoint.resume_averages(saved, path, averages, process)
    if start_epoch * steps + start > args.epochs * steps:
        raise UserError(f"{path}: holds {start_epoch} epochs and --epochs is {args.epochs}")
    if process.rank == 0:
        checkpoint.prepare_folders(args, own_checkpoints(args), own=[], fresh=not path)
        describe(args, process, batch, steps, (start_epoch, start), path, before, changed)
    saved = None  # its memory
    log = metrics.Log(args.log_dir, steps_done=start_epoch * steps + start, active=process.rank == 0)

    learner = distributed.parallel(model, device)
    saves = survival.Saves(args.save_steps, args.save_minutes, args.dist_timeout)

    def evaluate(epoch):
        top1 = knn.accuracy(model.encoder_q, model.head, *monitor, device, classes=classes, k=args.knn_k)
        log.write("knn", epoch * steps, epoch=epoch, top1=top1)
        say(f"kNN after {epoch} epochs: {top1:.2f} %")

    def save(step, *, last=False):
        """After that many steps. last: of this run, which then cannot end as if all were well without it."""
        done, within = divmod(step, steps)
        name = WITHIN if within or not due_to_save(done, args) else f"checkpoint_{done - 1:04d}.pth.tar"
        state = averages.state(distributed.from_all)
        problem = ""
        if process.rank == 0:
            log.sync()
            content = {
                "epoch": done,
                "arch": args.arch,
                "state_dict": checkpoint.prefixed(model),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "steps_per_epoch": steps,
                "averages": state,
                "skipped": sorted(reader.known),
                "config": vars(args),
            }
            problem = checkpoint.try_to_save(content, os.path.join(args.save_dir, name))
            if not problem:
                prune(name, args)
        saves.done()
        if last:
            problem = distributed.from_rank_0(problem)
            if problem:
                raise Failure(problem)
            saves.together()
        return name

    def stop(step):
        """Save and leave, because the run was told to."""
        name = save(step, last=True)
        if process.rank == 0:
            checkpoint.leave_marker(args, survival.warned(), step, name)
        raise survival.Preempted(
            f"told to stop: {os.path.join(args.save_dir, name)} holds {step} steps; --resume goes on"
        )

    def after_step(epoch, i, finite, lr):
        """Save or stop if that is due, between two steps or at an epoch's end."""
        step, at_end = epoch * steps + i + 1, i == steps - 1
        due = saves.after(step, news=reader.news(), at_once=at_end)
        if due.news:
            reader.exchange()
        if due.save and not (at_end and due_to_save(epoch + 1, args)):
            check_finite(finite, batches, epoch, i, lr, args)
            if due.stop:
                stop(step)
            save(step)

    due = args.knn_freq and (start_epoch % args.knn_freq == 0 or start_epoch == args.epochs) and not start
    if due and not distributed.from_rank_0(log.holds("knn", start_epoch)):
        evaluate(start_epoch)
    for epoch in range(start_epoch, args.epochs):
        batches.batch_sampler.set_epoch(epoch, start)
        lr = learning_rate(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with reader.watched():
            train(batches, learner, model, optimizer, averages, epoch, start, steps, lr, log, process, args, after_step)
        done, start = epoch + 1, 0
        if due_to_save(done, args):
            if saves.stopping and done < args.epochs:
                stop(done * steps)
            save(done * steps, last=done == args.epochs)
        if args.knn_freq and (done % args.knn_freq == 0 or done == args.epochs):
            evaluate(done)
    log.close()
    reader.tell()
    say(f"Done. Checkpoints: {args.save_dir}  Logs: {args.log_dir}")


def due_to_save(done, args):
    """Whether the checkpoint of an epoch is written: after `done` epochs."""
    return done % args.save_freq == 0 or done == args.epochs


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


def load_data(args, process, batch, skipped):
    """(training batches, kNN's (bank, queries) or None, number of classes). skipped: numbers of bad images."""
    images = loader.image_folder(args.data, "train")
    step = batch * process.world_size
    if len(images) < step:
        raise UserError(f"--batch-size {args.batch_size}: a step takes {step} images, {images.root} has {len(images)}")
    args.processes, args.global_batch, args.train_images = process.world_size, step, len(images)
    load = {"process": process, "workers": loader.workers_each(args.workers, process.local_size)}
    load["timeout"] = args.worker_timeout
    reader = loader.Reader(images, args.skip_bad_images, skipped)
    pairs = loader.TwoCrops(reader, loader.augmentation(args.img_size, args.aug_plus, args.blur), args.seed)
    batches = loader.train_loader(pairs, batch, seed=args.seed, **load)
    if not args.knn_freq:
        return batches, None, len(images.classes)

    val = loader.image_folder(args.data, "val")
    loader.same_classes(images, val, args.data)
    bank = copy.copy(images)  # the same index, other views
    bank.transform = val.transform = loader.center_view(args.img_size)
    monitor = [loader.eval_loader(part, batch, **load) for part in (loader.Readable(bank, reader), val)]
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


def train(batches, learner, model, optimizer, averages, epoch, start, steps, lr, log, process, args, after_step):
    """One epoch from step `start` on. Numbers are read back from the device at print steps and saves only."""
    device, first = process.device, epoch * steps
    pace, finite = metrics.Pace(), metrics.Finite(device)
    for i, (im_q, im_k, _) in pace.watch(batches, start):
        im_q, im_k = (im.to(device, non_blocking=True) for im in (im_q, im_k))
        if first + i == 0:
            log.images("pairs", pair_grid(im_q, im_k) if process.rank == 0 else None, 0)

        # what a network with dropout draws is a function of the step, too
        torch.manual_seed(distributed.seed_of("dropout", args.seed, first + i, process.rank))
        logits, labels = learner(im_q, im_k, epoch + i / steps, step=first + i)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        bad = finite.watch(i, loss, model.encoder_q.parameters())
        optimizer.step()

        averages.add(loss=loss, bad=bad, **metrics.contrastive_accuracy(logits, args.moco_k))
        if i % args.print_freq == 0 or i == steps - 1:
            numbers = averages.read(distributed.mean)
            if numbers.pop("bad"):
                check_finite(finite, batches, epoch, i, lr, args)
            numbers |= {"lr": lr, **pace.read(process.world_size)}
            if process.rank == 0:
                counts = dict(zip(TYPES, model.counts_at(epoch + i / steps)))
                left = pace.left((args.epochs - epoch) * steps - i - 1)
                report(log, numbers, logits.detach(), counts, epoch, i, steps, left, args)
        after_step(epoch, i, finite, lr)


def check_finite(finite, batches, epoch, i, lr, args):
    """Raise FloatingPointError that says where the loss or its gradient stopped being finite, if it did."""
    checkpoint.check_finite(finite, batches, epoch, i, f"lr {lr:g}", own_checkpoints(args), args.save_dir)


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


def own_checkpoints(args):
    """The checkpoints in --save-dir, oldest first."""
    within = os.path.join(args.save_dir, WITHIN)
    return [path for _, path in checkpoint.numbered(args.save_dir)] + [within] * os.path.exists(within)


def prune(written, args):
    """After a checkpoint of that name is safe, remove those that are not needed any more."""
    within = os.path.join(args.save_dir, WITHIN)
    if written != WITHIN and os.path.exists(within):
        os.remove(within)
    if args.keep:
        for _, path in checkpoint.numbered(args.save_dir)[: -args.keep]:
            os.remove(path)


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


def describe(args, process, batch, steps, position, path, before, changed):
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
        checkpoint.tell_resumed(path, position, process, before, changed)
        if position[0] == args.epochs:  # nothing left to train: config.json stays what it says of the run
            return
    metrics.write_json(os.path.join(args.save_dir, "config.json"), vars(args) | facts | metrics.origin())


def pair_grid(im_q, im_k, pairs=8):
    """The first query views above their key views, as one picture (3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (loader.IMAGENET_MEAN, loader.IMAGENET_STD))
    views = torch.cat([im_q[:pairs], im_k[:pairs]]).cpu() * std + mean
    return torchvision.utils.make_grid(views.clamp(0, 1), nrow=min(pairs, len(im_q)))


if __name__ == "__main__":
    distributed.launch(run, parse)
