"""Curves of runs from their log.jsonl, side by side; or a map of a backbone's features.

  python -m synco.plot runs/mocov2 runs/synco -o curves.png
  python -m synco.plot runs/mocov2 runs/synco --csv -o curves.csv
  python -m synco.plot --mean runs/mocov2-0 runs/mocov2-1 runs/synco-0 runs/synco-1 -o means.png
  python -m synco.plot --embedding runs/synco/checkpoint_0199.pth.tar DATA -o map.png

RUN is a folder with a log.jsonl, or such a file: of a pretraining, a linear probe or a fine-tuning. Drawn over the
epochs are loss, contrastive accuracy, kNN accuracy, and loss and accuracy of the classifiers, as far as the runs have
them. Without -o the numbers are printed as a table, the mean of each epoch. Pictures need matplotlib.
"""

import argparse
import importlib.util
import io
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from synco import distributed, files, metrics, options
from synco.errors import UserError
from synco.launch import command
from synco.options import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from synco.embedding import Map

# column of the tables → (kind of the log's lines, name in them); "train" lines are of a pretraining or of a classifier;
# a name that ends in "/" is the mean over the kinds of synthetic negatives
PRETRAINING = {
    "loss": ("train", "loss"),
    "acc1": ("train", "acc1"),
    "acc1_real": ("train", "acc1_real"),
    "knn_top1": ("knn", "top1"),
    "knn_train_top1": ("knn", "train_top1"),
    "knn_projection_top1": ("knn", "top1_projection"),
    "own_class_hardest": ("train", "own_class/hardest"),
    "own_class_queue": ("train", "own_class/queue"),
    "leakage": ("train", "leakage/"),
    "cosine": ("train", "cosine/"),
}
CLASSIFIER = {
    "train_loss": ("train", "loss"),
    "val_loss": ("val", "loss"),
    "val_top1": ("val", "top1"),
    "train_top1": ("eval_train", "top1"),
}
COLUMNS = (*PRETRAINING, *CLASSIFIER)
# (title, axis, {column: what it is of}); the first column is drawn solid, the others dashed and dotted
PANELS = (
    ("Contrastive loss", "loss [nats]", {"loss": ""}),
    ("Contrastive accuracy", "acc@1 [%]", {"acc1": "all negatives", "acc1_real": "real negatives only"}),
    (
        "kNN accuracy",
        "top-1 [%]",
        {"knn_top1": "val", "knn_train_top1": "train", "knn_projection_top1": "val, on the projection"},
    ),
    (
        "Real negatives of the query's class",
        "share",
        {"own_class_hardest": "the hardest", "own_class_queue": "all, as by chance"},
    ),
    ("Leakage: nearer than the positive", "share", {"leakage": "mean of the types"}),
    ("Gradient beside the real negatives'", "cosine", {"cosine": "mean of the types"}),
    ("Probe and fine-tuning: loss", "loss [nats]", {"val_loss": "val", "train_loss": "train"}),
    ("Probe and fine-tuning: accuracy", "top-1 [%]", {"val_top1": "val", "train_top1": "train"}),
)
STYLES = ("solid", "dashed", "dotted")
# also for the colour-blind: Okabe and Ito's without the yellow, which is faint on white, and three of Paul Tol's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999999", "#332288")
MARKERS = "osD^vP*X<>p"
POINTS = 200  # at most so many on a curve; more are averaged
LARGEST = 3.4e38  # what a log can hold comes from float32; the means of such numbers are finite, too

Point = tuple[float, float, int]  # epochs done, value, steps that it is the mean of


@dataclass
class Run:
    """One log. curves: {column: its points}, in the order of the steps."""

    label: str
    seed: int | None = None
    curves: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """Epochs done, perhaps a fraction."""
        return max(x for points in self.curves.values() for x, _, _ in points)


@dataclass(frozen=True)
class Group:
    """What is drawn in one colour: a run, or with --mean those of one label."""

    label: str
    runs: tuple[Run, ...]

    def averaged(self, column: str, width: float) -> dict[int, tuple[float, float, float, float]]:
        """{bin: (epochs, mean over the runs, lowest, highest)}; bins of `width` epochs that all the runs have.

        The first of several numbers of one run in a bin (bin - 1, bin] · width is averaged, by their steps.
        """
        tables = [binned(run.curves.get(column, ()), width) for run in self.runs]
        found = {}
        for i in sorted(set.intersection(*map(set, tables))):
            values = [table[i][1] for table in tables]
            found[i] = tables[0][i][0], sum(values) / len(values), min(values), max(values)
        return found


