"""VEPO (Jin et al. 2026, arXiv 2606.03937): uncertain tokens whose prediction the picture changes.

    s = (1 - (1 - j)^ALPHA (1 - d)^(1 - ALPHA)) h,   the best 20% of a completion count in the loss
j: Jensen and Shannon's divergence to the prediction with a noised picture; d: how much the entropy
changes there, in either direction; h: the entropy. Each is min-max scaled over the completion.

Source: github.com/Leonnnnnn929/VEPO, verl/utils/jsd_masking.py (score D), run_train.sh. The noise
has deviation NOISE in the vision tower's input; the source adds it once for each completion to the
same picture, which makes 6.93 of it (github.com/zsxm1998/awesome-perception-aware-rlvr).
Differs: each completion's chosen tokens share its divisor, in the source the batch's; no entropy
bonus of 0.001, which the paper does not name; the vision tower learns unless `--freeze vision`;
every frame of a clip has its own noise.
"""

import torch
from torch import Tensor

from attribution import COUNTERFACTUALS, SCORES
from lab.rules.common import at_tokens, js, of_predictions, scaled
from options import Options
from prompt import Prompt
from rollout import Rollout

OPTIONS = "--signals vepo --ratio 0.2 --pool response --normalize selected --beta 0"
ALPHA, NOISE = 0.7, 2.0


def noise(r: Rollout, o: Options) -> Prompt:
    frames, std = r.prompt.frames, torch.tensor(r.prompt.vision.std)[:, None, None] * 255
    drawn = torch.randn(frames.shape, generator=r.generator)
    return r.prompt.with_frames(frames + NOISE * std * drawn)


def vepo(r: Rollout, o: Options) -> Tensor:
    (before, head), (after, _), mask = r.states(), r.states(noise(r, o)), r.group.completion_mask
    entropy = of_predictions(lambda q: torch.special.entr(q.exp()).sum(-1), head, after[mask])
    j = at_tokens(of_predictions(js, head, before[mask], after[mask]), mask)
    change = (at_tokens(entropy, mask) - r.entropy).abs()
    j, d, h = (scaled(x, mask, rows=True) for x in (j, change, r.entropy))
    return (1 - (1 - j) ** ALPHA * (1 - d) ** (1 - ALPHA)) * h


COUNTERFACTUALS["visual_noise"], SCORES["vepo"] = noise, vepo
