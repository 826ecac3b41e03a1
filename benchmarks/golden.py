#!/usr/bin/env python3
"""How small runs of the programs end, bit for bit: a record of it, and the comparison of other code with the record.

  python benchmarks/golden.py record FOLDER                # with the code that is right
  python benchmarks/golden.py check FOLDER --root OTHER    # the code of another working tree (unset: this one's)

It knows the programs by their command lines and files alone. The runs with --resume auto are done four times:
undisturbed; +signal: told to stop in their second epoch, and resumed; +within, +epoch: resumed from what the record
keeps of a run that was stopped so, within an epoch and at its end. All must end as the record's undisturbed run did:
the same tensors, optimiser states, logs, results, names of files and exit status, else the status is 1. Differences in
"text", what is printed and the stored settings, are told, and count with --text only. It holds for one machine.
"""

import argparse
import difflib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

COMMON = "-a shufflenet_v2_x0_5 --img-size 32 -j 0 --seed 3 -p 3 --save-dir run data"
PRETRAIN = f"main_synco.py {COMMON} -b 16 --epochs 2 --warmup-epochs 1 --moco-k 64 --moco-dim 16 --n-hard 16 --n1 4 "
PRETRAIN += "--n2 3 --n3 2 --n4 2 --n5 2 --n6 1"
STEPS = PRETRAIN.replace("--epochs 2", "--steps 12")
PROBE = f"main_lincls.py {COMMON} --pretrained kept/v2/checkpoint_0000.pth.tar -b 16 --epochs 2 --lr 1 --schedule 1"
TUNING = f"main_semisup.py {COMMON} --pretrained kept/v2/checkpoint_0000.pth.tar -b 4 --epochs 3 --lr-classifier 0.02"
PERCENT10 = f"{TUNING} --weights finetune --lr-backbone 0.002 --train-percent 10"
STOPPED = "--resume auto --save-steps 2"
RUNS = {
    "v2": f"{PRETRAIN} --mlp --moco-t 0.2 --aug-plus --cos -j 1 {STOPPED}",
    "v1": f"{PRETRAIN} --warmup-epochs 0 --cooldown-epochs 1 --schedule 1 --save-freq 2",
    "moco": f"{PRETRAIN} --n1 0 --n2 0 --n3 0 --n4 0 --n5 0 --n6 0 --mlp --aug-plus --cos",
    "symmetric": f"{PRETRAIN} --symmetric --mask-same-image --mlp --aug-plus {STOPPED}",
    "adamw": f"{PRETRAIN} --optimizer adamw --clip-grad 1 --lr 0.01 --lr-warmup-epochs 1 --cos --lr-min 1e-5 {STOPPED}",
    "steps": f"{STEPS} --warmup-epochs 0,2s,0.5,4s,5s,1 --lr-warmup-epochs 3s --lr-warmup 0.01 --cos {STOPPED}",
    "bf16": f"{PRETRAIN} --amp bf16 --channels-last --mlp",
    "device": f"{PRETRAIN} --augment-on device --aug-plus",
    "bn-splits": f"{PRETRAIN} --bn-splits 2",
    "knn": f"{PRETRAIN} --knn-freq 1 --knn-k 5 --knn-train --save-best --keep 1 {STOPPED}",
    "heavy": f"{PRETRAIN} -a mobilenet_v3_small --aug-heavy --blur --crop-scale 0.3,0.9 --epochs 1 --warmup-epochs 0",
    "stem": f"{PRETRAIN} -a resnet18 --stem cifar --img-size 16 -b 40 --epochs 1 --warmup-epochs 0",
    "bad-image": f"{PRETRAIN} --skip-bad-images 2 {STOPPED}".replace(" data ", " damaged "),
    "two": f"{PRETRAIN} --multiprocessing-distributed --nproc-per-node 2 --knn-freq 1 --knn-k 5 --knn-train {STOPPED}",
    "probe": f"{PROBE} {STOPPED}",
    "probe-random": f"{PROBE} --pretrained random --epochs 3 --cos --lr-min 0.1 --val-freq 2 --save-confusion",
    "tuning": f"{PERCENT10} {STOPPED}",
    "tuning-two": f"-m torch.distributed.run --standalone --nproc-per-node 2 {PERCENT10}",
    "freeze": f"{TUNING} -b 16 --hold-out 30 --write-subset subset.txt",
    "evaluate": f"main_lincls.py {COMMON} -b 16 -e --resume kept/probe/checkpoint_lincls.pth.tar --eval-train",
    "export": "-m synco.export kept/v2/checkpoint_0000.pth.tar exported.pth",
    "knn-tool": "-m synco.knn kept/v2/checkpoint_0000.pth.tar data -j 0 -k 5",
}
UNEQUAL = {"time", "images_per_second", "data_share", "command", "versions"}  # keys in files, other each time
MASKED = re.compile(r"\d+(?= images/s)|(?<=data )[ \d]*\d%|(?<=ETA )(\d+ d )?[\d:]+")


