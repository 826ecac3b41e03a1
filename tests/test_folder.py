"""A run's folder: whose it is, where a run goes on, what is refused, and what is removed."""

import contextlib
import json
import os
import sys

import pytest
import torch

from synco import checkpoint, files
from synco.errors import UserError
from synco.folder import RunFiles, RunFolder

PRETRAINING = RunFiles(
    kind="pretraining",
    required=(),
    epoch="checkpoint_{:04}.pth.tar",
    within="checkpoint_step.pth.tar",
    best="model_best_knn.pth.tar",
)
PROBE = RunFiles(
    kind="classifier's",
    required=(),
    epoch="checkpoint_lincls.pth.tar",
    within="checkpoint_lincls_step.pth.tar",
    best="model_best_lincls.pth.tar",
    results=("result.json", "per_class.csv"),
)


@pytest.fixture(autouse=True)
def this_program(monkeypatch):
    """What config.json is compared with."""
    monkeypatch.setattr(sys, "argv", ["main_synco.py", "DATA"])


@pytest.fixture
def place(tmp_path):
    """A folder that is there, and empty."""
    (tmp_path / "r").mkdir()
    return tmp_path / "r"


def folder(path, log=None, run_files=PRETRAINING, **more):
    return RunFolder(str(path), log and str(log), run_files, **more)


def write(path, **more):
    """A whole checkpoint of one number."""
    checkpoint.save({"state_dict": {"w": torch.ones(1)}, "config": {}, **more}, str(path))
    return str(path)


def names(path):
    return sorted(name for name in os.listdir(path) if name != files.LOCK)


def by_program(path, name):
    (path / "config.json").write_text(json.dumps({"command": f"{name} --seed 3 'my data'"}))


# ----------------------------------------------------------------------------------------------- what is gone on from


def test_checkpoints_are_in_the_order_of_what_they_hold(place):
    for name in ("0002", "0010", "0001", "12345", "lincls", "002", "0003.pth.tar", "step"):
        (place / f"checkpoint_{name}.pth.tar").touch()
    (place / "model_best_knn.pth.tar").touch()
    found = [os.path.basename(path) for path in folder(place).checkpoints()]
    numbered = [f"checkpoint_{name}.pth.tar" for name in ("0001", "0002", "0010", "12345")]
    assert found == ["model_best_knn.pth.tar", *numbered, "checkpoint_step.pth.tar"]
    assert folder(place, run_files=PROBE).checkpoints() == [str(place / "checkpoint_lincls.pth.tar")]
    assert folder(place / "none").checkpoints() == []


def test_a_new_folder_and_an_empty_one_are_fresh(place):
    for path in (place, place / "new"):
        for resume in ("", "auto"):
            assert folder(path).find(resume) == (None, None)
    assert names(place) == []  # nothing is written before `prepare`


def test_the_newest_is_gone_on_from(place):
    write(place / "checkpoint_0000.pth.tar", epoch=1)
    newest = write(place / "checkpoint_0001.pth.tar", epoch=2)
    path, content = folder(place).find("auto")
    assert (path, content["epoch"]) == (newest, 2)
    within = write(place / "checkpoint_step.pth.tar", epoch=2, step=7)
    assert folder(place).find("auto")[0] == folder(place).find(within)[0] == within
    assert folder(place, restarted=True).find("")[0] == within  # the launcher's word is as good


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda path: path.write_bytes(b""), "not a whole checkpoint file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.symlink_to("nowhere"), "no such checkpoint file"),
        (lambda path: (path.touch(), path.chmod(0)), "cannot be read (Permission denied)"),
    ],
    ids=["empty", "folder", "dangling link", "without permission"],
)
def test_what_is_no_whole_checkpoint_is_passed_over_and_said(place, capsys, spoil, why):
    good, bad = place / "checkpoint_0000.pth.tar", place / "checkpoint_0001.pth.tar"
    write(good, epoch=1)
    spoil(bad)
    if "Permission" in why and os.access(bad, os.R_OK):
        pytest.skip("nothing is without permission for this user")
    assert folder(place).find("auto")[0] == str(good)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"warning: {bad}: {why}" in told and told.endswith(f"; going on from {good}\n")
    good.unlink()
    with pytest.raises(UserError, match=f"--resume auto: no checkpoint in {place} is whole, the newest: {bad}: "):
        folder(place).find("auto")


