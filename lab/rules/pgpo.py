"""PGPO, perception-grounded weights: every token keeps a part, visual ones take more.

    s_t = min-max over the completion of log(1 + k3 of the masked picture)
    w_t = s_t where it reaches the threshold, else 0;  then w times n / sum w: the mean weight is 1

Known to us from a summary only: k3, log1p, min-max, a threshold, the total mass kept. Not known:
the value of the threshold (0.2 here), what tokens below it get (0 here), and whether min and max
are a completion's or a batch's.
"""

from torch import Tensor

from attribution import WEIGHTS
from options import Options
from rollout import Rollout

OPTIONS = "--signals visual --shift k3 --weighting pgpo"
THRESHOLD = 0.2


def grounded(k3: Tensor, valid: Tensor) -> Tensor:
    """Weights (G, T) with mean 1 over each completion; a completion of equal scores weighs 1."""
    s = k3.clamp(min=0).log1p()
    low = s.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    high = s.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True)
    s = ((s - low) / (high - low).clamp(min=1e-12)).masked_fill(~valid, 0)
    w = s * (s >= THRESHOLD)
    w = valid.to(w.dtype).where(w.sum(-1, keepdim=True) == 0, w)
    return w * valid.sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp(min=1e-12)


def pgpo(r: Rollout, o: Options) -> Tensor:
    return grounded(r.scores["visual"], r.group.completion_mask)


WEIGHTS["pgpo"] = pgpo
