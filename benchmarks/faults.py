#!/usr/bin/env python3
"""Break a pretraining at each kind of moment, in each way of starting it, and see how it ends and whether it goes on.

  python benchmarks/faults.py                            # all: about 15 minutes on two CPU cores
  python benchmarks/faults.py --kinds error --forms spawn torchrun --moments step save

Kinds: an unexpected exception, SIGKILL, SIGTERM, and stdout and stderr whose reader has gone. Of two processes the
second has the fault, of a save the first, which alone writes. Wanted are the right status in time, one traceback of an
exception, no process or temporary folder left behind (SIGKILL may leave Python's own), and a run that goes on to the
same end as one that nothing happened to.
"""

import argparse
import glob
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

MOMENTS = ("start", "step", "save", "evaluation", "end")
FORMS = ("single", "spawn", "torchrun")
# kind → (statuses of a single process and of the launchers, seconds from the fault to the end)
KINDS = {"error": ({1}, 10), "kill": ({1, -9}, 60), "stop": ({0, 1, 75}, 20), "closed": ({0}, None)}


def fail(kind):
    """What happens to the process. The file tells when."""
    open(os.environ["FAULT_FILE"], "x").close()
    if kind == "error":
        raise RuntimeError("broken on purpose")
    if kind == "closed":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    else:
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)


def broken_pretrain(process, args):
    """main_synco.pretrain with the fault that the environment names."""
    import main_synco
    from synco import checkpoint, knn
    from synco.run import Run, Step

    moment, kind = os.environ["FAULT"].split()
    places = {"start": (Run, "begin"), "step": (Step, "record"), "save": (checkpoint, "save")}
    owner, name = (places | {"evaluation": (knn, "accuracy"), "end": (Run, "finish")})[moment]
    whole, calls = getattr(owner, name), itertools.count(1)
    rank = 0 if moment == "save" else process.world_size - 1

    def broken(*given, **named):
        if process.rank == rank and next(calls) == (5 if moment == "step" else 1):
            fail(kind)
        return whole(*given, **named)

    setattr(owner, name, broken)
    main_synco.pretrain(process, args)


def command(form, workers, data, folder, script="main_synco.py"):
    """The command line of a run in that form."""
    from benchmarks import survival

    flags = survival.PRETRAIN.split()[1:] + ["-j", str(workers), "--save-dir", folder, data]
    if form == "torchrun":
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
        return [sys.executable, *launcher, script, *flags]
    flags += ["--multiprocessing-distributed", "--nproc-per-node", "2"] * (form == "spawn")
    return [sys.executable, script, *flags]


def trial(moment, form, kind, *, workers, data, place, calm):
    """One broken run and its continuation → (seconds from the fault to the end, [what was not as wanted])."""
    from benchmarks import survival

    folder, output, wrong = os.path.join(place, "run"), os.path.join(place, "out.txt"), []
    temporary, file = tempfile.mkdtemp(dir="/tmp"), os.path.join(place, "fault")
    os.environ |= {"FAULT": f"{moment} {kind}", "FAULT_FILE": file, "TMPDIR": temporary}
    run = survival.start(command(form, workers, data, folder, os.path.abspath(__file__)), output)
    status = run.wait(300)
    seconds = time.time() - os.path.getmtime(file) if os.path.exists(file) else float("nan")
    statuses, limit = KINDS[kind]
    if status not in statuses or kind == "stop" and form != "torchrun" and moment != "end" and status != 75:
        wrong.append(f"status {status}")
    if limit is not None and not seconds <= limit:
        wrong.append(f"ended after {seconds:.1f} s")
    with open(output, errors="replace") as text:
        tracebacks = text.read().count("\nRuntimeError: broken on purpose")
    if tracebacks != (kind == "error"):
        wrong.append(f"{tracebacks} tracebacks")
    until = time.monotonic() + 10  # loading workers look for their trainer every five seconds
    while (left := survival.left_behind(folder, run.pid)) and time.monotonic() < until:
        time.sleep(0.2)
    wrong += [f"{len(left)} processes left"] * bool(left)
    wrong += ["a temporary folder left"] * (kind != "kill" and bool(glob.glob(os.path.join(temporary, "pymp-*"))))
    survival.finish(command(form, workers, data, folder), output)
    wrong += survival.differences(calm, folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return seconds, wrong


def main():
    from benchmarks import survival

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="loading workers, in turn")
    args = parser.parse_args()
    workers, failed = itertools.cycle(args.workers), 0
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        survival.make_data(data, each=20)
        for form in args.forms:
            calm = os.path.join(folder, form)
            survival.finish(command(form, 0, data, calm), calm + ".txt")
            for moment, kind in itertools.product(args.moments, args.kinds):
                j, place = next(workers), tempfile.mkdtemp(dir=folder)
                seconds, wrong = trial(moment, form, kind, workers=j, data=data, place=place, calm=calm)
                failed += bool(wrong)
                print(
                    f"{form:9} -j {j}  {moment:11} {kind:7} {seconds:5.1f} s  {'; '.join(wrong) or 'good'}", flush=True
                )
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    if "FAULT" in os.environ:
        import main_synco
        from synco.launch import launch

        sys.argv[0] = main_synco.__file__  # which its folder is known by
        launch(broken_pretrain, main_synco.parse)
    main()