def parse() -> argparse.Namespace:
    """The command line of `python -m synco.plot`."""
    parser = options.Parser(__doc__)
    parser.prog = "python -m synco.plot"
    flag = parser.add_argument
    flag("runs", nargs="*", metavar="RUN", help="folder with a log.jsonl, or such a file")
    flag("-o", "--output", metavar="FILE", help="picture (.png, .pdf, .svg ...) or table (.csv) to write, or to renew")
    flag("--csv", action="store_true", help="the table as CSV, on stdout or in -o FILE.csv")
    flag("--label", action="append", metavar="NAME", help="of a run, once for each (unset: from the folders' names)")
    flag(
        "--mean",
        action="store_true",
        help="mean of the runs with the same label, and lowest to highest as a band; a folder's name is taken "
        "without the run's seed at its end",
    )
    flag("--embedding", nargs=2, metavar=("CHECKPOINT", "DATA"), help="map of val's features in place of RUNs")
    flag("--method", choices=("pca", "tsne"), help="of --embedding: pca, unless tsne, which needs scikit-learn")
    flag("-b", "--batch-size", default=256, type=number(int, 1), help="of --embedding")
    options.add_data(parser, positional=False)  # of --embedding
    parser.set_defaults(arch=None, seed=0)
    args = parser.parse_args()
    if bool(args.runs) == bool(args.embedding):
        raise UserError("give RUNs, one or several, or --embedding CHECKPOINT DATA (--help lists the flags)")
    if args.embedding and (args.label or args.mean):
        raise UserError("--label and --mean are for RUNs; --embedding draws one checkpoint")
    if args.method and not args.embedding:
        raise UserError(f"--method {args.method} goes with --embedding")
    if args.label and len(args.label) != len(args.runs):
        raise UserError(f"--label is given {len(args.label)} times for {len(args.runs)} runs; give it once for each")
    if args.method == "tsne" and importlib.util.find_spec("sklearn") is None:
        raise UserError("--method tsne needs scikit-learn: pip install scikit-learn")
    options.check_data(args)
    args.checkpoint, args.data = args.embedding or (None, None)
    args.table = args.csv or args.output is None or args.output.endswith(".csv")
    if args.output is not None:
        check_output(args.output, table=args.table)
    return args


def check_output(path: str, *, table: bool) -> None:
    """Raise UserError if -o cannot be written, or needs what is not installed; table: whether a table is asked."""
    if table and not path.endswith(".csv"):
        raise UserError(f"-o {path}: --csv writes a table, whose name must end in .csv")
    files.check_output(path, f"-o {path}")
    if not table:
        kinds = new_figure((1, 1)).canvas.get_supported_filetypes()
        if os.path.splitext(path)[1][1:] not in kinds:
            raise UserError(f"-o {path}: must end in .csv, for a table, or .{', .'.join(sorted(kinds))}")


def run(args: argparse.Namespace) -> None:
    """Read the logs, or compute the map; draw it, or print it or write it as a table."""
    if args.embedding:
        from synco import embedding  # what it takes to compute features, which the curves do without

        points = embedding.feature_map(args)
        if args.table:
            rows = [[points.classes[label], *place] for label, place in zip(points.labels, points.places)]
            write_table(["class", "x", "y"], rows, args)
        else:
            write_picture(scatter(points), args.output)
        return
    groups = group(read_runs(args.runs, args.label), args.mean)
    if args.table:
        write_table(*table(groups, args.mean), args)
    else:
        write_picture(curves(groups), args.output)


# ------------------------------------------------------------------------------------------------------- logs


def read_runs(paths: Sequence[str], labels: Sequence[str] | None = None) -> list[Run]:
    """The `Run`s of folders or files; labels: their names (None: from their folders).

    Raises UserError that names one which is none, or is given twice.
    """
    logs = [os.path.join(path, "log.jsonl") if os.path.isdir(path) else path for path in paths]
    for path, log in zip(paths, logs):
        if not os.path.isfile(log):
            raise UserError(f"{path}: no such run; a RUN is a folder with a log.jsonl, or such a file")
    places = [os.path.realpath(log) for log in logs]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{paths[i]}: is given twice")
    return [read_run(log, label) for log, label in zip(logs, labels or names(places))]


