"""Is the key token key? One training under many rules for choosing tokens, on the toy world.

    python -m lab.study                         all variants, five seeds each; resumable
    python -m lab.study --only GRPO VPPO --add "VPPO 20%=--rule lab/rules/vppo.py --ratio 0.2"
    python -m lab.study --rule mine.py          a file's rule against its controls, with a page
    python -m lab.study --gradients MODEL       the paper's gradient analysis (gradients.py)

All variants share data, seeds, learning rate and steps. Differences are paired by seed: the same
cold start, the same order of prompts, the same random numbers in sampling. "/selected" variants
divide a row by its key tokens instead of its length; they take steps 2 to 5 times as large, which
is a difference of learning rate and is shown apart.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from lab.gradients import gradient_analysis
from lab.report import plot, smooth
from lab.rule import page
from lab.stats import detectable, holm, interval, p_value

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "GRPO": "--signals all",
    "random 20%": "--signals random",
    "random 45%": "--signals random --ratio 0.45",      # as many as the union of the three
    "entropy": "--signals entropy",
    "visual": "--signals visual",
    "temporal": "--signals temporal",
    "visual+entropy": "--signals visual entropy",
    "temporal+entropy": "--signals temporal entropy",
    "visual+temporal": "--signals visual temporal",
    "Video-KTR": "",
    "T-GRPO": "--rule lab/rules/t_grpo.py",
    "spread weights": "--rule lab/rules/tw_grpo.py",    # TW-GRPO, but for its beta
    "VPPO": "--rule lab/rules/vppo.py",
    "PAPO": "--rule lab/rules/papo.py",
    "PGPO's weights": "--rule lab/rules/pgpo.py",
    "weights per signal": "--rule lab/rules/per_signal.py",
    "Dr. GRPO": "--rule lab/rules/dr_grpo.py",
    "DAPO": "--rule lab/rules/dapo.py",
    "entropy 80/20": "--rule lab/rules/entropy_80_20.py",
    "KTR 10%": "--ratio 0.1",
    "KTR 50%": "--ratio 0.5",
    "KTR linear weights": "--weighting linear",
    "KTR JS distance": "--distance js",
    "KTR reversed frames": "--order reverse",
    "KTR half masked": "--masking half",
    "KTR signed": "--shift signed",
    "GRPO lr x2.2": "--signals all --lr 2.2e-4",        # the step size of /selected
    "random 45% /selected": "--signals random --ratio 0.45 --normalize selected",
    "KTR /selected": "--normalize selected",
}
CONTROLS = ("GRPO", "random 45%", "Video-KTR")              # of --rule
COMPARISONS = {         # heading: (measure, control)
    "minus GRPO": ("accuracy", "GRPO"),
    "minus random 45%": ("accuracy", "random 45%"),
    "learning minus GRPO": ("learning", "GRPO"),
}


# --------------------------------------------------------------------------------------------- runs
def folder_of(out: str, name: str, seed: int) -> Path:
    return Path(out) / name.replace("/", "per-") / f"seed-{seed}"


def commands_of(run: Path, seed: int, options: str, a: argparse.Namespace) -> list[list[str]]:
    """What trains a run and what tests it."""
    train = [
        "ktr.py", "--model", a.model, "--data", f"{a.world}/train.json", "--out", str(run),
        "--dtype", "float32", "--no_checkpointing", "--max_new_tokens", "64",
        "--prompts_per_step", "4", "--max_steps", str(a.steps), "--lr", "1e-4",
        "--warmup_steps", "10", "--save_every", "1000", "--keep", "1", "--workers", "0",
        "--seed", str(seed), "--sample_every", "1000000", *shlex.split(options)]
    test = [
        "evaluate.py", "--model", str(run / "final"), "--data", f"{a.world}/test.json",
        "--videos", a.world, "--benchmark", "toy", "--out", str(run / "after"),
        "--max_new_tokens", "64", "--batch", "100", "--dtype", "float32", "--workers", "0"]
    return [train, test]


def train_and_test(name: str, seed: int, options: str, a: argparse.Namespace, gpu: str) -> None:
    """One run and its test score, left alone if they are there already. RuntimeError holds what a
    failure printed, or says that the folder holds a run under other options or another text of its
    rule's file (a rule inside attribution.py cannot be told: remove its folder)."""
    run = folder_of(a.out, name, seed)
    commands, made_by = commands_of(run, seed, options, a), run / "study.json"
    rules = [(ROOT / word).read_text() for word in shlex.split(options) if word.endswith(".py")]
    if made_by.exists() and json.loads(made_by.read_text()) != commands + rules:
        raise RuntimeError(f"{run} holds a run under other options or another text of its rule; "
                           "remove it or change --out")
    if (run / "after" / "scores.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    made_by.write_text(json.dumps(commands + rules))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": gpu}
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                              capture_output=True, text=True)
        if done.returncode:
            printed = (done.stdout + done.stderr)[-2000:]
            raise RuntimeError(f"{name}, seed {seed}: {shlex.join(command)}\n{printed}")


