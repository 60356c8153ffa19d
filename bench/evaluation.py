"""Questions a minute at 7B on one GPU: evaluate.py's way against transformers' generate, one question at a time and in eights.

    python bench/evaluation.py

Random weights, greedy, 256 new tokens forced, clips of 32 frames of 256*28*28 pixels, three questions about each clip as in
Video-MME. Frames are in memory for all; writes bench/results/evaluation.json.
"""

import json
import sys
import time

import torch
from engine import DEVICE, RESULTS, ROOT, new_prompt, note, seconds, usual_inputs
from transformers.utils import logging

from lab.dryrun import random_model
from policy import load, sample

FRAMES, T, CLIPS = 32, 256, 11


def main() -> None:
    path = ROOT / "bench" / "results" / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    model, processor = load("random:7b", DEVICE, torch.bfloat16)
    clips = [new_prompt(processor, FRAMES, 448, 448, 256 * 784, seed) for seed in range(CLIPS)]
    prompts = [clip for clip in clips for _ in range(3)][:32]                   # the same frames object: features are shared
    note(path, shapes={"frames": FRAMES, "video_tokens": int(clips[0].visual.sum()), "prompt": len(clips[0].ids), "new_tokens": T,
                       "questions_together": len(prompts)})
    begun = time.perf_counter()
    sample(model, prompts, 1, T, temperature=0.0, top_p=1.0, ends=())           # compiles and captures
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    torch.cuda.reset_peak_memory_stats()
    ours = seconds(lambda: sample(model, prompts, 1, T, temperature=0.0, top_p=1.0, ends=()), 2)
    note(path, ours={"questions_per_minute": 60 * len(prompts) / ours, "seconds": ours, "first_batch_s": first,
                     "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30})
    model.__dict__.pop("_decoders")
    del model
    torch.cuda.empty_cache()

    usual = random_model("random:7b", DEVICE, torch.bfloat16).eval()
    usual.generation_config.eos_token_id = None

    def generate(count: int):
        inputs = usual_inputs(clips[0], count)
        with torch.no_grad():
            usual.generate(**inputs, do_sample=False, min_new_tokens=T, max_new_tokens=T, pad_token_id=0)
    generate(1)
    for count, repeat in ((1, 2), (8, 1)):
        took = seconds(lambda: generate(count), repeat)
        note(path, **{f"usual_{count}": {"questions_per_minute": 60 * count / took, "seconds": took,
                                         "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30}})
    rate = RESULTS["ours"]["questions_per_minute"]
    note(path, times_faster={f"than_{n}_at_a_time": rate / RESULTS[f"usual_{n}"]["questions_per_minute"] for n in (1, 8)})
    print(json.dumps(RESULTS["times_faster"]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "bench"))
    main()
