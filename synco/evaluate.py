"""What a checkpoint's features are worth, in one table: kNN, logistic regression, and measures of the features.

  python -m synco.evaluate CHECKPOINT DATA
  python -m synco.evaluate CHECKPOINT DATA --compare OTHER --features FOLDER -o evaluation.json

CHECKPOINT, OTHER: of SynCo, MoCo, a classifier or torchvision's own weights, or 'random' for untrained ones, beside a
checkpoint of its network. DATA holds train/CLASS/IMAGE and val/CLASS/IMAGE. The features of both are computed once;
with --features they are kept for other programs and, with what was found of them, for the next time; --features-only
stops there. Several processes: torchrun -m synco.evaluate ...

The logistic regression is trained on the stored features of the images' centres, with an L2 penalty chosen on a tenth
of the training images: it is not the published linear probe, which sees augmented views (main_lincls.py).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from synco import cache, datasets, distributed, features, files, knn, measures, metrics, options, subsets
from synco.distributed import Process, say
from synco.errors import Failure, UserError
from synco.features import Backbone, Store
from synco.launch import launch

NEIGHBOURS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)
PERCENTS = (100, 10, 1)
RANKED = 25_600  # images that RankMe is computed from, as in its paper
VIEWED = 10_000  # val images that alignment and uniformity are computed from
DRAWS = 10_000  # of the bootstrap
# the rows of the table that are no accuracies
MEASURES = {
    "RankMe": "{rankme:.1f} of {width}",
    "alignment": "{alignment:.4f}",
    "uniformity": "{uniformity:.3f}",
    "norm, mean ± deviation": "{norm_mean:.3f} ± {norm_std:.3f}",
    "spread": "{spread:.4f}",
}


@dataclass
class Result:
    """What was found of one checkpoint.

    hits: {measure: which val images it got right (M,)}; strengths: {measure: the L2 chosen}; facts: what else.
    """

    facts: dict = field(default_factory=dict)
    hits: dict[str, np.ndarray] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)

    def save(self, path: str) -> None:
        """Write it as JSON with its SHA-256, whole or not at all. Raises OSError if it cannot be written."""
        hits = {name: np.packbits(right).tobytes().hex() for name, right in self.hits.items()}
        content = {"facts": self.facts, "hits": hits, "strengths": self.strengths}
        files.write_json(path, content | {"sha256": _sha256(content)})

    @classmethod
    def load(cls, path: str, count: int) -> "Result | None":
        """What `save` wrote, of that many val images; None where there is none, or it is damaged."""
        try:
            content = files.read_json(path)
        except UserError:
            return None
        if content.pop("sha256", None) != _sha256(content):
            return None
        packed = {name: np.frombuffer(bytes.fromhex(bits), np.uint8) for name, bits in content["hits"].items()}
        hits = {name: np.unpackbits(bits, count=count).astype(bool) for name, bits in packed.items()}
        return cls(content["facts"], hits, content["strengths"])


def _sha256(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """One checkpoint's stored features of a split's images: rows (M, D) as they are, labels (M,) or None."""

    rows: np.ndarray
    labels: torch.Tensor | None
    device: torch.device

    def raw(self, positions: np.ndarray | slice) -> torch.Tensor:
        """Some rows, on the device."""
        return torch.from_numpy(np.array(self.rows[positions])).to(self.device)

    def unit(self, positions: np.ndarray | slice) -> torch.Tensor:
        """Some rows, with norm 1, in float64."""
        return knn.unit_rows(self.rows[positions], self.device)


def flags() -> options.Parser:
    """The command line."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="what to evaluate, or 'random'")
    options.add_data(parser, unlabelled=True)
    options.add_distributed(parser)
    features.add_features(parser)
    flag("--compare", metavar="OTHER", help="a second checkpoint, on the same images, and whether the two differ")
    flag("--features-only", action="store_true", help="write the features into --features, and nothing else")
    flag("-o", "--output", metavar="FILE", help="a JSON file to write the table into, or to renew")
    return parser


def parse() -> argparse.Namespace:
    """The flags of the command line, checked."""
    args = flags().parse_args()
    options.check_data(args)
    if args.features_only and args.features is None:
        raise UserError("--features-only writes into --features FOLDER; give it")
    if args.features_only and args.output:
        raise UserError(f"-o {args.output}: --features-only makes no table; leave one of the two out")
    if args.output is not None:
        files.check_output(args.output, f"-o {args.output}")
    return args


