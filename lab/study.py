"""The study: one training under many rules for choosing tokens, in toy worlds.

    python -m lab.study                     all STUDIES; --jobs N --minutes M, again to continue
    python -m lab.study toy --only GRPO VPPO --seeds 5
    python -m lab.study --rule mine.py      a file's rule against its controls, with a page
    python -m lab.study --looks             which tokens the signals find, and their gradients
    python -m lab.findings                  the tables

The rules of a study share data, learning rate and steps. Differences are paired by seed: the same
cold start, order of prompts and random numbers in sampling. Two outcomes of a run:
    accuracy    the chance that a sampled answer to an unseen question is right, at the end: one
                sample for each question, with the question's own random numbers in every run
    learning    the same over the whole run: the mean accuracy of the completions it learns from.
                No prompt comes twice, so each is unseen when it is sampled
Greedy answers would turn small differences into jumps (docs/results.md).

Worlds and their cold starts are made where --out lacks them. OUT/study_NAME.json holds a study's
finished runs and what made them; the commit is $COMMIT, or git's. Runs in a file that is there at
the start are not made again (but for --rule): to go on on another machine, copy it there.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lab import findings
from lab.attribution_table import attribution_table
from lab.gradients import gradient_analysis
from lab.rule import page
from run.arguments import load_rule

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "GRPO": "--signals all",
    "random 45%": "--signals random --ratio 0.45",      # as many as the union of the three, or more
    "Video-KTR": "",
    "visual+temporal": "--signals visual temporal",
    "visual": "--signals visual",
    "VPPO": "--rule lab/rules/vppo.py",
    "PAPO": "--rule lab/rules/papo.py",
    "T-GRPO": "--rule lab/rules/t_grpo.py",
    "TW-GRPO": "--rule lab/rules/tw_grpo.py",
    "random 20%": "--signals random",
    "random 36%": "--signals random --ratio 0.36",      # the share that the union has in `toy`
    "entropy": "--signals entropy",
    "temporal": "--signals temporal",
    "temporal reversed": "--rule lab/rules/frame_orders.py --signals temporal_reverse",
    "visual+entropy": "--signals visual entropy",
    "temporal+entropy": "--signals temporal entropy",
    "KTR 10%": "--ratio 0.1",
    "KTR 30%": "--ratio 0.3",
    "KTR 40%": "--ratio 0.4",
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
    "KTR blocks of frames": "--rule lab/rules/frame_orders.py "
                            "--signals visual temporal_blocks entropy",
    "KTR zeroed features": "--rule lab/rules/masking.py",
    "KTR another clip": "--rule lab/rules/masking.py --signals visual_replace temporal entropy",
}
VARIANTS |= {f"KTR {kind} weights": f"--rule lab/rules/soft_weights.py --weighting {kind}"
             for kind in ("softmax", "sigmoid", "exponential")}
VARIANTS |= {f"KTR {name} distance": f"--rule lab/rules/distances.py "
             f"--signals visual_{name.lower()} temporal_{name.lower()} entropy"
             for name in ("L1", "L2", "KL", "Hellinger", "cosine")}
CONTROLS = ("GRPO", "random 45%", "Video-KTR")          # of --rule


@dataclass(frozen=True)
class Study:
    """Runs that share a world, its cold start and how they are trained; seeds: of each rule."""
    seeds: dict[str, int]
    world: str = "toy"
    tokens: int = 64                    # the longest completion
    steps: int = 40
    training: str = "--lr 7e-5 --warmup_steps 5"


# in the order in which a seed's runs are begun: long ones first
STUDIES = {
    "demonstration": Study(dict.fromkeys((*CONTROLS, "KTR 50%"), 10), steps=200,
                           training="--lr 5e-5 --warmup_steps 10"),             # train.sh's
    "long": Study(dict.fromkeys(findings.LONG, 8), "long", tokens=192),
    "order": Study(dict.fromkeys(
        ("GRPO", "random 20%", "temporal", "visual", "temporal reversed"), 10), "order"),
    "toy": Study({**{rule: 9 for rule in VARIANTS if rule != "temporal reversed"},
                  **dict.fromkeys((*CONTROLS, "visual", "random 36%"), 20)}),
}


class Run(NamedTuple):
    study: str
    rule: str
    seed: int


# --------------------------------------------------------------------------------------------- runs
def folder_of(out: Path, run: Run) -> Path:
    return out / run.study / run.rule.replace("/", "per-") / f"seed-{run.seed}"


def start_of(out: Path, world: str) -> Path:
    """The shipped cold start, or another world's, made by `prepare`."""
    return ROOT / "cold_start" if world == "toy" else out / "starts" / world


