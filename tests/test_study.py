"""The study: statistics and tables by hand, a small study for real, gradients by plain means."""

import json
import math
import re
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch

import ktr
from lab import gradients, report, stats, study
from lab.stats import detectable, holm, interval, p_value, quantile
from lab.study import outcome
from policy import plain_score, sample
from run.arguments import parse
from run.arguments import check_names

SECONDS = 0.5
REWARDS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0)


def hand_made(out, name, seed, accuracy, rewards=REWARDS):
    """A finished run of ten steps with this test accuracy."""
    run = study.folder_of(out, name, seed)
    (run / "after").mkdir(parents=True)
    rows = [{"step": i + 1, "reward": r, "accuracy": i / 10, "kl": 0.01 * i, "grad_norm": 1.0 * i,
             "key_share": 0.45, "seconds": SECONDS} for i, r in enumerate(rewards)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"strict": accuracy, "n": 100}
    scores = {"scores": {"all": both, "kind: order": both}}
    (run / "after" / "scores.json").write_text(json.dumps(scores))
    return run


# --------------------------------------------------------------------------------------- statistics
def test_quantiles_are_those_of_the_tables():
    """Student's t as printed tables have it, odd and even, small and large."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 19: 2.093, 20: 2.086,
               29: 2.045, 30: 2.042, 60: 2.000, 120: 1.980}
    for df, t in printed.items():
        assert quantile(0.975, df) == pytest.approx(t, abs=6e-4), df
    assert quantile(0.995, 4) == pytest.approx(4.604, abs=6e-4)
    assert quantile(0.8, 2) == pytest.approx(1.061, abs=6e-4)
    assert quantile(0.975, 10_000) == pytest.approx(1.960, abs=6e-4)        # the normal's


def test_probabilities_agree_with_the_density():
    """The finite sums against the density, integrated numerically."""
    for df in (1, 2, 5, 8, 31):
        x = torch.linspace(-1.7, 1.7, 20_001, dtype=torch.float64)
        log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
        density = math.exp(log_norm) * (1 + x ** 2 / df) ** (-(df + 1) / 2)
        assert stats.inside(1.7, df) == pytest.approx(torch.trapezoid(density, x).item(), rel=1e-6)


def test_interval_and_p_by_hand():
    half = 4.3027 * math.sqrt(13 / 3)                   # variance (9 + 1 + 16) / 2, over 3
    assert interval([2.0, 4.0, 9.0]) == (5.0, pytest.approx(half, rel=1e-4))
    assert interval([1.0, 1.0, 1.0, 1.0, 1.0]) == (1.0, 0.0)
    assert math.isnan(interval([3.0])[1])               # one seed says nothing about the others
    more = interval([0.0, 2.0] * 15)[1]
    assert more == pytest.approx(2.0452 * math.sqrt(30 / 29) / math.sqrt(30), rel=1e-4)
    # two pairs: t is Cauchy, P(|T| > t) = 1 - 2 atan(t) / pi; mean 2, error 1
    assert p_value([1.0, 3.0]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert p_value([1.0, 1.0]) == 0 and p_value([0.0, 0.0]) == 1 and math.isnan(p_value([1.0]))
    # where the mean is as far from 0 as its interval reaches, p is 5%
    values = [x - 5.0 + half for x in (2.0, 4.0, 9.0)]
    assert p_value(values) == pytest.approx(0.05, rel=1e-4)


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2 = 0.06, no less than the one before; 0.5."""
    p = {"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02}
    assert holm(p) == pytest.approx({"b": 0.04, "d": 0.06, "a": 0.06, "c": 0.5})
    assert holm({"a": 0.4, "b": 0.7}) == pytest.approx({"a": 0.8, "b": 0.8})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert all(math.isnan(x) for x in holm({"a": math.nan, "b": math.nan}).values())
    some = holm({"b": math.nan, "a": 0.001, "c": 0.002})    # what has too few pairs does not count
    assert math.isnan(some["b"]) and (some["a"], some["c"]) == (0.002, 0.002)


def test_the_detectable_difference_is_detected_as_often_as_it_says():
    """80% of simulated studies with ten seeds see it; at a corrected level it is larger."""
    draws = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(0))
    draws = 3 * draws + detectable(3.0, 10)
    t = draws.mean(1) / (draws.std(1) / math.sqrt(10))
    assert (t.abs() > quantile(0.975, 9)).float().mean().item() == pytest.approx(0.8, abs=0.012)
    assert detectable(3.0, 10, level=0.05 / 21) > 1.5 * detectable(3.0, 10)


