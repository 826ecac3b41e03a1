"""Pretrained backbones through torch.hub, from a clone of this repository:

  import torch
  network = torch.hub.load(DIR, "resnet50", source="local", checkpoint="runs/synco/checkpoint_0199.pth.tar")

DIR is the clone's folder; the networks are those at the end of this file.
"""

from collections.abc import Callable as _Callable

import torch.nn as _nn

from synco import export as _export
from synco import networks as _networks

dependencies = ["torch", "torchvision", "numpy"]


def _entry(arch: str) -> _Callable[..., _nn.Module]:
    def load(checkpoint: str | None = None, *, num_classes: int | None = None) -> _nn.Module:
        if num_classes is not None and num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give 0 or None for features, or a number of outputs")
        if checkpoint is None:
            network = _networks.network_of(arch, 224)(num_classes=1000)
            head = _networks.head_name(network, 1000)
        else:
            network, head, _ = _export.load(checkpoint, arch)
        width = network.get_submodule(head).in_features
        new = _nn.Linear(width, num_classes) if num_classes else _nn.Identity()
        _networks.replace(network, head, new)
        return network

    load.__name__ = arch
    load.__doc__ = f"""torchvision's {arch} with the backbone of a checkpoint.

    checkpoint: path of a pretraining's checkpoint, a classifier's, or torchvision weights; None: untrained.
    num_classes: None or, as in timm, 0: the last linear layer is an Identity, so the network returns features (N, D);
    else it is a new, untrained layer with that many outputs.
    Raises ValueError that names what is wrong with the checkpoint, or a negative number of outputs.
    """
    return load


resnet18 = _entry("resnet18")
resnet34 = _entry("resnet34")
resnet50 = _entry("resnet50")
resnet101 = _entry("resnet101")
resnet152 = _entry("resnet152")
resnext50_32x4d = _entry("resnext50_32x4d")
resnext101_32x8d = _entry("resnext101_32x8d")
resnext101_64x4d = _entry("resnext101_64x4d")
wide_resnet50_2 = _entry("wide_resnet50_2")
wide_resnet101_2 = _entry("wide_resnet101_2")
