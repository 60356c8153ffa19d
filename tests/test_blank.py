"""Blank models: architectures of the published size, random weights that a seed decides."""

import pytest
import torch

from lab import blank
from engine.families import family_of
from lab import toy

# weights of the language models, head included, as technical reports and model cards give them
# (Qwen2.5 3.09B, 7.61B, 32.8B; Qwen3 1.7B, 4.0B, 8.2B), and billions of the whole as on the hub
TEXT = {
    "3b": 3_085_938_688,
    "7b": 7_615_616_512,
    "32b": 32_763_876_352,
    "qwen2-7b": 7_615_616_512,
    "qwen3-2b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}
WHOLE = {
    "3b": 3.75,
    "7b": 8.29,
    "32b": 33.5,
    "qwen2-7b": 8.29,
    "qwen3-2b": 2.13,
    "qwen3-4b": 4.44,
    "qwen3-8b": 8.77,
}
TIED = ("3b", "qwen3-2b", "qwen3-4b")


@pytest.mark.parametrize("size", blank.SIZES)
def test_architectures_have_the_published_size(size):
    tokenizer = blank.tokenizer()
    config = blank.config(f"random:{size}", tokenizer)
    with torch.device("meta"):
        model = family_of(config).model._from_config(config, dtype=torch.bfloat16)
    weights, seeing = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.visual))
    assert weights - seeing == TEXT[size]
    assert weights / 1e9 == pytest.approx(WHOLE[size], rel=0.002)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (size in TIED)
    special = [config.video_token_id, config.text_config.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(special) == ["<|video_pad|>", "<|im_end|>"]


def test_an_unknown_size_is_named():
    with pytest.raises(OSError, match="random:4b.*3b, 7b, 32b"):
        blank.config("random:4b", blank.tokenizer())


def test_seeds_make_different_random_weights(monkeypatch):
    """Policy and reference differ, so that the KL is no constant 0; the policy is the same on
    every rank."""
    monkeypatch.setattr(blank, "config", lambda name, tokenizer: toy.new_config(tokenizer))
    made = [blank.model("random:7b", blank.tokenizer(), seed=seed) for seed in (0, 0, 1)]
    a, again, other = [m.model.language_model.layers[0].mlp.up_proj.weight for m in made]
    assert torch.equal(a, again) and not torch.equal(a, other) and a.dtype == torch.bfloat16
