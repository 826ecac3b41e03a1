"""The package: what the wheel holds, its commands in an environment of their own, and requirements that agree."""

import configparser
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import ROOT, SMALL
from packaging.requirements import Requirement

import synco
from synco.launch import launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = {"synco-pretrain": "main_synco", "synco-lincls": "main_lincls", "synco-semisup": "main_semisup"}


def requirements(name):
    """The lines of a file of requirements, with those of the files that it names."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    named = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    return {line for line in lines if not line.startswith("-r ")}.union(*map(requirements, named))


def test_the_requirements_agree():
    needed, extras = PROJECT["dependencies"], PROJECT["optional-dependencies"]
    assert {Requirement(line).name for line in needed} == {"torch", "torchvision", "numpy", "tensorboard"}
    assert requirements("requirements.txt") == set(needed)
    assert requirements("requirements-dev.txt") == {*needed, *extras["dev"]}
    assert set(extras) == {"plot", "timm", "track", "dev"} and {*extras["plot"], *extras["timm"]} <= set(extras["dev"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this working tree."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("repository")  # building leaves files beside the sources
    shutil.copytree(ROOT / "synco", copy / "synco", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{name}.py" for name in COMMANDS.values())):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-build-isolation", "-w", copy.parent, copy)
    return next(copy.parent.glob("synco-*.whl"))


def pip(*words):
    offline = ["--isolated", "--quiet", "--disable-pip-version-check", *words, "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", *map(str, offline)], check=True, timeout=300)


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(f"synco-{synco.__version__}.dist-info/entry_points.txt").decode())
    package = {f"synco/{path.relative_to(ROOT / 'synco')}" for path in (ROOT / "synco").rglob("*.py")}
    assert names == package | {f"{script}.py" for script in COMMANDS.values()}
    assert dict(entries["console_scripts"]) == {name: f"{script}:main" for name, script in COMMANDS.items()}
    for script in map(importlib.import_module, COMMANDS.values()):
        assert script.main.func is launch and script.main.args[1] is script.parse


def test_a_run_of_the_installed_command(wheel, data, tmp_path):
    """In an environment that links to the packages needed here, in a folder that holds nothing.

    The process that it starts must find the script again.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    packages = next(tmp_path.glob("venv/lib/python*/site-packages"))
    (packages / "needed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    # where this package is installed beside what is needed, it is there already
    pip("--python", tmp_path / "venv" / "bin" / "python", "install", "--ignore-installed", wheel)
    (tmp_path / "empty").mkdir()
    words = [*SMALL, "--epochs", "1", "--multiprocessing-distributed", "--nproc-per-node", "1", data]
    words = [str(tmp_path / "venv" / "bin" / "synco-pretrain"), *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "empty"))[:2] == ["checkpoint_0000.pth.tar", "config.json"]
