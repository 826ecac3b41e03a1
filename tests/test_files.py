"""Files written whole or not at all, whatever happens meanwhile; what cannot be read or written; the folders' lock."""

import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

from synco import files
from synco.errors import UserError


@pytest.fixture
def unprivileged():
    """A folder, and this process without the right of root's to read and write whatever there is."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid():
            yield folder
            return
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def python(code, *words):
    """A second process with `files`, its stdout a pipe; as quick as Python itself, since torch is not imported."""
    words = [sys.executable, "-c", f"import sys, os\nfrom synco import files\n{code}", *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


# ----------------------------------------------------------------------------------------------------- written whole


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    killed = python(
        "with files.atomic_write(sys.argv[1]) as file:\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)",
        path,
    )
    assert killed.wait(60) == -signal.SIGKILL and path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error), files.atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_the_file_is_on_the_disk_before_its_name_and_that_before_the_end(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (order.append("fsync"), real(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (order.append("replace"), real(a, b)))
    files.write_json(tmp_path / "x", 1)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_an_ordinary_file_is_made_and_others_are_left_alone(tmp_path, monkeypatch):
    """Its permissions are those of open(); a link under a temporary name, even a guessed one, is not followed."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x.tmp").symlink_to("mine")
    files.write_json(tmp_path / "x", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["mine", "x", "x.tmp"] and json.loads((tmp_path / "x").read_text()) == {
        "a": 1
    }
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "mine").stat().st_mode
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "ab" * size)
    (tmp_path / "x.abababab.tmp").symlink_to("mine")
    with pytest.raises(FileExistsError):
        files.write_json(tmp_path / "x", {"a": 2})
    assert (tmp_path / "mine").read_text() == "mine" and json.loads((tmp_path / "x").read_text()) == {"a": 1}


# -------------------------------------------------------------------------------------------------- JSON, tables, names


