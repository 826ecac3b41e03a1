#!/usr/bin/env python3
"""How often the evaluation's 95 % intervals hold the truth, on simulated classifiers whose accuracy is known.

  python benchmarks/coverage.py

Of each accuracy and number of val images 2,000 classifiers are simulated, which are right on each image with that
probability; two of a pair are in part right on the same images. Counted is how many bootstrap intervals hold the
accuracy, or the difference of the two. What is to be reached: 95 % within 1.5.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from synco import measures  # noqa: E402

CASES = ((0.3, 10_000), (0.7, 10_000), (0.95, 10_000), (0.7, 1000))  # (accuracy, val images)
PAIRS = ((0.70, 0.71, 10_000), (0.70, 0.70, 10_000), (0.70, 0.75, 1000))  # (accuracy, other accuracy, val images)


def covered(draw, truth, simulations, draws, rng):
    """The percentage of intervals of draw()'s values that hold the truth."""
    inside = 0
    for _ in range(simulations):
        low, high = measures.interval(draw(), draws, rng)
        inside += low <= truth <= high
    return 100 * inside / simulations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap, as the evaluation's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng, results = np.random.default_rng(args.seed), {}
    for p, n in CASES:
        name = f"accuracy {100 * p:g} %, {n} images"
        results[name] = covered(lambda p=p, n=n: rng.random(n) < p, p, args.simulations, args.draws, rng)
    for p, q, n in PAIRS:

        def difference(p=p, q=q, n=n):
            shared, own = rng.random(n) < 0.6, rng.random((2, n))  # images that both find alike hard
            own[1] = np.where(shared, own[0], own[1])
            return (own[1] < q).astype(float) - (own[0] < p)

        name = f"difference of {100 * p:g} % and {100 * q:g} %, {n} images"
        results[name] = covered(difference, q - p, args.simulations, args.draws, rng)
    if args.json:
        print(json.dumps({"results": results} | vars(args)))
    else:
        print("\n".join(f"{name:44} {value:.2f} %" for name, value in results.items()))


if __name__ == "__main__":
    main()
