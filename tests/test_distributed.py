"""Real gloo processes: shuffling, gathering, one queue for all, and what is said when something fails."""

import functools
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import LAUNCHERS, ROOT, free_port, processes

from synco import distributed
from synco.builder import SynCo, update_ema
from synco.negatives import hardest, synthesize

FEW = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1, "warmup_epochs": 0}


def encoder(num_classes):
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, num_classes))


def test_seeds_differ_and_are_stable():
    seeds = {distributed.seed_of(word, *parts) for word in ("a", "b") for parts in np.ndindex(5, 5, 5)}
    assert len(seeds) == 250 and all(0 <= seed < 2**63 for seed in seeds)
    assert distributed.seed_of("a", 3, 4, 5) == distributed.seed_of("a", 3, 4, 5)


def _shuffle(rank, permutations, batch):
    W = distributed.world_size()
    everything = torch.arange(W * batch * 6.0).view(W * batch, 2, 3)
    mine = everything[rank * batch : (rank + 1) * batch]
    for permutation in permutations:
        shuffled = distributed.shuffle(mine, permutation)
        assert torch.equal(shuffled, everything[permutation[rank * batch : (rank + 1) * batch]])
        gathered = distributed.gather(shuffled)
        back = torch.empty_like(gathered)
        back[permutation] = gathered
        assert torch.equal(back, everything)
        images = everything.view(-1, 2, 1, 3).expand(-1, 2, 4, 3).to(memory_format=torch.channels_last)
        shuffled = distributed.shuffle(images[rank * batch : (rank + 1) * batch], permutation)
        assert torch.equal(shuffled, images[permutation[rank * batch : (rank + 1) * batch]])
    assert distributed.total(torch.tensor([rank + 1.0])).item() == W * (W + 1) / 2
    assert distributed.mean(torch.tensor([rank + 1.0])).item() == (W + 1) / 2
    return distributed.from_rank_0({"rank": rank})


@pytest.mark.parametrize("world_size", [2, 4])
def test_shuffle_and_gather(world_size):
    torch.manual_seed(world_size)
    n = world_size * 5
    permutations = [torch.randperm(n), torch.arange(n), torch.arange(n).flip(0)]
    assert processes(world_size, _shuffle, permutations, 5) == [{"rank": 0}] * world_size


def test_one_process_is_an_ordinary_case():
    x, permutation = torch.randn(5, 3), torch.randperm(5)
    assert torch.equal(distributed.shuffle(x, permutation), x[permutation])
    assert torch.equal(distributed.gather(x), x) and torch.equal(distributed.mean(x.clone()), x)
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.from_rank_0("a") == "a"


