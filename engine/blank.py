"""Blank models: real architectures with random weights, named random:7b, random:qwen3-8b, ..

They need no download, and cost what the real ones cost. Their tokenizer is that of the shipped
cold_start/, whose words are few but whose special tokens are the real ones.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from engine.families import family_of, new_config

# after the config.json of the Instruct models: (hidden, intermediate, layers, heads, key-value
# heads, vocabulary, whether the head is the embedding)
SIZES = {
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen3-2b": (2048, 6144, 28, 16, 8, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
}
# the vision tower: (blocks, hidden, intermediate, blocks that attend beyond their window or whose
# features join the first layers)
TOWERS = {
    "3b": (32, 1280, 3420, [7, 15, 23, 31]), "7b": (32, 1280, 3420, [7, 15, 23, 31]),
    "32b": (32, 1280, 3456, [7, 15, 23, 31]), "qwen2-7b": (32, 1280, 5120, []),
    "qwen3-2b": (24, 1024, 4096, [5, 11, 17]), "qwen3-4b": (24, 1024, 4096, [5, 11, 17]),
    "qwen3-8b": (27, 1152, 4304, [8, 16, 24]),
}


def tokenizer():
    """The one of cold_start/."""
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "cold_start")


def config(name: str, tokenizer) -> PreTrainedConfig:
    """The architecture called `name`, with this tokenizer's special tokens. "random:7b" is that of
    the 7B; "random:7b/4" has its width, but 4 layers and 4 vision blocks. OSError for an unknown
    size."""
    size, _, depth = name.removeprefix("random:").partition("/")
    if size not in SIZES:
        raise OSError(f"{name}: no such size; known: {', '.join(SIZES)}")
    hidden, intermediate, layers, heads, kv_heads, words, tied = SIZES[size]
    blocks, own, inner, special = TOWERS[size]
    if depth:
        layers = blocks = int(depth)
        special = [blocks - 1]
    text = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
                head_dim=128, max_position_embeddings=128000)
    vision = dict(depth=blocks, hidden_size=own, intermediate_size=inner, num_heads=16,
                  out_hidden_size=hidden)
    kind, sections, theta = "qwen2_5_vl", [16, 24, 24], 1e6
    if size.startswith("qwen3"):
        kind, sections, theta = "qwen3_vl", [24, 20, 20], 5e6
        vision["deepstack_visual_indexes"] = special
    elif size.startswith("qwen2"):
        kind = "qwen2_vl"
        vision = dict(depth=blocks, embed_dim=own, mlp_ratio=inner // own, num_heads=16,
                      hidden_size=hidden)
    else:
        vision |= dict(window_size=112, fullatt_block_indexes=special, tokens_per_second=2)
    return new_config(kind, tokenizer, text, vision, sections, theta, tied)


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
