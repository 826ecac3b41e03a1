"""Transfer to detectron2: names, bits, configurations, the trainer's wiring, and the table of trials."""

import importlib.machinery
import importlib.util
import json
import logging
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

from synco import files

DETECTION = ROOT / "detection"
CONFIGS = DETECTION / "configs"


def module(name):
    """A program of detection/ as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), DETECTION / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def convert():
    return module("convert-pretrain-to-detectron2")


# -------------------------------------------------------------------------------------------------------- converter


def detectron2_list(blocks, *, bottleneck, groups=1, width=64):
    """detectron2's names and shapes of a ResNet's stem and res2 ... res5, from the rules of its format alone."""
    found = {}

    def conv(name, out, into, kernel):
        found[f"{name}.weight"] = (out, into, kernel, kernel)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.norm.{kind}"] = (out,)

    conv("stem.conv1", 64, 3, 7)
    into = 64
    for stage, count in enumerate(blocks):
        out = (256 if bottleneck else 64) * 2**stage
        inner = groups * width * 2**stage
        for block in range(count):
            name = f"res{stage + 2}.{block}"
            if bottleneck:
                conv(f"{name}.conv1", inner, into, 1)
                conv(f"{name}.conv2", inner, inner // groups, 3)
                conv(f"{name}.conv3", out, inner, 1)
            else:
                conv(f"{name}.conv1", out, into, 3)
                conv(f"{name}.conv2", out, out, 3)
            if block == 0 and into != out:
                conv(f"{name}.shortcut", out, into, 1)
            into = out
    return found


LISTS = {
    "resnet18": detectron2_list([2, 2, 2, 2], bottleneck=False),
    "resnet50": detectron2_list([3, 4, 6, 3], bottleneck=True),
    "resnext50_32x4d": detectron2_list([3, 4, 6, 3], bottleneck=True, groups=32, width=4),
    "wide_resnet50_2": detectron2_list([3, 4, 6, 3], bottleneck=True, width=128),
}


def in_order(names):
    """torchvision's names of a ResNet's parameters, running means and variances, without the head."""
    return [name for name in names if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]


def read(path):
    """As detectron2 reads it."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


@pytest.mark.parametrize("arch", LISTS)
def test_round_trip(pretrained_of, convert, tool, tmp_path, arch):
    """Every tensor of the encoder in its place, bit for bit, and nothing else.

    Both formats list a block's convolutions, norms and shortcut in the order in which they are built, so the n-th
    convolution of one is the n-th of the other: the pairs come from that order and not from the names.
    """
    path, encoder = pretrained_of(arch)
    status, out, err = tool(convert, path, tmp_path / "out.pkl")
    assert (status, err) == (0, "") and os.listdir(tmp_path) == ["out.pkl"]
    content = read(tmp_path / "out.pkl")
    found = content.pop("model")
    assert content == {
        "__author__": "SynCo",
        "matching_heuristics": True,
        "arch": arch,
        "epoch": 200,
        "checkpoint_sha256": files.sha256(path),
    }
    assert {name: array.shape for name, array in found.items()} == LISTS[arch]
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in found.values())

    state = encoder.state_dict()
    convolutions = [name for name in in_order(state) if state[name].dim() == 4]
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    places = [name.removesuffix(".weight") for name, shape in LISTS[arch].items() if len(shape) == 4]
    assert len(convolutions) == len(norms) == len(places)
    for convolution, norm, place in zip(convolutions, norms, places):
        assert np.array_equal(found[f"{place}.weight"], state[convolution].numpy())
        for kind in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(found[f"{place}.norm.{kind}"], state[f"{norm}.{kind}"].numpy())


def test_the_table_and_the_names(pretrained_of, convert, tool, tmp_path):
    path, encoder = pretrained_of("resnet50")
    _, short, _ = tool(convert, path, tmp_path / "a.pkl")
    _, long, _ = tool(convert, path, tmp_path / "b.pkl", "--verbose")
    rows = {line[:19].strip(): line[19:].split()[0] for line in short.splitlines() if " tensors " in line}
    assert rows == {"kept": "265", "dropped: head": "4", "dropped: counters": "53", "dropped: others": "3"}
    size = sum(array.nbytes for array in read(tmp_path / "a.pkl")["model"].values())
    assert f"{size / 1e6:.1f} MB" in short and files.sha256(path) in short
    lines = long.splitlines()
    assert "layer2.0.downsample.1.running_var → res3.0.shortcut.norm.running_var (512,)" in lines
    assert {"encoder_q.fc.0.weight dropped", "queue dropped", "encoder_q.bn1.num_batches_tracked dropped"} < set(lines)
    assert sum(" → " in line for line in lines) == 265 and "→" not in short
    assert sum(line.endswith(" dropped") for line in lines) == 60


def test_the_small_stem_is_refused(pretrained_of, convert, tool, tmp_path):
    """detectron2 would run it with a stride and a max-pool that the weights have never seen."""
    saved = torch.load(pretrained_of("resnet18")[0], weights_only=True)
    saved["state_dict"]["module.encoder_q.conv1.weight"] = torch.ones(64, 3, 3, 3)
    torch.save(saved | {"config": {"stem": "cifar", "img_size": 32}}, tmp_path / "x.tar")
    status, out, err = tool(convert, tmp_path / "x.tar", tmp_path / "out.pkl")
    assert (status, out, err.count("\n")) == (2, "", 1) and "is of a ResNet with the stem 'cifar'" in err
    assert not (tmp_path / "out.pkl").exists()


