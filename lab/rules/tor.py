"""ToR, token reweighting (Lu et al. 2026, arXiv 2603.25077): tokens that reason, and that perceive.

    w = REASONING    on the batch's 30% of tokens with the highest entropy
    w = PERCEPTION   on the 30% whose log-probability changes most without the picture; else 0
The entropy is that of the prediction cut to the likeliest words with a mass of TOP_P (signal
cut_entropy). The loss is GRPO's with one divisor for the batch and a KL of 0.01 on every token; its
DAPO form: `--beta 0 --clip_high 0.28 --filter accuracy`.
Source: github.com/zsxm1998/awesome-perception-aware-rlvr, verl/trainer/perception_reasoning_loss.py
(the authors' own is not public); the cut prediction is scaled to a mass of 1, as there.
Differs: the clip is hidden with positions as they were (`--positions moved` closes the gap); the
batch is what a rank scores together; equal scores go to the earlier token, not by lot.
"""

import torch
from torch import Tensor

from attribution import SCORES, WEIGHTS, union
from lab.rules.common import at_tokens, of_predictions, top_of_batch
from options import Options
from rollout import Rollout

OPTIONS = ("--signals cut_entropy visual --ratio 0.3 --weighting tor --normalize tokens "
           "--beta 0.01 --kl_on all")
REASONING, PERCEPTION, TOP_P = 1.0, 0.5, 0.95


def entropy_of_top(logp: Tensor) -> Tensor:
    """(n,) entropy of log-probabilities (n, V) cut to their likeliest words."""
    p = logp.exp().sort(-1, descending=True).values
    p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0)
    return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)


def cut_entropy(r: Rollout, o: Options) -> Tensor:
    (states, head), mask = r.states(), r.group.completion_mask
    return at_tokens(of_predictions(entropy_of_top, head, states[mask]), mask)


def tor(r: Rollout, o: Options) -> Tensor:
    top = {name: top_of_batch(r, name, o.ratio) for name in r.scores}
    reasons = top.pop("cut_entropy")
    return torch.where(reasons, REASONING, PERCEPTION * union(top, reasons))


SCORES["cut_entropy"], WEIGHTS["tor"] = cut_entropy, tor
