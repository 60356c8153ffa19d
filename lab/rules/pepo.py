"""PEPO (Li et al. 2026, arXiv 2603.22847): perception, gated by exploration, more and more.

    v = mean over layers and the picture's tokens of cos(h of the token, h of the picture's token)
    w = n softmax(v (1 + GATE tanh(v' + h' - their mean)) / TEMPERATURE) over the completion
    A_it = (1 - p + p w_it) A_i,   p: the part of the run that is done
v' and h': v and the entropy, min-max scaled over the completion. KL 0.001 on every token.
Source: github.com/xzxxntxdy/PEPO, src/pepo/train/grpo_trainer.py, scripts/train (GATE 0.10 in one
commit). The states are what enters each layer and what leaves the last norm.
Differs: all of a clip's tokens count; one forward pass for the states, which the source shares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import SCORES, WEIGHTS
from lab.rules.common import at_tokens, own_and_visual, row_means, scaled, show_layers
from options import Options
from rollout import Rollout

OPTIONS = "--signals likeness --weighting pepo --beta 0.001 --kl_on all"
GATE, TEMPERATURE = 0.05, 1.8


def likeness(r: Rollout, o: Options) -> Tensor:
    found = []

    def look(row: Tensor) -> None:
        own, visual = (F.normalize(x.float(), dim=-1) for x in own_and_visual(row, r))
        found.append(own @ visual.mean(0))

    show_layers(r, look)
    return at_tokens(torch.stack(found).mean(0), r.group.completion_mask)


def pepo(r: Rollout, o: Options) -> Tensor:
    v, mask = r.scores["likeness"], r.group.completion_mask
    mixed = scaled(v, mask, rows=True) + scaled(r.entropy, mask, rows=True)
    gated = v * (1 + GATE * torch.tanh(mixed - row_means(mixed, mask))) / TEMPERATURE
    w = gated.masked_fill(~mask, -torch.inf).softmax(-1) * mask.sum(-1, keepdim=True)
    return (1 - r.progress + r.progress * w) * mask


SCORES["likeness"], WEIGHTS["pepo"] = likeness, pepo
