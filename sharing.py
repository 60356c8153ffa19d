"""Sharing the prompt: the packed row, its attention, and the cache that G completions decode from.

Scoring puts a prompt and its completions in one row, [prompt | o_1 | .. | o_G], in which every completion
sees the prompt and itself: the prompt is computed once, forward and backward. Decoding keeps one cache per
prompt whose slots after the prompt are dealt out in turn, token t of completion g in slot t*G + g, so the
G tokens of a step are G queries over the same keys.

Both reach the model through transformers' attention interface, so its own forward runs unchanged. On CUDA
the packed row is one call of torch's variable-length attention with the prompt's keys prepended to each
completion's, and decoding is one FlexAttention kernel that splits the keys over the chip; elsewhere (and for
the packed row in fp32, which that kernel does not take) both are SDPA under a mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch built without it; only CUDA needs it
    varlen_attn = None


@dataclass
class Packed:
    """Layout of packed rows: sequences 0, 1, .. are prompt 1, its completions, prompt 2, its completions, ..

    Sequence s has the queries cu_q[s]:cu_q[s+1] of the row; its keys are keys[cu_k[s]:cu_k[s+1]], the last
    of which are its own tokens, causally. `blocks` says the same for SDPA: (start, end, mask) per prompt.
    """
    cu_q: Tensor                                        # (S+1,) int32
    cu_k: Tensor                                        # (S+1,) int32
    keys: Tensor                                        # (K,) indices into the row
    max_q: int
    max_k: int
    blocks: list[tuple[int, int, Tensor]]               # mask (1, 1, n, n) bool, True where a query may look


def has_varlen(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def pack(prompt_lengths: list[int], completion_lengths: list[list[int]], embeds: Tensor) -> Packed:
    """The layout of one row that holds every prompt followed by its completions, for attention over `embeds`."""
    q_lengths, k_lengths, keys, blocks, start = [], [], [], [], 0
    for P, own in zip(prompt_lengths, completion_lengths):
        prompt, end = torch.arange(start, start + P), start + P + sum(own)
        q_lengths += [P, *own]
        k_lengths += [P, *(P + n for n in own)]
        keys.append(prompt)
        for n, tail in zip(own, torch.arange(start + P, end).split(own)):
            keys += [prompt, tail]
        if not has_varlen(embeds):
            owner = torch.repeat_interleave(torch.arange(len(own) + 1), torch.tensor([P, *own]))  # 0 is the prompt
            sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
            blocks.append((start, end, sees.tril()[None, None].to(embeds.device)))
        start = end
    cumulative = [F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(embeds.device, torch.int32) for x in (q_lengths, k_lengths)]
    return Packed(*cumulative, torch.cat(keys).to(embeds.device), max(q_lengths), max(k_lengths), blocks)


class Cache:
    """Keys and values of N prompts and of their G completions each, (N, heads, prompt + G*T, head_dim) per layer.

    Stands where transformers expects `past_key_values`: the model's attention calls `update`. Prefilling writes
    the packed prompts to `rows`, `columns`; decoding writes G tokens per prompt at `slots`.
    """

    def __init__(self, config, N: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (N, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.rows = self.columns = self.slots = None
        self.visible = length                           # decoding attends to the first `visible` slots

    def prefill(self, prompt_lengths: list[int], first: int = 0) -> None:
        """The next forward pass computes these prompts; the cache rows from `first` on take them."""
        device = self.keys[0].device
        lengths = torch.tensor(prompt_lengths)
        self.rows = torch.repeat_interleave(first + torch.arange(len(lengths)), lengths).to(device)
        self.columns = torch.cat([torch.arange(n) for n in prompt_lengths]).to(device)

    def decode(self, slots: Tensor) -> None:
        """The next forward passes compute one token of every completion; they go to `slots` (G,) of each row."""
        self.rows, self.slots = None, slots

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        if self.rows is not None:                       # key (1, heads, sum of prompts, head_dim)
            self.keys[layer][self.rows, :, self.columns] = key[0].transpose(0, 1)
            self.values[layer][self.rows, :, self.columns] = value[0].transpose(0, 1)
            return key, value
        self.keys[layer].index_copy_(2, self.slots, key)            # key (N, heads, G, head_dim)
        self.values[layer].index_copy_(2, self.slots, value)
        return self.keys[layer][:, :, :self.visible], self.values[layer][:, :, :self.visible]


def text_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packed | BlockMask | Tensor,
                   scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """Attention of the language model. query (B, H, Q, D), key and value (B, H_kv, K, D); returns (B, Q, H, D)."""
    mask = attention_mask
    if isinstance(mask, Packed):
        if has_varlen(query):
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))           # (L, heads, D)
            k, v = k.index_select(0, mask.keys), v.index_select(0, mask.keys)
            return varlen_attn(q, k, v, mask.cu_q, mask.cu_k, mask.max_q, mask.max_k,
                               window_size=(-1, 0), **GROUPED)[None], None
        rows = [F.scaled_dot_product_attention(*(x[:, :, start:end] for x in (query, key, value)),
                                               attn_mask=sees, scale=scaling, enable_gqa=True)
                for start, end, sees in mask.blocks]
        return torch.cat(rows, dim=2).transpose(1, 2), None
    if isinstance(mask, BlockMask):                     # one decoding step: the group's heads become queries, so
        B, H, Q, D = query.shape                        # that any ratio of heads gets the split-key kernel
        folded = query.reshape(B, key.shape[1], -1, D)
        out = flex_attention(folded, key, value, block_mask=mask, scale=scaling)
        return out.view(B, H, Q, D).transpose(1, 2), None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def vision_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
                     cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **_) -> tuple[Tensor, None]:
    """Attention inside the vision tower's windows, all windows in one call. query (1, H, L, D) -> (1, L, H, D)."""
    if has_varlen(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)[None], None
    lengths = cu_seq_lens_q.diff()
    out = torch.empty_like(query)
    for n in lengths.unique().tolist():                 # windows of one size make one batch
        index = (cu_seq_lens_q[:-1][lengths == n, None] + torch.arange(n, device=query.device)).flatten()
        q, k, v = (x[0][:, index].unflatten(1, (-1, n)).transpose(0, 1) for x in (query, key, value))   # (W, H, n, D)
        got = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out = out.index_copy(2, index, got.transpose(0, 1).flatten(1, 2)[None])
    return out.transpose(1, 2), None


# transformers hands a vision attention all windows at once only if its name holds "flash"
NAMES = {"text_config": "shared_prompt", "vision_config": "flash_windows"}
AttentionInterface.register(NAMES["text_config"], text_attention)
AttentionInterface.register(NAMES["vision_config"], vision_attention)
GROUPED = {"enable_gqa": True} if varlen_attn and "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