def make_images(data):
    """DATA of six classes, 20 images each to train, 5 to validate: blocks of colour, of which half is the class's."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 256, (6, 5, 6, 3))
    for split, count in (("train", 20), ("val", 5)):
        for c, own in enumerate(classes):
            (data / split / f"c{c}").mkdir(parents=True)
            for i in range(count):
                pixels = ((own + rng.integers(0, 256, own.shape)) // 2).astype(np.uint8).repeat(8, axis=0)
                Image.fromarray(pixels.repeat(8, axis=1)).save(data / split / f"c{c}" / f"{i}.png")


def run(words, place, root, stop=None):
    """Run a command in the folder `place` → exit status. stop: the signal to send within its second epoch."""
    words = [sys.executable, *(str(root / word) if word.startswith("main_") else word for word in words.split())]
    env = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
    env |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(root), XDG_CACHE_HOME=f"{place}.cache")
    with open(f"{place}.stdout", "w") as out, open(f"{place}.stderr", "w") as err:
        process = subprocess.Popen(words, cwd=place, env=env, stdout=out, stderr=err, start_new_session=True)
    until = time.monotonic() + 600
    while process.poll() is None:
        time.sleep(0.01)
        within = stop and list((place / "run").glob("*_step.pth.tar"))
        if within and re.search('"train".*"epoch": 1', (place / "run" / "log.jsonl").read_text()):
            os.killpg(process.pid, stop)
            stop = None
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def perform(job, record, scratch, root):
    """Do one of RUNS, or a variant of it such as v2+epoch, in a new folder → what `observe` finds."""
    (name, _, variant), place, kept, status = job.partition("+"), scratch / job, record / "checkpoints", 75
    place.mkdir()
    for link, to in (("data", scratch / "data"), ("damaged", scratch / "damaged"), ("kept", kept)):
        (place / link).symlink_to(to)
    if variant in ("within", "epoch"):
        left_out = ("*_step.pth.tar", "preempted.json") if variant == "epoch" else ()
        shutil.copytree(kept / name, place / "run", ignore=shutil.ignore_patterns(*left_out))
    if variant == "signal":
        status = run(RUNS[name], place, root, stop=(signal.SIGTERM, signal.SIGUSR1)[len(name) % 2])
        if not (kept / name).exists():
            shutil.copytree(place / "run", kept / name)
    status = run(RUNS[name], place, root) if status == 75 else f"{status} when told to stop"
    found = observe(place, root, status)
    found["text"] *= variant != "signal"  # where it was stopped is chance
    shutil.rmtree(place)
    return found


def observe(place, root, status):
    """What a run has left: {"numbers": {where: what, as a string}, "text": lines}."""
    numbers = {"exit status": str(status)}
    text = [f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"]
    for stream in ("stdout", "stderr"):
        printed = pathlib.Path(f"{place}.{stream}").read_text().replace(str(root), "ROOT").replace(str(place), "PLACE")
        text += [f"{stream}: {line}" for line in MASKED.sub("*", printed).splitlines()]
        numbers |= {f"kNN: {x}": "" for x in re.findall(r"^kNN \(.* images: (\S+ %)$", printed, re.M)}
    for path in sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink()):
        name, kind, content = re.sub(r"tfevents\..*", "tfevents", str(path.relative_to(place))), path.suffix, []
        if kind in (".tar", ".pth"):
            content = torch.load(path, weights_only=True)
        elif kind in (".json", ".jsonl", ".csv", ".txt"):
            lines = [path.read_text()] if kind == ".json" else path.read_text().splitlines()
            content = [json.loads(line) if "json" in kind else line for line in lines]
        numbers[name] = "written"
        for key, value in flat(content):
            if key.startswith("config.") or path.name == "config.json":
                text.append(f"{name} {key}: {value}")
            else:
                numbers[f"{name} {key}"] = value
    return {"numbers": numbers, "text": text}


def flat(content, where=""):
    """[(path, value as a string)] of nested dicts and lists; of a tensor its type, shape and SHA-256."""
    if isinstance(content, torch.Tensor):
        data = content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [(where, f"{content.dtype} {list(content.shape)} {hashlib.sha256(data).hexdigest()}")]
    if not isinstance(content, (dict, list, tuple)) or not content:
        return [(where, repr(content))]
    items = sorted((str(k), v) for k, v in content.items()) if isinstance(content, dict) else enumerate(content)
    return [pair for k, v in items if k not in UNEQUAL for pair in flat(v, f"{where}.{k}".lstrip("."))]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("action", choices=("record", "check"))
    flag("folder", type=pathlib.Path, help="of the record")
    flag("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"of {', '.join(RUNS)}")
    flag("--root", type=pathlib.Path, default=pathlib.Path(__file__).parents[1], help="the programs' (unset: this one)")
    flag("--text", action="store_true", help="what is printed and stored as settings must be equal, too")
    args = parser.parse_args(argv)
    record, root, recording = args.folder.resolve(), args.root.resolve(), args.action == "record"
    (record / "checkpoints").mkdir(parents=True, exist_ok=not recording)
    known = None if recording else json.loads((record / "record.json").read_text())
    ends = ("", "+signal", "+within", "+epoch")
    jobs = [name + end for name in args.only or RUNS for end in ends if not end or RUNS[name].endswith(STOPPED)]
    found, began = {}, time.monotonic()
    with TemporaryDirectory(prefix="golden-") as scratch, ThreadPoolExecutor(2) as pool:
        scratch = pathlib.Path(scratch)
        make_images(scratch / "data")
        shutil.copytree(scratch / "data", scratch / "damaged")
        (scratch / "damaged" / "train" / "c2" / "3.png").write_bytes(b"no image")
        for end in ("v2+signal", "+signal", ""):  # in this order, as others begin with what the record keeps of these
            stage = [job for job in jobs if job.endswith(end) and job not in found]
            found |= zip(stage, pool.map(lambda job: perform(job, record, scratch, root), stage))
    if recording:
        (record / "record.json").write_text(json.dumps(found, indent=0))
    known, texts, wrong = known or found, {}, 0
    for job, now in found.items():
        before, after = known[job.partition("+")[0]]["numbers"], now["numbers"]
        places = [place for place in before | after if before.get(place) != after.get(place)]
        differ = [f"{place}: {before.get(place)} → {after.get(place)}" for place in places]
        differ += now["text"][-3:] * (after["exit status"] != "0")
        wrong += len(differ)
        lines = [f"{job:20} {len(differ) or 'no'} of {len(before | after)} numbers differ", *differ[:20]]
        print("\n    ".join(lines), flush=True)
        for line in difflib.unified_diff(known[job]["text"], now["text"], n=0, lineterm=""):
            if not line.startswith(("---", "+++", "@@")):
                texts.setdefault(line, []).append(job)
    print(f"text: {len(texts) or 'no'} lines differ (-: the record's, +: now)")
    for line, names in texts.items():
        print(f"    {line}    [{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}]")
    print(f"{len(found)} runs in {time.monotonic() - began:.0f} s: {wrong or 'no'} differences in numbers")
    return 1 if wrong or args.text and texts else 0


if __name__ == "__main__":
    sys.exit(main())
