"""A page to look at: what a checkpoint's features take for alike, in one HTML file that needs nothing else.

  python -m synco.look CHECKPOINT DATA -o page.html

It shows the nearest training images of some validation images, the most confused classes, the images that are most
alone, near-duplicates between train and val, and, where a pretraining's checkpoint knows the images of its queue, the
hardest negatives of some queries. Without labels it leaves out what needs them; without val, training images are
compared among themselves. CHECKPOINT: of SynCo, MoCo, a classifier or torchvision's own weights, or 'random'. Several
processes: torchrun -m synco.look ...
"""

import argparse
import base64
import collections
import html
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from synco import backbone, cache, checkpoint, datasets, distributed, export, features, files, knn, networks, options
from synco.distributed import Process, say
from synco.errors import Failure, UserError
from synco.features import Backbone
from synco.launch import launch

SHOWN = 8  # neighbours of an image
VOTERS, TEMPERATURE = 20, 0.07
SIDE = 96  # pixels of an image's longer side on the page
LARGEST_PAGE = 50_000_000  # bytes
COMPARED = 10_000  # images that are compared pixel by pixel with their nearest
ALIKE = 0.92  # correlation of two near-duplicates' pixels
QUERIES = 256  # training images whose hardest negatives are counted
AMONG_THEMSELVES = 2000  # training images that stand in for val

STYLE = """
:root { color-scheme: light; --good: #00734d; --bad: #b3261e; --line: #d5d9de; --soft: #5c6570; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 20px; color: #1b1f24; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 36px 0 4px; }
h3 { font-size: 1rem; margin: 18px 0 6px; } p { margin: 4px 0 10px; max-width: 75ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.row { display: flex; gap: 14px; padding: 10px 0; border-top: 1px solid var(--line); align-items: flex-start; }
.many { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 104px; flex: none; }
figure img { display: block; width: 96px; height: 96px; object-fit: contain; background: #f1f3f5; border-radius: 3px;
  border: 3px solid transparent; box-sizing: content-box; }
figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
.good img { border-color: var(--good); } .good b { color: var(--good); }
.bad img { border-color: var(--bad); } .bad b { color: var(--bad); }
.pair { display: flex; gap: 4px; padding: 6px; border: 1px solid var(--line); border-radius: 5px; }
@media (max-width: 640px) { body { padding: 12px; } .row { gap: 8px; } .many { gap: 6px; }
  figure { width: 70px; } figure img { width: 64px; height: 64px; } figcaption { font-size: 11px; } }
"""


@dataclass
class Found:
    """Val images, or training images in their place, and their nearest training images, (Q, k) most similar first."""

    queries: datasets.Images
    bank: datasets.Images
    similarity: np.ndarray
    nearest: np.ndarray
    wanted: np.ndarray | None = None  # (Q,) labels of the queries
    labels: np.ndarray | None = None  # (M,) labels of the bank
    predicted: np.ndarray | None = None  # (Q,)
    duplicates: list = field(default_factory=list)  # from `near_duplicates`
    pictures: dict = field(default_factory=dict)  # those that are on the page already

    @property
    def right(self) -> np.ndarray:
        """(Q,) which queries kNN classifies rightly."""
        return self.predicted == self.wanted


