"""What the linear probe and the fine-tuning share: images, network, validation, tables, the result, and -e."""

import argparse
import functools
import math
import os
import weakref
from collections.abc import Callable

import torch
import torch.nn as nn

from synco import augment, backbone, cache, checkpoint, datasets, distributed, files, loader, metrics, options, subsets
from synco.errors import Failure, UserError
from synco.folder import RunFiles
from synco.heads import Heads, after, describe, summarize, validate
from synco.networks import head_name, network_errors_as_user_errors, network_of, try_images
from synco.precision import Precision
from synco.run import Run

RESULTS = ("result.json", "per_class.csv", "confusion.csv")  # what a run and -e leave beside the checkpoints
IMAGE_SETTINGS = ("stem", "img_size", "stats")


def run_files(kind: str) -> RunFiles:
    """The names in the folder of a run. kind: "lincls" or "semisup", in the names of its checkpoints."""
    return RunFiles(
        kind="classifier's",
        required=("epoch", "best_acc1", "optimizer"),
        epoch=f"checkpoint_{kind}.pth.tar",
        within=f"checkpoint_{kind}_step.pth.tar",
        best=f"model_best_{kind}.pth.tar",
        results=RESULTS,
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError where the flags of `options.add_run` and `options.add_classifier` contradict each other."""
    options.check_run(args)
    if args.evaluate and not args.resume:
        raise UserError("-e validates a saved classifier: name it with --resume")
    if not args.pretrained and not args.resume:
        raise UserError("--pretrained is needed: a checkpoint's path, or 'random' for untrained weights")
    if args.resume == "auto" and not (args.pretrained or args.save_dir):
        raise UserError("--resume auto looks in --save-dir: give it, or --pretrained, beside which it lies")


class Classifier:
    """A network with a new last layer on a pretrained backbone; its images, its best and its last validation.

    run: kept by the caller; frozen: whether the backbone is to stay as it is; choose: takes the training
    `datasets.Images` and returns the part to train on; None: all.
    network, last_layer: on the device, the last layer drawn as in MoCo's probe; images: what is trained on;
    batches: the `loader.train_loader` of it, None with -e.
    """

    def __init__(
        self, run: Run, args: argparse.Namespace, precision: Precision, *, frozen: bool, choose: Callable | None = None
    ) -> None:
        self.run = weakref.proxy(run)  # which keeps self.results: in a cycle the loaders would end in any order
        self.args, self.process, self.precision = args, run.process, precision
        if run.saved and backbone.is_pretraining(run.saved):
            raise UserError(f"{run.path}: is a pretraining checkpoint; --pretrained takes it")
        if not run.path and not args.pretrained:
            raise UserError(f"--resume auto: {run.folder.path} holds no run yet, and a new one needs --pretrained")
        self.pretrained = checkpoint.load(args.pretrained) if args.pretrained not in (None, "random") else None
        config = (self.pretrained or run.saved or {}).get("config")
        self.settings = options.resolve_image_settings(args, args.pretrained or run.path, config)
        self.best = self.last = None  # {"epoch", "top1", "top5"} of the best and the last validated epoch
        self.frozen = frozen
        self.heads = self.val = None
        self._load_images(choose)
        weights = self._make_network()
        if run.saved:
            self._check_resumed()
        if frozen and not args.evaluate:
            self._remember(weights)

    def _load_images(self, choose):
        """Validation and training images, and their loaders."""
        args, process, settings = self.args, self.process, self.settings
        batch = loader.batch_each(args.batch_size, process.local_size)
        workers = loader.workers_each(args.workers, process.local_size)
        load = {"process": process, "workers": workers, "timeout": args.worker_timeout}
        datasets.fetch(args, process)
        val, train = datasets.load(args, "val"), None
        self.classes, self.val_images = val.classes, len(val)
        self.images = self.batches = reader = None
        if not args.evaluate or args.eval_train:
            train = datasets.load(args, "train")
            datasets.same_classes(train, val, args.data)
            self.images = train = choose(train) if choose else train
        if args.cache_images:
            cache.keep([train, val] if train else [val], process, bool(args.skip_bad_images))
        centre = augment.center_view(settings["img_size"], settings["stats"])
        self.shown_as = lambda images: loader.eval_loader(images.with_transform(centre), batch, **load)
        self.shown = {"val": self.shown_as(val)}
        if train:
            reader = loader.Reader(train, args.skip_bad_images)
            view = augment.classifier_augmentation(settings["img_size"], settings["stats"])
            views = loader.Augmented(reader, view, self.run.seed)
            load_train = {"seed": self.run.seed, "order": self.run.order, "keep_last": True, **load}
            self.batches = loader.train_loader(views, batch, **load_train)
        if args.eval_train:
            readable = loader.Readable(train.with_transform(centre), reader)
            self.shown["train"] = loader.eval_loader(readable, batch, **load)

    def _make_network(self):
        """The network with --pretrained's backbone and a new last layer, fc ~ N(0, 0.01²) with bias 0.

        Returns the backbone's weights as the file has them.
        """
        args, run, settings = self.args, self.run, self.settings
        torch.manual_seed(run.seed)
        with network_errors_as_user_errors(args.arch, settings["img_size"]):
            make = network_of(args.arch, settings["img_size"], settings["stem"])
            self.network = make(num_classes=len(self.classes))
            self.head = head_name(self.network, len(self.classes))
        self.last_layer = self.network.get_submodule(self.head)
        nn.init.normal_(self.last_layer.weight, std=0.01)
        nn.init.zeros_(self.last_layer.bias)
        weights, self.checkpoint_sha256 = {}, None
        self.source, self.origin = f"random weights, seed {run.seed}", args.pretrained
        config = dict(run.before)
        if self.pretrained:
            weights = backbone.weights_of(self.pretrained, args.pretrained, self.head, arch=args.arch)
            count = backbone.load_backbone(self.network, self.head, weights, args.pretrained)
            self.source = backbone.summary(self.pretrained, args.pretrained, count)
            config = self.pretrained["config"] | config
            digest = files.sha256(args.pretrained) if self.process.rank == 0 else None
            self.checkpoint_sha256 = distributed.from_rank_0(digest)
            self.pretrained = None  # its memory
        elif run.saved:
            self.source = f"that of {run.path}"
            if args.pretrained is None:
                self.origin, self.checkpoint_sha256 = config.get("pretrained"), config.get("checkpoint_sha256")
        if args.evaluate or not run.saved:  # a run that goes on is compared by `Run.begin`
            for name in ("img_size", "stats"):
                if config.get(name, settings[name]) != settings[name]:
                    flag = f"--{name.replace('_', '-')} {settings[name]}"
                    distributed.warn(f"{flag}: {run.path or args.pretrained} is of a run with {config[name]}")
        self.precision.place(self.network)
        try_images(self.network, args.arch, settings["img_size"])
        return weights

    def add_heads(self, flag: str, rates: float | list[float]) -> Heads:
        """A last layer for each of these learning rates, which `flag` gave, and each of --wd: what is trained.

        With several on held-out images, `val` is for the one that is chosen. Raises UserError if `val` is not there,
        or a run goes on that has other heads.
        """
        rates, decays = options.listed(rates), options.listed(self.args.weight_decay)
        self.heads = Heads(self.network, self.head, rates, decays, flag if self.frozen else None)
        if self.run.saved:
            self.heads.check(self.run.saved, self.run.path)
        self.chosen_on = "val, as the papers do"
        if self.args.hold_out:
            self.chosen_on = f"{self.val_images} training images that are held out"
        if self.args.hold_out and self.heads.several:
            val = datasets.load(argparse.Namespace(**vars(self.args) | {"hold_out": None}), "val")
            datasets.same_classes(self.images, val, self.args.data)
            self.val = self.shown_as(val)
        return self.heads

    def _check_resumed(self):
        """Raise UserError unless the saved classifier is of this network, these classes and, to go on, this run."""
        args, saved, path = self.args, self.run.saved, self.run.path
        if saved.get("arch", args.arch) != args.arch:
            raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}; --arch is {args.arch!r}")
        config = saved["config"]
        classes = config.get("classes", self.classes)
        if classes != self.classes:
            strange = sorted(set(map(str, classes)) ^ set(self.classes)) if isinstance(classes, list) else []
            raise UserError(f"{path}: knows other classes than {args.data}: {', '.join(strange[:5])} differ")
        weights = checkpoint.unprefixed(saved["state_dict"])
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(backbone.AUXILIARY)}
        problem = checkpoint.differences(weights, self.network.state_dict())
        if problem:
            raise UserError(f"{path}: its weights do not fit {args.arch} with {len(self.classes)} classes: {problem}")
        saved["state_dict"] = weights
        if args.evaluate:
            self._check_same_training_images(config, path)
            return
        self.run.check_keys()
        tuned = self.run.folder.files.epoch == run_files("semisup").epoch
        if ("scheduler" in saved) != tuned:
            program = "main_semisup.py" if "scheduler" in saved else "main_lincls.py"
            raise UserError(f"{path}: is a checkpoint of {program}")
        checkpoint.check_epoch(saved, path)
        if saved["epoch"] > args.epochs:
            raise UserError(f"{path}: holds {saved['epoch']} epochs and --epochs is {args.epochs}")
        if config and config.get("checkpoint_sha256") != self.checkpoint_sha256:
            raise UserError(f"{path}: started from {config.get('pretrained')}, which is not --pretrained's file")
        try:  # the reference's files hold the best accuracy alone
            known = {"top1": float(saved["best_acc1"]), "top5": None, "epoch": None}
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: its best_acc1 is {saved['best_acc1']!r}, not a number") from error
        self.best, self.last = (_result(saved.get(name, known), name, path) for name in ("best", "last"))
        if saved["epoch"] == args.epochs and (self.last or {"epoch": 0})["epoch"] not in (None, args.epochs):
            raise UserError(f"{path}: holds {args.epochs} epochs, the last not validated; --epochs must be more")

    def _check_same_training_images(self, config, path):
        if self.args.eval_train and "train_images" in config:
            subset = subsets.digest(self.images) if "subset_sha256" in config else None
            now = len(self.images), subset
            if now != (config["train_images"], config.get("subset_sha256")):
                raise UserError(
                    f"{path}: was trained on other images ({config['train_images']}) than the {len(self.images)} that "
                    "--eval-train would take: give the same --train-percent or --subset-file"
                )

    def identity(self) -> dict:
        """What a run that goes on must have in common with this one, beside the flags."""
        facts = {"classes": self.classes, "val_images": self.val_images, "checkpoint_sha256": self.checkpoint_sha256}
        return self.settings | facts

    def facts(self) -> dict:
        """What is printed and stored of a run beside its settings."""
        images = f"{self.val_images} to validate, {len(self.classes)} classes"
        trained = f"{len(self.images)} to train, " if self.images is not None else ""
        facts = {"images": trained + images, "backbone": self.source}
        if self.heads and self.heads.several:
            facts["heads"] = f"{', '.join(self.heads.names)}; the best is chosen on {self.chosen_on}"
        return facts

    def _remember(self, weights):
        """Keep the frozen backbone for `check_frozen`, running statistics included: as the files have it, if there are.

        Raises UserError if a run goes on with another one.
        """
        state = self.network.state_dict()
        self.frozen = {name: x.clone() for name, x in state.items() if not name.startswith(self.head + ".")}
        saved = self.run.saved["state_dict"] if self.run.saved else {}
        for name, tensor in self.frozen.items():
            parts = [part[name].to(tensor) for part in (weights, saved) if name in part]
            if len(parts) == 2 and not torch.equal(*parts):
                raise UserError(
                    f"{self.run.path}: its frozen backbone is not that of --pretrained {self.args.pretrained}"
                )
            self.frozen[name] = parts[0] if parts else tensor

    def check_frozen(self) -> None:
        """Raise RuntimeError unless the backbone, running statistics included, is what it was, bit for bit."""
        state = self.network.state_dict()
        changed = [name for name, tensor in self.frozen.items() if not torch.equal(state[name], tensor)]
        if changed:
            raise RuntimeError(
                f"the frozen backbone has changed in {len(changed)} tensors, such as {', '.join(changed[:3])}"
            )

    def check_batch_norm(self) -> None:
        """Raise UserError if BatchNorm in train mode would see single images."""
        args, norms = self.args, nn.modules.batchnorm._BatchNorm
        if args.evaluate or not any(isinstance(m, norms) for m in self.network.modules()):
            return
        batch = self.batches.batch_sampler.batch_size
        if min(batch, math.ceil(len(self.images) / self.process.world_size)) < 2:
            raise UserError(
                f"--batch-size {args.batch_size}, {len(self.images)} images: a process takes one image a step, "
                "and BatchNorm needs two when the backbone is fine-tuned"
            )

    def end_epoch(self, epoch: int) -> None:
        """Validate if it is due, say and log what came of it, and write the checkpoints of the epoch."""
        args, done, better = self.args, epoch + 1, False
        if done == args.epochs or args.val_freq > 0 and done % args.val_freq == 0:
            each = self._validate()
            best = self.heads.judge([numbers for numbers, _ in each["val"]], done)
            for name, found in each.items():
                kind = name if name == "val" else "eval_train"
                if not self.run.is_logged(kind, done):  # before the run was killed, and not yet in a checkpoint
                    self.run.log(kind, epoch=done, **self.heads.numbers([numbers for numbers, _ in found], best))
            results = {name: found[best] for name, found in each.items()}
            self.last, before = summarize(results, done) | self.heads.label(best), self.best
            better = before is None or self.last["top1"] > before["top1"]
            self.best = self.last if better else before
            distributed.say(
                f"Epoch {epoch} {describe(results, self.last)}  (best {self.best['top1']:.2f} %{after(self.best)})"
            )
        if better:  # first, so that a run which is stopped in between writes it again
            kept = self.heads.keep(best)
            if self.run.save_best():
                try:
                    self._write_tables(results["val"][1])
                except OSError as error:
                    distributed.warn(f"{self.run.folder.path}: the tables cannot be written ({error.strerror})")
            else:
                self.best, self.heads.kept = before, kept  # whose weights are still there
                distributed.warn(f"epoch {epoch} is not kept as the best")
        self.run.end_epoch(epoch)

    def _validate(self):
        """{"val": [of each head], and with --eval-train "train": [of each head]}, from `validate`."""
        network = self.heads.module if self.heads else self.network
        validate_on = functools.partial(validate, network, device=self.process.device, classes=len(self.classes))
        return {name: validate_on(batches) for name, batches in self.shown.items()}

    def results(self) -> dict:
        """What a checkpoint holds of the validations so far."""
        return {"best_acc1": self.best["top1"] if self.best else 0.0, "best": self.best, "last": self.last}

    def finish(self) -> None:
        """Write result.json, the best epoch's numbers, unless a finished run was called again, and say them."""
        self.run.finish()
        best, last, path = self.best, self.last, self.run.folder.file("result.json")
        again = distributed.from_rank_0(os.path.exists(path) and self.run.first_epoch == self.args.epochs)
        more, reported = {}, ""
        if self.heads.several:
            for line in self.heads.table():
                distributed.say(line)
            more = {"heads": self.heads.result(), "chosen_on": self.chosen_on}
        if self.val and not again:
            more["val"] = self._validate_choice()
            reported = f" On val, looked at for this alone: top-1 {more['val']['top1']:.2f} %."
        if self.process.rank == 0 and not again:
            try:
                self._write_results(best | {"last": last} | more, self.origin, self.checkpoint_sha256)
            except OSError as error:
                raise Failure(f"{path}: cannot be written ({error.strerror}); the checkpoints are whole") from error
        top5 = f" (top-5 {best['top5']:.2f} %)" if best["top5"] is not None else ""
        distributed.say(
            f"Done. Best top-1 {best['top1']:.2f} %{top5}{after(best)}, {last['top1']:.2f} % after all "
            f"{self.args.epochs}.{reported} {path}"
        )

    def _validate_choice(self):
        """What the best head in its best epoch reaches on val, when it was chosen on other images."""
        self.last_layer.load_state_dict(self.heads.kept)
        [(numbers, _)] = validate(self.network, self.val, self.process.device, len(self.classes))
        return numbers

    def evaluate(self) -> None:
        """-e: validate the classifier that --resume names; say and write what it reaches."""
        run = self.run
        if "epoch" in run.saved:
            checkpoint.check_epoch(run.saved, run.path)
        checkpoint.load_model(run.saved, run.path, self.network)
        if self.process.rank == 0:
            files.make_folders(run.folder.path)
            metrics.print_facts({"device": metrics.device_name(self.process.device), "classifier": run.path})
        if self.batches:
            reader = self.batches.dataset.reader
            reader.mark_unreadable(checkpoint.unreadable(run.saved, run.path, len(reader)))
        results = {name: found[0] for name, found in self._validate().items()}
        if self.process.rank == 0:
            result = summarize(results, run.saved.get("epoch"))
            self._write_results(result, run.path, files.sha256(run.path), results["val"][1])
        if self.batches:
            reader.report_unreadable()
        distributed.say(f"{describe(results, {})}. {run.folder.file('result.json')}")

    def _write_results(self, result, path, digest, confusion=None):
        """result.json and with a confusion matrix the tables. Other results that are there get another name."""
        args, file = self.args, self.run.folder.file
        result = result | {"checkpoint": path, "checkpoint_sha256": digest, "arch": args.arch, "data": args.data}
        if not args.evaluate:
            result |= {name: vars(args)[name] for name in ("train_percent", "subset_file", "weights") if name in args}
        result |= {"hold_out": args.hold_out}
        result |= {"img_size": self.settings["img_size"], "val_images": self.val_images, "classes": len(self.classes)}
        try:
            old = files.read_json(file("result.json"))
        except UserError:  # something else of that name
            old = {}
        same = all(result.get(name) == value for name, value in old.items() if name not in ("command", "versions"))
        if not old or not same:
            for name in RESULTS if confusion is not None else RESULTS[:1]:
                files.set_aside(file(name))
        if confusion is not None:
            self._write_tables(confusion)
        files.write_json(file("result.json"), result | metrics.origin())

    def _write_tables(self, confusion):
        """Rank 0: per_class.csv; confusion.csv with --save-confusion. confusion (C, C): rows are the true classes."""
        if self.process.rank:
            return
        counts, file = confusion.tolist(), self.run.folder.file
        rows = [
            [name, sum(row), row[i], f"{100 * row[i] / max(sum(row), 1):.2f}"]
            for i, (name, row) in enumerate(zip(self.classes, counts))
        ]
        files.write_csv(file("per_class.csv"), ["class", "images", "right", "percent"], rows)
        if self.args.save_confusion:
            rows = [[name, *row] for name, row in zip(self.classes, counts)]
            files.write_csv(file("confusion.csv"), ["class", *self.classes], rows)


def _result(stored, name, path):
    """A `summarize` out of a checkpoint, None before the first validation. Raises UserError if it is neither."""
    if stored is None:
        return None
    numbers = [stored.get(key) for key in ("top1", "top5", "epoch")] if isinstance(stored, dict) else [None]
    if not isinstance(numbers[0], float) or not all(x is None or isinstance(x, (int, float)) for x in numbers):
        raise UserError(f"{path}: its {name} result is {str(stored)[:80]!r}")
    return {"top5": None, "epoch": None, **stored}