def try_one_step(options: str, a: argparse.Namespace) -> None:
    """SystemExit with the last line that a failure prints: what is wrong, in a rule's error."""
    with tempfile.TemporaryDirectory() as folder:
        train, _ = commands_of(Path(folder), 0, options, a)
        done = subprocess.run([sys.executable, *train, "--max_steps", "1", "--save_every", "0"],
                              cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr).strip().splitlines()[-1])


def run_all(variants: dict[str, str], a: argparse.Namespace) -> None:
    """Every variant and seed, `a.jobs` at once: by default one per core, or four per GPU."""
    gpus = [str(i) for i in range(torch.cuda.device_count())] or [""]
    jobs = a.jobs or (os.cpu_count() if gpus == [""] else 4 * len(gpus))
    work = [(seed, name) for seed in range(a.seeds) for name in variants]
    bar = tqdm(total=len(work), unit="run", dynamic_ncols=True)

    def one(i: int) -> None:
        seed, name = work[i]
        train_and_test(name, seed, variants[name], a, gpus[i % len(gpus)])
        bar.update()

    with bar, ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(len(work))))           # a failure is raised here, the rest dropped


# -------------------------------------------------------------------------------------------- table
def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def outcome(run: Path) -> dict[str, float]:
    """Of one run: test accuracy and the area under the training curve (`learning`) in percent; over
    the last fifth of the steps mean reward, KL, gradient norm, share of key tokens; seconds."""
    log = read_log(run)
    late = log[-max(1, len(log) // 5):]
    scores = json.loads((run / "after" / "scores.json").read_text())["scores"]
    return {"accuracy": 100 * scores["all"]["strict"],
            "learning": 100 * statistics.mean(row["accuracy"] for row in log),
            "reward": statistics.mean(row["reward"] for row in late),
            "share": 100 * statistics.mean(row["key_share"] for row in late),
            "kl": statistics.mean(row["kl"] for row in late),
            "grad": statistics.mean(row["grad_norm"] for row in late),
            "seconds": sum(row["seconds"] for row in log)}


def make_table(variants: dict[str, str], a: argparse.Namespace) -> dict:
    """{name: {measure or comparison: (mean, half-width of the 95% interval), "p COMPARISON": ..}},
    p corrected for all variants compared with that control; printed as well."""
    found, table, notes = {}, {}, []
    for name in variants:
        runs = [outcome(folder_of(a.out, name, seed)) for seed in range(a.seeds)]
        table[name] = {measure: interval([run[measure] for run in runs]) for measure in runs[0]}
        found[name] = runs
    compared = [label for label, (_, control) in COMPARISONS.items() if control in found]
    for label in compared:
        measure, control = COMPARISONS[label]
        differences = {}                                # from the control, seed by seed
        for name in variants:
            if name != control:
                pairs = zip(found[name], found[control])
                differences[name] = [run[measure] - other[measure] for run, other in pairs]
        corrected = holm({name: p_value(values) for name, values in differences.items()})
        for name, values in differences.items():
            table[name][label] = interval(values)
            table[name][f"p {label}"] = corrected[name]
        if a.seeds > 1 and differences:
            noise = statistics.median(statistics.stdev(values) for values in differences.values())
            m = len(differences)
            alone, among = detectable(noise, a.seeds), detectable(noise, a.seeds, 0.05 / m)
            notes.append(f"{label}: {alone:.1f} points alone, {among:.1f} among {m}")
    print_rows(table, compared)
    print(f"+-: 95% intervals over {a.seeds} seeds. learning: mean training accuracy of all steps")
    print("p: paired t over seeds, Holm's correction for all rules compared with that control")
    if notes:
        print("Found with 80% power at the 5% level, a true difference of:", "; ".join(notes))
    return table


def print_rows(table: dict, compared: list[str]) -> None:
    """A line for each variant: each measure, then its differences from the controls."""
    columns = []
    for measure in ("accuracy", "learning"):
        columns += [measure, *(label for label in compared if COMPARISONS[label][0] == measure)]
    heads = "".join(f"{column:>{25 if column in COMPARISONS else 16}}" for column in columns)
    print(f"{'':22}{heads}   reward  tokens     kl   grad  seconds")
    for name, row in table.items():
        line = f"{name:22}"
        for column in columns:
            if column not in row:                       # the control itself
                line += " " * 25
                continue
            mean, half = row[column]
            if column in COMPARISONS:
                line += f"   {mean:+6.1f} +- {half:4.1f} p {row[f'p {column}']:5.3f}"
            else:
                line += f"   {mean:5.1f} +- {half:4.1f}"
        print(f"{line}  {row['reward'][0]:7.2f} {row['share'][0]:6.0f}% {row['kl'][0]:6.3f} "
              f"{row['grad'][0]:6.2f} {row['seconds'][0]:8.0f}")


def draw(variants: dict[str, str], a: argparse.Namespace) -> None:
    """Curves of the training, as curves.svg and .png: means over seeds with 95% intervals; needs
    matplotlib."""
    runs, columns = [], ("reward", "accuracy", "kl", "grad_norm")
    for name in variants:
        logs = [read_log(folder_of(a.out, name, seed)) for seed in range(a.seeds)]
        log, band = {"step": [row["step"] for row in logs[0]]}, {}
        for column in columns:
            seeds = [smooth([row[column] for row in rows]) for rows in logs]
            found = [interval(values) for values in zip(*seeds)]
            log[column] = [mean for mean, _ in found]
            band[column] = [m - half for m, half in found], [m + half for m, half in found]
        runs.append({"name": name, "log": log, "smooth": log, "band": band})
    plot(runs, columns, Path(a.out, "curves"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join(VARIANTS).replace("%", "%%")
    add("--only", nargs="+", help=f"of: {names}")
    add("--add", nargs="+", default=[], metavar="NAME=OPTIONS", help="more, as options of ktr.py")
    add("--rule", type=Path, help="a file that registers a rule (lab/rules)")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=80)
    add("--jobs", type=int, default=0, help="runs at once (default: one per core, four per GPU)")
    add("--world", default="toy_world")
    add("--model", default="cold_start")
    add("--out", default="runs/study")
    add("--gradients", metavar="MODEL", help="the gradient analysis at this checkpoint instead")
    a = parser.parse_args()
    if not all("=" in item for item in a.add):
        parser.error("--add takes NAME=OPTIONS")
    unknown = [name for name in a.only or [] if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    if a.seeds < 1 or a.jobs < 0:
        parser.error("--seeds takes a number from 1 on, --jobs from 0 on")

    if not Path(a.world, "test.json").exists():
        subprocess.run([sys.executable, "-m", "lab.toy", "make", a.world], cwd=ROOT, check=True)
    if a.gradients:
        gradient_analysis(a.gradients, a.world)
        return
    only = a.only or (CONTROLS if a.rule else VARIANTS)
    variants = {name: VARIANTS[name] for name in only}
    variants.update(item.split("=", 1) for item in a.add)
    if a.rule:
        variants[a.rule.stem] = f"--rule {shlex.quote(str(a.rule.resolve()))}"
        try_one_step(variants[a.rule.stem], a)
    run_all(variants, a)
    table = make_table(variants, a)
    saved = {"options": vars(a), "variants": variants, "table": table}
    Path(a.out, "table.json").write_text(json.dumps(saved, indent=1, default=str))
    draw(variants, a)
    if a.rule:
        page(a.rule, [folder_of(a.out, name, 0) for name in (a.rule.stem, *only)], a)


if __name__ == "__main__":
    main()
