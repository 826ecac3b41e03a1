"""What the results of a study say: tables, paired comparisons, the figure, and README.md from its template."""

import math
import os
import re
import statistics
import string

from synco import files
from synco.files import read_json
from synco.negatives import KINDS
from synco.plot import COLOURS

NAMES = {"random": "no pretraining", "mocov2": "MoCo v2", "mochi": "MoCHi", "synco": "SynCo"}
MEASURES = {  # what a run is measured by
    "knn": "kNN, backbone",
    "knn_projection": "kNN, projection",
    "probe": "linear probe",
    "semi1": "1 % of the labels",
    "semi10": "10 % of the labels",
}
NEGATIVES = {  # number in the log: title
    "mass": "share of the softmax",
    "leakage": "nearer than the positive",
    "own_class": "of the query's class",
    "own_image": "of its image",
    "gradient": "share of the gradient",
    "cosine": "cosine with the real ones' part",
}
# of Student's distribution, 97.5 %, by degrees of freedom; with more the last is taken, which is too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def name_of(method):
    return NAMES.get(method) or method.replace("-", " ")


def methods_of(content):
    return list(dict.fromkeys(run["method"] for run in content["runs"]))


def values(content, method, key):
    """{seed: a number, or list} of the runs of a method that have it."""
    return {run["seed"]: run[key] for run in content["runs"] if run["method"] == method and key in run}


def measures_of(content):
    return {key: title for key, title in MEASURES.items() if any(key in run for run in content["runs"])}


def markdown(rows):
    """A table of Markdown; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def accuracies(content):
    """Mean and range over the seeds, in percent."""
    measures = measures_of(content)
    rows = [["", "seeds", *measures.values()]]
    for method in methods_of(content):
        numbers = [list(values(content, method, key).values()) for key in measures]
        cells = [f"{statistics.mean(n):.2f} ({min(n):.2f} to {max(n):.2f})" if n else "not measured" for n in numbers]
        rows.append([name_of(method), str(max(map(len, numbers))), *cells])
    return markdown(rows)


def paired(one, other):
    """Differences seed by seed of {seed: number} → (their mean, half the width of its 95 % interval), or None.

    The interval is Student's; there is none of fewer than two seeds in common.
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(differences) < 2:
        return None
    t = STUDENT[min(len(differences) - 1, len(STUDENT)) - 1]
    return statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(len(differences))


def comparisons(content):
    """{(method, another): {measure: `paired`}}: all with MoCo v2, and with the control."""
    ran = [method for method in methods_of(content) if method != "random"]
    pairs = [(one, other) for other in ("mocov2", "copied") for one in ran if one not in ("mocov2", other)]
    found = {}
    for pair in pairs:
        row = {key: paired(*(values(content, method, key) for method in pair)) for key in measures_of(content)}
        if all(row.values()):
            found[pair] = row
    return found


def differences(content):
    """The comparisons as a table, and how many of them chance would find."""
    found, measures = comparisons(content), measures_of(content)
    if not found:
        return ""
    rows = [["difference", *measures.values()]]
    for (one, other), row in found.items():
        cells = [f"{mean:+.2f} ± {half:.2f}{' *' * (abs(mean) > half)}" for mean, half in row.values()]
        rows.append([f"{name_of(one)} − {name_of(other)}", *cells])
    count = len(found) * len(measures)
    beyond = sum(abs(mean) > half for row in found.values() for mean, half in row.values())
    return (
        f"{markdown(rows)}\n\nMean of the differences seed by seed, in points, ± half its 95 % interval (Student's). * "
        f"marks the intervals without 0: {beyond} of {count}, where chance alone would leave {count / 20:.1f} "
        "of as many independent ones; these share runs."
    )


