"""Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): no division by the deviation, none by the length.

    A_i = R_i - mean R;  loss: sum over tokens, over G x the longest length allowed
The paper trains without a KL.
"""

from torch import Tensor

from grpo import ADVANTAGES
from options import Options
from rollout import Rollout

OPTIONS = "--signals all --advantage centred --normalize constant --beta 0"


def centred(r: Rollout, o: Options) -> Tensor:
    return (r.rewards - r.rewards.mean()).to(r.advantages.device)


ADVANTAGES["centred"] = centred
