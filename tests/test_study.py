"""The study: statistics and tables by hand, a small study for real, gradients by plain means."""

import json
import math
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

import ktr
from lab import findings, gradients, report, stats, study
from lab.findings import compare
from lab.stats import detectable, holm, interval, p_value, quantile
from lab.study import Run, Study, outcome
from policy import plain_score, sample
from run.arguments import check_names, parse

SECONDS = 0.5
LEARNT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MADE = {"commit": "abc", "machine": "m", "date": "today"}


def hand_made(out, rule, seed, accuracy, learnt=LEARNT, name="toy", commands=None):
    """A finished run of ten steps with this test accuracy."""
    run = study.folder_of(out, Run(name, rule, seed))
    (run / "after").mkdir(parents=True)
    rows = [{"step": i + 1, "reward": x, "accuracy": x, "kl": 0.01 * i, "grad_norm": 1.0 * i,
             "key_share": 0.45, "seconds": SECONDS} for i, x in enumerate(learnt)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "after" / "scores.json").write_text(json.dumps(scores_of(accuracy)))
    commands = commands or [["ktr.py", "--out", str(run)]]
    made = {"commands": commands, "rules": [], "made": MADE}
    (run / "study.json").write_text(json.dumps(made))
    return run


def scores_of(accuracy):
    both = {"strict": accuracy, "n": 100}
    return {"scores": {"all": both, "kind: order": both}}


def started(out, world="toy", accuracy=0.4):
    """The start's answers are there."""
    folder = out / "starts" / f"{world} tested" / "after"
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores_of(accuracy)))


def runs_of(out, **accuracies):
    """What a study's file holds of these accuracies, {rule: (seed 0's, seed 1's ..)}."""
    for rule, values in accuracies.items():
        for seed, value in enumerate(values):
            hand_made(out, rule, seed, value)
    started(out)
    variants = dict.fromkeys([*accuracies, "PAPO"], "")
    return study.collect(out, "toy", variants, dict.fromkeys(variants, 9))


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
    assert got == pytest.approx({"accuracy": 62, "learning": 45, "kl": 0.085, "grad": 8.5,
                                 "share": 45, "seconds": 10 * SECONDS})
    short = outcome(hand_made(tmp_path, "GRPO", 1, 0.62, learnt=(0.0, 0.3)))
    assert short["kl"] == 0.01 and short["curve"] == [0, 30]        # under five steps, the last


