"""Video-KTR: GRPO in which only key tokens carry the gradient. The training loop, top to bottom.

One step (paper algorithm 1), in the order of `main` and `learn`:
    data        the step's prompts; records that cannot be used are skipped and named
    sample      G completions for each prompt, decoded together; accuracy and format rewards
    score       their log-probabilities and entropies, with gradient
    reference   the starting checkpoint's log-probabilities
    attribute   visual, temporal, entropy; the union of each one's top tokens is the key mask
    backward    advantages, the clipped objective on key tokens, its gradient
    step        clip, sharded AdamW, cosine schedule; then log and save

    torchrun --nproc_per_node 8 ktr.py --model DIR --data train.json --videos DIR --out runs/ktr
    python ktr.py --help

Where the paper and the released code differ there is an option; --preset sets them all
(docs/choices.md). Unless --updates says otherwise each rollout is used once, so old and new
log-probabilities are equal, rho is 1 and the clip never binds; both stay, as the formula has them.
"""

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attribution import (ADVANTAGES, BONUSES, PENALTIES, Rollout, attribute, check_names,
                         checked)
from engine.prepare import recompute
from engine.sharded import ShardedAdamW
from grpo import group_advantages, grpo_loss
from policy import Group, batches, evaluating, freeze, load, sample, score_groups
from prompt import Processor, Prompt
from rewards import accuracy_reward, format_reward, length_bonus
from run import checkpoint
from run.distributed import add_up, distributed, leave, settle
from run.logs import Clock, Log, counted, reporter, rewind, sample_of
from run.options import MAY_CHANGE, Options, parse
from stream import UNUSABLE, Stream, preflight

ROW_TOKENS = 8192       # prompts are scored together while their packed rows have no more tokens
PATIENCE = 5            # steps in a row that may be skipped because the gradient is not finite


# -------------------------------------------------------------------------------- sample and reward
def read(processor: Processor, group: Group) -> list[str]:
    """The texts of a group's completions."""
    rows = zip(group.ids.cpu(), group.lengths)
    return [processor.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in rows]


def judge(o: Options, processor: Processor, group: Group, record: dict) -> tuple[Tensor, Tensor]:
    """Accuracy (G,) and format (G,) rewards of a group."""
    accuracy, form = [], []
    for text in read(processor, group):
        accuracy.append(accuracy_reward(text, record["solution"], record["problem_type"]))
        form.append(format_reward(text, o.format_pattern))
    return torch.tensor(accuracy), torch.tensor(form)


def roll_out(o: Options, model: nn.Module, processor: Processor,
             prompts: list[tuple[Prompt, int]]) -> list[Rollout]:
    """Sample a group for each (prompt, seed) and judge it."""
    if not prompts:
        return []
    shown, seeds = zip(*prompts)
    groups = sample(model, shown, o.G, o.max_new_tokens, temperature=o.temperature,
                    top_p=o.top_p, top_k=o.top_k, seeds=seeds)
    rollouts = list(map(Rollout, shown, groups, seeds))
    for r in rollouts:
        r.accuracy, r.format = judge(o, processor, r.group, r.prompt.record)
    given = BONUSES[o.bonus](rollouts, o, model, partial(read, processor))
    for r, extra in zip(rollouts, given, strict=True):
        r.extra = checked(f"bonus {o.bonus}", extra, r.accuracy)
    return rollouts


def reward(o: Options, r: Rollout) -> None:
    """Rewards (G,) and advantages (G,) (eq. 1), once the key mask is known (--length_of); and the
    tokens that bear the loss: none of a group that --filter drops, or of a cut completion."""
    counted = r.key_mask if o.length_of == "selected" else r.group.valid
    lengths = counted.sum(-1).cpu()
    r.bonus = length_bonus(r.accuracy, lengths, o.length_low, o.length_high, o.length_bonus)
    r.rewards = r.accuracy + r.format + r.bonus + r.extra
    r.advantages = group_advantages(r.rewards).to(r.group.valid.device)
    r.borne = r.group.valid
    if o.mask_cut:
        r.borne = r.borne & r.group.ended[:, None]
    values = r.rewards if o.filter == "reward" else r.accuracy
    if o.filter != "none" and (values == values[0]).all():
        r.borne = torch.zeros_like(r.borne)


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


def divisor(o: Options, rollouts: list[Rollout], world: int, device: torch.device) -> float | None:
    """What divides a group's sum under --normalize tokens: those of all ranks, over the prompts;
    under constant: as many as G completions of the longest length have."""
    if o.normalize == "tokens":
        mine = {"tokens": sum(sum(r.group.lengths) for r in rollouts)}
        return max(1.0, add_up(mine, device)["tokens"]) / (o.prompts_per_step * world)
    return o.G * o.max_new_tokens if o.normalize == "constant" else None


