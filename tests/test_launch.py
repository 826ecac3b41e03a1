"""Small programs of real gloo processes: how they are started, and how they end when something fails."""

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from conftest import LAUNCHERS, ROOT, SMALL, Fork, free_port, left_behind, without_launcher
from torch.utils.data import DataLoader

from benchmarks import survival as interrupted
from synco.launch import launch_status

PROGRAM = """
import os, sys, time
time.sleep(float(os.environ.get("LATE", 0)))
import torch
import torch.testing._internal.distributed.fake_pg  # a back end that waits for nobody
from synco import distributed, loader, options
from synco.errors import UserError
from synco.launch import launch

def parse():
    parser = options.Parser("test")
    options.add_distributed(parser)
    parser.add_argument("--fail", default="")
    parser.add_argument("--on", type=int, default=-1)
    parser.add_argument("--sleep", type=float)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--fake", action="store_true")
    args = parser.parse_args()
    args.dist_backend = "fake" if args.fake else args.dist_backend
    return args

def run(process, args):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        args.fail = ""  # what torchrun starts again goes well
    if args.workers:
        batches = iter(loader.eval_loader(range(1000), 2, process=process, workers=args.workers))
        next(batches)
    total = distributed.total(torch.ones(1)).item()
    word = distributed.from_rank_0({"from": process.rank})
    if args.sleep and args.on in (-1, process.rank):
        os.write(1, b"asleep\\n")
        time.sleep(args.sleep)
    if args.fail and args.on in (-1, process.rank):
        if args.fail == "kill":
            os.kill(os.getpid(), 9)
        if args.fail == "memory":
            torch.empty(1 << 50, dtype=torch.uint8)
        kinds = {"user": UserError("what is wrong"), "bug": KeyError("a bug"), "nan": FloatingPointError("nan")}
        raise kinds[args.fail]
    if args.fail:
        distributed.total(torch.ones(1))  # waits for the process that has failed
        time.sleep(60)
    os.write(1, f"rank {process.rank} of {process.world_size}, local {process.local_rank} of {process.local_size}, "
          f"{process.device}, sum {total:g}, word {word['from']}\\n".encode())

if __name__ == "__main__":
    launch(run, parse)
"""


@pytest.fixture
def launch(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    temporary = tempfile.mkdtemp(dir="/tmp")  # of a short path: it holds sockets
    (tmp_path / "temporary").symlink_to(temporary)

    def run(*flags, torchrun=0, restarts=0, env=None, wait=True, fresh=False):
        """fresh: in a new Python, as users start it, where it matters what a program leaves behind of its own."""
        env = without_launcher() | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary} | (env or {})
        if torchrun or fresh:
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {torchrun} --max-restarts {restarts}"
            words = [sys.executable, *(launcher.split() if torchrun else []), str(path), *map(str, flags)]
            started = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
            )
        else:
            started = Fork(path, *flags, env=env)
        if not wait:
            return started
        out, err = started.communicate(timeout=120)
        return started.returncode, sorted(out.splitlines()), err

    yield run
    shutil.rmtree(temporary)


def left_of(started, tmp_path):
    """What a program leaves behind: its processes, and Python's temporary folders."""
    return left_behind(tmp_path, started.pid) + list((tmp_path / "temporary").glob("pymp-*"))


SPAWN = ("--multiprocessing-distributed", "--world-size", "1", "--rank", "0")


SPAWN_2 = (*SPAWN, "--nproc-per-node", "2")


def test_one_process(launch):
    status, out, err = launch(fresh=True)
    assert (status, err) == (0, "")
    assert out == ["rank 0 of 1, local 0 of 1, cpu, sum 1, word 0"]
    assert launch("--world-size", "1", "--rank", "0")[1] == out


def test_spawn(launch):
    """With no GPU the reference's launcher starts nothing and exits with 0."""
    status, out, _ = launch(*SPAWN_2, "--dist-url", f"tcp://localhost:{free_port()}", fresh=True)
    assert status == 0
    assert out == [f"rank {r} of 2, local {r} of 2, cpu, sum 2, word 0" for r in range(2)]
    assert launch(*SPAWN)[1] == ["rank 0 of 1, local 0 of 1, cpu, sum 1, word 0"]


def test_torchrun(launch):
    """It ends well even where it had to start the processes again."""
    status, out, _ = launch("--fail", "kill", "--on", 1, torchrun=2, restarts=1)
    assert status == 0
    assert out == [f"rank {r} of 2, local {r} of 2, cpu, sum 2, word 0" for r in range(2)]


