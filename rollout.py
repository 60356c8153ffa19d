"""What a step knows of one prompt: its group of completions, and what is computed for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from prompt import Prompt


@dataclass(frozen=True)
class Group:
    """G completions of one prompt."""
    ids: Tensor                             # (G, T)
    completion_mask: Tensor                 # (G, T) bool: up to and with the first end token
    logp: Tensor | None = None              # (G, T) as sampling saw it, at temperature 1; logged
    ended: Tensor | None = None             # (G,) bool: an end token came before the limit

    @cached_property
    def lengths(self) -> list[int]:
        return self.completion_mask.sum(-1).tolist()

    @cached_property
    def flat_index(self) -> Tensor:
        """(n,) where the completions' n tokens lie in the flattened rows. (The host waits here.)"""
        return self.completion_mask.flatten().nonzero()[:, 0]


@dataclass
class Rollout:
    """One prompt, its group, and what a step computes for them, filled in from the top. (G, T)
    fields hold 0 or False at padding. Rewards are on the CPU, the rest on the policy's device."""
    prompt: "Prompt"
    group: Group
    seed: int                               # even, for sampling; signals draw from seed + 1

    accuracy: Tensor | None = None          # (G,) how right each answer is, 0..1
    format: Tensor | None = None            # (G,) 1 for the right form, else 0
    extra_reward: Tensor | None = None      # (G,) a rule's (--extra_reward)
    length_bonus: Tensor | None = None      # (G,) for the length of right answers
    rewards: Tensor | None = None           # (G,) the sum of these four

    logp: Tensor | None = None              # (G, T) of the sampled tokens under the policy
    old_logp: Tensor | None = None          # (G, T) logp at the first update, detached
    entropy: Tensor | None = None           # (G, T) nats, no gradient
    ref_logp: Tensor | None = None          # (G, T) under the starting checkpoint; None: beta is 0

    scores: dict[str, Tensor] = field(default_factory=dict)         # signal: (G, T)
    top_tokens: dict[str, Tensor] = field(default_factory=dict)     # signal: (G, T) bool
    key_mask: Tensor | None = None          # (G, T) bool, or weights >= 0 (--weighting)
    advantages: Tensor | None = None        # (G,)
    loss_mask: Tensor | None = None         # (G, T) bool: tokens that count in the loss
    metrics: dict[str, Tensor] = field(default_factory=dict)        # of the loss, and the loss

    generator: torch.Generator = field(init=False)          # the signals' random numbers: of the
                                                            # seed alone, on any rank the same
    states: Callable[..., tuple[Tensor, Tensor]] | None = None      # states(prompt=r.prompt): what
                                            # predicts the tokens (G, T, D), and the head (V, D)
    progress: float = 0.0                   # the part of the run that was done before this step
    model: nn.Module | None = field(default=None, repr=False)       # the policy
    batch: list["Rollout"] = field(init=False, repr=False)  # those of a rank's step that are scored
                                            # together, this one among them

    def __post_init__(self):
        self.batch = [self]
        self.generator = torch.Generator().manual_seed(self.seed + 1)
