"""The benchmarks, at a size at which they measure nothing: that they run, and what they print."""

import json

import pytest
from conftest import ARCH, ROOT, Fork, make_images, without_launcher

from benchmarks import golden

SMALLEST = {
    "head.py -n 4 -k 4096 --repeat 1": ("ratio", "results"),
    "input.py DATA --repeat 1 --img-size 16": ("ratio",),
    "startup.py --files 300 --classes 3": ("ratio",),
    f"step.py -a {ARCH} -b 4 --img-size 32 --moco-k 1024 --repeat 1": ("results", "batch_size"),
    f"heads.py -a {ARCH} -b 4 --lr 1 3 --repeat 1": ("ratio", "heads"),
    "comm.py -w 2 -b 4 --img-size 8 --steps 2": (),
}


@pytest.mark.parametrize("words", SMALLEST, ids=lambda words: words.split()[0])
def test_a_small_run_prints_one_object(words, tmp_path):
    make_images(tmp_path / "photos", classes=2, images=3)
    name, *flags = (str(tmp_path / "photos") if word == "DATA" else word for word in words.split())
    env = without_launcher() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = Fork(ROOT / "benchmarks" / name, *flags, "--json", env=env)
    out, err = run.communicate()
    assert run.returncode == 0, err
    found = json.loads(out)
    assert found and set(SMALLEST[words]) <= found.keys()


def test_the_golden_record_is_met_and_a_single_bit_is_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden, "RUNS", {"run": golden.STEPS.replace("--steps 12", "--steps 2")})
    assert golden.main(["record", str(tmp_path / "record")]) == 0
    path = tmp_path / "record" / "record.json"
    known = json.loads(path.read_text())
    numbers, text = known["run"].values()
    queue = "run/checkpoint_0000.pth.tar state_dict.module.queue"
    assert {"exit status", "run/config.json", "run/events.out.tfevents", "run/log.jsonl 0.loss", queue} < numbers.keys()
    numbers[queue] = numbers[queue][:-1] + ("0" if numbers[queue][-1] != "0" else "1")
    text[text.index("run/config.json 0.seed: 3")] = "run/config.json 0.seed: 4"
    path.write_text(json.dumps(known))
    capsys.readouterr()
    assert golden.main(["check", str(tmp_path / "record")]) == 1
    first, differ, *rest, last = capsys.readouterr().out.splitlines()
    assert first.startswith("run") and "1 of " in first and differ.startswith(f"    {queue}: torch.float32 [64, 16] ")
    told = ["text: 2 lines differ (-: the record's, +: now)"]
    told += [f"    {sign}run/config.json 0.seed: {seed}    [run]" for sign, seed in (("-", 4), ("+", 3))]
    assert rest == told and last.endswith("1 differences in numbers")
