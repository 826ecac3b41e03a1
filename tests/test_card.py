"""The model card: timm loads it and computes the same features, it says what the checkpoint says, and refusals."""

import os
import re

import pytest
import torch
from conftest import ARCH, make_pretrained

import main_synco
from synco import card, export, files
from synco.networks import features

timm = pytest.importorskip("timm", minversion="1.0.16")
pytest.importorskip("safetensors")

CONFIG = {"img_size": 64, "stats": "cifar10", "dataset": "imagefolder", "data": "/home/someone/photographs", "lr": 0.25}
CONFIG |= {"cos": True, "schedule": [120, 160], "moco_t": 0.2, "mlp": True, "symmetric": False, "n1": 7, "seed": 0}
ORIGIN = {"method": "SynCo: 7 | of\nthem", "command": "main_synco.py `x` | 'a b'", "versions": {"torch": "2.6.0"}}
PARTS = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pretraining's checkpoint, with settings, and one without any → (their folder, the encoder)."""
    folder = tmp_path_factory.mktemp("trained")
    encoder = make_pretrained("resnet18", folder / "bare.tar")
    saved = torch.load(folder / "bare.tar", weights_only=True)
    torch.save(saved | {"config": CONFIG | {"origin": ORIGIN}}, folder / "ours.tar")
    result = {"top1": 67.123, "top5": 88.0, "val_images": 500, "command": "main_lincls.py --lr 30"}
    for name, of in (("mine", "ours.tar"), ("other", "bare.tar")):
        digest = files.sha256(folder / of)
        files.write_json(folder / f"{name}.json", result | {"checkpoint": of, "checkpoint_sha256": digest})
    return folder, encoder


@torch.no_grad()
def test_timm_computes_the_same_features(trained, tool, tmp_path, monkeypatch):
    """With the lines that the card itself gives."""
    folder, encoder = trained
    monkeypatch.chdir(tmp_path)
    status, out, err = tool(export, folder / "ours.tar", "--card", "a card", "--results", folder / "mine.json")
    assert (status, err) == (0, "") and files.sha256(folder / "ours.tar") in out
    assert os.listdir() == ["a card"] and set(os.listdir("a card")) == PARTS
    [lines] = re.findall("```python\n(.*?)```", open("a card/README.md").read(), re.S)
    assert len(lines.splitlines()) == 3
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = {"images": images}
    exec(lines, found)
    assert torch.allclose(found["features"], features(encoder, "fc", images), rtol=1e-4, atol=1e-5)
    views = timm.data.resolve_model_data_config(found["network"])
    assert tuple(views["input_size"]) == (3, 64, 64) and tuple(views["mean"]) == (0.4914, 0.4822, 0.4465)
    assert timm.create_model("local-dir:a card", pretrained=True, num_classes=5).fc.out_features == 5


def test_what_it_says(trained, tool, tmp_path):
    folder, _ = trained
    assert tool(export, folder / "ours.tar", "--card", tmp_path / "card", "--results", folder / "mine.json")[0] == 0
    text = (tmp_path / "card" / "README.md").read_text()
    for line in (
        "# resnet18, 200 epochs",
        "SynCo: 7 \\| of\\\\nthem",
        "| data | photographs |",
        "| lr | 0.25 |",
        "| moco\\_t | 0.2 |",
        "| n1 | 7 |",
        "| seed | 0 |",
        "| linear probe | 67.12 % | 88.00 % | 500 | `main_lincls.py --lr 30` |",
        f"| SHA-256 | {files.sha256(folder / 'ours.tar')} |",
        "| made with | torch 2.6.0 |",
        "| command | `main_synco.py 'x' \\| 'a b'` |",
    ):
        assert line in text.splitlines()
    assert "license: cc-by-nc-4.0" in text and "symmetric" not in text and "schedule" not in text
    assert "someone" not in text


def test_an_evaluations_accuracies(trained, tool, tmp_path):
    """Of this checkpoint alone, where it is of two."""
    folder, _ = trained
    of = [{"checkpoint_sha256": files.sha256(folder / name)} for name in ("bare.tar", "ours.tar")]
    accuracies = {"knn k=10 t=0.1": {"top1": 61.0, "low": 58.25, "high": 63.5}, "logistic 1 %": {"top1": 40.0}}
    of[0]["accuracies"], of[1]["accuracies"] = {"knn k=10 t=0.1": {"top1": 99.0}}, accuracies
    path = tmp_path / "evaluation.json"
    files.write_json(path, {"checkpoints": of, "val_images": 50, "command": "evaluate.py x"})
    words = [folder / "ours.tar", "--card", tmp_path / "card", "--results", path, folder / "mine.json"]
    assert tool(export, *words)[0] == 0
    lines = (tmp_path / "card" / "README.md").read_text().splitlines()
    assert "| kNN, k = 10, t = 0.1 | 61.00 % (95 %: 58.25 to 63.50) |  | 50 | `evaluate.py x` |" in lines
    assert "| logistic regression, 1 % of the labels | 40.00 % |  | 50 |  |" in lines
    assert "| linear probe | 67.12 % | 88.00 % | 500 | `main_lincls.py --lr 30` |" in lines
    assert "99.00" not in "".join(lines)
    files.write_json(path, {"checkpoints": of, "val_images": 50, "settings": {"hold_out": 50}})
    assert tool(export, *words[:-1], "--force")[0] == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert text.count(", on held-out training images | ") == 2


