"""Is the key token key? One training under many rules for choosing tokens, on the toy world.

    python -m lab.study                         all variants; resumable; --jobs N --minutes M
    python -m lab.study --only GRPO VPPO --add "VPPO 20%=--rule lab/rules/vppo.py --ratio 0.2"
    python -m lab.study --rule mine.py          a file's rule against its controls, with a page
    python -m lab.study --table FILE            the tables of a study.json, nothing run
    python -m lab.study --gradients MODEL       the paper's gradient analysis (gradients.py)

All variants share data, learning rate and steps. Differences are paired by seed: the same cold
start, the same order of prompts, the same random numbers in sampling. Two outcomes of a run:
    accuracy    the chance that a sampled answer to an unseen question is right, at the end: one
                sample for each question, with the question's own random numbers in every run
    learning    the same over the whole run: the mean accuracy of the completions it learns from.
                No prompt comes twice, so each is unseen when it is sampled
Greedy answers would turn small differences into jumps (docs/results.md).
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lab import report
from lab.gradients import gradient_analysis
from lab.rule import page
from lab.stats import detectable, holm, interval, p_value
from run.arguments import load_rule

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "GRPO": "--signals all",
    "random 45%": "--signals random --ratio 0.45",      # as many as the union of the three
    "Video-KTR": "",
    "visual+temporal": "--signals visual temporal",
    "visual": "--signals visual",
    "VPPO": "--rule lab/rules/vppo.py",
    "PAPO": "--rule lab/rules/papo.py",
    "T-GRPO": "--rule lab/rules/t_grpo.py",
    "TW-GRPO": "--rule lab/rules/tw_grpo.py",
    "random 20%": "--signals random",
    "entropy": "--signals entropy",
    "temporal": "--signals temporal",
    "visual+entropy": "--signals visual entropy",
    "temporal+entropy": "--signals temporal entropy",
    "KTR 10%": "--ratio 0.1",
    "KTR 30%": "--ratio 0.3",
    "KTR 50%": "--ratio 0.5",
    "KTR linear weights": "--rule lab/rules/soft_weights.py",
    "KTR JS distance": "--rule lab/rules/distances.py",
    "KTR reversed frames": "--rule lab/rules/frame_orders.py",
    "KTR half masked": "--rule lab/rules/masking.py --signals visual_half temporal entropy",
    "KTR / selected": "--normalize selected",           # the release's divisor
    "random 45% / selected": "--signals random --ratio 0.45 --normalize selected",
    "PGPO": "--rule lab/rules/pgpo.py",
    "ToR": "--rule lab/rules/tor.py",
    "VEPO": "--rule lab/rules/vepo.py",
    "VGPO": "--rule lab/rules/vgpo.py",
    "PEPO": "--rule lab/rules/pepo.py",
    "Dr. GRPO": "--rule lab/rules/dr_grpo.py",
    "DAPO": "--rule lab/rules/dapo.py",
    "entropy 80/20": "--rule lab/rules/entropy_80_20.py",
}
CONTROLS = ("GRPO", "random 45%", "Video-KTR")          # of --rule
OUTCOMES = ("accuracy", "learning")
MEASURES = (*OUTCOMES, "reward", "share", "kl", "grad", "seconds")


# --------------------------------------------------------------------------------------------- runs
def folder_of(out: str, name: str, seed: int) -> Path:
    return Path(out) / name.replace("/", "per-") / f"seed-{seed}"


def commands_of(run: Path, seed: int, options: str, a: argparse.Namespace) -> list[list[str]]:
    """What trains a run and what tests it."""
    limits = ["--dtype", "float32", "--max_new_tokens", str(a.max_new_tokens), "--workers", "0"]
    train = [
        "ktr.py", "--model", a.model, "--data", f"{a.world}/train.json", "--out", str(run),
        *limits, "--no_checkpointing", "--prompts_per_step", "8", "--max_steps", str(a.steps),
        "--lr", "7e-5", "--warmup_steps", "5", "--save_every", "1000", "--keep", "1",
        "--seed", str(seed), "--sample_every", "1000000", *shlex.split(options)]
    test = [
        "evaluate.py", "--model", str(run / "final"), "--data", f"{a.world}/test.json",
        "--videos", a.world, "--benchmark", "toy", "--out", str(run / "after"), *limits,
        "--batch", "200", "--temperature", "1", "--top_p", "0.95"]
    return [train, test]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": ""}                 # a tiny model is no faster on a GPU


def train_and_test(name: str, seed: int, options: str, a: argparse.Namespace,
                   until: float = math.inf) -> bool:
    """One run and its test score, left alone if they are there already. False: it was ended at the
    time `until`. RuntimeError holds what a failure printed, or says that the folder holds a run
    under other options or another text of its rule's file (a rule inside attribution.py cannot be
    told: remove its folder)."""
    run = folder_of(a.out, name, seed)
    commands, made_by = commands_of(run, seed, options, a), run / "study.json"
    rules = [(ROOT / word).read_text() for word in shlex.split(options) if word.endswith(".py")]
    if made_by.exists() and json.loads(made_by.read_text()) != commands + rules:
        raise RuntimeError(f"{run} holds a run under other options or another text of its rule; "
                           "remove it or change --out")
    if (run / "after" / "scores.json").exists():
        return True
    run.mkdir(parents=True, exist_ok=True)
    made_by.write_text(json.dumps(commands + rules))
    for command in commands:
        left = None if until == math.inf else max(0.0, until - time.monotonic())
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(),
                                  capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return False
        if done.returncode:
            printed = (done.stdout + done.stderr)[-2000:]
            raise RuntimeError(f"{name}, seed {seed}: {shlex.join(command)}\n{printed}")
    return True


def try_one_step(options: str, a: argparse.Namespace) -> None:
    """SystemExit with the last line that a failure prints: what is wrong, in a rule's error; and
    with the one before, where the last says where it was."""
    with tempfile.TemporaryDirectory() as folder:
        train, _ = commands_of(Path(folder), 0, options, a)
        done = subprocess.run([sys.executable, *train, "--max_steps", "1", "--save_every", "0"],
                              cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise SystemExit("\n".join(lines[-2 if lines[-1].startswith("on rank ") else -1:]))


def run_all(variants: dict[str, str], a: argparse.Namespace) -> None:
    """Seed by seed, so that a cut leaves whole ones, `a.jobs` runs at once. At `a.minutes` what
    still runs is ended, to be repeated. A failure is raised once the others are done."""
    work = [(seed, name) for seed in range(a.seeds) for name in variants]
    bar = tqdm(total=len(work), unit="run", dynamic_ncols=True)
    until = time.monotonic() + 60 * a.minutes if a.minutes else math.inf

    def one(seed: int, name: str) -> None:
        if time.monotonic() < until and train_and_test(name, seed, variants[name], a, until):
            bar.update()

    with bar, ThreadPoolExecutor(a.jobs or os.cpu_count()) as pool:
        begun = [pool.submit(one, seed, name) for seed, name in work]
    for future in begun:
        future.result()


# ------------------------------------------------------------------------------------------ results
def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def outcome(run: Path) -> dict:
    """Of one run: test accuracy, also by kind of question, and the mean accuracy of training
    (`learning`) in percent, and its curve; over the last fifth of the steps mean
    reward, KL, gradient norm, share of key tokens; seconds."""
    log = read_log(run)
    late = log[-max(1, len(log) // 5):]
    scores = json.loads((run / "after" / "scores.json").read_text())["scores"]
    kinds = {name.removeprefix("kind: "): round(100 * row["strict"], 2)
             for name, row in scores.items() if name != "all"}
    curve = [round(100 * row["accuracy"], 1) for row in log]
    found = {"accuracy": 100 * scores["all"]["strict"],
             "learning": 100 * statistics.mean(row["accuracy"] for row in log),
             "reward": statistics.mean(row["reward"] for row in late),
             "share": 100 * statistics.mean(row["key_share"] for row in late),
             "kl": statistics.mean(row["kl"] for row in late),
             "grad": statistics.mean(row["grad_norm"] for row in late),
             "seconds": sum(row["seconds"] for row in log)}
    found = {name: round(value, 4) for name, value in found.items()}
    return {**found, "kinds": kinds, "curve": curve}


def collect(variants: dict[str, str], a: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """{name: {seed: outcome}} of the runs that are finished."""
    found = {name: {} for name in variants}
    for name, runs in found.items():
        for seed in range(a.seeds):
            run = folder_of(a.out, name, seed)
            if (run / "after" / "scores.json").exists():
                runs[str(seed)] = outcome(run)
    return {name: runs for name, runs in found.items() if runs}


def compare(runs: dict[str, dict[str, dict]], names: list[str], control: str,
            measure: str) -> tuple[dict[str, dict], str]:
    """{name: mean, half (95%), p (Holm), pairs} of the differences from the control over the seeds
    that both have, and what the comparison could have found."""
    differences = {}
    for name in names:
        seeds = sorted(set(runs[name]) & set(runs[control]))
        if seeds:
            pairs = [(runs[name][s][measure], runs[control][s][measure]) for s in seeds]
            differences[name] = [a - b for a, b in pairs]
    corrected = holm({name: p_value(values) for name, values in differences.items()})
    rows = {}
    for name, values in differences.items():
        mean, half = interval(values)
        rows[name] = {"mean": mean, "half": half, "p": corrected[name], "pairs": len(values)}
    several = [values for values in differences.values() if len(values) > 1]
    if not several:
        return rows, ""
    noise = statistics.median(statistics.stdev(values) for values in several)
    n, m = statistics.median_low(map(len, several)), len(names)
    alone, among = detectable(noise, n), detectable(noise, n, 0.05 / m)
    return rows, (f"{measure}: median deviation of a pair {noise:.1f}; found with {n} pairs and "
                  f"80% power: {alone:.1f} points alone, {among:.1f} among {m}")


def print_tables(runs: dict[str, dict[str, dict]], controls: list[str]) -> None:
    """Means over seeds with 95% intervals, then the paired differences from each control."""
    print(f"{'':22}seeds   accuracy        learning        reward  tokens     kl   grad  seconds")
    for name, of in runs.items():
        row = {key: interval([run[key] for run in of.values()]) for key in MEASURES}
        both = "   ".join(f"{row[key][0]:5.1f} +- {row[key][1]:4.1f}" for key in OUTCOMES)
        print(f"{name:22}{len(of):5d}   {both}  {row['reward'][0]:7.2f} {row['share'][0]:6.0f}% "
              f"{row['kl'][0]:6.3f} {row['grad'][0]:6.2f} {row['seconds'][0]:8.0f}")
    for control in (name for name in controls if name in runs):
        names = [name for name in runs if name != control]
        print(f"\n{f'minus {control}':22}pairs   accuracy                  learning")
        found = [compare(runs, names, control, measure) for measure in OUTCOMES]
        for name in found[0][0]:
            both = "   ".join("{mean:+5.1f} +- {half:4.1f}  p {p:5.3f}".format(**rows[name])
                              for rows, _ in found)
            print(f"{name:22}{found[0][0][name]['pairs']:5d}   {both}")
        print("\n".join(note for _, note in found))
    print("\n+-: 95% intervals over seeds. p: paired t, Holm's correction for the lines of a block")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=VARIANTS, help="not all of the rules")
    add("--add", nargs="+", default=[], metavar="NAME=OPTIONS", help="more, as options of ktr.py")
    add("--rule", type=Path, help="a file that registers a rule (lab/rules)")
    add("--seeds", type=int, help="of each rule (default: 5, of a --rule and its controls 4)")
    add("--steps", type=int, default=40)
    add("--max_new_tokens", type=int, default=64)
    add("--jobs", type=int, default=0, help="runs at once (default: one per core)")
    add("--minutes", type=float, default=0, help="stop by then, with what is finished")
    add("--world", default="runs/study_world", help="made, with 1200 test questions, if missing")
    add("--model", default=str(ROOT / "cold_start"))
    add("--out", default="runs/study")
    add("--controls", nargs="+", default=["GRPO", "random 45%"], help="rules to compare with")
    add("--table", type=Path, help="print the tables of this study.json instead")
    add("--gradients", metavar="MODEL", help="the gradient analysis at this checkpoint instead")
    a = parser.parse_args()
    a.out, a.world = (str(Path(path).resolve()) for path in (a.out, a.world))
    a.model = str(Path(a.model).resolve()) if Path(a.model).is_dir() else a.model
    if a.table:
        return print_tables(json.loads(a.table.read_text())["runs"], a.controls)
    if a.seeds is None:
        a.seeds = 4 if a.rule else 5
    if not all("=" in item for item in a.add):
        parser.error("--add takes NAME=OPTIONS")
    if a.seeds < 1 or min(a.jobs, a.minutes) < 0:
        parser.error("--seeds takes a number from 1 on, --jobs and --minutes from 0")

    if a.rule and not load_rule(str(a.rule)):
        raise SystemExit(f"error: {a.rule} has no OPTIONS: nothing selects what it registers; name "
                         "it there, also where it replaces a default")
    if not Path(a.world, "test.json").exists():
        make = [sys.executable, "-m", "lab.toy", "make", a.world, "--test", "1200"]
        subprocess.run(make, cwd=ROOT, check=True)
    if a.gradients:
        gradient_analysis(a.gradients, a.world, longest=a.max_new_tokens)
        return
    only = a.only or (CONTROLS if a.rule else VARIANTS)
    variants = {name: VARIANTS[name] for name in only}
    variants.update(item.split("=", 1) for item in a.add)
    if a.rule:
        variants[a.rule.stem] = f"--rule {shlex.quote(str(a.rule.resolve()))}"
        try_one_step(variants[a.rule.stem], a)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    try:
        run_all(variants, a)
    finally:                                            # what is finished is kept in any case
        runs = collect(variants, a)
        saved = {"options": vars(a), "variants": variants, "runs": runs}
        Path(a.out, "study.json").write_text(json.dumps(saved, default=str))
    print_tables(runs, a.controls)
    seeds = {name: [folder_of(a.out, name, int(seed)) for seed in of] for name, of in runs.items()}
    drawn = [{**report.over_seeds(list(map(report.read_run, of))), "name": f"{name} ({len(of)})"}
             for name, of in seeds.items()]
    report.plot(drawn, ["accuracy", "reward", "kl", "grad_norm"], Path(a.out, "study.html"))
    if a.rule and not seeds.get(a.rule.stem):
        raise SystemExit("no run of the rule is finished: again, with more --minutes")
    if a.rule:
        order = [a.rule.stem, *variants]
        page(a.rule, {name: seeds[name] for name in order if name in seeds}, a)


if __name__ == "__main__":
    main()
