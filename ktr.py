"""Video-KTR: GRPO in which only key tokens carry the gradient. Algorithm 1, top to bottom.

One step of `main`:
    sample      G completions for each prompt, decoded together, and what their answers earn
    learn       for each update: log-probabilities with gradient (score), the clipped objective on
                key tokens (backward)
    annotate    between these two, in the first update only: reference, key mask, advantages
    step        clip, AdamW, cosine; log and save

    torchrun --nproc_per_node 8 ktr.py --model DIR --data train.json --videos DIR --out runs/ktr

Where the paper and the released code differ there is an option; --preset sets them all
(docs/choices.md). With one update a rollout, old and new log-probabilities are equal, rho is 1 and
the clip never binds; both stay, as the formula has them.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attribution import attribute, check_output
from grpo import ADVANTAGES, PENALTIES, group_advantages, grpo_loss
from options import Options
from policy import batches, predicting_states, sample, score_groups
from prompt import Processor, Prompt
from rewards import EXTRA_REWARDS, accuracy_reward, format_reward, length_bonus
from rollout import Group, Rollout
from run.arguments import parse
from run.distributed import all_reduce_sum, run_program
from run.logs import Clock, metric_sums
from run.preflight import check_start
from run.training import Training

ROW_TOKENS = 8192       # prompts are scored together while their packed rows have no more tokens


# ------------------------------------------------------------------------------------------- sample
def sample_rollouts(o: Options, model: nn.Module, processor: Processor,
                    prompts: list[tuple[Prompt, int]]) -> list[Rollout]:
    """A group of completions for each (prompt, seed), and what they earn."""
    if not prompts:
        return []
    shown, seeds = zip(*prompts)
    groups = sample(model, shown, o.G, o.max_new_tokens, temperature=o.temperature,
                    top_p=o.top_p, top_k=o.top_k, seeds=seeds)
    rollouts = list(map(Rollout, shown, groups, seeds))
    for r in rollouts:
        r.accuracy, r.format = answer_rewards(o, processor, r.group, r.prompt.record)
    given = EXTRA_REWARDS[o.extra_reward](rollouts, o, model, partial(completion_texts, processor))
    for r, extra in zip(rollouts, given or [None] * len(rollouts), strict=True):
        r.extra_reward = check_output(f"extra reward {o.extra_reward}", extra, r.accuracy)
        add_rewards(o, r, r.group.completion_mask)
    return rollouts


def answer_rewards(o: Options, processor: Processor, group: Group,
                   record: dict) -> tuple[Tensor, Tensor]:
    """Accuracy (G,) and format (G,) rewards of a group's completions."""
    texts = completion_texts(processor, group)
    return (torch.tensor([accuracy_reward(text, record["solution"], record["problem_type"])
                          for text in texts]),
            torch.tensor([format_reward(text, o.format_pattern) for text in texts]))


def completion_texts(processor: Processor, group: Group) -> list[str]:
    rows = zip(group.ids.cpu(), group.lengths)
    return [processor.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in rows]


def add_rewards(o: Options, r: Rollout, length_mask: Tensor) -> None:
    """Set the length bonus and the rewards (G,), and the loss mask (G, T). The bonus counts the
    tokens in length_mask (G, T)."""
    r.length_bonus = length_bonus(r.accuracy, length_mask.sum(-1).cpu(), o.length_low,
                                  o.length_high, o.length_bonus)
    r.rewards = r.accuracy + r.format + r.length_bonus + r.extra_reward
    r.loss_mask = loss_mask(o, r)


def loss_mask(o: Options, r: Rollout) -> Tensor:
    """(G, T) bool: tokens that count in the loss: none of a group that --filter drops, none of a
    completion that was cut under --mask_cut."""
    mask, values = r.group.completion_mask, r.rewards if o.filter == "reward" else r.accuracy
    if o.mask_cut:
        mask = mask & r.group.ended[:, None]
    dropped = o.filter != "none" and bool((values == values[0]).all())
    return torch.zeros_like(mask) if dropped else mask


# ----------------------------------------------------------------------------------------- annotate
def annotate(o: Options, rollouts: list[Rollout], model: nn.Module, reference: nn.Module | None,
             clock: Clock) -> None:
    """What a rollout needs once: reference log-probabilities, key mask, advantages (eq. 1)."""
    prompts, groups = [r.prompt for r in rollouts], [r.group for r in rollouts]
    if reference is not None:
        with torch.no_grad():
            for r, (logp, _) in zip(rollouts, score_groups(reference, prompts, groups)):
                r.ref_logp = logp
    clock("reference")

    find_key_tokens(o, rollouts, model)
    clock("attribute")

    for r in rollouts:
        r.old_logp = r.logp.detach()
        if o.length_of == "selected":                   # the release's mistake
            add_rewards(o, r, r.key_mask)
        r.advantages = group_advantages(r.rewards).to(r.logp.device)


