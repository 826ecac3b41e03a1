#!/usr/bin/env python3
"""Count what the processes send each other in a step's shuffled BatchNorm, beside what gathering all images would take.

  python benchmarks/comm.py                      # 2 and 4 gloo processes, 32 images each, 100 steps
  python benchmarks/comm.py --img-size 224 --json

Bytes that a process receives from others, averaged over steps and processes: counted at torch.distributed's calls,
while real processes make them.
"""

import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from synco import distributed  # noqa: E402
from synco.launch import command  # noqa: E402
from synco.options import Parser, number  # noqa: E402


def parse():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("-w", "--worlds", nargs="+", type=number(int, 2), default=[2, 4], help="numbers of processes")
    flag("-b", "--batch", type=number(int, 1), default=32, help="images of a process")
    flag("--img-size", type=number(int, 1), default=32, help="side of the images")
    flag("--dim", type=number(int, 1), default=128, help="width of the keys")
    flag("--steps", type=number(int, 1), default=100, help="steps to average over")
    flag("--seed", type=number(int, 0), default=0, help="of the permutations")
    flag("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args()


class Counted:
    """Stands before torch.distributed's two collectives and counts the bytes that come from other processes."""

    def __init__(self):
        self.received = 0
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.all_to_all, self.all_gather = dist.all_to_all_single, getattr(dist, gather)
        dist.all_to_all_single = self.exchanged
        setattr(dist, gather, self.gathered)

    def exchanged(self, output, input, output_split_sizes, input_split_sizes):
        others = sum(output_split_sizes) - output_split_sizes[dist.get_rank()]
        self.received += others * output[:1].nbytes
        return self.all_to_all(output, input, output_split_sizes, input_split_sizes)

    def gathered(self, output, input):
        self.received += output.nbytes - input.nbytes
        return self.all_gather(output, input)

    def of(self, function, *args):
        before = self.received
        function(*args)
        return self.received - before


def work(rank, world, args, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    counted, sums = Counted(), torch.zeros(3, dtype=torch.float64)
    images = torch.zeros(args.batch, 3, args.img_size, args.img_size)
    keys = torch.zeros(args.batch, args.dim)
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(distributed.seed_of("shuffle", args.seed, step))
        permutation = torch.randperm(world * args.batch, generator=generator)
        sums += torch.tensor(
            [
                counted.of(distributed.shuffle, images, permutation),
                counted.of(distributed.gather, keys),
                counted.of(distributed.gather, images),
            ]
        )
    dist.all_reduce(sums)
    if rank == 0:
        results.put((sums / (world * args.steps)).tolist())
    dist.barrier()
    dist.destroy_process_group()


def main(args):
    found = {}
    context = mp.get_context("forkserver")
    for world in args.worlds:
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            words = world, args, os.path.join(folder, "store"), results
            mp.start_processes(work, words, nprocs=world, start_method="forkserver")
        shuffle, keys, gather = results.get()
        found[world] = {"shuffle": shuffle, "keys": keys, "all_gather": gather, "ratio": shuffle / gather}
    if args.json:
        facts = {"batch": args.batch, "img_size": args.img_size, "steps": args.steps, "torch": torch.__version__}
        print(json.dumps(facts | {"bytes_per_rank_and_step": found}))
        return
    print(f"{args.batch} images of {args.img_size} pixels a process; bytes from others, mean of {args.steps} steps")
    print(f"{'processes':>9}{'all-gather of images':>22}{'shuffle':>12}{'ratio':>9}{'1 / W':>8}{'keys':>10}")
    for world, f in found.items():
        print(f"{world:9}{f['all_gather']:22.0f}{f['shuffle']:12.0f}{f['ratio']:9.4f}{1 / world:8.4f}{f['keys']:10.0f}")


if __name__ == "__main__":
    command(main, parse)
