"""What several rules need: scoring in which the entropy has a gradient too, and means over rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policy import Group, hidden_states, unflatten
from prompt import Prompt

CHUNK = 1024            # tokens whose logits exist at once


def scored(model: nn.Module, prompt: Prompt, group: Group) -> tuple[Tensor, Tensor]:
    """logp (G, T) and entropy (G, T) of a group, both with gradient; one forward pass."""
    def both(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.linear(states, model.lm_head.weight).float().log_softmax(-1)       # (n, V)
        return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    states, ids = hidden_states(model, [prompt], [group]), group.ids.flatten()[group.places]
    chunks = zip(states.split(CHUNK), ids.split(CHUNK))
    parts = [checkpoint(both, *chunk, use_reentrant=False) for chunk in chunks]
    logp, entropy = (torch.cat(values) for values in zip(*parts))
    return unflatten(logp, [group])[0], unflatten(entropy, [group])[0]


def mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over completions of each one's mean over its tokens in mask; (G, T) both."""
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
