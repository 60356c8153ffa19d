"""Attribution: shift and selection by hand, and what each signal asks the model for."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from attribution import (
    COUNTERFACTUALS, SCORES, RuleError, attribute, frame_order, mask_video, select, shift,
    top_tokens)
from ktr import find_key_tokens
from options import Options
from policy import score, score_groups
from rollout import Group, Rollout
from run.arguments import load_rule


# ------------------------------------------------------------------------------ shift and selection
def test_shift_by_hand():
    logp, other = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.5]])
    assert shift(logp, other).tolist() == [[2.0, 1.0, 0.0]]
    assert shift(logp, other, "signed").tolist() == [[2.0, -1.0, 0.0]]
    k3 = [math.exp(-2) + 2 - 1, math.exp(1) - 1 - 1, 0.0]    # d = other - logp: -2, 1, 0
    assert shift(logp, other, "k3")[0].tolist() == pytest.approx(k3)
    with pytest.raises(ValueError, match="relative"):
        shift(logp, other, "relative")


def test_top_tokens_by_hand():
    scores = torch.tensor([[5.0, 1.0, 9.0], [7.0, 8.0, 2.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])     # the best one is padding
    group, response = top_tokens(scores, valid, 0.4), top_tokens(scores, valid, 0.5, "response")
    assert group.tolist() == [[False, False, False], [True, True, False]]
    assert response.tolist() == [[True, False, False], [True, True, False]]


def test_ties_go_to_the_earlier_token():
    scores, valid = torch.ones(2, 5), torch.ones(2, 5).bool()
    assert top_tokens(scores, valid, 0.3).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    each = top_tokens(scores, valid, 0.2, "response")
    assert each.nonzero().tolist() == [[0, 0], [1, 0]]
    assert top_tokens(scores, valid, 0.3, ties="threshold").all()       # the released code's >=


RATIOS, COUNTS = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], [0, 1, 3, 10, 15, 29, 30]


@pytest.mark.parametrize("ratio, n", list(itertools.product(RATIOS, COUNTS)))
def test_exactly_the_ceiling(ratio, n):
    valid = (torch.arange(36) < n).view(4, 9)
    chosen = top_tokens(torch.randn(4, 9), valid, ratio)
    assert chosen.sum() == math.ceil(round(ratio * n, 9)) and not (chosen & ~valid).any()


def test_against_brute_force():
    torch.manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 4, (3, 6)).float()                    # many ties
        valid = torch.rand(3, 6) < 0.7
        places = valid.nonzero().tolist()
        order = sorted((-scores[g, t].item(), g, t) for g, t in places)
        want = torch.zeros(3, 6).bool()
        for _, g, t in order[:math.ceil(0.25 * len(order))]:
            want[g, t] = True
        assert torch.equal(top_tokens(scores, valid, 0.25), want)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("pool", ["group", "response"])
def test_a_threshold_is_torchs_quantile(ratio, pool):
    """As the released code has it. Where (1 - ratio)(n - 1) is whole in exact arithmetic, rounding
    decides about the token at the threshold: it must be decided as torch.quantile does."""
    torch.manual_seed(0)
    for n in (1, 2, 5, 6, 10, 11, 21, 41, 101):
        for scores in (torch.randn(2, n), torch.randint(0, 4, (2, n)).float()):
            valid = torch.rand(2, n) < 0.8
            want = torch.zeros(2, n).bool()
            pools = [valid] if pool == "group" else [valid & (torch.arange(2) == g)[:, None]
                                                     for g in range(2)]
            for members in pools:
                if members.any():
                    threshold = torch.quantile(scores[members], 1 - ratio)
                    want |= members & (scores >= threshold)
            assert torch.equal(top_tokens(scores, valid, ratio, pool, "threshold"), want)


def test_inputs_are_untouched_and_bad_ones_refused():
    scores, valid = torch.randn(2, 4), torch.ones(2, 4).bool()
    before = scores.clone()
    top_tokens(scores, valid, 0.5)
    assert torch.equal(scores, before) and valid.all()
    for bad in ({"ratio": 1.5}, {"ratio": -0.1}, {"ratio": 0.5, "pool": "batch"},
                {"ratio": 0.5, "ties": "late"}):
        with pytest.raises(ValueError):
            top_tokens(scores, valid, **bad)
    scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        top_tokens(scores, valid, 0.5)
    valid[1, 1] = False
    top_tokens(scores, valid, 0.5)                                      # padding does not matter


def test_select_is_the_union():
    valid = torch.ones(1, 10).bool()
    signals = {"a": torch.arange(10.0)[None], "b": -torch.arange(10.0)[None]}
    got = select(signals, valid, {"a": 0.2, "b": 0.1})
    assert got.nonzero()[:, 1].tolist() == [0, 8, 9]
    assert not select({}, valid, {}).any()
    assert torch.equal(select(signals, valid, 0.2), select(signals, valid, {"a": 0.2, "b": 0.2}))


def test_an_order_of_frames_is_never_the_identity():
    for n in (2, 3, 8):
        for seed in range(60):
            order = frame_order(n, torch.Generator().manual_seed(seed)).tolist()
            assert sorted(order) == list(range(n)) and order != list(range(n))


# ------------------------------------------------------------------------------------------ signals
def rollout(prompt, seed=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(9, 40, (2, 3), generator=generator)
    r = Rollout(prompt, Group(ids, torch.tensor([[True, True, True], [True, True, False]])), seed)
    r.logp = -torch.rand(2, 3, generator=generator).masked_fill(~r.group.completion_mask, 0)
    r.entropy = torch.rand(2, 3, generator=generator).masked_fill(~r.group.completion_mask, 0)
    return r


class Asked(list):
    """A function that scores prompts: what it is asked for; every answer is logp = -2."""

    def __call__(self, prompts, groups):
        self.append(list(zip(prompts, groups)))
        return [torch.full(group.ids.shape, -2.0) for group in groups]


@pytest.fixture
def asked():
    return Asked()


def same_frames(a, b):
    return sorted(map(str, a.frames.tolist())) == sorted(map(str, b.frames.tolist()))


def test_signals_ask_for_the_right_counterfactual(prompts, asked):
    clip, image = prompts[0], prompts[3]
    rollouts = [rollout(clip), rollout(image)]
    options = Options(signals=["visual", "temporal", "entropy", "random"])
    attribute(rollouts, options, asked)
    (visual, temporal) = asked                  # one call per signal, all its rollouts together
    assert [group for _, group in visual] == [r.group for r in rollouts]
    assert [group for _, group in temporal] == [rollouts[0].group]
    assert visual[0][0].frames is None and not visual[0][0].visual.any()
    assert not torch.equal(temporal[0][0].frames, clip.frames)
    assert same_frames(temporal[0][0], clip)
    first, second = rollouts
    assert list(first.scores) == list(first.top_tokens) == options.signals
    assert list(second.scores) == ["visual", "entropy", "random"]
    want = (first.logp + 2).abs()
    assert torch.equal(first.scores["visual"], want) and torch.equal(first.scores["temporal"], want)
    assert torch.equal(first.scores["entropy"], first.entropy)


def test_the_mask_is_the_union_of_each_ones_top_tokens(prompts, asked):
    options = Options(ratio=0.4, shift="signed")
    r = rollout(prompts[0])
    attribute([r], options, asked)
    assert torch.equal(r.scores["visual"], r.logp + 2)
    for name, tokens in r.top_tokens.items():
        assert torch.equal(tokens, top_tokens(r.scores[name], r.group.completion_mask, 0.4))
    assert torch.equal(r.key_mask, select(r.scores, r.group.completion_mask, options.ratios))
    assert 2 <= r.key_mask.sum() <= 5 and r.key_mask.dtype == torch.bool


def test_positions_of_the_masked_prompt(prompts):
    r, text = rollout(prompts[0]), ~prompts[0].visual
    masked = mask_video(r, Options())
    assert torch.equal(masked.positions, prompts[0].positions[:, text])
    assert masked.next_position == prompts[0].next_position
    moved = mask_video(r, Options(positions="moved"))
    assert moved.positions[0].tolist() == list(range(len(moved.ids)))
    assert moved.next_position == len(moved.ids) == int(text.sum())


def test_real_scores_are_differences_of_real_log_probabilities(tiny, prompts):
    """Equation 2 and 3 with the model: the plain scores of the changed prompts, subtracted."""
    model, r = tiny[0], rollout(prompts[0])
    r.logp, r.entropy = (x.detach() for x in score(model, prompts[0], r.group))
    COUNTERFACTUALS["reverse"] = lambda r, o: r.prompt.with_frames(r.prompt.frames.flip(0))
    find_key_tokens(Options(signals=["visual", "reverse"]), [r], model)
    for name, changed in (("visual", mask_video(r, Options())),
                          ("reverse", prompts[0].with_frames(prompts[0].frames.flip(0)))):
        with torch.no_grad():
            other, _ = score(model, changed, r.group)
        assert torch.allclose(r.scores[name], (r.logp - other).abs(), atol=1e-5)
        assert r.scores[name].max() > 1e-3 and (r.scores[name][~r.group.completion_mask] == 0).all()
        assert not r.scores[name].requires_grad


def test_chance_belongs_to_the_seed_and_everything_is_all(prompts, asked):
    options = Options(signals=["random", "all"])
    a, b, c = rollout(prompts[0]), rollout(prompts[0]), rollout(prompts[0], seed=2)
    attribute([a, b, c], options, asked)
    assert torch.equal(a.scores["random"], b.scores["random"])
    assert not torch.equal(a.scores["random"], c.scores["random"])
    assert torch.equal(a.key_mask, a.group.completion_mask)               # plain GRPO
    assert a.top_tokens["random"].sum() == 1


def test_a_prompt_that_no_signal_applies_to_has_no_key_token(prompts, asked):
    r = rollout(prompts[3])
    attribute([r], Options(signals=["temporal"]), asked)
    assert not asked and r.scores == {} and not r.key_mask.any()


def test_a_rule_of_ones_own(prompts, asked):
    """A fork adds a function and a line: scores, or the prompt that is shown instead."""
    late = torch.arange(3.0).expand(2, 3)
    SCORES.update(late=lambda r, o: late, never=lambda r, o: r.prompt)
    COUNTERFACTUALS["last_frames"] = lambda r, o: r.prompt.with_frames(
        r.prompt.frames[-1:].expand_as(r.prompt.frames))
    r = rollout(prompts[0])
    attribute([r], Options(signals=["late", "last_frames", "never"]), asked)
    assert torch.equal(r.scores["late"], late) and list(r.scores) == ["late", "last_frames"]
    assert len(asked) == 1 and len(asked[0][0][0].frames.unique(dim=0)) == 1
    assert r.top_tokens["late"].tolist() == [[False, False, True], [False, False, False]]


def blacken(r, o):
    r.prompt.frames.zero_()
    return r.prompt


NO_PROMPTS = [
    (lambda r, o: r.prompt.with_frames(torch.cat([r.prompt.frames] * 2)),   # they would spill into
     r"signal mine: frames of shape \(16, .* cannot stand for .*\(8, "),   # the next prompt
    (lambda r, o: None, "signal mine gave no prompt; .* return r.prompt"),
    (lambda r, o: r.prompt.frames.flip(0), "signal mine gave no prompt"),
]
SPOILERS = [(rule, "signal mine changed what r holds in place; change a clone") for rule in (
    blacken, lambda r, o: [r.prompt.ids[:2].fill_(7)],
    lambda r, o: [r.group.completion_mask.logical_not_()])]


@pytest.mark.parametrize("registry, rule, told", [
    *((COUNTERFACTUALS, *case) for case in NO_PROMPTS + SPOILERS),
    *((SCORES, *case) for case in SPOILERS)])
def test_what_a_signal_may_not_do_is_told(prompts, asked, registry, rule, told):
    registry["mine"] = rule
    p = prompts[0]
    r = rollout(replace(p, frames=p.frames.clone(), ids=p.ids.clone()))
    with pytest.raises(RuleError, match=told):
        attribute([r], Options(signals=["mine"]), asked)


def test_scores_of_a_broken_model_do_not_stop_the_choice(prompts, asked):
    """Its loss is NaN as well, and that step is skipped: ktr.py. A rule's own NaN is an error."""
    SCORES["broken"] = lambda r, o: torch.full((2, 3), float("nan"))
    r = rollout(prompts[0])
    with pytest.raises(RuleError, match="signal broken: .*got NaN"):
        attribute([r], Options(signals=["broken"]), asked)
    r.logp[0, 1] = float("nan")
    attribute([r], Options(signals=["broken"]), asked)
    assert (r.scores["broken"] == 0).all() and r.top_tokens["broken"].sum() == 1


def test_distances_of_distributions_take_the_place_of_shifts(tiny, prompts):
    """lab/rules/distances.py: the whole distribution's move, here KL(p || q), word by word."""
    load_rule(str(ROOT / "lab/rules/distances.py"))
    model, r = tiny[0], rollout(prompts[0])
    find_key_tokens(Options(signals=["visual_kl"]), [r], model)
    with torch.no_grad():
        for g, n in enumerate(r.group.lengths):
            full = []
            for prompt in (prompts[0], mask_video(r, Options())):
                words = torch.arange(model.config.text_config.vocab_size)
                rows = []
                for t in range(n):              # every word in place of token t
                    ids = r.group.ids[g, :t + 1].repeat(len(words), 1)
                    ids[:, t] = words
                    group = Group(ids, torch.ones_like(ids).bool())
                    ((logp, _),) = score_groups(model, [prompt], [group])
                    rows.append(logp[:, t])
                full.append(torch.stack(rows))
            p, q = full
            want = (p.exp() * (p - q)).sum(-1)
            assert torch.allclose(r.scores["visual_kl"][g, :n], want, atol=1e-4)
            assert want.max() > 1e-3
