"""What the runs of a study have measured, as one JSON object."""

import os
import re
import statistics
import sys

from benchmarks.cifar10.programs import Ended
from synco import metrics
from synco.files import read_json


def gather(out, methods, evaluations):
    """Everything that was measured below the folder `out`; runs that are not finished are left out.

    Each run is {"method", "seed", "knn", "knn_projection", the evaluations' names: top-1 in percent}, a pretraining's
    further "minutes", "train_images", "curve" [[epochs, kNN of the backbone, of the projection]] and
    "negatives" [{"epoch", the log's numbers: mean over the epoch's lines}]. Raises Ended where no run is finished.
    """
    kept = read_json(os.path.join(out, "study.json"))
    runs, unfinished = [], []
    for method in methods:
        names = [name.removeprefix(f"{method}-") for name in (os.listdir(out) if kept else [])]
        for seed in sorted(int(name) for name in names if name.isdecimal()):
            folder = os.path.join(out, f"{method}-{seed}")
            found = evaluated(folder, evaluations)
            if found is not None and method != "random":
                found = pretrained(folder) and found | pretrained(folder)
            if found:
                runs.append({"method": method, "seed": seed} | found)
            else:
                unfinished.append(folder)
    if unfinished:
        print(f"study.py: not finished, and left out: {', '.join(unfinished)}", file=sys.stderr)
    if not runs:
        raise Ended(f"no finished run below {out}")
    return kept | {"runs": [*untrained(runs), *(run for run in runs if run["method"] != "random")]}


def untrained(runs):
    """What every seed's network is before its first step, with the evaluations of random weights."""
    before = {run["seed"]: run["curve"][0][1:] for run in reversed(runs) if "curve" in run}
    others = {run["seed"]: run for run in runs if run["method"] == "random"}
    for seed in sorted(before | others):
        knn = dict(zip(("knn", "knn_projection"), before.get(seed, ())))
        yield {"method": "random", "seed": seed} | knn | others.get(seed, {})


def evaluated(folder, evaluations):
    """{name: top-1 after the last epoch, so that none is picked by it}; None where one is not finished."""
    results = {name: read_json(os.path.join(folder, name, "result.json")) for name in evaluations}
    return {name: result["last"]["top1"] for name, result in results.items()} if all(results.values()) else None


def pretrained(folder):
    """The numbers of a pretraining; {} where it is not finished."""
    log = os.path.join(folder, "pretrain", "log.jsonl")
    lines = metrics.read_log(log) if os.path.exists(log) else []
    config = read_json(os.path.join(folder, "pretrain", "config.json"))
    curve = [[line["epoch"], line["top1"], line["top1_projection"]] for line in lines if line["kind"] == "knn"]
    if not curve or curve[-1][0] != config["epochs"]:
        return {}
    negatives = []
    for epoch in sorted({line["epoch"] for line in lines if line["kind"] == "train"}):
        of_epoch = [line for line in lines if line["kind"] == "train" and line["epoch"] == epoch]
        names = [name for name in of_epoch[-1] if "/" in name or name.startswith("acc")]
        means = {name: round(statistics.mean(line[name] for line in of_epoch if name in line), 4) for name in names}
        negatives.append({"epoch": epoch + 1} | means)
    with open(os.path.join(folder, "pretrain.txt")) as file:
        seconds = sum(map(int, re.findall(r"^# (\d+) s,", file.read(), re.M)))
    return {
        "knn": curve[-1][1],
        "knn_projection": curve[-1][2],
        "minutes": round(seconds / 60, 2),
        "train_images": config["train_images"],
        "curve": curve,
        "negatives": negatives,
    }
