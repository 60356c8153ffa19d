"""Video-KTR: GRPO in which only key tokens carry the gradient. The training loop, top to bottom.

One step (paper algorithm 1), in the order of `main` and `learn`:
    data        the step's prompts; records that cannot be used are skipped and named
    sample      G completions for each prompt, decoded together; accuracy and format rewards
    score       their log-probabilities and entropies, with gradient
    attribute   visual, temporal, entropy; the union of each one's top tokens is the key mask
    reference   the starting checkpoint's log-probabilities
    backward    advantages, the clipped objective on key tokens, its gradient
    step        clip, sharded AdamW, cosine schedule; then log and save

    torchrun --nproc_per_node 8 ktr.py --model DIR --data train.json --videos DIR --out runs/ktr
    python ktr.py --help

Where the paper and the released code differ there is an option; --preset sets them all
(docs/choices.md). Each rollout is used once, so old and new log-probabilities are equal, rho is 1
and the clip never binds; both stay, as the formula has them.
"""

import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ablations import ordered_bonus
from attribution import Rollout, attribute
from engine.sharded import ShardedAdamW
from grpo import group_advantages, grpo_loss
from policy import Group, batches, evaluating, freeze, load, sample, score_groups
from prompt import Processor, Prompt
from rewards import accuracy_reward, format_reward, length_bonus
from run import checkpoint
from run.distributed import distributed, leave
from run.logs import Clock, Ledger, Log, add_up, counted, sample_of
from run.options import MAY_CHANGE, Options, parse
from stream import UNUSABLE, Stream, preflight

ROW_TOKENS = 8192       # prompts are scored together while their packed rows have no more tokens
PATIENCE = 5            # steps in a row that may be skipped because the gradient is not finite


# -------------------------------------------------------------------------------- sample and reward
def judge(o: Options, processor: Processor, group: Group, record: dict) -> tuple[Tensor, Tensor]:
    """Accuracy (G,) and format (G,) rewards of a group."""
    accuracy, form = [], []
    for ids, n in zip(group.ids.cpu(), group.lengths):
        text = processor.tokenizer.decode(ids[:n], skip_special_tokens=True)
        accuracy.append(accuracy_reward(text, record["solution"], record["problem_type"]))
        form.append(format_reward(text, o.format_pattern))
    return torch.tensor(accuracy), torch.tensor(form)


def roll_out(o: Options, model: nn.Module, processor: Processor,
             prompts: list[tuple[Prompt, int, Tensor | None]]) -> list[Rollout]:
    """Sample a group for each prompt and judge it."""
    if not prompts:
        return []
    groups = sample(model, [prompt for prompt, *_ in prompts], o.G, o.max_new_tokens,
                    temperature=o.temperature, top_p=o.top_p, top_k=o.top_k,
                    seeds=[seed for _, seed, _ in prompts])
    rollouts = [Rollout(prompt, group, seed, other)
                for (prompt, seed, other), group in zip(prompts, groups)]
    for r in rollouts:
        r.accuracy, r.format = judge(o, processor, r.group, r.prompt.record)
    bonuses = ordered_bonus(rollouts, o, model, partial(judge, o, processor))
    for r, bonus in zip(rollouts, bonuses):
        r.ordered = bonus
    return rollouts


def reward(o: Options, r: Rollout) -> None:
    """Rewards (G,) and advantages (G,) (eq. 1), once the key mask is known (--length_of)."""
    counted = r.key_mask if o.length_of == "selected" else r.group.valid
    lengths = counted.sum(-1).cpu()
    r.bonus = length_bonus(r.accuracy, lengths, o.length_low, o.length_high, o.length_bonus)
    r.rewards = r.accuracy + r.format + r.bonus + r.ordered
    r.advantages = group_advantages(r.rewards)


# -------------------------------------------------------------------------------------------- learn
class Scorer(nn.Module):
    """What DDP wraps: the policy's scoring. Without prompts it is 0 through every trained weight,
    so that a rank whose records cannot be used still takes part in the same collectives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, prompts: list[Prompt], groups: list[Group]):
        if not prompts:
            return sum(p.sum() for p in self.model.parameters() if p.requires_grad) * 0.0
        return score_groups(self.model, prompts, groups)


def learn(o: Options, scorer: nn.Module, reference: nn.Module | None, rollouts: list[Rollout],
          clock: Clock) -> None:
    """Score, attribute and differentiate the step's rollouts, as many at once as fit a row."""
    rows = [len(r.prompt.ids) + sum(r.group.lengths) for r in rollouts]
    parts = batches(rows, ROW_TOKENS) or [slice(0)]
    for part in parts:
        alone = not isinstance(scorer, DistributedDataParallel)
        last = part is parts[-1]                # DDP averages in the last backward
        with nullcontext() if alone or last else scorer.no_sync():
            learn_from(o, scorer, reference, rollouts[part], clock)


