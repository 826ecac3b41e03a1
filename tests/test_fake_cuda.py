"""What runs on a GPU, without one: tensors that have a device, a dtype and a shape, and no numbers.

torch's FakeTensor refuses operands on several devices; `SameKind` sees the rest. No kernel is run, and convolutions
come out contiguous, whatever went in. The engine of backward asks for a GPU: the head's backward is called by itself.
"""

import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synco import augment, diagnostics, knn, metrics
from synco.builder import SynCo
from synco.negatives import KINDS
from synco.precision import Precision
from synco.run import Step

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # deepcopy's
aten = torch.ops.aten
K, N, COUNTS = 64, 4, {"n1": 3, "n2": 3, "n3": 3, "n4": 3, "n5": 3, "n6": 3, "n_copied": 3}
S = sum(COUNTS.values())


class SameKind(TorchDispatchMode):
    """Refuses products of two dtypes, and what the host would wait for: indices on the CPU of what is on the GPU, and
    decompositions, whose convergence it looks at.
    """

    PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.convolution)
    INDEXED = (aten.index, aten.index_put, aten.index_put_)
    DECOMPOSED = (aten._linalg_svd, aten._linalg_eigh, aten.linalg_qr)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if function.overloadpacket in self.PRODUCTS:
            assert len({x.dtype for x in tensors}) == 1, (function, [x.dtype for x in tensors])
        assert function.overloadpacket not in self.DECOMPOSED, function
        if function.overloadpacket in self.INDEXED:
            assert len({x.device for x in tensors}) == 1, (function, [x.device for x in tensors])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """The device cuda:0, of which there is a fake: what asks the driver is answered on the CPU."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)  # of an encoder
    with FakeTensorMode(), SameKind():
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError as error:
            if "driver" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__} asks the driver even for a fake GPU's random numbers")
        yield torch.device("cuda", 0)


def images(device, *shape):
    return torch.empty(*shape, 3, 32, 32, device=device)


def synco(device, layout, **settings):
    """A small SynCo on the device; nothing but its own code says later where a tensor is made."""

    def network(num_classes):
        made = torchvision.models.resnet18(num_classes=num_classes)
        for module in made.modules():
            if isinstance(module, nn.Conv2d):  # Module.to cannot change the layout of a FakeTensor
                module.weight = nn.Parameter(module.weight.detach().to(memory_format=layout))
        return made

    with device:
        return SynCo(network, 16, K, n_hard=8, warmup_epochs=0, **COUNTS, **settings)


@pytest.mark.parametrize(
    "amp, channels_last, settings",
    [
        ("off", False, {}),
        ("off", True, {"bn_splits": 2}),
        ("bf16", False, {"symmetric": True, "mask_same_image": True}),
        ("bf16", True, {}),
        ("fp16", True, {"bn_splits": 2}),
        ("bf16", True, {"bn_splits": 2, "symmetric": True, "mask_same_image": True}),
    ],
)
def test_a_step_has_one_device_and_the_head_is_float32(gpu, amp, channels_last, settings):
    how = Precision(gpu, amp, channels_last=channels_last)
    model = synco(gpu, how.layout, **settings)
    im_q, im_k, index = how.place([images("cpu", N), images("cpu", N), torch.empty(N, dtype=torch.long)])
    with how.autocast():
        assert model.encoder_k(im_k).dtype == (how.dtype or torch.float32)
        logits, labels = model(im_q, im_k, 0.5, step=3, index=index, inspect=True)
    rows = N * (1 + model.symmetric)
    assert logits.shape == (rows, 1 + K + S) and labels.shape == (rows,)
    loss = F.cross_entropy(logits, labels)
    (gradient, *others) = logits.grad_fn.apply(torch.empty_like(logits))  # the head's backward
    assert gradient.shape == (rows, 16) and not any(x is not None for x in others)
    accuracy = metrics.contrastive_accuracy(logits, K)
    step = Step(None, epoch=0, i=0, batch=None, is_printed=True)
    diagnostics.note(step, logits.detach(), model, dict(zip(KINDS, model.counts)), None)
    (_, (q,)), (_, tables) = step.notes.counts
    assert (q.device, q.dtype, q.shape) == (gpu, torch.float32, (rows, 16))
    assert all((x.device, x.dtype) == (gpu, torch.int64) for x in tables) and len(tables) == 3 + len(model.counts)
    for x in (logits, gradient, loss, model.queue, *accuracy.values(), *step.notes.numbers.values()):
        assert (x.device, x.dtype) == (gpu, torch.float32)


def test_knn_has_one_device(gpu):
    bank, labels = torch.empty(300, 16, device=gpu), torch.empty(300, dtype=torch.long, device=gpu)
    found = knn.predict(bank, labels, bank, classes=5, own=torch.arange(300, device=gpu))
    assert found.shape == (300,) and (found.device, found.dtype) == (gpu, torch.int64)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_augmentation_has_one_device(gpu, monkeypatch, kind):
    """Each step on all images: which ones it chooses are numbers."""
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda mask: torch.arange(len(mask))[:, None])
    finish = augment.Finish(augment.augmentation(32, kind, blur=kind == "v2"), gpu)
    parameters = sum(len(step.neutral) for step in finish.steps)
    views = finish(torch.empty(N, 3, 32, 32, dtype=torch.uint8), torch.empty(N, parameters))
    assert views.shape == (N, 3, 32, 32) and (views.device, views.dtype) == (gpu, torch.float32)


def test_views_by_pil_are_finished_on_one_device(gpu):
    crops = torch.empty(N, 3, 32, 32, dtype=torch.uint8)
    batches = types.SimpleNamespace(batch_sampler=None, dataset=None, ahead="")
    _, finish = augment.halves(augment.augmentation(32), gpu, "cpu")
    finished = augment.Finished(batches, finish)
    finished.batches = [([crops], [crops], torch.empty(N, dtype=torch.long))]
    for views in next(iter(finished))[:2]:
        assert views.shape == (N, 3, 32, 32) and (views.device, views.dtype) == (gpu, torch.float32)


def test_a_mix_up_is_seen(gpu):
    x, products = torch.empty(4, 4, device=gpu), torch.empty(4, 4, device=gpu, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.empty(4, 4)
    with pytest.raises(AssertionError, match="bfloat16"):
        x @ products
    with pytest.raises(AssertionError, match="_linalg_svd"):
        torch.linalg.svdvals(x)
    with pytest.raises(AssertionError, match="cpu"):
        x[torch.arange(4)]
