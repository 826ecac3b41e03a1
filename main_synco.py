#!/usr/bin/env python3
"""Pretrain an encoder with SynCo: MoCo v2 and synthetic hard negatives (arXiv 2410.02401).

On all GPUs of this machine, in the published settings:

  python main_synco.py -a resnet50 --lr 0.03 --batch-size 256 --multiprocessing-distributed --world-size 1 --rank 0 \\
    --mlp --moco-t 0.2 --aug-plus --cos --save-dir runs/synco IMAGENET

On one GPU, or on a CPU for trying it out (torchrun --nproc-per-node N works too):

  python main_synco.py -a resnet18 --img-size 32 --epochs 5 --warmup-epochs 1 -b 128 --moco-k 4096 --n-hard 64 \\
    --n1 16 --n2 16 --n3 16 --n4 4 --n5 4 --n6 4 --mlp --moco-t 0.2 --aug-plus --cos \\
    --knn-freq 1 --save-dir runs/try FOLDER

DATA holds train/CLASS/IMAGE and, for --knn-freq, val/CLASS/IMAGE; or it is where the data set lies that --dataset
names (and --download fetches). Writes checkpoint_0000.pth.tar ..., config.json,
log.jsonl and TensorBoard files.
"""

import itertools
import math
import os

import torch
import torch.nn.functional as F
import torchvision

from synco import augment, checkpoint, datasets, distributed, knn, loader, metrics, options, survival
from synco.builder import SynCo, fitting, network_of, try_images
from synco.distributed import say
from synco.negatives import TYPES
from synco.options import Failure, UserError, number
from synco.precision import Precision, compile_encoders

BEST = "model_best_knn.pth.tar"
WITHIN = "checkpoint_step.pth.tar"  # where the run stands within an epoch; until that epoch's own is written
# flags that may differ between a run and its continuation without a word
UNRELATED = options.UNRELATED | {"save_freq", "keep", "knn_freq", "knn_k", "knn_train", "save_best", "counts"}


