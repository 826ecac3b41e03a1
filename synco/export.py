"""A checkpoint's backbone as a file that others load: torchvision's names, as .pth or as .safetensors.

  python -m synco.export runs/synco/checkpoint_0199.pth.tar resnet50.pth
  python -m synco.export runs/synco/checkpoint_0199.pth.tar resnet50.safetensors

CHECKPOINT is a pretraining's (its query encoder is taken), a linear probe's, a fine-tuning's, or a file of torchvision
weights. The backbone is compared with torchvision's network, name by name and shape by shape. OUT.pth is a plain state
dict, which torch.load(OUT, weights_only=True) reads; OUT.safetensors, for which safetensors must be installed, carries
the checkpoint's name of the network, epoch and SHA-256 in its metadata.
"""

import argparse
import importlib.util
import io
import os

import torch

from synco import builder, checkpoint, distributed, metrics, options
from synco.options import UserError

SUFFIXES = (".pth", ".safetensors")


def parse():
    """The command line of `python -m synco.export`."""
    parser = options.Parser(__doc__)
    parser.prog = "python -m synco.export"
    add_arguments(parser, output="OUT", suffixes=SUFFIXES)
    parser.add_argument("--with-head", action="store_true", help="the head too, under its own names (fc.0.weight ...)")
    return parser.parse_args()


def add_arguments(parser, *, output, suffixes):
    """From which checkpoint to which file."""
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="checkpoint of SynCo or MoCo, or a torchvision network's weights")
    flag("output", metavar=output, help=f"file to write, {' or '.join(suffixes)}, in a folder that is there")
    flag("-a", "--arch", type=options.architecture, help="torchvision network, where the checkpoint does not name it")
    flag("--force", action="store_true", help="write over an output file that is there")


def run(args):
    """Load the backbone, write it, tell what was written."""
    check_output(args, SUFFIXES)
    if args.output.endswith(".safetensors") and importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{args.output}: safetensors is not installed; pip install safetensors, or write a .pth")
    network, head, saved = load(args.checkpoint, args.arch)
    tensors = backbone(network, head)
    if args.with_head:
        tensors |= head_weights(saved, args.checkpoint, head)
    facts = origin(saved, args.checkpoint)
    try:
        write(tensors, args.output, facts)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
    metrics.tell(facts | {"tensors": len(tensors), "size": size(tensors.values()), "written": args.output})


def check_output(args, suffixes):
    """Raises UserError if the output file has none of these suffixes, is there already, or cannot be written."""
    path = args.output
    if "\0" in path:
        raise UserError(f"{path!r}: no file can have that name")
    if not path.endswith(suffixes):
        raise UserError(f"{path}: the file to write must end in {' or '.join(suffixes)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder")
    if os.path.exists(path) and os.path.exists(args.checkpoint) and os.path.samefile(path, args.checkpoint):
        raise UserError(f"{path}: is the checkpoint itself")
    if os.path.lexists(path) and not args.force:
        raise UserError(f"{path}: is there already; --force writes over it")
    checkpoint.make_folders(folder)  # sees whether a file can be made there


def load(path, arch=None, stem=None):
    """A checkpoint's backbone in its network → (the network, its head's name, the checkpoint as a dict).

    path: a pretraining's checkpoint, a classifier's, or torchvision weights; arch, stem: the network's name and stem,
    wanted where the file does not say. The network's head has 1,000 outputs and is untrained; the dict has an `arch`,
    a `stem` and its `stats` in any case.
    Raises UserError if the file is no such checkpoint, or of another network, or does not say of which.
    """
    saved = checkpoint.load(path)
    arch = architecture(saved, path, arch)
    # a vision transformer has a parameter for every patch
    found = argparse.Namespace(dataset="imagefolder", stem=stem, img_size=None, stats=None)
    options.settle(found, path, saved["config"])
    try:
        with builder.fitting(arch, found.img_size):
            network = builder.network_of(arch, found.img_size, found.stem)(num_classes=1000)
            head = builder.head_name(network, 1000)
    except UserError as error:
        raise UserError(f"{path}: its network cannot be built: {error}") from error
    if saved.get("arch", arch) != arch:
        raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}, not of {arch!r}")
    weights = checkpoint.backbone(saved, path, head, classifier=True)
    if not weights.keys() & network.state_dict().keys():
        raise UserError(f"{path}: has no backbone: neither a pretraining's encoder_q.* nor the names of a {arch}")
    checkpoint.load_backbone(network, head, weights, path)
    return network, head, {**saved, "arch": arch, "stem": found.stem, "stats": found.stats}


def architecture(saved, path, arch):
    """The network's name: as given, or the checkpoint's. Raises UserError if neither names one of torchvision's."""
    arch = arch or saved.get("arch")
    if arch is None:
        raise UserError(f"{path}: does not say of which network it is; give --arch")
    try:
        return options.architecture(str(arch))
    except argparse.ArgumentTypeError as error:
        name, _, _ = str(error).partition(";")  # without the hint, which is for what was typed
        raise UserError(f"{path}: {name}") from error


def backbone(network, head):
    """A network's state dict without its head."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}


def head_weights(saved, path, head):
    """The head that the checkpoint holds, under its own names. Raises UserError if there is none that holds numbers."""
    weights = checkpoint.unprefixed(saved["state_dict"])
    prefix = checkpoint.ENCODER if checkpoint.is_pretraining(saved) else ""
    found = {name: tensor for name, tensor in weights.items() if name.startswith(f"{prefix}{head}.")}
    if not found:
        raise UserError(f"{path}: --with-head: there is no head ({head}.*) in it")
    checkpoint.check_real(found, path)
    return {
        name.removeprefix(prefix): tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()
    }


def origin(saved, path):
    """Where weights from `load` come from: {"checkpoint_sha256", "arch", "epoch"}, the epoch if the file has one.

    With "stem" and "stats" where they are not ImageNet's: whoever uses the weights must know.
    """
    facts = {"checkpoint_sha256": checkpoint.sha256(path), "arch": saved["arch"]}
    facts |= {"epoch": saved["epoch"]} if isinstance(saved.get("epoch"), int) else {}
    return facts | {name: saved[name] for name in ("stem", "stats") if saved[name] != "imagenet"}


def write(tensors, path, facts):
    """Write {name: tensor} as the file's suffix says, whole or not at all."""
    if path.endswith(".safetensors"):
        import safetensors.torch  # an optional package, used for this format alone

        content = safetensors.torch.save(tensors, {name: str(value) for name, value in facts.items()})
    else:
        buffer = io.BytesIO()  # torch.save hides what goes wrong on a disk, a full one for instance
        torch.save(tensors, buffer)
        content = buffer.getbuffer()
    with checkpoint.whole(path) as file:
        file.write(content)


def size(tensors):
    """How much memory tensors take, in words."""
    return f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6:.1f} MB"


if __name__ == "__main__":
    distributed.command(run, parse)