def test_two_nodes_that_spawn(launch):
    common = ("--multiprocessing-distributed", "--nproc-per-node", "2", "--world-size", "2")
    common += ("--dist-url", f"tcp://localhost:{free_port()}")
    nodes = [launch(*common, "--rank", str(rank), wait=False) for rank in (1, 0)]
    lines = sum([node.communicate(timeout=120)[0].splitlines() for node in nodes], [])
    assert sorted(lines) == [f"rank {r} of 4, local {r % 2} of 2, cpu, sum 4, word 0" for r in range(4)]


def test_processes_started_by_hand(launch):
    common = ("--world-size", "2", "--dist-url", f"tcp://localhost:{free_port()}")
    ranks = [launch(*common, "--rank", str(rank), wait=False) for rank in (1, 0)]
    lines = sum([one.communicate(timeout=120)[0].splitlines() for one in ranks], [])
    assert sorted(lines) == [f"rank {r} of 2, local 0 of 1, cpu, sum 2, word 0" for r in range(2)]


def test_of_several_processes_one_reports(launch):
    """Rank 0's own error, beside which others are silent, too: see the traceback of one spawned, below."""
    found, out, err = launch(*SPAWN_2, "--fail", "user", "--on", "1")
    assert (found, out, err) == (2, [], "program.py: error: what is wrong\n")


@pytest.mark.parametrize("kind, status", [("user", 2), ("nan", 1)])
def test_of_processes_that_all_fail_one_reports(launch, kind, status):
    ranks = by_hand(launch, "--fail", kind)
    errors = [one.communicate()[1] for one in ranks]
    message = {"user": "what is wrong", "nan": "nan"}[kind]
    assert [one.returncode for one in ranks] == [status] * 2
    assert sorted(errors) == ["", f"program.py: error: {message}\n"]


def test_under_torchrun_one_reports(launch):
    status, out, err = launch("--fail", "user", "--on", "1", torchrun=2)
    assert status == 1 and err.count("program.py: error: what is wrong") == 1
    assert "exitcode  : 2" in err
    assert 'program.py", line' not in err  # no traceback of the program's own


@pytest.mark.parametrize("way", ["alone", "spawned", "torchrun"])
def test_an_error_beside_loading_workers_ends_all_processes_with_its_traceback(launch, tmp_path, way):
    """The workers ignore SIGTERM, by which Python's own end would have them end, and waits."""
    flags = SPAWN_2 if way == "spawned" else ()
    flags = (*flags, "--workers", 2, "--sleep", 0.1, "--fail", "bug", "--on", 0)
    started = launch(*flags, torchrun=2 * (way == "torchrun"), wait=False, fresh=True)
    assert started.stdout.readline() == "asleep\n"
    began = time.monotonic()
    try:
        out, err = started.communicate(timeout=20)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert time.monotonic() - began < 10 and started.returncode == 1 and out == ""
    assert err.count("KeyError: 'a bug'") == 1 and "line" in err.partition("Traceback")[2]
    assert left_of(started, tmp_path) == []


def by_hand(launch, *flags, late=0.0):
    """Two processes that are started one by one, the second some seconds late."""
    flags = (*flags, "--world-size", 2, "--dist-url", f"tcp://localhost:{free_port()}", "--peer-timeout", 4)
    return [launch(*flags, "--rank", rank, wait=False, env={"LATE": str(late * rank)}) for rank in (0, 1)]


def test_processes_that_do_not_wait_for_each_other_wait_for_one_that_comes_late_and_for_the_last(launch):
    """As NCCL: a back end that begins before all are there, and ends without the others."""
    ranks = by_hand(launch, "--fake", "--sleep", 4, "--on", 1, late=12.0)
    assert ranks[1].stdout.readline() == "asleep\n"
    began = time.monotonic()
    outs = [ranks[0].communicate(timeout=60)]
    assert time.monotonic() - began > 3  # it has long been done itself
    outs.append(ranks[1].communicate(timeout=60))
    assert [one.returncode for one in ranks] == [0, 0], outs
    assert [out.count("word 0") for out, _ in outs] == [1, 1]


