"""Checkpoints: written atomically, loaded without executing anything, resumed exactly; ours, SynCo's and MoCo's."""

import contextlib
import glob
import hashlib
import json
import os
import pickle
import re
import secrets
import struct
import tempfile
import warnings
import zipfile

import torch

from synco import distributed, loader, metrics, survival
from synco.options import UserError

# what torch, zipfile and pickle raise on files that are truncated or of another kind
DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error,
    ArithmeticError, AssertionError, MemoryError, zipfile.BadZipFile,
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
        _sync_folder(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync_folder(folder):
    """Flush a folder's entries to disk, where the system lets a folder be opened: a rename is one of them."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


class _Hashing:
    """A file to write to that keeps the SHA-256 of what was written, and the error that torch.save would hide."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self):
        self.file.flush()


# What follows a checkpoint of ours, as the comment that a zip archive may end with: torch.load passes over it, and it
# stays with the file. The digest is of the file as torch.save wrote it, whose comment has the length 0.
SEAL = re.compile(rb"synco sha256 ([0-9a-f]{64})")
SEALED = len(b"synco sha256 ") + 64


def save(checkpoint, path):
    """Write a checkpoint, whole or not at all; what a killed attempt at it has left is removed.

    Raises OSError if it cannot be written; the file that was there is then as it was.
    """
    for left in glob.glob(f"{glob.escape(path)}.????????.tmp"):
        os.remove(left)
    with whole(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, hashing)
        except RuntimeError:
            raise hashing.error or RuntimeError(f"{path}: torch cannot write it") from None
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEALED) + b"synco sha256 " + hashing.digest.hexdigest().encode())


def try_to_save(checkpoint, path):
    """`save`, if it can: a line that says why not, for the run to go on until the next save, or "".

    Raises FloatingPointError if weights or momentum are not finite: such a file would replace a good one.
    """
    check_before_saving(checkpoint)
    try:
        save(checkpoint, path)
        return ""
    except OSError as error:
        problem = f"{path}: cannot be written ({error.strerror or error}); the checkpoint before it is whole"
        distributed.warn(problem)
        return problem


def check_whole(path):
    """Raise UserError if a file is damaged, as far as it can tell: by its seal, else by the zip's own checksums.

    The seal covers every bit of the file. Those of MoCo and SynCo have none; in torch's format of before 2020 there is
    nothing to check. Archives that would have to be unpacked are refused: torch.save writes none.
    """
    damaged = UserError(f"{path}: not a whole checkpoint file: truncated, damaged or of another kind")
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                if SEAL.search(_tail(file, SEALED)):
                    raise damaged
                return
            end = _tail(file, 22 + SEALED)
            if end[-22:].startswith(b"PK\5\6") and end[-2:] == b"\0\0":  # no comment
                with zipfile.ZipFile(file) as archive:
                    packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
                    if packed or archive.testzip() is not None:
                        raise damaged
                return
            seal = SEAL.fullmatch(end[22:])
            if not seal or end[20:22] != struct.pack("<H", SEALED):
                raise damaged
            digest, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - SEALED - 2
            file.seek(0)
            while left:
                block = file.read(min(left, 1 << 20))
                if not block:
                    raise damaged
                digest.update(block)
                left -= len(block)
            digest.update(b"\0\0")
            if digest.hexdigest().encode() != seal[1]:
                raise damaged
    except DAMAGED as error:
        raise error if error is damaged else damaged from error


def _tail(file, count):
    """The last bytes of a file, as many as there are of `count`."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - count))
    return file.read(count)


def load(path):
    """A checkpoint as a dict of CPU tensors and plain values, new or old format; nothing in it is executed.

    It has a `state_dict` (a file of weights alone becomes one) and a `config`, empty where the file has none.

    Raises UserError that names a file which is missing, truncated, not a checkpoint, or needs more than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    check_whole(path)
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


