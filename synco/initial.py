"""What a pretraining begins with: weights that there are (--init-from), and a queue of real images' keys."""

import argparse
import contextlib
import http.client
import itertools
import math
import os
import pickle
import sys

import torch
import torchvision

from synco import augment, backbone, checkpoint, distributed, files, loader, options
from synco.builder import SynCo
from synco.errors import UserError
from synco.precision import Precision
from synco.run import Run

TORCHVISION = "torchvision:"  # in front of the name of weights that torchvision fetches
UNREACHED = 2**32  # epochs and steps from here on are no training's: nothing else draws what they draw


def add_flags(parser: options.Parser) -> None:
    """What a fresh run begins with. The weights' name is compared by `load_weights` when a run goes on."""
    weights = "weights to begin a fresh run with: a checkpoint's, or a network's alone, or torchvision:NAME, such as "
    keys = "before the first step put keys of images into the queue, in place of noise (unset: with --init-from)"
    with parser.group("saving and resuming"):
        parser.free("--init-from", metavar="WHAT", help=f"{weights}torchvision:IMAGENET1K_V2")
        parser.identity("--fill-queue", action=argparse.BooleanOptionalAction, help=keys)


def load_weights(model: SynCo, run: Run, args: argparse.Namespace) -> tuple[dict, dict]:
    """Put the weights of --init-from into a model whose run begins → (facts to print, settings to store).

    The query encoder's backbone, and the head where the file has one that fits; the key encoder becomes a copy.
    Rank 0 reads them, and the others get its. A run that goes on keeps the checkpoint's weights and settings.
    Raises UserError if there are no such weights, they are of another network, the run began with others, or what it
    would go on from is a classifier.
    """
    what, stored = args.init_from, run.before.get("init_from")
    if run.path:
        if backbone.is_classifier(run.saved) and not backbone.is_pretraining(run.saved):
            raise UserError(f"{run.path}: is a classifier's checkpoint; --init-from takes it")
        if what and what != stored:
            began = f"began with {stored or 'random weights'}"
            raise UserError(f"--init-from {what}: {run.path} is of a run that {began}; leave it out to go on")
        return {}, {name: run.before[name] for name in ("init_from", "init_sha256") if name in run.before}
    if not what:
        return {}, {}
    if args.overwrite and os.path.isfile(what) and run.folder.holds(what):
        raise UserError(f"--overwrite would remove {what}, which --init-from names; give another --save-dir")
    words = digest = None
    if distributed.rank() == 0:
        words = _load(model, what, args)
        digest = None if what.startswith(TORCHVISION) else files.sha256(what)
    words, digest = distributed.from_rank_0((words, digest))
    distributed.share_weights(model)
    return {"initial_weights": words}, {"init_from": what, "init_sha256": digest}


def _load(model, what, args):
    """Rank 0's part of `load_weights` → what was taken and what not, in words."""
    content = _of_torchvision(what, args.arch) if what.startswith(TORCHVISION) else checkpoint.load(what)
    encoder, head = model.encoder_q, model.head
    weights = backbone.weights_of(content, what, head, arch=args.arch, classifier=True)
    count = backbone.load_backbone(encoder, head, weights, what)
    stats = content["config"].get("stats", args.stats)
    if stats != args.stats:
        distributed.warn(f"--stats {args.stats}: {what} is of a run with {stats}")
    wanted = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(head + ".")}
    found = backbone.head_of(content, head)
    if not found or backbone.is_classifier(content):
        told = "not taken (" + ("a classifier's)" if found else "there is none)")
    elif checkpoint.differences(found, wanted):
        told = f"not taken ({_widths(found)} there, {_widths(wanted)} here)"
    else:
        checkpoint.check_values(found, what, wanted)
        encoder.load_state_dict(found, strict=False)  # strict, but for the backbone
        told = "taken"
    model.encoder_k.load_state_dict(encoder.state_dict())
    known = [content["arch"]] if "arch" in content else []
    known += [f"{content['epoch']} epochs"] if "epoch" in content else []
    source = f"{what} ({', '.join(known)})" if known else what
    return f"backbone: {count} of {len(encoder.state_dict()) - len(wanted)} tensors from {source}; head: {told}"


def _of_torchvision(what, arch):
    """torchvision's own weights of a network, as `checkpoint.load` gives a classifier's."""
    if arch.startswith("timm:"):
        raise UserError(f"--init-from {what}: -a {arch} is none of torchvision's networks")
    known = torchvision.models.get_model_weights(arch).__members__
    name = what.removeprefix(TORCHVISION)
    if name not in known:
        raise UserError(f"--init-from {what}: torchvision's weights of {arch} are {', '.join(known) or 'none'}")
    try:
        with contextlib.redirect_stderr(sys.stdout):  # where torch tells of the download
            network = torchvision.models.get_model(arch, weights=name, progress=False)
    except (http.client.HTTPException, pickle.UnpicklingError, *checkpoint.DAMAGED) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--init-from {what}: cannot be fetched ({why})") from error
    return {"state_dict": network.state_dict(), "arch": arch, "best_acc1": None, "config": {}}


def _widths(head):
    """A head's layers, such as "2048-2048-128", by its weights {name: tensor}."""
    matrices = [tensor for _, tensor in sorted(head.items()) if tensor.ndim == 2]
    return "-".join(map(str, [*matrices[0].shape[1:], *(len(matrix) for matrix in matrices)])) if matrices else "other"


def fill_queue(model: SynCo, batches: loader.Loader | augment.Finished, precision: Precision) -> None:
    """Fill the queue with keys of the training images, before the first step; the encoders stay as they are.

    batches: the run's own loader, in epochs that no training reaches, so that the training's batches are the same with
    it and without. Images fewer than the queue's rows are gone through again, in other views. Every process must call
    this.
    """
    rank, step, filled = distributed.rank(), UNREACHED, 0
    each = batches.batch_sampler.batch_size * distributed.world_size() * (1 + model.symmetric)
    steps = math.ceil(model.K / each)
    times = math.ceil(steps / len(batches))
    again = f", going through them {times} times" if times > 1 else ""
    distributed.say(f"{'queue':18} filled with keys of the training images before the first step{again}")
    for epoch in itertools.count(UNREACHED):
        batches.batch_sampler.set_epoch(epoch)
        for batch in batches:
            torch.manual_seed(distributed.seed_of("dropout", model.seed, step, rank))
            with precision.autocast():
                filled += model.fill(*precision.place(batch), step=step)
            if filled >= model.K:
                return
            step += 1
