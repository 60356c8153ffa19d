"""Decoding: one token for all completions of all prompts, as fast as the weights can be read.

A `Decoder` owns the buffers of N prompts and their G completions and the step that extends them: the model's own
forward. On CUDA its layer is compiled and the step replayed as a CUDA graph; elsewhere it runs as it stands.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from engine.packing import Step

BLOCK = 128             # slots per block of FlexAttention's sparse mask


def draws_for(top_p: float) -> int:
    """Draws per token until all of them miss the nucleus, which holds at least top_p, once in 1e8 (64 at most)."""
    return 1 if top_p >= 1 else min(64, math.ceil(math.log(1e-8) / math.log(1 - top_p)))


def choose(logits: Tensor, draws: Tensor, banned: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """A token (R,) and its log-probability (R,) from logits (R, V); draws (R, K) are uniform in [0, 1).

    Top-p without sorting: tokens drawn from the whole distribution are kept if the mass of the likelier tokens
    is below top_p, which is the nucleus's definition; the first that is kept is an exact sample. If none of the K
    is (`draws_for`), the likeliest token stands in. temperature 0 is greedy.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    allowed = logits.masked_fill(banned, -torch.inf)
    token = allowed.argmax(-1)
    if temperature > 0:
        p = torch.softmax(allowed / temperature, -1)
        drawn = inverse_cdf(p, draws)                                                   # (R, K)
        mass = p.gather(-1, drawn)
        likelier = torch.stack([torch.where(p > m[:, None], p, 0).sum(-1) for m in mass.unbind(1)], 1)
        kept = likelier < top_p
        first = drawn.gather(1, kept.int().argmax(1, keepdim=True))[:, 0]
        token = torch.where(kept.any(1), first, token)
    return token, logits.gather(-1, token[:, None])[:, 0] - total


def inverse_cdf(p: Tensor, draws: Tensor, block: int = 512) -> Tensor:
    """Indices (R, K) of p (R, V) at which the cumulative mass passes draws (R, K), found block by block: one scan
    over a whole vocabulary is slow, and inductor (torch 2.11) cannot compile it."""
    p = F.pad(p, (0, -p.shape[1] % block)).unflatten(1, (-1, block))                    # (R, blocks, block)
    cdf = p.sum(-1).cumsum(-1)
    target = draws * cdf[:, -1:]
    which = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)     # (R, K)
    rest = target - F.pad(cdf, (1, 0)).gather(1, which)                                 # mass still to pass in its block
    inner = p.gather(1, which[..., None].expand(-1, -1, block)).cumsum(-1)              # (R, K, block)
    within = (inner <= rest[..., None]).sum(-1)
    last = (inner < inner[..., -1:]).sum(-1)                                            # the block's last possible token
    return which * block + torch.minimum(within, last)


def next_logits(model: nn.Module, token: Tensor, position: Tensor, step: Step) -> Tensor:
    """(N*G, V) logits after token (N, G) at position (N, G): one decoding step of the model's own forward."""
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token), position_ids=position.expand(3, -1, -1),
        layout=step, use_cache=False).last_hidden_state
    return model.lm_head(hidden).flatten(0, 1)


