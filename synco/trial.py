"""A trial of the linear probe or of fine-tuning: its files, settings, images and network, from start to result."""

import csv
import io
import json
import math
import os
import shutil
import time

import torch
import torch.nn as nn

from synco import checkpoint, classify, datasets, distributed, loader, metrics, options, survival
from synco.builder import fitting, head_name, network_of, try_images
from synco.classify import changed_weights, frozen_weights, new_last_layer, validate
from synco.distributed import say
from synco.options import Failure, UserError
from synco.precision import Precision

# flags that may differ between a trial and its continuation without a word; what follows from them is compared
UNRELATED = options.UNRELATED | set(
    "batch_size pretrained evaluate eval_train save_confusion subset_file write_subset val_freq".split()
)
RESULTS = ("result.json", "per_class.csv", "confusion.csv")  # what a trial and -e leave beside the checkpoints


def check_flags(args):
    """Raise UserError where the flags of `options.add_run` and `options.add_classifier` contradict each other."""
    options.check_run(args)
    if args.evaluate and not args.resume:
        raise UserError("-e validates a saved classifier: name it with --resume")
    if not args.pretrained and not args.resume:
        raise UserError("--pretrained is needed: a checkpoint's path, or 'random' for untrained weights")
    if args.resume == "auto" and not (args.pretrained or args.save_dir):
        raise UserError("--resume auto looks in --save-dir: give it, or --pretrained, beside which it lies")