def find(args, mine, own):
    """What --resume asks for: (path, the loaded checkpoint), or (None, None) for a fresh start. For every process.

    mine: the checkpoints of a run of this program in --save-dir, oldest first; own: the names of its other files. With
    'auto' the newest that is whole; a warning says which ones are not.
    """
    path = saved = None
    if distributed.rank() == 0:
        path = resume_path(args, mine, own)
        damaged = []
        for path in reversed(mine) if args.resume == "auto" else []:
            try:
                saved = load(path)
                break
            except UserError as error:
                damaged.append(str(error))
        if damaged and saved is None:
            raise UserError(f"--resume auto: no checkpoint in {args.save_dir} is whole, the newest: {damaged[0]}")
        for why in damaged:
            distributed.warn(f"{why}; going on from {path}")
    path = distributed.from_rank_0(path)
    if path and saved is None:
        saved = load(path)
    return path, saved


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
    check_values(found, path, wanted)
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


def position(checkpoint, path, steps):
    """How many steps a run has done, of `steps` an epoch; one that does not say stopped after a whole epoch, as MoCo's
    and SynCo's own do. Raises UserError if it makes no sense here."""
    epoch = checkpoint["epoch"]
    step = checkpoint.get("step")
    if "steps_per_epoch" not in checkpoint:  # the last epoch of ours may have been cut short
        return step if isinstance(step, int) and (epoch - 1) * steps < step < epoch * steps else epoch * steps
    per = checkpoint["steps_per_epoch"]
    if not all(isinstance(x, int) for x in (step, per)) or not (epoch - 1) * per < step <= (epoch + 1) * per:
        raise UserError(f"{path}: its step is {step!r} after {epoch!r} epochs of {per!r} steps")
    if step % per and per != steps:
        raise UserError(f"{path}: was stopped within an epoch of {per} steps; here an epoch has {steps}")
    return step + epoch * (steps - per)


def resume_averages(checkpoint, path, averages, process):
    """Load the averages since the last progress line, so that the next line is that of a run which never stopped."""
    if checkpoint.get("averages") is not None:
        try:
            averages.restore(checkpoint["averages"], process.rank, process.world_size, process.device)
        except ValueError as error:
            raise UserError(f"{path}: its averages are {error}") from error


def skipped(checkpoint, path, count):
    """The numbers of the bad images, of `count`, that a run had replaced before; none without a checkpoint."""
    found = checkpoint.get("skipped", []) if checkpoint else []
    if not isinstance(found, list) or not all(isinstance(index, int) and 0 <= index < count for index in found):
        raise UserError(f"{path}: its list of replaced images is none")
    return found


def tell_resumed(path, position, process, before, changed):
    """Print what a run goes on from, and what differs from the run before. position: (epochs, steps of the next)."""
    epochs, steps = position
    within = f" and {steps} steps of the next" if steps else ""
    metrics.tell({"resumed": f"{path}, {epochs} epochs{within} done"})
    if before.get("processes", process.world_size) != process.world_size:
        metrics.tell(
            {
                "processes": f"{before['processes']} → {process.world_size}: the same images in each step, but not the "
                "same numbers, as BatchNorm sees other parts of them"
            }
        )
    if changed:
        metrics.tell({"changed": "; ".join(changed)})


