"""Curves: their numbers against NumPy, the pictures by what is in them, refusals in one line."""

import csv
import json
import os
import sys

import numpy as np
import pytest
from conftest import SMALL, command

from synco import embedding, metrics, plot


def write_run(folder, *, steps=10, epochs=3, every=4, seed=0, classifier=False, base=5.0, length=None):
    """A log as the programs write it: a line after the first step of an epoch, every `every` further and the last.

    Returns {epoch: mean of the steps' losses}; the loss of step s is base / (1 + s), what a line holds is their mean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"steps_per_epoch": steps, "seed": seed}))
    lines, losses = [], base / (1 + np.arange(steps * epochs))
    if not classifier:
        lines.append({"kind": "knn", "step": 0, "epoch": 0, "top1": 10.0 + seed})
    for epoch in range(epochs):
        ends = sorted({*range(1, steps, every), steps})
        for start, end in zip([0, *ends], ends):
            loss = losses[epoch * steps + start : epoch * steps + end].mean()
            line = {"kind": "train", "step": epoch * steps + end, "epoch": epoch, "loss": loss, "acc1": 20.0}
            lines.append(line if classifier else line | {"acc1_real": 40.0})
        done = {"step": (epoch + 1) * steps, "epoch": epoch + 1}
        if classifier:
            lines.append({"kind": "val", **done, "top1": 50.0 + epoch + seed, "top5": 90.0, "loss": 1 / (1 + epoch)})
            lines.append({"kind": "eval_train", **done, "top1": 60.0 + epoch, "top5": 95.0, "loss": 0.1})
        else:
            lines.append({"kind": "knn", **done, "top1": 30.0 + epoch + seed, "top1_projection": 25.0})
    lines = [line for line in lines if line["step"] <= (length or steps * epochs)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = losses[: length or steps * epochs]
    return {e + 1: losses[e * steps : (e + 1) * steps].mean() for e in range(-(-len(losses) // steps))}


def read_table(text):
    return list(csv.DictReader(text.splitlines()))


def column(rows, name, run):
    """{epoch: value} of a run's rows that have it."""
    return {float(row["epoch"]): float(row[name]) for row in rows if row["run"] == run and row[name]}


# ------------------------------------------------------------------------------------------------------- tables


def test_the_table_has_the_mean_of_each_epoch_whatever_the_batch_size(tool, tmp_path):
    expected = write_run(tmp_path / "small", steps=10), write_run(tmp_path / "large", steps=7, epochs=2, every=3)
    status, out, err = tool(plot, "--csv", tmp_path / "small", tmp_path / "large" / "log.jsonl")
    assert (status, err) == (0, "")
    rows = read_table(out)
    for name, losses in zip(("small", "large"), expected):
        found = column(rows, "loss", name)
        assert list(found) == list(losses)
        np.testing.assert_allclose(list(found.values()), list(losses.values()), rtol=1e-12)
    assert column(rows, "knn_top1", "small") == {0: 10, 1: 30, 2: 31, 3: 32}
    assert column(rows, "knn_projection_top1", "large") == {1: 25, 2: 25}
    assert column(rows, "acc1_real", "large") == {1: 40, 2: 40}
    assert "knn_train_top1" not in rows[0] and "val_top1" not in rows[0]

    assert tool(plot, tmp_path / "small", tmp_path / "large", "-o", tmp_path / "t.csv")[0] == 0
    assert (tmp_path / "t.csv").read_text() == out
    words = [line.split() for line in tool(plot, tmp_path / "small")[1].splitlines()]
    assert words[0] == ["run", "epoch", "loss", "acc1", "acc1_real", "knn_top1", "knn_projection_top1"]
    assert words[1] == ["small", "0", "10.00"]
    assert words[2] == ["small", "1", f"{expected[0][1]:.4f}", "20.00", "40.00", "30.00", "25.00"]


