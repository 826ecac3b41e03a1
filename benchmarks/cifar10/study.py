#!/usr/bin/env python3
"""MoCo v2, MoCHi and SynCo on CIFAR-10 under equal budgets, over several seeds: what does each learn?

  python benchmarks/cifar10/study.py DATA                  # on a GPU: the recipe of MoCo's own demo, 200 epochs
  python benchmarks/cifar10/study.py --scale cpu DATA      # a small version, for two CPU cores

DATA is where torchvision keeps CIFAR-10, which is downloaded there if it is not; with --dataset imagefolder a folder
train/CLASS/IMAGE, val/CLASS/IMAGE. Each method and seed is a pretraining with main_synco.py, then a linear probe and
fine-tunings on 1 % and 10 % of the labels from its last checkpoint. The same command goes on after an interruption.
--choose tries the settings instead, on training images alone: a part of them stands in the place of val.

Runs are kept below --out. Results, figure and README.md are written beside this file; the figure needs matplotlib.
"""

import argparse
import concurrent.futures
import importlib.util
import itertools
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from synco import datasets, distributed, files, metrics  # noqa: E402
from synco.distributed import usable_cpus  # noqa: E402
from synco.errors import UserError  # noqa: E402
from synco.files import read_json  # noqa: E402
from synco.negatives import TYPES  # noqa: E402
from synco.plot import COLOURS  # noqa: E402

METHODS = ("mocov2", "mochi", "synco")
ALONE = tuple(f"{name}-alone" for name in TYPES)
NAMES = {"random": "no pretraining", "mocov2": "MoCo v2", "mochi": "MoCHi", "synco": "SynCo"}
NAMES |= {f"{name}-alone": f"SynCo, {name} alone" for name in TYPES}
USUAL = ["random", *METHODS]
PERCENTS = (1, 10)
# what a run is measured by: (key, column's title)
MEASURES = (
    ("knn", "kNN, backbone"),
    ("knn_projection", "kNN, projection"),
    ("probe", "linear probe"),
    ("semi1", "1 % of the labels"),
    ("semi10", "10 % of the labels"),
)
KINDS = ("positive", "queue", "hardest", *TYPES)  # of logits, in the hardness diagnostics
PUBLISHED = {10: 48.0, 20: 61.4, 50: 73.3, 200: 82.6}  # of MoCo's own demo: epochs → kNN on the projection


@dataclass(frozen=True)
class Scale:
    """Flags of the programs, but for method, seed and folders."""

    common: str  # of all three programs
    pretrain: str
    counts: dict  # {method: (n_hard, n1 ... n6)}
    probe: str
    semi: dict  # {percent: flags}
    hold_out: int  # training images in the place of val with --choose
    candidates: dict  # of --choose: {name: (method, further flags of the pretraining)}
    trials: dict  # of --choose, on the first candidate's checkpoint: {name: (evaluation, its further flags)}
    why: str  # how the settings were chosen, in words


def trials(probe, classifier, backbone):
    """`Scale.trials` of these learning rates."""
    found = {f"linear probe, lr {lr}": ("probe", f"--lr {lr}") for lr in probe}
    for percent, lr, slow in itertools.product(PERCENTS, classifier, backbone):
        flags = f"--lr-backbone {slow} --lr-classifier {lr}"
        found[f"{percent} % of the labels, lr {lr}, backbone's {slow}"] = (f"semi{percent}", flags)
    return found


