"""VPPO (Huang et al. 2025, arXiv 2510.09285): perception chooses tokens and weighs completions.

    s_t = k3 of the masked picture;  S_i = mean_t s_t
    m_t = 1 on the 40% of a completion's tokens with the highest s_t
    A_it = a_i A_i,  a_i = LOW + (HIGH - LOW) (S_i - min S) / (max S - min S) over the group
    loss += PENALTY x the mean entropy

Certain: the 40%, the two weightings, min-max scaling. Not certain, from memory: LOW 0.9, PENALTY
0.06, and that the paper picks HIGH anew in each batch so that the mean of a_i is 1, which HIGH
does here for a group. The paper writes s_t as a KL of whole distributions; k3 takes the sampled
token alone. Where all S_i are equal, a_i is 1.
"""

from torch import Tensor, nn

from grpo import ADVANTAGES, PENALTIES
from lab.rules.common import mean_of_rows, scored
from options import Options
from rollout import Rollout

OPTIONS = ("--signals visual --shift k3 --ratio 0.4 --pool response --advantage vppo "
           "--penalty entropy")
LOW, PENALTY = 0.9, 0.06


def shaping(scores: Tensor, valid: Tensor) -> Tensor:
    """a_i (G,) from scores (G, T): from LOW up, with mean 1."""
    S = (scores * valid).sum(-1) / valid.sum(-1).clamp(min=1)
    place = (S - S.min()) / (S.max() - S.min()).clamp(min=1e-12)        # 0..1
    if S.max() == S.min():
        return place + 1
    return LOW + (1 - LOW) * place / place.mean()                       # HIGH: 1 over the mean


def vppo(r: Rollout, o: Options) -> Tensor:
    return r.advantages * shaping(r.scores["visual"], r.group.completion_mask)


def entropy(r: Rollout, o: Options, model: nn.Module) -> Tensor:
    return PENALTY * mean_of_rows(scored(model, r.prompt, r.group)[1], r.loss_mask)


ADVANTAGES["vppo"] = vppo
PENALTIES["entropy"] = entropy
