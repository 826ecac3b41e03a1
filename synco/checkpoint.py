"""The checkpoint file: written whole and sealed, loaded without executing anything, its tensors checked."""

import glob
import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection

import torch

from synco import files
from synco.errors import UserError

# what torch, zipfile and pickle raise on files that are truncated or of another kind
DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error,
    ArithmeticError, AssertionError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip

PREFIX = "module."  # what DistributedDataParallel writes, and what the published tools expect
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights are stored in


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


def save(checkpoint: dict, path: str) -> None:
    """Write a checkpoint, whole or not at all; what a killed attempt at it has left is removed.

    Raises OSError if it cannot be written; the file that was there is then as it was.
    """
    for left in glob.glob(f"{glob.escape(path)}.????????.tmp"):
        os.remove(left)
    with files.atomic_write(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, hashing)
        except RuntimeError:
            raise hashing.error or RuntimeError(f"{path}: torch cannot write it") from None
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEALED) + b"synco sha256 " + hashing.digest.hexdigest().encode())


def check_whole(path: str) -> None:
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
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise error if error is damaged else damaged from error


def _tail(file, count):
    """The last bytes of a file, as many as there are of `count`."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - count))
    return file.read(count)


def load(path: str) -> dict:
    """A checkpoint as a dict of CPU tensors and plain values, new or old format; nothing in it is executed.

    It has a `state_dict` (a file of weights alone, .safetensors among them, becomes one) and a `config`, empty where
    the file has none.

    Raises UserError that names a file which is missing, truncated, not a checkpoint, or needs more than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'is not a file' if os.path.exists(path) else 'no such checkpoint file'}")
    if os.fspath(path).endswith(".safetensors"):
        return _load_safetensors(path)
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


def _load_safetensors(path):
    """What `load` gives of a .safetensors file; the network's name, epoch, stem and statistics are `export`'s."""
    try:
        import safetensors.torch  # an optional package, used for this format alone
    except ImportError:
        raise UserError(f"{path}: safetensors is not installed; pip install safetensors") from None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        weights = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, *DAMAGED) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({_first_line(error)})") from error
    found = {"state_dict": weights, "config": {name: facts[name] for name in ("stem", "stats") if name in facts}}
    found |= {"arch": facts["arch"]} if "arch" in facts else {}
    return found | ({"epoch": int(facts["epoch"])} if facts.get("epoch", "").isdecimal() else {})


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def prefixed(state_dict: dict) -> dict:
    """A state dict under the published names, `module.` included however the run was launched."""
    return {PREFIX + name: value for name, value in state_dict.items()}


def unprefixed(state_dict: dict) -> dict:
    """A state dict without `module.`."""
    return {name.removeprefix(PREFIX): value for name, value in state_dict.items()}


def load_model(checkpoint: dict, path: str, model: torch.nn.Module) -> None:
    """Load a checkpoint's weights and buffers into a model; MoCo's (C, K) queue is turned.

    Raises UserError that names what is missing, of another shape or not finite; the model is then as it was.
    """
    wanted, weights = model.state_dict(), unprefixed(checkpoint["state_dict"])
    queues = weights.get("queue"), wanted.get("queue")
    if None not in queues and queues[0].shape != queues[1].shape == queues[0].T.shape:
        weights["queue"] = queues[0].T.contiguous()
    problem = differences(weights, wanted)
    if problem:
        raise UserError(f"{path}: does not fit this model (dim, K, mlp?): {problem}")
    check_values(weights, path, wanted)
    model.load_state_dict(weights)


def unreadable(checkpoint: dict | None, path: str | None, count: int) -> list[int]:
    """The numbers of the images, of `count`, that a run could not read before; none without a checkpoint."""
    numbers = checkpoint.get("skipped", []) if checkpoint else []
    if not isinstance(numbers, list) or not all(isinstance(i, int) and 0 <= i < count for i in numbers):
        raise UserError(f"{path}: its list of replaced images is none")
    return numbers


def check_epoch(checkpoint: dict, path: str) -> None:
    """Raise UserError unless its epoch is a number of epochs done."""
    if not isinstance(checkpoint["epoch"], int) or checkpoint["epoch"] < 0:
        raise UserError(f"{path}: its epoch is {checkpoint['epoch']!r}, not a number of epochs done")


def position(checkpoint: dict, path: str, steps: int) -> int:
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


def load_optimizer(checkpoint: dict, path: str, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's momentum; learning rate, momentum's factor and weight decay stay those of the command line.

    Each tensor gets its parameter's layout, whatever that of the run before was: a fused step pairs them by memory.
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
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                state[name] = torch.empty_like(parameter).copy_(tensor)


def differences(found: dict, wanted: dict) -> str:
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


def check_real(weights: dict, path: str, whole: Collection[str] = ()) -> None:
    """Raise UserError that names a tensor which does not hold real numbers one by one.

    whole: the names of counters and indices, which are of whole numbers.
    """
    for name, tensor in weights.items():
        kinds = (*REAL, torch.int64) if name in whole else REAL
        if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without numbers (meta)" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
            raise UserError(f"{path}: {name} is a tensor {kind}; weights are dense and of real numbers")


def check_values(tensors: dict, path: str, wanted: dict | None = None) -> None:
    """Raise UserError that names a tensor which does not hold finite real numbers, or whole ones where those in
    `wanted` are."""
    check_real(tensors, path, whole=[name for name, like in (wanted or {}).items() if not like.is_floating_point()])
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"{path}: {broken[0]} holds values that are not finite ({len(broken)} such tensors)")


def not_finite(tensors: dict) -> list[str]:
    """The names of those among {name: tensor} that hold infinities or NaN, with one read from the device."""
    if not tensors:
        return []
    device = next(iter(tensors.values())).device
    good = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors.values()]).tolist()
    return [name for name, fine in zip(tensors, good) if not fine]


def check_before_saving(content: dict) -> None:
    """Raise FloatingPointError if weights or momentum are not finite: such a file would replace a good one."""
    tensors = dict(content["state_dict"])
    for number, state in content["optimizer"]["state"].items():
        tensors |= {f"{name} {number}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    broken = not_finite(tensors)
    if broken:
        raise FloatingPointError(f"{broken[0]} is not finite ({len(broken)} such tensors); nothing was saved")
