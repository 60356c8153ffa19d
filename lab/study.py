"""Is the key token key? The same training under different rules for choosing tokens, on the toy world, with controls.

    python -m lab.study                                           every variant below, five seeds each; resumable
    python -m lab.study --only GRPO Video-KTR "random 45%" --add "mine=--signals mine"      your rule against its controls
    python -m lab.study --gradients runs/study/Video-KTR/seed-0/final       the paper's gradient analysis

All variants share data, seeds, learning rate and steps. Differences are paired by seed: the same cold start, the same
order of prompts, the same random numbers in sampling. "/selected" variants divide a row by its key tokens instead of
its length; they take steps 2 to 5 times as large, which is a difference of learning rate and is shown apart.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch
from tqdm import tqdm

from attribution import Rollout, attribute, select
from ablations import shift
from data import Prompts, read_records
from grpo import group_advantages
from policy import load, sample, score_groups
from rewards import accuracy_reward, format_reward

VARIANTS = {
    "GRPO": "--signals all",
    "random 20%": "--signals random",
    "random 45%": "--signals random --ratio 0.45",                  # as many tokens as the union of the three
    "entropy": "--signals entropy",
    "visual": "--signals visual",
    "temporal": "--signals temporal",
    "visual+entropy": "--signals visual entropy",
    "temporal+entropy": "--signals temporal entropy",
    "visual+temporal": "--signals visual temporal",
    "Video-KTR": "",
    "T-GRPO": "--signals all --ordered_bonus 0.3",
    "TW-GRPO": "--signals spread --weighting spread",
    "KTR 10%": "--ratio 0.1",
    "KTR 50%": "--ratio 0.5",
    "KTR linear weights": "--weighting linear",
    "KTR JS distance": "--distance js",
    "KTR reversed frames": "--order reverse",
    "KTR half masked": "--masking half",
    "KTR signed": "--shift signed",
    "GRPO lr x2.2": "--signals all --lr 2.2e-4",                    # the step size that /selected amounts to
    "random 45% /selected": "--signals random --ratio 0.45 --normalize selected",
    "KTR /selected": "--normalize selected",
}
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
T_80 = (1.38, 1.06, 0.98, 0.94, 0.92, 0.91, 0.90, 0.89, 0.88, 0.88, 0.88, 0.87, 0.87, 0.87, 0.87, 0.86, 0.86, 0.86, 0.86)


# --------------------------------------------------------------------------------------------- runs
def train_and_test(name: str, seed: int, options: str, a: argparse.Namespace, device: str) -> None:
    """One run and its test score, left alone if they are there already. RuntimeError holds what a failure printed, or says
    that the folder holds a run under other options (a rule whose code has changed cannot be told: remove its folder)."""
    out = Path(a.out) / name.replace("/", "per-") / f"seed-{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": device, "HF_HUB_OFFLINE": "1"}
    train = ["ktr.py", "--model", a.model, "--data", f"{a.world}/train.json", "--out", str(out), "--dtype", "float32",
             "--no_checkpointing", "--max_new_tokens", "64", "--prompts_per_step", "4", "--max_steps", str(a.steps), "--lr", "1e-4",
             "--warmup_steps", "10", "--save_every", "1000", "--keep", "1", "--workers", "0", "--seed", str(seed),
             "--sample_every", "1000000", *shlex.split(options)]
    test = ["evaluate.py", "--model", str(out / "final"), "--data", f"{a.world}/test.json", "--videos", a.world, "--benchmark", "toy",
            "--out", str(out / "after"), "--max_new_tokens", "64", "--batch", "100", "--dtype", "float32", "--workers", "0"]
    made_by = out / "study.json"
    if made_by.exists() and json.loads(made_by.read_text()) != [train, test]:
        raise RuntimeError(f"{out} holds a run under other options; remove it or choose another --out")
    if (out / "after" / "scores.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    made_by.write_text(json.dumps([train, test]))
    for command in (train, test):
        done = subprocess.run([sys.executable, *command], cwd=Path(__file__).resolve().parent.parent, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}: {shlex.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")


def run_all(variants: dict[str, str], a: argparse.Namespace) -> None:
    """Every variant and seed, as many at once as there are cores or GPUs."""
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    places: Queue = Queue()
    for i in range(a.jobs or (4 * len(gpus) or os.cpu_count())):
        places.put(gpus[i % len(gpus)] if gpus else "")
    work = [(name, seed, options) for seed in range(a.seeds) for name, options in variants.items()]
    with tqdm(total=len(work), unit="run", dynamic_ncols=True) as bar, ThreadPoolExecutor(places.qsize()) as pool:
        def one(item):
            device = places.get()
            try:
                train_and_test(*item, a, device)
            finally:
                places.put(device)
                bar.update()
        list(pool.map(one, work))


# -------------------------------------------------------------------------------------------- table
def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t)."""
    n = len(values)
    return statistics.mean(values), T_95[min(n, len(T_95) + 1) - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else float("nan")


def outcome(run: Path) -> dict[str, float]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    late = log[-max(1, len(log) // 5):]
    scores = json.loads((run / "after" / "scores.json").read_text())["scores"]
    return {"accuracy": 100 * scores["all"]["strict"], "reward": statistics.mean(row["reward"] for row in late),
            "learning": 100 * statistics.mean(row["accuracy"] for row in log), "kl": statistics.mean(row["kl"] for row in late),
            "grad": statistics.mean(row["grad_norm"] for row in late), "share": 100 * statistics.mean(row["key_share"] for row in late),
            "seconds": sum(row["seconds"] for row in log)}


def print_table(variants: dict[str, str], a: argparse.Namespace) -> dict:
    """Test accuracy and learning with intervals, paired differences from GRPO and from chance, and what went with them."""
    found = {name: [outcome(Path(a.out) / name.replace("/", "per-") / f"seed-{seed}") for seed in range(a.seeds)] for name in variants}
    compared = [(measure, control) for measure, control in (("accuracy", "GRPO"), ("accuracy", "random 45%"), ("learning", "GRPO"))
                if control in found]
    print(f"{'':22} test accuracy" + "".join(f"   minus {control:11}" for measure, control in compared if measure == "accuracy")
          + "  learning" + "   minus GRPO  " * ("GRPO" in found) + "   reward  tokens     kl   grad  seconds")
    table, noise = {}, {measure: [] for measure in ("accuracy", "learning")}
    for name, runs in found.items():
        row = {key: interval([run[key] for run in runs]) for key in runs[0]}
        text = {"accuracy": f"{row['accuracy'][0]:5.1f} +- {row['accuracy'][1]:4.1f}", "learning": f"   {row['learning'][0]:5.1f}"}
        for measure, control in compared:
            differences = [run[measure] - other[measure] for run, other in zip(runs, found[control])]
            label = f"minus {control}" if measure == "accuracy" else f"learning minus {control}"
            row[label] = interval(differences)
            text[measure] += f"   {row[label][0]:+6.1f} +- {row[label][1]:4.1f}" if name != control else " " * 17
            if name != control and len(runs) > 1:
                noise[measure].append(statistics.stdev(differences))
        print(f"{name:22} {text['accuracy']} {text['learning']}  {row['reward'][0]:6.2f} {row['share'][0]:6.0f}% {row['kl'][0]:6.3f} "
              f"{row['grad'][0]:6.2f} {row['seconds'][0]:8.0f}")
        table[name] = row
    if noise["accuracy"]:
        df = min(a.seeds, len(T_95) + 1) - 2
        least = {measure: (T_95[df] + T_80[df]) * statistics.median(some) / math.sqrt(a.seeds) for measure, some in noise.items() if some}
        print(f"+-: 95% intervals over {a.seeds} seeds. The study would find (80% power, 5% level) a paired difference of "
              + ", ".join(f"{points:.1f} points of {measure}" for measure, points in least.items()))
    print("learning: mean training accuracy over all steps in percent, the area under the curve")
    return table


def plot(variants: dict[str, str], a: argparse.Namespace, path: Path) -> None:
    """Training reward against step, mean over seeds, smoothed; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name in variants:
        runs = [[json.loads(line)["reward"] for line in (Path(a.out) / name.replace("/", "per-") / f"seed-{seed}" / "log.jsonl").open()]
                for seed in range(a.seeds)]
        mean = torch.tensor(runs).mean(0)
        smooth = mean.unfold(0, min(10, len(mean)), 1).mean(-1)
        axes.plot(range(len(mean) - len(smooth), len(mean)), smooth, label=name, linewidth=2.2 if name in ("GRPO", "Video-KTR") else 1)
    axes.set(xlabel="step", ylabel="training reward (mean over seeds, 10 steps)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


# ---------------------------------------------------------------------------------------- gradients
def gradient_analysis(model_name: str, a: argparse.Namespace, questions: int = 64, G: int = 8) -> dict:
    """The paper's analysis at one checkpoint: the last layer's gradient from the key tokens and from the others, their cosine
    with the whole gradient, and the variance over completions of the loss that each leaves, -A_i/|o_i| sum_t m_t logp_t."""
    model, processor = load(model_name)
    records = [r for r in read_records(f"{a.world}/train.json")[0] if r["data_type"] == "video"][:questions]
    prompts = [Prompts(records, a.world, processor)[i] for i in range(len(records))]
    groups = sample(model, prompts, G, 64, seeds=range(len(prompts)))
    last = list(model.model.language_model.layers[-1].parameters())
    rules = {"Video-KTR": ({"visual": 0.2, "temporal": 0.2, "entropy": 0.2}), "random 45%": {"random": 0.45}}
    norms = {rule: {"key": [], "other": [], "cosine key": [], "cosine other": []} for rule in rules}
    losses: dict[str, list[float]] = {"GRPO": [], **{rule: [] for rule in rules}}
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        texts = [processor.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(group.ids, group.lengths)]
        rewards = torch.tensor([accuracy_reward(t, prompt.record["solution"], prompt.record["problem_type"]) + format_reward(t) for t in texts])
        advantages = group_advantages(rewards)
        if not advantages.any():
            continue
        ((logp, entropy),) = score_groups(model, [prompt], [group])
        r = Rollout(prompt, group.ids, group.valid, logp.detach(), entropy, torch.Generator().manual_seed(i))

        def moved(_, changed):
            with torch.no_grad():
                return [shift(r.logp, score_groups(model, changed, [group])[0][0])]
        tokens = -advantages[:, None] * logp / group.valid.sum(-1, keepdim=True)                    # (G, T)

        def gradient(mask):
            parts = torch.autograd.grad((tokens * mask).sum(), last, retain_graph=True)
            return torch.cat([g.flatten() for g in parts])
        whole = gradient(group.valid)
        losses["GRPO"] += (tokens * group.valid).sum(-1).tolist()
        for rule, ratios in rules.items():
            key = select(attribute([r], list(ratios), moved)[0], group.valid, ratios)
            losses[rule] += (tokens * key).sum(-1).tolist()
            for name, mask in (("key", key), ("other", group.valid & ~key)):
                g = gradient(mask)
                norms[rule][name].append(g.norm().item())
                norms[rule][f"cosine {name}"].append(torch.cosine_similarity(g, whole, dim=0).item())
    if not losses["GRPO"]:
        raise SystemExit(f"error: {model_name}: in all {len(groups)} groups the completions earn alike; there is no gradient to look at")
    table = {rule: {name: statistics.mean(values) for name, values in found.items()} for rule, found in norms.items()}
    variance = {rule: statistics.variance(values) for rule, values in losses.items()}
    print(f"last layer's gradient, mean over {len(norms['Video-KTR']['key'])} groups with unequal rewards")
    for rule, row in table.items():
        print(f"{rule:12} norm: key tokens {row['key']:.4f}, others {row['other']:.4f}; cosine with the whole: "
              f"{row['cosine key']:.3f}, {row['cosine other']:.3f}")
    print("variance of the loss: " + ", ".join(f"{rule} {value:.3f}" for rule, value in variance.items()))
    return {"gradients": table, "loss variance": variance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=OPTIONS", help="further variants, as options of ktr.py")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=0, help="runs at once (default: one per core, four per GPU)")
    parser.add_argument("--world", default="toy_world")
    parser.add_argument("--model", default="cold_start")
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--gradients", metavar="MODEL", help="the gradient analysis at this checkpoint instead")
    a = parser.parse_args()
    if a.gradients:
        return gradient_analysis(a.gradients, a)
    unknown = [name for name in a.only or [] if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    if not Path(a.world, "test.json").exists():
        subprocess.run([sys.executable, "-m", "lab.toy", "make", a.world], check=True)
    if any("=" not in item for item in a.add):
        parser.error("--add takes NAME=OPTIONS")
    variants = {name: VARIANTS[name] for name in a.only or VARIANTS} | dict(item.split("=", 1) for item in a.add)
    run_all(variants, a)
    table = print_table(variants, a)
    Path(a.out, "table.json").write_text(json.dumps({"options": vars(a), "variants": variants, "table": table}, indent=1))
    plot(variants, a, Path(a.out, "reward.png"))


if __name__ == "__main__":
    main()