def parse():
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_run(parser, epochs=200, batch_size=256, save_dir="./", steps=True)
    options.add_skipping(parser)
    options.add_distributed(parser)
    options.add_speed(parser)
    flag = parser.add_argument
    flag("--lr", "--learning-rate", default=0.03, type=number(float, 0), help="learning rate")
    flag("--schedule", default=[120, 160], nargs="*", type=number(int, 0), help="epochs that divide the lr by 10")
    flag("--cos", action="store_true", help="cosine schedule in place of --schedule")
    flag("--lr-min", default=0.0, type=number(float, 0), help="what the cosine ends at")
    flag("--lr-warmup-epochs", default=0, type=options.length, help="first epochs (or steps: 2500s) of linear warm-up")
    flag("--lr-warmup", default=0.0, type=number(float, 0), help="what the linear warm-up starts from")
    flag("--optimizer", default="sgd", choices=("sgd", "adamw"), help="adamw: no decay on norms and biases")
    flag("--momentum", default=0.9, type=number(float, 0), help="momentum of SGD")
    flag("--wd", "--weight-decay", default=1e-4, type=number(float, 0), dest="weight_decay", help="weight decay")
    flag("--clip-grad", type=number(float, above=0), metavar="NORM", help="largest norm of the gradient")
    flag("--aug-plus", action="store_true", help="MoCo v2's augmentation in place of v1's")
    flag("--aug-heavy", action="store_true", help="RandAugment and random erasing, in place of MoCo's augmentation")
    flag("--blur", action="store_true", help="with --aug-plus, --aug-heavy: blur crops below 64 pixels too")
    flag("--crop-scale", type=options.pair(0, 1), metavar="MIN,MAX", help="area of a crop (unset: 0.2,1; heavy: 0.5,1)")
    flag(
        "--augment-on",
        default="cpu",
        choices=("cpu", "device"),
        help="device: workers only decode, crop and resize; the rest is done in batches, on the GPU",
    )
    flag("--compile", action="store_true", help="compile the encoders with torch.compile")
    flag("--save-freq", default=1, type=number(int, 1), help="epochs between checkpoints; the last is always written")
    flag("--keep", default=0, type=number(int, 0), help="how many numbered checkpoints stay; 0: all")
    flag("--knn-freq", default=0, type=number(int, 0), help="epochs between kNN evaluations, train vs. val; 0: none")
    flag("--knn-k", default=200, type=number(int, 1), help="neighbours that vote; at most all")
    flag("--knn-train", action="store_true", help="kNN of the training images, too, each by the others")
    flag("--save-best", action="store_true", help=f"keep the best epoch by --knn-freq in {BEST}")
    flag("--sync-bn", action="store_true", help="BatchNorm statistics over all GPUs")
    flag("--bn-splits", default=1, type=number(int, 1), help="BatchNorm in that many splits, which stand in for GPUs")

    flag("--moco-dim", default=128, type=number(int, 1), help="width of the embedding")
    flag("--moco-k", default=65536, type=number(int, 1), help="rows of the queue")
    flag("--moco-m", default=0.999, type=number(float, 0, 1), help="momentum of the key encoder")
    flag("--moco-t", default=0.07, type=number(float, above=0), help="temperature")
    flag("--mlp", action="store_true", help="two-layer head, as in MoCo v2")
    flag("--symmetric", action="store_true", help="each view is query and key in turn; takes twice the queue rows")
    flag("--mask-same-image", action="store_true", help="a query's own image in the queue is no negative of it")

    flag("--n-hard", default=1024, type=number(int, 1), help="hardest queue rows to draw from")
    for i, (name, count) in enumerate(zip(TYPES, (256, 256, 256, 64, 64, 64)), 1):
        flag(f"--n{i}", default=count, type=number(int, 0), help=f"{name} negatives a query")
    flag("--alpha", default=0.5, type=number(float, high=1, above=0), help="type 1: weight of the query ~ U(0, alpha)")
    flag("--beta", default=1.5, type=number(float, above=1), help="type 2: extrapolation ~ U(1, beta)")
    flag("--gamma", default=1.0, type=number(float, high=1, above=0), help="type 3: weight of a row ~ U(0, gamma)")
    flag("--sigma", default=0.01, type=number(float, 0), help="type 4: standard deviation of the noise")
    flag("--delta", default=0.01, type=number(float, 0), help="type 5: step along the similarity's gradient")
    flag("--eta", default=0.01, type=number(float, 0), help="type 6: step along the gradient's sign")
    flag(
        "--warmup-epochs",
        default=10,
        type=options.lengths(len(TYPES)),
        help="first epochs (or steps: 2500s) without synthesis; one number, or one for each type: 0,0.5,1,2,2,2",
    )
    flag("--cooldown-epochs", default=0, type=number(int, 0), help="last epochs without synthesis")

    args = parser.parse_args()
    args.log_dir = args.log_dir or args.save_dir
    args.counts = {name: getattr(args, f"n{i}") for i, name in enumerate(TYPES, 1)}
    if any(args.counts.values()) and args.n_hard > args.moco_k:
        raise UserError(f"--n-hard {args.n_hard} is larger than the queue: --moco-k is {args.moco_k}")
    if args.blur and not (args.aug_plus or args.aug_heavy):
        raise UserError("--blur goes with --aug-plus or --aug-heavy: MoCo v1's augmentation has none")
    if args.sync_bn and args.bn_splits > 1:
        raise UserError(f"--sync-bn and --bn-splits {args.bn_splits} contradict each other")
    if args.aug_plus and args.aug_heavy:
        raise UserError("--aug-plus and --aug-heavy contradict each other")
    if args.augment_on == "device" and args.aug_heavy:
        raise UserError("--augment-on device cannot do --aug-heavy's RandAugment; leave one of the two out")
    for name in ("knn_train", "save_best"):
        if getattr(args, name) and not args.knn_freq:
            raise UserError(f"--{name.replace('_', '-')} goes with --knn-freq N")
    if args.lr_min and not args.cos:
        raise UserError(f"--lr-min {args.lr_min:g} goes with --cos")
    if args.lr_warmup and options.in_epochs(args.lr_warmup_epochs, 1) == 0:
        raise UserError(f"--lr-warmup {args.lr_warmup:g} goes with --lr-warmup-epochs N")
    if args.lr_min > args.lr:
        raise UserError(f"--lr-min {args.lr_min:g} is larger than --lr {args.lr:g}")
    options.check_run(args)
    options.settle(args)
    return args


