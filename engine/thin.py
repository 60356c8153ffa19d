"""Products of few rows, as decoding has them: as fast as the weights can be read.

cuBLAS reaches 55 to 90% of the bandwidth with 8 rows, least on the small matrices; this kernel
takes the weights as the large operand, several blocks in flight per processor, and cuts the sum
where rows are few. The partial sums are added by whatever the compiler fuses them with, always in
the same order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:     # a torch for CPUs only
    triton = None

MOST_ROWS = 64          # more are cuBLAS's
N_BLOCK, K_BLOCK = 64, 128
ENOUGH = 256            # blocks that fill the chip; fewer are cut along K


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x (.., K), weight (N, K), bias (N,)), for up to 64 rows on CUDA in half
    precision, no gradient."""
    rows, (N, K) = x.numel() // x.shape[-1], weight.shape
    fits = triton is not None and x.is_cuda and x.dtype != torch.float32 and K % K_BLOCK == 0
    if torch.is_grad_enabled() or not fits or rows > MOST_ROWS:
        return F.linear(x, weight, bias)
    blocks, steps, parts = -(-N // N_BLOCK), K // K_BLOCK, 1
    while blocks * parts * 2 <= ENOUGH and steps % 2 == 0:
        parts, steps = parts * 2, steps // 2
    sums = torch.empty(parts, rows, N, dtype=torch.float32, device=x.device)
    partial_sums[(blocks, parts)](
        x.contiguous(), weight, sums, rows, N, K, steps, max(16, triton.next_power_of_2(rows)),
        N_BLOCK, K_BLOCK, num_warps=4, num_stages=4)
    y = sums.sum(0)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], N)


if triton is not None:
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
