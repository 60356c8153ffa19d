"""Decoding: one token for all completions of all prompts, as fast as the weights can be read.

A step is the model's own forward. On CUDA its layer is compiled, and a CUDA graph replays the step.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.kernels import thin_linear
from engine.packing import Step
from engine.prepare import compile_layer, compiled_on_cuda


def choose(logits: Tensor, draws: Tensor, banned: Tensor, temperature: float, top_p: float,
           top_k: int = 0) -> tuple[Tensor, Tensor]:
    """A token (R,) and its log-probability (R,), at temperature 1 over all words, of logits (R, V).
    draws (R,) are uniform in [0, 1). As in transformers, temperature (0: greedy) comes first, then
    the top_k likeliest (0: all), then of those the nucleus: tokens while the mass of the likelier
    ones is below top_p, and those tied with its last."""
    total, p = probabilities(logits, banned, temperature or 1.0)
    if not temperature:
        token = logits.masked_fill(banned, -torch.inf).argmax(-1)
    elif top_k:
        best, index = p.topk(min(top_k, p.shape[-1]))           # likeliest first
        inside = best.cumsum(-1) - best < top_p * best.sum(-1, keepdim=True)
        place = inverse_cdf(torch.where(inside, best, 0), draws)
        token = index.gather(-1, place[:, None])[:, 0]
    else:
        border = nucleus_border(p, top_p) if top_p < 1 else 0.0
        token = inverse_cdf(p, draws, border)
    return token, logits.gather(-1, token[:, None])[:, 0].float() - total


@compiled_on_cuda
def probabilities(logits: Tensor, banned: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logsumexp (R,) of all, and the probabilities (R, V) of those that are not banned."""
    allowed = logits.float().masked_fill(banned, -torch.inf)
    return logits.float().logsumexp(-1), torch.softmax(allowed / temperature, -1)


def nucleus_border(p: Tensor, top_p: float) -> Tensor:
    """The largest number (R, 1) above which p (R, V) adds up to top_p or more: the nucleus."""
    if p.is_cuda:
        return border_by_bits(p, top_p)
    likeliest = p.sort(-1, descending=True).values
    inside = likeliest.cumsum(-1) - likeliest < top_p
    last = likeliest.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))    # of NaN none is
    return last.nextafter(torch.zeros(()))


def border_by_bits(p: Tensor, top_p: float) -> Tensor:
    """`nucleus_border`, three bits at a time: floats from 0 to 1 are ordered as their 30 bits are.
    On a GPU sorting 152,064 words would take longer than a layer."""
    border = torch.zeros(len(p), 1, dtype=torch.int32, device=p.device)
    digits = torch.arange(8, dtype=torch.int32, device=p.device)
    shifts = torch.arange(27, -1, -3, dtype=torch.int32, device=p.device)
    for steps in digits << shifts[:, None]:
        border = border_within(p, border, steps, top_p)
    return border.view(torch.float32)


@compiled_on_cuda
def border_within(p: Tensor, border: Tensor, steps: Tensor, top_p: float) -> Tensor:
    """The last of border + steps (8,), as bits, above which p (R, V) adds up to top_p or more."""
    p, tried = in_blocks(p), (border + steps).view(torch.float32)       # (R, blocks, block), (R, 8)
    mass = [torch.where(p > t[:, None, None], p, 0).sum(-1) for t in tried.unbind(1)[1:]]
    enough = torch.stack(mass, 1).sum(-1) >= top_p                      # True, .., True, False, ..
    return border + enough.sum(1, keepdim=True, dtype=torch.int32) * steps[1]


def in_blocks(p: Tensor, block: int = 512) -> Tensor:
    """p (R, V) as (R, blocks, block), filled up with 0. Sums over blocks use the whole GPU."""
    return F.pad(p, (0, -p.shape[1] % block)).unflatten(1, (-1, block))


@compiled_on_cuda
def inverse_cdf(p: Tensor, draws: Tensor, border: Tensor | float = 0.0) -> Tensor:
    """Indices (R,) at which the running sum of p (R, V), above border (R, 1), passes draws (R,) of
    its total. By blocks: inductor (torch 2.11) cannot compile a scan over a whole vocabulary."""
    p = in_blocks(torch.where(p > border, p, 0))
    block = p.shape[-1]
    cdf = p.sum(-1).cumsum(-1)
    target = draws[:, None] * cdf[:, -1:]
    which = torch.searchsorted(cdf, target, right=True)                 # (R, 1)
    which = torch.minimum(which, (cdf < cdf[:, -1:]).sum(-1, keepdim=True))     # the last with mass
    rest = target - F.pad(cdf, (1, 0)).gather(1, which)                 # to pass in its block
    inner = p.gather(1, which[..., None].expand(-1, -1, block))[:, 0].cumsum(-1)    # (R, block)
    within = (inner <= rest).sum(-1)
    last = (inner < inner[:, -1:]).sum(-1)                              # likewise
    return which[:, 0] * block + torch.minimum(within, last)


