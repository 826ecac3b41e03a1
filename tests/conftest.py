"""What the tests share: small data sets, the program run in this process, and real gloo processes."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same with and without GPUs; before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run side by side, and each of them is small

import gc

gc.disable()  # until all is imported, a third of which it would take; see pytest_collection_finish

import functools
import importlib
import pathlib
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


def pytest_collection_modifyitems(items):
    """What takes longest first, so that at the end no core waits for it."""
    items.sort(key=lambda item: item.path.stem not in ("test_launch", "test_survival", "test_cifar10_study"))


def pytest_collection_finish():
    """From now on collect garbage, and look for none in what was imported."""
    gc.freeze()
    gc.enable()


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


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """A pretraining of two epochs of three steps through the real command line → (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    return folder, script("main_synco", *SMALL, "--knn-freq", 1, "--save-dir", folder, data)


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


def features_by_torchvision(pretrained, views):
    """A `pretrained` checkpoint's features (M, D) of views (M, 3, H, W), by torchvision's own network."""
    net = torchvision.models.get_model(ARCH)
    net.fc = torch.nn.Identity()
    state = torch.load(pretrained, weights_only=True)["state_dict"]
    state = {name.removeprefix("module.encoder_q."): w for name, w in state.items() if ".encoder_q." in name}
    net.load_state_dict({name: w for name, w in state.items() if not name.startswith("fc.")})
    with torch.no_grad():
        return net.eval()(views).numpy()


def know_images(network, images):
    """Give a network's BatchNorm the statistics of images (M, 3, H, W): an untrained one's features are all alike."""
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    with torch.no_grad():
        network.train()(images)
    return network.eval()


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
    words = [str(word) for word in words]
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    elif words[0].endswith(".py"):
        words[:0] = [sys.executable]
    return subprocess.run(
        words, cwd=ROOT, env={**without_launcher(), **(env or {})}, capture_output=True, text=True, timeout=timeout
    )


def forkserver():
    """The context of processes that are forks of one helper, which has imported, once, what takes seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "torch.utils.tensorboard", "pytest"])
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
    gc.freeze()  # a fork would copy all that the helper has imported, to look for garbage
    gc.enable()
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
    return result  # the group goes with the process: to destroy it can hang, with torch 2.6 after an all-to-all


class Fork:
    """python PATH FLAGS, in a fork of the helper instead of a new Python; to be used as a Popen that gives text.

    Its environment is env alone, and it leads a session of its own.
    """

    def __init__(self, path, *flags, env):
        with tempfile.TemporaryDirectory() as folder:
            pipes = [f"{folder}/{name}" for name in ("stdout", "stderr")]
            for pipe in pipes:
                os.mkfifo(pipe)
            self.process = forkserver().Process(target=_run_program, args=(path, list(map(str, flags)), env, pipes))
            self.process.start()
            self.stdout, self.stderr = (open(pipe) for pipe in pipes)  # waits for the program to open them, too
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=120):
        """(the rest of its stdout, of its stderr), once it has ended; killed when the time is over."""
        timer = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        timer.start()
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            texts = tuple(pool.map(lambda stream: stream.read(), (self.stdout, self.stderr)))
        self.process.join()
        timer.cancel()
        return texts


def _run_program(path, flags, env, pipes):
    gc.freeze()  # see _fork
    gc.enable()
    for number, pipe in enumerate(pipes, start=1):
        os.dup2(os.open(pipe, os.O_WRONLY), number, inheritable=True)
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    mp.current_process()._config.pop("tempdir", None)  # the helper's, too, and a program that ends removes its own
    tempfile.tempdir = None  # to be looked up anew
    torch.set_num_threads(1)
    sys.argv = [str(path), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def without_launcher():
    """The environment, less what a launcher of these tests has set."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


def script(name, *flags):
    """A script of the repository, from its command line to its end, in a fork → CompletedProcess with its texts."""
    run = Fork(f"{name}.py", *flags, env=without_launcher())
    out, err = run.communicate()
    return subprocess.CompletedProcess(flags, run.returncode, out, err)


def left_behind(folder, session):
    """As `survival.left_behind`, once Python's helper process has had the time to see that its trainer has gone."""
    from benchmarks import survival

    until = time.monotonic() + 3
    while (found := survival.left_behind(str(folder), session)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def start_ranks(world_size, name, *flags):
    """A script in as many processes, with the environment that torchrun gives them → [its Fork]."""
    port = free_port()
    places = [map(str, (rank, world_size, rank, world_size, "localhost", port)) for rank in range(world_size)]
    environments = [without_launcher() | dict(zip(LAUNCHERS, place, strict=True)) for place in places]
    return [Fork(ROOT / f"{name}.py", *flags, env=env) for env in environments]


def program_of(world_size, name, *flags):
    """Start its ranks and wait for them → ([exit status], stdout, stderr)."""
    ranks = start_ranks(world_size, name, *flags)
    outs, errors = zip(*(rank.communicate() for rank in ranks))
    return [rank.returncode for rank in ranks], "".join(outs), "".join(errors)
