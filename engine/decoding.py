"""Decoding: one token for all completions of all prompts, as fast as the weights can be read.

A `Decoder` owns the buffers of N prompts and their G completions and the step that extends them:
the model's own forward. On CUDA its layer is compiled and the step replayed as a CUDA graph;
elsewhere it runs as it stands.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from engine import thin
from engine.packing import Step
from engine.prepare import compile_layer, compiled_on_cuda

BLOCK = 128             # slots per block of FlexAttention's sparse mask


def choose(logits: Tensor, draws: Tensor, banned: Tensor, temperature: float, top_p: float,
           top_k: int = 0) -> tuple[Tensor, Tensor]:
    """A token (R,) and its log-probability (R,), at temperature 1 over all words, from logits (R,
    V).

    draws (R,) are uniform in [0, 1). As in transformers, temperature comes first, then the top_k
    likeliest (0: all), then of those the nucleus: tokens while the mass of the likelier ones is
    below top_p. Both are exact; tokens tied with the nucleus's last belong to it. temperature 0 is
    greedy.
    """
    token, total, p = likeliest(logits, banned, temperature or 1.0)
    if temperature and top_k:
        best, index = p.topk(min(top_k, p.shape[-1]))           # likeliest first
        inside = best.cumsum(-1) - best < top_p * best.sum(-1, keepdim=True)
        place = inverse_cdf(torch.where(inside, best, 0), draws)
        token = index.gather(-1, place[:, None])[:, 0]
    elif temperature:
        border = nucleus_border(p, top_p) if top_p < 1 else 0.0
        token = inverse_cdf(torch.where(p > border, p, 0), draws)
    return token, logits.gather(-1, token[:, None])[:, 0].float() - total


@compiled_on_cuda
def likeliest(logits: Tensor, banned: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token (R,) that is not banned; logsumexp (R,) of all; probabilities (R, V)."""
    allowed = logits.float().masked_fill(banned, -torch.inf)
    p = torch.softmax(allowed / temperature, -1)
    return allowed.argmax(-1), logits.float().logsumexp(-1), p


def nucleus_border(p: Tensor, top_p: float) -> Tensor:
    """The largest number (R, 1) such that p (R, V) above it adds up to top_p or more: the
    nucleus is what lies above it. Found three bits at a time, since floats from 0 to 1 are
    ordered as their 30 bits are; sorting 152,064 words would take longer than a layer."""
    border = torch.zeros(len(p), 1, dtype=torch.int32, device=p.device)
    digits = torch.arange(8, dtype=torch.int32, device=p.device)
    for shift in range(27, -1, -3):
        border = border_within(p, border, digits << shift, top_p)
    return border.view(torch.float32)


@compiled_on_cuda
def border_within(p: Tensor, border: Tensor, steps: Tensor, top_p: float) -> Tensor:
    """The last of border + steps (8,), as bits, above which p (R, V) adds up to top_p or more."""
    p, tried = in_blocks(p), (border + steps).view(torch.float32)       # (R, blocks, block), (R, 8)
    mass = [torch.where(p > t[:, None, None], p, 0).sum(-1).sum(-1) for t in tried.unbind(1)[1:]]
    enough = torch.stack(mass, 1) >= top_p                              # True, .., True, False, ..
    return border + enough.sum(1, keepdim=True, dtype=torch.int32) * steps[1]


def in_blocks(p: Tensor, block: int = 512) -> Tensor:
    """p (R, V) as (R, blocks, block), filled up with 0. Sums block by block, then over blocks,
    use the whole chip; one over the row would use a processor for each row."""
    return F.pad(p, (0, -p.shape[1] % block)).unflatten(1, (-1, block))


@compiled_on_cuda
def inverse_cdf(p: Tensor, draws: Tensor) -> Tensor:
    """Indices (R,) of p (R, V) at which the cumulative mass passes draws (R,), found block by
    block: inductor (torch 2.11) cannot compile a scan over a whole vocabulary."""
    p = in_blocks(p)
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


