"""A checkpoint's backbone as a file that others load: torchvision's names, as .pth or as .safetensors.

  python -m synco.export runs/synco/checkpoint_0199.pth.tar resnet50.pth
  python -m synco.export runs/synco/checkpoint_0199.pth.tar resnet50.safetensors
  python -m synco.export runs/synco/checkpoint_0199.pth.tar --card card --results runs/synco/*/result.json

CHECKPOINT is a pretraining's (its query encoder is taken), a linear probe's, a fine-tuning's, or a file of torchvision
weights. The backbone is compared with torchvision's network, name by name and shape by shape. OUT.pth is a plain state
dict, which torch.load(OUT, weights_only=True) reads; OUT.safetensors, for which safetensors must be installed, carries
the checkpoint's name of the network, epoch and SHA-256 in its metadata. --card writes a folder that timm loads (timm
must be installed), whose README.md says what the backbone is: method, data, recipe, results, and where it comes from.
"""

import argparse
import importlib.util
import io
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from synco import backbone, card, checkpoint, files, metrics, networks, options
from synco.errors import UserError
from synco.launch import command

SUFFIXES = (".pth", ".safetensors")


def parse() -> argparse.Namespace:
    """The command line of `python -m synco.export`."""
    parser = options.Parser(__doc__)
    parser.prog = "python -m synco.export"
    add_arguments(parser, output="OUT", suffixes=SUFFIXES, required=False)
    parser.add_argument("--with-head", action="store_true", help="the head too, under its own names (fc.0.weight ...)")
    parser.add_argument("--card", metavar="FOLDER", help="write a model card there, in place of OUT")
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="with --card: result.json files, and what synco.evaluate -o wrote",
    )
    args = parser.parse_args()
    if args.results and args.card is None:
        parser.error("--results goes with --card FOLDER")
    if args.output is None and args.card is None:
        parser.error("the following arguments are required: OUT, or --card FOLDER")
    if args.card is not None and (args.output is not None or args.with_head):
        parser.error(f"--card {args.card}: goes without OUT and --with-head")
    return args


def add_arguments(
    parser: argparse.ArgumentParser, *, output: str, suffixes: tuple[str, ...], required: bool = True
) -> None:
    """From which checkpoint to which file; output: what --help calls that file; required: whether it must be given."""
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="checkpoint of SynCo or MoCo, or a torchvision network's weights")
    kind = f"file to write, {' or '.join(suffixes)}, in a folder that is there"
    flag("output", metavar=output, nargs=None if required else "?", help=kind)
    flag("-a", "--arch", type=options.architecture, help="torchvision network, where the checkpoint does not name it")
    flag("--force", action="store_true", help="write over an output file that is there")


def run(args: argparse.Namespace) -> None:
    """Load the backbone, write it, tell what was written."""
    if args.card is not None:
        return write_card(args)
    check_output(args, SUFFIXES)
    if args.output.endswith(".safetensors") and importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{args.output}: safetensors is not installed; pip install safetensors, or write a .pth")
    network, head, saved = load(args.checkpoint, args.arch)
    tensors = without_head(network, head)
    if args.with_head:
        tensors |= head_weights(saved, args.checkpoint, head)
    facts = origin(saved, args.checkpoint)
    try:
        write(tensors, args.output, facts)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
    facts |= {"tensors": len(tensors), "size": size_in_words(tensors.values()), "written": args.output}
    metrics.print_facts(facts)


def write_card(args: argparse.Namespace) -> None:
    """Write the model card that --card asks for, tell what was written."""
    card.check_folder(args.card, force=args.force)
    network, head, saved = load(args.checkpoint, args.arch)
    facts = origin(saved, args.checkpoint)
    digest = facts["checkpoint_sha256"]
    results = card.read_results(args.results, args.checkpoint, digest)
    card.write(args.card, network, head, saved, card.describe(args.card, args.checkpoint, saved, digest, results))
    metrics.print_facts(facts | {"results": len(results), "written": args.card})


def check_output(args: argparse.Namespace, suffixes: tuple[str, ...]) -> None:
    """Raise UserError if the output file has none of these suffixes, is there already, or cannot be written."""
    path = args.output
    if not path.endswith(suffixes):
        raise UserError(f"{path}: the file to write must end in {' or '.join(suffixes)}")
    files.check_output(path)
    if os.path.exists(path) and os.path.exists(args.checkpoint) and os.path.samefile(path, args.checkpoint):
        raise UserError(f"{path}: is the checkpoint itself")
    if os.path.lexists(path) and not args.force:
        raise UserError(f"{path}: is there already; --force writes over it")