def negatives(content):
    """Diagnostics of the last epoch, means over the seeds: of SynCo by kind, and of the control."""
    table = {}  # {(method, kind): {what: mean}}
    for method, kinds in (("synco", ("queue", "hardest", *KINDS[:-1])), ("copied", KINDS[-1:])):
        ends = [lines[-1] for lines in values(content, method, "negatives").values()]
        for kind in kinds if ends else ():
            numbers = {what: [end[f"{what}/{kind}"] for end in ends if f"{what}/{kind}" in end] for what in NEGATIVES}
            table[method, kind] = {what: statistics.mean(found) for what, found in numbers.items() if found}
    columns = {what: title for what, title in NEGATIVES.items() if any(what in row for row in table.values())}
    rows = [["", *columns.values()]]
    for (method, kind), row in table.items():
        cells = [f"{row[what]:.3f}" if what in row else "" for what in columns]
        rows.append([f"{name_of(method)}: {kind}", *cells])
    return markdown(rows) if table else ""


def draw(path, content):
    """Accuracies against the control's, and what the negatives are like, as a PNG; a dot a seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained")
    for place, ((one, other), row) in enumerate(comparisons(content).items()):
        colour = COLOURS[other == "copied"]
        mine, theirs = values(content, one, "knn"), values(content, other, "knn")
        dots = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        axes[0].plot(dots, [place] * len(dots), ".", color=colour, alpha=0.4)
        axes[0].errorbar(row["knn"][0], place, xerr=row["knn"][1], fmt="o", color=colour, capsize=3)
    pairs = list(comparisons(content))
    axes[0].set(title="kNN, backbone: mean difference, 95 % interval", xlabel="points")
    axes[0].set_yticks(range(len(pairs)), [f"{name_of(one)} − {name_of(other)}" for one, other in pairs], fontsize=7)
    axes[0].axvline(0, color="black", lw=0.8)
    kinds = ["queue", "hardest", *KINDS]
    for axis, what in zip(axes[1:], ("leakage", "own_class", "cosine")):
        for place, kind in enumerate(kinds):
            runs = values(content, "copied" if kind == KINDS[-1] else "synco", "negatives").values()
            dots = [lines[-1][f"{what}/{kind}"] for lines in runs if f"{what}/{kind}" in lines[-1]]
            axis.plot(dots, [place] * len(dots), "o", color=COLOURS[kind == KINDS[-1]], alpha=0.6)
        axis.set(title=NEGATIVES[what], ylim=(-0.5, len(kinds) - 0.5), xlabel="cosine" if what == "cosine" else "share")
        axis.set_yticks(range(len(kinds)), kinds)
    for axis in axes:
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def section(folder, scale):
    """What README.md says of one scale's results in the folder."""
    found = read_json(os.path.join(folder, f"{scale}.json"))
    if not found:
        return f"Not measured. The command:\n\n```\npython benchmarks/cifar10/study.py --scale {scale} DATA\n```"
    minutes = [run["minutes"] for run in found["runs"] if "minutes" in run]
    facts = [f"- Measured on: {machine}." for machine in found["machines"]]
    facts.append(f"- A pretraining took {statistics.median(minutes):.1f} minutes in the median, kNN included.")
    told = negatives(found)
    parts = [
        f"```\n{found['command']}\n```",
        accuracies(found),
        differences(found),
        f"![What the methods learn, and what their negatives are like]({scale}.png)",
        told and f"The negatives in the last epoch, means over its print steps and the seeds:\n\n{told}",
        "\n".join(facts),
        "```\n" + "\n".join(f"{name}: {flags}" for name, flags in flat(found["settings"])) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def flat(settings):
    """(name, flags) of nested dicts."""
    for name, flags in settings.items():
        yield from flat(flags) if isinstance(flags, dict) else [(name, flags)]


def write(folder):
    """README.md in the folder, from its template and the results there of all scales."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "README.template.md")) as file:
        template = file.read()
    scales = re.findall(r"^\$(\w+)$", template, re.M)
    with files.atomic_write(os.path.join(folder, "README.md")) as file:
        file.write(string.Template(template).substitute({scale: section(folder, scale) for scale in scales}).encode())
