"""Video-KTR: GRPO in which only key tokens carry the gradient. The training loop, top to bottom.

One step (paper algorithm 1):
    sample      G completions for each prompt of the step, decoded together
    reward      accuracy and format of each completion
    score       their log-probabilities and entropies, with gradient
    attribute   visual, temporal and entropy signals; the union of each one's top tokens is the key mask
    reference   the starting checkpoint's log-probabilities
    backward    the clipped objective on key tokens
    step        clip, sharded AdamW, cosine schedule

    torchrun --nproc_per_node 8 ktr.py --model DIR --data train.json --videos DIR --out runs/ktr
    python ktr.py --help

Departures from the paper's text and from the released code are options, one each (README: "Where the paper, the
released code and this project differ"); --preset sets them all. Each rollout is used once, so old and new
log-probabilities are equal, rho is 1 and the clip never binds; both stay, as the formula has them.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from run import checkpoint
from attribution import Rollout, attribute, select, soften
from ablations import distribution_shift, shift, shuffled
from data import Prompts, Skipped, loader
from grpo import group_advantages, grpo_loss
from run.logs import Clock, Ledger, Log, add_up, measured, names_of, sample_of
from run.options import MAY_CHANGE, UNUSABLE, Options, limits_of, parse, preflight
from policy import Group, batches, evaluating, hidden_states, load, predicting_states, sample, score_groups, unflatten
from prompt import Processor, Prompt
from rewards import accuracy_reward, format_reward, length_bonus
from engine.prepare import recompute
from engine.sharded import ShardedAdamW
from run.distributed import distributed, leave

ROW_TOKENS = 8192       # prompts are scored together while their packed rows stay within this many tokens
PATIENCE = 5            # steps in a row that may be skipped because the gradient is not finite


class Scorer(nn.Module):
    """What DDP wraps: the policy's scoring. Without prompts it is 0 through every parameter, so that a rank whose
    records cannot be used still takes part in the same collectives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, prompts: list[Prompt], groups: list[Group]):
        if not prompts:
            return sum(p.sum() for p in self.model.parameters()) * 0.0
        return score_groups(self.model, prompts, groups)


def judge(group: Group, record: dict, processor: Processor) -> tuple[Tensor, Tensor]:
    """Accuracy (G,) and format (G,) rewards of a group."""
    texts = [processor.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(group.ids.cpu(), group.lengths)]
    accuracy = [accuracy_reward(text, record["solution"], record["problem_type"]) for text in texts]
    return torch.tensor(accuracy), torch.tensor([format_reward(text) for text in texts])


