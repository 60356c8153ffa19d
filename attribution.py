"""Attribution: which tokens carry the gradient. The one file a fork edits.

Paper section 3.2: a signal scores every token of a group, each signal keeps its top r of them, the union
of the kept tokens is the key mask (eq. 2-5).

    visual    |logp(y_t | v, q, y_<t) - logp(y_t | v masked, q, y_<t)|
    temporal  |logp(y_t | v, q, y_<t) - logp(y_t | v shuffled, q, y_<t)|    (videos only)
    entropy   -sum_w p_w log p_w
    random    chance: the control that every claim about the others needs

A signal is a function of a `Rollout` that returns scores (G, T), or None where it does not apply; SIGNALS
names it. To ask what another prompt would have changed, it yields that prompt and receives how far each token
moved (G, T), so that the questions of all rollouts share forward passes. How the video is changed, and how a
move is measured, is counterfactual.py's. `top_tokens` and `select` are pure tensor functions.
"""

import inspect
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations import MASKINGS, ORDERS, shift  # noqa: F401  (shift is part of this module's interface)
from prompt import Prompt


@dataclass
class Rollout:
    """What a signal may look at: one prompt and its G completions."""
    prompt: Prompt
    ids: Tensor                             # (G, T) completion tokens
    valid: Tensor                           # (G, T) bool, True up to and with the first end token
    logp: Tensor                            # (G, T) of the sampled tokens, no gradient
    entropy: Tensor                         # (G, T) in nats
    generator: torch.Generator              # on the CPU, seeded by step and prompt: the same on any rank
    masking: str = "hide"                   # of MASKINGS
    positions: str = "unchanged"
    order: str = "random"                   # of ORDERS
    other: Tensor | None = None             # frames of another question, for masking by replacement
    states: Callable[[], tuple[Tensor, Tensor]] | None = None   # () -> the predicting states (G, T, D), the head (V, D)


Asks = Generator[Prompt, Tensor, Tensor | None]        # a signal that yields prompts and receives changes


# ------------------------------------------------------------------------------------------ signals
def visual(r: Rollout) -> Asks:
    """How much the token depends on seeing the video at all (paper eq. 2)."""
    change = yield MASKINGS[r.masking](r.prompt, positions=r.positions, generator=r.generator, other=r.other)
    return change


def temporal(r: Rollout) -> Asks:
    """How much the token depends on the order of the frames (paper eq. 3). A still image has none."""
    frames = len(r.prompt.frames)
    if r.prompt.kind == "image" or frames < 2:
        return None
    change = yield r.prompt.reordered(ORDERS[r.order](frames, r.generator))
    return change


def entropy(r: Rollout) -> Tensor:
    """Where the model is unsure (paper eq. 4)."""
    return r.entropy


def random(r: Rollout) -> Tensor:
    """Chance, at the same ratio."""
    return torch.rand(r.logp.shape, generator=r.generator).to(r.logp.device)


def every(r: Rollout) -> Tensor:
    """Every token alike; kept whole, this is plain GRPO."""
    return torch.ones_like(r.logp)


def spread(r: Rollout) -> Tensor:
    """How much the group's predictions differ at a position (TW-GRPO, arXiv 2505.24718): the mean over completions of
    sum_v (e^d - d - 1), d = mean log-probability - log-probability, clamped to +-11; padding predicts uniformly."""
    states, head = r.states()
    values = []
    for h, valid in zip(states.split(16, dim=1), r.valid.split(16, dim=1)):
        logp = F.linear(h, head).float().log_softmax(-1)                            # (G, t, V)
        logp = torch.where(valid[..., None], logp, -math.log(len(head)))
        d = (logp.mean(0) - logp).clamp(-11, 11)
        values.append((d.exp() - d - 1).sum(-1).mean(0))
    return torch.cat(values).expand_as(r.logp)


SIGNALS: dict[str, Callable[[Rollout], Asks | Tensor | None]] = {
    "visual": visual,
    "temporal": temporal,
    "entropy": entropy,
    "random": random,
    "all": every,
    "spread": spread,
}


