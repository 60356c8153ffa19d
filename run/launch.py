"""The recipe on this node: checks, then a process for each GPU, then what shows the result.

    python -m run.launch "lab.report OUT" [options of ktr.py]       ("": nothing is shown)

torchrun starts the processes. Left alone, it answers SIGTERM and Ctrl-C by killing them after 30 s,
in which a checkpoint of the 7B is not written, and ends every failure with a traceback of its own.
Here a signal goes to the processes, which save and end by themselves, and the last line is theirs.
From the environment: NPROC (all GPUs), DEVICE=cpu, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

KTR = str(Path(__file__).resolve().parent.parent / "ktr.py")


def processes() -> list[int]:
    """Process ids of this process's children that run ktr.py."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and KTR.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:                                 # it has ended meanwhile
            continue
    return found


def rendezvous(nproc: int) -> list[str]:
    """torchrun's options for this node."""
    nodes = os.environ.get("NNODES", "1")
    if nodes == "1":
        return ["--nproc_per_node", str(nproc), "--standalone"]
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if name not in os.environ:
            raise SystemExit(f"error: {name} is not set")
    return ["--nproc_per_node", str(nproc), "--nnodes", nodes,
            "--node_rank", os.environ["NODE_RANK"], "--master_addr", os.environ["MASTER_ADDR"],
            "--master_port", os.environ.get("MASTER_PORT", "29500")]


def train(torchrun: list[str], options: list[str]) -> int:
    """Run ktr.py under torchrun; the exit code."""
    heard = []

    def hand_on(number: int, _) -> None:
        heard.append(number)
        for process in processes():
            os.kill(process, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    logging.disable(logging.CRITICAL)
    try:
        task = run.parse_args(["--signals_to_handle", "SIGQUIT", *torchrun, KTR])
        task.training_script_args = options     # not parsed: --signals is short for one of its own
        run.run(task)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == -signal.SIGKILL:
            print(f"rank {rank} of this node was killed; was memory short?", file=sys.stderr)
        return 128 + heard[0] if heard else 1
    return 0


def main() -> int:
    shown, options = sys.argv[1].split(), sys.argv[2:]
    gpus = torch.cuda.device_count()
    if gpus == 0 and os.environ.get("DEVICE") != "cpu":
        raise SystemExit("error: no GPU found; the 7B recipe needs some (MODEL=cold_start "
                         "DEVICE=cpu tries it with a tiny model)")
    nproc = int(os.environ.get("NPROC") or gpus or 1)
    torchrun = rendezvous(nproc)
    environment = {**os.environ, "LOCAL_WORLD_SIZE": str(nproc)}
    checked = subprocess.run([sys.executable, KTR, *options, "--check"], env=environment)
    code = checked.returncode or train(torchrun, options)
    if code or not shown or os.environ.get("NODE_RANK", "0") != "0":
        return code
    return subprocess.run([sys.executable, "-P", "-m", *shown]).returncode


if __name__ == "__main__":
    sys.exit(main())