def load(path: str, arch: str | None = None, stem: str | None = None) -> tuple[nn.Module, str, dict[str, Any]]:
    """A checkpoint's backbone in its network → (the network, its head's name, the checkpoint as a dict).

    path: a pretraining's checkpoint, a classifier's, or torchvision weights; arch, stem: the network's name and stem,
    wanted where the file does not say. The network's head has 1,000 outputs and is untrained; the dict has an `arch`,
    a `stem`, its `stats` and an `img_size` in any case.
    Raises UserError if the file is no such checkpoint, or of another network, or does not say of which.
    """
    saved = checkpoint.load(path)
    arch = architecture(saved, path, arch)
    given = argparse.Namespace(dataset="imagefolder", stem=stem, img_size=None, stats=None)
    settings = options.resolve_image_settings(given, path, saved["config"])
    size = settings["img_size"]  # a vision transformer has a parameter for every patch
    try:
        with networks.network_errors_as_user_errors(arch, size):
            network = networks.network_of(arch, size, settings["stem"])(num_classes=1000)
            head = networks.head_name(network, 1000)
    except UserError as error:
        raise UserError(f"{path}: its network cannot be built: {error}") from error
    if saved.get("arch", arch) != arch:
        raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}, not of {arch!r}")
    weights = backbone.weights_of(saved, path, head, classifier=True)
    if not weights.keys() & network.state_dict().keys():
        raise UserError(f"{path}: has no backbone: neither a pretraining's encoder_q.* nor the names of a {arch}")
    backbone.load_backbone(network, head, weights, path)
    return network, head, saved | {"arch": arch} | settings


def architecture(saved: dict[str, Any], path: str, arch: str | None) -> str:
    """The network's name: as given, or the checkpoint's. Raises UserError if neither names one of torchvision's."""
    arch = arch or saved.get("arch")
    if arch is None:
        raise UserError(f"{path}: does not say of which network it is; give --arch")
    try:
        return options.architecture(str(arch))
    except argparse.ArgumentTypeError as error:
        name, _, _ = str(error).partition(";")  # without the hint, which is for what was typed
        raise UserError(f"{path}: {name}") from error


def without_head(network: nn.Module, head: str) -> dict[str, torch.Tensor]:
    """A network's state dict without its head, which has the name `head`."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}


def head_weights(saved: dict[str, Any], path: str, head: str) -> dict[str, torch.Tensor]:
    """The head that the checkpoint holds, under its own names. Raises UserError if there is none that holds numbers."""
    found = backbone.head_of(saved, head)
    if not found:
        raise UserError(f"{path}: --with-head: there is no head ({head}.*) in it")
    checkpoint.check_real(found, path)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def origin(saved: dict[str, Any], path: str) -> dict[str, Any]:
    """Where weights from `load` come from: {"checkpoint_sha256", "arch", "epoch"}, the epoch if the file has one.

    With "stem" and "stats" where they are not ImageNet's: whoever uses the weights must know.
    """
    facts = {"checkpoint_sha256": files.sha256(path), "arch": saved["arch"]}
    if isinstance(saved.get("epoch"), int):
        facts["epoch"] = saved["epoch"]
    return facts | {name: saved[name] for name in ("stem", "stats") if saved[name] != "imagenet"}


def write(tensors: dict[str, torch.Tensor], path: str, facts: dict[str, Any]) -> None:
    """Write {name: tensor} as the file's suffix says, whole or not at all. Raises OSError if it cannot be written."""
    if path.endswith(".safetensors"):
        import safetensors.torch  # an optional package, used for this format alone

        content = safetensors.torch.save(tensors, {name: str(value) for name, value in facts.items()})
    else:
        buffer = io.BytesIO()  # torch.save hides what goes wrong on a disk, a full one for instance
        torch.save(tensors, buffer)
        content = buffer.getbuffer()
    with files.atomic_write(path) as file:
        file.write(content)


def size_in_words(tensors: Iterable[torch.Tensor]) -> str:
    """How much memory tensors take, such as "94.1 MB"."""
    return f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6:.1f} MB"


if __name__ == "__main__":
    command(run, parse)
