"""The study: its tables by hand, one small study for real, and the gradient analysis against the plain model."""

import json
import math
import sys
from argparse import Namespace

import pytest
import torch
from conftest import plain_logp

from lab import study
from policy import sample
from lab.study import gradient_analysis, interval, outcome, print_table

SECONDS = 0.5


def hand_made(out, name, seed, accuracy, rewards=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0)):
    """A finished run of ten steps with this test accuracy."""
    run = out / name.replace("/", "per-") / f"seed-{seed}"
    (run / "after").mkdir(parents=True)
    rows = [{"step": i + 1, "reward": r, "accuracy": i / 10, "kl": 0.01 * i, "grad_norm": 1.0 * i, "key_share": 0.45, "seconds": SECONDS}
            for i, r in enumerate(rewards)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "after" / "scores.json").write_text(json.dumps({"scores": {"all": {"strict": accuracy, "n": 100}}}))
    return run


def test_interval_by_hand():
    assert interval([2.0, 4.0, 9.0]) == (5.0, pytest.approx(4.30 * math.sqrt(13 / 3)))          # variance (9 + 1 + 16) / 2
    mean, half = interval([3.0])
    assert mean == 3.0 and math.isnan(half)                                 # one seed says nothing about the others
    assert interval([1.0, 1.0, 1.0, 1.0, 1.0]) == (1.0, 0.0)
    assert interval([0.0, 2.0] * 15)[1] == pytest.approx(2.045 / math.sqrt(29), rel=0.03)       # more seeds than the table has


def test_outcome_by_hand(tmp_path):
    got = outcome(hand_made(tmp_path, "GRPO", 0, 0.62))                     # late: the last fifth, two of ten steps
    assert got == pytest.approx({"accuracy": 62, "reward": 1.5, "learning": 45, "kl": 0.085, "grad": 8.5, "share": 45, "seconds": 5})
    short = hand_made(tmp_path, "GRPO", 1, 0.62, rewards=(0.0, 3.0))
    assert outcome(short)["reward"] == 3                                    # of fewer than five steps, the last


def test_the_paired_table_by_hand(tmp_path, capsys):
    """Differences are taken seed by seed: their interval is far narrower than that of the accuracies."""
    accuracies = {"GRPO": (0.50, 0.60, 0.70), "random 45%": (0.50, 0.62, 0.73), "KTR /selected": (0.54, 0.65, 0.73)}
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            hand_made(tmp_path, name, seed, value)
    table = print_table({name: "" for name in accuracies}, Namespace(out=str(tmp_path), seeds=3))
    assert table["GRPO"]["accuracy"] == pytest.approx((60, 4.30 * 10 / math.sqrt(3)))
    mine = table["KTR /selected"]                                           # minus GRPO: 4, 5, 3; minus random: 4, 3, 0
    assert mine["minus GRPO"] == pytest.approx((4, 4.30 / math.sqrt(3)))
    assert mine["minus random 45%"] == pytest.approx((7 / 3, 4.30 * math.sqrt(13 / 3) / math.sqrt(3)))
    assert table["random 45%"]["minus GRPO"] == pytest.approx((5 / 3, 4.30 * math.sqrt(7 / 3) / math.sqrt(3)))      # 0, 2, 3
    assert table["GRPO"]["minus GRPO"] == (0, 0)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("KTR /selected"))
    assert line.split()[2:8] == ["64.0", "+-", "23.7", "+4.0", "+-", "2.5"]
    # power: 4.30 (95%) + 1.06 (80%), times median deviation / sqrt 3; deviations sqrt 7/3 (twice), 1, sqrt 13/3
    assert f"difference of {(4.30 + 1.06) * math.sqrt(7 / 3) / math.sqrt(3):.1f} points" in printed


