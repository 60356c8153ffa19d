"""The cold start of the toy world: supervised fine-tuning of a fresh tiny model.

Two thirds of the steps learn to see from the careful teacher, the last third imitates the careless
one (toy.SLIPS). The loss is the mean of -log pi(y_t | v, q, y_<t) over all tokens of the batch.

    OMP_NUM_THREADS=1 python -m lab.cold_start DIR      25 minutes on an idle core; makes what
                                                        cold_start/ holds
    python -m lab.cold_start DIR --family qwen3         a Qwen3-VL in place of a Qwen2.5-VL
    python -m lab.cold_start DIR --world order          another world's: the shipped one goes on
                                                        with that world's careless teacher
"""

import argparse
import math
import random
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from engine.families import family_of
from engine.prepare import prepare
from lab import toy
from policy import load, score_groups
from prompt import Processor, Vision
from rollout import Group

HALF = (0.5, 0.5, 0.5)


def new_model(device: str, family: str = "qwen2.5") -> tuple[nn.Module, Processor]:
    """The tiny model with weights from torch's random state, and its processor."""
    tokenizer = toy.new_tokenizer(toy.STAMPS if family == "qwen3" else "")
    config = toy.new_config(tokenizer, family)
    model = prepare(family_of(config).model(config), device)
    mean, std = (HALF, HALF) if family == "qwen3" else (Vision.mean, Vision.std)
    patch = config.vision_config.patch_size
    preprocessor = dict(image_mean=mean, image_std=std, patch_size=patch, temporal_patch_size=2,
                        merge_size=2, min_pixels=Vision.min_pixels, max_pixels=12845056)
    processor = Processor(tokenizer, model.config, preprocessor)
    model.generation_config.eos_token_id = processor.ends
    return model, processor


def said_by(teacher: str, tokenizer, device: str) -> Group:
    """The teacher's words and an end token as a group of one completion, (1, T)."""
    ids = torch.tensor([tokenizer(teacher).input_ids + [tokenizer.eos_token_id]], device=device)
    return Group(ids, torch.ones_like(ids, dtype=torch.bool), ids.float())


def train(folder: Path, steps: int = 3000, batch: int = 64, lr=1e-3, seed: int = 0,
          family: str = "qwen2.5", world: toy.World = toy.TOY, start: str = "") -> None:
    """Train a fresh tiny model, or the careless stage of `start`; write it into the folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, processor = load(start, device) if start else new_model(device, family)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="cold start", unit="step")
    warmup = max(1, steps // 10) if start else 200
    for step in bar:
        # a linear warm-up times a cosine down to a fiftieth of the peak
        cosine = (1 + math.cos(math.pi * (step / steps))) / 2
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup) * (0.02 + 0.98 * cosine)
        careless = bool(start) or step >= 2 * steps // 3
        prompts, groups = [], []
        for _ in range(batch):
            prompt, teacher = toy.example_prompt(rng, processor, careless, world)
            prompts.append(prompt)
            groups.append(said_by(teacher, processor.tokenizer, device))
        scored = score_groups(model, prompts, groups)
        loss = -torch.cat([logp[0] for logp, _ in scored]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder)
    processor.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="where the checkpoint goes")
    add("--family", choices=toy.TINY, default="qwen2.5", help="architecture of the tiny model")
    add("--world", choices=toy.WORLDS, default="toy", help="world that the questions come from")
    add("--model", default="cold_start", help="checkpoint that another --world starts from")
    a = parser.parse_args()
    more = {} if a.world == "toy" else dict(steps=120, batch=32, lr=5e-4, start=a.model)
    train(a.folder, family=a.family, world=toy.WORLDS[a.world], **more)


if __name__ == "__main__":
    main()