def next_logits(model: nn.Module, token: Tensor, position: Tensor, step: Step) -> Tensor:
    """(N*G, V) logits after token (N, G) at position (N, G): one decoding step of the model's
    own forward."""
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token), position_ids=position.expand(3, -1, -1),
        layout=step, use_cache=False).last_hidden_state
    return thin.linear(hidden, model.lm_head.weight).flatten(0, 1)


def blocks_in_use(lengths: Tensor, used: Tensor, room: int,
                  count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each prompt's `count` blocks of slots: how many the prompt fills wholly (N,) (they come
    first and need no mask), how many need one (N,), and which those are (N, count): the prompt's
    last, and the completions' from `room` on."""
    whole, ending = lengths // BLOCK, (lengths % BLOCK > 0).long()
    after = torch.arange(count, device=lengths.device) - ending[:, None]
    later = (room // BLOCK + after).clamp(max=count - 1)
    mixed_blocks = torch.where(after < 0, whole[:, None], later)
    return whole, ending + (used + BLOCK - 1) // BLOCK, mixed_blocks


class Decoder:
    """Buffers for N prompts and G completions of up to T tokens each, and the step that extends all
    by a token.

    Slot room + t*G + g of a prompt's cache row holds token t of its completion g. On CUDA the step
    is compiled and captured once; everything that changes from prompt to prompt lives in a buffer,
    so prompts of other lengths, and fewer of them, replay the same graph, and attention visits only
    the blocks of slots in use.
    """

    def __init__(self, model: nn.Module, N: int, G: int, room: int, T: int, temperature: float,
                 top_p: float, top_k: int):
        device, config = model.device, model.config.text_config
        self.model, self.N, self.G, self.T = model, N, G, T
        self.how = temperature, top_p, top_k
        block = BLOCK if device.type == "cuda" else 1
        self.room = -(-room // block) * block
        length = self.room + -(-G * T // block) * block
        heads = config.num_key_value_heads
        size = model.model.language_model.layers[0].self_attn.head_dim
        self.kv = [tuple(torch.zeros(N, heads, length, size, dtype=model.dtype, device=device)
                         for _ in range(2)) for _ in range(config.num_hidden_layers)]

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.ids, self.token, self.position = integers(T, N, G), integers(N, G), integers(N, G)
        self.slots, self.step, self.lengths = integers(G), integers(1), integers(N)
        self.used = integers(N)  # slots taken after the prompt
        self.draws = torch.zeros(T, N, G, device=device)
        self.valid, self.logp = self.draws.bool(), self.draws.clone()
        self.done = self.valid[0].clone()                                           # (N, G)
        self.ends = torch.full((16,), -1, device=device)        # end tokens, filled up with -1
        self.banned = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        self.banned[vision_tokens(model.config)] = True
        prompt_lengths, used, room = self.lengths, self.used, self.room

        def sees(b, _, q, slot):
            """Whether query q (completion q % G of prompt b) attends to a slot: the prompt's,
            and its own so far."""
            own = slot - room
            return (slot < prompt_lengths[b]) | ((own >= 0) & (own < used[b]) & (own % G == q % G))

        self.sees, self.graph, self.block_mask = sees, None, None
        if device.type == "cuda":
            every = torch.arange(length // BLOCK, dtype=torch.int32, device=device)
            every = every.expand(N, 1, 1, -1)
            self.whole, self.mixed = torch.zeros(2, N, 1, 1, dtype=torch.int32, device=device)
            self.mixed_blocks = every.clone()
            queries = config.num_attention_heads // heads * G
            self.block_mask = BlockMask.from_kv_blocks(
                self.mixed, self.mixed_blocks, self.whole, every.contiguous(), BLOCK, sees,
                (queries, length), compute_q_blocks=False)
            self._capture()

    def attach(self) -> None:
        """Let the model's layers read and write this decoder's keys and values."""
        for layer, kv in zip(self.model.model.language_model.layers, self.kv):
            layer.self_attn.kv = kv

    def start(self, lengths: Sequence[int], positions: Sequence[int], seeds: Sequence[int], T: int,
              ends: Sequence[int]) -> None:
        """Begin anew with n <= N prompts of these lengths and next positions, to be extended by
        up to T tokens. A prompt's random numbers depend on its seed alone."""
        n, device = len(lengths), self.ids.device
        self.lengths.fill_(1)[:n] = torch.tensor(lengths, device=device)    # others count as ended
        self.position.zero_()[:n] = torch.tensor(positions, device=device)[:, None]
        draws = [torch.rand(T, self.G, generator=torch.Generator().manual_seed(seed))
                 for seed in seeds]
        self.draws[:T, :n] = torch.stack(draws, 1).to(device)
        self.done.fill_(True)[:n] = False
        self.ends.fill_(-1)[:len(ends)] = torch.tensor(ends, dtype=torch.long, device=device)
        self.step.zero_(), self.valid.zero_(), self.used.fill_(self.G)
        self.slots.copy_(self.room + torch.arange(self.G))
        self._list_blocks()

    def _list_blocks(self) -> None:
        if self.block_mask is not None:
            count = self.mixed_blocks.shape[-1]
            now = blocks_in_use(self.lengths, self.used, self.room, count)
            for buffer, values in zip((self.whole, self.mixed, self.mixed_blocks), now):
                buffer.copy_(values.view_as(buffer))

    def extend(self, logits: Tensor) -> None:
        """Choose a token for every completion from logits (N*G, V) and write it down."""
        draws = self.draws.index_select(0, self.step).flatten()
        token, logp = choose(logits, draws, self.banned, *self.how)
        self.token.copy_(token.view_as(self.token))
        self.ids.index_copy_(0, self.step, self.token[None])
        self.logp.index_copy_(0, self.step, logp.view_as(self.token)[None])
        self.valid.index_copy_(0, self.step, ~self.done[None])
        self.done |= (self.token[..., None] == self.ends).any(-1)       # isin may sort, and wait

    def advance(self) -> None:
        """One decoding step: the last tokens go into the cache, the next ones come out."""
        if self.graph is not None:
            return self.graph.replay()
        sees = self.block_mask
        if sees is None:
            slots = self.room + int(self.used[0])
            prompt, query, slot = (torch.arange(n) for n in (self.N, self.G, slots))
            sees = self.sees(prompt[:, None, None, None], None, query[:, None], slot)
        logits = next_logits(self.model, self.token, self.position, Step(self.slots, sees))
        self.position += 1
        self.slots += self.G
        self.used += self.G
        self.step += 1
        self._list_blocks()
        self.extend(logits)

    def _capture(self) -> None:
        self.attach()
        layers = self.model.model.language_model.layers
        scoring = [layer.forward for layer in layers]
        for layer in layers:                            # one is compiled and serves all
            compile_layer(layer, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, settles lazy allocations
                self.start([1], [1], [0], 1, ())
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.start([1], [1], [0], 1, ())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # other threads go on
            self.advance()
        self.graph = graph
        for layer, kept in zip(layers, scoring):
            layer.forward = kept


def vision_tokens(config: PreTrainedConfig) -> list[int]:
    """Tokens that must never be sampled: they would stand for pixels that do not exist."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
             "vision_token_id")
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]


def decoder_for(model: nn.Module, N: int, G: int, room: int, T: int, temperature: float,
                top_p: float, top_k: int = 0) -> Decoder:
    """A decoder that fits: on CUDA the one at hand where it can, else one with room to spare
    that replaces it."""
    how = temperature, top_p, top_k
    if model.device.type != "cuda":
        return Decoder(model, N, G, room, T, *how)
    held = model.__dict__.setdefault("_decoders", {})
    d = held.get((G, *how))
    if d is None or d.N < N or d.room < room or d.T < T:
        room = max(1024, 2 ** (room - 1).bit_length())
        if d is not None:
            N, room, T = max(N, d.N), max(room, d.room), max(T, d.T)
            del held[G, *how], d
            for layer in model.model.language_model.layers:
                layer.self_attn.kv = None  # or the old cache would stay beside the new one
        held[G, *how] = Decoder(model, N, G, room, T, *how)
    return held[G, *how]