def run(process: Process, args: argparse.Namespace) -> None:
    """Evaluate one checkpoint or two, print the table, write the JSON file."""
    datasets.fetch(args, process)
    train = datasets.load(args, "train", labelled=False)
    val = datasets.load(args, "val", labelled=False)
    labelled = bool(train.classes and val.classes)
    parts = []
    if labelled and not args.features_only:
        datasets.same_classes(train, val, args.data)
        parts = labelled_parts(train, args.seed)
        say_missing(train, val)
    if args.cache_images:
        cache.keep([train, val], process)
    paths = [args.checkpoint] + [args.compare] * (args.compare is not None)
    models = open_models(args, paths, process.device)
    digests = [files.sha256(path) if process.rank == 0 and path != "random" else None for path in paths]
    for model in models:
        say(f"{'checkpoint':18} {model.source}; {model.arch} at {model.img_size} pixels")
    if len({model.img_size for model in models}) > 1:
        say(f"{'image sizes':18} differ: each network sees the images at its own")
    classes = f", {len(train.classes)} classes" if labelled else ", without labels: no accuracies"
    say(f"{'images':18} {len(train)} to train, {len(val)} to validate{classes}")
    with features.open_store(args, process) as store:
        results = [evaluate(model, train, val, parts, store, args) for model in models]
    if args.features_only or process.rank:
        return
    table = tabulate(results, paths, digests, args.seed)
    print_table(table, results, len(val))
    if args.output:
        settings = {name: getattr(args, name) for name in "data dataset limit_images hold_out split_seed seed".split()}
        facts = {"val_images": len(val), "settings": settings} | metrics.origin()
        try:
            files.write_json(args.output, table | facts)
        except OSError as error:
            raise Failure(f"-o {args.output}: cannot be written ({error.strerror})") from error
        say(f"written: {args.output}")


def open_models(args: argparse.Namespace, paths: list[str], device: torch.device) -> list[Backbone]:
    """The backbones of these paths; an untrained one is like the checkpoint beside it, but for what flags say."""
    models, like = {}, args
    for path in sorted(paths, key=lambda path: path == "random"):
        models[path] = model = features.open_backbone(like, path, device)
        if "random" in paths:
            unset = [name for name in ("arch", "stem", "img_size", "stats") if getattr(args, name) is None]
            like = argparse.Namespace(**vars(args) | {name: getattr(model, name) for name in unset})
    return [models[path] for path in paths]


def labelled_parts(train: datasets.Images, seed: int) -> list[tuple[int, np.ndarray, str]]:
    """[(percent of the labels, the positions of its images, where the list is from)], without lists that are not to be
    had. Every process must call this."""
    parts = []
    place = {name: i for i, name in enumerate(train.names)}
    for percent in PERCENTS:
        try:
            part, source = subsets.subset(train, percent, seed)
            if len(part) < 2:
                raise UserError(f"{len(part)} image, and one is to be held out")
        except UserError as error:
            say(f"{f'{percent} % of the labels':18} left out: {error}")
            continue
        positions = np.arange(len(train)) if percent == 100 else np.array([place[name] for name in part.names])
        parts.append((percent, positions, source))
    return parts


def say_missing(train: datasets.Images, val: datasets.Images) -> None:
    """Say which classes have no images in a split, and for which k of kNN there are too few."""
    for name, images in (("train", train), ("val", val)):
        without = sorted(set(range(len(images.classes))) - set(map(int, images.targets)))
        if without:
            shown = ", ".join(images.classes[i] for i in without[:3]) + (", ..." if len(without) > 3 else "")
            say(f"{name + ' classes':18} {len(without)} of {len(images.classes)} have no images: {shown}")
    fewer = [str(k) for k in NEIGHBOURS if k > len(train)]
    if fewer:
        shown = ", ".join(fewer[:-1]) + " and " * (len(fewer) > 1) + fewer[-1]
        say(f"{'kNN':18} k = {shown}: train has {len(train)} images, and all of them vote")


# ------------------------------------------------------------------------------------------------- one checkpoint


