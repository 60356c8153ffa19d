"""A run under way: how it begins, what lasts through it, and what is done between its steps."""

import json
import math
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attribution import RuleError
from engine.prepare import recompute
from engine.sharded import ShardedAdamW
from engine.weights import freeze
from options import Options
from policy import load, score_groups
from prompt import Prompt
from rollout import Group, Rollout
from run import checkpoint
from run.distributed import all_reduce_sum, distributed
from run.logs import Clock, Log, drop_later_rows, reporter, sample_of
from run.preflight import UNUSABLE, made_by
from run.stream import Stream

NOT_FINITE = 5          # steps in a row that may be skipped because the gradient is not finite
IDLE = 10               # steps in a row without anything to learn, before that is said


class Scorer(nn.Module):
    """What DDP wraps: the policy's scoring. Without prompts it is 0 times every trained weight, so
    that a rank whose records cannot be used still takes part in the same collectives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, prompts: list[Prompt], groups: list[Group]):
        if not prompts:
            return sum(p.sum() for p in self.model.parameters() if p.requires_grad) * 0.0
        return score_groups(self.model, prompts, groups)


def across_ranks(scorer: nn.Module, optimizer: ShardedAdamW, device: torch.device) -> nn.Module:
    """The scorer in DDP, which averages gradients over the ranks and keeps them in its buckets."""
    torch._dynamo.config.optimize_ddp = False               # layers are compiled one by one
    ids = [device.index] if device.type == "cuda" else None
    scorer = DistributedDataParallel(scorer, device_ids=ids, gradient_as_bucket_view=True,
                                     broadcast_buffers=False)
    # DDP makes its buckets anew at the second forward, and keeps the old ones while gradients or
    # NCCL hold them: two empty passes that let go of both, or gradients would be held twice
    for _ in range(2):
        scorer.zero_grad()
        scorer([], []).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
            time.sleep(1)               # NCCL's watchdog lets go of tensors ten times a second
    optimizer.zero_grad()
    return scorer


class Training:
    """What lasts through a run, and what is done between its steps."""

    def __init__(self, o: Options, records: list[dict], left_out: set[int]):
        """Load policy, optimizer and reference; go on from the newest checkpoint, if any."""
        self.o, self.preemption = o, checkpoint.Preemption()
        self.rank, self.ranks, self.device = rank, ranks, device = distributed()
        out = Path(o.out)
        out.mkdir(parents=True, exist_ok=True)
        self.log = Log(out, rank, reporter(o, out) if rank == 0 else None)
        resumed = checkpoint.newest(out)
        self.model, self.processor = load(str(resumed or o.model), device, getattr(torch, o.dtype))
        trained = freeze(self.model, o.freeze)
        if o.checkpointing:
            recompute(self.model)
        self.optimizer = ShardedAdamW(self.model, o.lr, o.weight_decay, offload=o.offload)
        self.reference: nn.Module | None = None         # the starting checkpoint, for the KL
        if o.beta > 0:
            self.reference, _ = load(o.model, device, self.model.dtype, seed=1)
            self.reference.requires_grad_(False)
        self.scorer: nn.Module = Scorer(self.model)
        if ranks > 1:
            self.scorer = across_ranks(self.scorer, self.optimizer, device)

        self.state = {"step": 0, "place": 0, "skipped": 0, "not_finite": 0, "idle": 0,
                      "made_by": made_by(o, ranks, records)}    # what checkpoints keep
        if resumed:
            self.state |= checkpoint.load_state(resumed, self.optimizer)
            trained += f"; continuing from {resumed}"
        if rank == 0:
            for part in out.glob("checkpoint-*.part"):          # of a save that was killed
                shutil.rmtree(part, ignore_errors=True)
            drop_later_rows(out, self.state["step"])
            (out / "options.json").write_text(json.dumps(asdict(o), indent=2))
        all_reduce_sum({"ranks": 1}, device)            # none writes before that is done
        self.stream = Stream(o, records, left_out, self.processor, self.log, rank, ranks,
                             self.state)
        steps, planned = self.stream.steps, self.state.get("steps", self.stream.steps)
        weights, left = sum(p.numel() for p in self.model.parameters()), steps - self.stream.first
        hours = left * o.max_new_tokens * weights * (0.7 + 0.3 * o.prompts_per_step) / 3.6e15
        if rank == 0:       # by 6.4 s on H100s at T = 768 and 8.3e9 weights (docs/speed.md)
            on_gpus = f" ({hours:.1f} hours on H100s)" * torch.cuda.is_available()
            print(f"{trained}; {left} steps on {ranks} processes{on_gpus}; a checkpoint takes "
                  f"{14e-9 * weights:.3g} GB")
        if planned != steps and rank == 0:
            print(f"the run now has {steps} steps, not {planned}: the lr follows another cosine")
        self.state["steps"] = steps
        # (prompt, seed) of a question that is asked again through the whole run
        self.watched = self.stream.watched(left_out) if rank == 0 else None

    @contextmanager
    def name_errors(self, step: int):
        """An error inside says on which rank, in which step and with which records it happened; one
        in a rule's output is told in one line."""
        try:
            yield
        except RuleError as error:
            raise SystemExit(f"error: {error}") from None
        except Exception as error:
            records = [self.stream.records[i] for _, i in self.stream.places_of_rank(step)]
            names = ", ".join(str(record["problem_id"]) for record in records)
            error.add_note(f"on rank {self.rank} in step {step + 1}, with the records {names}")
            raise

    def averaging(self, last: bool):
        """Gradients are averaged over the ranks in the last backward pass of a step."""
        return nullcontext() if last or self.ranks == 1 else self.scorer.no_sync()

    def end_step(self, sums: dict[str, float], norm: float, lr: float, clock: Clock) -> bool:
        """Count and log a step; whether a signal reached any rank, so that the run stops here."""
        state, step = self.state, self.state["step"]
        state["step"], state["place"] = step + 1, self.stream.place_after(step)
        state["skipped"] += self.stream.all_ranks_prompts - int(sums["prompts"])
        state["not_finite"] = 0 if math.isfinite(norm) else state["not_finite"] + 1
        more = {"grad_norm": norm, "lr": lr, "skipped": state["skipped"]}
        self.log.step(step + 1, self.stream.steps, sums, more, clock)
        self.report_idle(sums)
        return sums["leaving"] > 0

    def report_idle(self, sums: dict[str, float]) -> None:
        """Say when nothing has been learnt in IDLE steps in a row, and why."""
        prompts, state = sums["prompts"], self.state
        flat, keyless = sums["flat"] == prompts, sums["key_share"] == 0
        state["idle"] = state["idle"] + 1 if prompts and (flat or keyless) else 0
        if state["idle"] == IDLE and self.rank == 0:
            why = f"no token carried gradient: none of --signals {' '.join(self.o.signals)} applied"
            if flat:
                why = (f"in every group all completions earned the same (reward "
                       f"{sums['reward'] / prompts:.2f}); {self.o.out}/samples.jsonl shows some")
            elif sums["dropped"] == prompts:
                why = "--filter or --mask_cut left every group out of the loss"
            tqdm.write(f"nothing was learnt in {IDLE} steps: {why}")

    def samples_due(self) -> bool:
        every = self.o.sample_every or max(1, self.stream.steps // 50)
        return self.rank == 0 and self.state["step"] % every == 0

    def log_samples(self, rollouts: list[Rollout], watched: Rollout | None) -> None:
        for r in [*rollouts, *([watched] if watched else [])]:
            self.log.append("samples.jsonl", sample_of(
                r, self.state["step"], self.processor.tokenizer, watched=r is watched))

    def save_when_due(self, stopping: bool) -> None:
        """A checkpoint when it is due. SystemExit where the run must end: a signal asked for it,
        the model has broken, or too many records cannot be used."""
        o, out, done, steps = self.o, Path(self.o.out), self.state["step"], self.stream.steps
        if self.state["not_finite"] >= NOT_FINITE:
            raise SystemExit(f"error: the gradient was not finite in {NOT_FINITE} steps in a row; "
                             f"lower --lr, or look at {out / 'samples.jsonl'}")
        seen, skipped = done * self.stream.all_ranks_prompts, self.state["skipped"]
        if skipped > UNUSABLE * max(seen, 100):
            raise SystemExit(f"error: {skipped} of {seen} records could not be used, named in "
                             f"{out}/skipped.*.jsonl; `python data.py check {o.data} --videos "
                             f"{o.videos}` lists them all for --leave_out")
        if o.save_every and (done % o.save_every == 0 or done == steps or stopping):
            checkpoint.save(out, self.model, self.processor, self.optimizer, self.state, o)
        if stopping and done < steps:
            if self.rank == 0:
                saved = f"saved {checkpoint.newest(out)}" if o.save_every else "nothing is saved"
                print(f"stopped after step {done} of {steps}, {saved}; run the same command again "
                      f"to {'continue' if o.save_every else 'start anew'}")
            raise SystemExit(143)

    def end(self) -> None:
        """The run is done: OUT/final points to its last checkpoint."""
        if self.rank == 0 and self.o.save_every:
            final = checkpoint.point_to_newest(Path(self.o.out))
            print(f"done: {self.stream.steps} steps; the model is in {final}, the log in "
                  f"{self.o.out}/log.jsonl")
