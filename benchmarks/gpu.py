#!/usr/bin/env python3
"""What a GPU makes of this repository: the checks of tests/gpu, then the measurements, together in under 10 minutes.

  benchmarks/gpu.sh [FOLDER]                       # FOLDER/CLASS/IMAGE: JPEG files to read; unset: made ones
  benchmarks/gpu.sh [FOLDER] --only "step"         # parts of it again, or what there was no time for
  python benchmarks/gpu.py --dry --out FOLDER      # all of it tiny, on the CPU: whether the chain holds
  python benchmarks/gpu.py --tables                # README.md's tables for GPUs, from the files that are there

Each part is a program with a time limit of its own, and has a line of the table; one that fails ends no other, and
then the status is 1. All results go into gpu-NAME.json, of the GPU's name, beside this file or in --out; a later call
replaces those of its parts. Further flags of step.py in STEP, of the pretraining in PRETRAIN: STEP="--bn-splits 8".
"""

import contextlib
import glob
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from synco import files, metrics  # noqa: E402
from synco.distributed import usable_cpus  # noqa: E402
from synco.errors import Failure, UserError  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.options import Parser  # noqa: E402

TOTAL = 590  # seconds of all parts together
PRETRAIN = "main_synco.py --mlp --moco-t 0.2 --aug-plus --cos --augment-on device --warmup-epochs 0 --save-dir RUN/run"
PARTS = {  # name: (seconds at most, command on a GPU, with --dry)
    "checks": (300, "-m pytest tests/gpu --junitxml RUN/checks.xml", "--dry -k mining_is_topk"),
    "head, 32 queries": (40, "benchmarks/head.py -n 32 --json", "-n 2 -k 1024 --repeat 1"),
    "head, 256 queries": (40, "benchmarks/head.py -n 256 --json", "-n 4 -k 1024 --repeat 1"),
    "step": (90, "benchmarks/step.py --json STEP", "TINY"),
    "step float32": (90, "benchmarks/step.py --amp off --no-channels-last --tf32 --json STEP", "TINY"),
    "step, 32 images": (60, "benchmarks/step.py -b 32 --json STEP", "TINY"),
    "input": (60, "benchmarks/input.py IMAGES --images 512 --batch 256 --json", "--images 4 --batch 2 --img-size 16"),
    "program": (120, f"{PRETRAIN} -a resnet50 -b 256 --amp bf16 --channels-last --steps 70 PRETRAIN RUN/data",
                "-a shufflenet_v2_x0_5 -b 4 --amp off --img-size 32 --moco-k 1024 --steps 12 -j 0"),
    "step compiled": (150, "benchmarks/step.py --compile --json STEP", "TINY"),
}  # fmt: skip
TINY = "-a shufflenet_v2_x0_5 -b 4 --amp off --img-size 32 --moco-k 1024 --repeat 1"
# what is to be reached on an H100 or H200: (what, bound, its sign, the value in the results of the parts)
WANTED = (
    ("SynCo's step, of MoCo v2's", 1.02, "≤", lambda r: r["step"]["SynCo"]["of_moco"]),
    ("faster than the textbook's float32 step", 3, "≥", lambda r: 1 / r["step"]["SynCo"]["of_textbook"]),
    ("images/s from memory", 2000, "≥", lambda r: r["step"]["SynCo"]["images_per_second"]),
    ("images/s from memory, compiled", 3000, "≥", lambda r: r["step compiled"]["SynCo"]["images_per_second"]),
    ("images/s from JPEG files, of those from memory", 0.9, "≥", lambda r: r["program"]["images_per_second"]
     / r["step"]["SynCo"]["images_per_second"]),
)  # fmt: skip