def load_optimizer(checkpoint, path, optimizer):
    """Load a checkpoint's momentum; learning rate, momentum's factor and weight decay stay those of the command line.

    Raises UserError if it does not fit; the optimiser is then as it was.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for number, state in checkpoint["optimizer"]["state"].items():
            for name, tensor in state.items():
                if isinstance(tensor, torch.Tensor) and tensor.dim():  # a tensor of one number is a count
                    if tensor.shape != parameters[number].shape:
                        raise ValueError(f"{name} {number} has the shape {tuple(tensor.shape)}")
                    check_values({f"{name} {number}": tensor}, path)
        groups = checkpoint["optimizer"]["param_groups"]
        # put in before, since it depends on them where a state lies: a fused AdamW's counts of steps are on the device
        groups = [group | setting for group, setting in zip(groups, settings, strict=True)]
        optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({_first_line(error)})") from error


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
    check_values(weights, path, wanted)
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


def check_values(tensors, path, wanted=None):
    """Raise UserError that names a tensor which does not hold finite real numbers, or whole ones where those in
    `wanted` are."""
    check_real(tensors, path, whole=[name for name, like in (wanted or {}).items() if not like.is_floating_point()])
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"{path}: {broken[0]} holds values that are not finite ({len(broken)} such tensors)")


def not_finite(tensors):
    """The names of those among {name: tensor} that hold infinities or NaN, with one read from the device."""
    if not tensors:
        return []
    device = next(iter(tensors.values())).device
    good = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors.values()]).tolist()
    return [name for name, fine in zip(tensors, good) if not fine]


def check_before_saving(content):
    """Raise FloatingPointError if weights or momentum are not finite: such a file would replace a good one."""
    tensors = dict(content["state_dict"])
    for number, state in content["optimizer"]["state"].items():
        tensors |= {f"{name} {number}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    broken = not_finite(tensors)
    if broken:
        raise FloatingPointError(f"{broken[0]} is not finite ({len(broken)} such tensors); nothing was saved")


def check_finite(finite, batches, epoch, i, rates, mine, folder):
    """Raise FloatingPointError if a loss or gradient was not finite up to step i of an epoch; for every process.

    It names the first such step, the learning rates (`rates`) and the newest of the checkpoints `mine`;
    nonfinite.json in `folder` has the images of that step.
    """
    first = finite.first_bad(distributed.from_all)
    if first is None:
        return
    images = loader.images_of(batches, epoch, first)
    report = os.path.join(folder, "nonfinite.json")
    if distributed.rank() == 0:
        with contextlib.suppress(OSError), whole(report) as file:
            content = {"epoch": epoch, "step": first, "noticed": i, "rates": rates, "images": images}
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    raise FloatingPointError(
        f"the loss or its gradient is not finite from step {first} of epoch {epoch} on ({rates}; noticed at step {i}); "
        f"its images: {report}; last good checkpoint: {mine[-1] if mine else 'none'}"
    )


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
    lock(args)
    newest = mine[-1] if mine else None
    if args.restarted:  # by torchrun, after this very run began: what --save-dir holds is its own
        args.overwrite, args.resume = False, "auto" if mine else args.resume
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
    if apart and not path and not (args.overwrite or args.restarted) and metrics.log_files(args.log_dir):
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
    lock(args)
    if fresh and not args.overwrite and products(args.save_dir):  # since `resume_path` looked, when there was no lock
        raise UserError(
            f"--save-dir {args.save_dir}: another run has used it meanwhile; give another, or --resume auto"
        )
    for pattern in ("checkpoint_*.pth.tar", "model_best_*.pth.tar"):  # what killed writes have left: the lock is ours
        for left in glob.glob(os.path.join(glob.escape(args.save_dir), f"{pattern}.????????.tmp")):
            os.remove(left)
    marker = os.path.join(args.save_dir, survival.MARKER)
    if os.path.exists(marker):
        os.remove(marker)
    old = [*mine, *(path for path in own if os.path.exists(path))] if args.overwrite else []
    for path in old + (metrics.log_files(args.log_dir) if fresh or args.overwrite else []):
        os.remove(path)
    distributed.began()


def lock(args):
    """Lock --save-dir, if it is there, for this run. Raises UserError if another one has it."""
    if os.path.isdir(args.save_dir):
        try:
            survival.lock(args.save_dir)
        except OSError as error:
            raise UserError(f"{args.save_dir}: cannot be written ({error.strerror})") from error


def leave(args, saves, step, name):
    """Leave a run that was told to stop and has saved: raise `survival.Preempted` in every process.

    Writes preempted.json, which tells a script where the run goes on. saves: the run's `survival.Saves`; step: how many
    are done; name: of the checkpoint that holds them.
    """
    heard = next(filter(None, distributed.from_all(survival.warned())), None)  # perhaps by one process alone
    if distributed.rank() == 0:
        content = {"signal": heard, "step": step, "checkpoint": name}
        try:
            with whole(os.path.join(args.save_dir, survival.MARKER)) as file:
                file.write(json.dumps(content).encode() + b"\n")
        except OSError as error:
            distributed.warn(f"{args.save_dir}: {survival.MARKER} cannot be written ({error.strerror})")
    saves.together()
    raise survival.Preempted(f"Told to stop: {os.path.join(args.save_dir, name)} holds {step} steps.")


def make_folders(*folders):
    """Make these folders, all or none. Raises UserError that names one that cannot be written."""
    for folder in folders:
        there = os.path.abspath(folder)
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(1 << 16))  # a disk that is full lets files be made
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