class Decoder:
    """Buffers for N prompts and G completions of up to T tokens each, and the step that extends all
    by a token. All that changes from prompt to prompt lives in a buffer, so prompts of other
    lengths, and fewer of them, replay the same graph. how: temperature, top_p, top_k."""

    def __init__(self, model: nn.Module, N: int, G: int, room: int, T: int, how: tuple):
        device, config = model.device, model.config.text_config
        self.model, self.N, self.G, self.T, self.room, self.how = model, N, G, T, room, how
        layers = model.model.language_model.layers
        shape = N, config.num_key_value_heads, room + G * T, layers[0].self_attn.head_dim
        self.kv = [tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
                   for _ in layers]
        integers = partial(torch.zeros, dtype=torch.long, device=device)
        self.ids, self.token, self.position = integers(T, N, G), integers(N, G), integers(N, G)
        self.slots, self.step, self.lengths = integers(G), integers(1), integers(N)
        self.draws = torch.zeros(T, N, G, device=device)
        self.mask, self.logp = self.draws.bool(), self.draws.clone()
        self.done = self.mask[0].clone()                                           # (N, G)
        self.ends = torch.full((16,), -1, device=device)        # end tokens, filled up with -1
        self.banned = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        self.banned[vision_tokens(model.config)] = True
        self.graph = None
        if device.type == "cuda":
            self._capture()

    def attach(self) -> None:
        """Let the model's layers read and write this decoder's keys and values."""
        for layer, kv in zip(self.model.model.language_model.layers, self.kv):
            layer.self_attn.kv = kv

    def start(self, lengths: Sequence[int], positions: Sequence[int], seeds: Sequence[int], T: int,
              ends: Sequence[int]) -> None:
        """Begin anew with n <= N prompts of these lengths and next positions, for up to T tokens. A
        prompt's random numbers depend on its seed alone."""
        n, device = len(lengths), self.ids.device
        self.lengths.fill_(1)[:n] = torch.tensor(lengths, device=device)    # others count as ended
        self.position.zero_()[:n] = torch.tensor(positions, device=device)[:, None]
        draws = [torch.rand(T, self.G, generator=torch.Generator().manual_seed(x)) for x in seeds]
        self.draws[:T, :n] = torch.stack(draws, 1).to(device)
        self.done.fill_(True)[:n] = False
        self.ends.fill_(-1)[:len(ends)] = torch.tensor(ends, dtype=torch.long, device=device)
        self.step.zero_(), self.mask.zero_()
        self.slots.copy_(self.room + torch.arange(self.G))

    def extend(self, logits: Tensor) -> None:
        """Choose a token for every completion from logits (N*G, V) and write it down."""
        draws = self.draws.index_select(0, self.step).flatten()
        token, logp = choose(logits, draws, self.banned, *self.how)
        self.token.copy_(token.view_as(self.token))
        self.ids.index_copy_(0, self.step, self.token[None])
        self.logp.index_copy_(0, self.step, logp.view_as(self.token)[None])
        self.mask.index_copy_(0, self.step, ~self.done[None])
        self.done |= (self.token[..., None] == self.ends).any(-1)       # isin may sort, and wait

    def advance(self) -> None:
        """One decoding step: the last tokens go into the cache, the next ones come out."""
        if self.graph is not None:
            return self.graph.replay()
        hidden = self.model.model.language_model(                                   # (N, G, D)
            inputs_embeds=self.model.get_input_embeddings()(self.token), use_cache=False,
            position_ids=self.position.expand(3, -1, -1),
            layout=Step(self.slots, self.room, self.lengths)).last_hidden_state
        logits = thin_linear(hidden, self.model.lm_head.weight).flatten(0, 1)       # (N*G, V)
        self.position += 1
        self.slots += self.G
        self.step += 1
        self.extend(logits)

    def _capture(self) -> None:
        self.attach()
        text = self.model.model.language_model
        small = text.embed_tokens, text.rotary_emb, text.norm
        scoring = {part: part.forward for part in (*text.layers, *small)}
        for layer in text.layers:                       # one is compiled and serves all
            compile_layer(layer, dynamic=False)
        for part in small:
            part.forward = torch.compile(part.forward, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):                          # compiles, settles lazy allocations
                self.start([1], [1], [0], 1, ())
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.start([1], [1], [0], 1, ())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # other threads go on
            self.advance()
        self.graph = graph
        for part, forward in scoring.items():
            part.forward = forward


def vision_tokens(config: PreTrainedConfig) -> list[int]:
    """Tokens that are never sampled: they would stand for pixels that do not exist."""
    names = ("image", "video", "vision_start", "vision_end", "vision")
    ids = [getattr(config, f"{name}_token_id", None) for name in names]
    return [token for token in ids if token is not None]


def decoder_for(model: nn.Module, N: int, G: int, room: int, T: int, *how: float) -> Decoder:
    """A decoder that fits: on CUDA the one at hand, or a larger one instead. how: see `Decoder`."""
    if model.device.type != "cuda":
        return Decoder(model, N, G, room, T, how)
    held = model.__dict__.setdefault("_decoders", {})
    d, T = held.get((G, *how)), max(T, 2)       # to be captured, it must advance
    if d is None or d.N < N or d.room < room or d.T < T:
        room = max(1024, 2 ** (room - 1).bit_length())
        if d is not None:
            N, room, T = max(N, d.N), max(room, d.room), max(T, d.T)
            del held[G, *how], d
            for layer in model.model.language_model.layers:
                layer.self_attn.kv = None               # else the old cache would stay
        held[G, *how] = Decoder(model, N, G, room, T, how)
    return held[G, *how]
