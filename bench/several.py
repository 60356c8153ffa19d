"""The recipe on all GPUs of a host: what a step costs, and what must hold with several ranks.

    python -m bench.several [state offload kill images evaluation]

    state       `bash train.sh 7b --dry_run`, T = 768, real steps, the state on the GPUs
    offload     the same with --offload
    kill        one rank gets SIGKILL between two checkpoints; the run is continued, and its weights
                are compared with an unbroken run's
    images      a third of the records are still images, so ranks of a step differ in what they hold
    evaluation  evaluate.py over all GPUs and on one, the same questions

`kill` and `images` take four layers of the 3B's width: they are about ranks, not speed. Writes
bench/results/N_CARD.json, such as four_h100.json.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.common import ROOT, new_results, note
from lab.dryrun import make_clips, table

N = torch.cuda.device_count()
WORDS = {1: "one", 2: "two", 4: "four", 8: "eight"}
RUNS = Path("runs/several")
SMALL = ["--model", "random:3b/4", "--max_new_tokens", "64", "--workers", "1", "--lr", "1e-4",
         "--prompts_per_step", "1"]


def start(name: str, *command: str, **environment: str) -> tuple[subprocess.Popen, Path]:
    """A command under way, and the file of what it prints."""
    printed = RUNS / f"{name}.txt"
    with open(printed, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, **environment}), printed


def finish(process: subprocess.Popen, printed: Path) -> None:
    if process.wait():
        raise SystemExit(f"{printed} ends:\n" + "\n".join(printed.read_text().splitlines()[-30:]))


def recipe(name: str, *options: str) -> dict:
    """A dry run of the 7B: seconds, memory, and the most that a card was reserved for."""
    most = [0] * N
    process, printed = start(
        name, "bash", "train.sh", "7b", "--dry_run", "--prompts_per_step", "1",
        "--max_new_tokens", "768", "--max_steps", "6", "--workers", "2", *options,
        OUT=str(RUNS / name))
    while process.poll() is None:
        used = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,"
                               "nounits"], capture_output=True, text=True).stdout.split()
        most = [max(a, int(b)) for a, b in zip(most, used)]
        time.sleep(1)
    finish(process, printed)
    return {**table(RUNS / name, 16916), "used_gib_of_each_card": [x / 1024 for x in most]}


def small_run(name: str, data: Path, steps: int, **more: str) -> tuple[subprocess.Popen, Path]:
    return start(name, sys.executable, "-m", "run.launch", "", *SMALL, "--data", str(data), "--out",
                 str(RUNS / name), "--max_steps", str(steps), "--save_every", "4", **more)


def log_of(name: str) -> list[dict]:
    file = RUNS / name / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill(data: Path) -> dict:
    finish(*small_run("unbroken", data, 8))
    process, printed = small_run("killed", data, 8)
    while len(log_of("killed")) < 6 and process.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begun = time.time()
    code = process.wait()
    ended, reached = time.time() - begun, len(log_of("killed"))
    finish(*small_run("killed", data, 8))
    a, b = (load_file(RUNS / name / "final" / "model.safetensors")
            for name in ("unbroken", "killed"))
    apart = max((a[key].float() - b[key].float()).abs().max().item() for key in a)
    went_on = re.findall(r"continuing from (\S+)", printed.read_text())
    return {"exit_code": code, "seconds_until_all_had_ended": ended, "steps_then": reached,
            "continued_from": went_on, "steps_in_the_log": len(log_of("killed")),
            "largest_difference_of_a_weight": apart,
            "weights_equal": sum(torch.equal(a[key], b[key]) for key in a) / len(a)}


def images(data: Path) -> dict:
    """Every third record becomes a still image."""
    rows = json.loads(data.read_text())
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(data.parent / "i.png")
    for row in rows[::3]:
        row.update(data_type="image", path="./i.png")
    mixed = data.with_name("mixed.json")
    mixed.write_text(json.dumps(rows))
    finish(*small_run("images", mixed, 8))
    log = log_of("images")
    return {"steps": len(log), "prompts": [row["prompts"] for row in log],
            "grad_norm": [row["grad_norm"] for row in log]}


def evaluation(data: Path) -> dict:
    """Each clip under a name of its own, since questions about one clip share a rank."""
    rows = json.loads(data.read_text())[:32 * N]
    for i, row in enumerate(rows):
        row["path"] = f"./clip-{i}.y4m"
        link = data.parent / row["path"]
        link.unlink(missing_ok=True)
        link.symlink_to(data.parent / f"{i % 2}.y4m")
    asked = data.with_name("asked.json")
    asked.write_text(json.dumps(rows))
    found, answers = {}, {}
    for ranks in (1, N):
        out = RUNS / f"answers-{ranks}"
        shutil.rmtree(out, ignore_errors=True)
        begun = time.time()
        finish(*start(f"evaluation-{ranks}", sys.executable, "-m", "torch.distributed.run",
                      "--standalone", "--nproc_per_node", str(ranks), "evaluate.py", "--model",
                      "random:7b", "--benchmark", "custom", "--data", str(asked), "--videos",
                      str(data.parent), "--out", str(out), "--frames", "16"))
        lines = (out / "predictions.jsonl").read_text().splitlines()[1:]
        answers[ranks] = {row["row"]: row["output"] for row in map(json.loads, lines)}
        found[f"seconds_on_{ranks}"] = time.time() - begun
    same = sum(answers[1][row] == answers[N].get(row) for row in answers[1])
    return {**found, "questions": len(rows), "answered": len(answers[N]), "equal_answers": same}


def main() -> None:
    asked = sys.argv[1:] or ["state", "offload", "kill", "images", "evaluation"]
    card = re.search(r"[HAB]\d+", torch.cuda.get_device_name()).group().lower()
    path = ROOT / "bench" / "results" / f"{WORDS.get(N, N)}_{card}.json"
    results = {**new_results(path), "gpus": N}
    RUNS.mkdir(parents=True, exist_ok=True)
    clips = RUNS.resolve() / "clips"
    if not clips.exists():
        make_clips(clips)
    data = clips / "data.json"
    phases = {"state": lambda: recipe("state"), "offload": lambda: recipe("offload", "--offload"),
              "kill": lambda: kill(data), "images": lambda: images(data),
              "evaluation": lambda: evaluation(data)}
    for phase in asked:
        note(results, path, **{phase: phases[phase]()})


if __name__ == "__main__":
    main()
