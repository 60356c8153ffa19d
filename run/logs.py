"""What a run writes down: log.jsonl (every metric, every step), samples.jsonl, skipped.RANK.jsonl, and one line a step."""

import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from attribution import top_tokens
from data import Skipped
from run.options import Options
from prompt import Processor

PHASES = ("data", "sample", "score", "attribute", "reference", "backward", "step")


class Clock:
    """Seconds by phase."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, defaultdict(float), time.perf_counter()

    def __call__(self, phase: str) -> None:
        """Everything since the last call was `phase`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class Ledger:
    """GiB of GPU memory by what took it: what the first step leaves behind, and the peak of the second."""

    def __init__(self, device: torch.device):
        self.on, self.parts, self.last = device.type == "cuda", defaultdict(float), 0.0

    def __call__(self, part: str) -> None:
        """Everything allocated since the last call and still held is `part`'s."""
        if self.on:
            now = torch.cuda.memory_allocated() / 2 ** 30
            self.parts[part] += now - self.last
            self.last = now

    def settle(self) -> None:
        """The first step is over: all that lasts is allocated."""
        if self.on:
            self("gradients")                           # freed just now, or DDP's buckets
            self.on = False
            torch.cuda.reset_peak_memory_stats()

    def close(self) -> dict[str, float]:
        """GiB by part, for activations what the peak exceeds the parts by; empty without a GPU."""
        if not self.parts:
            return {}
        peak, reserved = torch.cuda.max_memory_allocated() / 2 ** 30, torch.cuda.max_memory_reserved() / 2 ** 30
        return {**self.parts, "activations": peak - sum(self.parts.values()), "peak": peak, "reserved": reserved}


def add_up(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sums over all ranks, in one collective; every rank must bring the same names."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


METRICS = ("reward", "reward_std", "flat", "accuracy", "format", "bonus", "length", "ended", "tokens", "loss", "kl", "clipped",
           "entropy", "key_share", "overlap", "sampling_gap")


def names_of(o: Options) -> list[str]:
    """The metrics of one prompt that are logged, the same on every rank; the README explains each."""
    return [*METRICS, *(f"share_{name}" for name in o.signals)]


def measured(o: Options, item: dict) -> dict[str, float]:
    """The metrics of one prompt."""
    r, group, rewards = item["rollout"], item["group"], item["rewards"]
    n = r.valid.sum()
    chosen = chosen_by(o, item)
    times = sum(chosen.values(), torch.zeros_like(r.valid, dtype=torch.int))        # signals that chose each token
    values = {
        "reward": rewards.mean(), "reward_std": rewards.std(), "flat": (rewards == rewards[0]).all(), "length": n / o.G,
        "ended": group.ended.float().mean(), "tokens": n, "entropy": r.entropy.sum() / n,
        "overlap": (times > 1).sum() / item["key_mask"].sum().clamp(min=1),
        "sampling_gap": (r.logp - group.logp).abs().masked_fill(~r.valid, 0).sum() / n,
        **{name: item[name].float().mean() for name in ("accuracy", "format", "bonus", "loss", "kl", "clipped", "key_share")},
        **{f"share_{name}": chosen[name].sum() / n if name in chosen else torch.zeros(()) for name in o.signals}}
    return {name: float(values[name]) for name in names_of(o)}


def chosen_by(o: Options, item: dict) -> dict[str, torch.Tensor]:
    """Each signal's own key tokens (G, T)."""
    return {name: top_tokens(scores, item["rollout"].valid, o.ratios[name], o.pool, o.ties)
            for name, scores in item["signals"].items()}


def line_of(row: dict[str, float], steps: int) -> str:
    """One aligned line per step; the README explains the columns."""
    seconds = " ".join(f"{name} {row[f'seconds_{name}']:.1f}" for name in PHASES if row[f"seconds_{name}"] >= 0.05)
    memory = f" {row['memory_gib']:.1f}GiB" if row["memory_gib"] else ""
    return (f"{row['step']:5d}/{steps}  reward {row['reward']:5.3f}  acc {row['accuracy']:5.3f}  fmt {row['format']:4.2f}  "
            f"len {row['length']:5.1f}  key {100 * row['key_share']:4.1f}%  kl {row['kl']:7.4f}  grad {row['grad_norm']:7.3f}  "
            f"lr {row['lr']:.1e}  {row['seconds']:5.2f}s ({seconds}){memory}")


def sample_of(o: Options, item: dict, step: int, processor: Processor, most: int = 4) -> dict:
    """What samples.jsonl keeps of one prompt: its first completions, token by token with scores and choices."""
    record, group, chosen = item["prompt"].record, item["group"], chosen_by(o, item)
    rows = []
    for g, n in enumerate(group.lengths[:most]):
        rows.append({
            "tokens": [processor.tokenizer.decode([i]) for i in group.ids[g, :n].tolist()],
            "signals": {name: [float(f"{x:.3g}") for x in scores[g, :n].tolist()] for name, scores in item["signals"].items()},
            "chosen": {name: mask[g, :n].int().tolist() for name, mask in chosen.items()},
            **{name: float(item[name][g]) for name in ("accuracy", "format", "advantages")}, "reward": float(item["rewards"][g])})
    kept = ("problem_id", "problem", "options", "solution", "path", "data_type")
    return {"step": step, "watched": "watched" in item, **{name: record.get(name) for name in kept}, "completions": rows}


def reporter(o: Options, out: Path):
    """A function that sends a row to TensorBoard or Weights & Biases, where asked for and installed."""
    try:
        if o.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(out))
            return lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()]
        if o.report_to == "wandb":
            import wandb
            run = wandb.init(project="video-ktr", name=out.name, config=asdict(o))
            return lambda row: run.log(row, step=row["step"])
    except ImportError:
        raise SystemExit(f"error: --report_to {o.report_to} needs it installed: pip install {o.report_to}") from None
    return None


