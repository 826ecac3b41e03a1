"""What a CPU cannot show, on one GPU: its kernels, its precision, that the host does not wait for it, and NCCL."""

import contextlib
import copy
import functools
import importlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import default_collate

import hubconf
from benchmarks import textbook
from synco import augment, checkpoint, knn, launch, options
from synco.builder import SynCo
from synco.negatives import hardest
from synco.networks import SplitBatchNorm2d
from synco.precision import Precision
from synco.run import Run, Step

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
ARCH = "resnet18"
IMAGES, K = (256, 8192) if GPU else (32, 512)  # of a data set; rows of a queue
WORKERS = {"main_synco": "pretrain", "main_lincls": "probe", "main_semisup": "train"}  # what a script runs in a process

on_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
on_two_gpus = pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
slow = pytest.mark.slow

# a run that does not blow rounding up
PRETRAIN = (
    f"-a {ARCH} --moco-t 0.5 --lr 0.01 --mlp --aug-plus --cos --seed 3 --epochs 2 --warmup-epochs 0.5 -p 1 --no-tf32"
)
if GPU:
    PRETRAIN += " --img-size 64 -b 32 -j 2 --moco-k 4096 --n-hard 256"
else:
    PRETRAIN += (
        " --img-size 32 -b 8 -j 0 --moco-k 64 --moco-dim 16 --n-hard 16 --n1 4 --n2 4 --n3 4 --n4 4 --n5 4 --n6 4"
    )
FAST = "--amp bf16 --channels-last --augment-on device"
PROBE = f"-a {ARCH} --pretrained random --img-size 32 -b {IMAGES // 8 if GPU else 8} -j 0 --seed 3 -p 1 --lr 0.1 1"
MOCO = " ".join(f"--n{i} 0" for i in range(1, 7))


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder of smooth colour noise in four classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(IMAGES):
        for split in ("train", "val"):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            path = folder / split / f"c{i % 4}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((96, 96), Image.BICUBIC).save(path)
    return folder


def program(name, *flags):
    """Run a script in this process; it is to end well."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        assert launch.launch_status(getattr(module, WORKERS.get(name, "run")), module.parse) == 0


def start(*flags, **env):
    """A pretraining in a process of its own → Popen."""
    words = [sys.executable, "main_synco.py", *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)


def assert_good_end(process):
    """It ends with 0 and its last line, and torch misses no destroy_process_group, which was "not called"."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0 and "Done." in out and "Traceback" not in err and "not called" not in err, err


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def pretrained(data, tmp_path_factory):
    """pretrained("flags ...") → the folder of such a pretraining of two epochs; each is run once."""

    @functools.cache
    def run(flags):
        folder = tmp_path_factory.mktemp("runs") / "run"
        program("main_synco", *PRETRAIN.split(), *flags.split(), "--save-dir", folder, data)
        return folder

    return run


def losses(folder, name="loss"):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return torch.tensor([line[name] for line in lines if line["kind"] == "train"])


def weights(folder, epoch=1):
    return torch.load(folder / f"checkpoint_{epoch:04}.pth.tar", map_location="cpu", weights_only=True)["state_dict"]


