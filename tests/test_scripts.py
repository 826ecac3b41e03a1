"""The shell scripts: their style, the commands that they start, and what they do to files."""

import base64
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types

import pytest
from conftest import ROOT

SCRIPTS = sorted([*(ROOT / "scripts").glob("**/*.sh"), *(ROOT / "scripts").glob("**/*.sbatch")])
EXTRACT = ROOT / "scripts" / "extract_imagenet.sh"

# facts of the papers: method → the counts n_hard, n1 ... n6
COUNTS = {
    "synco": (1024, 256, 256, 256, 64, 64, 64),
    "mochi": (1024, 128, 0, 1024, 0, 0, 0),  # (N, s, s') = (1024, 1024, 128): s mixes of two rows, s' with the query
    "mocov2": (1024, 0, 0, 0, 0, 0, 0),
}
RUNS = [(method, epochs) for method in COUNTS for epochs in (200, 800)]


def bash(script, *words, cwd, first_on_path=None, **env):
    """Run a script → CompletedProcess; programs in the folder `first_on_path` go before all others."""
    path = os.pathsep.join([str(first_on_path)] * (first_on_path is not None) + [os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(script), *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder, name, text):
    """Write an executable shell program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


def tree(folder):
    """{path: bytes, or None for a folder} of everything in a folder."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_style(script):
    text = script.read_text()
    assert text.startswith(("#!/usr/bin/env bash\n", "#!/bin/bash\n"))
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if 'dirname "$' in script.read_text()], ids=lambda s: s.name
)
def test_called_through_a_link(script, tmp_path):
    """Whatever it starts is the repository's, wherever the link lies."""
    for name in ("python", "torchrun"):
        program(tmp_path / "bin", name, "pwd; printf '%s\\n' \"$@\"; exit 7")
    (tmp_path / "link.sh").symlink_to(script)
    words = ["1"] * (script.name == "semisup_r50.sh") + ["a", "b", "c", "d"]
    done = bash(tmp_path / "link.sh", *words, cwd=tmp_path, first_on_path=tmp_path / "bin")
    where, *words = done.stdout.splitlines()
    started = [os.path.join(where, word) for word in words if word.endswith(".py")]
    assert started and all(os.path.exists(path) for path in started), done.stdout
    assert all(os.path.realpath(path).startswith(f"{ROOT}/") for path in started)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_path_of_some_machine(script):
    """A path that starts at the root of the file system or at a home folder; "$folder"/data is none."""
    text = script.read_text()
    for allowed in ("/usr/bin/env bash", "/bin/bash", "/dev/null", "/dev/stderr"):
        text = text.replace(allowed, "")
    top = "home Users root data datasets mnt media scratch work workspace tmp opt srv usr var private gpfs nfs lustre"
    found = re.findall(rf'(?<![\w.}})])(?<!\w")(?:/(?:{"|".join(top.split())})\b|~\w*/)\S*', text)
    assert not found


def test_every_published_run_has_a_script():
    assert {f"pretrain_{method}_r50_{epochs}ep.sh" for method, epochs in RUNS} <= {path.name for path in SCRIPTS}


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.fixture
def started(tmp_path, monkeypatch):
    """started(method, epochs, words ...) runs a script whose torchrun is a stub, and parses the flags that it gets as
    main_synco does → (torchrun's own flags, args)."""
    import main_synco

    stub = program(tmp_path / "bin", "torchrun", "pwd; printf '%s\\n' \"$@\"")
    (tmp_path / "elsewhere").mkdir()

    def start(method, epochs, *words, **env):
        script = ROOT / "scripts" / f"pretrain_{method}_r50_{epochs}ep.sh"
        done = bash(script, *words, cwd=tmp_path / "elsewhere", first_on_path=stub, **env)
        assert (done.returncode, done.stderr) == (0, "")
        where, *got = done.stdout.splitlines()
        assert os.path.samefile(where, tmp_path / "elsewhere")  # so that relative paths keep their meaning
        program_at = next(i for i, word in enumerate(got) if word.endswith("main_synco.py"))
        assert os.path.samefile(tmp_path / "elsewhere" / got[program_at], ROOT / "main_synco.py")
        monkeypatch.setattr(sys, "argv", ["main_synco.py", *got[program_at + 1 :]])
        return got[:program_at], main_synco.parse()

    monkeypatch.delenv("NPROC", raising=False)
    return start


@pytest.mark.parametrize("method, epochs", RUNS)
def test_recipe(started, method, epochs):
    launcher, args = started(method, epochs, "my images/imagenet")
    assert launcher == ["--standalone", "--nproc-per-node", "8"]
    assert (args.arch, args.epochs, args.lr, args.batch_size) == ("resnet50", epochs, 0.03, 256)
    assert (args.momentum, args.weight_decay) == (0.9, 1e-4)
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 65536, 0.999, 0.2)
    assert args.mlp and args.aug_plus and args.cos
    assert (args.n_hard, *(getattr(args, f"n{i}") for i in range(1, 7))) == COUNTS[method]
    assert (args.warmup_epochs, args.cooldown_epochs) == (10, 0)
    assert (args.resume, args.data) == ("auto", "my images/imagenet")
    assert args.save_dir == f"runs/{method}_r50_{epochs}ep"


@pytest.mark.parametrize("method, epochs", RUNS)
def test_own_folder_and_flags(started, method, epochs):
    extra = ["--epochs", 3, "--n1", 7, "--resume", "", "--schedule", 1, 2]
    launcher, args = started(method, epochs, "imagenet", "../my run", *extra, NPROC="2")
    assert launcher == ["--standalone", "--nproc-per-node", "2"]
    assert (args.data, args.save_dir) == ("imagenet", "../my run")
    assert (args.epochs, args.n1, args.resume, args.schedule) == (3, 7, "", [1, 2])
    assert (args.n2, args.n3) == COUNTS[method][2:4]  # the others stay


