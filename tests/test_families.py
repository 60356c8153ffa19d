"""Every family against transformers' own forward and generate: tiny models of random weights.

The reference is the library's whole model, at its own positions; where a video is masked, its text
model under an explicit mask.
"""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, as_in_transformers_5, masked, plain_inputs
from transformers import Qwen3VLProcessor

import ktr
import policy
from data import Limits, check_record, load_media
from engine import families, weights
from engine.decoding import vision_tokens
from engine.prepare import recompute
from lab import cold_start, toy
from lab.rules.common import leave_out_tokens
from lab.rules.frame_orders import rearranged, with_times
from options import Options
from policy import plain_score, sample, score, score_groups
from rollout import Rollout
from run.arguments import parse

ENDS = [2, 20, 30, 40]                                  # several, so that a random model ends


@pytest.fixture(scope="module", params=list(toy.TINY))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A checkpoint whose weights are large enough that its outputs depend on what it sees."""
    made = tmp_path_factory.mktemp(family)
    cold_start.train(made, steps=1, batch=2, family=family)
    model, _ = policy.load(str(made))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.2) if p.ndim == 1 else p.normal_(0, 0.08)
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def ours(folder):
    return policy.load(str(folder))


@pytest.fixture(scope="module")
def plain(folder):
    """The same weights in an untouched transformers model."""
    return weights.from_pretrained(str(folder), torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(ours):
    """Two clips, a still image, a clip."""
    rng, found = random.Random(5), {"video": [], "image": []}
    while len(found["video"]) < 3 or not found["image"]:
        prompt = toy.example_prompt(rng, ours[1])[0]
        found[prompt.kind].append(prompt)
    a, b, c = found["video"][:3]
    return [a, b, found["image"][0], c]


@pytest.fixture(scope="module")
def groups(ours, prompts):
    return sample(ours[0], prompts, 3, 12, seeds=[1, 2, 3, 4], ends=ENDS)


def inputs_of(plain, prompt, completion=None):
    inputs = plain_inputs(prompt, completion)
    if plain.config.model_type != "qwen2_5_vl":
        inputs.pop("second_per_grid_ts", None)          # only one family takes seconds
    return inputs


def logp_of(logits, prompt, ids):
    logp = logits[0, len(prompt.ids) - 1:-1].log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0]


def plain_logp(plain, prompt, ids):
    return plain_score(plain, prompt, ids[None])[0][0]


def masked_logp(plain, prompt, ids, visible, size=1.0):
    """(n,) of a completion under transformers' text model, at its own positions, with a mask over
    the prompt's tokens, the vision features times `size`."""
    inputs, length = inputs_of(plain, prompt, ids), len(prompt.ids) + len(ids)
    sees = torch.ones(length, length).tril().bool()
    sees[:, :len(prompt.ids)] &= visible
    sees |= torch.eye(length).bool()            # the hidden tokens' own rows must not be empty
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    seen = plain.model.visual(pixels, grid_thw=torch.tensor([prompt.grid]))
    where, more = torch.zeros(1, length).bool(), {}
    where[0, :len(prompt.ids)] = prompt.visual
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter(where[..., None], size * seen.pooler_output)
    if "deepstack_features" in seen:
        more = {"visual_pos_masks": where,
                "deepstack_visual_embeds": [size * x for x in seen.deepstack_features]}
    states = plain.model.language_model(
        inputs_embeds=embeds, position_ids=inputs["position_ids"], attention_mask=sees[None, None],
        **more).last_hidden_state
    return logp_of(plain.lm_head(states), prompt, ids)


def rows_of(group):
    return [group.ids[g, :n] for g, n in enumerate(group.lengths)]


def same(got, group, reference, atol=2e-5):
    for g, ids in enumerate(rows_of(group)):
        assert torch.allclose(got[g, :len(ids)], reference(ids), atol=atol)


# --------------------------------------------------------------------------------- scores, samples
def test_every_part_of_the_family_is_there(family, ours, prompts):
    """Or the tests below show less than they say."""
    model, clip, v = ours[0], prompts[0], prompts[0].vision
    runs = clip.visual.int().diff().clamp(min=0).sum()
    attention = model.model.language_model.layers[0].self_attn
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    odd = attention.head_dim != model.config.text_config.hidden_size // 4
    deep = families.feature_width(model.config) // 128 - 1
    found = runs, v.patch, v.mean[0] == 0.5, tied, odd, hasattr(attention, "q_norm"), deep
    assert found == ((4, 16, True, True, True, True, 2) if family == "qwen3"
                     else (1, 14, False, False, False, False, 0))
    assert clip.visual.sum() == 16 and clip.grid == (4, 4, 4)