def test_a_row_says_what_its_rate_was_chosen_on(trained, tool, tmp_path):
    """On held-out images: its number on val, without one that it is of those; on val: that it is the best of many."""
    folder, _ = trained
    result = {"top1": 77.0, "top5": 97.0, "val_images": 640, "command": "main_lincls.py", "hold_out": 640}
    result["checkpoint_sha256"] = files.sha256(folder / "ours.tar")
    files.write_json(tmp_path / "several.json", result | {"val": {"top1": 70.0, "top5": 90.0}})
    files.write_json(tmp_path / "one.json", result | {"command": "main_semisup.py"})
    best = {"top1": 71.0, "val_images": 500, "hold_out": None, "heads": [{"lr": 1.0}, {"lr": 10.0}]}
    files.write_json(tmp_path / "best.json", result | best)
    words = [folder / "ours.tar", "--card", tmp_path / "card", "--results", tmp_path / "several.json"]
    assert tool(export, *words, tmp_path / "one.json", tmp_path / "best.json")[0] == 0
    lines = (tmp_path / "card" / "README.md").read_text().splitlines()
    assert "| linear probe | 70.00 % | 90.00 % |  | `main_lincls.py` |" in lines
    told = "training on labels, on held-out training images"
    assert f"| {told} | 77.00 % | 97.00 % | 640 | `main_semisup.py` |" in lines
    told = "linear probe, the best of 2 settings on these images"
    assert f"| {told} | 71.00 % | 97.00 % | 500 | `main_lincls.py` |" in lines


def test_a_row_says_how_many_labels_there_were(trained, tool, tmp_path):
    folder, _ = trained
    result = {"top1": 50.0, "checkpoint_sha256": files.sha256(folder / "ours.tar"), "command": "main_semisup.py"}
    files.write_json(tmp_path / "few.json", result | {"train_percent": 1, "weights": "finetune"})
    files.write_json(tmp_path / "more.json", result | {"train_percent": 10, "weights": "freeze"})
    files.write_json(tmp_path / "own.json", result | {"train_percent": 100, "subset_file": "x", "weights": "freeze"})
    words = ["--card", tmp_path / "card", "--results", *(tmp_path / f"{name}.json" for name in ("few", "more", "own"))]
    assert tool(export, folder / "ours.tar", *words)[0] == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert "| fine-tuning on 1 % of the labels | 50.00 % |" in text
    assert "| linear classifier on 10 % of the labels | 50.00 % |" in text
    assert "| linear classifier on a list of labels | 50.00 % |" in text


@pytest.mark.parametrize("step, title", [(3, "1.5 epochs"), (4, "2 epochs"), (-5, "2 epochs"), ("x", "2 epochs")])
def test_a_length_in_steps_may_end_within_an_epoch(trained, tool, tmp_path, step, title):
    folder, _ = trained
    content = torch.load(folder / "ours.tar", weights_only=True) | {"epoch": 2, "step": step, "steps_per_epoch": 2}
    torch.save(content, tmp_path / "x.tar")
    assert tool(export, tmp_path / "x.tar", "--card", tmp_path / "card")[0] == 0
    assert f"# resnet18, {title}\n" in (tmp_path / "card" / "README.md").read_text()


def test_settings_that_decide_a_run_are_listed():
    """All but the network, which is the title, and --aug, which stands in other settings."""
    decisive = {name for name, kind in main_synco.flags().kinds.items() if kind in ("identity", "schedule")}
    assert decisive - {*card.DATA, *card.RECIPE} == {"arch", "aug"}


def test_a_checkpoint_that_says_nothing(trained, tool, tmp_path):
    """As the published ones."""
    folder, _ = trained
    (tmp_path / "card").mkdir()
    assert tool(export, folder / "bare.tar", "--card", tmp_path / "card")[0] == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert text.count("The checkpoint does not say.") == 3 and "None were given." in text
    assert "| command | not recorded |" in text and "| made with | not recorded |" in text
    before = text
    assert tool(export, folder / "ours.tar", "--card", tmp_path / "card", "--force")[0] == 0
    assert (tmp_path / "card" / "README.md").read_text() != before


@pytest.mark.parametrize("config", [{"origin": 3}, {"origin": {"versions": [1], "method": [2]}}, {"lr": {}, "data": 5}])
def test_settings_may_be_anything(trained, tool, tmp_path, config):
    folder, _ = trained
    torch.save(torch.load(folder / "bare.tar", weights_only=True) | {"config": config}, tmp_path / "x.tar")
    status, _, err = tool(export, tmp_path / "x.tar", "--card", tmp_path / "card")
    assert (status, err) == (0, "")