def run_study(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    return study.main()


def test_a_small_study_for_real(checkpoint_folder, world, tmp_path, monkeypatch):
    """Your own rule is trained and tested on both seeds; what was there (GRPO) is left alone; a rerun does nothing."""
    for seed in range(2):
        hand_made(tmp_path, "GRPO", seed, 0.25, rewards=(0.0, 1.0))
    command = ["--only", "GRPO", "--add", "mine=--signals random --ratio 0.3 --G 4 --max_new_tokens 8", "--seeds", 2, "--steps", 2,
               "--world", world, "--model", checkpoint_folder, "--out", tmp_path]
    kept = (tmp_path / "GRPO" / "seed-0" / "log.jsonl").stat().st_mtime_ns
    run_study(monkeypatch, *command, "--jobs", 2)
    for seed in range(2):
        run = tmp_path / "mine" / f"seed-{seed}"
        options = json.loads((run / "options.json").read_text())
        assert [options[name] for name in ("signals", "ratio", "seed", "lr", "max_steps")] == [["random"], 0.3, seed, 1e-4, 2]
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [1, 2] and all(row["prompts"] == 4 and 0.3 <= row["key_share"] < 0.36 for row in log)
        assert json.loads((run / "after" / "scores.json").read_text())["scores"]["all"]["n"] == 24
    saved = json.loads((tmp_path / "table.json").read_text())
    assert set(saved["table"]) == {"GRPO", "mine"} and saved["variants"]["mine"].startswith("--signals random")
    assert saved["table"]["GRPO"]["accuracy"] == [25.0, 0.0]
    mine = [outcome(tmp_path / "mine" / f"seed-{seed}")["accuracy"] for seed in range(2)]
    assert saved["table"]["mine"]["minus GRPO"] == pytest.approx(interval([x - 25 for x in mine]))
    assert (tmp_path / "GRPO" / "seed-0" / "log.jsonl").stat().st_mtime_ns == kept

    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: pytest.fail(f"started again: {a}"))
    run_study(monkeypatch, *command)
    assert json.loads((tmp_path / "table.json").read_text())["table"] == saved["table"]


def test_a_failing_run_is_named_with_what_it_printed(world, tmp_path, monkeypatch):
    def broken(command, **_):
        return Namespace(returncode=1, stdout="", stderr="error: something")
    monkeypatch.setattr(study.subprocess, "run", broken)
    hand_made(tmp_path, "GRPO", 0, 0.5)
    with pytest.raises(RuntimeError, match=r"(?s)mine, seed 0: .*ktr.py.*--signals mine.*error: something"):
        run_study(monkeypatch, "--only", "GRPO", "--add", "mine=--signals mine", "--seeds", 1, "--world", world, "--out", tmp_path)
    with pytest.raises(SystemExit):
        run_study(monkeypatch, "--only", "GRPOO")


def test_every_variant_is_a_valid_command_line():
    from run.options import parse
    for name, options in study.VARIANTS.items():
        o = parse(["--model", "m", "--data", "d", *study.shlex.split(options)])
        assert (o.signals == ["visual", "temporal", "entropy"]) == name.startswith(("Video-KTR", "KTR")), name


# ---------------------------------------------------------------------------------------- gradients
def test_gradients_of_the_parts_make_the_whole(checkpoint_folder, tiny, plain, world, monkeypatch):
    """One question: |key| cos(key) + |other| cos(other) is the norm of the whole gradient, which the plain model gives too."""
    monkeypatch.setattr(study, "accuracy_reward", lambda text, *_: float(len(text) % 3))
    monkeypatch.setattr(study, "format_reward", lambda text: 0.0)
    seen = []

    def short(model, prompts, G, limit, seeds):
        seen.append((prompts, sample(model, prompts, G, 12, seeds=seeds)))
        return seen[0][1]
    monkeypatch.setattr(study, "sample", short)
    got = gradient_analysis(str(checkpoint_folder), Namespace(world=str(world)), questions=1, G=4)

    (((prompt,), (group,)),) = seen
    assert prompt.kind == "video"
    rewards = [len(tiny[1].tokenizer.decode(ids[:n], skip_special_tokens=True)) % 3 for ids, n in zip(group.ids, group.lengths)]
    mean, deviation = torch.tensor(rewards).float().mean().item(), torch.tensor(rewards).float().std().item()
    assert deviation > 0                                                    # or the question tells nothing
    losses = []
    for ids, n, reward in zip(group.ids, group.lengths, rewards):
        logp = plain_logp(plain, prompt, ids[:n]).gather(-1, ids[:n, None])[:, 0]
        losses.append(-(reward - mean) / (deviation + 1e-4) * logp.mean())
    parts = torch.autograd.grad(sum(losses), list(plain.model.language_model.layers[-1].parameters()))
    whole = torch.cat([g.flatten() for g in parts]).norm().item()
    for rule, row in got["gradients"].items():
        assert row["key"] > 0 and row["other"] > 0
        assert row["key"] * row["cosine key"] + row["other"] * row["cosine other"] == pytest.approx(whole, rel=1e-3), rule
    assert got["gradients"]["Video-KTR"] != got["gradients"]["random 45%"]
    assert got["loss variance"]["GRPO"] == pytest.approx(torch.stack(losses).var().item(), rel=1e-3)