def test_flags_without_a_save_folder(started):
    _, args = started("synco", 200, "imagenet", "--keep", 2)
    assert (args.data, args.save_dir, args.keep) == ("imagenet", "runs/synco_r50_200ep", 2)


@pytest.mark.parametrize("method, epochs", RUNS)
@pytest.mark.parametrize("words", [[], ["--keep", "2"]], ids=["nothing", "flags only"])
def test_no_data_folder(tmp_path, method, epochs, words):
    stub = program(tmp_path / "bin", "torchrun", "echo started")
    script = ROOT / "scripts" / f"pretrain_{method}_r50_{epochs}ep.sh"
    done = bash(script, *words, cwd=tmp_path, first_on_path=stub)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert script.name in done.stderr and "IMAGENET" in done.stderr


# ------------------------------------------------------------------------------------------------ recipes for one GPU

# facts of the published runs
CIFAR10 = {
    "mocov2": (0, 0, 0, 0, 0, 0),
    "mochi": (8, 0, 64, 0, 0, 0),  # a sixteenth of ImageNet's counts, as the queue of 4,096 is of its 65,536
    "synco": (16, 16, 16, 4, 4, 4),
}
ONE_GPU = [*(f"cifar10_{method}" for method in CIFAR10), "imagenette_resnext50", "mochi_caltech256"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(script, words ...) runs a recipe whose python is a stub that leaves checkpoints, and parses the flags of
    each program that it starts → [(program, args)]."""
    write = """printf '%s\\n' "$@" END
next=
for word; do
    [ "$next" ] && { mkdir -p "$word"; touch "$word/checkpoint_0001.pth.tar" "$word/checkpoint_0010.pth.tar"; }
    next=; [ "$word" = --save-dir ] && next=1
done; true"""
    stub = program(tmp_path / "bin", "python", write)
    timm = types.ModuleType("timm")  # the name of the network is checked
    timm.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    timm.list_models = lambda: ["efficientnet_b2"]
    timm.is_model = timm.list_models().__contains__
    monkeypatch.setitem(sys.modules, "timm", timm)

    def start(name, *words):
        done = bash(ROOT / "scripts" / f"{name}.sh", *words, cwd=tmp_path, first_on_path=stub)
        assert (done.returncode, done.stderr) == (0, "")
        found = []
        for command in done.stdout.split("END\n")[:-1]:
            path, *flags = command.splitlines()
            module = importlib.import_module(os.path.basename(path).removesuffix(".py"))
            assert os.path.samefile(tmp_path / path, module.__file__)
            monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
            found.append((module.__name__, module.parse()))
        return found

    return start


@pytest.mark.parametrize("method", CIFAR10)
def test_cifar10(commands, method):
    """The settings of MoCo's demo, whatever the method."""
    ((name, args),) = commands(f"cifar10_{method}", "my data")
    assert (name, args.data, args.dataset, args.download) == ("main_synco", "my data", "cifar10", True)
    assert (args.arch, args.stem, args.img_size, args.stats, args.mlp) == ("resnet18", "cifar", 32, "cifar10", False)
    assert (args.epochs, args.batch_size, args.bn_splits, args.cos) == (200, 512, 8, True)
    assert (args.optimizer, args.lr, args.momentum, args.weight_decay) == ("sgd", 0.06, 0.9, 5e-4)
    assert (args.lr_min, args.lr_warmup_epochs, args.clip_grad) == (0, 0, None)
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 4096, 0.99, 0.1)
    assert (args.aug_plus, args.aug_heavy, args.blur, args.crop_scale) == (True, False, False, [0.08, 1])
    assert (args.symmetric, args.mask_same_image) == (False, False)
    assert tuple(getattr(args, f"n{i}") for i in range(1, 7)) == CIFAR10[method]
    assert (args.warmup_epochs, args.cooldown_epochs) == (10, 0)
    if method != "mocov2":
        assert args.n_hard == 64
    assert (args.knn_freq, args.knn_k, args.resume, args.save_dir) == (10, 200, "auto", f"runs/cifar10_{method}")


@pytest.mark.parametrize("method", CIFAR10)
def test_cifar10_with_other_flags(commands, method):
    trial = ["--epochs", 2, "-a", "resnet18", "--limit-images", 2000]
    ((_, args),) = commands(f"cifar10_{method}", "data", "my run", *trial)
    assert (args.epochs, args.limit_images, args.save_dir, args.download) == (2, 2000, "my run", True)
    folder = ["--dataset", "imagefolder", "--img-size", 32, "--stats", "cifar10"]
    ((_, args),) = commands(f"cifar10_{method}", "data", *folder)
    assert (args.dataset, args.img_size, args.stats, args.download) == ("imagefolder", 32, "cifar10", False)
    ((_, args),) = commands(f"cifar10_{method}", "data", "--dataset=cifar100")
    assert (args.dataset, args.img_size, args.stats) == ("cifar100", 32, "cifar100")


def test_imagenette(commands):
    """The pretraining, and the probe on its last checkpoint."""
    (first, args), (second, probe) = commands("imagenette_resnext50", "my data")
    assert (first, args.data, args.dataset, args.download) == ("main_synco", "my data", "imagenette", True)
    assert (args.arch, args.stem, args.img_size, args.mlp) == ("resnext50_32x4d", "imagenet", 224, True)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.cos) == (600, 32, 0.03, 1e-4, True)
    assert (args.optimizer, args.momentum, args.bn_splits) == ("sgd", 0.9, 1)
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 16384, 0.999, 0.2)
    assert (args.aug_plus, args.crop_scale) == (True, None)
    assert not any((args.n1, args.n2, args.n3, args.n4, args.n5, args.n6))
    assert (args.knn_freq, args.knn_train, args.save_best) == (1, True, True)
    assert (args.resume, args.save_dir) == ("auto", "runs/imagenette_resnext50")

    assert (second, probe.data, probe.dataset, probe.arch) == ("main_lincls", "my data", "imagenette", args.arch)
    assert probe.pretrained == "runs/imagenette_resnext50/checkpoint_0010.pth.tar"
    assert (probe.epochs, probe.batch_size, probe.lr, probe.weight_decay, probe.momentum) == (200, 32, 0.03, 0, 0.9)
    assert (probe.cos, probe.lr_min) == (True, 5e-7)
    assert (probe.resume, probe.save_dir) == ("auto", "runs/imagenette_resnext50/lincls")


