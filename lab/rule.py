"""A rule in one file against its controls on the toy world: training, tables, one page.

    bash train.sh rule my_rule.py           or: python -m lab.rule my_rule.py [--seeds 5 ..]

The file registers its rule at any of attribution.py's seams and may hold OPTIONS, those of ktr.py
that it is trained with (lab/rules has examples). First one step is tried: an error in the rule ends
this in one line. Then the study runs it beside GRPO, Video-KTR and 45% random tokens; what its
tokens are is looked at with the model that it has trained.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import ktr
import policy
from attribution import attribute
from data import Prompts, read_records
from lab import report, study
from lab.attribution_table import attribution_table, heavier
from lab.gradients import gradient_analysis
from run.logs import Clock, sample_of
from run.options import Options, parse

CONTROLS = ("GRPO", "random 45%", "Video-KTR")


def try_one_step(options: str, a: argparse.Namespace) -> None:
    """SystemExit with the last line that a failure printed: what is wrong, in a rule's error."""
    with tempfile.TemporaryDirectory() as folder:
        train, _ = study.commands_of(Path(folder), 0, options, a)
        done = subprocess.run([sys.executable, *train, "--max_steps", "1", "--save_every", "0"],
                              cwd=study.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr).strip().splitlines()[-1])


@contextmanager
def passes_counted():
    """Counts the policy's forward passes by kind."""
    original, counts = policy.packed_forward, Counter()

    def counting(model, prompts, groups, *rest, **more):
        kind = "with gradient" if torch.is_grad_enabled() else "without"
        counts["sampling" if groups[0] is None else kind] += 1
        return original(model, prompts, groups, *rest, **more)
    policy.packed_forward = counting
    try:
        yield counts
    finally:
        policy.packed_forward = original


def look(name: str, o: Options, model, processor, world: str, questions: int = 8):
    """Rows of samples.jsonl, in which the rule's weights stand beside Video-KTR's signals; and the
    passes that a step costs, the reference's apart."""
    records = read_records(Path(world) / "test.json")[0][:questions]
    data, rows = Prompts(records, world, processor), []
    for i in range(len(data)):
        with passes_counted() as counts:
            (mine,) = ktr.roll_out(o, model, processor, [(data[i], 2 * i, None)])
            total = ktr.divisor(o, [mine], 1, model.device)
            ktr.learn(o, ktr.Scorer(model), None, [mine], 1.0, total, Clock(model.device))
        r = replace(mine, scores={}, chosen={})
        attribute([r], Options(), model)
        r.scores[name] = mine.key_mask.float()
        r.chosen[name] = heavier(mine.key_mask, mine.group.valid)
        rows.append(sample_of(r, i + 1, processor.tokenizer))
    return rows, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=0, help="runs at once (default: one per core)")
    parser.add_argument("--world", default="toy_world")
    parser.add_argument("--model", default="cold_start")
    parser.add_argument("--out", default="", help="default: runs/rule-NAME")
    a = parser.parse_args()
    name, options = a.file.stem, f"--rule '{a.file.resolve()}'"
    a.out = a.out or f"runs/rule-{name}"
    if not Path(a.world, "test.json").exists():
        subprocess.run([sys.executable, "-m", "lab.toy", "make", a.world], cwd=study.ROOT,
                       check=True)
    o = parse(["--model", a.model, "--data", f"{a.world}/train.json", "--max_new_tokens", "64",
               "--rule", str(a.file)])
    try_one_step(options, a)
    variants = {**{control: study.VARIANTS[control] for control in CONTROLS}, name: options}
    study.run_all(variants, a)
    study.make_table(variants, a)
    study.draw(variants, a)

    run = study.folder_of(a.out, name, 0)
    attribution_table(str(run / "final"), Path(a.world), rules={name: o})
    gradient_analysis(a.model, a.world, rules={"Video-KTR": Options(), name: o})
    rows, passes = look(name, o, *policy.load(str(run / "final")), a.world)
    print("passes a step, the reference's apart:",
          ", ".join(f"{n} {kind}" for kind, n in passes.items()))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (run / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    content = report.content_of([study.folder_of(a.out, rule, 0) for rule in (name, *CONTROLS)])
    page = Path(a.out, "report.html")
    page.write_text(report.build(content), encoding="utf-8")
    print(f"page: {page}")


if __name__ == "__main__":
    main()
