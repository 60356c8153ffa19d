"""Weights per signal, in the manner of ToR (token reweighting of perception and reasoning tokens).

    w_t = 1 + sum over signals of WEIGHT[signal] * [the signal chose y_t], then mean weight 1

ToR weighs the tokens that perceive (visual) and those that reason (entropy) each by a weight of
their own. Its values, and what it gives all other tokens, are not known to us: these are ours, and
so the rule is not called ToR.
"""

import torch
from torch import Tensor

from attribution import WEIGHTS
from options import Options
from rollout import Rollout

OPTIONS = "--signals visual entropy --weighting per_signal"
WEIGHT = {"visual": 1.0, "entropy": 0.5}


def weigh(chosen: dict[str, Tensor], valid: Tensor) -> Tensor:
    """Weights (G, T) with mean 1 over the group's valid tokens."""
    w = torch.ones(valid.shape, device=valid.device)
    for name, tokens in chosen.items():
        w = w + WEIGHT.get(name, 0.0) * tokens
    w = w * valid
    return w * valid.sum() / w.sum().clamp(min=1)


def per_signal(r: Rollout, o: Options) -> Tensor:
    return weigh(r.top_tokens, r.group.completion_mask)


WEIGHTS["per_signal"] = per_signal
