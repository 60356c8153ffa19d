"""PAPO (Wang et al. 2025, arXiv 2507.06448): a loss for depending on what is seen.

    loss += mean( -GAMMA K_t - ETA logp_t - ETA logp'_t ),   K_t = exp(d) - d - 1,  d = logp' - logp
logp' is seen with 60% of the picture's patches black; d within +-20, K at most 10. logp' has no
gradient, so that its own term is a constant: the authors' default (RECOMPUTE_AUG_LOG_PROBS off);
`--penalty papo_grad` gives it one, as the paper's equation reads. On the policy's own tokens the
term of logp has an expected gradient of 0. Means: of completions, then over them (PAPO-G).

Source: github.com/MikeWangWZHL/PAPO, examples/papo_grpo/qwen2_5_vl_7b_grpo_papo.sh (without a KL:
0.01 and 0.03) and dp_actor.py, which averages over all tokens; read in a fork and in the same
script of github.com/zsxm1998/awesome-perception-aware-rlvr. KL 0.01 on every token, clip 0.2 / 0.3.
Differs: a clip's frames share their black patches; further --updates draw their own.
"""

import torch
from torch import Tensor, nn

from grpo import PENALTIES
from lab.rules.common import blacken, row_means
from options import Options
from policy import score_groups
from rollout import Rollout

OPTIONS = "--signals all --penalty papo --beta 0.01 --kl_on all --clip_high 0.3"
GAMMA, ETA = 0.02, 0.05


def perception(logp: Tensor, masked: Tensor) -> Tensor:
    """K_t (G, T): how much tokens depend on what is black."""
    d = (masked - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def papo(r: Rollout, o: Options, model: nn.Module, gradient: bool = False) -> Tensor:
    with torch.set_grad_enabled(gradient):
        ((masked, _),) = score_groups(model, [blacken(r, o)], [r.group])
    term = -GAMMA * perception(r.logp, masked) - ETA * (r.logp + masked)
    return row_means(term, r.loss_mask).mean()


PENALTIES |= {"papo": papo, "papo_grad": lambda r, o, m: papo(r, o, m, gradient=True)}
