"""The prompt: what the model is shown. Protocol strings, chat template, patches, positions, counterfactuals.

A clip's frames become patches as transformers' Qwen2VLVideoProcessor makes them (tests/golden holds its
outputs; the processor itself needs torchvision). Positions are computed here, once per prompt: the library's
get_rope_index loops over rows, and release 5.17 cuts the seconds between frames to whole numbers.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

QUESTION_TRAIN = (
    "{Question}\nPlease think about this question as if you were a human pondering deeply. Engage in an internal "
    "dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', 'let's break it down', etc, or "
    "other natural language thought expressions It's encouraged to include self-reflection or verification in the "
    "reasoning process. Provide your detailed reasoning between the <think> </think> tags, and then give your final "
    "answer between the <answer> </answer> tags.")
QUESTION_EVAL = QUESTION_TRAIN.replace("<think> </", "<think> and </").replace("<answer> </", "<answer> and </")
NUMBER = " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> </answer> tags."
TYPE = {
    "multiple choice": " Please provide only the single option letter (e.g., A, B, C, D, etc.) within the "
                       "<answer> </answer> tags.",
    "numerical": NUMBER,
    "OCR": " Please transcribe text from the image/video clearly and provide your text answer within the "
           "<answer> </answer> tags.",
    "free-form": " Please provide your text answer within the <answer> </answer> tags.",
    "regression": NUMBER,
}


class BadRecord(ValueError):
    """A record that cannot be used. The message names the record and says why."""


def name_of(record: dict) -> str:
    return f"record {record.get('problem_id', '?')} (row {record.get('row', '?')})"


def question_text(record: dict, template: str = QUESTION_TRAIN) -> str:
    """The user's words (facts: Video-R1's QUESTION_TEMPLATE and TYPE_TEMPLATE). Options without letters get them,
    because the answer is a letter by position."""
    if "whole_prompt" in record:                        # a benchmark with a prompt of its own
        return record["whole_prompt"]
    question = record["problem"]
    if record["problem_type"] == "multiple choice":
        letters = [chr(65 + i) for i in range(len(record["options"]))]
        options = [option if re.match(rf"\s*\(?{re.escape(letter)}\s*[.):]", option) else f"{letter}. {option}"
                   for letter, option in zip(letters, record["options"])]
        head = question.rstrip().removesuffix("Options:") if question.rstrip().endswith("Options:") else question
        question = head + "Options:\n" + "".join(option + "\n" for option in options)
    return template.replace("{Question}", question) + TYPE[record["problem_type"]]



# ------------------------------------------------------------------------------------- pixels, positions
def target_size(height: int, width: int, max_pixels: int, min_pixels: int = 56 * 56, factor: int = 28) -> tuple[int, int]:
    """Qwen2-VL's smart_resize: both sides multiples of 28, area within the limits, aspect ratio nearly kept."""
    if max(height, width) / min(height, width) > 200:
        raise BadRecord(f"aspect ratio {max(height, width) / min(height, width):.0f} exceeds 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


@dataclass(frozen=True)
class Vision:
    """Constants of the checkpoint's preprocessor_config.json and vision config."""
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    tokens_per_second: float = 2


def fit(frames: np.ndarray, max_pixels: int, v: Vision) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, h, w) uint8 within the limits: bicubic, antialiased, rounded back to 0..255."""
    size = target_size(*frames.shape[1:3], max_pixels, v.min_pixels, v.patch * v.merge)
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bicubic", antialias=True)


def grid_of(frames: Tensor, v: Vision) -> tuple[int, int, int]:
    """(t, h, w) in patches."""
    n, _, height, width = frames.shape
    return -(-n // v.temporal), height // v.patch, width // v.patch


def patches(frames: Tensor, v: Vision) -> Tensor:
    """(n, 3, H, W) uint8 -> (t*h*w, 3*temporal*patch*patch) float32, merge x merge neighbours adjacent.

    transformers' Qwen2VLVideoProcessor: normalise, repeat the last frame to fill a temporal patch, cut.
    """
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] * 255.0 for x in (v.mean, v.std))
    x = (frames.float() - mean) / std
    if short := -len(x) % v.temporal:
        x = torch.cat([x, x[-1:].expand(short, -1, -1, -1)])
    n, c, height, width = x.shape
    t, h, w = n // v.temporal, height // v.patch, width // v.patch
    x = x.view(t, v.temporal, c, h // v.merge, v.merge, v.patch, w // v.merge, v.merge, v.patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)            # t, h', w', merge, merge, c, temporal, patch, patch
    return x.reshape(t * h * w, -1)


def rope_positions(visual: Tensor, grid: tuple[int, int, int], merge: int, ticks: float) -> Tensor:
    """(3, P) temporal, height and width positions (Qwen2.5-VL's M-RoPE) of a prompt with one clip or image.

    visual: (P,) bool, True at the media's tokens. grid: its (t, h, w) in patches. ticks: positions from one
    temporal patch to the next, tokens_per_second * seconds (the product is rounded down, not its factors).
    As in transformers 5, text goes on after the larger side of a frame, also where the clip's last second has a
    higher position (transformers 4 went on after that); completions come after the highest position of all.
    """
    before = int(visual.nonzero()[0])
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    axes = torch.meshgrid((torch.arange(t) * ticks).long(), torch.arange(h), torch.arange(w), indexing="ij")
    media = torch.stack(axes).flatten(1) + before                                   # (3, t*h*w)
    after = torch.arange(len(visual) - before - media.shape[1]) + before + max(h, w)
    return torch.cat([torch.arange(before).expand(3, -1), media, after.expand(3, -1)], dim=1)


@dataclass(frozen=True)
class Prompt:
    """One question with its clip, ready for the model; the counterfactuals of attribution.py are made from it."""
    record: dict
    ids: Tensor                         # (P,) token ids, one per merged patch of the clip
    positions: Tensor                   # (3, P)
    next_position: int                  # of the first completion token
    visual: Tensor                      # (P,) bool: where the vision features go
    frames: Tensor | None               # (n, 3, H, W) uint8; None once the video is hidden
    vision: Vision
    seconds: float                      # between two temporal patches
    kept: Tensor | None = None          # (V,) bool: the vision features that are still in the prompt; None is all
    blank: bool = False                 # the vision features are zeros

    @property
    def kind(self) -> str:
        return self.record["data_type"]

    @property
    def grid(self) -> tuple[int, int, int]:
        return grid_of(self.frames, self.vision)

    def hidden(self, positions: str = "unchanged") -> "Prompt":
        """Without its video tokens: nothing attends to them, so they are not even computed. The other tokens stay
        where they were ("unchanged"), or close the gap as under the released code's mask ("moved")."""
        return replace(self.thinned(torch.zeros(int(self.visual.sum()), dtype=torch.bool), positions), frames=None)

    def thinned(self, keep: Tensor, positions: str = "unchanged") -> "Prompt":
        """With only the video tokens where keep (V,) is True."""
        stays = ~self.visual
        stays[self.visual] = keep
        ids, places, following = self.ids[stays], self.positions[:, stays], self.next_position
        if positions == "moved":
            places, following = torch.arange(len(ids)).expand(3, -1), len(ids)
        return replace(self, ids=ids, positions=places, next_position=following, visual=self.visual[stays], kept=keep)

    def zeroed(self) -> "Prompt":
        """With zeros in place of the vision features."""
        return replace(self, blank=True)

    def reordered(self, order: Tensor) -> "Prompt":
        """With its frames in another order (n,)."""
        return self.showing(self.frames[order])

    def showing(self, frames: Tensor) -> "Prompt":
        """With other frames of the same number and size."""
        return replace(self, frames=frames)

    def timed(self, seconds: float) -> "Prompt":
        """As if its temporal patches were this many seconds apart (the released code scores with 1)."""
        positions = rope_positions(self.visual, self.grid, self.vision.merge, self.vision.tokens_per_second * seconds)
        return replace(self, positions=positions, next_position=int(positions.max()) + 1)


class Processor:
    """Turns a record and its frames into a Prompt, with the constants and the chat template of a checkpoint."""

    def __init__(self, tokenizer, config, preprocessor: dict):
        self.tokenizer, self.preprocessor = tokenizer, preprocessor
        self.media_ids = {"video": config.video_token_id, "image": config.image_token_id}
        size = preprocessor.get("size") or {}
        self.vision = Vision(
            patch=config.vision_config.patch_size, temporal=config.vision_config.temporal_patch_size,
            merge=config.vision_config.spatial_merge_size,
            min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge") or Vision.min_pixels,
            mean=tuple(preprocessor["image_mean"]), std=tuple(preprocessor["image_std"]),
            tokens_per_second=config.vision_config.tokens_per_second)

    @classmethod
    def from_pretrained(cls, name: str) -> "Processor":
        """From a checkpoint's folder or hub name. OSError if it has no preprocessor_config.json."""
        preprocessor = json.loads(Path(cached_file(name, "preprocessor_config.json")).read_text())
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = json.loads(Path(cached_file(name, "chat_template.json")).read_text())["chat_template"]
        return cls(tokenizer, AutoConfig.from_pretrained(name), preprocessor)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2))

    def prompt(self, record: dict, frames: Tensor, seconds_per_frame: float, max_prompt: int = 16384,
               template: str = QUESTION_TRAIN) -> Prompt:
        """frames: (n, 3, H, W) uint8 from `fit`. BadRecord if the prompt exceeds max_prompt tokens (it is never cut)."""
        v = self.vision
        content = [{"type": record["data_type"]}, {"type": "text", "text": question_text(record, template)}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                  add_generation_prompt=True)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        media = self.media_ids[record["data_type"]]
        if sum(int((ids == m).sum()) for m in self.media_ids.values()) != 1:
            raise BadRecord(f"{name_of(record)}: the question itself holds an image or video token")
        grid = grid_of(frames, v)
        count = torch.ones_like(ids)
        count[ids == media] = math.prod(grid) // v.merge ** 2
        ids = ids.repeat_interleave(count)
        if len(ids) > max_prompt:
            raise BadRecord(f"{name_of(record)}: a prompt of {len(ids)} tokens exceeds the limit of {max_prompt}")
        seconds = v.temporal * seconds_per_frame
        positions = rope_positions(ids == media, grid, v.merge, v.tokens_per_second * seconds)
        return Prompt(record, ids, positions, int(positions.max()) + 1, ids == media, frames, v, seconds)
