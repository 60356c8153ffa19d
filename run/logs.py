"""What a run writes down, and one line a step. Rollouts are rollout.Rollout.

    log.jsonl           every metric of every step; docs/running.md explains each
    samples.jsonl       completions with every token's scores and choices
    skipped.RANK.jsonl  records that could not be used, with the reason
"""

import json
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from options import Options

PHASES = ("data", "sample", "score", "reference", "attribute", "backward", "step")
REWARDS = ("accuracy", "format", "length_bonus", "extra_reward")
METRICS = ("reward", "reward_std", "flat", *REWARDS, "length", "ended", "tokens", "loss", "kl",
           "clipped", "dropped", "entropy", "key_share", "overlap", "sampling_gap")
OF_THE_LOSS = ("kl", "clipped")         # means over the groups that count in the loss
SAMPLED = 4             # completions of a prompt that samples.jsonl keeps


class Clock:
    """Seconds by phase. On a GPU they are its own, and nobody waits for it until they are read."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self("begin")

    def __call__(self, phase: str) -> None:
        """Everything since the last call was `phase`."""
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((phase, now))

    @property
    def seconds(self) -> dict[str, float]:
        spent, cuda = {}, self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        for (_, begun), (phase, ended) in pairwise(self.marks):
            seconds = begun.elapsed_time(ended) / 1000 if cuda else ended - begun
            spent[phase] = spent.get(phase, 0.0) + seconds
        return spent


def metrics_of(r) -> dict[str, float]:
    """The metrics of one rollout: METRICS, and the share of each signal's top tokens."""
    mask, rewards = r.group.completion_mask, r.rewards
    n = mask.sum()
    signals = sum(r.top_tokens.values(), torch.zeros_like(mask, dtype=torch.int))   # (G, T) count
    gap = (r.old_logp - r.group.logp).abs().masked_fill(~mask, 0)
    values: dict[str, Tensor] = {
        "reward": rewards.mean(), "reward_std": rewards.std(),
        "flat": (rewards == rewards[0]).all(), "dropped": ~r.loss_mask.any(),
        **{name: getattr(r, name).mean() for name in REWARDS}, "length": n / len(rewards),
        "ended": r.group.ended.float().mean(), "tokens": n, "entropy": r.entropy.sum() / n,
        "overlap": (signals > 1).sum() / r.key_mask.sum().clamp(min=1),
        "sampling_gap": gap.sum() / n, **r.metrics}
    values |= {f"share_{name}": tokens.sum() / n for name, tokens in r.top_tokens.items()}
    return {name: float(value) for name, value in values.items()}


def metric_sums(o: Options, rollouts: list, leaving: bool) -> dict[str, float]:
    """What a rank's step adds to the sums over all ranks; the same names on each of them."""
    names = [*METRICS, *(f"share_{name}" for name in o.signals)]
    found = [metrics_of(r) for r in rollouts]
    sums = {name: sum(metrics.get(name, 0.0) for metrics in found) for name in names}
    return {"prompts": len(rollouts), "leaving": leaving, **sums}


def line_of(row: dict[str, float], steps: int) -> str:
    """One aligned line per step."""
    seconds = " ".join(f"{name} {row[f'seconds_{name}']:.1f}" for name in PHASES
                       if row[f"seconds_{name}"] >= 0.05)
    memory = f" {row['memory_gib']:.1f}GiB" if row["memory_gib"] else ""
    return (f"{row['step']:5d}/{steps}  reward {row['reward']:5.3f}  acc {row['accuracy']:5.3f}  "
            f"fmt {row['format']:4.2f}  len {row['length']:5.1f}  "
            f"key {100 * row['key_share']:4.1f}%  kl {row['kl']:7.4f}  "
            f"grad {row['grad_norm']:7.3f}  lr {row['lr']:.1e}  {row['seconds']:5.2f}s "
            f"({seconds}){memory}")