def test_positions_are_the_librarys(ours, plain, prompts):
    for prompt in (as_in_transformers_5(ours[1], prompt) for prompt in prompts):
        rope = {k: v for k, v in inputs_of(plain, prompt).items() if "pixel" not in k}
        want, delta = plain.model.get_rope_index(**rope)
        assert torch.equal(prompt.positions, want[:, 0])
        assert prompt.next_position == len(prompt.ids) + int(delta)


@torch.no_grad()
def test_scores_of_clips_and_images_together_are_the_librarys(ours, plain, prompts, groups):
    for prompt, group, (logp, _) in zip(prompts, groups, score_groups(ours[0], prompts, groups)):
        same(logp, group, lambda ids: plain_logp(plain, prompt, ids))
        seen = group.logp.masked_fill(~group.completion_mask, 0)
        assert torch.allclose(logp, seen, atol=2e-5)            # what sampling saw


def test_where_text_stands_after_a_clip(family, ours, prompts):
    """4 temporal patches, 2 or 1 apart, end at 6 or 3 and a frame of 2 x 2 tokens at 1; blocks of
    one time each, and still images, end where their frames do."""
    later = {"qwen2.5": 6 - 1, "qwen2": 3 - 1, "qwen3": 0}[family]
    for prompt in prompts:
        as_there = as_in_transformers_5(ours[1], prompt)
        moved = later if prompt.kind == "video" else 0
        assert prompt.next_position - as_there.next_position == moved
        assert torch.equal(prompt.positions[:, -1] - as_there.positions[:, -1],
                           torch.full((3,), moved))


def test_greedy_samples_of_clips_and_images_together_are_generates(ours, plain, prompts):
    prompts = [as_in_transformers_5(ours[1], prompt) for prompt in prompts]
    banned = vision_tokens(plain.config)
    assert len(banned) == 4
    for prompt, group in zip(prompts, sample(ours[0], prompts, 2, 16, temperature=0)):
        want = plain.generate(**inputs_of(plain, prompt), max_new_tokens=16, do_sample=False,
                              suppress_tokens=banned)[0, len(prompt.ids):]
        assert all(torch.equal(ids, want) for ids in rows_of(group))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_librarys(ours, plain, prompts, groups, checkpointing):
    model, some = ours[0], slice(1, 3)                  # a clip and an image
    model.zero_grad(), plain.zero_grad()
    recompute(model, checkpointing)
    sum(logp.sum() for logp, _ in score_groups(model, prompts[some], groups[some])).backward()
    recompute(model, False)
    for prompt, group in zip(prompts[some], groups[some]):
        for ids in rows_of(group):
            plain_logp(plain, prompt, ids).sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        tolerance = 2e-5 * max(1, b.grad.abs().max())
        assert b.grad.any() and torch.allclose(a.grad, b.grad, atol=tolerance), name
    model.zero_grad(), plain.zero_grad()


# ---------------------------------------------------------------------------- masked and shuffled
@torch.no_grad()
def test_masked_passes_are_the_librarys_under_a_mask(ours, plain, prompts, groups):
    """Hidden: what DeepStack would add goes with the tokens. Zeroed: it is 0 too. Half: what stays
    goes to its own tokens."""
    every, half = torch.ones_like, torch.arange(16) % 3 > 0
    for prompt, group in zip(prompts[1:], groups[1:]):
        keep = half[:int(prompt.visual.sum())]
        some = ~prompt.visual
        some[prompt.visual] = keep
        hidden, zeroed = masked(prompt), replace(prompt, zeroed=True)
        thinned = leave_out_tokens(prompt, keep)
        changed = score_groups(ours[0], [hidden, zeroed, thinned, prompt], [group] * 4)
        got = [logp for logp, _ in changed]             # one packed row for all
        same(got[0], group, lambda ids: masked_logp(plain, prompt, ids, ~prompt.visual))
        same(got[1], group, lambda ids: masked_logp(plain, prompt, ids, every(some), size=0.0))
        same(got[2], group, lambda ids: masked_logp(plain, prompt, ids, some))
        same(got[3], group, lambda ids: masked_logp(plain, prompt, ids, every(some)))
        for a, b in ((0, 3), (1, 3), (2, 3), (0, 1)):   # and they all differ
            assert (got[a] - got[b]).abs().max() > 1e-3