def test_another_run_is_left_alone(place, tmp_path):
    older, newer = (write(place / f"checkpoint_{i:04}.pth.tar", epoch=i + 1) for i in range(2))
    outside = write(tmp_path / "checkpoint_0000.pth.tar")
    for resume, message in (
        ("", f"--save-dir {place} holds another run (checkpoint_0001.pth.tar): --resume auto goes on with it, "
             "--overwrite starts anew, another --save-dir leaves it alone"),
        (outside, "holds another run (checkpoint_0001.pth.tar)"),
        (older, f"--resume {older}: --save-dir holds the newer {newer}, which would be left; give another"),
        (str(place / "checkpoint_0009.pth.tar"), "checkpoint_0009.pth.tar: no such checkpoint file"),
        (str(place), f"--resume {place}: is a folder; give a checkpoint, or --save-dir {place} --resume auto"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            folder(place).find(resume)
        assert message in str(error.value)
    with pytest.raises(UserError, match=f"--overwrite would remove {newer}, which --resume names; give one of the two"):
        folder(place, overwrite=True).find(newer)
    assert folder(place, overwrite=True).find(outside)[0] == outside
    assert folder(place, overwrite=True).find("") == (None, None)
    assert folder(place, overwrite=True, restarted=True).find("")[0] == newer  # it was given up before the restart


def test_results_alone_are_another_run_too(place):
    (place / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds another run \(result.json\)"):
        folder(place, run_files=PROBE).find("")
    assert folder(place, run_files=PROBE, overwrite=True).find("") == (None, None)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["checkpoint_lincls.pth.tar", "model_best_semisup.pth.tar", "result.json"])
def test_the_run_of_another_program_is_left_alone(place, name, overwrite):
    (place / name).write_text("theirs")
    with pytest.raises(UserError) as error:
        folder(place, overwrite=overwrite).find("")
    assert str(error.value) == f"--save-dir {place} holds a run of another program ({name}); give another"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for find in (lambda f: f.find(""), lambda f: f.find("auto")):
        with pytest.raises(UserError, match="--save-dir .*file: is not a folder"):
            find(folder(tmp_path / "file"))


# --------------------------------------------------------------------------------------------------------- whose log


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "events.out.tfevents.1.host.2.3"])
@pytest.mark.parametrize("resume", ["", "auto", "PATH"])
def test_what_is_not_of_a_run_of_this_program_is_left_alone(place, tmp_path, name, resume):
    (place / name).write_text("{}\n")
    resume = write(tmp_path / "x.pth.tar") if resume == "PATH" else resume
    with pytest.raises(UserError) as error:
        folder(place).find(resume)
    assert str(error.value) == (
        f"--save-dir {place} holds {name}, which is not of a run of this program; give another, or --overwrite"
    )
    folder(place, overwrite=True).find(resume)


def test_a_run_of_this_program_that_never_saved_does_not_stand_in_the_way(place):
    (place / "log.jsonl").write_text("{}\n")
    by_program(place, "/somewhere/main_synco.py")
    assert folder(place).find("") == folder(place).find("auto") == (None, None)
    for other in (
        '{"command": "main_lincls.py --seed 3"}', '{"command": "main_synco.py \'"}', '{"command": 3}',
        '{"command": ""}', "[]", "{", "", "\0",
    ):  # fmt: skip
        (place / "config.json").write_text(other)
        with pytest.raises(UserError, match="holds config.json, which is not of a run of this program"):
            folder(place).find("auto")


def test_another_runs_log_in_a_folder_of_its_own(place, tmp_path):
    """Also by a run that goes on: the log would be cut to its steps."""
    log = tmp_path / "log"
    log.mkdir()
    (log / "log.jsonl").write_text("theirs\n")
    kept = write(place / "checkpoint_0000.pth.tar", config={"log_dir": str(tmp_path / "elsewhere")})
    message = f"--log-dir {log} holds the log of another run; give another, or --overwrite"
    for path, resume in ((place, "auto"), (place, kept), (tmp_path / "new", ""), (tmp_path / "new", kept)):
        with pytest.raises(UserError) as error:
            folder(path, log).find(resume)
        assert str(error.value) == message
    for more in ({"overwrite": True}, {"restarted": True}):
        folder(tmp_path / "new", log, **more).find("")
    write(kept, config={"log_dir": str(log)})
    assert folder(place, log).find("auto")[0] == kept  # its own
    (tmp_path / "link").symlink_to(log)
    assert folder(place, tmp_path / "link").find("auto")[0] == kept
    write(kept, config={"log_dir": ["strange"]})
    with pytest.raises(UserError, match="holds the log of another run"):
        folder(place, log).find("auto")
    assert (log / "log.jsonl").read_text() == "theirs\n"