def _train(rank, batch, steps, evaluating):
    """Some steps under DDP as the program takes them → what each step left."""
    W = distributed.world_size()
    torch.manual_seed(0)
    model = SynCo(encoder, 4, 4 * W * batch + 3, 0.9, 0.2, False, **FEW, seed=1)
    model.train(not evaluating)
    learner = distributed.parallel(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    seen = []
    model.encoder_k[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    left = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        im_q, im_k = torch.randn(2, W * batch, 6, generator=g)
        mine = slice(rank * batch, (rank + 1) * batch)
        logits, labels = learner(im_q[mine], im_k[mine], step=step)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        left.append((model.queue.clone().numpy(), model.queue_ptr.item(), logits.detach().numpy(), seen[step].numpy()))
    return left, [p.detach().numpy() for p in model.parameters()]


@functools.cache
def trained(world_size, evaluating=False):
    return processes(world_size, _train, 6, 7, evaluating)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_has_the_same_queue_after_each_step(world_size):
    found = trained(world_size)
    (first, parameters), *others = found
    for left, weights in others:
        for step in range(7):
            assert (left[step][0] == first[step][0]).all() and left[step][1] == first[step][1]
            assert left[step][2].shape == first[step][2].shape and (left[step][2] != first[step][2]).any()
        assert all((a == b).all() for a, b in zip(weights, parameters))
    assert first[6][1] == 7 * 6 * world_size % len(first[0][0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_batch_norm_of_the_keys_sees_a_permuted_batch(world_size):
    found = trained(world_size)
    for step in range(2):
        g = torch.Generator().manual_seed(step)
        im_k = torch.randn(2, world_size * 6, 6, generator=g)[1]
        saw = [torch.from_numpy(found[rank][0][step][3]) for rank in range(world_size)]
        places = [(im_k[None] == rows[:, None]).all(-1).nonzero()[:, 1].tolist() for rows in saw]
        assert sorted(sum(places, [])) == list(range(world_size * 6))  # every image once
        for rank, place in enumerate(places):
            assert set(place) != set(range(rank * 6, rank * 6 + 6))  # and not where it came from


def _symmetric(rank, batch, steps):
    """Some steps with both views as queries and an image's own rows masked → their logits, the queue, gradients."""
    torch.manual_seed(0)
    none = {f"n{i}": 0 for i in range(1, 7)}
    model = SynCo(encoder, 4, 40, 0.9, 0.2, False, **none, symmetric=True, mask_same_image=True).eval()
    learner, found = distributed.parallel(model, torch.device("cpu")), []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        im_q, im_k = torch.randn(2, 8, 6, generator=g)
        index = torch.randperm(10, generator=g)[:8]  # most images come again while their keys are in the queue
        mine = slice(rank * batch, (rank + 1) * batch)
        logits, labels = learner(im_q[mine], im_k[mine], step=step, index=index[mine])
        F.cross_entropy(logits, labels).backward()
        found.append(logits.detach().view(2, batch, -1))
    gradients = [w.grad.numpy() for w in model.encoder_q.parameters()]
    return torch.stack(found).numpy(), model.queue.numpy(), model.queue_index.tolist(), gradients


def test_symmetric_and_masked_processes_are_one_with_the_whole_batch():
    logits, queue, numbers, gradients = _symmetric(0, 8, 4)
    assert np.isinf(logits[1:]).any(axis=(1, 2, 3)).all() and not np.isinf(logits[..., 0]).any()
    parts = processes(2, _symmetric, 4, 4)
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts], axis=2), logits, atol=1e-5)
    for _, its_queue, its_numbers, its_gradients in parts:
        np.testing.assert_allclose(its_queue, queue, atol=1e-6)
        assert its_numbers == numbers and numbers.count(-1) == 0
        for ours, theirs in zip(its_gradients, gradients):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_fill_the_queue_as_one_with_the_whole_batch(world_size):
    """With BatchNorm in eval mode the shuffle must not show: a plain loop on the whole batch gives the same queue."""
    found = trained(world_size, evaluating=True)
    torch.manual_seed(0)
    model = SynCo(encoder, 4, 4 * world_size * 6 + 3, 0.9, 0.2, False, **FEW, seed=1).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    queue, pointer = model.queue.clone(), 0
    for step in range(7):
        im_q, im_k = torch.randn(2, world_size * 6, 6, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            update_ema(model.encoder_k, model.encoder_q, 0.9)
            for key in F.normalize(model.encoder_k(im_k), dim=1):
                queue[pointer] = key
                pointer = (pointer + 1) % len(queue)
        ours = found[0][0][step]
        torch.testing.assert_close(torch.from_numpy(ours[0]), queue, atol=1e-5, rtol=0)
        assert ours[1] == pointer
        # the weights go on as in the processes, each of which draws its own synthetic negatives
        old = torch.from_numpy(found[0][0][step - 1][0]) if step else model.queue
        q = F.normalize(model.encoder_q(im_q), dim=1)
        with torch.no_grad():
            k = F.normalize(model.encoder_k(im_k), dim=1)
        losses = []
        for rank in range(world_size):
            part = slice(rank * 6, rank * 6 + 6)
            g = torch.Generator().manual_seed(distributed.seed_of("negatives", 1, step, rank))
            hard = hardest((q[part] @ old.T).detach(), 8)
            s = synthesize(q[part], old, hard, model.counts, **model.ranges, generator=g)
            columns = [(q[part] * k[part]).sum(1, keepdim=True), q[part] @ old.T, (s @ q[part][:, :, None]).squeeze(2)]
            losses.append(F.cross_entropy(torch.cat(columns, dim=1) / 0.2, torch.zeros(6, dtype=torch.long)))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for ours, plain in zip(found[0][1], model.parameters()):
        torch.testing.assert_close(torch.from_numpy(ours), plain.detach(), atol=1e-5, rtol=0)


def _traffic(rank, batch, steps):
    import torch.distributed as dist

    calls, moved = [], 0
    original = dist.all_to_all_single

    def count(output, input, output_split_sizes, input_split_sizes):
        nonlocal moved
        moved += sum(size for source, size in enumerate(output_split_sizes) if source != rank)
        calls.append(1)
        return original(output, input, output_split_sizes, input_split_sizes)

    dist.all_to_all_single = count
    W = distributed.world_size()
    for step in range(steps):
        permutation = torch.randperm(W * batch, generator=torch.Generator().manual_seed(step))
        distributed.shuffle(torch.zeros(batch, 1), permutation)
    return moved


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_image_goes_to_one_process_only(world_size):
    """The reference gathers every image everywhere: (W - 1) · B received a step. Here a W-th of that, on average."""
    moved = processes(world_size, _traffic, 32, 100)
    gathered = (world_size - 1) * 32 * 100
    assert sum(moved) / world_size <= gathered * (1 / world_size + 0.01)


# ---------------------------------------------------------------- launching: small programs of their own

PROGRAM = """
import os, sys, time
import torch
from synco import distributed, options
from synco.options import UserError

def parse():
    parser = options.Parser("test")
    options.add_distributed(parser)
    parser.add_argument("--fail", default="")
    parser.add_argument("--on", type=int, default=-1)
    parser.add_argument("--sleep", action="store_true")
    return parser.parse_args()

def run(process, args):
    total = distributed.total(torch.ones(1)).item()
    if args.sleep:
        os.write(1, b"asleep\\n")
        time.sleep(60)
    if args.fail and args.on in (-1, process.rank):
        if args.fail == "kill":
            os.kill(os.getpid(), 9)
        kinds = {"user": UserError("what is wrong"), "bug": KeyError("a bug"), "nan": FloatingPointError("nan")}
        raise kinds[args.fail]
    if args.fail:
        distributed.total(torch.ones(1))  # waits for the process that has failed
        time.sleep(60)
    os.write(1, f"rank {process.rank} of {process.world_size}, local {process.local_rank} of {process.local_size}, "
          f"{process.device}, sum {total:g}\\n".encode())

if __name__ == "__main__":
    distributed.launch(run, parse)
"""


@pytest.fixture
def launch(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def run(*flags, torchrun=0, env=None, wait=True):
        words = [sys.executable]
        if torchrun:
            words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
        words += [str(path), *flags]
        kept = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
        kept |= {"PYTHONPATH": str(ROOT), **(env or {})}
        started = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept, start_new_session=True
        )
        if not wait:
            return started
        out, err = started.communicate(timeout=120)
        return started.returncode, sorted(out.splitlines()), err

    return run


SPAWN = ("--multiprocessing-distributed", "--world-size", "1", "--rank", "0")


def test_one_process(launch):
    status, out, err = launch()
    assert (status, err) == (0, "")
    assert out == ["rank 0 of 1, local 0 of 1, cpu, sum 1"]
    assert launch("--world-size", "1", "--rank", "0")[1] == out


def test_spawn(launch):
    """With no GPU the reference's launcher starts nothing and exits with 0."""
    status, out, _ = launch(*SPAWN, "--dist-url", f"tcp://localhost:{free_port()}", "--nproc-per-node", "2")
    assert status == 0
    assert out == [f"rank {r} of 2, local {r} of 2, cpu, sum 2" for r in range(2)]
    assert launch(*SPAWN)[1] == ["rank 0 of 1, local 0 of 1, cpu, sum 1"]


def test_torchrun(launch):
    status, out, _ = launch(torchrun=2)
    assert status == 0
    assert out == [f"rank {r} of 2, local {r} of 2, cpu, sum 2" for r in range(2)]


def test_two_nodes_that_spawn(launch):
    common = ("--multiprocessing-distributed", "--nproc-per-node", "2", "--world-size", "2")
    common += ("--dist-url", f"tcp://localhost:{free_port()}")
    nodes = [launch(*common, "--rank", str(rank), wait=False) for rank in (1, 0)]
    lines = sum([node.communicate(timeout=120)[0].splitlines() for node in nodes], [])
    assert sorted(lines) == [f"rank {r} of 4, local {r % 2} of 2, cpu, sum 4" for r in range(4)]


def test_processes_started_by_hand(launch):
    common = ("--world-size", "2", "--dist-url", f"tcp://localhost:{free_port()}")
    ranks = [launch(*common, "--rank", str(rank), wait=False) for rank in (1, 0)]
    lines = sum([one.communicate(timeout=120)[0].splitlines() for one in ranks], [])
    assert sorted(lines) == [f"rank {r} of 2, local 0 of 1, cpu, sum 2" for r in range(2)]


@pytest.mark.parametrize("kind, on, status", [("user", "-1", 2), ("user", "0", 2), ("user", "1", 2), ("nan", "-1", 1)])
def test_of_several_processes_one_reports(launch, kind, on, status):
    found, out, err = launch(*SPAWN, "--nproc-per-node", "2", "--fail", kind, "--on", on)
    message = {"user": "what is wrong", "nan": "nan"}[kind]
    assert (found, out, err) == (status, [], f"program.py: error: {message}\n")


def test_under_torchrun_one_reports(launch):
    status, out, err = launch("--fail", "user", "--on", "1", torchrun=2)
    assert status == 1 and err.count("program.py: error: what is wrong") == 1
    assert "exitcode  : 2" in err
    assert 'program.py", line' not in err  # no traceback of the program's own


def test_a_bug_keeps_its_traceback(launch):
    status, _, err = launch("--fail", "bug")
    assert status == 1 and "Traceback" in err and "KeyError: 'a bug'" in err
    status, _, err = launch(*SPAWN, "--nproc-per-node", "2", "--fail", "bug", "--on", "1")
    assert status == 1 and "Traceback" in err and "KeyError: 'a bug'" in err


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
    with pytest.raises(SystemExit) as stop:
        distributed.launch(lambda process, args: started.append(process), parse)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and started == [] and message in err and err.count("\n") == 1
    if "LOCAL_RANK" in env:  # the others of the node come to the same verdict, and leave it to the first to say it
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setenv("RANK", "3")
        with pytest.raises(SystemExit) as stop:
            distributed.launch(lambda process, args: started.append(process), parse)
        assert stop.value.code == 2 and started == [] and capsys.readouterr().err == ""


def test_an_environment_that_counts_nodes(launch):
    """MoCo's --dist-url env:// with --multiprocessing-distributed: WORLD_SIZE and RANK are those of nodes."""
    env = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    flags = ("--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-url", "env://")
    assert launch(*flags, env=env)[1] == [f"rank {r} of 2, local {r} of 2, cpu, sum 2" for r in range(2)]


def test_when_rank_0_fails_on_another_node_no_traceback_is_left(launch):
    common = ("--world-size", "2", "--dist-url", f"tcp://localhost:{free_port()}", "--fail", "user", "--on", "0")
    ranks = [launch(*common, "--rank", str(rank), wait=False) for rank in (0, 1)]
    errors = [one.communicate(timeout=120)[1] for one in ranks]
    assert errors[0] == "program.py: error: what is wrong\n"
    assert "Traceback" not in errors[1]  # c10d itself may warn that the store has gone
    assert [one.returncode for one in ranks] == [2, 2]


@pytest.mark.parametrize("flags", [(), (*SPAWN, "--nproc-per-node", "2")])
def test_an_interrupted_program_says_so_in_one_line(launch, flags):
    started = launch(*flags, "--sleep", wait=False)
    for _ in range(2 if flags else 1):
        assert started.stdout.readline() == "asleep\n"
    os.killpg(started.pid, signal.SIGINT)  # what Ctrl-C does: every process gets it
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (130, "", "program.py: error: interrupted\n")


def test_a_worker_that_is_killed_is_said(launch):
    status, _, err = launch(*SPAWN, "--nproc-per-node", "2", "--fail", "kill", "--on", "1")
    assert status == 1 and err == "program.py: error: rank 1 was ended by SIGKILL\n"


def test_a_taken_port_is_said(launch):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = launch(*SPAWN, "--dist-url", f"tcp://localhost:{port}")
    assert status == 2 and f"--dist-url tcp://localhost:{port}: cannot listen there" in err