def attribute(rollouts: list[Rollout], names: list[str],
              moved: Callable[[list[int], list[Prompt]], list[Tensor]]) -> list[dict[str, Tensor]]:
    """Each rollout's scores by signal, {name: (G, T)}; signals that do not apply are left out.

    moved(numbers, prompts) says how far the tokens of rollouts[number] move, (G, T), under each one's other prompt.
    """
    scores: list[dict[str, Tensor]] = [{} for _ in rollouts]
    for name in names:
        asking = []                                     # (rollout's number, generator, answer to send it)
        for i, r in enumerate(rollouts):
            result = SIGNALS[name](r)
            if inspect.isgenerator(result):
                asking.append((i, result, None))
            elif result is not None:
                scores[i][name] = result
        while asking:
            asked = []
            for i, generator, answer in asking:
                try:
                    asked.append((i, generator, generator.send(answer)))
                except StopIteration as stop:
                    if stop.value is not None:
                        scores[i][name] = stop.value
            answers = moved([i for i, *_ in asked], [p for *_, p in asked]) if asked else []
            asking = [(i, generator, answer) for (i, generator, _), answer in zip(asked, answers)]
    return scores


# ---------------------------------------------------------------------------------------- selection
def top_tokens(scores: Tensor, valid: Tensor, ratio: float, pool: str = "group", ties: str = "exact") -> Tensor:
    """(G, T) bool: the ceil(ratio * n) best-scored of the n valid tokens of the pool, never an invalid one.

    pool: "group" ranks the tokens of all G rollouts together, "response" each row by itself.
    ties: "exact" keeps the earlier token (row by row, then position); "threshold" keeps every token that
    scores at least as much as the last one kept, so the share can exceed the ratio (released code).
    Raises ValueError for a ratio outside 0..1, an unknown pool, or a valid score that is NaN.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in 0..1, not {ratio}")
    if pool not in ("group", "response"):
        raise ValueError(f"pool must be 'group' or 'response', not {pool!r}")
    if ties not in ("exact", "threshold"):
        raise ValueError(f"ties must be 'exact' or 'threshold', not {ties!r}")
    if pool == "response":
        rows = [top_tokens(s[None], v[None], ratio, "group", ties) for s, v in zip(scores, valid.bool())]
        return torch.cat(rows) if rows else torch.zeros_like(valid, dtype=torch.bool)
    where = valid.bool().flatten().nonzero().squeeze(-1)                            # positions of the n valid tokens
    candidates = scores.flatten()[where]
    if candidates.isnan().any():
        raise ValueError("a valid token has the score NaN")
    k = math.ceil(ratio * len(where) - 1e-9)                                        # 0.07 * 100 is 7.000000000000001
    order = torch.sort(candidates, descending=True, stable=True).indices[:k]
    kept = torch.zeros_like(candidates, dtype=torch.bool)
    kept[order] = True
    if ties == "threshold" and k > 0:
        kept = candidates >= candidates[order[-1]]
    mask = torch.zeros_like(valid, dtype=torch.bool).flatten()
    mask[where] = kept
    return mask.view(valid.shape)


def select(signals: dict[str, Tensor], valid: Tensor, ratios: dict[str, float], pool: str = "group",
           ties: str = "exact") -> Tensor:
    """The key mask (G, T): the union of each signal's top tokens (paper eq. 5)."""
    mask = torch.zeros_like(valid, dtype=torch.bool)
    for name, scores in signals.items():
        mask = mask | top_tokens(scores, valid, ratios[name], pool, ties)
    return mask


# ----------------------------------------------------------------------- soft weights (an ablation)
def scaled(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores brought to 0..1 over the group's valid tokens (all 0 where they are equal)."""
    low, high = scores[valid].min(), scores[valid].max()
    return ((scores - low) / (high - low).clamp(min=1e-12)).masked_fill(~valid, 0)


def standard(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 over the group's valid tokens."""
    return (scores - scores[valid].mean()) / (scores[valid].std(correction=0) + 1e-6)


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {       # (scores, valid), each (G, T) -> weights (G, T)
    "sigmoid": lambda s, valid: torch.sigmoid(standard(s, valid)),
    "softmax": lambda s, valid: torch.softmax(standard(s, valid).masked_fill(~valid, -torch.inf).flatten(), 0).view_as(s) * valid.sum(),
    "linear": scaled,
    "exponential": lambda s, valid: torch.exp(scaled(s, valid) - 1),
    "spread": lambda s, valid: 1 + 0.7 * scaled(s, valid),          # TW-GRPO's, for the signal of that name
}


def soften(signals: dict[str, Tensor], valid: Tensor, weighting: str) -> Tensor:
    """Weights (G, T) in place of the key mask: for each token the largest that a signal gives it."""
    weights = [WEIGHTINGS[weighting](scores, valid.bool()) for scores in signals.values()]
    return (torch.stack(weights).amax(0) if weights else torch.zeros(valid.shape, device=valid.device)) * valid