@pytest.mark.parametrize("name", ["config.json", "preempted.json", "log.jsonl", "events.out.tfevents.1.host.2.3"])
def test_a_folder_where_a_file_is_to_be(place, name):
    write(place / "checkpoint_0000.pth.tar")
    (place / name).mkdir()
    for resume, overwrite in (("auto", False), ("", True)):
        with pytest.raises(UserError, match=f"{name}: is a folder, where a run writes a file"):
            folder(place, overwrite=overwrite).find(resume)


# ------------------------------------------------------------------------------------------- what is written, removed


def test_starting_anew_removes_the_old_run_and_nothing_else(place):
    own = ["checkpoint_lincls.pth.tar", "checkpoint_lincls_step.pth.tar", "model_best_lincls.pth.tar", "log.jsonl"]
    own += ["events.out.tfevents.1.host.2.3", "result.json", "per_class.csv", "preempted.json"]
    others = ["notes.txt", "checkpoint.pth.tar", "result-1.json"]
    for name in own + others:
        (place / name).write_text("")
    anew = folder(place, run_files=PROBE, overwrite=True)
    assert anew.find("") == (None, None)
    assert names(place) == sorted(own + others)
    anew.prepare(None)
    assert names(place) == sorted(others)


def test_going_on_keeps_all_but_what_is_in_the_way(place):
    for i in range(4):
        write(place / f"checkpoint_{i:04}.pth.tar")
    for name in ("log.jsonl", "preempted.json", "checkpoint_step.pth.tar.0a1b2c3d.tmp", "config.json.0a1b2c3d.tmp"):
        (place / name).write_text("")
    goes_on = folder(place, keep=2)
    goes_on.prepare(goes_on.find("auto")[0])
    assert names(place) == ["checkpoint_0002.pth.tar", "checkpoint_0003.pth.tar", "log.jsonl"]


@pytest.mark.parametrize("name", ["config.json", "per_class.csv", "model_best_lincls.pth.tar"])
def test_only_what_a_killed_write_leaves_is_removed(place, name):
    left = f"{name}.0a1b2c3d.tmp"
    others = [f"{name}.tmp", f"{name}.0a1b2c3d", f"{name}.0a1b2c3d4.tmp", f"my {left}", f"{left}.gz"]
    for each in [left, *others]:
        (place / each).write_text("")
    folder(place, run_files=PROBE).prepare(None)
    assert names(place) == sorted(others)


