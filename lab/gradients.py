"""The paper's gradient analysis: how much of GRPO's gradient comes from the key tokens?

At one checkpoint, for each question's group, the loss without clip and KL,
    L = sum_i -A_i / |o_i| sum_t m_t logp(y_t),
and its gradient in the language model's last layer, with m = 1 on the key tokens, on the others, or
on all: norms, cosines with that of all, and the variance of each rule's losses over completions.

    python -m lab.study --looks       at each world's cold start, and at a demonstration's end
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Prompts, read_records
from grpo import group_advantages
from ktr import find_key_tokens, sample_rollouts
from lab.attribution_table import heavier
from options import Options
from policy import load, score_groups
from rollout import Rollout

RULES = {"Video-KTR": Options(), "visual+temporal": Options(signals=["visual", "temporal"]),
         "random 45%": Options(signals=["random"], ratio=0.45)}


def gradient_of(losses: Tensor, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """mask (G, T) -> the last layer's flat gradient of the sum of the losses (G, T) under it."""
    last = list(model.model.language_model.layers[-1].parameters())

    def gradient(mask: Tensor) -> Tensor:
        parts = torch.autograd.grad((losses * mask).sum(), last, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])
    return gradient


def gradient_analysis(model_name: str, world: str, questions: int = 64, G: int = 8,
                      rules: dict[str, Options] = RULES, longest: int = 64) -> dict:
    """Print and return {"gradients": {rule: means over groups}, "loss variance": {rule: ..}}, on
    clips of the world's train.json. A rule's key tokens are those that `heavier` takes. SystemExit
    if no group has unequal rewards."""
    model, processor = load(model_name)
    records = read_records(Path(world) / "train.json")[0]
    clips = [record for record in records if record["data_type"] == "video"][:questions]
    data = Prompts(clips, world, processor)
    o = Options(G=G, max_new_tokens=longest)
    rollouts = sample_rollouts(o, model, processor, [(data[i], i) for i in range(len(data))])
    rows = {rule: [] for rule in rules}
    losses = {rule: [] for rule in ("GRPO", *rules)}
    for sampled in rollouts:
        prompt, group, mask = sampled.prompt, sampled.group, sampled.group.completion_mask
        advantages = group_advantages(sampled.rewards)
        if not advantages.any():
            continue
        ((logp, entropy),) = score_groups(model, [prompt], [group])
        tokens = -advantages[:, None] * logp / mask.sum(-1, keepdim=True)           # (G, T)
        gradient = gradient_of(tokens, model)
        whole = gradient(mask)
        losses["GRPO"] += (tokens * mask).sum(-1).tolist()
        for rule, o in rules.items():
            r = Rollout(prompt, group, sampled.seed, logp=logp.detach(), entropy=entropy.detach())
            find_key_tokens(o, [r], model)
            losses[rule] += (tokens * r.key_mask).sum(-1).tolist()
            row, key = {}, heavier(r.key_mask, mask)
            for name, some in (("key", key), ("other", mask & ~key)):
                part = gradient(some)
                row[name] = part.norm().item()
                row[f"cosine {name}"] = torch.cosine_similarity(part, whole, dim=0).item()
            rows[rule].append(row)
    if not losses["GRPO"]:
        raise SystemExit(f"error: {model_name}: in all {len(rollouts)} groups the completions earn "
                         "alike; there is no gradient to look at")

    table = {}
    for rule, found in rows.items():
        table[rule] = {name: statistics.mean(row[name] for row in found) for name in found[0]}
    variance = {rule: statistics.variance(values) for rule, values in losses.items()}
    print(f"last layer's gradient, mean over {len(found)} groups with unequal rewards")
    for rule, row in table.items():
        print(f"{rule:16} norm: key tokens {row['key']:.4f}, others {row['other']:.4f}; "
              f"cosine with the whole: {row['cosine key']:.3f}, {row['cosine other']:.3f}")
    variances = [f"{rule} {value:.3f}" for rule, value in variance.items()]
    print(f"variance of the loss: {', '.join(variances)}")
    return {"gradients": table, "loss variance": variance}