def test_memory_that_is_too_small_for_one_process_ends_all_with_a_line_that_says_what_to_lower(launch):
    ranks = by_hand(launch, "--fake", "--fail", "memory", "--on", 1)
    began = time.monotonic()
    errors = [one.communicate(timeout=60)[1] for one in ranks]
    assert time.monotonic() - began < 30 and [one.returncode for one in ranks] == [1, 1]
    assert errors[0] == "" and errors[1].startswith("program.py: error: can't allocate memory: "), errors
    assert errors[1].count("\n") == 1 and "lower --batch-size or --img-size" in errors[1]


@pytest.mark.parametrize("on", [0, 1])
def test_processes_that_do_not_see_each_others_end_hear_of_an_error(launch, on):
    """As NCCL: a collective that waits for a process that has failed waits on."""
    ranks = by_hand(launch, "--fake", "--sleep", 0.1, "--fail", "user", "--on", on)
    assert ranks[on].stdout.readline() == "asleep\n"
    began = time.monotonic()
    errors = [one.communicate(timeout=60)[1] for one in ranks]
    assert time.monotonic() - began < 10 and [one.returncode for one in ranks] == [2, 2]
    assert errors[on] == "program.py: error: what is wrong\n" and "error" not in errors[1 - on], errors


def test_a_store_that_does_not_answer_any_more_ends_the_others(launch):
    """Its machine has lost its network, say; here its process is stopped."""
    ranks = by_hand(launch, "--fake", "--sleep", 60)
    for one in ranks:
        assert one.stdout.readline() == "asleep\n"
    ranks[0].send_signal(signal.SIGSTOP)
    try:
        _, err = ranks[1].communicate(timeout=25)
    finally:
        for one in ranks:
            one.kill()
    assert ranks[1].returncode == 1
    assert err == "program.py: error: lost the process that holds the others together: it does not answer\n"