# ------------------------------------------------------------------------------------------- table
def test_outcome_by_hand(tmp_path):
    got = outcome(hand_made(tmp_path, "GRPO", 0, 0.62))     # late: the last fifth, two of ten steps
    assert got.pop("kinds") == {"order": 62} and got.pop("curve") == list(range(0, 100, 10))
    assert got == pytest.approx({"accuracy": 62, "reward": 1.5, "learning": 45, "kl": 0.085,
                                 "grad": 8.5, "share": 45, "seconds": 10 * SECONDS})
    short = outcome(hand_made(tmp_path, "GRPO", 1, 0.62, rewards=(0.0, 3.0)))
    assert short["reward"] == 3                         # of fewer than five steps, the last
    assert short["curve"] == [0, 10]


def test_the_paired_table_by_hand(tmp_path, capsys):
    """Differences are taken seed by seed: their interval is far narrower than the accuracies'. A
    seed that the control has not, or the rule, makes no pair."""
    accuracies = {"GRPO": (0.50, 0.60, 0.70, 0.99), "visual": (0.54, 0.65, 0.73),
                  "VPPO": (0.50, 0.62, 0.73)}
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            hand_made(tmp_path, name, seed, value)
    a = Namespace(out=str(tmp_path), seeds=9)
    runs = study.collect(dict.fromkeys([*accuracies, "PAPO"], ""), a)
    assert {name: list(seeds) for name, seeds in runs.items()} == {
        name: [str(seed) for seed in range(len(values))] for name, values in accuracies.items()}
    study.print_tables(runs, ["GRPO", "random 45%"])
    printed = capsys.readouterr().out

    def expected(mean, variance):
        return pytest.approx((mean, 4.3027 * math.sqrt(variance / 3)), rel=1e-4)
    assert f"64.0 +- {4.3027 * math.sqrt(91 / 3):.1f}" in printed
    assert "minus GRPO" in printed and "minus random 45%" not in printed
    found, note = study.compare(runs, ["visual", "VPPO"], "GRPO", "accuracy")
    mine, other = found["visual"], found["VPPO"]
    assert (mine["mean"], mine["half"]) == expected(4, 1)           # 4, 5, 3
    assert (other["mean"], other["half"]) == expected(5 / 3, 7 / 3)         # 0, 2, 3
    assert mine["pairs"] == 3
    # with two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t^2); two main rules meet GRPO
    t = [4 * math.sqrt(3), 5 / 3 / math.sqrt(7 / 9)]
    p = [1 - x / math.sqrt(2 + x * x) for x in t]
    assert mine["p"] == pytest.approx(2 * p[0]) and other["p"] == pytest.approx(p[1])
    same, _ = study.compare(runs, ["visual", "VPPO"], "GRPO", "learning")
    assert same["VPPO"]["p"] == 1
    line = [x for x in printed.splitlines() if x.startswith("visual")][1]
    assert line.split()[:8] == ["visual", "3", "+4.0", "+-", "2.5", "p", f"{2 * p[0]:.3f}", "+0.0"]
    # median deviation of the two differences from GRPO: of sqrt 7/3 and 1
    noise = (math.sqrt(7 / 3) + 1) / 2
    alone, among = detectable(noise, 3), detectable(noise, 3, 0.025)
    assert f"{alone:.1f} points alone, {among:.1f} among 2" in note and note in printed
    assert "Holm" in printed


