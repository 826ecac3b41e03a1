"""The benchmarks, at a size at which they measure nothing: that they run, and what they print."""

import json
import sys

import pytest
import torch
from conftest import ARCH, ROOT, Fork, make_images, without_launcher

from benchmarks import golden, gpu, scale, step, textbook
from synco.errors import Failure, UserError

SMALLEST = {
    "head.py -n 4 -k 4096 --repeat 1": ("ratio", "results"),
    "input.py DATA --repeat 1 --img-size 16": ("ratio",),
    "startup.py --files 300 --classes 3": ("ratio",),
    f"step.py -a {ARCH} -b 4 --img-size 32 --moco-k 1024 --repeat 1": ("results", "batch_size"),
    f"heads.py -a {ARCH} -b 4 --lr 1 3 --repeat 1": ("ratio", "heads"),
    "comm.py -w 2 -b 4 --img-size 8 --steps 2": (),
    f"scale.py -a {ARCH} -w 8 64 --images 4": ("predicted", "weights"),
    "coverage.py --simulations 3 --draws 50": ("results",),
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


def test_a_step_that_the_memory_is_too_small_for_is_told_and_the_others_go_on(monkeypatch, capsys):
    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(textbook, "logits", full)
    words = f"step.py -a {ARCH} -b 4 --img-size 32 --moco-k 1024 --repeat 1 --json"
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words.split()[:-1], *more])
        step.main(step.parse())
    table, found = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "SynCo, textbook     out of memory: lower --batch-size 4" in table
    found = json.loads(found)["results"]
    assert found["SynCo, textbook"] == {"out_of_memory": "lower --batch-size 4"}
    assert found["SynCo"]["of_moco"] > 0 and found["SynCo"]["of_textbook"] is None


def test_the_acceptance_of_a_gpu_goes_on_after_a_part_that_fails_and_writes_its_tables(tmp_path, monkeypatch, capsys):
    """On the CPU, tiny; a second call adds to the first one's file."""
    make_images(tmp_path / "photos", classes=2, images=3)
    (tmp_path / "README.md").write_text("before\n<!-- gpu.py --tables -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setitem(gpu.PARTS, "step", (60, "benchmarks/head.py --nothing", ""))  # which starts faster
    monkeypatch.setitem(gpu.PARTS, "step, 32 images", (0.01, "benchmarks/step.py", ""))

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *flags])
        gpu.main(gpu.parse())

    with pytest.raises(Failure, match="failed: step, step, 32 images$"):
        call(str(tmp_path / "photos"), "--dry", "--only", "step", "step, 32 images", "input")
    call("--dry", "--only", "head, 32 queries")
    record = json.loads((tmp_path / "gpu-dry.json").read_text())["parts"]
    assert "unrecognized arguments: --nothing" in record["step"]["failed"]
    assert record["step, 32 images"]["failed"] == "not done after 0 s"
    assert record["head, 32 queries"]["result"]["SynCo"]["ms"] > 0 and record["input"]["result"]["device"] == "cpu"
    call("--tables")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- gpu.py --tables -->\ndry run, no GPU, ") and text.endswith(
        "<!-- end -->\nafter\n"
    )
    assert "| head, 32 queries | MoCo v2 " in text and "| input | " in text and "old" not in text
    assert "| step, 32 images | not done after 0 s | 0 |" in text


def test_predicted_bytes_are_those_that_processes_exchange():
    """Keys and gradients to the byte; where the images go is drawn: 480 draws, within 5 standard deviations."""
    found = scale.check(3, steps=20)
    for parts in found.values():
        for name in ("keys", "gradients", "agreement"):
            assert parts[name][1] == pytest.approx(parts[name][0], rel=1e-9), name
        assert parts["shuffle"][1] == pytest.approx(parts["shuffle"][0], rel=5 * (1 / 2 / 480) ** 0.5)
    assert found["off"]["shuffle"][0] == 2 * found["bf16"]["shuffle"][0]  # the images travel in the autocast's type


def test_a_prediction_by_hand(monkeypatch):
    """Two nodes of two, 1,000 weights, images of 600 bytes; the network is what takes time."""
    words = "scale.py -w 4 --node 2 --images 4 --compute-ms 1 --link 1000 --network 1e-6 --latency-us 10"
    monkeypatch.setattr(sys, "argv", [*words.split(), *"--img-size 10 --dim 2 --moco-k 64 --amp bf16".split()])
    ms = scale.predict(4, scale.parse(), weights=1000, host=0.001)["ms"]
    assert ms["gradients"] == pytest.approx(1.5 * 4000 / 1e3 * 1e3 + 0.04)  # 1 kB/s; one bucket: nothing hides it
    assert ms["shuffle"] == pytest.approx(2 * (2 / 4) * 4 * 600 + 0.03)  # of a node's two GPUs half the images
    assert ms["keys"] == pytest.approx(2 * 4 * 2 * 4 + 0.03)  # the other node's eight
    assert ms["host"] == pytest.approx(1) and ms["step"] == pytest.approx(sum(ms.values()) - ms["step"])


def test_what_was_wanted_of_a_gpu_is_compared_with_what_was_found():
    step = {"SynCo": {"of_moco": 1.01, "of_textbook": 0.4, "images_per_second": 2000.0}}
    found = gpu.judged({"step": step, "program": {"images_per_second": 1700.0}})  # "step compiled" is not there
    assert [(value, reached) for _, _, value, reached in found] == [
        (1.01, True),
        (2.5, False),
        (2000.0, True),
        (0.85, False),
    ]


def test_the_acceptance_of_a_gpu_wants_one(monkeypatch, tmp_path):
    for flags, message in (
        ([], "torch finds no GPU on this machine"),
        (["--dry"], "give --out another folder"),
        (["--dry", "--out", str(tmp_path), str(tmp_path / "none")], "none: no such folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
        with pytest.raises(UserError, match=message):
            gpu.parse()


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