# ------------------------------------------------------------------------------------------------------ the loss head

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9 has a second interface to the settings
SETTINGS = {  # what may have been set before, by either or by both
    "nothing": "",
    "older": "torch.set_float32_matmul_precision('high')",
    "flags": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "newer": "torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "newer, then older": "torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.allow_tf32 = False",
    "--tf32": "Precision(DEVICE, tf32=True)",
    "--no-tf32": "Precision(DEVICE, tf32=False)",
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


def head(**settings):
    """A SynCo whose loss head is what counts, on the device."""
    torch.manual_seed(0)
    return SynCo(lambda num_classes: nn.Linear(8, num_classes), 128, K, T=0.2, mlp=False, **settings).to(DEVICE)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("before", [name for name in SETTINGS if NEWER or "newer" not in name])
def test_the_loss_head_is_float32_whatever_was_set_before(fresh_settings, before, amp):
    """The logits and the gradient are float64's, though the queue moves on in between; TensorFloat-32 is 1e-3 off."""
    model, q, k, keys = head(n_hard=K), unit(64, 128), unit(64, 128), unit(64, 128)
    slots, labels = (K - 30 + torch.arange(64)) % K, torch.zeros(64, dtype=torch.long)
    exact = q.double().requires_grad_()
    queue = model.queue.double().cpu()
    expected = torch.cat([(exact * k).sum(dim=1, keepdim=True), exact @ queue.T], dim=1) / 0.2
    F.cross_entropy(expected, labels).backward()

    exec(SETTINGS[before])
    found = q.to(DEVICE).clone().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
        logits = model.logits(found, k.to(DEVICE), slots.to(DEVICE), (0,) * 6)
    loss = F.cross_entropy(logits, labels.to(DEVICE))
    model.queue.index_copy_(0, slots.to(DEVICE), keys.to(DEVICE))
    loss.backward()
    torch.testing.assert_close(logits.double().cpu(), expected, atol=2e-5, rtol=0)
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(found.grad.double().cpu(), exact.grad, atol=1e-4 * scale, rtol=0)


def test_the_loss_head_is_the_textbooks():
    """All six types, from equal generators. Similarities that are nearly equal may be ordered otherwise in a row."""
    counts, n_hard, found = (32, 32, 32, 8, 8, 8), K // 64, []
    model, q, k, slots = head(n_hard=n_hard), unit(32, 128).to(DEVICE), unit(32, 128).to(DEVICE), torch.arange(32)
    for fast in (True, False):
        variable, generator = q.clone().requires_grad_(), torch.Generator(DEVICE).manual_seed(5)
        if fast:
            logits = model.logits(variable, k, slots.to(DEVICE), counts, generator)
        else:
            settings = {"n_hard": n_hard, "T": model.T, **model.ranges}
            logits = textbook.logits(variable, k, model.queue, counts, **settings, generator=generator)
        F.cross_entropy(logits, torch.zeros(32, dtype=torch.long, device=DEVICE)).backward()
        found.append((logits.detach(), variable.grad))
    (logits, gradient), (expected, expected_gradient) = found
    same = (logits - expected).abs().amax(dim=1) < 1e-4
    assert same.sum() >= 29
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient[same], expected_gradient[same], atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("n, rows, n_hard", [(32, 65536, 1024), (256, 65536, 1024), (64, 4096, 64), (64, 500, 64)])
def test_mining_is_topk(n, rows, n_hard):
    """Of a part of the logits, whose rows are of odd length."""
    n = n if GPU else 4
    similarity = torch.randn(n, 1 + rows + 960, device=DEVICE)[:, 1 : 1 + rows]
    found = similarity.gather(1, hardest(similarity, n_hard))
    assert torch.equal(found, similarity.topk(n_hard, dim=1).values)


# --------------------------------------------------------------------------------------- layers, optimisers, evaluation


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_in_splits_is_the_cpus(layout):
    norm, x, sent = SplitBatchNorm2d(8, splits=4).double(), torch.randn(16, 8, 9, 9).double(), torch.randn(16, 8, 9, 9)
    nn.init.normal_(norm.weight)
    found = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        here = copy.deepcopy(norm).to(device, dtype)
        variable = x.to(device, dtype, memory_format=layout).detach().clone().requires_grad_()
        y = here(variable)
        y.backward(sent.to(y))
        tensors = (y.detach(), variable.grad, here.weight.grad, here.running_mean, here.running_var)
        found.append([tensor.double().cpu() for tensor in tensors])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_momentum_begins_at_zero_though_first_steps_are_left_out(skipped):
    """The fused SGD leaves the memory of its momentum as it comes if its first step is skipped."""

    def train(gradients, fused):
        how, weight = Precision(DEVICE), torch.ones(1 << 10, device=DEVICE, requires_grad=True)
        how.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=512.0)
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=0.5, fused=fused)
        for gradient in gradients:
            optimizer.zero_grad()
            how.backward((weight * gradient).sum(), optimizer, [weight])
            how.step(optimizer)
        return weight.detach()

    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing was written to holds NaN
    try:
        found = train([torch.inf] * skipped + [2.0, -3.0, 0.5], fused=True)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, train([2.0, -3.0, 0.5], fused=False))


