"""Soft weights in place of the key mask (paper, ablation of the weighting): a token weighs what the
signal that thinks most of it gives. s are a signal's scores over the group's tokens.

    linear       s brought to 0..1
    exponential  exp(linear - 1)
    sigmoid      sigmoid(z),  z = s with mean 0 and deviation 1
    softmax      softmax(z) times the number of tokens, so that the mean weight is 1
`--rule lab/rules/soft_weights.py` takes linear; others: `--weighting softmax`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attribution import WEIGHTS
from lab.rules.common import scaled
from options import Options
from rollout import Rollout

OPTIONS = "--weighting linear"


def standard(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 over the group's tokens; -inf at padding."""
    z = (scores - scores[mask].mean()) / (scores[mask].std(correction=0) + 1e-6)
    return z.masked_fill(~mask, -torch.inf)


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    z = standard(scores, mask)
    return torch.softmax(z.flatten(), 0).view_as(z) * mask.sum()


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {    # scores, completion mask -> (G, T)
    "sigmoid": lambda scores, mask: torch.sigmoid(standard(scores, mask)),
    "softmax": softmax,
    "linear": scaled,
    "exponential": lambda scores, mask: torch.exp(scaled(scores, mask) - 1),
}


def soft(r: Rollout, o: Options, kind: str) -> Tensor:
    """Weights (G, T): the largest that any signal gives a token."""
    mask = r.group.completion_mask
    weights = torch.zeros(mask.shape, device=mask.device)
    for scores in r.scores.values():
        weights = torch.maximum(weights, KINDS[kind](scores, mask))
    return weights * mask


WEIGHTS |= {kind: partial(soft, kind=kind) for kind in KINDS}