def evaluate(
    model: Backbone, train: datasets.Images, val: datasets.Images, parts: list, store: Store, args: argparse.Namespace
) -> Result | None:
    """All numbers of one checkpoint, the same in every process; with --features-only none. Every process must call it.

    parts: from `labelled_parts`.
    """
    device = store.process.device
    splits = []
    for name, images in (("train", train), ("val", val)):
        labels = features.labels_of(images)
        labels = None if labels is None else torch.from_numpy(labels).to(device)
        splits.append(Split(store.features(model, images, name), labels, device))
    if args.features_only:
        return None
    viewed = val.subset(features.spread(len(val), VIEWED).tolist())
    views = [Split(store.features(model, viewed, f"view{i}", crop=i, seed=args.seed), None, device) for i in (0, 1)]
    path = os.path.join(store.folder, f"result-{result_key([*splits, *views], parts, args.seed)}.json")
    result = distributed.from_rank_0(Result.load(path, len(val)) if store.process.rank == 0 else None)
    if result is None:
        result = compute(*splits, views, parts, store, args.seed)
        try:
            if store.kept and store.process.rank == 0:
                result.save(path)
        except OSError as error:
            distributed.warn(f"{path}: cannot be written ({error.strerror}); the next call computes it anew")
    elif store.kept:
        say(f"{'numbers':18} there already, in {path}")
    about = {"checkpoint": model.source, "arch": model.arch, "img_size": model.img_size}
    result.facts = about | {"weights_sha256": model.sha256} | result.facts
    return result


def result_key(splits: list[Split], parts: list, seed: int) -> str:
    """What a result is known by: a digest of all that it depends on, this code and the libraries' versions among it."""
    about = [seed, splits[0].device.type, torch.__version__, np.__version__]
    about += [files.sha256(module) for module in (__file__, features.__file__, knn.__file__, measures.__file__)]
    about += [[percent, hashlib.sha256(positions).hexdigest()] for percent, positions, _ in parts]
    for folder in (os.path.dirname(split.rows.filename) for split in splits):  # its name says of which weights, images
        about += [os.path.basename(folder), files.sha256(os.path.join(folder, "checks.npy"))]
    return _sha256(about)[:16]


def compute(train: Split, val: Split, views: list[Split], parts: list, store: Store, seed: int) -> Result:
    """The numbers of stored features, the same in every process. Every process must call this."""
    result = Result()
    if parts:
        result.hits |= neighbours(train, val, store.process)
        features.leave_if_warned("the features are kept" if store.kept else "nothing was written")
    tasks = [lambda: describe(train, val, views)]
    tasks += [regression(train, val, percent, positions, seed) for percent, positions, _ in parts]
    for facts, hits, strengths in shared(tasks, store.process):
        result.facts |= facts
        result.hits |= hits
        result.strengths |= strengths
    return result


def shared(tasks: list[Callable], process: Process) -> list:
    """What the tasks return, in every process; each is done by one of them, so nothing depends on how many there are.

    Every process must call this.
    """
    mine = {i: tasks[i]() for i in range(process.rank, len(tasks), process.world_size)}
    distributed.barrier()  # at the store: a task may take longer than a collective waits
    every = {i: found for part in distributed.from_all(mine) for i, found in part.items()}
    return [every[i] for i in range(len(tasks))]


def neighbours(train: Split, val: Split, process: Process) -> dict[str, np.ndarray]:
    """{"knn k=... t=...": which val images weighted kNN gets right}. Every process must call this."""
    classes = int(train.labels.max()) + 1
    similarity, rows = knn.search(train.rows, val.rows, max(NEIGHBOURS), process)
    first = len(val.rows) * process.rank // process.world_size
    found = {}
    for start in range(0, len(rows), knn.ROUND):
        part = slice(start, start + knn.ROUND)
        labels = train.labels[rows[part]]
        wanted = val.labels[first + start : first + start + len(labels)]
        for k in NEIGHBOURS:
            for t in TEMPERATURES:
                hits = knn.vote(similarity[part, :k], labels[:, :k], classes=classes, t=t) == wanted
                found.setdefault(f"knn k={k} t={t:g}", []).append(hits.cpu().numpy())
    mine = {name: np.concatenate(hits) for name, hits in found.items()}
    everyone = distributed.from_all(mine)
    names = next(part for part in everyone if part)
    return {name: np.concatenate([part[name] for part in everyone if part]) for name in names}


def describe(train: Split, val: Split, views: list[Split]) -> tuple[dict, dict, dict]:
    """The measures of the features that need no labels, for `shared`."""
    ranked = train.raw(features.spread(len(train.rows), RANKED))
    rank, width = measures.rankme(ranked) if ranked.any() else 0.0, ranked.shape[1]
    norms = torch.cat(
        [train.raw(slice(i, i + knn.CHUNK)).double().norm(dim=1) for i in range(0, len(train.rows), knn.CHUNK)]
    )
    shown = val.unit(features.spread(len(val.rows), VIEWED))
    variance = measures.spread(shown)
    facts = {"width": width, "rankme": rank, "rankme_images": len(ranked), "norm_mean": norms.mean().item()}
    facts |= {"norm_std": norms.std(correction=0).item(), "spread": variance}
    facts |= {"alignment": measures.alignment(*(view.unit(slice(None)) for view in views))}
    facts |= {"uniformity": measures.uniformity(shown), "view_images": len(shown)}
    return facts | {"collapse": measures.collapse_in_words(variance, rank, width)}, {}, {}


