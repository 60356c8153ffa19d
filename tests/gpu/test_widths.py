"""Every family at its real width on a GPU, four layers of it, against transformers.

What a whole step of each costs is measured by `python -m bench.engine ours families`.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import masked, plain_inputs

from lab import blank
from engine.decoding import vision_tokens
from engine.prepare import prepare, recompute
from policy import load_processor, plain_score, sample, score, score_groups
from prompt import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
T, SCORED = 24, 96      # tokens that are sampled, and scored
WORDS = {"problem": "which way does the circle move " * 30, "options": [], "path": "",
         "problem_type": "numerical", "solution": "<answer>1</answer>", "problem_id": 0, "row": 0}


@pytest.fixture(scope="module", params=["random:7b/4", "random:qwen2-7b/4", "random:qwen3-8b/4"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plain(name):
    """fp32, transformers' own; weights doubled, so that what is seen matters."""
    model = blank.model(name, blank.tokenizer(), GPU, torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(2)
    return model


@pytest.fixture(scope="module")
def prompts(name):
    """A clip of 8 frames and a still image of noise."""
    processor, rng, made = load_processor(name), np.random.default_rng(0), []
    for kind, n in (("video", 8), ("image", 1)):
        frames = rng.integers(0, 255, (n, 160, 224, 3), dtype=np.uint8)
        record = {**WORDS, "data_type": kind}
        frames = fit(frames, 160 * 224, processor.vision)
        made.append(processor.prompt(record, frames, 0.5, text_after="frame"))      # as generate
    return made


def inputs_of(model, prompt, completion=None):
    inputs = plain_inputs(prompt, None if completion is None else completion.cpu())
    if model.config.model_type != "qwen2_5_vl":
        inputs.pop("second_per_grid_ts", None)
    cast = {torch.float32: model.dtype}
    return {key: x.to(GPU, cast.get(x.dtype, x.dtype)) for key, x in inputs.items()}


@torch.no_grad()
def plain_scores(model, prompt, rows):
    """transformers' own (G, T) log-probabilities."""
    return plain_score(model, prompt, rows)[0]


def test_fp32_equals_transformers(name, plain, prompts):
    ours = prepare(copy.deepcopy(plain), GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    ids = torch.randint(20, 1000, (4, T), device=GPU, generator=generator)
    for prompt, group in zip(prompts, sample(ours, prompts, 1, T, temperature=0, ends=())):
        with torch.no_grad():
            got, _ = score(ours, prompt, ids)
            hidden, _ = score(ours, masked(prompt), ids)
        gap = (got - plain_scores(plain, prompt, ids)).abs().max().item()
        print(f"{name}: fp32 scores are at most {gap:.1e} nats from transformers'")
        assert gap < 3e-4
        assert (got - hidden).abs().max() > 1e-2
        want = plain.generate(**inputs_of(plain, prompt), max_new_tokens=T, do_sample=False,
                              eos_token_id=None, suppress_tokens=vision_tokens(plain.config))
        assert group.ids[0].tolist() == want[0, len(prompt.ids):].tolist()


def cast(model, dtype):
    """A copy with weights of this type; rotary frequencies stay as they were."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def test_bf16_is_as_near_to_fp32_as_transformers_is(name, plain, prompts):
    """And differentiates: every weight gets a finite gradient that is not zero."""
    half = cast(plain, torch.bfloat16)
    exact = cast(half, torch.float32)                           # the same rounded weights
    ours = prepare(copy.deepcopy(half), GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    ids = torch.randint(20, 1000, (4, SCORED), device=GPU, generator=generator)
    sampled = sample(ours, prompts, 4, T, ends=())
    gaps = {"transformers": [], "score": [], "sample": []}
    for prompt, group in zip(prompts, sampled):
        want = plain_scores(exact, prompt, ids)
        with torch.no_grad():
            got, _ = score(ours, prompt, ids)
        gaps["transformers"].append((plain_scores(half, prompt, ids) - want).abs().mean())
        gaps["score"].append((got - want).abs().mean())
        want = plain_scores(exact, prompt, group.ids)
        gaps["sample"].append((group.logp - want).abs().mean())
    means = {who: torch.stack(found).mean().item() for who, found in gaps.items()}
    print(name, "mean distance to fp32, nats:", {who: f"{x:.4f}" for who, x in means.items()})
    assert means["score"] < 1.2 * means["transformers"]         # the same tokens; chance is 5%
    assert means["sample"] < 1.5 * means["transformers"]        # others, and fewer
    recompute(ours).train()
    groups = score_groups(ours, prompts, sampled)
    sum(logp.mean() for logp, _ in groups).backward()
    for key, p in ours.named_parameters():                      # with recomputation
        assert torch.isfinite(p.grad).all() and p.grad.any(), key