def names(logs: Sequence[str]) -> list[str]:
    """A name for each of different logs: the shortest end of its folder's path that no other has.

    What all these ends end in is left out: "a" and "b" for a/pretrain and b/pretrain.
    """
    places = [os.path.dirname(log) if os.path.basename(log) == "log.jsonl" else log for log in logs]
    parts = [[part for part in place.split(os.sep) if part] or [os.sep] for place in places]
    ends = []
    for i, mine in enumerate(parts):
        others = parts[:i] + parts[i + 1 :]
        count = 1
        while count < len(mine) and any(other[-count:] == mine[-count:] for other in others):
            count += 1
        ends.append(mine[-count:])
    while all(len(end) > 1 for end in ends) and len({end[-1] for end in ends}) == 1:
        ends = [end[:-1] for end in ends]
    return ["/".join(end) for end in ends]


def read_run(log: str, label: str) -> Run:
    """The `Run` of a log.jsonl. Damaged lines are left out with a warning.

    Raises UserError if the file holds no line that can be drawn, or does not tell how many steps an epoch has.
    """
    damaged = []
    try:
        lines = [line for line in metrics.read_log(log, damaged.append) if is_count(line["step"])]
    except OSError as error:
        raise UserError(f"{log}: cannot be read ({error.strerror})") from error
    if not lines:
        raise UserError(f"{log}: holds no line of a run{'' if damaged else ' yet'}")
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        distributed.warn(f"{log}: damaged lines are left out: {', '.join(map(str, damaged[:3]))}{more}")
    config = read_config(log)
    steps = config.get("steps_per_epoch") or steps_per_epoch(lines, log)
    pretraining = any(line["kind"] == "train" and "acc1_real" in line for line in lines)
    run = Run(label, config.get("seed"))
    for column, (kind, name) in (PRETRAINING if pretraining else PRETRAINING | CLASSIFIER).items():
        if kind == "train" and (column in PRETRAINING) != pretraining:
            continue
        before, points = 0, []
        for line in sorted((line for line in lines if line["kind"] == kind), key=lambda line: line["step"]):
            found = [line[key] for key in line if key == name or name.endswith("/") and key.startswith(name)]
            if found and all(map(is_number, found)):
                points.append((line["step"] / steps, sum(found) / len(found), max(line["step"] - before, 1)))
            before = line["step"]
        if points:
            run.curves[column] = points
    if not run.curves:
        raise UserError(f"{log}: holds neither losses nor accuracies")
    return run


def read_config(log: str) -> dict[str, int]:
    """What the config.json beside a log tells of the run's seed and steps_per_epoch; a warning if it is damaged."""
    try:
        found = files.read_json(os.path.join(os.path.dirname(log), "config.json"))
    except UserError as error:
        distributed.warn(f"{error}; it is left out")
        return {}
    return {name: found[name] for name in ("seed", "steps_per_epoch") if is_count(found.get(name))}


def is_number(value: Any) -> bool:
    """Whether a value from a log is a number that a run can have written: finite, in float32's range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number >= 0 that a float, too, holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def steps_per_epoch(lines: Iterable[dict[str, Any]], log: str) -> float:
    """From the log's lines at the end of an epoch. Raises UserError if there is none yet."""
    told = [line for line in lines if is_count(line.get("epoch"))]
    trained = [line for line in told if line["kind"] == "train"]
    ends = [
        (one["step"], one["epoch"] + 1) for one, after in zip(trained, trained[1:]) if after["epoch"] > one["epoch"]
    ]
    ends += [(line["step"], line["epoch"]) for line in told if line["kind"] in ("knn", "val") and line["epoch"] > 0]
    if not ends or ends[0][0] <= 0:
        raise UserError(f"{log}: its first epoch has not ended, and no config.json beside it says its steps_per_epoch")
    return ends[0][0] / ends[0][1]