def test_diagnostics_are_the_mean_of_the_kinds(tool, tmp_path):
    """Of those that a line has: synthesis may begin later, and of a line's first queue no image is known."""
    write_run(tmp_path / "run", epochs=2, every=10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train" and line["epoch"] == 1]
    trained[-1].update({"leakage/noisy": 0.25, "leakage/mixed": 0.75, "cosine/noisy": 0.9, "own_class/hardest": 0.2})
    trained[-1].update({"own_class/queue": 0.1, "own_class/noisy": 0.4})
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_table(tool(plot, "--csv", tmp_path / "run")[1])
    last, names = rows[-1], ("leakage", "cosine", "own_class_hardest", "own_class_queue")
    assert [float(last[name]) for name in names] == pytest.approx([0.5, 0.9, 0.2, 0.1])
    assert not any(row[name] for row in rows[:-1] for name in names)


def test_a_run_that_is_in_the_midst_of_an_epoch(tool, tmp_path):
    expected = write_run(tmp_path / "run", steps=10, length=25)
    rows = read_table(tool(plot, "--csv", tmp_path / "run")[1])
    found = column(rows, "loss", "run")
    assert list(found) == [1, 2, 2.5]
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-12)


@pytest.mark.parametrize("classifier", [False, True])
def test_without_config_the_log_tells_the_length_of_an_epoch(tool, tmp_path, classifier):
    write_run(tmp_path / "run", steps=10, classifier=classifier)
    before = tool(plot, "--csv", tmp_path / "run")[1]
    (tmp_path / "run" / "config.json").unlink()
    assert tool(plot, "--csv", tmp_path / "run")[1] == before
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] == "train"]
    (tmp_path / "run" / "log.jsonl").write_text("".join(kept))
    assert column(read_table(tool(plot, "--csv", tmp_path / "run")[1]), before.split(",")[2], "run").keys() == {1, 2, 3}


def test_a_classifiers_log(tool, tmp_path):
    expected = write_run(tmp_path / "probe", classifier=True)
    rows = read_table(tool(plot, "--csv", tmp_path / "probe")[1])
    assert list(rows[0]) == ["run", "epoch", "train_loss", "val_loss", "val_top1", "train_top1"]
    assert column(rows, "val_top1", "probe") == {1: 50, 2: 51, 3: 52}
    assert column(rows, "train_top1", "probe") == {1: 60, 2: 61, 3: 62}
    np.testing.assert_allclose(list(column(rows, "train_loss", "probe").values()), list(expected.values()), rtol=1e-12)


def test_a_real_run(program, tool, data, tmp_path):
    status, _, err = program(*SMALL, "--knn-freq", 1, "-p", 1, "--save-dir", tmp_path / "run", data)
    assert status == 0, err
    lines = metrics.read_log(tmp_path / "run" / "log.jsonl")
    rows = read_table(tool(plot, "--csv", tmp_path / "run")[1])
    for kind, name, title in (("train", "loss", "loss"), ("train", "acc1", "acc1"), ("knn", "top1", "knn_top1")):
        for epoch in (0, 1, 2):
            values = [
                line[name] for line in lines if line["kind"] == kind and line["epoch"] + (kind == "train") == epoch
            ]
            if values:
                np.testing.assert_allclose(column(rows, title, "run")[epoch], np.mean(values), rtol=1e-6)


def test_a_reader_that_has_had_enough(tmp_path):
    """`... | head -1` of a table that is longer than a pipe holds."""
    write_run(tmp_path / "run", steps=2, epochs=2000, every=1)
    line = f"set -o pipefail; {sys.executable} -m synco.plot --csv {tmp_path}/run | head -1"
    done = command("bash", "-c", line)
    assert (done.returncode, done.stdout[:4], done.stdout.count("\n"), done.stderr) == (0, "run,", 1, "")


# ------------------------------------------------------------------------------------------------ labels, means


