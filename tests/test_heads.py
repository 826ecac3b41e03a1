"""Several last layers in one pass: each is what it would be alone, whatever becomes of the others."""

import json
import os
import shutil

import pytest
import torch
import torch.nn as nn
from conftest import ARCH, cut_at, program_of, script
from test_main_lincls import BEST, LAST, lines_of, refused, result

from synco import checkpoint
from synco.heads import Fork, Heads

FLAGS = f"-a {ARCH} --img-size 32 -j 0 -b 8 --epochs 3 --schedule 2 --seed 3 -p 2 --save-steps 2".split()
RATES = (1.0, 30.0, 3e38)  # the last diverges


@pytest.fixture(scope="module")
def several(data, pretrained, tmp_path_factory):
    """A probe with three rates through the real command line → (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("heads") / "several"
    flags = [*FLAGS, "--pretrained", pretrained, "--save-dir", folder, "--lr", *RATES, data]
    return folder, script("main_lincls", *flags)


def head_of(content, name):
    """A head's weights and momentum in a checkpoint of several, or of the one that it was trained alone in."""
    if "heads" not in content:
        layer = {key: content["state_dict"][f"module.fc.{key}"] for key in ("weight", "bias")}
        numbers = content["optimizer"]["param_groups"][0]["params"]
    else:
        layer = content["heads"]["layers"][name]
        numbers = content["optimizer"]["param_groups"][list(content["heads"]["layers"]).index(name)]["params"]
    return [*layer.values(), *(content["optimizer"]["state"][i]["momentum_buffer"] for i in numbers)]


def same(a, b, name):
    return all(torch.equal(x, y) for x, y in zip(head_of(a, name), head_of(b, name), strict=True))


def test_each_head_is_the_run_with_its_rate_alone(several, data, pretrained, tmp_path, programs):
    folder, run = several
    assert run.returncode == 0, run.stderr
    many = checkpoint.load(str(folder / LAST))
    reached = {head["name"]: head for head in result(folder)["heads"]}
    for lr in RATES[:2]:
        alone = tmp_path / f"{lr:g}"
        status, _, err = programs("main_lincls", *FLAGS, "--pretrained", pretrained, "--save-dir", alone, "--lr", lr, data)  # fmt: skip # noqa: E501
        assert status == 0, err
        assert same(many, checkpoint.load(str(alone / LAST)), f"lr{lr:g}")
        head, found = reached[f"lr{lr:g}"], result(alone)
        assert [head[key] for key in ("epoch", "top1", "top5")] == [found[key] for key in ("epoch", "top1", "top5")]
        assert head["last"]["top1"] == found["last"]["top1"]
        logged = [[line for line in lines_of(place) if line["kind"] == "train"] for place in (folder, alone)]
        assert [line[f"loss/lr{lr:g}"] for line in logged[0]] == [line["loss"] for line in logged[1]]
        val = [[line for line in lines_of(place) if line["kind"] == "val"] for place in (folder, alone)]
        assert [line[f"loss/lr{lr:g}"] for line in val[0]] == [line["loss"] for line in val[1]]


def test_a_head_that_diverges_is_dropped_with_a_line(several):
    folder, run = several
    gone = [line for line in run.stderr.splitlines() if "diverged" in line]
    assert len(gone) == 1 and "lr3e+38 has diverged and is dropped" in gone[0] and "heads that go on: 2" in gone[0]
    heads = {head["name"]: head for head in result(folder)["heads"]}
    assert heads["lr3e+38"]["diverged"]["epoch"] == 0 and heads["lr3e+38"]["top1"] is None
    assert heads["lr1"]["diverged"] is heads["lr30"]["diverged"] is None
    table = run.stdout[run.stdout.index("head ") :].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["head", "lr1", "lr30", "lr3e+38"]
    assert [line.split()[-1] for line in table[1:4]] == ["no", "no", "0"] and table[4].startswith("Done. Best top-1 ")


def test_the_best_heads_checkpoint_is_the_published_format(several, data, tmp_path, programs):
    folder, _ = several
    best, found = checkpoint.load(str(folder / BEST)), result(folder)
    name = found["head"]
    assert "the best is chosen on val, as the papers do" in several[1].stdout and "val" in found["chosen_on"]
    layer = best["heads"]["layers"][name]
    assert torch.equal(best["state_dict"]["module.fc.weight"], layer["weight"])
    assert sorted(key for key in best["state_dict"] if "fc" in key) == ["module.fc.bias", "module.fc.weight"]
    assert found["top1"] == max(head["top1"] for head in found["heads"] if head["top1"] is not None)
    flags = ["-a", ARCH, "--img-size", 32, "-j", 0, "-e", "--resume", folder / BEST, "--save-dir", tmp_path / "e", data]
    status, out, err = programs("main_lincls", *flags)
    assert status == 0 and result(tmp_path / "e")["top1"] == found["top1"], err