def run(process, args):
    device = process.device
    path, saved = checkpoint.find(args, own_checkpoints(args), own=[])
    before = saved["config"] if saved else {}
    args.deterministic = args.seed is not None or before.get("deterministic") is True
    args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, path, before))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic

    precision = Precision(device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    batch = batch_of_each(args, process)
    datasets.fetch(args, process)
    batches, monitor, classes = load_data(args, process, batch)
    steps, reader = len(batches), batches.dataset.reader
    if args.steps:
        args.epochs = math.ceil(args.steps / steps)
        options.check_start(args)
    total = args.steps or args.epochs * steps
    changed = options.compare(before, args, path, UNRELATED)
    reader.learn(checkpoint.skipped(saved, path, len(reader)))
    if options.in_epochs(args.lr_warmup_epochs, steps) > total / steps:
        distributed.warn(f"--lr-warmup-epochs {args.lr_warmup_epochs}: longer than the run, which never reaches --lr")
    model = make_model(args, precision, steps, total)
    optimizer = make_optimizer(args, model, precision.fused)

    done, averages = args.start_epoch * steps, metrics.Averages()  # steps
    if saved:
        epochs = checkpoint.resume(saved, path, model, optimizer, args.arch)
        done = checkpoint.position(saved, path, steps)
        if done > total:
            raise UserError(f"{path}: holds {epochs} epochs and --epochs is {args.epochs}")
        if args.mask_same_image:
            checkpoint.resume_index(saved, path, model.queue_index)
        checkpoint.resume_averages(saved, path, averages, process)
        precision.resume(saved, path)
    start_epoch, start = divmod(done, steps) if done < total else (args.epochs, 0)
    if process.rank == 0:
        checkpoint.prepare_folders(args, own_checkpoints(args), own=[], fresh=not path)
        describe(args, process, batch, steps, total, (start_epoch, start), path, before, changed)
    saved = None  # its memory
    log = metrics.Log(args.log_dir, steps_done=done, active=process.rank == 0)
    kept = log.kept if os.path.exists(os.path.join(args.save_dir, BEST)) else []  # rank 0's; the others' is empty
    best = max((line["top1"] for line in kept if line["kind"] == "knn" and line["epoch"]), default=-1.0)
    best = distributed.from_rank_0(best)

    learner = distributed.parallel(model, device)
    saves = survival.Saves(args.save_steps, args.save_minutes, args.dist_timeout)

    def evaluate(done):
        nonlocal best
        found = knn.accuracy(
            model.encoder_q, model.head, *monitor, device, classes=classes, k=args.knn_k, train=args.knn_train
        )
        told = f"{found['top1']:.2f} % (projection {found['top1_projection']:.2f} %)"
        told += f", training images {found['train_top1']:.2f} %" if args.knn_train else ""
        say(f"kNN after {done} epochs: {told}")
        if args.save_best and done and found["top1"] > best:
            save(min(done * steps, total), BEST)
        # the last: a run that is stopped before this line evaluates again, and saves again
        log.write("knn", min(done * steps, total), epoch=done, **found)
        best = max(best, found["top1"] if done else -1.0)

    def save(step, name, *, last=False):
        """Write a checkpoint after that many steps. last: of this run, which then cannot end well without it."""
        state, problem = averages.state(distributed.from_all), ""
        if process.rank == 0:
            log.sync()
            content = {
                "epoch": math.ceil(step / steps) if step == total else step // steps,
                "arch": args.arch,
                "state_dict": checkpoint.prefixed(model),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "steps_per_epoch": steps,
                "averages": state,
                "skipped": sorted(reader.known),
                "config": vars(args),
                **precision.state(),
            }
            if args.mask_same_image:
                content["queue_index"] = model.queue_index
            problem = checkpoint.try_to_save(content, os.path.join(args.save_dir, name))
            if not problem and name != BEST:
                prune(name, args)
        if name != BEST:  # with --save-freq no run goes on from that one
            saves.done()
        if last:
            problem = distributed.from_rank_0(problem)
            if problem:
                raise Failure(problem)

    def stop(step, name):
        save(step, name, last=True)
        checkpoint.leave(args, saves, step, name)

    def after_step(epoch, i, finite, lr):
        """Save or stop if that is due, within an epoch or at the end of one that gets no checkpoint of its own."""
        step = epoch * steps + i + 1
        at_end = step == total or i == steps - 1
        due = saves.after(step, news=reader.news(), at_once=at_end)
        if due.news:
            reader.exchange()
        if due.save and not (at_end and due_to_save(epoch + 1, args)):
            check_finite(finite, batches, epoch, i, lr, args)
            if due.stop:
                stop(step, WITHIN)
            save(step, WITHIN)

    due = args.knn_freq and not start and (start_epoch % args.knn_freq == 0 or start_epoch == args.epochs)
    if due and not distributed.from_rank_0(log.holds("knn", start_epoch)):
        evaluate(start_epoch)
    for epoch in range(start_epoch, args.epochs):
        batches.batch_sampler.set_epoch(epoch, start)
        with reader.watched():
            span = epoch, start, steps, total
            train(batches, learner, model, optimizer, precision, averages, span, log, process, args, after_step)
        done, start = epoch + 1, 0
        if due_to_save(done, args):
            name = f"checkpoint_{epoch:04d}.pth.tar"
            if saves.stopping and done < args.epochs:
                stop(done * steps, name)
            save(min(done * steps, total), name, last=done == args.epochs)
        if args.knn_freq and (done % args.knn_freq == 0 or done == args.epochs):
            evaluate(done)
    log.close()
    reader.tell()
    say(f"Done. Checkpoints: {args.save_dir}  Logs: {args.log_dir}")


def due_to_save(done, args):
    """Whether an epoch gets a checkpoint of its own: the one after which `done` are done."""
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
    keys = batch * process.world_size * (1 + args.symmetric)
    if args.moco_k < keys:
        raise UserError(f"--moco-k {args.moco_k} is smaller than the {keys} keys of a step")
    return batch


def load_data(args, process, batch):
    """(training batches, kNN's (bank, queries) or None, number of classes)."""
    images = datasets.load(args, "pretrain")
    step = batch * process.world_size
    if len(images) < step:
        raise UserError(f"--batch-size {args.batch_size}: a step takes {step} images, {images.root} has {len(images)}")
    args.processes, args.global_batch = process.world_size, step
    args.train_images, args.train_images_crc32 = len(images), images.checksum()
    bank = val = None
    if args.knn_freq:
        # but for STL-10, whose labelled images are others, the images and what is kept of them are those of training
        bank, val = (datasets.load(args, "train") if args.dataset == "stl10" else images), datasets.load(args, "val")
        datasets.same_classes(bank, val, args.data)
    if args.cache_images:
        datasets.cache([images, val] if args.knn_freq else [images], process.local_size, bool(args.skip_bad_images))

    load = {"process": process, "workers": loader.workers_each(args.workers, process.local_size)}
    load["timeout"] = args.worker_timeout
    kind = "heavy" if args.aug_heavy else "v2" if args.aug_plus else "v1"
    view = loader.augmentation(args.img_size, kind, blur=args.blur, crop_scale=args.crop_scale, stats=args.stats)
    on_device = args.augment_on == "device"
    if on_device and process.device.type == "cpu":
        distributed.warn("--augment-on device is meant for GPUs, and this run is on the CPU, which it takes time from")
    reader = loader.Reader(images.raw() if on_device else images, args.skip_bad_images)
    pairs = loader.TwoCrops(reader, augment.Crop(view) if on_device else view, args.seed)
    batches = loader.train_loader(pairs, batch, seed=args.seed, **load)
    if on_device:
        batches = augment.Finished(batches, augment.Finish(view, process.device))
    if not args.knn_freq:
        return batches, None, len(images.classes)
    shown = [part.seen(loader.center_view(args.img_size, args.stats)) for part in (bank, val)]
    if bank is images:
        shown[0] = loader.Readable(shown[0], reader)
    monitor = [loader.eval_loader(part, batch, **load) for part in shown]
    return batches, monitor, len(bank.classes)


def make_model(args, precision, steps, total):
    """The model on its device, in its layout; sees that the network takes images of --img-size.

    steps: of an epoch; total: of the run.
    """
    torch.manual_seed(args.seed)  # the same start in every process
    with fitting(args.arch, args.img_size):
        model = SynCo(
            network_of(args.arch, args.img_size, args.stem),
            args.moco_dim,
            args.moco_k,
            args.moco_m,
            args.moco_t,
            args.mlp,
            n_hard=args.n_hard,
            **{f"n{i}": getattr(args, f"n{i}") for i in range(1, 7)},
            **{name: getattr(args, name) for name in ("alpha", "beta", "gamma", "sigma", "delta", "eta")},
            warmup_epochs=[options.in_epochs(start, steps) for start in warmups(args)],
            stop_epoch=total / steps - args.cooldown_epochs,
            symmetric=args.symmetric,
            mask_same_image=args.mask_same_image,
            bn_splits=args.bn_splits,
            seed=args.seed,
        )
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()):
            raise UserError(f"--sync-bn: {args.arch} has no BatchNorm")
    precision.place(model).eval()
    try_images(model.encoder_q, args.arch, args.img_size)
    if args.compile:
        compile_encoders(model, precision.device)
    return model.train()