def flags() -> options.Parser:
    """The command line."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="whose features to look at, or 'random'")
    options.add_data(parser, unlabelled=True)
    options.add_distributed(parser)
    features.add_features(parser)
    flag("-o", "--output", required=True, metavar="FILE", help="the page to write, or to renew: FILE.html")
    flag("-n", "--images", default=12, type=options.number(int, 1), help="examples in each part of the page")
    return parser


def parse() -> argparse.Namespace:
    """The flags of the command line, checked."""
    args = flags().parse_args()
    options.check_data(args)
    if not args.output.endswith((".html", ".htm")):
        raise UserError(f"-o {args.output}: must end in .html")
    files.check_output(args.output, f"-o {args.output}")
    return args


def run(process: Process, args: argparse.Namespace) -> None:
    """Find the neighbours, and write the page."""
    datasets.fetch(args, process)
    train = datasets.load(args, "train", labelled=False)
    try:
        val = datasets.load(args, "val", labelled=False)
    except UserError as error:
        say(f"{'val':18} {error}: training images are compared among themselves")
        val = None
    if val is not None and train.classes and val.classes:
        datasets.same_classes(train, val, args.data)
    if args.cache_images:
        cache.keep([train, val] if val is not None else [train], process)
    model = features.open_backbone(args, args.checkpoint, process.device)
    say(f"{'checkpoint':18} {model.source}; {model.arch} at {model.img_size} pixels")
    with features.open_store(args, process) as store:
        bank = store.features(model, train, "train")
        chosen = None if val is not None else features.spread(len(train), AMONG_THEMSELVES)
        queries = store.features(model, val, "val") if val is not None else bank[chosen]
        answers = knn.search(bank, queries, max(VOTERS, SHOWN), process, own=chosen)
        parts = distributed.from_all([x.cpu().numpy() for x in answers])
    if process.rank:
        return
    similarity, nearest = (np.concatenate(part) for part in zip(*parts))
    found = Found(train.subset(chosen.tolist()) if val is None else val, train, similarity, nearest)
    classify(found)
    found.duplicates = near_duplicates(found)
    hardest = hardest_negatives(model, args, process)
    title = f"{model.source}; {model.arch} at {model.img_size} pixels"
    content, count = fitting(lambda n: page(title, found, hardest, n, val is None), args.images)
    if count < args.images:
        say(f"{args.output}: of {count} images in each part in place of {args.images}, to stay below 50 MB")
    try:
        with files.atomic_write(args.output) as file:
            file.write(content)
    except OSError as error:
        raise Failure(f"-o {args.output}: cannot be written ({error.strerror})") from error
    say(f"written: {args.output} ({len(content) / 1e6:.1f} MB)")


def classify(found: Found) -> None:
    """Add the labels, if there are, and what the nearest images vote for."""
    found.wanted, found.labels = features.labels_of(found.queries), features.labels_of(found.bank)
    if found.labels is None or found.wanted is None:
        found.wanted = found.labels = None
        return
    voters = torch.from_numpy(found.similarity[:, :VOTERS]), torch.from_numpy(found.labels[found.nearest[:, :VOTERS]])
    found.predicted = knn.vote(*voters, classes=len(found.bank.classes), t=TEMPERATURE).numpy()


def fitting(make: Callable[[int], bytes], count: int) -> tuple[bytes, int]:
    """make(n), a page of n examples, with the largest n of count, count/2, ... that is not too large → (it, n)."""
    content = make(count)
    while len(content) > LARGEST_PAGE and count > 1:
        count //= 2
        content = make(count)
    return content, count


# -------------------------------------------------------------------------------------------------------- the page


def page(title: str, found: Found, hardest: "Hardest | None", count: int, among: bool) -> bytes:
    """The page with `count` examples in each part. hardest: from `hardest_negatives`; among: there is no val."""
    parts = [neighbours(found, count)]
    if found.predicted is not None:
        parts.append(confusions(found, count))
    parts += [alone(found, count), duplicates(found, count, among)]
    if hardest is not None:
        parts.append(negatives(found, hardest, count))
    of = "training images, among themselves" if among else "val images"
    facts = f"{len(found.queries):,} {of}; {len(found.bank):,} training images"
    if found.predicted is not None:
        facts += (
            f"; kNN (k = {min(VOTERS, found.nearest.shape[1])}, t = {TEMPERATURE}): {100 * found.right.mean():.2f} %"
        )
    head = f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>{text(title)}</title>"
    head += f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}</style>"
    body = f"<h1>What the features take for alike</h1><p>{text(title)}<br>{facts}</p>{''.join(parts)}"
    return f"{head}<body>{body}</body></html>\n".encode("utf-8", errors="replace")


def text(content: object) -> str:
    """Anything as HTML's text; a name that is no UTF-8 has ? in it."""
    return html.escape(str(content).encode("utf-8", errors="replace").decode())


