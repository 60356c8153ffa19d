"""Options: choices that exist, values that are allowed, and one line for all others."""

import pytest

from engine.weights import parts_of
from options import GONE, LIMITS, MAY_CHANGE, PARTS, PRESETS, Options
from run.arguments import check_names, parse

BASE = ["--model", "m", "--data", "folder/d.json"]


def test_presets_and_single_options():
    for name, values in PRESETS.items():
        o = parse([*BASE, "--preset", name])
        assert all(getattr(o, key) == value for key, value in values.items())
    assert PRESETS["paper"] == {}               # the defaults
    more = ["--preset", "released", "--shift", "abs", "--signals", "visual", "random"]
    o = parse([*BASE, *more])
    assert o.shift == "abs" and o.normalize == "selected" and o.signals == ["visual", "random"]
    o = parse(BASE)
    assert o.lr == 2e-6 and o.ratio == 0.2 and o.beta == 0.04 and o.videos == "folder"


def test_the_paper_is_the_default():
    assert parse(BASE) == Options(model="m", data="folder/d.json", videos="folder")


def test_what_options_name_is_registered(tiny):
    """Options cannot import what they name (imports point one way)."""
    check_names(Options())
    assert list(parts_of(tiny[0])) == list(PARTS)


def test_lists_of_names_name_options():
    fields = Options.__dataclass_fields__
    limited = {f.name for f, *_ in LIMITS}
    assert limited < set(fields) and set(MAY_CHANGE) <= set(fields)
    assert {name for name, f in fields.items() if f.type in (int, float)} == limited
    assert not set(GONE) & set(fields)


def refusal(capsys, *arguments):
    """The one line that ends the program."""
    with pytest.raises(SystemExit) as stop:
        parse([*BASE, *arguments])
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert len(usage) == 1 and usage[0].startswith("usage: ktr.py")
    return line


@pytest.mark.parametrize("bad", [
    ["--ratoi", "0.1"], ["--rati", "0.1"], ["--shift", "relative"], ["--preset", "theirs"],
    ["--lr", "fast"]])
def test_misspelt_options_fail(bad, capsys):
    line = refusal(capsys, *bad)
    assert "error" in line and bad[0] in line


@pytest.mark.parametrize("arguments, says", [
    (["--signal", "visual"], "did you mean --signals?"), (["--rati", "0.1"], "mean --ratio?"),
    (["--signals", "visual,temporal"], "--signals are separated by spaces, not by commas"),
    (["--ratio", "0.2", "0.3"], "--ratio is one for all"),
    (["--masking", "zero"], "--masking is gone: --rule lab/rules/masking.py"),
    (["--bonus", "t_grpo"], "--bonus is gone: --extra_reward"),
])
def test_what_was_probably_meant_is_told(arguments, says, capsys):
    assert says in refusal(capsys, *arguments)


@pytest.mark.parametrize("name, value, allowed", [
    ("top_p", "0", "above 0"), ("top_p", "1.5", "at most 1"), ("top_p", "nan", "above 0"),
    ("temperature", "-1", "above 0"), ("temperature", "0", "above 0"),
    ("temperature", "inf", "above 0"), ("prompts_per_step", "0", "above 0"),
    ("G", "0", "2 or more"), ("G", "1", "2 or more"), ("keep", "0", "above 0"),
    ("max_new_tokens", "0", "above 0"), ("lr", "nan", "above 0"), ("lr", "0", "above 0"),
    ("beta", "-0.1", "0 or more"), ("beta", "inf", "0 or more"), ("ratio", "1.1", "at most 1"),
    ("ratio", "-0.1", "0 or more"), ("top_k", "-1", "0 or more"), ("epochs", "0", "above 0"),
    ("max_frames", "1", "2 or more"), ("sample_fps", "0", "above 0"),
    ("workers", "-1", "0 or more"), ("save_every", "-5", "0 or more"),
    ("weight_decay", "nan", "0 or more"), ("max_steps", "-1", "0 or more"),
    ("max_grad_norm", "0", "above 0"), ("clip", "0", "above 0"),
])
def test_a_bad_value_is_one_line_that_says_what_is_allowed(name, value, allowed, capsys):
    line = refusal(capsys, f"--{name}", value)
    told = line.split(f"--{name} must be ")[1].split(", not ")[0]
    assert allowed in told


@pytest.mark.parametrize("arguments, says", [
    (["--length_low", "600"], "--length_low 600 exceeds --length_high 512"),
    (["--freeze", "vision", "head"], "invalid choice: 'head'"),
    (["--freeze", "language", "vision", "projector"], "--freeze leaves nothing to train"),
    (["--shift", "blur"], "signed"),            # argparse lists the choices
    (["--data", ""], "--data is needed"), (["--model", ""], "--model is needed"),
])
def test_values_that_do_not_go_together(arguments, says, capsys):
    assert says in refusal(capsys, *arguments)


@pytest.mark.parametrize("arguments", [
    ["--top_p", "1", "--ratio", "0", "--temperature", "0.1", "--beta", "0", "--keep", "1"],
    ["--G", "2", "--length_low", "512", "--workers", "0", "--save_every", "0"],
    ["--freeze", "vision", "projector"],
])
def test_values_at_the_edge_are_allowed(arguments):
    parse([*BASE, *arguments])


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in said for name in Options.__dataclass_fields__)
    assert "20%)" in said and "20%%" not in said


def test_a_rules_preset_sets_its_choices(tmp_path, capsys):
    """It used to change the preset's name alone."""
    (tmp_path / "a.py").write_text('OPTIONS = "--preset released --pool response"')
    o = parse([*BASE, "--rule", str(tmp_path / "a.py"), "--shift", "abs"])
    assert (o.preset, o.normalize, o.top_k) == ("released", "selected", 50)
    assert (o.pool, o.shift) == ("response", "abs")
    (tmp_path / "c.py").write_text('OPTIONS = "--lr 0.5"')
    o = parse([*BASE, "--rule", str(tmp_path / "a.py"), str(tmp_path / "c.py")])
    assert (o.pool, o.lr) == ("response", 0.5)
    again = ["--rule", str(tmp_path / "a.py"), f"--rule={tmp_path / 'c.py'}"]
    assert parse([*BASE, *again]) == o
    (tmp_path / "d.py").write_text('OPTIONS = "--ratoi 0.1"')
    line = refusal(capsys, "--rule", str(tmp_path / "d.py"))
    assert f"{tmp_path}/d.py: OPTIONS: unrecognized arguments: --ratoi" in line
    for options in ("--rule another.py", "--rule=another.py"):
        (tmp_path / "b.py").write_text(f'OPTIONS = "{options}"')
        assert "another --rule" in refusal(capsys, "--rule", str(tmp_path / "b.py"))
    for slip in ('OPTIONS = ["--signals"]', "OPTIONS = \"--signals 'all\"", "{}['x']"):
        (tmp_path / "e.py").write_text(slip)
        with pytest.raises(SystemExit, match="error: --rule .*e.py: "):
            parse([*BASE, "--rule", str(tmp_path / "e.py")])
