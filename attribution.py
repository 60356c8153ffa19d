"""Attribution: which tokens carry the gradient. The one file a fork edits.

Paper section 3.2. A signal scores every token y_t of a group's completions; each signal keeps its
top r of them, and the union of the kept tokens is the key mask m (eq. 5).

    visual    eq. 2   |logp(y_t | v, q, y_<t) - logp(y_t | v masked,   q, y_<t)|
    temporal  eq. 3   |logp(y_t | v, q, y_<t) - logp(y_t | v shuffled, q, y_<t)|   videos only
    entropy   eq. 4   -sum_w p_w log p_w
    random    chance: the control that every claim about the others needs
    all       every token alike: kept whole, this is plain GRPO

A signal is a function of a `Rollout` and the run's options. It returns its scores (G, T); or the
prompt that should be shown instead, and a token's score is how far its log-probability moves then;
or None where it does not apply. SIGNALS names it. How a video is masked or shuffled, and the other
options of the paper's ablations, are ablations.py's. What selects is pure tensor functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ablations import DISTANCES, MASKINGS, ORDERS, WEIGHTINGS, distances, soften
from policy import Group, evaluating, predicting_states, score_groups
from prompt import Prompt, WrongFrames
from run.options import Options


@dataclass
class Rollout:
    """One prompt and its group of G completions: all that a step finds out about them, in order.

    ktr.py fills it from top to bottom. (G, T) fields hold 0 or False at padding.
    """
    prompt: Prompt
    group: Group                            # the completions: ids, valid (G, T)
    seed: int                               # of sampling, even; the signals' is the next one

    accuracy: Tensor | None = None          # (G,) how right each answer is, 0..1
    format: Tensor | None = None            # (G,) 1 where the completion has the asked-for form
    extra: Tensor | None = None             # (G,) a rule's reward (--bonus)

    logp: Tensor | None = None              # (G, T) of the sampled tokens under the policy
    old_logp: Tensor | None = None          # (G, T) the same before the first of --updates
    entropy: Tensor | None = None           # (G, T) nats
    ref_logp: Tensor | None = None          # (G, T) under the starting checkpoint; None: beta is 0

    scores: dict[str, Tensor] = field(default_factory=dict)     # signal: (G, T)
    chosen: dict[str, Tensor] = field(default_factory=dict)     # signal: (G, T) bool, its top r
    key_mask: Tensor | None = None          # (G, T) bool, or weights >= 0 (--weighting)

    bonus: Tensor | None = None             # (G,) for the length of right answers
    rewards: Tensor | None = None           # (G,) accuracy + format + bonus + extra
    advantages: Tensor | None = None        # (G,)
    borne: Tensor | None = None             # (G, T) bool: tokens that bear the loss
    metrics: dict[str, Tensor] = field(default_factory=dict)    # of the loss, and the loss itself

    generator: torch.Generator = field(init=False)              # the signals' random numbers, on
    states: Callable[[], tuple[Tensor, Tensor]] | None = None   # any rank the same. states():
                                                                # predicting (G, T, D), head (V, D)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed + 1)


# ------------------------------------------------------------------------------------------ signals
def visual(r: Rollout, o: Options) -> Prompt:
    """The prompt with its video masked: what depends on seeing it at all moves (eq. 2)."""
    return MASKINGS[o.masking](r, o)


def temporal(r: Rollout, o: Options) -> Prompt | None:
    """The prompt with its frames in another order: what depends on that moves (eq. 3)."""
    timed = o.times == "moved" and r.prompt.vision.timestamps       # pairs of frames share a time
    n = r.prompt.grid[0] if timed else len(r.prompt.frames)
    if r.prompt.kind == "image" or n < 2:
        return None
    order = ORDERS[o.order](n, r.generator)
    return r.prompt.rearranged(order) if timed else r.prompt.reordered(order)


def entropy(r: Rollout, o: Options) -> Tensor:
    """Where the model is unsure (eq. 4)."""
    return r.entropy


def random(r: Rollout, o: Options) -> Tensor:
    """Chance, at the same ratio."""
    return torch.rand(r.logp.shape, generator=r.generator).to(r.logp.device)


def every(r: Rollout, o: Options) -> Tensor:
    """Every token alike."""
    return torch.ones_like(r.logp)


SIGNALS: dict[str, Callable[[Rollout, Options], Tensor | Prompt | None]] = {
    "visual": visual,
    "temporal": temporal,
    "entropy": entropy,
    "random": random,
    "all": every,
}


def shift(logp: Tensor, counterfactual_logp: Tensor, kind: str = "abs") -> Tensor:
    """How far tokens' log-probabilities (G, T) move when another video is shown (eq. 2 and 3).

    "abs": in either direction (paper). "signed": only tokens that lose probability rank high
    (released code). "k3": exp(d) - d - 1, d = counterfactual - logp, which estimates the KL from
    the sampled token (Schulman 2020). ValueError for another kind.
    """
    if kind not in ("abs", "signed", "k3"):
        raise ValueError(f"shift must be 'abs', 'signed' or 'k3', not {kind!r}")
    difference = logp - counterfactual_logp
    if kind == "k3":
        return (-difference).exp() + difference - 1
    return difference.abs() if kind == "abs" else difference


def moves(rollouts: list[Rollout], changed: list[Prompt], o: Options, model) -> list[Tensor]:
    """How far each rollout's tokens move, (G, T), when its changed prompt is shown instead."""
    groups = [r.group for r in rollouts]
    if o.distance != "logp":
        return distances(model, [r.prompt for r in rollouts], changed, groups, o.distance)
    counterfactual = score_groups(model, changed, groups)
    return [shift(r.logp, logp, o.shift) for r, (logp, _) in zip(rollouts, counterfactual)]