HAND = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29744"}
TORCHRUN = {**HAND, "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "flags, env, gpus, message",
    [
        ("--world-size 2 --rank 2 --dist-url tcp://localhost:1", {}, 0, "--world-size 2 --rank 2: "),
        ("--world-size 2", {}, 0, "--world-size 2 --rank -1: "),
        ("--rank 1", {}, 0, "--world-size -1 --rank 1: "),
        ("--world-size 0", {}, 0, "--world-size 0 --rank -1: "),
        ("--world-size 2 --rank 0", {}, 0, "--world-size 2 needs --dist-url tcp://HOST:PORT"),
        ("--dist-url http://localhost:1", {}, 0, "--dist-url 'http://localhost:1': must be tcp://HOST:PORT or env://"),
        ("--dist-url tcp://localhost", {}, 0, "--dist-url 'tcp://localhost': must be"),
        ("--dist-url tcp://localhost:99999", {}, 0, "--dist-url 'tcp://localhost:99999': must be"),
        ("--dist-url env://", {}, 0, "the environment lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("", {"WORLD_SIZE": "4", "RANK": "3"}, 0, "the environment lacks MASTER_ADDR, MASTER_PORT"),
        ("--dist-backend nccl", {}, 0, "--dist-backend nccl needs GPUs"),
        ("--dist-backend mpi", {}, 0, "argument --dist-backend: invalid choice: 'mpi'"),
        ("--gpu 3", {}, 0, "--gpu 3: this machine has 0 GPUs"),
        ("--gpu 3", {}, 1, "--gpu 3: this machine has 1 GPU, numbered from 0"),
        ("--gpu 0 --multiprocessing-distributed", {}, 2, "--multiprocessing-distributed uses every GPU"),
        ("--multiprocessing-distributed --nproc-per-node 3", {}, 2, "--nproc-per-node 3: this machine has 2 GPUs"),
        ("--nproc-per-node 2", {}, 0, "--nproc-per-node 2 goes with --multiprocessing-distributed"),
        ("--world-size 3", HAND, 0, "--world-size 3 contradicts the environment, which says 1"),
        ("--rank 1", HAND, 0, "--rank 1 contradicts the environment"),
        ("--rank 0", TORCHRUN, 0, "--rank 0 contradicts the environment, which gives each process its own"),
        ("--gpu 0", TORCHRUN, 4, "--gpu 0: the launcher gives each process its GPU"),
        ("", TORCHRUN, 2, "4 processes on this node, which has 2 GPUs"),
        ("--multiprocessing-distributed", TORCHRUN, 0, "--multiprocessing-distributed: 4 processes have been started"),
        ("", {**HAND, "RANK": "1"}, 0, "RANK=1 WORLD_SIZE=1 in the environment: the rank must lie in 0..0"),
        ("", {**HAND, "WORLD_SIZE": "x"}, 0, "RANK=0 WORLD_SIZE=x MASTER_PORT=29744 in the environment: must be whole"),
        ("", {**HAND, "MASTER_PORT": "x"}, 0, "MASTER_PORT=x in the environment: must be whole numbers"),
        ("--wrld-size 1", {}, 0, "unrecognized arguments: --wrld-size"),
        ("--world 1", {}, 0, "unrecognized arguments: --world 1"),
    ],
)
def test_contradictions_are_refused(flags, env, gpus, message, monkeypatch, capsys):
    from synco import options

    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    def parse():
        parser = options.Parser("test")
        options.add_distributed(parser)
        return parser.parse_args(flags.split())

    started = []
    status = launch_status(lambda process, args: started.append(process), parse)
    err = capsys.readouterr().err
    assert status == 2 and started == [] and message in err and err.count("\n") == 1
    if "LOCAL_RANK" in env:  # the others of the node come to the same verdict, and leave it to the first to say it
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setenv("RANK", "3")
        assert launch_status(lambda process, args: started.append(process), parse) == 2
        assert started == [] and capsys.readouterr().err == ""


def test_an_environment_that_counts_nodes(launch):
    """MoCo's --dist-url env:// with --multiprocessing-distributed: WORLD_SIZE and RANK are those of nodes."""
    env = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    flags = ("--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-url", "env://")
    assert launch(*flags, env=env)[1] == [f"rank {r} of 2, local {r} of 2, cpu, sum 2, word 0" for r in range(2)]


def test_when_rank_0_fails_on_another_node_no_traceback_is_left(launch):
    common = ("--world-size", "2", "--dist-url", f"tcp://localhost:{free_port()}", "--fail", "user", "--on", "0")
    ranks = [launch(*common, "--rank", str(rank), wait=False) for rank in (0, 1)]
    errors = [one.communicate(timeout=120)[1] for one in ranks]
    assert errors[0] == "program.py: error: what is wrong\n"
    assert "Traceback" not in errors[1]  # c10d itself may warn that the store has gone
    assert [one.returncode for one in ranks] == [2, 2]


@pytest.mark.parametrize("flags, who", [((), "all"), (SPAWN_2, "all"), (SPAWN_2, "parent")])
def test_an_interrupted_program_says_so_in_one_line(launch, tmp_path, flags, who):
    started = launch(*flags, "--sleep", 60, "--workers", 1, wait=False, fresh=True)
    for _ in range(2 if flags else 1):
        assert started.stdout.readline() == "asleep\n"
    began = time.monotonic()
    if who == "parent":
        os.kill(started.pid, signal.SIGINT)
    for pause in (0, 0.05, 0.2) if who == "all" else ():  # of an impatient user
        time.sleep(pause)
        os.killpg(started.pid, signal.SIGINT)  # what Ctrl-C does: every process gets it
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (130, "", "program.py: error: interrupted\n")
    assert time.monotonic() - began < 8 and left_of(started, tmp_path) == []


def test_a_killed_launcher_leaves_nobody_behind(launch, tmp_path):
    started = launch(*SPAWN_2, "--sleep", 60, "--workers", 1, wait=False, fresh=True)
    for _ in range(2):
        assert started.stdout.readline() == "asleep\n"
    started.kill()
    assert "program.py: error: the launcher has gone\n" in started.communicate(timeout=30)[1]
    assert left_of(started, tmp_path) == []


def test_a_launcher_that_is_killed_before_its_processes_have_met_leaves_nobody_behind(launch, tmp_path):
    """They would wait for each other for minutes, at a store that has gone."""
    started = launch(*SPAWN_2, wait=False, fresh=True)
    while len(interrupted.left_behind(str(tmp_path), started.pid)) < 4:  # launcher, Python's helper, two processes
        assert started.poll() is None
        time.sleep(0.005)
    started.kill()
    started.communicate(timeout=45)  # until all have closed their output
    assert left_of(started, tmp_path) == []


def test_a_killed_trainer_leaves_no_folder_behind(launch, tmp_path):
    started = launch("--sleep", 60, "--workers", 2, wait=False, fresh=True)
    assert started.stdout.readline() == "asleep\n"
    assert len(list((tmp_path / "temporary").glob("pymp-*"))) == 1  # for all workers
    started.kill()
    started.communicate(timeout=30)
    assert left_of(started, tmp_path) == []


def test_processes_started_by_hand_name_the_one_that_has_gone(launch):
    """No launcher tells them: rank 1 is killed, and the others are in a collective, and asleep."""
    common = ("--sleep", 60, "--world-size", 3, "--dist-url", f"tcp://localhost:{free_port()}", "--peer-timeout", 5)
    ranks = [launch(*common, "--rank", rank, wait=False) for rank in range(3)]
    for one in ranks:
        assert one.stdout.readline() == "asleep\n"
    began = time.monotonic()
    ranks[1].kill()
    errors = [one.communicate(timeout=60)[1] for one in ranks]
    assert time.monotonic() - began < 20 and [one.returncode for one in ranks] == [1, -9, 1]
    assert errors[0].endswith("program.py: error: lost rank 1: no sign of life for 5 s\n")
    assert "Traceback (most recent" not in errors[0] + errors[2] and "lost rank" not in errors[2]
    # rank 2 found out by itself and leaves the line to rank 0, or it found rank 0 gone, which holds the store
    told = [line for line in errors[2].splitlines() if line.startswith("program.py: error: ")]
    assert told in ([], ["program.py: error: lost the process that holds the others together"])


def test_a_worker_that_is_killed_is_said(launch):
    status, _, err = launch(*SPAWN_2, "--fail", "kill", "--on", "1")
    assert status == 1 and err == "program.py: error: rank 1 was ended by SIGKILL\n"


def test_a_taken_port_is_said(launch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = launch(*SPAWN, "--dist-url", f"tcp://localhost:{port}")
    assert status == 2 and f"--dist-url tcp://localhost:{port}: cannot listen there" in err


# ---------------------------------------------------------------- what is printed

PRINTING = """
import sys, time
from synco.exits import exit_with

def main():
    time.sleep(0.3)  # until the reader has gone
    print("é →", sys.argv[1], flush=True)
    print("é →", sys.argv[1], file=sys.stderr, flush=True)
    print("the last", end="")
    return 75

exit_with(main)
"""


@pytest.mark.parametrize(
    "where, encoding",
    [
        (where, "utf-8")
        for where in (">&-", "2>&-", ">&- 2>&-", ">/dev/full", ">/dev/full 2>&1", "| true", "2>&1 | true")
    ]
    + [(">out 2>err", "ascii"), (">out 2>err", "latin-1"), (">out 2>err", "utf-8")],
)
def test_nothing_that_is_printed_ends_a_program(tmp_path, where, encoding):
    (tmp_path / "x.py").write_text(PRINTING)
    line = f'("{sys.executable}" x.py "$NAME"; echo $? > status) {where}'
    name = b"\xff.jpg"  # no text in any encoding
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "NAME": os.fsdecode(name)}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, check=False, timeout=60)
    assert (tmp_path / "status").read_text() == "75\n"
    if (tmp_path / "out").exists():
        expected = {"ascii": b"? ? ?.jpg", "latin-1": b"\xe9 ? ?.jpg", "utf-8": "é → ?.jpg".encode()}[encoding]
        assert (tmp_path / "out").read_bytes() == expected + b"\nthe last"
        assert b".jpg\n" in (tmp_path / "err").read_bytes()


@pytest.mark.parametrize(
    "name, flags",
    [
        ("main_synco", [*SMALL, "--knn-freq", 1]),
        ("main_lincls", [*SMALL[:4], "--epochs", 1, "--lr", 1]),
        ("main_semisup", [*SMALL[:4], "--epochs", 1]),
        ("main_lincls", [*SMALL[:4], "-b", 8, "--epochs", 2, "--lr", 1e38]),
    ],
    ids=["pretraining", "probe", "fine-tuning", "failure"],
)
def test_what_loads_images_ends_with_its_program(programs, pretrained, data, tmp_path, name, flags):
    """In a circle of references it would stay, to be taken apart in any order: workers then print tracebacks."""
    start = [] if name == "main_synco" else ["--pretrained", pretrained]
    gc.collect()
    gc.disable()
    try:
        status = programs(name, *flags, "-j", 0, *start, "--save-dir", tmp_path / "r", data)[0]
        left = [found for found in gc.get_objects() if isinstance(found, DataLoader)]
    finally:
        gc.enable()
    assert status == (1e38 in flags) and not left
