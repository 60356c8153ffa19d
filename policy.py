"""The policy: load a Qwen-VL (docs/families.md), sample G completions of a prompt, score them.

    load(name)                              model and processor, from a folder, hub name, random:7b
    sample(model, prompts, G, ...)          G completions for each prompt, all decoded together
    score(model, prompt, completions)       their log-probabilities and entropies (eq. 4)
    plain_score(model, prompt, completions) the same the obvious way: to read, and to test against

A prompt is computed once for its whole group, in scoring (engine/scoring.py) and in decoding
(engine/decoding.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from engine import weights
from engine.decoding import decoder_for
from engine.prepare import prepare
from engine.scoring import TokenStats, hidden_states, packed_forward, unflatten
from lab import blank
from prompt import Processor, Prompt, Vision
from rollout import Group

PREFILL = 16384         # prompt tokens prefilled in one forward pass
CHECK_EVERY = 16        # decoding steps between checks whether all have ended (a check waits)


# --------------------------------------------------------------------------------------------- load
def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
         seed: int = 0) -> tuple[nn.Module, Processor]:
    """The model, ready for this project, and its processor.

    name: a checkpoint's folder or hub name, or random:3b, random:7b (seed: of its random weights).
    OSError if the checkpoint is missing or incomplete, ValueError if it is of another family.
    Of its generation_config.json only the end tokens count.
    """
    logging.disable_progress_bar()
    processor = load_processor(name)
    if name.startswith("random:"):
        model = blank.model(name, blank.tokenizer(), device, dtype, seed)
    else:
        model = weights.from_pretrained(name, dtype)
    model.generation_config.eos_token_id = processor.ends
    return prepare(model, device), processor


def load_processor(name: str) -> Processor:
    """The processor of a checkpoint's folder, hub name, or random:7b. The same errors as `load`; a
    folder's weights are checked here too, by their names and shapes."""
    if not name.startswith("random:"):
        processor = Processor.from_pretrained(name)
        weights.check_weights(name)
        return processor
    v = Vision()
    constants = {"image_mean": v.mean, "image_std": v.std, "min_pixels": v.min_pixels}
    return Processor(blank.tokenizer(), weights.config_of(name), constants)


# -------------------------------------------------------------------------------------------- score
def plain_score(model: nn.Module, prompt: Prompt, completions: Tensor) -> tuple[Tensor, Tensor]:
    """(logp (G, T), entropy (G, T)) of completions (G, T), by a plain transformers model: the
    prompt repeated for each completion, logits at every token. `score` must equal this."""
    G, T = completions.shape
    P, device = len(prompt.ids), completions.device
    ids = torch.cat([prompt.ids.to(device).expand(G, -1), completions], dim=1)      # (G, P + T)
    following = (prompt.next_position + torch.arange(T)).expand(3, -1)
    positions = torch.cat([prompt.positions, following], dim=1)[:, None]            # (3, 1, P + T)
    kinds, media = torch.zeros_like(ids), {}            # 0 a word, 1 of an image, 2 of a video
    if prompt.frames is not None:
        image = prompt.kind == "image"
        kinds[:, :P][:, prompt.visual.to(device)] = 1 if image else 2
        pixels, grid = ("pixel_values", "image") if image else ("pixel_values_videos", "video")
        media = {pixels: prompt.pixels(device).to(model.dtype).repeat(G, 1),
                 f"{grid}_grid_thw": torch.tensor([prompt.grid] * G, device=device)}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                   position_ids=positions.expand(-1, G, -1).to(device), use_cache=False,
                   **media).logits[:, P - 1:-1]                                     # (G, T, V)
    rows = []
    for row, tokens in zip(logits, completions):
        logp = row.float().log_softmax(-1)                                          # (T, V)
        rows.append((logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))
    logp, entropy = (torch.stack(x) for x in zip(*rows))
    return logp, entropy


