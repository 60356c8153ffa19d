"""The model families, and all that differs between them: docs/families.md has the list.

    Qwen2-VL    temporal patches are one position apart
    Qwen2.5-VL  temporal patches are their seconds apart
    Qwen3-VL    seconds are words: every temporal patch is a vision block of its own after its time;
                and vision features also join the outputs of the first layers (DeepStack,
                arXiv 2406.04334)
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration)


@dataclass(frozen=True)
class Family:
    name: str
    model: type[PreTrainedModel]
    timestamps: bool = False                            # seconds are words of the prompt


FAMILIES = {                                            # by their config's model_type
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": Family("Qwen3-VL", Qwen3VLForConditionalGeneration, True),
}
HUB_NAME = re.compile(r"\w[\w.-]*/(?!final$|checkpoint-\d+$)[\w.-]+")      # no run's folder


def family_of(config: PreTrainedConfig) -> Family:
    return FAMILIES[config.model_type]


def read_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint's folder or hub name (ORGANISATION/MODEL). OSError where there is
    none; ValueError for another family."""
    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise OSError(f"{name}: no such folder")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        hint = f"; the run's model is {name}/final" if Path(name, "final").exists() else ""
        raise OSError(f"{name}: no config.json in it{hint}")
    kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type", "unknown")
    if kind not in FAMILIES:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(f"a model of type {kind}, which is not one of {known} (dense)")
    config = AutoConfig.from_pretrained(name)
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
        raise ValueError("sliding window attention, which is not supported")
    return config


def end_tokens(tokenizer, config: PreTrainedConfig, generation: dict) -> list[int]:
    """The tokens that end a completion: generation_config.json's, or else the config's, or the
    tokenizer's; and the template's <|im_end|>, which base models leave out. ValueError for none."""
    others = [getattr(x, "eos_token_id", None) for x in (config, config.text_config, tokenizer)]
    given = [generation.get("eos_token_id"), *others]
    ends = next((ids for ids in given if ids is not None), [])
    ends = {ends} if isinstance(ends, int) else set(ends)
    if "<|im_end|>" in (tokenizer.chat_template or ""):
        ends.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    if not ends:
        raise ValueError("no file of it names an end token (eos_token_id)")
    return sorted(ends)


def stamp(text: str, n: int, temporal: int, seconds: float | list[float]) -> str:
    """A prompt with a vision block for each temporal patch of its n frames, after the time of the
    patch's middle. seconds: each frame's after the first, or from one to the next. As transformers
    4.57 and vLLM do; transformers 5 leaves the template's own vision tokens around them all."""
    block, blocks = "<|vision_start|><|video_pad|><|vision_end|>", ""
    for first in range(0, n, temporal):
        last = min(first + temporal, n) - 1             # where n is odd, the last frame is repeated
        time = ((seconds[first] + seconds[last]) / 2 if isinstance(seconds, list)
                else (first + last) / 2 * seconds)
        blocks += f"<{time:.1f} seconds>{block}"
    return text.replace(block, blocks, 1)


def vision_features(tower: nn.Module, patches: Tensor, grids: Tensor) -> Tensor:
    """(V, width): what each merged patch gives the language model, side by side: D as its
    embedding, and D for the output of each of the first layers (DeepStack)."""
    seen = tower(patches, grid_thw=grids)
    return torch.cat([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=-1)


def feature_width(config: PreTrainedConfig) -> int:
    deep = getattr(config.vision_config, "deepstack_visual_indexes", ())
    return config.text_config.hidden_size * (1 + len(deep))
