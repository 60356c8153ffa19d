"""The prompt: what the model is shown. Words, patches, positions.

Frames become patches as transformers' Qwen2VLVideoProcessor makes them (tests/golden holds its
outputs; the processor itself needs torchvision). Positions are computed here, once per prompt: the
library's get_rope_index loops over rows, and release 5.17 cuts seconds to whole numbers.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import cached_file

from engine.families import end_tokens, family_of, read_config, stamp
from engine.packing import to_device

QUESTION_TRAIN = (
    "{Question}\nPlease think about this question as if you were a human pondering deeply. Engage "
    "in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', "
    "'let's break it down', etc, or other natural language thought expressions It's encouraged to "
    "include self-reflection or verification in the reasoning process. Provide your detailed "
    "reasoning between the <think> </think> tags, and then give your final answer between the "
    "<answer> </answer> tags.")
QUESTION_EVAL = QUESTION_TRAIN.replace("> </", "> and </")
WANTED = {
    "multiple choice": "provide only the single option letter (e.g., A, B, C, D, etc.)",
    "numerical": "provide the numerical value (e.g., 42 or 3.14)",
    "OCR": "transcribe text from the image/video clearly and provide your text answer",
    "free-form": "provide your text answer",
    "regression": "provide the numerical value (e.g., 42 or 3.14)",
}
TYPE = {kind: f" Please {do} within the <answer> </answer> tags." for kind, do in WANTED.items()}


class BadRecord(ValueError):
    """A record that cannot be used. The message names the record and says why."""


def one_line(value: object, most: int = 400) -> str:
    """A text for a message: no line ends, no lone surrogates, the middle of a long one cut out."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[:most // 2]} .. {text[-most // 2:]}"


def name_of(record: dict) -> str:
    return f"record {one_line(record.get('problem_id', '?'), 80)} (row {record.get('row', '?')})"


def by_letter(options: list[str]) -> dict[str, str]:
    """{letter: the option's text}. A letter is cut off only if every option begins with its own:
    "B. x", "b) x", "(B) x" or "B: x", but not "B.C. 20"."""
    heads = [re.match(rf"(?i)\s*\(?{letter}\s*[.):](?!\w\.)\s*", option)
             for letter, option in zip(ascii_uppercase, options)]
    cuts = [head.end() if all(heads) else 0 for head in heads]
    return {letter: option[n:] for letter, option, n in zip(ascii_uppercase, options, cuts)}


def question_text(record: dict, template: str = QUESTION_TRAIN) -> str:
    """The user's words (Video-R1's QUESTION_TEMPLATE and TYPE_TEMPLATE). Options without letters
    get them, because the answer is a letter by position."""
    if "whole_prompt" in record:                        # a benchmark with a prompt of its own
        return record["whole_prompt"]
    question = record["problem"]
    if record["problem_type"] == "multiple choice":
        if question.rstrip().endswith("Options:"):
            question = question.rstrip().removesuffix("Options:")
        question += "Options:\n"
        texts = by_letter(record["options"])
        for (letter, text), option in zip(texts.items(), record["options"]):
            question += f"{letter}. {text}\n" if text == option else f"{option}\n"
    return template.replace("{Question}", question) + TYPE[record["problem_type"]]


