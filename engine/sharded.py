"""AdamW with fp32 master weights and moments, sharded over the ranks (ZeRO stage 1, Rajbhandari et
al. 2020).

bf16 keeps 8 bits of a weight, so most updates of 2e-6 would round away; the optimizer therefore
keeps every weight in fp32 and the model's copy is rounded from it. The model's weights live in one
flat buffer, cut into equal shards: each rank updates its shard, and one all-gather brings every
rank the rest. `offload` keeps the fp32 state (12 bytes a weight) in pinned host memory; parts of it
visit the GPU for the step, the next part arriving while one is computed and the last one leaves
(ZeRO-Offload, Ren et al. 2021, has the CPU compute).
"""

from dataclasses import dataclass
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

AT_ONCE = 1 << 26  # weights of a part: 256 MiB in fp32, a power of two as pinned memory comes in
ALIGN = 64              # weights start at multiples of 128 bytes (bf16), as kernels like them
MOST_RANKS = 4096


def flatten(module: nn.Module, device: torch.device | str) -> None:
    """Move the parameters of `module` to `device`, into one buffer `module.flat`: matrices first,
    then vectors.

    One buffer can be cut into equal shards and gathered by one collective. Its order makes
    neighbours of weights that multiply the same input (q, k, v; gate, up), so decoding can multiply
    them at once.
    """
    params = sorted(module.parameters(), key=lambda p: p.ndim < 2)
    sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
    spare = MOST_RANKS * ALIGN  # so that the last shard is as long as the others
    module.flat = torch.zeros(sum(sizes) + spare, dtype=params[0].dtype, device=device)
    with torch.no_grad():
        for p, part in zip(params, module.flat.split([*sizes, spare])):
            view = part[:p.numel()].view_as(p)
            view.copy_(p)
            p.data = view
    module.to(device)                                   # what is left: the buffers


@dataclass
class Part:
    """Up to AT_ONCE weights whose state is stepped together."""
    state: list[Tensor]                 # master weights, first and second moments, each (n,) fp32
    pieces: list[tuple[nn.Parameter, int, int, int]]    # parameter, from, to; where in the state


