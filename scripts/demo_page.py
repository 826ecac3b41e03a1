"""Print the demo's results as a table, and write FOLDER/index.html: one page of all it has found, in one file.

  python -m scripts.demo_page FOLDER

FOLDER is that of scripts/demo.sh, which calls this at its end.
"""

import base64
import pathlib
import re

from synco import files, look, metrics, options
from synco.errors import UserError
from synco.launch import command

WEIGHTS = {"random": "untrained", "pretrained": "SynCo"}  # folder of the trials: column
STYLE = """
table { border-collapse: collapse; margin: 12px 0; } tr { border-bottom: 1px solid var(--line); }
th, td { padding: 4px 20px 4px 0; text-align: left; }
pre { background: #f1f3f5; padding: 10px; border-radius: 5px; white-space: pre-wrap; overflow-wrap: anywhere; }
.curves { overflow-x: auto; } .curves img { width: 100%; min-width: 720px; }
.maps { display: flex; flex-wrap: wrap; gap: 10px; } .maps div { flex: 1 1 400px; } .maps img { width: 100%; }
"""
NEXT = """\
# the curves of a run, while it goes on as well
.venv/bin/tensorboard --logdir "{folder}/pretrain"
# what the features are worth: kNN, logistic regression and other measures, with intervals
.venv/bin/python -m synco.evaluate "{folder}"/pretrain/checkpoint_*.pth.tar "{folder}/patches"
# your own images, FOLDER/train/CLASS/IMAGE or without classes, on a GPU; --help lists the flags
.venv/bin/python main_synco.py -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 8 \\
  --save-dir runs/mine FOLDER"""


def parse():
    """The command line."""
    parser = options.Parser(__doc__)
    parser.prog = "python -m scripts.demo_page"
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="that of scripts/demo.sh")
    return parser.parse_args()


def run(args) -> None:
    """Read what the demo has left in the folder, print the table, write the page."""
    folder = args.folder
    try:
        rows = results(folder)
        content = page(folder, rows)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; scripts/demo.sh makes it") from error
    try:
        with files.atomic_write(folder / "index.html") as file:
            file.write(content.encode())
    except OSError as error:
        raise UserError(f"{folder / 'index.html'}: cannot be written ({error.strerror})") from error
    print()
    for row in rows:
        print("{:52} {:>14} {:>14}".format(*row))
    print(f"\n{NEXT.format(folder=folder)}\n\nAll of it on one page: {folder / 'index.html'}")


def results(folder: pathlib.Path) -> list[tuple[str, ...]]:
    """A table of words: what is measured, of random weights, and after pretraining; first its heading."""
    log = metrics.read_log(str(folder / "pretrain" / "log.jsonl"))
    knn = [line["top1"] for line in log if line["kind"] == "knn"]
    if not knn:
        raise UserError(f"{folder / 'pretrain' / 'log.jsonl'}: has no kNN accuracy; scripts/demo.sh makes it")
    rows = {"kNN": [f"{knn[0]:.1f} %", f"{knn[-1]:.1f} %"]}
    for name in WEIGHTS:
        trials = folder / "trials" / name
        probe, tuned = (result_in(trials / kind) for kind in ("lincls", "semisup"))
        chosen = pathlib.Path(tuned["checkpoint"]).parent.name
        for measure, rates, top1, best in (
            ("linear probe", [head["name"] for head in probe["heads"]], probe["val"]["top1"], probe["head"]),
            ("fine-tuned on 10 %", sorted(path.name for path in trials.glob("semisup/lr*")), tuned["top1"], chosen),
        ):
            measure = f"{measure}, rates {' '.join(rates).replace('lr', '')}"
            rows.setdefault(measure, []).append(f"{top1:.1f} % at {best.removeprefix('lr')}")
    heading = f"top-1 on {tuned['val_images']:,} val patches", *WEIGHTS.values()
    return [heading, *((measure, *cells) for measure, cells in rows.items())]


def result_in(folder: pathlib.Path) -> dict:
    """The result.json of a trial."""
    found = files.read_json(folder / "result.json")
    if not found:
        raise UserError(f"{folder / 'result.json'}: is not there; scripts/demo.sh makes it")
    return found


def page(folder: pathlib.Path, rows: list[tuple[str, ...]]) -> str:
    """The page. rows: from `results`."""
    lines = ("".join(f"<{kind}>{look.text(cell)}" for cell in row) for kind, row in zip(["th"] + ["td"] * 9, rows))
    maps = "".join(f"<div>{picture(folder / f'map-{name}.png', title)}</div>" for name, title in WEIGHTS.items())
    nearest = re.search("<section>.*?</section>", (folder / "features.html").read_text(encoding="utf-8"), re.S)[0]
    parts = [
        look.section(
            "Results",
            "Val's patches are from the photographs' right quarters, of which nothing was trained on. The probe trains "
            "one layer on labelled patches, the fine-tuning the whole network on a tenth of them. Both weights had the "
            "same learning rates, and each takes what is best on 640 training patches that are held out. All numbers "
            "are of this run, of seed 0; rounding alone has moved SynCo's by one (kNN) to three points (fine-tuning).",
            f"<table><tr>{'<tr>'.join(lines)}</table>",
        ),
        look.section(
            "How the pretraining went",
            "Without labels. Synthesis begins after two epochs: most interpolated negatives lie nearer to a query than "
            "its positive, which hardly ever ranks first any more. The kNN accuracy is what counts.",
            f"<div class=curves>{picture(folder / 'curves.png', 'curves of the pretraining')}</div>",
        ),
        look.section(
            "Maps of the features",
            "A point is a patch of val; colour and shape tell its photograph. First by random weights, then by SynCo.",
            f"<div class=maps>{maps}</div>",
        ),
        nearest + "<p>Confusions, near-duplicates and hard negatives: <a href=features.html>features.html</a></p>",
        look.section(
            "What to do next",
            "In the repository's folder; README.md leads to the manual.",
            f"<pre>{look.text(NEXT.format(folder=folder))}</pre>",
        ),
    ]
    head = "<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>SynCo's demo</title>"
    head += f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{look.STYLE}{STYLE}</style>"
    about = "A ResNet-18 has looked at patches of 16 photographs, and was never told which patch is of which."
    return f"{head}<body><h1>SynCo's demo</h1><p>{about}</p>{''.join(parts)}</body></html>\n"


def picture(path: pathlib.Path, title: str) -> str:
    """A PNG file as an image that needs no file."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f"<img src='data:image/png;base64,{content}' alt='{title}' title='{title}'>"


if __name__ == "__main__":
    command(run, parse)