def section(title: str, explanation: str, content: str) -> str:
    """A part of the page; title and explanation are plain text."""
    return f"<section><h2>{text(title)}</h2><p class=soft>{text(explanation)}</p>{content}</section>"


def figure(found: Found, images: datasets.Images, position: int, caption: str = "", right: bool | None = None) -> str:
    """An image with a caption, plain text; right: whether it is marked as right or wrong."""
    key = id(images), int(position)
    if key not in found.pictures:
        found.pictures[key] = jpeg(images.image(int(position)))
    mark = "" if right is None else f"<b>{'✓' if right else '✗'}</b> "
    kind = "" if right is None else " class=good" if right else " class=bad"
    name = text(images.names[int(position)])
    image = f"<img src='data:image/jpeg;base64,{found.pictures[key]}' alt='{name}' title='{name}' loading=lazy>"
    return f"<figure{kind}>{image}<figcaption>{mark}{text(caption)}</figcaption></figure>"


def jpeg(image: Image.Image) -> str:
    """An image, not larger than SIDE, as the base64 of a JPEG."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode()


def class_of(images: datasets.Images, labels: np.ndarray | None, position: int) -> str:
    """The name of an image's class, "" where there are no labels."""
    return "" if labels is None else images.classes[labels[position]]


def pair(found: Found, q: int, n: int, number: float) -> str:
    """A query and a training image side by side, with a number."""
    one = figure(found, found.queries, q, class_of(found.queries, found.wanted, q))
    other = figure(found, found.bank, n, f"{class_of(found.bank, found.labels, n)} {number:.3f}")
    return f"<div class=pair>{one}{other}</div>"


def neighbours(found: Found, count: int) -> str:
    """Some images and their nearest training images."""
    rows = []
    for q in features.spread(len(found.queries), count):
        name = class_of(found.queries, found.wanted, q)
        right = None if found.predicted is None else bool(found.right[q])
        verdict = "" if right in (None, True) else f", taken for {found.bank.classes[found.predicted[q]]}"
        near = []
        for similarity, n in zip(found.similarity[q, :SHOWN], found.nearest[q, :SHOWN]):
            same = None if found.labels is None else bool(found.labels[n] == found.wanted[q])
            near.append(figure(found, found.bank, n, f"{class_of(found.bank, found.labels, n)} {similarity:.3f}", same))
        image = figure(found, found.queries, q, name + verdict, right)
        rows.append(f"<div class=row>{image}<div class=many>{''.join(near)}</div></div>")
    explanation = "Left an image, beside it the training images most similar to it, with the cosine of their features."
    if found.predicted is not None:
        explanation += " ✓ and ✗: of the image's class or not; of the image itself: whether kNN is right."
    return section("Nearest training images", explanation, "".join(rows))


def confusions(found: Found, count: int) -> str:
    """The pairs of classes that kNN confuses most, with examples."""
    wrong = np.flatnonzero(~found.right)
    pairs = collections.Counter(zip(found.wanted[wrong].tolist(), found.predicted[wrong].tolist()))
    blocks = []
    for (of, taken), times in pairs.most_common(count):
        of_pair = wrong[(found.wanted[wrong] == of) & (found.predicted[wrong] == taken)]
        of_pair = of_pair[np.argsort(-found.similarity[of_pair, 0], kind="stable")]
        nearest = [int(np.argmax(found.labels[found.nearest[q]] == taken)) for q in of_pair[:4]]  # of that class
        examples = [pair(found, q, found.nearest[q, i], found.similarity[q, i]) for q, i in zip(of_pair, nearest)]
        total = int((found.wanted == of).sum())
        head = f"{found.bank.classes[of]} taken for {found.bank.classes[taken]}: {times} of {total}"
        blocks.append(f"<h3>{text(head)}</h3><div class=many>{''.join(examples)}</div>")
    explanation = "By kNN. Each example with the nearest training image of the class that it is taken for."
    return section("Most confused classes", explanation, "".join(blocks) or "<p>None is confused.</p>")


