#!/usr/bin/env python3
"""MoCo v2, MoCHi, SynCo, its six types and a control on CIFAR-10 under equal budgets: what does each learn?

  python benchmarks/cifar10/study.py DATA                  # on a GPU: the recipe of MoCo's own demo, 200 epochs
  python benchmarks/cifar10/study.py --scale small DATA    # a very small version, for two CPU cores

DATA is where torchvision keeps CIFAR-10, which is downloaded there if it is not; with --dataset imagefolder a folder
train/CLASS/IMAGE, val/CLASS/IMAGE. Each method and seed is a pretraining with main_synco.py, then the evaluations that
the scale has, from its last checkpoint. The same command goes on after an interruption; in pieces of ten minutes:

  until python benchmarks/cifar10/study.py --minutes 10 DATA; do [ $? = 75 ] || break; done

Runs are kept below --out. Results, figure and README.md are written beside this file; the figure needs matplotlib.
"""

import argparse
import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass

import torch

HERE = os.path.dirname(os.path.abspath(__file__))  # of results, figure and README.md
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from benchmarks.cifar10 import report, results  # noqa: E402
from benchmarks.cifar10.programs import ROOT, Ended, Programs, TimeOver  # noqa: E402
from synco import datasets, distributed, files, methods, metrics  # noqa: E402
from synco.distributed import usable_cpus  # noqa: E402
from synco.errors import PREEMPTED, UserError  # noqa: E402
from synco.files import read_json  # noqa: E402
from synco.negatives import TYPES  # noqa: E402
from synco.options import LONGEST, number  # noqa: E402


@dataclass(frozen=True)
class Scale:
    """Flags of the programs, but for method, seed and folders."""

    common: str  # of all programs
    pretrain: str
    evaluations: dict  # {name: program and flags}

    def number(self, flag):
        """Of a flag of the pretraining."""
        words = self.pretrain.split()
        return int(words[words.index(flag) + 1])


def fine_tuning(percent, flags):
    return f"main_semisup.py --train-percent {percent} --weights finetune --lr-backbone 0.02 {flags}"


SCALES = {
    "gpu": Scale(
        common="-a resnet18 --stem cifar --img-size 32 --stats cifar10 --amp bf16 --channels-last --cache-images "
        "--save-minutes 1",
        pretrain="--epochs 200 -b 512 --lr 0.06 --wd 5e-4 --cos --bn-splits 8 --moco-k 4096 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 10 --knn-freq 10 --save-freq 10 --keep 1",
        evaluations={
            "probe": "main_lincls.py --epochs 50 -b 512 --lr 0.03 --schedule 30 40 --val-freq 10",
            "semi1": fine_tuning(1, "--epochs 60 -b 128 --lr-classifier 0.02 --val-freq 20"),
            "semi10": fine_tuning(10, "--epochs 60 -b 128 --lr-classifier 0.02 --val-freq 20"),
        },
    ),
    "cpu": Scale(
        common="-a resnet18 --img-size 32 --stats cifar10 --limit-images 10000 --cache-images -j 0",
        pretrain="--epochs 25 -b 128 --lr 0.03 --wd 5e-4 --cos --bn-splits 2 --moco-k 512 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 5 --knn-freq 5 --keep 1",
        evaluations={
            "probe": "main_lincls.py --epochs 10 -b 128 --lr 0.01 --schedule 6 8 --val-freq 0",
            "semi1": fine_tuning(1, "--epochs 30 -b 25 --lr-classifier 0.01 --val-freq 0"),
            "semi10": fine_tuning(10, "--epochs 20 -b 64 --lr-classifier 0.01 --val-freq 0"),
        },
    ),
    "small": Scale(
        common="-a timm:test_resnet --img-size 32 --stats cifar10 --limit-images 2560 --cache-images -j 0",
        pretrain="--epochs 5 -b 64 --lr 0.03 --wd 5e-4 --cos --bn-splits 2 --moco-k 512 --moco-m 0.99 --moco-t 0.1 "
        "--aug-plus --crop-scale 0.08,1 --augment-on device --warmup-epochs 1 --knn-freq 5 --save-freq 5 "
        "--save-minutes 2 --keep 1",
        evaluations={},
    ),
}
METHODS = ("random", "mocov2", "copied", "mochi", "synco", *(f"{name}-alone" for name in TYPES))


