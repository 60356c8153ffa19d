"""Whole runs on the GPU: cold starts, two ranks, interruption."""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch

from launch import ROOT, clips, command, environment, finish, steps_of  # noqa: F401


def test_five_cold_starts_finish_and_end(clips, tmp_path):
    """Each with compilation caches of its own: whatever inductor's timings decide, no run may
    die of it, and each process is gone within 10 s of its last step. They have the 3B's width
    and two layers and blocks, so that several can go at once; then one starts warm."""
    runs, waiting = {}, list(range(5))
    memory = torch.cuda.get_device_properties(0).total_memory
    together = max(1, min(5, memory // (32 << 30)))         # half of it is for other tests
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
    assert warm < max(cold)


def check_that_it_ends(log) -> None:
    """A run that has logged its last step may live 10 s more."""
    if log.exists() and len(log.read_text().splitlines()) == 3:
        assert time.time() - log.stat().st_mtime < 10, f"{log} is complete, but its run did not end"


def cold_start(k: int, clips, folder, name: str = "") -> subprocess.Popen:
    name = name or f"run{k}"
    options = f"--max_steps 3 --max_new_tokens 192 --G 8 --seed {k}"
    arguments = command(clips, folder / name, options, model="random:3b/2")
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{k}",
              "TRITON_CACHE_DIR": f"{folder}/triton{k}"}
    with open(folder / f"output.{name}", "w") as output:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output,
                                env=environment(**caches))


def test_two_ranks_end_with_the_same_weights(clips, tmp_path):
    """Five steps in which one rank has a clip and the other an image, or nothing, since its clip
    is broken."""
    arguments = command(clips, tmp_path / "run", "--lr 1e-3 --top_k 50", processes=2,
                        script="tests/gpu/watched.py")
    finish(arguments, KTR_SHARE_GPU="1", WATCH=str(tmp_path))
    weights = [(tmp_path / f"weights.{rank}").read_text().splitlines() for rank in (0, 1)]
    assert weights[0] == weights[1] and len(set(weights[0])) == 5       # they change every step
    prompts = [row["prompts"] for row in steps_of(tmp_path / "run")]
    assert len(prompts) == 5 and set(prompts) == {1, 2}                 # 1: beside a broken clip


def test_resumed_goes_on_as_an_unbroken_run_does(clips, tmp_path):
    """From the checkpoint of step 4: the same completions, rewards and gradient in step 5."""
    options = "--max_steps 6 --save_every 4 --lr 1e-3"
    whole = command(clips, tmp_path / "whole", options, script="tests/gpu/watched.py")
    finish(whole)
    unbroken = steps_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-000006")
    finish(whole)
    resumed = steps_of(tmp_path / "whole")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6] and resumed[:4] == unbroken[:4]
    x, y = unbroken[4], resumed[4]
    print(f"gradient norms of step 5: {x['grad_norm']} unbroken, {y['grad_norm']} resumed")
    assert x["reward"] == y["reward"] and x["tokens"] == y["tokens"]
    assert x["grad_norm"] > 0 and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=0.01)


def test_killed_and_started_again_ends(clips, tmp_path):
    again = command(clips, tmp_path / "run", "--max_steps 6 --save_every 2 --lr 1e-3",
                    script="tests/gpu/watched.py")
    broken = subprocess.Popen(again, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoint-000002").exists():
        assert broken.poll() is None
        time.sleep(0.02)
    kill(broken)
    finish(again)
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and all that descends from it, as a machine that goes down would."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], text=True, capture_output=True)
    parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
    doomed = {process.pid}
    while found := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= found
    for pid in doomed:
        subprocess.run(["kill", "-9", str(pid)], stderr=subprocess.DEVNULL)
    process.wait()


def test_sigterm_saves_and_leaves(clips, tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    run = subprocess.Popen(command(clips, tmp_path / "run", "--max_steps 500 --save_every 1000"),
                           cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    while not log.exists() or not log.read_text():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and "SIGTERM: left after step" in output, output[-3000:]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((saved / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    finish(command(clips, tmp_path / "run", f"--max_steps {int(saved.name[-6:]) + 1}"))
    assert len(steps_of(tmp_path / "run")) == int(saved.name[-6:]) + 1