SCALES = {
    "gpu": Scale(
        common="-a resnet18 --stem cifar --img-size 32 --stats cifar10 --amp bf16 --channels-last --cache-images",
        pretrain="--epochs 200 -b 512 --lr 0.06 --wd 5e-4 --cos --bn-splits 8 --moco-k 4096 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 10 --knn-freq 10 --save-freq 10 "
        "--save-minutes 2 --keep 1",
        counts={"mocov2": (64, 0, 0, 0, 0, 0, 0), "mochi": (64, 8, 0, 64, 0, 0, 0), "synco": (64, 16, 16, 16, 4, 4, 4)},
        probe="--epochs 50 -b 512 --lr 0.03 --schedule 30 40 --val-freq 10",
        semi={
            1: "--epochs 60 -b 128 --lr-backbone 0.02 --lr-classifier 0.02 --val-freq 20",
            10: "--epochs 60 -b 128 --lr-backbone 0.02 --lr-classifier 0.02 --val-freq 20",
        },
        hold_out=5000,
        candidates={
            "MoCo v2": ("mocov2", ""),
            "MoCHi": ("mochi", ""),
            "MoCHi, synthesis from epoch 20 on": ("mochi", "--warmup-epochs 20"),
            "SynCo": ("synco", ""),
            "SynCo, synthesis from epoch 20 on": ("synco", "--warmup-epochs 20"),
        },
        trials=trials(probe=(0.3, 0.1, 0.03, 0.01), classifier=(0.2, 0.02), backbone=(0.02, 0.005)),
        why="The pretraining is the recipe of MoCo's own demo for one GPU: a single linear layer as head, no blur, "
        "T = 0.1, crops from 0.08 of the area on; bfloat16 and augmentation on the GPU are ours. Its queue of 4,096 is "
        "a sixteenth of ImageNet's, and so are n_hard and the counts of MoCHi and SynCo; synthesis begins after 10 of "
        "200 epochs as it does on ImageNet. The learning rates of probe and fine-tuning are those that were chosen for "
        "the small version, for larger batches; --choose tries others.",
    ),
    "cpu": Scale(
        common="-a resnet18 --img-size 32 --stats cifar10 --limit-images 10000 --cache-images -j 0",
        pretrain="--epochs 25 -b 128 --lr 0.03 --wd 5e-4 --cos --bn-splits 2 --moco-k 512 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 5 --knn-freq 5 --keep 1",
        counts={"mocov2": (8, 0, 0, 0, 0, 0, 0), "mochi": (8, 1, 0, 8, 0, 0, 0), "synco": (8, 2, 2, 2, 1, 1, 1)},
        probe="--epochs 10 -b 128 --lr 0.01 --schedule 6 8 --val-freq 0",
        semi={
            1: "--epochs 30 -b 25 --lr-backbone 0.02 --lr-classifier 0.01 --val-freq 0",
            10: "--epochs 20 -b 64 --lr-backbone 0.02 --lr-classifier 0.01 --val-freq 0",
        },
        hold_out=5000,
        candidates={
            "MoCo v2, K = 512": ("mocov2", "--epochs 10"),
            "MoCo v2, K = 1,024": ("mocov2", "--epochs 10 --moco-k 1024"),
            "MoCo v2, K = 4,096": ("mocov2", "--epochs 10 --moco-k 4096"),
            "MoCo v2, K = 512, lr 0.06": ("mocov2", "--epochs 10 --lr 0.06"),
            "SynCo, K = 512, synthesis from epoch 2 on": ("synco", "--epochs 10 --warmup-epochs 2"),
            "SynCo, K = 512, synthesis from epoch 5 on": ("synco", "--epochs 10 --warmup-epochs 5"),
        },
        trials=trials(probe=(0.3, 0.03, 0.01, 0.003), classifier=(0.1, 0.01), backbone=(0.02, 0.005)),
        why="Small enough for two cores: 10,000 training images (the same for every seed), 25 epochs of 78 steps, a "
        "ResNet-18 with ImageNet's stem at 32 pixels. Queue and learning rates are the best of the candidates below, "
        "of which the pretrainings ran for 10 epochs; when synthesis begins made no difference there, and it begins "
        "after a fifth of the epochs. n_hard and the counts of MoCHi and SynCo are ImageNet's, divided by 128 as the "
        "queue is, and at least 1.",
    ),
}


