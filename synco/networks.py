"""Which networks there are, by name; their stems, heads and features; BatchNorm in splits of the batch."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from synco.errors import UserError


def head_name(network: nn.Module, dim: int) -> str:
    """The name of a network's last linear layer with `dim` outputs: its head, by what it is and not by its name.

    Raises ValueError if there is none.
    """
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == dim]
    if not names:
        raise ValueError(f"{type(network).__name__} has no linear layer with {dim} outputs to serve as its head")
    return names[-1]


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` equal parts of the batch, each with its own statistics: k GPUs on one (MoCo's demo).

    Part s holds the images s, s + k, s + 2k, ...: taking every k-th image needs no copy. In train mode the running
    statistics move by the mean of what each part alone would move them by; in eval mode this is BatchNorm.
    x (N, C, H, W); raises ValueError if `splits` does not divide N.
    """

    def __init__(self, *args: Any, splits: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.splits = splits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        N, C, H, W = x.shape
        k = self.splits
        if N % k:
            raise ValueError(f"a batch of {N} cannot be normalised in {k} equal splits")
        mean, var = self.running_mean.repeat(k), self.running_var.repeat(k)
        y = F.batch_norm(
            x.reshape(N // k, k * C, H, W),
            mean,
            var,
            self.weight.repeat(k),
            self.bias.repeat(k),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(k, C).mean(0))
        self.running_var.copy_(var.view(k, C).mean(0))
        self.num_batches_tracked.add_(1)
        return y.view(N, C, H, W)


def split_batch_norm(network: nn.Module, splits: int) -> None:
    """Put a `SplitBatchNorm2d` in the place of every BatchNorm2d. Raises ValueError if the network has none."""
    every = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [(name, m) for name, m in every if type(m) is nn.BatchNorm2d]
    if not norms or len(norms) < len(every):
        kinds = ", ".join(sorted({type(m).__name__ for _, m in every} - {"BatchNorm2d"})) or "no BatchNorm2d"
        raise ValueError(f"bn_splits is {splits}: {type(network).__name__} has {kinds}, which cannot be split")
    for name, norm in norms:
        split = SplitBatchNorm2d(norm.num_features, norm.eps, norm.momentum, splits=splits)
        split.load_state_dict(norm.state_dict())
        replace(network, name, split)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """The network with BatchNorm statistics over the images of all processes, and the same weights.

    Raises ValueError if it has no BatchNorm, or one of a kind that computes more than that, which would be lost.
    """
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    known, convert = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}, nn.SyncBatchNorm.convert_sync_batchnorm
    if any(kind.__module__.startswith("timm.") for kind in kinds):
        from timm.layers import BatchNormAct2d, convert_sync_batchnorm  # which keeps the activations in BatchNormAct2d

        known, convert = known | {BatchNormAct2d}, convert_sync_batchnorm
    if not kinds:
        raise ValueError("has no BatchNorm")
    if kinds - known:
        names = ", ".join(sorted(kind.__name__ for kind in kinds - known))
        raise ValueError(f"has {names}, which cannot be synchronised")
    return convert(network)


def network_of(arch: str, img_size: int, stem: str = "imagenet") -> Callable[..., nn.Module]:
    """A callable that takes `num_classes` and returns the network of that name, randomly initialised.

    arch: one of torchvision's classification networks, or timm:NAME; stem: "cifar" for `small_stem`.
    """
    make = _timm_network(arch, img_size) if arch.startswith("timm:") else _torchvision_network(arch, img_size)
    return make if stem == "imagenet" else lambda num_classes: small_stem(make(num_classes=num_classes))


def _torchvision_network(arch, img_size):
    options = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # one output, and torchvision's own initialisation
    elif arch.startswith("vit_"):
        options = {"image_size": img_size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (img_size, img_size)}
    return partial(torchvision.models.get_model, arch, weights=None, **options)


def _timm_network(arch, img_size):
    import timm  # an optional package, used for these networks alone

    name = arch.removeprefix("timm:")
    known = timm.models.get_pretrained_cfg(name)
    options = {"img_size": img_size} if known and known.fixed_input_size else {}
    return partial(timm.create_model, name, pretrained=False, **options)


def small_stem(network: nn.Module) -> nn.Module:
    """Give a ResNet the stem of MoCo's recipe for CIFAR-10: a 3×3 convolution of stride 1, and no max-pool.

    Raises ValueError if the network does not begin with a ResNet's 7×7 convolution and max-pool.
    """
    conv, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7) or not isinstance(pool, nn.MaxPool2d):
        raise ValueError(f"{type(network).__name__} has no ResNet's stem to replace with that for small images (cifar)")
    network.conv1 = nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets
    network.maxpool = nn.Identity()
    return network


@contextlib.contextmanager
def network_errors_as_user_errors(arch: str, img_size: int) -> Iterator[None]:
    """Around the building and the first use of a network: what it cannot do becomes a UserError of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"-a {arch} --img-size {img_size}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def try_images(network: nn.Module, arch: str, img_size: int) -> None:
    """Raise UserError if a network cannot take images of that size. It is left in eval mode."""
    network.eval()
    device = next(network.parameters()).device
    with network_errors_as_user_errors(arch, img_size):
        network(torch.zeros(2, 3, img_size, img_size, device=device))


def casts_images(network: nn.Module) -> bool:
    """Whether autocast begins with the cast of the network's images: its first layer is a convolution or a product.

    The first that the network has: torchvision's and timm's, for which a test looks, begin with it.
    """
    layers = (m for m in network.modules() if not list(m.children()))
    return isinstance(next(layers), nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)


def encode(network: nn.Module, head: str, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the head, the backbone's features, and the network's outputs.

    images (N, 3, H, W) → (N, D), (N, C).
    """
    caught = []
    hook = network.get_submodule(head).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        outputs = network.forward(images)  # not the call, which a compiled network answers without its layers' hooks
    finally:
        hook.remove()
    return caught[0].flatten(1), outputs


def features(network: nn.Module, head: str, images: torch.Tensor) -> torch.Tensor:
    """What enters the head: the backbone's features. images (N, 3, H, W) → (N, D)."""
    return encode(network, head, images)[0]
