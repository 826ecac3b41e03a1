"""The backbone in anybody's file: a checkpoint of ours, SynCo's or MoCo's, or a network's weights."""

import torch

from synco import checkpoint
from synco.errors import UserError

ENCODER = "encoder_q."  # the query encoder in a pretraining checkpoint
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # second classifiers in torchvision's weights, which we do not build


def weights_of(
    content: dict, path: str, head: str = "fc", *, arch: str | None = None, classifier: bool = False
) -> dict[str, torch.Tensor]:
    """The backbone's weights in a checkpoint, under torchvision's names, without the head.

    content: from `checkpoint.load`: ours, SynCo's or MoCo's pretraining (the query encoder is taken), or a network of
    torchvision's, with or without `module.`; a trained classifier with `classifier=True` alone.
    head: the head's name, left out; arch: the network's name, compared with the checkpoint's if it has one.
    Raises UserError if the checkpoint is of another network or a classifier's.
    """
    if arch and content.get("arch", arch) != arch:
        raise UserError(f"{path}: is a checkpoint of {content['arch']!r}; --arch is {arch!r}")
    if is_classifier(content) and not classifier:
        raise UserError(f"{path}: is a classifier's checkpoint; --pretrained takes a pretraining's")
    weights = _network(content)
    return {name: w for name, w in weights.items() if not name.startswith((head + ".", *AUXILIARY))}


def head_of(content: dict, head: str = "fc") -> dict[str, torch.Tensor]:
    """The head in a checkpoint, under its names in the network, {} where there is none. content, head: `weights_of`."""
    return {name: w for name, w in _network(content).items() if name.startswith(head + ".")}


def _network(content):
    """The weights of the network that is taken, under its own names."""
    weights = checkpoint.unprefixed(content["state_dict"])
    if is_pretraining(content):
        weights = {name.removeprefix(ENCODER): w for name, w in weights.items() if name.startswith(ENCODER)}
    return weights


def is_classifier(content: dict) -> bool:
    """Whether it comes from a linear probe or a fine-tuning."""
    return "best_acc1" in content


def is_pretraining(content: dict) -> bool:
    """Whether it comes from a contrastive pretraining."""
    return any(name.startswith(ENCODER) for name in checkpoint.unprefixed(content["state_dict"]))


def load_backbone(network: torch.nn.Module, head: str, weights: dict[str, torch.Tensor], path: str) -> int:
    """Put `weights_of` a backbone into a network, all but its head → how many tensors.

    Raises UserError that names the tensors that are missing, unknown, of another shape or not finite; the network is
    then as it was.
    """
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}
    wrong = checkpoint.differences(weights, wanted)
    if wrong:
        raise UserError(f"{path}: its weights do not fit this network: {wrong}")
    checkpoint.check_values(weights, path, wanted)
    network.load_state_dict(weights, strict=False)  # strict but for the head
    return len(weights)


def summary(content: dict, path: str, count: int) -> str:
    """What was loaded, in words: where from, its network and epochs, how many tensors."""
    of = "the query encoder" if is_pretraining(content) else "the network"
    known = [content["arch"]] if "arch" in content else []
    known += [f"{content['epoch']} epochs"] if "epoch" in content else []
    return f"{', '.join([path, *known])}: {count} tensors of {of}"
