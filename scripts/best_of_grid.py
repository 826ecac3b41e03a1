#!/usr/bin/env python3
"""Print the results of several trials as a table, the best first.

  python scripts/best_of_grid.py FOLDER

FOLDER holds a folder for each trial of main_lincls.py or main_semisup.py, with its result.json. The best is best on the
validation images that chose it, as in the published numbers.
"""

import argparse
import json
import pathlib
import sys


def refuse(message):
    print(f"best_of_grid.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read(path):
    """A result.json → top-1 and top-5 in percent and the epoch; the last two may be None. Raises ValueError."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict):
        raise ValueError("no object")
    for name, highest in (("top1", 100), ("top5", 100), ("epoch", 10**9)):
        value = result.get(name, "")
        optional = value is None and name != "top1"
        if not (optional or isinstance(value, (int, float)) and 0 <= value <= highest):
            raise ValueError(f"its {name} is no number up to {highest}")
    return result["top1"], result["top5"], result["epoch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    trials = []
    for path in sorted(folder.glob("*/result.json")):
        try:
            top1, top5, epoch = read(path)
        except (OSError, ValueError, RecursionError) as error:
            refuse(f"{path}: not a result of main_lincls.py or main_semisup.py ({error})")
        trials.append((top1, "" if top5 is None else f"{top5:.2f}", epoch or "", path.parent.name))
    if not trials:
        refuse(f"{folder}: holds no trial's result.json")
    trials.sort(key=lambda trial: -trial[0])
    width = max(len("trial"), *(len(trial[-1]) for trial in trials))
    print(f"{'trial':{width}}  top-1  top-5  epoch")
    for i, (top1, top5, epoch, name) in enumerate(trials):
        print(f"{name:{width}}  {top1:5.2f}  {top5:>5}  {epoch:>5}{'  best' if i == 0 else ''}")


if __name__ == "__main__":
    main()