def test_the_paired_table_by_hand(tmp_path):
    """Differences are taken seed by seed: their interval is far narrower than the accuracies'. A
    seed that the control has not, or the rule, makes no pair."""
    found = runs_of(tmp_path, GRPO=(0.50, 0.60, 0.70, 0.99), visual=(0.54, 0.65, 0.73),
                    VPPO=(0.50, 0.62, 0.73))
    runs = found["runs"]
    assert {name: list(seeds) for name, seeds in runs.items()} == {
        "GRPO": ["0", "1", "2", "3"], "visual": ["0", "1", "2"], "VPPO": ["0", "1", "2"]}
    assert found["start"] == {"accuracy": 40, "kinds": {"order": 40}}
    assert found["made"] == [{**MADE, "runs": 10}]
    assert found["commands"] == ["python ktr.py --out OUT/toy/GRPO/seed-0"]

    def expected(mean, variance):
        return pytest.approx((mean, 4.3027 * math.sqrt(variance / 3)), rel=1e-4)
    pairs = [("visual", "GRPO"), ("VPPO", "GRPO"), ("PAPO", "GRPO")]
    rows, note = compare(runs, pairs)
    assert set(rows) == set(pairs[:2])
    mine, other = (rows[pair] for pair in pairs[:2])
    assert (mine["mean"], mine["half"]) == expected(4, 1)           # 4, 5, 3
    assert (other["mean"], other["half"]) == expected(5 / 3, 7 / 3)         # 0, 2, 3
    assert mine["pairs"] == 3
    # with two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t^2); two rules meet GRPO
    t = [4 * math.sqrt(3), 5 / 3 / math.sqrt(7 / 9)]
    p = [1 - x / math.sqrt(2 + x * x) for x in t]
    assert mine["p"] == pytest.approx(2 * p[0]) and other["p"] == pytest.approx(p[1])
    assert compare(runs, pairs, "learning")[0][pairs[1]]["p"] == 1
    # median deviation of the two differences from GRPO: of sqrt 7/3 and 1
    noise, largest = (math.sqrt(7 / 3) + 1) / 2, math.sqrt(7 / 3)
    assert note == (f"a pair deviates by {noise:.1f} (median; largest {largest:.1f}); 3 pairs find "
                    f"{detectable(noise, 3):.1f} alone, {detectable(noise, 3, 0.025):.1f} among 2 "
                    f"({detectable(largest, 3, 0.025):.1f} for the noisiest)")

    head, _, *lines = findings.table_of(found).splitlines()
    cells = [cell.strip() for cell in lines[1].split("|")[1:-1]]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "rule", "seeds", "tokens", "accuracy", "minus GRPO", "p", "learning", "minus GRPO", "p",
        "KL", "seconds"]
    assert cells[:3] + cells[4:6] == ["visual", "3", "45%", "+4.0 +- 2.5", f"{2 * p[0]:.3f}"]
    assert cells[3] == f"64.0 +- {4.3027 * math.sqrt(91 / 3):.1f}" and cells[7] == "+0.0 +- 0.0"
    assert f"accuracy minus GRPO: {note}." in lines[-1]
    kinds = findings.kinds_table(found, pairs[:1]).splitlines()
    assert [re.split(r" *\| *", line)[1:3] for line in kinds[2:]] == [
        ["the start", "40.0"], ["GRPO", "69.8 +- 33.6"], ["visual minus GRPO", "+4.0 +- 2.5"]]


def test_one_seed_has_a_table_without_intervals(tmp_path):
    found = runs_of(tmp_path, GRPO=(0.5,), visual=(0.5,))
    rows, note = compare(found["runs"], [("visual", "GRPO")])
    row = rows["visual", "GRPO"]
    assert row["mean"] == 0 and math.isnan(row["half"]) and row["pairs"] == 1 and note == ""
    assert "find" not in findings.table_of(found)


def test_a_claims_verdict():
    """By the interval: on which side of 0 does it lie?"""
    assert findings.verdict(2.0, 0.5, 2.3) == findings.verdict(-2.0, 0.5, -0.4) == "same sign"
    assert findings.verdict(-2.0, 0.5, 2.3) == "opposite sign"
    assert findings.verdict(0.2, 0.3, 2.3) == findings.verdict(1.0, 1.5, 2.3) == "not seen"
    assert findings.verdict(1.0, math.nan, 2.3) == "not seen"        # one pair


def test_an_answer_names_what_differs(tmp_path, monkeypatch):
    """Of three comparisons the one below 5%; of one, whatever it is."""
    runs = runs_of(tmp_path, GRPO=(0.5, 0.6, 0.7), visual=(0.56, 0.66, 0.76), VPPO=(0.5, 0.6, 0.7),
                   PAPO=(0.5, 0.62, 0.67))
    ask = {"all?": ("toy", 3, findings.minus_grpo(("visual", "VPPO", "PAPO"))),
           "one?": ("toy", 3, [("PAPO", "GRPO")]), "none?": ("long", 8, [("visual", "GRPO")])}
    monkeypatch.setattr(findings, "QUESTIONS", ask)
    lines = findings.answers_table({"toy": runs}).splitlines()
    told = [line.split("|")[3].strip() for line in lines]
    assert told[2] == ("visual minus GRPO +6.0 +- 0.0 (p <0.001, 3); no difference seen: 2 of 3")
    assert told[3].startswith("PAPO minus GRPO -0.3 +- ") and told[4] == "no runs yet"
    plan = findings.plan_table({"studies": {"toy": runs["runs"]}}).splitlines()
    noise = math.sqrt(19 / 3)                           # of 0, 2, -3
    assert f"a pair deviates by {noise:.1f}; 3 pairs find {detectable(noise, 3):.1f} " in plan[3]
    assert f"8 pairs find {0:.1f} " in plan[4]         # the toy's, where the world has none