class Log:
    """The files of one run. Rank 0 writes log and samples; every rank writes down the records it skips."""

    def __init__(self, o: Options, out: Path, rank: int, start: int):
        self.out, self.rank, self.writer = out, rank, None
        if rank:
            return
        (out / "options.json").write_text(json.dumps(asdict(o), indent=2))
        for name in ("log.jsonl", "samples.jsonl"):                 # a resumed run repeats what came after its checkpoint
            lines = (out / name).open(encoding="utf-8").readlines() if (out / name).exists() else []
            (out / name).write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= start), "utf-8")
        self.writer = reporter(o, out)

    def append(self, name: str, row: dict) -> None:
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def step(self, step: int, steps: int, totals: dict[str, float], more: dict[str, float], clock: Clock) -> None:
        """One line of log.jsonl: means over the prompts of all ranks, and rank 0's seconds and memory."""
        if self.rank:
            return
        n, seconds = max(totals["prompts"], 1), sum(clock.seconds.values())
        row = {"step": step, **{name: value / n for name, value in totals.items() if name not in ("leaving", "skipped", "prompts")},
               **more, "tokens": totals["tokens"], "prompts": totals["prompts"], "seconds": seconds,
               "tokens_per_second": totals["tokens"] / seconds, **{f"seconds_{name}": clock.seconds[name] for name in PHASES},
               "memory_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0.0}
        self.append("log.jsonl", row)
        tqdm.write(line_of(row, steps))
        if self.writer:
            self.writer(row)

    def memory(self, parts: dict[str, float]) -> None:
        if self.rank == 0 and parts:
            (self.out / "memory.json").write_text(json.dumps(parts, indent=1))

    def sample(self, row: dict) -> None:
        if self.rank == 0:
            self.append("samples.jsonl", row)

    def skip(self, item: Skipped, step: int) -> None:
        tqdm.write(f"skipped: {item.reason}")
        self.append(f"skipped.{self.rank}.jsonl", {"step": step, "problem_id": item.record.get("problem_id"), "reason": item.reason})
