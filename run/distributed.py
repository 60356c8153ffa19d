"""Processes: how a run of several starts, sums up and ends.

torchrun says how many there are; without it there is one. KTR_SHARE_GPU=1 lets several processes
share the first GPU and talk through gloo (NCCL refuses that): tests of two ranks then need one GPU.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def distributed(timeout: timedelta = timedelta(minutes=30)) -> tuple[int, int, torch.device]:
    """(rank, world size, device); NCCL on GPUs, else gloo.

    The timeout is for ranks that wait: for rank 0 to write a checkpoint to a slow disk, say. A rank
    that raises or dies does not need it; torchrun ends the others then.
    """
    if not torch.cuda.is_available():
        device, backend = torch.device("cpu"), "gloo"
    elif os.environ.get("KTR_SHARE_GPU") == "1":
        device, backend = torch.device("cuda", 0), "gloo"
    else:
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    dist.init_process_group(backend, timeout=timeout,
                            device_id=device if backend == "nccl" else None)
    return dist.get_rank(), dist.get_world_size(), device


def all_reduce_sum(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sums over all ranks, in one collective; every rank must bring the same names."""
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def wait_for_nccl(device: torch.device) -> None:
    """Wait until finished collectives have let go of their tensors: NCCL's watchdog holds these
    until it looks at them again, ten times a second."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        time.sleep(1)


def run_program(main: Callable[[], object]) -> None:
    """main, then the end of this process; Ctrl-C is one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; run the same command again to continue") from None
    exit_process()


def exit_process() -> None:
    """End this process now that its work is done: at once, without destructors and exit handlers.

    inductor's handler waits up to 300 s for its compiling processes, and under torch 2.13 gloo's
    destructors abort about one exit in 40 ("terminate called without an active exception"), which
    torchrun takes for a failure of the whole run. What a run keeps is on the disk by now.
    """
    if dist.is_initialized():
        dist.barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for child in multiprocessing.active_children():
        child.kill()                    # they ignore SIGTERM
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
