"""Questions a minute at 7B on one GPU: evaluate.py's way against transformers' generate, one
question at a time and in eights.

    python -m bench.evaluation

Random weights, greedy, 256 new tokens forced, clips of 32 frames of 256*28*28 pixels, three
questions about each clip as in Video-MME. Frames are in memory for all; writes
bench/results/evaluation.json.
"""

from functools import partial

import torch
from transformers.utils import logging

from bench.common import (
    DEVICE, ROOT, free, new_prompt, new_results, note, peak, seconds, usual_inputs)
from lab import blank
from policy import load, sample

FRAMES, T, CLIPS = 32, 256, 11


def main() -> None:
    path = ROOT / "bench" / "results" / "evaluation.json"
    keep = partial(note, new_results(path), path)
    logging.set_verbosity_error()
    model, processor = load("random:7b", DEVICE, torch.bfloat16)
    clips = [new_prompt(processor, FRAMES, 448, 448, 256 * 784, seed) for seed in range(CLIPS)]
    prompts = [clip for clip in clips for _ in range(3)][:32]  # features are shared
    keep(
        shapes={
            "frames": FRAMES,
            "video_tokens": int(clips[0].visual.sum()),
            "new_tokens": T,
            "prompt": len(clips[0].ids),
            "questions_together": len(prompts),
        }
    )

    def answer():
        sample(model, prompts, 1, T, temperature=0.0, top_p=1.0, ends=())  # noqa: F821

    first = seconds(answer)  # compiles and captures
    torch.cuda.reset_peak_memory_stats()
    ours = seconds(answer, 2)
    ours_per_minute = 60 * len(prompts) / ours
    keep(
        ours={
            "questions_per_minute": ours_per_minute,
            "seconds": ours,
            "first_batch_s": first,
            "peak_gib": peak(),
        }
    )
    model.__dict__.pop("_decoders")
    del model
    free()

    usual = blank.model("random:7b", blank.tokenizer(), DEVICE, torch.bfloat16).eval()
    usual.generation_config.eos_token_id = None

    def generate(count: int):
        with torch.no_grad():
            usual.generate(
                **usual_inputs(clips[0], count),
                do_sample=False,
                min_new_tokens=T,
                max_new_tokens=T,
                pad_token_id=0,
            )

    generate(1)
    for count, repeat in ((1, 2), (8, 1)):
        took = seconds(lambda: generate(count), repeat)
        rate = 60 * count / took
        keep(
            **{
                f"usual_{count}": {
                    "questions_per_minute": rate,
                    "seconds": took,
                    "peak_gib": peak(),
                },
                f"times_faster_than_{count}": ours_per_minute / rate,
            }
        )


if __name__ == "__main__":
    main()
