"""Real gloo processes: shuffling, gathering, one queue for all."""

import copy
import datetime
import functools
import os
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import processes

from synco import distributed
from synco.builder import SynCo, update_ema
from synco.negatives import hardest, synthesize

FEW = {"n_hard": 8, "n1": 2, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1, "warmup_epochs": 0}


def encoder(num_classes):
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, num_classes))


def test_free_memory_is_no_more_than_the_machine_has():
    assert 10**7 < distributed.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_on_any_control_group_above_counts(tmp_path):
    """As batch systems set them: on the job's, while the process's own has none."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    500000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/slurm/job_7/step_0/task_0\n")
    assert distributed.free_memory(tmp_path) == 500_000 * 1024  # there are no such groups
    for group, limit in (("slurm", "300000"), ("slurm/job_7", "200000"), ("slurm/job_7/step_0/task_0", "max")):
        folder = tmp_path / "sys" / "fs" / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.stat").write_text("anon 90000\nfile 999999\nshmem 30000\n")
    assert distributed.free_memory(tmp_path) == 200_000 - 90_000 - 30_000


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
    assert distributed.from_all("x") == ["x"]


def _slow(rank):
    """Rank 0 takes longer than a collective may, and then another one → what was waited for, and how long."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
    began = time.monotonic()
    time.sleep(2.5 * (rank == 0))
    words = [distributed.from_rank_0({"rank": rank}), distributed.from_rank_0([rank])]
    time.sleep(2.5 * (rank == 1))
    distributed.barrier()
    return words, time.monotonic() - began


def test_processes_wait_for_each_other_however_long_it_takes():
    for words, seconds in processes(2, _slow):
        assert words == [{"rank": 0}, [0]] and seconds > 4.9


@pytest.mark.parametrize(
    "masks, shares",
    [
        (["0123", "0123"], [2, 2]),  # as torchrun's
        (["01", "23"], [2, 2]),  # bound by srun
        (["012", "345", "2"], [Fraction(5, 2), 3, Fraction(1, 2)]),
    ],
)
def test_cpus_are_shared_with_the_processes_of_the_node_that_may_run_on_them(monkeypatch, masks, shares):
    masks = [set(mask) for mask in masks]
    everyone = [(node, mask) for node in ("here", "elsewhere") for mask in masks]
    monkeypatch.setattr(distributed, "node", lambda: "here")
    monkeypatch.setattr(distributed, "from_all", lambda own: everyone)
    for mask, share in zip(masks, shares):
        monkeypatch.setattr(distributed, "_cpus", lambda mask=mask: mask)
        assert distributed.cpu_share() == share


def test_a_process_by_itself_has_all_its_cpus():
    assert distributed.cpu_share() == distributed.usable_cpus() == len(os.sched_getaffinity(0))


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


def _fill(rank, symmetric):
    """Whether `fill` leaves what a step with encoders that stand still does → that, the queue, its images."""
    torch.manual_seed(rank)
    model = SynCo(encoder, 8, 24, 1.0, mlp=False, n_hard=4, symmetric=symmetric, mask_same_image=True)
    distributed.share_weights(model)
    twin, (im_q, im_k) = copy.deepcopy(model), torch.randn(2, 4, 6)
    index = torch.arange(4) + 10 * rank
    model.fill(im_q, im_k, index, step=5)
    twin(im_q, im_k, 0, step=5, index=index)
    return torch.equal(model.queue, twin.queue), model.queue, model.queue_index.tolist(), twin.queue_index.tolist()


@pytest.mark.parametrize("symmetric", [False, True])
def test_filling_puts_in_the_keys_of_all_processes(symmetric):
    found = processes(2, _fill, symmetric)
    images = [0, 1, 2, 3, 10, 11, 12, 13] * (1 + symmetric)
    for same, queue, index, after_a_step in found:
        assert same and torch.equal(queue, found[0][1])
        assert index == images + [-1] * (24 - len(images)) == after_a_step


def _share(rank):
    """Weights and statistics in a layout of the process's own → those of before and those that it then has."""
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if rank:
        network.to(memory_format=torch.channels_last)
    network(torch.randn(2, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    distributed.share_weights(network)
    return before, {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def test_processes_get_the_weights_of_the_first():
    (first, mine), (other, its) = processes(2, _share)
    assert all(torch.equal(first[name], mine[name]) and torch.equal(first[name], its[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


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