class ShardedAdamW:
    """AdamW over the parameters of a flattened module that have gradients. Norms and biases are not
    decayed.

    With the gradients averaged over the ranks already (DDP), `step` makes the same update on every
    rank.
    """

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
        mine = []  # (parameter, from, to) of this rank's weights
        for p, start in zip(self.params, starts):
            a, b = max(self.low - start, 0), min(self.high - start, p.numel())
            if p.requires_grad and a < b:
                mine.append((p, a, b))
        device = self.flat.device
        visiting = offload and device.type == "cuda"
        home = torch.device("cpu") if offload else device
        self.parts = [part_of(pieces, home, pin=visiting) for pieces in cut(mine)]
        self.visit = Visits(device) if visiting else None

    def zero_grad(self) -> None:
        for p in self.params:
            if self.world > 1 and p.grad is not None:
                p.grad.zero_()                          # stays in DDP's bucket
            else:
                p.grad = None

    def grad_norm(self) -> float:
        """L2 norm of the whole gradient, the same number on every rank; nan or inf if any part
        of it is."""
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
        """One update with the gradients times `scale`; afterwards every rank holds the same
        weights."""
        self.lr, self.steps = lr, self.steps + 1
        if self.visit is not None:
            self.visit.all(self.parts, lambda part, state: self.update(part, state, scale))
        else:
            for part in self.parts:
                self.update(part, part.state, scale)
        if self.world > 1:
            dist.all_gather_into_tensor(self.flat, self.flat[self.low:self.high].clone())

    def update(self, part: Part, state: list[Tensor], scale: float) -> None:
        """Step one part, whose state is (perhaps a copy of) `state`, and round its master
        weights into the model."""
        for p, a, b, at in part.pieces:
            if p.grad is not None:
                master, m, v = (x[at:at + b - a] for x in state)
                self.adamw(master, m, v, p.grad.view(-1)[a:b].float() * scale, p.ndim > 1)
                p.view(-1)[a:b] = master

    def adamw(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, decayed: bool) -> None:
        """Loshchilov and Hutter 2019, algorithm 2, in place; operations ordered as in
        torch.optim.AdamW."""
        b1, b2 = self.betas
        if decayed:
            w.mul_(1 - self.lr * self.weight_decay)
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        spread = (v.sqrt() / sqrt(1 - b2 ** self.steps)).add_(self.eps)
        w.addcdiv_(m, spread, value=-self.lr / (1 - b1 ** self.steps))

    def state_dict(self) -> dict:
        """This rank's shard."""
        if self.visit is not None:
            torch.cuda.synchronize()
        return {"state": [part.state for part in self.parts], "steps": self.steps,
                "rank": self.rank, "world": self.world}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up a shard saved by the same rank of as many. The model's own weights come from
        its checkpoint."""
        if (state["rank"], state["world"]) != (self.rank, self.world):
            raise ValueError(f"the optimizer state is that of rank {state['rank']} of "
                             f"{state['world']}, this is rank {self.rank} of {self.world}")
        for part, saved in zip(self.parts, state["state"], strict=True):
            for own, other in zip(part.state, saved, strict=True):
                own.copy_(other)
        self.steps = state["steps"]


def cut(mine: list[tuple[nn.Parameter, int, int]]) -> list[list[tuple[nn.Parameter, int, int]]]:
    """The same weights in order, in lists of at most AT_ONCE."""
    lists, room = [], 0
    for p, a, b in mine:
        while a < b:
            if room == 0:
                lists.append([])
                room = AT_ONCE
            take = min(room, b - a)
            lists[-1].append((p, a, a + take))
            a, room = a + take, room - take
    return lists


def part_of(pieces: list[tuple[nn.Parameter, int, int]], device: torch.device, pin: bool) -> Part:
    """Fresh state of these weights: their fp32 copy, and no moments yet."""
    sizes = [b - a for _, a, b in pieces]
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    state = [torch.zeros(sum(sizes), device=device, pin_memory=pin) for _ in range(3)]
    with torch.no_grad():
        for (p, a, b), at in zip(pieces, places):
            state[0][at:at + b - a] = p.view(-1)[a:b]
    return Part(state, [(*piece, at) for piece, at in zip(pieces, places)])


class Visits:
    """Parts of host state take turns in two sets of GPU buffers: while one is stepped, the next
    arrives on a stream of its own and the last one leaves on another."""

    def __init__(self, device: torch.device):
        self.buffers = [[torch.empty(AT_ONCE, device=device) for _ in range(3)] for _ in range(2)]
        self.coming, self.going = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def all(self, parts: list[Part], update) -> None:
        """update(part, its state on the GPU) for every part, in order; what it leaves there goes
        home."""
        here = torch.cuda.current_stream()
        left = [torch.cuda.Event(), torch.cuda.Event()]
        arrived = [torch.cuda.Event(), torch.cuda.Event()]

        def fetch(k: int) -> None:
            with torch.cuda.stream(self.coming):
                self.coming.wait_event(left[k % 2])     # the part before last has gone from here
                for buffer, home in zip(self.buffers[k % 2], parts[k].state):
                    buffer[:len(home)].copy_(home, non_blocking=True)
                arrived[k % 2].record()

        self.coming.wait_stream(self.going)
        for k in range(min(1, len(parts))):
            fetch(k)
        for k, part in enumerate(parts):
            if k + 1 < len(parts):
                fetch(k + 1)
            here.wait_event(arrived[k % 2])
            update(part, self.buffers[k % 2])
            self.going.wait_stream(here)
            with torch.cuda.stream(self.going):
                for buffer, home in zip(self.buffers[k % 2], part.state):
                    home.copy_(buffer[:len(home)], non_blocking=True)
                left[k % 2].record()
        here.wait_stream(self.going)
