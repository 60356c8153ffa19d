"""What a rule in a file of its own does: its tokens, its gradient, its passes, on one page.

    bash train.sh rule my_rule.py           or: python -m lab.study --rule my_rule.py [--seeds 4]

The file adds to any of the registries (docs/rules.md) and may hold OPTIONS, those of ktr.py that it
is trained with (lab/rules has examples). First one step is tried: an error in the rule ends all
in one line. Then the study trains it and its controls, and this file shows the results.
"""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import ktr
import policy
from data import Prompts, read_records
from engine import scoring
from lab import report
from lab.attribution_table import attribution_table, heavier
from lab.gradients import gradient_analysis
from options import Options
from run.arguments import parse
from run.logs import Clock, sample_of
from run.training import Scorer


@contextmanager
def passes_counted():
    """Counts the policy's forward passes by kind."""
    original, counts = scoring.packed_forward, Counter()

    def counting(model, prompts, groups, *rest, **more):
        kind = "with gradient" if torch.is_grad_enabled() else "without"
        counts["sampling" if groups[0] is None else kind] += 1
        return original(model, prompts, groups, *rest, **more)
    policy.packed_forward = scoring.packed_forward = counting
    try:
        yield counts
    finally:
        policy.packed_forward = scoring.packed_forward = original


def look(name: str, o: Options, model, processor, world: str, questions: int):
    """Rows of samples.jsonl, in which the rule's weights stand beside Video-KTR's signals; and the
    passes that a step costs, the reference's apart."""
    records = read_records(Path(world) / "test.json")[0]
    clips = [record for record in records if record["data_type"] == "video"][:questions]
    data, rows = Prompts(clips, world, processor), []
    for i in range(len(data)):
        with passes_counted() as counts:
            (mine,) = ktr.sample_rollouts(o, model, processor, [(data[i], 2 * i)])
            divisor = ktr.loss_divisor(o, [mine], 1, model.device)
            ktr.learn(o, Scorer(model), None, [mine], divisor, Clock(model.device))
        r = replace(mine, scores={}, top_tokens={})
        ktr.find_key_tokens(Options(), [r], model)
        r.scores[name] = mine.key_mask.float()
        r.top_tokens[name] = heavier(mine.key_mask, mine.group.completion_mask)
        rows.append(sample_of(r, i + 1, processor.tokenizer))
    return rows, counts


def page(file: Path, runs: dict[str, list[Path]], out: Path, world: Path, start: Path,
         questions: int = 64) -> None:
    """After a study: print what a rule's tokens are and the passes it costs, by the model of its
    first seed, and their share of the gradient at the start; write the page of `runs`, the seeds of
    the rule and of its controls, into out."""
    name, first = file.stem, runs[file.stem][0]
    final = str(first / "final")
    o = parse(["--model", final, "--data", f"{world}/train.json", "--max_new_tokens", "64",
               "--rule", str(file)])
    attribution_table(final, world, questions, rules={name: o})
    gradient_analysis(str(start), str(world), questions, rules={"Video-KTR": Options(), name: o})
    rows, passes = look(name, o, *policy.load(final), str(world), min(8, questions))
    print("passes a step, the reference's apart:",
          ", ".join(f"{n} {kind}" for kind, n in passes.items()))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (first / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    shown = [{**report.over_seeds(list(map(report.read_run, seeds))),
              "name": f"{rule} ({len(seeds)})"} for rule, seeds in runs.items()]
    file = out / f"{name}.html"
    file.write_text(report.build(report.content_of(shown)), encoding="utf-8")
    print(f"page: {file}")