def main():
    args = parse()
    scale = SCALES[args.scale]
    programs = Programs(args)
    try:
        if args.choose:
            found = {"candidates": programs.all(choose, list(scale.candidates.items()))}
            found |= {"trials": programs.all(try_out, list(scale.trials.items()))} | settings_of(scale)
            files.write_json(os.path.join(HERE, f"{args.scale}-choice.json"), origin(args, "--choose") | found)
        else:
            if not args.report_only:
                programs.all(run, [(method, seed) for seed in args.seeds for method in args.methods])
            found = gather(args, scale)
            draw(os.path.join(HERE, f"{args.scale}.png"), found)
            files.write_json(os.path.join(HERE, f"{args.scale}.json"), found)
            print(table(found), verdicts(found), sep="\n\n")
        with files.atomic_write(os.path.join(HERE, "README.md")) as file:
            file.write(readme().encode())
    except (Ended, UserError) as error:
        sys.exit(f"study.py: {error}")
    except OSError as error:
        sys.exit(f"study.py: {error.filename}: {error.strerror}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("data", metavar="DATA", help="where CIFAR-10 lies, or with --dataset imagefolder a folder of its images")
    flag("--dataset", default="cifar10", choices=("cifar10", "imagefolder"), help="what DATA holds (default: cifar10)")
    flag("--scale", default="gpu", choices=SCALES, help="size of the study (default: gpu)")
    flag("--seeds", type=seeds, default=[0, 1, 2], help="of the runs (default: 0,1,2)")
    flag("--methods", type=methods, default=USUAL, help=f"of {', '.join(NAMES)} (default: {','.join(USUAL)})")
    flag("--each-type", action="store_true", help="SynCo with each of its six types alone, too")
    flag("--jobs", type=int, help="runs at the same time (default: 1, and on a CPU as many as it has cores)")
    flag("--out", metavar="FOLDER", help="folder for the runs (default: runs/cifar10-SCALE)")
    flag("--choose", action="store_true", help="try the candidates for the settings, on training images alone")
    flag("--report-only", action="store_true", help="start nothing; write up the runs that are finished")
    args = parser.parse_args()
    if args.choose and args.report_only:
        parser.error("--choose starts runs and --report-only none; give one")
    if args.scale == "gpu" and not torch.cuda.is_available() and not args.report_only:
        parser.error("--scale gpu needs a GPU, and there is none here; --scale cpu is the small version")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    if not os.path.isdir(args.data) and args.dataset == "imagefolder" and not args.report_only:
        parser.error(f"{args.data}: no such folder")
    if not args.choose and importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs matplotlib: pip install matplotlib")
    if not os.access(HERE, os.W_OK):
        parser.error(f"{HERE}: cannot be written, and the results belong there")
    args.methods = [name for name in NAMES if name in args.methods or args.each_type and name in ALONE]
    tasks = len(SCALES[args.scale].candidates) if args.choose else len(args.methods) * len(args.seeds)
    args.jobs = args.jobs or (min(usable_cpus(), tasks) if args.scale == "cpu" else 1)
    args.out = os.path.abspath(args.out or os.path.join(ROOT, "runs", f"cifar10-{args.scale}"))
    return args


def seeds(text):
    """An argparse type: numbers with commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers >= 0 with commas, such as 0,1,2")
    return list(dict.fromkeys(found))


def methods(text):
    """An argparse type: names of methods with commas."""
    found = text.split(",")
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(NAMES)}")
    return found


# ------------------------------------------------------------------------------------------------------ the runs


class Ended(Exception):
    """What ends the study, in one line."""


class Programs:
    """Runs the repository's programs, so many at a time as --jobs says."""

    def __init__(self, args):
        self.args, self.running, self.stopped = args, set(), threading.Event()

    def all(self, what, tasks):
        """Call what(args, scale, programs, task) for every task → what they return.

        Raises Ended where one fails, or at Ctrl-C and SIGTERM: programs that are running save and stop, and no other is
        started.
        """
        args, scale = self.args, SCALES[self.args.scale]
        prepare(args, scale)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            try:
                return list(pool.map(lambda task: what(args, scale, self, task), tasks))
            except (Ended, KeyboardInterrupt) as error:
                self.stopped.set()
                for process in list(self.running):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise Ended(f"{str(error) or 'interrupted'}; the same command goes on") from error
            finally:
                signal.signal(signal.SIGTERM, before)

    def start(self, words, log):
        """Run a program to its end; its output goes to the end of `log`. Raises Ended if it fails."""
        if self.stopped.is_set():
            raise Ended("interrupted")
        os.makedirs(os.path.dirname(log), exist_ok=True)
        environment = dict(os.environ)
        if self.args.scale == "cpu":
            threads = max(1, usable_cpus() // self.args.jobs)
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])]
        began = time.time()
        with open(log, "a") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
            if self.stopped.is_set():  # meanwhile
                process.terminate()
            status = process.wait()
            self.running.discard(process)
            print(f"# {time.time() - began:.0f} s, status {status}", file=file)
        if status:
            with open(log) as file:
                told = [line.strip() for line in file if line.strip()][-2]
            self.stopped.set()
            raise Ended(f"{words[0]} ended with status {status}: {told} ({log})")


