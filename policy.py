"""The policy: load a Qwen-VL (docs/families.md), sample G completions of a prompt, score them.

    load(name)                          model and processor, from a folder, hub name or random:7b
    sample(model, prompts, G, ...)      G completions for each prompt, all decoded together
    score(model, prompt, completions)   their log-probabilities and entropies (eq. 4)

A prompt is computed once for its whole group: scoring runs one packed row [prompt | o_1 | .. | o_G]
(engine/packing.py), decoding shares the prompt's keys and values (engine/decoding.py). Logits exist
only where a completion token is predicted, in chunks that are recomputed in the backward pass.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from engine import blank, families
from engine.decoding import decoder_for
from engine.packing import onto, pack
from engine.prepare import compiled_on_cuda, prepare
from prompt import Processor, Prompt, Vision, patches

CHUNK = 1024            # tokens whose logits exist at once: 0.6 GiB at 152,064 words in fp32
PREFILL = 16384         # prompt tokens prefilled in one forward pass
CHECK_EVERY = 16        # decoding steps between looks at whether all have ended (a look waits)


@dataclass(frozen=True)
class Group:
    """G completions of one prompt."""
    ids: Tensor                         # (G, T)
    valid: Tensor                       # (G, T) bool: up to and with the first end token
    logp: Tensor | None = None          # (G, T) as sampling saw it, before temperature and top-p
    ended: Tensor | None = None         # (G,) bool: an end token came before the limit

    @cached_property
    def lengths(self) -> list[int]:
        return self.valid.sum(-1).tolist()

    @cached_property
    def places(self) -> Tensor:
        """Where the n valid tokens lie in the flattened rows (n,). Found once: to count them, the
        host waits for the GPU."""
        return self.valid.flatten().nonzero()[:, 0]


# --------------------------------------------------------------------------------------------- load
def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
         seed: int = 0) -> tuple[nn.Module, Processor]:
    """The model, ready for this project, and its processor.

    name: a checkpoint's folder or hub name, or random:3b, random:7b (seed is that of its weights).
    OSError where the checkpoint is missing or incomplete, ValueError where it is of another family.
    Of its generation_config.json only the end tokens count: what `sample` draws is up to its caller.
    """
    logging.disable_progress_bar()
    processor = load_processor(name)
    if name.startswith("random:"):
        model = blank.model(name, blank.tokenizer(), device, dtype, seed)
    else:
        model = families.from_pretrained(name, dtype)
    model.generation_config.eos_token_id = processor.ends
    return prepare(model, device), processor


def load_processor(name: str) -> Processor:
    """The processor of a checkpoint's folder, hub name, or random:7b. Errors as `load`'s, which a
    folder's weights raise here too, before they are read."""
    if not name.startswith("random:"):
        processor = Processor.from_pretrained(name)
        families.check_weights(name)
        return processor
    tokenizer, v = blank.tokenizer(), Vision()
    constants = {"image_mean": v.mean, "image_std": v.std, "min_pixels": v.min_pixels}
    return Processor(tokenizer, blank.config(name, tokenizer), constants)


