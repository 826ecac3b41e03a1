"""A run's folder: which files are its own, where it goes on, what is refused, and what is removed."""

import argparse
import contextlib
import dataclasses
import glob
import os
import re
import shlex
import shutil
import sys

from synco import checkpoint, distributed, files, metrics
from synco.errors import UserError

MARKER = "preempted.json"  # left by a run that was told to stop, until it goes on
CONFIG = "config.json"
NONFINITE = "nonfinite.json"
PATTERNS = ("checkpoint_*.pth.tar", "model_best_*.pth.tar")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What one kind of run leaves in its folder.

    epoch: the checkpoint of an epoch, a pattern of its number or one name for all; within: the one within an epoch,
    which is there until that epoch's own is written; best: the best epoch's; results: what is left beside them.
    kind: what its checkpoints are called; required: the keys without which none can be gone on from.
    """

    kind: str
    required: tuple[str, ...]
    epoch: str
    within: str
    best: str
    results: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether each epoch has a checkpoint of its own."""
        return self.epoch.format(0) != self.epoch


class RunFolder:
    """The save folder of a run, and its log folder, which may be the same.

    overwrite: whether a run that is there is given up; keep: how many numbered checkpoints stay, 0: all;
    restarted: by its launcher, after this very run began: what the folder holds is its own; locks: the stack
    that keeps the folder's lock: closing it releases that.
    """

    def __init__(
        self,
        path: str,
        log_path: str | None,
        run_files: RunFiles,
        *,
        overwrite: bool = False,
        keep: int = 0,
        restarted: bool = False,
        locks: contextlib.ExitStack | None = None,
    ) -> None:
        self.path, self.log_path, self.files = path, log_path or path, run_files
        self.overwrite, self.keep, self.restarted = overwrite and not restarted, keep, restarted
        self.locks, self._lock = locks or contextlib.ExitStack(), None

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.path, name)

    def checkpoints(self) -> list[str]:
        """The checkpoints of this kind: the best if there is one, those of epochs, oldest first, the one within one.

        Each but the best holds all that it takes to go on, the last one of these the most.
        """
        ends = self._numbered() if self.files.numbered else [(0, self.file(self.files.epoch))]
        paths = [self.file(self.files.best), *(path for _, path in ends), self.file(self.files.within)]
        return [path for path in paths if os.path.lexists(path)]

    def _numbered(self):
        """[(number in the name, path)], oldest first."""
        before, after = re.split(r"\{.*\}", self.files.epoch)
        pattern = re.compile(re.escape(before) + r"(\d{4,})" + re.escape(after))
        matches = ((pattern.fullmatch(name), name) for name in _listed(self.path))
        return sorted((int(match[1]), self.file(name)) for match, name in matches if match)

    def results(self) -> list[str]:
        """The results that are there."""
        return [path for path in map(self.file, self.files.results) if os.path.lexists(path)]

    # ------------------------------------------------------------------------------------------ what is gone on from

    def find(self, resume: str) -> tuple[str | None, dict | None]:
        """What --resume asks for: (path, its content), (None, None) for a fresh start. Every process must call this.

        With 'auto' the newest that is whole; a warning says which ones are not.
        Raises UserError for a folder that holds something else, or where nothing can be read.
        """
        path = content = None
        if distributed.rank() == 0:
            path, content = self._find(resume)
        path = distributed.from_rank_0(path)
        if path and content is None:
            content = checkpoint.load(path)
        return path, content

    def _find(self, resume):
        self.lock()
        held = self.checkpoints()
        resume = "auto" if self.restarted and held else resume
        path = resume if resume != "auto" else held[-1] if held else None
        path = path or None
        if path and resume != "auto":
            _check_file(path)
        self._check_kind(path)
        inside = bool(path) and self.holds(path)
        if inside and self.overwrite:
            raise UserError(f"--overwrite would remove {path}, which --resume names; give one of the two")
        if inside and os.path.basename(path) in [os.path.basename(older) for older in held[:-1]]:
            raise UserError(
                f"--resume {path}: --save-dir holds the newer {held[-1]}, which would be left; give another"
            )
        mine = held[-1:] or self.results()
        if mine and not inside and not self.overwrite:
            raise UserError(
                f"--save-dir {self.path} holds another run ({os.path.basename(mine[0])}): --resume auto "
                "goes on with it, --overwrite starts anew, another --save-dir leaves it alone"
            )
        content = None
        if path:
            path, content = self._newest_whole(held) if resume == "auto" else (path, checkpoint.load(path))
        self._check_log(inside, content)
        return path, content

    def holds(self, path: str) -> bool:
        """Whether a file of that path lies in the folder."""
        return os.path.realpath(os.path.dirname(path)) == os.path.realpath(self.path)

    def _newest_whole(self, held):
        damaged = []
        for path in reversed(held):
            try:
                content = checkpoint.load(path)
            except UserError as error:
                damaged.append(str(error))
                continue
            for why in damaged:
                distributed.warn(f"{why}; going on from {path}")
            return path, content
        raise UserError(f"--resume auto: no checkpoint in {self.path} is whole, the newest: {damaged[0]}")

    def _check_kind(self, path):
        """Raise UserError unless this is a folder, or none yet, without another program's run."""
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"--save-dir {self.path}: is not a folder")
        written = [self.file(CONFIG), self.file(MARKER), *metrics.log_files(self.log_path), *self.results()]
        for name in written + (self.checkpoints() if self.overwrite else []):
            if os.path.isdir(name):
                raise UserError(f"{name}: is a folder, where a run writes a file; move it, or give another folder")
        own = {*self.checkpoints(), *self.results()}
        strange = [product for product in self._products() if product not in own]
        if strange and not (path and self.holds(path)):
            raise UserError(
                f"--save-dir {self.path} holds a run of another program ({os.path.basename(strange[0])}); give another"
            )

    def _products(self):
        """The files that only a run of one of the programs leaves, whichever it was."""
        patterns = (*PATTERNS, "result.json")
        return [
            path for pattern in patterns for path in sorted(glob.glob(os.path.join(glob.escape(self.path), pattern)))
        ]

    def _check_log(self, inside, content):
        """Raise UserError if a log would be cut or written over that is not this run's own."""
        if self.overwrite or self.restarted:
            return
        if self._log_is_apart() and metrics.log_files(self.log_path):
            config = content["config"] if content else files.read_json(self.file(CONFIG)) if self._never_saved() else {}
            stored = config.get("log_dir")
            if not isinstance(stored, str) or os.path.realpath(stored) != os.path.realpath(self.log_path):
                raise UserError(f"--log-dir {self.log_path} holds the log of another run; give another, or --overwrite")
        if inside or self._never_saved():
            return
        there = [path for path in [self.file(CONFIG), *metrics.log_files(self.path)] if os.path.lexists(path)]
        if there:
            raise UserError(
                f"--save-dir {self.path} holds {os.path.basename(there[0])}, which is not of a run of this program; "
                "give another, or --overwrite"
            )

    def _log_is_apart(self):
        return os.path.realpath(self.log_path) != os.path.realpath(self.path)

    def _never_saved(self):
        """Whether the folder holds what a run of this program leaves that ended before its first checkpoint."""
        try:
            command = files.read_json(self.file(CONFIG)).get("command")
            words = shlex.split(command if isinstance(command, str) else "")  # of None it would read the terminal
        except (UserError, ValueError):  # a file may hold anything
            return False
        return bool(words) and os.path.basename(words[0]) == os.path.basename(sys.argv[0])

    def find_to_evaluate(self, resume: str) -> tuple[str, dict]:
        """The classifier that -e validates: (path, its content). Every process must call this.

        Raises UserError where there is none, or where its results would lie beside another run.
        """
        path = None
        if distributed.rank() == 0:
            held = self.checkpoints()
            if resume == "auto" and not held:
                raise UserError(f"-e --resume auto: {self.path} holds no classifier")
            path = held[0] if resume == "auto" else resume
            if resume != "auto":
                _check_file(path)
            if os.path.exists(self.path) and not os.path.isdir(self.path):
                raise UserError(f"--save-dir {self.path}: is not a folder")
            others = [product for product in self._products() if not product.endswith("result.json")]
            if others and not self.holds(path):
                raise UserError(f"--save-dir {self.path} holds a run ({os.path.basename(others[0])}); give another")
        path = distributed.from_rank_0(path)
        return path, checkpoint.load(path)

    # ------------------------------------------------------------------------------------------- what is written there

    def lock(self) -> None:
        """Lock the folder, if it is there, for this process. Raises UserError if another one has it."""
        if self._lock is None and os.path.isdir(self.path):
            try:
                self._lock = self.locks.enter_context(files.FolderLock(self.path))
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def prepare(self, resumed: str | None) -> None:
        """Make the folders if both can be written, and remove what is given up or was left by a kill.

        resumed: the checkpoint that the run goes on from. `find` has seen to it that what is there is this run's,
        one that --overwrite gives up, or one that left no checkpoint.
        """
        files.make_folders(self.path, self.log_path)
        self.lock()
        if not resumed and not self.overwrite and self._products():  # since `find` looked, when there was no lock
            raise UserError(
                f"--save-dir {self.path}: another run has used it meanwhile; give another, or --resume auto"
            )
        own = (*PATTERNS, *self.files.results, CONFIG, NONFINITE, MARKER)
        for name in _listed(self.path):  # what killed writes have left: the lock is ours
            if any(re.fullmatch(re.escape(x).replace(r"\*", ".*") + r"\.\w{8}\.tmp", name) for x in own):
                os.remove(self.file(name))
        given_up = [self.file(MARKER)]
        given_up += [*self.checkpoints(), *self.results()] if self.overwrite else []
        other = not resumed or not (self.holds(resumed) or self._log_is_apart())  # the log of a run that never saved
        given_up += metrics.log_files(self.log_path) if self.overwrite or other else []
        for path in given_up:
            if os.path.lexists(path):
                os.remove(path)
        if resumed and self.holds(resumed) and os.path.basename(resumed) != self.files.within:
            self.prune(os.path.basename(resumed))

    def bring_along(self, path: str, *, within: bool) -> None:
        """Copy a run that goes on from `path` in another folder here: its best and last checkpoint, its results.

        within: whether `path` stands within an epoch.
        """
        names = [self.files.best, *self.files.results] + [self.files.epoch] * within
        pairs = [(os.path.join(os.path.dirname(path), name), self.file(name)) for name in names]
        pairs.append((path, self.file(self.files.within if within else self.files.epoch)))  # at the end: it marks a run
        for old, new in pairs:
            if os.path.exists(old):
                with open(old, "rb") as source, files.atomic_write(new) as target:
                    shutil.copyfileobj(source, target)

    def prune(self, written: str) -> None:
        """After the checkpoint of that name is safe, remove those that are not needed any more.

        Of numbered ones `keep` stay, which that one is the newest of; what bears a higher number is not this run's.
        """
        if written in (self.files.within, self.files.best):
            return
        older = []
        if self.files.numbered and self.keep:
            paths = [path for _, path in self._numbered()]
            older = paths[: paths.index(self.file(written)) + 1][: -self.keep]
        for path in [self.file(self.files.within), *older]:
            if os.path.isfile(path):
                os.remove(path)

    def mark_preempted(self, signal: str | None, step: int, name: str) -> None:
        """Write preempted.json, which tells a script that the checkpoint of that name holds where the run goes on."""
        try:
            files.write_json(self.file(MARKER), {"signal": signal, "step": step, "checkpoint": name})
        except OSError as error:
            distributed.warn(f"{self.path}: {MARKER} cannot be written ({error.strerror})")


def _check_file(path):
    if os.path.isdir(path):
        raise UserError(f"--resume {path}: is a folder; give a checkpoint, or --save-dir {path} --resume auto")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")


def _listed(folder):
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def default_folder(args: argparse.Namespace, name: str) -> str:
    """A folder of the run's own, beside the checkpoint that it starts from. name: the run's, at its end."""
    if args.resume not in ("", "auto"):
        folder, file = os.path.split(args.resume)
        return os.path.join(folder, f"{_stem(file)}-evaluated") if args.evaluate else folder or "."
    if args.pretrained in (None, "random"):
        return f"random-{args.arch}-{name}"
    folder, file = os.path.split(args.pretrained)
    return os.path.join(folder, f"{_stem(file)}-{name}")


def _stem(file):
    for ending in (".tar", ".pth", ".pt"):
        file = file.removesuffix(ending)
    return file