def learn(o: Options, scorer: nn.Module, reference: nn.Module | None, rollouts: list[Rollout],
          scale: float, total: float | None, clock: Clock) -> None:
    """Score, attribute and differentiate some rollouts; `scale` weighs their loss in the step's,
    `total` is `divisor`'s. After the first of --updates the attribution is done."""
    model = getattr(scorer, "module", scorer).model
    prompts, groups = [r.prompt for r in rollouts], [r.group for r in rollouts]
    stats = scorer(prompts, groups)
    if not rollouts:
        return stats.backward()
    for r, (logp, entropy) in zip(rollouts, stats):
        r.logp, r.entropy = logp, entropy                       # (G, T); logp has a gradient
    clock("score")

    first = rollouts[0].old_logp is None                        # of --updates
    if first and reference is not None:
        with torch.no_grad():
            for r, (logp, _) in zip(rollouts, score_groups(reference, prompts, groups)):
                r.ref_logp = logp
    clock("reference")

    if first:
        attribute(rollouts, o, model)
    clock("attribute")

    loss = 0.0
    for r in rollouts:
        if first:
            r.old_logp = r.logp.detach()
            reward(o, r)
        A = checked(f"advantage {o.advantage}", ADVANTAGES[o.advantage](r, o),
                    r.advantages, r.old_logp)                               # (G,) or (G, T)
        one, r.metrics = grpo_loss(
            r.logp, r.old_logp, r.ref_logp, A, r.borne, r.key_mask, beta=o.beta, clip=o.clip,
            clip_high=o.clip_high, normalize=o.normalize, total=total, kl_on=o.kl_on,
            kl_estimator=o.kl_estimator)
        penalty = PENALTIES[o.penalty](r, o, model)
        if penalty is not None:
            one = one + checked(f"penalty {o.penalty}", penalty, r.logp.sum(), gradient=True)
        r.metrics["loss"] = one.detach()
        loss = loss + one * scale
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


def watch(o: Options, model: nn.Module, processor: Processor,
          watched: tuple[Prompt, int]) -> Rollout:
    """A rollout of the prompt that is looked at through the whole run; nothing is learnt of it."""
    (r,) = roll_out(o, model, processor, [watched])
    with evaluating(model):
        ((r.logp, r.entropy),) = score_groups(model, [r.prompt], [r.group])
    attribute([r], o, model)
    reward(o, r)
    return r


# -------------------------------------------------------------------------------------------- main
@dataclass
class Run:
    """What lasts through a run."""
    rank: int
    world: int                              # processes
    device: torch.device
    model: nn.Module                        # the policy
    processor: Processor
    optimizer: ShardedAdamW
    scorer: nn.Module                       # of the policy; under DDP if there are several ranks
    reference: nn.Module | None             # the starting checkpoint; None: beta is 0
    state: dict                             # of the run: what a checkpoint keeps beside weights
    log: Log
    stream: Stream
    leaving: checkpoint.Preemption
    watched: tuple[Prompt, int] | None      # (prompt, seed), looked at through the whole run


def begin(o: Options, records: list[dict], left_out: set[int]) -> Run:
    """Load the policy, its optimizer and its reference; take up the newest checkpoint, if any."""
    leaving = checkpoint.Preemption()
    rank, world, device = distributed()
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, rank, reporter(o, out) if rank == 0 else None)
    resumed = checkpoint.newest(out)
    model, processor = load(str(resumed or o.model), device, getattr(torch, o.dtype))
    trained = freeze(model, o.freeze)
    if o.checkpointing:
        recompute(model)
    model.train()
    optimizer = ShardedAdamW(model, o.lr, o.weight_decay, offload=o.offload)
    reference = None
    if o.beta > 0:
        reference, _ = load(o.model, device, model.dtype, seed=1)
        reference.requires_grad_(False)
    scorer: nn.Module = Scorer(model)
    if world > 1:
        torch._dynamo.config.optimize_ddp = False               # layers are compiled one by one
        ids = [device.index] if device.type == "cuda" else None
        scorer = DistributedDataParallel(scorer, device_ids=ids, gradient_as_bucket_view=True,
                                         broadcast_buffers=False)
        for _ in range(2):              # from now on gradients live in DDP's buckets, or they would
            scorer.zero_grad()          # be held twice. The second forward makes these anew, and
            scorer([], []).backward()   # keeps the old ones while gradients or NCCL hold them
            settle(device)
        optimizer.zero_grad()

    options = {name: value for name, value in asdict(o).items() if name not in MAY_CHANGE}
    texts = [sha256(Path(file).read_bytes()).hexdigest()[:8] for file in o.rule]
    made_by = {**options, "processes": world, "records": len(records)}
    if texts:
        made_by["text of rules"] = texts
    state = {"step": 0, "place": 0, "skipped": 0, "not_finite": 0, "made_by": made_by}
    if resumed:
        state = checkpoint.load_state(resumed, optimizer, made_by)
        trained += f"; continuing from {resumed}"
    if rank == 0:
        print(trained)
        checkpoint.sweep(out)
        rewind(out, state["step"])
        (out / "options.json").write_text(json.dumps(asdict(o), indent=2))
    add_up({"ranks": 1}, device)            # none writes before that is done
    stream = Stream(o, records, left_out, processor, log, rank, world, state)
    watched = stream.watched(left_out, processor) if rank == 0 else None
    return Run(rank, world, device, model, processor, optimizer, scorer, reference, state, log,
               stream, leaving, watched)