def score(model: nn.Module, prompt: Prompt, completions: Tensor | Group,
          mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logp (G, T), entropy (G, T)) of completions (G, T) of one prompt, 0 at padding.

    mask (G, T): True at a completion's tokens, which come first in each row (default: all).
    Gradients, too, equal those of the plain forward.
    """
    if not isinstance(completions, Group):
        completions = completions.to(model.device)
        mask = torch.ones_like(completions, dtype=torch.bool) if mask is None else mask
        completions = Group(completions, mask.to(model.device).bool())
    return score_groups(model, [prompt], [completions])[0]


def score_groups(model: nn.Module, prompts: Sequence[Prompt],
                 groups: Sequence[Group]) -> list[tuple[Tensor, Tensor]]:
    """`score` of each prompt's group, from one forward pass."""
    if not prompts:
        return []
    ids = torch.cat([group.ids.flatten()[group.flat_index] for group in groups])
    states = hidden_states(model, prompts, groups)
    logp, entropy = TokenStats.apply(states, model.lm_head.weight, ids)
    return list(zip(unflatten(logp, groups), unflatten(entropy, groups)))


def predicting_states(model: nn.Module, prompt: Prompt, group: Group) -> tuple[Tensor, Tensor]:
    """The states (G, T, D) that predict a group's tokens, and the head (V, D). No gradient."""
    with torch.no_grad():
        (states,) = unflatten(hidden_states(model, [prompt], [group]), [group])
    return states, model.lm_head.weight.detach()


# ------------------------------------------------------------------------------------------- sample
def sample(model: nn.Module, prompts: Sequence[Prompt], G: int, max_new_tokens: int, *,
           temperature: float = 1.0, top_p: float = 0.95, top_k: int = 0,
           seeds: Sequence[int] | None = None, ends: Sequence[int] | None = None) -> list[Group]:
    """G completions for each prompt, all decoded together. Vision tokens are never sampled.

    temperature 0 is greedy; top_k 0 is off.
    seeds: one for each prompt (default 0, 1, ..). A prompt's random numbers depend on its seed
    alone, not on the rank or the prompts beside it.
    ends: end tokens (default: the checkpoint's).
    """
    if seeds is None:
        seeds = range(len(prompts))
    if ends is None:
        ends = model.generation_config.eos_token_id
    lengths = [len(p.ids) for p in prompts]
    with torch.no_grad():
        d = decoder_for(model, len(prompts), G, max(lengths), max_new_tokens, temperature, top_p,
                        top_k)
        d.attach()
        last, computed = [], {}
        for part in batches(lengths, PREFILL):
            some = prompts[part]
            hidden = packed_forward(model, some, [None] * len(some), part.start, computed)
            last.append(hidden[torch.tensor(lengths[part]).cumsum(0).to(hidden.device) - 1])
        d.start(lengths, [p.next_position for p in prompts], seeds, max_new_tokens, ends)
        logits = F.pad(model.lm_head(torch.cat(last)), (0, 0, 0, d.N - len(prompts)))
        d.extend(logits.repeat_interleave(G, 0))
        for t in range(1, max_new_tokens):
            look = model.device.type == "cpu" or t % CHECK_EVERY == 0
            if look and bool(d.done.all()):
                break
            d.advance()
    groups = []
    for n in range(len(prompts)):
        mask = d.mask[:, n].T                                                       # (G, T)
        T = int(mask.sum(-1).max())
        groups.append(Group(d.ids[:T, n].T.clone(), mask[:, :T].clone(), d.logp[:T, n].T.clone(),
                            d.done[n].clone()))
    return groups


def batches(sizes: Sequence[int], limit: int) -> list[slice]:
    """Consecutive runs of `sizes` with sums within `limit`; a larger single size stands alone."""
    starts, total = [], 0
    for i, size in enumerate(sizes):
        if not starts or total + size > limit:
            starts.append(i)
            total = 0
        total += size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)])]
