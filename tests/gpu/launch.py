"""What the tests on a GPU share: short runs of ktr.py as processes, clips, prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prompt import fit

ROOT = Path(__file__).resolve().parent.parent.parent


def command(data: Path, out: Path, more: str = "", processes: int = 1, model: str = "cold_start",
            script: str = "ktr.py") -> list[str]:
    """torchrun of a short training run on the GPU; `more` are further options, as typed."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = {"--model": model, "--data": data, "--videos": data.parent, "--out": out,
               "--max_steps": 5, "--max_new_tokens": 32, "--G": 4, "--workers": 1,
               "--save_every": 0}
    words = more.split()
    options.update(zip(words[::2], words[1::2]))
    pairs = [str(x) for pair in options.items() for x in pair]
    return [*run, "--nproc_per_node", str(processes), script, *pairs]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def finish(arguments: list[str], timeout: float = 180, **env: str) -> str:
    """Run to the end; its output. Fails with the output if it fails."""
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment(**env),
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def steps_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """data.json whose order in a run of two ranks (seed 42) gives rank 0 clips, and rank 1 an
    image or a broken clip."""
    folder = tmp_path_factory.mktemp("clips")
    subprocess.run(
        [sys.executable, "-m", "lab.dryrun", "clips", folder, "--frames", "8"],
        cwd=ROOT,
        check=True,
        env=environment(),
    )
    (folder / "broken.y4m").write_bytes((folder / "0.y4m").read_bytes()[:100])
    noise = np.random.default_rng(0).integers(0, 255, (112, 140, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    rows = json.loads((folder / "data.json").read_text())[:24]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()
    for place, index in enumerate(order):
        if place % 4 == 1:
            rows[index].update(data_type="image", path="./image.png")
        if place in (3, 7):
            rows[index]["path"] = "./broken.y4m"
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def random_prompt(processor, frames: int, height: int, width: int, words: int = 186, seed: int = 0):
    """A clip of random frames and a question of so many words."""
    clip = np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    record = {
        "problem": "which way does the circle move " * (words // 6),
        "data_type": "video",
        "options": [],
        "problem_type": "numerical",
        "solution": "<answer>1</answer>",
        "problem_id": seed,
        "row": seed,
        "path": "",
    }
    return processor.prompt(record, fit(clip, height * width, processor.vision), 0.5)