# -------------------------------------------------------------------------------- pixels, positions
def target_size(height: int, width: int, max_pixels: float, min_pixels: int = 56 * 56,
                factor: int = 28) -> tuple[int, int]:
    """Qwen2-VL's smart_resize: sides in multiples of 28, aspect ratio nearly kept, area within the
    limits (shrinking rounds down, perhaps below min_pixels). BadRecord beyond a ratio of 200."""
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise BadRecord(f"aspect ratio {ratio:.0f} exceeds 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
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
    tokens_per_second: float | None = 2     # None: temporal patches are one position apart
    timestamps: bool = False                # the prompt says each temporal patch's time in words


def fit(frames: np.ndarray, max_pixels: float, v: Vision, min_pixels: int = 0) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, h, w) uint8 within the limits: bicubic, antialiased, rounded."""
    min_pixels = min(max(min_pixels, v.min_pixels), max_pixels)
    size = target_size(*frames.shape[1:3], max_pixels, min_pixels, v.patch * v.merge)
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    same = x.shape[-2:] == size
    return x if same else F.interpolate(x, size=size, mode="bicubic", antialias=True)


def grid_of(frames: Tensor, v: Vision) -> tuple[int, int, int]:
    """(t, h, w) in patches."""
    n, _, height, width = frames.shape
    return -(-n // v.temporal), height // v.patch, width // v.patch


def patches(frames: Tensor, v: Vision) -> Tensor:
    """(n, 3, H, W) uint8 -> (t*h*w, 3*temporal*patch*patch) float32, merge x merge neighbours
    adjacent: normalise, repeat the last frame to fill a temporal patch, cut."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] * 255.0
                 for x in (v.mean, v.std))
    x = (frames.float() - mean) / std
    short = -len(x) % v.temporal
    x = torch.cat([x, x[-1:].expand(short, -1, -1, -1)])
    (t, h, w), c = grid_of(frames, v), x.shape[1]
    x = x.view(t, v.temporal, c, h // v.merge, v.merge, v.patch, w // v.merge, v.merge, v.patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)            # t, h', w', merge, merge, c, temporal, ..
    return x.reshape(t * h * w, -1)


def rope_positions(visual: Tensor, grid: tuple[int, int, int], merge: int, ticks: float,
                   text_after: str = "clip") -> Tensor:
    """(3, P) temporal, height and width positions (M-RoPE): one clip, in one run of tokens or in
    several with text between, or an image.

    visual: (P,) bool, the media's tokens. grid: its (t, h, w) in patches. ticks: positions from one
    temporal patch of a run to the next, tokens_per_second * seconds (rounded down after the
    product). text_after "clip": text goes on after the run's highest position of all three axes, as
    in transformers 4, under which Qwen2-VL and Qwen2.5-VL checkpoints were trained; "frame": after
    the larger side of a frame, even below the clip's last second, as in transformers 5. Completions
    come after the highest position of all.
    """
    h, w = grid[1] // merge, grid[2] // merge
    parts, start = [], 0
    for seen, n in zip(*(x.tolist() for x in visual.unique_consecutive(return_counts=True))):
        if seen:
            times = (torch.arange(n // (h * w)) * ticks).long()
            axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).flatten(1) + start)                      # (3, n)
        else:
            parts.append(torch.arange(start, start + n).expand(3, -1))
        frame = seen and text_after == "frame"
        start = start + max(h, w) if frame else int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Prompt:
    """One question with its clip, ready for the model."""
    record: dict
    ids: Tensor                         # (P,) token ids, one per merged patch of the clip
    positions: Tensor                   # (3, P)
    next_position: int                  # of the first completion token
    visual: Tensor                      # (P,) bool: where vision features go, not start and end
    frames: Tensor | None               # (n, 3, H, W) uint8; None once the video is hidden
    vision: Vision
    seconds: float                      # between two temporal patches, on average
    kept: Tensor | None = None          # (V,) bool: vision features still in the prompt; None: all
    zeroed: bool = False                # zeros stand in place of the vision features

    @property
    def kind(self) -> str:
        return self.record["data_type"]

    @property
    def grid(self) -> tuple[int, int, int]:
        return grid_of(self.frames, self.vision)

    def pixels(self, device: torch.device | str = "cpu") -> Tensor:
        """(t*h*w, 3*temporal*patch*patch) float32: what the vision tower takes."""
        return patches(to_device(self.frames, device), self.vision)

    def with_frames(self, frames: Tensor) -> "Prompt":
        """The same question about other frames, as many and as large."""
        return replace(self, frames=frames)


class Processor:
    """Turns a record and its frames into a Prompt, as a checkpoint's constants and template say."""

    def __init__(self, tokenizer, config, preprocessor: dict, generation: dict = {}):
        """preprocessor, generation: of preprocessor_config.json and generation_config.json."""
        self.tokenizer, self.preprocessor = tokenizer, preprocessor
        self.ends = end_tokens(tokenizer, config, generation)
        self.media_ids = {"video": config.video_token_id, "image": config.image_token_id}
        added = tokenizer.added_tokens_decoder.values()
        self.control = [token.content for token in added if token.special]
        size = preprocessor.get("size") or {}
        min_area = preprocessor.get("min_pixels") or size.get("shortest_edge") or Vision.min_pixels
        vision = config.vision_config
        self.vision = Vision(
            vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, min_area,
            tuple(preprocessor["image_mean"]), tuple(preprocessor["image_std"]),
            getattr(vision, "tokens_per_second", None), family_of(config).timestamps)

    @classmethod
    def from_pretrained(cls, name: str) -> "Processor":
        """From a folder or hub name. OSError: a file is missing; ValueError: not a known family."""
        def read(file: str, default: dict | None = None) -> dict:
            try:
                return json.loads(Path(cached_file(name, file)).read_text())
            except OSError:
                if default is None:
                    raise
                return default

        config, tokenizer = read_config(name), AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = read("chat_template.json")["chat_template"]
        of_images = read("processor_config.json", {}).get("image_processor")    # transformers 5
        return cls(tokenizer, config, of_images or read("preprocessor_config.json"),
                   read("generation_config.json", {}))

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        Path(folder, "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2))

    def prompt(self, record: dict, frames: Tensor, seconds_per_frame: float | list[float],
               max_prompt: int = 16384, text_after: str = "clip") -> Prompt:
        """frames: (n, 3, H, W) uint8 from `fit`, seconds_per_frame apart, or at the seconds listed.
        BadRecord if it exceeds max_prompt tokens (it is never cut), or has a special token."""
        v, media = self.vision, self.media_ids[record["data_type"]]
        words = {"type": "text", "text": question_text(record)}
        messages = [{"role": "user", "content": [{"type": record["data_type"]}, words]}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)
        grid, runs = grid_of(frames, v), 1
        if v.timestamps and record["data_type"] == "video":
            text, runs = stamp(text, len(frames), v.temporal, seconds_per_frame), grid[0]
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        if torch.isin(ids, torch.tensor(list(self.media_ids.values()))).sum() != runs:
            raise BadRecord(f"{name_of(record)}: the question holds an image or video token")
        for token in self.control:                      # it would end the turn, or open another
            if token in words["text"]:
                raise BadRecord(f"{name_of(record)}: the question holds the control token {token}")
        count = torch.ones_like(ids)
        count[ids == media] = math.prod(grid) // v.merge ** 2 // runs
        ids = ids.repeat_interleave(count)
        if len(ids) > max_prompt:
            count = f"a prompt of {len(ids)} tokens exceeds the limit of {max_prompt}"
            raise BadRecord(f"{name_of(record)}: {count}")
        if isinstance(seconds_per_frame, list):         # said in words; no position needs them
            seconds_per_frame = seconds_per_frame[-1] / max(1, len(frames) - 1)
        seconds = v.temporal * seconds_per_frame
        ticks = 1 if v.tokens_per_second is None else v.tokens_per_second * seconds
        positions = rope_positions(ids == media, grid, v.merge, ticks, text_after)
        after = int(positions.max()) + 1
        return Prompt(record, ids, positions, after, ids == media, frames, v, seconds)