@torch.no_grad()
def test_shuffled_frames_keep_words_and_positions(family, ours, plain, prompts, groups):
    prompt, group = prompts[0], groups[0]
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    shuffled = prompt.with_frames(prompt.frames[order])
    assert torch.equal(shuffled.ids, prompt.ids) and not torch.equal(order, torch.arange(8))
    assert torch.equal(shuffled.positions, prompt.positions)
    got, _ = score(ours[0], shuffled, group)
    same(got, group, lambda ids: plain_logp(plain, shuffled, ids))
    assert (got - score(ours[0], prompt, group)[0]).abs().max() > 1e-3
    if family == "qwen3":
        text = ours[1].tokenizer.decode(shuffled.ids[~shuffled.visual])
        times = [f"< {t} seconds >" for t in ("0 . 2", "1 . 2", "2 . 2", "3 . 2")]
        assert [text.index(t) for t in times] == sorted(text.index(t) for t in times)


@torch.no_grad()
def test_times_may_move_along_with_their_frames(family, ours, plain, prompts, groups):
    prompt, group, model, processor = prompts[0], groups[0], *ours
    r, o = Rollout(prompt, group, 0), Options()
    if family != "qwen3":                               # no times to move: frames singly
        same_ids = with_times(r, o)
        assert torch.equal(same_ids.ids, prompt.ids)
        return
    order = torch.tensor([2, 0, 3, 1])
    moved = rearranged(prompt, order)
    text = processor.tokenizer.decode(moved.ids[~moved.visual])
    places = [text.index(f"< {i} . 2 seconds >") for i in (2, 0, 3, 1)]     # 0.5 s between frames
    assert places == sorted(places) and len(moved.ids) == len(prompt.ids)
    assert torch.equal(moved.frames[:2], prompt.frames[4:6])
    got, _ = score(model, moved, group)
    same(got, group, lambda ids: plain_logp(plain, moved, ids))
    assert (got - score(model, prompt, group)[0]).abs().max() > 1e-3
    back = rearranged(moved, torch.argsort(order))
    for name in ("ids", "positions", "visual", "frames"):
        assert torch.equal(getattr(back, name), getattr(prompt, name))
    assert back.next_position == prompt.next_position
    changed = with_times(r, o)
    assert changed.ids.sort().values.equal(prompt.ids.sort().values)
    assert not torch.equal(changed.ids, prompt.ids)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_few_frames_and_odd_ones_are_rearranged(ours, n):
    """A clip of one temporal patch has no other order; an odd last frame counts for two."""
    processor = ours[1]
    if not processor.vision.timestamps:
        pytest.skip("no times in its prompts")
    record = toy.example_prompt(random.Random(5), processor)[0].record
    frames = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 64, 64)
    prompt = processor.prompt({**record, "data_type": "video"}, frames, 0.5)
    changed = with_times(Rollout(prompt, None, 0), Options())
    assert (changed is prompt) == (n < 3)
    if changed is not prompt:
        assert set(changed.frames.flatten().tolist()) == set(range(n))
        assert len(changed.frames) == n + n % 2 and changed.grid == prompt.grid


# ----------------------------------------------------------------------------------- what is shown
@pytest.mark.parametrize("n, apart", [(1, 0.5), (2, 0.5), (3, 0.5), (8, 0.7), (16, 1 / 3)])
def test_times_are_the_librarys(n, apart):
    """0.5 s between frames: the first pair is at 0.25 s, said as 0.2; an odd last frame stands
    alone."""
    block = "<|vision_start|><|video_pad|><|vision_end|>"
    times = Qwen3VLProcessor._calculate_timestamps(None, list(range(n)), 1 / apart, 2)
    want = "a" + "".join(f"<{t:.1f} seconds>{block}" for t in times) + f"b{block}"
    for seconds in (apart, [i / (1 / apart) for i in range(n)]):
        assert families.stamp(f"a{block}b{block}", n, 2, seconds) == want
    if apart == 0.5:
        assert want.startswith("a<0.2 seconds>" if n > 1 else "a<0.0 seconds>")


