"""The batch files for Slurm: what they ask for, the commands they start, and what they do when they are stopped.

No Slurm is needed: srun and scontrol are stubs. What the signals do is tried with real processes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL
from test_scripts import COUNTS, program

FOLDER = ROOT / "scripts" / "slurm"
JOBS = sorted(FOLDER.glob("*.sbatch"))
NAMES = ["lincls", "pretrain_1gpu", "pretrain_1node", "pretrain_nodes"]
PRETRAINING = [name for name in NAMES if name.startswith("pretrain")]
# what Slurm sets in a batch script
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_CPUS_ON_NODE": "48",
    "SLURM_CPUS_PER_TASK": "24",
    "SLURM_GPUS_ON_NODE": "4",
}
SCONTROL = 'case $1 in show) printf "node07\\nnode08\\n";; *) echo "$@" >>scontrol.txt;; esac'


@pytest.fixture
def repository(tmp_path):
    """A folder that looks like the repository's to the batch files, which are started there, with stubs in bin."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for name in ("main_synco.py", "main_lincls.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    program(tmp_path / "bin", "scontrol", SCONTROL)
    program(tmp_path / "bin", "srun", 'echo "srun $1 $2" >>srun.txt; shift 2; exec "$@"')  # --cpus-per-task N COMMAND
    for name in ("python", "torchrun"):
        program(tmp_path / "bin", name, f"printf '%s\\n' {name} \"$@\"")
    return tmp_path


