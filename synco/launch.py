"""Processes: start them (torchrun, spawn, by hand, or just one), and end them with the right line and status."""

import dataclasses
import datetime
import functools
import multiprocessing.connection
import os
import re
import signal
import time
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from synco import signals
from synco.distributed import Process, barrier, say, usable_cpus
from synco.errors import INTERRUPTED, PREEMPTED, Preempted, UserError
from synco.exits import end_workers, exit_with, outcome, report, tell
from synco.guard import Guard

# what gloo's and NCCL's errors say where a process has gone
GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket", re.IGNORECASE)


def launch(worker: Callable, parse: Callable) -> NoReturn:
    """Parse the command line, start the processes it asks for, run worker(process, args) in each, and exit.

    parse() → args with the flags of `options.add_distributed`. A `UserError` ends the program with one line on
    stderr and status 2, a FloatingPointError (the run diverged) or a `Failure` with one line and status 1, `Preempted`
    with status 75; of several processes one reports. Any other exception keeps its traceback, and has status 1.
    SIGTERM, SIGUSR1 and SIGHUP are warnings, see `signals.warned`.
    """
    exit_with(launch_status, worker, parse)


def launch_status(worker: Callable, parse: Callable) -> int:
    """What `launch` does, but return the exit status."""
    with signals.listening():
        start = None
        try:
            args = parse()
            start = _plan(args)
            return start(worker, args)
        except BaseException as error:  # of whatever kind: it ends here, and is told
            if start is None and isinstance(error, UserError) and os.environ.get("LOCAL_RANK", "0") != "0":
                return 2  # the others of the node come to the same verdict
            return tell(error)


def command(main: Callable, parse: Callable) -> NoReturn:
    """Run main(parse()) in this process, for a tool that needs no others, and exit; errors are told as by `launch`."""
    exit_with(command_status, main, parse)


def command_status(main: Callable, parse: Callable) -> int:
    """What `command` does, but return the exit status."""
    try:
        main(parse())
        return 0
    except BaseException as error:
        return tell(error)


def _plan(args) -> Callable:
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
    url, nodes, rank = args.dist_url, args.world_size, args.rank
    if url == "env://":  # as in MoCo: the environment counts nodes, each of which starts its processes
        url = "tcp://{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        _address(url)
        nodes, rank = _integers("WORLD_SIZE", "RANK")

    if args.multiprocessing_distributed:
        if args.gpu is not None:
            raise UserError(f"--gpu {args.gpu}: --multiprocessing-distributed uses every GPU; leave one of the two out")
        local_size = args.nproc_per_node or max(1, gpus)
        if gpus and local_size > gpus:
            raise UserError(f"--nproc-per-node {local_size}: this machine has {gpus} GPU{'s' * (gpus != 1)}")
    else:
        local_size = 1
    world = max(nodes, 1)
    if nodes == 0 or rank >= world or (rank == -1 and world > 1):
        raise UserError(f"--world-size {nodes} --rank {rank}: the first must be >= 1, the second in 0..{world - 1}")
    if world > 1 and url is None:
        raise UserError(f"--world-size {world} needs --dist-url tcp://HOST:PORT, the same for all")
    if args.multiprocessing_distributed:
        return lambda worker, args: _spawn(worker, args, url, local_size, nodes=world, node=max(rank, 0))
    if world > 1:
        return lambda worker, args: _by_hand(worker, args, url, world, rank)
    return lambda worker, args: _enter(worker, args, Process(device=_device(args.gpu or 0)))


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
    return lambda worker, args: _enter(worker, args, process, connect, "TORCHELASTIC_RUN_ID" in os.environ)


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


def _spawn(worker, args, url, local_size, *, nodes, node) -> int:
    """Start this node's processes → their exit status; the store lives here, in the parent, which outlives them."""
    world = nodes * local_size
    store = _store(url, world, serve=True) if node == 0 else None
    url = f"tcp://localhost:{store.port}" if node == 0 else url
    context = multiprocessing.get_context("spawn")  # a fork of a process that knows of GPUs cannot use them
    places = [Process(node * local_size + i, world, i, local_size, _device(i)) for i in range(local_size)]
    children = [context.Process(target=_spawned, args=(worker, args, place, url)) for place in places]
    try:
        with signals.passing_on(children):
            running, failed = children, []
            while running and not failed:
                multiprocessing.connection.wait([child.sentinel for child in running])
                ended = [child for child in running if child.exitcode is not None]
                running = [child for child in running if child not in ended]
                failed = [child for child in ended if child.exitcode]
    finally:
        _stop(children)
    if not failed:
        return 0
    status = failed[0].exitcode
    if status < 0:  # a signal, from the system when memory runs out, say: the process could not speak
        place = places[children.index(failed[0])]
        report(f"rank {place.rank} was ended by {signal.Signals(-status).name}")
    elif status == INTERRUPTED:
        raise KeyboardInterrupt
    if node == 0 and nodes > 1:
        time.sleep(Guard.NOTICE)  # with the store, until the other nodes have read there what happened
    return max(status, 1)


