"""Starts with nothing compiled, several at once."""

import subprocess
import time

import torch
from launch import ROOT, clips, command, environment, steps_of  # noqa: F401


def test_five_cold_starts_finish_and_end(clips, tmp_path):
    """Each with compilation caches of its own: whatever inductor's timings decide, no run may
    die of it, and each process is gone within 10 s of its last step. They have the 3B's width
    and two layers and blocks, so that several can go at once; then one starts warm."""
    runs, waiting = {}, list(range(5))
    memory = torch.cuda.get_device_properties(0).total_memory
    together = max(1, min(5, memory // (27 << 30)))     # half of it is for other tests
    try:
        while waiting or runs:
            while waiting and len(runs) < together:
                k = waiting.pop(0)
                runs[k] = cold_start(k, clips, tmp_path)
            for k, run in list(runs.items()):
                if run.poll() is None:
                    check_that_it_ends(tmp_path / f"run{k}" / "log.jsonl")
                else:
                    assert run.returncode == 0, (tmp_path / f"output.run{k}").read_text()[-6000:]
                    assert len(steps_of(tmp_path / f"run{k}")) == 3
                    del runs[k]
            time.sleep(0.2)
    finally:
        for run in runs.values():
            run.terminate()
    cold = [steps_of(tmp_path / f"run{k}")[0]["seconds"] for k in range(5)]
    assert cold_start(1, clips, tmp_path, "warm").wait(120) == 0
    warm = steps_of(tmp_path / "warm")[0]["seconds"]
    print(f"first steps, s: cold {[round(s, 1) for s in cold]} at once; warm {warm:.1f}")
    assert warm < 0.7 * min(cold)


def check_that_it_ends(log) -> None:
    """A run that has logged its last step may live 10 s more."""
    if log.exists() and len(log.read_text().splitlines()) == 3:
        assert time.time() - log.stat().st_mtime < 10, f"{log} is complete, but its run did not end"


def cold_start(k: int, clips, folder, name: str = "") -> subprocess.Popen:
    name = name or f"run{k}"
    options = "--max_steps 3 --max_new_tokens 192 --G 8"
    arguments = command(clips, folder / name, options, model="random:3b/2")
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{k}",
              "TRITON_CACHE_DIR": f"{folder}/triton{k}"}
    with open(folder / f"output.{name}", "w") as output:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output,
                                env=environment(**caches))