def test_other_sources(convert, tool, tmp_path):
    """torchvision's own weights; and the published command, from the program's folder, on a terminal without arrows."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "input.pth.tar")
    assert tool(convert, tmp_path / "input.pth.tar", tmp_path / "a.pkl", "-a", "resnet18")[0] == 0
    words = ["convert-pretrain-to-detectron2.py", tmp_path / "input.pth.tar", tmp_path / "b.pkl", "--arch", "resnet18"]
    words, env = [sys.executable, *words, "--verbose"], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=DETECTION, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "conv1.weight ? stem.conv1.weight" in done.stdout
    a, b = read(tmp_path / "a.pkl"), read(tmp_path / "b.pkl")
    assert "epoch" not in a and a["checkpoint_sha256"] == b["checkpoint_sha256"]
    assert np.array_equal(a["model"]["stem.conv1.weight"], network.conv1.weight.detach().numpy())


def test_what_is_refused(pretrained_of, convert, tool, tmp_path, monkeypatch):
    """What only the converter refuses, and of what it shares with the export one of each kind."""
    path, _ = pretrained_of("resnet18")
    monkeypatch.chdir(tmp_path)
    state = torchvision.models.resnet18().state_dict()
    torch.save({"arch": "resnet18", "state_dict": state, "best_acc1": 1.0}, "lincls.pth.tar")
    other = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save({"arch": "shufflenet_v2_x0_5", "state_dict": other}, "shuffle.pth.tar")
    vit = torchvision.models.vit_b_32(image_size=32).state_dict()
    torch.save({"arch": "vit_b_32", "config": {"img_size": 32}, "state_dict": vit}, "vit.pth.tar")
    torch.save({"arch": "resnet18", "state_dict": {"encoder_k.x": torch.ones(1)}}, "key.pth.tar")
    (tmp_path / "cut.pth.tar").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "there.pkl").write_text("mine")
    before = sorted(os.listdir())
    for words, message in (
        (["lincls.pth.tar", "x.pkl"], "lincls.pth.tar: is a classifier's checkpoint, not a pretraining's; for its"),
        (["shuffle.pth.tar", "x.pkl"], "is of a shufflenet_v2_x0_5; detectron2's names are those of ResNets alone"),
        (["vit.pth.tar", "x.pkl"], "is of a vit_b_32; detectron2's names are those of ResNets alone"),
        (["key.pth.tar", "x.pkl"], "has no backbone: neither a pretraining's encoder_q.* nor"),
        (["cut.pth.tar", "there.pkl", "--force"], "not a whole checkpoint file"),
        (["none.pth.tar", "x.pkl"], "none.pth.tar: no such checkpoint file"),
        ([path, "there.pkl"], "there.pkl: is there already; --force writes over it"),
        ([path, "x.pth"], "x.pth: the file to write must end in .pkl"),
        ([path, "none/x.pkl"], "none/x.pkl: there is no folder none"),
    ):
        status, out, err = tool(convert, *words)
        assert (status, out, err.count("\n")) == (2, "", 1), words
        assert message in err
    assert sorted(os.listdir()) == before and (tmp_path / "there.pkl").read_text() == "mine"


# --------------------------------------------------------------------------------------------------- configurations

RGB = {
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.WEIGHTS": "",
    "INPUT.FORMAT": "RGB",
    "SOLVER.BASE_LR": 0.01,
}
SUPERVISED = {
    "MODEL.PIXEL_MEAN": [103.530, 116.280, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "INPUT.FORMAT": "BGR",
    "SOLVER.BASE_LR": 0.02,
}
ALL = {
    "VERSION": 2,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "INPUT.MIN_SIZE_TEST": 800,
    "SOLVER.IMS_PER_BATCH": 16,
    "TEST.PRECISE_BN.ENABLED": True,
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": list(range(480, 801, 32)),
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.WARMUP_ITERS": 100,
}
COCO = {
    "MODEL.MASK_ON": True,
    "INPUT.MIN_SIZE_TRAIN": list(range(640, 801, 32)),
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
}
SCHEDULES = {
    "pascal_voc_R_50_C4_24k": VOC | {"SOLVER.STEPS": [18000, 22000], "SOLVER.MAX_ITER": 24000},
    "pascal_voc_R_50_C4_12k": VOC | {"SOLVER.STEPS": [9000, 11000], "SOLVER.MAX_ITER": 12000},
    "coco_R_50_C4_1x": COCO | {"SOLVER.STEPS": [60000, 80000], "SOLVER.MAX_ITER": 90000},
    "coco_R_50_C4_2x": COCO | {"SOLVER.STEPS": [120000, 160000], "SOLVER.MAX_ITER": 180000},
}


def merged(path):
    """A configuration on those that its _BASE_ names (a file or several, later ones first), {"A.B": value}."""
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(path.read_text())
    bases = content.pop("_BASE_", [])
    found = {}
    for base in [bases] if isinstance(bases, str) else bases:
        found |= merged(path.parent / base)

    def flat(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return found | dict(flat(content, ""))


@pytest.mark.parametrize("name", SCHEDULES)
def test_configurations(name):
    assert merged(CONFIGS / f"{name}.yaml") == ALL | SUPERVISED | SCHEDULES[name]
    assert merged(CONFIGS / f"{name}_synco.yaml") == ALL | SCHEDULES[name] | RGB


def test_every_configuration_is_known():
    names = {f"{name}{kind}.yaml" for name in SCHEDULES for kind in ("", "_synco")}
    assert set(os.listdir(CONFIGS)) == names | {"Base-RCNN-C4-BN.yaml", "synco.yaml"}


def scaled(gpus):
    """VOC's 24,000 iterations on fewer GPUs: (batch, rate, warm-up, two steps, iterations) by the linear rule."""
    return 2 * gpus, 0.01 * gpus / 8, *(number * 8 // gpus for number in (100, 18000, 22000, 24000))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_readmes_scaling(gpus):
    batch, rate, warm_up, first, second, end = scaled(gpus)
    row = f"| {gpus} | {batch} | {rate:g} | {warm_up} | {first:,}, {second:,} | {end:,} |"
    assert row in (DETECTION / "README.md").read_text(encoding="utf-8").splitlines()


# ----------------------------------------------------------------------------------------------------------- trainer


@pytest.fixture
def train_net():
    return module("train_net")


def test_without_detectron2(train_net, tool, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detectron2" else find(name))
    monkeypatch.chdir(tmp_path)
    status, out, err = tool(train_net, "--config-file", CONFIGS / "coco_R_50_C4_1x_synco.yaml", "MODEL.WEIGHTS", "x")
    assert (status, out, err.count("\n")) == (2, "", 1) and os.listdir(tmp_path) == []
    assert "detectron2 is not installed" in err and "pip install" in err
    assert "pip install --no-build-isolation" in (DETECTION / "README.md").read_text(encoding="utf-8")
    assert tool(train_net, "--help")[0] == 0


def merged_value(text):
    """A value on the command line, which detectron2 reads as a literal."""
    return pytest.importorskip("yaml").safe_load(text)


def write_config(folder, **changes):
    """A config.yaml as a run of pascal_voc_R_50_C4_24k_synco leaves it in its OUTPUT_DIR."""
    values = merged(CONFIGS / "pascal_voc_R_50_C4_24k_synco.yaml")
    values |= {"MODEL.WEIGHTS": "./output.pkl", "SOLVER.REFERENCE_WORLD_SIZE": 0} | changes
    config = Node()
    for key, value in values.items():
        config.put(key, value)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)  # which is YAML too
    (folder / "config.yaml").write_text(text)


class Node(dict):
    """The little of detectron2's configuration that train_net.py touches."""

    def __getattr__(self, name):
        return self[name]

    __setattr__ = dict.__setitem__

    def put(self, key, value):
        first, _, rest = key.partition(".")
        if rest:
            self.setdefault(first, Node()).put(rest, value)
        else:
            self[first] = tuple(value) if isinstance(value, list) else value

    def merge_from_file(self, path):
        for key, value in merged(pathlib.Path(path)).items():
            self.put(key, value)

    def merge_from_list(self, words):
        for key, value in zip(words[::2], words[1::2]):
            if key.split(".")[0] not in self:
                raise KeyError(f"Non-existent config key: {key}")
            self.put(key, merged_value(value))

    def freeze(self):
        pass


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """In place of detectron2: its modules as far as train_net.py uses them. The list of what was called, in order."""
    pytest.importorskip("yaml")
    calls, cached = [], tmp_path / "downloaded.pkl"

    class Trainer:
        def __init__(self, config):
            calls.append(("trainer",))

        def resume_or_load(self, resume):
            calls.append(("load", resume))

        def train(self):
            calls.append(("train",))

        @classmethod
        def build_model(cls, config):
            return "model"

        @classmethod
        def test(cls, config, model):
            calls.append(("test", *(cls.build_evaluator(config, name) for name in config.DATASETS.TEST)))

    class Heads:
        @classmethod
        def _build_res5_block(cls, cfg):
            return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1)), 5

    class Registry(dict):
        def register(self, kind):
            self[kind.__name__] = kind

    class Known(dict):
        __getattr__ = dict.__getitem__

    def known(name):
        root = os.environ["DETECTRON2_DATASETS"]
        if name.startswith("voc"):
            folder = os.path.join(root, f"VOC{name[4:8]}")
            return Known(evaluator_type="pascal_voc", dirname=folder, split=name[9:])
        file = os.path.join(root, "coco", "annotations", f"{name}.json")
        return Known(evaluator_type="coco", json_file=file, image_root=os.path.join(root, "coco", f"{name[10:]}2017"))

    class Checkpointer:
        """Loads by names and shapes as detectron2 0.6 does, and passes over what does not fit."""

        def __init__(self, model, save_dir=""):
            self.model = model
            calls.extend([("folder", save_dir)] * bool(save_dir))

        def load(self, path):
            content = read(path) if path.endswith(".pkl") else torch.load(path, map_location="cpu")
            content = content if "model" in content else {"model": content}
            for name, w in content["model"].items():
                if not isinstance(w, (np.ndarray, torch.Tensor)):
                    raise ValueError(f"Unsupported type found in checkpoint! {name}: {type(w)}")
            found = {name: torch.as_tensor(w) for name, w in content.pop("model").items()}
            for name, w in self.model.state_dict().items():
                for match in [key for key in found if f".{name}".endswith(f".{key}")]:
                    if found[match].shape == w.shape:
                        w.copy_(found[match])
            logging.getLogger("detectron2.checkpoint").error("what was loaded, in many lines")
            return content

        def resume_or_load(self, path, *, resume):
            calls.append(("weights", path, {"resume": resume}))

    class PathManager:
        @staticmethod
        def get_local_path(path):
            if "://" not in path:
                return path
            if cached.exists():
                return str(cached)
            raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    def build_model(config):
        """A detector whose backbone has one convolution, in the shape that the configuration gives it."""
        assert config.MODEL.DEVICE == "cpu" and config.MODEL.ROI_HEADS.NAME in registry
        model, block = torch.nn.Module(), torch.nn.Module()
        width = config.MODEL.RESNETS.NUM_GROUPS * config.MODEL.RESNETS.WIDTH_PER_GROUP
        block.conv1 = torch.nn.Conv2d(3, width, 1, bias=False)
        model.backbone = torch.nn.ModuleDict({"stem": block})
        model.head = torch.nn.Linear(1, 1)  # not of the pretraining
        return model

    def setup(config, args):
        calls.append(("setup", config.OUTPUT_DIR))
        os.makedirs(config.OUTPUT_DIR, exist_ok=True)
        (tmp_path / config.OUTPUT_DIR / "config.yaml").touch()

    defaults = {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}
    default = lambda: Node(  # noqa: E731
        MODEL=Node(DEVICE="cuda", RESNETS=Node(defaults)), SOLVER=Node(REFERENCE_WORLD_SIZE=0), OUTPUT_DIR="./output"
    )
    registry = Registry()
    modules = {
        "": {},
        ".config": {"get_cfg": default},
        ".data": {"MetadataCatalog": types.SimpleNamespace(get=known)},
        ".engine": {
            "launch": lambda work, gpus, machines, rank, url, args: calls.append(("launch", gpus)) or work(*args),
            "default_setup": setup,
            "DefaultTrainer": Trainer,
        },
        ".checkpoint": {"DetectionCheckpointer": Checkpointer},
        ".evaluation": {
            "COCOEvaluator": lambda name, output_dir: ("COCO", name),
            "PascalVOCDetectionEvaluator": lambda name: ("VOC", name),
        },
        ".layers": {"get_norm": lambda norm, channels: torch.nn.BatchNorm2d(channels) if norm == "naiveSyncBN" else 0},
        ".modeling": {"build_model": build_model},
        ".modeling.roi_heads": {"ROI_HEADS_REGISTRY": registry, "Res5ROIHeads": Heads},
        ".utils": {},
        ".utils.file_io": {"PathManager": PathManager},
    }
    for name, content in modules.items():
        fake = types.ModuleType(f"detectron2{name}")
        fake.__spec__ = importlib.machinery.ModuleSpec(fake.__name__, None)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    monkeypatch.chdir(tmp_path)
    for year, split in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (tmp_path / f"data/VOC{year}" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/VOC{year}/ImageSets/Main/{split}.txt").touch()
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / "data/coco" / folder).mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / f"data/coco/annotations/coco_2017_{name}.json").touch()
    write_converted(tmp_path / "output.pkl", "resnet50")
    detector = {"backbone.stem.conv1.weight": torch.ones(64, 3, 1, 1), "head.weight": torch.ones(1, 1)}
    torch.save({"model": detector, "iteration": 3}, tmp_path / "detector.pth")
    return types.SimpleNamespace(calls=calls, registry=registry)


