"""Processes: how a run of several starts, sums up and ends.

The environment says how many there are, as torchrun sets it. KTR_SHARE_GPU=1 lets several share the
first GPU and talk through gloo (NCCL refuses that): tests of two ranks then need one GPU.
"""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

# torch 2.11 has no newer names
warnings.filterwarnings("ignore", ".*(broadcast_buffers|all_gather_into_tensor)", FutureWarning)


def distributed(timeout: timedelta = timedelta(minutes=30)) -> tuple[int, int, torch.device]:
    """(rank, world size, device); NCCL on GPUs, else gloo. The timeout is for ranks that wait: for
    rank 0 to write a checkpoint to a slow disk. (If one dies, the launcher ends the others.)"""
    device, shared = torch.device("cpu"), os.environ.get("KTR_SHARE_GPU") == "1"
    if torch.cuda.is_available():
        device = torch.device("cuda", 0 if shared else int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    nccl = device.type == "cuda" and not shared
    dist.init_process_group("nccl" if nccl else "gloo", timeout=timeout,
                            device_id=device if nccl else None)
    return dist.get_rank(), dist.get_world_size(), device


def all_reduce_sum(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sums over all ranks, in one collective; every rank must bring the same names."""
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def run_program(main: Callable[[], object]) -> None:
    """main, then the end of this process; Ctrl-C is one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; run the same command again to continue") from None
    exit_process()


def exit_process() -> None:
    """End this process, whose work is done, without exit handlers and destructors: inductor's
    handler waits up to 300 s for its processes, and gloo (torch 2.13) aborts one exit in 40."""
    if dist.is_initialized():
        dist.barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for child in multiprocessing.active_children():
        child.kill()                    # they ignore SIGTERM
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
