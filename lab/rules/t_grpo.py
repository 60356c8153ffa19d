"""T-GRPO (Video-R1, Feng et al. 2025, arXiv 2503.21776): a reward for using the order of frames.

    R_i += 0.3 where completion i is right and p >= FACTOR p~
p is the accuracy of the clip's G completions, p~ that of G/2 completions which saw its frames
shuffled. Videos only. FACTOR is 1 in the paper, 0.8 in the released code; right means an accuracy
above 0.1 (released code).
"""

import torch
from torch import Tensor, nn

from attribution import frame_order
from options import Options
from policy import sample
from rewards import EXTRA_REWARDS, accuracy_reward
from rollout import Rollout

OPTIONS = "--signals all --extra_reward t_grpo"
BONUS, FACTOR = 0.3, 1.0


def t_grpo(rollouts: list[Rollout], o: Options, model: nn.Module, texts) -> list[Tensor]:
    bonus = [torch.zeros(len(r.group.ids)) for r in rollouts]
    moving = [i for i, r in enumerate(rollouts)
              if r.prompt.kind == "video" and len(r.prompt.frames) > 1]
    if not moving:
        return bonus
    seeds, prompts = [rollouts[i].seed + 1 for i in moving], []
    for i, seed in zip(moving, seeds):
        prompt, generator = rollouts[i].prompt, torch.Generator().manual_seed(seed)
        order = frame_order(len(prompt.frames), generator)
        prompts.append(prompt.with_frames(prompt.frames[order]))
    groups = sample(model, prompts, o.G // 2, o.max_new_tokens, temperature=o.temperature,
                    top_p=o.top_p, top_k=o.top_k, seeds=seeds)
    for i, group in zip(moving, groups):
        r, record = rollouts[i], rollouts[i].prompt.record
        blind = [accuracy_reward(text, record["solution"], record["problem_type"])
                 for text in texts(group)]
        if r.accuracy.mean() >= FACTOR * torch.tensor(blind).mean():
            bonus[i] = BONUS * (r.accuracy > 0.1).float()
    return bonus


EXTRA_REWARDS["t_grpo"] = t_grpo
