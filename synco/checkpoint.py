"""Checkpoints: written atomically, loaded without executing anything, resumed exactly; ours, SynCo's and MoCo's."""

import contextlib
import glob
import hashlib
import os
import pickle
import re
import secrets
import struct
import tempfile
import warnings

import torch

from synco import metrics
from synco.options import UserError

# what torch, zipfile and pickle raise on files that are truncated or of another kind
DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error,
)  # fmt: skip

PREFIX = "module."  # what DistributedDataParallel writes, and what the published tools expect
ENCODER = "encoder_q."  # the query encoder in a pretraining checkpoint
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights are stored in
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # second classifiers in torchvision's weights, which we do not build


@contextlib.contextmanager
def whole(path):
    """A binary file to write to, in the same folder; flushed to disk and renamed: `path` is whole at every moment."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    file = open(temporary, "xb")  # x: a new file, never one that is there
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(checkpoint, path):
    """Write a checkpoint, whole or not at all; what a killed attempt at it has left is removed."""
    for left in glob.glob(f"{glob.escape(path)}.????????.tmp"):
        os.remove(left)
    with whole(path) as file:
        torch.save(checkpoint, file)


def load(path):
    """A checkpoint as a dict of CPU tensors and plain values, new or old format; nothing in it is executed.

    It has a `state_dict` (a file of weights alone becomes one) and a `config`, empty where the file has none.

    Raises UserError that names a file which is missing, truncated, not a checkpoint, or needs more than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on kinds of files and tensors that are refused in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {found[1]}, which would have to be executed" if found else "it is of another kind"
        raise UserError(f"{path}: not a checkpoint of tensors and plain values: {why}") from error
    except DAMAGED as error:
        raise UserError(f"{path}: not a whole checkpoint file: truncated, damaged or of another kind") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(checkpoint).__name__}")
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}  # weights alone, as torchvision's are
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint: it has no 'state_dict'")
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint: {name!r} in its 'state_dict' is no tensor's name")
    if not isinstance(checkpoint.get("config"), dict):  # MoCo's and SynCo's own have none
        checkpoint["config"] = {}
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
    check_epoch(checkpoint, path)

    wanted = model.state_dict()
    found = unprefixed(checkpoint["state_dict"])
    if "queue" in found and found["queue"].shape != wanted["queue"].shape == found["queue"].T.shape:
        found["queue"] = found["queue"].T.contiguous()
    wrong = differences(found, wanted)
    if wrong:
        raise UserError(f"{path}: does not fit this model (dim, K, mlp?): {wrong}")
    load_optimizer(checkpoint, path, optimizer)
    model.load_state_dict(found)
    return checkpoint["epoch"]


def resume_index(checkpoint, path, queue_index):
    """Put a checkpoint's `queue_index`, the images' numbers of the queue's rows, into the model's, both (K,).

    Raises UserError if there is none, or one of another shape.
    """
    found = checkpoint.get("queue_index")
    if not isinstance(found, torch.Tensor) or found.dtype != torch.int64 or found.shape != queue_index.shape:
        raise UserError(f"{path}: --mask-same-image: it does not say of which images its {len(queue_index)} rows are")
    queue_index.copy_(found)


def check_epoch(checkpoint, path):
    """Raise UserError unless its epoch is a number of epochs done."""
    if not isinstance(checkpoint["epoch"], int) or checkpoint["epoch"] < 0:
        raise UserError(f"{path}: its epoch is {checkpoint['epoch']!r}, not a number of epochs done")