def _stop(children) -> None:
    """End the processes that are left: by Ctrl-C, upon which they end their own children, or by force."""
    signals.ignore_interrupts()
    for child in children:
        if child.is_alive():
            os.kill(child.pid, signal.SIGINT)
    until = time.monotonic() + 5
    for child in children:
        if child.pid is not None:
            child.join(max(0.0, until - time.monotonic()))
    end_workers()


def _spawned(worker, args, process, url) -> NoReturn:
    def status() -> int:
        with signals.listening():
            return _enter(worker, args, process, lambda again=False: _store(url, process.world_size, serve=False), True)

    exit_with(status)


def _share(args, world) -> int:
    """How many processes share the node of one that was started by itself: as in MoCo, with --gpu one per GPU."""
    return 1 if args.gpu is None else min(world, torch.cuda.device_count())


def _by_hand(worker, args, url, world, rank) -> int:
    """One process of several that the user starts one by one."""
    process = Process(rank, world, args.gpu or 0, _share(args, world), _device(args.gpu or 0))
    return _enter(worker, args, process, lambda again=False: _store(url, world, serve=rank == 0 and not again))


def _enter(worker, args, process, connect=None, launched=False) -> int:
    """Run the worker in this process, within a process group if there is a connect → the exit status.

    connect() → the store where the processes meet; connect(again=True) → a further connection to it; launched: whether
    the parent process is a launcher.
    """
    guard = Guard(process, launched, args.peer_timeout)
    if connect is not None:
        guard.start()  # the launcher may go before the processes have met, whose waiting lasts minutes
    try:
        if process.device.type == "cuda":
            torch.cuda.set_device(process.device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cpus() // process.local_size))
        if connect is None:
            return _work(worker, args, process)
        return _together(worker, args, process, connect, guard)
    except BaseException as error:  # of whatever kind: no process is left behind, and the others hear of it
        return _failed(error, process, guard)
    finally:
        end_workers()  # at a good end, too, one that is stuck would not let this process go
        process.locks.close()


def _together(worker, args, process, connect, guard) -> int:
    """Meet the other processes, run the worker, and meet again → the exit status."""
    all_starts = connect()  # torchrun's is the same in every start of the processes
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if guard.launched else "0"
    if attempt != "0" and all_starts.check(["preempted"]):  # torchrun takes it for a failure; none to be tried again
        if process.rank == 0:
            print("the run was told to stop", flush=True)
        return PREEMPTED
    began = functools.partial(all_starts.set, "began", "") if process.rank == 0 else process.began
    process = dataclasses.replace(process, restarted=attempt != "0" and all_starts.check(["began"]), began=began)
    guard.watch(dist.PrefixStore(attempt, connect(again=True)))
    backend = args.dist_backend or ("nccl" if process.device.type == "cuda" else "gloo")
    timeout = None if args.dist_timeout is None else datetime.timedelta(seconds=args.dist_timeout)
    store, place = dist.PrefixStore(attempt, all_starts), {"rank": process.rank, "world_size": process.world_size}
    dist.init_process_group(backend, store=store, timeout=timeout, **place)
    # gloo waits for all here, NCCL does not, and would not wait at the end
    everyone = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    status = _work(worker, args, process)
    if status == PREEMPTED:
        all_starts.set("preempted", "")
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    barrier()  # for the last one, however long it takes; then leave together, so that nobody asks a store that has gone
    dist.barrier(everyone)
    return status


def _work(worker, args, process) -> int:
    try:
        worker(process, args)
        return 0
    except Preempted as error:
        say(str(error))
        end_workers()  # whose own end the traceback's would wait for
        return PREEMPTED


def _failed(error: BaseException, process: Process, guard: Guard) -> int:
    """Tell of an error of the worker's, if this process is the first of several to fail → the exit status."""
    (status, line), several = outcome(error), guard.store is not None
    if several and line is None and (isinstance(error, dist.DistError) or GONE.search(str(error))):
        guard.settle()
    signals.ignore_interrupts()
    end_workers()  # what the error's traceback holds would wait for them
    if guard.launched and isinstance(error, KeyboardInterrupt):
        return status  # the launcher says it
    before = guard.claim(status)
    if before is None or (line is None and not several):  # what the others of the node may know nothing of
        tell(error)
    if several and process.rank == 0 and not guard.launched:
        time.sleep(Guard.NOTICE)  # with the store, until the others have read there what happened
    return status if before is None else before