def weight_count(name: str, frozen: Sequence[str] = ()) -> int:
    """How many weights the model of this name has beside its frozen parts, from its configuration
    alone."""
    if name.startswith("random:"):
        config = blank.config(name, blank.tokenizer())
    else:
        config = families.read_config(name)
    with torch.device("meta"):
        model = families.family_of(config).model(config)
    kept = [weights for part, weights in parts(model).items() if part not in frozen]
    return sum(p.numel() for weights in kept for p in weights)


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights of the vision tower, of the projector after it, and of the language model."""
    tower = model.model.visual
    projector = [p for name, p in tower.named_parameters() if "merger" in name]
    known = {id(p) for p in projector}
    vision = [p for p in tower.parameters() if id(p) not in known]
    known |= {id(p) for p in vision}
    language = [p for p in model.parameters() if id(p) not in known]
    return {"vision": vision, "projector": projector, "language": language}


def freeze(model: nn.Module, frozen: Sequence[str]) -> str:
    """Train all parts but the frozen ones (vision, projector, language); says which, in words."""
    said = []
    for name, weights in parts(model).items():
        for p in weights:
            p.requires_grad_(name not in frozen)
        size = sum(p.numel() for p in weights) / 1e6
        said.append(f"{name} {size:,.1f}M{' (frozen)' if name in frozen else ''}")
    return "trained: " + ", ".join(said)


# -------------------------------------------------------------------------------------------- score
def vision_features(model: nn.Module, prompts: Sequence[Prompt],
                    known: dict[int, Tensor]) -> Tensor | None:
    """The features (sum V, width) of the prompts' video and image tokens, in order, with all that
    families.vision_features puts into them; None without any.

    Those of each clip are kept in `known` by its frames' id: questions about one clip share them.
    """
    device, dtype = model.device, model.dtype
    clips = {id(p.frames): p for p in prompts
             if p.frames is not None and not p.blank and id(p.frames) not in known}
    if clips:
        pixels = [patches(onto(device, p.frames), p.vision) for p in clips.values()]
        grids = torch.tensor([p.grid for p in clips.values()])
        merged = families.vision_features(model.model.visual, torch.cat(pixels).to(dtype),
                                          grids.to(device))
        sizes = grids.prod(-1) // model.config.vision_config.spatial_merge_size ** 2
        known.update(zip(clips, merged.split(sizes.tolist())))
    out = []
    for p in prompts:
        if p.blank:
            shape = int(p.visual.sum()), families.feature_width(model.config)
            out.append(torch.zeros(shape, device=device, dtype=dtype))
        elif p.frames is not None:
            features = known[id(p.frames)]
            out.append(features if p.kept is None else features[p.kept.to(device)])
    return torch.cat(out) if out else None


def packed_forward(model: nn.Module, prompts: Sequence[Prompt], groups: Sequence[Group | None],
                   keep: int | None = None, known: dict[int, Tensor] | None = None) -> Tensor:
    """Last hidden states (L, D) of one packed row: each prompt, then its completions, if any.

    keep: the prompts' keys and values go to the layers' cache, from this row of it on.
    known: see `vision_features`.
    """
    device = model.device
    ids, positions, visual, owned = [], [], [], []
    for p, group in zip(prompts, groups):
        lengths = group.lengths if group else []
        ids.append(onto(device, p.ids))
        positions.append(p.positions)
        visual += [p.visual, torch.zeros(sum(lengths), dtype=torch.bool)]
        owned.append(lengths)
        if group:
            ids.append(group.ids.flatten()[group.places])
        for n in lengths:                                       # each completion follows the prompt
            positions.append((p.next_position + torch.arange(n)).expand(3, -1))
    embeds = model.get_input_embeddings()(torch.cat(ids))                           # (L, D)
    row = pack([len(p.ids) for p in prompts], owned, embeds)
    if keep is not None:
        rows = [torch.full_like(p.ids, n) for n, p in enumerate(prompts, keep)]
        slots = [torch.arange(len(p.ids)) for p in prompts]
        row.store = onto(device, torch.cat(rows)), onto(device, torch.cat(slots))
    where = onto(device, torch.cat(visual))
    position_ids = onto(device, torch.cat(positions, dim=1)[:, None])
    features = vision_features(model, prompts, {} if known is None else known)
    more = {}
    if features is not None:
        first, *later = features.to(embeds.dtype).split(embeds.shape[-1], dim=-1)
        embeds = embeds.masked_scatter(where[:, None], first)
        more = families.deepstack(where, later)
    return model.model.language_model(
        inputs_embeds=embeds[None].clone(),     # a view would have its first layer compiled apart
        position_ids=position_ids, layout=row, use_cache=False, **more).last_hidden_state[0]


def hidden_states(model: nn.Module, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
    """(n, D): the state that predicts each valid completion token, prompt by prompt, row by row."""
    before, start = [], 0
    for p, group in zip(prompts, groups):
        start += len(p.ids)
        last = start - 1                        # the prompt's last token predicts each first token
        for n in group.lengths:
            if n:
                before += [torch.tensor([last]), torch.arange(start, start + n - 1)]
            start += n
    return packed_forward(model, prompts, groups)[onto(model.device, torch.cat(before))]


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
    """logp (n,) and entropy (n,) of tokens ids (n,) under softmax(hidden W^T), keeping no logits.

    entropy is -sum_w p_w log p_w (eq. 4), over all words at temperature 1. Only logp has a
    gradient. Softmax and sums are fp32; products are in the weights' precision.
    """

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
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:                             # not under --freeze language
            grad_weight = torch.zeros_like(weight)
        chunks = (x.split(CHUNK) for x in (hidden, ids, grad, grad_hidden))
        for h, i, g, out in zip(*chunks):
            d = logits_gradient(h, weight, i, g)
            torch.mm(d, weight, out=out)
            if grad_weight is not None:
                grad_weight.addmm_(d.T, h)
        return grad_hidden, grad_weight, None


def score_groups(model: nn.Module, prompts: Sequence[Prompt],
                 groups: Sequence[Group]) -> list[tuple[Tensor, Tensor]]:
    """(logp (G, T), entropy (G, T)) of each prompt's group, 0 at padding, from one forward pass."""
    ids = torch.cat([group.ids.flatten()[group.places] for group in groups])
    states = hidden_states(model, prompts, groups)
    logp, entropy = TokenStats.apply(states, model.lm_head.weight, ids)
    return list(zip(unflatten(logp, groups), unflatten(entropy, groups)))


