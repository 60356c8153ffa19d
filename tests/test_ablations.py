"""The paper's other options: by hand, and against plain references."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_inputs
from test_data import GOOD

import ablations
import ktr
from ablations import DISTANCES, MASKINGS, ORDERS, WEIGHTINGS, blocks, distribution_shift, soften
from attribution import Rollout, attribute
from policy import Group, predicting_states, sample, score
from prompt import BadRecord
from run.options import Options

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
    distance = DISTANCES[kind]
    assert distance(P.log()[None], Q.log()[None]).tolist() == pytest.approx([want], abs=1e-6)
    assert distance(P.log()[None], P.log()[None]).tolist() == pytest.approx([0], abs=1e-6)
    if most is not None:
        apart = torch.tensor([[200.0, 0.0], [0.0, 200.0]]).log_softmax(-1)
        assert distance(apart[:1], apart[1:]).item() == pytest.approx(most, abs=1e-5)


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
    assert set(want) | {"logp"} == set(DISTANCES)
    for kind, values in want.items():
        assert torch.allclose(DISTANCES[kind](p, q), values, atol=1e-6), kind


@pytest.mark.parametrize("kind", sorted(set(DISTANCES) - {"logp"}))
def test_a_shift_in_chunks_is_the_shift_at_once(kind, monkeypatch):
    torch.manual_seed(0)
    states, other, head = torch.randn(10, 4), torch.randn(10, 4), torch.randn(7, 4)
    want = DISTANCES[kind]((states @ head.T).log_softmax(-1), (other @ head.T).log_softmax(-1))
    assert torch.allclose(distribution_shift(states, other, head, kind), want, atol=1e-6)
    rows, distance = [], DISTANCES[kind]
    monkeypatch.setitem(DISTANCES, kind, lambda p, q: rows.append(len(p)) or distance(p, q))
    # room for 3 rows of 7 words, and for not even one
    for room, sizes in ((3 * 7 + 6, [3, 3, 3, 1]), (1, [1] * 10)):
        monkeypatch.setattr(ablations, "LOGITS_AT_ONCE", room)
        rows.clear()
        got = distribution_shift(states, other, head, kind)
        assert torch.allclose(got, want, atol=1e-6) and rows == sizes


# ---------------------------------------------------------------------------------------- the video
def masked(kind, prompt, seed=0, **options):
    return MASKINGS[kind](rollout(prompt, seed), Options(masking=kind, **options))


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
        monkeypatch.setattr(ablations, "load_media", load_media)
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
    with pytest.raises(SystemExit, match="--masking replace: .* no other clip that decodes"):
        masked("replace", clip, **others(None))


def test_hide_and_zero_are_the_prompts_own(prompts):
    for positions in ("unchanged", "moved"):
        hidden = masked("hide", prompts[0], positions=positions)
        want = prompts[0].hidden(positions)
        assert hidden.frames is None and torch.equal(hidden.ids, want.ids)
        assert torch.equal(hidden.positions, want.positions)
    zeroed = masked("zero", prompts[0])
    assert zeroed.blank and torch.equal(zeroed.ids, prompts[0].ids)
    assert torch.equal(zeroed.frames, prompts[0].frames)


# -------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16])
def test_an_order_is_a_permutation_and_never_the_identity(name, n):
    for seed in range(40):
        order = ORDERS[name](n, torch.Generator().manual_seed(seed)).tolist()
        assert sorted(order) == list(range(n)) != order


def test_reverse_and_blocks_by_hand():
    generator = torch.Generator().manual_seed(0)
    assert ORDERS["reverse"](5, generator).tolist() == [4, 3, 2, 1, 0]
    assert blocks(6, generator).tolist() == [4, 5, 0, 1, 2, 3]      # two blocks: one other order
    seen = set()
    for _ in range(60):
        order = blocks(14, generator).tolist()
        parts = [list(range(14))[i:i + 4] for i in (0, 4, 8, 12)]   # the last holds two frames
        starts = sorted(range(4), key=lambda i: order.index(4 * i))
        assert order == [frame for i in starts for frame in parts[i]]
        seen.add(tuple(starts))
    assert len(seen) > 10 and (0, 1, 2, 3) not in seen


# ------------------------------------------------------------------------------------- soft weights
# padding holds the extremes, and must not count
SCORES = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, -99.0]])
VALID = torch.tensor([[True, True, False], [True, True, False]])
Z = [(x - 2.5) / math.sqrt(1.25) for x in (1, 2, 3, 4)]     # mean 2.5, variance (2.25 + 0.25) / 2


@pytest.mark.parametrize("weighting, want", {
    "linear": [0, 1 / 3, 2 / 3, 1],
    "exponential": [math.exp(-1), math.exp(-2 / 3), math.exp(-1 / 3), 1],
    "sigmoid": [1 / (1 + math.exp(-z)) for z in Z],                     # 0.207 0.390 0.610 0.793
    "softmax": [4 * math.exp(z) / sum(map(math.exp, Z)) for z in Z],    # their mean is 1
}.items())
def test_weightings_by_hand(weighting, want):
    weights = WEIGHTINGS[weighting](SCORES, VALID)
    assert weights[VALID].tolist() == pytest.approx(want, abs=1e-5)
    soft = soften({"one": SCORES}, VALID, weighting)
    assert soft[VALID].tolist() == pytest.approx(want, abs=1e-5) and (soft[~VALID] == 0).all()


def test_every_weighting_is_tried_and_equal_scores_are_no_division_by_zero():
    equal = {"linear": 0, "exponential": math.exp(-1), "sigmoid": 0.5, "softmax": 1}
    assert set(equal) == set(WEIGHTINGS)
    for weighting, value in equal.items():
        weights = WEIGHTINGS[weighting](torch.full((2, 3), 5.0), VALID)
        assert weights[VALID].tolist() == pytest.approx([value] * 4)


def test_soften_takes_the_largest_weight_of_any_signal():
    signals = {"rising": SCORES, "falling": -SCORES}
    soft = soften(signals, VALID, "linear")
    assert soft[VALID].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1])
    none = soften({}, VALID, "linear")
    assert none.shape == VALID.shape and not none.any()
    assert SCORES[0, 2] == 99                                   # the scores are untouched


def test_weights_take_the_place_of_the_mask(tiny, prompts):
    r = rollout(prompts[0], G=2)
    r.entropy = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    r.logp = torch.zeros(2, 2)
    attribute([r], Options(signals=["entropy"], weighting="linear", ratio=0.25), tiny[0])
    assert r.key_mask.flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert r.chosen["entropy"].tolist() == [[False, False], [False, True]]      # still logged


# ------------------------------------------------------------------------------------------ states
def test_predicting_states_are_those_of_the_scores(tiny, prompts):
    model, processor = tiny
    (group,) = sample(model, prompts[:1], 4, 12, seeds=[3], ends=[2, 20, 30, 40])
    assert len(set(group.lengths)) > 1
    states, head = predicting_states(model, prompts[0], group)
    logp = F.linear(states, head).log_softmax(-1).gather(-1, group.ids[..., None])[..., 0]
    want = score(model, prompts[0], group)[0]
    assert torch.allclose(logp[group.valid], want[group.valid], atol=1e-5)
    assert not states.requires_grad and (states[~group.valid] == 0).all()


# ------------------------------------------------------------------------------------------ rewards
def test_the_bonus_is_part_of_the_reward(prompts):
    o = Options(G=3, length_low=2, length_high=3)
    valid = torch.arange(4) < torch.tensor([[3], [4], [2]])
    r = Rollout(prompts[0], Group(torch.zeros(3, 4), valid), 0)
    r.accuracy, r.format = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    r.extra, r.key_mask = torch.tensor([0.3, 0.3, 0.0]), torch.ones(3, 4)
    ktr.reward(o, r)
    # 1 + 1 + 0.2 + 0.3; 1 + 0.3, too long; 1
    assert r.rewards.tolist() == pytest.approx([2.5, 1.3, 1.0])
    assert r.bonus.tolist() == pytest.approx([0.2, 0, 0])
    deviation = torch.tensor([2.5, 1.3, 1.0]).std().item()
    want = [(x - 1.6) / (deviation + 1e-4) for x in (2.5, 1.3, 1.0)]
    assert r.advantages.tolist() == pytest.approx(want)


def test_the_length_bonus_may_count_selected_tokens(prompts):
    """--length_of selected, the release's slip: rows of 3 and 4 tokens have 1 and 2 selected."""
    valid = torch.arange(4) < torch.tensor([[3], [4]])
    key = torch.tensor([[True, False, False, False], [True, True, False, False]])
    earned = []
    for what in ("response", "selected"):
        o = Options(G=2, length_low=2, length_high=3, length_of=what)
        r = Rollout(prompts[0], Group(torch.zeros(2, 4), valid), 0)
        r.accuracy, r.format, r.extra = torch.ones(2), torch.zeros(2), torch.zeros(2)
        r.key_mask = key
        ktr.reward(o, r)
        earned.append(r.bonus.tolist())
    assert earned == [pytest.approx([0.2, 0]), pytest.approx([0, 0.2])]