def write_converted(path, arch, width=64, **more):
    """What the converter makes of a network with one convolution."""
    facts = {"__author__": "SynCo", "matching_heuristics": True, "arch": arch, "checkpoint_sha256": "0" * 64} | more
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.ones((width, 3, 1, 1), np.float32)}, **facts}))


def words(config, *more):
    """The published command's words, on a CPU."""
    file = CONFIGS / f"{config}.yaml"
    return ["--config-file", file, "--data-dir", "data", *more, "MODEL.WEIGHTS", "./output.pkl", "MODEL.DEVICE", "cpu"]


def test_training(train_net, tool, stub):
    status, _, err = tool(train_net, *words("pascal_voc_R_50_C4_24k_synco", "--resume"))
    assert (status, err) == (0, "")
    assert stub.calls == [("launch", 1), ("setup", "./output"), ("trainer",), ("load", True), ("train",)]


@pytest.mark.parametrize(
    "config, evaluator",
    [
        ("pascal_voc_R_50_C4_12k_synco", ("VOC", "voc_2007_test")),
        ("coco_R_50_C4_2x_synco", ("COCO", "coco_2017_val")),
        ("coco_R_50_C4_1x", ("COCO", "coco_2017_val")),
    ],
)
def test_evaluation_alone(train_net, tool, stub, tmp_path, config, evaluator):
    """It leaves the files of the training in OUTPUT_DIR alone: what detectron2 writes goes to a folder in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").touch()
    (tmp_path / "run/config.yaml").write_text("the training's")
    given = ["MODEL.WEIGHTS", "detector.pth", "OUTPUT_DIR", "run"]
    status, _, err = tool(train_net, *words(config, "--eval-only"), *given)
    assert (status, err) == (0, "")
    assert [call[0] for call in stub.calls] == ["launch", "setup", "folder", "weights", "test"]
    assert stub.calls[1:3] == [("setup", "run/eval"), ("folder", "run")]
    assert stub.calls[3][1:] == ("detector.pth", {"resume": False}) and stub.calls[4] == ("test", evaluator)
    assert sorted(os.listdir("run")) == ["config.yaml", "eval", "metrics.json"]
    assert (tmp_path / "run/config.yaml").read_text() == "the training's"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"SOLVER.BASE_LR": 0.02},
        {"SOLVER.STEPS": [1, 2]},
        {"SOLVER.MAX_ITER": 12000},
        {"DATASETS.TRAIN": ["voc_2007_trainval"]},
        {"MODEL.WEIGHTS": "other.pkl"},
        {"SOLVER.REFERENCE_WORLD_SIZE": 8},
    ],
)
def test_a_run_goes_on_with_its_settings(train_net, tool, stub, tmp_path, change):
    """--resume refuses a run of other settings, and names what differs."""
    write_config(tmp_path / "run", **change)
    (tmp_path / "run/model_0004999.pth").touch()
    before = (tmp_path / "run/config.yaml").read_text()
    status, _, err = tool(train_net, *words("pascal_voc_R_50_C4_24k_synco", "--resume"), "OUTPUT_DIR", "run")
    if not change:
        assert (status, err) == (0, "") and ("load", True) in stub.calls
        return
    assert (status, err.count("\n"), stub.calls) == (2, 1, [])
    assert "the run in OUTPUT_DIR run is another: " in err and next(iter(change)) in err
    assert (tmp_path / "run/config.yaml").read_text() == before


@pytest.mark.parametrize("left", [{}, {"metrics.json": ""}, {"metrics.json": '{"iteration": 19, "lr": 0.1}\n'}])
def test_a_start_that_failed_does_not_stand_in_the_way(train_net, tool, stub, tmp_path, left):
    """detectron2 leaves a metrics.json and other files before it has trained a step, and without a checkpoint."""
    write_config(tmp_path / "run", **{"SOLVER.IMS_PER_BATCH": 999})
    for name, text in left.items():
        (tmp_path / "run" / name).write_text(text)
    for more in ([], ["--resume"]):
        status, _, err = tool(train_net, *words("pascal_voc_R_50_C4_24k_synco", *more), "OUTPUT_DIR", "run")
        assert (status, err) == (0, "") and stub.calls[-1] == ("train",)


def test_weights_that_cannot_be_fetched(train_net, tool, stub, tmp_path):
    """One line, and nothing left that would have the same command refused; later it works."""
    given = [*words("pascal_voc_R_50_C4_24k"), "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"]
    status, out, err = tool(train_net, *given)
    assert (status, out, err.count("\n"), stub.calls) == (2, "", 1, [])
    assert "R-50.pkl: cannot be loaded (URLError: <urlopen error [Errno -3] Temporary failure in name re" in err
    assert not (tmp_path / "output").exists()
    write_converted(tmp_path / "downloaded.pkl", "resnet50")
    content = read(tmp_path / "downloaded.pkl")
    del content["checkpoint_sha256"]  # another tool's
    (tmp_path / "downloaded.pkl").write_bytes(pickle.dumps(content))
    assert tool(train_net, *given)[0] == 0


def test_weights_that_would_not_be_used_are_refused(train_net, tool, stub, tmp_path):
    """detectron2 trains on with random weights where names or shapes differ."""
    synco, supervised = "pascal_voc_R_50_C4_24k_synco", "pascal_voc_R_50_C4_24k"
    write_converted(tmp_path / "resnext50_32x4d.pkl", "resnext50_32x4d", width=128)
    write_converted(tmp_path / "resnet101.pkl", "resnet101")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "output.pkl").read_bytes()[:100])
    torch.save({"epoch": 200, "state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}}, tmp_path / "x.pth.tar")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "backbone.pth")
    torch.save({"model": {"backbone.stem.conv1.weight": torch.ones(9, 3, 1, 1)}}, tmp_path / "other.pth")
    (tmp_path / "empty.pth").touch()
    lacks = "lacks stem.conv1.weight in the shape that MODEL.RESNETS asks for; convert-pretrain-to-detectron2.py makes"
    for config, weights, message in (
        (synco, "resnext50_32x4d.pkl", lacks),
        (synco, "resnet101.pkl", "is a converted resnet101: take a _synco configuration and that DEPTH"),
        (supervised, "output.pkl", "is a converted resnet50: take a _synco configuration and that DEPTH"),
        (synco, "list.pkl", "list.pkl: cannot be loaded ("),
        (synco, "cut.pkl", "cut.pkl: cannot be loaded ("),
        (
            synco,
            "x.pth.tar",
            "cannot be loaded (ValueError: Unsupported type found in checkpoint! epoch: <class 'int'>)",
        ),
        (synco, "backbone.pth", lacks),
        (synco, "other.pth", lacks),
        (synco, "empty.pth", "empty.pth: cannot be loaded (EOFError"),
    ):
        status, out, err = tool(train_net, *words(config), "MODEL.WEIGHTS", weights)
        assert (status, out, err.count("\n"), stub.calls) == (2, "", 1, []), weights
        assert message in err
    assert not os.path.exists("output") and not logging.root.manager.disable
    resnext = ["MODEL.WEIGHTS", "resnext50_32x4d.pkl", "MODEL.RESNETS.NUM_GROUPS", "32"]
    resnext += ["MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
    for more in (resnext, ["MODEL.WEIGHTS", "resnet101.pkl", "MODEL.RESNETS.DEPTH", "101"]):
        assert tool(train_net, *words(synco), *more)[::2] == (0, ""), more
    assert tool(train_net, *words(synco), "MODEL.WEIGHTS", "detector.pth")[0] == 0


def test_the_extra_norm(train_net, stub):
    """A norm of the configured kind follows res5, and a second call registers nothing twice."""
    train_net.register_extra_norm()
    head = stub.registry["Res5ROIHeadsExtraNorm"]
    train_net.register_extra_norm()
    assert stub.registry == {"Res5ROIHeadsExtraNorm": head}
    config = Node()
    config.put("MODEL.RESNETS.NORM", "naiveSyncBN")
    res5, channels = head._build_res5_block(config)
    assert channels == 5 and [type(part).__name__ for part in res5] == ["Conv2d", "BatchNorm2d"]
    assert res5(torch.randn(2, 3, 4, 4)).shape == (2, 5, 4, 4)


def test_what_the_trainer_refuses(train_net, tool, stub, tmp_path):
    voc, coco = "pascal_voc_R_50_C4_24k_synco", "coco_R_50_C4_1x_synco"
    for name, text in (("metrics.json", '{"bbox/AP": 1.0, "iteration": 9}\n'), ("model_0004999.pth", "")):
        (tmp_path / f"with {name}").mkdir()
        (tmp_path / f"with {name}" / name).write_text(text)
    shutil.rmtree(tmp_path / "data/VOC2012")
    before = sorted(tmp_path.rglob("*"))
    for given, message in (
        (
            words(voc),
            "VOC2012/ImageSets/Main/trainval.txt: not there, and voc_2012_trainval needs it; --data-dir is the",
        ),
        (
            ["--config-file", CONFIGS / f"{coco}.yaml", "--data-dir", "data", "--num-gpus", "0"],
            "MODEL.WEIGHTS : no such",
        ),
        (
            [*words(coco), "MODEL.WEIGHTS", "no.pkl"],
            "MODEL.WEIGHTS no.pkl: no such file; convert-pretrain-to-detectron2",
        ),
        ([*words(coco), "MODEL.DEVICE", "cuda"], "--num-gpus 1: GPUs of this machine: 0"),
        ([*words(coco), "OUTPUT_DIR", "with metrics.json"], "holds another run (metrics.json): --resume goes on"),
        (
            [*words(coco), "OUTPUT_DIR", "with model_0004999.pth"],
            "holds another run (model_0004999.pth): --resume goes",
        ),
        ([*words(coco), "OUTPUT_DIR", "output.pkl"], "output.pkl: cannot be written"),
        ([*words(coco), "WEIGHTS", "x"], "Non-existent config key: WEIGHTS"),
        (words("none"), "none.yaml"),
        ([], "the following arguments are required: --config-file"),
    ):
        status, out, err = tool(train_net, *given)
        assert (status, out, err.count("\n")) == (2, "", 1), given
        assert message in err
    assert sorted(tmp_path.rglob("*")) == before and stub.calls == []


@pytest.mark.parametrize(
    "config, place",
    [
        ("pascal_voc_R_50_C4_24k_synco", "VOC2007/ImageSets/Main/test.txt"),
        ("coco_R_50_C4_1x_synco", "coco/annotations/coco_2017_train.json"),
        ("coco_R_50_C4_1x_synco", "coco/val2017"),
    ],
)
def test_missing_parts_of_the_data(train_net, tool, stub, tmp_path, config, place):
    (tmp_path / "data" / place).rename(tmp_path / "away")
    status, out, err = tool(train_net, *words(config))
    assert (status, out, err.count("\n"), stub.calls) == (2, "", 1, [])
    assert f"data/{place}: not there, and " in err


# ----------------------------------------------------------------------------- with detectron2, where it is installed


@pytest.fixture(scope="module")
def tiny_voc(tmp_path_factory):
    """VOC's folders with a few drawn images, each of one dog."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    box = "".join(f"<{side}>{at}</{side}>" for side, at in zip(("xmin", "ymin", "xmax", "ymax"), (10, 8, 70, 50)))
    facts = "<name>dog</name><pose/><truncated>0</truncated><difficult>0</difficult>"
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / f"VOC{year}" / folder).mkdir(parents=True)
        for split in splits:
            names = [f"{split}{i}" for i in range(2)]
            (root / f"VOC{year}/ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"VOC{year}/JPEGImages/{name}.jpg")
                dog = f"<object>{facts}<bndbox>{box}</bndbox></object>"
                size = "<size><width>96</width><height>64</height><depth>3</depth></size>"
                text = f"<annotation><filename>{name}.jpg</filename>{size}{dog}</annotation>"
                (root / f"VOC{year}/Annotations/{name}.xml").write_text(text)
    return root


SMALL = (
    "MODEL.DEVICE cpu SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (64,) "
    "INPUT.MIN_SIZE_TEST 64 TEST.PRECISE_BN.NUM_ITER 1 DATALOADER.NUM_WORKERS 0 MODEL.RPN.POST_NMS_TOPK_TRAIN 32 "
    "MODEL.RPN.POST_NMS_TOPK_TEST 32 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16"
).split()


def test_detectron2_trains(pretrained_of, convert, tool, tiny_voc, tmp_path):
    """Two steps, the evaluation, and what summarize.py reads of it, with the program as it stands."""
    pytest.importorskip("detectron2")
    assert tool(convert, pretrained_of("resnet50")[0], tmp_path / "output.pkl")[0] == 0
    line = [
        sys.executable,
        "-W",
        "ignore",
        "train_net.py",
        "--config-file",
        "configs/pascal_voc_R_50_C4_24k_synco.yaml",
    ]
    line += ["--data-dir", tiny_voc, "MODEL.WEIGHTS", tmp_path / "output.pkl", "OUTPUT_DIR", tmp_path / "run", *SMALL]
    done = subprocess.run(list(map(str, line)), cwd=DETECTION, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model_final.pth").is_file()
    trained = (tmp_path / "run" / "config.yaml").read_text()
    words = [*map(str, line), "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    done = subprocess.run(words, cwd=DETECTION, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/eval/config.yaml").is_file() and (tmp_path / "run/config.yaml").read_text() == trained
    again = subprocess.run(list(map(str, line)), cwd=DETECTION, capture_output=True, text=True, timeout=600)
    assert (again.returncode, again.stdout) == (2, "") and "holds another run (model_final.pth)" in again.stderr
    resumed = subprocess.run([*map(str, line), "--resume"], cwd=DETECTION, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0 and "Starting training from iteration 2" in resumed.stdout + resumed.stderr
    line += ["--resume", "SOLVER.BASE_LR", "0.5"]
    resumed = subprocess.run(list(map(str, line)), cwd=DETECTION, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 2 and "SOLVER.BASE_LR 0.01 → 0.5" in resumed.stderr
    done = summarize(tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[0].split()[2:4] == ["box", "AP50"]


def test_detectron2_loads_the_pickle(pretrained_of, convert, tool, train_net, tmp_path):
    """The detector has every tensor of the pickle, and in backbone and res5 no tensor that the pickle has not."""
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    out = tmp_path / "output.pkl"
    assert tool(convert, pretrained_of("resnet50")[0], out)[0] == 0
    train_net.register_extra_norm()
    file = str(CONFIGS / "coco_R_50_C4_2x_synco.yaml")
    config = train_net.configuration(file, ["MODEL.DEVICE", "cpu"])
    model = build_model(config)
    DetectionCheckpointer(model).load(str(out))
    wanted = read(out)["model"]
    found = {
        name.removeprefix("backbone.").removeprefix("roi_heads."): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.res5.")) and not name.endswith("num_batches_tracked")
    }
    extra = {f"res5.norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")}
    assert found.keys() == wanted.keys() | extra
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_detectron2_does_not_get_other_weights(pretrained_of, convert, train_net, tool, tmp_path, monkeypatch):
    """The pretraining's own checkpoint, torchvision's names, another network, another configuration, no network."""
    pytest.importorskip("detectron2")

    def unreachable(*_, **__):
        raise socket.gaierror(-3, "no network")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(train_net, "check_data", lambda names: None)
    for arch in ("resnet18", "resnet50"):
        assert tool(convert, pretrained_of(arch)[0], tmp_path / f"{arch}.pkl")[0] == 0
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "names.pth")
    checkpoint_itself, supervised = pretrained_of("resnet50")[0], "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    for config, weights, message in (
        ("24k_synco", checkpoint_itself, "cannot be loaded (ValueError: Unsupported type found in checkpoint!"),
        ("24k_synco", tmp_path / "names.pth", "names.pth: lacks stem.conv1.weight in the shape"),
        ("24k_synco", tmp_path / "resnet18.pkl", "resnet18.pkl: lacks "),
        ("24k", tmp_path / "resnet50.pkl", "is a converted resnet50: take a _synco configuration"),
        ("24k", supervised, "cannot be loaded (URLError: <urlopen error [Errno -3] no network>)"),
    ):
        given = ["--config-file", CONFIGS / f"pascal_voc_R_50_C4_{config}.yaml", "OUTPUT_DIR", tmp_path / "run"]
        status, _, err = tool(train_net, *given, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights)
        assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arch", LISTS)
def test_detectron2s_backbones_compute_the_same(pretrained_of, convert, tool, tmp_path, arch):
    """detectron2's own network of that kind takes the pickle's names strictly, and gives torchvision's activations."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    path, encoder = pretrained_of(arch)
    assert tool(convert, path, tmp_path / "output.pkl")[0] == 0
    config = get_cfg()
    nets = config.MODEL.RESNETS
    nets.DEPTH, nets.NORM, nets.STRIDE_IN_1X1, nets.OUT_FEATURES = 50, "BN", False, ["res5"]
    if arch == "resnet18":
        nets.DEPTH, nets.RES2_OUT_CHANNELS = 18, 64
    nets.NUM_GROUPS, nets.WIDTH_PER_GROUP = {"resnext50_32x4d": (32, 4), "wide_resnet50_2": (1, 128)}.get(arch, (1, 64))
    config.MODEL.BACKBONE.FREEZE_AT = 0
    network = build_backbone(config).eval()
    weights = {name: torch.from_numpy(array) for name, array in read(tmp_path / "output.pkl")["model"].items()}
    loaded = network.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys and all(name.endswith("num_batches_tracked") for name in loaded.missing_keys)
    layers = torch.nn.Sequential(*list(encoder.children())[:-2])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(network(images)["res5"], layers(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_detectron2_scales_linearly(train_net, gpus):
    """What SOLVER.REFERENCE_WORLD_SIZE makes of the recipe is what the README's table says."""
    pytest.importorskip("detectron2")
    from detectron2.engine import DefaultTrainer

    file = str(CONFIGS / "pascal_voc_R_50_C4_24k_synco.yaml")
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", "8"]
    config = train_net.configuration(file, opts)
    solver = DefaultTrainer.auto_scale_workers(config, gpus).SOLVER
    found = (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS, *solver.STEPS, solver.MAX_ITER)
    assert found == scaled(gpus)


# --------------------------------------------------------------------------------------------------------- summarize


def summarize(*folders, cwd=None, **env):
    line = [sys.executable, DETECTION / "summarize.py", *folders]
    env = os.environ | env
    return subprocess.run(list(map(str, line)), cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def write_run(folder, *evaluations):
    """A metrics.json as detectron2 writes it: lines of losses, and among them evaluations (iteration, APs)."""
    folder.mkdir(parents=True)
    lines = [{"iteration": 19, "total_loss": 2.5, "lr": 0.01}]
    for iteration, values in evaluations:
        lines += [values | {"bbox/AP-dog": float("nan"), "iteration": iteration}, {"iteration": iteration, "lr": 0.0}]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def boxes(ap50, ap, ap75):
    return {"bbox/AP": ap, "bbox/AP50": ap50, "bbox/AP75": ap75}


def masks(ap50, ap, ap75):
    return {"segm/AP": ap, "segm/AP50": ap50, "segm/AP75": ap75}


def test_summary_of_trials(tmp_path):
    """Mean and sample deviation against NumPy's; the last evaluation counts; trials by folder or by name."""
    values = np.array([[82.31, 57.02, 63.5], [82.9, 57.44, 64.21], [82.44, 57.1, 63.77]])
    for i, row in enumerate(values, 9):  # trial9, trial10, trial11
        write_run(tmp_path / f"runs/voc/trial{i}", (12000, boxes(1.0, 2.0, 3.0)), (24000, boxes(*row)))
        write_run(tmp_path / f"runs/beside_trial{i}", (24000, boxes(*row)))
    write_run(tmp_path / "runs/other", (24000, boxes(81.34, 53.51, 58.8)))
    done = summarize("runs/voc", *(f"runs/beside_trial{i}/" for i in (9, 10, 11)), "runs/other", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in done.stdout.splitlines()]
    means = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(values.mean(0), values.std(0, ddof=1))]
    assert found == [
        ["run", "n", "box AP50", "box AP", "box AP75"],
        ["runs/voc", "3", *means],
        ["runs/beside", "3", *means],
        ["runs/other", "1", "81.3", "53.5", "58.8"],
    ]
    assert summarize("runs/voc/trial9", "runs/voc/trial10", cwd=tmp_path).stdout.splitlines()[1].split()[:2] == [
        "runs/voc",
        "2",
    ]


def test_summary_with_masks_and_unequal_trials(tmp_path):
    write_run(tmp_path / "coco/trial1", (90000, boxes(60.0, 40.0, 44.0) | masks(57.0, 35.0, 37.0)))
    write_run(tmp_path / "coco/trial2", (80000, boxes(61.0, 41.0, 45.0) | masks(58.0, 36.0, 38.0)))
    write_run(tmp_path / "voc", (24000, boxes(82.6, 57.2, 63.9)))
    done = summarize("coco", "voc", cwd=tmp_path)
    header, coco, voc, note = done.stdout.splitlines()
    assert header.split("  ")[-1].strip() == "mask AP75" and coco.count(" ± 0.7") == 6 and "35.5 ± 0.7" in coco
    assert voc.split() == ["voc", "1", "82.6", "57.2", "63.9", "-", "-", "-"]
    assert note == "note: coco: the trials were evaluated at different iterations: trial1 90000, trial2 80000"


def test_summary_of_what_there_is(tmp_path):
    """An unfinished trial, a line that a kill cut off and an AP that is no number take nothing from the others."""
    write_run(tmp_path / "voc/trial1", (24000, boxes(82.0, 57.0, 63.0)))
    write_run(tmp_path / "voc/trial2", (24000, boxes(83.0, float("nan"), 64.0)))
    write_run(tmp_path / "voc/trial3")
    whole = (tmp_path / "voc/trial1/metrics.json").read_text()
    (tmp_path / "voc/trial1/metrics.json").write_text('{"iteration": 5, "lo\n' + whole)
    done = summarize("voc", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    _, row, *notes = done.stdout.splitlines()
    assert row.replace(" ± ", "±").split() == ["voc", "2", "82.5±0.7", "nan", "63.5±0.7"]
    assert notes == [
        "note: voc/trial1: passed over what is not JSON in metrics.json, 1 of its lines",
        "note: voc/trial3: left out: no line of metrics.json has bbox/AP, so it was not evaluated yet",
    ]
    plain = summarize("voc", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "") and "82.5 ? 0.7" in plain.stdout


def test_what_summarize_refuses(tmp_path):
    write_run(tmp_path / "unfinished")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "half", (5, {"bbox/AP": 1.0}))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/metrics.json").write_text('{"iteration": 1}\n{"itera')
    for folder, message in (
        ("none", "none: no such folder"),
        ("empty", "empty: holds no metrics.json, nor does a folder in it"),
        ("unfinished", "unfinished: left out: no line of metrics.json has bbox/AP"),
        ("half", "half/metrics.json: its last evaluation has no bbox/AP50"),
        ("cut", "cut: left out: no line of metrics.json has bbox/AP"),
    ):
        done = summarize(folder, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
    assert summarize("--help").returncode == 0 and summarize(cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "left out: no line of metrics.json has bbox/AP"),
        ('["bbox/AP"]', "left out: no line of metrics.json has bbox/AP"),
        ('{"bbox/AP": 1.0, "bbox/AP50": [1], "bbox/AP75": 1.0, "iteration": 1}', "has no bbox/AP50"),
        ('{"bbox/AP": 1' + "0" * 400 + ', "bbox/AP50": 1, "bbox/AP75": 1, "iteration": 1}', "has no bbox/AP"),
        ('{"bbox/AP": Infinity, "bbox/AP50": 1, "bbox/AP75": 1, "iteration": 1}', "has no bbox/AP"),
        ('{"bbox/AP": 1, "bbox/AP50": 1, "bbox/AP75": 1, "iteration": {"a": 1}}', "has no iteration"),
        ('{"bbox/AP": 1, "bbox/AP50": 1, "bbox/AP75": 1, "segm/AP": "1", "iteration": 1}', "has no segm/AP"),
    ],
    ids=range(7),
)
def test_absurd_metrics_are_one_line(tmp_path, text, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(text)
    done = summarize("run", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-300:]
    assert message in done.stderr
