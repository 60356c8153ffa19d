"""TW-GRPO's soft reward (Dang et al. 2025, arXiv 2505.24718), for any rule: several right options
earn in parts.

    reward = said / right where the options said are a subset of the right ones, else 0
Source: github.com/longmalongma/TW-GRPO, src/open_r1/grpo.py (accuracy_reward), for all its answers.
Differs: only multiple choice earns in parts; the other types of Video-R1's data have own rewards.
"""

import re

import torch
from torch import Tensor, nn

from options import Options
from rewards import EXTRA_REWARDS, extract_answer
from rollout import Rollout

OPTIONS = "--extra_reward in_parts"


def part_right(text: str, solution: str) -> float:
    """The share of the right options, separated by commas, that are said, if no wrong one is."""
    answers = extract_answer(text), extract_answer(solution) or solution
    said, right = (set(re.sub(r"\s", "", answer).split(",")) for answer in answers)
    return len(said) / len(right) if said <= right else 0.0


def in_parts(rollouts: list[Rollout], o: Options, model: nn.Module, texts) -> list[Tensor]:
    """What the reward in parts gives beyond the strict accuracy."""
    given = []
    for r in rollouts:
        parts = [part_right(text, r.prompt.record["solution"]) for text in texts(r.group)]
        several = r.prompt.record["problem_type"] == "multiple choice"
        given.append((torch.tensor(parts) - r.accuracy).clamp(min=0) * several)
    return given


EXTRA_REWARDS["in_parts"] = in_parts
