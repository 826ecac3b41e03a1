"""ImageNet as people hold it: extracted, in its two archives, as Kaggle's tree, or in shards; under the same names."""

import functools
import io
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from synco import distributed, index, layouts, records, tars
from synco.errors import UserError
from synco.index import is_image
from synco.records import Index

PLACES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # of the folders train and val; the others are Kaggle's
KAGGLES = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
# what tarfile, zlib and SciPy raise on a devkit that is damaged or something else
DAMAGED = (
    OSError, EOFError, tarfile.TarError, zlib.error, LookupError, ValueError, TypeError, AttributeError,
    NotImplementedError,
)  # fmt: skip
NAME = re.compile(r"((n\d{8})_\d+|ILSVRC2012_val_\d{8})(?:_(n\d{8}))?")  # Hugging Face's have the class at the end


def find(root: str, split: str) -> Index:
    """The images of a split, "train" or "val", under their canonical names.

    These are wnid/wnid_N.JPEG, and wnid/ILSVRC2012_val_N.JPEG. Raises UserError where root holds them in no form that
    is known, or has no labels for images that need some.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --dataset imagenet looks for ImageNet in it")
    for place in PLACES:
        path = os.path.join(place, split)
        if os.path.isdir(os.path.join(root, path)):
            with os.scandir(os.path.join(root, path)) as entries:
                kinds = {"folder" if entry.is_dir() else "image" if is_image(entry.name) else "" for entry in entries}
            if "folder" in kinds:
                return _said(index.open_index(os.path.join(root, path)), split, f"the folder {path}")
            if "image" in kinds:
                make = functools.partial(_flat, root, path)
                return _said(index.opened(root, f"imagenet {path}", make), split, f"the folder {path}, without classes")
    archive = f"ILSVRC2012_img_{split}.tar"
    if os.path.isfile(os.path.join(root, archive)):
        make = functools.partial(_archive, root, archive)
        return _said(index.opened(root, f"imagenet {archive}", make), split, f"{archive}, read in place")
    paths = layouts.files_of(root, split)
    if paths:
        names = train_names
        if split == "val":  # whose labels may be numbers of train's classes
            classes = find(root, "train").classes if layouts.files_of(root, "train") else []
            names = functools.partial(val_names, root, classes)
        found = layouts.open_shards(root, split, paths, names, "imagenet")
        return _said(found, split, f"{len(paths)} shards, read in place")
    forms = f"{split}/WNID/IMAGE, {archive}, {PLACES[1]}/{split} or shards {split}-*.tar"
    raise UserError(f"{root}: holds ImageNet's {split} in no form that is known: {forms}")


def _said(found, split, form):
    distributed.say(f"{'ImageNet':18} {split}: {len(found)} images in {form}")
    return found


def canonical(member: str, labels: Mapping[str, str]) -> str | None:
    """The canonical name of an image with this path; None if neither that nor {its stem: WNID} tells the class."""
    match = NAME.fullmatch(os.path.splitext(os.path.basename(member))[0])
    wnid = match and (match[2] or match[3] or labels.get(match[1]))
    return f"{wnid}/{match[1]}.JPEG" if wnid else None


def _named(root, members, labels=None):
    """(canonical names of members, states of the file of labels if one was needed). Raises UserError for no name."""
    names = [canonical(member, labels or {}) for member in members]
    states = []
    if None in names and labels is None and any("_val_" in member for member in members):
        path, labels = val_labels(root)
        names, states = [canonical(member, labels) for member in members], [index.state(root, path)]
    if None in names:
        unnamed = [member for member, name in zip(members, names) if name is None]
        raise UserError(f"{root}: the classes of {len(unnamed)} images are not known, such as {unnamed[0]}")
    return names, states


def _flat(root, path):
    """(the `Index` of a folder of images without class folders, states)."""
    images = [os.path.join(path, name) for name in sorted(os.listdir(os.path.join(root, path))) if is_image(name)]
    names, states = _named(root, images)
    return records.of_names(root, names, paths=images), [index.state(root, path), *states]


def _archive(root, name):
    """(the `Index` of one of the two archives, states). The classes' archives in that of train are read in place."""
    path = os.path.join(root, name)
    outer = list(tars.members(path))
    inner = [member for member in outer if member.name.endswith(".tar")]
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda member: list(tars.members(path, member)), inner)
        images = [image for part in (outer, *found) for image in part if is_image(image.name)]
    if not images:
        raise UserError(f"{path}: holds no images")
    names, states = _named(root, [image.name for image in images])
    spans = [(0, image.start, image.count) for image in images]
    return records.of_names(root, names, paths=[name], spans=spans), [index.state(root, name), *states]