def test_one_seed_has_a_table_without_intervals(tmp_path, capsys):
    for name in ("GRPO", "visual"):
        hand_made(tmp_path, name, 0, 0.5)
    a = Namespace(out=str(tmp_path), seeds=1)
    runs = study.collect({"GRPO": "", "visual": ""}, a)
    row = study.compare(runs, ["visual"], "GRPO", "accuracy")[0]["visual"]
    study.print_tables(runs, ["GRPO"])
    assert row["mean"] == 0 and math.isnan(row["half"]) and row["pairs"] == 1
    assert "power" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- runs
def run_study(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    return study.main()


def test_a_small_study_for_real(checkpoint_folder, world, tmp_path, monkeypatch, capsys):
    """Your own rule is trained and tested; what was there is left alone; a rerun does nothing."""
    options = "--signals random --ratio 0.3 --G 4"
    for seed in range(2):
        hand_made(tmp_path, "GRPO", seed, 0.25, rewards=(0.0, 1.0))
    hand_made(tmp_path, "mine", 0, 0.5, rewards=(0.0, 1.0))
    command = ["--only", "GRPO", "--add", f"mine={options}", "--seeds", 2, "--steps", 2,
               "--max_new_tokens", 8,
               "--world", world, "--model", checkpoint_folder, "--out", tmp_path]
    kept = [tmp_path / "GRPO" / "seed-0" / "log.jsonl", tmp_path / "mine" / "seed-0" / "log.jsonl"]
    times = [path.stat().st_mtime_ns for path in kept]
    run_study(monkeypatch, *command, "--jobs", 2)
    run = tmp_path / "mine" / "seed-1"
    found = json.loads((run / "options.json").read_text())
    names = ("signals", "ratio", "seed", "lr", "max_steps")
    assert [found[name] for name in names] == [["random"], 0.3, 1, 7e-5, 2]
    log = study.read_log(run)
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["prompts"] == 8 and 0.3 <= row["key_share"] < 0.36 for row in log)
    assert json.loads((run / "after" / "scores.json").read_text())["scores"]["all"]["n"] == 24
    saved = json.loads((tmp_path / "study.json").read_text())
    assert set(saved["runs"]) == {"GRPO", "mine"} and saved["variants"]["mine"] == options
    assert saved["runs"]["mine"]["1"] == outcome(run)
    assert saved["runs"]["GRPO"]["1"]["accuracy"] == 25
    assert [path.stat().st_mtime_ns for path in kept] == times

    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: pytest.fail(f"started: {a}"))
    capsys.readouterr()
    run_study(monkeypatch, *command)
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == saved["runs"]
    printed = capsys.readouterr().out
    run_study(monkeypatch, "--table", tmp_path / "study.json")
    again = capsys.readouterr().out
    assert printed.startswith(again) and "minus GRPO" in again          # then come the curves
    with pytest.raises(RuntimeError, match="seed-1 holds a run under other options"):
        run_study(monkeypatch, *command, "--steps", 3)


RULE = """import torch
from attribution import WEIGHTS

OPTIONS = "--signals entropy --weighting late --G 4 --max_new_tokens 8"


def late(r, o):
    return torch.arange(float(r.logp.shape[1])).expand_as(r.logp) * r.group.completion_mask


WEIGHTS["late"] = late
"""