def test_command(out: Path, study: Study, model: Path, folder: Path) -> list[str]:
    world = out / "worlds" / study.world
    return ["evaluate.py", "--model", str(model), "--data", f"{world}/test.json",
            "--videos", str(world), "--benchmark", "toy", "--out", str(folder / "after"),
            "--dtype", "float32", "--max_new_tokens", str(study.tokens), "--workers", "0",
            "--batch", "200", "--temperature", "1", "--top_p", "0.95"]


def commands_of(out: Path, run: Run, options: str) -> list[list[str]]:
    """What trains a run and what tests it."""
    study, folder = STUDIES[run.study], folder_of(out, run)
    train = [
        "ktr.py", "--model", str(start_of(out, study.world)),
        "--data", f"{out}/worlds/{study.world}/train.json", "--out", str(folder),
        "--dtype", "float32", "--max_new_tokens", str(study.tokens), "--workers", "0",
        "--no_checkpointing", "--prompts_per_step", "8", "--max_steps", str(study.steps),
        *study.training.split(), "--save_every", "50", "--keep", "1", "--seed", str(run.seed),
        "--sample_every", "1000000", *shlex.split(options)]
    return [train, test_command(out, study, folder / "final", folder)]


@cache
def made_here() -> dict:
    """What a run of this process is made with."""
    commit = os.environ.get("COMMIT") or subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT,
        capture_output=True, text=True).stdout.strip()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {"commit": commit or "unknown", "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {(*names, platform.processor())[0]}",
            "python": platform.python_version(), "torch": version("torch"),
            "transformers": version("transformers")}


def call(command: list[str], until: float, patience: float = 30) -> str | None:
    """Run a command with one thread and no GPU. Returns None, or what it printed if it failed;
    TimeoutError when the time `until` ended it: by SIGTERM, at which ktr.py saves."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": ""}          # a tiny model is no faster on a GPU
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        left = None if until == math.inf else until - time.monotonic()
        printed, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise TimeoutError from None
    return printed if process.returncode else None


def prepare(out: Path, name: str, until: float) -> None:
    """A world with 1,200 test questions, its cold start, and the start's answers to them."""
    study = next(study for study in STUDIES.values() if study.world == name)
    world, start = out / "worlds" / name, start_of(out, name)
    made = {world / "test.json": ["-m", "lab.toy", "make", str(world), "--world", name,
                                  "--test", "1200"],
            start / "preprocessor_config.json": ["-m", "lab.cold_start", str(start),
                                                 "--world", name],
            out / "starts" / f"{name} tested" / "after" / "scores.json": test_command(
                out, study, start, out / "starts" / f"{name} tested")}
    for file, command in made.items():
        if not file.exists() and (printed := call(command, until)):
            raise RuntimeError(f"{shlex.join(command)}\n{printed[-2000:]}")