def unflatten(flat: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """Values (n, ..) of all valid tokens, as (G, T, ..) for each group; 0 at padding."""
    out = []
    for group, part in zip(groups, flat.split([sum(group.lengths) for group in groups])):
        empty = flat.new_zeros(group.ids.numel(), *flat.shape[1:])
        out.append(empty.index_put((group.places,), part).unflatten(0, group.ids.shape))
    return out


def score(model: nn.Module, prompt: Prompt, completions: Tensor | Group,
          mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logp (G, T), entropy (G, T)) of completions (G, T) of one prompt.

    mask (G, T): True at valid tokens, which come first in each row (default: all). Equals the plain
    forward of each full sequence; gradients included.
    """
    if not isinstance(completions, Group):
        completions = completions.to(model.device)
        valid = torch.ones_like(completions, dtype=torch.bool) if mask is None else mask
        completions = Group(completions, valid.to(model.device).bool())
    return score_groups(model, [prompt], [completions])[0]


def predicting_states(model: nn.Module, prompt: Prompt, group: Group) -> tuple[Tensor, Tensor]:
    """The states (G, T, D) that predict a group's tokens, and the head (V, D). No gradient."""
    with evaluating(model):
        (states,) = unflatten(hidden_states(model, [prompt], [group]), [group])
    return states, model.lm_head.weight.detach()


# ------------------------------------------------------------------------------------------- sample
@contextmanager
def evaluating(model: nn.Module):
    """Without gradients and without gradient checkpointing (whose layers would drop the cache)."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sample(model: nn.Module, prompts: Sequence[Prompt], G: int, max_new_tokens: int, *,
           temperature: float = 1.0, top_p: float = 0.95, top_k: int = 0,
           seeds: Sequence[int] | None = None, ends: Sequence[int] | None = None) -> list[Group]:
    """G completions for each prompt, all decoded together. Vision tokens never come out.

    temperature 0 is greedy; top_k 0 is off.
    seeds: one per prompt (default 0, 1, ..). A prompt's random numbers depend on its seed alone,
    not on the rank or the company it is decoded in.
    ends: end tokens (default: the checkpoint's).
    """
    if seeds is None:
        seeds = range(len(prompts))
    if ends is None:
        ends = model.generation_config.eos_token_id
    lengths = [len(p.ids) for p in prompts]
    with evaluating(model):
        d = decoder_for(model, len(prompts), G, max(lengths), max_new_tokens, temperature, top_p,
                        top_k)
        d.attach()
        last, known = [], {}
        for part in batches(lengths, PREFILL):
            some = prompts[part]
            hidden = packed_forward(model, some, [None] * len(some), keep=part.start, known=known)
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
        valid = d.valid[:, n].T                                 # (G, T)
        T = int(valid.sum(-1).max())
        groups.append(Group(d.ids[:T, n].T.clone(), valid[:, :T].clone(),
                            d.logp[:T, n].T.clone(), d.done[n].clone()))
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
