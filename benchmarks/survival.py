#!/usr/bin/env python3
"""Interrupt runs in every way and compare how they end with runs that nobody disturbed.

  python benchmarks/survival.py                  # all parts, one table; by hand, it takes an hour on two CPU cores
  python benchmarks/survival.py kill term --runs 5 --json

The runs are small (a ShuffleNet, 180 synthetic images of 40 pixels, gloo processes on the CPU), but for the cost of a
checkpoint, which is one of a ResNet-50 with a queue of 65,536 rows. Everything is written below --folder and removed.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from synco import checkpoint, metrics  # noqa: E402
from synco.agreement import Agreement  # noqa: E402
from synco.builder import SynCo  # noqa: E402
from synco.errors import UserError  # noqa: E402

ARCH = "shufflenet_v2_x0_5"
COMMON = f"-a {ARCH} --img-size 32 --seed 3 -p 4 --epochs 2 --resume auto --save-steps 2"
PRETRAIN = (
    f"main_synco.py {COMMON} -j 1 -b 8 --warmup-epochs 1 --moco-k 64 --moco-dim 16 --mlp --n-hard 16 "
    "--n1 4 --n2 3 --n3 2 --n4 2 --n5 2 --n6 1 --aug-plus --cos --knn-freq 1 --knn-k 5"
)
PROBE = f"main_lincls.py {COMMON} -j 0 -b 16 --lr 1 --schedule 2 --pretrained {{}}/pretrained.pth.tar"
TUNING = (
    f"main_semisup.py {COMMON} -j 0 -b 16 --lr-backbone 0.02 --lr-classifier 0.2 --weights finetune "
    "--pretrained {}/pretrained.pth.tar"
)
PROGRAMS = {"pretraining": PRETRAIN, "probe": PROBE, "fine-tuning": TUNING}
TIMED = ("time", "images_per_second", "data_share")
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_data(folder, each=60):
    """DATA with three classes of smooth colour noise, and the checkpoint that the classifiers start from."""
    rng = np.random.default_rng(0)
    for split, count in (("train", each), ("val", 6)):
        for c in range(3):
            os.makedirs(os.path.join(folder, split, f"c{c}"))
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                image.resize((40, 40), Image.BICUBIC).save(os.path.join(folder, split, f"c{c}", f"{i}.jpg"))
    torch.manual_seed(0)
    weights = torchvision.models.get_model(ARCH, num_classes=16).state_dict()
    state = {f"module.encoder_q.{name}": weight for name, weight in weights.items()}
    torch.save({"epoch": 1, "arch": ARCH, "state_dict": state}, os.path.join(folder, "pretrained.pth.tar"))


def words(program, data, folder, processes=1, torchrun=False):
    """The command line of a run, as a list."""
    flags = [*PROGRAMS[program].format(data).split(), "--save-dir", folder, data]
    if torchrun:
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes} --max-restarts 3"
        return [sys.executable, *launcher.split(), *flags]
    if processes > 1:
        flags += ["--multiprocessing-distributed", "--nproc-per-node", str(processes)]
    return [sys.executable, *flags]


def start(command, output):
    """Start a command in a session of its own; what it prints is appended to a file."""
    env = {name: value for name, value in os.environ.items() if name not in TOLD}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def finish(command, output):
    """Run a command to its end → seconds. Raises RuntimeError with the end of its output where it fails."""
    began = time.monotonic()
    status = start(command, output).wait()
    if status:
        with open(output) as file:
            raise RuntimeError(f"status {status}: {file.read()[-3000:]}")
    return time.monotonic() - began


def differences(one, other):
    """How two runs' folders differ in what must not depend on interruptions: a list of words, empty if in nothing."""
    found = []
    names = [sorted(name for name in os.listdir(folder) if name.endswith(".pth.tar")) for folder in (one, other)]
    if names[0] != names[1]:
        return [f"checkpoints {names}"]
    for name in names[0]:
        a, b = (torch.load(os.path.join(folder, name), weights_only=True) for folder in (one, other))
        found += [f"{name}: {where}" for where in unequal(a, b) if not where.startswith("config.")]
    logs = [metrics.read_log(os.path.join(folder, "log.jsonl")) for folder in (one, other)]
    logs = [[{k: v for k, v in line.items() if k not in TIMED} for line in log] for log in logs]
    return found + (["log.jsonl"] if logs[0] != logs[1] else [])