def train_and_test(out: Path, run: Run, options: str, until: float = math.inf) -> None:
    """One run and its test score, left alone if they are there already, continued if they are
    begun. RuntimeError holds what a failure printed, or says that the folder holds a run under
    other options or another text of its rule's file (a rule inside attribution.py cannot be told:
    remove its folder)."""
    folder, commands = folder_of(out, run), commands_of(out, run, options)
    made_by = folder / "study.json"
    rules = [(ROOT / word).read_text() for word in shlex.split(options) if word.endswith(".py")]
    made = {"commands": commands, "rules": rules}
    if made_by.exists() and {**(held := json.loads(made_by.read_text())), **made} != held:
        raise RuntimeError(f"{folder} holds a run under other options or another text of its rule; "
                           "remove it or change --out")
    if (folder / "after" / "scores.json").exists():
        return
    if time.monotonic() >= until:
        raise TimeoutError
    folder.mkdir(parents=True, exist_ok=True)
    made_by.write_text(json.dumps({**made, "made": made_here()}))
    trained = (folder / "final").exists()
    for command in commands[trained:]:
        if printed := call(command, until):
            raise RuntimeError(f"{run.study}, {run.rule}, seed {run.seed}: {shlex.join(command)}\n"
                               f"{printed[-2000:]}")


def try_one_step(out: Path, options: str) -> None:
    """SystemExit with the last line that a failure prints: what is wrong, in a rule's error; and
    with the one before, where the last says where it was."""
    with tempfile.TemporaryDirectory() as folder:
        train, _ = commands_of(out, Run("toy", "tried", 0), options)
        tried = [*train, "--out", folder, "--max_steps", "1", "--save_every", "0"]
        printed = call(tried, math.inf)
    if printed:
        lines = printed.strip().splitlines()
        raise SystemExit("\n".join(lines[-2 if lines[-1].startswith("on rank ") else -1:]))


def run_all(out: Path, runs: list[Run], variants: dict[str, str], jobs: int, until: float) -> None:
    """`jobs` runs at once, in this order. At the time `until` what still runs saves and ends. A
    failure is raised once the others are done."""
    bar = tqdm(total=len(runs), unit="run", dynamic_ncols=True)
    worlds = dict.fromkeys(STUDIES[run.study].world for run in runs)
    with ThreadPoolExecutor(jobs) as pool:
        ready = {world: pool.submit(prepare, out, world, until) for world in worlds}

        def one(run: Run) -> None:
            ready[STUDIES[run.study].world].result()
            train_and_test(out, run, variants[run.rule], until)
            bar.update()

        begun = [pool.submit(one, run) for run in runs]
        try:
            failed = [error for future in begun if (error := future.exception())]
        finally:
            pool.shutdown(cancel_futures=True)          # Ctrl-C: those that run heard it too
            bar.close()
    for error in failed:
        if not isinstance(error, TimeoutError):
            raise error


def plan(studies: list[str], only: list[str] | None, seeds: int | None) -> list[Run]:
    """Rules with ten seeds or more first: the main questions are theirs. Ablations last. Seed by
    seed, so that a cut leaves whole ones."""
    runs = [Run(name, rule, seed) for name in STUDIES if name in studies
            for rule, most in STUDIES[name].seeds.items() if only is None or rule in only
            for seed in range(min(most, seeds or most))]

    def turn(run: Run) -> tuple[int, int]:
        if STUDIES[run.study].seeds[run.rule] >= 10:
            return 0, run.seed
        return 2 if run.rule in findings.ABLATIONS else 1, run.seed

    return sorted(runs, key=turn)


# ------------------------------------------------------------------------------------------ results
def kinds_of(scores: dict) -> dict[str, float]:
    return {name.removeprefix("kind: "): round(100 * row["strict"], 2)
            for name, row in scores.items() if name != "all"}


def scores_in(folder: Path) -> dict:
    return json.loads((folder / "after" / "scores.json").read_text())["scores"]


