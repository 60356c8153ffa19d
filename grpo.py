"""GRPO: group advantages and the token-masked clipped loss (paper eq. 1 and 5).

    A_i = (R_i - mean R) / (std R + eps)
    J   = mean_i 1/|o_i| sum_t m_t [ min(rho A_i, clip(rho, 1-c, 1+c) A_i) - beta KL_t ]
    rho = exp(logp - old_logp),   KL_t = exp(x) - x - 1,  x = ref_logp - logp clamped to +-10

`completion_mask` marks the tokens that |o_i| counts, up to and with the first end token (ktr.py
hands over fewer under --filter and --mask_cut); `key_mask`, those that carry the gradient.
Pure tensor functions; this file needs torch alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages (..., G) of rewards (..., G): centred, over the sample standard deviation (n-1).

    A group whose rewards are all equal gets exactly 0 (as does a group of one): only the KL pulls.
    """
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    centred = rewards - rewards.mean(-1, keepdim=True)
    n = rewards.shape[-1]
    std = (centred.square().sum(-1, keepdim=True) / max(n - 1, 1)).sqrt()
    return torch.where(equal, torch.zeros_like(rewards), centred / (std + eps))


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """KL(policy || reference) at each sampled token (Schulman 2020), x clamped to +-10."""
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', not {kind!r}")
    x = (ref_logp - logp).clamp(-10, 10)
    if kind == "k1":
        return -x
    return x.square() / 2 if kind == "k2" else torch.exp(x) - x - 1


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor,
              completion_mask: Tensor, key_mask: Tensor, *, beta: float = 0.04, clip: float = 0.2,
              clip_high: float = 0.0, normalize: str = "length", divisor: float | None = None,
              kl_on: str = "selected", kl_estimator: str = "k3") -> tuple[Tensor, dict]:
    """The negated objective of one group, and what to log about it.

    logp, old_logp, ref_logp: (G, T) log-probabilities of the sampled tokens; ref_logp None: no KL.
    advantages: (G,), or (G, T) if each token has its own.
    completion_mask: (G, T) bool.  key_mask: (G, T) bool, or float weights >= 0.
    clip_high: the upper clip (DAPO); 0: as clip.
    normalize: "length" divides a row's sum by |o_i| (paper); "selected" by the sum of its key_mask
    (released code: a gradient 2 to 3.5 times as large; 0 where that is 0); "tokens" (DAPO) and
    "constant" (Dr. GRPO) divide the sum of all rows by `divisor`, by default the group's tokens.
    kl_on: "selected" puts the KL term on key tokens only (released code); "all" on every token.
    Log-probabilities at padding are ignored, whatever they are.
    """
    if normalize not in ("length", "selected", "tokens", "constant"):
        raise ValueError(f"unknown normalize {normalize!r}")
    if kl_on not in ("selected", "all"):
        raise ValueError(f"kl_on must be 'selected' or 'all', not {kl_on!r}")
    mask = completion_mask.bool()
    weight = key_mask.to(logp.dtype) * mask                             # (G, T) m_t
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    if advantages.ndim == 1:
        advantages = advantages[:, None]

    ratio = torch.exp(logp - old_logp)                                  # (G, T) rho
    gain = advantages * ratio
    clipped = advantages * ratio.clamp(1 - clip, 1 + (clip_high or clip))
    objective = weight * torch.minimum(gain, clipped)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        kl = kl_estimate(logp, ref_logp.masked_fill(~mask, 0.0), kl_estimator)
        objective = objective - beta * kl * (weight if kl_on == "selected" else mask)

    length = mask.sum(-1)                                               # (G,) |o_i|
    tokens = length.sum().clamp(min=1)
    if normalize in ("tokens", "constant"):
        loss = -objective.sum() / (tokens if divisor is None else divisor)
    else:
        mass = weight.sum(-1) if normalize == "selected" else length    # (G,)
        loss = -torch.where(mass > 0, objective.sum(-1) / torch.where(mass > 0, mass, 1), 0).mean()
    metrics = {
        "kl": kl.detach().sum() / tokens,
        "clipped": ((clipped < gain) & (weight > 0)).sum() / (weight > 0).sum().clamp(min=1),
        "key_share": weight.detach().sum() / tokens,
    }
    return loss, metrics


# ------------------------------------------------------------------------- the registries of a rule
# (r, o) -> advantages (G,) or (G, T)
ADVANTAGES: dict[str, Callable] = {"group": lambda r, o: r.advantages}
# (r, o, model) -> a scalar with gradient, added to the loss
PENALTIES: dict[str, Callable | None] = {"none": None}