def test_imagenette_with_other_flags(commands):
    (_, args), (_, probe) = commands("imagenette_resnext50", "data", "my run", "--epochs", 2, "--", "--epochs", 3)
    assert (args.epochs, args.save_dir, args.data) == (2, "my run", "data")
    assert (probe.epochs, probe.save_dir, probe.data) == (3, "my run/lincls", "data")
    assert probe.pretrained == "my run/checkpoint_0010.pth.tar"
    folder = ["--dataset", "imagefolder"]
    (_, args), (_, probe) = commands("imagenette_resnext50", "data", *folder, "-a", "resnet18", "--limit-images=99")
    assert (args.dataset, args.download, args.arch, args.limit_images) == ("imagefolder", False, "resnet18", 99)
    assert (probe.dataset, probe.arch, probe.limit_images, probe.epochs) == ("imagefolder", "resnet18", 99, 200)
    _, (_, probe) = commands("imagenette_resnext50", "data", *folder, "--", "--dataset", "imagenette")
    assert probe.dataset == "imagenette"
    (_, args), (_, probe) = commands("imagenette_resnext50", "data", "--", "--epochs", 4)
    assert (args.epochs, args.save_dir, probe.epochs) == (600, "runs/imagenette_resnext50", 4)


def test_imagenettes_probe_waits_for_a_pretraining_that_ends(tmp_path):
    stub = program(tmp_path / "bin", "python", 'echo "$1"; exit 75')
    done = bash(ROOT / "scripts" / "imagenette_resnext50.sh", "data", cwd=tmp_path, first_on_path=stub)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (75, 1, "") and "main_synco" in done.stdout


def test_caltech256(commands):
    ((name, args),) = commands("mochi_caltech256", "my data")
    assert (name, args.data, args.dataset, args.download) == ("main_synco", "my data", "caltech256", True)
    assert (args.arch, args.mlp, args.img_size, args.batch_size) == ("timm:efficientnet_b2", True, 224, 64)
    assert (args.steps, args.optimizer, args.weight_decay, args.clip_grad) == (25000, "adamw", 0.01, 5)
    assert (args.cos, args.lr, args.lr_min) == (True, 2e-4, 2.5e-6)
    assert (args.lr_warmup, args.lr_warmup_epochs) == (2.5e-7, "2500s")
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 8192, 0.999, 0.07)
    assert args.n_hard == 32 and [getattr(args, f"n{i}") for i in range(1, 7)] == [16, 0, 16, 0, 0, 0]
    # of the types that have counts: 1, mixes with the query, from step 10,000 on; 3, mixes of two, from 5,000
    assert (args.warmup_epochs[0], args.warmup_epochs[2]) == ("10000s", "5000s")
    assert (args.mask_same_image, args.aug_heavy, args.aug_plus, args.crop_scale) == (True, True, False, None)
    assert (args.resume, args.save_dir) == ("auto", "runs/mochi_caltech256")
    ((_, args),) = commands("mochi_caltech256", "data", "my run", "--steps", 20, "--lr", 1e-3)
    assert (args.steps, args.lr, args.save_dir) == (20, 1e-3, "my run")
    ((_, args),) = commands("mochi_caltech256", "data", "--dataset", "imagefolder")
    assert (args.dataset, args.download, args.img_size) == ("imagefolder", False, 224)


@pytest.mark.parametrize("name", ONE_GPU)
@pytest.mark.parametrize("words", [[], ["--keep", "2"]], ids=["nothing", "flags only"])
def test_recipe_usage(tmp_path, name, words):
    stub = program(tmp_path / "bin", "python", "echo started")
    done = bash(ROOT / "scripts" / f"{name}.sh", *words, cwd=tmp_path, first_on_path=stub)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{name}.sh DATA [SAVE_DIR]" in done.stderr


# -------------------------------------------------------------------------------------------------------- evaluation

GRID = {"lincls_r50": ["30"], "semisup_r50": ["0.005", "0.01", "0.02", "0.05", "0.1"]}
WORDS_OF = {"lincls_r50": [], "semisup_r50": ["1"]}  # what comes before CHECKPOINT


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """trials(script, words ...) runs a grid whose torchrun writes a result.json in place of training, and parses the
    flags of each trial as the program does → (torchrun's own flags, [args], the output's last lines)."""
    write = """printf '%s\\n' "$@" END
next=
for word; do
    [ "$next" ] && { mkdir -p "$word"; echo '{"top1": '${word#*lr}', "top5": 80, "epoch": 7}' >"$word/result.json"; }
    next=; [ "$word" = --save-dir ] && next=1
done; true"""
    stub = program(tmp_path / "bin", "torchrun", write)
    (stub / "python").symlink_to(sys.executable)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.delenv("LRS", raising=False)

    def start(name, *words, **env):
        done = bash(ROOT / "scripts" / f"{name}.sh", *words, cwd=tmp_path, first_on_path=stub, **env)
        assert (done.returncode, done.stderr) == (0, "")
        *commands, table = done.stdout.split("END\n")
        module = importlib.import_module(f"main_{name.removesuffix('_r50')}")
        parsed = []
        for command in commands:
            got = command.splitlines()
            program_at = got.index(str(ROOT / "scripts" / ".." / f"{module.__name__}.py"))
            monkeypatch.setattr(sys, "argv", [module.__name__, *got[program_at + 1 :]])
            parsed.append(module.parse())
        return got[:program_at], parsed, table

    return start