def prepare(args, scale):
    """Fetch the images, and keep beside the runs what they are made with. Raises Ended if that was something else."""
    if args.dataset == "cifar10":  # before several programs do so at once
        try:
            fetching = argparse.Namespace(dataset="cifar10", download=True, data=args.data)
            datasets.fetch(fetching, distributed.Process())
        except UserError as error:
            raise Ended(error) from error
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "study.json")
    before, now = read_json(path), {"dataset": args.dataset} | settings_of(scale)
    changed = [name for name in now if before and before.get(name) != now[name]]
    if changed:
        raise Ended(f"--out {args.out}: holds runs with other settings ({', '.join(changed)}); give another")
    machines = before.get("machines", [])
    if machine(args) not in machines:
        files.write_json(path, now | {"machines": [*machines, machine(args)]})


def settings_of(scale):
    """All that decides a run's numbers, but for method and seed."""
    counts = {name: " ".join(map(str, numbers)) for name, numbers in scale.counts.items()}
    fine_tuning = {str(percent): flags for percent, flags in scale.semi.items()}
    return {"settings": {"all": scale.common, "pretraining": scale.pretrain, "probe": scale.probe},
            "counts": counts, "fine-tuning": fine_tuning}  # fmt: skip


def machine(args):
    """What the runs take place on, in words."""
    names = [processor(), f"{usable_cpus()} cores"]
    if args.scale == "gpu":
        names = [f"GPU {torch.cuda.get_device_name()}", *names] if torch.cuda.is_available() else names
    versions = [f"{name} {version}" for name, version in metrics.origin()["versions"].items()]
    return ", ".join([*names, *versions, f"{args.jobs} run{'s' * (args.jobs > 1)} at a time"])


def processor():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def run(args, scale, programs, task):
    """Pretraining and evaluations of one method and seed, as far as they are not done."""
    method, seed = task
    folder = os.path.join(args.out, f"{method}-{seed}")
    common = [*scale.common.split(), "--seed", seed, "--resume", "auto", "--dataset", args.dataset, args.data]
    weights = "random"
    if method != "random":
        weights = pretrain(programs, folder, [*common, *scale.pretrain.split(), *method_flags(scale, method)])
    for name, words in evaluations(scale).items():
        if not os.path.exists(os.path.join(folder, name, "result.json")):
            words = [*words, *common, "--pretrained", weights, "--save-dir", os.path.join(folder, name)]
            programs.start(words, os.path.join(folder, f"{name}.txt"))
    print(f"{NAMES[method]}, seed {seed}: done", flush=True)


def choose(args, scale, programs, task):
    """Pretraining with one candidate for the settings → its kNN accuracy on the images that were held out."""
    name, (method, flags) = task
    folder = choice_folder(args, name)
    words = [*held_out(args, scale), *scale.pretrain.split(), *method_flags(scale, method), *flags.split()]
    pretrain(programs, folder, words)
    last = curve(folder)[-1]
    print(f"{name}: kNN {last['top1']:.2f} %, on the projection {last['top1_projection']:.2f} %", flush=True)
    return {"name": name, "flags": flags, "knn": last["top1"], "knn_projection": last["top1_projection"]}


def try_out(args, scale, programs, task):
    """An evaluation of the first candidate's checkpoint with other settings → its accuracy on the held-out images."""
    name, (evaluation, flags) = task
    first, (_, more) = next(iter(scale.candidates.items()))
    words = [*scale.pretrain.split(), *more.split()]
    weights = os.path.join(choice_folder(args, first), "pretrain", last_checkpoint(words))
    folder = choice_folder(args, name)
    if not os.path.exists(os.path.join(folder, "result.json")):
        words = [*evaluations(scale)[evaluation], *flags.split(), *held_out(args, scale)]
        programs.start([*words, "--pretrained", weights, "--save-dir", folder], f"{folder}.txt")
    top1 = read_json(os.path.join(folder, "result.json"))["last"]["top1"]
    print(f"{name}: {top1:.2f} %", flush=True)
    return {"name": name, "flags": flags, "top1": top1}