@pytest.mark.parametrize("cut, nth", [(LAST, 2), ("checkpoint_lincls_step.pth.tar", 2)], ids=["epoch", "within"])
def test_an_interrupted_run_of_several_ends_bit_identical(
    several, data, pretrained, tmp_path, programs, monkeypatch, cut, nth
):
    flags = [*FLAGS, "--pretrained", pretrained, "--resume", "auto", "--save-dir", tmp_path, "--lr", *RATES, data]
    with monkeypatch.context() as patch:
        cut_at(patch, cut, nth)
        assert programs("main_lincls", *flags)[0] == 130
    status, out, err = programs("main_lincls", *flags)
    assert status == 0 and "resumed " in out, err
    for name in (LAST, BEST):
        a, b = (checkpoint.load(str(place / name)) for place in (several[0], tmp_path))
        assert all(same(a, b, head) for head in a["heads"]["layers"])
        assert [a["heads"][key] for key in ("diverged", "best", "last")] == [b["heads"][key] for key in ("diverged", "best", "last")]  # fmt: skip # noqa: E501
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    assert lines_of(several[0]) == lines_of(tmp_path)


def test_several_processes_train_the_same_heads(data, pretrained, tmp_path):
    base = [*FLAGS, "--epochs", 1, "--pretrained", pretrained, "--save-dir"]
    contents = []
    for rates in ((1.0, 30.0), (30.0,)):
        folder = tmp_path / str(len(rates))
        statuses, _, err = program_of(2, "main_lincls", *base, folder, "--lr", *rates, data)
        assert statuses == [0, 0], err
        contents.append(checkpoint.load(str(tmp_path / str(len(rates)) / LAST)))
    assert same(*contents, "lr30")


def test_rates_and_decays_of_a_frozen_semi_supervised_run_chosen_on_held_out_images(
    data, pretrained, tmp_path, programs
):
    flags = [*FLAGS[:8], "--epochs", 1, "--seed", 3, "--hold-out", 6, "--pretrained", pretrained]
    status, out, err = programs(
        "main_semisup", *flags, "--lr-classifier", 0.1, 1, "--wd", 0, 0.01, "--save-dir", tmp_path / "r", data
    )
    assert status == 0 and "On val, looked at for this alone: top-1 " in out, err
    found = result(tmp_path / "r")
    names = ["lr0.1-wd0", "lr0.1-wd0.01", "lr1-wd0", "lr1-wd0.01"]
    assert [head["name"] for head in found["heads"]] == names
    assert found["chosen_on"] == "6 training images that are held out" and found["val_images"] == 6
    best = tmp_path / "r" / "model_best_semisup.pth.tar"
    status, _, err = programs("main_semisup", *FLAGS[:6], "-e", "--resume", best, "--save-dir", tmp_path / "e", data)
    assert status == 0 and result(tmp_path / "e")["top1"] == found["val"]["top1"], err
    assert len(checkpoint.load(str(best))["scheduler"]["base_lrs"]) == 4


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("main_lincls", "--lr 1 3 1.0", "argument --lr/--learning-rate: 1 is given twice"),
        ("main_lincls", "--lr 1 x 3", "'x' is not a number >= 0"),
        ("main_lincls", "--lr 1 -3", "'-3' is not a number >= 0"),
        ("main_lincls", "--wd 0 0", "argument --wd/--weight-decay: 0 is given twice"),
        ("main_semisup", "--weights finetune --lr-classifier 1 3", "--lr-classifier 1.0 3.0: several go with"),
        ("main_semisup", "--weights finetune --wd 1 3", "--wd 1.0 3.0: several go with --weights freeze alone"),
    ],
)
def test_bad_flags(data, tmp_path, programs, program, flags, message):
    words = ["-a", ARCH, "--pretrained", "random", "--save-dir", tmp_path / "r", *flags.split(), data]
    refused(programs(program, *words), message, tmp_path / "r")