def group(runs: Sequence[Run], mean: bool) -> list[Group]:
    """The `Group`s to draw: with `mean` one for each label, in the order of their first runs; else one for each run."""
    if not mean:
        return [Group(run.label, (run,)) for run in runs]
    labels = [run.label if run.seed is None else without_seed(run.label, run.seed) for run in runs]
    found = {label: [run for run, its in zip(runs, labels) if its == label] for label in labels}
    return [Group(label, tuple(members)) for label, members in found.items()]


def without_seed(label: str, seed: int) -> str:
    """ "synco-3", "synco_seed3" and "synco/s3" with the seed 3 → "synco"."""
    return re.sub(rf"[-_./= ]*(?:seed|s)?[-_= ]*(?<!\d)0*{re.escape(str(seed))}$", "", label) or label


def bin_width(runs: Sequence[Run]) -> float:
    """Epochs to average the lines of training over: at least two lines of each run, and at most `POINTS` bins in all.

    The first line of an epoch tells of one step alone, the others of many: by itself it would be a spike.
    """
    lengths = [run.length or 1 for run in runs]  # 0: a run that has just begun
    densities = [
        len(run.curves[name]) / length
        for run, length in zip(runs, lengths)
        for name in ("loss", "train_loss")
        if name in run.curves
    ]
    parts = min([POINTS / max(lengths), *(density / 2 for density in densities)])  # of an epoch
    return 1 / math.floor(parts) if parts >= 1 else max(1, math.ceil(max(lengths) / POINTS))


def binned(points: Iterable[Point], width: float) -> dict[int, tuple[float, float]]:
    """Points (x, y, weight) → {bin: (largest x, weighted mean of y)}, where bin - 1 < x / width <= bin."""
    sums = {}
    for x, y, weight in points:
        total = sums.setdefault(math.ceil(x / width - 1e-6), [x, 0, 0])
        total[0] = max(total[0], x)
        total[1] += y * weight
        total[2] += weight
    return {i: (x, y / weight) for i, (x, y, weight) in sums.items()}


# ------------------------------------------------------------------------------------------------------ tables


def table(groups: Sequence[Group], mean: bool) -> tuple[list[str], list[list]]:
    """(header, rows): a row for each group and epoch (0: before the first), of the columns that some group has."""
    columns = [name for name in COLUMNS if any(name in run.curves for group in groups for run in group.runs)]
    kinds = ("", "_min", "_max") if mean else ("",)
    header = ["run", *(["runs"] if mean else []), "epoch", *(name + kind for name in columns for kind in kinds)]
    rows = []
    for one in groups:
        found = {name: one.averaged(name, 1) for name in columns}
        length = min(run.length for run in one.runs)
        for epoch in sorted(set().union(*found.values())):
            row = [one.label, *([len(one.runs)] if mean else []), round(min(epoch, length), 4)]
            for name in columns:
                row += found[name][epoch][1 : 1 + len(kinds)] if epoch in found[name] else [None] * len(kinds)
            rows.append(row)
    return header, rows


def write_table(header: list[str], rows: list[list], args: argparse.Namespace) -> None:
    """Write a table into -o, print it as CSV, or in columns that a person can read."""
    text = files.csv_text(header, rows) if args.csv or args.output else in_columns(header, rows)
    if args.output:
        write(text.encode(errors="surrogateescape"), args.output)
        return
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # who reads it, such as `head`, has had enough; what is left is not to raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_columns(header: list[str], rows: list[list]) -> str:
    """A table in columns of equal width; beside a mean its range, in place of two columns for that."""
    shown = [name for name in header if not name.endswith(("_min", "_max"))]
    words = [shown, *([in_words(name, dict(zip(header, row))) for name in shown] for row in rows)]
    widths = [max(len(row[i]) for row in words) for i in range(len(shown))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in words)
    return "".join(line + "\n" for line in lines)


def in_words(name: str, row: dict[str, Any]) -> str:
    """A column of a row, with as many digits as a reader wants: 4 of losses, 2 of percents; beside a mean its range."""

    def short(value):
        return f"{value:.{4 if 'loss' in name else 2}f}" if isinstance(value, float) and name != "epoch" else f"{value}"

    value, low, high = (row.get(name + kind) for kind in ("", "_min", "_max"))
    if value is None:
        return ""
    return short(value) + (f" [{short(low)}, {short(high)}]" if low != high else "")