@pytest.mark.parametrize("name", GRID)
def test_grid(trials, tmp_path, name):
    before = WORDS_OF[name]
    launcher, parsed, table = trials(name, *before, "my runs/checkpoint_0199.pth.tar", "imagenet")
    assert launcher == ["--standalone", "--nproc-per-node", "8"]
    assert len({args.save_dir for args in parsed}) == len(parsed) == len(GRID[name])
    folder = f"my runs/checkpoint_0199-{'lincls' if name == 'lincls_r50' else 'semisup-1percent'}"
    for args, lr in zip(parsed, GRID[name]):
        assert (args.arch, args.pretrained, args.data) == ("resnet50", "my runs/checkpoint_0199.pth.tar", "imagenet")
        assert (args.save_dir, args.resume) == (f"{folder}/lr{lr}", "auto")
        if name == "lincls_r50":
            assert (args.lr, args.epochs, args.schedule, args.batch_size) == (30, 100, [60, 80], 256)
            assert (args.weight_decay, args.momentum) == (0, 0.9)
        else:
            assert (args.lr_backbone, args.lr_classifier, args.batch_size) == (float(lr), 0.5, 1024)
            assert (args.train_percent, args.weights, args.epochs, args.weight_decay) == (1, "finetune", 60, 1e-6)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["trial", "top-1", "top-5", "epoch"] and len(rows) == 1 + len(parsed)
    best = max(GRID[name], key=float)
    assert rows[1] == [f"lr{best}", f"{float(best):.2f}", "80.00", "7", "best"]
    assert [row[0] for row in rows[1:]] == [f"lr{lr}" for lr in sorted(GRID[name], key=float, reverse=True)]


@pytest.mark.parametrize("percent, epochs", [(1, 60), (10, 30), (100, 90)])
def test_epochs_of_a_fine_tuning(trials, percent, epochs):
    words = [percent, "random", "imagenet", "mine", "--epochs", 3]
    launcher, (args, _), _ = trials("semisup_r50", *words[:-2], NPROC="2", LRS="0.1 0.2")
    assert (args.epochs, args.train_percent, args.save_dir) == (epochs, percent, "mine/lr0.1")
    assert launcher[-1] == "2"
    assert [args.epochs for args in trials("semisup_r50", *words)[1]] == [3] * 5


@pytest.mark.parametrize("status, runs", [(1, 5), (130, 1)])
def test_a_grid_goes_on_after_a_trial_that_fails_but_not_after_ctrl_c(tmp_path, status, runs):
    stub = program(tmp_path / "bin", "torchrun", f"echo started; exit {status}")
    (stub / "python").symlink_to(sys.executable)
    done = bash(ROOT / "scripts" / "semisup_r50.sh", "10", "random", "imagenet", cwd=tmp_path, first_on_path=stub)
    assert done.stdout.count("started") == runs and done.returncode != 0


@pytest.mark.parametrize("name", GRID)
def test_grid_usage(tmp_path, name):
    stub = program(tmp_path / "bin", "torchrun", "echo started")
    wrong = [[], ["x.pth.tar"], ["x.pth.tar", "--keep"]] + ([["5", "x", "y"]] if name == "semisup_r50" else [])
    for words in wrong:
        done = bash(ROOT / "scripts" / f"{name}.sh", *words, cwd=tmp_path, first_on_path=stub)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert f"{name}.sh" in done.stderr and "CHECKPOINT IMAGENET" in done.stderr


ABSURD = [
    "{}", "[1]", "7", "null", "[" * 100_000, "{", '{"top1": null, "top5": 1, "epoch": 1}',
    '{"top1": NaN, "top5": 1, "epoch": 1}', '{"top1": 1e999, "top5": 1, "epoch": 1}',
    '{"top1": 1' + "0" * 400 + ', "top5": 1, "epoch": 1}', '{"top1": "60", "top5": 1, "epoch": 1}',
    '{"top1": 60, "top5": [1], "epoch": 1}', '{"top1": 60, "top5": null, "epoch": {"a": 1}}', '{"top1": 60}',
]  # fmt: skip


