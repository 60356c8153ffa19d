"""AdamW with fp32 master weights and moments, sharded over the ranks (ZeRO 1, Rajbhandari 2020).

bf16 keeps 8 bits of a weight, so most updates of 2e-6 would round away: the optimizer keeps every
weight in fp32, and the model's copy is rounded from it. The model's weights live in one flat
buffer, cut into equal shards: each rank updates its own, and one all-gather brings it the rest.
`offload` keeps the fp32 state (12 bytes a weight) in pinned host memory; parts of it visit the GPU
for the step in turn (ZeRO-Offload, Ren et al. 2021, has the CPU compute).
"""

from collections.abc import Iterator
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

AT_ONCE = 1 << 26       # weights of a part: 256 MiB in fp32; pinned memory comes in powers of two
ALIGN = 64              # weights start at multiples of 128 bytes (bf16), as kernels like them
MOST_RANKS = 4096


def flatten(module: nn.Module, device: torch.device | str) -> None:
    """Move the parameters of `module` to `device`, into one buffer `module.flat`: matrices first,
    then vectors. So weights that multiply the same input (q, k, v; gate, up) are neighbours, which
    decoding multiplies at once."""
    params = sorted(module.parameters(), key=lambda p: p.ndim < 2)
    sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
    spare = MOST_RANKS * ALIGN                          # the last shard is as long as the others
    module.flat = torch.zeros(sum(sizes) + spare, dtype=params[0].dtype, device=device)
    with torch.no_grad():
        for p, part in zip(params, module.flat.split([*sizes, spare])):
            p.data = part[:p.numel()].view_as(p).copy_(p)
    module.to(device)                                   # what is left: the buffers


class Part:
    """Up to AT_ONCE weights whose state is stepped together; at first, without moments."""

    def __init__(self, pieces: list[tuple], device: torch.device, pin: bool):
        self.pieces = pieces                            # (parameter, from, to, place in the state)
        size = sum(b - a for _, a, b, _ in pieces)
        # master weights, first and second moments, each (n,) fp32
        self.state = [torch.zeros(size, device=device, pin_memory=pin) for _ in range(3)]
        with torch.no_grad():
            for p, a, b, at in pieces:
                self.state[0][at:at + b - a] = p.view(-1)[a:b]