def start(repository, name, *words, **env):
    """Start a batch file as Slurm does, a copy of it in another folder → Popen."""
    copy = repository / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(FOLDER / name, copy)
    path = os.pathsep.join([str(repository / "bin"), os.environ["PATH"]])
    cleaned = {key: value for key, value in os.environ.items() if key not in ("NPROC", "SLURM_RESTART_COUNT")}
    return subprocess.Popen(
        ["bash", str(copy), *map(str, words)],
        cwd=repository,
        env={**cleaned, **SLURM, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def started(repository, monkeypatch):
    """started(name, words ...) runs a batch file and parses its program's flags → (the launcher's words, args)."""

    def run(name, *words, **env):
        job = start(repository, f"{name}.sbatch", *words, **env)
        out, err = job.communicate(timeout=60)
        assert (job.returncode, err) == (0, "")
        got = out.splitlines()
        at = next(i for i, word in enumerate(got) if word.startswith("main_"))
        module = __import__(got[at].removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", got[at:])
        assert (repository / "srun.txt").read_text() == "srun --cpus-per-task 24\n"
        assert not (repository / "scontrol.txt").exists()  # nothing is requeued
        return got[:at], module.parse()

    return run


# ------------------------------------------------------------------------------------------------ what they ask for


def test_these_are_all_jobs():
    assert [path.stem for path in JOBS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_a_job_asks_for(name):
    text = (FOLDER / f"{name}.sbatch").read_text()
    assert os.access(FOLDER / f"{name}.sbatch", os.X_OK) and text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("^#SBATCH.*", text, re.M))
    assert asked.keys() == {
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
        *("output", "open-mode", "requeue", "signal"),
    }  # and so nothing of one site: no partition, no account
    assert (asked["signal"], asked["open-mode"], asked["requeue"]) == ("B:USR1@120", "append", "")
    assert asked["ntasks-per-node"] == "1"
    gpus = {"pretrain_1gpu": ("1", "1"), "pretrain_nodes": ("2", "4")}.get(name, ("1", "8"))
    assert (asked["nodes"], asked["gpus-per-node"]) == gpus
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert not [line for line in commands if re.search(r"\b(module|conda|source|export)\b", line)]
    assert "#SBATCH" not in text[text.index(commands[0]) :]  # Slurm reads none after the first command


# ------------------------------------------------------------------------------------------------ what they start


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(started, name):
    launcher, args = started(name, "my images/imagenet")
    nodes = 2 if name == "pretrain_nodes" else 1
    assert (args.arch, args.epochs, args.lr, args.batch_size * nodes) == ("resnet50", 200, 0.03, 256)
    assert (args.momentum, args.weight_decay) == (0.9, 1e-4)
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 65536, 0.999, 0.2)
    assert args.mlp and args.aug_plus and args.cos
    assert (args.n_hard, *(getattr(args, f"n{i}") for i in range(1, 7))) == COUNTS["synco"]
    assert args.bn_splits == (8 if name == "pretrain_1gpu" else 1)
    assert (args.resume, args.workers, args.data) == ("auto", 48, "my images/imagenet")
    assert args.save_dir == f"runs/slurm_{name.removeprefix('pretrain_')}"
    if name == "pretrain_1gpu":
        assert launcher == ["python"]
    elif name == "pretrain_1node":
        assert launcher == ["torchrun", "--standalone", "--nproc-per-node", "4"]
    else:
        assert launcher == [
            *("torchrun", "--nnodes", "2", "--nproc-per-node", "4"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node07:24567", "--rdzv-id", "1234567-0"),
        ]


def test_the_probe(started):
    launcher, args = started("lincls", "my runs/checkpoint_0199.pth.tar", "imagenet")
    assert launcher == ["torchrun", "--standalone", "--nproc-per-node", "4"]
    assert (args.arch, args.pretrained, args.data) == ("resnet50", "my runs/checkpoint_0199.pth.tar", "imagenet")
    assert (args.lr, args.epochs, args.schedule, args.batch_size) == (30, 100, [60, 80], 256)
    assert (args.weight_decay, args.momentum, args.resume, args.workers) == (0, 0.9, "auto", 48)
    assert args.save_dir == "my runs/checkpoint_0199-lincls"


@pytest.mark.parametrize("name", NAMES)
def test_own_folder_and_flags(started, name):
    before = ["a.pth.tar"] if name == "lincls" else []
    extra = ["--epochs", 3, "--batch-size", 64, "-j", 2]
    launcher, args = started(name, *before, "imagenet", "my run", *extra, NPROC="2", SLURM_RESTART_COUNT="3")
    assert (args.data, args.save_dir, args.epochs, args.batch_size, args.workers) == ("imagenet", "my run", 3, 64, 2)
    if name != "pretrain_1gpu":
        assert launcher[launcher.index("--nproc-per-node") + 1] == "2"
    if name == "pretrain_nodes":
        assert launcher[-1] == "1234567-3"  # processes that a restart left behind do not meet the new ones


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("words", [[], ["--keep", "2"], ["elsewhere"]])
def test_usage(repository, name, words):
    if words == ["elsewhere"]:
        (repository / "main_synco.py").unlink()
        (repository / "main_lincls.py").unlink()
        words = ["a.pth.tar", "imagenet"]
    job = start(repository, f"{name}.sbatch", *words)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out, err.count("\n")) == (2, "", 1)
    assert f"sbatch scripts/slurm/{name}.sbatch" in err and "IMAGENET" in err and "repository's folder" in err


def test_a_number_of_nodes_that_does_not_divide_the_batch(repository):
    job = start(repository, "pretrain_nodes.sbatch", "imagenet", SLURM_JOB_NUM_NODES="3")
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out, err.count("\n")) == (2, "", 1) and "3 nodes" in err and "256" in err


# ------------------------------------------------------------------------------------------------ when they are stopped


def wait_for(path, text=""):
    """Until a file is there that holds a text."""
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise TimeoutError(f"{path} did not come")


# a run that says that it has begun, and goes on until it gets a signal; "$@" ends in --save-dir SAVE_DIR DATA
RUN = """trap 'echo USR1 >>got.txt; [ "$USR1" ] && echo {{}} >run/preempted.json; exit ${{USR1:-0}}' USR1
trap 'echo TERM >>got.txt; [ "$TERM_" ] && echo {{}} >run/preempted.json; exit ${{TERM_:-0}}' TERM
mkdir -p run; echo $$ >pid.txt; {body}"""
WAIT = "for i in $(seq 600); do sleep 0.1; done"


def requeued(repository):
    path = repository / "scontrol.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("status, again", [(75, True), (0, False)])
def test_before_the_time_limit_the_run_is_told_and_the_job_requeued(repository, status, again):
    """Slurm signals the batch shell alone; a run that ends well all the same is not started once more."""
    program(repository / "bin", "python", RUN.format(body=WAIT))
    job = start(repository, "pretrain_1gpu.sbatch", "imagenet", "run", USR1=str(status))
    wait_for(repository / "pid.txt", "\n")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == status
    assert (repository / "got.txt").read_text() == "USR1\n"
    assert requeued(repository) == ("requeue 1234567\n" if again else "")


def test_a_run_that_does_not_listen_yet_is_requeued_too(repository):
    """While Python starts, the signal ends it, and nothing is left that tells why."""
    program(repository / "bin", "python", f"echo $$ >pid.txt; {WAIT}")
    job = start(repository, "pretrain_1gpu.sbatch", "imagenet", "run")
    wait_for(repository / "pid.txt", "\n")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert (job.returncode, requeued(repository)) == (128 + signal.SIGUSR1, "requeue 1234567\n")


@pytest.mark.parametrize("name", ["pretrain_1node", "pretrain_nodes"])
@pytest.mark.parametrize("everyone", [False, True], ids=["the task", "every process"])
def test_torchrun_gets_the_signal_that_it_knows(repository, name, everyone):
    """USR1 becomes TERM, where Slurm signals the task alone as well as where it signals all of a step's processes."""
    program(repository / "bin", "torchrun", RUN.replace("USR1' USR1", "").format(body=WAIT).split("\n", 1)[1])
    job = start(repository, f"{name}.sbatch", "imagenet", "run", TERM_="1")
    wait_for(repository / "pid.txt", "\n")
    if everyone:  # as srun would: to the wrapper's child, too
        os.kill(int((repository / "pid.txt").read_text()), signal.SIGUSR1)
        time.sleep(0.3)
        assert not (repository / "got.txt").exists() and job.poll() is None
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 1
    assert (repository / "got.txt").read_text() == "TERM\n"
    assert requeued(repository) == "requeue 1234567\n"


def test_a_preemption_that_only_the_run_is_told_of(repository):
    """Slurm sends TERM to the tasks of a step: the marker that the run leaves is why the job is requeued."""
    program(repository / "bin", "python", RUN.format(body=WAIT))
    job = start(repository, "pretrain_1gpu.sbatch", "imagenet", "run", TERM_="75")
    wait_for(repository / "pid.txt", "\n")
    os.kill(int((repository / "pid.txt").read_text()), signal.SIGTERM)
    job.communicate(timeout=60)
    assert (job.returncode, requeued(repository)) == (75, "requeue 1234567\n")


def test_a_run_that_fails_by_itself_is_not_requeued(repository):
    """Least of all over and over, because of a marker that an earlier preemption left."""
    (repository / "run").mkdir()
    (repository / "run" / "preempted.json").write_text("{}")
    program(repository / "bin", "python", RUN.format(body="exit 2"))
    job = start(repository, "pretrain_1gpu.sbatch", "imagenet", "run")
    job.communicate(timeout=60)
    assert (job.returncode, requeued(repository)) == (2, "")


def test_scancel_requeues_nothing(repository):
    """It ends the batch shell by TERM, as it does the tasks."""
    program(repository / "bin", "python", RUN.format(body=WAIT))
    job = start(repository, "pretrain_1gpu.sbatch", "imagenet", "run", TERM_="75")
    wait_for(repository / "pid.txt", "\n")
    job.send_signal(signal.SIGTERM)
    os.kill(int((repository / "pid.txt").read_text()), signal.SIGTERM)
    job.communicate(timeout=60)
    time.sleep(0.2)
    assert (job.returncode, requeued(repository)) == (-signal.SIGTERM, "")


def test_a_real_run_is_stopped_and_goes_on(repository, data, monkeypatch, programs, signal_after):
    """torchrun and the program are the real ones, two processes are told; what a second start starts goes on."""
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    program(repository / "bin", "torchrun", torchrun)
    flags = [*SMALL, "--epochs", 2000, "--keep", 2]
    job = start(repository, "pretrain_1node.sbatch", data, "run", *flags, NPROC="2")
    for _ in range(1200):
        if (repository / "run" / "checkpoint_0000.pth.tar").exists() or job.poll() is not None:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and "world size         2" in out and "resumed" not in out, err
    assert requeued(repository) == "requeue 1234567\n", err
    assert (repository / "run" / "preempted.json").exists()

    program(repository / "bin", "torchrun", "printf '%s\\n' \"$@\"")
    job = start(repository, "pretrain_1node.sbatch", data, "run", *flags, SLURM_RESTART_COUNT="1", NPROC="2")
    words = job.communicate(timeout=60)[0].splitlines()
    assert job.returncode == 0
    monkeypatch.chdir(repository)
    signal_after(1)
    status, out, err = programs("main_synco", *words[words.index("main_synco.py") + 1 :])
    assert status == 75 and "resumed  " in out, err
