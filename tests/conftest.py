"""What the tests share: small data sets, the program run in this process, and real gloo processes."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same with and without GPUs; before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run side by side, and each of them is small

import contextlib
import functools
import importlib
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from PIL import Image

# who runs the tests in the background, or under nohup, has these ignored, and so would every program started here
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets

ARCH = "shufflenet_v2_x0_5"
WORKERS = {"main_synco": "pretrain", "main_lincls": "probe", "main_semisup": "train"}  # what a script runs in a process

# main_synco on a network, queue and images small enough for many runs
SMALL = (
    f"-a {ARCH} --img-size 32 -j 0 -b 8 --epochs 2 --warmup-epochs 1 --moco-k 64 --moco-dim 16 --mlp "
    "--n-hard 16 --n1 4 --n2 3 --n3 2 --n4 2 --n5 2 --n6 1 --aug-plus --cos --seed 3 -p 2"
).split()


def make_images(folder, *, classes=3, images=8, size=40, seed=0):
    """An ImageFolder of smooth colour noise: folder/cN/M.jpg."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        os.makedirs(folder / f"c{c}", exist_ok=True)
        for i in range(images):
            coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size), Image.BICUBIC).save(folder / f"c{c}" / f"{i}.jpg")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with train (24 images) and val (7 images)."""
    folder = tmp_path_factory.mktemp("data")
    make_images(folder / "train", classes=3, images=8)
    make_images(folder / "val", classes=3, images=2, seed=1)
    make_images(folder / "val", classes=1, images=3, seed=2)
    return str(folder)


def as_the_programs_own():
    """Have pytest's stdout and stderr replace what they have no character for, as the programs' own do."""
    sys.stdout.reconfigure(errors="replace")
    sys.stderr.reconfigure(errors="backslashreplace")


@pytest.fixture
def programs(monkeypatch, capsys):
    """programs("main_lincls", "flags ...") runs a script in this process → (exit status, stdout, stderr)."""
    from synco.launch import launch_status

    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()

    def run(name, *flags):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name.rpartition(".")[2] + ".py", *map(str, flags)])
        capsys.readouterr()
        as_the_programs_own()
        status = launch_status(getattr(module, WORKERS.get(name, "run")), module.parse)
        out, err = capsys.readouterr()
        return status, out, err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def program(programs):
    """program("flags ...") runs main_synco in this process → (exit status, stdout, stderr)."""
    return functools.partial(programs, "main_synco")


@pytest.fixture
def signal_after(monkeypatch):
    """signal_after(n): this process gets SIGTERM in its n-th gradient step from now, once."""
    step = torch.optim.SGD.step

    def arm(count, number=signal.SIGTERM):
        left = [count]

        def counting(self, *args):
            found = step(self, *args)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return found

        monkeypatch.setattr(torch.optim.SGD, "step", counting)

    return arm


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(module, "flags ...") runs a tool of one process in this process → (exit status, stdout, stderr)."""
    from synco.launch import command_status

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        capsys.readouterr()
        as_the_programs_own()
        status = command_status(module.run, module.parse)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def make_pretrained(arch, path):
    """A pretraining's checkpoint of 200 epochs in the published format, all its numbers distinct → its query encoder.

    The key encoder and the queue are cut down to a few tensors: readers of the backbone pass over them.
    """
    torch.manual_seed(len(arch))
    encoder = torchvision.models.get_model(arch, num_classes=16)
    width = encoder.fc.in_features
    encoder.fc = torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    for norm in encoder.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.1)
            norm.num_batches_tracked.fill_(7)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["module.encoder_k.conv1.weight"] = torch.ones(4)
    state["module.queue"], state["module.queue_ptr"] = torch.ones(4, 16), torch.zeros(1, dtype=torch.long)
    torch.save({"epoch": 200, "arch": arch, "state_dict": state, "optimizer": {}}, path)
    return encoder.eval()


@pytest.fixture(scope="session")
def pretrained_of(tmp_path_factory):
    """pretrained_of(arch) → (a checkpoint's path, its query encoder), from `make_pretrained`, once per session."""
    folder, made = tmp_path_factory.mktemp("pretrained"), {}

    def get(arch):
        if arch not in made:
            path = folder / f"{arch}.pth.tar"
            made[arch] = path, make_pretrained(arch, path)
        return made[arch]

    return get


@pytest.fixture(scope="session")
def pretrained(pretrained_of):
    """A `pretrained_of` a small network → path."""
    return str(pretrained_of(ARCH)[0])


def cut_at(monkeypatch, name, nth=1):
    """Have Ctrl-C come when the n-th file of that name is about to be there, whole and under its name."""
    replace, left = os.replace, [nth]

    def cutting(source, target):
        left[0] -= os.path.basename(target) == name
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cutting)


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def command(*words, env=None, timeout=300):
    """Run a command from the repository's root → CompletedProcess with its texts."""
    cleaned = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    words = [str(word) for word in words]
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    elif words[0].endswith(".py"):
        words[:0] = [sys.executable]
    return subprocess.run(
        words, cwd=ROOT, env={**cleaned, **(env or {})}, capture_output=True, text=True, timeout=timeout
    )


def forkserver():
    """The context of processes that are forks of one helper, which has imported, once, what takes seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "pytest"])
    return context


def forks(count, function, *args):
    """[function(rank, *args) in each of `count` fresh processes, side by side]; function: of a module's top level.

    Raises the first error with its traceback, and ends the others.
    """
    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_fork, (function, args, folder), nprocs=count, start_method="forkserver")
        return [pickle.loads(pathlib.Path(folder, str(rank)).read_bytes()) for rank in range(count)]


def _fork(rank, function, args, folder):
    torch.set_num_threads(1)
    pathlib.Path(folder, str(rank)).write_bytes(pickle.dumps(function(rank, *args)))


def processes(world_size, function, *args):
    """[function(rank, *args) of each of `world_size` real gloo processes]; function: of a test module's top level."""
    store = dist.TCPStore("localhost", 0, world_size, is_master=True, wait_for_workers=False)
    return forks(world_size, _process, world_size, store.port, function, args)


def _process(rank, world_size, port, function, args):
    store = dist.TCPStore("localhost", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result = function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result


def program_of(world_size, name, *flags):
    """A script in as many processes, as torchrun starts them but for the launcher → ([exit status], stdout, stderr)."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, port, folder, name, [str(flag) for flag in flags])
        ranks = [forkserver().Process(target=_program, args=(rank, *given)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
            rank.kill()  # one that hangs
            rank.join()
        statuses = [rank.exitcode for rank in ranks]
        texts = {kind: "".join(path.read_text() for path in sorted(pathlib.Path(folder).glob(f"*.{kind}")))
                 for kind in ("out", "err")}  # fmt: skip
    return statuses, texts["out"], texts["err"]


def _program(rank, world_size, port, folder, name, flags):
    from synco.exits import exit_with
    from synco.launch import launch_status

    mp.current_process()._config.pop("tempdir", None)  # the helper's, too, and a program that fails removes its own
    torch.set_num_threads(1)
    place = (rank, world_size, rank, world_size, "localhost", port)
    os.environ.update({variable: str(value) for variable, value in zip(LAUNCHERS, place, strict=True)})
    module = importlib.import_module(name)
    sys.argv = [f"{name}.py", *flags]
    with (
        open(f"{folder}/{rank}.out", "w") as out,
        open(f"{folder}/{rank}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        exit_with(launch_status, getattr(module, WORKERS[name]), module.parse)