def learn_from(o: Options, scorer: nn.Module, reference: nn.Module | None,
               rollouts: list[Rollout], clock: Clock) -> None:
    """`learn` for one packed row. The loss is the mean over the step's prompts of all ranks."""
    prompts, groups = [r.prompt for r in rollouts], [r.group for r in rollouts]
    stats = scorer(prompts, groups)
    if not rollouts:
        return stats.backward()
    for r, (logp, entropy) in zip(rollouts, stats):
        r.logp, r.entropy = logp, entropy                       # (G, T); logp has a gradient
    clock("score")

    attribute(rollouts, o, getattr(scorer, "module", scorer).model)
    clock("attribute")

    if reference is not None:
        with torch.no_grad():
            for r, (logp, _) in zip(rollouts, score_groups(reference, prompts, groups)):
                r.ref_logp = logp
    clock("reference")

    loss = 0.0
    for r in rollouts:
        reward(o, r)
        one, r.metrics = grpo_loss(
            r.logp, r.logp.detach(), r.ref_logp, r.advantages.to(r.logp.device), r.group.valid,
            r.key_mask, beta=o.beta, clip=o.clip, normalize=o.normalize, kl_on=o.kl_on)
        r.metrics["loss"] = one.detach()
        loss = loss + one / o.prompts_per_step
    loss.backward()
    for r in rollouts:
        r.logp = r.logp.detach()
    clock("backward")