def outcome(folder: Path) -> dict:
    """Of one run: test accuracy, also by kind of question, and the mean accuracy of training
    (`learning`) in percent, and its curve; over the last fifth of the steps mean KL, gradient norm
    and share of key tokens; seconds."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    late, scores = log[-max(1, len(log) // 5):], scores_in(folder)
    found = {"accuracy": 100 * scores["all"]["strict"],
             "learning": 100 * statistics.mean(row["accuracy"] for row in log),
             "share": 100 * statistics.mean(row["key_share"] for row in late),
             "kl": statistics.mean(row["kl"] for row in late),
             "grad": statistics.mean(row["grad_norm"] for row in late),
             "seconds": sum(row["seconds"] for row in log)}
    found = {name: round(value, 4) for name, value in found.items()}
    curve = [round(100 * row["accuracy"], 1) for row in log]
    return {**found, "kinds": kinds_of(scores), "curve": curve}


def finished(out: Path, study: str, rule: str, most: int) -> dict[int, Path]:
    """{seed: folder}"""
    folders = {seed: folder_of(out, Run(study, rule, seed)) for seed in range(most)}
    return {seed: f for seed, f in folders.items() if (f / "after" / "scores.json").exists()}


def shown(out: Path, commands: list[list[str]]) -> list[str]:
    """Commands as a user would type them, the study's folder as OUT."""
    return [shlex.join(["python", *command]).replace(f"{out}/", "OUT/").replace(f"{ROOT}/", "")
            for command in commands]


def collect(out: Path, name: str, variants: dict[str, str], most: dict[str, int],
            earlier: dict | None = None) -> dict:
    """A study's finished runs, the start's scores, and what made them, as its file holds them:
    "made" are commits, machines and days with how many runs each made, and a run's "made" is its
    place there; "commands" are one run's. Runs of an `earlier` file stay where no folder holds
    newer ones, also beyond `most`. {} if no run is finished."""
    held = earlier or {"runs": {}, "made": [], "commands": []}
    runs = {rule: {seed: {**row, "made": held["made"][row["made"]]} for seed, row in rows.items()}
            for rule, rows in held["runs"].items()}
    commands = held["commands"]
    for rule, seeds in most.items():
        for seed, folder in finished(out, name, rule, seeds).items():
            by = json.loads((folder / "study.json").read_text())
            runs.setdefault(rule, {})[str(seed)] = {**outcome(folder), "made": by["made"]}
            commands = commands or shown(out, by["commands"])
    if not runs:
        return {}
    counts: Counter = Counter()
    for row in (row for rows in runs.values() for row in rows.values()):
        key = json.dumps({name: value for name, value in row["made"].items() if name != "runs"})
        counts[key] += 1
        row["made"] = list(counts).index(key)
    tested = out / "starts" / f"{STUDIES[name].world} tested"
    if (tested / "after" / "scores.json").exists() or not earlier:
        scores = scores_in(tested)
        start = {"accuracy": 100 * scores["all"]["strict"], "kinds": kinds_of(scores)}
    else:
        start = earlier["start"]
    rules = [rule for rule in variants if rule in runs]
    return {"made": [{**json.loads(key), "runs": n} for key, n in counts.items()],
            "commands": commands, "rules": {rule: variants[rule] for rule in rules}, "start": start,
            "runs": {rule: dict(sorted(runs[rule].items(), key=lambda row: int(row[0])))
                     for rule in rules}}


def earlier_file(out: Path, name: str) -> dict | None:
    """OUT/study_NAME.json, if there is one: its runs count as finished, so that a study goes on on
    another machine with its file alone. SystemExit if they were made under other options, or the
    file does not say by what. The texts of rules' files are not compared."""
    file = out / f"study_{name}.json"
    if not file.exists():
        return None
    held = json.loads(file.read_text())
    runs = [(Run(name, rule, int(seed)), row) for rule, rows in held["runs"].items()
            for seed, row in rows.items()]
    same = all(VARIANTS.get(rule) == options for rule, options in held["rules"].items()) and any(
        held["commands"] == shown(out, commands_of(out, run, VARIANTS[run.rule]))
        for run, _ in runs)
    if not same or any("made" not in row for _, row in runs):
        raise SystemExit(f"error: the runs of {file} were made under other options, or it does not "
                         "say by what; move it away or change --out")
    return held


def in_file(found: dict | None, run: Run) -> bool:
    return found is not None and str(run.seed) in found["runs"].get(run.rule, {})