def test_both_folders_are_made_or_none(tmp_path):
    folder(tmp_path / "a" / "b", tmp_path / "c").prepare(None)
    assert os.path.isdir(tmp_path / "a" / "b") and os.path.isdir(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/log: cannot be written"):
        folder(tmp_path / "d", tmp_path / "file" / "log").prepare(None)
    assert not os.path.exists(tmp_path / "d")


def test_the_lock_is_one_and_there_until_the_process_gives_up_what_it_holds(place, monkeypatch):
    made, lock = [], files.FolderLock
    monkeypatch.setattr(files, "FolderLock", lambda path: made.append(path) or lock(path))
    with contextlib.ExitStack() as locks:
        mine = folder(place, locks=locks)
        mine.lock()
        mine.lock()
        assert os.listdir(place) == [files.LOCK] and made == [str(place)]
    assert os.listdir(place) == []


def test_a_run_that_came_first_meanwhile_is_not_written_over(place):
    """Both found the folder empty; the other had it while this one waited."""
    mine = folder(place)
    assert mine.find("") == (None, None)
    for name in ("checkpoint_0000.pth.tar", "log.jsonl"):
        (place / name).write_text("the other's")
    with pytest.raises(UserError, match="r: another run has used it meanwhile"):
        mine.prepare(None)
    assert names(place) == ["checkpoint_0000.pth.tar", "log.jsonl"]


def test_what_was_just_written_stays(place):
    """Of numbered checkpoints the last `keep` up to it, and those of higher numbers, which are not this run's."""
    for i in (0, 1, 2, 7):
        write(place / f"checkpoint_{i:04}.pth.tar")
    (place / "checkpoint_step.pth.tar").touch()
    kept = folder(place, keep=1)
    for name in ("checkpoint_step.pth.tar", "model_best_knn.pth.tar"):
        kept.prune(name)
        assert len(names(place)) == 5
    kept.prune("checkpoint_0002.pth.tar")
    assert names(place) == ["checkpoint_0002.pth.tar", "checkpoint_0007.pth.tar"]
    folder(place).prune("checkpoint_0007.pth.tar")  # all are kept
    assert len(names(place)) == 2


def test_a_checkpoint_elsewhere_brings_along_what_belongs_to_it(place, tmp_path):
    for name in ("checkpoint_lincls_step.pth.tar", "checkpoint_lincls.pth.tar", "model_best_lincls.pth.tar",
                 "per_class.csv", "log.jsonl"):  # fmt: skip
        (place / name).write_text(name)
    for within, name in ((False, "checkpoint_lincls.pth.tar"), (True, "checkpoint_lincls_step.pth.tar")):
        new = tmp_path / f"new {within}"
        new.mkdir()
        folder(new, run_files=PROBE).bring_along(str(place / name), within=within)
        wanted = {"checkpoint_lincls.pth.tar", "model_best_lincls.pth.tar", "per_class.csv"} | {name}
        assert {each: (new / each).read_text() for each in names(new)} == {each: each for each in wanted}


def test_the_marker_tells_where_the_run_goes_on(place, capsys):
    folder(place).mark_preempted("SIGTERM", 5, "checkpoint_step.pth.tar")
    told = json.loads((place / "preempted.json").read_text())
    assert told == {"signal": "SIGTERM", "step": 5, "checkpoint": "checkpoint_step.pth.tar"}
    folder(place / "none").mark_preempted("SIGTERM", 5, "x")  # the checkpoint is what counts
    assert "none: preempted.json cannot be written (No such file or directory)" in capsys.readouterr().err


def test_what_is_evaluated(place, tmp_path):
    with pytest.raises(UserError, match=f"-e --resume auto: {place} holds no classifier"):
        folder(place, run_files=PROBE).find_to_evaluate("auto")
    last = write(place / "checkpoint_lincls.pth.tar", epoch=3)
    assert folder(place, run_files=PROBE).find_to_evaluate("auto")[0] == last
    best = write(place / "model_best_lincls.pth.tar", epoch=2)
    assert folder(place, run_files=PROBE).find_to_evaluate("auto")[1]["epoch"] == 2  # the best, if there is one
    assert folder(place, run_files=PROBE).find_to_evaluate(last)[0] == last
    outside = write(tmp_path / "x.pth.tar")
    with pytest.raises(UserError, match=r"holds a run \(checkpoint_lincls.pth.tar\); give another"):
        folder(place, run_files=PROBE).find_to_evaluate(outside)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "result.json").write_text("{}")  # results are set aside, never lost
    assert folder(tmp_path / "e", run_files=PROBE).find_to_evaluate(best)[0] == best
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is not a folder"):
        folder(tmp_path / "file", run_files=PROBE).find_to_evaluate(best)
    with pytest.raises(UserError, match="none.pth.tar: no such checkpoint file"):
        folder(tmp_path / "e", run_files=PROBE).find_to_evaluate(str(tmp_path / "none.pth.tar"))


def test_a_run_with_a_log_elsewhere_that_never_saved_is_begun_again(place, tmp_path):
    """Its config.json says where its log is; another log folder is still another run's."""
    for name in ("log", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("")
    config = {"command": "main_synco.py DATA", "log_dir": str(tmp_path / "log")}
    (place / "config.json").write_text(json.dumps(config))
    assert folder(place, tmp_path / "log").find("auto") == (None, None)
    with pytest.raises(UserError, match="others holds the log of another run"):
        folder(place, tmp_path / "others").find("auto")


def test_a_run_from_elsewhere_does_not_go_on_with_the_log_of_one_that_never_saved(place, tmp_path):
    by_program(place, "main_synco.py")
    (place / "log.jsonl").write_text("")
    (tmp_path / "old").mkdir()
    path = write(tmp_path / "old" / "checkpoint_0003.pth.tar")
    run = folder(place)
    assert run.find(path)[0] == path
    run.prepare(path)
    assert "log.jsonl" not in names(place)
