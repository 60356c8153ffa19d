"""The house: imports point one way, lines and main stay short, the budgets hold."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("engine", "run", "lab")
WIDEST = 100
LONGEST_MAIN = 60
MAY_IMPORT = {
    "engine": {"engine", "run"},
    "run": {"engine", "run"},
    "top": {"top", "engine", "run"},
    "lab": {"lab", "top", "engine", "run"},
}


def files_of(*groups):
    found = []
    for group in groups:
        folder = ROOT if group == "top" else ROOT / group
        found += sorted(folder.glob("*.py"))
    return found


def name_of(path):
    """run/logs.py -> run.logs"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def group_of(name):
    folder = name.split(".")[0]
    return folder if folder in FOLDERS else "top"


MODULES = {name_of(path): path for path in files_of("top", *FOLDERS)}


def imported(path):
    """The project's modules that a file imports, wherever in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module, *inside]              # from run import checkpoint
        else:
            continue
        found.update(name for name in names if name in MODULES)
    return found


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def test_the_graph_is_seen():
    """Both ways of importing are understood, or the tests below show nothing."""
    assert {"run.checkpoint", "run.logs", "attribution", "policy"} <= GRAPH["ktr"]
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    wrong = {other for other in GRAPH[name] if group_of(other) not in MAY_IMPORT[group_of(name)]}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_no_imports_in_a_circle():
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


@pytest.mark.parametrize("groups", [("top", "engine", "run"), ("lab",), ("tests",)])
def test_lines_are_short(groups):
    wide = []
    for path in files_of(*groups):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDEST:
                wide.append(f"{path.relative_to(ROOT)}:{number}: {len(line)}")
    assert not wide, "\n".join(wide)


def test_main_fits_a_screen():
    tree = ast.parse((ROOT / "ktr.py").read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= LONGEST_MAIN


def test_every_module_says_what_it_owns():
    silent = [name for name, path in MODULES.items() if not ast.get_docstring(
        ast.parse(path.read_text()))]
    assert not silent


def test_nothing_catches_everything():
    """`except Exception` hides a fault; where it only adds a note, it must raise again."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or raises, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("groups, most", [(("top", "engine", "run"), 4428), (("lab",), 1564)])
def test_the_program_does_not_grow(groups, most):
    """wc -l, docstrings and blank lines too. Wanted are 2,200 and 1,300: lower these with it."""
    sizes = {path: len(Path(path).read_text().splitlines()) for path in files_of(*groups)}
    assert sum(sizes.values()) <= most, sizes