def alone(found: Found, count: int) -> str:
    """The images that are least similar to any training image."""
    chosen = np.argsort(found.similarity[:, 0], kind="stable")[:count]
    pairs = [pair(found, q, found.nearest[q, 0], found.similarity[q, 0]) for q in chosen]
    explanation = "Those whose nearest training image, on the right, is the least similar."
    return section("Most alone", explanation, f"<div class=many>{''.join(pairs)}</div>")


def duplicates(found: Found, count: int, among: bool) -> str:
    """Near-duplicates by their pixels, among the pairs of images that the features take for most similar."""
    pairs = [pair(found, *one) for one in found.duplicates[:count]]
    checked = min(COMPARED, len(found.queries))
    explanation = (
        f"{len(found.duplicates)} of {checked:,} images: at 16 × 16 pixels the colours of one of their three nearest "
        f"training images, mirrored or not, correlate with theirs to more than {ALIKE:g}, the number at each pair."
    )
    if found.predicted is not None and found.duplicates and not among:
        others = np.ones(len(found.queries), dtype=bool)
        others[[q for q, _, _ in found.duplicates]] = False
        if others.any():
            explanation += f" kNN without them: {100 * found.right[others].mean():.2f} %, with them "
            explanation += f"{100 * found.right.mean():.2f} %."
    where = "among the training images" if among else "between train and val"
    return section(
        f"Near-duplicates {where}: {len(found.duplicates)}", explanation, f"<div class=many>{''.join(pairs)}</div>"
    )


def near_duplicates(found: Found) -> list[tuple[int, int, float]]:
    """[(query, training image, correlation of their pixels)], the most alike first, see `duplicates`."""
    checked = np.argsort(-found.similarity[:, 0], kind="stable")[:COMPARED]
    near = found.nearest[checked, :3]
    others = np.unique(near)
    with ThreadPoolExecutor(distributed.usable_cpus()) as pool:  # PIL decodes without Python's lock
        mine = np.array(list(pool.map(lambda q: pattern(found.queries.image(int(q))), checked)))
        theirs = np.array(list(pool.map(lambda n: pattern(found.bank.image(int(n))), others)))
    theirs = theirs[np.searchsorted(others, near)]  # (Q, 3, 16, 16, 3)
    alike = [np.einsum("qhwc,qnhwc->qn", mine, x) for x in (theirs, theirs[:, :, :, ::-1])]
    alike = np.maximum(*alike)
    best = alike.argmax(axis=1)
    pairs = zip(checked.tolist(), near[np.arange(len(near)), best].tolist(), alike.max(axis=1).tolist())
    return sorted((found for found in pairs if found[2] > ALIKE), key=lambda found: -found[2])


def pattern(image: Image.Image) -> np.ndarray:
    """An image at 16 × 16 pixels, less its mean and divided by its norm, (16, 16, 3); zeros where it is one colour."""
    pixels = np.asarray(image.resize((16, 16), Image.BOX), dtype=np.float32)
    pixels = pixels - pixels.mean(axis=(0, 1))
    return pixels / max(float(np.linalg.norm(pixels)), 1.0)


# ----------------------------------------------------------------------------------------------- the queue's negatives


@dataclass
class Hardest:
    """Queries among the images of a pretraining, (Q,), and the rows of its queue, hardest first, as images' numbers.

    numbers, similarity (Q, n); same: share of those n rows that are of the query's own class, and of all rows, in
    percent; None without labels.
    """

    images: datasets.Images
    queries: np.ndarray
    numbers: np.ndarray
    similarity: np.ndarray
    labels: np.ndarray | None
    same: tuple[float, float] | None