def load_optimizer(checkpoint, path, optimizer):
    """Load a checkpoint's momentum; learning rate, momentum's factor and weight decay stay those of the command line.

    Raises UserError if it does not fit; the optimiser is then as it was.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({_first_line(error)})") from error
    for group, setting in zip(optimizer.param_groups, settings):
        group.update(setting)


def differences(found, wanted):
    """How the tensors of two state dicts differ in names and shapes, in words; "" where they do not.

    BatchNorm's `num_batches_tracked` may lack: weights of the time before it have none, and nothing here reads it.
    """
    kinds = {
        "missing": [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} ({tuple(found[name].shape)} where {tuple(wanted[name].shape)} is wanted)"
            for name in wanted
            if name in found and found[name].shape != wanted[name].shape
        ],
    }
    return "; ".join(
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    )


def backbone(checkpoint, path, head="fc", *, arch=None, classifier=False):
    """The backbone's weights in a checkpoint, under torchvision's names, without the head.

    checkpoint: from `load`: ours, SynCo's or MoCo's pretraining (the query encoder is taken), or a network of
    torchvision's, with or without `module.`; a trained classifier with `classifier=True` alone.
    head: the head's name, left out; arch: the network's name, compared with the checkpoint's if it has one.
    Raises UserError if the checkpoint is of another network or a classifier's.
    """
    if arch and checkpoint.get("arch", arch) != arch:
        raise UserError(f"{path}: is a checkpoint of {checkpoint['arch']!r}; --arch is {arch!r}")
    if is_classifier(checkpoint) and not classifier:
        raise UserError(f"{path}: is a classifier's checkpoint; --pretrained takes a pretraining's")
    weights = unprefixed(checkpoint["state_dict"])
    if is_pretraining(checkpoint):
        weights = {name.removeprefix(ENCODER): w for name, w in weights.items() if name.startswith(ENCODER)}
    return {name: w for name, w in weights.items() if not name.startswith((head + ".", *AUXILIARY))}


def is_classifier(checkpoint):
    """Whether it comes from a linear probe or a fine-tuning."""
    return "best_acc1" in checkpoint


def is_pretraining(checkpoint):
    """Whether it comes from a contrastive pretraining."""
    return any(name.startswith(ENCODER) for name in unprefixed(checkpoint["state_dict"]))


def load_backbone(network, head, weights, path):
    """Put a `backbone` into a network, all but its head → how many tensors.

    Raises UserError that names the tensors that are missing, unknown, of another shape or not finite; the network is
    then as it was.
    """
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}
    wrong = differences(weights, wanted)
    if wrong:
        raise UserError(f"{path}: its weights do not fit this network: {wrong}")
    check_real(weights, path, whole=[name for name, tensor in wanted.items() if not tensor.is_floating_point()])
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds values that are not finite ({len(broken)} such tensors)")
    network.load_state_dict(weights, strict=False)  # strict but for the head
    return len(weights)


def check_real(weights, path, whole=()):
    """Raise UserError that names a tensor which does not hold real numbers one by one.

    whole: the names of counters and indices, which are of whole numbers.
    """
    for name, tensor in weights.items():
        kinds = (*REAL, torch.int64) if name in whole else REAL
        if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without numbers (meta)" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
            raise UserError(f"{path}: {name} is a tensor {kind}; weights are dense and of real numbers")


def summary(checkpoint, path, count):
    """What was loaded, in words: where from, its network and epochs, how many tensors."""
    of = "the query encoder" if is_pretraining(checkpoint) else "the network"
    known = [checkpoint["arch"]] if "arch" in checkpoint else []
    known += [f"{checkpoint['epoch']} epochs"] if "epoch" in checkpoint else []
    return f"{', '.join([path, *known])}: {count} tensors of {of}"


def sha256(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def choose_seed(given, path, config):
    """A run's seed: as given, as in the settings of the checkpoint it goes on from, or a new one."""
    stored = config.get("seed")
    if isinstance(stored, int) and 0 <= stored < 2**32:
        if given not in (None, stored):
            raise UserError(f"--seed {given}: {path} was run with seed {stored}; leave --seed out to go on")
        return stored
    return int.from_bytes(os.urandom(4), "little") if given is None else given


def resume_path(args, mine, own):
    """The checkpoint that --resume asks for, or None; refuses a --save-dir or --log-dir that holds something else.

    mine: the checkpoints of a run of this program in --save-dir, oldest first; own: the names of its other files.
    """
    newest = mine[-1] if mine else None
    path = newest if args.resume == "auto" else args.resume or None
    if path and not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    if os.path.exists(args.save_dir) and not os.path.isdir(args.save_dir):
        raise UserError(f"--save-dir {args.save_dir}: is not a folder")
    inside = bool(path) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(args.save_dir)
    strange = [product for product in products(args.save_dir) if product not in {*mine, *own}]
    if strange and not inside:
        raise UserError(
            f"--save-dir {args.save_dir} holds a run of another program ({os.path.basename(strange[0])}); give another"
        )
    if inside and args.overwrite:
        raise UserError(f"--overwrite would remove {path}, which --resume names; give one of the two")
    if inside and os.path.basename(path) in [os.path.basename(older) for older in mine[:-1]]:
        raise UserError(f"--resume {path}: --save-dir holds the newer {newest}, which would be left; give another")
    held = mine[-1:] or [name for name in own if os.path.exists(name)]
    if held and not inside and not args.overwrite:
        raise UserError(
            f"--save-dir {args.save_dir} holds another run ({os.path.basename(held[0])}): --resume auto "
            "goes on with it, --overwrite starts anew, another --save-dir leaves it alone"
        )
    apart = os.path.realpath(args.log_dir) != os.path.realpath(args.save_dir)
    if apart and not path and not args.overwrite and metrics.log_files(args.log_dir):
        raise UserError(f"--log-dir {args.log_dir} holds the log of another run; give another, or --overwrite")
    return path


def products(folder):
    """The files in a folder that only a run of one of the programs leaves there, whichever it was."""
    patterns = ("checkpoint_*.pth.tar", "model_best_*.pth.tar", "result.json")
    return [path for pattern in patterns for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))]


def prepare_folders(args, mine, own, fresh):
    """Make the output folders if both can be written; a fresh start removes what another left in them.

    `resume_path` has seen to it that this is a run that --overwrite gives up, or one that left no checkpoint.
    """
    make_folders(args.save_dir, args.log_dir)
    old = [*mine, *(path for path in own if os.path.exists(path))] if args.overwrite else []
    for path in old + (metrics.log_files(args.log_dir) if fresh or args.overwrite else []):
        os.remove(path)


def make_folders(*folders):
    """Make these folders, all or none. Raises UserError that names one that cannot be written."""
    for folder in folders:
        there = os.path.abspath(folder)
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
