"""The benchmarks, at a size at which they measure nothing: that they run, and what they print."""

import json

import pytest
from conftest import ARCH, ROOT, command, make_images

SMALLEST = {
    "head.py -n 4 -k 4096 --repeat 1": ("ratio", "results"),
    "input.py DATA --repeat 1 --img-size 16": ("ratio",),
    "startup.py --files 300 --classes 3": ("ratio",),
    f"step.py -a {ARCH} -b 4 --img-size 32 --moco-k 1024 --repeat 1": ("results", "batch_size"),
    "comm.py -w 2 -b 4 --img-size 8 --steps 2": (),
}


@pytest.mark.parametrize("words", SMALLEST, ids=lambda words: words.split()[0])
def test_a_small_run_prints_one_object(words, tmp_path):
    make_images(tmp_path / "photos", classes=2, images=3)
    name, *flags = (str(tmp_path / "photos") if word == "DATA" else word for word in words.split())
    done = command(ROOT / "benchmarks" / name, *flags, "--json", env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found and set(SMALLEST[words]) <= found.keys()
