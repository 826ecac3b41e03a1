"""A run: where it stands, its folder, its log, and what happens between two steps so that it cannot be lost."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from synco import checkpoint, distributed, files, loader, measures, metrics, options, settings, signals
from synco.agreement import Agreement
from synco.errors import Failure, Preempted, UserError
from synco.folder import CONFIG, NONFINITE, RunFiles, RunFolder


class Run:
    """One run of a program, from the checkpoint that it goes on from to its end.

    process: this one; args, kinds: the flags and `options.Parser.kinds`; run_files: the names in its folder;
    save_dir: where --save-dir does not say; evaluate: it only reads a classifier that --resume names.
    Finds what to go on from, refuses what cannot be, and draws the seed; writes nothing before `begin`.

    seed: of every draw; path, saved: the checkpoint that it goes on from and its content until `begin`, or None;
    before: the settings stored in it, {} without; order: the rule by which an epoch's order is drawn.
    """

    def __init__(
        self,
        process: distributed.Process,
        args: argparse.Namespace,
        kinds: dict[str, str],
        run_files: RunFiles,
        *,
        save_dir: str | None = None,
        evaluate: bool = False,
    ) -> None:
        self.process, self.args, self.kinds = process, args, kinds
        policy = {"overwrite": args.overwrite, "keep": getattr(args, "keep", 0), "restarted": process.restarted}
        self.folder = RunFolder(args.save_dir or save_dir, args.log_dir, run_files, locks=process.locks, **policy)
        find = self.folder.find_to_evaluate if evaluate else self.folder.find
        self.path, self.saved = find(args.resume)
        self.before = self.saved["config"] if self.saved else {}
        self.deterministic = args.seed is not None or self.before.get("deterministic") is True
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark = not self.deterministic
        self.seed = distributed.from_rank_0(settings.choose_seed(args.seed, self.path, self.before))
        ours = "step" in (self.saved or {})  # SynCo's and MoCo's own checkpoints have no order to go on with
        self.order = self.before.get("order", 1) if ours else loader.ORDER

    def begin(
        self,
        batches: Any,
        total: int,
        state: dict[str, Any],
        *,
        facts: dict,
        identity: dict | None = None,
        rates: tuple[str, ...] = ("lr",),
        save_freq: int | None = None,
        results: Callable[[], dict] = dict,
    ) -> None:
        """Take over what the checkpoint holds, make the folders, and print and store what is about to run.

        batches: a `loader.train_loader`; total: steps of the whole run; state: {key in the checkpoint: an object with
        state_dict and load_state_dict}: the model under "state_dict", its "optimizer", the `Precision` under "scaler",
        a classifier's `heads.Heads` under "heads";
        facts: what is printed and stored beside the settings; identity: settings beside the flags that must not change;
        rates: the names of the learning rates of the optimiser's first groups; save_freq: epochs between checkpoints
        that follow an epoch's last step; None: they follow its evaluation, and hold its `results`.
        """
        args, process = self.args, self.process
        self.batches, self.reader = batches, batches.dataset.reader
        self.steps_per_epoch, self.total = len(batches), total
        self.last_epoch, self.heads = math.ceil(total / self.steps_per_epoch), state.get("heads")
        self.state, self.results, self.rate_names, self.save_freq = state, results, rates, save_freq
        options.check_start(args, self.last_epoch)
        self.config = vars(args) | self._settings() | (identity or {})
        changes = settings.compare(self.before, self.config, self.kinds, self.path, force=args.force_resume)
        self.reader.mark_unreadable(checkpoint.unreadable(self.saved, self.path, len(self.reader)))
        self.averages = metrics.Averages(self.heads.shape if self.heads else ())  # since the last print step
        self.epoch, self.start = args.start_epoch, 0  # where it goes on: the epoch and the step in it
        self.done = self.epoch * self.steps_per_epoch
        self.seconds_between, self.collapse = 0.0, measures.Collapse()  # epochs' steps, to evaluate and save
        if self.saved:
            self._load()
        self.first_epoch = self.epoch
        if process.rank == 0:
            self._begin_files(facts, changes)
        self._log = metrics.Log(self.folder.log_path, steps_done=self.done, active=process.rank == 0)
        if args.track and process.rank == 0:
            self._log.track(args.track, self.config | self.origin, (self.saved or {}).get("tracker"))
        self.saved = None  # its memory
        evaluations = [line for line in self._log.kept if line["kind"] != "train"]
        has_best = os.path.exists(self.folder.file(self.folder.files.best))
        self.evaluations, self.has_best = distributed.from_rank_0((evaluations, has_best))
        self.evaluations_before = len(self.evaluations)
        self.agreement = Agreement(args.save_steps, args.save_minutes, args.dist_timeout)

    def _settings(self):
        """What a checkpoint says of its run beside the flags."""
        images, world_size = self.reader.dataset, self.process.world_size
        return {
            "save_dir": self.folder.path,
            "log_dir": self.folder.log_path,
            "seed": self.seed,
            "deterministic": self.deterministic,
            "order": self.order,
            "epochs": self.last_epoch,
            "processes": world_size,
            "global_batch": self.batches.batch_sampler.batch_size * world_size,
            "train_images": len(images),
            "train_images_crc32": images.checksum(),
            "threads": torch.get_num_threads() if self.process.device.type == "cpu" else None,
        }

    def check_keys(self) -> None:
        """Raise UserError unless the checkpoint has what it takes to go on from it."""
        kind, missing = self.folder.files.kind, [key for key in self.folder.files.required if key not in self.saved]
        if missing:
            raise UserError(f"{self.path}: not a {kind} checkpoint that can be resumed: it has no {', '.join(missing)}")

    def _load(self):
        """Take over position and state of the checkpoint. Raises UserError that says what does not fit."""
        saved, path, process = self.saved, self.path, self.process
        self.check_keys()
        if saved.get("arch", self.args.arch) != self.args.arch:
            raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}; --arch is {self.args.arch!r}")
        checkpoint.check_epoch(saved, path)
        checkpoint.load_model(saved, path, self.state["state_dict"])
        checkpoint.load_optimizer(saved, path, self.state["optimizer"])
        self.done = done = checkpoint.position(saved, path, self.steps_per_epoch)
        if done > self.total or saved["epoch"] > self.last_epoch:
            raise UserError(f"{path}: holds {saved['epoch']} epochs and --epochs is {self.last_epoch}")
        self.epoch = saved["epoch"]
        if self.save_freq is not None:
            self.epoch = done // self.steps_per_epoch if done < self.total else self.last_epoch
        self.start = 0 if self.epoch == self.last_epoch else done - self.epoch * self.steps_per_epoch
        if not 0 <= self.start <= self.steps_per_epoch:
            raise UserError(f"{path}: its step is {saved['step']} after {saved['epoch']} of {self.last_epoch} epochs")
        try:
            if saved.get("averages") is not None:
                self.averages.restore(saved["averages"], process.rank, process.world_size, process.device)
            for key in self.state.keys() - {"state_dict", "optimizer"}:
                self.state[key].load_state_dict(saved.get(key, {}))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def _begin_files(self, facts, changes):
        """Rank 0's part of `begin`: the folders, what is printed, config.json."""
        folder, path, process = self.folder, self.path, self.process
        facts = facts | {"device": metrics.device_name(process.device), "world_size": process.world_size}
        batch = self.batches.batch_sampler.batch_size
        facts |= {"batch_per_process": batch, "global_batch": batch * process.world_size}
        facts |= {"prefetched": self.batches.ahead, "steps_per_epoch": self.steps_per_epoch, "seed": self.seed}
        self.origin = facts | metrics.origin()
        folder.prepare(path)
        if path and not folder.files.numbered and not folder.checkpoints():
            folder.bring_along(path, within=self.start > 0)
        process.began()
        metrics.print_facts(facts)
        if path:
            within = f" and {self.start} steps of the next" if self.start else ""
            metrics.print_facts({"resumed": f"{path}, {self.epoch} epochs{within} done"})
            self._print_if_changed("processes", "the same images in each step, but not the same numbers, as BatchNorm "
                                   "sees other parts of them")  # fmt: skip
            self._print_if_changed("threads", "not the same numbers to the last bit, as sums are taken in other orders")
            if changes:
                metrics.print_facts({"changed": "; ".join(changes)})
        if not path or self.epoch < self.last_epoch:  # else config.json stays what it says of the run
            files.write_json(folder.file(CONFIG), self.config | self.origin)

    def _print_if_changed(self, name, consequence):
        before, now = self.before.get(name), self.config.get(name)
        if None not in (before, now) and before != now:
            metrics.print_facts({name: f"{before} → {now}: {consequence}"})

    def epochs(self) -> Iterator[int]:
        """The epochs that are not done."""
        for epoch in range(self.first_epoch, self.last_epoch):
            self.epoch = epoch
            yield epoch

    def steps(self, epoch: int) -> Iterator["Step"]:
        """The steps of an epoch that are not done; between two of them it prints, checks, saves and stops.

        What a network draws in a step, for dropout say, is a function of the step. Numbers are read from the device at
        print steps and saves alone.
        """
        first = epoch * self.steps_per_epoch
        start = self.start if epoch == self.first_epoch else 0
        self.done, end = first + start, min(self.steps_per_epoch, self.total - first)
        if epoch > self.first_epoch:
            self.seconds_between = time.perf_counter() - self.ended_at
        self.pace, self.finite = metrics.Pace(), metrics.Finite(self.process.device)
        self.batches.batch_sampler.set_epoch(epoch, start)
        for i, batch in self.pace.watch(itertools.islice(self.batches, end - start), start):
            last = i == end - 1
            step = Step(self, epoch, i, batch, is_printed=i % self.args.print_freq == 0 or last)
            torch.manual_seed(distributed.seed_of("dropout", self.seed, step.done, self.process.rank))
            yield step
            self.done = step.done + 1
            if step.is_printed:
                self._report(step)
            self._save_if_due(step, last)
        self.epoch, self.ended_at = epoch + 1, time.perf_counter()

    def _report(self, step):
        """At a print step, with one read: whether all numbers were finite, a progress line, and a line of the log."""
        names, means = self.averages.take(distributed.mean)
        notes, read = step.notes.read(means=means, scale=self.state["scaler"].scale())
        numbers = dict(zip(names, read["means"]))
        if np.any(numbers.pop("bad")):
            self._check_finite(step)
        self.state["scaler"].check(read["scale"])
        numbers |= self._rates() | self.pace.read(self.process.world_size)
        if self.process.rank:
            return
        shown, numbers = self.heads.report(numbers, step.epoch) if self.heads else ("", numbers)
        place = f"[{step.i + 1:{len(str(self.steps_per_epoch))}}/{self.steps_per_epoch}]"
        left = self.pace.left(self.total - self.done, self.seconds_between * (self.last_epoch - step.epoch))
        print(f"Epoch {step.epoch} {place}  {shown}{metrics.progress(numbers)}  ETA {left}", flush=True)
        self.collapse.watch(step.epoch, notes)
        self.log("train", epoch=step.epoch, **numbers, **notes)

    def _rates(self):
        return {name: group["lr"] for name, group in zip(self.rate_names, self.state["optimizer"].param_groups)}

    def _check_finite(self, step):
        """Raise FloatingPointError if a loss or gradient was not finite up to this step of the epoch, in any process.

        It names the first such step; nonfinite.json has the images of that step. Of several heads all must be so.
        """
        firsts = self.finite.first_bad(distributed.from_all)
        first = min((first for first in firsts if first is not None), default=None)
        if first is None or self.heads and self.heads.drop(firsts, step.epoch, self.state["optimizer"]):
            return
        rates = ", ".join(f"{name} {rate:g}" for name, rate in self._rates().items())
        content = {"epoch": step.epoch, "step": first, "noticed": step.i, "rates": rates}
        content["images"] = loader.paths_of(self.batches, step.epoch, first)
        report, held = self.folder.file(NONFINITE), self.folder.checkpoints()
        if self.process.rank == 0:
            with contextlib.suppress(OSError):
                files.write_json(report, content)
        raise FloatingPointError(
            f"the loss or its gradient is not finite from step {first} of epoch {step.epoch} on ({rates}; noticed at "
            f"step {step.i}); its images: {report}; last good checkpoint: {held[-1] if held else 'none'}"
        )

    def _save_if_due(self, step, last):
        """Save or stop after a step if that is due, unless the epoch's own checkpoint is written next."""
        due = self.agreement.after(self.done, share=self.reader.found_unreadable(), at_once=last)
        if due.share:
            self.reader.share_unreadable()
        if due.save and not (last and self._saves(step.epoch)):
            self._check_finite(step)
            name = self.folder.files.within
            self._save(name, must=due.stop)
            if due.stop:
                self._leave(name)

    def _saves(self, epoch):
        """Whether the checkpoint of this epoch is due right after its last step."""
        done = epoch + 1
        return self.save_freq is not None and (done % self.save_freq == 0 or done == self.last_epoch)

    def end_epoch(self, epoch: int) -> None:
        """Write the epoch's checkpoint if it is due, and leave if the run was told to stop."""
        name, last = self.folder.files.epoch.format(epoch), epoch + 1 == self.last_epoch
        if self.save_freq is None:
            stop = self.agreement.after(self.done, at_once=True).stop
        elif self._saves(epoch):
            stop = self.agreement.stopping
        else:
            return
        self._save(name, must=stop or last)
        if stop and not last:
            self._leave(name)

    def save_best(self) -> bool:
        """Write the checkpoint of the best epoch, this one, before its number is logged → whether that worked."""
        return self._save(self.folder.files.best, must=self.save_freq is None and self.done == self.total)

    def _save(self, name, *, must=False):
        """Write a checkpoint of where the run stands → whether that worked; if not and it `must`, raise Failure."""
        averages = self.averages.state(distributed.from_all)
        problem = self._write(name, averages) if self.process.rank == 0 else ""
        if name != self.folder.files.best:
            self.agreement.saved()
        if must or name == self.folder.files.best:
            problem = distributed.from_rank_0(problem)
        if problem and must:
            raise Failure(problem)
        return not problem

    def _write(self, name, averages):
        """Rank 0's part of `_save` → why the file could not be written, or ""."""
        self._log.sync()  # a checkpoint's run takes its lines for written
        if self.heads:
            self.heads.publish()
        path, epochs = self.folder.file(name), self.epoch
        if self.save_freq is not None:
            epochs = self.last_epoch if self.done == self.total else self.done // self.steps_per_epoch
        content = {
            "epoch": epochs,
            "arch": self.args.arch,
            **{key: state for key, part in self.state.items() if len(state := part.state_dict())},
            "step": self.done,
            "steps_per_epoch": self.steps_per_epoch,
            "averages": averages,
            "skipped": sorted(self.reader.unreadable),
            "config": self.config | {"origin": self.origin},
            **({"tracker": self._log.tracked} if self._log.tracked else {}),
            **self.results(),
        }
        content["state_dict"] = checkpoint.prefixed(content["state_dict"])
        checkpoint.check_before_saving(content)
        try:
            checkpoint.save(content, path)
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror or error}); the checkpoint before it is whole"
            distributed.warn(problem)
            return problem
        self.folder.prune(name)
        return ""

    def _leave(self, name):
        """Leave a run that was told to stop, whose checkpoint is safe: raise Preempted in every process."""
        heard = next(filter(None, distributed.from_all(signals.warned())), None)  # perhaps by one process alone
        if self.process.rank == 0:
            self.folder.mark_preempted(heard, self.done, name)
        self._log.close()
        self.agreement.meet()
        raise Preempted(f"Told to stop: {self.folder.file(name)} holds {self.done} steps.")

    def log(self, kind: str, **numbers: float | None) -> None:
        """A line of numbers in log.jsonl and TensorBoard, after the steps that are done."""
        if kind != "train":
            self.evaluations.append({"kind": kind, **numbers})
        self._log.write(kind, self.done, **numbers)

    def log_image(self, name: str, image: torch.Tensor) -> None:
        """image (3, H, W) in [0, 1] → TensorBoard."""
        self._log.images(name, image, self.done)

    def is_logged(self, kind: str, epoch: int) -> bool:
        """Whether the log holds an evaluation of that kind after that many epochs."""
        return any(line["kind"] == kind and line.get("epoch") == epoch for line in self.evaluations)

    def best_logged(self, kind: str, name: str) -> float:
        """The largest of those numbers after an epoch, as far as the best's checkpoint is there, else -1."""
        lines = self.evaluations[0 if self.has_best else self.evaluations_before :]
        numbers = [line.get(name) for line in lines if line["kind"] == kind and line.get("epoch")]
        return max((number for number in numbers if isinstance(number, float)), default=-1.0)

    def finish(self) -> None:
        """Close the log, and say which images could not be read."""
        self._log.close()
        self.reader.report_unreadable()


@dataclasses.dataclass
class Step:
    """One step: its batch, its place, and what it has to report.

    epoch, i: it is step i of that epoch; batch: as the loader gives it; notes: a print step's numbers for the log.
    """

    run: Run
    epoch: int
    i: int
    batch: Any
    is_printed: bool
    notes: metrics.Notes = dataclasses.field(default_factory=metrics.Notes)

    @property
    def done(self) -> int:
        """Steps of the whole run before this one."""
        return self.epoch * self.run.steps_per_epoch + self.i

    @property
    def prints(self) -> bool:
        """Whether this process prints after this step."""
        return self.is_printed and self.run.process.rank == 0

    def record(self, loss: torch.Tensor, norm: torch.Tensor, **numbers: torch.Tensor) -> None:
        """Add to the averages of the next print step; nothing is read from the device.

        loss, norm of the gradient, numbers: 0-dim tensors, the same names in every step and process.
        """
        self.run.averages.add(loss=loss, bad=self.run.finite.watch(self.i, loss, norm), **numbers)

    def note(self, **numbers: torch.Tensor) -> None:
        """Numbers of a print step for its line in the log: 0-dim tensors."""
        self.notes.add(**numbers)
