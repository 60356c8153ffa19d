"""Rules besides the key mask: soft weights, TW-GRPO's spread, T-GRPO's bonus, masking by another clip. By hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import ktr
from attribution import SIGNALS, WEIGHTINGS, Rollout, attribute, soften
from data import Skipped
from run.options import parse
from policy import Group, predicting_states, sample, score

SCORES = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, -99.0]])
VALID = torch.tensor([[True, True, False], [True, True, False]])            # padding holds the extremes, and must not count
Z = [(x - 2.5) / math.sqrt(1.25) for x in (1, 2, 3, 4)]                     # mean 2.5, variance (2.25 + 0.25) / 2


# -------------------------------------------------------------------------------------- soft weights
@pytest.mark.parametrize("weighting, want", {
    "linear": [0, 1 / 3, 2 / 3, 1],
    "exponential": [math.exp(-1), math.exp(-2 / 3), math.exp(-1 / 3), 1],
    "spread": [1, 1 + 0.7 / 3, 1 + 1.4 / 3, 1.7],
    "sigmoid": [1 / (1 + math.exp(-z)) for z in Z],                         # 0.207, 0.390, 0.610, 0.793
    "softmax": [4 * math.exp(z) / sum(map(math.exp, Z)) for z in Z],        # their mean is 1
}.items())
def test_weightings_by_hand(weighting, want):
    weights = WEIGHTINGS[weighting](SCORES, VALID)
    assert weights[VALID].tolist() == pytest.approx(want, abs=1e-5)
    soft = soften({"one": SCORES}, VALID, weighting)
    assert soft[VALID].tolist() == pytest.approx(want, abs=1e-5) and (soft[~VALID] == 0).all()


def test_every_weighting_is_tried_and_equal_scores_are_no_division_by_zero():
    equal = {"linear": 0, "exponential": math.exp(-1), "spread": 1, "sigmoid": 0.5, "softmax": 1}
    assert set(equal) == set(WEIGHTINGS)
    for weighting, value in equal.items():
        assert WEIGHTINGS[weighting](torch.full((2, 3), 5.0), VALID)[VALID].tolist() == pytest.approx([value] * 4)


def test_soften_takes_the_largest_weight_of_any_signal():
    signals = {"rising": SCORES, "falling": -SCORES}
    assert soften(signals, VALID, "linear")[VALID].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1])
    none = soften({}, VALID, "linear")
    assert none.shape == VALID.shape and not none.any()
    assert SCORES[0, 2] == 99                                               # the scores themselves are untouched


# -------------------------------------------------------------------------------------------- TW-GRPO
def spread_by_loops(states, head, valid):
    """sum_v (e^d - d - 1) averaged over the group, d = mean log-probability - log-probability within +-11."""
    G, T, V = *valid.shape, len(head)
    values = []
    for t in range(T):
        rows = [F.linear(states[g, t], head).log_softmax(-1).tolist() if valid[g, t] else [-math.log(V)] * V for g in range(G)]
        total = 0.0
        for g in range(G):
            for v in range(V):
                d = max(-11.0, min(11.0, sum(row[v] for row in rows) / G - rows[g][v]))
                total += math.exp(d) - d - 1
        values.append(total / G)
    return values


@pytest.mark.parametrize("size", [1.0, 25.0])                               # with 25 some differences exceed 11
def test_spread_equals_plain_loops(prompts, size):
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(3, 18, 4, generator=generator, dtype=torch.float64), size * torch.randn(7, 4, generator=generator).double()
    valid = torch.arange(18) < torch.tensor([[18], [5], [17]])              # 18 tokens: more than one chunk of 16
    r = Rollout(prompts[0], torch.zeros(3, 18).long(), valid, torch.zeros(3, 18), torch.zeros(3, 18), generator,
                states=lambda: (states, head))
    scores = attribute([r], ["spread"], None)[0]["spread"]
    want = torch.tensor(spread_by_loops(states, head, valid))
    assert scores.shape == (3, 18) and all(torch.allclose(row, want, rtol=1e-3, atol=1e-5) for row in scores)
    same = Rollout(prompts[0], r.ids, torch.ones_like(valid), r.logp, r.entropy, generator,
                   states=lambda: (states[:1].expand(3, -1, -1), head))
    assert SIGNALS["spread"](same).abs().max() < 1e-4                       # nothing spreads where all predict the same


def test_predicting_states_are_those_of_the_scores(tiny, prompts):
    model, processor = tiny
    (group,) = sample(model, prompts[:1], 4, 12, seeds=[3], ends=[2, 20, 30, 40])
    assert len(set(group.lengths)) > 1
    states, head = predicting_states(model, prompts[0], group)
    logp = F.linear(states, head).log_softmax(-1).gather(-1, group.ids[..., None])[..., 0]
    assert torch.allclose(logp[group.valid], score(model, prompts[0], group)[0][group.valid], atol=1e-5)
    assert not states.requires_grad and (states[~group.valid] == 0).all()


# --------------------------------------------------------------------------------------------- T-GRPO
@pytest.mark.parametrize("factor, helped", [(1.0, [True, False, True]), (0.8, [True, True, True]), (2.5, [False, False, False])])
def test_the_bonus_goes_to_correct_completions_where_order_helps(prompts, monkeypatch, factor, helped):
    ordered = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0.4, 0], [0.5, 0, 0, 0.1]])          # means 0.5, 0.6, 0.15
    shuffled = [torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.75]), torch.tensor([0.15, 0.15])]   # 0.5, 0.75, 0.15 (a tie)
    asked = []

    def sampled(model, shown, G, limit, *, temperature, top_p, seeds):
        asked.append((shown, G, limit, temperature, top_p, seeds))
        return [Group(torch.zeros(G, 1), torch.ones(G, 1)) for _ in shown]

    answers = iter(shuffled)
    monkeypatch.setattr(ktr, "sample", sampled)
    monkeypatch.setattr(ktr, "judge", lambda group, record, processor: (next(answers), torch.ones(2)))
    o = parse(["--model", "m", "--data", "d", "--G", "4", "--ordered_bonus", "0.3", "--ordered_factor", str(factor),
               "--max_new_tokens", "9", "--temperature", "0.7", "--top_p", "0.9"])
    clips, image = prompts[:3], prompts[3]
    still = clips[0].showing(clips[0].frames[:1])                           # a clip of one frame has no order either
    right = torch.ones(4)
    pairs = [(clips[0], ordered[0]), (image, right), (clips[1], ordered[1]), (still, right), (clips[2], ordered[2])]
    batch = [{"prompt": prompt, "seed": 10 * i, "accuracy": accuracy} for i, (prompt, accuracy) in enumerate(pairs)]
    got = ktr.ordered_bonus(o, None, batch, None)
    correct = [torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 0, 0])]    # more than 0.1
    want = [correct[0] * helped[0], torch.zeros(4), correct[1] * helped[1], torch.zeros(4), correct[2] * helped[2]]
    assert len(got) == 5 and all(torch.allclose(a, 0.3 * b) for a, b in zip(got, want))
    (shown, G, *settings, seeds), = asked                                   # all clips together, half as many completions
    assert G == 2 and settings == [9, 0.7, 0.9] and seeds == [1, 21, 41]    # not the random numbers of the ordered group
    for prompt, clip in zip(shown, clips, strict=True):
        assert not torch.equal(prompt.frames, clip.frames) and torch.equal(prompt.ids, clip.ids)
        assert sorted(map(str, prompt.frames.tolist())) == sorted(map(str, clip.frames.tolist()))       # the same frames


def test_no_bonus_unless_asked_for_and_none_for_images(prompts, monkeypatch):
    monkeypatch.setattr(ktr, "sample", lambda *_, **__: pytest.fail("nothing has to be sampled"))
    for prompt, bonus in ((prompts[0], "0"), (prompts[3], "0.3")):
        o = parse(["--model", "m", "--data", "d", "--G", "4", "--ordered_bonus", bonus])
        (none,) = ktr.ordered_bonus(o, None, [{"prompt": prompt, "seed": 0, "accuracy": torch.ones(4)}], None)
        assert none.tolist() == [0, 0, 0, 0]


def test_the_bonus_is_part_of_the_reward():
    o = parse(["--model", "m", "--data", "d", "--G", "3", "--length_low", "2", "--length_high", "3"])
    item = {"key_mask": torch.ones(3, 4), "accuracy": torch.tensor([1.0, 1.0, 0.0]), "format": torch.tensor([1.0, 0.0, 1.0]),
            "ordered": torch.tensor([0.3, 0.3, 0.0]), "group": Group(torch.zeros(3, 4), torch.arange(4) < torch.tensor([[3], [4], [2]]))}
    ktr.reward(o, item)
    assert item["rewards"].tolist() == pytest.approx([2.5, 1.3, 1.0])       # 1 + 1 + 0.2 + 0.3; 1 + 0.3, too long; 1
    deviation = torch.tensor([2.5, 1.3, 1.0]).std().item()
    assert item["advantages"].tolist() == pytest.approx([(x - 1.6) / (deviation + 1e-4) for x in (2.5, 1.3, 1.0)])


# -------------------------------------------------------------------------------------- another clip
class Clips(list):
    records = [{"path": "./a"}, {"path": "./b"}, {"path": "./c"}, {"path": "./a"}]


def test_the_other_clip_is_the_last_usable_one_before(prompts):
    data, order = Clips([prompts[0], Skipped({}, "gone"), prompts[2], prompts[3]]), [3, 2, 1, 0, 2]
    assert ktr.clip_before(data, order, 4) is prompts[0].frames
    assert ktr.clip_before(data, order, 3) is prompts[2].frames             # what cannot be read is passed over
    assert ktr.clip_before(data, order, 0) is prompts[2].frames             # before the first comes the last
    assert ktr.clip_before(data, [2, 0, 3], 2) is prompts[2].frames         # the same clip in another row is no other clip
    with pytest.raises(ValueError, match="no usable clip but ./a"):
        ktr.clip_before(data, [0, 3, 1], 0)
