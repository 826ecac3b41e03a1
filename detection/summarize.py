#!/usr/bin/env python3
"""Mean ± standard deviation of the APs in detectron2's output folders, for boxes and, where there are any, masks.

  python summarize.py runs/voc_synco runs/voc_supervised

A folder is a run's OUTPUT_DIR, with its metrics.json, or holds several such runs. Runs whose folders differ only in a
number after "trial" at the end (runs/voc/trial1 ..., runs/voc_trial1 ...) are trials of one row; all others are rows of
their own. Of a run the last evaluation counts; a run without one is left out, and named below the table. ± is the
sample standard deviation (n − 1) and is left out for n = 1.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys

COLUMNS = {"bbox": ("AP50", "AP", "AP75"), "segm": ("AP50", "AP", "AP75")}
NAMES = {"bbox": "box", "segm": "mask"}


class Mistake(ValueError):
    """A mistake of the user's, reported as one line."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a run, or a folder of such folders")
    rows, notes = {}, []
    for folder in parser.parse_args().folders:
        for run in runs_in(folder):
            found, skipped = last_evaluation(run)
            if skipped:
                notes.append(f"{run}: passed over what is not JSON in metrics.json, {skipped} of its lines")
            if found is None:
                notes.append(f"{run}: left out: no line of metrics.json has bbox/AP, so it was not evaluated yet")
            else:
                rows.setdefault(row_of(run), {})[run] = found
    if not rows:
        raise Mistake("; ".join(notes))
    print_table({name: list(trials.values()) for name, trials in rows.items()})
    for name, trials in rows.items():
        iterations = {run: result["iteration"] for run, result in trials.items()}
        if len(set(iterations.values())) > 1:
            told = ", ".join(f"{os.path.basename(run)} {iteration}" for run, iteration in iterations.items())
            notes.append(f"{name}: the trials were evaluated at different iterations: {told}")
    for note in notes:
        print(f"note: {note}")


def runs_in(folder):
    """The folder itself if it is a run's, or the runs in it, trial2 before trial10. Raises Mistake if there is none."""
    folder = os.path.normpath(folder)
    if not os.path.isdir(folder):
        raise Mistake(f"{folder}: no such folder")
    if os.path.isfile(os.path.join(folder, "metrics.json")):
        return [folder]
    inside = [os.path.join(folder, name) for name in os.listdir(folder)]
    found = [run for run in inside if os.path.isfile(os.path.join(run, "metrics.json"))]
    if not found:
        raise Mistake(f"{folder}: holds no metrics.json, nor does a folder in it: not the output of a training")
    return sorted(found, key=lambda run: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", run)])


def row_of(run):
    """The row that a run belongs to: its path without the trial's number."""
    return re.sub(r"[/\\_.-]?trial[_-]?\d+$", "", run) or "trial"


def last_evaluation(run):
    """The last line of metrics.json that has APs → (it as a dict, or None; how many lines are not JSON).

    Lines are cut off where a run was killed. Raises Mistake if the evaluation lacks its iteration or one of the APs:
    numbers from 0 to 100, or NaN.
    """
    path = os.path.join(run, "metrics.json")
    found, skipped = None, 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                skipped += 1
                continue
            if isinstance(line, dict) and "bbox/AP" in line:
                found = line
    if found is None:
        return None, skipped
    wanted = [f"{kind}/{column}" for kind in COLUMNS if f"{kind}/AP" in found for column in COLUMNS[kind]]
    for key in ["iteration", *wanted]:
        value = found.get(key)
        is_number = isinstance(value, (int, float)) and not (value < 0 or value > 100)  # NaN is neither
        if not (is_number or key == "iteration" and isinstance(value, int)):
            raise Mistake(f"{path}: its last evaluation has no {key}")
    return found, skipped


def print_table(rows):
    """rows: {name: [evaluation of each trial]}."""
    kinds = [kind for kind in COLUMNS if any(f"{kind}/AP" in trial for trials in rows.values() for trial in trials)]
    keys = [f"{kind}/{column}" for kind in kinds for column in COLUMNS[kind]]
    titles = [f"{NAMES[kind]} {column}" for kind in kinds for column in COLUMNS[kind]]
    lines = [["run", "n", *titles]]
    for name, trials in rows.items():
        lines.append([name, str(len(trials)), *(cell([trial.get(key) for trial in trials]) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def cell(values):
    """[values of the trials] → "mean ± deviation", "-" where a trial has none, "nan" where one's is not a number."""
    if None in values:
        return "-"
    if any(map(math.isnan, values)):
        return "nan"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # ± becomes ? where the terminal has no such character
    try:
        main()
    except (Mistake, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
