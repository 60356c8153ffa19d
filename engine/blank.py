"""TEMPORARY"""
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# from the config.json of Qwen2.5-VL-3B/7B/32B-Instruct
SIZES = {
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie=True, vision=3420),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie=False, vision=3420),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie=False, vision=3456),
}


def config(size: str, tokenizer) -> Qwen2_5_VLConfig:
    """The architecture of this size, with the special tokens of the toy world's tokenizer."""
    size = size.removeprefix("random:")
    if size not in SIZES:
        raise OSError(f"random:{size}: no such size; known: {', '.join(SIZES)}")
    shape, token = dict(SIZES[size]), tokenizer.convert_tokens_to_ids
    tie, vision = shape.pop("tie"), shape.pop("vision")
    return Qwen2_5_VLConfig(
        text_config=dict(
            **shape, max_position_embeddings=128000, rms_norm_eps=1e-6, tie_word_embeddings=tie,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")),
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=vision, num_heads=16, out_hidden_size=shape["hidden_size"],
            window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=tie,
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


def model(name, tokenizer, device, dtype, seed=0):
    torch.manual_seed(seed)
    with torch.device(device):
        m = Qwen2_5_VLForConditionalGeneration._from_config(config(name, tokenizer), dtype=dtype)
    m.generation_config.eos_token_id = tokenizer.eos_token_id
    return m
