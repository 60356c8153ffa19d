"""VGPO (Wang et al. 2026, arXiv 2604.09349): weights by how near to the picture a token's state is.

    w = cos(last state of the token, mean of the picture's tokens'), min-max over the batch
    w *= 1 + STRENGTH t / T    on the top 20% of the completion's second half; then min-max over it
    psi = 1 + w - mean w  in 0.1 .. 2;    phi = sum of w, min-max over the group
    A_it = psi_it alpha_i A_i,   alpha = 1 + phi - mean phi  in 0.9 .. 2;   the loss is DAPO's
Source: github.com/wzb-bupt/VGPO, verl/workers/actor/dp_actor.py, verl/trainer/core_algos.py, whose
first min-max counts padding as 0, and whose groups are what lies side by side in a micro-batch.
Differs: here neither; all of a clip's tokens make the mean; one forward pass for the states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import SCORES, WEIGHTS
from engine.scoring import packed_forward
from lab.rules.common import at_tokens, of_batch, own_and_visual, row_means, scaled
from options import Options
from rollout import Rollout

OPTIONS = ("--signals nearness --weighting vgpo --normalize tokens --clip_high 0.28 "
           "--filter accuracy --beta 0")
STRENGTH, TOP = 0.3, 0.2


def nearness(r: Rollout, o: Options) -> Tensor:
    own, visual = own_and_visual(packed_forward(r.model, [r.prompt], [r.group]), r)
    cosines = F.cosine_similarity(own.float(), visual.float().mean(0), dim=-1)
    return at_tokens(cosines, r.group.completion_mask)


def vgpo(r: Rollout, o: Options) -> Tensor:
    mask, every = r.group.completion_mask, torch.cat(of_batch(r, "nearness"))
    w = (r.scores["nearness"] - every.min()) / (every.max() - every.min()).clamp(min=1e-8)
    t, n = torch.arange(mask.shape[1], device=mask.device), mask.sum(-1, keepdim=True)
    late, k = w.masked_fill(~mask | (t < n // 2), -1), ((n - n // 2) * TOP).long().clamp(min=1)
    top = late >= late.sort(-1, descending=True).values.gather(-1, k - 1)
    w = scaled(w * (1 + STRENGTH * t / (n - 1).clamp(min=1) * top), mask, rows=True)
    phi = scaled(w.sum(-1), mask.any(-1))
    alpha = (1 + phi - phi.mean()).clamp(0.9, 2)[:, None]
    return (1 + w - row_means(w, mask)).clamp(0.1, 2) * alpha * mask


SCORES["nearness"], WEIGHTS["vgpo"] = nearness, vgpo