def test_the_documents_hold_what_the_files_say():
    """Each block is the one that the command prints, and each interval of the prose is in one."""
    blocks = findings.blocks_of()
    printed = "\n".join(blocks.values())
    for name in findings.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert findings.renewed(text, blocks) == text, f"{name}: python -m lab.findings --write"
        prose = re.sub(r"<!-- [\w ]+ -->\n.*?<!-- end -->", "", text, flags=re.S)
        if name == "README.md":
            prose = prose.split("## What we found")[1].split("\n## ")[0]
        for interval_ in re.findall(r"\d+\.\d\s\+-\s\d+\.\d", prose):
            assert " ".join(interval_.split()) in printed, f"{name}: {interval_}"
    shown = re.findall(r"<!-- ([\w ]+) -->\n", (ROOT / "docs/results.md").read_text())
    used = [name for name in shown if name != "end"]
    assert len(used) == len(set(used)) and set(used) >= set(blocks) - {"long kinds"}


def test_a_block_is_renewed_and_nothing_else():
    text = "a\n<!-- toy -->\n| 1 |\n<!-- end -->\nb\n<!-- long -->\n<!-- end -->\n"
    assert findings.renewed(text, {"toy": "| 2 |"}) == (
        "a\n<!-- toy -->\n| 2 |\n<!-- end -->\nb\n<!-- long -->\nNo runs yet.\n<!-- end -->\n")


def test_curves_are_means_over_seeds(tmp_path, monkeypatch):
    """A panel for each study; of the toy's rules those that are looked at."""
    drawn = []
    monkeypatch.setattr(report, "plot", lambda *a: drawn.extend(a))
    hand_made(tmp_path, "GRPO", 1, 0.5, learnt=(0.2,) * 10)
    toy = runs_of(tmp_path / "more", GRPO=(0.5,), visual=(0.5,), VPPO=(0.5,))
    toy["runs"]["GRPO"]["1"] = outcome(study.folder_of(tmp_path, Run("toy", "GRPO", 1)))
    findings.draw({"toy": toy}, tmp_path / "study.html")
    lines, panels, _ = drawn
    assert panels == ["toy"] and [line["name"] for line in lines] == ["GRPO", "visual"]
    assert lines[0]["log"] == {"step": list(range(1, 11)), "toy": list(range(10, 60, 5))}


# -------------------------------------------------------------------------------------------- plan


def test_what_is_asked_is_planned():
    """Each question's pairs have the seeds that its power was computed for; claims have theirs."""
    for name, n, pairs in findings.QUESTIONS.values():
        seeds = study.STUDIES[name].seeds
        known = [pair for pair in pairs if set(pair) <= set(seeds)]
        assert min(seeds[rule] for pair in known for rule in pair) == n, name
        assert {rule for pair in pairs for rule in pair} <= set(seeds)
    for claim, _, name, rule, control in findings.CLAIMS:
        assert {rule, control} <= set(study.STUDIES[name].seeds), claim
    assert set(findings.ABLATIONS) <= set(study.VARIANTS)
    assert study.STUDIES["toy"].seeds["visual"] == 20 and set(study.STUDIES) == set(
        findings.LOOKED_AT)


def test_main_rules_come_first_then_seed_by_seed():
    runs = study.plan(["toy", "order", "demonstration"], None, None)
    first = [run for run in runs if study.STUDIES[run.study].seeds[run.rule] >= 10]
    assert runs[:len(first)] == first and first[0] == Run("demonstration", "GRPO", 0)
    last = [run for run in runs[len(first):] if run.rule in findings.ABLATIONS]
    assert last and runs[-len(last):] == last
    for part in (first, runs[len(first):-len(last)], last):
        assert [run.seed for run in part] == sorted(run.seed for run in part)
    assert len(runs) == len(set(runs)) and Run("toy", "visual", 19) in first
    assert study.plan(["toy"], ["GRPO"], 2) == [Run("toy", "GRPO", 0), Run("toy", "GRPO", 1)]


