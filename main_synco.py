#!/usr/bin/env python3
"""Pretrain an encoder with SynCo: MoCo v2 and synthetic hard negatives (arXiv 2410.02401).

On all GPUs of this machine, in the published settings:

  python main_synco.py -a resnet50 --lr 0.03 --batch-size 256 --multiprocessing-distributed --world-size 1 --rank 0 \\
    --mlp --moco-t 0.2 --aug-plus --cos --save-dir runs/synco IMAGENET

On one GPU, or on a CPU for trying it out (torchrun --nproc-per-node N works too):

  python main_synco.py -a resnet18 --img-size 32 --epochs 5 --warmup-epochs 1 -b 128 --moco-k 4096 --method synco \\
    --mlp --moco-t 0.2 --aug-plus --cos --knn-freq 1 --save-dir runs/try FOLDER

DATA holds train/CLASS/IMAGE and, for --knn-freq, val/CLASS/IMAGE; or images without labels; or it is where the data
lie that --dataset names (--download fetches some). Writes checkpoint_0000.pth.tar ..., config.json, log.jsonl and
TensorBoard files.
"""

import argparse
import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from synco import augment, cache, datasets, diagnostics, distributed, initial, knn, loader, methods, metrics, options
from synco.builder import QueueIndex, SynCo
from synco.errors import UserError
from synco.folder import RunFiles
from synco.launch import launch
from synco.negatives import KINDS
from synco.networks import network_errors_as_user_errors, network_of, sync_batch_norm, try_images
from synco.options import number
from synco.precision import Precision, compile_encoders
from synco.run import Run

FILES = RunFiles("pretraining", ("epoch", "arch", "optimizer"), epoch="checkpoint_{:04}.pth.tar",
                 within="checkpoint_step.pth.tar", best="model_best_knn.pth.tar")  # fmt: skip
# the model's settings that flags have the names of
SAME = "alpha beta gamma sigma delta eta symmetric mask_same_image bn_splits".split()


def pretrain(process: distributed.Process, args: argparse.Namespace) -> None:
    """One process of a pretraining run."""
    run = Run(process, args, flags().kinds, FILES)
    precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
    batches, monitor = load_data(args, process, run)
    steps = len(batches)  # of an epoch
    total = args.steps or args.epochs * steps  # of the run
    if options.in_epochs(args.lr_warmup_epochs, steps) > total / steps:
        distributed.warn(f"--lr-warmup-epochs {args.lr_warmup_epochs}: longer than the run, which never reaches --lr")
    model = make_model(args, precision, run.seed, steps=steps, total=total)
    optimizer = make_optimizer(args, model, precision.fused)
    rows = QueueIndex(model, images=len(batches.dataset.reader))
    state = {"state_dict": model, "optimizer": optimizer, "scaler": precision, "queue_index": rows}
    facts, origin = initial.load_weights(model, run, args)
    facts = {"method": methods.describe(args, steps, total), **facts}
    run.begin(batches, total, state, facts=facts, identity=origin, save_freq=args.save_freq)
    labels = diagnostics.labels_of(run.reader.dataset)  # for the log alone
    learner = distributed.parallel(model, process.device)
    if not run.path and (args.fill_queue or args.init_from and args.fill_queue is None):
        initial.fill_queue(model, batches, precision)
    weights = list(model.encoder_q.parameters())

    for epoch in run.epochs():
        evaluate(run, args, model, monitor, epoch)
        for step in run.steps(epoch):
            im_q, im_k, index = precision.place(step.batch)
            if step.done == 0 and process.rank == 0:
                run.log_image("pairs", metrics.pair_grid(im_q, im_k, options.STATS[args.stats]))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step.done, steps, args)

            with precision.autocast():
                # logits (N, 1 + K + S), target (N,), all 0
                logits, target = learner(
                    im_q, im_k, step.done / steps, step=step.done, index=index, inspect=step.prints
                )
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            norm = precision.backward(loss, optimizer, weights, args.clip_grad)
            precision.step(optimizer)

            norms = {"grad_norm": norm} if args.clip_grad else {}
            step.record(loss, norm, **norms, **metrics.contrastive_accuracy(logits, args.moco_k))
            if step.prints:
                counts = dict(zip(KINDS, model.counts_at(step.done / steps)))
                diagnostics.note(step, logits.detach(), model, counts, labels)
        run.end_epoch(epoch)
    evaluate(run, args, model, monitor, run.last_epoch)
    run.finish()
    distributed.say(f"Done. Checkpoints: {run.folder.path}  Logs: {run.folder.log_path}")


