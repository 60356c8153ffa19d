"""PGPO (Ye et al. 2026, arXiv 2604.01840, eq. 6 and 7): each token weighs by what it sees.

    I = min-max over the completion of log(1 + S),  S = k3 of the hidden picture
    w = I / TAU                              where I < TAU
    w = 1 + BOOST (I - TAU) / (1 - TAU)      elsewhere;  then the completion's mean weight is 1
The weight multiplies the advantage; the loss is DAPO's, without a KL. `--weighting pgpo_dev` is the
authors' development code: TAU a quantile of the completion's I, w at least FLOOR, no rescaling.

Source: github.com/zsxm1998/awesome-perception-aware-rlvr, verl/trainer/perception_reasoning_loss.py
(the announced code is not public; its development: Yzk1114/EasyR1). Equal scores weigh 1.
Differs: the whole clip is hidden; groups all right or all wrong are dropped, not replaced.
"""

import torch
from torch import Tensor

from attribution import WEIGHTS
from lab.rules.common import first_scores, row_means, scaled
from options import Options
from rollout import Rollout

OPTIONS = ("--signals visual --shift k3 --weighting pgpo --normalize tokens --clip_high 0.28 "
           "--filter accuracy --beta 0")
TAU, BOOST, FLOOR = 0.4, 2.0, 0.1


def ramp(I: Tensor, tau: Tensor, floor: float = 0.0) -> Tensor:
    below, above = I / tau, 1 + BOOST * (I - tau) / (1 - tau).clamp(min=1e-8)
    return torch.where(I < tau, below.clamp(min=floor), above)


def pgpo(r: Rollout, o: Options, dev: bool = False) -> Tensor:
    mask = r.group.completion_mask
    I = scaled(first_scores(r).clamp(min=0).log1p(), mask, rows=True)
    if dev:
        index = (mask.sum(-1, keepdim=True) * TAU).long()
        tau = I.masked_fill(~mask, torch.inf).sort(-1).values.gather(-1, index)
        return ramp(I, tau, FLOOR) * mask
    w = ramp(I, I.new_tensor(TAU)) * mask
    mean = row_means(w, mask)
    return torch.where(mean > 0, w / mean.clamp(min=1e-8), 1.0) * mask


WEIGHTS |= {"pgpo": pgpo, "pgpo_dev": lambda r, o: pgpo(r, o, dev=True)}
