"""VPPO (Huang et al. 2025, arXiv 2510.09285): perception chooses tokens and weighs completions.

    s_t = k3 of the picture with half its patches black;   S_i = mean_t s_t (each at most 10)
    m_t = 1 on the 40% of a completion's tokens with the highest s_t
    A_it = a_i A_i,   a_i = LOW + (HIGH - LOW) (S_i - min S) / (max S - min S)
    loss += PENALTY x mean of -logp of the sampled tokens (its expected gradient is 0)
min and max are the batch's; HIGH gives a the mean 1. The loss is DAPO's, without a KL.
Source: github.com/huaixuheqing/VPPO-RL, verl/workers/actor/dp_actor.py, perc_utils.py and
examples/configs (0.12 for Qwen3-VL-8B): HIGH is a micro-batch's, every completion has own patches.
Differs: a clip's frames share them; the batch is a rank's, the penalty's mean a group's.
"""

from functools import partial

import torch
from torch import Tensor, nn

from attribution import COUNTERFACTUALS
from grpo import ADVANTAGES, PENALTIES
from lab.rules.common import blacken, first_scores, row_means
from options import Options
from rollout import Rollout

OPTIONS = ("--signals visual_half_black --shift k3 --ratio 0.4 --pool response --advantage vppo "
           "--penalty surprise --normalize tokens --clip_high 0.28 --filter accuracy --beta 0")
LOW, PENALTY = 0.9, 0.06


def means(r: Rollout) -> Tensor:                                    # S (G,)
    return row_means(first_scores(r).clamp(max=10), r.group.completion_mask)[:, 0]


def vppo(r: Rollout, o: Options) -> Tensor:
    S, every = means(r), torch.cat(list(map(means, r.batch)))
    if every.max() - every.min() <= 1e-6:
        return r.advantages
    return r.advantages * (LOW + (1 - LOW) * (S - every.min()) / (every.mean() - every.min()))


def surprise(r: Rollout, o: Options, model: nn.Module) -> Tensor:
    return PENALTY * -(r.logp * r.loss_mask).sum() / r.loss_mask.sum().clamp(min=1)


COUNTERFACTUALS["visual_half_black"] = partial(blacken, share=0.5)
ADVANTAGES["vppo"], PENALTIES["surprise"] = vppo, surprise
