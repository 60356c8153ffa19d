"""The paper's ablations, which are rules: by hand, and against plain references."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_inputs
from test_data import GOOD

import ktr
from attribution import COUNTERFACTUALS, WEIGHTS, shuffle_frames
from attribution import SCORES as SCORES_OF_ATTRIBUTION
from ktr import find_key_tokens
from lab.rules import common, frame_orders, masking, soft_weights
from lab.rules.common import leave_out_tokens, of_predictions
from lab.rules.distances import DISTANCES
from options import Options
from policy import predicting_states, sample, score
from prompt import BadRecord
from rollout import Group, Rollout

P, Q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])


def rollout(prompt, seed=0, G=4):
    """A rollout before anything is scored."""
    return Rollout(prompt, Group(torch.zeros(G, 2).long(), torch.ones(G, 2).bool()), seed)


# ---------------------------------------------------------------------------------------- distances
JS = (0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3)
      + 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)) / 2


@pytest.mark.parametrize("kind, want, most", [      # most: of distributions that share no word
    ("l1", 0.4 + 0.4, 2.0),
    ("l2", math.sqrt(0.16 + 0.16), math.sqrt(2)),
    ("kl", 0.5 * math.log(5 / 9) + 0.5 * math.log(5), None),
    ("js", JS, math.log(2)),
    ("hellinger", math.sqrt(1 - math.sqrt(0.45) - math.sqrt(0.05)), 1.0),
    ("cosine", 1 - (0.45 + 0.05) / math.sqrt(0.5 * 0.82), 1.0),
])
def test_distances_by_hand(kind, want, most):
    between = DISTANCES[kind]
    assert between(P.log()[None], Q.log()[None]).tolist() == pytest.approx([want], abs=1e-6)
    assert between(P.log()[None], P.log()[None]).tolist() == pytest.approx([0], abs=1e-6)
    if most is not None:
        apart = torch.tensor([[200.0, 0.0], [0.0, 200.0]]).log_softmax(-1)
        assert between(apart[:1], apart[1:]).item() == pytest.approx(most, abs=1e-5)


def torch_kl(p, q):
    """KL(p || q) by torch, which turns the arguments round."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def test_distances_equal_torchs_own_on_many_words():
    torch.manual_seed(0)
    p, q = (3 * torch.randn(2, 6, 50, dtype=torch.float64)).log_softmax(-1)
    middle, norm = ((p.exp() + q.exp()) / 2).log(), torch.linalg.vector_norm
    cosines = torch.stack([a @ b / a.norm() / b.norm() for a, b in zip(p.exp(), q.exp())])
    want = {
        "l1": norm(p.exp() - q.exp(), 1, -1),
        "l2": norm(p.exp() - q.exp(), 2, -1),
        "kl": torch_kl(p, q),
        "js": (torch_kl(p, middle) + torch_kl(q, middle)) / 2,
        "hellinger": norm(p.exp().sqrt() - q.exp().sqrt(), 2, -1) / math.sqrt(2),
        "cosine": 1 - cosines}
    assert set(want) == set(DISTANCES)
    for kind, values in want.items():
        assert torch.allclose(DISTANCES[kind](p, q), values, atol=1e-6), kind


@pytest.mark.parametrize("kind", sorted(DISTANCES))
def test_a_shift_in_chunks_is_the_shift_at_once(kind, monkeypatch):
    torch.manual_seed(0)
    states, other, head = torch.randn(10, 4), torch.randn(10, 4), torch.randn(7, 4)
    want = DISTANCES[kind]((states @ head.T).log_softmax(-1), (other @ head.T).log_softmax(-1))
    assert torch.allclose(of_predictions(DISTANCES[kind], head, states, other), want, atol=1e-6)
    rows, between = [], DISTANCES[kind]
    monkeypatch.setitem(DISTANCES, kind, lambda p, q: rows.append(len(p)) or between(p, q))
    # room for 3 rows of 7 words, and for not even one
    for room, sizes in ((3 * 7 + 6, [3, 3, 3, 1]), (1, [1] * 10)):
        monkeypatch.setattr(common, "LOGITS_AT_ONCE", room)
        rows.clear()
        got = of_predictions(DISTANCES[kind], head, states, other)
        assert torch.allclose(got, want, atol=1e-6) and rows == sizes


# ---------------------------------------------------------------------------------------- the video
def masked(kind, prompt, seed=0, **options):
    return COUNTERFACTUALS[f"visual_{kind}"](rollout(prompt, seed), Options(**options))