def parse():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("folder", nargs="?", metavar="FOLDER", help="FOLDER/CLASS/IMAGE (unset: 64 images of noise)")
    flag("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    flag("--out", default=HERE, metavar="FOLDER", help="where gpu-NAME.json and README.md are (unset: beside this)")
    flag("--dry", action="store_true", help="tiny, on the CPU; needs --out")
    flag("--tables", action="store_true", help="write the tables in README.md, and run nothing")
    args = parser.parse_args()
    if args.dry and args.out == HERE:
        raise UserError("--dry measures nothing that should stand here: give --out another folder")
    if not (args.dry or args.tables or torch.cuda.is_available()):
        raise UserError("torch finds no GPU on this machine; --dry tries the chain on the CPU")
    if args.folder is not None and not os.path.isdir(args.folder):
        raise UserError(f"{args.folder}: no such folder; it should hold CLASS/IMAGE")
    args.folder = args.folder and os.path.abspath(args.folder)
    return args


def make_images(folder, count, size=(500, 375)):
    """JPEG files of colour noise, coarse and fine, of the size of ImageNet's: FOLDER/noise/N.jpg."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "noise"))
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 12, (size[1], size[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, "noise", f"{i}.jpg"))


def repeat_images(source, folder, count):
    """FOLDER/train/CLASS with `count` links to the files in SOURCE/CLASS, each as often as it takes."""
    found = [path for path in glob.glob(os.path.join(glob.escape(source), "*", "*")) if os.path.isfile(path)]
    if not found:
        raise UserError(f"{source}: holds no CLASS/IMAGE")
    for i in range(count):
        path = found[i % len(found)]
        place = os.path.join(folder, "train", os.path.basename(os.path.dirname(path)))
        os.makedirs(place, exist_ok=True)
        os.symlink(os.path.abspath(path), os.path.join(place, f"{i // len(found)}-{os.path.basename(path)}"))


def words_of(name, args, run):
    """A part's command."""
    _, text, tiny = PARTS[name]
    if args.dry:
        text = text.replace(" --compile", "")
        first, sep, last = text.rpartition(" PRETRAIN")
        text = f"{first} {tiny}{sep}{last}" if sep else f"{text} {tiny}"
    text = re.sub(r"\b(STEP|PRETRAIN)\b", lambda found: os.environ.get(found[0], ""), text.replace("TINY", TINY))
    source = args.folder or os.path.join(run, "made")
    return [sys.executable, *(word.replace("RUN/", f"{run}/").replace("IMAGES", source) for word in shlex.split(text))]


def perform(name, args, run, seconds):
    """Run a part → its results. Raises Failure with the reason why there are none."""
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.dry else {})}
    process = subprocess.Popen(
        words_of(name, args, run), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failure(f"not done after {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # and with it what it has started
            os.killpg(process.pid, signal.SIGKILL)
    if name == "checks" and process.returncode in (0, 1):  # 1: some failed
        return read_checks(os.path.join(run, "checks.xml"))
    if process.returncode:
        last = (err.strip() or out.strip() or "nothing was printed").splitlines()[-1]
        raise Failure(f"status {process.returncode}: {last}")
    if name == "program":
        lines = metrics.read_log(os.path.join(run, "run", "log.jsonl"))[1:]  # the first has cuDNN's search in it
        return {key: statistics.median(line[key] for line in lines) for key in ("images_per_second", "data_share")}
    found = json.loads(out)
    return found.get("results", found)


def read_checks(path):
    """pytest's report → {"passed", "skipped", "failed": their names}."""
    cases = list(xml.etree.ElementTree.parse(path).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    failed = [case.get("name") for case, tags in zip(cases, kinds) if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in kinds)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}


def told(name, found):
    """A part's results in a line."""
    if name == "checks":
        names = f": {', '.join(found['failed'])}" if found["failed"] else ""
        return f"{found['passed']} passed, {found['skipped']} skipped, {len(found['failed'])} failed{names}"
    if name == "program":
        return f"{found['images_per_second']:.0f} images/s, {found['data_share']:.0%} of the time waiting for images"
    if name == "input":
        cores = found["workers_images_per_second_and_core"]
        workers = f"{cores['cpu']:.0f} images/s and core by PIL, {cores['device']:.0f} with --augment-on device"
        return f"{workers}; the device's half {found['device_views_per_second']:.0f} views/s"
    texts = []
    for version, numbers in found.items():
        text = f"{numbers['ms']:.2f} ms" if "ms" in numbers else f"out of memory ({numbers['out_of_memory']})"
        text += f", {numbers['images_per_second']:.0f} images/s" if "images_per_second" in numbers else ""
        text += f", {numbers['peak_mib']:.0f} MiB" if "peak_mib" in numbers else ""
        texts.append(f"{version} {text}")
    return "; ".join(texts)


def judged(results):
    """[(what is wanted, its bound in words, the value, whether it is reached)], as far as it was measured."""
    lines = []
    for what, bound, sign, value_of in WANTED:
        with contextlib.suppress(KeyError, TypeError):
            value = value_of(results)
            lines.append((what, f"{sign} {bound:,}", value, value <= bound if sign == "≤" else value >= bound))
    return lines


def table(record):
    """A GPU's part of README.md."""
    facts = [record["machine"], *(f"{name} {version}" for name, version in record["versions"].items())]
    lines = [", ".join(facts) + ".", "", "| part | result | s |", "| --- | --- | --- |"]
    for name, part in record["parts"].items():
        text = told(name, part["result"]) if "result" in part else part["failed"]
        lines.append(f"| {name} | {text} | {part['seconds']:.0f} |")
    results = {name: part["result"] for name, part in record["parts"].items() if "result" in part}
    if verdicts := judged(results):
        lines += ["", "| wanted of an H100 or H200 | | found | |", "| --- | --- | --- | --- |"]
    for what, bound, value, reached in verdicts:
        lines.append(f"| {what} | {bound} | {value:,.3f} | {'reached' if reached else 'not reached'} |")
    return "\n".join(lines)


def write_tables(folder):
    """README.md's part between the two marks, from every gpu-*.json in the folder. Raises UserError without marks."""
    path, begin, end = os.path.join(folder, "README.md"), "<!-- gpu.py --tables -->\n", "<!-- end -->"
    with open(path) as file:
        text = file.read()
    before, mark, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (mark and last):
        raise UserError(f"{path}: lacks the lines {begin.strip()} and {end} between which the tables stand")
    records = [files.read_json(name) for name in sorted(glob.glob(os.path.join(glob.escape(folder), "gpu-*.json")))]
    made = "\n\n".join(map(table, records)) or "Not measured: no machine with a GPU was at hand."
    with files.atomic_write(path) as file:
        file.write(f"{before}{begin}{made}\n{end}{after}".encode())


def main(args):
    if args.tables:
        return write_tables(args.out)
    gpu = "dry run, no GPU" if args.dry else torch.cuda.get_device_name()
    path = os.path.join(args.out, f"gpu-{'dry' if args.dry else re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.json")
    record = files.read_json(path) or {"parts": {}}
    record |= {"machine": f"{gpu}, {usable_cpus()} CPUs", "versions": metrics.origin()["versions"]}
    record |= {"torch_cuda": torch.version.cuda, "images": args.folder or "64 JPEG files of noise"}
    print(f"{record['machine']}, torch {torch.__version__}\n{'part':20}{'s':>5}  result", flush=True)
    began = time.monotonic()
    with TemporaryDirectory(prefix="gpu-") as run:
        if not args.folder:
            make_images(os.path.join(run, "made"), 4 if args.dry else 64)
        repeat_images(args.folder or os.path.join(run, "made"), os.path.join(run, "data"), 48 if args.dry else 18_000)
        for name in args.only:
            started, part = time.monotonic(), {"command": PARTS[name][1]}
            left = TOTAL - (started - began)
            try:
                if left < 20:
                    raise Failure(f'left out, no time: benchmarks/gpu.sh --only "{name}"')
                part["result"] = perform(name, args, run, min(PARTS[name][0], left))
            except Failure as error:
                part["failed"] = str(error)
            part["seconds"] = time.monotonic() - started
            record["parts"][name] = part
            files.write_json(path, record)
            text = told(name, part["result"]) if "result" in part else part["failed"]
            print(f"{name:20}{part['seconds']:5.0f}  {text}", flush=True)
    results = {name: part["result"] for name, part in record["parts"].items() if "result" in part}
    for what, bound, value, reached in () if args.dry else judged(results):
        print(f"{'' if reached else 'not '}reached: {what} {bound}: {value:,.3f}")
    print(path)
    bad = [name for name in args.only if "result" not in record["parts"][name]]
    if bad or results.get("checks", {}).get("failed"):
        raise Failure(f"failed: {', '.join(bad) or 'checks'}")


if __name__ == "__main__":
    command(main, parse)
