"""AdamW with fp32 master weights and moments, sharded over the ranks (ZeRO stage 1, Rajbhandari et al. 2020).

bf16 keeps 8 bits of a weight, so most updates of 2e-6 would round away; the optimizer therefore keeps every
weight in fp32 and the model's copy is rounded from it. The model's weights live in one flat buffer, cut into
equal shards: each rank updates its shard, and one all-gather brings every rank the rest. torch ships
ZeroRedundancyOptimizer, but it steps in the weights' own precision and sends them tensor by tensor.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

AT_ONCE = 1 << 28       # weights whose fp32 gradients exist at once: 1 GiB
ALIGN = 64              # weights start at multiples of 128 bytes (bf16), as kernels like them
MOST_RANKS = 4096


def distributed(timeout: timedelta = timedelta(minutes=30)) -> tuple[int, int, torch.device]:
    """(rank, world size, device): one process, or as many as torchrun started; NCCL on GPUs, else gloo.

    The timeout is for ranks that wait: for rank 0 to write a checkpoint to a slow disk, say. A rank that raises or dies
    does not need it; torchrun ends the others then.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    return dist.get_rank(), dist.get_world_size(), device


def leave() -> None:
    """End this process, one of several, when its work is done.

    Under torch 2.13, gloo's destructors abort about one exit in 40 ("terminate called without an active exception"),
    which torchrun takes for a failure of the whole run; so they do not get to run.
    """
    if dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "gloo":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        dist.destroy_process_group()


def flatten(module: nn.Module, device: torch.device | str) -> None:
    """Move the parameters of `module` to `device`, into one buffer `module.flat`: matrices first, then vectors.

    One buffer can be cut into equal shards and gathered by one collective. Its order makes neighbours of weights
    that multiply the same input (q, k, v; gate, up), so decoding can multiply them at once (policy.py).
    """
    params = sorted(module.parameters(), key=lambda p: p.ndim < 2)
    sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
    module.flat = torch.zeros(sum(sizes) + MOST_RANKS * ALIGN, dtype=params[0].dtype, device=device)     # shards end alike
    with torch.no_grad():
        for p, part in zip(params, module.flat.split([*sizes, MOST_RANKS * ALIGN])):
            view = part[:p.numel()].view_as(p)
            view.copy_(p)
            p.data = view
    module.to(device)                                   # what is left: the buffers


class ShardedAdamW:
    """AdamW over the parameters of a flattened module. Norms and biases are not decayed.

    With the parameters' gradients averaged over the ranks already (DDP), `step` makes the same update on every
    rank. shards > world size holds and updates only the first of them: for measuring memory, not for training.
    """

    def __init__(self, module: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, shards: int | None = None, offload=False):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.params = sorted((p for p in module.parameters() if p.requires_grad), key=lambda p: p.ndim < 2)
        first = self.params[0]
        starts = [(p.data_ptr() - module.flat.data_ptr()) // first.element_size() for p in self.params]
        total = starts[-1] + self.params[-1].numel()
        size = -(-total // ((shards or self.world) * ALIGN)) * ALIGN
        self.flat = module.flat[:size * (shards or self.world)]
        self.low, self.high = self.rank * size, (self.rank + 1) * size
        self.pieces = []                                # (parameter, from, to, fp32 master of that part), this rank's
        for p, start in zip(self.params, starts):
            a, b = max(self.low - start, 0), min(self.high - start, p.numel())
            if a < b:
                self.pieces.append((p, a, b, p.detach().view(-1)[a:b].float().clone()))
        groups = [{"params": [m for p, _, _, m in self.pieces if (p.ndim > 1) == decayed], "weight_decay": wd}
                  for decayed, wd in ((True, weight_decay), (False, 0.0))]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]] or [torch.zeros(1)], lr=lr, betas=betas, eps=eps,
                                      fused=first.is_cuda)

    def zero_grad(self) -> None:
        for p in self.params:
            if self.world > 1 and p.grad is not None:
                p.grad.zero_()                          # stays in DDP's bucket
            else:
                p.grad = None

    def grad_norm(self) -> float:
        """L2 norm of the whole gradient, the same number on every rank; nan or inf if any part of it is."""
        squares = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for p, a, b, _ in self.pieces:
            if p.grad is not None:
                squares += torch.linalg.vector_norm(p.grad.view(-1)[a:b], dtype=torch.float32).double().square()
        if self.world > 1:
            dist.all_reduce(squares)
        return squares.sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with the gradients times `scale`; afterwards every rank holds the same weights."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        pieces = list(self.pieces)
        while pieces:
            part, size = [], 0
            while pieces and (not part or size + pieces[0][3].numel() <= AT_ONCE):
                part.append(pieces.pop(0))
                size += part[-1][3].numel()
            for p, a, b, master in part:
                master.grad = None if p.grad is None else p.grad.view(-1)[a:b] * scale if p.dtype == torch.float32 else p.grad.view(-1)[a:b].float().mul_(scale)
            self.adam.step()                            # of those that have a gradient
            for p, a, b, master in part:
                master.grad = None
                p.view(-1)[a:b] = master
        if self.world > 1:
            dist.all_gather_into_tensor(self.flat, self.flat[self.low:self.high].clone())

    def state_dict(self) -> dict:
        """This rank's shard."""
        return {"masters": [m for *_, m in self.pieces], "adam": self.adam.state_dict(),
                "rank": self.rank, "world": self.world}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up a shard saved by the same rank of as many. The model's own weights come from the same checkpoint."""
        if (state["rank"], state["world"]) != (self.rank, self.world):
            raise ValueError(f"the optimizer state is that of rank {state['rank']} of {state['world']}, "
                             f"this is rank {self.rank} of {self.world}")
        for (p, a, b, master), saved in zip(self.pieces, state["masters"], strict=True):
            master.copy_(saved)
        self.adam.load_state_dict(state["adam"])
