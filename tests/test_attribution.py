import itertools
import math

import pytest
import torch

import attribution
from attribution import Rollout, attribute, select, shift, top_tokens
from ablations import shuffled


def test_shift_by_hand():
    logp, other = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.5]])
    assert shift(logp, other).tolist() == [[2.0, 1.0, 0.0]]
    assert shift(logp, other, "signed").tolist() == [[2.0, -1.0, 0.0]]
    with pytest.raises(ValueError, match="relative"):
        shift(logp, other, "relative")


def test_top_tokens_by_hand():
    scores = torch.tensor([[5.0, 1.0, 9.0], [7.0, 8.0, 2.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])         # the best score is padding
    assert top_tokens(scores, valid, 0.4).tolist() == [[False, False, False], [True, True, False]]
    assert top_tokens(scores, valid, 0.5, "response").tolist() == [[True, False, False], [True, True, False]]


def test_ties_go_to_the_earlier_token():
    scores, valid = torch.ones(2, 5), torch.ones(2, 5).bool()
    assert top_tokens(scores, valid, 0.3).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert top_tokens(scores, valid, 0.2, "response").nonzero().tolist() == [[0, 0], [1, 0]]
    assert top_tokens(scores, valid, 0.3, ties="threshold").all()           # the released code's >=


@pytest.mark.parametrize("ratio, n", list(itertools.product([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], [0, 1, 3, 10, 15, 29, 30])))
def test_exactly_the_ceiling(ratio, n):
    valid = (torch.arange(36) < n).view(4, 9)
    chosen = top_tokens(torch.randn(4, 9), valid, ratio)
    assert chosen.sum() == math.ceil(round(ratio * n, 9)) and not (chosen & ~valid).any()


def test_against_brute_force():
    torch.manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 4, (3, 6)).float()                        # many ties
        valid = torch.rand(3, 6) < 0.7
        order = sorted(((-scores[g, t].item(), g, t) for g in range(3) for t in range(6) if valid[g, t]))
        want = torch.zeros(3, 6).bool()
        for _, g, t in order[:math.ceil(0.25 * len(order))]:
            want[g, t] = True
        assert torch.equal(top_tokens(scores, valid, 0.25), want)


def test_inputs_are_untouched_and_bad_ones_refused():
    scores, valid = torch.randn(2, 4), torch.ones(2, 4).bool()
    before = scores.clone()
    top_tokens(scores, valid, 0.5)
    assert torch.equal(scores, before) and valid.all()
    for bad in ({"ratio": 1.5}, {"ratio": -0.1}, {"ratio": 0.5, "pool": "batch"}, {"ratio": 0.5, "ties": "late"}):
        with pytest.raises(ValueError):
            top_tokens(scores, valid, **bad)
    scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        top_tokens(scores, valid, 0.5)
    valid[1, 1] = False
    top_tokens(scores, valid, 0.5)                                          # NaN at padding does not matter


def test_select_is_the_union():
    valid = torch.ones(1, 10).bool()
    signals = {"a": torch.arange(10.0)[None], "b": -torch.arange(10.0)[None]}
    got = select(signals, valid, {"a": 0.2, "b": 0.1})
    assert got.nonzero()[:, 1].tolist() == [0, 8, 9]
    assert not select({}, valid, {}).any()


def test_shuffled_is_never_the_identity():
    for n in (2, 3, 8):
        for seed in range(60):
            order = shuffled(n, torch.Generator().manual_seed(seed))
            assert sorted(order.tolist()) == list(range(n)) and order.tolist() != list(range(n))


def rollout(prompt, **more):
    valid = torch.ones(2, 3).bool()
    return Rollout(prompt, torch.zeros(2, 3).long(), valid, -torch.rand(2, 3), torch.rand(2, 3),
                   torch.Generator().manual_seed(0), **more)


def test_signals_ask_for_the_right_counterfactual(prompts):
    clip, image = prompts[0], prompts[3]
    asked = []

    def moved(numbers, changed):
        asked.append(list(zip(numbers, changed)))
        return [torch.full((2, 3), 2.0) for _ in numbers]

    rollouts = [rollout(clip), rollout(image)]
    scores = attribute(rollouts, ["visual", "temporal", "entropy", "random"], moved)
    (visual, temporal) = asked                                              # one call per signal, all rollouts together
    assert [i for i, _ in visual] == [0, 1] and [i for i, _ in temporal] == [0]
    assert visual[0][1].frames is None and not visual[0][1].visual.any()
    assert not torch.equal(temporal[0][1].frames, clip.frames)
    assert sorted(map(str, temporal[0][1].frames.tolist())) == sorted(map(str, clip.frames.tolist()))   # the same frames
    assert "temporal" not in scores[1] and set(scores[0]) == {"visual", "temporal", "entropy", "random"}
    assert (scores[0]["visual"] == 2).all() and (scores[0]["temporal"] == 2).all()
    assert torch.equal(scores[0]["entropy"], rollouts[0].entropy)


def test_masking_options(prompts):
    asked = []

    def moved(numbers, changed):
        asked.extend(changed)
        return [torch.zeros(2, 3)] * len(numbers)

    attribute([rollout(prompts[0], masking="zero")], ["visual"], moved)
    attribute([rollout(prompts[0], positions="moved")], ["visual"], moved)
    zeroed, other = asked
    assert zeroed.blank and torch.equal(zeroed.ids, prompts[0].ids)
    assert other.positions[0].tolist() == list(range(len(other.ids)))


def test_random_is_reproducible_and_everything_is_all(prompts):
    a, b = (attribute([rollout(prompts[0])], ["random", "all"], None)[0] for _ in range(2))
    assert torch.equal(a["random"], b["random"]) and top_tokens(a["all"], torch.ones(2, 3).bool(), 1.0).all()


def test_a_signal_may_ask_more_than_once(prompts, monkeypatch):
    def twice(r):
        first = yield r.prompt.hidden()
        second = yield r.prompt.zeroed()
        return first + second

    monkeypatch.setitem(attribution.SIGNALS, "twice", twice)
    scores = attribute([rollout(prompts[0])], ["twice"], lambda numbers, changed: [torch.zeros(2, 3)] * len(numbers))
    assert scores[0]["twice"].shape == (2, 3)
