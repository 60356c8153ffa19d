import torch
import torch.distributed as dist
from engine.sharded import distributed, leave  # TEMPORARY


def agree(ok: bool, device: torch.device) -> bool:
    """True on every rank if it is True on all of them."""
    if not dist.is_initialized():
        return ok
    flag = torch.tensor(int(ok), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