def sample_of(r, step: int, tokenizer, watched: bool = False) -> dict:
    """What samples.jsonl keeps of a rollout: its first completions, token by token. watched: it is
    of the question that is asked again through the whole run."""
    completions = []
    for g, n in enumerate(r.group.lengths[:SAMPLED]):
        scores = {name: s[g, :n].tolist() for name, s in r.scores.items()}
        completions.append({
            "tokens": [tokenizer.decode([i]) for i in r.group.ids[g, :n].tolist()],
            "signals": {name: [float(f"{x:.3g}") for x in row] for name, row in scores.items()},
            "top_tokens": {name: c[g, :n].int().tolist() for name, c in r.top_tokens.items()},
            "accuracy": float(r.accuracy[g]), "format": float(r.format[g]),
            "advantages": float(r.advantages[g]), "reward": float(r.rewards[g])})
    names = ("problem_id", "problem", "options", "solution", "path", "data_type")
    about = {name: r.prompt.record.get(name) for name in names}
    return {"step": step, "watched": watched, **about, "completions": completions}


def rows_of(path: Path) -> list[dict]:
    """The whole rows of a JSON-lines file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def lost_records(out: Path) -> dict[int, str]:
    """{row: reason} of the records that ended a decoder, which a continued run does not try."""
    rows = [row for path in out.glob("skipped.*.jsonl") for row in rows_of(path)]
    return {row["row"]: row["reason"] for row in rows if row.get("lost")}


def drop_later_rows(out: Path, step: int) -> None:
    """Drop what a run's files hold of steps after `step`, since those are done again; lost decoders
    stay. Without a checkpoint to go on from (step 0) the files are put aside, as
    NAME.before-SECONDS. For rank 0, before any rank writes."""
    for path in [out / "log.jsonl", out / "samples.jsonl", *out.glob("skipped.*.jsonl")]:
        if path.exists() and step == 0:
            path.rename(f"{path}.before-{int(time.time())}")
        elif path.exists():
            kept = [row for row in rows_of(path) if row["step"] <= step or row.get("lost")]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
            part.replace(path)                  # whole, whatever kills this process


def reporter(o: Options, out: Path) -> tuple | None:
    """(what sends a row of the log, what ends that) where --report_to says; None if nowhere.
    SystemExit if that is not installed."""
    try:
        if o.report_to == "wandb":
            import wandb
            run = wandb.init(project="video-ktr", name=out.name, config=asdict(o))
            return run.log, run.finish
        if o.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out)
            return (lambda row: [board.add_scalar(*item, row["step"]) for item in row.items()],
                    board.close)
    except ImportError:
        raise SystemExit(f"error: pip install {o.report_to}, or leave --report_to out") from None


class Log:
    """The files of one run. Rank 0 writes log and samples; every rank, what it skips."""

    def __init__(self, out: Path, rank: int, reporter=None):
        self.out, self.rank, self.reporter = out, rank, reporter

    def append(self, name: str, row: dict) -> None:
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def step(self, step: int, steps: int, sums: dict[str, float], more: dict[str, float],
             clock: Clock) -> None:
        """One row: means over the prompts of all ranks; seconds and memory are rank 0's."""
        if self.rank:
            return
        spent, n = clock.seconds, max(sums["prompts"], 1)
        in_loss, seconds = max(n - sums["dropped"], 1), sum(spent.values())
        means = {name: value / (in_loss if name in OF_THE_LOSS else n)
                 for name, value in sums.items() if name != "leaving"}
        row = {"step": step, **means, **more, "tokens": sums["tokens"], "seconds": seconds,
               "prompts": sums["prompts"], "tokens_per_second": sums["tokens"] / seconds,
               **{f"seconds_{name}": spent.get(name, 0.0) for name in PHASES},
               "memory_gib": torch.cuda.max_memory_allocated() / 2 ** 30}
        self.append("log.jsonl", row)
        tqdm.write(line_of(row, steps))
        if self.reporter:
            send, end = self.reporter
            send(row)
            if step == steps:                   # exit_process() leaves no other chance
                end()

    def skip(self, skipped, step: int) -> None:
        """Name a data.Skipped; step: the one that it is skipped in, counted from 1."""
        tqdm.write(f"skipped: {skipped.reason}")
        names = {name: skipped.record.get(name) for name in ("row", "path", "problem_id")}
        self.append(f"skipped.{self.rank}.jsonl",
                    {"step": step, **names, "reason": skipped.reason, "lost": skipped.lost})