def make_optimizer(args, model, fused):
    """SGD with MoCo's settings, or AdamW without decay on norms and biases, which have one dimension.

    fused: see `Precision.fused`.
    """
    if args.optimizer == "adamw":
        weights = list(model.encoder_q.parameters())
        groups = [{"params": [w for w in weights if w.ndim > 1]}]
        groups.append({"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0})
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=fused)
    # both encoders' parameters, as in the published checkpoints; the key encoder's get no gradient and so do not move
    return torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=fused
    )


def train(batches, learner, model, optimizer, precision, averages, span, log, process, args, after_step):
    """One epoch, or what the run's end leaves of it. Numbers are read from the device at print steps and saves only.

    averages: those since the last print step; span: which epoch, from which of its steps on, how many steps an epoch
    and the run have; after_step(epoch, step in it, `metrics.Finite`, learning rate) is called after each.
    """
    epoch, start, steps, total = span
    parameters = list(model.encoder_q.parameters())
    device, first = process.device, epoch * steps
    steps_now = min(steps, total - first)
    pace, finite = metrics.Pace(), metrics.Finite(device)
    for i, (im_q, im_k, index) in pace.watch(itertools.islice(batches, steps_now - start), start):
        im_q, im_k, index = precision.place(im_q), precision.place(im_k), index.to(device, non_blocking=True)
        if first + i == 0:
            log.images("pairs", pair_grid(im_q, im_k, args.stats) if process.rank == 0 else None, 0)
        lr = learning_rate(first + i, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # what a network with dropout draws is a function of the step, too
        torch.manual_seed(distributed.seed_of("dropout", args.seed, first + i, process.rank))
        with precision.autocast():
            logits, labels = learner(im_q, im_k, (first + i) / steps, step=first + i, index=index)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        norm = precision.backward(loss, optimizer, parameters, args.clip_grad)
        bad = finite.watch(i, loss, norm)
        precision.step(optimizer)

        norms = {"grad_norm": norm} if args.clip_grad else {}
        averages.add(loss=loss, bad=bad, **norms, **metrics.contrastive_accuracy(logits, args.moco_k))
        if i % args.print_freq == 0 or i == steps_now - 1:
            numbers = averages.read(distributed.mean)
            if numbers.pop("bad"):
                check_finite(finite, batches, epoch, i, lr, args)
            precision.check()
            numbers |= {"lr": lr, **pace.read(process.world_size)}
            if process.rank == 0:
                counts = dict(zip(TYPES, model.counts_at((first + i) / steps)))
                left = pace.left(total - first - i - 1)
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


def learning_rate(done, steps, args):
    """The rate after `done` steps, `steps` an epoch: a linear warm-up, then MoCo's rule.

    That is a cosine from --lr to --lr-min, or a tenth at each milestone; once an epoch, or with --steps every step.
    """
    warmup, at = options.in_epochs(args.lr_warmup_epochs, steps), done / steps
    if at < warmup:
        return args.lr_warmup + (args.lr - args.lr_warmup) * at / warmup
    at, end = (at, args.steps / steps) if args.steps else (done // steps, args.epochs)
    if args.cos:
        part = max(0, at - warmup) / (end - warmup)
        return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * part))
    return args.lr * 0.1 ** sum(at >= milestone for milestone in args.schedule)


