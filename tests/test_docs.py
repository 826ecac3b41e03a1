"""The documentation: its commands are some that the programs take, its links and the files that it names are there."""

import importlib
import re
import shlex
import sys

import pytest
import torch.distributed.run
import torchvision
from conftest import ARCH, ROOT, make_images

import main_synco

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "detection/README.md")]
PAGES += [*ROOT.glob("benchmarks/**/README.md"), *ROOT.glob("docs/*.md")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGE = sorted(path.name for path in (ROOT / "synco").glob("*.py") if path.name != "__init__.py")
SCRIPTS = {"synco-pretrain": "main_synco", "synco-lincls": "main_lincls", "synco-semisup": "main_semisup"}
RUN = ("python", "python3", "torchrun", "make", "pip", "bash", "sbatch", "cd", *SCRIPTS)
FILES = [path for path in ROOT.rglob("*") if not {".git", ".venv", "__pycache__"} & set(path.relative_to(ROOT).parts)]
# what stands for a value that the reader knows, and what stands for more
STANDS_FOR = {"LR": "0.1", "SEED": "3", "...": None}
# those of main_moco.py, in its order
MOCO = (
    "--arch -a --workers -j --epochs --start-epoch --batch-size -b --lr --learning-rate --schedule --momentum --wd "
    "--weight-decay --print-freq -p --resume --world-size --rank --dist-url --dist-backend --seed --gpu "
    "--multiprocessing-distributed --moco-dim --moco-k --moco-m --moco-t --mlp --aug-plus --cos"
).split()


def blocks(page):
    """The fenced blocks of a page: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """The command lines in its blocks, as lists of words; blocks that begin with no command show something else."""
    found = []
    for language, text in blocks(page):
        lines = text.replace("\\\n", " ").splitlines()
        first = lines[0].split()[0] if lines and lines[0].split() else ""
        if language in ("", "bash", "sh") and (first in RUN or re.fullmatch(r"[\w/.]+\.(sh|sbatch)", first)):
            for line in lines:
                words = shlex.split(re.sub(r"\[[^]]*\]", "", line), comments=True)
                words = [STANDS_FOR.get(word, word) for word in words]
                found += [[word for word in words if word is not None]] * bool(words)
    return found


def in_repository(name, page):
    """The file of that name, from the page's folder or the root; a bare name may lie in any folder."""
    for folder in (page.parent, ROOT):
        if (folder / name).exists():
            return folder / name
    return next((path for path in FILES if "/" not in name and path.name == name), None)


def check(words, page, monkeypatch):
    """Raise unless this is a command that can be given."""
    program, *rest = words
    if program in SCRIPTS:
        return parse(SCRIPTS[program], rest, monkeypatch)
    if program == "torchrun":
        launched = torch.distributed.run.get_args_parser().parse_args(rest)
        words = ["-m"] * launched.module + [launched.training_script, *launched.training_script_args]
        return check(["python", *words], page, monkeypatch)
    if program == "cd":
        assert (ROOT / rest[0]).is_dir()
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip" or rest[:2] == ["-m", "pip"]:
        for name in re.findall(r"-r (\S+)", " ".join(rest)):
            assert (ROOT / name).exists()
    elif program in ("python", "python3") and rest[0] == "-m":
        if rest[1].startswith(("synco.", "main_")):
            parse(rest[1], rest[2:], monkeypatch)
    elif program in ("python", "python3") and rest[0].removesuffix(".py") in SCRIPTS.values():
        parse(rest[0].removesuffix(".py"), rest[1:], monkeypatch)
    else:  # another script: its file, and that it knows the flags
        name = rest.pop(0) if program in ("python", "python3", "bash", "sbatch") else program
        script = in_repository(name, page)
        assert script, f"{name}: no such script"
        known = script.read_text() + (ROOT / "synco" / "export.py").read_text() * ("detectron2" in name)
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--") and len(word) > 2):
            passed_on = (
                script.suffix in (".sh", ".sbatch") or "parse_known_args" in known or "default_argument" in known
            )
            assert flag in known or passed_on, f"{flag}: unknown to {name}"


def parse(module, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *words])
    importlib.import_module(module).parse()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_its_program_takes(name, monkeypatch):
    page = ROOT / name
    for words in commands(page):
        try:
            check(words, page, monkeypatch)
        except (ValueError, SystemExit, OSError) as error:
            raise AssertionError(f"{name}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("name", NAMES)
def test_python_in_it_is_python(name):
    for language, text in blocks(ROOT / name):
        if language == "python":
            compile(text, name, "exec")


def test_commands_are_found_and_wrong_ones_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```\npython main_synco.py --mlp \\\n  D # why\n\nmake demo\n```\n```\ntop-1   68 %\n```\n")
    assert commands(page) == [["python", "main_synco.py", "--mlp", "D"], ["make", "demo"]]
    assert len([words for name in NAMES for words in commands(ROOT / name)]) > 30
    for wrong in (
        "python main_synco.py --mpl D",
        "synco-lincls --pretrained random --lr x D",
        "torchrun --nproc-per-node 2 main_semisup.py --train-percent 3 D",
        "python -m synco.export",
        "python benchmarks/head.py --jason",
        "python benchmarks/none.py",
        "scripts/none.sh DATA",
        "make nothing",
        "cd nowhere",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(wrong.split(), page, monkeypatch)


def anchors(page):
    """What the headings of a page can be linked by, as GitHub makes it."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_named_files_are_there(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not re.match(r"\w+:", target):
            linked = page.parent / path if path else page
            assert linked.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{name}: {target}"
    for named in re.findall(r"`([\w./-]+\.(?:py|sh|sbatch|yaml|toml|cff|md))\b[^`]*`", text):
        known = named.startswith("...") or in_repository(named, page) or (ROOT / "synco" / named).exists()
        assert known, f"{name}: {named}"


def test_readme_is_short_and_leads_everywhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 160
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= set(re.findall(r"\]\(([\w/.]+)", text))
    assert [name for name in PACKAGE if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_the_text_are_known(name):
    """Each is in a program of the repository, or torchrun's, or Slurm's."""
    sources = "".join(path.read_text() for path in FILES if path.suffix in (".py", ".sh", ".sbatch"))
    known = {
        "--gres",
        *re.findall(r"--[a-z][\w-]*", sources),
        *torch.distributed.run.get_args_parser()._option_string_actions,
    }
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", text):
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) <= known, f"{name}: {code}"


def test_every_flag_of_mocos_is_here_and_explained():
    table = (ROOT / "docs" / "pretraining.md").read_text().partition("## MoCo's flags")[2]
    assert [flag for flag in MOCO if f"`{flag}`" not in table] == []
    assert set(MOCO) <= set(main_synco.flags()._option_string_actions)


def test_small_commands_of_the_manual_run(programs, tmp_path, monkeypatch):
    """Those that want a folder of images alone, one after the other, on few of them: each does what it says."""
    data, checkpoint = tmp_path / "images", "runs/try/checkpoint_0004.pth.tar"
    make_images(data / "train", images=44)
    make_images(data / "val", images=5, seed=1)
    monkeypatch.chdir(tmp_path)
    stand_for = {"resnet18": ARCH, "FOLDER": str(data), "DATA": str(data), "CHECKPOINT": checkpoint, "OTHER": "random"}
    ran = []
    for name in ("pretraining", "evaluation"):
        for words in commands(ROOT / "docs" / f"{name}.md"):
            if {"FOLDER", "DATA", "CHECKPOINT"} & {*words} and not {
                "runs/synco/checkpoint_0199.pth.tar",
                "IMAGENET",
            } & {*words}:
                module, flags = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
                flags = [stand_for.get(word, word) for word in flags]
                if "--pretrained" in flags:  # not all the twenty or thirty epochs of an evaluation
                    flags[flags.index("--epochs") + 1] = "1"
                status, _, err = programs(module, "-j", 0, *flags)
                assert status == 0, f"{words}: {err}"
                ran.append(module)
    assert {"main_synco", "main_lincls", "main_semisup", "synco.knn", "synco.evaluate", "synco.look"} == {*ran}
    assert all((tmp_path / name).exists() for name in (checkpoint, "evaluation.json", "page.html", "runs/features"))


def test_the_model_as_a_library(monkeypatch):
    """The block of docs/export.md, with a smaller network in ResNet-50's place."""
    monkeypatch.setattr(torchvision.models, "resnet50", torchvision.models.resnet18)
    [text] = [text for _, text in blocks(ROOT / "docs" / "export.md") if "SynCo(" in text]
    found = {}
    exec(text, found)
    assert found["logits"].shape == (8, 1 + 65536 + 960) and found["labels"].shape == (8,)
    assert found["loss"].isfinite()
