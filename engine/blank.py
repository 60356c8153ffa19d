"""Blank models: real architectures with random weights, named random:7b, random:qwen3-8b, ..

They need no download, and cost what the real ones cost. Their tokenizer is that of the shipped
cold_start/, whose words are few but whose special tokens are the real ones.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from engine.families import family_of, new_config

# after the config.json of the Instruct models: (hidden, intermediate, layers, heads, key-value
# heads, vocabulary, whether the head is the embedding, the vision tower)
SIZES = {
    "3b": (2048, 11008, 36, 16, 2, 151936, True, "qwen2_5_vl", 3420),
    "7b": (3584, 18944, 28, 28, 4, 152064, False, "qwen2_5_vl", 3420),
    "32b": (5120, 27648, 64, 40, 8, 152064, False, "qwen2_5_vl", 3456),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False, "qwen2_vl", None),
    "qwen3-2b": (2048, 6144, 28, 16, 8, 151936, True, "qwen3_vl", "300M"),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True, "qwen3_vl", "300M"),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False, "qwen3_vl", "400M"),
}
SIGLIP = {              # the towers of Qwen3-VL, SigLIP-2's: depth, hidden, intermediate, deepstack
    "300M": (24, 1024, 4096, [5, 11, 17]),
    "400M": (27, 1152, 4304, [8, 16, 24]),
}


def tokenizer():
    """The one of cold_start/."""
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "cold_start")


def tower(kind: str, hidden: int, variant: int | str | None) -> dict:
    """The vision config of a family's model with this hidden size."""
    if kind == "qwen3_vl":
        depth, own, intermediate, deep = SIGLIP[variant]
        return dict(depth=depth, hidden_size=own, intermediate_size=intermediate, num_heads=16,
                    out_hidden_size=hidden, deepstack_visual_indexes=deep)
    if kind == "qwen2_vl":
        return dict(depth=32, embed_dim=1280, hidden_size=hidden, num_heads=16, mlp_ratio=4)
    return dict(depth=32, hidden_size=1280, intermediate_size=variant, num_heads=16,
                out_hidden_size=hidden, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
                tokens_per_second=2)


def config(name: str, tokenizer) -> PreTrainedConfig:
    """The architecture called `name` ("random:7b"), with this tokenizer's special tokens.
    OSError for an unknown size."""
    size = name.removeprefix("random:")
    if size not in SIZES:
        raise OSError(f"{name}: no such size; known: {', '.join(SIZES)}")
    hidden, intermediate, layers, heads, kv_heads, words, tied, kind, variant = SIZES[size]
    text = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
                head_dim=128, max_position_embeddings=128000)
    sections, theta = ([24, 20, 20], 5e6) if kind == "qwen3_vl" else ([16, 24, 24], 1e6)
    return new_config(kind, tokenizer, text, tower(kind, hidden, variant), sections, theta, tied)


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