@pytest.mark.parametrize("kind, settings", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_momentum_of_a_run_in_another_layout(fresh_settings, before, after, kind, settings):
    """A fused step pairs a weight with what lies at the same place in memory."""
    images, found, saved = torch.randn(4, 3, 9, 9), [], None
    for channels_last in (before, after):
        torch.manual_seed(0)
        how = Precision(DEVICE, channels_last=channels_last, tf32=False)
        network = how.place(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()))
        optimizer = kind(network.parameters(), 0.1, fused=True, **settings)
        if saved:
            checkpoint.load_optimizer({"optimizer": saved[0]}, "x.tar", optimizer)
            network.load_state_dict(saved[1])
        for _ in range(1 if saved else 2):
            optimizer.zero_grad()
            network(how.place(images)).square().mean().backward()
            how.step(optimizer)
            saved = saved or copy.deepcopy((optimizer.state_dict(), network.state_dict()))
        found.append(network[0].weight.detach().contiguous())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_devices_half_of_the_augmentation_is_the_cpus(kind):
    view, rng = augment.augmentation(64, kind), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)) for _ in range(32)]
    torch.manual_seed(0)
    crops, parameters = default_collate([augment.Crop(view)(picture) for picture in pictures])
    expected, found = (
        augment.Finish(view, device)(crops, parameters).cpu() for device in (torch.device("cpu"), DEVICE)
    )
    apart = ((found - expected) * torch.tensor(options.STATS["imagenet"][1]).view(3, 1, 1) * 255).abs()
    assert apart.mean() < 0.01 and (apart > 0.5).float().mean() < 1e-4


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_views_by_pil_are_the_cpus_to_the_bit(kind):
    """They come in 8 bits; what is left is the normalisation, of which a GPU rounds each operation as a CPU does."""
    whole = augment.augmentation(64, kind)
    begin, finish = augment.halves(whole, DEVICE, "cpu")
    picture, found = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)), []
    for half in (whole, begin):
        torch.manual_seed(0)
        found.append([half(picture) for _ in range(16)])
    assert torch.equal(finish(torch.stack([view for (view,) in found[1]])).cpu(), torch.stack(found[0]))


@pytest.mark.parametrize("own", [None, torch.arange(300)])
def test_knn_is_the_cpus(own):
    torch.manual_seed(0)
    bank, labels = unit(3000, 64), torch.randint(10, (3000,))
    predictions = []
    for device in (torch.device("cpu"), DEVICE):
        rows, mine = bank.to(device), own if own is None else own.to(device)
        predictions.append(knn.predict(rows, labels.to(device), rows[:300], classes=10, own=mine).cpu())
    assert (predictions[0] != predictions[1]).float().mean() < 0.01


# ------------------------------------------------------------------------------------------------------- the programs


def test_a_run_without_synthesis_is_the_cpus(pretrained, data, tmp_path, monkeypatch):
    """The same images and weights; what is drawn for synthetic negatives is the device's own."""
    monkeypatch.setattr(launch, "_device", lambda index: torch.device("cpu"))
    program("main_synco", *PRETRAIN.split(), *MOCO.split(), "--save-dir", tmp_path / "run", data)
    monkeypatch.undo()
    torch.testing.assert_close(losses(pretrained(MOCO)), losses(tmp_path / "run"), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--channels-last", marks=slow),
        pytest.param("--amp bf16", marks=slow),
        FAST,
        "--augment-on device",
        pytest.param("--amp fp16 --channels-last", marks=on_a_gpu),
    ],
)
def test_a_fast_run_is_the_plain_one_but_for_rounding(pretrained, flags):
    fast, plain = pretrained(flags), pretrained("")
    torch.testing.assert_close(losses(fast), losses(plain), rtol=0.05, atol=0)
    assert not torch.equal(losses(fast), losses(plain))  # it did compute otherwise
    expected = weights(plain)
    for name, tensor in weights(fast).items():
        assert tensor.dtype == expected[name].dtype and tensor.isfinite().all(), name