def test_half_keeps_half_of_the_video_and_every_position(prompts):
    for prompt in prompts:
        halved = masked("half", prompt)
        n = int(prompt.visual.sum())
        assert halved.kept.shape == (n,)
        assert int(halved.kept.sum()) == n // 2 == int(halved.visual.sum())
        stays = ~prompt.visual                                      # all text, and of the video:
        stays[prompt.visual.nonzero()[:, 0][halved.kept]] = True
        assert torch.equal(halved.ids, prompt.ids[stays])
        assert torch.equal(halved.positions, prompt.positions[:, stays])
        assert halved.next_position == prompt.next_position
        assert torch.equal(masked("half", prompt).kept, halved.kept)
        assert not torch.equal(masked("half", prompt, seed=2).kept, halved.kept)


def plain_logp(plain, prompt, ids, visible=None, features=None):
    """(n,) of a completion under the library's own model, at this project's positions, with a mask
    over the prompt's tokens, or with other features in place of the video's."""
    inputs, n = plain_inputs(prompt, ids), len(ids)
    length = len(prompt.ids) + n
    sees = torch.ones(length, length).tril().bool()
    if visible is not None:
        sees[:, :len(prompt.ids)] &= visible
    sees |= torch.eye(length).bool()            # the hidden tokens' own rows must not be empty
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    if features is None:
        pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        features = plain.model.visual(pixels, grid_thw=grid).pooler_output
    embeds[0, :len(prompt.ids)][prompt.visual] = features
    states = plain.model.language_model(
        inputs_embeds=embeds, position_ids=inputs["position_ids"],
        attention_mask={"full_attention": sees[None, None]}).last_hidden_state
    logp = plain.lm_head(states)[0, len(prompt.ids) - 1:-1].log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def test_half_and_zero_equal_the_plain_forward(tiny, plain, prompts):
    """Thinning gives what hiding those tokens from every query gives; blanking, what features of
    zeros give."""
    model, prompt = tiny[0], prompts[0]
    ids = torch.randint(9, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    halved, zeroed = masked("half", prompt), masked("zero", prompt)
    visible = torch.ones(len(prompt.ids)).bool()
    visible[prompt.visual] = halved.kept
    nothing = torch.zeros(int(prompt.visual.sum()), plain.config.text_config.hidden_size)
    for row in ids:
        whole = plain_logp(plain, prompt, row)
        assert torch.allclose(score(model, prompt, row[None])[0][0], whole, atol=1e-5)
        for shown, want in ((halved, plain_logp(plain, prompt, row, visible)),
                            (zeroed, plain_logp(plain, prompt, row, features=nothing))):
            assert torch.allclose(score(model, shown, row[None])[0][0], want, atol=1e-5)
            assert (want - whole).abs().max() > 1e-3


@pytest.fixture
def others(tmp_path, monkeypatch):
    """others(shades, ...): records, the first GOOD itself, whose clips are a shade each (of three
    frames, of another size), or cannot be decoded (None); their options."""
    def make(*shades):
        shade_of = {f"./{i}.y4m": shade for i, shade in enumerate(shades)}
        records = [GOOD, *({**GOOD, "path": path} for path in shade_of)]

        def load_media(record, root, limits, vision):
            shade = shade_of[record["path"]]            # KeyError: the question's own clip
            if shade is None:
                raise BadRecord("broken")
            moving = torch.tensor([shade, shade + 1, shade + 2], dtype=torch.uint8)
            return moving[:, None, None, None].expand(3, 3, 28, 84).contiguous(), 1.0
        monkeypatch.setattr(masking, "load_media", load_media)
        data = tmp_path / f"{len(records)}.json"
        data.write_text(json.dumps(records))
        return dict(data=str(data), videos=str(tmp_path))
    return make


def test_replacing_shows_another_clip_in_this_ones_shape(prompts, others):
    clip, image = (replace(prompts[i], record=GOOD) for i in (0, 3))
    options = others(100, None, None)
    shown = masked("replace", clip, **options)
    assert shown.frames.shape == clip.frames.shape == (8, 3, 56, 56)
    assert shown.frames.dtype == torch.uint8
    # eight frames over 0..2 in steps of 2/7: 0, 0.29, 0.57, 0.86, 1.14, 1.43, 1.71, 2
    seen = [frame.unique().tolist() for frame in shown.frames]
    assert seen == [[100], [100], [101], [101], [101], [101], [102], [102]]
    assert torch.equal(shown.ids, clip.ids) and torch.equal(shown.positions, clip.positions)
    assert shown.grid == clip.grid
    assert masked("replace", image, **options).frames.unique().tolist() == [100]


def test_the_other_clip_belongs_to_the_seed_and_is_never_left_out(prompts, others, tmp_path):
    options = others(10, 50, 90, 130)
    left_out = tmp_path / "bad.json"
    left_out.write_text('[{"path": "./1.y4m"}]')
    options["leave_out"] = str(left_out)
    clip, seen = replace(prompts[0], record=GOOD), []
    for seed in (*range(0, 40, 2), 0):
        seen.append(int(masked("replace", clip, seed, **options).frames.min()))
    assert set(seen) == {10, 90, 130} and seen[0] == seen[-1]
    with pytest.raises(SystemExit, match="visual_replace: .* no other clip that decodes"):
        masked("replace", clip, **others(None))


def test_zeroed_features_leave_the_prompt_as_it_is(prompts):
    zeroed = masked("zero", prompts[0])
    assert zeroed.zeroed and torch.equal(zeroed.ids, prompts[0].ids)
    assert torch.equal(zeroed.frames, prompts[0].frames)


def test_tokens_can_be_left_out_twice(prompts):
    """The second time counts those that were left the first time."""
    n = int(prompts[0].visual.sum())
    first, second = torch.arange(n) % 2 == 0, torch.arange(n // 2) % 3 == 0
    once = leave_out_tokens(prompts[0], first)
    twice = leave_out_tokens(once, second)
    assert twice.kept.nonzero()[:, 0].tolist() == list(range(n))[::2][::3]
    assert int(twice.visual.sum()) == int(second.sum())


# -------------------------------------------------------------------------------------------- order
def order_of(change, n, seed=0):
    """The numbers of the frames that a counterfactual shows of a clip of n frames."""
    frames = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 56, 56)
    prompt = SimpleNamespace(frames=frames, kind="video", with_frames=lambda frames: frames)
    r = SimpleNamespace(prompt=prompt, generator=torch.Generator().manual_seed(seed))
    return change(r, Options())[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("change", [shuffle_frames, frame_orders.reverse, frame_orders.blocks])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16])
