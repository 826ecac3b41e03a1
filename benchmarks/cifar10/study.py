#!/usr/bin/env python3
"""MoCo v2, MoCHi and SynCo on CIFAR-10 under equal budgets, over several seeds: what does each learn?

  python benchmarks/cifar10/study.py DATA                  # on a GPU: the recipe of MoCo's own demo, 200 epochs
  python benchmarks/cifar10/study.py --scale cpu DATA      # a small version, in two hours on two CPU cores

DATA is where torchvision keeps CIFAR-10, which is downloaded there if it is not; with --dataset imagefolder a folder
train/CLASS/IMAGE, val/CLASS/IMAGE. Each method and seed is a pretraining with main_synco.py, then a linear probe and
fine-tunings on 1 % and 10 % of the labels from its last checkpoint. The same command goes on after an interruption.
--choose tries the settings instead, on training images alone: a part of them stands in the place of val.

Runs are kept below --out. Results, figure and README.md are written beside this file; the figure needs matplotlib.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import shlex
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

from synco import checkpoint, metrics  # noqa: E402
from synco.negatives import TYPES  # noqa: E402
from synco.options import usable_cpus  # noqa: E402
from synco.plot import COLOURS  # noqa: E402

METHODS = ("mocov2", "mochi", "synco")
ALONE = tuple(f"{name}-alone" for name in TYPES)
NAMES = {"random": "no pretraining", "mocov2": "MoCo v2", "mochi": "MoCHi", "synco": "SynCo"}
NAMES |= {f"{name}-alone": f"SynCo, {name} alone" for name in TYPES}
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
PUBLISHED = {10: 48.0, 20: 61.4, 50: 73.3, 200: 82.6}  # of MoCo v1's demo: epochs → kNN on the projection


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
    why: str  # how the settings were chosen, in words


SCALES = {
    "gpu": Scale(
        common="-a resnet18 --stem cifar --amp bf16 --channels-last --cache-images",
        pretrain="--epochs 200 -b 512 --lr 0.06 --wd 5e-4 --cos --bn-splits 8 --moco-k 4096 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --compile --warmup-epochs 10 --knn-freq 10 --keep 1",
        counts={"mocov2": (64, 0, 0, 0, 0, 0, 0), "mochi": (64, 8, 0, 64, 0, 0, 0), "synco": (64, 16, 16, 16, 4, 4, 4)},
        probe="--epochs 50 -b 512 --lr 3 --schedule 30 40 --val-freq 10",
        semi={
            1: "--epochs 60 -b 128 --lr-backbone 0.01 --lr-classifier 0.1 --val-freq 20",
            10: "--epochs 60 -b 128 --lr-backbone 0.02 --lr-classifier 0.2 --val-freq 20",
        },
        hold_out=5000,
        candidates={
            "MoCo v2": ("mocov2", ""),
            "MoCHi": ("mochi", ""),
            "MoCHi, warm-up of 20 epochs": ("mochi", "--warmup-epochs 20"),
            "SynCo": ("synco", ""),
            "SynCo, warm-up of 20 epochs": ("synco", "--warmup-epochs 20"),
        },
        why="The pretraining is the recipe of MoCo's own demo for one GPU, which is MoCo v2 without its MLP and blur. "
        "Its queue of 4,096 is a sixteenth of ImageNet's, and so are n_hard and the counts of MoCHi and SynCo; "
        "synthesis begins after 10 epochs of 200 as it does on ImageNet. The learning rates of probe and fine-tuning "
        "were not searched for.",
    ),
    "cpu": Scale(
        common="-a resnet18 --img-size 32 --stats cifar10 --limit-images 10000 --cache-images -j 0",
        pretrain="--epochs 25 -b 128 --lr 0.03 --wd 5e-4 --cos --bn-splits 2 --moco-k 512 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 5 --knn-freq 5 --keep 1",
        counts={"mocov2": (8, 0, 0, 0, 0, 0, 0), "mochi": (8, 1, 0, 8, 0, 0, 0), "synco": (8, 2, 2, 2, 1, 1, 1)},
        probe="--epochs 10 -b 128 --lr 0.3 --schedule 6 8 --val-freq 0",
        semi={
            1: "--epochs 30 -b 25 --lr-backbone 0.01 --lr-classifier 0.1 --val-freq 0",
            10: "--epochs 20 -b 64 --lr-backbone 0.02 --lr-classifier 0.1 --val-freq 0",
        },
        hold_out=5000,
        candidates={},
        why="",
    ),
}


def main():
    args = parse()
    scale = SCALES[args.scale]
    if args.choose:
        path = os.path.join(HERE, f"{args.scale}-choice.json")
        metrics.write_json(
            path, origin(args) | {"candidates": in_parallel(args, choose, scale, list(scale.candidates.items()))}
        )
    else:
        if not args.report_only:
            in_parallel(args, run, scale, [(method, seed) for seed in args.seeds for method in args.methods])
        found = gather(args, scale)
        if not found["runs"]:
            sys.exit(f"study.py: no finished run below {args.out}")
        metrics.write_json(os.path.join(HERE, f"{args.scale}.json"), found)
        draw(os.path.join(HERE, f"{args.scale}.png"), found)
        print(table(found), verdicts(found), sep="\n\n")
    with checkpoint.whole(os.path.join(HERE, "README.md")) as file:
        file.write(readme().encode())


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("data", metavar="DATA", help="where CIFAR-10 lies, or with --dataset imagefolder a folder of its images")
    flag("--dataset", default="cifar10", choices=("cifar10", "imagefolder"), help="what DATA holds (default: cifar10)")
    flag("--scale", default="gpu", choices=SCALES, help="size of the study (default: gpu)")
    flag("--seeds", type=seeds, default=[0, 1, 2], help="of the runs (default: 0,1,2)")
    several = f"of {', '.join((*METHODS, *ALONE))} and random, no pretraining"
    flag("--methods", type=methods, default=[*METHODS, "random"], help=f"{several} (default: the first three, random)")
    flag("--each-type", action="store_true", help="SynCo with each of its six types alone, too")
    flag("--jobs", type=int, help="runs at the same time (default: 1, and on a CPU as many as it has cores)")
    flag("--out", metavar="FOLDER", help="folder for the runs (default: runs/cifar10-SCALE)")
    flag("--choose", action="store_true", help="try the candidates for the settings, on training images alone")
    flag("--report-only", action="store_true", help="start nothing; write up the runs that are finished")
    args = parser.parse_args()
    if args.scale == "gpu" and not torch.cuda.is_available() and not args.report_only:
        parser.error("--scale gpu needs a GPU, and there is none here; --scale cpu is the small version")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    if not os.path.isdir(args.data) and args.dataset == "imagefolder":
        parser.error(f"{args.data}: no such folder")
    args.jobs = args.jobs or (usable_cpus() if args.scale == "cpu" else 1)
    args.out = os.path.abspath(args.out or os.path.join(ROOT, "runs", f"cifar10-{args.scale}"))
    args.methods = [name for name in NAMES if name in args.methods or args.each_type and name in ALONE]
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
    """A program of the study ended with an error; one line says which."""


def in_parallel(args, what, scale, tasks):
    """Call what(args, scale, task) for every task, args.jobs at a time → what they return.

    Where one fails, those that are running go on to their end, no other is started, and the study ends.
    """
    failed = threading.Event()

    def unless_failed(task):
        try:
            return None if failed.is_set() else what(args, scale, task)
        except Ended:
            failed.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            return list(pool.map(unless_failed, tasks))
        except (Ended, KeyboardInterrupt) as error:
            failed.set()
            sys.exit(f"study.py: {error or 'interrupted'}; the same command goes on")


def run(args, scale, task):
    """Pretraining and evaluations of one method and seed, as far as they are not done."""
    method, seed = task
    folder, data = os.path.join(args.out, f"{method}-{seed}"), data_flags(args)
    common = [*scale.common.split(), "--seed", seed, "--resume", "auto", *data]
    weights = "random"
    if method != "random":
        weights = pretrain(args, folder, [*common, *scale.pretrain.split(), *method_flags(scale, method)])
    for name, words in evaluations(scale).items():
        if not os.path.exists(os.path.join(folder, name, "result.json")):
            words = [*words, *common, "--pretrained", weights, "--save-dir", os.path.join(folder, name)]
            start(args, words, os.path.join(folder, f"{name}.txt"))
    print(f"{NAMES[method]}, seed {seed}: done", flush=True)


def choose(args, scale, task):
    """Pretraining with one candidate for the settings → its kNN accuracy on the images that were held out."""
    name, (method, flags) = task
    folder = os.path.join(args.out, "choose", name.lower().replace(" ", "-").replace(",", ""))
    held_out = ["--seed", 100, "--hold-out", scale.hold_out, "--resume", "auto", *data_flags(args)]
    words = [*scale.common.split(), *held_out, *scale.pretrain.split(), *method_flags(scale, method), *flags.split()]
    pretrain(args, folder, words)
    last = curve(metrics.read_log(log_of(folder)))[-1]
    print(f"{name}: kNN {last['top1']:.2f} %, on the projection {last['top1_projection']:.2f} %", flush=True)
    return {"name": name, "flags": flags, "knn": last["top1"], "knn_projection": last["top1_projection"]}


def pretrain(args, folder, words):
    """Run main_synco.py until it is done → its last checkpoint."""
    save_dir = os.path.join(folder, "pretrain")
    epochs = int([value for name, value in zip(words, words[1:]) if name == "--epochs"][-1])  # the last one counts
    last = os.path.join(save_dir, f"checkpoint_{epochs - 1:04d}.pth.tar")
    if not os.path.exists(last):
        start(args, ["main_synco.py", *words, "--save-dir", save_dir], os.path.join(folder, "pretrain.txt"))
    return last


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


def data_flags(args):
    download = ["--download"] if args.dataset == "cifar10" else []
    return ["--dataset", args.dataset, *download, args.data]


def start(args, words, log):
    """Run a program of the repository; its output goes to the end of `log`. Raises Ended if it fails."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    environment = dict(os.environ)
    if args.scale == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, usable_cpus() // args.jobs))}
    command = [sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])]
    began = time.time()
    with open(log, "a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        print(f"# {time.time() - began:.0f} s, status {status}", file=file)
    if status:
        with open(log) as file:
            told = [line.strip() for line in file if line.strip()][-2]
        raise Ended(f"{words[0]} ended with status {status}: {told} ({log})")


# ------------------------------------------------------------------------------------------------------ the results


def log_of(folder):
    return os.path.join(folder, "pretrain", "log.jsonl")


def curve(lines):
    return [line for line in lines if line["kind"] == "knn"]


def gather(args, scale):
    """Everything that was measured, as one JSON object; runs that are not finished are left out."""
    runs = []
    for method in NAMES:
        for seed in sorted(args.seeds):
            folder = os.path.join(args.out, f"{method}-{seed}")
            files = {name: os.path.join(folder, name, "result.json") for name in evaluations(scale)}
            if all(os.path.exists(path) for path in files.values()):
                runs.append({"method": method, "seed": seed, **measured(folder, files)})
    settings = {"all": scale.common, "pretraining": scale.pretrain}
    for method in dict.fromkeys(run["method"] for run in runs):
        if method != "random":
            settings[NAMES[method]] = " ".join(map(str, method_flags(scale, method)))
    settings["linear probe"] = scale.probe
    settings |= {f"fine-tuning on {percent} %": flags for percent, flags in scale.semi.items()}
    return origin(args) | {"settings": settings, "runs": runs}


def origin(args):
    """Scale, data, machine, versions and command of a measurement."""
    machine = {"processor": processor(), "cores": usable_cpus(), "runs at a time": args.jobs}
    if args.scale == "gpu" and torch.cuda.is_available():
        machine = {"gpu": torch.cuda.get_device_name()} | machine
    flags = [f"--scale {args.scale}"] * (args.scale != "gpu") + ["--choose"] * args.choose
    flags += [f"--dataset {args.dataset}"] * (args.dataset != "cifar10")
    flags += [f"--seeds {','.join(map(str, args.seeds))}"] * (args.seeds != [0, 1, 2] and not args.choose)
    command = " ".join(["python benchmarks/cifar10/study.py", *flags, "DATA"])
    versions = metrics.origin()["versions"]
    return {"scale": args.scale, "dataset": args.dataset, "machine": machine, "versions": versions, "command": command}


def processor():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def measured(folder, files):
    """The numbers of one finished run."""
    found = {}
    for name, path in files.items():
        with open(path) as file:
            found[name] = json.load(file)["last"]["top1"]  # of the last epoch: none is picked by its val accuracy
    if not os.path.exists(log_of(folder)):
        return found
    lines = metrics.read_log(log_of(folder))
    points, ends = curve(lines), {}
    for line in lines:
        if line["kind"] == "train":
            ends[line["epoch"]] = line  # each epoch's last
    found["knn"], found["knn_projection"] = points[-1]["top1"], points[-1]["top1_projection"]
    found["curve"] = [[line["epoch"], line["top1"], line["top1_projection"]] for line in points]
    found["hardness"] = [
        {"epoch": epoch + 1, "acc1": line["acc1"], "acc1_real": line["acc1_real"]}
        | {name: value for name, value in line.items() if name.startswith(("similarity/", "mass/"))}
        for epoch, line in ends.items()
    ]
    found["minutes"] = round((lines[-1]["time"] - lines[0]["time"]) / 60, 1)
    return found


def methods_of(content):
    return list(dict.fromkeys(run["method"] for run in content["runs"]))


def values(content, method, key):
    """One number, or list, of every seed of a method that has it."""
    return [run[key] for run in content["runs"] if run["method"] == method and key in run]


def markdown(rows):
    """A table of Markdown; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def table(content):
    """Mean and range over the seeds, in percent."""
    rows = [["", "seeds", *(title for _, title in MEASURES)]]
    for method in methods_of(content):
        numbers = [values(content, method, key) for key, _ in MEASURES]
        rows.append([NAMES[method], str(len(numbers[-1])), *map(cell, numbers)])
    return markdown(rows)


def cell(numbers):
    if not numbers:
        return ""
    spread = f" ({min(numbers):.2f} to {max(numbers):.2f})" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{spread}"


def verdicts(content):
    """For each method and measure, whether it differs from MoCo v2 by more than the seeds do."""
    rows = [["against MoCo v2", *(title for _, title in MEASURES)]]
    for method in methods_of(content):
        pairs = [(values(content, method, key), values(content, "mocov2", key)) for key, _ in MEASURES]
        if method not in ("mocov2", "random") and min(len(numbers) for pair in pairs for numbers in pair) > 1:
            rows.append([NAMES[method], *(verdict(*pair) for pair in pairs)])
    return markdown(rows) if len(rows) > 1 else ""


def verdict(ours, base):
    """The difference of two means, and whether the ranges overlap."""
    apart = min(ours) > max(base) or max(ours) < min(base)
    return f"{statistics.mean(ours) - statistics.mean(base):+.2f}, {'ranges apart' if apart else 'within the spread'}"


def hardness(content):
    """Mean similarity to the query and share of the softmax at the end, by method and kind, means over the seeds."""
    rows = [["", *KINDS]]
    for method in methods_of(content):
        ends = [lines[-1] for lines in values(content, method, "hardness")]
        for what, title, form in (
            ("similarity", "similarity to the query", "{:.3f}"),
            ("mass", "share of the softmax", "{:.1%}"),
        ):
            numbers = [[end[f"{what}/{kind}"] for end in ends if f"{what}/{kind}" in end] for kind in KINDS]
            if ends:
                cells = [form.format(statistics.mean(n)).replace("%", " %") if n else "" for n in numbers]
                rows.append([f"{NAMES[method]}, {title}", *cells])
    return markdown(rows)


def draw(path, content):
    """kNN accuracy of all methods and SynCo's hardness over the epochs, mean and range over the seeds, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        print("study.py: no figure without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), sharex=True, layout="constrained")
    for axis, column, title in zip(axes, (1, 2), ("backbone", "128-d projection")):
        for colour, method in zip(COLOURS, [m for m in methods_of(content) if m != "random"]):
            band(
                axis, [[(p[0], p[column]) for p in c] for c in values(content, method, "curve")], colour, NAMES[method]
            )
        if content["scale"] == "gpu" and column == 2:
            axis.plot(*zip(*PUBLISHED.items()), "k*", ms=9, ls="none", label="published, MoCo's demo")
        axis.set(title=f"kNN on the {title}", xlabel="epochs", ylabel="top-1 on val [%]")
    for colour, kind in zip(COLOURS, KINDS):
        name = f"similarity/{kind}"
        lines = values(content, "synco", "hardness")
        band(axes[2], [[(e["epoch"], e[name]) for e in line if name in e] for line in lines], colour, kind)
    axes[2].set(title="SynCo: similarity to the query", xlabel="epochs", ylabel="mean cosine")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with checkpoint.whole(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def band(axis, lines, colour, label):
    """Mean and range of lines [(x, y), ...] over the same x."""
    lines = [line for line in lines if line]
    if lines:
        x, y = [point[0] for point in lines[0]], list(zip(*([value for _, value in line] for line in lines)))
        axis.plot(x, list(map(statistics.mean, y)), color=colour, label=label)
        axis.fill_between(
            x, [min(values) for values in y], [max(values) for values in y], color=colour, alpha=0.2, lw=0
        )


# ------------------------------------------------------------------------------------------------------ README.md

HEAD = """# CIFAR-10: what does each method learn?

MoCo v2, MoCHi and SynCo under equal budgets, each over several seeds, and the same network without pretraining. This
file is written by `study.py` from its results. Numbers are top-1 in percent on the 10,000 validation images after
the last epoch: mean over the seeds (lowest to highest); no epoch was picked by its accuracy. kNN: k = 200, weighted
with temperature 0.1, on the backbone's features and on the 128-d projection. A difference is "within the spread"
unless the lowest of one method is above the highest of the other; with three seeds each, two methods that are equal
come out as "ranges apart" in one of ten comparisons."""


def readme():
    """README.md from the results of both scales, as far as there are any."""
    titles = {"gpu": "On a GPU, 200 epochs", "cpu": "On a CPU, a small version"}
    return "\n\n".join([HEAD, *(f"## {titles[scale]}\n\n{section(scale)}" for scale in SCALES)]) + "\n"


def section(scale):
    """What README.md says of one scale."""
    found, choice = (read(f"{scale}.json"), read(f"{scale}-choice.json"))
    parts = []
    if found:
        shown = {f"Ran on a {'GPU' if 'gpu' in found['machine'] else 'CPU'}": ", ".join(words(found["machine"]))}
        shown["Versions"] = ", ".join(words(found["versions"]))
        shown["Images"] = (
            "CIFAR-10" if found["dataset"] == "cifar10" else "CIFAR-10, re-encoded as files (lossy: not the original)"
        )
        minutes = [run["minutes"] for run in found["runs"] if "minutes" in run]
        shown["A pretraining took"] = f"{statistics.median(minutes):.1f} minutes in the median"
        parts += [
            f"```\n{found['command']}\n```",
            table(found),
            verdicts(found),
            f"![kNN accuracy and hardness over the epochs]({scale}.png)",
            "How hard the negatives are at the end, means over the seeds (the hardest are part of the queue):",
            hardness(found),
            "\n".join(f"- {name}: {value}." for name, value in shown.items()),
            "Settings:\n\n```\n" + "\n".join(f"{name}: {value}" for name, value in found["settings"].items()) + "\n```",
        ]
    else:
        flags = "" if scale == "gpu" else f"--scale {scale} "
        parts += ["Not measured. The command:", f"```\npython benchmarks/cifar10/study.py {flags}DATA\n```"]
    if scale == "gpu":
        told = ", ".join(f"{accuracy} % after {epochs} epochs" for epochs, accuracy in PUBLISHED.items())
        parts.append(f"MoCo's own demo of this recipe publishes, kNN on the projection: {told} (of 200).")
        if found:
            parts.append(markdown(beside_published(found)))
    parts.append(SCALES[scale].why)
    if choice:
        rows = [[c["name"], f"{c['knn']:.2f}", f"{c['knn_projection']:.2f}"] for c in choice["candidates"]]
        parts.append(
            f"Candidates, kNN on {SCALES[scale].hold_out} training images that were held out, one seed:\n\n"
            f"```\n{choice['command']}\n```"
        )
        parts.append(markdown([["", "backbone", "projection"], *rows]))
    return "\n\n".join(part for part in parts if part)


def beside_published(content):
    """MoCo v2's accuracies at the published epochs."""
    rows = [["kNN on the projection", *(f"{epochs} epochs" for epochs in PUBLISHED)]]
    rows.append(["published", *(f"{accuracy:.1f}" for accuracy in PUBLISHED.values())])
    curves = [{epoch: projection for epoch, _, projection in line} for line in values(content, "mocov2", "curve")]
    rows.append(["here", *(cell([c[epochs] for c in curves if epochs in c]) for epochs in PUBLISHED)])
    return rows


def words(machine):
    return [f"{name} {value}" if name not in ("processor", "gpu") else value for name, value in machine.items()]


def read(name):
    """A result beside this file; None where there is none."""
    try:
        with open(os.path.join(HERE, name)) as file:
            return json.load(file)
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main()
