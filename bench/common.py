"""What the benchmarks share: clips of random frames, the usual way of generating, timing, notes."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from engine.decoding import vision_tokens
from prompt import fit, patches

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
DATASHEET = 4.8e12  # an H200's bytes per second by its datasheet
BEGUN = time.time()


def commit() -> str:
    """The commit that runs (or $COMMIT, where only its files travelled)."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("COMMIT") or asked.stdout.strip()


def new_results(path: Path) -> dict:
    """What a file of results begins with; and what `path` holds already of this commit and GPU."""
    asked = "python -m " + " ".join(["bench." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    made_by = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    old = json.loads(path.read_text()) if path.exists() else {}
    if any(old.get(name) != value for name, value in made_by.items()):
        old = {"commands": []}
    return {
        **old,
        "commands": [*old["commands"], asked],
        **made_by,
        "python": platform.python_version(),
        "dtype": "bfloat16",
        "weights": "random, architecture of Qwen2.5-VL-7B",
    }


def note(results: dict, path: Path, **values) -> None:
    """Keep what was measured as soon as it is."""
    results.update(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"[{time.time() - BEGUN:6.1f} s]", json.dumps(values), flush=True)


def seconds(function, repeat: int = 1, warm: int = 0) -> float:
    """Median of `repeat` calls after `warm` others."""
    for _ in range(warm):
        function()
    found = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def free() -> None:
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def new_prompt(
    processor, frames: int, height: int, width: int, pixels: int, seed: int = 0, kind: str = "video"
):
    """A clip (or still image) of random frames and a question that makes about 200 text tokens."""
    rng = np.random.default_rng(seed)
    record = {
        "problem": "which way does the circle move " * 31,
        "data_type": kind,
        "problem_type": "numerical",
        "options": [],
        "solution": "<answer>1</answer>",
        "problem_id": seed,
        "row": seed,
        "path": "",
    }
    clip = fit(
        rng.integers(0, 255, (frames, height, width, 3), dtype=np.uint8), pixels, processor.vision
    )
    return processor.prompt(record, clip, 0.5)


# -------------------------------------------------------------------------------- the usual way
def usual_inputs(prompt, G: int):
    """What transformers' generate takes, the prompt repeated."""
    ids = prompt.ids[None].expand(G, -1).to(DEVICE)
    kinds = torch.zeros_like(ids)
    kinds[:, prompt.visual.to(DEVICE)] = 2
    pixels = patches(prompt.frames.to(DEVICE), prompt.vision).to(torch.bfloat16)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=kinds,
        pixel_values_videos=pixels.repeat(G, 1),
        video_grid_thw=torch.tensor([prompt.grid] * G, device=DEVICE),
        second_per_grid_ts=torch.tensor([prompt.seconds] * G),
    )


def usual_generate(model, prompt, G: int, T: int, **more):
    return model.generate(
        **usual_inputs(prompt, 1),
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        num_return_sequences=G,
        min_new_tokens=T,
        max_new_tokens=T,
        pad_token_id=0,
        suppress_tokens=vision_tokens(model.config),
        **more,
    )[:, len(prompt.ids) :]