def test_an_order_is_a_permutation_and_never_the_identity(change, n):
    for seed in range(40):
        order = order_of(change, n, seed)
        assert sorted(order) == list(range(n)) != order


def test_reverse_and_blocks_by_hand():
    assert order_of(frame_orders.reverse, 5) == [4, 3, 2, 1, 0]
    assert order_of(frame_orders.blocks, 6) == [4, 5, 0, 1, 2, 3]   # two blocks: one other order
    seen = set()
    for seed in range(60):
        order = order_of(frame_orders.blocks, 14, seed)
        parts = [list(range(14))[i:i + 4] for i in (0, 4, 8, 12)]   # the last holds two frames
        starts = sorted(range(4), key=lambda i: order.index(4 * i))
        assert order == [frame for i in starts for frame in parts[i]]
        seen.add(tuple(starts))
    assert len(seen) > 10 and (0, 1, 2, 3) not in seen


def test_images_have_no_other_order(prompts):
    r = rollout(prompts[3])
    for change in (shuffle_frames, frame_orders.reverse, frame_orders.blocks,
                   frame_orders.with_times):
        assert change(r, Options()) is r.prompt


# ------------------------------------------------------------------------------------- soft weights
# padding holds the extremes, and must not count
SCORES = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, -99.0]])
VALID = torch.tensor([[True, True, False], [True, True, False]])
Z = [(x - 2.5) / math.sqrt(1.25) for x in (1, 2, 3, 4)]     # mean 2.5, variance (2.25 + 0.25) / 2


def soften(scores, weighting):
    """The rule's weights of a rollout with these scores."""
    r = SimpleNamespace(scores=scores, group=SimpleNamespace(completion_mask=VALID))
    return WEIGHTS[weighting](r, Options())


@pytest.mark.parametrize("weighting, want", {
    "linear": [0, 1 / 3, 2 / 3, 1],
    "exponential": [math.exp(-1), math.exp(-2 / 3), math.exp(-1 / 3), 1],
    "sigmoid": [1 / (1 + math.exp(-z)) for z in Z],                     # 0.207 0.390 0.610 0.793
    "softmax": [4 * math.exp(z) / sum(map(math.exp, Z)) for z in Z],    # their mean is 1
}.items())
def test_weightings_by_hand(weighting, want):
    weights = soft_weights.KINDS[weighting](SCORES, VALID)
    assert weights[VALID].tolist() == pytest.approx(want, abs=1e-5)
    soft = soften({"one": SCORES}, weighting)
    assert soft[VALID].tolist() == pytest.approx(want, abs=1e-5) and (soft[~VALID] == 0).all()


