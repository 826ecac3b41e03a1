"""One decision in all processes of a run: when to save, when to stop."""

import dataclasses
import datetime
import time

import torch
import torch.distributed as dist

from synco import signals


@dataclasses.dataclass(frozen=True)
class Due:
    """What all processes do after a step: save, stop after having saved, share which images they could not read."""

    save: bool = False
    stop: bool = False
    share: bool = False


class Agreement:
    """When to save and when to stop, the same in every process of the run.

    every: steps between saves, minutes: time between them by rank 0's clock, 0: never. Each step every process gives
    its word to an all-reduce on the CPU, which runs while the next step is computed and is asked for after that; so a
    warning to one process is acted on by all after the same step, at most two steps later.
    timeout: seconds until a missing word is an error, or None for torch's own.
    """

    def __init__(self, every: int = 0, minutes: float = 0.0, timeout: float | None = None) -> None:
        self.every, self.minutes = every, minutes
        self.saved_at = time.monotonic()
        self.stopping, self.pending, self.group = False, None, None
        if dist.is_initialized():
            seconds = None if timeout is None else datetime.timedelta(seconds=timeout)
            self.group = dist.new_group(backend="gloo", timeout=seconds)

    def after(self, step: int, *, share: bool = False, at_once: bool = False) -> Due:
        """What is due after this step (counted from 1).

        share: whether this process has found an image that it could not read; at_once: wait for the others' word of
        this very step.
        """
        rank = dist.get_rank() if self.group is not None else 0
        late = rank == 0 and bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        words = [late, bool(signals.warned()), share]
        if self.group is not None:
            word = torch.tensor(words, dtype=torch.uint8)
            words = self._wait()
            self.pending = word, dist.all_reduce(word, dist.ReduceOp.MAX, group=self.group, async_op=True)
            if at_once:
                words = [max(pair) for pair in zip(words, self._wait())]
        late, stop, share = map(bool, words)
        self.stopping = self.stopping or stop
        return Due(late or self.stopping or bool(self.every) and step % self.every == 0, self.stopping, share)

    def _wait(self):
        if self.pending is None:
            return [0, 0, 0]
        (word, work), self.pending = self.pending, None
        work.wait()
        return word.tolist()

    def saved(self) -> None:
        """A checkpoint was written just now: the clock of `minutes` starts again."""
        self.saved_at = time.monotonic()

    def meet(self) -> None:
        """Wait for all processes: none may leave while rank 0 still writes, or a launcher ends them all."""
        if self.group is not None:
            dist.barrier(group=self.group)
