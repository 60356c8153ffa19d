"""What is done to the video, and distances between predictions: by hand, and against plain references."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_inputs

import ablations
from ablations import DISTANCES, MASKINGS, ORDERS, blocks, distribution_shift
from policy import score

P, Q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])


# ----------------------------------------------------------------------------------------- distances
@pytest.mark.parametrize("kind, want, most", [                              # most: of distributions that share no word
    ("l1", 0.4 + 0.4, 2.0),
    ("l2", math.sqrt(0.16 + 0.16), math.sqrt(2)),
    ("kl", 0.5 * math.log(5 / 9) + 0.5 * math.log(5), None),
    ("js", (0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3) + 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)) / 2, math.log(2)),
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


def test_distances_equal_torchs_own_on_many_words():
    torch.manual_seed(0)
    p, q = (3 * torch.randn(2, 6, 50, dtype=torch.float64)).log_softmax(-1)
    middle = ((p.exp() + q.exp()) / 2).log()
    want = {
        "l1": torch.linalg.vector_norm(p.exp() - q.exp(), 1, -1), "l2": torch.linalg.vector_norm(p.exp() - q.exp(), 2, -1),
        "kl": F.kl_div(q, p, reduction="none", log_target=True).sum(-1),                        # KL(p || q): torch turns them round
        "js": sum(F.kl_div(middle, x, reduction="none", log_target=True).sum(-1) for x in (p, q)) / 2,
        "hellinger": torch.linalg.vector_norm(p.exp().sqrt() - q.exp().sqrt(), 2, -1) / math.sqrt(2),
        "cosine": 1 - torch.stack([a @ b / a.norm() / b.norm() for a, b in zip(p.exp(), q.exp())])}
    assert set(want) == set(DISTANCES)
    for kind, values in want.items():
        assert torch.allclose(DISTANCES[kind](p, q), values, atol=1e-6), kind


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_shift_in_chunks_is_the_shift_at_once(kind, monkeypatch):
    torch.manual_seed(0)
    states, other, head = torch.randn(10, 4), torch.randn(10, 4), torch.randn(7, 4)
    want = DISTANCES[kind]((states @ head.T).log_softmax(-1), (other @ head.T).log_softmax(-1))
    assert torch.allclose(distribution_shift(states, other, head, kind), want, atol=1e-6)
    rows, distance = [], DISTANCES[kind]
    monkeypatch.setitem(DISTANCES, kind, lambda p, q: rows.append(len(p)) or distance(p, q))
    for words, sizes in ((3 * 7 + 6, [3, 3, 3, 1]), (1, [1] * 10)):         # room for 3 rows of 7 words; for not even one
        monkeypatch.setattr(ablations, "WORDS_AT_ONCE", words)
        rows.clear()
        assert torch.allclose(distribution_shift(states, other, head, kind), want, atol=1e-6) and rows == sizes


# ---------------------------------------------------------------------------------------- the video
def test_half_keeps_half_of_the_video_and_every_position(prompts):
    for prompt in prompts:
        halved = MASKINGS["half"](prompt, generator=torch.Generator().manual_seed(1))
        n = int(prompt.visual.sum())
        assert halved.kept.shape == (n,) and int(halved.kept.sum()) == n // 2 == int(halved.visual.sum())
        stays = ~prompt.visual
        stays[prompt.visual.nonzero()[:, 0][halved.kept]] = True            # all text, and these of the video
        assert torch.equal(halved.ids, prompt.ids[stays]) and torch.equal(halved.positions, prompt.positions[:, stays])
        assert halved.next_position == prompt.next_position
        again, other = (MASKINGS["half"](prompt, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        assert torch.equal(again.kept, halved.kept) and not torch.equal(other.kept, halved.kept)


def plain_logp(plain, prompt, ids, visible=None, features=None):
    """(n,) of a completion under the library's own model, at this project's positions, with a mask over the prompt's
    tokens, or with other features in place of the video's."""
    inputs, n = plain_inputs(prompt, ids), len(ids)
    length = len(prompt.ids) + n
    sees = torch.ones(length, length).tril().bool()
    if visible is not None:
        sees[:, :len(prompt.ids)] &= visible
    sees |= torch.eye(length).bool()                                        # the hidden tokens' own rows must not be empty
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    if features is None:
        features = plain.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]).pooler_output
    embeds[0, :len(prompt.ids)][prompt.visual] = features
    positions = torch.cat([prompt.positions, (prompt.next_position + torch.arange(n)).expand(3, -1)], 1)[:, None]
    states = plain.model.language_model(inputs_embeds=embeds, position_ids=positions,
                                        attention_mask={"full_attention": sees[None, None]}).last_hidden_state
    logp = plain.lm_head(states)[0, len(prompt.ids) - 1:-1].log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def test_half_and_zero_equal_the_plain_forward(tiny, plain, prompts):
    """Thinning gives what hiding those tokens from every query gives; blanking what features of zeros give."""
    prompt, ids = prompts[0], torch.randint(9, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    halved = MASKINGS["half"](prompt, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(len(prompt.ids)).bool()
    visible[prompt.visual] = halved.kept
    zeroed = MASKINGS["zero"](prompt)
    for row in ids:
        whole = plain_logp(plain, prompt, row)
        half = plain_logp(plain, prompt, row, visible)
        zero = plain_logp(plain, prompt, row, features=torch.zeros(int(prompt.visual.sum()), plain.config.text_config.hidden_size))
        assert torch.allclose(score(tiny[0], prompt, row[None])[0][0], whole, atol=1e-5)
        assert torch.allclose(score(tiny[0], halved, row[None])[0][0], half, atol=1e-5) and (half - whole).abs().max() > 1e-3
        assert torch.allclose(score(tiny[0], zeroed, row[None])[0][0], zero, atol=1e-5) and (zero - whole).abs().max() > 1e-3


def test_replacing_shows_the_other_clip_in_this_ones_shape(prompts):
    clip, image = prompts[0], prompts[3]
    shades = torch.tensor([10, 100, 200], dtype=torch.uint8)
    other = shades[:, None, None, None].expand(3, 3, 28, 84).contiguous()   # three plain frames of another size
    shown = MASKINGS["replace"](clip, other=other)
    assert shown.frames.shape == clip.frames.shape == (8, 3, 56, 56) and shown.frames.dtype == torch.uint8
    # eight frames over 0..2 in steps of 2/7: 0, 0.29, 0.57, 0.86, 1.14, 1.43, 1.71, 2
    assert [frame.unique().tolist() for frame in shown.frames] == [[10], [10], [100], [100], [100], [100], [200], [200]]
    assert torch.equal(shown.ids, clip.ids) and torch.equal(shown.positions, clip.positions) and shown.grid == clip.grid
    assert torch.equal(MASKINGS["replace"](clip, other=prompts[1].frames).frames, prompts[1].frames)    # of the same shape
    assert torch.equal(MASKINGS["replace"](image, other=prompts[1].frames).frames, prompts[1].frames[:1])


def test_hide_and_zero_are_the_prompts_own(prompts):
    for positions in ("unchanged", "moved"):
        hidden, want = MASKINGS["hide"](prompts[0], positions=positions, other=None), prompts[0].hidden(positions)
        assert hidden.frames is None and torch.equal(hidden.ids, want.ids) and torch.equal(hidden.positions, want.positions)
    zeroed = MASKINGS["zero"](prompts[0], positions="unchanged")
    assert zeroed.blank and torch.equal(zeroed.ids, prompts[0].ids) and torch.equal(zeroed.frames, prompts[0].frames)


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
    assert blocks(6, generator).tolist() == [4, 5, 0, 1, 2, 3]              # two blocks: one other order
    seen = set()
    for _ in range(60):
        order = blocks(14, generator).tolist()
        parts = [list(range(14))[i:i + 4] for i in (0, 4, 8, 12)]           # the last holds two frames
        starts = sorted(range(4), key=lambda i: order.index(4 * i))
        assert order == [frame for i in starts for frame in parts[i]]
        seen.add(tuple(starts))
    assert len(seen) > 10 and (0, 1, 2, 3) not in seen
