"""The engine on a GPU against itself: alone, on the CPU, in plain form. test_widths.py compares it
with transformers."""

import pytest
import torch
import torch.nn.functional as F
from launch import random_prompt
from torch import nn

from engine import sharded
from engine.decoding import choose
from engine.kernels import attend, thin_linear
from engine.packing import Step
from engine.prepare import prepare, recompute
from engine.sharded import ShardedAdamW, flatten
from lab import blank
from policy import load_processor, sample, score, score_groups
from rollout import Group

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def processor():
    return load_processor("random:7b")


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


@pytest.fixture(scope="module")
def short_and_long(processor):
    prompts = [
        random_prompt(processor, 4, 56, 56, 6),
        random_prompt(processor, 32, 448, 448, 1200, seed=1),
    ]
    assert len(prompts[1].ids) > 30 * len(prompts[0].ids)
    return prompts


def test_prompts_of_very_different_lengths_are_decoded_as_if_alone(processor, short_and_long):
    """In fp32 and greedily: the words of a blank model are all about as likely, so in bf16 another
    rounding would choose other ones."""
    model = prepare(blank.model("random:3b/4", blank.tokenizer(), GPU, torch.float32), GPU)
    groups = sample(model, short_and_long, 2, 40, temperature=0, ends=())
    for prompt, group in zip(short_and_long, groups):
        (alone,) = sample(model, [prompt], 2, 40, temperature=0, ends=())
        assert torch.equal(group.ids, alone.ids)
        assert torch.allclose(group.logp, alone.logp, atol=1e-4)


def test_prompts_of_very_different_lengths_are_scored_as_if_alone(processor, short_and_long):
    model = prepare(blank.model("random:3b/4", blank.tokenizer(), GPU, torch.bfloat16), GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    groups = []
    for lengths in ([1, 40, 7, 3], [40, 2, 40, 1]):
        ids = torch.randint(1000, (4, 40), device=GPU, generator=generator)
        valid = torch.arange(40, device=GPU) < torch.tensor(lengths, device=GPU)[:, None]
        groups.append(Group(ids, valid))
    with torch.no_grad():
        together = score_groups(model, short_and_long, groups)
        for (logp, _), prompt, group in zip(together, short_and_long, groups):
            gap = (logp - score(model, prompt, group)[0]).abs()
            print(f"scored together and alone, nats apart: mean {gap.mean():.4f}, "
                  f"most {gap.max():.4f}")
            assert gap.max() < 0.1


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
        got, again = thin_linear(x, weight, bias), thin_linear(x, weight, bias)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == torch.bfloat16 and torch.equal(got, again)
    assert (got - want).norm() / want.norm() < 3e-3


@pytest.mark.parametrize(
    "lengths, G, step, heads, D, dtype",
    [
        ([1203], 8, 300, (28, 4), 128, torch.bfloat16),             # the 7B's step
        ([1203, 7, 900, 1], 8, 511, (28, 4), 128, torch.bfloat16),
        ([4200] * 32, 1, 0, (28, 4), 128, torch.bfloat16),          # evaluation
        ([1203], 8, 300, (32, 8), 128, torch.float32),
        ([1, 100, 37], 3, 11, (4, 2), 32, torch.float32),           # the toy model
        ([64, 3], 12, 40, (14, 2), 16, torch.float32),              # rows in two tiles
        ([5], 2, 0, (4, 4), 64, torch.float16),                     # fewer slots than programs
    ],
)
def test_attention_of_a_step_equals_sdpa(lengths, G, step, heads, D, dtype):
    """In double precision; what no completion sees is NaN."""
    torch.manual_seed(0)
    N, (H, H_kv), room = len(lengths), heads, max(lengths) + 20
    query = torch.randn(N, H, G, D, device=GPU, dtype=dtype)
    keys, values = torch.randn(2, N, H_kv, room + G * (step + 3), D, device=GPU, dtype=dtype)
    keys[:, :, room + G * (step + 1) :] = values[:, :, room + G * (step + 1) :] = torch.nan
    for n, length in enumerate(lengths):
        keys[n, :, length:room] = values[n, :, length:room] = torch.nan
    slots = room + step * G + torch.arange(G, device=GPU)
    got, again = (
        attend(query, keys, values, slots, room, torch.tensor(lengths, device=GPU), None)
        for _ in range(2)
    )
    assert torch.equal(got, again) and got.dtype == dtype
    sees = Step(slots.cpu(), room, torch.tensor(lengths)).sees().to(GPU)
    n = sees.shape[-1]
    want = F.scaled_dot_product_attention(
        query.double(),
        keys[:, :, :n].double().nan_to_num(),
        values[:, :, :n].double().nan_to_num(),
        attn_mask=sees,
        enable_gqa=True,
    ).transpose(1, 2)
    assert (got - want).norm() / want.norm() < (1e-6 if dtype == torch.float32 else 5e-3)


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
