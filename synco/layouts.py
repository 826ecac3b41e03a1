"""Where a data set's images lie: a folder, with classes or without, a list, or tar shards; each becomes an `Index`."""

import csv
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from synco import distributed, files, index, records, tars
from synco.errors import UserError
from synco.index import is_image
from synco.records import Index

SPLITS = {"train": "train", "val": "val(?:idation)?"}  # as the names of shards have them


def folder(root: str, split: str, labelled: bool = True) -> Index:
    """The images of root/split. Raises UserError where a folder or the images are missing.

    labelled: whether they must be in class folders; if not, those at any depth of root are train's where it has neither
    a folder train nor val.
    """
    place, wanted = os.path.join(root, split), f"it should hold {split}/CLASS/IMAGE"
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; {wanted}")
    if os.path.isdir(place):
        found = index.open_index(place)
        if not found.labelled and len(found.groups) > 1 and not found.groups[0]:
            count = int(found.starts[1])
            distributed.say(f"{'images':18} {count} beside class folders, such as {found[0]}: all are without labels")
        return found
    if labelled or split != "train" or os.path.isdir(os.path.join(root, "val")):
        raise UserError(f"{root}: has no folder {split!r} in it; {wanted}")
    try:
        return index.open_index(root, labelled=False)
    except UserError as error:
        raise UserError(f"{error}, and {root} has no folder {split!r} in it; {wanted}") from error


# ------------------------------------------------------------------------------------------------------------- lists


def listed(root: str, split: str, path: str, other: str | None = None) -> Index:
    """The images in a list: a path a line, absolute or below root, and optionally a label after a tab or a comma.

    other: the list of the other split. Raises UserError for a list that cannot be read, in which images are missing or
    come twice, or if one of the two lists has labels and the other none.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; what {path} lists should be in it")

    def make():
        has_labels = {name: next(_lines(name, root))[2] is not None for name in (path, other) if name}
        if len(set(has_labels.values())) > 1:
            with_labels, without = sorted(has_labels, key=has_labels.get, reverse=True)
            raise UserError(
                f"{with_labels} has labels and {without} has none; give both a column of labels, or neither"
            )
        rows = list(_lines(path, root))
        paths = [name for _, name, _ in rows]
        labels = [label for _, _, label in rows]
        odd = [number for number, _, label in rows if (label is None) != (labels[0] is None)]
        if odd:
            raise UserError(
                f"{path}: line {odd[0]} has {'no' if labels[0] is not None else 'a'} label, unlike the first"
            )
        with ThreadPoolExecutor(16) as threads:  # while one waits for a network's disk, others ask on
            there = list(threads.map(lambda name: os.path.isfile(os.path.join(root, name)), paths))
        missing = [name for name, is_there in zip(paths, there) if not is_there]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of its {len(paths)} images are not in {root}: {missing[0]} is first"
            )
        names = names_of([_relative(name, root) for name in paths], labels, path, split)
        states = [index.state(root, os.path.abspath(name)) for name in has_labels]
        return records.of_names(root, names, labelled=labels[0] is not None, paths=paths, source=path), states

    return index.opened(root, f"list {split} {os.path.realpath(path)}", make)


def content_of(path: str) -> bytes:
    """What a list says. Raises UserError if it cannot be read."""
    try:
        with files.open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: the list of images cannot be read ({error.strerror})") from error


def _lines(path: str, root: str) -> Iterator[tuple[int, str, str | None]]:
    """(its number, path, label or None) of each line of a list but a header."""
    content = content_of(path)
    if b"\0" in content:
        raise UserError(f"{path}: not a list of images: it is no text file")
    count = 0
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        text = os.fsdecode(line.removesuffix(b"\r"))
        if not text.strip():
            continue
        try:
            fields = next(csv.reader([text], delimiter="\t" if "\t" in text else ","))
        except csv.Error as error:
            raise UserError(f"{path}: line {number} cannot be read ({error})") from error
        if is_image(fields[-1]) and not text.startswith('"'):
            fields = [text]  # a comma in a file's name
        if len(fields) > 2 or (len(fields) == 2 and not fields[1].strip()):
            raise UserError(f"{path}: line {number}, {text[:80]!r}, is not a path, or a path and a label")
        name, label = fields[0], fields[1].strip() if len(fields) == 2 else None
        if not count and number == 1 and not is_image(name) and not os.path.isfile(os.path.join(root, name)):
            continue  # a header
        count += 1
        yield number, name, label
    if not count:
        raise UserError(f"{path}: the list names no image")


def _relative(path: str, root: str) -> str:
    """A path that may be absolute as it is below root, or without its first slash where it is not below."""
    whole = os.path.normpath(os.path.join(os.path.abspath(root), path))
    return whole.removeprefix(os.path.abspath(root) + "/").lstrip("/")


def names_of(paths: Sequence[str], labels: Sequence[str | None], source: str, split: str = "") -> list[str]:
    """The names of images: "label/path", where what comes before the label in all the paths is left out.

    So train/cat/1.jpg of the class cat is cat/1.jpg, as it is in a folder. Without labels the path, less a first
    folder `split` that all of them have. Raises UserError for a label that could be no folder's name.
    """
    if labels[0] is None:
        whole = all(path.startswith(f"{split}/") for path in paths)
        return [path[len(split) + 1 :] for path in paths] if whole else list(paths)
    bad = [label for label in set(labels) if "/" in label or label in ("", ".", "..")]
    if bad:
        raise UserError(f"{source}: the label {bad[0]!r} could be no folder's name")
    parts = paths[0].split("/")
    for i in (i for i, part in enumerate(parts[:-1]) if part == labels[0]):
        head = "".join(f"{part}/" for part in parts[:i])
        if all(path.startswith(f"{head}{label}/") for path, label in zip(paths, labels)):
            return [path[len(head) :] for path in paths]
    return [f"{label}/{path}" for path, label in zip(paths, labels)]


# ------------------------------------------------------------------------------------------------------------ shards


def files_of(root: str, split: str, ending: str = "tar") -> list[str]:
    """A split's shards, relative to root and sorted: split/*.tar, or such as split-000.tar in root or root/data."""
    named = rf"(.*[-_.])?{SPLITS[split]}([-_.].*)?"
    for place, pattern in ((split, r".+"), ("", named), ("data", named)):
        path = os.path.join(root, place)
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        found = [os.path.join(place, name) for name in names if re.fullmatch(rf"{pattern}\.{ending}", name)]
        if found:
            return found
    return []