@on_a_gpu
def test_a_run_whose_first_fp16_steps_are_left_out(data, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = "--amp fp16 --bn-splits 4 --clip-grad 5 --epochs 4".split()
    program("main_synco", *PRETRAIN.split(), *flags, "--save-dir", tmp_path, data)
    saved = checkpoint.load(str(tmp_path / "checkpoint_0003.pth.tar"))
    assert saved["scaler"]["scale"] < 2.0**24
    first, last = (weights(tmp_path, epoch)["module.encoder_q.fc.0.weight"] for epoch in (0, 3))
    assert not torch.equal(first, last) and all(tensor.isfinite().all() for tensor in weights(tmp_path, 3).values())


EVERY = "--symmetric --mask-same-image --clip-grad 5 --bn-splits 2 --channels-last --augment-on device"


@pytest.mark.parametrize(
    "name, flags",
    [
        ("main_synco", PRETRAIN),
        ("main_synco", f"{PRETRAIN} {FAST}"),
        ("main_synco", f"{PRETRAIN} {EVERY}"),
        ("main_synco", f"{PRETRAIN} --optimizer adamw --amp bf16"),
        ("main_lincls", PROBE),
        pytest.param("main_synco", f"{PRETRAIN} --amp fp16 --clip-grad 5 --bn-splits 2", marks=on_a_gpu),
        pytest.param("main_synco", f"{PRETRAIN} --compile", marks=[on_a_gpu, slow]),
    ],
)
def test_the_host_does_not_wait_between_print_steps(data, tmp_path, monkeypatch, name, flags):
    """torch raises an error where it would, from the accounts of one step on to the next line that is printed.

    What a print step notes of its negatives is within.
    """
    record, report, steps = Step.record, Run._report, []

    def forbid(step, *args, **numbers):
        record(step, *args, **numbers)
        steps.append("step")
        if GPU:
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError, match="synchroniz"):
                args[0].sum().item()

    def allow(run, step):
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
        steps.append("print")
        report(run, step)

    monkeypatch.setattr(Step, "record", forbid)
    monkeypatch.setattr(Run, "_report", allow)
    synthesis = ["--warmup-epochs", 0] * (name == "main_synco")
    try:
        program(name, *flags.split(), *"-p 4 --epochs 1".split(), *synthesis, "--save-dir", tmp_path / "run", data)
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert "".join(word[0] for word in steps) == ("spsssspsssp" if GPU else "spsssp")


@slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        FAST,
        "--optimizer adamw --bn-splits 2",
        pytest.param("--amp fp16 --channels-last", marks=on_a_gpu),
    ],
)
def test_a_run_that_goes_on_is_exactly_the_one_that_never_stopped(pretrained, data, tmp_path, flags):
    whole = pretrained(flags)
    shutil.copy(whole / "checkpoint_0000.pth.tar", tmp_path)
    program("main_synco", *PRETRAIN.split(), *flags.split(), "--resume", "auto", "--save-dir", tmp_path, data)
    expected, found = weights(whole), weights(tmp_path)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(
    "name, flags", [("main_synco", f"{PRETRAIN} --warmup-epochs 0{' --amp fp16' * GPU}"), ("main_lincls", PROBE)]
)
def test_a_print_step_waits_for_the_device_once(data, tmp_path, monkeypatch, name, flags):
    """torch warns of each wait."""
    report, waits = Run._report, []

    def count(run, step):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if GPU:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                report(run, step)
            finally:
                if GPU:
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))

    monkeypatch.setattr(Run, "_report", count)
    program(name, *flags.split(), *"-p 4 --epochs 1".split(), "--save-dir", tmp_path / "run", data)
    assert len(waits) > 1 and set(waits) == {1 if GPU else 0}


@slow
def test_encoders_are_compiled_once(data, tmp_path, monkeypatch):
    """Both in the first step; what a step leaves behind in torch's settings asks for no other."""
    from torch._dynamo.utils import counters

    record, graphs = Step.record, []

    def count(step, *args, **numbers):
        record(step, *args, **numbers)
        graphs.append(counters["stats"]["unique_graphs"])

    if not GPU:  # in a dry run the graphs count, and what is made of them takes two minutes
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(Step, "record", count)
    words = [*PRETRAIN.split(), *"--compile --amp bf16 --channels-last --epochs 1".split()]
    program("main_synco", *words, "--save-dir", tmp_path / "run", data)
    assert len(graphs) > 3 and graphs[0] >= 2 and graphs[-1] == graphs[0]