def regression(train: Split, val: Split, percent: int, positions: np.ndarray, seed: int) -> Callable:
    """A task for `shared`: logistic regression on that percent of the labels, at these positions."""

    def task():
        rows, labels = train.raw(positions), train.labels[torch.from_numpy(positions).to(train.device)]
        drawn = np.random.default_rng(distributed.seed_of("held out", seed, percent)).permutation(len(rows))
        held_out = torch.zeros(len(rows), dtype=torch.bool, device=train.device)
        held_out[torch.from_numpy(drawn[: max(1, len(rows) // 10)]).to(train.device)] = True
        fitted, strength = measures.choose_strength(rows, labels, held_out)
        parts = [fitted.predict(val.raw(slice(i, i + knn.CHUNK))) for i in range(0, len(val.rows), knn.CHUNK)]
        name = f"logistic {percent} %"
        return {}, {name: (torch.cat(parts) == val.labels).cpu().numpy()}, {name: strength}

    return task


# ------------------------------------------------------------------------------------------------------- the table


def tabulate(results: list[Result], paths: list[str], digests: list[str | None], seed: int) -> dict:
    """The numbers as JSON holds them: accuracies in percent with their 95 % intervals, and of two their differences."""

    def draw():
        return np.random.default_rng(distributed.seed_of("bootstrap", seed))

    def entry(values):
        low, high = measures.interval(100.0 * values, DRAWS, draw())
        return {"top1": 100.0 * float(values.mean()), "low": low, "high": high}

    found = []
    for path, digest, result in zip(paths, digests, results):
        accuracies = {name: entry(hits) for name, hits in result.hits.items()}
        for name, strength in result.strengths.items():
            accuracies[name]["l2"] = strength
        found.append({"path": path, "checkpoint_sha256": digest} | result.facts | {"accuracies": accuracies})
    table = {"checkpoints": found}
    if len(results) == 2:
        differences = {}
        for name in results[0].hits:
            one, other = (result.hits[name].astype(np.float64) for result in results)
            low, high = measures.interval(100 * (other - one), DRAWS, draw())
            differences[name] = {"difference": 100 * (other - one).mean(), "low": low, "high": high}
            differences[name]["differ"] = bool(low > 0 or high < 0)
        table["differences"] = differences
    return table


def print_table(table: dict, results: list[Result], count: int) -> None:
    """Print what `tabulate` has found. count: of val images."""
    checkpoints, differences = table["checkpoints"], table.get("differences", {})
    if len(checkpoints) == 2:
        print(f"\n{'':26}{'CHECKPOINT':>24}{'OTHER':>24}{'OTHER - CHECKPOINT':>28}")
    else:
        print(f"\n{'':26}{'top-1, 95 % interval':>24}")
    for name in results[0].hits:
        line = f"{measures.in_words(name).replace('logistic regression,', ' '):26}"
        for checkpoint in checkpoints:
            line += "{:>24}".format("{top1:.2f} [{low:.2f}, {high:.2f}]".format(**checkpoint["accuracies"][name]))
        if name in differences:
            found = differences[name]
            line += "{:>28}".format("{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**found))
            line += "  they differ" if found["differ"] else "  no difference seen"
        elif "l2" in checkpoints[0]["accuracies"][name]:
            line += f"  L2 {checkpoints[0]['accuracies'][name]['l2']:g}"
        print(line)
    for title, form in MEASURES.items():
        print(f"{title:26}" + "".join(f"{form.format(**checkpoint):>24}" for checkpoint in checkpoints))
    for name, checkpoint in zip(("CHECKPOINT: ", "OTHER: ") if len(checkpoints) == 2 else ("",), checkpoints):
        print(name + checkpoint["collapse"])
    if results[0].hits:
        print(
            f"\nIntervals: bootstrap over the {count} val images ({DRAWS} draws), which says nothing of other training "
            "runs or images.\nLogistic regression: on the stored features of the images' centres, not the published "
            "linear probe."
        )


if __name__ == "__main__":
    launch(run, parse)
