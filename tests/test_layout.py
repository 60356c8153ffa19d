"""The house: imports point one way, lines and main stay short, the budgets hold."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDERS = ("engine", "run", "lab")
WIDEST = 100
ORDER = [                   # each line may import those above it, and its own
    {"engine", "lab.blank", "grpo", "rewards", "options", "rollout"},
    {"prompt"},
    {"records"},
    {"data"},
    {"policy", "attribution"},
    {"run", "lab.grading", "lab.protocols", "lab.predictions", "lab.scores"},
    {"ktr", "evaluate"},
    {"lab"},
]
ALONE = {"attribution": {"options", "prompt", "rollout"}, "grpo": set(), "rewards": set(),
         "options": set(), "rollout": {"prompt"}}       # for types only
PATH = ("ktr", "attribution", "grpo", "rewards", "policy", "prompt", "data", "options", "rollout")
LIMITS = {"ktr": 230, "attribution": 210}


def files_of(*groups):
    found = []
    for group in groups:
        folder = ROOT if group == "top" else ROOT / group
        found += sorted(folder.glob("*.py"))
    return found


def name_of(path):
    """run/logs.py -> run.logs"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def level_of(name):
    """By its own name, or its folder's."""
    return next(i for part in (name, name.split(".")[0])
                for i, names in enumerate(ORDER) if part in names)


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
    assert {"run.training", "run.logs", "attribution", "policy"} <= GRAPH["ktr"]
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    wrong = {other for other in GRAPH[name] if level_of(other) > level_of(name)
             and other not in ALONE.get(name, ())}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"
    assert name not in ALONE or GRAPH[name] <= ALONE[name]


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


def lines_of(*paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_heart_is_small():
    """ktr.py and attribution.py, and all that a reader of the method opens."""
    for name, most in LIMITS.items():
        assert lines_of(MODULES[name]) <= most, name
    sizes = {name: lines_of(MODULES[name]) for name in PATH}
    assert sum(sizes.values()) <= 1500, sizes


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


def test_the_program_does_not_grow():
    """wc -l, docstrings and blank lines too; without lab, bench and tests."""
    assert lines_of(*files_of("top", "engine", "run")) <= 4300


def test_ruff_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise",
                           ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


DROP_IN = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("transformers", "decord", "av"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
"""


def test_the_heart_needs_torch_alone():
    """README's example, on tensors of one's own, without transformers and decord."""
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"## In your own trainer\n.*?```python\n(.*?)```", readme, re.S)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12 and "from grpo import" in example
    check = "assert (logp.grad != 0).equal(key_mask) and 0.2 < key_mask.float().mean() < 0.6"
    done = subprocess.run([sys.executable, "-c", DROP_IN + example + check], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