def attribute(rollouts: list[Rollout], o: Options, model: nn.Module) -> None:
    """Fill in each rollout's scores, each signal's chosen tokens, and the key mask. No gradient.

    The rollouts' changed prompts share one forward pass per signal.
    """
    with evaluating(model):
        for r in rollouts:
            r.states = partial(predicting_states, model, r.prompt, r.group)
        for name in o.signals:
            try:
                answers = [SIGNALS[name](r, o) for r in rollouts]
            except WrongFrames as error:
                raise SystemExit(f"error: signal {name}: {error}") from None
            asking = [r for r, answer in zip(rollouts, answers) if isinstance(answer, Prompt)]
            changed = [answer for answer in answers if isinstance(answer, Prompt)]
            moved = iter(moves(asking, changed, o, model) if changed else [])
            for r, answer in zip(rollouts, answers):
                scores = next(moved) if isinstance(answer, Prompt) else answer
                if scores is not None:
                    r.scores[name] = scores
    for r in rollouts:              # after all passes, since to look at numbers is to wait for them
        for name, scores in r.scores.items():
            # where the model gives NaN the gradient will be NaN, and the step skipped
            scores = checked(f"signal {name}", scores, r.logp).nan_to_num(nan=0.0)
            r.scores[name] = scores
            r.chosen[name] = top_tokens(scores, r.group.valid, o.ratios[name], o.pool, o.ties)
        weights = WEIGHTS[o.weighting](r, o)
        r.key_mask = checked(f"weighting {o.weighting}", weights, r.logp, least=0)


# ---------------------------------------------------------------------------------------- selection
def top_tokens(scores: Tensor, valid: Tensor, ratio: float, pool: str = "group",
               ties: str = "exact") -> Tensor:
    """(G, T) bool: the ceil(ratio * n) best-scored of the pool's n valid tokens, no invalid one.

    scores (G, T), valid (G, T) bool.
    pool: "group" ranks the tokens of all G rollouts together, "response" each row by itself.
    ties: "exact" keeps the earlier token (row by row, then position). "threshold" keeps every
    token that reaches the (1 - ratio) quantile, so that ties exceed the ratio (released code).
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
    candidates = scores[valid]              # (n,)
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


def union(chosen: dict[str, Tensor], valid: Tensor) -> Tensor:
    """(G, T) bool: the tokens that any signal chose."""
    mask = torch.zeros_like(valid, dtype=torch.bool)
    for tokens in chosen.values():
        mask = mask | tokens
    return mask


def select(signals: dict[str, Tensor], valid: Tensor, ratios: dict[str, float],
           pool: str = "group", ties: str = "exact") -> Tensor:
    """The key mask m (G, T): the union of each signal's top tokens (eq. 5). In one call what
    `attribute` does in two, since it keeps what each signal chose."""
    chosen = {name: top_tokens(scores, valid, ratios[name], pool, ties)
              for name, scores in signals.items()}
    return union(chosen, valid)


# ------------------------------------------------------------------------ the other seams of a rule
# Each is named by an option (--weighting NAME ..). What it gives is on the policy's device and
# without gradient, but for a penalty, which has one; bonuses are on the CPU.
WEIGHTS: dict[str, Callable[[Rollout, Options], Tensor]] = {            # -> (G, T) >= 0
    "binary": lambda r, o: union(r.chosen, r.group.valid),              # the key mask (eq. 5)
    **dict.fromkeys(WEIGHTINGS, lambda r, o: soften(r.scores, r.group.valid, o.weighting))}
ADVANTAGES: dict[str, Callable] = {"group": lambda r, o: r.advantages}  # -> (G,) or (G, T)
PENALTIES: dict[str, Callable] = {"none": lambda r, o, model: None}     # -> (), for the loss
BONUSES: dict[str, Callable] = {            # -> (G,) for each rollout; read(group) -> its texts
    "none": lambda rollouts, o, model, read: [torch.zeros_like(r.accuracy) for r in rollouts]}
SEAMS = {           # what an option may name
    "signals": SIGNALS, "masking": MASKINGS, "order": ORDERS, "distance": DISTANCES,
    "weighting": WEIGHTS, "advantage": ADVANTAGES, "penalty": PENALTIES, "bonus": BONUSES}


def check_names(o: Options) -> None:
    """SystemExit, in one line, where an option names what is not registered."""
    for option, registry in SEAMS.items():
        named = getattr(o, option)
        for name in [named] if isinstance(named, str) else named:
            if name not in registry:
                what, known = option.removesuffix("s"), ", ".join(registry)
                raise SystemExit(f"error: unknown {what} {name!r}; known: {known}")


def checked(rule: str, value: Tensor, *like: Tensor, gradient: bool = False,
            least: float = -math.inf) -> Tensor:
    """What a rule gave; SystemExit, in one line, if it has the shape and device of none of `like`,
    is NaN (and they are not) or below `least`, or has a gradient and may not (or has none)."""
    fault = None
    if not isinstance(value, Tensor):
        fault = f"a {type(value).__name__}"
    elif (value.shape, value.device) not in [(x.shape, x.device) for x in like]:
        fault = f"shape {tuple(value.shape)} on {value.device}"
    elif value.requires_grad != gradient:
        fault = f"one {'with a' if value.requires_grad else 'without'} gradient"
    elif value.isnan().any() and not any(x.isnan().any() for x in like):
        fault = "NaN"
    elif (value < least).any():
        fault = f"one below {least}"
    if fault:
        shapes = " or ".join(str(tuple(x.shape)) for x in like)
        raise SystemExit(f"error: {rule}: expected a tensor of shape {shapes} on {like[0].device} "
                         f"{'with a' if gradient else 'without'} gradient, no NaN; got {fault}")
    return value
