"""The policy against the plain forward and the library's own generate."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import as_in_transformers_5, masked, plain_inputs

import policy
from engine import scoring
from engine.decoding import vision_tokens
from engine.prepare import recompute
from engine.scoring import TokenStats
from lab.rules.common import leave_out_tokens
from policy import batches, plain_score, sample, score, score_groups
from rollout import Group

ENDS = [2, 20, 30, 40]          # several end tokens, so that a random model ends at all


@pytest.fixture(scope="module")
def groups(tiny, prompts):
    return sample(tiny[0], prompts, 4, 20, seeds=[1, 2, 3, 4], ends=ENDS)


def test_sampling_stops_at_the_end_token_and_keeps_it(groups):
    lengths = {n for group in groups for n in group.lengths}
    assert len(lengths) > 2                     # they differ, or this test shows nothing
    for group in groups:
        for row, n, ended in zip(group.ids.tolist(), group.lengths, group.ended.tolist()):
            assert not set(ENDS) & set(row[:n - 1])
            assert (row[n - 1] in ENDS) == ended and (ended or n == 20)


def test_the_shared_prompt_equals_the_plain_forward(tiny, plain, prompts, groups):
    for prompt, group in zip(prompts, groups):
        logp, entropy = score(tiny[0], prompt, group)
        for g, n in enumerate(group.lengths):
            want = plain_score(plain, prompt, group.ids[g:g + 1, :n])
            assert torch.allclose(logp[g, :n], want[0][0], atol=1e-5)
            assert torch.allclose(entropy[g, :n], want[1][0], atol=1e-5)
            assert (logp[g, n:] == 0).all() and (entropy[g, n:] == 0).all()


@torch.no_grad()
def test_the_plain_forward_is_transformers_own(tiny, plain, prompts):
    """At its own positions, whole distributions, one completion at a time."""
    ids = torch.randint(9, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    for prompt in (as_in_transformers_5(tiny[1], prompt) for prompt in prompts):
        logp, entropy = plain_score(plain, prompt, ids)
        for g in range(3):
            inputs = plain_inputs(prompt, ids[g])
            inputs.pop("position_ids")
            want = plain(**inputs).logits[0, len(prompt.ids) - 1:-1].log_softmax(-1)
            assert torch.allclose(logp[g], want.gather(-1, ids[g][:, None])[:, 0], atol=1e-5)
            assert torch.allclose(entropy[g], -(want.exp() * want).sum(-1), atol=1e-5)


def test_what_sampling_saw_is_what_scoring_finds(tiny, prompts, groups):
    for prompt, group in zip(prompts, groups):
        seen = group.logp.masked_fill(~group.completion_mask, 0)
        assert torch.allclose(score(tiny[0], prompt, group)[0], seen, atol=1e-5)


def test_prompts_scored_together_and_alone_agree(tiny, prompts, groups):
    for (logp, _), prompt, group in zip(score_groups(tiny[0], prompts, groups), prompts, groups):
        assert torch.allclose(logp, score(tiny[0], prompt, group)[0], atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_plain_forwards(tiny, plain, prompts, groups, checkpointing):
    model, (prompt, group) = tiny[0], (prompts[0], groups[0])
    weights = torch.randn(group.ids.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad(), plain.zero_grad()
    if checkpointing:
        recompute(model)
        model.train()
    (score(model, prompt, group)[0] * weights).sum().backward()
    recompute(model, False)
    model.eval()
    for g, n in enumerate(group.lengths):
        ids = group.ids[g, :n]
        logp = plain_score(plain, prompt, ids[None])[0][0]
        (logp * weights[g, :n]).sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        tolerance = 1e-5 * max(1, b.grad.abs().max())
        assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=tolerance), name
    model.zero_grad(), plain.zero_grad()


def test_interface_takes_plain_tensors(tiny, prompts):
    ids = torch.randint(9, 40, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    logp, entropy = score(tiny[0], prompts[0], ids, mask)
    assert logp.shape == entropy.shape == (3, 5)
    assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()
    assert torch.allclose(score(tiny[0], prompts[0], ids[:1])[0], logp[:1], atol=1e-5)


def test_hiding_the_video_equals_an_attention_mask(tiny, plain, prompts, groups):
    """Dropping the video tokens and keeping positions gives what masking them in every query
    gives."""
    prompt, group = prompts[0], groups[0]
    got = score(tiny[0], masked(prompt), group)[0]
    for g, n in enumerate(group.lengths):
        inputs = plain_inputs(prompt, group.ids[g, :n])
        length = len(prompt.ids) + n
        visible = torch.ones(length, length).tril().bool()
        visible[:, :len(prompt.ids)] &= ~prompt.visual
        visible |= torch.eye(length).bool()     # the hidden tokens' own rows must not be empty
        embeds = plain.get_input_embeddings()(inputs["input_ids"])
        hidden = plain.model.language_model(
            inputs_embeds=embeds, position_ids=inputs["position_ids"],
            attention_mask={"full_attention": visible[None, None]}).last_hidden_state
        logp = plain.lm_head(hidden)[0, len(prompt.ids) - 1:-1].log_softmax(-1)
        want = logp.gather(-1, group.ids[g, :n, None])[:, 0]
        assert torch.allclose(got[g, :n], want, atol=1e-5)


def test_completions_stay_where_they_were_when_a_long_clip_is_hidden(tiny, prompts):
    """In a long clip the highest position is the last second's; hiding it must not move the
    completion."""
    long = tiny[1].prompt(prompts[0].record, prompts[0].frames, 15.0, text_after="frame")
    assert long.positions[:, ~long.visual].max() < long.positions.max()
    assert masked(long).next_position == long.next_position == int(long.positions.max()) + 1
    assert masked(long, "moved").next_position == len(masked(long, "moved").ids)


def test_a_hidden_video_is_not_computed(tiny, prompts, groups, monkeypatch):
    seen = []
    forward = tiny[0].model.language_model.forward
    monkeypatch.setattr(tiny[0].model.language_model, "forward",
                        lambda **kw: seen.append(kw["inputs_embeds"].shape[1]) or forward(**kw))

    def ran(*_, **__):
        pytest.fail("the vision tower ran")
    monkeypatch.setattr(tiny[0].model.visual, "forward", ran)
    score(tiny[0], masked(prompts[0]), groups[0])
    text = int((~prompts[0].visual).sum())
    assert seen == [text + sum(groups[0].lengths)]


def test_counterfactuals_change_what_is_seen(tiny, prompts, groups):
    whole = score(tiny[0], prompts[0], groups[0])[0]
    keep = torch.arange(int(prompts[0].visual.sum())) % 2 == 0
    for changed in (masked(prompts[0]), replace(prompts[0], zeroed=True),
                    leave_out_tokens(prompts[0], keep),
                    prompts[0].with_frames(prompts[0].frames.flip(0))):
        assert (score(tiny[0], changed, groups[0])[0] - whole).abs().max() > 1e-3


def test_questions_about_one_clip_share_its_features(tiny, prompts, groups, monkeypatch):
    calls = []
    forward = tiny[0].model.visual.forward
    monkeypatch.setattr(tiny[0].model.visual, "forward",
                        lambda x, **k: calls.append(len(x)) or forward(x, **k))
    alone = [score(tiny[0], prompts[0], group)[0] for group in groups[:2]]
    again = replace(prompts[0], record={**prompts[0].record})       # another question, same clip
    together = score_groups(tiny[0], [prompts[0], again], groups[:2])
    assert calls[0] == calls[2] and len(calls) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, (b, _) in zip(alone, together))


def test_token_stats_in_chunks(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 3)
    torch.manual_seed(0)
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids, scale = torch.randint(0, 11, (8,)), torch.randn(8, dtype=torch.float64)
    logp, entropy = TokenStats.apply(hidden, weight, ids)
    want = F.linear(hidden, weight).log_softmax(-1)
    sampled = want.gather(-1, ids[:, None])[:, 0]
    assert torch.allclose(logp.double(), sampled, atol=1e-5)
    assert torch.allclose(entropy.double(), -(want.exp() * want).sum(-1), atol=1e-5)
    got = torch.autograd.grad((logp * scale).sum(), (hidden, weight))
    exact = torch.autograd.grad((sampled * scale).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, exact))


def test_greedy_sampling_equals_generate(tiny, plain, prompts):
    prompts = [as_in_transformers_5(tiny[1], prompt) for prompt in prompts]
    for prompt, group in zip(prompts, sample(tiny[0], prompts, 1, 24, temperature=0)):
        want = plain.generate(**plain_inputs(prompt), max_new_tokens=24, do_sample=False,
                              suppress_tokens=vision_tokens(plain.config))
        assert group.ids[0, :group.lengths[0]].tolist() == want[0, len(prompt.ids):].tolist()


def test_a_prompts_random_numbers_depend_on_its_seed_alone(tiny, prompts, groups):
    alone = sample(tiny[0], [prompts[2]], 4, 20, seeds=[3], ends=ENDS)[0]
    assert torch.equal(alone.ids[alone.completion_mask], groups[2].ids[groups[2].completion_mask])
    other = sample(tiny[0], [prompts[2]], 4, 20, seeds=[30], ends=ENDS)[0]
    assert other.lengths != alone.lengths or not torch.equal(other.ids, alone.ids)


def test_vision_tokens_never_come_out(tiny, prompts):
    model = tiny[0]
    banned = vision_tokens(model.config)
    assert len(banned) == 4
    flat = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[banned] *= 60      # now they would be by far the likeliest
    try:
        for temperature in (0.0, 1.0):
            (group,) = sample(model, prompts[:1], 8, 30, temperature=temperature, top_p=1.0)
            assert not torch.isin(group.ids, torch.tensor(banned)).any()
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(flat)


def test_batches():
    assert batches([3, 3, 3], 6) == [slice(0, 2), slice(2, 3)]
    assert batches([9, 1, 1], 6) == [slice(0, 1), slice(1, 3)] and batches([], 6) == []


def test_group_lengths():
    assert Group(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()).lengths == [2, 3]


def test_a_clip_is_seen_once_for_all_its_questions(tiny, prompts, monkeypatch):
    """Also when its questions are prefilled apart (as 64-frame prompts are); the tokens are the
    same."""
    model, seen = tiny[0], []
    two = [prompts[0], replace(prompts[0], record={**prompts[0].record})]
    together = policy.sample(model, two, 2, 8, temperature=0)
    watch = model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(policy, "PREFILL", 1)
    apart = policy.sample(model, two, 2, 8, temperature=0)
    watch.remove()
    assert len(seen) == 1 and all(torch.equal(a.ids, b.ids) for a, b in zip(together, apart))