def test_a_rule_in_a_file_meets_its_controls(checkpoint_folder, world, tmp_path, monkeypatch,
                                             capsys):
    """Once it is trained (see below): tabled, its tokens looked at."""
    monkeypatch.setattr(study, "page", partial(study.page, questions=2))
    monkeypatch.setattr(study, "try_one_step", lambda *_: None)
    monkeypatch.setattr(ktr, "accuracy_reward", lambda text, *_: float(len(text) % 3))
    for seed, rewards in enumerate([(0.0, 1.0), (1.0, 4.0), (2.0, 1.0)]):
        hand_made(tmp_path, "GRPO", seed, 0.25, rewards)
        hand_made(tmp_path, "late", seed, 0.5, rewards=(2.0, 2.0))
    (tmp_path / "late" / "seed-0" / "final").symlink_to(checkpoint_folder)
    file = tmp_path / "late.py"
    file.write_text(RULE)
    command = ["--rule", file, "--only", "GRPO", "--seeds", 3, "--steps", 2, "--world", world,
               "--model", checkpoint_folder, "--out", tmp_path, "--max_new_tokens", 8]
    run_study(monkeypatch, *command)
    printed = capsys.readouterr().out
    assert "passes a step, the reference's apart: 1 sampling, 1 with gradient" in printed
    lines = [line for line in printed.splitlines() if line.startswith("late ")]
    measures, table, words, gradient = lines
    assert "45%" in measures and "p" in table.split()
    assert "%" in words and "norm: key tokens" in gradient
    run = tmp_path / "late" / "seed-0"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for completion in (c for row in rows for c in row["completions"]):
        weights, n = completion["signals"]["late"], len(completion["tokens"])
        assert weights == list(range(n)) and set(completion["signals"]) >= {"visual", "entropy"}
    page = (tmp_path / "late.html").read_text()
    content = json.loads(re.search(r'id="data">(.*)</script>', page)[1])
    shown = {run["name"]: run for run in content["runs"]}
    assert list(shown) == ["late (3)", "GRPO (3)"]
    assert shown["late (3)"]["log"]["reward"] == [2.0, 2.0]
    grpo = shown["GRPO (3)"]
    assert grpo["log"]["reward"] == [1.0, 2.0]                          # means of three seeds
    t = quantile(0.975, 2)                              # deviations 1 and sqrt 3, over sqrt 3
    lower, upper = grpo["band"]["reward"]
    assert lower == [report.number(1 - t / math.sqrt(3)), report.number(2 - t)]
    assert upper == [report.number(1 + t / math.sqrt(3)), report.number(2 + t)]
    assert any(note.startswith("curves are means over seeds") for note in content["notes"])


def test_a_rule_that_has_changed_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: started.append(command) or
                        Namespace(returncode=0))
    file = tmp_path / "late.py"
    a = Namespace(out=str(tmp_path), model="m", world="w", steps=2, max_new_tokens=8)
    for text in (RULE, RULE, RULE + "# another"):
        file.write_text(text)
        if text != RULE:
            with pytest.raises(RuntimeError, match="another text of its rule"):
                study.train_and_test("late", 0, f"--rule {file}", a)
        else:
            study.train_and_test("late", 0, f"--rule {file}", a)
    assert len(started) == 4 and str(file) in started[0]


def test_an_error_in_a_rules_file_ends_the_study_in_one_line(checkpoint_folder, world, tmp_path,
                                                             monkeypatch):
    file = tmp_path / "late.py"
    file.write_text(RULE.replace(".expand_as(r.logp) * r.group.completion_mask", ""))
    with pytest.raises(SystemExit) as stop:
        run_study(monkeypatch, "--rule", file, "--world", world, "--model", checkpoint_folder,
                  "--out", tmp_path)
    assert str(stop.value).startswith("error: weighting late: expected a tensor of shape (4, ")
    assert "\n" not in str(stop.value) and not (tmp_path / "late").exists()


def test_a_rules_traceback_is_told_with_its_place(checkpoint_folder, world, tmp_path, monkeypatch):
    file = tmp_path / "late.py"
    file.write_text(RULE.replace("r.logp", "r.lgp"))
    with pytest.raises(SystemExit, match=r"AttributeError: .*lgp.*\non rank 0 in step 1, with"):
        run_study(monkeypatch, "--rule", file, "--world", world, "--model", checkpoint_folder,
                  "--out", tmp_path)