def test_every_weighting_is_tried_and_equal_scores_are_no_division_by_zero():
    equal = {"linear": 0, "exponential": math.exp(-1), "sigmoid": 0.5, "softmax": 1}
    assert set(equal) == set(soft_weights.KINDS)
    for weighting, value in equal.items():
        weights = soft_weights.KINDS[weighting](torch.full((2, 3), 5.0), VALID)
        assert weights[VALID].tolist() == pytest.approx([value] * 4)


def test_soften_takes_the_largest_weight_of_any_signal():
    signals = {"rising": SCORES, "falling": -SCORES}
    soft = soften(signals, "linear")
    assert soft[VALID].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1])
    none = soften({}, "linear")
    assert none.shape == VALID.shape and not none.any()
    assert SCORES[0, 2] == 99                                   # the scores are untouched


def test_weights_take_the_place_of_the_mask(tiny, prompts):
    r = rollout(prompts[0], G=2)
    r.entropy = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    r.logp = torch.zeros(2, 2)
    find_key_tokens(Options(signals=["entropy"], weighting="linear", ratio=0.25), [r], tiny[0])
    assert r.key_mask.flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert r.top_tokens["entropy"].tolist() == [[False, False], [False, True]]      # still logged


# ------------------------------------------------------------------------------------------ states
def test_predicting_states_are_those_of_the_scores(tiny, prompts):
    model, processor = tiny
    (group,) = sample(model, prompts[:1], 4, 12, seeds=[3], ends=[2, 20, 30, 40])
    assert len(set(group.lengths)) > 1
    states, head = predicting_states(model, prompts[0], group)
    logp = F.linear(states, head).log_softmax(-1).gather(-1, group.ids[..., None])[..., 0]
    want = score(model, prompts[0], group)[0]
    assert torch.allclose(logp[group.completion_mask], want[group.completion_mask], atol=1e-5)
    assert not states.requires_grad and (states[~group.completion_mask] == 0).all()


# ------------------------------------------------------------------------------------------ rewards
def test_the_bonus_is_part_of_the_reward(prompts):
    o = Options(G=3, length_low=2, length_high=3)
    valid = torch.arange(4) < torch.tensor([[3], [4], [2]])
    r = Rollout(prompts[0], Group(torch.zeros(3, 4), valid), 0)
    r.accuracy, r.format = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    r.extra_reward = torch.tensor([0.3, 0.3, 0.0])
    ktr.add_rewards(o, r, valid)
    # 1 + 1 + 0.2 + 0.3; 1 + 0.3, too long; 1
    assert r.rewards.tolist() == pytest.approx([2.5, 1.3, 1.0])
    assert r.length_bonus.tolist() == pytest.approx([0.2, 0, 0])


@pytest.mark.parametrize("what, earned", [("response", [0.2, 0]), ("selected", [0, 0.2])])
def test_the_length_bonus_may_count_selected_tokens(tiny, prompts, what, earned):
    """--length_of selected, the release's mistake: rows of 3 and 4 tokens have 1 and 2 selected."""
    mask = torch.arange(4) < torch.tensor([[3], [4]])
    o = Options(G=2, length_low=2, length_high=3, length_of=what, signals=["first"], ratio=3 / 7)
    r = Rollout(prompts[0], Group(torch.zeros(2, 4), mask), 0)
    r.accuracy, r.format, r.extra_reward = torch.ones(2), torch.zeros(2), torch.zeros(2)
    ktr.add_rewards(o, r, mask)
    r.logp = torch.zeros(2, 4)
    SCORES_OF_ATTRIBUTION["first"] = lambda r, o: torch.tensor([[9.0, 0, 0, 0], [8, 7, 0, 0]])
    ktr.annotate(o, [r], tiny[0], None, ktr.Clock(torch.device("cpu")))
    assert r.length_bonus.tolist() == pytest.approx(earned)
    deviation = r.rewards.std().item() + 1e-4
    want = [(x - 1.1) / deviation for x in r.rewards.tolist()]
    assert r.advantages.tolist() == pytest.approx(want)
