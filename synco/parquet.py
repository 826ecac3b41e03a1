"""Hugging Face's parquet files of images, as a source to pack: they decode a hundred images to read one."""

import contextlib
import json
import os
from collections.abc import Iterator

from synco import imagenet, layouts
from synco.errors import UserError


def files_of(root: str, split: str) -> list[str]:
    """The parquet files of a split, relative to root, sorted."""
    return layouts.files_of(root, split, "parquet")


class Source:
    """The images of a split in their files' order. names, classes, labels: as `pack.Stored` has them.

    ImageNet's images have their canonical names; others their path, or where there is none their number.
    Raises UserError where pyarrow or a column of images is missing, or a file cannot be read.
    """

    def __init__(self, root: str, split: str) -> None:
        self.paths = [os.path.join(root, path) for path in files_of(root, split)]
        paths, numbers, self.starts = [], [], [0]
        for path in self.paths:
            with _opened(path) as file:
                self.image, label, self.classes = _columns(path, file.schema_arrow)
                columns = [f"{self.image}.path"] + [label] * bool(label)
                rows = file.read(columns=columns).to_pylist()
            paths += [(row[self.image] or {}).get("path") for row in rows]
            numbers += [row[label] for row in rows] if label else []
            self.starts.append(len(paths))
        plain = [path or f"{i:09}.jpg" for i, path in enumerate(paths)]
        self._name(plain, numbers)

    def _name(self, paths, numbers):
        """Set names, classes and labels."""
        canonical = [imagenet.canonical(path, {}) for path in paths]
        if None not in canonical:
            self.names, labels = canonical, [name.partition("/")[0] for name in canonical]
        elif not numbers:
            self.names, self.classes, self.labels = paths, [], [0] * len(paths)
            return
        else:
            names = dict(enumerate(self.classes)) or {n: str(n) for n in numbers if n is not None}
            odd = set(numbers) - names.keys()
            if odd:
                raise UserError(f"{self.paths[0]}: its label {odd.pop()} is none of its classes'")
            labels = [names[n].replace("/", "_") for n in numbers]
            self.names = layouts.names_of(paths, labels, self.paths[0])
        self.classes = sorted(set(labels))
        number = {label: i for i, label in enumerate(self.classes)}
        self.labels = [number[label] for label in labels]

    def contents(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of the images `start` to `stop` - 1. Each group of rows is read once."""
        for path, first, end in zip(self.paths, self.starts, self.starts[1:]):
            if first < stop and end > start:
                with _opened(path) as file:
                    for group in range(file.num_row_groups):
                        count = file.metadata.row_group(group).num_rows
                        if first < stop and first + count > start:
                            column = file.read_row_group(group, columns=[f"{self.image}.bytes"]).column(self.image)
                            for row in column[max(0, start - first) : stop - first]:
                                content = row.as_py()
                                if not content or content["bytes"] is None:
                                    raise UserError(f"{path}: an image has no bytes in it, but at most a path")
                                yield content["bytes"]
                        first += count


@contextlib.contextmanager
def _opened(path):
    """A parquet file. What goes wrong with it is a UserError that names it."""
    try:
        import pyarrow.parquet as pq  # an optional package, for these files alone
    except ImportError as error:
        raise UserError(f"{path}: to read it takes pyarrow: pip install pyarrow") from error
    import pyarrow

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as a parquet file ({' '.join(str(error).split())})") from error


def _columns(path, schema):
    """(the column of images, that of labels or None, the labels' names or []) of a parquet file."""
    import pyarrow

    kinds = {field.name: field.type for field in schema}
    images = [
        name
        for name, kind in kinds.items()
        if pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    ]
    if not images:
        raise UserError(f"{path}: has no column of images, with bytes and path; it has {', '.join(kinds)}")
    label = "label" if "label" in kinds else None
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        classes = list(features[label]["names"])
    except (KeyError, TypeError, ValueError):  # only what the datasets library has written says it
        classes = []
    return images[0], label, classes