def own_checkpoints(args):
    """The checkpoints in --save-dir: the best if there is one, the numbered ones, oldest first, the one in an epoch."""
    best, within = (os.path.join(args.save_dir, name) for name in (BEST, WITHIN))
    numbered = [path for _, path in checkpoint.numbered(args.save_dir)]
    return [best] * os.path.exists(best) + numbered + [within] * os.path.exists(within)


def prune(written, args):
    """After a checkpoint of that name is safe, remove those that are not needed any more."""
    within = os.path.join(args.save_dir, WITHIN)
    if written != WITHIN and os.path.exists(within):
        os.remove(within)
    if args.keep:
        for _, path in checkpoint.numbered(args.save_dir)[: -args.keep]:
            os.remove(path)


def method(args, steps, total):
    """The method in words. steps: of an epoch; total: of the run."""
    if not any(args.counts.values()):
        return "MoCo (no synthetic negatives)"
    kinds = ", ".join(f"{count} {name}" for name, count in args.counts.items() if count)
    mochi = not any(args.counts[name] for name in TYPES if name not in ("interpolated", "mixed"))
    starts = {name: start for (name, n), start in zip(args.counts.items(), warmups(args)) if n}
    end = total / steps - args.cooldown_epochs
    if len(set(starts.values())) == 1:
        told = str(next(iter(starts.values())))
    else:
        told = ", ".join(f"{start} ({name})" for name, start in starts.items())
    when = f"from epoch {told} on" + (f", before epoch {end:g}" if args.cooldown_epochs else "")
    if end <= min(options.in_epochs(start, steps) for start in starts.values()):
        when = "in no epoch: all are warm-up or cool-down"
    return (
        f"{'MoCHi' if mochi else 'SynCo'}: {sum(args.counts.values())} synthetic negatives a query ({kinds}), "
        f"made from the {args.n_hard} hardest of {args.moco_k} queue rows, {when}"
    )


def warmups(args):
    """The six warm-ups, in epochs or steps, see `options.length`."""
    return args.warmup_epochs if isinstance(args.warmup_epochs, list) else [args.warmup_epochs] * len(TYPES)


def describe(args, process, batch, steps, total, position, path, before, changed):
    """Print what is about to run, and store it as config.json."""
    facts = {
        "method": method(args, steps, total),
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


def pair_grid(im_q, im_k, stats, pairs=8):
    """The first query views above their key views, as one picture (3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in options.STATS[stats])
    views = torch.cat([im_q[:pairs], im_k[:pairs]]).cpu() * std + mean
    return torchvision.utils.make_grid(views.clamp(0, 1), nrow=min(pairs, len(im_q)))


if __name__ == "__main__":
    distributed.launch(run, parse)