def test_a_network_of_timms_own(tool, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=1000)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(
        {"arch": "timm:mobilenetv3_small_050", "state_dict": state, "config": {"img_size": 48}}, tmp_path / "x.tar"
    )
    assert tool(export, tmp_path / "x.tar", "--card", tmp_path / "card")[0] == 0
    assert '"architecture": "mobilenetv3_small_050"' in (tmp_path / "card" / "config.json").read_text()


def test_what_is_refused(trained, tool, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    make_pretrained(ARCH, tmp_path / "shuffle.tar")
    saved = torch.load(folder / "bare.tar", weights_only=True)
    stem = {**saved["state_dict"], "module.encoder_q.conv1.weight": torch.ones(64, 3, 3, 3)}
    torch.save(saved | {"state_dict": stem, "config": {"stem": "cifar", "img_size": 32}}, "small.tar")
    os.makedirs("run")
    for name in ("run/config.json", "run/checkpoint_0000.pth.tar", "file", "none.json"):
        (tmp_path / name).write_text("{}")
    digest = files.sha256(folder / "ours.tar")
    for name, checkpoints in (
        ("empty", []),
        ("null", [{"checkpoint_sha256": digest, "accuracies": {"knn k=1 t=1": {"top1": 1.0, "low": None}}}]),
        ("nan", [{"checkpoint_sha256": digest, "accuracies": {"knn k=1 t=1": {"top1": float("nan")}}}]),
        ("nan5", [{"checkpoint_sha256": digest, "top1": 1.0, "top5": float("nan")}]),
        ("bare", [{"checkpoint_sha256": digest, "accuracies": {}}]),
        ("random", [{"checkpoint_sha256": None, "path": "random", "accuracies": {}}]),
    ):
        files.write_json(f"{name}.json", {"checkpoints": checkpoints})
    assert tool(export, folder / "bare.tar", "--card", "made")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ours = str(folder / "ours.tar")
    for words, message in (
        ([ours, "--card", "run", "--force"], "--card run: holds checkpoint_0000.pth.tar, which is no part of a card"),
        ([ours, "--card", "made"], "--card made: holds a card already; --force writes over it"),
        ([ours, "--card", "file"], "--card file: is not a folder"),
        ([ours, "--card", "no/card"], f"--card no/card: there is no folder {tmp_path}/no"),
        ([ours, "--card", "new", "--results", "missing.json"], "--results missing.json: no such file"),
        ([ours, "--card", "new", "--results", "none.json"], "--results none.json: is not what main_lincls.py"),
        ([ours, "--card", "new", "--results", "empty.json"], "--results empty.json: is not what main_lincls.py"),
        ([ours, "--card", "new", "--results", "null.json"], "--results null.json: is not what main_lincls.py"),
        ([ours, "--card", "new", "--results", "nan.json"], "--results nan.json: is not what main_lincls.py"),
        ([ours, "--card", "new", "--results", "nan5.json"], "--results nan5.json: is not what main_lincls.py"),
        ([ours, "--card", "new", "--results", "bare.json", "bare.json"], "--results bare.json: is given twice"),
        ([ours, "--card", "new", "--results", "bare.json"], "--results bare.json: holds no accuracies"),
        ([ours, "--card", "new", "--results", "random.json"], "another checkpoint (random weights) than"),
        (
            [ours, "--card", "new", "--results", str(folder / "mine.json"), str(folder / "other.json")],
            f"{folder}/other.json: is of another checkpoint (bare.tar, SHA-256 ",
        ),
        (["shuffle.tar", "--card", "new"], f"--card: timm has no network '{ARCH}'"),
        (["small.tar", "--card", "new"], "--card: timm's resnet18 is another network: of another shape: conv1.weight"),
        ([ours, "--card", "new", "--with-head"], "--card new: goes without OUT and --with-head"),
        ([ours, "x.pth", "--card", "new"], "--card new: goes without OUT and --with-head"),
        ([ours, "--results", "none.json", "x.pth"], "--results goes with --card FOLDER"),
        ([ours], "the following arguments are required: OUT, or --card FOLDER"),
    ):
        status, out, err = tool(export, *words)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err, (words, err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_nothing(trained, tool, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = tool(export, trained[0] / "ours.tar", "--card", tmp_path / "card")
    assert (status, err.count("\n")) == (2, 1) and "cannot be written (No space left on device)" in err
    assert os.listdir(tmp_path) == []


def test_other_features_than_ours_are_refused(trained, tool, tmp_path, monkeypatch):
    """A network of timm's with the same names that computes something else: here, without its ReLUs."""
    create = timm.create_model

    def other(*args, **settings):
        network = create(*args, **settings)
        network.act1 = torch.nn.Identity()
        return network

    monkeypatch.setattr(timm, "create_model", other)
    status, _, err = tool(export, trained[0] / "ours.tar", "--card", tmp_path / "card")
    assert status == 2 and "computes other features from these weights" in err and os.listdir(tmp_path) == []