def hardest_negatives(model: Backbone, args: argparse.Namespace, process: Process) -> Hardest | None:
    """The hardest negatives in a checkpoint's queue; None, and said why, where its images are not to be told."""
    index, config = model.saved.get("queue_index"), model.saved.get("config", {})
    weights = checkpoint.unprefixed(model.saved.get("state_dict", {}))
    queue = weights.get("queue")
    if queue is None or not isinstance(index, torch.Tensor) or not backbone.is_pretraining(model.saved):
        return None
    images = datasets.load(args, "pretrain")
    known = config.get("train_images"), config.get("train_images_crc32")
    if known != (len(images), images.checksum()) or index.shape != queue.shape[:1] or index.max() >= len(images):
        say(f"{'queue':18} left out: the pretraining's images are others than DATA's (--limit-images, --hold-out?)")
        return None
    chosen = features.spread(len(images), QUERIES)
    rows = torch.stack([model.center_view()(images.image(int(i))) for i in chosen]).to(process.device)
    with torch.no_grad():
        entering = torch.cat([networks.features(model.network, model.head, part) for part in rows.split(64)])
    similarity = project(model, entering.cpu(), args.checkpoint) @ queue.float().T  # (Q, K)
    own = (index == torch.from_numpy(chosen)[:, None]) | (index < 0)
    n = min(config.get("n_hard", 1024), int((~own).sum(dim=1).min()))
    if n < 1:
        return None
    similarity, rows = similarity.masked_fill_(own, -torch.inf).topk(n, dim=1)
    labels, same = features.labels_of(images), None
    if labels is not None:
        of_row, mine = labels[index.clamp(min=0).numpy()], labels[chosen][:, None]
        among = (of_row == mine)[~own.numpy()].mean()
        same = 100 * float((of_row[rows.numpy()] == mine).mean()), 100 * float(among)
    return Hardest(images, chosen, index[rows].numpy(), similarity.numpy(), labels, same)


def project(model: Backbone, rows: torch.Tensor, path: str) -> torch.Tensor:
    """Features (N, D) through the pretraining's own head, one linear layer or two → unit rows (N, C)."""
    weights = export.head_weights(model.saved, path, model.head)
    names = sorted(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    for i, name in enumerate(names):
        rows = F.linear(F.relu(rows) if i else rows, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    return F.normalize(rows, dim=1)


def negatives(found: Found, hardest: Hardest, count: int) -> str:
    """Some queries and their hardest negatives in the queue."""
    images, labels, rows = hardest.images, hardest.labels, []
    for q in features.spread(len(hardest.queries), count):
        number = hardest.queries[q]
        near = []
        for similarity, n in zip(hardest.similarity[q, :SHOWN], hardest.numbers[q, :SHOWN]):
            same = None if labels is None else bool(labels[n] != labels[number])
            near.append(figure(found, images, n, f"{class_of(images, labels, n)} {similarity:.3f}", same))
        image = figure(found, images, number, class_of(images, labels, number))
        rows.append(f"<div class=row>{image}<div class=many>{''.join(near)}</div></div>")
    explanation = (
        "Left the centre of a training image as a query, beside it the rows of the checkpoint's queue that are most "
        "similar to it, with their cosine; rows of the query's own image are left out."
    )
    if hardest.same:
        explanation += (
            f" ✗: of the query's own class. So are {hardest.same[0]:.1f} % of the {hardest.numbers.shape[1]:,} hardest "
            f"rows of {len(hardest.queries)} queries, and {hardest.same[1]:.1f} % of the whole queue."
        )
    return section("Hardest negatives in the queue", explanation, "".join(rows))


if __name__ == "__main__":
    launch(run, parse)
