"""What the linear probe and the fine-tuning share: a trial's files, images and network, its epochs, its validation."""

import copy
import csv
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from synco import checkpoint, distributed, loader, metrics, options
from synco.builder import fitting, head_name, torchvision_network
from synco.distributed import say
from synco.options import UserError

# flags that may differ between a trial and its continuation without a word; what follows from them is compared
UNRELATED = options.UNRELATED | set(
    "batch_size pretrained evaluate eval_train save_confusion subset_file write_subset".split()
)


def check_flags(args):
    """Raise UserError where the flags of `options.add_run` and `options.add_classifier` contradict each other."""
    options.check_run(args)
    if args.evaluate and not args.resume:
        raise UserError("-e validates a saved classifier: name it with --resume")
    if not args.pretrained and not args.resume:
        raise UserError("--pretrained is needed: a checkpoint's path, or 'random' for untrained weights")


class Trial:
    """One run of a classifier: its files, images and network, its first epoch, its best and its last result.

    kind: "lincls" or "semisup", in the names of its checkpoints; name: of its folder where --save-dir is not given.
    Call in this order: `read_images`, `make_network`, `begin`; then `train` and `conclude` in each epoch, `finish`;
    or, with --evaluate, `evaluate` after `begin`. Sets args.save_dir, args.log_dir and args.seed.
    """

    def __init__(self, process, args, kind, name):
        self.process, self.args, self.kind = process, args, kind
        args.save_dir = args.save_dir or default_folder(args, name)
        args.log_dir = args.log_dir or args.save_dir
        self.path = distributed.from_rank_0(self._resume_path() if distributed.rank() == 0 else None)
        self.saved = checkpoint.load(self.path) if self.path else None
        before = self.saved["config"] if self.saved else {}
        if self.saved and checkpoint.is_pretraining(self.saved):
            raise UserError(f"{self.path}: is a pretraining checkpoint; --pretrained takes it")
        if not self.path and not args.pretrained:
            raise UserError(f"--resume auto: {args.save_dir} holds no run yet, and a new one needs --pretrained")
        if not args.evaluate:
            args.deterministic = args.seed is not None or before.get("deterministic") is True
            torch.backends.cudnn.deterministic = args.deterministic
            torch.backends.cudnn.benchmark = not args.deterministic
            args.seed = distributed.from_rank_0(checkpoint.choose_seed(args.seed, self.path, before))
        self.batch = loader.batch_each(args.batch_size, process.local_size)
        args.global_batch = self.batch * process.world_size
        self.start_epoch, self.best, self.last = args.start_epoch, None, None

    def _file(self, name):
        return os.path.join(self.args.save_dir, name)

    def _own_checkpoints(self):
        """This kind's checkpoints in --save-dir, the best and then the last, where they are."""
        names = (f"model_best_{self.kind}.pth.tar", f"checkpoint_{self.kind}.pth.tar")
        return [path for path in map(self._file, names) if os.path.exists(path)]

    def _resume_path(self):
        """The classifier to go on from or to validate, or None; refuses a --save-dir that holds another result."""
        args, mine = self.args, self._own_checkpoints()
        if args.evaluate:
            path = mine[0] if args.resume == "auto" and mine else args.resume
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such checkpoint file")
            mine = os.path.realpath(os.path.dirname(path)) == os.path.realpath(args.save_dir)
            mine = mine or self._old_result().get("checkpoint_sha256") == checkpoint.sha256(path)
        else:
            path = checkpoint.resume_path(args, mine)
        if self._old_result() and not mine and not args.overwrite:
            raise UserError(
                f"--save-dir {args.save_dir} holds another run's result.json; give another folder, or --overwrite"
            )
        return path

    def _old_result(self):
        """What result.json in --save-dir says, {} where there is none."""
        try:
            with open(self._file("result.json")) as file:
                return json.load(file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._file('result.json')}: cannot be read as JSON ({error})") from error

    def read_images(self, choose=None):
        """Find the images. choose: takes the training folder and returns the part of it to train on."""
        args, process = self.args, self.process
        workers = loader.workers_each(args.workers, process.local_size)
        val = loader.image_folder(args.data, "val")
        args.classes, args.val_images = val.classes, len(val)
        shown = {"val": val}
        if not args.evaluate or args.eval_train:
            train = loader.image_folder(args.data, "train")
            loader.same_classes(train, val, args.data)
            train = choose(train) if choose else train
            views = loader.Augmented(train, loader.classifier_augmentation(args.img_size), args.seed or 0)
            self.batches = loader.train_loader(
                views, self.batch, process=process, workers=workers, seed=views.seed, keep_last=True
            )
            self.steps = len(self.batches)
            args.train_images = len(train)
            if args.eval_train:
                shown["train"] = copy.copy(train)  # the same images, other views
        self.shown = {}
        for name, images in shown.items():
            images.transform = loader.center_view(args.img_size)
            self.shown[name] = loader.eval_loader(images, self.batch, process=process, workers=workers)

    def make_network(self):
        """The network with --pretrained's backbone and a new last layer, fc ~ N(0, 0.01²) with bias 0, on its device.

        Returns (network, last layer).
        """
        args, device = self.args, self.process.device
        torch.manual_seed(args.seed or 0)
        with fitting(args.arch, args.img_size):
            network = torchvision_network(args.arch, args.img_size)(num_classes=len(args.classes))
            self.head = head_name(network, len(args.classes))
        last = network.get_submodule(self.head)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)

        args.checkpoint_sha256 = None
        self.source, self.pretrained = f"random weights, seed {args.seed}", args.pretrained
        if args.pretrained is None:
            self.source = f"those in {self.path}"
            args.checkpoint_sha256 = self.saved["config"].get("checkpoint_sha256")
            self.pretrained = self.saved["config"].get("pretrained")
        elif args.pretrained != "random":
            found = checkpoint.load(args.pretrained)
            weights = checkpoint.backbone(found, args.pretrained, self.head, arch=args.arch)
            count = checkpoint.load_backbone(network, self.head, weights, args.pretrained)
            self.source = checkpoint.summary(found, args.pretrained, count)
            digest = checkpoint.sha256(args.pretrained) if self.process.rank == 0 else None
            args.checkpoint_sha256 = distributed.from_rank_0(digest)
        network.to(device).eval()
        with fitting(args.arch, args.img_size), torch.no_grad():
            network(torch.zeros(2, 3, args.img_size, args.img_size, device=device))
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

    def begin(self, optimizer, scheduler=None):
        """Go on from --resume if it is given, check what stays frozen, and tell what is about to run."""
        args = self.args
        backbone = [w for name, w in self.network.named_parameters() if not name.startswith(self.head + ".")]
        tuned = any(w.requires_grad for w in backbone)
        self.frozen = {} if tuned or args.evaluate else frozen_weights(self.network, self.head)
        if self.saved:
            self._load_classifier()
            if not args.evaluate:
                self._resume(optimizer, scheduler)
            if args.pretrained not in (None, "random") and changed_weights(self.network, self.frozen):
                raise UserError(f"{self.path}: its frozen backbone is not that of --pretrained {args.pretrained}")
            self.frozen = frozen_weights(self.network, self.head) if self.frozen else {}
        facts = {
            "device": metrics.device_name(self.process.device),
            "world_size": self.process.world_size,
            "images": f"{args.val_images} to validate, {len(args.classes)} classes",
            "backbone": self.source,
        }
        if args.evaluate:
            if self.process.rank == 0:
                checkpoint.make_folders(args.save_dir)
                metrics.tell(facts)
            return
        facts["images"] = f"{args.train_images} to train, {facts['images']}"
        facts |= {"global_batch": args.global_batch, "steps_per_epoch": self.steps, "seed": args.seed}
        if self.process.rank == 0:
            results = [path for path in [self._file("result.json")] if os.path.exists(path)]
            checkpoint.prepare_folders(args, self._own_checkpoints() + results, fresh=not self.path)
            metrics.tell(facts)
            if self.path:
                metrics.tell({"resumed": f"{self.path}, {self.start_epoch} epochs done"})
            if self.start_epoch < args.epochs:
                metrics.write_json(self._file("config.json"), vars(args) | facts | metrics.origin())
        steps_done = self.start_epoch * self.steps
        self.log = metrics.Log(args.log_dir, steps_done=steps_done, active=self.process.rank == 0)

    def _load_classifier(self):
        """The saved classifier's weights, if it is one of this network and these classes."""
        args, saved, path = self.args, self.saved, self.path
        if saved.get("arch", args.arch) != args.arch:
            raise UserError(f"{path}: is a checkpoint of {saved['arch']!r}; --arch is {args.arch!r}")
        classes = saved["config"].get("classes", args.classes)
        if classes != args.classes:
            strange = sorted(set(classes) ^ set(args.classes))
            raise UserError(f"{path}: knows other classes than {args.data}: {', '.join(map(str, strange[:5]))} differ")
        weights = checkpoint.unprefixed(saved["state_dict"])
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(checkpoint.AUXILIARY)}
        wrong = checkpoint.differences(weights, self.network.state_dict())
        if wrong:
            raise UserError(f"{path}: its weights do not fit {args.arch} with {len(args.classes)} classes: {wrong}")
        self.network.load_state_dict(weights)

    def _resume(self, optimizer, scheduler):
        """The rest of a saved trial: epoch, optimiser, best and last result. Refuses another trial's settings."""
        args, saved, path = self.args, self.saved, self.path
        missing = [key for key in ("epoch", "best_acc1", "optimizer") if key not in saved]
        if missing:
            raise UserError(
                f"{path}: not a classifier's checkpoint that can be resumed: it has no {', '.join(missing)}"
            )
        if ("scheduler" in saved) != (scheduler is not None):
            program = "main_semisup.py" if "scheduler" in saved else "main_lincls.py"
            raise UserError(f"{path}: is a checkpoint of {program}")
        changed = options.changed(saved["config"], args, UNRELATED)
        if changed:
            raise UserError(f"{path}: is of a run with other settings: {'; '.join(changed)}")
        checkpoint.load_optimizer(saved, path, optimizer)
        if scheduler:
            scheduler.load_state_dict(saved["scheduler"])
        self.start_epoch = saved["epoch"]
        self.best = saved.get("best", {"top1": float(saved["best_acc1"])})
        self.last = saved.get("last", self.best)
        self.saved = None  # its memory

    def train(self, learner, optimizer, epoch):
        """One epoch of cross-entropy. Numbers are read back from the device at print steps only.

        learner: the network, or what `distributed.parallel` made of it. BatchNorm and dropout are in the mode that
        the caller has set.
        """
        process, args, steps = self.process, self.args, self.steps
        self.batches.batch_sampler.sampler.set_epoch(epoch)
        averages, pace = metrics.Averages(), metrics.Pace()
        rates = [group["lr"] for group in optimizer.param_groups]
        for i, (images, labels) in pace.watch(self.batches):
            images = images.to(process.device, non_blocking=True)
            labels = labels.to(process.device, non_blocking=True)
            # what a network with dropout draws is a function of the step, too
            torch.manual_seed(distributed.seed_of("dropout", args.seed, epoch * steps + i, process.rank))
            logits = learner(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            right = 100.0 * (metrics.ranked(logits) == labels[:, None])  # (N, 5)
            averages.add(loss=loss, acc1=right[:, 0].mean(), acc5=right.sum(dim=1).mean())
            if i % args.print_freq == 0 or i == steps - 1:
                numbers = averages.read(distributed.mean)
                if not math.isfinite(numbers["loss"]):
                    raise FloatingPointError(f"the loss is {numbers['loss']} in epoch {epoch}, step {i} (lr {rates})")
                numbers |= pace.read(process.world_size)
                say(
                    f"Epoch {epoch} [{i + 1:{len(str(steps))}}/{steps}]  loss {numbers['loss']:.4f}  "
                    f"acc@1 {numbers['acc1']:5.2f}  acc@5 {numbers['acc5']:5.2f}  "
                    f"{numbers['images_per_second']:.0f} images/s  data {numbers['data_share']:.0%}  "
                    f"ETA {pace.left((args.epochs - epoch) * steps - i - 1)}"
                )
                for name, lr in zip(("lr", "lr_backbone"), rates):
                    numbers[name] = lr
                self.log.write("train", epoch * steps + i + 1, epoch=epoch, **numbers)

    def check_frozen(self):
        """Raise RuntimeError unless the backbone, running statistics included, is what it was, bit for bit."""
        changed = changed_weights(self.network, self.frozen)
        if changed:
            raise RuntimeError(
                f"the frozen backbone has changed in {len(changed)} tensors, such as {', '.join(changed[:3])}"
            )

    def conclude(self, epoch, optimizer, scheduler=None):
        """The end of an epoch: validate, tell, write the last checkpoint, and the best if it is."""
        done, args = epoch + 1, self.args
        results = self._validate()
        numbers, confusion = results["val"]
        for name, (found, _) in results.items():
            self.log.write(name if name == "val" else "eval_train", done * self.steps, epoch=done, **found)
        self.last = {"epoch": done, "top1": numbers["top1"], "top5": numbers["top5"]}
        if "train" in results:
            self.last["train_top1"] = results["train"][0]["top1"]
        better = self.best is None or self.last["top1"] > self.best["top1"]
        if better:
            self.best = self.last
        say(
            f"Epoch {epoch} {describe(results)}  (best {self.best['top1']:.2f} % "
            f"after {self.best.get('epoch', 'some')} epochs)"
        )
        if self.process.rank:
            return
        content = {
            "epoch": done,
            "arch": args.arch,
            "state_dict": checkpoint.prefixed(self.network),
            "best_acc1": self.best["top1"],
            "optimizer": optimizer.state_dict(),
            "best": self.best,
            "last": self.last,
            "config": vars(args),
        }
        if scheduler:
            content["scheduler"] = scheduler.state_dict()
        if better:  # first, so that a run which is stopped in between writes it again
            checkpoint.save(content, self._file(f"model_best_{self.kind}.pth.tar"))
            self._write_tables(confusion)
        checkpoint.save(content, self._file(f"checkpoint_{self.kind}.pth.tar"))

    def _validate(self):
        return {
            name: validate(self.network, images, self.process.device, len(self.args.classes))
            for name, images in self.shown.items()
        }

    def _write_tables(self, confusion):
        """per_class.csv, and confusion.csv with --save-confusion. confusion (C, C): rows are the true classes."""
        classes = self.args.classes
        rows = [
            [name, sum(row), row[i], f"{100 * row[i] / max(sum(row), 1):.2f}"]
            for i, (name, row) in enumerate(zip(classes, confusion.tolist()))
        ]
        write_csv(self._file("per_class.csv"), ["class", "images", "right", "percent"], rows)
        if self.args.save_confusion:
            rows = [[name, *row] for name, row in zip(classes, confusion.tolist())]
            write_csv(self._file("confusion.csv"), ["class", *classes], rows)

    def finish(self):
        """Write result.json, the best epoch's numbers, and say them."""
        self.log.close()
        best, last = self.best, self.last
        result = {name: best.get(name) for name in ("top1", "top5", "epoch")}
        if "train_top1" in best:
            result["train_top1"] = best["train_top1"]
        self._write_result(result | {"last": last}, self.pretrained, self.args.checkpoint_sha256)
        top5 = f" (top-5 {best['top5']:.2f} %)" if "top5" in best else ""
        say(
            f"Done. Best top-1 {best['top1']:.2f} %{top5} after {best.get('epoch', 'some')} of {self.args.epochs} "
            f"epochs, {last['top1']:.2f} % after the last. {self._file('result.json')}"
        )

    def evaluate(self):
        """Validate the classifier that --resume names, and write and say what it reaches."""
        results = self._validate()
        numbers, confusion = results["val"]
        result = {"top1": numbers["top1"], "top5": numbers["top5"], "epoch": self.saved.get("epoch")}
        if "train" in results:
            result["train_top1"] = results["train"][0]["top1"]
        if self.process.rank == 0:
            self._write_tables(confusion)
            self._write_result(result, self.path, checkpoint.sha256(self.path))
        say(f"{describe(results)}. {self._file('result.json')}")

    def _write_result(self, result, path, digest):
        if self.process.rank == 0:
            args = self.args
            result |= {"checkpoint": path, "checkpoint_sha256": digest, "arch": args.arch, "data": args.data}
            result |= {"val_images": args.val_images, "classes": len(args.classes)}
            metrics.write_json(self._file("result.json"), result | metrics.origin())


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


def frozen_weights(network, head):
    """A copy of a network's state, running statistics included, without its last layer: {name: tensor}."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}


def changed_weights(network, before):
    """The names of the tensors of `frozen_weights` that are no longer what they were, bit for bit."""
    now = network.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]


@torch.no_grad()
def validate(network, batches, device, classes):
    """A classifier's results over a `loader.eval_loader`, which spreads the images over the processes.

    Every process validates with rank 0's buffers and gets the same numbers. The network is put in eval mode meanwhile.
    Returns {"top1", "top5" (percent), "loss"}, and the confusion matrix (C, C): rows are the true classes.
    """
    distributed.share_buffers(network)
    was_training = network.training
    network.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.long, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the loss, of the hits among five
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        logits = network(images.to(device, non_blocking=True)).float()  # (N, C)
        ranked = metrics.ranked(logits)  # (N, 5)
        cell = labels * classes + ranked[:, 0]
        confusion.scatter_add_(0, cell, torch.ones_like(cell))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), (ranked == labels[:, None]).sum().double()])
    network.train(was_training)
    confusion = distributed.total(confusion).view(classes, classes).cpu()
    loss, five = distributed.total(sums).tolist()
    count, right = confusion.sum().item(), confusion.trace().item()
    return {"top1": 100 * right / count, "top5": 100 * five / count, "loss": loss / count}, confusion


def describe(results):
    """The numbers of `validate` in words, for "val" and perhaps "train"."""
    numbers, _ = results["val"]
    words = f"val: top-1 {numbers['top1']:.2f} %  top-5 {numbers['top5']:.2f} %  loss {numbers['loss']:.4f}"
    return words + (f"  train: top-1 {results['train'][0]['top1']:.2f} %" if "train" in results else "")


def write_csv(path, header, rows):
    """Write a table."""
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