@pytest.mark.parametrize(
    "folders, expected",
    [
        (["x/moco", "x/synco"], ["moco", "synco"]),
        (["x/a/pretrain", "x/b/pretrain"], ["a", "b"]),
        (["x/a/pretrain", "x/b/pretrain", "x/b/probe"], ["a/pretrain", "b/pretrain", "probe"]),
        (["x/a", "x/b/a"], ["x", "b"]),
        (["x/only"], ["only"]),
    ],
)
def test_names_are_the_shortest_that_differ(folders, expected):
    assert plot.names([f"/{folder}/log.jsonl" for folder in folders]) == expected


def test_two_logs_in_a_folder_are_named_after_themselves():
    assert plot.names(["/x/old.jsonl", "/x/new.jsonl"]) == ["old.jsonl", "new.jsonl"]


def test_own_labels(tool, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    words = ["--csv", tmp_path / "a", tmp_path / "b", "--label", "MoCo v2", "--label", "MoCHi, 64"]
    rows = read_table(tool(plot, *words)[1])
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["MoCo v2", "MoCHi, 64"]


def test_means_over_seeds(tool, tmp_path):
    """Runs of one name but for their own seed at its end; the epochs that all of them have."""
    losses = [write_run(tmp_path / f"synco-{seed}", seed=seed, base=5 + seed, epochs=3 + seed) for seed in (0, 1, 4)]
    write_run(tmp_path / "moco_200", seed=1)
    rows = read_table(tool(plot, "--csv", "--mean", *sorted(tmp_path.iterdir()))[1])
    assert {row["run"]: row["runs"] for row in rows} == {"synco": "3", "moco_200": "1"}
    for epoch in (1, 2, 3):
        values = [table[epoch] for table in losses]
        for name, value in (("loss", np.mean(values)), ("loss_min", min(values)), ("loss_max", max(values))):
            np.testing.assert_allclose(column(rows, name, "synco")[epoch], value, rtol=1e-12)
    assert column(rows, "knn_top1_max", "synco") == {0: 14, 1: 34, 2: 35, 3: 36}
    assert column(rows, "knn_top1_min", "synco") == {0: 10, 1: 30, 2: 31, 3: 32}
    lines = tool(plot, "--mean", *sorted(tmp_path.iterdir()))[1].splitlines()
    assert lines[0].split()[:3] == ["run", "runs", "epoch"] and "knn_top1_min" not in lines[0]
    assert lines[1].split() == ["moco_200", "1", "0", "11.00"]
    assert lines[-1].startswith("synco") and "33.67 [32.00, 36.00]" in lines[-1]


@pytest.mark.parametrize("label", ["synco-3", "synco_seed3", "synco/s3", "synco.seed=03", "synco 3"])
def test_the_seed_at_a_names_end(label):
    assert plot.without_seed(label, 3) == "synco"
    assert plot.without_seed(label, 4) == label
    assert plot.without_seed("synco-13", 3) == "synco-13" and plot.without_seed("3", 3) == "3"


# ------------------------------------------------------------------------------------------------------- pictures


def test_a_picture(tool, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", classifier=True)
    out = tmp_path / "curves.png"
    out.write_text("an older one")
    status, told, err = tool(plot, tmp_path / "a", tmp_path / "b", "-o", out)
    assert (status, told, err) == (0, f"written: {out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "curves.png"]
    assert tool(plot, tmp_path / "a", "-o", tmp_path / "curves.svg")[0] == 0
    assert b"Contrastive accuracy" in (tmp_path / "curves.svg").read_bytes()


def drawn(figure):
    """{panel's first line: [(line style, x, y)]}"""
    return {
        axes.get_title().splitlines()[0]: [(line.get_linestyle(), *line.get_data()) for line in axes.get_lines()]
        for axes in figure.axes
    }


def test_what_is_in_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a_0", "_b $x$"):  # marks that matplotlib has a meaning for
        write_run(tmp_path / name, steps=10, epochs=2, every=2)
    runs = plot.read_runs([str(tmp_path / "a_0"), str(tmp_path / "_b $x$")])
    figure = plot.curves(plot.group(runs, mean=False))
    panels = drawn(figure)
    assert list(panels) == ["Contrastive loss", "Contrastive accuracy", "kNN accuracy"]
    assert [style for style, *_ in panels["Contrastive accuracy"]] == ["-", "--"] * 2
    assert "solid: all negatives, dashed: real negatives only" in figure.axes[1].get_title()
    for _, x, y in panels["Contrastive loss"]:  # lines after steps 1, 3, 5, 7, 9, 10: in three bins of an epoch
        losses = 5 / (1 + np.arange(20))
        np.testing.assert_allclose(x, [0.3, 0.5, 1, 1.3, 1.5, 2])
        bins = np.split(losses, [3, 5, 10, 13, 15])
        np.testing.assert_allclose(y, [part.mean() for part in bins])
    _, x, y = panels["kNN accuracy"][0]
    assert list(x) == [0, 1, 2] and list(y) == [10, 30, 31]
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["a_0", r"_b \$x\$"]
    assert len({line.get_color() for line in figure.axes[2].get_lines()}) == 4 - 2  # a colour a run
    for axes in figure.axes:
        assert axes.get_xlabel() == "epochs" and axes.get_ylabel().endswith(("[nats]", "[%]"))
    plot.write_picture(figure, str(tmp_path / "x.png"))


def test_long_runs_are_thinned_out(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", steps=100, epochs=30, every=5)
    figure = plot.curves(plot.group(plot.read_runs([str(tmp_path / "run")]), mean=False))
    ((_, x, y),) = drawn(figure)["Contrastive loss"]
    assert 100 < len(x) <= plot.POINTS and x[-1] == 30
    np.testing.assert_allclose(np.sum(np.diff([0, *x]) * y) / 30, np.mean(5 / (1 + np.arange(3000))))  # nothing lost


def test_the_band_of_several_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in (0, 4):
        write_run(tmp_path / f"x-{seed}", seed=seed)
    runs = plot.read_runs([str(tmp_path / "x-0"), str(tmp_path / "x-4")])
    figure = plot.curves(plot.group(runs, mean=True))
    (line,) = (line for line in figure.axes[2].get_lines() if line.get_linestyle() == "-")
    assert list(line.get_ydata()) == [12, 32, 33, 34]
    corners = figure.axes[2].collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in corners} >= {(0, 10), (0, 14), (3, 32), (3, 36)}
    assert figure.legends[0].get_texts()[0].get_text() == "x (2 runs)"


def test_the_colours_and_markers_tell_110_groups_apart():
    assert len({tuple(plot.look(i).values()) for i in range(110)}) == 110


def test_without_matplotlib(tool, tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = tool(plot, tmp_path / "run", "-o", tmp_path / "x.png")
    assert (status, out, err.count("\n")) == (2, "", 1) and "pip install matplotlib" in err and "--csv" in err
    assert not (tmp_path / "x.png").exists()
    assert tool(plot, tmp_path / "run", "-o", tmp_path / "x.csv")[0] == 0 and (tmp_path / "x.csv").exists()
    assert tool(plot, tmp_path / "run")[0] == 0


# ---------------------------------------------------------------------------------------------------- bad input


def test_damaged_lines_are_left_out_with_a_warning(tool, tmp_path):
    write_run(tmp_path / "run")
    before = tool(plot, "--csv", tmp_path / "run")[1]
    lines = (tmp_path / "run" / "log.jsonl").read_bytes().splitlines(keepends=True)
    wrong = [b'{"kind": "tr\n', b"[1, 2]\n", b"\xff\xfe\x00\n", b'{"kind": "knn", "step": "many"}\n']
    odd = [b'{"kind": "knn", "step": 1, "epoch": 1, "top1": NaN}\n', b'{"kind": 7, "step": 2}\n', b'{"kind": "tr']
    (tmp_path / "run" / "log.jsonl").write_bytes(b"".join(lines[:2] + wrong + lines[2:] + odd))
    status, out, err = tool(plot, "--csv", tmp_path / "run")
    assert (status, out) == (0, before)
    assert err.count("\n") == 1 and "log.jsonl: damaged lines are left out: 3, 4, 5" in err


ABSURD = {
    "not a number": "NaN",
    "infinite": "1e999",
    "beyond float": "9" * 400,
    "beyond Python": "9" * 5000,
    "beyond float32": "1e300",
    "negative": "-1",
    "a fraction": "1e-320",
    "a list": "[3]",
    "an object": '{"step": 3}',
    "text": '"3"',
    "true": "true",
    "nothing": "null",
    "deep": "[" * 1000 + "]" * 1000,
    "deeper": "[" * 100_000 + "]" * 100_000,
    "long": '"' + "x" * 10_000_000 + '"',
}


@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_absurd_values_are_passed_over(tool, tmp_path, value):
    """In each place of the log's lines and of config.json; where they are all that there is, in one line."""
    write_run(tmp_path / "run")
    before = tool(plot, "--csv", tmp_path / "run")[1]
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write(f'{{"kind": "knn", "step": {value}, "epoch": 1, "top1": 50.0}}\n')
        file.write(f'{{"kind": {value}, "step": 1, "epoch": 1, "loss": 50.0}}\n{value}\n')
    status, out, err = tool(plot, "--csv", tmp_path / "run")
    assert (status, out) == (0, before) and err.count("\n") <= 1

    (tmp_path / "run" / "config.json").write_text(f'{{"seed": {value}, "steps_per_epoch": {value}}}')
    status, out, err = tool(plot, "--csv", "--mean", tmp_path / "run")
    assert status == 0 and column(read_table(out), "knn_top1", "run") == {0: 10, 1: 30, 2: 31, 3: 32}
    (tmp_path / "run" / "config.json").write_text(value)
    assert tool(plot, "--csv", tmp_path / "run")[:2] == (0, before)

    (tmp_path / "run" / "log.jsonl").write_text(f'{{"kind": "train", "step": 4, "epoch": {value}, "loss": {value}}}\n')
    status, out, err = tool(plot, tmp_path / "run")
    if value not in ("-1", "1e-320"):  # which are losses
        assert (
            (status, out) == (2, "")
            and 1 <= err.count("\n") <= 3
            and err.splitlines()[-1].startswith("plot.py: error: ")
        )


def test_numbers_as_large_as_can_be(tool, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "run").mkdir()
    lines = [{"kind": "train", "step": step, "epoch": 2**53 * (step > 1), "loss": 3.4e38} for step in (1, 2, 2**53)]
    lines += [{"kind": "val", "step": 2**53, "epoch": 2**53, "top1": -3.4e38}]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for words in ([], ["--csv"], ["-o", tmp_path / "x.png"]):
        status, _, err = tool(plot, "--mean", tmp_path / "run", *words)
        assert (status, err) == (0, "")


def test_a_run_that_has_just_begun(tool, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_text('{"kind": "train", "step": 0, "epoch": 0, "loss": 1.0}\n')
    assert tool(plot, tmp_path / "run", "-o", tmp_path / "x.png")[0] == 0


def test_a_damaged_config_is_left_out_with_a_warning(tool, tmp_path):
    write_run(tmp_path / "run")
    before = tool(plot, "--csv", tmp_path / "run")[1]
    for damage in (lambda path: path.write_text("[" * 100_000), lambda path: (path.unlink(), path.mkdir())):
        damage(tmp_path / "run" / "config.json")
        status, out, err = tool(plot, "--csv", tmp_path / "run")
        assert (status, out, err.count("\n")) == (0, before, 1) and "warning: " in err and "config.json: " in err


def test_names_that_are_no_utf8(tool, tmp_path):
    pytest.importorskip("matplotlib")
    name = os.fsdecode(b"caf\xe9")
    write_run(tmp_path / name)
    out = tmp_path / f"{name}.csv"
    status, told, err = tool(plot, tmp_path / name, "-o", out)
    assert (status, told, err) == (0, f"written: {tmp_path}/caf?.csv\n", "") and b"\ncaf\xe9,1," in out.read_bytes()
    assert "caf?" in tool(plot, tmp_path / name)[1]
    for picture in ("x.png", "x.svg", "x.pdf", f"{name}.png"):
        assert tool(plot, tmp_path / name, "-o", tmp_path / picture)[0] == 0 and (tmp_path / picture).exists()
    points = embedding.Map([[0.0, 1.0], [1.0, 0.0]], [0, 1], ["a", name], ("x", "y"), name)
    plot.write_picture(plot.scatter(points), str(tmp_path / "map.png"))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give RUNs, one or several, or --embedding"),
        (["nowhere"], "nowhere: no such run"),
        (["folder"], "folder: no such run"),
        (["run", "nowhere"], "nowhere: no such run"),
        (["run", "run/log.jsonl"], "run/log.jsonl: is given twice"),
        (["empty"], "log.jsonl: holds no line of a run yet"),
        (["binary"], "log.jsonl: holds no line of a run"),
        (["other"], "log.jsonl: holds neither losses nor accuracies"),
        (["begun"], "log.jsonl: its first epoch has not ended, and no config.json"),
        (["run", "--label", "a", "--label", "b"], "--label is given 2 times for 1 runs"),
        (["run", "-o", "folder"], "-o folder: is a folder"),
        (["run", "-o", "none/x.csv"], "there is no folder none"),
        (["run", "--csv", "-o", "x.png"], "must end in .csv"),
        (["run", "-o", "x.jsonl"], "-o x.jsonl: must end in .csv, for a table, or"),
        (["run", "-o", "run"], "-o run: is a folder"),
        (["run", "-o", "x" * 300 + ".csv"], "x.csv: cannot be written (File name too long)"),
        (["run", "-o", "run/log.jsonl/x.csv"], "there is no folder run/log.jsonl"),
        (["x" * 300], "xxx: no such run"),
        (["y/" * 3000 + "x"], "y/x: no such run"),
        ([os.fsdecode(b"\xff")], "\\udcff: no such run"),
        (["--embedding", "x" * 300, "data"], "data: no such folder"),
        (["run", "--method", "tsne"], "--method tsne goes with --embedding"),
        (["run", "--embedding", "c.pth.tar", "data"], "give RUNs, one or several, or --embedding"),
        (["--embedding", "c.pth.tar", "nowhere"], "nowhere: no such folder"),
        (["--embedding", "c.pth.tar", "data", "--mean"], "--label and --mean are for RUNs"),
    ],
)
def test_bad_input(tool, tmp_path, monkeypatch, words, message):
    if "x.jsonl" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for name, text in (
        ("folder", None),
        ("empty", b""),
        ("binary", b"\x89PNG\n\x00\n"),
        ("other", b'{"kind": "speed", "step": 3, "epoch": 1}\n{"kind": "speed", "step": 6, "epoch": 2}\n'),
        ("begun", b'{"kind": "train", "step": 3, "epoch": 0, "loss": 1.0}\n'),
    ):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "log.jsonl").write_bytes(text)
    (tmp_path / "other" / "config.json").write_text('{"steps_per_epoch": 3}')
    before = sorted(tmp_path.rglob("*"))
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is, and pytest's is not
    status, out, err = tool(plot, *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_written(tool, tmp_path, monkeypatch):
    """A disk that fills up leaves the older file as it was."""
    write_run(tmp_path / "run")
    (tmp_path / "x.csv").write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, _, err = tool(plot, tmp_path / "run", "-o", tmp_path / "x.csv")
    assert status == 2 and err.count("\n") == 1 and "No space left on device" in err
    assert (tmp_path / "x.csv").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.csv"]