class Trial:
    """One run of a classifier: its files, images and network, its first epoch, its best and its last result.

    kind: "lincls" or "semisup", in the names of its checkpoints; name: of its folder where --save-dir is not given.
    Call in this order: `read_images`, `make_network`, `begin`; then `train` and `conclude` in each epoch, `finish`;
    or, with --evaluate, `evaluate` after `begin`. Sets args.save_dir, args.log_dir and args.seed.
    """

    def __init__(self, process, args, kind, name):
        self.process, self.args, self.kind = process, args, kind
        self.precision = Precision(process.device, args.amp, channels_last=args.channels_last, tf32=args.tf32)
        args.save_dir = args.save_dir or default_folder(args, name)
        args.log_dir = args.log_dir or args.save_dir
        if args.evaluate:
            self.path = distributed.from_rank_0(self._evaluated_path() if distributed.rank() == 0 else None)
            self.saved = checkpoint.load(self.path)
        else:
            self.path, self.saved = checkpoint.find(args, self._own_checkpoints(), self._own_results())
        before = self.saved["config"] if self.saved else {}
        if self.saved and checkpoint.is_pretraining(self.saved):
            raise UserError(f"{self.path}: is a pretraining checkpoint; --pretrained takes it")
        if not self.path and not args.pretrained:
            raise UserError(f"--resume auto: {args.save_dir} holds no run yet, and a new one needs --pretrained")
        args.deterministic = args.seed is not None or before.get("deterministic") is True
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic
        args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, self.path, before))
        self.found = checkpoint.load(args.pretrained) if args.pretrained not in (None, "random") else None
        origin = self.found or self.saved
        options.settle(args, args.pretrained or self.path, origin["config"] if origin else None)
        self.batch = loader.batch_each(args.batch_size, process.local_size)
        args.processes, args.global_batch = process.world_size, self.batch * process.world_size
        self.start_epoch, self.start, self.best, self.last = args.start_epoch, 0, None, None
        self.averages, self.reader = metrics.Averages(), None
        self.validation_seconds = 0.0

    def _file(self, name):
        return os.path.join(self.args.save_dir, name)

    def _own_checkpoints(self):
        """This kind's checkpoints in --save-dir, where they are: the best, the last, and the one within an epoch.

        The last one of these is where the trial goes on; each holds all that it takes.
        """
        names = (f"model_best_{self.kind}.pth.tar", f"checkpoint_{self.kind}.pth.tar", self._within())
        return [path for path in map(self._file, names) if os.path.exists(path)]

    def _within(self):
        """The name of the checkpoint within an epoch, which is there until that epoch's own is written."""
        return f"checkpoint_{self.kind}_step.pth.tar"

    def _own_results(self):
        return [self._file(name) for name in RESULTS]

    def _evaluated_path(self):
        """The classifier to validate; refuses a --save-dir that holds another run."""
        args, mine = self.args, self._own_checkpoints()
        if args.resume == "auto" and not mine:
            raise UserError(f"-e --resume auto: {args.save_dir} holds no classifier")
        path = mine[0] if args.resume == "auto" else args.resume
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such checkpoint file")
        if os.path.exists(args.save_dir) and not os.path.isdir(args.save_dir):
            raise UserError(f"--save-dir {args.save_dir}: is not a folder")
        others = [held for held in checkpoint.products(args.save_dir) if not held.endswith("result.json")]
        if others and os.path.realpath(os.path.dirname(path)) != os.path.realpath(args.save_dir):
            raise UserError(f"--save-dir {args.save_dir} holds a run ({os.path.basename(others[0])}); give another")
        return path

    def read_images(self, choose=None):
        """Find the images. choose: takes the training folder and returns the part of it to train on."""
        args, process = self.args, self.process
        load = {"process": process, "workers": loader.workers_each(args.workers, process.local_size)}
        load["timeout"] = args.worker_timeout
        datasets.fetch(args, process)
        val = datasets.load(args, "val")
        args.classes, args.val_images = val.classes, len(val)
        shown = {"val": val}
        if not args.evaluate or args.eval_train:
            train = datasets.load(args, "train")
            datasets.same_classes(train, val, args.data)
            train = choose(train) if choose else train
            if args.eval_train:
                shown["train"] = train
            if args.cache_images:
                datasets.cache([train, val], process.local_size, bool(args.skip_bad_images))
            self.reader = loader.Reader(train, args.skip_bad_images)
            view = loader.classifier_augmentation(args.img_size, args.stats)
            views = loader.Augmented(self.reader, view, args.seed)
            self.batches = loader.train_loader(views, self.batch, seed=args.seed, keep_last=True, **load)
            self.train_images, self.steps = train, len(self.batches)
            args.train_images, args.train_images_crc32 = len(train), train.checksum()
        elif args.cache_images:
            datasets.cache([val], process.local_size)
        self.shown = {}
        for name, images in shown.items():
            centre = images.seen(loader.center_view(args.img_size, args.stats))
            centre = loader.Readable(centre, self.reader) if name == "train" else centre
            self.shown[name] = loader.eval_loader(centre, self.batch, **load)

    def make_network(self):
        """The network with --pretrained's backbone and a new last layer, fc ~ N(0, 0.01²) with bias 0, on its device.

        Returns (network, last layer).
        """
        args = self.args
        torch.manual_seed(args.seed)
        with fitting(args.arch, args.img_size):
            network = network_of(args.arch, args.img_size, args.stem)(num_classes=len(args.classes))
            self.head = head_name(network, len(args.classes))
        last = new_last_layer(network, self.head)
        config = self.saved["config"] if self.saved else {}
        self.loaded, args.checkpoint_sha256 = {}, None
        self.source, self.pretrained = f"random weights, seed {args.seed}", args.pretrained
        if self.found:
            found, self.found = self.found, None  # its memory
            self.loaded = checkpoint.backbone(found, args.pretrained, self.head, arch=args.arch)
            count = checkpoint.load_backbone(network, self.head, self.loaded, args.pretrained)
            self.source, config = checkpoint.summary(found, args.pretrained, count), found["config"] | config
            digest = checkpoint.sha256(args.pretrained) if self.process.rank == 0 else None
            args.checkpoint_sha256 = distributed.from_rank_0(digest)
        elif self.saved:
            self.source = f"that of {self.path}"
            if args.pretrained is None:
                self.pretrained, args.checkpoint_sha256 = config.get("pretrained"), config.get("checkpoint_sha256")
        for name in ("img_size", "stats"):
            value, flag = getattr(args, name), name.replace("_", "-")
            # a trial that goes on is compared in `_resume`
            if config.get(name, value) != value and (args.evaluate or not self.saved):
                source = self.path or args.pretrained
                distributed.warn(f"--{flag} {value}: {source} is of a run with {config[name]}")
        self.precision.place(network)
        try_images(network, args.arch, args.img_size)
        self.network = network
        return network, last

    def check_batch_norm(self):
        """Raise UserError if BatchNorm in train mode would see single images."""
        args = self.args
        if args.evaluate or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules()):
            return
        each = min(self.batch, math.ceil(args.train_images / self.process.world_size))
        if each < 2:
            raise UserError(
                f"--batch-size {args.batch_size}, {args.train_images} images: a process takes one image a step, "
                "and BatchNorm needs two when the backbone is fine-tuned"
            )

    def begin(self, optimizer):
        """Go on from --resume if it is given, and tell what is about to run."""
        args, rank = self.args, self.process.rank
        backbone = [w for name, w in self.network.named_parameters() if not name.startswith(self.head + ".")]
        tuned = any(w.requires_grad for w in backbone)
        changed = []
        before = self.saved["config"] if self.saved else {}
        if self.saved:
            self._load_classifier()
            if not args.evaluate:
                changed = self._resume(optimizer)
            if self.reader:
                self.reader.learn(checkpoint.skipped(self.saved, self.path, len(self.reader)))
        self.frozen = {} if tuned or args.evaluate else frozen_weights(self.network, self.head)
        for name in self.frozen.keys() & self.loaded.keys():  # what the file says, and not what was made of it
            self.frozen[name] = self.loaded[name].to(self.frozen[name])
        if self.saved and changed_weights(self.network, self.frozen):
            raise UserError(f"{self.path}: its frozen backbone is not that of --pretrained {args.pretrained}")
        self.loaded = None  # its memory
        facts = {
            "device": metrics.device_name(self.process.device),
            "world_size": self.process.world_size,
            "images": f"{args.val_images} to validate, {len(args.classes)} classes",
        }
        if args.evaluate:
            if rank == 0:
                checkpoint.make_folders(args.save_dir)
                metrics.tell(facts | {"classifier": self.path})
            return
        facts |= {
            "images": f"{args.train_images} to train, {facts['images']}",
            "backbone": self.source,
            "global_batch": args.global_batch,
            "steps_per_epoch": self.steps,
            "seed": args.seed,
        }
        if rank == 0:
            checkpoint.prepare_folders(args, self._own_checkpoints(), self._own_results(), fresh=not self.path)
            self._bring_along()
            metrics.tell(facts)
            if self.path:
                checkpoint.tell_resumed(self.path, (self.start_epoch, self.start), self.process, before, changed)
            if self.start_epoch < args.epochs:
                metrics.write_json(self._file("config.json"), vars(args) | facts | metrics.origin())
        self.saved = None  # its memory
        done = self.start_epoch * self.steps + self.start
        self.log = metrics.Log(args.log_dir, steps_done=done, active=rank == 0)
        self.saves = survival.Saves(args.save_steps, args.save_minutes, args.dist_timeout)

    def _bring_along(self):
        """A trial that goes on in another folder takes its best and last checkpoint and its tables along."""
        if not self.path or self._own_checkpoints():
            return
        last = f"checkpoint_{self.kind}.pth.tar"
        beside = [f"model_best_{self.kind}.pth.tar", *RESULTS] + [last] * bool(self.start)
        pairs = [(os.path.join(os.path.dirname(self.path), name), self._file(name)) for name in beside]
        pairs.append((self.path, self._file(self._within() if self.start else last)))  # at the end: it marks a run
        for old, new in pairs:
            if os.path.exists(old):
                with open(old, "rb") as source, checkpoint.whole(new) as target:
                    shutil.copyfileobj(source, target)

    def _load_classifier(self):
        """The saved classifier's weights, if it is one of this network, these classes and these images."""
        args, saved, path = self.args, self.saved, self.path
        if saved.get("arch", args.arch) != args.arch:
            raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}; --arch is {args.arch!r}")
        classes = saved["config"].get("classes", args.classes)
        if classes != args.classes:
            strange = sorted(set(map(str, classes)) ^ set(args.classes))
            raise UserError(f"{path}: knows other classes than {args.data}: {', '.join(strange[:5])} differ")
        weights = checkpoint.unprefixed(saved["state_dict"])
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(checkpoint.AUXILIARY)}
        wrong = checkpoint.differences(weights, self.network.state_dict())
        if wrong:
            raise UserError(f"{path}: its weights do not fit {args.arch} with {len(args.classes)} classes: {wrong}")
        self.network.load_state_dict(weights)
        config = saved["config"]
        if args.evaluate and args.eval_train and "train_images" in config:
            now = (args.train_images, getattr(args, "subset_sha256", None))
            if now != (config["train_images"], config.get("subset_sha256")):
                raise UserError(
                    f"{path}: was trained on other images ({config['train_images']}) than the {args.train_images} that "
                    "--eval-train would take: give the same --train-percent or --subset-file"
                )

    def _resume(self, optimizer):
        """The rest of a saved trial: position, optimiser, best and last result. Refuses another trial's settings.

        Returns what --force-resume has let change, in words.
        """
        args, saved, path = self.args, self.saved, self.path
        missing = [key for key in ("epoch", "best_acc1", "optimizer") if key not in saved]
        if missing:
            raise UserError(
                f"{path}: not a classifier's checkpoint that can be resumed: it has no {', '.join(missing)}"
            )
        if ("scheduler" in saved) != (self.kind == "semisup"):
            program = "main_semisup.py" if "scheduler" in saved else "main_lincls.py"
            raise UserError(f"{path}: is a checkpoint of {program}")
        checkpoint.check_epoch(saved, path)
        if saved["epoch"] > args.epochs:
            raise UserError(f"{path}: holds {saved['epoch']} epochs and --epochs is {args.epochs}")
        config = saved["config"]
        if config and config.get("checkpoint_sha256") != args.checkpoint_sha256:
            raise UserError(f"{path}: started from {config.get('pretrained')}, which is not --pretrained's file")
        changed = options.compare(config, args, path, UNRELATED)
        try:  # the reference's files hold the best accuracy alone
            known = {"top1": float(saved["best_acc1"]), "top5": None, "epoch": None}
            results = (saved.get(name, known) for name in ("best", "last"))
            self.best, self.last = (None if found is None else dict(found) for found in results)  # None: no epoch yet
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: its best_acc1 is {saved['best_acc1']!r}, not a number") from error
        if saved["epoch"] == args.epochs and (self.last or {"epoch": 0}).get("epoch") not in (None, args.epochs):
            raise UserError(f"{path}: holds {args.epochs} epochs, the last not validated; --epochs must be more")
        self.start = checkpoint.position(saved, path, self.steps) - saved["epoch"] * self.steps
        if not 0 <= self.start <= self.steps or saved["epoch"] == args.epochs and self.start:
            raise UserError(f"{path}: its step is {saved['step']} after {saved['epoch']} of {args.epochs} epochs")
        checkpoint.check_values(checkpoint.unprefixed(saved["state_dict"]), path, self.network.state_dict())
        checkpoint.load_optimizer(saved, path, optimizer)
        checkpoint.resume_averages(saved, path, self.averages, self.process)
        self.precision.resume(saved, path)
        self.start_epoch = saved["epoch"]
        return changed

    def train(self, learner, optimizer, epoch, **more):
        """One epoch, or what is left of it, see `classify.train`. more: other keys of a checkpoint within it."""
        process, args = self.process, self.args
        rates = dict(zip(("lr", "lr_backbone"), (group["lr"] for group in optimizer.param_groups)))
        told = ", ".join(f"{name} {lr:g}" for name, lr in rates.items())

        def report(i, numbers, pace):
            ahead = (args.epochs - epoch) * self.steps - i - 1
            validations = sum(self._shown(done) for done in range(epoch + 1, args.epochs + 1))
            say(
                f"Epoch {epoch} [{i + 1:{len(str(self.steps))}}/{self.steps}]  loss {numbers['loss']:.4f}  "
                f"acc@1 {numbers['acc1']:5.2f}  acc@5 {numbers['acc5']:5.2f}  "
                f"{numbers['images_per_second']:.0f} images/s  data {numbers['data_share']:.0%}  "
                f"ETA {pace.left(ahead, validations * self.validation_seconds)}"
            )
            self.log.write("train", epoch * self.steps + i + 1, epoch=epoch, **numbers, **rates)

        def check_finite(i, finite):
            checkpoint.check_finite(finite, self.batches, epoch, i, told, self._own_checkpoints(), args.save_dir)

        def after_step(i, finite):
            due = self.saves.after(epoch * self.steps + i + 1, news=self.reader.news())
            if due.news:
                self.reader.exchange()
            if due.save:
                check_finite(i, finite)
                self._save(optimizer, epoch, i + 1, self._within(), stop=due.stop, **more)
                if due.stop:
                    checkpoint.leave(self.args, self.saves, epoch * self.steps + i + 1, self._within())

        with self.reader.watched():
            classify.train(
                learner, self.batches, optimizer, epoch,
                process=process, seed=args.seed, print_freq=args.print_freq, averages=self.averages, report=report,
                check_finite=check_finite, after_step=after_step, start=self.start if epoch == self.start_epoch else 0,
                precision=self.precision,
            )  # fmt: skip

    def _save(self, optimizer, epoch, within, name, *, stop=False, **more):
        """Write a checkpoint of so many whole epochs and steps of the next. more: other keys.

        stop: the trial ends with it, or not as if all were well.
        """
        state, problem = self.averages.state(distributed.from_all), ""
        if self.process.rank == 0:
            self.log.sync()
            content = {
                "epoch": epoch,
                "arch": self.args.arch,
                "state_dict": checkpoint.prefixed(self.network),
                "best_acc1": self.best["top1"] if self.best else 0.0,
                "optimizer": optimizer.state_dict(),
                "best": self.best,
                "last": self.last,
                "step": epoch * self.steps + within,
                "steps_per_epoch": self.steps,
                "averages": state,
                "skipped": sorted(self.reader.known),
                "config": vars(self.args),
                **self.precision.state(),
                **more,
            }
            problem = checkpoint.try_to_save(content, self._file(name))
        self.saves.done()
        if stop:
            problem = distributed.from_rank_0(problem)
            if problem:
                raise Failure(problem)
        return not problem

    def check_frozen(self):
        """Raise RuntimeError unless the backbone, running statistics included, is what it was, bit for bit."""
        changed = changed_weights(self.network, self.frozen)
        if changed:
            raise RuntimeError(
                f"the frozen backbone has changed in {len(changed)} tensors, such as {', '.join(changed[:3])}"
            )

    def conclude(self, epoch, optimizer, **more):
        """The end of an epoch: validate if it is due, tell, write the last and perhaps the best checkpoint.

        more: other keys of the checkpoints.
        """
        done, args = epoch + 1, self.args
        last, final, better = f"checkpoint_{self.kind}.pth.tar", done == args.epochs, False
        if self._shown(done):
            results = self._validate()
            for name, (numbers, _) in results.items():
                kind = name if name == "val" else "eval_train"
                if not self.log.holds(kind, done):  # written before the run was killed, and not yet in a checkpoint
                    self.log.write(kind, done * self.steps, epoch=done, **numbers)
            self.last = summary(results, done)
            better, before = self.best is None or self.last["top1"] > self.best["top1"], self.best
            if better:
                self.best = self.last
            say(f"Epoch {epoch} {describe(results)}  (best {self.best['top1']:.2f} %{after(self.best)})")
        stop = self.saves.after(done * self.steps, at_once=True).stop
        if better:  # first, so that a run which is stopped in between writes it again
            written = self._save(optimizer, done, 0, f"model_best_{self.kind}.pth.tar", stop=final, **more)
            if written and self.process.rank == 0:
                try:
                    self._write_tables(results["val"][1])
                except OSError as error:
                    distributed.warn(f"{args.save_dir}: the tables cannot be written ({error.strerror})")
            if not distributed.from_rank_0(written):
                self.best = before  # whose weights are still there
                distributed.warn(f"epoch {epoch} is not kept as the best")
        written = self._save(optimizer, done, 0, last, stop=stop or final, **more)
        if written and self.process.rank == 0 and os.path.exists(self._file(self._within())):
            os.remove(self._file(self._within()))
        if stop and not final:
            checkpoint.leave(args, self.saves, done * self.steps, last)

    def _shown(self, done):
        """Whether a validation is due after so many epochs."""
        args = self.args
        return done == args.epochs or args.val_freq > 0 and done % args.val_freq == 0

    def _validate(self):
        """{"val": ..., and with --eval-train "train": ...}, from `validate`."""
        began = time.perf_counter()
        found = {
            name: validate(self.network, images, self.process.device, len(self.args.classes))
            for name, images in self.shown.items()
        }
        self.validation_seconds = time.perf_counter() - began
        return found

    def _write_tables(self, confusion):
        """per_class.csv, and confusion.csv with --save-confusion. confusion (C, C): rows are the true classes."""
        classes, counts = self.args.classes, confusion.tolist()
        rows = [
            [name, sum(row), row[i], f"{100 * row[i] / max(sum(row), 1):.2f}"]
            for i, (name, row) in enumerate(zip(classes, counts))
        ]
        write_csv(self._file("per_class.csv"), ["class", "images", "right", "percent"], rows)
        if self.args.save_confusion:
            rows = [[name, *row] for name, row in zip(classes, counts)]
            write_csv(self._file("confusion.csv"), ["class", *classes], rows)

    def finish(self):
        """Write result.json, the best epoch's numbers, unless a finished trial was called again, and say them."""
        self.log.close()
        self.reader.tell()
        best, last, path = self.best, self.last, self._file("result.json")
        if self.process.rank == 0 and not (os.path.exists(path) and self.start_epoch == self.args.epochs):
            try:
                self._write_results(best | {"last": last}, self.pretrained, self.args.checkpoint_sha256)
            except OSError as error:
                raise Failure(f"{path}: cannot be written ({error.strerror}); the checkpoints are whole") from error
        top5 = f" (top-5 {best['top5']:.2f} %)" if best["top5"] is not None else ""
        say(
            f"Done. Best top-1 {best['top1']:.2f} %{top5}{after(best)}, {last['top1']:.2f} % after all "
            f"{self.args.epochs}. {self._file('result.json')}"
        )

    def evaluate(self):
        """Validate the classifier that --resume names; say and write what it reaches."""
        results = self._validate()
        if self.process.rank == 0:
            found = summary(results, self.saved.get("epoch"))
            self._write_results(found, self.path, checkpoint.sha256(self.path), results["val"][1])
        if self.reader:
            self.reader.tell()
        say(f"{describe(results)}. {self._file('result.json')}")

    def _write_results(self, result, path, digest, confusion=None):
        """result.json and with a confusion matrix the tables. Other results that are there get another name."""
        args = self.args
        result = result | {"checkpoint": path, "checkpoint_sha256": digest, "arch": args.arch, "data": args.data}
        result |= {"img_size": args.img_size, "val_images": args.val_images, "classes": len(args.classes)}
        old = read_json(self._file("result.json"))
        if not old or any(
            result.get(name) != value for name, value in old.items() if name not in ("command", "versions")
        ):
            for name in RESULTS if confusion is not None else RESULTS[:1]:
                set_aside(self._file(name))
        if confusion is not None:
            self._write_tables(confusion)
        metrics.write_json(self._file("result.json"), result | metrics.origin())