@slow
def test_probe_finetuning_knn_export_and_hub(pretrained, data, tmp_path):
    path = pretrained("") / "checkpoint_0001.pth.tar"
    more = "--epochs 1 -b 16 --seed 1 -p 2 --amp bf16 --channels-last".split()
    program("main_lincls", "-a", ARCH, "--pretrained", path, *more, "--save-dir", tmp_path / "probe", data)
    rates = "--lr-backbone 0.01 --lr-classifier 0.1 --weights finetune --train-percent 100".split()
    program("main_semisup", "-a", ARCH, "--pretrained", path, *rates, *more, "--save-dir", tmp_path / "tuned", data)
    assert all((tmp_path / name / "result.json").exists() for name in ("probe", "tuned"))
    program("synco.knn", path, data, "-j", "0")
    program("synco.knn", tmp_path / "tuned" / "checkpoint_semisup.pth.tar", data, "-j", "0")

    exported = tmp_path / "backbone.pth"
    words = [sys.executable, "-m", "synco.export", path, exported]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    network = torchvision.models.get_model(ARCH)
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(exported, weights_only=True))
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = network.double().eval()(images.double())
        found = getattr(hubconf, ARCH)(str(path)).to(DEVICE).eval()(images.to(DEVICE))
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-2 * expected.abs().max().item(), rtol=0)


def test_heads_that_share_a_pass_are_each_alone(data, tmp_path):
    """Though another one diverges, and is dropped."""
    one, several = tmp_path / "one", tmp_path / "several"
    for folder, rates in ((one, ["1"]), (several, ["0.1", "1", "3e38"])):
        program("main_lincls", *PROBE.split(), "--epochs", 1, "--lr", *rates, "--save-dir", folder, data)
    torch.testing.assert_close(losses(several, "loss/lr1"), losses(one), rtol=1e-3, atol=0)
    heads = json.loads((several / "result.json").read_text())["heads"]
    assert [head["name"] for head in heads if head["diverged"]] == ["lr3e+38"]
    assert len(heads) == 3 and losses(several, "loss/lr0.1").isfinite().all()


