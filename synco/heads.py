"""The last layers on one backbone, one for each learning rate: their pass, what each reaches, which have diverged."""

import copy
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from synco import checkpoint, distributed, metrics
from synco.errors import UserError
from synco.networks import features
from synco.run import Step


class Fork(nn.Module):
    """A network with several last layers: images (N, 3, H, W) → [logits (N, C) of each].

    With one layer, the network's own, this is the network. Several share one pass through it, which has no gradient.
    alive (layers,): where it is False the logits are 0, and so is their gradient.
    """

    def __init__(self, network: nn.Module, head: str, layers: nn.ModuleList, alive: torch.Tensor) -> None:
        super().__init__()
        self.network, self.head, self.layers, self.alive = network, head, layers, alive
        self.train(network.training)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        if len(self.layers) == 1:
            return [self.network(images)]
        with torch.no_grad():
            x = features(self.network, self.head, images)  # (N, D)
        return [torch.where(alive, layer(x), 0) for alive, layer in zip(self.alive, self.layers)]


class Heads:
    """The last layers of a run, one for each pair of a learning rate and a weight decay, all with the same start.

    network, head: the one that they belong to, on its device, and the name of its own last layer; rates, decays: the
    pairs are all combinations; flag: the rates', where lower ones are to be advised.
    Several heads are copies of the network's own last layer, which then holds the one that was best: what a checkpoint
    has in its state dict. A single head is the network's own last layer.

    names: as in "lr3", or "lr3-wd0" with several decays; settings: [(rate, decay)]; layers; module: the `Fork`;
    diverged: {name: {"epoch", "step"}}; best, last: {name: what it has reached}, of several heads.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str,
        rates: Sequence[float] = (0.0,),
        decays: Sequence[float] = (0.0,),
        flag: str | None = None,
    ) -> None:
        self.settings, self.flag = list(itertools.product(rates, decays)), flag
        self.names = [f"lr{lr:.12g}" + f"-wd{wd:.12g}" * (len(decays) > 1) for lr, wd in self.settings]
        self.own, self.several = network.get_submodule(head), len(self.settings) > 1
        copies = [copy.deepcopy(self.own) for _ in self.settings] if self.several else [self.own]
        self.layers = nn.ModuleList(copies)
        self.alive = torch.ones(len(self.names), dtype=torch.bool, device=next(network.parameters()).device)
        self.module = Fork(network, head, self.layers, self.alive)
        self.diverged, self.best, self.last = {}, {}, {}
        self.kept = None  # the best head's weights in its best epoch
        self.warned = False

    @property
    def weights(self) -> list:
        """The parameters of the one head, or [those of each]: what `Precision.backward` takes the norms of."""
        each = [list(layer.parameters()) for layer in self.layers]
        return each if self.several else each[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the losses and of what else there is of each head; () with one."""
        return (len(self.names),) if self.several else ()

    @property
    def rate_names(self) -> tuple[str, ...]:
        """What the log calls the learning rate of each."""
        return tuple(f"lr/{name}" for name in self.names) if self.several else ("lr",)

    def groups(self) -> list[dict]:
        """The optimiser's parameter groups, one for each head."""
        return [
            {"params": list(layer.parameters()), "lr": lr, "weight_decay": wd}
            for layer, (lr, wd) in zip(self.layers, self.settings)
        ]

    def losses(self, logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each head (heads,), of a single one as a 0-dim tensor. logits: as `Fork` has them."""
        return joined([F.cross_entropy(part.float(), labels) for part in logits])

    def record(self, step: Step, losses: torch.Tensor, norms: torch.Tensor, logits: list, labels: torch.Tensor) -> None:
        """`Step.record` with the accuracies. A head that is not finite has no gradient in the steps that follow."""
        if self.several:
            self.alive.logical_and_((losses.detach() + norms).isfinite())
        step.record(losses, norms, **metrics.accuracy(joined([part.detach() for part in logits]), labels))

    # ------------------------------------------------------------------------------------------- at print steps, saves

    def drop(self, firsts: list[int | None], epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        """Put to rest those that are not finite any more, all weights 0, and say so → whether others are left.

        firsts: of each head the step of this epoch from which on it has not been finite, or None.
        """
        gone = {name: first for name, first in zip(self.names, firsts) if first is not None}
        left = [name for name in self.names if name not in self.diverged | gone]
        if not left:
            return False
        for i, (name, layer) in enumerate(zip(self.names, self.layers)):
            if name not in gone or name in self.diverged:
                continue
            self.diverged[name] = {"epoch": epoch, "step": gone[name]}
            self.alive[i] = False
            with torch.no_grad():
                for weight in layer.parameters():
                    weight.zero_()
                    if optimizer.state[weight].get("momentum_buffer") is not None:
                        optimizer.state[weight]["momentum_buffer"].zero_()
            distributed.warn(
                f"{name} has diverged and is dropped: its loss or gradient is not finite from step {gone[name]} of "
                f"epoch {epoch} on; heads that go on: {len(left)}"
            )
        return True

    def report(self, numbers: dict, epoch: int) -> tuple[str, dict[str, float]]:
        """The numbers of a print step, of each head where they are lists → (whose the line shows, numbers of the log).

        That is the head with the smallest loss, under the plain names; those of each have its name behind a slash.
        """
        shown = ""
        if self.several:
            index = {name: i for i, name in enumerate(self.names) if name not in self.diverged}
            best = min(index, key=lambda name: numbers["loss"][index[name]])
            each = {what: value for what, value in numbers.items() if isinstance(value, list)}
            rates = {what: numbers[what] for what in self.rate_names}
            numbers = {what: value for what, value in numbers.items() if what not in rates}
            numbers |= {what: value[index[best]] for what, value in each.items()} | {"lr": rates[f"lr/{best}"]}
            for name, i in index.items():
                numbers |= {f"{what}/{name}": value[i] for what, value in each.items()}
            shown = f"{best}: "
        self._warn_if_grown(numbers["loss"], epoch)
        return shown, numbers

    def _warn_if_grown(self, loss, epoch):
        """Once in the first epoch: the best head's loss is far above that of guessing, which all heads begin with."""
        guessing = math.log(self.own.out_features)
        if self.flag and epoch == 0 and loss > 10 * guessing and not self.warned:
            self.warned = True
            lowest = min(lr for lr, _ in self.settings)
            lower = " ".join(f"{lowest / 10**i:g}" for i in (1, 2, 3))
            distributed.warn(
                f"the loss has grown to {loss:.1f} in the first epoch, over ten times the {guessing:.1f} of guessing: "
                f"try lower rates, {self.flag} {lower}"
            )

    # ------------------------------------------------------------------------------------------------- of an epoch

    def judge(self, results: list[dict], epoch: int) -> int:
        """Keep what each head has reached after so many epochs → the number of the best.

        results: of each head {"top1", "top5", "loss"}. Of equals in top-1 the one with the smallest loss is the best.
        """
        found = {
            name: {"epoch": epoch, **result} for name, result in zip(self.names, results) if name not in self.diverged
        }
        self.last |= found
        for name, result in found.items():
            if name not in self.best or result["top1"] > self.best[name]["top1"]:
                self.best[name] = result
        return self.names.index(max(found, key=lambda name: rank(found[name])))

    def numbers(self, results: list[dict], best: int) -> dict[str, float]:
        """For the log: the best head's numbers under their plain names, and those of each with its name behind a slash.

        results: see `judge`.
        """
        found = dict(results[best])
        if self.several:
            found["lr"] = self.settings[best][0]
            for name, result in zip(self.names, results):
                found |= {f"{what}/{name}": value for what, value in result.items() if name not in self.diverged}
        return found

    def label(self, i: int) -> dict[str, str]:
        """{"head": the name of head i}, {} where there is one alone."""
        return {"head": self.names[i]} if self.several else {}

    def publish(self) -> None:
        """Put the head that did best when last validated, as it is now, into the network's own last layer.

        Before there is one that is the first which has not diverged.
        """
        if self.several:
            left = [name for name in self.names if name not in self.diverged]
            best = max(left, key=lambda name: rank(self.last[name]) if name in self.last else (-1.0, 0.0))
            self.own.load_state_dict(self.layers[self.names.index(best)].state_dict())

    def keep(self, i: int) -> dict | None:
        """Keep the weights of head i as the best so far → those that were before."""
        before = self.kept
        if self.several:
            self.kept = copy.deepcopy(self.layers[i].state_dict())
        return before

    def table(self) -> list[str]:
        """What each has reached in its best epoch, as lines."""
        width = max(map(len, [*self.names, "head"]))
        lines = [f"{'head':{width}}    top-1     top-5      loss  epoch  diverged"]
        for name in self.names:
            best, gone = self.best.get(name), self.diverged.get(name)
            numbers = f"{'':34}"
            if best:
                numbers = f"{best['top1']:6.2f} %  {best['top5']:6.2f} %  {best['loss']:8.4g}  {best['epoch']:5}"
            when = f"in epoch {gone['epoch']}" if gone else "no"
            lines.append(f"{name:{width}} {numbers}  {when}")
        return lines

    def result(self) -> list[dict]:
        """What each has reached, for result.json."""
        nothing = {"epoch": None, "top1": None, "top5": None, "loss": None}
        return [
            {"name": name, "lr": lr, "weight_decay": wd, "diverged": self.diverged.get(name)}
            | self.best.get(name, nothing)
            | {"last": self.last.get(name)}
            for name, (lr, wd) in zip(self.names, self.settings)
        ]

    # ----------------------------------------------------------------------------------------------- in a checkpoint

    def check(self, saved: dict, path: str) -> None:
        """Raise UserError unless a checkpoint, where one goes on from it, has these heads."""
        try:
            held = list(saved["heads"]["layers"]) if "heads" in saved else []
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: its heads are none") from error
        mine = self.names if self.several else []
        if held != mine:
            held, mine = (f"the heads {', '.join(map(str, names))}" if names else "one head" for names in (held, mine))
            raise UserError(f"{path}: has {held}; the learning rates and weight decays given make {mine}")

    def state_dict(self) -> dict:
        """What a checkpoint is to hold of several heads beside the momentum; {} of one."""
        if not self.several:
            return {}
        layers = {name: layer.state_dict() for name, layer in zip(self.names, self.layers)}
        numbers = {"diverged": self.diverged, "best": self.best, "last": self.last}
        return {"layers": layers, "kept": self.kept, **numbers}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`. Raises ValueError if it does not fit."""
        if not self.several:
            return
        try:
            layers = {name: state["layers"][name] for name in self.names}
            for name, weights in (layers | ({"kept": state["kept"]} if state["kept"] else {})).items():
                problem = checkpoint.differences(weights, self.own.state_dict())
                if problem or checkpoint.not_finite(weights):
                    raise ValueError(f"its head {name} does not fit: {problem or 'values that are not finite'}")
            for layer, weights in zip(self.layers, layers.values()):
                layer.load_state_dict(weights)
            self.kept = state["kept"]
            result = ("epoch", "top1", "top5", "loss")
            numbers = {"best": result, "last": result, "diverged": ("epoch", "step")}
            for kind, keys in numbers.items():
                found = state[kind]
                if not found.keys() <= set(self.names) or not all(
                    isinstance(entry[key], (int, float)) for entry in found.values() for key in keys
                ):
                    raise ValueError(f"what its heads have reached ({kind}) is none of theirs")
                setattr(self, kind, dict(found))
        except (TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError("its heads are not the heads of a run") from error
        for i, name in enumerate(self.names):
            self.alive[i] = name not in self.diverged


def rank(result: dict) -> tuple[float, float]:
    """What makes a result better than another: top-1, and of equals a smaller loss."""
    return result["top1"], -result["loss"]


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor with a first dimension of the parts; a single one as it is."""
    return torch.stack(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def validate(
    network: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device, classes: int
) -> list[tuple[dict[str, float], torch.Tensor]]:
    """A classifier's results over a `loader.eval_loader`, which spreads the images over the processes.

    network: images → logits (N, C), or a `Fork`, whose heads see the same features. It is put in eval mode meanwhile.
    Every process validates with rank 0's buffers and gets the same numbers.
    Returns of each head {"top1", "top5" (percent), "loss"}, and the confusion matrix (C, C): rows are the true classes.
    """
    distributed.share_buffers(network)
    was_training = network.training
    network.eval()
    heads = len(network.layers) if isinstance(network, Fork) else 1
    confusion = torch.zeros(heads, classes * classes, dtype=torch.long, device=device)
    sums = torch.zeros(heads, 2, dtype=torch.float64, device=device)  # of the loss, of the hits among five
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        outputs = network(images.to(device, non_blocking=True))
        for i, logits in enumerate(outputs if isinstance(outputs, list) else [outputs]):
            logits = logits.float()  # (N, C)
            ranked = metrics.ranked(logits)  # (N, 5)
            cell = labels * classes + ranked[:, 0]
            confusion[i].scatter_add_(0, cell, torch.ones_like(cell))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[i] += torch.stack([loss.double(), (ranked == labels[:, None]).sum().double()])
    network.train(was_training)
    return [_results(*counted, classes) for counted in zip(confusion, sums)]


def _results(confusion, sums, classes):
    """One head's, of all processes: each by itself, since gloo sums in an order that depends on the place."""
    confusion = distributed.total(confusion).view(classes, classes).cpu()
    loss, five = distributed.total(sums).tolist()
    count, right = confusion.sum().item(), confusion.trace().item()
    return {"top1": 100 * right / count, "top5": 100 * five / count, "loss": loss / count}, confusion


def summarize(results: dict, epoch: int | None) -> dict:
    """What is kept of an epoch's validation: {"epoch", "top1", "top5"}, and "train_top1" with --eval-train.

    results: {"val": ..., and perhaps "train": ...} of one head, from `validate`.
    """
    numbers, _ = results["val"]
    kept = {"epoch": epoch, "top1": numbers["top1"], "top5": numbers["top5"]}
    return kept | ({"train_top1": results["train"][0]["top1"]} if "train" in results else {})


def after(result: dict) -> str:
    """ " with HEAD after N epochs", as far as a `summarize` knows."""
    head = f" with {result['head']}" if "head" in result else ""
    return head + ("" if result["epoch"] is None else f" after {result['epoch']} epoch{'s' * (result['epoch'] != 1)}")


def describe(results: dict, kept: dict) -> str:
    """The numbers of `validate` in words, for "val" and perhaps "train". kept: the `summarize` of them."""
    numbers, _ = results["val"]
    words = f"val: top-1 {numbers['top1']:.2f} %  top-5 {numbers['top5']:.2f} %  loss {numbers['loss']:.4f}"
    words = words.replace("val:", f"val, {kept['head']}:") if "head" in kept else words
    return words + (f"  train: top-1 {results['train'][0]['top1']:.2f} %" if "train" in results else "")
