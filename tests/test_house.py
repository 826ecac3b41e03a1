"""The rules of the house: imports run one way, settings are not written after parsing, what is public is typed, and
nothing is too long.
"""

import ast
import re

from conftest import ROOT

PACKAGE = {path.stem: path.read_text() for path in (ROOT / "synco").glob("*.py")}
SCRIPTS = {path.stem: path.read_text() for path in ROOT.glob("main_*.py")}
BESIDE = {
    str(path.relative_to(ROOT).with_suffix("")): path.read_text()
    for pattern in ("benchmarks/*.py", "benchmarks/*/*.py", "detection/*.py", "hubconf.py")
    for path in ROOT.glob(pattern)
}


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
    written = re.compile(r"\bargs\.\w+(, args\.\w+)* [|+-]?= |setattr\(args", re.ASCII)
    found = {name: written.findall(source) for name, source in (PACKAGE | SCRIPTS).items() if name not in ("plot",)}
    assert not any(found.values()), found


def test_no_module_holds_state():
    """What stands at a module's top level is a constant, but for the warnings heard: signals are the process's."""
    found = []
    for module, source in PACKAGE.items():
        nodes = list(ast.walk(tree := ast.parse(source)))
        found += [f"{module}: global {', '.join(node.names)}" for node in nodes if isinstance(node, ast.Global)]
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [name for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]
            if isinstance(getattr(node, "value", None), (ast.List, ast.Dict, ast.Set, ast.Call)):
                found += [f"{module}.{name.id}" for name in names if not name.id.lstrip("_").isupper()]
    assert found == ["signals._heard"]


def functions(source):
    """(name, node) of each function; names as in `__qualname__`, such as "Run.log" and "launch.<locals>.status"."""

    def within(node, place):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield place + child.name, child
                yield from within(child, f"{place}{child.name}.<locals>.")
            else:
                yield from within(child, f"{place}{child.name}." if isinstance(child, ast.ClassDef) else place)

    return within(ast.parse(source), "")


def arguments(node):
    """(those that can be given by their place, the others) of a function, without self and cls."""
    given = node.args
    placed = [argument for argument in given.posonlyargs + given.args if argument.arg not in ("self", "cls")]
    return placed, [argument for argument in (given.vararg, *given.kwonlyargs, given.kwarg) if argument]


def untyped(source):
    """The public signatures that lack types, each with what has none; __init__ and its like are public."""
    for name, node in functions(source):
        if "<locals>" in name or any(part.startswith("_") and not part.endswith("__") for part in name.split(".")):
            continue
        placed, others = arguments(node)
        missing = [argument.arg for argument in placed + others if argument.annotation is None]
        missing += ["the result"] * (node.returns is None)
        if missing:
            yield f"{name}: {', '.join(missing)}"


def test_public_signatures_are_typed():
    sample = """
class Open:
    def __init__(self, x, *rest: int, y=1, **more): pass
    def _own(self, x): pass
class _Closed:
    def f(self, x): pass
def g(x: int):
    def h(x): pass
"""
    assert list(untyped(sample)) == ["Open.__init__: x, y, more, the result", "g: the result"]
    sources = PACKAGE | SCRIPTS
    del sources["negatives"]  # formulas: dtypes and shapes are in their docstrings, as they are of `shuffle`
    found = [f"{module}.{line}" for module, source in sources.items() for line in untyped(source)]
    assert found == ["distributed.shuffle: x, permutation, the result"]


def lines(node):
    return node.end_lineno - node.lineno + 1


def test_no_file_function_loop_or_list_of_arguments_is_too_long():
    limits = dict.fromkeys(PACKAGE, 400) | {"main_synco": 330, "main_lincls": 150, "main_semisup": 150}
    long = [name for name, source in (PACKAGE | SCRIPTS).items() if source.count("\n") > limits[name]]
    assert long in ([], ["plot"])
    loops, bodies, signatures = [], [], []
    for module, source in (PACKAGE | SCRIPTS | BESIDE).items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.For, ast.While)) and lines(node) > 60:
                loops.append(f"{module}: line {node.lineno}")
        for name, node in functions(source):
            if lines(node) > 60 and name not in ("parse", "flags"):  # a line for each flag
                bodies.append(f"{module}.{name}")
            if len(arguments(node)[0]) > 6:
                signatures.append(f"{module}.{name}")
    assert not loops
    assert bodies == ["builder.SynCo.__init__"]  # a model's settings, one a line
    assert signatures == ["builder._Logits.forward"]  # autograd's own protocol has no keywords