def learning_rate(done: int, steps: int, args: argparse.Namespace) -> float:
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


def evaluate(run: Run, args: argparse.Namespace, model: SynCo, monitor: Callable | None, done: int) -> None:
    """kNN accuracy after so many epochs, if it is due and the log lacks it; with --save-best the best's checkpoint."""
    due = args.knn_freq and (done % args.knn_freq == 0 or done == run.last_epoch)
    if not due or run.done != min(done * run.steps_per_epoch, run.total) or run.is_logged("knn", done):
        return
    numbers = monitor(model.encoder_q, model.head)
    words = f"{numbers['top1']:.2f} % (projection {numbers['top1_projection']:.2f} %)"
    words += f", training images {numbers['train_top1']:.2f} %" if args.knn_train else ""
    distributed.say(f"kNN after {done} epochs: {words}")
    if args.save_best and done and numbers["top1"] > run.best_logged("knn", "top1"):
        run.save_best()
    run.log("knn", epoch=done, **numbers)  # the last: a run that is stopped before evaluates and saves again


def load_data(
    args: argparse.Namespace, process: distributed.Process, run: Run
) -> tuple[loader.Loader | augment.Finished, Callable | None]:
    """(training batches, the kNN monitor: a function of (network, name of its head), or None)."""
    batch = batch_of_each(args, process)
    datasets.fetch(args, process)
    images = datasets.load(args, "pretrain")
    step = batch * process.world_size
    if len(images) < step:
        raise UserError(f"--batch-size {args.batch_size}: a step takes {step} images, {images.root} has {len(images)}")
    bank = val = None
    if args.knn_freq:
        # but for STL-10, whose labelled images are others, the images and what is kept of them are those of training
        bank, val = (datasets.load(args, "train") if args.dataset == "stl10" else images), datasets.load(args, "val")
        datasets.same_classes(bank, val, args.data)
    if args.cache_images:
        cache.keep([images, val] if args.knn_freq else [images], process, bool(args.skip_bad_images))

    workers = loader.workers_each(args.workers, process.local_size)
    load = {"process": process, "workers": workers, "timeout": args.worker_timeout}
    kind = "heavy" if args.aug_heavy else "v2" if args.aug_plus else "v1"
    view = augment.augmentation(args.img_size, kind, blur=args.blur, crop_scale=args.crop_scale, stats=args.stats)
    on_device = args.augment_on == "device"
    if on_device and process.device.type == "cpu":
        distributed.warn("--augment-on device is meant for GPUs, and this run is on the CPU, which it takes time from")
    reader = loader.Reader(images.as_uint8() if on_device else images, args.skip_bad_images)
    begin, finish = augment.halves(view, process.device, args.augment_on)
    pairs = loader.TwoCrops(reader, begin, run.seed)
    batches = loader.train_loader(pairs, batch, seed=run.seed, order=run.order, **load)
    batches = augment.Finished(batches, finish) if finish else batches
    if not args.knn_freq:
        return batches, None
    shown = [part.with_transform(augment.center_view(args.img_size, args.stats)) for part in (bank, val)]
    if bank is images:
        shown[0] = loader.Readable(shown[0], reader)
    loaders = [loader.eval_loader(part, batch, **load) for part in shown]
    settings = {"classes": len(bank.classes), "k": args.knn_k, "train": args.knn_train}
    return batches, lambda network, head: knn.accuracy(network, head, *loaders, process.device, **settings)


def batch_of_each(args: argparse.Namespace, process: distributed.Process) -> int:
    """How many images a process takes in a step: its share of --batch-size."""
    batch = loader.batch_each(args.batch_size, process.local_size)
    if batch < 2:
        raise UserError(f"--batch-size {args.batch_size}: a process takes {batch}, and BatchNorm needs 2 at least")
    if batch % args.bn_splits or batch // args.bn_splits < 2:
        given = f"--batch-size {args.batch_size} --bn-splits {args.bn_splits}"
        raise UserError(f"{given}: the {batch} images of a process do not divide into equal splits of at least 2")
    if args.moco_k < (keys := batch * process.world_size * (1 + args.symmetric)):
        raise UserError(f"--moco-k {args.moco_k} is smaller than the {keys} keys of a step")
    return batch


