"""Kernels of a decoding step on CUDA: attention over a shared prompt, and products of few rows.

`attend` is FlashDecoding (Dao et al. 2023): programs share out the slots in use, whose number they
read on the GPU, so that a captured graph serves every length; a second kernel joins their sums. The
query heads of a key head and the G completions are the rows of one product: each key is read once.
`thin_linear` reads the weights at full speed; cuBLAS reaches 55 to 90% of it with 8 rows. The
weights are the large operand, several blocks in flight per processor, and sums are cut where blocks
are few. Both add in the same order every time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:     # a torch for CPUs only
    triton = None

TILE_ROWS = 64          # rows of one program of `attend`
MOST_PARTS = 64         # of a prompt's slots
PROGRAMS = 132          # that fill a Hopper GPU
THIN_ROWS = 64          # more rows are cuBLAS's
N_BLOCK, K_BLOCK = 64, 128
BLOCKS = 256            # that fill the GPU; fewer are cut along K


def attend(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, room: int, lengths: Tensor,
           scale: float | None) -> Tensor:
    """(N, G, H, D), from query (N, H, G, D), keys and values (N, H_kv, slots, D), D a power of 2.
    bf16, fp16 or fp32; no gradient. The slots are those of packing.Step: the new tokens' are
    `slots` (G,), the last ones seen."""
    N, H, G, D = query.shape
    heads, length = keys.shape[1:3]
    rows = H // heads * G
    tiles = -(-rows // TILE_ROWS)
    parts = min(MOST_PARTS, max(1, round(PROGRAMS / (N * heads * tiles))))
    slots_at_once, stages = (16, 2) if query.dtype == torch.float32 else (64, 3)    # by registers
    # of each part: its highest score m, sum of exp(score - m), and sum of exp(score - m) * value
    shape, fp32 = (N * heads, parts, rows), {"dtype": torch.float32, "device": query.device}
    tops, masses = torch.empty(shape, **fp32), torch.empty(shape, **fp32)
    sums, out = torch.empty(*shape, D, **fp32), query.new_empty(N, G, H, D)
    log2 = (scale or D ** -0.5) * math.log2(math.e)
    height = max(16, triton.next_power_of_2(min(rows, TILE_ROWS)))
    partial_attention[(parts, N * heads, tiles)](
        query.contiguous(), keys, values, slots, lengths, sums, tops, masses, room, heads, length,
        rows, G, log2, D, height, slots_at_once, num_warps=4, num_stages=stages)
    join[(rows, N * heads)](sums, tops, masses, out, heads, rows, parts, G, D,
                            triton.next_power_of_2(parts), num_warps=2)
    return out


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x (.., K), weight (N, K), bias (N,)): by the kernel for up to 64 rows on CUDA, in
    half precision, without gradients."""
    rows, (N, K) = x.numel() // x.shape[-1], weight.shape
    fits = triton is not None and x.is_cuda and x.dtype != torch.float32 and K % K_BLOCK == 0
    if torch.is_grad_enabled() or not fits or rows > THIN_ROWS:
        return F.linear(x, weight, bias)
    blocks, steps, parts = -(-N // N_BLOCK), K // K_BLOCK, 1
    while blocks * parts * 2 <= BLOCKS and steps % 2 == 0:
        parts, steps = parts * 2, steps // 2
    sums = torch.empty(parts, rows, N, dtype=torch.float32, device=x.device)
    partial_sums[(blocks, parts)](
        x.contiguous(), weight, sums, rows, N, K, steps, max(16, triton.next_power_of_2(rows)),
        N_BLOCK, K_BLOCK, num_warps=4, num_stages=4)
    y = sums.sum(0)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], N)


if triton is not None:
    @triton.jit
    def partial_attention(query, keys, values, slots, lengths, sums, tops, masses, room, heads,
                          length, rows, G, LOG2: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                          SLOTS: tl.constexpr):
        part, head, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        prompt = tl.load(lengths + head // heads).to(tl.int32)
        used = prompt + tl.load(slots).to(tl.int32) - room + G          # by all completions
        share = tl.cdiv(tl.cdiv(used, parts), SLOTS) * SLOTS
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, D)
        keys += head.to(tl.int64) * length * D
        values += head.to(tl.int64) * length * D
        x = tl.load(query + (head * rows + row[:, None]) * D + d, mask=row[:, None] < rows,
                    other=0.0)
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, D), tl.float32)
        for begin in range(part * share, tl.minimum(part * share + share, used), SLOTS):
            i = begin + tl.arange(0, SLOTS)
            own = i - prompt                            # from 0 on it is a completion's
            at = tl.where(own < 0, i, room + own)[:, None] * D + d
            k = tl.load(keys + at, mask=i[:, None] < used, other=0.0)
            v = tl.load(values + at, mask=i[:, None] < used, other=0.0)
            sees = (own < 0)[None, :] | (own[None, :] % G == row[:, None] % G)
            score = tl.dot(x, tl.trans(k), input_precision="ieee") * LOG2
            score = tl.where(sees & (i < used)[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)     # has it seen anything?
            p, shrink = tl.exp2(score - finite[:, None]), tl.exp2(top - finite)
            mass = mass * shrink + tl.sum(p, 1)
            total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
            top = higher
        at = (head * parts + part) * rows + row
        tl.store(tops + at, top, mask=row < rows)
        tl.store(masses + at, mass, mask=row < rows)
        tl.store(sums + at[:, None] * D + d, total, mask=row[:, None] < rows)

    @triton.jit
    def join(sums, tops, masses, out, heads, rows, parts, G, D: tl.constexpr, PARTS: tl.constexpr):
        row, head = tl.program_id(0), tl.program_id(1)
        part, d = tl.arange(0, PARTS), tl.arange(0, D)
        at = (head * parts + part) * rows + row
        top = tl.load(tops + at, mask=part < parts, other=-float("inf"))
        weight = tl.exp2(top - tl.max(top, 0))
        mass = tl.sum(weight * tl.load(masses + at, mask=part < parts, other=0.0), 0)
        x = tl.load(sums + at[:, None] * D + d, mask=part[:, None] < parts, other=0.0)
        y = tl.sum(weight[:, None] * x, 0) / mass
        # row = query head * G + completion, of the heads that share a key head
        n, first = head // heads, head % heads * (rows // G)
        place = ((n * G + row % G) * heads * (rows // G) + first + row // G) * D
        tl.store(out + place + d, y)

    @triton.jit
    def partial_sums(x, w, out, rows, N, K, steps, ROWS: tl.constexpr, N_BLOCK: tl.constexpr,
                     K_BLOCK: tl.constexpr):
        n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
        r = tl.arange(0, ROWS)
        k = tl.program_id(1) * steps * K_BLOCK + tl.arange(0, K_BLOCK)
        w += n[:, None] * K + k[None, :]
        x += r[None, :] * K + k[:, None]
        total = tl.zeros((N_BLOCK, ROWS), tl.float32)
        for _ in range(steps):
            weights = tl.load(w, mask=n[:, None] < N, other=0.0, eviction_policy="evict_first")
            total = tl.dot(weights, tl.load(x, mask=r[None, :] < rows, other=0.0), total)
            w += K_BLOCK
            x += K_BLOCK
        out += (tl.program_id(1) * rows + r[None, :]) * N + n[:, None]
        tl.store(out, total, mask=(r[None, :] < rows) & (n[:, None] < N))
