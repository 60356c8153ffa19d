"""What several rules need: video tokens left out, entropy with a gradient, scales and means."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.scoring import hidden_states, unflatten
from prompt import Prompt
from rollout import Group

CHUNK = 1024            # tokens whose logits exist at once


def leave_out_tokens(prompt: Prompt, stays: Tensor) -> Prompt:
    """The prompt with only those of its video tokens where stays (V,) is True; positions stay."""
    tokens = ~prompt.visual
    tokens[prompt.visual] = stays
    kept = stays
    if prompt.kept is not None:                         # of those that were left before
        kept = prompt.kept.clone()
        kept[prompt.kept] = stays
    return replace(prompt, ids=prompt.ids[tokens], positions=prompt.positions[:, tokens],
                   visual=prompt.visual[tokens], kept=kept)


def scored(model: nn.Module, prompt: Prompt, group: Group) -> tuple[Tensor, Tensor]:
    """logp (G, T) and entropy (G, T) of a group, both with gradient; one forward pass."""
    def both(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.linear(states, model.lm_head.weight).float().log_softmax(-1)       # (n, V)
        return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    states, ids = hidden_states(model, [prompt], [group]), group.ids.flatten()[group.flat_index]
    chunks = zip(states.split(CHUNK), ids.split(CHUNK))
    parts = [checkpoint(both, *chunk, use_reentrant=False) for chunk in chunks]
    logp, entropy = (torch.cat(values) for values in zip(*parts))
    return unflatten(logp, [group])[0], unflatten(entropy, [group])[0]


def scaled(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores brought to 0..1 over the group's tokens (all 0 where they are equal)."""
    low, high = scores[mask].min(), scores[mask].max()
    return ((scores - low) / (high - low).clamp(min=1e-12)).masked_fill(~mask, 0)


def mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over completions of each one's mean over its tokens in mask; (G, T) both."""
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