def unequal(a, b, where=""):
    """Where two checkpoints, as nested dicts and lists of tensors and plain values, differ by a bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not isinstance(a, dict):
        return [] if a == b else [where]
    if a.keys() != b.keys():
        return [where]
    return [place for key in a for place in unequal(a[key], b[key], f"{where}.{key}" if where else str(key))]


def left_behind(folder, session=None):
    """The processes whose command line names this folder, and those of a session."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            named = folder.encode() in file.read()
            if pid != os.getpid() and (named or os.getsid(pid) == session) and state(pid)[0] != "Z":
                found.append(pid)
    return found


def state(pid):
    """(the letter of a process's state, its parent)."""
    with open(f"/proc/{pid}/stat") as file:
        letter, parent = file.read().rpartition(")")[2].split()[:2]
    return letter, int(parent)


def interrupt(command, folder, seconds, rng, number, times):
    """Send a signal to all of a run's processes at random moments, once to `times` times, then let it end.

    seconds: how long an undisturbed run takes → [(status, seconds from the signal to the end)] of those that were
    interrupted. A run that is done before its first signal is begun anew. What it prints is in FOLDER.txt.
    """
    output, found, wanted = folder + ".txt", [], rng.randint(1, times)
    while len(found) < wanted:
        before = os.path.getsize(output) if os.path.exists(output) else 0
        process = start(command, output)
        if number == signal.SIGKILL:
            time.sleep(rng.uniform(0.25, 1) * seconds)
        else:  # a warning ends a program that is still starting as it does any other
            while os.path.getsize(output) == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.6) * seconds)
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        status = process.wait()
        if status == 0 and found:
            break
        if status == 0:
            shutil.rmtree(folder)
        else:
            found.append((status, time.monotonic() - began))
    finish(command, output)
    return found


def disturbed(kind, program, processes, data, folder, *, runs, rng):
    """`runs` runs, each interrupted once or twice, beside an undisturbed one → a row of the table."""
    calm = os.path.join(folder, f"calm-{program}-{processes}")
    output = calm + ".txt"
    if not os.path.exists(calm):
        finish(words(program, data, calm, processes), output)
    again = os.path.join(folder, "time")
    seconds = finish(words(program, data, again, processes), output)
    wrong, interrupted = differences(calm, again), []
    shutil.rmtree(again)
    same = 0
    for run in range(runs):
        place = os.path.join(folder, f"{kind}-{program}-{processes}-{run}")
        number = signal.SIGKILL if kind == "kill" else rng.choice((signal.SIGTERM, signal.SIGUSR1))
        command = words(program, data, place, processes)
        interrupted += interrupt(command, place, seconds, rng, number, times=2)
        found = differences(calm, place)
        wrong += [f"run {run}: {where}" for where in found]
        same += not found
        shutil.rmtree(place)
    statuses = sorted({status for status, _ in interrupted})
    times = sorted(elapsed for _, elapsed in interrupted) or [0]
    words_of = f"{same} of {runs} identical, {len(interrupted)} interruptions, statuses {statuses}"
    if kind == "term":
        words_of += f", signal to exit {times[len(times) // 2]:.1f} s (at most {times[-1]:.1f})"
    name = {"kill": "SIGKILL", "term": "SIGTERM or SIGUSR1"}[kind]
    return row(f"{name}, {program}, {processes} process{'es' * (processes > 1)}", words_of, same == runs, wrong)


def row(what, result, good, wrong=()):
    """A row of the table."""
    return {"what": what, "result": result, "good": bool(good), "wrong": list(wrong)[:5]}


