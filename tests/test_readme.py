"""What the README shows is true: its own rule runs, the names it gives exist, every metric and file is explained."""

import importlib
import json
import re

import pytest
from conftest import ROOT

import attribution
import ktr
from run.logs import METRICS, PHASES
from run.options import Options, parse

README = (ROOT / "README.md").read_text()


def test_your_own_rule(checkpoint_folder, world, tmp_path, monkeypatch):
    (rule,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "SIGNALS[" in block)
    assert len([line for line in rule.splitlines() if line.strip()]) <= 10
    monkeypatch.setattr(attribution, "SIGNALS", dict(attribution.SIGNALS))
    exec(rule, {**vars(attribution)})
    options = re.search(r"train with `--signals (.*?)`", README).group(1).split()
    monkeypatch.setattr("run.options.SIGNALS", attribution.SIGNALS)
    ktr.main(parse(["--model", str(checkpoint_folder), "--data", str(world / "train.json"), "--out", str(tmp_path), "--dtype", "float32",
                    "--max_new_tokens", "12", "--G", "4", "--workers", "0", "--no_checkpointing", "--max_steps", "3",
                    "--prompts_per_step", "2", "--signals", *options]))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0.2 <= row["share_entropy"] < 0.3 for row in log) and any(0.2 <= row["share_frozen"] < 0.3 for row in log)


def test_names_in_the_paper_to_code_table_exist():
    names = re.findall(r"`(\w+)\.(\w+)`", README[README.index("## Paper to code"):README.index("## Where the paper")])
    names = [(module, name) for module, name in names if name != "py"]
    assert len(names) > 10
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_options_and_their_choices_exist():
    table = README[README.index("## Where the paper"):README.index("## What the log says")].replace("\\|", "|")
    fields = Options.__dataclass_fields__
    for name, choices in re.findall(r"`--(\w+) ([\w|]+)`", table):
        choices = choices.split("|")
        if len(choices) > 1:
            assert choices == fields[name].metadata["choices"], name
    for name in re.findall(r"`--(\w+)", table):
        assert name in fields, name


def test_every_metric_is_explained():
    table = README[README.index("## What the log says"):README.index("## Speed")]
    for name in (*METRICS, "grad_norm", "lr", "prompts", "skipped", "tokens_per_second", "memory_gib", "seconds"):
        assert re.search(rf"\| [\w, ]*\b{name}\b[\w, ]*\|", table), name
    assert "data" in PHASES and "seconds_PHASE" in table


@pytest.mark.parametrize("pattern", ["*.py", "*.sh"])
def test_every_file_is_in_the_tree(pattern):
    tree = README[README.index("## Files"):README.index("## Evaluation")]
    assert [path.name for path in ROOT.glob(pattern) if path.name not in tree] == []