def shards(root: str, split: str) -> Index:
    """The images of a split in tar shards. Raises UserError where there are none, or one cannot be read."""
    paths = files_of(root, split)
    if not paths:
        raise UserError(f"{root}: has no shards {split}-*.tar or {split}/*.tar")
    return open_shards(root, split, paths, generic_names, "shards")


def open_shards(root: str, split: str, paths: list[str], names: Callable, kind: str) -> Index:
    """The `Index` of these shards, relative to root: that beside them, see `synco.pack`, or else by `index.opened`.

    names: a function of (the images' members, their labels or Nones, each one's shard) that gives their names; kind:
    tells its indices from others'.
    Raises UserError if a shard is of another size than the index beside it says.
    """
    warn_of_gaps(paths)
    place = os.path.dirname(paths[0])
    around = os.path.join(root, place) if place else root
    settings = files.read_json(os.path.join(around, f"{split}.pack.json"))
    if settings.get("short_side"):
        made = f"short side {settings['short_side']}, JPEG quality {settings['quality']}"
        distributed.say(f"{'images':18} {split}: re-encoded when they were packed ({made})")
    beside = index.read(os.path.join(around, f"{split}.index"), around)
    if beside:
        found = beside[0]
        known = [os.path.join(place, found.path(i)) for i in range(len(found.sizes))]
        if known == paths:
            for path, size in zip(paths, found.sizes.tolist()):
                now = os.path.getsize(os.path.join(root, path))
                if now != size:
                    raise UserError(
                        f"{os.path.join(root, path)}: has changed since {split}.index was made: it has {now} bytes and "
                        f"had {size}; python -m synco.pack --verify tells more"
                    )
            return found
    make = functools.partial(scan_shards, root, paths, names, settings.get("classes"))
    found = index.opened(root, "\0".join([kind, split, *paths]), make)
    packed = settings.get("images", len(found))
    if packed != len(found):  # the last ones are missing, or the packing goes on
        distributed.warn(f"{around}: its {split} shards hold {len(found)} of the {packed} images of {split}.pack.json")
    return found


def scan_shards(root: str, paths: list[str], names: Callable, classes: list[str] | None = None) -> tuple[Index, list]:
    """(the `Index` of shards as they are now, their states). classes: their names, where the labels are numbers."""
    states = [index.state(root, path) for path in paths]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda path: tars.samples(os.path.join(root, path)), paths))
    owners = [path for path, part in zip(paths, found) for _ in part]
    images = [sample.image for part in found for sample in part]
    labels = [sample.label for part in found for sample in part]
    if not images:
        raise UserError(f"{os.path.join(root, paths[0])}: holds no images" + " nor do the others" * (len(paths) > 1))
    if None in labels and any(label is not None for label in labels):
        i = labels.index(None)
        raise UserError(f"{os.path.join(root, owners[i])}: {images[i].name} has no label, unlike others")
    if classes and labels[0] is not None:
        known = {str(number): name for number, name in enumerate(classes)}
        odd = [(owner, label) for owner, label in zip(owners, labels) if label not in known]
        if odd:
            owner, label = odd[0]
            raise UserError(f"{os.path.join(root, owner)}: its label {label} is none of the {len(classes)} classes")
        labels = [known[label] for label in labels]
    numbers = {path: i for i, path in enumerate(paths)}
    spans = [(numbers[path], image.start, image.count) for path, image in zip(owners, images)]
    whole = [os.path.join(root, path) for path in owners]
    named = names([image.name for image in images], labels, whole)
    return records.of_names(root, named, labelled=labels[0] is not None, paths=paths, spans=spans), states


def generic_names(members: list[str], labels: list[str | None], shards: list[str]) -> list[str]:
    """Names from the members' and their labels; where shards count from nothing again, the shard's name goes before."""
    plain = [tars.plain(member) for member in members]
    if len(set(plain)) < len(plain) and len(set(zip(shards, plain))) == len(plain):
        plain = [f"{os.path.basename(shard)[:-4]}/{name}" for shard, name in zip(shards, plain)]
    return names_of(plain, labels, shards[0])


def warn_of_gaps(paths: Sequence[str]) -> None:
    """Warn of shards that are missing from their sequence, as in train-000.tar, train-002.tar."""
    sequences = {}
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)(?:-of-(\d+))?\.tar", path)
        if match and not re.fullmatch(r"n\d{8}", os.path.basename(path)[:-4]):  # ImageNet's classes count nothing
            sequences.setdefault((match[1], match[3]), []).append(match[2])
    for (head, total), numbers in sequences.items():
        known, ends = {int(number) for number in numbers}, f"-of-{total}" if total else ""
        first = min(known) if min(known) < 2 or not total else 0
        missing = sorted(set(range(first, int(total) + first if total else max(known))) - known)
        if missing:
            name = f"{head}{missing[0]:0{len(numbers[0])}}{ends}.tar"
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            distributed.warn(f"{name}{more} missing from the sequence of {len(numbers)} shards")
