"""Checkpoints: written atomically, loaded without executing anything, resumed exactly; ours, SynCo's and MoCo's."""

import glob
import os
import pickle
import re
import struct

import torch

from synco.options import UserError

# what torch, zipfile and pickle raise on files that are truncated or of another kind
DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error,
)  # fmt: skip

PREFIX = "module."  # what DistributedDataParallel writes, and what the published tools expect


def save(checkpoint, path):
    """Write to a temporary file in the same folder, flush it to disk, rename: `path` is whole at every moment."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path):
    """A checkpoint as a dict of CPU tensors and plain values, new or old format; nothing in it is executed.

    Raises UserError that names a file which is missing, truncated, not a checkpoint, or needs more than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not a checkpoint of tensors and plain values ({_first_line(error)})") from error
    except DAMAGED as error:
        raise UserError(f"{path}: not a whole checkpoint file: truncated, damaged or of another kind") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint: it has no 'state_dict'")
    strange = [name for name, value in checkpoint["state_dict"].items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UserError(f"{path}: not a checkpoint: {strange[0]!r} in its 'state_dict' is no tensor")
    return checkpoint


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def numbered(folder):
    """The pretraining checkpoints of a folder: [(epoch number in the name, path)], oldest first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.pth.tar")):
        match = re.fullmatch(r"checkpoint_(\d{4,})\.pth\.tar", os.path.basename(path))
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def prefixed(model):
    """The state dict of a model under the published names, `module.` included however the run was launched."""
    return {PREFIX + name: value for name, value in model.state_dict().items()}


def unprefixed(state_dict):
    """A state dict without `module.`."""
    return {name.removeprefix(PREFIX): value for name, value in state_dict.items()}


def resume(checkpoint, path, model, optimizer, arch):
    """Load a pretraining checkpoint of ours, SynCo's or MoCo's into a model and its optimiser → epochs done.

    MoCo's (C, K) queue is turned. Raises UserError that names what is missing, of another shape or another network;
    model and optimiser are then as they were.
    """
    missing = [key for key in ("epoch", "arch", "optimizer") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a pretraining checkpoint that can be resumed: it has no {', '.join(missing)}")
    if checkpoint["arch"] != arch:
        raise UserError(f"{path}: is a checkpoint of {checkpoint['arch']!r}; --arch is {arch!r}")
    if not isinstance(checkpoint["epoch"], int) or checkpoint["epoch"] < 0:
        raise UserError(f"{path}: its epoch is {checkpoint['epoch']!r}, not a number of epochs done")

    wanted = model.state_dict()
    found = unprefixed(checkpoint["state_dict"])
    if "queue" in found and found["queue"].shape != wanted["queue"].shape == found["queue"].T.shape:
        found["queue"] = found["queue"].T.contiguous()
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    wrong += [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: does not fit this model (dim, K, mlp?): {'; '.join(wrong[:3])}{more}")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({_first_line(error)})") from error
    for group, setting in zip(optimizer.param_groups, settings):
        group.update(setting)  # the command line says lr, momentum and weight decay, the checkpoint the buffers
    model.load_state_dict(found)
    return checkpoint["epoch"]


def backbone(checkpoint, path, head="fc"):
    """The backbone's weights in a checkpoint, under torchvision's names, without the head.

    checkpoint: from `load`: ours, SynCo's or MoCo's pretraining (the query encoder is taken), with or without
    `module.`. head: the head's name, left out. Raises UserError if there is no query encoder.
    """
    weights = unprefixed(checkpoint["state_dict"])
    encoder = "encoder_q."
    found = {name.removeprefix(encoder): w for name, w in weights.items() if name.startswith(encoder)}
    if not found:
        raise UserError(f"{path}: not a pretraining checkpoint: it has no {encoder}* weights")
    return {name: weight for name, weight in found.items() if not name.startswith(head + ".")}
