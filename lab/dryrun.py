"""What a step of the recipe costs on your machine: synthetic clips, and the table of a finished run.

`--model random:7b` (engine/blank.py) needs no download, the clips need no data. Random weights
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
import torch  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lab.toy import write_y4m
from prompt import Processor, Vision


# from the config.json of Qwen2.5-VL-3B/7B/32B-Instruct
SIZES = {
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie=True, vision=3420),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie=False, vision=3420),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie=False, vision=3456),
}


def random_config(size: str, tokenizer) -> Qwen2_5_VLConfig:
    """The architecture of this size, with the special tokens of the toy world's tokenizer."""
    if size not in SIZES:
        raise OSError(f"random:{size}: no such size; known: {', '.join(SIZES)}")
    shape, token = dict(SIZES[size]), tokenizer.convert_tokens_to_ids
    tie, vision = shape.pop("tie"), shape.pop("vision")
    return Qwen2_5_VLConfig(
        text_config=dict(
            **shape, max_position_embeddings=128000, rms_norm_eps=1e-6, tie_word_embeddings=tie,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")),
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=vision, num_heads=16, out_hidden_size=shape["hidden_size"],
            window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=tie,
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


def random_processor(name: str) -> Processor:
    """With the toy world's tokenizer, since the real one would have to be downloaded."""
    from lab.toy import new_tokenizer
    tokenizer = new_tokenizer()
    return Processor(tokenizer, random_config(name.removeprefix("random:"), tokenizer),
                     {"image_mean": Vision.mean, "image_std": Vision.std, "min_pixels": Vision.min_pixels})


def random_model(name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The model of "random:7b" and the like; another seed makes a reference that differs from the policy."""
    tokenizer = random_processor(name).tokenizer
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(random_config(name.removeprefix("random:"), tokenizer), dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


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


def table(run: Path, epoch: int) -> dict:
    """Print and return what a run's steps cost (medians), the first two (compilation) apart;
    `epoch` is its number of prompts."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    options = json.loads((run / "options.json").read_text())
    memory = {}
    if (run / "memory.json").exists():
        memory = json.loads((run / "memory.json").read_text())
    later = log[2:] or log
    cost = {}
    for name in later[0]:
        if name.startswith("seconds"):
            cost[name] = statistics.median(row[name] for row in later)
    prompts = later[0]["prompts"]
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
    parser.add_argument("command", choices=["clips", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--epoch", type=int, default=16916,
                        help="prompts of an epoch; the paper's list has 16,916")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    a = parser.parse_args()
    if a.command == "clips":
        make_clips(a.folder, a.frames)
        return
    found = table(a.folder, a.epoch)
    if a.out:
        a.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
