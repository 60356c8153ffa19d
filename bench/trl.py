"""TRL's GRPOTrainer at 7B on one GPU: plain GRPO, one image of 1,008 tokens, G = 8, T = 512, no
reference.

    python -m bench.trl             needs trl, datasets, accelerate; bench/results/trl.json

Ours in the same setting (`python -m bench.engine plain lengths`) is measured just before, on the
same machine, and written beside it. Gradient checkpointing and bf16 as there; SGD in place of
AdamW, whose state would not fit (the optimizer is left out of our figures). Rewards are random.
Steps 2, 3: 512 tokens each. Step 4: rows end after 100 to 512 tokens, drawn as in bench.engine.
"""

import json
import subprocess
import sys
import time

import numpy as np
import torch
from datasets import IterableDataset
from PIL import Image
from transformers import LogitsProcessor, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

from bench.common import DEVICE, ROOT, new_results, note, peak
from bench.engine import G, T, drawn_lengths
from lab import blank


class EndAt(LogitsProcessor):
    """Rows end with the end token after so many tokens, and not before."""

    def __init__(self, lengths: list[int], end: int):
        self.lengths, self.end, self.done = torch.tensor(lengths, device=DEVICE), end, 0

    def __call__(self, ids, scores):
        self.done += 1
        ending = self.done >= self.lengths
        scores[:, self.end] = torch.where(ending, 0.0, -torch.inf)
        scores[ending] = torch.where(
            torch.arange(scores.shape[1], device=DEVICE) == self.end, 0.0, -torch.inf
        )
        return scores


class Watch(TrainerCallback):
    """Seconds of each step; from the fourth on, rows end early."""

    def __init__(self):
        self.steps, self.sampling, self.early = [], [], 3

    def on_step_begin(self, *_, **__):
        torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self.begun)


def main() -> None:
    subprocess.run([sys.executable, "-m", "bench.engine", "plain", "lengths"], cwd=ROOT, check=True)
    path = ROOT / "bench" / "results" / "trl.json"
    ours = json.loads(path.with_name("engine.json").read_text())
    results = new_results(path)
    tokenizer = blank.tokenizer()
    tokenizer.padding_side = "left"
    model = blank.model("random:7b", tokenizer, DEVICE, torch.bfloat16)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (1008, 784, 3), dtype=np.uint8)
    )
    question = "which way does the circle move " * 31
    rows = [{"prompt": [{"role": "user", "content": question}], "image": image} for _ in range(6)]
    watch = Watch()
    generate = model.generate

    def watched(*arguments, **more):
        number = len(watch.steps)
        lengths = drawn_lengths(0) if number >= watch.early else [T + 1] * G
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = generate(
            *arguments, logits_processor=[EndAt(lengths, tokenizer.eos_token_id)], **more
        )
        torch.cuda.synchronize()
        watch.sampling.append(time.perf_counter() - begun)
        return out

    model.generate = watched
    rng = np.random.default_rng(0)
    config = GRPOConfig(
        output_dir="/tmp/trl",
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=T,
        beta=0.0,
        temperature=1.0,
        top_p=0.95,
        bf16=True,
        gradient_checkpointing=True,
        optim="sgd",
        learning_rate=1e-6,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: rng.random(len(completions)).tolist(),
        config,
        IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=processor,
        callbacks=[watch],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    note(
        results,
        path,
        trl=trl_version,
        steps_512=watch.steps[1:3],
        sampling_512=watch.sampling[1:3],
        steps_100_to_512=watch.steps[3:],
        sampling_100_to_512=watch.sampling[3:],
        peak_gib=peak(),
        first_step_s=watch.steps[0],
        ours={name: ours[name] for name in ("plain_image", "lengths_plain_image")},
    )


if __name__ == "__main__":
    main()
