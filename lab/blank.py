"""Blank models: real architectures with random weights, named random:7b, random:qwen3-8b, ..

They need no download, and cost what the real ones cost. Their tokenizer is that of the shipped
cold_start/, whose words are few but whose special tokens are the real ones.
"""

import json
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from engine.families import FAMILIES, family_of

# what `new_config` takes, after the config.json of the Instruct models
SIZES = json.loads(Path(__file__).with_suffix(".json").read_text())


def tokenizer():
    """The one of cold_start/."""
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "cold_start")


def new_config(kind: str, tokenizer, text: dict, vision: dict, sections: list[int],
               theta: float, tied: bool = False) -> PreTrainedConfig:
    """A config of this model_type, with the tokenizer's special tokens. sections, theta: of M-RoPE.
    tied: the head is the embedding."""
    family, token = FAMILIES[kind], tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    if kind == "qwen3_vl":                              # the axes take turns
        rope["mrope_interleaved"] = True
    ends = {"bos_token_id": None, "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>")}
    return family.model.config_class(
        text_config={**text, "rms_norm_eps": 1e-6, "rope_parameters": rope, **ends},
        vision_config=vision, tie_word_embeddings=tied,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"))


def config(name: str, tokenizer) -> PreTrainedConfig:
    """Architecture `name`, with this tokenizer's special tokens: "random:7b", or "random:7b/4" of
    its width, but 4 layers and 4 vision blocks. OSError for an unknown size."""
    size, _, depth = name.removeprefix("random:").partition("/")
    if size not in SIZES:
        raise OSError(f"{name}: no such size; known: {', '.join(SIZES)}")
    shape = deepcopy(SIZES[size])
    if depth:
        text, vision = shape["text"], shape["vision"]
        text["num_hidden_layers"] = vision["depth"] = int(depth)
        for special in ("fullatt_block_indexes", "deepstack_visual_indexes") & vision.keys():
            vision[special] = [int(depth) - 1]
    return new_config(tokenizer=tokenizer, **shape)


def model(name: str, tokenizer, device: torch.device | str = "cpu",
          dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """An untouched transformers model of that name. Another seed makes a reference that differs
    from the policy."""
    torch.manual_seed(seed)
    made = config(name, tokenizer)
    with torch.device(device):
        blank = family_of(made).model._from_config(made, dtype=dtype)
    blank.generation_config.eos_token_id = tokenizer.eos_token_id
    return blank
