"""TW-GRPO (Dang et al. 2025, arXiv 2505.24718): tokens weigh by how much predictions differ there.

    w_t = 1 + (ALPHA - 1) s_t,  s_t: the min-max over the group's positions of the mean over i of
          sum_v exp(d) - d - 1,   d = mean log-probability - log-probability of completion i
d is within +-11; after its end a completion predicts uniformly. One divisor for the batch's tokens;
no KL; gradients clipped at a norm of 20; the reward is soft_reward.py.
Source: github.com/longmalongma/TW-GRPO, src/open_r1/trainer/grpo_trainer.py, src/open_r1/grpo.py,
scripts/tw-grpo.sh. Its vision tower is frozen (`--freeze vision`), one prompt makes a batch.
Differs: the reward's parts; nothing else looks at the picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import SCORES, WEIGHTS
from lab.rules.common import scaled
from lab.rules.soft_reward import in_parts
from options import Options
from rewards import EXTRA_REWARDS
from rollout import Rollout

OPTIONS = ("--signals spread --weighting tw_grpo --extra_reward in_parts --normalize tokens "
           "--beta 0 --clip_high 0.28 --max_grad_norm 20")
ALPHA = 1.7


def spread(r: Rollout, o: Options) -> Tensor:
    (states, head), values = r.states(), []
    for h, mask in zip(states.split(16, dim=1), r.group.completion_mask.split(16, dim=1)):
        logp = F.linear(h, head).float().log_softmax(-1)                # (G, t, V)
        logp = torch.where(mask[..., None], logp, -math.log(len(head)))
        d = (logp.mean(0) - logp).clamp(-11, 11)
        values.append((d.exp() - d - 1).sum(-1).mean(0))
    return torch.cat(values).expand_as(r.group.ids)


def tw_grpo(r: Rollout, o: Options) -> Tensor:
    mask = r.group.completion_mask
    return (1 + (ALPHA - 1) * scaled(r.scores["spread"], mask)) * mask


SCORES["spread"], WEIGHTS["tw_grpo"], EXTRA_REWARDS["in_parts"] = spread, tw_grpo, in_parts