def summary(results, epoch):
    """What is kept of `Trial._validate` for an epoch: {"epoch", "top1", "top5"}, and "train_top1" with --eval-train."""
    numbers, _ = results["val"]
    found = {"epoch": epoch, "top1": numbers["top1"], "top5": numbers["top5"]}
    return found | ({"train_top1": results["train"][0]["top1"]} if "train" in results else {})


def after(result):
    """ " after N epochs", where a `summary` knows of how many."""
    return "" if result["epoch"] is None else f" after {result['epoch']} epoch{'s' * (result['epoch'] != 1)}"


def describe(results):
    """The numbers of `validate` in words, for "val" and perhaps "train"."""
    numbers, _ = results["val"]
    words = f"val: top-1 {numbers['top1']:.2f} %  top-5 {numbers['top5']:.2f} %  loss {numbers['loss']:.4f}"
    return words + (f"  train: top-1 {results['train'][0]['top1']:.2f} %" if "train" in results else "")


def default_folder(args, name):
    """A folder of the run's own, beside the checkpoint that it starts from."""
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


def read_json(path):
    """The object in a JSON file; {} where there is no file, and a placeholder where it holds something else."""
    try:
        with open(path) as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {"": "something else"}


def set_aside(path):
    """Rename a file, if it is there, to the first free of name-1.ext, name-2.ext, ..."""
    stem, ending = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}-{number}{ending}"):
        number += 1
    if os.path.exists(path):
        os.rename(path, f"{stem}-{number}{ending}")


def write_csv(path, header, rows):
    """Write a table, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with checkpoint.whole(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