def test_the_demonstration_is_train_shs():
    """The rate, its warm-up and the steps that `bash train.sh` takes."""
    script = (ROOT / "train.sh").read_text()
    demonstration = study.STUDIES["demonstration"]
    assert demonstration.training == " ".join(re.search(
        r"(--lr \S+) (--warmup_steps \d+)", script).groups())
    assert "prompts_per_step $((8 / procs))" in script and demonstration.steps == 1600 // 8
    assert f"--max_new_tokens {demonstration.tokens} --prompts" in script


def test_every_variant_is_a_valid_command_line():
    for name, options in study.VARIANTS.items():
        o = parse(["--model", "m", "--data", "d", *study.shlex.split(options)])
        check_names(o)
        all_three = [signal.split("_")[0] for signal in o.signals]
        assert (all_three == ["visual", "temporal", "entropy"]) == name.startswith(
            ("Video-KTR", "KTR")), name


# -------------------------------------------------------------------------------------------- runs
def run_study(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    return study.main()


@pytest.fixture
def small(checkpoint_folder, world, tmp_path, monkeypatch):
    """A toy study of two steps on the tests' own world and checkpoint; its folder."""
    monkeypatch.setattr(study, "VARIANTS", {
        "GRPO": "--signals all", "mine": "--signals random --ratio 0.3 --G 4"})
    seeds = {"GRPO": 3, "mine": 2}
    monkeypatch.setattr(study, "STUDIES", {"toy": Study(seeds, tokens=8, steps=2)})
    monkeypatch.setattr(study, "CONTROLS", ("GRPO",))
    monkeypatch.setattr(study, "start_of", lambda out, name: checkpoint_folder)
    monkeypatch.setenv("COMMIT", "abc")
    study.made_here.cache_clear()
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds" / "toy").symlink_to(world)
    started(tmp_path)
    return tmp_path


def test_a_small_study_for_real(small, monkeypatch, capsys):
    """A rule is trained and tested; what was there is left alone; a rerun does nothing."""
    for seed in range(2):
        commands = study.commands_of(small, Run("toy", "GRPO", seed), "--signals all")
        hand_made(small, "GRPO", seed, 0.25, learnt=(0.0, 0.5), commands=commands)
    command = ["toy", "--seeds", 1, "--out", small]
    kept = small / "toy" / "GRPO" / "seed-0" / "log.jsonl"
    time = kept.stat().st_mtime_ns
    run_study(monkeypatch, *command, "--jobs", 2)
    run = small / "toy" / "mine" / "seed-0"
    found = json.loads((run / "options.json").read_text())
    names = ("signals", "ratio", "seed", "lr", "max_steps")
    assert [found[name] for name in names] == [["random"], 0.3, 0, 7e-5, 2]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["prompts"] == 8 and 0.3 <= row["key_share"] < 0.36 for row in log)
    assert study.scores_in(run)["all"]["n"] == 24
    saved = json.loads((small / "study_toy.json").read_text())
    assert saved["rules"] == study.VARIANTS
    assert saved["runs"]["mine"] == {"0": {**outcome(run), "made": 1}}
    assert saved["runs"]["GRPO"]["1"]["accuracy"] == 25         # finished, though not asked for
    here, *before = sorted(saved["made"], key=lambda made: made["runs"])
    assert before == [{**MADE, "runs": 2}] and here["commit"] == "abc" and here["runs"] == 1
    assert here["torch"] == torch.__version__ and "cores" in here["machine"]
    assert kept.stat().st_mtime_ns == time

    monkeypatch.setattr(study, "call", lambda *a: pytest.fail(f"started: {a}"))
    capsys.readouterr()
    run_study(monkeypatch, *command)
    assert json.loads((small / "study_toy.json").read_text()) == saved
    assert findings.table_of(saved) in capsys.readouterr().out
    for folder in ("toy", "starts"):                            # on another machine: the file alone
        shutil.rmtree(small / folder)
    run_study(monkeypatch, *command)
    assert json.loads((small / "study_toy.json").read_text()) == saved
    monkeypatch.setitem(study.VARIANTS, "mine", "--signals random")
    with pytest.raises(SystemExit, match="made under other options"):
        run_study(monkeypatch, *command)
    monkeypatch.setattr(study, "STUDIES", {"toy": Study({"GRPO": 2, "mine": 1}, steps=3)})
    with pytest.raises(SystemExit, match="made under other options"):
        run_study(monkeypatch, *command)
    (small / "study_toy.json").unlink()
    hand_made(small, "mine", 0, 0.5)
    started(small)
    with pytest.raises(RuntimeError, match="seed-0 holds a run under other options"):
        run_study(monkeypatch, *command, "--only", "mine")