def blocks_in_use(lengths: Tensor, used: Tensor, room: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each prompt's `count` blocks of slots: how many the prompt fills wholly (N,) (they come first and need no mask),
    how many need one (N,), and which those are (N, count): the prompt's last, and the completions' from `room` on."""
    whole, ending = lengths // BLOCK, (lengths % BLOCK > 0).long()
    after = torch.arange(count, device=lengths.device) - ending[:, None]
    mixed_blocks = torch.where(after < 0, whole[:, None], (room // BLOCK + after).clamp(max=count - 1))
    return whole, ending + (used + BLOCK - 1) // BLOCK, mixed_blocks


class Decoder:
    """Buffers for N prompts and G completions of up to T tokens each, and the step that extends all by a token.

    Slot room + t*G + g of a prompt's cache row holds token t of its completion g. On CUDA the step is compiled
    and captured once; everything that changes from prompt to prompt lives in a buffer, so prompts of other
    lengths, and fewer of them, replay the same graph, and attention visits only the blocks of slots in use.
    """

    def __init__(self, model: nn.Module, N: int, G: int, room: int, T: int, temperature: float, top_p: float):
        device, config = model.device, model.config.text_config
        self.model, self.N, self.G, self.T = model, N, G, T
        self.temperature, self.top_p = temperature, top_p
        block = BLOCK if device.type == "cuda" else 1
        self.room = -(-room // block) * block
        length = self.room + -(-G * T // block) * block
        head_dim = model.model.language_model.layers[0].self_attn.head_dim
        shape = (N, config.num_key_value_heads, length, head_dim)
        self.kv = [(torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
                   for _ in range(config.num_hidden_layers)]
        self.draws = torch.zeros(T, N * G, draws_for(top_p), device=device)
        self.ids, self.token, self.position, self.slots, self.step, self.lengths, self.used = (
            torch.zeros(shape, dtype=torch.long, device=device)
            for shape in ((T, N, G), (N, G), (N, G), (G,), (1,), (N,), (N,)))       # used: slots taken after the prompt
        self.valid, self.logp = torch.zeros(T, N, G, dtype=torch.bool, device=device), torch.zeros(T, N, G, device=device)
        self.done = torch.zeros(N, G, dtype=torch.bool, device=device)
        self.banned = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        self.banned[vision_tokens(model.config)] = True
        self.ends = torch.full((4,), -1, device=device)                             # end tokens, filled up with -1
        prompt_lengths, used, room = self.lengths, self.used, self.room

        def sees(b, _, q, slot):
            """Whether query q (completion q % G of prompt b) attends to a slot: the prompt, and its own tokens so far."""
            own = slot - room
            return (slot < prompt_lengths[b]) | ((own >= 0) & (own < used[b]) & (own % G == q % G))

        self.sees, self.graph, self.block_mask, self.choose = sees, None, None, choose
        if device.type == "cuda":
            self.choose = compiled(choose)
            every = torch.arange(length // BLOCK, dtype=torch.int32, device=device).expand(N, 1, 1, -1)
            self.whole, self.mixed = torch.zeros(2, N, 1, 1, dtype=torch.int32, device=device)     # how many blocks of each
            self.mixed_blocks = every.clone()
            queries = config.num_attention_heads // config.num_key_value_heads * G
            self.block_mask = BlockMask.from_kv_blocks(self.mixed, self.mixed_blocks, self.whole, every.contiguous(), BLOCK,
                                                       sees, (queries, length), compute_q_blocks=False)
            self._capture()

    def attach(self) -> None:
        """Let the model's layers read and write this decoder's keys and values."""
        for layer, kv in zip(self.model.model.language_model.layers, self.kv):
            layer.self_attn.kv = kv

    def start(self, lengths: Tensor, positions: Tensor, draws: Tensor, ends: Sequence[int]) -> None:
        """Begin anew with n <= N prompts of the given lengths (n,), next positions (n,), and draws (<= T, n, G, K)."""
        n = len(lengths)
        self.lengths.fill_(1)[:n] = lengths                                         # rows without a prompt count as ended
        self.position.zero_()[:n] = positions[:, None]
        self.draws.view(self.T, self.N, self.G, -1)[:len(draws), :n] = draws
        self.done.fill_(True)[:n] = False
        self.ends.fill_(-1)[:len(ends)] = torch.tensor(ends, dtype=torch.long, device=self.ends.device)
        self.step.zero_(), self.valid.zero_(), self.used.fill_(self.G)
        self.slots.copy_(self.room + torch.arange(self.G))
        self._list_blocks()

    def _list_blocks(self) -> None:
        if self.block_mask is not None:
            for buffer, now in zip((self.whole, self.mixed, self.mixed_blocks), blocks_in_use(
                    self.lengths, self.used, self.room, self.mixed_blocks.shape[-1])):
                buffer.copy_(now.view_as(buffer))

    def extend(self, logits: Tensor) -> None:
        """Choose a token for every completion from logits (N*G, V) and write it down."""
        token, logp = self.choose(logits, self.draws.index_select(0, self.step)[0], self.banned, self.temperature, self.top_p)
        self.token.copy_(token.view_as(self.token))
        self.ids.index_copy_(0, self.step, self.token[None])
        self.logp.index_copy_(0, self.step, logp.view_as(self.token)[None])
        self.valid.index_copy_(0, self.step, ~self.done[None])
        self.done |= torch.isin(self.token, self.ends)

    def advance(self) -> None:
        """One decoding step: the last tokens go into the cache, the next ones come out."""
        if self.graph is not None:
            return self.graph.replay()
        sees = self.block_mask
        if sees is None:
            prompt, query, slot = (torch.arange(n) for n in (self.N, self.G, self.room + int(self.used[0])))
            sees = self.sees(prompt[:, None, None, None], None, query[:, None], slot)       # (N, 1, G, slots so far)
        logits = next_logits(self.model, self.token, self.position, Step(self.slots, sees))
        self.position += 1
        self.slots += self.G
        self.used += self.G
        self.step += 1
        self._list_blocks()
        self.extend(logits)

    def _capture(self) -> None:
        def begin():
            one = torch.ones(self.N, dtype=torch.long, device=self.ids.device)
            self.start(one, one, self.draws.new_zeros(1, 1, 1, 1), ())
        self.attach()
        layers = self.model.model.language_model.layers
        scoring = [layer._compiled_call_impl for layer in layers]
        for layer in layers:                                                        # one is compiled and serves all
            layer._compiled_call_impl = torch.compile(layer._call_impl, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):                                                      # compiles, and settles lazy allocations
                begin()
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        begin()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):            # other threads (NCCL, loaders) go on
            self.advance()
        self.graph = graph
        for layer, kept in zip(layers, scoring):
            layer._compiled_call_impl = kept


@cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def vision_tokens(config: PreTrainedConfig) -> list[int]:
    """Tokens that must never be sampled: they would stand for pixels that do not exist."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]


def decoder_for(model: nn.Module, N: int, G: int, room: int, T: int, temperature: float, top_p: float) -> Decoder:
    """A decoder that fits: on CUDA the one at hand where it can, else one with room to spare that replaces it."""
    if model.device.type != "cuda":
        return Decoder(model, N, G, room, T, temperature, top_p)
    held = model.__dict__.setdefault("_decoders", {})
    d = held.get((G, temperature, top_p))
    if d is None or d.N < N or d.room < room or d.T < T:
        room = max(1024, 2 ** (room - 1).bit_length())
        if d is not None:
            N, room, T = max(N, d.N), max(room, d.room), max(T, d.T)
            del held[G, temperature, top_p], d
            for layer in model.model.language_model.layers:
                layer.self_attn.kv = None               # or the old cache would stay beside the new one
        held[G, temperature, top_p] = Decoder(model, N, G, room, T, temperature, top_p)
    return held[G, temperature, top_p]