def held_out(args, scale):
    """Flags of all programs with --choose: a part of the training images stands in the place of val."""
    words = ["--seed", 100, "--hold-out", scale.hold_out, "--resume", "auto", "--dataset", args.dataset, args.data]
    return [*scale.common.split(), *words]


def choice_folder(args, name):
    return os.path.join(args.out, "choose", re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-"))


def pretrain(programs, folder, words):
    """Run main_synco.py until its last evaluation is done → its last checkpoint."""
    save_dir = os.path.join(folder, "pretrain")
    if not curve(folder) or curve(folder)[-1]["epoch"] != epochs_of(words):
        programs.start(["main_synco.py", *words, "--save-dir", save_dir], os.path.join(folder, "pretrain.txt"))
    return os.path.join(save_dir, last_checkpoint(words))


def epochs_of(words):
    return int([value for name, value in zip(words, words[1:]) if name == "--epochs"][-1])  # the last one counts


def last_checkpoint(words):
    """The name of a pretraining's last checkpoint."""
    return f"checkpoint_{epochs_of(words) - 1:04d}.pth.tar"


def evaluations(scale):
    """{folder's name: program and flags}."""
    found = {"probe": ["main_lincls.py", *scale.probe.split()]}
    for percent in PERCENTS:
        flags = ["--train-percent", percent, "--weights", "finetune", *scale.semi[percent].split()]
        found[f"semi{percent}"] = ["main_semisup.py", *flags]
    return found


def method_flags(scale, method):
    n_hard, *counts = counts_of(scale, method)
    return ["--n-hard", n_hard, *(word for i, n in enumerate(counts, 1) for word in (f"--n{i}", n))]


def counts_of(scale, method):
    """(n_hard, n1 ... n6) of a method. A type alone takes the number of all six together: as many negatives."""
    if method in scale.counts:
        return scale.counts[method]
    n_hard, *counts = scale.counts["synco"]
    return n_hard, *(sum(counts) if method == f"{name}-alone" else 0 for name in TYPES)


# ------------------------------------------------------------------------------------------------------ the results


def log_lines(folder):
    """The lines of a pretraining's log; none where there is no log."""
    path = os.path.join(folder, "pretrain", "log.jsonl")
    return metrics.read_log(path) if os.path.exists(path) else []


def curve(folder):
    return [line for line in log_lines(folder) if line["kind"] == "knn"]


def gather(args, scale):
    """Everything that was measured below --out, as one JSON object; runs that are not finished are left out.

    Raises Ended where there is no finished run.
    """
    kept = read_json(os.path.join(args.out, "study.json"))
    runs, unfinished = [], []
    for method in NAMES:
        numbers = [name.removeprefix(f"{method}-") for name in (os.listdir(args.out) if kept else [])]
        for seed in sorted(int(number) for number in numbers if number.isdecimal()):
            folder = os.path.join(args.out, f"{method}-{seed}")
            found = measured(folder, method, evaluations(scale))
            if found:
                runs.append({"method": method, "seed": seed} | found)
            else:
                unfinished.append(folder)
    if unfinished:
        print(f"study.py: not finished, and left out: {', '.join(unfinished)}", file=sys.stderr)
    if not runs:
        raise Ended(f"no finished run below {args.out}")
    for found in runs:  # a network before its first step is that of no pretraining
        twin = [other for other in runs if other["method"] != "random" and other["seed"] == found["seed"]]
        if found["method"] == "random" and twin:
            found["knn"], found["knn_projection"] = twin[0]["curve"][0][1:]
    ran = [method for method in NAMES if any(found["method"] == method for found in runs)]
    flags = ["--each-type"] if set(ALONE) <= set(ran) else []
    if [method for method in ran if method not in ALONE or not flags] != USUAL:
        flags = [f"--methods {','.join(ran)}"]
    numbers = sorted({found["seed"] for found in runs})
    flags += [f"--seeds {','.join(map(str, numbers))}"] * (numbers != [0, 1, 2])
    return origin(args, *flags) | settings_of(scale) | {"runs": runs}


def origin(args, *flags):
    """Scale, data, machines and command of a measurement."""
    kept = read_json(os.path.join(args.out, "study.json"))
    flags = [f"--scale {args.scale}"] * (args.scale != "gpu") + list(flags)
    flags += [f"--dataset {kept['dataset']}"] * (kept["dataset"] != "cifar10")
    command = " ".join(["python benchmarks/cifar10/study.py", *flags, "DATA"])
    return {"scale": args.scale, "dataset": kept["dataset"], "machines": kept["machines"], "command": command}


def measured(folder, method, evaluated):
    """The numbers of one run; {} where it is not finished. evaluated: the names of its evaluations' folders."""
    found = {"images": {}}
    for name in evaluated:
        result = read_json(os.path.join(folder, name, "result.json"))
        if not result:
            return {}
        found[name] = result["last"]["top1"]  # of the last epoch: none is picked by its val accuracy
        found["images"] |= {"val": result["val_images"], name: _config(folder, name)["train_images"]}
    if method == "random":
        return found
    lines, points = log_lines(folder), curve(folder)
    if points[-1]["epoch"] != _config(folder, "pretrain")["epochs"]:
        return {}
    ends = {line["epoch"]: line for line in lines if line["kind"] == "train"}  # each epoch's last
    found["images"]["pretrain"] = _config(folder, "pretrain")["train_images"]
    found["knn"], found["knn_projection"] = points[-1]["top1"], points[-1]["top1_projection"]
    found["curve"] = [[line["epoch"], line["top1"], line["top1_projection"]] for line in points]
    found["hardness"] = [
        {"epoch": epoch + 1, "acc1": line["acc1"], "acc1_real": line["acc1_real"]}
        | {name: value for name, value in line.items() if name.startswith(("similarity/", "mass/"))}
        for epoch, line in ends.items()
    ]
    with open(os.path.join(folder, "pretrain.txt")) as file:
        found["minutes"] = round(sum(int(seconds) for seconds in re.findall(r"^# (\d+) s,", file.read(), re.M)) / 60, 1)
    return found


def _config(folder, name):
    return read_json(os.path.join(folder, name, "config.json"))


def methods_of(content):
    return list(dict.fromkeys(run["method"] for run in content["runs"]))


def values(content, method, key):
    """{seed: a number, or list} of the runs of a method that have it."""
    return {run["seed"]: run[key] for run in content["runs"] if run["method"] == method and key in run}


def markdown(rows):
    """A table of Markdown; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def table(content):
    """Mean and range over the seeds, in percent."""
    rows = [["", "seeds", *(title for _, title in MEASURES)]]
    for method in methods_of(content):
        numbers = [list(values(content, method, key).values()) for key, _ in MEASURES]
        rows.append([NAMES[method], str(len(numbers[-1])), *map(cell, numbers)])
    return markdown(rows)


def cell(numbers, form="{:.2f}"):
    """Mean and range."""
    if not numbers:
        return "not measured"
    mean, low, high = (form.format(f(numbers)) for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})" if len(numbers) > 1 else mean


def pairs_of(content):
    """The pairs of methods that are compared, as far as both have two seeds in common."""
    found = [(method, "mocov2") for method in methods_of(content) if method not in ("random", "mocov2")]
    found += [("synco", "mochi")]
    runs = {method: set(values(content, method, "semi10")) for method in NAMES}
    return [(one, other) for one, other in found if len(runs[one] & runs[other]) > 1]


def verdicts(content):
    """For each two methods and measure, whether they differ by more than the seeds do."""
    rows = [["difference", *(title for _, title in MEASURES)]]
    for one, other in pairs_of(content):
        cells = [verdict(values(content, one, key), values(content, other, key)) for key, _ in MEASURES]
        rows.append([f"{NAMES[one]} − {NAMES[other]}", *cells])
    return markdown(rows) if len(rows) > 1 else ""


def verdict(one, other):
    """Differences seed by seed of {seed: number}, and whether the two ranges overlap."""
    common = sorted(one.keys() & other.keys())
    differences = [one[seed] - other[seed] for seed in common]
    one, other = [one[seed] for seed in common], [other[seed] for seed in common]
    apart = min(one) > max(other) or max(one) < min(other)
    return f"{cell(differences, '{:+.2f}')}, {'ranges apart' if apart else 'within the spread'}"


def by_chance(content):
    """What `verdicts` says of methods that are equal."""
    ways = {math.comb(2 * len(values(content, one, "semi10")), len(values(content, one, "semi10"))) // 2
            for one, _ in pairs_of(content)}  # fmt: skip
    if not ways:
        return ""
    return (
        'A difference is the mean over the seeds (lowest to highest). It is "within the spread" unless the lowest of '
        'one method is above the highest of the other. Two equal methods come out as "ranges apart" in one of '
        f"{min(ways)} "
        f"comparisons if all their runs are independent, and the tables hold {len(MEASURES) * len(pairs_of(content))} "
        "comparisons. Runs of one seed share initial weights, order of images and the draw of the labels."
    )


def hardness(content):
    """Mean similarity to the query and share of the softmax in the last step, by method, means over the seeds."""
    rows = [["", *KINDS]]
    for method in methods_of(content):
        ends = [lines[-1] for lines in values(content, method, "hardness").values()]
        for what, title, form in (
            ("similarity", "similarity to the query", "{:.3f}"),
            ("mass", "share of the softmax", "{:.1%}"),
        ):
            numbers = [[end[f"{what}/{kind}"] for end in ends if f"{what}/{kind}" in end] for kind in KINDS]
            if ends:
                cells = [form.format(statistics.mean(n)).replace("%", " %") if n else "" for n in numbers]
                rows.append([f"{NAMES[method]}, {title}", *cells])
    return markdown(rows) if len(rows) > 1 else ""


def draw(path, content):
    """kNN accuracy of all methods and SynCo's hardness over the epochs, mean and range over the seeds, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), sharex=True, layout="constrained")
    for axis, column, title in zip(axes, (1, 2), ("backbone", "128-d projection")):
        for colour, method in zip(COLOURS, [m for m in methods_of(content) if m != "random"]):
            curves = values(content, method, "curve").values()
            band(axis, [{point[0]: point[column] for point in points} for points in curves], colour, NAMES[method])
        if content["scale"] == "gpu" and column == 2:
            axis.plot(*zip(*PUBLISHED.items()), "k*", ms=9, ls="none", label="published, MoCo's demo")
        axis.set(title=f"kNN on the {title}", xlabel="epochs", ylabel="top-1 on val [%]")
    for colour, kind in zip(COLOURS, KINDS):
        lines = values(content, "synco", "hardness").values()
        name = f"similarity/{kind}"
        band(axes[2], [{e["epoch"]: e[name] for e in line if name in e} for line in lines], colour, kind)
    axes[2].set(title="SynCo: similarity to the query", xlabel="epochs", ylabel="mean cosine")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def band(axis, lines, colour, label):
    """Mean and range of lines {x: y}, at each x that any of them has."""
    y = {x: [line[x] for line in lines if x in line] for x in sorted(set().union(*lines))}
    if y:
        axis.plot(list(y), list(map(statistics.mean, y.values())), color=colour, label=label)
        low, high = (list(map(f, y.values())) for f in (min, max))
        axis.fill_between(list(y), low, high, color=colour, alpha=0.2, lw=0)


# ------------------------------------------------------------------------------------------------------ README.md

HEAD = """# CIFAR-10: what does each method learn?

MoCo v2, MoCHi and SynCo, each over several seeds, and the same network without pretraining. All methods see the same
images for as many epochs, with the same settings; what differs is which synthetic negatives are added, and so the
time of a step. This file is written by `study.py` from its results. Accuracies are top-1 in percent on validation
images after the last epoch: mean over the seeds (lowest to highest); no epoch was picked by its accuracy. kNN:
k = 200, weighted with temperature 0.1, on the backbone's features and on the 128-d projection. "No pretraining" is
fine-tuned with the same learning rates as the pretrained networks: a floor, not the best that is possible without."""


def readme():
    """README.md from the results of both scales, as far as there are any."""
    titles = {"gpu": "On a GPU, 200 epochs", "cpu": "On a CPU, a small version"}
    return "\n\n".join([HEAD, *(f"## {titles[scale]}\n\n{section(scale)}" for scale in SCALES)]) + "\n"


def section(scale):
    """What README.md says of one scale."""
    found, choice = (read_json(os.path.join(HERE, f"{scale}{more}.json")) for more in ("", "-choice"))
    parts = []
    if found:
        parts += [
            f"```\n{found['command']}\n```",
            table(found),
            verdicts(found),
            by_chance(found),
            f"![kNN accuracy and hardness over the epochs]({scale}.png)",
            "How hard the negatives were in the last step, means over the seeds (the hardest are part of the queue):",
            hardness(found),
            circumstances(found),
            settings_text(found),
        ]
    else:
        flags = "" if scale == "gpu" else f"--scale {scale} "
        parts += ["Not measured. The command:", f"```\npython benchmarks/cifar10/study.py {flags}DATA\n```"]
    if scale == "gpu":
        told = ", ".join(f"{accuracy} % after {epochs}" for epochs, accuracy in PUBLISHED.items())
        parts.append(f"Published for MoCo's demo, 200 epochs, kNN on the projection: {told} epochs.")
        parts.append(markdown(beside_published(found)) if found else "")
    parts.append(SCALES[scale].why)
    if choice:
        rows = [[c["name"], f"{c['knn']:.2f}", f"{c['knn_projection']:.2f}"] for c in choice["candidates"]]
        parts.append(
            f"The candidates, on {SCALES[scale].hold_out:,} training images that were held out, one seed:\n\n"
            f"```\n{choice['command']}\n```"
        )
        parts.append(markdown([["pretraining", "kNN, backbone", "kNN, projection"], *rows]))
        rows = [[trial["name"], f"{trial['top1']:.2f}"] for trial in choice["trials"]]
        parts.append(f"Evaluations of {choice['candidates'][0]['name']} on the same images:")
        parts.append(markdown([["", "top-1"], *rows]))
    return "\n\n".join(part for part in parts if part)


def circumstances(content):
    """Machines, images and times, as a list."""
    images = {name: count for run in content["runs"] for name, count in run["images"].items()}
    files = {"cifar10": "the original files"}.get(content["dataset"], "files in a folder, lossy if they are JPEG")
    minutes = [run["minutes"] for run in content["runs"] if "minutes" in run]
    lines = [f"Measured on: {machine}." for machine in content["machines"]]
    told = f"{images['pretrain']:,} for pretraining and kNN, " if "pretrain" in images else ""
    lines.append(
        f"Images ({files}): {told}{images['probe']:,} for the probe, {images['semi1']:,} and {images['semi10']:,} with "
        f"labels for fine-tuning, {images['val']:,} to validate."
    )
    if minutes:
        lines.append(f"A pretraining took {statistics.median(minutes):.1f} minutes in the median, kNN included.")
    return "\n".join(f"- {line}" for line in lines)


def settings_text(content):
    """The flags of all programs."""
    lines = [f"{name}: {flags}" for name, flags in content["settings"].items()]
    lines += [f"fine-tuning on {percent} %: {flags}" for percent, flags in content["fine-tuning"].items()]
    lines += [f"n_hard and n1 to n6 of {NAMES[method]}: {numbers}" for method, numbers in content["counts"].items()]
    return "Settings:\n\n```\n" + "\n".join(lines) + "\n```"


def beside_published(content):
    """MoCo v2's accuracies at the published epochs."""
    rows = [["kNN on the projection", *(f"{epochs} epochs" for epochs in PUBLISHED)]]
    rows.append(["published", *(f"{accuracy:.1f}" for accuracy in PUBLISHED.values())])
    curves = [{epoch: value for epoch, _, value in points} for points in values(content, "mocov2", "curve").values()]
    rows.append(["here", *(cell([points[epochs] for points in curves if epochs in points]) for epochs in PUBLISHED)])
    return rows


if __name__ == "__main__":
    main()
