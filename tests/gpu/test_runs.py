"""Whole runs on the GPU: two ranks, interruption. Cold starts are test_cold_starts.py's."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launch import ROOT, clips, command, environment, finish, steps_of  # noqa: F401


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
    wait_for((tmp_path / "run" / "checkpoint-000002").exists, broken)
    kill(broken)
    finish(again)
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "run").glob("log.jsonl.before-*"))          # it was not begun anew


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and all that descends from it, as a machine that goes down would."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:                                 # it has ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(after_name[1])
    doomed = {process.pid}
    while found := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= found
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process: subprocess.Popen, limit: float = 120) -> None:
    """Until the condition holds, while the process lives; it is killed after `limit` seconds."""
    begun = time.time()
    while not condition():
        assert process.poll() is None, "the run ended too early"
        if time.time() - begun > limit:
            kill(process)
            pytest.fail(f"waited for {limit} s")
        time.sleep(0.02)


def test_sigterm_saves_and_leaves(clips, tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "output", "w") as output:
        run = subprocess.Popen(
            command(clips, tmp_path / "run", "--max_steps 500 --save_every 1000"),
            cwd=ROOT, env=environment(), stdout=output, stderr=output)
    wait_for(lambda: log.exists() and log.read_text(), run)
    run.send_signal(signal.SIGTERM)
    run.wait(60)
    output = (tmp_path / "output").read_text()
    assert run.returncode != 0 and "stopped after step" in output, output[-3000:]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((saved / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    finish(command(clips, tmp_path / "run", f"--max_steps {int(saved.name[-6:]) + 1}"))
    assert len(steps_of(tmp_path / "run")) == int(saved.name[-6:]) + 1
    assert not list((tmp_path / "run").glob("log.jsonl.before-*"))