def test_a_run_goes_on_with_the_same_heads(several, data, pretrained, tmp_path, programs):
    shutil.copytree(several[0], tmp_path / "r")
    flags = [*FLAGS, "--pretrained", pretrained, "--resume", "auto", "--save-dir", tmp_path / "r", "--force-resume"]
    for rates, mine in (([1, 30], "the heads lr1, lr30"), ([30], "one head")):
        message = f"has the heads lr1, lr30, lr3e+38; the learning rates and weight decays given make {mine}"
        refused(programs("main_lincls", *flags, "--lr", *rates, data), message)
    content = torch.load(tmp_path / "r" / LAST, weights_only=True) | {"epoch": 2}
    for change, message in (
        ({"best": {"lr1": 3}}, "its heads are not the heads of a run"),
        ({"kept": {"weight": torch.ones(2)}}, "its head kept does not fit: missing: bias"),
        ({"diverged": {"lr7": {"epoch": 0, "step": 0}}}, "what its heads have reached (diverged) is none of theirs"),
    ):
        torch.save(content | {"heads": content["heads"] | change}, tmp_path / "r" / LAST)
        refused(programs("main_lincls", *flags, "--lr", *RATES, data), message)


def test_all_that_diverge_end_the_run(data, pretrained, tmp_path, programs):
    flags = [*FLAGS, "--pretrained", pretrained, "--save-dir", tmp_path / "r", "--lr", "2e38", "3e38", data]
    status, _, err = programs("main_lincls", *flags)
    assert status == 1 and err.count("\n") == 1 and "is not finite from step" in err
    assert not os.path.exists(tmp_path / "r" / LAST)
    assert json.loads((tmp_path / "r" / "nonfinite.json").read_text())["epoch"] == 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.body(x).relu())


def test_a_fork_runs_the_backbone_once_and_mixes_no_gradients():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    heads, passes = Heads(net, "fc", [1.0, 3.0, 10.0]), []
    heads.layers.requires_grad_(True)
    net.body.register_forward_hook(lambda *_: passes.append(1))
    x, labels = torch.randn(7, 6), torch.randint(3, (7,))
    heads.alive[2] = False
    logits = heads.module(x)
    assert len(passes) == 1 and isinstance(heads.module, Fork) and not logits[2].any()
    heads.losses(logits, labels)[1].backward()
    weights = [layer.weight for layer in heads.layers]
    expected = torch.softmax(net(x), dim=1) - nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(weights[1].grad, expected.T @ net.body(x).relu() / 7)
    assert not weights[0].grad.any() and not weights[2].grad.any()


def test_a_loss_that_has_grown_tenfold_is_told_once_and_lower_rates_named(capsys):
    heads = Heads(Net(), "fc", [30.0], flag="--lr")
    for epoch, loss, told in ((0, 10.0, False), (0, 11.0, True), (0, 12.0, False)):  # ln 3 is 1.0986
        heads.report({"loss": loss}, epoch)
        err = capsys.readouterr().err
        assert ("over ten times the 1.1 of guessing: try lower rates, --lr 3 0.3 0.03\n" in err) == told, (loss, err)
    for quiet in (Heads(Net(), "fc", [30.0]), Heads(Net(), "fc", [30.0], flag="--lr")):  # fine-tuning; a later epoch
        quiet.report({"loss": 1e4}, int(quiet.flag is not None))
        assert capsys.readouterr().err == ""


def test_the_head_with_the_smallest_loss_is_shown():
    heads = Heads(Net(), "fc", [1.0, 3.0])
    numbers = {"loss": [2.0, 1.0], "acc1": [10.0, 20.0], "lr/lr1": 0.1, "lr/lr3": 0.3, "data_share": 0.5}
    shown, found = heads.report(numbers, 1)
    assert shown == "lr3: " and (found["loss"], found["acc1"], found["lr"]) == (1.0, 20.0, 0.3)
    assert (found["loss/lr1"], found["acc1/lr3"], found["data_share"]) == (2.0, 20.0, 0.5) and "lr/lr1" not in found


def test_of_heads_with_one_accuracy_the_smaller_loss_is_best():
    heads = Heads(Net(), "fc", [1.0, 3.0])
    results = [{"top1": 50.0, "top5": 100.0, "loss": 9.0}, {"top1": 50.0, "top5": 100.0, "loss": 1.0}]
    assert heads.judge(results, 1) == 1 and heads.last["lr3"]["loss"] == 1.0
