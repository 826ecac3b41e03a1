"""Processes: start them (torchrun, spawn, by hand, or just one), and what they tell each other.

World size 1 and a CPU are ordinary cases: without a process group the collectives below act on one process.
"""

import datetime
import functools
import gc
import inspect
import logging
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from synco import survival
from synco.options import Failure, UserError, usable_cpus
from synco.survival import PREEMPTED, Preempted

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended

# what gloo's and NCCL's errors say where a process has gone
GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket", re.IGNORECASE)


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
    stderr and status 2, a FloatingPointError (the run diverged) or a `Failure` with one line and status 1, `Preempted`
    with status 75; of several processes one reports. Any other exception keeps its traceback.
    SIGTERM and SIGUSR1 are warnings, see `survival.warned`. args.restarted is set where torchrun has started the
    processes anew after the run `began`: such a run is to go on by itself.
    """
    try:
        args = parse()
        start = _plan(args)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _report(error)
        sys.exit(2)
    args.restarted = False
    try:
        with survival.listening():
            start(worker, args)
    except KeyboardInterrupt:
        _report("interrupted")
        sys.exit(INTERRUPTED)


def command(main, parse):
    """Run main(parse()) in this process, for a tool that needs no others; errors are reported as `launch` does.

    What stdout has no character for is printed as "?": it is no reason to fail once the work is done.
    """
    sys.stdout.reconfigure(errors="replace")
    try:
        main(parse())
    except UserError as error:
        _report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        _report("interrupted")
        sys.exit(INTERRUPTED)


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

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and (args.dist_url == "env://" or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise UserError(f"the environment lacks {', '.join(missing)}, which --dist-url env:// and WORLD_SIZE > 1 need")
    if not missing and ("LOCAL_RANK" in os.environ or not args.multiprocessing_distributed):
        return _plan_environment(args, gpus)
    if args.dist_url == "env://":  # as in MoCo: the environment counts nodes, each of which starts its processes
        args.dist_url = "tcp://{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        _address(args.dist_url)
        args.world_size, args.rank = _integers("WORLD_SIZE", "RANK")

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
    rank, world, _ = _integers("RANK", "WORLD_SIZE", "MASTER_PORT")
    local_rank, local_size = args.gpu or 0, _share(args, world)
    launched = "LOCAL_RANK" in os.environ
    if launched:
        local_rank, local_size = _integers("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} WORLD_SIZE={world} in the environment: the rank must lie in 0..{world - 1}")
    if args.multiprocessing_distributed:
        raise UserError(f"--multiprocessing-distributed: {world} processes have been started already; leave it out")
    # The same verdict in every process of a node, since one speaks for all: --rank is one number for several ranks.
    if args.world_size not in (-1, world):
        raise UserError(f"--world-size {args.world_size} contradicts the environment, which says {world}; leave it out")
    if args.rank != -1 and (args.rank != rank or (launched and world > 1)):
        raise UserError(
            f"--rank {args.rank} contradicts the environment, which gives each process its own; leave it out"
        )
    if args.gpu is not None and launched:
        raise UserError(f"--gpu {args.gpu}: the launcher gives each process its GPU; leave it out")
    if gpus and launched and local_size > gpus:
        raise UserError(f"{local_size} processes on this node, which has {gpus} GPU{'s' * (gpus != 1)}")

    def connect(again=False):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            if again:
                return dist.TCPStore(host, port, world, is_master=False, wait_for_workers=False)
            store, _, _ = next(dist.rendezvous("env://"))
        except dist.DistNetworkError as error:
            raise UserError(f"MASTER_ADDR:MASTER_PORT {host}:{port}: the processes cannot meet there") from error
        return store

    process = Process(rank, world, local_rank, local_size, _device(local_rank))
    return lambda worker, args: _enter(worker, args, process, connect, launched="TORCHELASTIC_RUN_ID" in os.environ)


def _integers(*names):
    """Those variables of the environment, as whole numbers."""
    try:
        return [int(os.environ[name]) for name in names]
    except (KeyError, ValueError):
        given = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise UserError(f"{given} in the environment: must be whole numbers") from None


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
    except RuntimeError as error:  # of which newer versions make a DistNetworkError
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
    start = functools.partial(
        mp.spawn, _spawned, (worker, args, url, local_size, world, node), nprocs=local_size, join=False
    )
    try:
        with survival.passing_on(start) as context:
            while not context.join():
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:  # a signal, from the system when memory runs out, say: the worker could not speak
            _report(f"rank {node * local_size + error.error_index} was ended by {error.signal_name}")
        sys.exit(error.exit_code if error.exit_code > 0 else 1)


def _spawned(local_rank, worker, args, url, local_size, world, node):
    process = Process(node * local_size + local_rank, world, local_rank, local_size, _device(local_rank))
    with survival.listening():
        _enter(worker, args, process, lambda again=False: _store(url, world, serve=False), launched=True)


def _share(args, world):
    """How many processes share the node of one that was started by itself: as in MoCo, with --gpu one per GPU."""
    return 1 if args.gpu is None else min(world, torch.cuda.device_count())


def _by_hand(worker, args, world, rank):
    """One process of several that the user starts one by one."""
    process = Process(rank, world, args.gpu or 0, _share(args, world), _device(args.gpu or 0))
    _enter(worker, args, process, lambda again=False: _store(args.dist_url, world, serve=rank == 0 and not again))


def _enter(worker, args, process, connect, launched=False):
    """Run the worker in this process, within a process group if there is a connect.

    connect() → the store where the processes meet; connect(again=True) → a further connection to it; launched: whether
    the parent process is a launcher.
    """
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cpus() // process.local_size))
    store, all_starts, status = None, None, None
    guard = survival.Guard(process, None, launched, args.peer_timeout, _report)
    if launched:
        guard.start()  # the launcher may go before the processes have met, whose waiting lasts minutes
    try:
        if connect is not None:
            all_starts = connect()  # torchrun's is the same in every start of the processes
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if launched and attempt != "0":
                if all_starts.check(["preempted"]):  # torchrun takes it for a failure; it is none to be tried again
                    raise Preempted("the run was told to stop")
                args.restarted = all_starts.check(["began"])
            store = dist.PrefixStore(attempt, all_starts)
            backend = args.dist_backend or ("nccl" if process.device.type == "cuda" else "gloo")
            timeout = None if args.dist_timeout is None else datetime.timedelta(seconds=args.dist_timeout)
            dist.init_process_group(
                backend, store=store, rank=process.rank, world_size=process.world_size, timeout=timeout
            )
            beats = dist.PrefixStore(attempt, connect(again=True))
            guard.finish(done=False)
            guard = survival.Guard(process, beats, launched, args.peer_timeout, _report)
            guard.start()
            _begun.append(all_starts)
        worker(process, args)
        status = 0
    except Preempted as error:
        survival.end_workers()  # whose own end the traceback's would wait for
        if all_starts is not None:
            all_starts.set("preempted", "")
        say(str(error))
        status = PREEMPTED
    except (UserError, FloatingPointError, Failure) as error:
        # Of the processes that get here the first speaks for all.
        if (process.local_rank == 0) if store is None else _failures(store, 1) in (1, None):
            _report(error)
        status = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if process.world_size == 1:
            raise
        status = INTERRUPTED  # the launcher says it
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            if store is None or _failures(store, 1) in (1, None):
                _report(f"{str(error).strip().splitlines()[0]} The run can go on from its last checkpoint.")
            status = 1
        else:
            failures = 0 if store is None else _failures(store, 0)
            if failures == 0:
                if process.world_size == 1 or not GONE.search(str(error)):
                    raise
                if not guard.settle(lambda: _failures(store, 0)):
                    raise
                failures = _failures(store, 0)
            if failures is None:
                _report("lost the process that holds the others together; its own message says why")
            # This process lost a peer to the peer's own end, which the peer or its launcher reports. The launcher is to
            # see the peer's end and status first, and ends this process then.
            time.sleep(5)
            status = 1 if failures == 0 else 2
    finally:
        _begun.clear()
        survival.unlock()
        if status is None and store is not None:
            _failures(store, 1)  # a bug: the peers need not report that they lost this process
        guard.finish(done=status in (0, PREEMPTED))
    if status == 0 and store is not None and dist.get_backend() == "nccl":
        dist.destroy_process_group()
    survival.end_workers()  # at a good end, too, one that is stuck would not let this process go
    if status or store is not None:
        gc.collect()  # ends loading workers that the error's traceback kept
        _leave(status, process)


_begun = []  # the store that outlives the processes, see `began`


def began():
    """Say that the run has its save folder: should torchrun start the processes anew, they go on with what it holds."""
    if _begun and rank() == 0:
        _begun[0].set("began", "")


def _failures(store, more):
    """How many processes have failed, with `more` of them; None where the process that holds the store has gone."""
    try:
        return store.add("failures", more)
    except RuntimeError:
        return None


def _leave(status, process):
    """End this process; of several, without the process group's own end, which waits for peers that have gone.

    Seen with gloo in torch 2.6: destroying the group after a run that went well hung in every fourth run or so.
    """
    if process.world_size == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


def to_device(x, device):
    """A CPU tensor on the device; the host does not wait for the device to get there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


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


def from_all(value):
    """[each process's value (any small picklable object)], in rank order, in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def say(text):
    """Print a line, in rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


def warn(text):
    """Print a warning on stderr, in rank 0 alone."""
    if rank() == 0:
        print(f"{os.path.basename(sys.argv[0])}: warning: {text}", file=sys.stderr, flush=True)


def share_buffers(module):
    """Give every process rank 0's buffers, in place: BatchNorm statistics differ between processes in training."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
