"""The shared-prompt forward: one packed row [prompt | o_1 | .. | o_G], logits only where needed.

Logits exist in chunks, and again in the backward pass. Types: prompt.Prompt, rollout.Group.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import families
from engine.packing import pack, to_device
from engine.prepare import compiled_on_cuda

CHUNK = 1024            # tokens whose logits exist at once: 0.6 GiB at 152,064 words in fp32


def features_of(model: nn.Module, prompts: Sequence, computed: dict[int, Tensor]) -> Tensor | None:
    """The features (sum V, width) of the prompts' video and image tokens, in order; None without
    any. computed: those of each clip, by its frames' id; questions about one clip share them."""
    device, dtype = model.device, model.dtype
    clips = {id(p.frames): p for p in prompts
             if p.frames is not None and not p.zeroed and id(p.frames) not in computed}
    if clips:
        pixels = torch.cat([p.pixels(device) for p in clips.values()]).to(dtype)
        grids = torch.tensor([p.grid for p in clips.values()])
        merged = families.vision_features(model.model.visual, pixels, grids.to(device))
        sizes = grids.prod(-1) // model.config.vision_config.spatial_merge_size ** 2
        computed.update(zip(clips, merged.split(sizes.tolist())))
    out = []
    for p in prompts:
        if p.zeroed:
            shape = int(p.visual.sum()), families.feature_width(model.config)
            out.append(torch.zeros(shape, device=device, dtype=dtype))
        elif p.frames is not None:
            features = computed[id(p.frames)]
            out.append(features if p.kept is None else features[p.kept.to(device)])
    return torch.cat(out) if out else None


def packed_forward(model: nn.Module, prompts: Sequence, groups: Sequence,
                   first_cache_row: int | None = None, computed: dict | None = None) -> Tensor:
    """Last hidden states (L, D) of one packed row: each prompt, then its completions, if any.
    first_cache_row: the prompts' keys and values go to the layers' cache, from this row of it on.
    computed: see `features_of`."""
    device = model.device
    ids, positions, visual = [], [], []
    lengths_of = [group.lengths if group else [] for group in groups]
    for p, group, lengths in zip(prompts, groups, lengths_of):
        ids.append(to_device(p.ids, device))
        visual += [p.visual, torch.zeros(sum(lengths), dtype=torch.bool)]
        if group:
            ids.append(group.ids.flatten()[group.flat_index])
        after = [p.next_position + torch.arange(n) for n in lengths]    # each follows the prompt
        positions += [p.positions, *(x.expand(3, -1) for x in after)]
    embeds = model.get_input_embeddings()(torch.cat(ids))                           # (L, D)
    row = pack([len(p.ids) for p in prompts], lengths_of, embeds)
    if first_cache_row is not None:
        rows = [torch.full_like(p.ids, n) for n, p in enumerate(prompts, first_cache_row)]
        slots = [torch.arange(len(p.ids)) for p in prompts]
        row.store = to_device(torch.cat(rows), device), to_device(torch.cat(slots), device)
    where = to_device(torch.cat(visual), device)
    position_ids = to_device(torch.cat(positions, dim=1)[:, None], device)
    features = features_of(model, prompts, {} if computed is None else computed)
    more = {}
    if features is not None:
        first, *later = features.to(embeds.dtype).split(embeds.shape[-1], dim=-1)
        embeds = embeds.masked_scatter(where[:, None], first)
        if later:                                               # DeepStack
            more = {"visual_pos_masks": where[None], "deepstack_visual_embeds": later}
    return model.model.language_model(
        inputs_embeds=embeds[None].clone(),     # a view would have its first layer compiled apart
        position_ids=position_ids, layout=row, use_cache=False, **more).last_hidden_state[0]


def hidden_states(model: nn.Module, prompts: Sequence, groups: Sequence) -> Tensor:
    """(n, D): the state that predicts each completion token, prompt by prompt, row by row."""
    before, start = [], 0
    for p, group in zip(prompts, groups):
        start += len(p.ids)
        last = start - 1                        # the prompt's last token predicts each first token
        for n in group.lengths:
            if n:
                before += [torch.tensor([last]), torch.arange(start, start + n - 1)]
            start += n
    return packed_forward(model, prompts, groups)[to_device(torch.cat(before), model.device)]


def unflatten(flat: Tensor, groups: Sequence) -> list[Tensor]:
    """Values (n, ..) of all completion tokens, as (G, T, ..) for each group; 0 at padding."""
    out = []
    for group, part in zip(groups, flat.split([sum(group.lengths) for group in groups])):
        empty = flat.new_zeros(group.ids.numel(), *flat.shape[1:])
        out.append(empty.index_put((group.flat_index,), part).unflatten(0, group.ids.shape))
    return out


@partial(compiled_on_cuda, dynamic=True)
def token_stats(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """logp (n,) and entropy (n,) of tokens ids (n,) under softmax(hidden W^T)."""
    logits = F.linear(hidden, weight).float()
    total = logits.logsumexp(-1)
    logp = logits.gather(-1, ids[:, None])[:, 0] - total
    return logp, total - (torch.softmax(logits, -1) * logits).sum(-1)


@partial(compiled_on_cuda, dynamic=True)
def logits_gradient(hidden: Tensor, weight: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """grad (n,) of logp as that of the logits (n, V): d logp/d logits = (1 at the token) - p."""
    p = torch.softmax(F.linear(hidden, weight).float(), -1)
    own = torch.arange(len(weight), device=ids.device) == ids[:, None]
    return ((own.float() - p) * grad[:, None]).to(weight.dtype)


class TokenStats(torch.autograd.Function):
    """`token_stats`, keeping no logits: entropy is -sum_w p_w log p_w (eq. 4), over all words at
    temperature 1. Only logp has a gradient. Softmax and sums are fp32, products as the weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, ids)
        chunks = zip(hidden.detach().split(CHUNK), ids.split(CHUNK))
        stats = [token_stats(h, weight.detach(), i) for h, i in chunks]
        logp, entropy = (torch.cat(x) for x in zip(*stats))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
        hidden, weight, ids = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)                  # --freeze language: no grad_weight
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        chunks = (x.split(CHUNK) for x in (hidden, ids, grad, grad_hidden))
        for h, i, g, out in zip(*chunks):
            d = logits_gradient(h, weight, i, g)
            torch.mm(d, weight, out=out)
            if grad_weight is not None:
                grad_weight.addmm_(d.T, h)
        return grad_hidden, grad_weight, None