def write(content: bytes, path: str) -> None:
    """Write the file of -o, whole or not at all, and say so."""
    try:
        with files.atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written ({error.strerror})") from error
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------------- pictures


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty matplotlib figure; size in inches. Raises UserError if there is no matplotlib."""
    try:
        from matplotlib.figure import Figure  # an optional package; and no pyplot, whose state is global
    except ImportError as error:
        raise UserError(
            "a picture needs matplotlib: pip install matplotlib; or --csv in place of it writes a table"
        ) from error
    return Figure(figsize=size, layout="constrained")


def look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th group or class; 110 of them differ."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def curves(groups: Sequence[Group]) -> "Figure":
    """A figure of the panels that some run has something for."""
    has = {name for group in groups for run in group.runs for name in run.curves}
    panels = [(*panel[:2], {n: of for n, of in panel[2].items() if n in has}) for panel in PANELS]
    panels = [panel for panel in panels if panel[2]]
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = new_figure((4.6 * across, 3.6 * down + 0.6))
    for k, (title, unit, shown) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, k)
        for i, one in enumerate(groups):
            for style, name in zip(STYLES, shown):
                trained = (PRETRAINING | CLASSIFIER)[name][0] == "train"
                width = bin_width(one.runs) if trained else 1
                _curve(axes, one.averaged(name, width), style, i, few_markers=trained)
        what = [of for of in shown.values() if of]
        if len(what) > 1:
            title += "\n" + ", ".join(map("{}: {}".format, STYLES, what))
        elif what:
            title += f" ({what[0]})"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epochs")
        axes.set_ylabel(unit)
        axes.grid(True, alpha=0.3)
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.dataLim.intervaly
        if "loss" in unit and high > 20 * low > 0:  # a start that went astray would hide the rest
            axes.set_yscale("log")
    _legend(figure, groups)
    return figure


def _legend(figure, groups):
    """Name the groups below the panels, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look(i)) for i in range(len(groups))]
    labels = [plain(one.label + (f" ({len(one.runs)} runs)" if len(one.runs) > 1 else "")) for one in groups]
    across = int(figure.get_figwidth() / (0.8 + 0.09 * max(map(len, labels))))  # inches an entry takes
    several = any(len(one.runs) > 1 for one in groups)
    title = "means; the bands reach from the lowest to the highest run" if several else None
    columns = min(len(groups), max(1, across))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=title)


def plain(text: str) -> str:
    """A label that matplotlib shows as it is: no formula between dollars, and not hidden, as those with a first "_"."""
    text = text.encode(errors="replace").decode()  # a file's name may be no UTF-8
    return " " * text.startswith("_") + text.replace("$", r"\$")


def _curve(axes, found, style, i, *, few_markers):
    """One group's line, and a band from its lowest to its highest run where these differ."""
    if not found:
        return
    x, y, low, high = zip(*found.values())
    # a marker on each evaluation; on a curve of many steps some, to tell more groups than there are colours
    axes.plot(x, y, linestyle=style, linewidth=1.5, markersize=4, markevery=0.15 if few_markers else 1, **look(i))
    if low != high:
        axes.fill_between(x, low, high, color=look(i)["color"], alpha=0.2, linewidth=0)


def write_picture(figure: "Figure", path: str) -> None:
    """Write a figure in the format that the file's name says, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format=os.path.splitext(path)[1][1:], dpi=150)
    write(content.getbuffer(), path)


def scatter(points: "Map") -> "Figure":
    """A figure of images as points, each in its class's colour; up to 20 classes are named beside it."""
    named = len(points.classes) <= 20
    figure = new_figure((7.5 if named else 6, 5.6))
    axes = figure.add_subplot()
    for i, name in enumerate(points.classes):
        mine = [place for place, label in zip(points.places, points.labels) if label == i]
        if mine:
            axes.scatter(*zip(*mine), s=9, alpha=0.7, linewidths=0, label=plain(name), **look(i))
    if named:
        figure.legend(loc="outside right upper", markerscale=2, frameon=False)
    axes.set_title(plain(points.title + ("" if named else f", {len(points.classes)} classes")), fontsize=10)
    axes.set_xlabel(points.axes[0])
    axes.set_ylabel(points.axes[1])
    axes.grid(True, alpha=0.3)
    return figure


if __name__ == "__main__":
    command(run, parse)
