"""The recipe on this node: checks, then a process for each GPU, then what shows the result.

    python -m run.launch "lab.report OUT" [options of ktr.py]       ("": nothing is shown)

(torchrun kills its processes 30 s after SIGTERM: too soon for a checkpoint of the 7B.)
From the environment: NPROC (all GPUs), DEVICE=cpu, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

KTR = Path(__file__).resolve().parent.parent / "ktr.py"
PATIENCE = 20           # seconds that the others have to end after one has failed


def environments(nproc: int) -> list[dict[str, str]]:
    """What torch.distributed reads, for each process of this node."""
    e = {"OMP_NUM_THREADS": "1", "NNODES": "1", "MASTER_PORT": "29500", **os.environ}
    if e["NNODES"] == "1":
        with socket.create_server(("", 0)) as free:
            port = str(free.getsockname()[1])
        e |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if missing := sorted({"NODE_RANK", "MASTER_ADDR"} - e.keys()):
        raise SystemExit(f"error: {' and '.join(missing)} is not set")
    first, ranks = nproc * int(e["NODE_RANK"]), nproc * int(e["NNODES"])
    e |= {"LOCAL_WORLD_SIZE": str(nproc), "WORLD_SIZE": str(ranks)}
    return [{**e, "RANK": str(first + i), "LOCAL_RANK": str(i)} for i in range(nproc)]


def run(environments: list[dict[str, str]], options: list[str]) -> int:
    """Run ktr.py in these processes; the exit code of the first that failed, 143 after a signal."""
    # in groups of their own: Ctrl-C reaches this process alone, which hands it on
    team = [subprocess.Popen([sys.executable, KTR, *options], env=e, process_group=0)
            for e in environments]
    heard = []

    def hand_on(number: int, _) -> None:
        at_once = number == signal.SIGINT and number in heard       # no wait for a checkpoint
        for process in team:
            process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
        heard.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hand_on)
    while not any(p.poll() for p in team) and None in (p.returncode for p in team):
        time.sleep(0.2)
    code, deadline = next((p.returncode for p in team if p.returncode), 0), time.time() + PATIENCE
    for process in team:
        try:
            process.wait(max(0, deadline - time.time()))
        except subprocess.TimeoutExpired:       # it waits for the one that failed
            process.kill()
    if heard and code < 0:
        print("stopped without saving; run the same command again", file=sys.stderr)
    elif code == -signal.SIGKILL:
        print("a process of this run was killed; was memory short?", file=sys.stderr)
    return 143 if heard else code if code >= 0 else 128 - code


def main() -> int:
    shown, options = sys.argv[1].split(), sys.argv[2:]
    gpus = torch.cuda.device_count()
    if gpus == 0 and os.environ.get("DEVICE") != "cpu":
        raise SystemExit("error: no GPU found; the 7B recipe needs some (MODEL=cold_start "
                         "DEVICE=cpu tries it with a tiny model)")
    ranks = environments(int(os.environ.get("NPROC") or gpus or 1))
    code = run(ranks[:1], [*options, "--check"]) or run(ranks, options)
    if code or not shown or os.environ.get("NODE_RANK", "0") != "0":
        return code
    return subprocess.run([sys.executable, "-P", "-m", *shown]).returncode


if __name__ == "__main__":
    sys.exit(main())
