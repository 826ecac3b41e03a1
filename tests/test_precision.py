"""Precision, layout and compilation: the same results within their tolerance, and no read from the device."""

import copy
import functools
import json
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ARCH, ROOT, SMALL, command, make_images
from torch.utils._python_dispatch import TorchDispatchMode

from synco import augment, checkpoint, datasets, launch, loader, metrics, precision
from synco.builder import SynCo, full_precision
from synco.distributed import Process
from synco.errors import UserError
from synco.networks import encode
from synco.precision import Precision, compile_encoders

CPU = torch.device("cpu")
CALM = "-a resnet18 --moco-t 0.5 --lr 0.01".split()  # a run that does not blow rounding up


def losses(folder):
    with open(folder / "log.jsonl") as lines:
        return torch.tensor([line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """runs(flags ...) → the folder of such a run of two epochs; each is run once."""
    import main_synco

    made = {}

    def run(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["main_synco.py", *SMALL, *CALM, *flags, "--save-dir", str(folder), data])
                assert launch.launch_status(main_synco.pretrain, main_synco.parse) == 0
            made[flags] = folder
        return made[flags]

    return run


@pytest.mark.parametrize("flags, tolerance", [(("--amp", "bf16"), 0.02), (("--channels-last",), 0.005)])
def test_a_fast_run_is_the_plain_one_within_the_documented_tolerance(runs, flags, tolerance):
    plain, fast = runs(), runs(*flags)
    torch.testing.assert_close(losses(fast), losses(plain), rtol=tolerance, atol=0)
    assert not torch.equal(losses(fast), losses(plain))  # it did compute otherwise
    expected, found = (checkpoint.load(f"{folder}/checkpoint_0001.pth.tar") for folder in (plain, fast))
    assert found.keys() == expected.keys() and list(found["state_dict"]) == list(expected["state_dict"])
    for name, tensor in expected["state_dict"].items():
        assert found["state_dict"][name].dtype == tensor.dtype and found["state_dict"][name].shape == tensor.shape


def test_augmentation_on_the_device_is_the_same_run_but_for_rounding(runs, capsys):
    plain = runs()
    capsys.readouterr()
    torch.testing.assert_close(losses(runs("--augment-on", "device")), losses(plain), rtol=0.05, atol=0)
    assert "warning: --augment-on device is meant for GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags, told",
    [
        ("main_synco", "--amp fp16", "--amp fp16 needs a GPU, and this run is on the CPU; --amp bf16 and off"),
        ("main_lincls", "--amp fp16 --pretrained random", "--amp fp16 needs a GPU"),
        ("main_semisup", "--amp fp16 --pretrained random --train-percent 10 --weights finetune --lr-backbone 0.1 "
         "--lr-classifier 0.1", "--amp fp16 needs a GPU"),
        ("main_synco", "--amp bf17", "argument --amp: invalid choice: 'bf17'"),
        ("main_synco", "--augment-on device --aug-heavy", "--augment-on device cannot do --aug-heavy's RandAugment"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(programs, data, tmp_path, script, flags, told):
    status, _, err = programs(script, "-a", "resnet18", *flags.split(), "--save-dir", tmp_path / "run", data)
    assert status == 2 and told in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_gpu_without_bf16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(UserError, match="--amp bf16: Old GPU has no bf16; use fp16 or off"):
        Precision(torch.device("cuda"), "bf16")


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9 has a second interface to the settings
# what a user's code may have set before, by either or by both
SETTINGS = {
    "nothing": "",
    "older": "torch.set_float32_matmul_precision('medium')",
    "newer": "torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "newer, CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "older, then newer": "torch.set_float32_matmul_precision('high'); torch.backends.fp32_precision = 'ieee'",
    "newer, then older": "torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.allow_tf32 = False",
}


@pytest.fixture
def fresh_settings():
    """torch's settings of float32 as they are when it is imported, before and after."""

    def reset():
        if NEWER:
            torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        if NEWER:
            torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"

    reset()
    yield
    reset()


def settings_now():
    """By both interfaces; None: torch refuses to say."""
    getters = {
        "matmul": torch.get_float32_matmul_precision,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    }
    if NEWER:
        newer = {"cuda.matmul": torch.backends.cuda.matmul, "mkldnn.matmul": torch.backends.mkldnn.matmul}
        newer |= {"conv": torch.backends.cudnn.conv, "rnn": torch.backends.cudnn.rnn}
        getters |= {name: lambda which=which: which.fp32_precision for name, which in newer.items()}
    found = {}
    for name, get in getters.items():
        try:
            found[name] = get()
        except RuntimeError:
            found[name] = None
    return found


both_interfaces = pytest.mark.parametrize(
    "before",
    [
        pytest.param(code, id=name, marks=pytest.mark.skipif("newer" in name and not NEWER, reason="torch < 2.9"))
        for name, code in SETTINGS.items()
    ],
)


@both_interfaces
@pytest.mark.parametrize("asked", [True, False, None])
def test_tf32_is_for_products_and_convolutions_alike(fresh_settings, before, asked):
    exec(before)
    expected = settings_now()
    Precision(CPU, tf32=asked)
    if asked is not None:
        expected = {"matmul": "high" if asked else "highest", "cublas": asked, "cudnn": asked}
        expected |= dict.fromkeys(("cuda.matmul", "mkldnn.matmul", "conv", "rnn"), "tf32" if asked else "ieee")
    found = settings_now()
    assert found == {name: expected[name] for name in found}


@both_interfaces
def test_the_head_computes_in_float32_whatever_was_set_before(fresh_settings, before):
    """torch raises an error where one interface is asked about what the other has set."""
    model, images = small(), torch.randn(2, 4, 3, 9, 9)
    exec(before)
    expected = settings_now()
    with full_precision(CPU):
        found = settings_now()
    assert {found.pop(name, "ieee") for name in ("cuda.matmul", "mkldnn.matmul")} == {"ieee"}
    assert (found["matmul"], found["cublas"]) == ("highest", False)
    logits, labels = model(*images, step=0)
    F.cross_entropy(logits, labels).backward()
    assert settings_now() == expected


def small_network(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_classes),
    )


def small(network=small_network, **settings):
    torch.manual_seed(0)
    counts = {"n_hard": 16, "n1": 3, "n2": 3, "n3": 3, "n4": 3, "n5": 3, "n6": 3}
    return SynCo(network, 8, 64, T=0.2, mlp=False, warmup_epochs=0, **{**counts, **settings})


def test_the_head_computes_in_float32_whatever_is_around_it():
    model = small()
    q, k = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    slots, weights = torch.arange(5), torch.randn(5, 1 + 64 + 18)

    def head():
        variable = q.clone().requires_grad_()
        logits = model.logits(variable, k, slots, model.counts, torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
        return logits.detach(), variable.grad

    expected = head()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = head()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("settings", [{}, {"bn_splits": 2}, {"symmetric": True}])
def test_a_step_under_autocast(settings):
    """The encoders' part is rounded to bf16, and the queue and the logits are not."""
    images = torch.randn(2, 4, 3, 9, 9)
    plain, fast = small(**settings), small(**settings)
    expected, _ = plain(*images, step=1)
    with Precision(CPU, "bf16").autocast():
        found, _ = fast(*images, step=1)
    assert found.dtype == fast.queue.dtype == torch.float32
    torch.testing.assert_close(found[:, :65], expected[:, :65], atol=0.2, rtol=0)  # q·k / 0.2: 0.04 of q·k
    assert not torch.equal(found, expected)
    assert (fast.queue.norm(dim=1) - 1).abs().max() < 1e-6
    F.cross_entropy(found, torch.zeros(len(found), dtype=torch.long)).backward()
    assert all(w.grad.dtype == torch.float32 for w in fast.encoder_q.parameters())


def test_a_scaled_loss_gives_the_same_training(data):
    """Scaling by a power of two and back loses nothing where nothing over- or underflows."""
    views = loader.Augmented(datasets.image_folder(data, "train"), augment.classifier_augmentation(16), 3)
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        network = small_network(3)
        how = Precision(CPU)
        how.scaler = scaler or how.scaler
        batches = loader.train_loader(views, 8, process=Process(), workers=0, seed=3)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for images, labels in batches:
            optimizer.zero_grad()
            how.backward(F.cross_entropy(network(images), labels), optimizer, list(network.parameters()))
            how.step(optimizer)
        weights.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    assert torch.equal(*weights)


def scaling(scale):
    how = Precision(CPU)
    how.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return how


def test_an_overflow_is_left_out_and_no_end_of_them_is_an_error():
    how, weight = scaling(1e-5), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1)
    assert how.backward((weight * torch.tensor([3.0, 4.0])).sum(), optimizer, [weight], 1.0).item() == pytest.approx(5)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))  # unscaled, then clipped
    how.step(optimizer)
    before = weight.detach().clone()
    for _ in range(4):  # each halves the scale
        how.check(how.scale().item())
        optimizer.zero_grad()
        assert how.backward((weight * torch.inf).sum(), optimizer, [weight]).item() == 0
        how.step(optimizer)
    assert torch.equal(weight, before)
    with pytest.raises(FloatingPointError, match="--amp fp16: the gradient is not finite, even of a loss .* 6.25e-07"):
        how.check(how.scale().item())
    norm = Precision(CPU).backward((weight * torch.inf).sum(), optimizer, [weight])
    assert not norm.isfinite()  # in float32 it is an error, see `metrics.Finite`


@pytest.fixture
def filled_memory():
    """Memory that nothing was written to holds NaN, and not what happens to be there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_momentum_begins_at_zero_though_the_first_step_is_left_out(filled_memory):
    """A fused SGD takes memory for it as it comes; only a scaler can have it leave that as it is."""
    gradients = [torch.tensor([3.0, -1e-3, 0.5]), torch.tensor([1.0, 2.0, 0.25])]

    def train(how, gradients, fused):
        weight, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight, other], 0.1, momentum=0.9, weight_decay=0.5, fused=fused)
        for gradient in gradients:
            optimizer.zero_grad()
            how.backward((weight * gradient).sum(), optimizer, [weight])
            how.step(optimizer)
        state = optimizer.state_dict()["state"]
        assert list(state) == [0]  # none of a parameter that gets no gradient, as in the published format
        return torch.stack([weight.detach(), state[0]["momentum_buffer"]])

    skipped = train(scaling(512.0), [torch.full((3,), torch.inf), *gradients], True)
    assert torch.equal(skipped, train(scaling(512.0), gradients, True))
    assert torch.equal(skipped, train(Precision(CPU), gradients, True))
    torch.testing.assert_close(skipped, train(Precision(CPU), gradients, False))


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
@pytest.mark.parametrize("kind, settings", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_momentum_of_a_run_in_another_layout(before, after, kind, settings):
    """A fused step pairs a weight with what lies at the same place in memory."""
    images = torch.randn(4, 3, 9, 9)

    def start(channels_last, fused):
        torch.manual_seed(0)
        how = Precision(CPU, channels_last=channels_last)
        network = how.place(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
        return how, network, kind(network.parameters(), 0.1, fused=fused, **settings)

    def step(how, network, optimizer):
        optimizer.zero_grad()
        network(how.place(images)).square().mean().backward()
        how.step(optimizer)

    plain, other = start(before, False), start(after, True)
    step(*plain)
    checkpoint.load_optimizer({"optimizer": copy.deepcopy(plain[2].state_dict())}, "x.tar", other[2])
    other[1].load_state_dict(plain[1].state_dict())
    for weight, state in other[2].state.items():
        assert all(x.stride() == weight.stride() for x in state.values() if x.dim())
    step(*plain), step(*other)
    for found, expected in zip(other[1].parameters(), plain[1].parameters()):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "script, flags, file",
    [
        ("main_synco", SMALL, "checkpoint_0000"),
        ("main_lincls", ["--pretrained", "random"], "checkpoint_lincls"),
        (
            "main_semisup",
            ["--pretrained", "random", "--weights", "finetune", "--lr-backbone", 0.1],
            "checkpoint_semisup",
        ),
    ],
)
def test_optimisers_are_fused_where_that_saves_a_read(programs, data, tmp_path, monkeypatch, script, flags, file):
    """With fp16 an optimiser of several kernels has the host read in each step whether it is to be left out."""
    monkeypatch.setattr(Precision, "fused", True)  # on a CPU, too
    few = [*flags, "-a", ARCH, "--img-size", 32, "-j", 0, "-b", 8, "--epochs", 1]
    status, _, err = programs(script, *few, "--save-dir", tmp_path / "run", data)
    assert status == 0, err
    saved = checkpoint.load(tmp_path / "run" / f"{file}.pth.tar")
    assert all(group["fused"] is True for group in saved["optimizer"]["param_groups"])


def test_the_scaler_goes_on_where_it_was():
    first, second = scaling(512.0), scaling(8.0)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(3):  # an overflow halves the scale
        optimizer.zero_grad()
        first.scaler.scale(weight * torch.inf).sum().backward()
        first.scaler.step(optimizer)
        first.scaler.update()
    assert weight.item() == 1 and first.state_dict()["scale"] == 64.0
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert Precision(CPU).state_dict() == {}  # nothing to store where nothing scales
    Precision(CPU).load_state_dict(first.state_dict())
    second.load_state_dict({})
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    "state", [3, {"scale": 8.0}, {"scale": "large"}, {"scale": float("nan")}, {"scale": 0.0}, {"scale": -1.0}]
)
def test_a_scaler_state_that_is_none_is_refused(state):
    whole = scaling(8.0).state_dict()
    state = whole | state if isinstance(state, dict) and state != {"scale": 8.0} else state
    with pytest.raises(ValueError, match="its scaler state does not fit"):
        scaling(8.0).load_state_dict(state)


def test_compiled_encoders_keep_their_names_and_numbers(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = small(), small()
    compile_encoders(compiled, CPU)
    images = torch.randn(2, 4, 3, 9, 9)
    logits = []
    for model in (plain, compiled):
        for step in range(2):
            found, labels = model(*images, step=step)
            F.cross_entropy(found, labels).backward()
        logits.append(found)
    torch.testing.assert_close(logits[1], logits[0])
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(compiled.state_dict().values(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs)
    for model in (plain, compiled):
        model.eval()
    features = [encode(model.encoder_q, model.head, images[0]) for model in (compiled, plain)]
    torch.testing.assert_close(*features)  # kNN hooks into the network


class Compiled(nn.Module):
    """Code of ours: torch compiles none of its own modules by themselves."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = small_network(num_classes)

    def forward(self, x):
        return self.layers(x)


def test_the_encoders_are_compiled_once(monkeypatch, fresh_settings):
    """A graph each, in the first step; what a step leaves behind in torch's settings asks for no other."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model, images = small(Compiled), torch.randn(2, 4, 3, 9, 9)
    compile_encoders(model, CPU)
    tried = len(graphs)  # whether there is a compiler
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        logits, labels = model(*images, step=step)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        assert len(graphs) == tried + 2, step


def test_a_compiler_that_fails_is_one_line(monkeypatch, program, data, tmp_path):
    def fails(function):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler\n\nmore lines")

    monkeypatch.setattr(precision.torch, "compile", fails)
    status, _, err = program(*SMALL, "--compile", "--save-dir", tmp_path / "run", data)
    assert status == 2 and not (tmp_path / "run").exists()
    assert err == "main_synco.py: error: --compile cannot work here: InvalidCxxCompiler: No working C++ compiler\n"


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    WAITING = [torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select]
    WAITING += [torch.ops.aten.equal, torch.ops.aten._unique2]

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        masks = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.count += function.overloadpacket in self.WAITING or masks  # how many a mask chooses, the host asks
        return function(*args, **(kwargs or {}))


EVERY = "--symmetric --mask-same-image --clip-grad 5 --bn-splits 2 --amp bf16 --channels-last --lr-warmup-epochs 1"


@pytest.mark.parametrize("flags", ["", EVERY])
def test_only_print_steps_read_from_the_device(program, tmp_path, monkeypatch, flags):
    """Counted from the accounts of one step to those of the next; the images come from a worker process."""
    make_images(tmp_path / "data" / "train", classes=3, images=14)
    add, counts = metrics.Averages.add, []

    def count(self, **values):
        counts.append(reads.count)
        add(self, **values)

    def counted(method, tensor, *args, **kwargs):
        reads.count += 1
        return method(tensor, *args, **kwargs)

    monkeypatch.setattr(metrics.Averages, "add", count)
    for name in ("tolist", "item", "cpu", "numpy"):  # which on a CPU need no operation
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, method=method, **named: counted(method, *args, **named))
    with Reads() as reads:
        status, _, err = program(
            *SMALL, *flags.split(), *"-j 1 -p 3 --epochs 1 --warmup-epochs 0".split(),
            "--save-dir", tmp_path / "run", tmp_path / "data",
        )  # fmt: skip
    assert status == 0, err
    found = [after - before for before, after in zip(counts, counts[1:])]
    assert len(found) == 4 and found[1] == found[2] == 0  # steps 0 and 3 print, after their accounts
    assert found[0] > 0  # the test does see the reads of a print step


ON_A_GPU = """
import sys
import torch
import main_synco
from synco import metrics
from synco.launch import launch

add, read = metrics.Averages.add, metrics.Averages.read

def strict(self, **values):
    add(self, **values)
    torch.cuda.set_sync_debug_mode("error")

def free(self, reduce, **others):
    torch.cuda.set_sync_debug_mode("default")
    return read(self, reduce, **others)

metrics.Averages.add, metrics.Averages.read = strict, free
launch(main_synco.pretrain, main_synco.parse)
"""


@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="needs a GPU")
@pytest.mark.parametrize("flags", ["", "--amp fp16 --clip-grad 5", EVERY, "--augment-on device"])
def test_a_gpu_refuses_reads_in_other_steps(tmp_path, flags):
    """torch raises an error where the host waits for the GPU between two steps that do not print."""
    make_images(tmp_path / "data" / "train", classes=3, images=14)
    (tmp_path / "strict.py").write_text(ON_A_GPU)
    run = command(
        tmp_path / "strict.py", *SMALL, *flags.split(), *"-j 1 -p 3 --epochs 1 --warmup-epochs 0".split(),
        "--save-dir", tmp_path / "run", tmp_path / "data",
        env={"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


NUMBERS_ON_A_GPU = """
import json
import sys
import torch
import torch.nn as nn
from synco import checkpoint
from synco.builder import full_precision
from synco.precision import Precision

gpu = torch.device("cuda")

torch.use_deterministic_algorithms(True)  # memory that nothing was written to holds NaN
momentum = []
for amp, gradients in (("off", [2.0, 3.0]), ("fp16", [torch.inf, 2.0, 3.0])):
    how, weight = Precision(gpu, amp), torch.ones(3, device=gpu, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=how.fused)
    for gradient in gradients:
        optimizer.zero_grad()
        how.backward((weight * gradient).sum(), optimizer, [weight])
        how.step(optimizer)
    momentum.append(optimizer.state[weight]["momentum_buffer"])
assert torch.equal(*momentum), momentum
torch.use_deterministic_algorithms(False)

images, weights, state = torch.randn(4, 3, 9, 9), [], None
for channels_last in (False, True):
    torch.manual_seed(0)
    how = Precision(gpu, channels_last=channels_last, tf32=False)
    network = how.place(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, fused=how.fused)
    if state:
        checkpoint.load_optimizer({"optimizer": state}, "x.tar", optimizer)
        network.load_state_dict(trained)
    for step in range(2 - channels_last):
        optimizer.zero_grad()
        network(how.place(images)).square().mean().backward()
        how.step(optimizer)
        if not state:
            state = json.loads(json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist()))
            state["state"] = {int(i): {k: torch.tensor(v) for k, v in x.items()} for i, x in state["state"].items()}
            trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights.append(network[0].weight.detach().contiguous())
torch.testing.assert_close(*weights)

a, b = torch.randn(2, 512, 512, device=gpu)
for before in json.loads(sys.argv[1]):
    exec(before)
    with full_precision(gpu):
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), atol=1e-3, rtol=0)  # TF32: 1e-2
"""


@pytest.mark.skipif(not os.path.exists("/dev/nvidia0"), reason="needs a GPU")
def test_momentum_and_products_on_a_gpu(tmp_path):
    """What the tests above see on a CPU, by CUDA's fused SGD and cuBLAS."""
    (tmp_path / "numbers.py").write_text(NUMBERS_ON_A_GPU)
    codes = [code for name, code in SETTINGS.items() if NEWER or "newer" not in name]
    run = command(
        tmp_path / "numbers.py", json.dumps(codes), env={"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