def train_names(members: list[str], labels: list[str | None], shards: list[str]) -> list[str]:
    """The canonical names of shards' images, which their own names tell."""
    return _named(shards[0], members)[0]


def val_names(root: str, classes: list[str], members: list[str], labels: list[str | None], shards: list[str]) -> list:
    """The canonical names of val's images in shards: a label is a WNID, or a number of train's classes as sorted."""
    if labels[0] is None:
        return _named(root, members)[0]
    try:
        labels = [classes[int(label)] if label.isdecimal() else label for label in labels]
    except LookupError as error:
        raise UserError(f"{shards[0]}: its labels are numbers beyond train's {len(classes)} classes") from error
    return _named(root, members, {stem(member): label for member, label in zip(members, labels)})[0]


def stem(member: str) -> str:
    """An image's name without folders and ending."""
    return os.path.splitext(os.path.basename(member))[0]


# ------------------------------------------------------------------------------------------------------- labels of val


def val_labels(root: str) -> tuple[str, dict[str, str]]:
    """(the file that tells them, {"ILSVRC2012_val_N": WNID}): Kaggle's table, or the devkit, as archive or folder.

    Raises UserError where there is none or it cannot be read.
    """
    for path in (KAGGLES, f"ILSVRC/{KAGGLES}"):
        if os.path.isfile(os.path.join(root, path)):
            lines = os.fsdecode(layouts.content_of(os.path.join(root, path))).splitlines()
            found = [re.match(r"(ILSVRC2012_val_\d{8}),(n\d{8})\b", line) for line in lines]
            return path, {match[1]: match[2] for match in found if match}
    for path in (f"{DEVKIT}.tar.gz", f"{DEVKIT}.tar", DEVKIT):
        if os.path.exists(os.path.join(root, path)):
            return path, _devkit(os.path.join(root, path))
    raise UserError(f"{root}: has no labels of the val images: put {DEVKIT}.tar.gz or {KAGGLES} beside them")


def _devkit(path):
    """{"ILSVRC2012_val_N": WNID} by the devkit, whose ground truth has the classes by ILSVRC's own numbers."""
    try:
        import scipy.io  # an optional package, for MATLAB's format
    except ImportError as error:
        raise UserError(f"{path}: to read it takes scipy (pip install scipy); {KAGGLES} does without") from error
    parts = [f"{DEVKIT}/data/meta.mat", f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"]
    try:
        if os.path.isdir(path):
            contents = []
            for part in parts:
                with open(os.path.join(os.path.dirname(path), part), "rb") as file:
                    contents.append(file.read())
        else:
            with tarfile.open(path) as kit:
                contents = [kit.extractfile(part).read() for part in parts]
        synsets = scipy.io.loadmat(io.BytesIO(contents[0]), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return {f"ILSVRC2012_val_{i:08}": wnids[int(n)] for i, n in enumerate(contents[1].split(), 1)}
    except (*DAMAGED, scipy.io.matlab.MatReadError) as error:
        raise UserError(f"{path}: is not the devkit {DEVKIT} ({' '.join(str(error).split())})") from error
