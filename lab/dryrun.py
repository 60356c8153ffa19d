"""The recipe's size without its weights: Qwen2.5-VL's architectures with random weights, and synthetic clips.

`--model random:7b` is a checkpoint that needs no download; with synthetic clips it shows what a step costs in
seconds and memory on your machine. Random weights change neither: completions run to the limit, which is the
most a step can cost. They earn no rewards, and their text means nothing.

    bash train.sh 7b --dry_run [options of ktr.py]      clips, a dozen steps, this table
    python -m lab.dryrun clips DIR --frames 16              the clips alone
    python -m lab.dryrun table RUN --epoch 16916            the table of a finished run
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

def make_clips(folder: Path, frames: int = 16, records: int = 4096) -> None:
    """Two clips of noise, 640x360, long enough for `frames` at 2 a second, and as many records about them."""
    from lab.toy import write_y4m
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        still = rng.integers(0, 255, (360, 640, 3), dtype=np.uint8)
        write_y4m(folder / f"{i}.y4m", np.stack([np.roll(still, 8 * t, 1) for t in range(2 * frames)]), fps=4)
    words = "which way does the circle move and how many flashes are there " * 16
    rows = [{"problem_id": i, "problem": words, "data_type": "video", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
             "solution": "<answer>A</answer>", "path": f"./{i % 2}.y4m"} for i in range(records)]
    (folder / "data.json").write_text(json.dumps(rows))


def table(run: Path, epoch: int) -> dict:
    """Print and return what a run's steps cost, the first two (compilation) apart."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    memory = json.loads((run / "memory.json").read_text()) if (run / "memory.json").exists() else {}
    options, later = json.loads((run / "options.json").read_text()), log[2:] or log
    names = [name for name in later[0] if name.startswith("seconds")]
    cost = {name: statistics.median(row[name] for row in later) for name in names}
    prompts = later[0]["prompts"]
    hours = epoch / prompts * cost["seconds"] / 3600
    print(f"{options['model']}: {prompts:.0f} prompts a step, G={options['G']}, up to {options['max_new_tokens']} tokens, "
          f"{options['max_frames']} frames; {len(later)} steps after {len(log) - len(later)} to warm up ({log[0]['seconds']:.0f} s the first)")
    print("seconds: " + ", ".join(f"{name.removeprefix('seconds_')} {value:.2f}" for name, value in cost.items() if name != "seconds")
          + f"; a step {cost['seconds']:.2f}")
    print(f"{3600 * prompts / cost['seconds']:.0f} prompts an hour; an epoch of {epoch} prompts: {hours:.1f} hours")
    if memory:
        print("GiB on one GPU: " + ", ".join(f"{part} {value:.1f}" for part, value in memory.items()))
    return {"seconds": cost, "prompts": prompts, "prompts_per_hour": 3600 * prompts / cost["seconds"], "epoch_hours": hours,
            "memory_gib": memory, "steps": len(later), "all_steps_seconds": [row["seconds"] for row in log], "options": options}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["clips", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--epoch", type=int, default=16916, help="prompts of an epoch; the paper's list has 16,916")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    if arguments.command == "clips":
        make_clips(arguments.folder, arguments.frames)
    else:
        found = table(arguments.folder, arguments.epoch)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))