def one_rank_killed(data, folder, rng):
    """torchrun --max-restarts 3, and a rank that is killed once."""
    calm, place = os.path.join(folder, "calm-pretraining-2"), os.path.join(folder, "restarted")
    if not os.path.exists(calm):
        finish(words("pretraining", data, calm, 2), calm + ".txt")
    process = start(words("pretraining", data, place, 2, torchrun=True), place + ".txt")
    within = os.path.join(place, "checkpoint_step.pth.tar")
    while not os.path.exists(within):
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2))
    ranks = [pid for pid in left_behind(place) if state(pid)[1] == process.pid]
    os.kill(rng.choice(ranks), signal.SIGKILL)
    status = process.wait()
    found = differences(calm, place)
    with open(place + ".txt") as file:
        resumed = file.read().count("resumed   ")
    result = f"status {status}, {resumed} restart, {'identical' if not found else 'different'}"
    return row("torchrun --max-restarts 3, a rank killed once", result, status == 0 and not found and resumed, found)


def damage(path, content, kind, rng):
    """Write a damaged checkpoint: the `content` of a whole one cut, with other bits, with zeros in it, or a pickle."""
    content = bytearray(content)
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "bits":
        for _ in range(rng.choice((1, 1, 1, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "last bits":
        content[-1 - rng.randrange(200)] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        at = rng.choice((0, rng.randrange(len(content))))
        length = min(rng.choice((1, 512, 4096, len(content))), len(content) - at)
        content[at : at + length] = bytes(length)
    elif kind == "pickle":
        hostile = rng.choice((os.system, eval, print))
        content = pickle.dumps({"state_dict": {}, "x": _Hostile(hostile)}, protocol=rng.randrange(6))
    with open(path, "wb") as file:
        file.write(content)


class _Hostile:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("touch executed" if self.function is not print else "executed",)


KINDS = ("cut", "bits", "last bits", "zeros", "pickle")


def damaged(path, folder, count, rng):
    """`count` damaged copies of a checkpoint, each to be refused in one line."""
    with open(path, "rb") as file:
        content = file.read()
    refused, wrong = 0, []
    bad = os.path.join(folder, "damaged.pth.tar")
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        damage(bad, content, kind, rng)
        with open(bad, "rb") as file:
            if file.read() == content:  # zeros over zeros
                refused += 1
                continue
        try:
            checkpoint.load(bad)
            wrong.append(f"{kind}: loaded")
        except UserError as error:
            refused += "\n" not in str(error)
    executed = os.path.exists("executed")
    good = refused == count and not executed
    return row(f"{count} damaged checkpoints", f"{refused} refused in one line", good, wrong)


def full_disk(data, folder, rng):
    """A run whose disk fills up: on a tmpfs of a few MB where one may be mounted, else with a limit on file sizes."""
    place = os.path.join(folder, "full")
    os.makedirs(place)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "none", place], capture_output=True)
    if mounted.returncode:
        return row("full disk", "not measured: no tmpfs may be mounted here", True)
    try:
        output = place + ".txt"
        command = words("pretraining", data, os.path.join(place, "run"), 1)
        process = start(command, output)
        first = os.path.join(place, "run", "checkpoint_0000.pth.tar")
        while not os.path.exists(first) and process.poll() is None:
            time.sleep(0.02)
        with contextlib.suppress(OSError), open(os.path.join(place, "filler"), "wb") as filler:
            while True:
                filler.write(bytes(1 << 16))
        status = process.wait()
        whole = checkpoint.load(first)["epoch"] == 1
        with open(output) as file:
            text = file.read()
        os.remove(os.path.join(place, "filler"))
        again = start(command, output).wait()
        calm = os.path.join(folder, "calm-pretraining-1")
        found = ["not done"] if again else differences(calm, os.path.join(place, "run"))
        warnings, lines = text.count("warning: "), text.count("Epoch 1")
        result = (
            f"{warnings} failed saves told, {lines} lines of the last epoch, status {status}, the checkpoint before "
            f"whole; gone on with room: {'different' if found else 'identical'}"
        )
        return row("full disk (tmpfs)", result, status == 1 and whole and warnings > 1 and lines and not found, found)
    finally:
        subprocess.run(["umount", place], check=True)


def cost(folder, repeat=5):
    """Seconds and bytes of a checkpoint of a ResNet-50 with K = 65,536, as it is saved and as it is read."""
    model = SynCo(torchvision.models.resnet50, 128, 65536, mlp=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for parameter in model.encoder_q.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    path = os.path.join(folder, "checkpoint_0000.pth.tar")
    seconds, plain = [], []
    for _ in range(repeat):
        began = time.perf_counter()
        content = {"state_dict": checkpoint.prefixed(model.state_dict()), "optimizer": optimizer.state_dict()}
        checkpoint.save(content, path)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        torch.save(content, path + ".plain")
        plain.append(time.perf_counter() - began)
    began = time.perf_counter()
    checkpoint.load(path)
    read = time.perf_counter() - began
    size = os.path.getsize(path)
    median, worst = sorted(seconds)[repeat // 2], max(seconds)
    result = (
        f"{size / 1e6:.0f} MB, {median:.2f} s (at most {worst:.2f}; torch.save alone "
        f"{sorted(plain)[repeat // 2]:.2f}), {100 * worst / 600:.2f} % of 10 minutes; checked and read in {read:.2f} s"
    )
    return row("checkpoint of ResNet-50, K = 65,536", result, worst < 6)


def _agree(rank, steps, port, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    saves, x, gradient = Agreement(), torch.randn(400, 400), torch.randn(1 << 18)
    times = {True: [], False: []}
    for step in range(steps):
        agreeing = step % 2 == 0  # turn about, so that a noisy machine disturbs both alike
        began = time.perf_counter()
        for _ in range(20):
            x = torch.tanh(x @ x)
        dist.all_reduce(gradient)
        if agreeing:
            saves.after(step)
        times[agreeing].append(time.perf_counter() - began)
    medians = {agreeing: sorted(found)[len(found) // 2] for agreeing, found in times.items()}
    results.put((medians[True], medians[False]))
    dist.barrier()


def agreement(folder, steps=600):
    """What agreeing costs in a step whose gradients are summed over two processes."""
    import socket

    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_agree, (steps, port, results), nprocs=2)
    agreeing, without = max(results.get() for _ in range(2))
    result = f"{1e3 * agreeing:.2f} ms a step, {1e3 * without:.2f} ms without"
    return row("agreeing on saves and stops, 2 processes", result, agreeing < without + 0.005)


PARTS = ("kill", "term", "torchrun", "damaged", "disk", "cost", "agreement")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=20, help="runs that are interrupted in each way (default: 20)")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS, help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--folder", help="an empty folder to work in (unset: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    rng = random.Random(args.seed)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data = os.path.join(folder, "data")
        make_data(data)
        jobs = []
        jobs += [(cost, folder)] * ("cost" in args.parts) + [(agreement, folder)] * ("agreement" in args.parts)
        for kind in ("kill", "term"):
            for program, processes in (("pretraining", 1), ("pretraining", 2), ("probe", 1), ("fine-tuning", 2)):
                runs = -(-args.runs // 2) if program == "pretraining" else args.runs  # half with each number
                if kind in args.parts and program in args.programs:
                    job = functools.partial(disturbed, runs=runs, rng=rng)
                    jobs.append((job, kind, program, processes, data, folder))
        jobs += [(one_rank_killed, data, folder, rng)] * ("torchrun" in args.parts)
        if "damaged" in args.parts or "disk" in args.parts:
            calm = os.path.join(folder, "calm-pretraining-1")
            finish(words("pretraining", data, calm), calm + ".txt")
            last = os.path.join(calm, "checkpoint_0001.pth.tar")
            jobs += [(damaged, last, folder, 200, rng)] * ("damaged" in args.parts)
            jobs += [(full_disk, data, folder, rng)] * ("disk" in args.parts)
        for job, *arguments in jobs:
            done = job(*arguments)
            rows.append(done)
            if not args.json:
                print(f"{done['what']:44} {done['result']}{'' if done['good'] else '   FAILED'}", flush=True)
                for line in done["wrong"]:
                    print(f"{'':44} {line}", flush=True)
        behind = left_behind(folder)
        rows.append(row("processes left behind", str(len(behind)), not behind))
    if args.json:
        print(json.dumps({"torch": torch.__version__, "runs": args.runs, "seed": args.seed, "rows": rows}))
    else:
        print(f"{rows[-1]['what']:44} {rows[-1]['result']}")
    sys.exit(0 if all(found["good"] for found in rows) else 1)


if __name__ == "__main__":
    main()