def look(out: Path) -> None:
    """OUT/looks.json: what the signals find at the toy's cold start; gradients at each world's, and
    at the end of the demonstration's first run of Video-KTR."""
    for world in {study.world for study in STUDIES.values()}:
        prepare(out, world, math.inf)
    at = {study.world: (start_of(out, study.world), study) for study in STUDIES.values()}
    end = folder_of(out, Run("demonstration", "Video-KTR", 0)) / "final"
    if end.exists():
        at["toy, at the end of the demonstration"] = end, STUDIES["demonstration"]
    found = {"made": [made_here()],
             "attribution": attribution_table(str(start_of(out, "toy")), out / "worlds/toy"),
             "gradients": {name: gradient_analysis(
                 str(model), str(out / "worlds" / study.world), longest=study.tokens)
                 for name, (model, study) in at.items()}}
    (out / "looks.json").write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help=f"some of {', '.join(STUDIES)} (default: all)")
    add("--only", nargs="+", choices=VARIANTS, metavar="RULE",
        help="these rules of a study, by the names of its table (default: all)")
    add("--rule", type=Path, help="a file of yours that registers a rule (docs/rules.md)")
    add("--looks", action="store_true", help="look at attribution and gradients; train nothing")
    add("--seeds", type=int, help="most seeds of a rule (default: the study's; with --rule 4)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: one a core)")
    add("--minutes", type=float, default=math.inf,
        help="minutes until it stops; what runs then has half a minute more to save")
    add("--out", type=Path, default=Path("runs/study"), help="folder for worlds, runs and results")
    a = parser.parse_args()
    out, studies = a.out.resolve(), a.studies or (["toy"] if a.rule else list(STUDIES))
    if unknown := set(studies) - set(STUDIES):
        parser.error(f"{', '.join(unknown)}: no such study; there are {', '.join(STUDIES)}")
    if a.rule and a.rule.stem in VARIANTS:
        parser.error(f"--rule {a.rule}: a rule of the table has that name; rename the file")
    if a.seeds is not None and a.seeds < 1 or a.jobs < 1 or a.minutes <= 0:
        parser.error("--seeds and --jobs take a number from 1 on, --minutes one above 0")
    if a.looks:
        return look(out)

    earlier = {} if a.rule else {name: earlier_file(out, name) for name in studies}
    until, variants = time.monotonic() + 60 * a.minutes, dict(VARIANTS)
    seeds = a.seeds or (4 if a.rule else None)
    runs = [run for run in plan(studies, a.only or (CONTROLS if a.rule else None), seeds)
            if folder_of(out, run).exists() or not in_file(earlier.get(run.study), run)]
    if a.rule:
        if not load_rule(str(a.rule)):
            raise SystemExit(f"error: {a.rule} has no OPTIONS: nothing selects what it registers; "
                             "name it there, also where it replaces a default")
        variants[a.rule.stem] = f"--rule {shlex.quote(str(a.rule.resolve()))}"
        prepare(out, "toy", until)
        try_one_step(out, variants[a.rule.stem])
        runs += [Run("toy", a.rule.stem, seed) for seed in range(seeds)]
        runs.sort(key=lambda run: run.seed)
    try:
        run_all(out, runs, variants, a.jobs, until)
    finally:                                            # what is finished is kept in any case
        for name in studies:
            most = {run.rule: seeds for run in runs} if a.rule else STUDIES[name].seeds
            if found := collect(out, name, variants, most, earlier.get(name)):
                file = out / (f"{a.rule.stem}.json" if a.rule else f"study_{name}.json")
                part = file.with_suffix(".part")
                part.write_text(json.dumps(found))
                part.replace(file)
                print(f"\n{name}: {file}\n{findings.table_of(found)}")
    if a.rule:
        folders = {rule: list(finished(out, "toy", rule, seeds).values())
                   for rule in (a.rule.stem, *most)}
        if not folders[a.rule.stem]:
            raise SystemExit("no run of the rule is finished: again, with more --minutes")
        page(a.rule, {rule: runs for rule, runs in folders.items() if runs}, out,
             out / "worlds" / "toy", start_of(out, "toy"))


if __name__ == "__main__":
    main()