@pytest.mark.parametrize(
    "content, message",
    [(None, "holds no trial's result.json"), *((content, "not a result of main_") for content in ABSURD)],
    ids=range(1 + len(ABSURD)),
)
def test_no_results(tmp_path, content, message):
    (tmp_path / "a").mkdir()
    if content:
        (tmp_path / "a" / "result.json").write_text(content)
    words = [sys.executable, str(ROOT / "scripts" / "best_of_grid.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


# --------------------------------------------------------------------------------------------------- extract_imagenet

CLASSES = {name: [f"{name}_{i}.JPEG" for i in (7, 12, 301)] for name in ("n01440764", "n01751748")}
LABELS = {
    "ILSVRC2012_val_00000001.JPEG": "n01751748",
    "ILSVRC2012_val_00000002.JPEG": "n01440764",
    "ILSVRC2012_val_00000003.JPEG": "n01751748",
}


def content(name):
    """Bytes that no other image has, across several tar blocks."""
    return name.encode() * 100


def tar(files, mode="w"):
    """{name: bytes} → an archive's bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.uid, entry.uname = len(data), 54321, "someone"
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def label_lines(labels):
    return "".join(f"{image} {wnid}\n" for image, wnid in labels.items())


@pytest.fixture
def given(tmp_path):
    """A folder with the two archives and the labels, small."""
    folder = tmp_path / "given"
    folder.mkdir()
    inner = {f"{wnid}.tar": tar({name: content(name) for name in names}) for wnid, names in CLASSES.items()}
    (folder / "train.tar").write_bytes(tar(inner))
    (folder / "val.tar").write_bytes(tar({name: content(name) for name in LABELS}))
    (folder / "labels.txt").write_text(label_lines(LABELS))
    return folder


EXPECTED = {f"train/{wnid}/{name}": content(name) for wnid, names in CLASSES.items() for name in names} | {
    f"val/{wnid}/{name}": content(name) for name, wnid in LABELS.items()
}
WORDS = ("train.tar", "val.tar", "out", "labels.txt")


def files(folder):
    return {path: data for path, data in tree(folder).items() if data is not None}


@pytest.mark.parametrize("kind", ["tar", "gtar", "bsdtar"])
def test_extract(given, tmp_path, kind):
    found = shutil.which(kind)
    if not found:
        pytest.skip(f"no {kind} here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tar").symlink_to(found)
    before = tree(given)
    done = bash(EXTRACT, *WORDS, cwd=given, first_on_path=tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["out/train: 6 images", "out/val: 3 images"]
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2 and "1281167" in warnings[0] and "50000" in warnings[1]
    assert files(given / "out") == EXPECTED
    assert sorted(os.listdir(given / "out")) == ["train", "val"]  # the temporary folder is gone
    assert {path: data for path, data in tree(given).items() if not path.startswith("out")} == before
    assert all(path.stat().st_uid == os.getuid() for path in (given / "out").rglob("*"))

    before = tree(given)
    again = bash(EXTRACT, *WORDS, cwd=given, first_on_path=tmp_path / "bin")
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "out/train" in again.stderr
    assert tree(given) == before


def test_extract_beside_other_files(given, tmp_path):
    """Spaces in the paths; empty target folders, one of them a link; and a file that was there before."""
    out = tmp_path / "my images"
    (out / "val").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (out / "train").symlink_to(tmp_path / "disk")
    (out / "notes.txt").write_text("mine")
    (given / "labels.txt").write_text(label_lines(LABELS).replace("\n", "\r\n"))
    done = bash(EXTRACT, *(given / name for name in WORDS[:2]), out, given / "labels.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {f"train/{path}": data for path, data in files(tmp_path / "disk").items()} | {
        path: data for path, data in files(out).items() if path.startswith("val")
    } == EXPECTED
    assert (out / "notes.txt").read_text() == "mine" and (out / "train").is_symlink()
    assert sorted(os.listdir(out)) == ["notes.txt", "train", "val"]


def _swap(given):
    (given / "train.tar").rename(given / "x.tar")
    (given / "val.tar").rename(given / "train.tar")
    (given / "x.tar").rename(given / "val.tar")


def _occupy(path):
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("mine")


WRONG = {
    "no train archive": (lambda given: (given / "train.tar").unlink(), "train.tar"),
    "no val archive": (lambda given: (given / "val.tar").unlink(), "val.tar"),
    "no labels": (lambda given: (given / "labels.txt").unlink(), "labels.txt"),
    "train is no tar": (lambda given: (given / "train.tar").write_bytes(b"GIF89a" * 500), "train.tar"),
    "val is no tar": (lambda given: (given / "val.tar").write_text("<html>not found</html>"), "val.tar"),
    "val is empty": (lambda given: (given / "val.tar").write_bytes(b""), "val.tar"),
    "val is cut": (lambda given: (given / "val.tar").write_bytes((given / "val.tar").read_bytes()[:5000]), "val.tar"),
    "train given twice": (
        lambda given: (given / "val.tar").write_bytes((given / "train.tar").read_bytes()),
        "'n01440764.tar', not images",
    ),
    "swapped": (_swap, "'ILSVRC2012_val_00000001.JPEG', not class archives"),
    "an image without label": (
        lambda given: (given / "labels.txt").write_text(label_lines(dict(list(LABELS.items())[:2]))),
        "ILSVRC2012_val_00000003.JPEG",
    ),
    "a label without class": (
        lambda given: (given / "labels.txt").write_text("\n".join(LABELS)),
        "ILSVRC2012_val_00000001.JPEG",
    ),
    "an unknown class": (
        lambda given: (given / "labels.txt").write_text(label_lines(LABELS).replace("n01440764", "../../away")),
        "../../away",
    ),
    "train is there": (lambda given: _occupy(given / "out" / "train"), "out/train"),
    "val is there": (lambda given: _occupy(given / "out" / "val"), "out/val"),
    "a file in the way": (lambda given: (given / "out").write_text("mine"), "out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_extract_refuses(given, case):
    spoil, named = WRONG[case]
    spoil(given)
    before = tree(given)
    done = bash(EXTRACT, *WORDS, cwd=given)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert named in done.stderr
    assert tree(given) == before


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_extract_usage(given, count):
    before = tree(given)
    done = bash(EXTRACT, *(WORDS + ("more",))[:count], cwd=given)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "VAL_LABELS" in done.stderr and "ILSVRC2012_devkit_t12.tar.gz" in done.stderr
    assert tree(given) == before


def test_extract_damaged_class(given):
    """What only the unpacking shows leaves neither half a data set nor the temporary folder."""
    inner = {"n01440764.tar": tar({"n01440764_7.JPEG": b"x"}), "n01751748.tar": b"GIF89a" * 500}
    (given / "train.tar").write_bytes(tar(inner))
    done = bash(EXTRACT, *WORDS, cwd=given)
    assert done.returncode == 2
    assert "n01751748.tar cannot be unpacked" in done.stderr.splitlines()[-1]
    assert os.listdir(given / "out") == []


def test_extract_interrupted(given, tmp_path):
    """A signal in the midst of the work: the temporary folder goes, and the same command works afterwards."""
    stub = program(
        tmp_path / "bin", "tar", f'case $1 in -xOf) kill -TERM $PPID;; esac\nexec {shutil.which("tar")} "$@"'
    )
    done = bash(EXTRACT, *WORDS, cwd=given, first_on_path=stub)
    assert done.returncode != 0
    assert os.listdir(given / "out") == []
    assert bash(EXTRACT, *WORDS, cwd=given).returncode == 0
    assert files(given / "out") == EXPECTED


HOSTILE = {
    "a device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "a pipe": {"type": tarfile.FIFOTYPE},
    "a folder": {"type": tarfile.DIRTYPE},
    "a link": {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"},
    "a hard link": {"type": tarfile.LNKTYPE, "linkname": "n01440764_7.JPEG"},
    "a way out": {"name": "../../n01440764_8.JPEG"},
    "a root": {"name": "/n01440764_8.JPEG"},
    "another kind": {"name": "n01440764_8.sh"},
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", [*HOSTILE, "no image"])
def test_extract_writes_plain_files_alone(given, case, split):
    """Whatever else an archive holds, nothing of it is made, the data set least of all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if case != "no image":
            for name in ("n01440764_7.JPEG", "n01440764_12.JPEG"):
                entry = tarfile.TarInfo(name)
                archive.addfile(entry)
            for attribute, value in HOSTILE[case].items():
                setattr(entry, attribute, value)
            archive.addfile(entry)
    if split == "train":
        others = {"n01751748.tar": tar({"n01751748_7.JPEG": b"x"})}
        (given / "train.tar").write_bytes(tar({"n01440764.tar": buffer.getvalue(), **others}))
    else:
        (given / "val.tar").write_bytes(buffer.getvalue())
        (given / "labels.txt").write_text("".join(f"n01440764_{i}.JPEG n01440764\n" for i in (7, 8, 12)))
    before = tree(given)
    done = bash(EXTRACT, *WORDS, cwd=given)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    left = tree(given)
    assert left.pop("out", None) is None and left == before


def test_extract_keeps_no_owner_and_no_mode(given):
    """A file is the user's own whatever the archive says, also for root: no setuid, no owner, no permissions of it."""
    entry = tarfile.TarInfo("n01440764_7.JPEG")
    entry.mode, entry.uid, entry.gid, entry.size = 0o6777, 54321, 54321, 1
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(b"x"))
    (given / "train.tar").write_bytes(tar({f"{wnid}.tar": buffer.getvalue() for wnid in CLASSES}))
    assert bash(EXTRACT, *WORDS, cwd=given).returncode == 0
    (given / "plain").touch()
    found, plain = (given / "out/train/n01440764/n01440764_7.JPEG").stat(), (given / "plain").stat()
    assert (found.st_mode, found.st_uid, found.st_gid) == (plain.st_mode, plain.st_uid, plain.st_gid)


def test_extract_after_a_kill(given):
    """What SIGKILL left in the way goes when the script is called again."""
    (given / "out/.extract.Ab12Cd/train/n01440764").mkdir(parents=True)
    (given / "out/.extract.Ab12Cd/train/n01440764/n01440764_7.JPEG").touch()
    assert bash(EXTRACT, *WORDS, cwd=given).returncode == 0
    assert sorted(os.listdir(given / "out")) == ["train", "val"]


def make_devkit(path, scipy_io):
    """The parts of ILSVRC2012's devkit that matter: class numbers in order, and in a .mat their WordNet ids."""
    import numpy as np

    # numbers in no order, and as in the real file an inner node of the tree after the leaves
    rows = [(2, "n01751748", "sea snake", 0), (1, "n01440764", "tench", 0), (1001, "n00001740", "entity", 2)]
    synsets = np.empty((3, 1), dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12"
    entries = {
        f"{root}/readme.txt": b"read me",
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n",
        f"{root}/data/meta.mat": meta.getvalue(),
    }
    path.write_bytes(tar(entries, "w:gz"))


def test_extract_with_the_devkit(given):
    make_devkit(given / "devkit.tar.gz", pytest.importorskip("scipy.io"))
    done = bash(EXTRACT, *WORDS[:3], "devkit.tar.gz", cwd=given)
    assert done.returncode == 0, done.stderr
    assert files(given / "out") == EXPECTED


def test_extract_with_something_else_as_devkit(given):
    pytest.importorskip("scipy.io")
    (given / "devkit.tar.gz").write_bytes((given / "val.tar").read_bytes())
    done = bash(EXTRACT, *WORDS[:3], "devkit.tar.gz", cwd=given)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "devkit.tar.gz" in done.stderr
    assert not (given / "out").exists()


def test_extract_with_the_devkit_without_scipy(given, tmp_path):
    (given / "devkit.tar.gz").write_bytes(tar({}, "w:gz"))
    stub = program(tmp_path / "bin", "python3", "exit 1")
    done = bash(EXTRACT, *WORDS[:3], "devkit.tar.gz", cwd=given, first_on_path=stub)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "scipy" in done.stderr
    assert not (given / "out").exists()


# --------------------------------------------------------------------------------------------------------- detection

DETECTION = {
    "voc": ("pascal_voc_R_50_C4_24k_synco", [1, 2, 3, 4, 5]),
    "coco_1x": ("coco_R_50_C4_1x_synco", [1]),
    "coco_2x": ("coco_R_50_C4_2x_synco", [1]),
}


@pytest.fixture
def detected(tmp_path, monkeypatch):
    """detected(name, words ...) runs a script whose python is a stub → ([train_net's args, as it parses them], the
    words of the last call)."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "detection" / "train_net.py")
    train_net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)
    stub = program(tmp_path / "bin", "python", "printf '%s\\n' \"$@\" END")

    def start(name, *words, **env):
        script = ROOT / "scripts" / f"detection_{name}.sh"
        done = bash(script, *words, cwd=tmp_path, first_on_path=stub, **env)
        assert (done.returncode, done.stderr) == (0, "")
        calls = [text.splitlines() for text in done.stdout.split("END\n")[:-1]]
        parsed = []
        for path, *given in calls[:-1]:
            assert os.path.samefile(tmp_path / path, ROOT / "detection" / "train_net.py")
            monkeypatch.setattr(sys, "argv", ["train_net.py", *given])
            parsed.append(train_net.parse())
        return parsed, calls[-1]

    monkeypatch.delenv("NPROC", raising=False)
    return start


@pytest.mark.parametrize("name", DETECTION)
def test_detection(detected, name):
    config, trials = DETECTION[name]
    runs, last = detected(name, "my weights.pkl", "my data", "runs/my run")
    for args, trial in zip(runs, trials, strict=True):
        assert os.path.samefile(args.config_file, ROOT / "detection" / "configs" / f"{config}.yaml")
        assert (args.data_dir, args.num_gpus, args.resume, args.eval_only) == ("my data", 8, True, False)
        changes = dict(zip(args.opts[::2], args.opts[1::2]))
        assert changes == {
            "MODEL.WEIGHTS": "my weights.pkl",
            "OUTPUT_DIR": f"runs/my run/trial{trial}",
            "SOLVER.REFERENCE_WORLD_SIZE": "8",
        }
    assert last[0].endswith("summarize.py") and last[1:] == ["runs/my run"]


@pytest.mark.parametrize("name", DETECTION)
def test_detection_of_one_trial_with_more_words(detected, name):
    """Flags and KEY VALUE pairs in any order, after those of the script and so stronger."""
    more = ["7", "--eval-only", "SOLVER.BASE_LR", "0.02", "SEED", "3"]
    (args,), last = detected(name, "w.pkl", "data", "out", *more, NPROC="2")
    assert (args.num_gpus, args.eval_only) == (2, True) and last[1:] == ["out"]
    assert args.opts[2:4] == ["OUTPUT_DIR", "out/trial7"] and args.opts[-4:] == more[2:]


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize("words", [[], ["w.pkl", "data"], ["w.pkl", "data", "--resume"]])
def test_detection_usage(tmp_path, name, words):
    stub = program(tmp_path / "bin", "python", "echo started")
    done = bash(ROOT / "scripts" / f"detection_{name}.sh", *words, cwd=tmp_path, first_on_path=stub)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "WEIGHTS DATA OUTPUT" in done.stderr


def test_detection_stops_at_a_failure(tmp_path):
    stub = program(tmp_path / "bin", "python", "echo started; exit 2")
    done = bash(ROOT / "scripts" / "detection_voc.sh", "w", "d", "o", cwd=tmp_path, first_on_path=stub)
    assert (done.returncode, done.stdout) == (2, "started\n")


# -------------------------------------------------------------------------------------------------------------- demo


def demo(tmp_path, fails="nothing"):
    """Run the demo in a folder with a space, with stubs of which those with the word `fails` fail; best_of_grid.py's
    finds lr0.01 best → (CompletedProcess, [the words of each command])."""
    text = f"""printf '%s\\n' "${{0##*/}}" "$@" END >> {tmp_path}/commands
case "$*" in
    *{fails}*) exit 3 ;;
    *main_synco.py*) printf '%s\\n' 'device cpu' 'kNN after 0 epochs: 50.00 %' ;;
    scripts/best_of_grid.py*) printf '%s\\n' 'trial top-1' 'lr0.01 70 best' 'lr1 9' ;;
