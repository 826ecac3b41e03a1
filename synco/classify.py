"""What trains and validates a classifier, in the linear probe and in fine-tuning alike."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from synco import distributed, metrics
from synco.precision import Precision


def new_last_layer(network, head):
    """Draw a network's last layer anew, weights ~ N(0, 0.01²) and biases 0 as in MoCo's probe → that layer."""
    last = network.get_submodule(head)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return last


def train(
    learner,
    batches,
    optimizer,
    epoch,
    *,
    process,
    seed,
    print_freq,
    averages,
    report,
    check_finite,
    after_step,
    start=0,
    precision=None,
):
    """One epoch of cross-entropy from step `start` on. Numbers are read from the device at print steps only.

    learner: a network, or what `distributed.parallel` made of one, in the mode that its BatchNorm and dropout are to
    have; batches: a `loader.train_loader`; averages: those since the last print step;
    precision: a `Precision`, None for float32. At print steps calls
    report(step in the epoch, numbers, pace): loss, acc1 and acc5 (percent) as means since the last, images_per_second,
    data_share; a `metrics.Pace`. Calls after_step(step in the epoch, a `metrics.Finite`) after each step, and
    check_finite with the same at print steps if a loss or gradient was not finite, to raise FloatingPointError.
    """
    steps = len(batches)
    batches.batch_sampler.set_epoch(epoch, start)
    precision = precision or Precision(process.device)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pace, finite = metrics.Pace(), metrics.Finite(process.device)
    for i, (images, labels) in pace.watch(batches, start):
        images = precision.place(images)
        labels = labels.to(process.device, non_blocking=True)
        # what a network with dropout draws is a function of the step, too
        torch.manual_seed(distributed.seed_of("dropout", seed, epoch * steps + i, process.rank))
        with precision.autocast():
            logits = learner(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        norm = precision.backward(loss, optimizer, parameters)
        bad = finite.watch(i, loss, norm)
        precision.step(optimizer)

        right = 100.0 * (metrics.ranked(logits) == labels[:, None])  # (N, 5)
        averages.add(loss=loss, bad=bad, acc1=right[:, 0].mean(), acc5=right.sum(dim=1).mean())
        if i % print_freq == 0 or i == steps - 1:
            numbers = averages.read(distributed.mean)
            if numbers.pop("bad"):
                check_finite(i, finite)
            precision.check()
            report(i, numbers | pace.read(process.world_size), pace)
        after_step(i, finite)


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


def frozen_weights(network, head):
    """A copy of a network's state, running statistics included, without its last layer: {name: tensor}."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}


def changed_weights(network, before):
    """The names of the tensors of `frozen_weights` that are no longer what they were, bit for bit."""
    now = network.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]
