"""TW-GRPO's parts (Dang et al. 2025, arXiv 2505.24718): tokens weigh by how much the group's
predictions differ there, several right options earn a part each, tokens share one divisor.

    w_t = 1 + 0.7 s_t,  s_t the min-max over the group of mean_i KL(mean prediction || prediction i)
    accuracy = |said| / |right| where nothing wrong is said, else 0   (several right options)
    loss: sum over the group's tokens, over their number

KL is sum_v exp(d) - d - 1 with d = mean log-probability - log-probability within +-11; padding
predicts uniformly. Not certain: the soft reward's exact levels. Not known to us: its beta, so
--beta stays; with several prompts a step the divisor is the batch's. Hence the study names what
is here, and does not call it TW-GRPO.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution import SCORES, WEIGHTS
from lab.rules.common import scaled
from options import Options
from rewards import EXTRA_REWARDS, extract_answer
from rollout import Rollout

SEVERAL = re.compile(r"[A-Z](\W*[A-Z])+")
OPTIONS = "--signals spread --weighting tw_grpo --extra_reward several_right --normalize tokens"


def spread(r: Rollout, o: Options) -> Tensor:
    """How much the group's predictions differ at a position: (G, T), rows alike."""
    states, head = r.states()
    values = []
    for h, mask in zip(states.split(16, dim=1), r.group.completion_mask.split(16, dim=1)):
        logp = F.linear(h, head).float().log_softmax(-1)                # (G, t, V)
        logp = torch.where(mask[..., None], logp, -math.log(len(head)))
        d = (logp.mean(0) - logp).clamp(-11, 11)
        values.append((d.exp() - d - 1).sum(-1).mean(0))
    return torch.cat(values).expand_as(r.group.ids)


def tw_grpo(r: Rollout, o: Options) -> Tensor:
    return (1 + 0.7 * scaled(r.scores["spread"], r.group.completion_mask)) * r.group.completion_mask


def part_right(text: str, solution: str) -> float:
    """The share of the right letters that are said, if no wrong one is."""
    said, right = (set(re.findall("[A-Z]", extract_answer(x))) for x in (text, solution))
    return len(said) / len(right) if said <= right else 0.0


def several_right(rollouts: list[Rollout], o: Options, model: nn.Module, texts) -> list[Tensor]:
    """What `part_right` gives beyond the strict accuracy; 0 where one option is right."""
    bonus = [torch.zeros(len(r.group.ids)) for r in rollouts]
    for i, r in enumerate(rollouts):
        solution = r.prompt.record["solution"]
        letters = SEVERAL.fullmatch(extract_answer(solution))
        if r.prompt.record["problem_type"] == "multiple choice" and letters:
            parts = torch.tensor([part_right(text, solution) for text in texts(r.group)])
            bonus[i] = parts - r.accuracy
    return bonus


SCORES["spread"] = spread
WEIGHTS["tw_grpo"] = tw_grpo
EXTRA_REWARDS["several_right"] = several_right