def test_the_time_ends_a_command_gently(tmp_path):
    """SIGTERM, and time to save; nothing is begun after the limit. What fails is told."""
    script = ("import signal, sys, time; from pathlib import Path\n"
              "def save(*_): time.sleep(0.2); Path(sys.argv[1]).touch(); sys.exit(143)\n"
              "signal.signal(signal.SIGTERM, save); time.sleep(60)")
    with pytest.raises(TimeoutError):
        study.call(["-c", script, str(tmp_path / "saved")], study.time.monotonic() + 0.5)
    assert (tmp_path / "saved").exists()
    stubborn = script.replace("save(*_): time", "save(*_): time.sleep(60); time")
    with pytest.raises(TimeoutError):
        study.call(["-c", stubborn, str(tmp_path / "lost")], study.time.monotonic() + 0.5, 0.1)
    with pytest.raises(TimeoutError):
        study.train_and_test(tmp_path, Run("toy", "GRPO", 0), "", study.time.monotonic())
    assert not (tmp_path / "toy").exists()
    assert study.call(["-c", ""], math.inf) is None
    assert "ValueError: x" in study.call(["-c", "raise ValueError('x')"], math.inf)


def test_a_run_that_the_time_ended_is_continued(small, monkeypatch):
    """It has no score; the next call gives the same command, and only the test where training is
    done. Others' scores are kept."""
    seen = []

    def ended(command, until):
        seen.append(command[0])
        raise TimeoutError
    monkeypatch.setattr(study, "call", ended)
    asked = study.commands_of(small, Run("toy", "GRPO", 0), "--signals all")
    hand_made(small, "GRPO", 0, 0.5, commands=asked)
    command = ["--out", small, "--jobs", 1, "--only", "mine", "--seeds", 1]
    run_study(monkeypatch, *command, "--minutes", 0.5)
    assert seen == ["ktr.py"]
    assert list(json.loads((small / "study_toy.json").read_text())["runs"]) == ["GRPO"]
    run_study(monkeypatch, *command)
    (small / "toy" / "mine" / "seed-0" / "final").mkdir()
    run_study(monkeypatch, *command)
    assert seen == ["ktr.py", "ktr.py", "evaluate.py"]


