"""Counterfactuals: what is done to the video, and how far a token's prediction moves.

Registries, one line each, for the paper's ablations (its table of perturbations and of distances):
    MASKINGS   the video masked: every token hidden, features zeroed, half of the tokens hidden, another clip
    ORDERS     the frames in another order: random, reversed, blocks of four frames
    DISTANCES  between the next-token distributions, besides the change of the sampled token's log-probability
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prompt import Prompt

WORDS_AT_ONCE = 1 << 27         # logits that exist at once while distributions are compared


# -------------------------------------------------------------------------------------------- video
def half(prompt: Prompt, generator: torch.Generator, **_) -> Prompt:
    """Half of the video tokens, picked by chance, are hidden."""
    visible = int(prompt.visual.sum())
    keep = torch.zeros(visible, dtype=torch.bool)
    keep[torch.randperm(visible, generator=generator)[:visible // 2]] = True
    return prompt.thinned(keep)


def another(prompt: Prompt, other: Tensor, **_) -> Prompt:
    """The clip of another question, brought to the same number and size of frames."""
    index = torch.linspace(0, len(other) - 1, len(prompt.frames)).round().long()
    frames = F.interpolate(other[index], size=prompt.frames.shape[-2:], mode="bicubic", antialias=True)
    return prompt.showing(frames)


MASKINGS: dict[str, Callable[..., Prompt]] = {          # (prompt, positions=, generator=, other=) -> prompt
    "hide": lambda prompt, positions, **_: prompt.hidden(positions),
    "zero": lambda prompt, **_: prompt.zeroed(),
    "half": half,
    "replace": another,
}


# -------------------------------------------------------------------------------------------- order
def shuffled(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of n >= 2 frames that is never the identity; one per prompt, shared by its group."""
    while True:
        order = torch.randperm(n, generator=generator)
        if not torch.equal(order, torch.arange(n)):
            return order


def blocks(n: int, generator: torch.Generator, size: int = 4) -> Tensor:
    """Blocks of `size` frames in another order, frames within a block in theirs; up to one block: frames shuffled."""
    parts = torch.arange(n).split(size)
    return torch.cat([parts[i] for i in shuffled(len(parts), generator)]) if len(parts) > 1 else shuffled(n, generator)


ORDERS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": shuffled,
    "reverse": lambda n, _: torch.arange(n).flip(0),
    "blocks": blocks,
}


# ----------------------------------------------------------------------------------------- distance
def shift(logp: Tensor, counterfactual_logp: Tensor, kind: str = "abs") -> Tensor:
    """How far the tokens' log-probability moves when the video is changed.

    "abs": |logp - counterfactual| (paper).  "signed": logp - counterfactual, so that only tokens which
    lose probability rank high (released code).
    """
    if kind not in ("abs", "signed"):
        raise ValueError(f"shift must be 'abs' or 'signed', not {kind!r}")
    difference = logp - counterfactual_logp
    return difference.abs() if kind == "abs" else difference


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return (kl(p, middle) + kl(q, middle)) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {        # of log-probabilities p, q (n, V) -> (n,)
    "l1": lambda p, q: (p.exp() - q.exp()).abs().sum(-1),
    "l2": lambda p, q: (p.exp() - q.exp()).square().sum(-1).sqrt(),
    "kl": kl,
    "js": js,
    "hellinger": lambda p, q: (((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2).sqrt(),
    "cosine": lambda p, q: 1 - F.cosine_similarity(p.exp(), q.exp(), dim=-1),
}


def distribution_shift(states: Tensor, other: Tensor, head: Tensor, kind: str) -> Tensor:
    """(n,) distance between the next-token distributions of two rows of states (n, D), in chunks; head is (V, D)."""
    chunk = max(1, WORDS_AT_ONCE // len(head))
    return torch.cat([DISTANCES[kind](*(F.linear(x, head).float().log_softmax(-1) for x in pair))
                      for pair in zip(states.split(chunk), other.split(chunk))])
