"""Attribution: which tokens carry the gradient (paper, section 3.2).

    visual    eq. 2   |logp(y_t | v, q, y_<t) - logp(y_t | v masked,   q, y_<t)|
    temporal  eq. 3   |logp(y_t | v, q, y_<t) - logp(y_t | v shuffled, q, y_<t)|    no images
    entropy   eq. 4   -sum_w p_w log p_w
    key mask  eq. 5   the union of the top r of each signal's tokens

A signal scores every token y_t of a group's completions. It gives the scores, or a counterfactual:
another prompt. Then a token's score is how far its log-probability moves under that prompt.
This file needs torch alone: `shift` and `select` take tensors of any trainer, `attribute` a rollout
(rollout.py), options (options.py) and a function that scores prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from options import Options
    from prompt import Prompt
    from rollout import Group, Rollout


class RuleError(ValueError):
    """What a rule returned cannot be used. The message names the rule, in one line."""


# ---------------------------------------------------------------------------------- counterfactuals
def mask_video(r: "Rollout", o: "Options") -> "Prompt":
    """The prompt without its video's (or image's) tokens (eq. 2); the start and end around them
    stay. A token hidden from attention reaches no other one, so leaving it out gives the same
    log-probabilities. Text stays at its own positions, or closes the gap (`--positions moved`)."""
    p, text = r.prompt, ~r.prompt.visual                                            # (P,)
    ids, positions, following = p.ids[text], p.positions[:, text], p.next_position
    if o.positions == "moved":
        positions, following = torch.arange(len(ids)).expand(3, -1), len(ids)
    return replace(p, ids=ids, positions=positions, next_position=following, visual=p.visual[text],
                   frames=None)


def shuffle_frames(r: "Rollout", o: "Options") -> "Prompt":
    """The prompt with its frames (not pairs) in another order (eq. 3), one for the whole group;
    positions and times stay. The prompt itself where no other is: an image, a clip of one frame."""
    n = len(r.prompt.frames)
    if r.prompt.kind == "image" or n < 2:
        return r.prompt
    return r.prompt.with_frames(r.prompt.frames[frame_order(n, r.generator)])


def frame_order(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation (n,) of n >= 2 frames that is never the identity."""
    while True:
        order = torch.randperm(n, generator=generator)
        if not torch.equal(order, torch.arange(n)):
            return order


def shift(logp: Tensor, counterfactual_logp: Tensor, kind: str = "abs") -> Tensor:
    """How far tokens' log-probabilities (G, T) move when another video is shown (eq. 2 and 3).

    "abs": in either direction (paper). "signed": how far they fall, below 0 where they rise
    (released code). "k3": exp(d) - d - 1, d = counterfactual - logp, which estimates the KL from
    the sampled token (Schulman 2020). ValueError for another kind.
    """
    if kind not in ("abs", "signed", "k3"):
        raise ValueError(f"shift must be 'abs', 'signed' or 'k3', not {kind!r}")
    difference = logp - counterfactual_logp
    if kind == "k3":
        return (-difference).exp() + difference - 1
    return difference.abs() if kind == "abs" else difference


# ---------------------------------------------------------------------------------------- selection
def top_tokens(scores: Tensor, valid: Tensor, ratio: float, pool: str = "group",
               ties: str = "exact") -> Tensor:
    """(G, T) bool: the ceil(ratio * n) best-scored of the pool's n valid tokens, no invalid one.

    scores (G, T), valid (G, T) bool: the completion mask.
    pool: "group" ranks the tokens of all G completions together, "response" each row by itself.
    ties: "exact" keeps the earlier token (row by row, then position). "threshold" keeps every
    token that reaches the (1 - ratio) quantile, maybe more than ceil(ratio * n) (released code).
    ValueError for a ratio outside 0..1, an unknown pool or ties, or a valid score that is NaN.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in 0..1, not {ratio}")
    if pool not in ("group", "response"):
        raise ValueError(f"pool must be 'group' or 'response', not {pool!r}")
    if ties not in ("exact", "threshold"):
        raise ValueError(f"ties must be 'exact' or 'threshold', not {ties!r}")
    valid = valid.bool()
    if pool == "response":
        rows = [top_tokens(s[None], v[None], ratio, "group", ties) for s, v in zip(scores, valid)]
        return torch.cat(rows) if rows else torch.zeros_like(valid)
    mask = torch.zeros_like(valid)
    candidates = scores[valid]                                                      # (n,)
    if candidates.isnan().any():
        raise ValueError("a valid token has the score NaN")
    if len(candidates) == 0:
        return mask
    if ties == "threshold":
        kept = candidates >= torch.quantile(candidates, 1 - ratio)
    else:
        k = math.ceil(ratio * len(candidates) - 1e-9)           # 0.07 * 100 is 7.000000000000001
        best = torch.sort(candidates, descending=True, stable=True).indices[:k]
        kept = torch.zeros_like(candidates, dtype=torch.bool)
        kept[best] = True
    return mask.masked_scatter(valid, kept)


def union(masks: dict[str, Tensor], valid: Tensor) -> Tensor:
    """(G, T) bool: the tokens in any of the signals' masks."""
    return sum(masks.values(), torch.zeros_like(valid, dtype=torch.bool))       # + of bool is "or"