def make_model(args: argparse.Namespace, precision: Precision, seed: int, *, steps: int, total: int) -> SynCo:
    """The model on its device, in its layout. steps: of an epoch; total: of the run."""
    torch.manual_seed(seed)  # the same start in every process
    with network_errors_as_user_errors(args.arch, args.img_size):
        model = SynCo(
            network_of(args.arch, args.img_size, args.stem),
            dim=args.moco_dim,
            K=args.moco_k,
            m=args.moco_m,
            T=args.moco_t,
            mlp=args.mlp,
            **{name: getattr(args, name) for name in (*methods.FLAGS, *SAME)},
            warmup_epochs=[options.in_epochs(start, steps) for start in methods.warmups(args)],
            stop_epoch=total / steps - args.cooldown_epochs,
            seed=seed,
        )
    if args.sync_bn:
        try:
            model = sync_batch_norm(model)
        except ValueError as error:
            raise UserError(f"--sync-bn: {args.arch} {error}") from error
    precision.place(model).eval()
    try_images(model.encoder_q, args.arch, args.img_size)
    if args.compile:
        compile_encoders(model, precision.device)
    return model.train()


def make_optimizer(args: argparse.Namespace, model: SynCo, fused: bool | None) -> torch.optim.Optimizer:
    """SGD with MoCo's settings, or AdamW without decay on norms and biases, which have one dimension."""
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": fused}
    if args.optimizer == "adamw":
        weights = list(model.encoder_q.parameters())
        groups = [{"params": [w for w in weights if w.ndim > 1]}]
        groups.append({"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0})
        return torch.optim.AdamW(groups, **settings)
    # both encoders' parameters, as in the published checkpoints; the key encoder's get no gradient and so do not move
    return torch.optim.SGD(model.parameters(), momentum=args.momentum, **settings)


def flags() -> options.Parser:
    """The command line: `identity` is what a run is, `schedule` how it learns, `free` may change when it goes on."""
    parser = options.Parser(__doc__, normal="data -a --epochs --steps -b --lr --cos --mlp --moco-t --aug-plus --method "
                            "--amp --multiprocessing-distributed --knn-freq --save-dir --resume")  # fmt: skip
    identity, schedule, free = parser.identity, parser.schedule, parser.free
    # the model's defaults, from the one place where they stand
    model = {name: parameter.default for name, parameter in inspect.signature(SynCo).parameters.items()}
    options.add_data(parser, unlabelled=True)
    options.add_run(parser, epochs=200, batch_size=256, save_dir="./", steps=True)
    for add in (options.add_skipping, options.add_distributed, options.add_speed, initial.add_flags):
        add(parser)
    methods.add_flags(parser, model)
    with parser.group("data and network"):
        identity("--aug-plus", action="store_true", help="MoCo v2's augmentation in place of v1's: --aug v2")
        identity("--aug-heavy", action="store_true", help="RandAugment and random erasing, in place of MoCo's")
        identity("--aug", choices=("v1", "v2", "heavy"), help="v2: as --aug-plus; heavy: as --aug-heavy")
        identity("--blur", action="store_true", help="with --aug v2, --aug heavy: blur crops below 64 pixels too")
        crop = "crop area (unset: 0.2,1; heavy: 0.5,1)"
        identity("--crop-scale", type=options.pair(0, 1), metavar="MIN,MAX", help=crop)
    with parser.group("method"):
        identity("--mlp", action="store_true", help="two-layer head, as in MoCo v2")
        identity("--moco-dim", default=model["dim"], type=number(int, 1), help="width of the embedding")
        identity("--moco-k", default=model["K"], type=number(int, 1), help="rows of the queue")
        identity("--moco-m", default=model["m"], type=number(float, 0, 1), help="momentum of the key encoder")
        identity("--moco-t", default=model["T"], type=number(float, above=0), help="temperature")
        twice = "each view is query and key in turn; takes twice the queue rows"
        identity("--symmetric", action="store_true", help=twice)
        identity("--mask-same-image", action="store_true", help="a query's own image is no negative of it")
        identity("--sync-bn", action="store_true", help="BatchNorm statistics over all GPUs")
        splits = "BatchNorm in so many splits, which stand in for GPUs"
        identity("--bn-splits", default=1, type=number(int, 1), help=splits)
    with parser.group("optimisation"):
        schedule("--lr", "--learning-rate", default=0.03, type=number(float, 0), help="learning rate")
        milestones = "epochs that divide the lr by 10"
        schedule("--schedule", default=[120, 160], nargs="*", type=number(int, 0), help=milestones)
        schedule("--cos", action="store_true", help="cosine schedule in place of --schedule")
        schedule("--lr-min", default=0.0, type=number(float, 0), help="what the cosine ends at")
        warmup = "epochs (or steps: 2500s) of linear warm-up"
        schedule("--lr-warmup-epochs", default=0, type=options.length, help=warmup)
        schedule("--lr-warmup", default=0.0, type=number(float, 0), help="what the linear warm-up starts from")
        identity("--optimizer", default="sgd", choices=("sgd", "adamw"), help="adamw: no decay on norms and biases")
        identity("--momentum", default=0.9, type=number(float, 0), help="momentum of SGD")
        decay = {"dest": "weight_decay", "help": "weight decay"}
        identity("--wd", "--weight-decay", default=1e-4, type=number(float, 0), **decay)
        identity("--clip-grad", type=number(float, above=0), metavar="NORM", help="largest norm of the gradient")
    with parser.group("evaluation while training"):
        often = "epochs between kNN evaluations, train vs. val; 0: none"
        free("--knn-freq", default=0, type=number(int, 0), help=often)
        free("--knn-k", default=200, type=number(int, 1), help="neighbours that vote; at most all")
        free("--knn-train", action="store_true", help="kNN of the training images, too, each by the others")
        free("--save-best", action="store_true", help=f"keep the best epoch by --knn-freq in {FILES.best}")
    with parser.group("saving and resuming"):
        free("--save-freq", default=1, type=number(int, 1), help="epochs between checkpoints; the last has one")
        free("--keep", default=0, type=number(int, 0), help="how many numbered checkpoints stay; 0: all")
    with parser.group("speed"):
        where = "device: workers only decode, crop and resize; the rest is done in batches, on the GPU"
        identity("--augment-on", default="cpu", choices=("cpu", "device"), help=where)
        identity("--compile", action="store_true", help="compile the encoders with torch.compile")
    return parser


def parse() -> argparse.Namespace:
    """The flags of the command line, checked."""
    parser = flags()
    args = parser.parse_args()
    if args.preset:
        parser.set_defaults(**methods.preset(args.preset, args.moco_k))
        args = parser.parse_args()
    aug = vars(args).pop("aug")  # a second name alone: what a run stores and compares are MoCo's own two flags
    for kind, flag in (("v2", "aug_plus"), ("heavy", "aug_heavy")):
        if aug not in (None, kind) and getattr(args, flag):
            raise UserError(f"--aug {aug} and --{flag.replace('_', '-')} contradict each other")
        if aug == kind:
            vars(args)[flag] = True
    for wrong, message in (
        (any(methods.counts(args)) and args.n_hard > args.moco_k, f"--n-hard {args.n_hard} is larger than the queue: "
         f"--moco-k is {args.moco_k} (--method synco scales all counts to it)"),
        (args.blur and not (args.aug_plus or args.aug_heavy), "--blur goes with --aug-plus or --aug-heavy: MoCo v1's "
         "augmentation has none"),
        (args.init_from == "", "--init-from '': must name weights"),
        (args.init_from and args.resume not in ("", "auto"), f"--init-from {args.init_from} begins a run, and --resume "
         f"{args.resume} goes on with one; give one of the two"),
        (args.sync_bn and args.bn_splits > 1, f"--sync-bn and --bn-splits {args.bn_splits} contradict each other"),
        (args.sync_bn and not torch.cuda.is_available(), "--sync-bn needs GPUs, and this machine has none"),
        (args.aug_plus and args.aug_heavy, "--aug-plus and --aug-heavy contradict each other"),
        (args.augment_on == "device" and args.aug_heavy, "--augment-on device cannot do --aug-heavy's RandAugment; "
         "leave one of the two out"),
        (args.knn_train and not args.knn_freq, "--knn-train goes with --knn-freq N"),
        (args.save_best and not args.knn_freq, "--save-best goes with --knn-freq N"),
        (args.lr_min and not args.cos, f"--lr-min {args.lr_min:g} goes with --cos"),
        (args.lr_warmup and options.in_epochs(args.lr_warmup_epochs, 1) == 0, f"--lr-warmup {args.lr_warmup:g} goes "
         "with --lr-warmup-epochs N"),
        (args.lr_min > args.lr, f"--lr-min {args.lr_min:g} is larger than --lr {args.lr:g}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)
    options.check_run(args)
    vars(args).update(options.resolve_image_settings(args))
    return args


main = partial(launch, pretrain, parse)  # what synco-pretrain calls where this is installed

if __name__ == "__main__":
    main()