def test_the_evaluation_is_the_cpus(fresh_settings, pretrained, data, tmp_path, monkeypatch):
    """Of a logistic regression in float32 another penalty may be the best."""
    Precision(DEVICE, tf32=False)
    path, found = pretrained("") / "checkpoint_0001.pth.tar", []
    for device in ("device", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(launch, "_device", lambda index: torch.device("cpu"))
        program("synco.evaluate", path, data, "-j", 0, "-o", tmp_path / device)
        found += json.loads((tmp_path / device).read_text())["checkpoints"]
    for name, wanted in found[1]["accuracies"].items():
        if found[0]["accuracies"][name].get("l2") == wanted.get("l2"):
            assert abs(found[0]["accuracies"][name]["top1"] - wanted["top1"]) < 2, name
    assert {"knn k=200 t=0.1", "logistic 100 %"} <= found[0]["accuracies"].keys()
    for name in ("rankme", "norm_mean", "norm_std", "spread", "alignment", "uniformity"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-2), name


# ---------------------------------------------------------------------------------------------------------- processes


@slow
@pytest.mark.parametrize(
    "flags", ["--bn-splits 4 --amp bf16 --channels-last", pytest.param("--sync-bn", marks=on_a_gpu)]
)
def test_a_world_of_one(data, tmp_path, flags):
    """NCCL with DDP, all-to-all, objects and the gloo group beside it, to a clean end; in a dry run gloo."""
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    env = {name: str(value) for name, value in (place | {"MASTER_PORT": free_port()}).items()}
    words = [*PRETRAIN.split(), *flags.split(), *"--epochs 1 --knn-freq 1".split()]
    assert_good_end(start(*words, "--save-dir", tmp_path / "run", data, **env))
    assert (tmp_path / "run" / "checkpoint_0000.pth.tar").exists()


@slow
@on_two_gpus
@pytest.mark.parametrize("flags", [FAST, pytest.param("--sync-bn", marks=on_a_gpu)])
def test_a_world_of_two(data, tmp_path, flags):
    words = [*PRETRAIN.split(), *flags.split(), *"--multiprocessing-distributed --nproc-per-node 2".split()]
    assert_good_end(start(*words, "--knn-freq", 1, "--save-dir", tmp_path / "run", data))
    assert losses(tmp_path / "run").isfinite().all()


AGREEMENT = """
import os, sys
import torch
from synco import distributed, launch, options
from synco.builder import SynCo

def run(process, args):
    W, rank = process.world_size, process.rank
    for layout in (torch.contiguous_format, torch.channels_last):
        mine = (rank + torch.arange(6.0) / 10).view(6, 1, 1, 1).expand(6, 3, 4, 5)
        mine = mine.to(process.device).contiguous(memory_format=layout)
        order = torch.randperm(6 * W, generator=torch.Generator().manual_seed(3))
        everyone = distributed.gather(mine)
        assert torch.equal(distributed.shuffle(mine, order), everyone[order[6 * rank : 6 * rank + 6].to(mine.device)])
    torch.manual_seed(0)
    model = SynCo(lambda num_classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, num_classes)), 8, 32,
                  mlp=False, n_hard=4, n1=2, n2=2, n3=2, n4=2, n5=2, n6=2).to(process.device)
    torch.manual_seed(rank)
    for step in range(5):
        model(*torch.randn(2, 4, 3, 4, 4, device=process.device), step=step)
    queues = distributed.gather(model.queue[None])
    assert (queues == model.queue).all() and model.queue_ptr.item() == 5 * 4 * W % 32
    os.write(1, b"agreed ")

def parse():
    parser = options.Parser("")
    options.add_distributed(parser)
    return parser.parse_args()

if __name__ == "__main__":
    launch.launch(run, parse)
"""
FULL = """
import torch
import main_synco
from synco.launch import launch

step = torch.optim.SGD.step

def full(self, *args):
    weight = self.param_groups[0]["params"][0]
    if torch.distributed.get_rank() == 1 and weight in self.state:  # in its second step
        torch.empty(1 << 50, dtype=torch.uint8, device=weight.device)
    return step(self, *args)

if __name__ == "__main__":
    torch.optim.SGD.step = full
    launch(main_synco.pretrain, main_synco.parse)
"""


def torchrun(path, *flags, processes=2):
    """A program in several processes → CompletedProcess."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, path, *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


@slow
@on_two_gpus
def test_images_are_shuffled_rightly_and_queues_agree(tmp_path):
    (tmp_path / "agreement.py").write_text(AGREEMENT)
    done = torchrun(tmp_path / "agreement.py")
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr


@slow
@on_two_gpus
def test_a_rank_without_memory_ends_the_run_with_one_report(data, tmp_path):
    """The other one waits for it in a collective."""
    (tmp_path / "full.py").write_text(FULL)
    began = time.monotonic()
    done = torchrun(tmp_path / "full.py", *PRETRAIN.split(), "--save-dir", tmp_path / "run", data)
    assert done.returncode == 1 and time.monotonic() - began < (60 if GPU else 150)
    told = [line for line in done.stderr.splitlines() if line.startswith("full.py: error: ")]
    assert len(told) == 1 and "lower --batch-size or --img-size" in told[0], done.stderr
    assert 'full.py", line' not in done.stderr


@slow
def test_a_peer_that_starts_late_is_waited_for(data, tmp_path):
    """NCCL's own start does not wait, and the guard must not take who is yet to come for gone.

    On a single GPU the other one never comes, and the first is still waiting after 20 seconds.
    """
    url, peers = f"tcp://localhost:{free_port()}", []
    words = [*PRETRAIN.split(), *f"--epochs 1 --world-size 2 --dist-url {url} --peer-timeout 4".split()]
    try:
        for rank in range(2):
            here = ["--gpu", rank] if GPU else []
            peers.append(start(*words, *here, "--rank", rank, "--save-dir", tmp_path / "run", data))
            if rank == 0:
                with pytest.raises(subprocess.TimeoutExpired):
                    peers[0].wait(timeout=20)
                if torch.cuda.device_count() == 1:
                    return
        assert_good_end(peers[0])
        assert peers[1].wait(timeout=60) == 0
    finally:
        for peer in peers:
            with contextlib.suppress(ProcessLookupError):
                peer.kill()
