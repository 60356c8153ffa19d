"""PAPO (Wang et al. 2025, arXiv 2507.06448): a loss for depending on what is seen.

    loss += mean( -gamma K_t + eta H_t + eta H'_t )
    K_t = exp(d) - d - 1, at most 0.2,  d = logp' - logp
logp' and the entropy H' are those of the policy with part of the picture masked; both passes have
gradient. Means: over a completion's tokens, then over completions (PAPO-G).

Direction, cap, gamma and eta are those of the trainer in trl 0.26 (trl/experimental/papo), which we
could read; the paper's text has the ratio the other way round, and we do not know its values of
gamma for each size. Masked are 60% of the video tokens, by chance and hidden; the paper blackens
patches of an image. The loss beside it is plain GRPO.
"""

import torch
from torch import Tensor, nn

from grpo import PENALTIES
from lab.rules.common import leave_out_tokens, mean_of_rows, scored
from options import Options
from rollout import Rollout

OPTIONS = "--signals all --penalty papo"
GAMMA, ETA, CAP, MASKED = 0.1, 0.03, 0.2, 0.6


def perception(logp: Tensor, masked: Tensor) -> Tensor:
    """K_t (G, T): how much tokens depend on what is masked."""
    d = masked - logp
    return (d.exp() - d - 1).clamp(max=CAP)


def papo(r: Rollout, o: Options, model: nn.Module) -> Tensor:
    stays = torch.rand(int(r.prompt.visual.sum()), generator=r.generator) >= MASKED
    logp, entropy = scored(model, r.prompt, r.group)
    masked_logp, masked_entropy = scored(model, leave_out_tokens(r.prompt, stays), r.group)
    term = -GAMMA * perception(logp, masked_logp) + ETA * (entropy + masked_entropy)
    return mean_of_rows(term, r.loss_mask)


PENALTIES["papo"] = papo