@torch.no_grad()
def find_key_tokens(o: Options, rollouts: list[Rollout], model: nn.Module) -> None:
    """`attribute`, under the current policy."""
    def score(prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[Tensor]:
        return [logp for logp, _ in score_groups(model, prompts, groups)]

    for r in rollouts:
        r.model, r.batch = model, rollouts
        r.states = lambda prompt=r.prompt, r=r: predicting_states(model, prompt, r.group)
    attribute(rollouts, o, score)


# -------------------------------------------------------------------------------------------- learn
def learn(o: Options, scorer: nn.Module, reference: nn.Module | None, rollouts: list[Rollout],
          divisor: float | None, clock: Clock) -> None:
    """The gradient of some of a step's rollouts. divisor: `loss_divisor`'s."""
    model = getattr(scorer, "module", scorer).model
    scored = scorer([r.prompt for r in rollouts], [r.group for r in rollouts])
    if not rollouts:
        return scored.backward()        # of 0: other ranks wait for this one's gradients
    for r, (logp, entropy) in zip(rollouts, scored):
        r.logp, r.entropy = logp, entropy                               # (G, T); logp with gradient
    clock("score")

    if rollouts[0].old_logp is None:                                    # the first of --updates
        annotate(o, rollouts, model, reference, clock)

    loss = 0.0
    for r in rollouts:
        advantages = check_output(f"advantage {o.advantage}", ADVANTAGES[o.advantage](r, o),
                                  r.advantages, r.old_logp)             # (G,) or (G, T)
        group_loss, r.metrics = grpo_loss(
            r.logp, r.old_logp, r.ref_logp, advantages, r.loss_mask, r.key_mask, beta=o.beta,
            clip=o.clip, clip_high=o.clip_high, normalize=o.normalize, divisor=divisor,
            kl_on=o.kl_on, kl_estimator=o.kl_estimator)
        if o.penalty != "none":
            penalty = PENALTIES[o.penalty](r, o, model)
            group_loss = group_loss + check_output(f"penalty {o.penalty}", penalty, group_loss,
                                                   gradient=True)
        r.metrics["loss"] = group_loss.detach()
        loss = loss + group_loss / o.prompts_per_step   # of planned prompts; DDP averages ranks
    loss.backward()
    for r in rollouts:
        r.logp = r.logp.detach()
    clock("backward")


def loss_divisor(o: Options, rollouts: list[Rollout], ranks: int,
                 device: torch.device) -> float | None:
    """What the sum over a group's tokens is divided by. --normalize tokens: this step's tokens that
    count in the loss, on all ranks, over its number of prompts; constant: G x max_new_tokens;
    length and selected: None, since each row has its own."""
    if o.normalize == "tokens":
        tokens = all_reduce_sum({"tokens": sum(float(r.loss_mask.sum()) for r in rollouts)}, device)
        return max(1.0, tokens["tokens"]) / (o.prompts_per_step * ranks)
    return o.G * o.max_new_tokens if o.normalize == "constant" else None


def learning_rate(o: Options, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
    return o.lr * (1 + math.cos(math.pi * done)) / 2


# --------------------------------------------------------------------------------------------- main
def watched_rollout(o: Options, t: Training) -> Rollout:
    """The question that is asked again through the whole run. Nothing is learnt from it."""
    (r,) = sample_rollouts(o, t.model, t.processor, [t.watched])
    with torch.no_grad():
        ((r.logp, r.entropy),) = score_groups(t.model, [r.prompt], [r.group])
    annotate(o, [r], t.model, t.reference, Clock(t.device))
    return r


def main(o: Options) -> None:
    """The whole run: algorithm 1, step by step."""
    records, left_out = check_start(o)
    if o.check:
        return print(f"ready: {len(records)} records in {o.data}, model {o.model}")
    t = Training(o, records, left_out)

    for step in tqdm(range(t.stream.first, t.stream.steps), initial=t.stream.first,
                     total=t.stream.steps, unit="step", disable=t.rank > 0, dynamic_ncols=True):
        clock, lr = Clock(t.device), learning_rate(o, step, t.stream.steps)
        with t.name_errors(step):
            prompts = t.stream.prompts_of_step(step)
            clock("data")
            rollouts = sample_rollouts(o, t.model, t.processor, prompts)            # sample
            for r in rollouts:
                r.progress = step / t.stream.steps
            clock("sample")
            divisor = loss_divisor(o, rollouts, t.ranks, t.device)
            rows = [len(r.prompt.ids) + sum(r.group.lengths) for r in rollouts]
            parts = batches(rows, ROW_TOKENS) or [slice(0)]
            for _ in range(o.updates):
                for part in parts:                                                  # learn
                    with t.averaging(part is parts[-1]):
                        learn(o, t.scorer, t.reference, rollouts[part], divisor, clock)

                norm = t.optimizer.grad_norm()      # the same on every rank
                sums = all_reduce_sum(metric_sums(o, rollouts, t.preemption.asked), t.device)
                if math.isfinite(norm) and sums["prompts"]:                         # step
                    t.optimizer.step(lr, min(1.0, o.max_grad_norm / (norm + 1e-6)))
                t.optimizer.zero_grad()
                clock("step")
        stopping = t.end_step(sums, norm, lr, clock)                                # log and save
        if t.samples_due():
            with t.name_errors(step):
                t.log_samples(rollouts[:1], watched_rollout(o, t) if t.watched else None)
        t.save_when_due(stopping)
    t.end()


if __name__ == "__main__":
    run_program(lambda: main(parse()))
