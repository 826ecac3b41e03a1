"""The rules of the house that a reader relies on: imports run one way, and settings are not written after parsing."""

import ast
import re

from conftest import ROOT

PACKAGE = {path.stem: path.read_text() for path in (ROOT / "synco").glob("*.py")}


def imports(source):
    """The modules of the package that a module's own top level imports."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == "synco":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("synco."):
            found.add(node.module.removeprefix("synco."))
    return found


def test_imports_run_one_way():
    """Every module can be put after all that it imports."""
    waiting, placed = {name: imports(source) for name, source in PACKAGE.items()}, set()
    while ready := [name for name, needs in waiting.items() if needs <= placed]:
        placed |= set(ready)
        for name in ready:
            del waiting[name]
    assert not waiting, f"in a circle: {waiting}"
    assert not imports(PACKAGE["negatives"]) and not imports(PACKAGE["errors"])
    assert imports(PACKAGE["files"]) == {"errors"}


def test_settings_are_not_written_after_parsing():
    scripts = {path.stem: path.read_text() for path in ROOT.glob("main_*.py")}
    written = re.compile(r"\bargs\.\w+(, args\.\w+)* [|+-]?= |setattr\(args", re.ASCII)
    found = {name: written.findall(source) for name, source in (PACKAGE | scripts).items() if name not in ("plot",)}
    assert not any(found.values()), found
