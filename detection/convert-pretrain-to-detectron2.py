#!/usr/bin/env python3
"""Convert a pretrained ResNet to a weights file of detectron2.

  python3 convert-pretrain-to-detectron2.py input.pth.tar output.pkl

CHECKPOINT is that of a pretraining (its query encoder is taken) or a file of torchvision weights; ResNets, ResNeXts and
wide ResNets of torchvision are converted, others refused. The head and BatchNorm's counters stay out. The pickle also
holds the network's name, the epoch and the SHA-256 of CHECKPOINT (keys arch, epoch, checkpoint_sha256).
"""

import os
import pickle
import re
import sys

# the package lies one folder up: works from any folder, without an installation
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from torchvision.models import ResNet

from synco import backbone, checkpoint, export, files, metrics, options
from synco.errors import UserError
from synco.launch import command

SUFFIXES = (".pkl",)  # by which detectron2 knows the format


def parse():
    parser = options.Parser(__doc__)
    export.add_arguments(parser, output="OUTPUT", suffixes=SUFFIXES)
    parser.add_argument("--verbose", action="store_true", help="print the tensors' names")
    return parser.parse_args()


def run(args):
    export.check_output(args, SUFFIXES)
    network, head, saved = export.load(args.checkpoint, args.arch)
    if not isinstance(network, ResNet):
        raise UserError(f"{args.checkpoint}: is of a {saved['arch']}; detectron2's names are those of ResNets alone")
    if saved["stem"] != "imagenet":
        raise UserError(f"{args.checkpoint}: is of a ResNet with the stem {saved['stem']!r}, which detectron2 has not")
    if backbone.is_classifier(saved):
        raise UserError(
            f"{args.checkpoint}: is a classifier's checkpoint, not a pretraining's; "
            "for its backbone convert what python -m synco.export makes of it"
        )
    weights = {name: w for name, w in export.without_head(network, head).items() if not is_counter(name)}
    facts = export.origin(saved, args.checkpoint)
    content = {
        "model": {detectron2_name(name): w.numpy() for name, w in weights.items()},
        "__author__": "SynCo",
        "matching_heuristics": True,  # has detectron2 find each name's place: stem.* under backbone.*, say
        **facts,
    }
    try:
        with files.atomic_write(args.output) as file:
            pickle.dump(content, file)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
    if args.verbose:
        for name, w in weights.items():
            print(f"{name} → {detectron2_name(name)} {tuple(w.shape)}")
    metrics.print_facts(facts)
    report(saved["state_dict"], weights, head, verbose=args.verbose)
    metrics.print_facts({"written": args.output})


def is_counter(name):
    """Whether it is BatchNorm's count of batches, which detectron2 does not use."""
    return name.endswith("num_batches_tracked")


def detectron2_name(name):
    """detectron2's name of a tensor of torchvision's ResNet, such as layer1.0.bn2.bias → res2.0.conv2.norm.bias."""
    if name.startswith(("conv1.", "bn1.")):
        name = "stem." + name
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def report(state_dict, kept, head, *, verbose):
    """Print how many of a checkpoint's tensors were kept and dropped, and their size."""
    state = checkpoint.unprefixed(state_dict)
    encoder = backbone.ENCODER if any(name.startswith(backbone.ENCODER) for name in state) else ""
    rows = {"kept": {}, "dropped: head": {}, "dropped: counters": {}, "dropped: others": {}}
    for name, tensor in state.items():
        inner = name.removeprefix(encoder)
        if not name.startswith(encoder):
            rows["dropped: others"][name] = tensor  # the key encoder and the queue
        elif inner in kept:
            rows["kept"][name] = tensor
        elif inner.startswith(head + "."):
            rows["dropped: head"][name] = tensor
        else:
            rows["dropped: counters"][name] = tensor
    if verbose:
        for name in (name for kind in rows if kind != "kept" for name in rows[kind]):
            print(f"{name} dropped")
    for kind, tensors in rows.items():
        print(f"{kind:18} {len(tensors):4} tensors  {export.size_in_words(tensors.values()):>9}")


if __name__ == "__main__":
    command(run, parse)
