"""Distances between whole next-token distributions in place of the sampled token's log-probability
(paper, ablation of the distance), for both counterfactuals: visual_NAME, temporal_NAME.

    l1, l2 (of probabilities), kl (before || after), js (Jensen and Shannon's), hellinger, cosine
`--rule lab/rules/distances.py` takes js; others: `--signals visual_kl temporal_kl entropy`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import COUNTERFACTUALS, SCORES
from options import Options
from rollout import Rollout

OPTIONS = "--signals visual_js temporal_js entropy"
LOGITS_AT_ONCE = 1 << 27        # while distributions are compared: 0.5 GiB in fp32


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q)."""
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """The mean KL to the middle of both."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {        # of log p, log q (n, V) -> (n,)
    "l1": lambda p, q: (p.exp() - q.exp()).abs().sum(-1),
    "l2": lambda p, q: (p.exp() - q.exp()).square().sum(-1).sqrt(),
    "kl": kl,
    "js": js,
    "hellinger": lambda p, q: (((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2).sqrt(),
    "cosine": lambda p, q: 1 - F.cosine_similarity(p.exp(), q.exp(), dim=-1),
}


def distance(states: Tensor, others: Tensor, head: Tensor, kind: str) -> Tensor:
    """(n,) distances of the predictions of two rows of states (n, D), in chunks; head is (V, D)."""
    rows = max(1, LOGITS_AT_ONCE // len(head))
    found = []
    for x, y in zip(states.split(rows), others.split(rows)):
        p, q = (F.linear(h, head).float().log_softmax(-1) for h in (x, y))
        found.append(DISTANCES[kind](p, q))
    return torch.cat(found)


def moved(r: Rollout, o: Options, signal: str, kind: str) -> Tensor:
    """(G, T): how far each prediction moves under a counterfactual, where that applies."""
    changed, mask = COUNTERFACTUALS[signal](r, o), r.group.completion_mask
    if changed is r.prompt:
        return changed
    scores = torch.zeros(mask.shape, device=mask.device)
    (before, head), (after, _) = r.states(), r.states(changed)
    scores[mask] = distance(before[mask], after[mask], head, kind)
    return scores


for signal in ("visual", "temporal"):
    for kind in DISTANCES:
        SCORES[f"{signal}_{kind}"] = partial(moved, signal=signal, kind=kind)
