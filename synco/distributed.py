"""What the processes of a run tell each other, and which CPUs and how much memory they have.

World size 1 and a CPU are ordinary cases: without a process group the collectives below act on one process.
"""

import contextlib
import inspect
import os
import pathlib
import pickle
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synco.errors import one_line


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Process:
    """One process of a run: its place among all processes and on its node, and its device.

    restarted: whether torchrun has started the processes anew after the run had said that it `began`; such a run goes
    on by itself. began(): to be called once the save folder is the run's own. locks: of folders; `launch`
    closes them, and copies of this share them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    restarted: bool = False
    began: Callable[[], None] = _nothing
    locks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False, repr=False)


def seed_of(purpose: str, *parts: int) -> int:
    """One 63-bit seed from a purpose (a word) and whole numbers >= 0, such as ("crops", seed, epoch, index).

    Every draw of a run comes from such a seed, so it depends on nothing that ran before.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *parts])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(_cpus())


def _cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def free_memory(root: str | os.PathLike = "/") -> int:
    """Bytes of memory that are free for this process: the machine's, or those of a control group that has fewer.

    A batch system may limit any group above the process's own. root: of the file system, where /proc and /sys are.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    root = pathlib.Path(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        own = pathlib.PurePosixPath((root / "proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/"))
    except OSError:  # not Linux
        return min(found)
    for group in (own, *own.parents):
        folder = root / "sys/fs/cgroup" / group
        try:
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int(used["anon"]) + int(used.get("shmem", 0))  # what is not the cache of files
            found.append(int((folder / "memory.max").read_text()) - used)
        except (OSError, ValueError):  # no such group here, or "max": no limit
            pass
    return min(found)


def cpu_share() -> Fraction:
    """CPUs of this process, of which one that n processes of the node may run on counts as 1/n.

    Processes that srun binds to parts of the node have those to themselves; those of torchrun or spawned ones, and of a
    container, share what they all may run on. Every process must call this.
    """
    here, own = node(), _cpus()
    masks = [cpus for node, cpus in from_all((here, own)) if node == here]
    return sum((Fraction(1, sum(cpu in cpus for cpus in masks)) for cpu in own), Fraction(0))


def node() -> str:
    """What the processes of one machine have in common."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:  # containers of one machine have names of their own
            return file.read()
    except OSError:
        return socket.gethostname()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module under DistributedDataParallel, or itself in a single process.

    Buffers are not sent around in each step: the queue is the same everywhere by construction, and BatchNorm's
    statistics are made equal where they are read, see `share_buffers`.
    """
    if not dist.is_initialized():
        return module
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # renamed in torch 2.15
    learner = DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, **{sync: False}
    )
    if device.type == "cpu" and world_size() > 2:
        learner.register_comm_hook(None, _each_alone)
    return learner


def _each_alone(_, bucket):
    """DDP's mean of gradients over the processes, each gradient by itself.

    Of gradients in one buffer the place of each decides in which order gloo sums it over three processes or more, and
    DDP puts them together anew after its first step. A run that goes on has another first step than one that never
    stopped, and would round otherwise.
    """
    buffer = bucket.buffer().div_(world_size())
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda _: buffer)


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shuffle(x, permutation):
    """Exchange rows between processes so that rank r gets its part of the permuted global batch.

    x (B, ...): this process's rows; the global batch is every process's, in rank order.
    permutation (W·B,): a CPU tensor, the same in all processes → (B, ...), the rows
    permutation[r·B:(r+1)·B] of the global batch. Each row travels once, to the one process that needs it.
    """
    if not dist.is_initialized():
        return x[to_device(permutation, x.device)]
    W, r, B = world_size(), rank(), x.shape[0]
    places = permutation.view(W, B)
    sends = [row[row // B == r] - r * B for row in places]  # my rows that each process needs, in its order
    sources = places[r] // B
    received = x.new_empty(x.shape)  # contiguous, whatever the layout of x
    dist.all_to_all_single(
        received,
        x[to_device(torch.cat(sends), x.device)].contiguous(),  # what is sent is memory, in the order of `received`
        output_split_sizes=sources.bincount(minlength=W).tolist(),
        input_split_sizes=[len(rows) for rows in sends],
    )
    arrival = sources.sort(stable=True).indices  # rows arrive by source, in the order of their places
    return received[to_device(arrival.argsort(), x.device)]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait for the device to get there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def gather(x: Tensor) -> Tensor:
    """x (B, ...) of every process, of one shape → (W·B, ...), in rank order."""
    if not dist.is_initialized():
        return x
    everyone = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    # newer versions of torch warn of the older name
    collect = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    collect(everyone, x.contiguous())
    return everyone


def exchange(x: Tensor) -> Tensor:
    """x (W·B, ...), of one shape in every process → (W·B, ...): this process's B rows of each process's x, by rank."""
    if not dist.is_initialized():
        return x
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous())
    return received


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes; x itself is changed to it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes; x itself is changed."""
    return total(x).div_(world_size())


def from_rank_0(value: Any) -> Any:
    """Rank 0's value (any small picklable object), in every process.

    The others wait for it at the store where the processes met, however long rank 0 takes, for a download say: a
    collective would fail after NCCL's ten minutes.
    """
    if not dist.is_initialized():
        return value
    store = _store()
    key = f"from_rank_0/{store.add(f'from_rank_0/calls/{rank()}', 1)}"
    if rank() == 0:
        store.set(key, pickle.dumps(value))
        return value
    _wait_for(store, key)
    return pickle.loads(store.get(key))


def broadcast(value: Any) -> Any:
    """Rank 0's value (any picklable object, however large), in every process, which must call this at the same time."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every process has come here, at the store as `from_rank_0` does, however long that takes."""
    if dist.is_initialized():
        store = _store()
        key = f"barrier/{store.add(f'barrier/calls/{rank()}', 1)}"
        if store.add(f"{key}/count", 1) == world_size():
            store.set(key, "")
        _wait_for(store, key)


def _store():
    return (
        dist.distributed_c10d._get_default_store()
    )  # the one given to init_process_group, for which torch has no name


def _wait_for(store, key: str) -> None:
    """Wait until the store has that key. Asks again and again, so that signals and the guard are heard meanwhile."""
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def from_all(value: Any) -> list:
    """[each process's value (any small picklable object)], in rank order, in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    """Print a line, in rank 0 alone."""
    if rank() == 0:
        print(one_line(text), flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, in rank 0 alone."""
    if rank() == 0:
        print(f"{os.path.basename(sys.argv[0])}: warning: {one_line(text)}", file=sys.stderr, flush=True)


def share_weights(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers, in place."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            memory = tensor.contiguous()  # what is sent, whatever the layout of the weights
            dist.broadcast(memory, src=0)
            tensor.copy_(memory)


def share_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers, in place: BatchNorm statistics differ between processes in training."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