class ShardedAdamW:
    """AdamW over the parameters of a flattened module that have gradients, averaged over the ranks
    already (DDP). Norms and biases are not decayed."""

    def __init__(self, module: nn.Module, lr: float, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 offload: bool = False):
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.steps = 0
        self.params = sorted(module.parameters(), key=lambda p: p.ndim < 2)
        starts = [p.storage_offset() for p in self.params]
        total = starts[-1] + self.params[-1].numel()
        size = -(-total // (self.world * ALIGN)) * ALIGN
        self.flat = module.flat[:size * self.world]
        self.low, self.high = self.rank * size, (self.rank + 1) * size
        spans = [(p, max(self.low - start, 0), min(self.high - start, p.numel()))
                 for p, start in zip(self.params, starts)]
        mine = [(p, a, b) for p, a, b in spans if p.requires_grad and a < b]
        device = self.flat.device
        visiting = offload and device.type == "cuda"
        home = torch.device("cpu") if offload else device
        self.parts = [Part(pieces, home, pin=visiting) for pieces in cut(mine)]
        self.host_state = HostState(device) if visiting else None

    def zero_grad(self) -> None:
        for p in self.params:
            if self.world > 1 and p.grad is not None:
                p.grad.zero_()                          # stays in DDP's bucket
            else:
                p.grad = None

    def grad_norm(self) -> float:
        """L2 norm of the whole gradient, the same on all ranks; nan or inf if any part of it is."""
        squares = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for part in self.parts:
            for p, a, b, _ in part.pieces:
                if p.grad is not None:
                    norm = torch.linalg.vector_norm(p.grad.view(-1)[a:b], dtype=torch.float32)
                    squares += norm.double().square()
        if self.world > 1:
            dist.all_reduce(squares)
        return squares.sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with the gradients times `scale`; every rank then has the same weights."""
        self.lr, self.steps = lr, self.steps + 1
        at_home = ((part, part.state) for part in self.parts)
        for part, state in self.host_state.visit(self.parts) if self.host_state else at_home:
            for p, a, b, at in part.pieces:
                if p.grad is not None:
                    master, m, v = (x[at:at + b - a] for x in state)
                    self.adamw(master, m, v, p.grad.view(-1)[a:b].float() * scale, p.ndim > 1)
                    p.view(-1)[a:b] = master            # rounded
        if self.world > 1:
            dist.all_gather_into_tensor(self.flat, self.flat[self.low:self.high].clone())

    def adamw(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, decayed: bool) -> None:
        """Loshchilov and Hutter 2019, algorithm 2, in place, in torch.optim.AdamW's order."""
        b1, b2 = self.betas
        if decayed:
            w.mul_(1 - self.lr * self.weight_decay)
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        spread = (v.sqrt() / sqrt(1 - b2 ** self.steps)).add_(self.eps)
        w.addcdiv_(m, spread, value=-self.lr / (1 - b1 ** self.steps))

    def state_dict(self) -> dict:
        """This rank's shard."""
        if self.host_state is not None:
            torch.cuda.synchronize()
        return {"state": [part.state for part in self.parts], "steps": self.steps,
                "rank": self.rank, "world": self.world}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up a shard saved by the same rank of as many, else ValueError. The model's own
        weights come from its checkpoint."""
        if (state["rank"], state["world"]) != (self.rank, self.world):
            raise ValueError(f"the optimizer state is that of rank {state['rank']} of "
                             f"{state['world']}, this is rank {self.rank} of {self.world}")
        for part, saved in zip(self.parts, state["state"], strict=True):
            for own, other in zip(part.state, saved, strict=True):
                own.copy_(other)
        self.steps = state["steps"]


def cut(mine: list[tuple[nn.Parameter, int, int]]) -> list[list[tuple]]:
    """The same weights in order, as `pieces` of parts of at most AT_ONCE."""
    lists, at = [], AT_ONCE
    for p, a, b in mine:
        while a < b:
            if at == AT_ONCE:
                lists.append([])
                at = 0
            end = min(b, a + AT_ONCE - at)
            lists[-1].append((p, a, end, at))
            a, at = end, at + end - a
    return lists


class HostState:
    """Parts of host state take turns in two sets of GPU buffers: while one is stepped, the next
    arrives on a stream of its own and the last one leaves on another."""

    def __init__(self, device: torch.device):
        self.buffers = [[torch.empty(AT_ONCE, device=device) for _ in range(3)] for _ in range(2)]
        self.coming, self.going = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def visit(self, parts: list[Part]) -> Iterator[tuple[Part, list[Tensor]]]:
        """Every part and its state on the GPU; what the caller leaves there goes home."""
        here = torch.cuda.current_stream()
        left, arrived = ([torch.cuda.Event(), torch.cuda.Event()] for _ in range(2))

        def fetch(k: int) -> None:
            with torch.cuda.stream(self.coming):
                self.coming.wait_event(left[k % 2])     # the part before last has gone from here
                for buffer, home in zip(self.buffers[k % 2], parts[k].state):
                    buffer[:len(home)].copy_(home, non_blocking=True)
                arrived[k % 2].record()

        self.coming.wait_stream(self.going)
        if parts:
            fetch(0)
        for k, part in enumerate(parts):
            if k + 1 < len(parts):
                fetch(k + 1)
            here.wait_event(arrived[k % 2])
            yield part, self.buffers[k % 2]
            self.going.wait_stream(here)
            with torch.cuda.stream(self.going):
                for buffer, home in zip(self.buffers[k % 2], part.state):
                    home.copy_(buffer[:len(home)], non_blocking=True)
                left[k % 2].record()
        here.wait_stream(self.going)