def test_json(tmp_path):
    content = {"a": [1, 2.5, None, "ü"], "b": {}}
    files.write_json(tmp_path / "x.json", content)
    assert files.read_json(tmp_path / "x.json") == content == json.loads((tmp_path / "x.json").read_text())
    assert files.read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a whole JSON file"),
        (b'{"a": 1', "not a whole JSON file"),
        (b"\xff\xfe\x00", "not a whole JSON file"),
        (b"[" * 100_000, "not a whole JSON file"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a whole JSON file"),
        (b"[1]", "holds no JSON object, but a list"),
        (b"null", "holds no JSON object, but a NoneType"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=f"x.json: {message}"):
        files.read_json(tmp_path / "x.json")


def test_json_that_cannot_be_read_is_refused(tmp_path, unprivileged):
    for path, message in (
        ("/", "/: cannot be read .Is a directory"),
        ("/" + "x" * 300, "cannot be read .File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            files.read_json(path)
    path = os.path.join(unprivileged, "x.json")
    files.write_json(path, {})
    os.chmod(path, 0)
    with pytest.raises(UserError, match="x.json: cannot be read .Permission denied"):
        files.read_json(path)


def test_a_class_name_with_a_comma_is_one_cell_of_the_table(tmp_path):
    files.write_csv(tmp_path / "x.csv", ["class", "n"], [['a, "b"', 3], [os.fsdecode(b"\xe9"), 4]])
    assert (tmp_path / "x.csv").read_bytes() == b'class,n\n"a, ""b""",3\n\xe9,4\n'


def test_set_aside_takes_the_first_free_number(tmp_path):
    files.set_aside(tmp_path / "x.json")
    assert os.listdir(tmp_path) == []
    for text in ("first", "second"):
        (tmp_path / "x.json").write_text(text)
        files.set_aside(tmp_path / "x.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x-1.json": "first", "x-2.json": "second"}


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ------------------------------------------------------------------------------------------------ what can be written


def test_folders_are_made_all_or_none(tmp_path, unprivileged):
    files.make_folders(f"{unprivileged}/a/b", f"{unprivileged}/c")
    files.make_folders(f"{unprivileged}/a/b")
    assert os.path.isdir(f"{unprivileged}/a/b") and os.path.isdir(f"{unprivileged}/c")
    open(f"{unprivileged}/file", "w").close()
    os.mkdir(f"{unprivileged}/closed", 0o500)
    for name in ("file", "file/x", "closed", "closed/x"):
        with pytest.raises(UserError, match=f"{name}: cannot be written "):
            files.make_folders(f"{unprivileged}/new", f"{unprivileged}/{name}")
    assert not os.path.exists(f"{unprivileged}/new")


def test_checking_makes_nothing(tmp_path):
    files.check_writable(tmp_path / "a" / "b", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_listed_is_refused(unprivileged):
    """A run would find no checkpoint of another one in it."""
    os.mkdir(f"{unprivileged}/r", 0o300)
    with pytest.raises(UserError, match="r: cannot be made or listed .Permission denied"):
        files.make_folders(f"{unprivileged}/r")


def test_a_folders_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(UserError, match="xxx: cannot be made or listed .File name too long"):
        files.make_folders(tmp_path / ("x" * 300))


def test_a_disk_that_is_full_from_the_start_is_said_before_anything_is_written(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # files can be made, and hold next to nothing
    try:
        with pytest.raises(UserError, match="r: cannot be written "):
            files.make_folders(tmp_path / "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in ("new", "file", "folder/new", os.fsdecode(b"\xff"), "x" * 240):
        files.check_output(path)
        files.write_json(path, {})
    before = sorted(tmp_path.rglob("*"))
    for path, message in (
        ("folder", "-o: is a folder"),
        ("none/x", "-o: there is no folder none"),
        ("file/x", "-o: there is no folder file"),
        ("x" * 300, "-o: cannot be written .File name too long"),
        ("x" * 300 + "/x", "-o: there is no folder xxx"),
        ("x/" * 3000 + "x", "-o: there is no folder x/"),
        ("x\0", "'-o': no file can have that name"),
    ):
        with pytest.raises(UserError, match=message):
            files.check_output(path, "-o")
    assert sorted(tmp_path.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------------- the lock

HOLDER = "lock = files.FolderLock(sys.argv[1])\nprint('held', flush=True)\nsys.stdin.read()\nlock.release()"


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked tmp_path; it is killed at the test's end."""
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys\nfrom synco import files\n{HOLDER}", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_has_locked_is_refused_by_its_name(tmp_path, holder):
    with pytest.raises(UserError, match=f"--save-dir {tmp_path}: another run is using it .process {holder.pid} on "):
        files.FolderLock(tmp_path, patience=0)
    holder.communicate("")  # it releases the lock
    assert os.listdir(tmp_path) == []
    with files.FolderLock(tmp_path, patience=0):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert os.listdir(tmp_path) == [".lock"]
    lock = files.FolderLock(tmp_path, patience=0)
    refused = python(
        "try:\n    files.FolderLock(sys.argv[1], patience=0)\nexcept ValueError as e:\n    print(e)", tmp_path
    )
    assert f"another run is using it (process {os.getpid()} on " in refused.communicate(timeout=60)[0]
    lock.release()
    lock.release()  # once is enough, and twice no harm
    assert os.listdir(tmp_path) == []


def test_patience(tmp_path, holder):
    """An owner that ends within it is no reason to refuse."""
    holder.stdin.close()
    files.FolderLock(tmp_path, patience=60).release()


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "mine").write_text("mine")
    for target in ("../mine", "../new"):
        (tmp_path / "r" / ".lock").symlink_to(target)
        with pytest.raises(UserError, match="r/.lock: is a symbolic link, which no lock is; remove it"):
            files.FolderLock(tmp_path / "r")
        (tmp_path / "r" / ".lock").unlink()
    assert (tmp_path / "mine").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["mine", "r"]
