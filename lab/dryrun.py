"""What a step of the recipe costs on your machine: synthetic clips, and a finished run's table.

`--model random:7b` (lab/blank.py) needs no download, the clips need no data. Random weights
change neither seconds nor memory: completions run to the limit, which is the most a step can cost.
They earn no rewards, and their text means nothing.

    bash train.sh 7b --dry_run [options of ktr.py]      clips, a dozen steps, this table
    python -m lab.dryrun clips DIR --frames 16          the clips alone
    python -m lab.dryrun table RUN --epoch 16916        the table of a finished run
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from engine.weights import weight_count
from lab.toy import write_y4m


def make_clips(folder: Path, frames: int = 16, records: int = 4096) -> None:
    """Two clips of noise, 640x360, long enough for `frames` at 2 a second, and as many records
    about them, in data.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        still = rng.integers(0, 255, (360, 640, 3), dtype=np.uint8)
        moving = np.stack([np.roll(still, 8 * t, 1) for t in range(2 * frames)])
        write_y4m(folder / f"{i}.y4m", moving, fps=4)
    question = {
        "problem": "which way does the circle move and how many flashes are there " * 16,
        "data_type": "video", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
        "solution": "<answer>A</answer>"}
    rows = [{"problem_id": i, **question, "path": f"./{i % 2}.y4m"} for i in range(records)]
    (folder / "data.json").write_text(json.dumps(rows))


def memory_parts(options: dict, prompts: float, peak: float) -> dict[str, float]:
    """GiB of one GPU by what takes it: what lasts, from the number of weights, and the rest of the
    peak (activations, caches, a part of the optimizer's step). Empty without a GPU."""
    if not peak:
        return {}
    n = weight_count(options["model"]) / 2 ** 30
    trained = weight_count(options["model"], options["freeze"]) / 2 ** 30
    each = 2 if options["dtype"] == "bfloat16" else 4
    ranks = prompts / options["prompts_per_step"]
    parts = {"weights": each * n, "gradients": each * trained,
             "reference": each * n if options["beta"] else 0.0,
             "optimizer": 0.0 if options["offload"] else 12 * min(trained, n / ranks)}
    return {**parts, "activations": peak - sum(parts.values()), "peak": peak}


def table(run: Path, epoch: int) -> dict:
    """Print and return what a run's steps cost (medians), the first two (compilation) apart;
    `epoch` is its number of prompts."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    options = json.loads((run / "options.json").read_text())
    later = log[2:] or log
    names = [name for name in later[0] if name.startswith("seconds")]
    cost = {name: statistics.median(row[name] for row in later) for name in names}
    prompts = later[0]["prompts"]
    memory = memory_parts(options, prompts, max(row.get("memory_gib", 0) for row in log))
    per_hour = 3600 * prompts / cost["seconds"]
    hours = epoch / per_hour
    phases = [f"{name.removeprefix('seconds_')} {value:.2f}"
              for name, value in cost.items() if name != "seconds"]
    print(f"{options['model']}: {prompts:.0f} prompts a step, G={options['G']}, up to "
          f"{options['max_new_tokens']} tokens, {options['max_frames']} frames; {len(later)} steps "
          f"after {len(log) - len(later)} to warm up ({log[0]['seconds']:.0f} s the first)")
    print(f"seconds: {', '.join(phases)}; a step {cost['seconds']:.2f}")
    print(f"{per_hour:.0f} prompts an hour; an epoch of {epoch} prompts: {hours:.1f} hours")
    if memory:
        parts = ", ".join(f"{part} {value:.1f}" for part, value in memory.items())
        print(f"GiB on one GPU: {parts}")
    return {
        "seconds": cost, "prompts": prompts, "prompts_per_hour": per_hour, "epoch_hours": hours,
        "memory_gib": memory, "steps": len(later), "options": options,
        "all_steps_seconds": [row["seconds"] for row in log]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["clips", "table"])
    add("folder", type=Path, help="the folder that `clips` fills, or a finished run")
    add("--frames", type=int, default=16, help="frames that a clip must have at 2 a second")
    add("--epoch", type=int, default=16916, help="prompts of an epoch; the paper's list has 16,916")
    add("--out", type=Path, help="also write the table as JSON")
    a = parser.parse_args()
    if a.command == "clips":
        make_clips(a.folder, a.frames)
        return
    found = table(a.folder, a.epoch)
    if a.out:
        a.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