def select(signals: dict[str, Tensor], valid: Tensor, ratios: dict[str, float] | float,
           pool: str = "group", ties: str = "exact") -> Tensor:
    """The key mask m (G, T): the union of each signal's top tokens (eq. 5). ratios: of each signal,
    or one for all."""
    if not isinstance(ratios, dict):
        ratios = dict.fromkeys(signals, ratios)
    return union({name: top_tokens(scores, valid, ratios[name], pool, ties)
                  for name, scores in signals.items()}, valid)


# ------------------------------------------------------------------------- the registries of a rule
# (r, o) -> the prompt that is shown instead. Where a signal does not apply, it gives r.prompt
COUNTERFACTUALS: dict[str, Callable[["Rollout", "Options"], "Prompt"]] = {
    "visual": mask_video,
    "temporal": shuffle_frames,
}
# (r, o) -> scores (G, T), or r.prompt where a signal does not apply
SCORES: dict[str, Callable[["Rollout", "Options"], Tensor]] = {
    "entropy": lambda r, o: r.entropy,                                  # eq. 4
    "random": lambda r, o: torch.rand(r.logp.shape, generator=r.generator).to(r.logp.device),
    "all": lambda r, o: torch.ones_like(r.logp),                        # plain GRPO
}
# (r, o) -> weights (G, T) >= 0 in the loss
WEIGHTS: dict[str, Callable[["Rollout", "Options"], Tensor]] = {
    "binary": lambda r, o: union(r.top_tokens, r.group.completion_mask),            # eq. 5
}


def attribute(rollouts: list["Rollout"], o: "Options",
              score: Callable[[Sequence["Prompt"], Sequence["Group"]], list[Tensor]]) -> None:
    """Fill in each rollout's scores and top tokens by signal, and its key mask. No gradient.

    score(prompts, groups) returns the log-probabilities (G, T) of each group after its prompt; it
    is called once for a counterfactual, if it applies. RuleError if a rule's output is unusable.
    """
    for name in o.signals:
        asked = [(r, given) for r in rollouts if (given := ask(name, r, o)) is not r.prompt]
        if name in SCORES:
            for r, scores in asked:
                r.scores[name] = scores
            continue
        found = asked and score([prompt for _, prompt in asked], [r.group for r, _ in asked])
        for (r, _), counterfactual_logp in zip(asked, found):
            r.scores[name] = shift(r.logp.detach(), counterfactual_logp, o.shift)   # eq. 2, 3
    for r in rollouts:          # after all passes, since reading a number waits for the GPU
        for name, scores in r.scores.items():
            # where the model gives NaN the gradient will be NaN, and the step skipped
            scores = check_output(f"signal {name}", scores, r.logp).nan_to_num(nan=0.0)
            r.scores[name] = scores
            r.top_tokens[name] = top_tokens(scores, r.group.completion_mask, o.ratios[name],
                                            o.pool, o.ties)
        weights = WEIGHTS[o.weighting](r, o)
        r.key_mask = check_output(f"weighting {o.weighting}", weights, r.logp, minimum=0)


def ask(name: str, r: "Rollout", o: "Options") -> "Tensor | Prompt":
    """Scores, or the prompt that a signal shows instead; RuleError if these cannot be used."""
    lent = (r.prompt.frames, r.prompt.ids, r.prompt.visual, r.group.completion_mask, r.logp)
    before = [x._version for x in lent]
    given = (SCORES.get(name) or COUNTERFACTUALS[name])(r, o)
    if [x._version for x in lent] != before:
        raise RuleError(f"signal {name} changed what r holds in place; change a clone() of it")
    if name in SCORES:
        return given
    if not hasattr(given, "frames"):
        raise RuleError(f"signal {name} gave no prompt; where it does not apply, return r.prompt")
    if given.frames is not None and given.grid != r.prompt.grid:
        raise RuleError(f"signal {name}: frames of shape {tuple(given.frames.shape)} cannot stand "
                        f"for those of shape {tuple(r.prompt.frames.shape)}")
    return given


def check_output(rule: str, value: Tensor, *examples: Tensor, gradient: bool = False,
                 minimum: float = -math.inf) -> Tensor:
    """`value`, which a rule returned. RuleError unless it has the shape and device of one of the
    examples, no NaN (unless one of them has), no value below minimum, and a gradient as asked."""
    fault = None
    if not isinstance(value, Tensor):
        fault = f"a {type(value).__name__}"
    elif (value.shape, value.device) not in [(x.shape, x.device) for x in examples]:
        fault = f"shape {tuple(value.shape)} on {value.device}"
    elif value.requires_grad != gradient:
        fault = f"one {'with a' if value.requires_grad else 'without'} gradient"
    elif value.isnan().any() and not any(x.isnan().any() for x in examples):
        fault = "NaN"
    elif (value < minimum).any():
        fault = f"one below {minimum}"
    if fault:
        shapes = " or ".join(str(tuple(x.shape)) for x in examples)
        raise RuleError(f"{rule}: expected a tensor of shape {shapes} on {examples[0].device} "
                        f"{'with a' if gradient else 'without'} gradient, no NaN; got {fault}")
    return value