def main():
    args = parse()
    scale, programs = SCALES[args.scale], Programs(args.jobs, on_cpu=args.scale != "gpu")
    try:
        if not args.report_only:
            prepare(args)
            tasks = [(method, seed) for seed in args.seeds for method in args.methods]
            programs.all(lambda method, seed: run(args, scale, programs, method, seed), tasks, args.minutes)
        found = results.gather(args.out, METHODS, scale.evaluations)
        found = {"command": command(args, found)} | found
        report.draw(os.path.join(HERE, f"{args.scale}.png"), found)
        files.write_json(os.path.join(HERE, f"{args.scale}.json"), found)
        print(report.accuracies(found), report.differences(found), sep="\n\n")
        report.write(HERE)
    except TimeOver as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(PREEMPTED)
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
    flag("--seeds", type=seeds, default=[0, 1, 2, 3, 4], help="of the runs (default: 0,1,2,3,4)")
    flag("--methods", type=names, default=METHODS, help=f"of {','.join(METHODS)} (default: all)")
    flag("--jobs", type=int, help="runs at the same time, which share the GPU, too; how many are fastest there is not "
         "measured (default: 1, and on a CPU as many as it has cores)")  # fmt: skip
    flag("--minutes", type=number(float, high=LONGEST, above=0), help="end after that many: the runs save and stop, "
         "which takes some seconds more, the status is 75, and the same command goes on (default: none)")  # fmt: skip
    flag("--out", metavar="FOLDER", help="folder for the runs (default: runs/cifar10-SCALE)")
    flag("--report-only", action="store_true", help="start nothing; write up the runs that are finished")
    args = parser.parse_args()
    if args.scale == "gpu" and not torch.cuda.is_available() and not args.report_only:
        parser.error("--scale gpu needs a GPU, and there is none here; --scale small is a version without")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    if not os.path.isdir(args.data) and args.dataset == "imagefolder" and not args.report_only:
        parser.error(f"{args.data}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs matplotlib: pip install matplotlib")
    if not os.access(HERE, os.W_OK):
        parser.error(f"{HERE}: cannot be written, and the results belong there")
    args.jobs = args.jobs or (min(usable_cpus(), len(args.methods) * len(args.seeds)) if args.scale != "gpu" else 1)
    args.out = os.path.abspath(args.out or os.path.join(ROOT, "runs", f"cifar10-{args.scale}"))
    return args


def command(args, found):
    """What to type for these results."""
    ran = [method for method in METHODS if any(run["method"] == method for run in found["runs"])]
    numbers = sorted({run["seed"] for run in found["runs"]})
    flags = [f"--scale {args.scale}"] + [f"--methods {','.join(ran)}"] * (ran != list(METHODS))
    flags += [f"--seeds {','.join(map(str, numbers))}"] * (numbers != [0, 1, 2, 3, 4])
    flags += [f"--dataset {found['dataset']}"] * (found["dataset"] != "cifar10")
    return " ".join(["python benchmarks/cifar10/study.py", *flags, "DATA"])


def seeds(text):
    """An argparse type: numbers with commas."""
    found = text.split(",")
    if not all(part.isdecimal() for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers >= 0 with commas, such as 0,1,2")
    return list(dict.fromkeys(map(int, found)))


def names(text):
    """An argparse type: names of methods with commas."""
    unknown = [name for name in text.split(",") if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METHODS)}")
    return [name for name in METHODS if name in text.split(",")]


def prepare(args):
    """Fetch the images, and keep beside the runs what they are made with. Raises Ended if that was something else."""
    if args.dataset == "cifar10":  # before several programs do so at once
        fetching = argparse.Namespace(dataset="cifar10", download=True, data=args.data)
        datasets.fetch(fetching, distributed.Process())
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "study.json")
    before, now = read_json(path), {"dataset": args.dataset, "settings": asdict(SCALES[args.scale])}
    changed = [name for name in now if before and before.get(name) != now[name]]
    if changed:
        raise Ended(f"--out {args.out}: holds runs with other settings ({', '.join(changed)}); give another")
    machines = before.get("machines", [])
    if machine(args) not in machines:
        files.write_json(path, now | {"machines": [*machines, machine(args)]})


def machine(args):
    """What the runs take place on, in words."""
    names = [f"GPU {torch.cuda.get_device_name()}"] if args.scale == "gpu" else []
    try:
        with open("/proc/cpuinfo") as file:
            names += [next(line.split(":")[1].strip() for line in file if line.startswith("model name"))]
    except (OSError, StopIteration):
        names += [platform.processor() or "unknown processor"]
    versions = [f"{name} {version}" for name, version in metrics.origin()["versions"].items()]
    several = f"{args.jobs} run{'s' * (args.jobs > 1)} at a time"
    return ", ".join([*names, f"{usable_cpus()} cores", *versions, several])


def run(args, scale, programs, method, seed):
    """Pretraining and evaluations of one method and seed, as far as they are not done."""
    folder = os.path.join(args.out, f"{method}-{seed}")
    common = [*scale.common.split(), "--seed", seed, "--resume", "auto", "--dataset", args.dataset, args.data]
    if "-j" not in common:
        common = ["-j", programs.cores, *common]
    weights, save_dir = "random", os.path.join(folder, "pretrain")
    if method != "random":
        if not results.pretrained(folder):
            words = [*common, *scale.pretrain.split(), *method_flags(scale, method), "--save-dir", save_dir]
            programs.start(["main_synco.py", *words], os.path.join(folder, "pretrain.txt"))
        weights = os.path.join(save_dir, f"checkpoint_{scale.number('--epochs') - 1:04d}.pth.tar")
    for name, words in scale.evaluations.items():
        if not os.path.exists(os.path.join(folder, name, "result.json")):
            words = [*words.split(), *common, "--pretrained", weights, "--save-dir", os.path.join(folder, name)]
            programs.start(words, os.path.join(folder, f"{name}.txt"))
    print(f"{report.name_of(method)}, seed {seed}: done", flush=True)


def method_flags(scale, method):
    """A type alone gets as many negatives as all six together, and as the control."""
    if method in methods.COUNTS:
        return ["--method", method]
    number = 1 + TYPES.index(method.removesuffix("-alone"))
    return ["--method", "mocov2", f"--n{number}", methods.preset("copied", scale.number("--moco-k"))["n_copied"]]


if __name__ == "__main__":
    main()
