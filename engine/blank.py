"""Blank models: the architectures of Qwen2.5-VL with random weights, named random:3b, random:7b, random:32b.

They need no download, and cost what the real ones cost. Their tokenizer is that of the shipped cold_start/,
whose words are few but whose special tokens are the real ones, since Qwen's would have to be downloaded.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# from the config.json of Qwen2.5-VL-3B/7B/32B-Instruct
SIZES = {
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
}
VISION_MLP = {"3b": 3420, "7b": 3420, "32b": 3456}      # intermediate size of the vision tower's blocks


def tokenizer():
    """The one of cold_start/."""
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "cold_start")


def config(name: str, tokenizer) -> Qwen2_5_VLConfig:
    """The architecture called `name`, with this tokenizer's special tokens. "random:7b" is that of the 7B;
    "random:7b/4" has its width, but 4 layers and 4 vision blocks. OSError for an unknown size."""
    size, _, layers = name.removeprefix("random:").partition("/")
    if size not in SIZES:
        raise OSError(f"{name}: no such size; known: {', '.join(SIZES)}")
    shape, token = dict(SIZES[size]), tokenizer.convert_tokens_to_ids
    blocks, whole = 32, [7, 15, 23, 31]                 # whole: blocks that attend beyond their window
    if layers:
        shape["num_hidden_layers"] = blocks = int(layers)
        whole = [blocks - 1]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(**shape, max_position_embeddings=128000, rms_norm_eps=1e-6, rope_parameters=rope,
                bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    vision = dict(depth=blocks, hidden_size=1280, intermediate_size=VISION_MLP[size], num_heads=16,
                  out_hidden_size=shape["hidden_size"], window_size=112, fullatt_block_indexes=whole,
                  tokens_per_second=2)
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape["tie_word_embeddings"],
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


def model(name: str, tokenizer, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
          seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """An untouched transformers model of that name. Another seed makes a reference that differs from the policy."""
    torch.manual_seed(seed)
    with torch.device(device):
        made = Qwen2_5_VLForConditionalGeneration._from_config(config(name, tokenizer), dtype=dtype)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return made