def test_worlds_and_starts_are_made_where_they_miss(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(study, "call", lambda command, until: called.append(command))
    study.prepare(tmp_path, "long", math.inf)
    assert [command[:2] for command in called] == [
        ["-m", "lab.toy"], ["-m", "lab.cold_start"], ["evaluate.py", "--model"]]
    assert called[2][2] == called[1][2] == str(tmp_path / "starts" / "long")
    study.prepare(tmp_path, "toy", math.inf)            # its start is shipped
    assert [command[0] for command in called[3:]] == ["-m", "evaluate.py"]
    assert called[4][2] == str(ROOT / "cold_start")
    monkeypatch.setattr(study, "call", lambda *_: "error: no room")
    with pytest.raises(RuntimeError, match="lab.toy make .*\nerror: no room"):
        study.prepare(tmp_path, "order", math.inf)


RULE = """import torch
from attribution import WEIGHTS

OPTIONS = "--signals entropy --weighting late --G 4 --max_new_tokens 8"


def late(r, o):
    return torch.arange(float(r.logp.shape[1])).expand_as(r.logp) * r.group.completion_mask


WEIGHTS["late"] = late
"""


def test_a_rule_in_a_file_meets_its_controls(small, checkpoint_folder, monkeypatch, capsys):
    """Once it is trained (see below): tabled, its tokens looked at."""
    monkeypatch.setattr(study, "page", partial(study.page, questions=2))
    monkeypatch.setattr(study, "try_one_step", lambda *_: None)
    monkeypatch.setattr(study, "train_and_test", lambda *_: None)
    monkeypatch.setattr(ktr, "accuracy_reward", lambda text, *_: float(len(text) % 3))
    for seed, learnt in enumerate([(0.0, 1.0), (1.0, 4.0), (2.0, 1.0)]):
        hand_made(small, "GRPO", seed, 0.25, learnt)
        hand_made(small, "late", seed, 0.5, learnt=(2.0, 2.0))
    (small / "toy" / "late" / "seed-0" / "final").symlink_to(checkpoint_folder)
    file = small / "late.py"
    file.write_text(RULE)
    run_study(monkeypatch, "--rule", file, "--seeds", 3, "--out", small)
    printed = capsys.readouterr().out
    assert "passes a step, the reference's apart: 1 sampling, 1 with gradient" in printed
    lines = [line for line in printed.splitlines() if re.match(r"(\| )?late ", line)]
    table, words, gradient = lines
    assert "| +25.0 +- 0.0 | <0.001 |" in table
    assert "%" in words and "norm: key tokens" in gradient
    run = small / "toy" / "late" / "seed-0"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for completion in (c for row in rows for c in row["completions"]):
        weights, n = completion["signals"]["late"], len(completion["tokens"])
        assert weights == list(range(n)) and set(completion["signals"]) >= {"visual", "entropy"}
    page = (small / "late.html").read_text()
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
    called = []
    monkeypatch.setattr(study, "call", lambda command, until: called.append(command))
    file, run = tmp_path / "late.py", Run("toy", "late", 0)
    for text in (RULE, RULE, RULE + "# another"):
        file.write_text(text)
        if text != RULE:
            with pytest.raises(RuntimeError, match="another text of its rule"):
                study.train_and_test(tmp_path, run, f"--rule {file}")
        else:
            study.train_and_test(tmp_path, run, f"--rule {file}")
    assert len(called) == 4 and str(file) in called[0]


def test_an_error_in_a_rules_file_ends_the_study_in_one_line(small, monkeypatch):
    file = small / "late.py"
    file.write_text(RULE.replace(".expand_as(r.logp) * r.group.completion_mask", ""))
    with pytest.raises(SystemExit) as stop:
        run_study(monkeypatch, "--rule", file, "--out", small)
    assert str(stop.value).startswith("error: weighting late: expected a tensor of shape (4, ")
    assert "\n" not in str(stop.value) and not (small / "toy").exists()


def test_a_rules_traceback_is_told_with_its_place(tmp_path, monkeypatch):
    printed = "Traceback ..\nAttributeError: lgp\non rank 0 in step 1, with 'a.y4m'\n"
    monkeypatch.setattr(study, "call", lambda *_: printed)
    with pytest.raises(SystemExit) as stop:
        study.try_one_step(tmp_path, "")
    assert str(stop.value) == "AttributeError: lgp\non rank 0 in step 1, with 'a.y4m'"


def test_a_rules_file_that_selects_nothing_is_refused(small, monkeypatch):
    (small / "late.py").write_text(RULE.replace("OPTIONS", "OPTION"))
    with pytest.raises(SystemExit, match="late.py has no OPTIONS: nothing selects"):
        run_study(monkeypatch, "--rule", small / "late.py", "--out", small)


def test_a_failing_run_is_named_with_what_it_printed(small, monkeypatch):
    monkeypatch.setattr(study, "call", lambda *_: "error: something")
    told = r"(?s)toy, mine, seed 0: .*ktr.py.*--ratio 0.3.*error: something"
    with pytest.raises(RuntimeError, match=told):
        run_study(monkeypatch, "--only", "mine", "--seeds", 1, "--out", small)


@pytest.mark.parametrize("wrong", [["--only", "GRPOO"], ["toys"], ["--seeds", "0"],
                                   ["--jobs", "0"], ["--minutes", "-1"]])
def test_wrong_options_are_refused(wrong, monkeypatch):
    with pytest.raises(SystemExit):
        run_study(monkeypatch, *wrong)


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
