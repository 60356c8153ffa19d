"""What several rules need: videos changed, predictions looked at whole, scales, the batch."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import top_tokens
from engine.scoring import packed_forward
from options import Options
from prompt import Prompt
from rollout import Rollout

LOGITS_AT_ONCE = 1 << 27        # while whole predictions are looked at: 0.5 GiB in fp32


# ------------------------------------------------------------------------------------------- videos
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


def blacken(r: Rollout, o: Options, share: float = 0.6) -> Prompt:
    """The prompt with this share of its frames' patches black, by chance: the vision tower's own
    patches (of 14 pixels; Qwen3-VL: 16), the same in every frame, since what is black in one frame
    would else be seen in the next."""
    size = r.prompt.vision.patch
    rows, columns = (side // size for side in r.prompt.frames.shape[-2:])
    seen = torch.rand(rows, columns, generator=r.generator) >= share
    seen = seen.repeat_interleave(size, 0).repeat_interleave(size, 1)               # (H, W)
    return r.prompt.with_frames(r.prompt.frames * seen)


# -------------------------------------------------------------------------------------- predictions
def of_predictions(function: Callable[..., Tensor], head: Tensor, *states: Tensor) -> Tensor:
    """(n, ..): a function of the log-probabilities (n, V) that follow from each of the states
    (n, D), in chunks; head is (V, D)."""
    rows = max(1, LOGITS_AT_ONCE // len(head))
    chunks = zip(*(x.split(rows) for x in states))
    return torch.cat([function(*(F.linear(h, head).float().log_softmax(-1) for h in chunk))
                      for chunk in chunks])


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (n, V)."""
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen and Shannon's divergence: the mean KL to the middle of both."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def own_and_visual(row: Tensor, r: Rollout) -> tuple[Tensor, Tensor]:
    """Of the states (L, D) of a packed row [prompt | completions]: those of the completions' tokens
    themselves (n, D), and those of the video's (V, D)."""
    prompt, own = row.split([len(r.prompt.ids), len(row) - len(r.prompt.ids)])
    return own, prompt[r.prompt.visual.to(row.device)]


def show_layers(r: Rollout, look: Callable[[Tensor], None]) -> None:
    """Call look(row (L, D)) with the packed row [prompt | completions] as it enters each layer and
    as it leaves the last norm: one forward pass, with hooks that are gone after it."""
    with ExitStack() as hooks:
        for layer in r.model.model.language_model.layers:
            hook = layer.register_forward_pre_hook(lambda layer, given: look(given[0][0]))
            hooks.callback(hook.remove)
        look(packed_forward(r.model, [r.prompt], [r.group]))


def at_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Values (n,) of the tokens in mask, as (G, T); 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values.float())


# --------------------------------------------------------------------------------- scales and means
def scaled(scores: Tensor, mask: Tensor, rows: bool = False) -> Tensor:
    """Scores brought to 0..1 over the group's tokens in mask, or over each row's (all 0 where they
    are equal)."""
    over = -1 if rows else tuple(range(scores.ndim))
    low = scores.masked_fill(~mask, math.inf).amin(over, keepdim=True)
    high = scores.masked_fill(~mask, -math.inf).amax(over, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=1e-8)).masked_fill(~mask, 0)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """(G, 1): the mean over each row's tokens in mask; (G, T) both."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------- the batch
def first_scores(r: Rollout) -> Tensor:
    """The scores (G, T) of the first signal that is named and applies."""
    return next(iter(r.scores.values()))


def of_batch(r: Rollout, name: str) -> list[Tensor]:
    """A signal's scores (n,) of all tokens of each rollout of the batch, where it applies."""
    scored = [x for x in r.batch if name in x.scores]
    return [x.scores[name][x.group.completion_mask].nan_to_num(nan=0.0) for x in scored]


def top_of_batch(r: Rollout, name: str, ratio: float) -> Tensor:
    """(G, T) bool: which of a rollout's tokens are among the signal's best of the whole batch."""
    flat, mask = of_batch(r, name), r.group.completion_mask
    scores = torch.cat(flat)[None]
    top = top_tokens(scores, torch.ones_like(scores, dtype=torch.bool), ratio)[0]
    parts = zip([x for x in r.batch if name in x.scores], top.split(list(map(len, flat))))
    return torch.zeros_like(mask).masked_scatter(mask, next(p for x, p in parts if x is r))
