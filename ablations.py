"""The paper's other options, so that attribution.py stays short.

    MASKINGS    the video masked: its tokens hidden, features zeroed, half hidden, another clip
    ORDERS      the frames in another order: random, reversed, blocks of four
    DISTANCES   between next-token distributions, in place of the token's own log-probability
    WEIGHTINGS  soft weights in place of the key mask

One registry each, one line an entry; the defaults are the first ones. A rollout `r` is
attribution.Rollout, options `o` are run.options.Options.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Limits, load_media, read_records
from engine.workers import loader
from policy import Group, hidden_states, unflatten
from prompt import BadRecord, Prompt, Vision
from stream import limits_of

LOGITS_AT_ONCE = 1 << 27        # while distributions are compared: 0.5 GiB in fp32


# --------------------------------------------------------------------------------- the video masked
def half(r, o) -> Prompt:
    """Half of the video tokens, picked by chance, are hidden."""
    count = int(r.prompt.visual.sum())
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count, generator=r.generator)[:count // 2]] = True
    return r.prompt.thinned(keep)


@dataclass
class Media:
    """Map-style data set: index -> the frames of a record's clip, or None where it has none."""
    records: list[dict]
    root: str
    limits: Limits
    vision: Vision

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            return load_media(self.records[index], self.root, self.limits, self.vision)[0]
        except BadRecord:
            return None

    def lost(self, index: int, reason: str) -> None:
        """What stands for a clip whose decoding process died or hung."""


@cache
def records_in(data: str, leave_out: str) -> list[dict]:
    return read_records(data, leave_out or None)[0]


def another(r, o) -> Prompt:
    """The clip of another question, brought to the same number and size of frames. It is decoded
    now, in a process that may die; the next one is tried where it cannot be. SystemExit where there
    is none."""
    records, frames = records_in(o.data, o.leave_out), r.prompt.frames
    indices = torch.randperm(len(records), generator=r.generator).tolist()
    others = [i for i in indices if records[i]["path"] != r.prompt.record["path"]]
    media = loader(Media(records, o.videos, limits_of(o), r.prompt.vision), others, workers=1)
    with closing(media):
        other = next((clip for clip in media if clip is not None), None)
    if other is None:
        raise SystemExit(f"error: --masking replace: {o.data} has no other clip that decodes")
    index = torch.linspace(0, len(other) - 1, len(frames)).round().long()
    size = frames.shape[-2:]
    return r.prompt.showing(F.interpolate(other[index], size=size, mode="bicubic", antialias=True))


MASKINGS: dict[str, Callable[..., Prompt]] = {          # (r, o) -> prompt
    "hide": lambda r, o: r.prompt.hidden(o.positions),
    "zero": lambda r, o: r.prompt.zeroed(),
    "half": half,
    "replace": another,
}


# ------------------------------------------------------------------------------ the frames' order
def shuffled(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of n >= 2 frames that is never the identity; one for a whole group."""
    while True:
        order = torch.randperm(n, generator=generator)
        if not torch.equal(order, torch.arange(n)):
            return order


def blocks(n: int, generator: torch.Generator, size: int = 4) -> Tensor:
    """Blocks of `size` frames in another order; where there is one block, frames shuffled."""
    parts = torch.arange(n).split(size)
    if len(parts) == 1:
        return shuffled(n, generator)
    return torch.cat([parts[i] for i in shuffled(len(parts), generator)])


ORDERS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": shuffled,
    "reverse": lambda n, _: torch.arange(n).flip(0),
    "blocks": blocks,
}


# ------------------------------------------------------------------- distances of distributions
def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q)."""
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen and Shannon's: the mean KL to the middle of both."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {     # of log p, log q (n, V)
    "logp": None,       # the sampled token's own: attribution.shift           # -> (n,)
    "l1": lambda p, q: (p.exp() - q.exp()).abs().sum(-1),
    "l2": lambda p, q: (p.exp() - q.exp()).square().sum(-1).sqrt(),
    "kl": kl,
    "js": js,
    "hellinger": lambda p, q: (((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2).sqrt(),
    "cosine": lambda p, q: 1 - F.cosine_similarity(p.exp(), q.exp(), dim=-1),
}


def distribution_shift(states: Tensor, other: Tensor, head: Tensor, kind: str) -> Tensor:
    """(n,) distances of the predictions of two rows of states (n, D), in chunks; head is (V, D)."""
    rows = max(1, LOGITS_AT_ONCE // len(head))
    found = []
    for x, y in zip(states.split(rows), other.split(rows)):
        p, q = (F.linear(h, head).float().log_softmax(-1) for h in (x, y))
        found.append(DISTANCES[kind](p, q))
    return torch.cat(found)


def distances(model: nn.Module, prompts: Sequence[Prompt], changed: Sequence[Prompt],
              groups: Sequence[Group], kind: str) -> list[Tensor]:
    """How far the next-token distribution moves at each token, (G, T) for each group."""
    before, after = (hidden_states(model, shown, groups) for shown in (prompts, changed))
    return unflatten(distribution_shift(before, after, model.lm_head.weight, kind), groups)


# ----------------------------------------------------------------------------------- soft weights
def scaled(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores brought to 0..1 over the group's valid tokens (all 0 where they are equal)."""
    low, high = scores[valid].min(), scores[valid].max()
    return ((scores - low) / (high - low).clamp(min=1e-12)).masked_fill(~valid, 0)


def standard(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 over the group's valid tokens; -inf at padding."""
    z = (scores - scores[valid].mean()) / (scores[valid].std(correction=0) + 1e-6)
    return z.masked_fill(~valid, -torch.inf)


def softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """A distribution over the group's tokens, times their number: the mean weight is 1."""
    z = standard(scores, valid)
    return torch.softmax(z.flatten(), 0).view_as(z) * valid.sum()


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {   # scores, valid -> weights, (G, T)
    "sigmoid": lambda scores, valid: torch.sigmoid(standard(scores, valid)),
    "softmax": softmax,
    "linear": scaled,
    "exponential": lambda scores, valid: torch.exp(scaled(scores, valid) - 1),
}


def soften(signals: dict[str, Tensor], valid: Tensor, weighting: str) -> Tensor:
    """Weights (G, T) in place of the key mask: the largest that any signal gives a token."""
    weights = torch.zeros(valid.shape, device=valid.device)
    for scores in signals.values():
        weights = torch.maximum(weights, WEIGHTINGS[weighting](scores, valid.bool()))
    return weights * valid