def test_times_come_from_the_file(tmp_path):
    """13 frames at 3 a second, 4 of them shown: 0, 4, 8, 12. Seconds are the clip's own even where
    positions take 1.0 for every clip."""
    toy.write_y4m(tmp_path / "a.y4m", np.zeros((13, 64, 64, 3), np.uint8), fps=3)
    _, processor = cold_start.new_model("cpu", "qwen3")
    record = check_record({"problem": "?", "data_type": "video", "problem_type": "numerical",
                           "solution": "<answer>1</answer>", "path": "a.y4m"}, 0)
    media = load_media(record, tmp_path, Limits(max_frames=4), processor.vision)
    assert media[0].shape == (4, 3, 64, 64) and media[1] == pytest.approx([0, 4 / 3, 8 / 3, 4])
    prompt = processor.prompt(record, *media)
    text = processor.tokenizer.decode(prompt.ids[~prompt.visual])
    assert "< 0 . 7 seconds > <|vision_start|> <|vision_end|> < 3 . 3 seconds >" in text
    assert load_media(record, tmp_path, Limits(max_frames=4))[1] == 0.5


def test_a_question_with_a_video_token_is_refused(ours, prompts):
    bad = {**prompts[0].record, "problem": "<|vision_start|><|video_pad|><|vision_end|>"}
    with pytest.raises(ValueError, match="holds an image or video token"):
        ours[1].prompt(bad, prompts[0].frames, 0.5)


# -------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("change, why", [
    ({"model_type": "qwen3_vl_moe"}, "type qwen3_vl_moe, which is not one of Qwen2-VL, Qwen2.5-VL"),
    ({"model_type": "qwen3_5"}, "type qwen3_5"),
    ({"model_type": "qwen3"}, "type qwen3, which"),
    ({"model_type": "qwen9_vl"}, "type qwen9_vl"),              # transformers knows it no more
    ({"model_type": None}, "type None"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding window"),
])
def test_other_models_are_refused_before_anything_is_loaded(change, why, world, tmp_path):
    config = json.loads((ROOT / "cold_start" / "config.json").read_text())
    if "layer_types" in change:
        config["text_config"] |= {**change, "use_sliding_window": True, "sliding_window": 8}
    else:
        config |= change
    (tmp_path / "config.json").write_text(json.dumps(config))   # and no other file
    with pytest.raises(ValueError, match=why):
        policy.load(str(tmp_path))
    options = ["--model", str(tmp_path), "--data", str(world / "train.json"), "--check"]
    with pytest.raises(SystemExit, match=f"^error: --model .*{why}") as stop:
        ktr.main(parse(options))
    assert "\n" not in str(stop.value)


# --------------------------------------------------------------------------------------- whole runs
def test_supervision_lowers_the_loss(family):
    """What `lab.toy cold_start --family` does: the same prompts again and again."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model, processor = cold_start.new_model("cpu", family)
    shown = [toy.example_prompt(rng, processor) for _ in range(2)]
    prompts = [prompt for prompt, _ in shown]
    said = [cold_start.said_by(teacher, processor.tokenizer, "cpu") for _, teacher in shown]
    assert all(processor.tokenizer.unk_token_id not in p.ids for p in prompts)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-4), []
    for _ in range(12):
        scored = score_groups(model, prompts, said)
        loss = -torch.cat([logp[0] for logp, _ in scored]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize("frozen", [[], ["--freeze", "vision"]])
def test_the_loop_runs_and_saves(folder, world, tmp_path, capsys, monkeypatch, frozen):
    """Two steps, checkpointing on; what is frozen stays, all else moves; the result loads."""
    monkeypatch.setattr(ktr, "accuracy_reward", lambda text, *_: len(text) % 7 / 7)
    options = ["--model", folder, "--data", world / "train.json", "--out", tmp_path, "--G", 4,
               "--dtype", "float32", "--max_new_tokens", 8, "--workers", 0, "--lr", 1e-3,
               "--max_steps", 2, "--prompts_per_step", 2, "--save_every", 2, *frozen]
    ktr.main(parse([str(x) for x in options]))
    before = weights.from_pretrained(str(folder), torch.float32)
    after = weights.from_pretrained(str(tmp_path / "final"), torch.float32)
    printed = capsys.readouterr().out
    for name, (a, b) in {name: (weights.parts_of(before)[name], weights.parts_of(after)[name])
                         for name in weights.parts_of(after)}.items():
        held = name in frozen
        assert [torch.equal(x, y) for x, y in zip(a, b)] == [held] * len(a), name
        assert f"{name} {sum(x.numel() for x in a) / 1e6:.1f}M" + " (frozen)" * held in printed
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["sampling_gap"] < 1e-5 and row["grad_norm"] > 0
                                  for row in rows)
    assert all(row["share_visual"] > 0 and row["share_temporal"] > 0 for row in rows)