esac"""
    for name in ("python", "torchrun"):
        program(tmp_path / "bin", name, text)
    folder = tmp_path / "my demo"
    (folder / "trials" / "random" / "semisup" / "lr9").mkdir(parents=True)  # of an earlier call
    done = bash(ROOT / "scripts" / "demo.sh", folder, cwd=tmp_path, first_on_path=tmp_path / "bin")
    commands = (tmp_path / "commands").read_text().split("END\n")[:-1]
    return done, [command.splitlines() for command in commands]


def test_demo(tmp_path, monkeypatch):
    """A pretraining, the same probe and fine-tunings from it and from random weights, and a page; flags go together."""
    pytest.importorskip("matplotlib")  # the parser of synco.plot asks for it
    done, (patches, pretraining, *trials, curves, look, page) = demo(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kNN after" in done.stdout and "device" not in done.stdout
    folder = f"{tmp_path}/my demo"
    assert not os.path.exists(f"{folder}/trials/random/semisup/lr9")
    assert patches == ["python", "scripts/make_demo_patches.py", f"{folder}/patches"]
    assert pretraining[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]

    def parse(words):
        at = next(i for i, word in enumerate(words) if word.startswith(("main_", "synco.", "scripts.")))
        monkeypatch.setattr(sys, "argv", words[at:])
        return importlib.import_module(words[at].removesuffix(".py")).parse()

    pretraining = parse(pretraining)
    last = f"{pretraining.save_dir}/checkpoint_{pretraining.epochs - 1:04}.pth.tar"
    own = {}
    for name, weights in (("random", "random"), ("pretrained", last)):
        found = [words for words in trials if any(f"{folder}/trials/{name}/" in word for word in words)]
        [drawn] = [words for words in trials if f"{folder}/map-{name}.png" in words]
        assert parse(drawn).checkpoint == weights
        probe, *tuned, best, evaluation = found
        assert best == ["python", "scripts/best_of_grid.py", f"{folder}/trials/{name}/semisup"]
        probe, *tuned, evaluation = map(parse, (probe, *tuned, evaluation))
        assert len(probe.lr) > 2 and len({one.lr_backbone for one in tuned}) == len(tuned) > 2
        assert {(one.pretrained, one.hold_out) for one in (probe, *tuned)} == {(weights, probe.hold_out)}
        assert (
            probe.hold_out and not evaluation.hold_out
        )  # what is best is chosen on training images, val for that alone
        chosen = f"{folder}/trials/{name}/semisup/lr0.01"
        assert evaluation.evaluate and evaluation.resume == f"{chosen}/checkpoint_semisup.pth.tar"
        assert chosen in [one.save_dir for one in tuned]
        own[name] = [vars(one) for one in (probe, *tuned, evaluation)]
        assert {(one["arch"], one["img_size"], one["data"]) for one in own[name]} == {
            (pretraining.arch, pretraining.img_size, pretraining.data)
        }
    for one, other in zip(*own.values()):  # both weights get the same
        assert {key for key in one if one[key] != other[key]} <= {"pretrained", "save_dir", "resume"}
    assert parse(curves).runs == [pretraining.save_dir]
    assert (parse(look).checkpoint, parse(look).data) == (last, pretraining.data)
    assert str(parse(page).folder) == folder


@pytest.mark.parametrize("fails", ["main_synco.py", "random", "lr0.05", "best_of_grid"])
def test_demo_that_fails_makes_no_page(tmp_path, fails):
    done, commands = demo(tmp_path, fails)
    assert done.returncode and not any("scripts.demo_page" in words for words in commands)


@pytest.fixture
def demo_found(tmp_path):
    """What a demo leaves for its page, made up: two measures of each weights, three pictures, a page of neighbours."""
    from synco.look import section

    def write(name, content):
        path = tmp_path / "a & b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    lines = [{"kind": "knn", "step": i, "top1": top1} for i, top1 in enumerate((50.04, 60, 70.06))]
    write("pretrain/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for name, top1 in (("random", 51.26), ("pretrained", 71.26)):
        heads = [{"name": "lr0.1"}, {"name": "lr3"}]
        write(f"trials/{name}/lincls/result.json", json.dumps({"heads": heads, "head": "lr3", "val": {"top1": top1}}))
        for lr in ("0.5", "2"):
            write(f"trials/{name}/semisup/lr{lr}/result.json", "{}")
        tuned = {"top1": top1 + 1, "checkpoint": "x/lr0.5/c.pth.tar", "val_images": 1234}
        write(f"trials/{name}/semisup/result.json", json.dumps(tuned))
    for name in ("curves", "map-random", "map-pretrained"):
        write(f"{name}.png", name.encode())
    write(
        "features.html", f"<html>{section('Nearest', 'near', '<i>1</i>')}{section('Other', 'far', '<i>2</i>')}</html>"
    )
    return tmp_path / "a & b"


ROWS = [
    ["top-1 on 1,234 val patches", "untrained", "SynCo"],
    ["kNN", "50.0 %", "70.1 %"],
    ["linear probe, rates 0.1 3", "51.3 % at 3", "71.3 % at 3"],
    ["fine-tuned on 10 %, rates 0.5 2", "52.3 % at 0.5", "72.3 % at 0.5"],
]


def test_demo_page(demo_found, tool):
    status, out, err = tool(importlib.import_module("scripts.demo_page"), demo_found)
    assert (status, err) == (0, "")
    assert [re.split("  +", line.strip()) for line in out.splitlines()[1:5]] == ROWS
    assert out.endswith(f"{demo_found}/index.html\n") and f'"{demo_found}/patches"' in out
    page = (demo_found / "index.html").read_text()
    table = page[page.index("<table>") : page.index("</table>")]
    assert [re.findall(r"<t[dh]>([^<]*)", row) for row in table.split("<tr>")[1:]] == ROWS
    sources = re.findall("src='data:image/png;base64,([^']*)'", page)
    assert [base64.b64decode(source) for source in sources] == [b"curves", b"map-random", b"map-pretrained"]
    assert page.count("src=") == 3 and re.findall("href=([^>]*)", page) == ["features.html"]
    assert "<i>1</i>" in page and "<i>2</i>" not in page  # the nearest neighbours alone
    assert "a &amp; b/patches" in page and "a & b" not in page


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["pretrain/log.jsonl", "trials/random/semisup/result.json", "map-random.png"])
def test_demo_page_of_half_a_demo(demo_found, tool, name, cut):
    if cut and name.endswith(".png"):
        pytest.skip("a picture is not looked into")
    (demo_found / name).unlink()
    if cut:
        (demo_found / name).write_text("{")
    status, out, err = tool(importlib.import_module("scripts.demo_page"), demo_found)
    assert (status, out, err.count("\n")) == (2, "", 1) and str(demo_found / name) in err
    assert not (demo_found / "index.html").exists()


# ------------------------------------------------------------------------------------------------- make_demo_patches


def test_demo_patches(tmp_path, monkeypatch, capsys):
    """Training patches hold no pixel of a photograph's right quarter, held-out patches nothing else."""
    pytest.importorskip("skimage")
    import numpy as np
    from PIL import Image

    spec = importlib.util.spec_from_file_location("make_demo_patches", ROOT / "scripts" / "make_demo_patches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = Image.open

    class Extremes:
        """Draws the smallest pair of numbers, then the largest, and so on: the corners of what is allowed."""

        def __init__(self, seed):
            self.drawn = 0

        def integers(self, low, high):
            self.drawn += 1
            return high - 1 if (self.drawn - 1) // 2 % 2 else low

    def marked(path):
        """In place of a photograph: black, and its right quarter white."""
        width, height = read(path).size
        right = np.arange(width) >= 3 * width // 4
        return Image.fromarray(np.tile(np.uint8(255) * right, (height, 1)))

    monkeypatch.setattr(sys, "argv", ["make_demo_patches.py", str(tmp_path), "--train", "3", "--val", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(module.Image, "open", marked)
        patch.setattr(module.np.random, "default_rng", Extremes)
        module.main()
    capsys.readouterr()
    assert sorted(os.listdir(tmp_path)) == ["train", "val"]
    for split, count, colour in (("train", 3, 0), ("val", 2, 255)):
        classes = sorted(os.listdir(tmp_path / split))
        assert len(classes) == 16
        assert all(len(os.listdir(tmp_path / split / name)) == count for name in classes)
        for path in (tmp_path / split).rglob("*.jpg"):
            patch = np.asarray(read(path))
            assert patch.shape == (48, 48, 3)
            assert np.all(patch == colour), path