def test_a_rules_file_that_selects_nothing_is_refused(world, tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(RULE.replace("OPTIONS", "OPTION"))
    with pytest.raises(SystemExit, match="late.py has no OPTIONS: nothing selects"):
        run_study(monkeypatch, "--rule", tmp_path / "late.py", "--world", world)


def test_a_failing_run_is_named_with_what_it_printed(world, tmp_path, monkeypatch):
    def broken(command, **_):
        return Namespace(returncode=1, stdout="", stderr="error: something")
    monkeypatch.setattr(study.subprocess, "run", broken)
    hand_made(tmp_path, "GRPO", 0, 0.5)
    told = r"(?s)mine, seed 0: .*ktr.py.*--signals mine.*error: something"
    with pytest.raises(RuntimeError, match=told):
        run_study(monkeypatch, "--only", "GRPO", "--add", "mine=--signals mine", "--seeds", 1,
                  "--world", world, "--out", tmp_path)


@pytest.mark.parametrize("wrong", [["--only", "GRPOO"], ["--add", "mine"], ["--seeds", "0"],
                                   ["--minutes", "-1"]])
def test_wrong_options_are_refused(wrong, monkeypatch):
    with pytest.raises(SystemExit):
        run_study(monkeypatch, *wrong)


def test_a_run_that_the_time_ends_leaves_no_score(tmp_path, monkeypatch, world):
    """It is repeated by the next call; after the limit nothing is begun."""
    seen = []

    def endless(command, timeout, **_):
        seen.append(timeout)
        raise study.subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(study.subprocess, "run", endless)
    hand_made(tmp_path, "GRPO", 0, 0.5)
    command = ["--only", "GRPO", "--seeds", 2, "--world", world, "--out", tmp_path, "--jobs", 1]
    run_study(monkeypatch, *command, "--minutes", 0.5)
    assert len(seen) == 1 and 0 < seen[0] <= 30
    assert list(json.loads((tmp_path / "study.json").read_text())["runs"]["GRPO"]) == ["0"]


def test_every_variant_is_a_valid_command_line():
    for name, options in study.VARIANTS.items():
        o = parse(["--model", "m", "--data", "d", *study.shlex.split(options)])
        check_names(o)
        all_three = [signal.split("_")[0] for signal in o.signals]
        assert (all_three == ["visual", "temporal", "entropy"]) == name.startswith(
            ("Video-KTR", "KTR")), name


# ---------------------------------------------------------------------------------------- gradients
def test_gradients_of_the_parts_make_the_whole(checkpoint_folder, tiny, plain, world, monkeypatch):
    """One question: |key| cos(key) + |other| cos(other) is the norm of the whole gradient, which
    the plain model gives too."""
    monkeypatch.setattr(ktr, "accuracy_reward", lambda text, *_: float(len(text) % 3))
    monkeypatch.setattr(ktr, "format_reward", lambda *_: 0.0)
    seen = []

    def short(model, prompts, G, limit, seeds, **how):
        seen.extend([*prompts, *sample(model, prompts, G, 12, seeds=seeds)])
        return seen[1:]
    monkeypatch.setattr(ktr, "sample", short)
    got = gradients.gradient_analysis(str(checkpoint_folder), str(world), questions=1, G=4)

    prompt, group = seen
    assert prompt.kind == "video"
    rows = [ids[:n] for ids, n in zip(group.ids, group.lengths)]
    texts = [tiny[1].tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    rewards = torch.tensor([float(len(text) % 3) for text in texts])
    assert rewards.std() > 0                            # or the question tells nothing
    losses = []
    for row, advantage in zip(rows, (rewards - rewards.mean()) / (rewards.std() + 1e-4)):
        logp = plain_score(plain, prompt, row[None])[0][0]
        losses.append(-advantage * logp.mean())
    last = list(plain.model.language_model.layers[-1].parameters())
    parts = torch.autograd.grad(sum(losses), last)
    whole = torch.cat([g.flatten() for g in parts]).norm().item()
    for rule, row in got["gradients"].items():
        assert row["key"] > 0 and row["other"] > 0
        found = row["key"] * row["cosine key"] + row["other"] * row["cosine other"]
        assert found == pytest.approx(whole, rel=1e-3), rule
    assert got["gradients"]["Video-KTR"] != got["gradients"]["random 45%"]
    variance = torch.stack(losses).var().item()
    assert got["loss variance"]["GRPO"] == pytest.approx(variance, rel=1e-3)


def test_a_checkpoint_without_a_gradient_is_told(checkpoint_folder, world, monkeypatch):
    monkeypatch.setattr(ktr, "accuracy_reward", lambda *_: 0.0)
    monkeypatch.setattr(ktr, "format_reward", lambda *_: 0.0)
    with pytest.raises(SystemExit, match="in all 1 groups the completions earn alike"):
        gradients.gradient_analysis(str(checkpoint_folder), str(world), questions=1, G=2)