def learning_rate(o: Options, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
    return o.lr * (1 + math.cos(math.pi * done)) / 2


def keep_samples(o: Options, log: Log, model: nn.Module, processor: Processor,
                 rollouts: list[Rollout], watched: tuple | None, step: int) -> None:
    """One rollout of the step, and one of the watched prompt, go to samples.jsonl."""
    for r in rollouts[:1]:
        log.sample(sample_of(r, step, processor.tokenizer))
    if watched:
        r = watch(o, model, processor, watched)
        log.sample(sample_of(r, step, processor.tokenizer, watched=True))


def watch(o: Options, model: nn.Module, processor: Processor,
          looked_at: tuple[Prompt, int, Tensor | None]) -> Rollout:
    """A rollout of a prompt that is looked at through the whole run; nothing is learnt from it."""
    (r,) = roll_out(o, model, processor, [looked_at])
    with evaluating(model):
        ((r.logp, r.entropy),) = score_groups(model, [r.prompt], [r.group])
    attribute([r], o, model)
    reward(o, r)
    return r


# -------------------------------------------------------------------------------------------- main
def build(o: Options, resumed: Path | None, world: int, device: torch.device, memory: Ledger):
    """(model, processor, optimizer, scorer, reference): what is trained, and with what."""
    model, processor = load(str(resumed or o.model), device, getattr(torch, o.dtype))
    trained = freeze(model, o.freeze)
    if int(os.environ.get("RANK", 0)) == 0:
        print(trained)
    memory("weights")
    if o.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = ShardedAdamW(model, o.lr, o.weight_decay, shards=o.shards or None,
                             offload=o.offload)
    memory("optimizer")
    reference = None
    if o.beta > 0:
        reference, _ = load(o.model, device, model.dtype, seed=1)
        reference.requires_grad_(False)
    memory("reference")
    scorer: nn.Module = Scorer(model)
    if world > 1:
        torch._dynamo.config.optimize_ddp = False               # layers are compiled one by one
        ids = [device.index] if device.type == "cuda" else None
        scorer = DistributedDataParallel(scorer, device_ids=ids, gradient_as_bucket_view=True,
                                         broadcast_buffers=False)
        scorer([], []).backward()       # from now on gradients live in DDP's buckets: accumulated,
        optimizer.zero_grad()           # they would otherwise be held twice
    memory("gradients")
    return model, processor, optimizer, scorer, reference


@contextmanager
def naming(rank: int, step: int, records: list[dict]):
    """An error inside says on which rank, in which step and with which records it happened."""
    try:
        yield
    except Exception as error:
        names = ", ".join(str(record["problem_id"]) for record in records)
        error.add_note(f"on rank {rank} in step {step}, with the records {names}")
        raise


def fresh_state(o: Options, records: list[dict], world: int) -> dict:
    """What a checkpoint keeps of a run besides weights and optimizer."""
    options = {name: value for name, value in asdict(o).items() if name not in MAY_CHANGE}
    made_by = {**options, "processes": world, "records": len(records)}
    return {"step": 0, "place": 0, "seen": 0, "skipped": 0, "not_finite": 0, "made_by": made_by}


def stop_if_hopeless(o: Options, state: dict) -> None:
    """SystemExit where the model has broken, or the data is not what it should be."""
    if state["not_finite"] >= PATIENCE:
        raise SystemExit(f"error: the gradient was not finite in {PATIENCE} steps in a row; lower "
                         f"--lr, or look at {Path(o.out) / 'samples.jsonl'}")
    if state["skipped"] > UNUSABLE * max(state["seen"], 100):
        raise SystemExit(f"error: {state['skipped']} of {state['seen']} records could not be used, "
                         f"named in {o.out}/skipped.*.jsonl; `python data.py check {o.data} "
                         f"--videos {o.videos}` lists them all for --leave_out")


def leave_early(o: Options, rank: int, step: int, steps: int) -> None:
    """SystemExit with SIGTERM's code, after a line that says what is saved."""
    if rank == 0:
        saved = f"saved {checkpoint.newest(Path(o.out))}" if o.save_every else "nothing is saved"
        print(f"SIGTERM: left after step {step} of {steps}, {saved}; start again with "
              f"--resume auto to continue")
    raise SystemExit(143)


def main(o: Options) -> None:
    records, left_out = preflight(o)
    if o.check:
        return print(f"ready: {len(records)} records in {o.data}, model {o.model}")
    leaving = checkpoint.Preemption()
    rank, world, device = distributed()
    out, memory = Path(o.out), Ledger(device)
    out.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.newest(out)
    model, processor, optimizer, scorer, reference = build(o, resumed, world, device, memory)
    state = fresh_state(o, records, world)
    if resumed:
        state = checkpoint.load_state(resumed, optimizer, state)
    log = Log(o, out, rank, state["step"])
    stream = Stream(o, records, left_out, processor, log, rank, world, state)
    first, steps, A = stream.first, stream.steps, o.prompts_per_step
    watched = stream.watched() if rank == 0 and first < steps else None

    for step in tqdm(range(first, steps), initial=first, total=steps, unit="step",
                     disable=rank > 0, dynamic_ncols=True):
        clock, lr = Clock(device), learning_rate(o, step, steps)
        with naming(rank, step, [records[index] for _, index in stream.own(step)]):
            prompts = stream.take(step)
            clock("data")
            rollouts = roll_out(o, model, processor, prompts)
            clock("sample")
            memory("decoding")
            learn(o, scorer, reference, rollouts, clock)
        memory("gradients")

        norm = optimizer.grad_norm()            # the same on every rank
        totals = add_up(counted(o, rollouts, leaving.asked), device)
        finite = math.isfinite(norm)
        if finite and totals["prompts"]:
            optimizer.step(lr, min(1.0, o.max_grad_norm / (norm + 1e-6)))
        memory("optimizer")
        optimizer.zero_grad()
        clock("step")

        state |= {"step": step + 1, "place": stream.place_after(step),
                  "seen": state["seen"] + A * world,
                  "skipped": state["skipped"] + A * world - int(totals["prompts"]),
                  "not_finite": 0 if finite else state["not_finite"] + 1}
        log.step(step + 1, steps, totals, {"grad_norm": norm, "lr": lr,
                                           "skipped": state["skipped"]}, clock)
        log.memory(memory.after(step + 1 - first))
        if rank == 0 and (step + 1) % (o.sample_every or max(1, steps // 100)) == 0:
            keep_samples(o, log, model, processor, rollouts, watched, step + 1)
        stop_if_hopeless(o, state)
        stopping = leaving.step_ended(totals["leaving"])
        if o.save_every and ((step + 1) % o.save_every == 0 or step + 1 == steps or stopping):
            with leaving.saving():
                checkpoint.save(out, model, processor, optimizer, state, asdict(o), steps, o.keep)
        if stopping and step + 1 < steps:
            leave_early(o, rank, step + 1, steps)
    leaving.heard.set()
    if rank == 0 and o.save_every:
        checkpoint.point_to_newest(out)
        print(f"done: {steps} steps; the model is in {out / 'final'}, the log in "
              f"{out / 'log.jsonl'}")


if __name__ == "__main__":
    main(parse())
    leave()