def ordered_bonus(o: Options, model: nn.Module, batch: list[dict], processor: Processor) -> list[Tensor]:
    """T-GRPO (Video-R1): half as many completions see the frames shuffled; where the ordered clip's group is right at least
    as often (times a factor), its correct completions earn a bonus (G,)."""
    bonus = [torch.zeros(o.G) for _ in batch]
    clips = [i for i, item in enumerate(batch) if item["prompt"].kind == "video" and len(item["prompt"].frames) > 1]
    if not o.ordered_bonus or not clips:
        return bonus
    seeds = [batch[i]["seed"] + 1 for i in clips]
    prompts = [batch[i]["prompt"].reordered(shuffled(len(batch[i]["prompt"].frames), torch.Generator().manual_seed(seed)))
               for i, seed in zip(clips, seeds)]
    for i, group in zip(clips, sample(model, prompts, o.G // 2, o.max_new_tokens, temperature=o.temperature, top_p=o.top_p, seeds=seeds)):
        shuffled_accuracy, accuracy = judge(group, batch[i]["prompt"].record, processor)[0], batch[i]["accuracy"]
        if accuracy.mean() >= o.ordered_factor * shuffled_accuracy.mean():
            bonus[i] = o.ordered_bonus * (accuracy > 0.1).float()
    return bonus


def seed_of(o: Options, index: int) -> int:
    """The even seed of the run's prompt number `index`, for sampling; the next one is for its signals. Below 2**32, since
    torch's CPU generator heeds no more of a seed."""
    return 2 * Random(f"{o.seed} {index}").getrandbits(31)


def clip_before(data: Prompts, order: list[int], index: int) -> Tensor:
    """Frames (n, 3, H, W) of the last usable clip before this one in the run's order, for masking by replacement."""
    own = data.records[order[index]]["path"]
    others = (order[index - back] for back in range(1, len(order)) if data.records[order[index - back]]["path"] != own)
    frames = next((item.frames for item in map(data.__getitem__, others) if isinstance(item, Prompt)), None)
    if frames is None:
        raise ValueError(f"--masking replace: there is no usable clip but {own}")
    return frames


def look(o: Options, model: nn.Module, batch: list[dict], prompts: list[Prompt], stats: list[tuple[Tensor, Tensor]]) -> None:
    """Attribution: each item gets its rollout, its signals' scores and its key mask (or soft weights)."""
    groups = [item["group"] for item in batch]
    rollouts = [Rollout(prompt, group.ids, group.valid, logp.detach(), entropy,
                        torch.Generator().manual_seed(item["seed"] + 1), o.masking, o.positions, o.order, item["other"],
                        partial(predicting_states, model, prompt, group))
                for item, prompt, group, (logp, entropy) in zip(batch, prompts, groups, stats)]

    def moved(numbers: list[int], changed: list[Prompt]) -> list[Tensor]:
        some = [groups[i] for i in numbers]
        with evaluating(model):
            if o.distance == "logp":
                return [shift(rollouts[i].logp, logp, o.shift) for i, (logp, _) in zip(numbers, score_groups(model, changed, some))]
            before, after = (hidden_states(model, shown, some) for shown in ([prompts[i] for i in numbers], changed))
            return unflatten(distribution_shift(before, after, model.lm_head.weight, o.distance), some)

    for item, r, scores in zip(batch, rollouts, attribute(rollouts, o.signals, moved)):
        scores = {name: s.nan_to_num(nan=0.0) for name, s in scores.items()}        # all ranks skip a broken step together, later
        item.update(rollout=r, signals=scores, key_mask=select(scores, r.valid, o.ratios, o.pool, o.ties)
                    if o.weighting == "binary" else soften(scores, r.valid, o.weighting))           # (G, T)


def reward(o: Options, item: dict) -> None:
    """Rewards (G,) and advantages (G,): accuracy, format, length bonus, and T-GRPO's bonus where asked for."""
    lengths = (item["key_mask"] if o.length_of == "selected" else item["group"].valid).sum(-1).cpu()
    bonus = length_bonus(item["accuracy"], lengths, o.length_low, o.length_high, o.length_bonus)
    rewards = item["accuracy"] + item["format"] + bonus + item["ordered"]
    item.update(bonus=bonus, rewards=rewards, advantages=group_advantages(rewards))


def learn(o: Options, scorer: nn.Module, reference: nn.Module | None, batch: list[dict], scale: float, clock: Clock) -> None:
    """Score, attribute and differentiate the rollouts of some prompts; leaves what it found in the items of `batch`."""
    prompts = [item["prompt"].timed(1.0) if o.scoring_seconds == "fixed" and item["prompt"].kind == "video"
               else item["prompt"] for item in batch]
    groups = [item["group"] for item in batch]
    stats = scorer(prompts, groups)                                                 # (logp, entropy), each (G, T)
    if not batch:
        return stats.backward()
    clock("score")

    look(o, getattr(scorer, "module", scorer).model, batch, prompts, stats)
    clock("attribute")

    ref_logp = [None] * len(batch)
    if reference is not None:
        with torch.no_grad():
            ref_logp = [logp for logp, _ in score_groups(reference, prompts, groups)]
    clock("reference")

    loss = 0.0
    for item, (logp, _), ref in zip(batch, stats, ref_logp):
        reward(o, item)
        one, metrics = grpo_loss(logp, logp.detach(), ref, item["advantages"].to(logp.device), item["group"].valid, item["key_mask"],
                                 beta=o.beta, clip=o.clip, normalize=o.normalize, kl_on=o.kl_on)
        loss = loss + one * scale
        item.update(loss=one.detach(), **metrics)
    loss.backward()
    clock("backward")


def watch(o: Options, model: nn.Module, prompt: Prompt, other: Tensor | None, processor: Processor) -> dict:
    """Completions of one prompt that is looked at through the whole run, with signals and rewards; nothing is learnt."""
    item = {"prompt": prompt, "seed": seed_of(o, -1), "other": other, "ordered": 0.0}
    (item["group"],) = sample(model, [prompt], o.G, o.max_new_tokens, temperature=o.temperature, top_p=o.top_p, seeds=[item["seed"]])
    item["accuracy"], item["format"] = judge(item["group"], prompt.record, processor)
    with evaluating(model):
        look(o, model, [item], [prompt], score_groups(model, [prompt], [item["group"]]))
    reward(o, item)
    return item


def learning_rate(o: Options, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    return o.lr * (1 + math.cos(math.pi * (step - o.warmup_steps) / max(1, steps - o.warmup_steps))) / 2


def main(o: Options) -> None:
    records = preflight(o)
    if o.check:
        return print(f"ready: {len(records)} records in {o.data}, model {o.model}")
    leaving = checkpoint.Preemption()
    rank, world, device = distributed()
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.newest(out)

    memory = Ledger(device)
    model, processor = load(str(resumed or o.model), device, getattr(torch, o.dtype))
    memory("weights")
    if o.checkpointing:
        recompute(model)
    model.train()
    optimizer = ShardedAdamW(model, o.lr, o.weight_decay, offload=o.offload)
    memory("optimizer")
    reference = load(o.model, device, model.dtype, seed=1)[0].requires_grad_(False) if o.beta > 0 else None
    memory("reference")
    scorer: nn.Module = Scorer(model)
    if world > 1:
        torch._dynamo.config.optimize_ddp = False       # layers are compiled one by one; cut up for DDP's buckets, they would
        scorer = DistributedDataParallel(               # not match what checkpointing recomputes outside its forward
            scorer, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            broadcast_buffers=False)
        scorer([], []).backward()                       # from now on gradients live in DDP's buckets: accumulated, they would
        optimizer.zero_grad()                           # otherwise be held twice
    memory("gradients")

    A, B = o.prompts_per_step, o.prompts_per_step * world                           # prompts per rank; of all ranks
    per_epoch = len(records) // B
    if per_epoch == 0:
        raise SystemExit(f"error: {len(records)} records are too few for one step of {B} prompts")
    steps = o.max_steps or o.epochs * per_epoch
    state = {"step": 0, "seen": 0, "skipped": 0, "not_finite": 0, "prompts_per_step": B, "records": len(records),
             "options": {name: value for name, value in asdict(o).items() if name not in MAY_CHANGE}}
    if resumed:
        fresh, state = state, checkpoint.load_state(resumed, optimizer)
        told = [{**s["options"], "prompts a step": s["prompts_per_step"], "records": s["records"]} for s in (state, fresh)]
        changed = [f"{name}: {told[0].get(name)!r} there, {value!r} now" for name, value in told[1].items() if told[0].get(name) != value]
        if changed:
            raise SystemExit(f"error: {resumed} was made otherwise ({'; '.join(changed)}); to continue exactly, start as it was "
                             f"started, or begin a new run from its weights: --model {resumed} --out ANOTHER")
    order = []
    for epoch in range(-(-steps // per_epoch)):
        permuted = torch.randperm(len(records), generator=torch.Generator().manual_seed(o.seed + epoch))
        order += permuted[:per_epoch * B].tolist()
    first = state["step"]
    mine = [order[step * B + rank * A + a] for step in range(first, steps) for a in range(A)]
    data = Prompts(records, o.videos, processor, limits_of(o))
    stream = iter(loader(data, mine, o.workers))
    log = Log(o, out, rank, first)
    watched = data[order[0]] if rank == 0 else None                                 # the run's first prompt
    watched_other = clip_before(data, order, 0) if rank == 0 and o.masking == "replace" else None

    for step in tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=rank > 0, dynamic_ncols=True):
        clock, lr = Clock(device), learning_rate(o, step, steps)
        batch, numbers = [], range(step * B + rank * A, step * B + (rank + 1) * A)  # the prompts' numbers in the whole run
        try:
            for index in numbers:
                item = next(stream)
                if isinstance(item, Skipped):
                    log.skip(item, step)
                else:
                    batch.append({"prompt": item, "seed": seed_of(o, index),
                                  "other": clip_before(data, order, index) if o.masking == "replace" else None})
            clock("data")

            if batch:
                groups = sample(model, [item["prompt"] for item in batch], o.G, o.max_new_tokens, temperature=o.temperature,
                                top_p=o.top_p, seeds=[item["seed"] for item in batch])
                for item, group in zip(batch, groups):
                    accuracy, form = judge(group, item["prompt"].record, processor)
                    item.update(group=group, accuracy=accuracy, format=form)
                for item, bonus in zip(batch, ordered_bonus(o, model, batch, processor)):
                    item["ordered"] = bonus
            clock("sample")
            memory("decoding")

            rows = [len(item["prompt"].ids) + sum(item["group"].lengths) for item in batch]
            parts = batches(rows, ROW_TOKENS) or [slice(0)]
            for part in parts:
                last = part is parts[-1]
                with nullcontext() if last or world == 1 else scorer.no_sync():     # DDP averages in the last backward
                    learn(o, scorer, reference, batch[part], 1 / A, clock)
        except Exception as error:
            names = ", ".join(str(records[order[index]]["problem_id"]) for index in numbers)
            error.add_note(f"on rank {rank} in step {step}, with the records {names}")
            raise

        memory("gradients")
        found = [measured(o, item) for item in batch]
        totals = add_up({"prompts": len(batch), "skipped": A - len(batch), "leaving": leaving.asked,
                         **{name: sum(m[name] for m in found) for name in names_of(o)}}, device)
        norm = optimizer.grad_norm()                                                # the same on every rank
        finite = math.isfinite(norm)
        if finite and totals["prompts"]:
            optimizer.step(lr, min(1.0, o.max_grad_norm / (norm + 1e-6)))
        memory("optimizer")
        optimizer.zero_grad()
        clock("step")

        state["step"] = step + 1
        state["seen"] += B
        state["skipped"] += int(totals["skipped"])
        state["not_finite"] = 0 if finite else state["not_finite"] + 1
        if step == first:
            memory.settle()
        elif step == first + 1:
            log.memory(memory.close())
        if leaving.asked or totals["leaving"]:
            leaving.heard.set()
        log.step(step + 1, steps, totals, {"grad_norm": norm, "lr": lr, "skipped": state["skipped"]}, clock)
        if rank == 0 and (step + 1) % (o.sample_every or max(1, steps // 100)) == 0:
            for item in batch[:1] + ([{**watch(o, model, watched, watched_other, processor), "watched": True}] if isinstance(watched, Prompt) else []):
                log.sample(sample_of(o, item, step + 1, processor))
        if state["not_finite"] >= PATIENCE:
            raise SystemExit(f"error: the gradient was not finite in {PATIENCE} steps in a row; lower --lr, or look at "
                             f"{out / 'samples.jsonl'}")
        if state["skipped"] > UNUSABLE * max(state["seen"], 100):
            raise SystemExit(f"error: {state['skipped']} of {state['seen']} records could not be used, named in {out}/skipped.*.jsonl; "
                             f"`python data.py check {o.data} --videos {o.videos}` lists them all for --leave_out")
        if o.save_every and ((step + 1) % o.save_every == 0 or step + 1 == steps or totals["leaving"]):
            leaving.saving = True
            checkpoint.save(out, model, processor, optimizer, state, asdict(o), steps, o.keep)
            leaving.saving = False
            clock("save")
            if rank == 0:
                tqdm.write(f"saved {checkpoint.newest(out)} in {clock.seconds['save']:.1f} s")
        if totals["leaving"] and step + 1 < steps:
            if rank == 0:
                print(f"SIGTERM: saved {checkpoint.newest(out)} after step {step + 1} of {steps}; start again with --resume auto "
                      f"to continue")
            raise SystemExit(143)
    leaving.heard.set()
    if rank == 0 and o.save_every:
        (out / "final").unlink(missing_ok=True)
        (out / "final").symlink_to(checkpoint.newest(out).name)
        print(f"done: {steps} steps; the model is in {out / 'final'}, the log in {out / 'log.jsonl'}")


if __name__ == "__main__":
    main(parse())
    leave()
