"""Checkpoint files: the published formats, written whole or not at all, and never executed."""

import copy
import os
import pickle
import random
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

from benchmarks import survival as interrupted
from synco import checkpoint
from synco.builder import SynCo
from synco.errors import UserError
from synco.networks import network_of

FEW = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1}


def resnet(seed=0, K=48):
    torch.manual_seed(seed)
    model = SynCo(network_of("resnet18", 32), 16, K, mlp=True, **FEW)
    return model, torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)


def step(model, optimizer):
    g = torch.Generator().manual_seed(5)
    logits, labels = model(*torch.randn(2, 4, 3, 32, 32, generator=g), step=0)
    optimizer.zero_grad()
    F.cross_entropy(logits, labels).backward()
    optimizer.step()


@pytest.fixture(scope="module")
def published():
    """A checkpoint in the reference's format, put together from facts about the format and not by `save`."""
    model, optimizer = resnet()
    step(model, optimizer)
    content = {
        "epoch": 7,
        "arch": "resnet18",
        "state_dict": {"module." + name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    return content, model, optimizer


def test_names_and_keys_are_the_published_ones(published):
    content, model, optimizer = published
    names = set(checkpoint.prefixed(model.state_dict()))
    assert names == set(content["state_dict"])
    assert all(name.startswith(("module.encoder_q.", "module.encoder_k.", "module.queue")) for name in names)
    assert {"module.encoder_q.conv1.weight", "module.encoder_k.fc.2.bias", "module.queue_ptr"} < names
    assert content["state_dict"]["module.queue"].shape == (48, 16)
    assert set(checkpoint.unprefixed(content["state_dict"])) == set(model.state_dict())
    state = optimizer.state_dict()
    assert len(state["param_groups"]) == 1 and len(state["param_groups"][0]["params"]) == 128
    assert sorted(state["state"]) == list(range(64))  # momentum for the query encoder's parameters alone


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_that_is_fused_reads_the_state_of_one_that_is_not(fused):
    """A fused AdamW wants its counts of steps on the device and in float32, the other one leaves them as they are."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    saved = torch.optim.AdamW(weights[:1], 0.1, fused=not fused)
    weights[0].sum().backward()
    saved.step()
    state = saved.state_dict()
    state["state"][0]["step"] = state["state"][0]["step"].double()
    optimizer = torch.optim.AdamW(weights[1:], 0.2, fused=fused)
    checkpoint.load_optimizer({"optimizer": state}, "x", optimizer)
    assert optimizer.state[weights[1]]["step"].dtype == (torch.float32 if fused else torch.float64)
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["lr"]) == (fused, 0.2)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("moco_queue", [True, False])
def test_the_references_checkpoint_resumes_with_its_optimizer(published, tmp_path, prefix, moco_queue):
    content, trained, trained_optimizer = published
    state = content["state_dict"] if prefix else checkpoint.unprefixed(content["state_dict"])
    if moco_queue:  # MoCo's queue is (C, K)
        name = "module.queue" if prefix else "queue"
        state = {**state, name: state[name].T.contiguous()}
    path = str(tmp_path / "checkpoint_0006.pth.tar")
    torch.save({**content, "state_dict": state}, path)

    model, optimizer = resnet(seed=1)
    optimizer.param_groups[0]["weight_decay"] = 5e-4
    saved = checkpoint.load(path)
    checkpoint.load_model(saved, path, model)
    checkpoint.load_optimizer(saved, path, optimizer)
    assert same(model, trained) and saved["config"] == {}
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4  # the command line's, not the file's
    twin, twin_optimizer = copy.deepcopy((trained, trained_optimizer))
    twin_optimizer.param_groups[0]["weight_decay"] = 5e-4
    step(model, optimizer)
    step(twin, twin_optimizer)
    assert same(model, twin)  # the momentum came along


@pytest.mark.parametrize("state", [None, {}, {"state": {}, "param_groups": []}, {"state": {0: {"x": torch.ones(3)}}}])
def test_an_optimizer_state_that_does_not_fit_is_refused_and_changes_nothing(published, state):
    _, optimizer = resnet(seed=1)
    with pytest.raises(UserError, match="x.pth.tar: its optimizer state does not fit"):
        checkpoint.load_optimizer({"optimizer": state}, "x.pth.tar", optimizer)
    assert not optimizer.state


def test_missing_unknown_and_misshapen_tensors_are_named(published):
    content, _, _ = published
    state = content["state_dict"]
    few = {name: tensor for name, tensor in state.items() if name != "module.encoder_q.conv1.weight"}
    for K, weights, message in (
        (96, state, r"of another shape: queue \(\(48, 16\) where \(96, 16\) is wanted\)"),
        (48, few | {"module.extra": torch.zeros(1)}, "missing: encoder_q.conv1.weight; unknown: extra$"),
        (48, state | {"module.queue": torch.full((48, 16), torch.inf)}, "queue holds values that are not finite"),
        (
            48,
            state | {"module.queue": torch.ones(48, 16).to_sparse()},
            "queue is a tensor of torch.float32, torch.spar",
        ),
        (48, state | {"module.queue_ptr": torch.ones(1, dtype=torch.bool)}, "queue_ptr is a tensor of torch.bool"),
    ):
        model, _ = resnet(seed=1, K=K)
        before = copy.deepcopy(model)
        with pytest.raises(UserError, match=message):
            checkpoint.load_model({"state_dict": weights}, "x", model)
        assert same(model, before)


def test_positions_that_make_no_sense_are_refused():
    for epoch in ("seven", -1, None, torch.ones(1)):
        with pytest.raises(UserError, match="x: its epoch is .*, not a number of epochs done"):
            checkpoint.check_epoch({"epoch": epoch}, "x")
    checkpoint.check_epoch({"epoch": 7}, "x")
    for step, per in (("x", 3), (99, 3), (3, 3), (10, 3), (7, "3"), (None, 3)):
        with pytest.raises(UserError, match="x: its step is .* after 2 epochs of "):
            checkpoint.position({"epoch": 2, "step": step, "steps_per_epoch": per}, "x", 3)
    with pytest.raises(UserError, match="x: was stopped within an epoch of 4 steps; here an epoch has 3"):
        checkpoint.position({"epoch": 2, "step": 9, "steps_per_epoch": 4}, "x", 3)
    assert checkpoint.position({"epoch": 2, "step": 8, "steps_per_epoch": 4}, "x", 3) == 6  # whole epochs


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Hostile()}, "hostile.pth.tar")
    torch.save({"state_dict": {}, "x": Hostile()}, "old.pth.tar", _use_new_zipfile_serialization=False)
    with open("pickle.pth.tar", "wb") as file:
        pickle.dump({"state_dict": {}, "x": Hostile()}, file)
    for name in ("hostile", "old", "pickle"):
        with pytest.raises(UserError, match=f"{name}.pth.tar: not a"):
            checkpoint.load(f"{name}.pth.tar")
    assert not os.path.exists("executed")
    torch.save([1, 2], "list.pth.tar")
    torch.save({"state_dict": {"w": 3}}, "number.pth.tar")
    torch.save({0: torch.ones(2)}, "nameless.pth.tar")
    with open("text.pth.tar", "w") as file:
        file.write("hello\n" * 100)
    open("empty.pth.tar", "w").close()
    with zipfile.ZipFile("zip.pth.tar", "w") as file:
        file.writestr("a.txt", "a")
    for name in ("list", "number", "nameless", "text", "empty", "zip"):
        with pytest.raises(UserError, match=f"{name}.pth.tar: ") as error:
            checkpoint.load(f"{name}.pth.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.pth.tar: no such checkpoint file"):
        checkpoint.load("none.pth.tar")


@pytest.mark.parametrize("old_format", [True, False])
def test_truncated_files_are_refused(tmp_path, old_format):
    whole = str(tmp_path / "whole.pth.tar")
    state = {f"w{i}": torch.randn(50) for i in range(6)}
    torch.save({"epoch": 1, "state_dict": state}, whole, _use_new_zipfile_serialization=not old_format)
    content = open(whole, "rb").read()
    for length in range(0, len(content) - 1, max(1, len(content) // 60)):
        path = str(tmp_path / "cut.pth.tar")
        with open(path, "wb") as file:
            file.write(content[:length])
        with pytest.raises(UserError, match="cut.pth.tar: not a"):
            checkpoint.load(path)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "checkpoint_0000.pth.tar")
    checkpoint.save({"state_dict": {"w": torch.ones(3)}}, path)
    first = open(path, "rb").read()

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"state_dict": {"w": torch.ones(1000)}, "x": Unwritable()}, path)
    assert open(path, "rb").read() == first and os.listdir(tmp_path) == ["checkpoint_0000.pth.tar"]

    order = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (order.append("fsync"), real(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (order.append("replace"), real(a, b)))
    checkpoint.save({"state_dict": {"w": torch.zeros(3)}}, path)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_a_save_removes_what_a_killed_one_has_left(tmp_path):
    for name in ("a.pth.tar.0123abcd.tmp", "b.pth.tar.0123abcd.tmp", "a.pth.tar.tmp"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save({"epoch": 1}, str(tmp_path / "a.pth.tar"))
    assert sorted(os.listdir(tmp_path)) == ["a.pth.tar", "a.pth.tar.tmp", "b.pth.tar.0123abcd.tmp"]


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("whole") / "checkpoint_0000.pth.tar")
    state = {f"w{i}": torch.randn(40, 7) for i in range(20)}
    checkpoint.save({"epoch": 1, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


@pytest.mark.parametrize("kind", interrupted.KINDS)
def test_every_damaged_file_is_refused_in_one_line(whole, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with open(whole, "rb") as file:
        content = file.read()
    rng = random.Random(kind)
    for _ in range(40):
        interrupted.damage("bad.pth.tar", content, kind, rng)
        with open("bad.pth.tar", "rb") as file:
            if file.read() == content:  # zeros in place of zeros
                continue
        with pytest.raises(UserError, match="^bad.pth.tar: not a ") as error:
            checkpoint.load("bad.pth.tar")
        assert "\n" not in str(error.value)
    assert os.listdir() == ["bad.pth.tar"]


def test_a_flipped_bit_in_any_of_the_last_bytes_is_seen(whole, tmp_path):
    with open(whole, "rb") as file:
        content = bytearray(file.read())
    path = str(tmp_path / "x.pth.tar")
    for place in range(1, 110):
        content[-place] ^= 16
        with open(path, "wb") as file:
            file.write(content)
        content[-place] ^= 16
        with pytest.raises(UserError, match="not a whole checkpoint file"):
            checkpoint.check_whole(path)


def test_other_readers_take_a_sealed_file_and_foreign_ones_are_checked_by_their_own_sums(whole, tmp_path):
    plain = torch.load(whole, weights_only=True)
    assert torch.load(whole, weights_only=True, mmap=True)["epoch"] == 1
    with zipfile.ZipFile(whole) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"synco sha256 ")
    path = tmp_path / "foreign.pth.tar"
    torch.save(plain, path)
    assert torch.equal(checkpoint.load(path)["state_dict"]["w3"], plain["state_dict"]["w3"])
    content = bytearray(path.read_bytes())
    where = content.index(plain["state_dict"]["w3"].numpy().tobytes())
    content[where + 100] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["epoch"] == 1  # torch itself does not notice
    with pytest.raises(UserError, match="foreign.pth.tar: not a whole checkpoint file"):
        checkpoint.load(path)
    with zipfile.ZipFile(tmp_path / "packed.pth.tar", "w", zipfile.ZIP_DEFLATED) as archive:  # 1000 times its size
        archive.writestr("x/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="packed.pth.tar: not a whole checkpoint file"):
        checkpoint.load(tmp_path / "packed.pth.tar")


def test_nothing_that_is_not_finite_is_saved():
    content = {"state_dict": {"w": torch.ones(3)}, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}
    checkpoint.check_before_saving(content)
    for place in (content["state_dict"], content["optimizer"]["state"][0]):
        name = next(iter(place))
        place[name] = torch.tensor([1.0, float("inf"), 0.0])
        with pytest.raises(FloatingPointError, match=f"{name}.* is not finite"):
            checkpoint.check_before_saving(content)
        place[name] = torch.ones(3)


def test_where_checkpoints_of_before_stopped():
    """They tell the steps, and not those of an epoch; with --steps the last epoch was cut short."""
    found = [
        checkpoint.position({"epoch": 4, **more}, "x", 3) for more in ({"step": 10}, {"step": 12}, {}, {"step": "a"})
    ]
    assert found == [10, 12, 12, 12]


def test_safetensors_of_others(tmp_path, monkeypatch):
    """Weights alone, as timm publishes them, and what is said where the package is not installed."""
    save = pytest.importorskip("safetensors.torch").save_file
    save({"conv1.weight": torch.ones(2, 3)}, tmp_path / "x.safetensors", {"format": "pt"})
    content = checkpoint.load(tmp_path / "x.safetensors")
    assert content.keys() == {"state_dict", "config"} and content["config"] == {}
    assert torch.equal(content["state_dict"]["conv1.weight"], torch.ones(2, 3))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="x.safetensors: safetensors is not installed; pip install safetensors$"):
        checkpoint.load(tmp_path / "x.safetensors")
