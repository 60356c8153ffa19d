"""What README and docs show is true: the rule runs, names exist, metrics are explained."""

import importlib
import re

from conftest import ROOT
from test_ktr import arguments, log_of

import ktr
from options import Options
from run.arguments import parse
from run.logs import METRICS, PHASES

README = (ROOT / "README.md").read_text()
CHOICES = (ROOT / "docs/choices.md").read_text().replace("\\|", "|")
RUNNING = (ROOT / "docs/running.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_your_own_rule(checkpoint_folder, world, tmp_path):
    """The rule of the README, in a file of its own, trains."""
    text = section("Your own rule")
    (rule,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in rule.splitlines() if line.strip()]) <= 10
    name = re.search(r"--rule (\S+?)`", text).group(1)
    (tmp_path / name).write_text(rule)
    more = ["--max_steps", "3", "--prompts_per_step", "2", "--rule", tmp_path / name]
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, *more)))
    log = log_of(tmp_path)
    assert all(0.2 <= row["share_entropy"] < 0.3 for row in log)
    assert any(0.2 <= row["share_frozen"] < 0.3 for row in log)     # a step of images has none


def test_names_in_the_table_of_the_method_exist():
    names = re.findall(r"`(\w+)\.(\w+)`", section("The method in the code"))
    names = [(module, name) for module, name in names if name not in ("py", "sh")]
    assert len(names) > 12
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_options_and_their_choices_exist():
    fields, seen = Options.__dataclass_fields__, set()
    for name, choices in re.findall(r"`--(\w+)(?: ([\w|]+))?", CHOICES):
        assert name in fields, name
        seen.add(name)
        if "|" in choices:
            known = fields[name].metadata["choices"]
            assert choices.split("|") == known, name
    assert len(seen) > 12


def test_every_choice_of_the_presets_has_its_row():
    from options import PRESETS
    for name in PRESETS["released"]:
        assert f"`--{name}" in CHOICES, name


def test_every_metric_is_explained():
    logged = ("grad_norm", "lr", "prompts", "skipped", "tokens_per_second", "memory_gib", "seconds")
    for name in (*METRICS, *logged):
        assert re.search(rf"\| [\w, ]*\b{name}\b[\w, ]*\|", RUNNING), name
    assert "data" in PHASES and "seconds_PHASE" in RUNNING


def test_every_file_and_folder_is_in_the_tree():
    tree = section("Files")
    there = [path.name for pattern in ("*.py", "*.sh") for path in ROOT.glob(pattern)]
    there += [f"{path.name}/" for path in ROOT.iterdir() if (path / "..").exists()
              and path.is_dir() and list(path.glob("*.py")) and not path.name.startswith(".")]
    assert [name for name in there if name not in tree] == []


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 190 and len(README.split()) <= 1700
