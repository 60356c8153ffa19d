"""The engine on a GPU against transformers, and against itself on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import plain_inputs
from engine import blank, sharded, thin
from engine.decoding import choose, vision_tokens
from engine.prepare import prepare, recompute
from engine.sharded import ShardedAdamW, flatten
from launch import random_prompt
from policy import Group, load_processor, sample, score, score_groups

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def processor():
    return load_processor("random:7b")


@pytest.fixture(scope="module")
def wide():
    """7B's width, four layers and blocks of it, fp32; weights doubled, so that what is seen
    matters."""
    model = blank.model("random:7b/4", blank.tokenizer(), GPU, torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(2)
    return model


def plain_scores(model, prompt, completion):
    """transformers' own (n,) log-probabilities of one completion."""
    inputs = {name: x.to(GPU) for name, x in plain_inputs(prompt, completion.cpu()).items()}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


@pytest.fixture(scope="module")
def case(processor):
    prompt = random_prompt(processor, 8, 140, 224)
    ids = torch.randint(1000, (4, 24), device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    return prompt, ids


def test_fp32_equals_transformers(wide, case):
    prompt, ids = case
    want = torch.stack([plain_scores(wide, prompt, row) for row in ids])
    greedy = {name: x.to(GPU) for name, x in plain_inputs(prompt).items()}
    tokens = wide.generate(
        **greedy,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=vision_tokens(wide.config),
    )[0, len(prompt.ids) :]
    ours = prepare(copy.deepcopy(wide), GPU)
    with torch.no_grad():
        got = score(ours, prompt, ids)[0]
    assert (got - want).abs().max() < 1e-4
    (group,) = sample(ours, [prompt], 1, 24, temperature=0, ends=())
    assert group.ids[0].tolist() == tokens.tolist()
    with torch.no_grad():
        again = score(ours, prompt, group)[0]
    assert (again - group.logp).abs().max() < 1e-4


def test_bf16_is_as_near_to_fp32_as_transformers_is(wide, case):
    prompt, ids = case
    half = copy.deepcopy(wide).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()  # the same rounded weights
    want = torch.stack([plain_scores(exact, prompt, row) for row in ids])
    theirs = (
        (torch.stack([plain_scores(half, prompt, row) for row in ids]) - want).abs().mean().item()
    )
    ours = prepare(half, GPU)
    with torch.no_grad():
        scored = (score(ours, prompt, ids)[0] - want).abs().mean().item()
    (group,) = sample(ours, [prompt], 4, 24, ends=())
    rows = torch.stack([plain_scores(exact, prompt, row) for row in group.ids])
    sampled = (group.logp - rows).abs().mean().item()
    print(
        f"mean distance to fp32, nats: transformers {theirs:.4f}, score {scored:.4f}, "
        f"sample {sampled:.4f}"
    )
    assert scored < 1.15 * theirs and sampled < 1.15 * theirs


def test_sixty_four_frames(processor):
    """8,192 video tokens at the whole 7B's size: sampled, scored and differentiated."""
    model = recompute(
        prepare(blank.model("random:7b", blank.tokenizer(), GPU, torch.bfloat16), GPU)
    )
    prompt = random_prompt(processor, 64, 448, 448)
    assert prompt.visual.sum() == 8192
    torch.cuda.reset_peak_memory_stats()
    (group,) = sample(model, [prompt], 8, 64, ends=())
    logp, entropy = score(model, prompt, group)
    (logp.sum() / logp.numel()).backward()
    assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert (logp.detach() - group.logp).abs().mean() < 0.1
    print(f"64 frames: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def test_prompts_of_very_different_lengths(processor):
    model = prepare(blank.model("random:3b/4", blank.tokenizer(), GPU, torch.bfloat16), GPU)
    prompts = [
        random_prompt(processor, 4, 56, 56, 6),
        random_prompt(processor, 32, 448, 448, 1200, seed=1),
    ]
    assert len(prompts[1].ids) > 30 * len(prompts[0].ids)
    groups = sample(model, prompts, 4, 40, seeds=[5, 6], ends=())
    alone = [sample(model, [p], 4, 40, seeds=[s], ends=())[0] for p, s in zip(prompts, (5, 6))]
    same = [(a.ids == b.ids).float().mean().item() for a, b in zip(groups, alone)]
    assert min(same) > 0.5  # rounding moves a draw now and then, and all that follows
    groups = [
        Group(g.ids, torch.arange(40, device=GPU) < torch.tensor(n, device=GPU)[:, None])
        for g, n in zip(groups, ([1, 40, 7, 3], [40, 2, 40, 1]))
    ]
    with torch.no_grad():
        for (logp, _), prompt, group in zip(score_groups(model, prompts, groups), prompts, groups):
            assert torch.allclose(logp, score(model, prompt, group)[0], atol=0.05)


@pytest.mark.parametrize("how", [(1.0, 0.95, 0), (0.7, 0.9, 50)])
def test_compiled_choice_equals_the_plain_one(how):
    torch.manual_seed(0)
    logits, banned = torch.randn(8, 152064) * 3, torch.zeros(152064, dtype=torch.bool)
    draws = torch.rand(8)
    token, logp = choose(logits, draws, banned, *how)
    got = choose(logits.cuda(), draws.cuda(), banned.cuda(), *how)
    assert (got[0].cpu() == token).float().mean() >= 7 / 8  # sums differ in the last place
    same = got[0].cpu() == token
    assert torch.allclose(got[1].cpu()[same], logp[same], atol=1e-4)


@pytest.mark.parametrize(
    "rows, N, K, biased",
    [
        (8, 4608, 3584, True),
        (32, 3584, 18944, False),
        (1, 100, 128, True),
        (64, 152064, 2048, False),
        (8, 37888, 3584, False),
        (3, 77, 200, True),
    ],
)
def test_thin_products(rows, N, K, biased):
    x, weight = (
        torch.randn(shape, device=GPU, dtype=torch.bfloat16)
        for shape in ((2, rows, K)[-2:], (N, K))
    )
    bias = torch.randn(N, device=GPU, dtype=torch.bfloat16) if biased else None
    with torch.no_grad():
        got, again = thin.linear(x, weight, bias), thin.linear(x, weight, bias)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == torch.bfloat16 and torch.equal(got, again)
    assert (got - want).norm() / want.norm() < 3e-3


def test_state_in_host_memory_makes_the_same_weights(monkeypatch):
    """After five steps in parts smaller than most matrices, bit by bit."""
    monkeypatch.setattr(sharded, "AT_ONCE", 1 << 16)
    modules = []
    for offload in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(300, 700), nn.LayerNorm(700), nn.Linear(700, 999)).to(
            torch.bfloat16
        )
        flatten(module, GPU)
        optimizer = ShardedAdamW(module, 1e-3, 0.01, offload=offload)
        for step in range(5):
            generator = torch.Generator(GPU).manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, device=GPU, generator=generator).to(p.dtype)
            optimizer.step(1e-3, 0.7)
        modules.append((module, optimizer))
    (a, on_gpu), (b, on_host) = modules
    assert (
        all(x.is_pinned() for part in on_host.parts for x in part.state) and len(on_host.parts) > 10
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    torch.cuda.synchronize()
    for x, y in zip(on_gpu.parts, on_host.parts):
        assert all(torch.equal(s.cpu(), t) for s, t in zip(x.state, y.state))
