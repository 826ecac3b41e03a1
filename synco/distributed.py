"""Processes: start them (torchrun, spawn, by hand, or just one), and what they tell each other.

World size 1 and a CPU are ordinary cases: without a process group the collectives below act on one process.
"""

import inspect
import logging
import os
import sys
import zlib
from dataclasses import dataclass
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from synco.options import UserError, usable_cpus


@dataclass(frozen=True)
class Process:
    """One process of a run: its place among all processes and on its node, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")


def seed_of(purpose, *parts):
    """One 63-bit seed from a purpose (a word) and whole numbers >= 0, such as ("crops", seed, epoch, index).

    Every draw of a run comes from such a seed, so it depends on nothing that ran before.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *parts])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


# ---------------------------------------------------------------------------------------------- launching


def launch(worker, parse):
    """Parse the command line, start the processes it asks for, and run worker(process, args) in each.

    parse() → args with the flags of `options.add_distributed`. A `UserError` ends the program with one line on
    stderr and status 2, a FloatingPointError (the run diverged) with one line and status 1; of several processes
    one reports. Any other exception keeps its traceback.
    """
    try:
        args = parse()
        start = _plan(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            _report(error)
        sys.exit(2)
    start(worker, args)


def _plan(args):
    """The way to start the processes, as a function of (worker, args). Raises UserError where the flags contradict."""
    if args.dist_backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--dist-backend nccl needs GPUs and this machine has none; use gloo")
    gpus = torch.cuda.device_count()
    if args.gpu is not None and args.gpu >= gpus:
        raise UserError(f"--gpu {args.gpu}: this machine has {gpus} GPU{'s' * (gpus != 1)}, numbered from 0")
    if args.dist_url not in (None, "env://"):
        _address(args.dist_url)
    if args.nproc_per_node is not None and not args.multiprocessing_distributed:
        raise UserError(f"--nproc-per-node {args.nproc_per_node} goes with --multiprocessing-distributed")

    from_env = [name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if args.dist_url == "env://" and not all(from_env):
        raise UserError("--dist-url env:// needs RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment")
    if all(from_env):
        return _plan_environment(args, gpus)

    if args.multiprocessing_distributed:
        if args.gpu is not None:
            raise UserError(f"--gpu {args.gpu}: --multiprocessing-distributed uses every GPU; leave one of the two out")
        local_size = args.nproc_per_node or max(1, gpus)
        if gpus and local_size > gpus:
            raise UserError(f"--nproc-per-node {local_size}: this machine has {gpus} GPU{'s' * (gpus != 1)}")
    else:
        local_size = 1
    world, rank = max(args.world_size, 1), args.rank
    if args.world_size == 0 or rank >= world or (rank == -1 and world > 1):
        raise UserError(
            f"--world-size {args.world_size} --rank {rank}: the first must be >= 1, the second in 0..{world - 1}"
        )
    if world > 1 and args.dist_url is None:
        raise UserError(f"--world-size {world} needs --dist-url tcp://HOST:PORT, the same for all")
    if args.multiprocessing_distributed:
        return lambda worker, args: _spawn(worker, args, local_size, nodes=world, node=max(rank, 0))
    if world > 1:
        return lambda worker, args: _by_hand(worker, args, world, rank)
    return lambda worker, args: _enter(worker, args, Process(device=_device(args.gpu or 0)), None)


def _plan_environment(args, gpus):
    """torchrun, or a hand-set environment of the same variables."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", args.gpu or 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE in the environment: {error}") from None
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} WORLD_SIZE={world} in the environment: the rank must lie in 0..{world - 1}")
    if args.multiprocessing_distributed:
        raise UserError(f"--multiprocessing-distributed: {world} processes have been started already; leave it out")
    for flag, given, found in (("--world-size", args.world_size, world), ("--rank", args.rank, rank)):
        if given not in (-1, found):
            raise UserError(f"{flag} {given} contradicts the environment, which says {found}; leave it out")
    if args.gpu is not None and "LOCAL_RANK" in os.environ:
        raise UserError(f"--gpu {args.gpu}: the launcher gives each process its GPU; leave it out")
    if gpus and local_rank >= gpus:
        raise UserError(f"{local_size} processes on this node, which has {gpus} GPU{'s' * (gpus != 1)}")

    def start(worker, args):
        process = Process(rank, world, local_rank, local_size, _device(local_rank))
        store, _, _ = next(dist.rendezvous("env://"))
        _enter(worker, args, process, dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store))

    return start


def _address(url):
    """tcp://HOST:PORT → (host, port)."""
    try:
        parts = urlparse(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:  # a port that is no number, or too large a one
        pass
    raise UserError(f"--dist-url {url!r}: must be tcp://HOST:PORT or env://")


def _device(index):
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def _store(url, world_size, serve):
    """The key-value store where the processes meet; `serve` starts its server in this process."""
    host, port = ("localhost", 0) if url is None else _address(url)
    try:
        return dist.TCPStore(host, port, world_size, is_master=serve, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if serve:
            raise UserError(f"--dist-url {url}: cannot listen there; is another run using the port?") from error
        raise UserError(f"--dist-url {url}: cannot reach rank 0 there") from error


def _spawn(worker, args, local_size, *, nodes, node):
    """Start this node's processes; the store lives here, in the parent, and outlives any of them."""
    world = nodes * local_size
    try:
        store = _store(args.dist_url, world, serve=True) if node == 0 else None
    except UserError as error:
        _report(error)
        sys.exit(2)
    url = f"tcp://localhost:{store.port}" if node == 0 else args.dist_url
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the worker's own line says what happened
    try:
        mp.spawn(_spawned, (worker, args, url, local_size, world, node), nprocs=local_size)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code > 0 else 1)


def _spawned(local_rank, worker, args, url, local_size, world, node):
    process = Process(node * local_size + local_rank, world, local_rank, local_size, _device(local_rank))
    _enter(worker, args, process, _store(url, world, serve=False))


def _by_hand(worker, args, world, rank):
    """One process of several that the user starts one by one."""
    try:
        store = _store(args.dist_url, world, serve=rank == 0)
    except UserError as error:
        _report(error)
        sys.exit(2)
    _enter(worker, args, Process(rank, world, 0, 1, _device(args.gpu or 0)), store)


def _enter(worker, args, process, store):
    """Run the worker in this process, within a process group if there is a store."""
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cpus() // process.local_size))
    try:
        if store is not None:
            backend = args.dist_backend or ("nccl" if process.device.type == "cuda" else "gloo")
            dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world_size)
        worker(process, args)
    except (UserError, FloatingPointError) as error:
        # The first of the processes to get here speaks for all of them.
        if store is None or store.add("failures", 1) == 1:
            _report(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except RuntimeError:
        # A process that lost a peer to the peer's own, reported, error stays silent.
        if store is not None and store.add("failures", 0) > 0:
            sys.exit(2)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _report(error):
    # An error that comes from a loader worker carries that worker's traceback: its last line is the error's own.
    line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)


def parallel(module, device):
    """The module under DistributedDataParallel, or itself in a single process.

    Buffers are not sent around in each step: the queue is the same everywhere by construction, and BatchNorm's
    statistics are made equal where they are read, see `share_buffers`.
    """
    if not dist.is_initialized():
        return module
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # renamed in torch 2.15
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, **{sync: False}
    )


# --------------------------------------------------------------------------------------------- collectives


def rank():
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shuffle(x, permutation):
    """Exchange rows between processes so that rank r gets its part of the permuted global batch.

    x (B, ...): this process's rows; the global batch is every process's, in rank order.
    permutation (W·B,): a CPU tensor, the same in all processes → (B, ...), the rows
    permutation[r·B:(r+1)·B] of the global batch. Each row travels once, to the one process that needs it.
    """
    if not dist.is_initialized():
        return x[permutation.to(x.device)]
    W, r, B = world_size(), rank(), x.shape[0]
    places = permutation.view(W, B)
    sends = [row[row // B == r] - r * B for row in places]  # my rows that each process needs, in its order
    sources = places[r] // B
    received = torch.empty_like(x)
    dist.all_to_all_single(
        received,
        x[torch.cat(sends).to(x.device)],
        output_split_sizes=sources.bincount(minlength=W).tolist(),
        input_split_sizes=[len(rows) for rows in sends],
    )
    arrival = sources.sort(stable=True).indices  # rows arrive by source, in the order of their places
    return received[arrival.argsort().to(x.device)]


def gather(x):
    """x (B, ...) of every process, of one shape → (W·B, ...), in rank order."""
    if not dist.is_initialized():
        return x
    everyone = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


def total(x):
    """The sum of a tensor over all processes; x itself is changed to it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean(x):
    """The mean of a tensor over all processes; x itself is changed."""
    return total(x).div_(world_size())


def from_rank_0(value):
    """Rank 0's value (any small picklable object), in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_buffers(module):
    """Give every process rank 0's buffers, in place: BatchNorm statistics differ between processes in training."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
