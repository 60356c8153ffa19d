"""Distances between whole next-token distributions in place of the sampled token's log-probability
(paper, ablation of the distance), for both counterfactuals: visual_NAME, temporal_NAME.

    l1, l2 (of probabilities), kl (before || after), js (Jensen and Shannon's), hellinger, cosine
`--rule lab/rules/distances.py` takes js; others: `--signals visual_kl temporal_kl entropy`.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from attribution import COUNTERFACTUALS, SCORES
from lab.rules.common import at_tokens, js, kl, of_predictions
from options import Options
from rollout import Rollout

OPTIONS = "--signals visual_js temporal_js entropy"
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {        # of log p, log q (n, V) -> (n,)
    "l1": lambda p, q: (p.exp() - q.exp()).abs().sum(-1),
    "l2": lambda p, q: (p.exp() - q.exp()).square().sum(-1).sqrt(),
    "kl": kl,
    "js": js,
    "hellinger": lambda p, q: (((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2).sqrt(),
    "cosine": lambda p, q: 1 - F.cosine_similarity(p.exp(), q.exp(), dim=-1),
}


def distance_scores(r: Rollout, o: Options, signal: str, kind: str) -> Tensor:
    """(G, T): how far each prediction moves under a counterfactual, where that applies."""
    changed, mask = COUNTERFACTUALS[signal](r, o), r.group.completion_mask
    if changed is r.prompt:
        return changed
    (before, head), (after, _) = r.states(), r.states(changed)
    return at_tokens(of_predictions(DISTANCES[kind], head, before[mask], after[mask]), mask)


for signal in ("visual", "temporal"):
    for kind in DISTANCES:
        SCORES[f"{signal}_{kind}"] = partial(distance_scores, signal=signal, kind=kind)