@contextmanager
def naming(rank: int, step: int, records: list[dict]):
    """An error inside says on which rank, in which step and with which records it happened."""
    try:
        yield
    except Exception as error:
        names = ", ".join(str(record["problem_id"]) for record in records)
        error.add_note(f"on rank {rank} in step {step + 1}, with the records {names}")
        raise


def keep(o: Options, run: Run, rollouts: list[Rollout], stopping: bool) -> None:
    """Samples and checkpoints when they are due after a step; SystemExit where the run must end:
    asked by SIGTERM, or the model has broken, or the data is not what it should be."""
    state, steps, out = run.state, run.stream.steps, Path(o.out)
    done = state["step"]
    if run.rank == 0 and done % (o.sample_every or max(1, steps // 100)) == 0:
        tokenizer = run.processor.tokenizer
        if rollouts:
            run.log.append("samples.jsonl", sample_of(rollouts[0], done, tokenizer))
        if run.watched:
            r = watch(o, run.model, run.processor, run.watched)
            run.log.append("samples.jsonl", sample_of(r, done, tokenizer, watched=True))
    if state["not_finite"] >= PATIENCE:
        raise SystemExit(f"error: the gradient was not finite in {PATIENCE} steps in a row; lower "
                         f"--lr, or look at {out / 'samples.jsonl'}")
    seen = done * run.stream.B
    if state["skipped"] > UNUSABLE * max(seen, 100):
        raise SystemExit(f"error: {state['skipped']} of {seen} records could not be used, named in "
                         f"{out}/skipped.*.jsonl; `python data.py check {o.data} --videos "
                         f"{o.videos}` lists them all for --leave_out")
    if o.save_every and (done % o.save_every == 0 or done == steps or stopping):
        run.leaving.saving = True
        checkpoint.save(out, run.model, run.processor, run.optimizer, state, o)
        run.leaving.saving = False
    if stopping and done < steps:
        if run.rank == 0:
            saved = f"saved {checkpoint.newest(out)}" if o.save_every else "nothing is saved"
            print(f"SIGTERM: left after step {done} of {steps}, {saved}; start again with "
                  f"--resume auto to continue")
        raise SystemExit(143)


def main(o: Options) -> None:
    """The whole run: algorithm 1, step by step."""
    check_names(o)
    records, left_out = preflight(o)
    if o.check:
        return print(f"ready: {len(records)} records in {o.data}, model {o.model}")
    run = begin(o, records, left_out)
    stream, optimizer, state, A = run.stream, run.optimizer, run.state, o.prompts_per_step

    for step in tqdm(range(stream.first, stream.steps), initial=stream.first, total=stream.steps,
                     unit="step", disable=run.rank > 0, dynamic_ncols=True):
        clock, lr = Clock(run.device), learning_rate(o, step, stream.steps)
        with naming(run.rank, step, stream.records_of(step)):
            prompts = stream.take(step)                                     # data
            clock("data")
            rollouts = roll_out(o, run.model, run.processor, prompts)       # sample, judge
            clock("sample")
            rows = [len(r.prompt.ids) + sum(r.group.lengths) for r in rollouts]
            parts = batches(rows, ROW_TOKENS) or [slice(0)]
            total = divisor(o, rollouts, run.world, run.device)
            for _ in range(o.updates):
                for part in parts:                                          # score .. backward
                    last = part is parts[-1]    # DDP averages in the last backward
                    with nullcontext() if last or run.world == 1 else run.scorer.no_sync():
                        learn(o, run.scorer, run.reference, rollouts[part], 1 / A, total, clock)

                norm = optimizer.grad_norm()    # the same on every rank
                totals = add_up(counted(o, rollouts, run.leaving.asked), run.device)
                finite = math.isfinite(norm)
                if finite and totals["prompts"]:
                    optimizer.step(lr, min(1.0, o.max_grad_norm / (norm + 1e-6)))   # step
                optimizer.zero_grad()
                clock("step")

        state["step"], state["place"] = step + 1, stream.place_after(step)
        state["skipped"] += stream.B - int(totals["prompts"])
        state["not_finite"] = 0 if finite else state["not_finite"] + 1
        more = {"grad_norm": norm, "lr": lr, "skipped": state["skipped"]}
        run.log.step(step + 1, stream.steps, totals, more, clock)           # log
        stopping = run.leaving.step_ended(clock.total, totals["leaving"])
        keep(o, run, rollouts, stopping)                                    # save
    run.leaving.heard.set()
    if run.rank == 0 and o.save_every:
        final = checkpoint.point_to_newest(Path(o.out))
        print(f"done: {stream.steps} steps; the model is in {final}, the log in {o.out}/log.jsonl")


if __name__ == "__main__":
    main(parse())
    leave()
