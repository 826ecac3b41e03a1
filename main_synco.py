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
    Pretraining(process, args).run()


class Pretraining:
    """One run: its images, model, optimiser and files, how many steps it has done and how many it is to do.

    steps: of an epoch; total: of the run; start_epoch, start: the epoch it begins or goes on in, and the step in that.
    """

    def __init__(self, process, args):
        self.process, self.args = process, args
        path, saved = checkpoint.find(args, own_checkpoints(args), own=[])
        before = saved["config"] if saved else {}
        args.deterministic = args.seed is not None or before.get("deterministic") is True
        args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, path, before))
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic

        self.precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
        batch = batch_of_each(args, process)
        datasets.fetch(args, process)
        self.batches, self.monitor, self.classes = load_data(args, process, batch)
        self.steps, self.reader = len(self.batches), self.batches.dataset.reader
        if args.steps:
            args.epochs = math.ceil(args.steps / self.steps)
            options.check_start(args)
        self.total = args.steps or args.epochs * self.steps
        changed = options.compare(before, args, path, UNRELATED)
        self.reader.learn(checkpoint.skipped(saved, path, len(self.reader)))
        if options.in_epochs(args.lr_warmup_epochs, self.steps) > self.total / self.steps:
            distributed.warn(
                f"--lr-warmup-epochs {args.lr_warmup_epochs}: longer than the run, which never reaches --lr"
            )
        self.model = make_model(args, self.precision, self.steps, self.total)
        self.optimizer = make_optimizer(args, self.model, self.precision.fused)
        self.averages = metrics.Averages()  # since the last print step

        done = self._resume(saved, path) if saved else args.start_epoch * self.steps
        self.start_epoch, self.start = divmod(done, self.steps) if done < self.total else (args.epochs, 0)
        if process.rank == 0:
            checkpoint.prepare_folders(args, own_checkpoints(args), own=[], fresh=not path)
            position = self.start_epoch, self.start
            describe(args, process, batch, self.steps, self.total, position, path, before, changed)
        saved = None  # its memory
        self.log = metrics.Log(args.log_dir, steps_done=done, active=process.rank == 0)
        kept = self.log.kept if os.path.exists(os.path.join(args.save_dir, BEST)) else []  # rank 0's; others have none
        best = max((line["top1"] for line in kept if line["kind"] == "knn" and line["epoch"]), default=-1.0)
        self.best = distributed.from_rank_0(best)  # kNN accuracy
        self.learner = distributed.parallel(self.model, process.device)
        self.saves = survival.Saves(args.save_steps, args.save_minutes, args.dist_timeout)

    def _resume(self, saved, path):
        """Take over what a checkpoint holds → how many steps it has done."""
        args = self.args
        epochs = checkpoint.resume(saved, path, self.model, self.optimizer, args.arch)
        done = checkpoint.position(saved, path, self.steps)
        if done > self.total:
            raise UserError(f"{path}: holds {epochs} epochs and --epochs is {args.epochs}")
        if args.mask_same_image:
            checkpoint.resume_index(saved, path, self.model.queue_index)
        checkpoint.resume_averages(saved, path, self.averages, self.process)
        self.precision.resume(saved, path)
        return done

    def run(self):
        """All epochs from the first that is not done, with their checkpoints and evaluations."""
        args, first = self.args, self.start_epoch
        due = args.knn_freq and not self.start and (first % args.knn_freq == 0 or first == args.epochs)
        if due and not distributed.from_rank_0(self.log.holds("knn", first)):
            self.evaluate(first)
        for epoch in range(first, args.epochs):
            with self.reader.watched():
                self.train(epoch, self.start if epoch == first else 0)
            done = epoch + 1
            if due_to_save(done, args):
                name = f"checkpoint_{epoch:04d}.pth.tar"
                if self.saves.stopping and done < args.epochs:
                    self.stop(done * self.steps, name)
                self.save(min(done * self.steps, self.total), name, last=done == args.epochs)
            if args.knn_freq and (done % args.knn_freq == 0 or done == args.epochs):
                self.evaluate(done)
        self.log.close()
        self.reader.tell()
        say(f"Done. Checkpoints: {args.save_dir}  Logs: {args.log_dir}")

    def train(self, epoch, start):
        """One epoch from step `start` on, or what the run's end leaves of it.

        Numbers are read from the device at print steps and saves only.
        """
        args, process, model, precision = self.args, self.process, self.model, self.precision
        parameters = list(model.encoder_q.parameters())
        device, first = process.device, epoch * self.steps
        steps_now = min(self.steps, self.total - first)
        pace, finite = metrics.Pace(), metrics.Finite(device)
        self.batches.batch_sampler.set_epoch(epoch, start)
        for i, (im_q, im_k, index) in pace.watch(itertools.islice(self.batches, steps_now - start), start):
            im_q, im_k, index = precision.place(im_q), precision.place(im_k), index.to(device, non_blocking=True)
            if first + i == 0:
                self.log.images("pairs", pair_grid(im_q, im_k, args.stats) if process.rank == 0 else None, 0)
            lr = learning_rate(first + i, self.steps, args)
            for group in self.optimizer.param_groups:
                group["lr"] = lr

            # what a network with dropout draws is a function of the step, too
            torch.manual_seed(distributed.seed_of("dropout", args.seed, first + i, process.rank))
            with precision.autocast():
                logits, labels = self.learner(im_q, im_k, (first + i) / self.steps, step=first + i, index=index)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            norm = precision.backward(loss, self.optimizer, parameters, args.clip_grad)
            bad = finite.watch(i, loss, norm)
            precision.step(self.optimizer)

            norms = {"grad_norm": norm} if args.clip_grad else {}
            self.averages.add(loss=loss, bad=bad, **norms, **metrics.contrastive_accuracy(logits, args.moco_k))
            if i % args.print_freq == 0 or i == steps_now - 1:
                numbers = self.averages.read(distributed.mean)
                if numbers.pop("bad"):
                    self.check_finite(finite, epoch, i, lr)
                precision.check()
                numbers |= {"lr": lr, **pace.read(process.world_size)}
                if process.rank == 0:
                    self.report(numbers, logits.detach(), epoch, i, pace.left(self.total - first - i - 1))
            self.save_if_due(epoch, i, finite, lr)

    def report(self, numbers, logits, epoch, i, left):
        """A progress line, and the same numbers with the negatives' hardness as a log line.

        i: the step in the epoch; left: the time that is left, in words.
        """
        args, done = self.args, epoch * self.steps + i
        print(
            f"Epoch {epoch} [{i + 1:{len(str(self.steps))}}/{self.steps}]  loss {numbers['loss']:.4f}  "
            f"acc@1 {numbers['acc1']:5.2f}  acc@5 {numbers['acc5']:5.2f}  real acc@1 {numbers['acc1_real']:5.2f}  "
            f"{numbers['images_per_second']:.0f} images/s  data {numbers['data_share']:.0%}  ETA {left}",
            flush=True,
        )
        counts = dict(zip(TYPES, self.model.counts_at(done / self.steps)))
        found = metrics.hardness(logits, counts, K=args.moco_k, T=args.moco_t, n_hard=args.n_hard)
        values = torch.stack([v for pair in found.values() for v in pair]).tolist()
        names = [f"{what}/{name}" for name in found for what in ("similarity", "mass")]
        self.log.write("train", done + 1, epoch=epoch, **numbers, **dict(zip(names, values)))

    def check_finite(self, finite, epoch, i, lr):
        """Raise FloatingPointError that says where the loss or its gradient stopped being finite, if it did."""
        own, folder = own_checkpoints(self.args), self.args.save_dir
        checkpoint.check_finite(finite, self.batches, epoch, i, f"lr {lr:g}", own, folder)

    def save_if_due(self, epoch, i, finite, lr):
        """Save or stop after step i of an epoch if that is due, unless its end has a checkpoint of its own."""
        step = epoch * self.steps + i + 1
        at_end = step == self.total or i == self.steps - 1
        due = self.saves.after(step, news=self.reader.news(), at_once=at_end)
        if due.news:
            self.reader.exchange()
        if due.save and not (at_end and due_to_save(epoch + 1, self.args)):
            self.check_finite(finite, epoch, i, lr)
            if due.stop:
                self.stop(step, WITHIN)
            self.save(step, WITHIN)

    def save(self, step, name, *, last=False):
        """Write a checkpoint after that many steps. last: of this run, which then cannot end well without it."""
        args, state, problem = self.args, self.averages.state(distributed.from_all), ""
        if self.process.rank == 0:
            self.log.sync()
            content = {
                "epoch": math.ceil(step / self.steps) if step == self.total else step // self.steps,
                "arch": args.arch,
                "state_dict": checkpoint.prefixed(self.model),
                "optimizer": self.optimizer.state_dict(),
                "step": step,
                "steps_per_epoch": self.steps,
                "averages": state,
                "skipped": sorted(self.reader.known),
                "config": vars(args),
                **self.precision.state(),
            }
            if args.mask_same_image:
                content["queue_index"] = self.model.queue_index
            problem = checkpoint.try_to_save(content, os.path.join(args.save_dir, name))
            if not problem and name != BEST:
                prune(name, args)
        if name != BEST:  # with --save-freq no run goes on from that one
            self.saves.done()
        if last:
            problem = distributed.from_rank_0(problem)
            if problem:
                raise Failure(problem)

    def stop(self, step, name):
        """Save and leave, because the run was told to."""
        self.save(step, name, last=True)
        checkpoint.leave(self.args, self.saves, step, name)

    def evaluate(self, done):
        """kNN accuracy after so many epochs, told and logged; with --save-best the best one's checkpoint."""
        args, step = self.args, min(done * self.steps, self.total)
        found = knn.accuracy(
            self.model.encoder_q, self.model.head, *self.monitor, self.process.device,
            classes=self.classes, k=args.knn_k, train=args.knn_train,
        )  # fmt: skip
        told = f"{found['top1']:.2f} % (projection {found['top1_projection']:.2f} %)"
        told += f", training images {found['train_top1']:.2f} %" if args.knn_train else ""
        say(f"kNN after {done} epochs: {told}")
        if args.save_best and done and found["top1"] > self.best:
            self.save(step, BEST)
        # the last: a run that is stopped before this line evaluates again, and saves again
        self.log.write("knn", step, epoch=done, **found)
        self.best = max(self.best, found["top1"] if done else -1.0)


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
