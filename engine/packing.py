"""Sharing the prompt: the packed row, the step over a shared cache, and the attention of both.

Scoring puts a prompt and its completions in one row, [prompt | o_1 | .. | o_G], in which every
completion sees the prompt and itself: the prompt is computed once, forward and backward. Decoding
keeps one row of keys and values per prompt whose slots after the prompt are dealt out in turn,
token t of completion g in slot t*G + g, so the G tokens of a step are G queries over the same keys.

Both reach the model through transformers' attention interface: its own forward hands the keyword
`layout`, a `Packed` row or a decoding `Step`, down to every layer's attention. On CUDA the row is
one call of torch's variable-length attention (which takes no fp32), the prompt's keys before each
completion's, and the step is engine/kernels.py's; else both are SDPA under a mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from engine.kernels import attend


@dataclass
class Packed:
    """Layout of a packed row. Its sequences are prompt 1, its completions, prompt 2, ..; sequence s
    has the queries cu_q[s]:cu_q[s+1] of the row and the keys keys[cu_k[s]:cu_k[s+1]], the last of
    which are its own, causally. `blocks` says the same for SDPA: (start, end, mask) per prompt."""
    cu_q: Tensor                                        # (S+1,) int32
    cu_k: Tensor                                        # (S+1,) int32
    keys: Tensor                                        # (K,) indices into the row
    max_q: int
    max_k: int
    blocks: list[tuple[int, int, Tensor]]               # mask (1, 1, n, n), True: a query may look
    store: tuple[Tensor, Tensor] | None = None          # each token's (prompt, slot) in `kv`


@dataclass
class Step:
    """One decoding step: N prompts' rows of slots, G new tokens each. The layers' `kv` holds
    keys and values, each (N, heads, slots, head_dim); the new tokens go to `slots` (G,). They look
    at the first `lengths` (N,) slots and at their own completion's, from `room` on."""
    slots: Tensor
    room: int
    lengths: Tensor

    def sees(self) -> Tensor:
        """The same as a mask (N, 1, G, n) over the first n slots."""
        G, slot = len(self.slots), torch.arange(int(self.slots[-1]) + 1)
        own, completion = slot - self.room, torch.arange(G)[:, None]
        return (slot < self.lengths[:, None, None, None]) | (own >= 0) & (own % G == completion)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x, from the CPU, on the device. The host does not wait for the copy, or for the GPU."""
    cuda = torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if cuda else x


def has_varlen(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def pack(prompt_lengths: list[int], completion_lengths: list[list[int]], embeds: Tensor) -> Packed:
    """The layout of a row of prompts, each followed by its completions, that embeds (L, D) hold."""
    q_lengths, k_lengths, keys, blocks, start = [], [], [], [], 0
    device = embeds.device
    for P, own in zip(prompt_lengths, completion_lengths):
        prompt, end = torch.arange(start, start + P), start + P + sum(own)
        q_lengths += [P, *own]
        k_lengths += [P, *(P + n for n in own)]
        keys.append(prompt)
        for tail in torch.arange(start + P, end).split(own):
            keys += [prompt, tail]
        if not has_varlen(embeds):
            counts = torch.tensor([P, *own])
            owner = torch.repeat_interleave(torch.arange(len(own) + 1), counts)     # 0: the prompt
            sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
            blocks.append((start, end, to_device(sees.tril()[None, None], device)))
        start = end
    cu_q, cu_k = (to_device(F.pad(torch.tensor(x).cumsum(0, dtype=torch.int32), (1, 0)), device)
                  for x in (q_lengths, k_lengths))
    index = to_device(torch.cat(keys), device)
    return Packed(cu_q, cu_k, index, max(q_lengths), max(k_lengths), blocks)


def text_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                   layout: Packed | Step, scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """Attention of the language model. query (B, H, Q, D), key and value (B, H_kv, Q, D);
    returns (B, Q, H, D)."""
    if isinstance(layout, Step):
        return step_attention(query, key, value, layout, *module.kv, scaling), None
    if layout.store is not None:
        for cache, new in zip(module.kv, (key, value)):
            cache[layout.store[0], :, layout.store[1]] = new[0].transpose(0, 1)
    if has_varlen(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))               # (L, heads, D)
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
        return varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k,
                           window_size=(-1, 0), **GROUPED)[None], None              # causal
    parts = [F.scaled_dot_product_attention(*(x[:, :, start:end] for x in (query, key, value)),
                                            attn_mask=sees, scale=scaling, enable_gqa=True)
             for start, end, sees in layout.blocks]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def step_attention(query: Tensor, key: Tensor, value: Tensor, step: Step, keys: Tensor,
                   values: Tensor, scaling: float | None) -> Tensor:
    """query (N, H, G, D), key and value (N, H_kv, G, D) -> (N, G, H, D), over keys and values
    (N, H_kv, slots, D)."""
    keys.index_copy_(2, step.slots, key)
    values.index_copy_(2, step.slots, value)
    if keys.is_cuda:
        return attend(query, keys, values, step.slots, step.room, step.lengths, scaling)
    sees = step.sees()
    n = sees.shape[-1]
    return F.scaled_dot_product_attention(query, keys[:, :, :n], values[:, :, :n], attn_mask=sees,
                                          scale=scaling, enable_gqa=True).transpose(1, 2)


def vision_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                     scaling: float | None = None, cu_seq_lens_q: Tensor | None = None,
                     max_length_q: int | None = None, **_) -> tuple[Tensor, None]:
    """Attention inside the vision tower's windows, in one call: (1, H, L, D) -> (1, L, H, D)."""
    if has_varlen(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cu = cu_seq_lens_q
        return varlen_attn(q, k, v, cu, cu, max_length_q, max_length_q)[None], None
    lengths = cu_seq_lens_q.diff()
    out = torch.empty_like(query)
    for n in lengths.unique().tolist():                 # windows of one size make one batch
        starts = cu_seq_lens_q[:-1][lengths == n, None]
        index = (starts + torch.arange(n, device=query.device)).flatten()
        q, k, v = (x[0][:, index].unflatten(1, (-1, n)).transpose(0, 1)         # (W, H, n, D)
                   for x in (query, key, value))
        got = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out = out.index_copy(2, index, got.transpose(0, 1).flatten(1, 2)[None])
    return out.transpose(1, 2), None


# transformers hands a vision attention all windows at once only if its name holds "flash"
NAMES = {"text_config": "shared_prompt", "vision_config": "flash_windows"}
AttentionInterface.register(NAMES["text_config"], text_attention)
AttentionInterface.register(NAMES["vision_config"], vision_attention)
GROUPED = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or ()) else {}
