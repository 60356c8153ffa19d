import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, as_in_transformers_5, masked, plain_inputs

import data
from lab import toy
from lab.rules.common import leave_out_tokens
from prompt import (
    QUESTION_EVAL, QUESTION_TRAIN, TYPE, BadRecord, Vision, by_letter, fit, one_line, patches,
    question_text, rope_positions, target_size)

GOLDEN = np.load(ROOT / "tests" / "golden" / "processor.npz")


@pytest.mark.parametrize("name", ["down", "odd", "up", "image"])
def test_patches_equal_the_transformers_processors(name):
    """Outputs of Qwen2VLVideoProcessor and Qwen2VLImageProcessor (transformers 5.17, torchvision
    0.26) for the same frames."""
    frames = fit(GOLDEN[name + "_in"], 12 * 28 * 28, Vision())
    got = patches(frames, Vision())
    assert torch.equal(got, torch.from_numpy(GOLDEN[name + "_out"]))
    grid = GOLDEN[name + "_grid"][0]
    assert got.shape[0] == grid.prod()
    assert (frames.shape[2] // 14, frames.shape[3] // 14) == tuple(grid[1:])


@pytest.mark.parametrize("h, w, limit, want", [
    (720, 1280, 128 * 784, (224, 420)), (272, 640, 128 * 784, (196, 476)),
    (56, 56, 128 * 784, (56, 56)),
    (10, 10, 128 * 784, (56, 56)), (100, 30, 4 * 784, (112, 28)),
])
def test_target_size(h, w, limit, want):
    assert target_size(h, w, limit) == want


def test_target_size_keeps_within_the_limit():
    rng = random.Random(0)
    for _ in range(300):
        h, w = rng.randint(30, 2000), rng.randint(30, 2000)
        a, b = target_size(h, w, 128 * 784)
        assert a % 28 == 0 == b % 28 and a * b <= 128 * 784
    with pytest.raises(BadRecord, match="aspect"):
        target_size(10, 4000, 128 * 784)


@pytest.mark.parametrize("h, w, want", [
    (144, 176, (308, 364)),     # grows by sqrt(100352 / 25344) = 1.98990 to 286.5, 350.2; up
    (480, 640, (280, 364)),     # shrinks by sqrt(307200 / 105369) = 1.70748 to 281.1, 374.8; down
    (280, 364, (280, 364)),     # 130 * 784 is between the two
])
def test_sizes_of_qwen_vl_utils_under_the_release(h, w, want):
    """By hand, after smart_resize of qwen-vl-utils 0.0.10 (min 128 * 784, max 1.05 times that)."""
    assert target_size(h, w, int(1.05 * 128 * 784), 128 * 784) == want


def test_the_table_of_tokens():
    """docs/tokens.md: the function it shows gives the numbers it shows."""
    text = (ROOT / "docs" / "tokens.md").read_text()
    shown = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], shown)
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 11
    for name, kind, frames, width, height, most, *numbers in rows[1:]:
        most = math.prod(int(x) for x in most.split("\\*"))
        for pixels, number in zip(("paper", "released"), numbers):
            got = shown["tokens"](kind.strip(), int(frames), int(width), int(height), most, pixels)
            assert got == int(number.replace(",", "")), (name, pixels, got)


def test_the_table_is_what_a_prompt_has(tiny, tmp_path):
    """Its first row, from a file."""
    frames = np.zeros((32, 360, 640, 3), np.uint8)
    toy.write_y4m(tmp_path / "a.y4m", frames, fps=4)
    row = {**record(), "path": "a.y4m", "solution": "<answer>A</answer>"}
    for pixels in ("paper", "released"):
        limits = data.Limits(pixels=pixels)
        item = data.Prompts([data.check_record(row, 0)], tmp_path, tiny[1], limits)[0]
        assert item.visual.sum() == 960


def test_one_line():
    assert one_line("何 a") == "何 a" and one_line("a\nb\ud800") == r"'a\nb\ud800'"
    assert one_line("a" * 300 + "b" * 300) == "a" * 200 + " .. " + "b" * 200


def test_positions_equal_the_librarys(tiny, prompts, plain):
    """Where seconds are whole, transformers' get_rope_index agrees (5.17 cuts fractions)."""
    for prompt in (as_in_transformers_5(tiny[1], prompt) for prompt in prompts):
        inputs = {k: v for k, v in plain_inputs(prompt).items() if "pixel" not in k}
        want, delta = plain.model.get_rope_index(**inputs)
        assert torch.equal(prompt.positions, want[:, 0])
        assert prompt.next_position == len(prompt.ids) + int(delta)


def test_fractions_of_seconds_move_positions():
    visual = torch.tensor([False] + [True] * 4 + [False])
    positions = rope_positions(visual, (4, 2, 2), 2, 2 * 0.8, "frame")  # 4 patches of one token
    assert positions[0].tolist() == [0, 1, 2, 4, 5, 2]  # 1 + floor(0, 1.6, 3.2, 4.8); text from 2
    assert positions[1].tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("grid, ticks, frame, clip", [
    ((8, 16, 24), 2, 27, 30),           # 8 patches 2 apart: 15 .. 29; 8 x 12 tokens: 15 .. 26
    ((32, 22, 38), 2, 34, 78),          # 15 .. 77; 11 x 19 tokens: 15 .. 33
    ((8, 16, 24), 1, 27, 27),           # Qwen2-VL: 15 .. 22, so the frame's width is the highest
    ((1, 16, 24), 2, 27, 27)])          # a still image
def test_text_goes_on_after_the_clips_highest_position(grid, ticks, frame, clip):
    """As in transformers 4, under which the checkpoints were trained; worked out by hand."""
    tokens = grid[0] * grid[1] * grid[2] // 4
    visual = torch.tensor([False] * 15 + [True] * tokens + [False] * 3)
    for text_after, first in (("clip", clip), ("frame", frame)):
        positions = rope_positions(visual, grid, 2, ticks, text_after)
        assert positions[:, -3:].tolist() == [[first, first + 1, first + 2]] * 3
    assert torch.equal(rope_positions(visual, grid, 2, ticks)[:, -1], torch.full((3,), clip + 2))


def test_blocks_of_one_time_each_stand_alike_under_both():
    """Qwen3-VL's: a temporal patch a run, text between."""
    run = [False] * 2 + [True] * 6
    both = [rope_positions(torch.tensor(run * 3 + [False]), (3, 4, 6), 2, 1, text_after)
            for text_after in ("clip", "frame")]
    assert torch.equal(*both) and both[0][:, -1].tolist() == [15] * 3           # 3 * (2 + 3)


def record(**more):
    return {"problem": "What?", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
            "data_type": "video", **more}


def test_protocol_strings():
    text = question_text(record())
    assert text.startswith("What?Options:\nA. x\nB. y\n\nPlease think about this question as if "
                           "you were a human")
    assert text.endswith("within the <answer> </answer> tags.") and "<think> </think>" in text
    assert "<think> and </think>" in question_text(record(), QUESTION_EVAL)
    for kind, words in TYPE.items():
        assert question_text(record(problem_type=kind, options=["A. x", "B. y"])).endswith(words)
    assert "Options" not in question_text(record(problem_type="numerical", options=[]))


@pytest.mark.parametrize("options", [
    ["A) x", "B) y"], ["A. x", "B. y"], ["(A) x", "(B) y"], ["A: x", "B: y"], ["A.x", " B .  y"],
    ["a) x", "b) y"], ["(a) x", "(b) y"], ["a. x", "B: y"], ["A. ", "B. y"]])
def test_options_with_letters_get_no_second_one(options):
    text = question_text(record(options=options))
    assert "Options:\n" + "\n".join(options) + "\n\n" in text
    assert by_letter(options) == {"A": "x" if "x" in options[0] else "", "B": "y"}


@pytest.mark.parametrize("options", [
    ["x", "y"], ["A.D. 500", "500 B.C.", "1000"], ["A.D. 500", "B.C. 20"], ["A. x", "y"],
    ["x", "B. y"], ["B. x", "A. y"], ["a.m.", "b.p.m."], ["A man", "Band"], ["(c)(a)", "(b)(a)"],
    ["1. x", "2. y"], ["C. elegans", "B. subtilis"]])
def test_the_list_decides_whether_options_have_letters(options):
    """Only where each begins with its own; else nothing of a text is taken for one."""
    text = question_text(record(options=options))
    shown = [f"{letter}. {option}" for letter, option in zip("ABC", options)]
    assert "Options:\n" + "\n".join(shown) + "\n\n" in text
    assert by_letter(options) == dict(zip("ABC", options))


def test_a_problem_that_ends_in_options():
    assert question_text(record(problem="Which?\nOptions:")).startswith("Which?\nOptions:\nA. x\n")
    assert question_text(record(problem="Which? Options:\n")).count("Options:") == 1


def test_fourteen_options_and_other_scripts():
    text = question_text(record(problem="何色？", options=[f"色{i}" for i in range(14)]))
    assert "何色？" in text and "N. 色13" in text


def test_the_chat_template_surrounds_the_clip(tiny, prompts):
    model, processor = tiny
    for prompt in prompts:
        media = processor.media_ids[prompt.kind]
        t, h, w = prompt.grid
        assert (prompt.ids == media).sum() == t * h * w // 4 == prompt.visual.sum()
        text = processor.tokenizer.decode(prompt.ids[~prompt.visual])
        assert text.startswith("<|im_start|> user <|vision_start|> <|vision_end|>")
        assert text.endswith("<|im_start|> assistant")


def test_a_question_with_a_video_token_is_refused(tiny, prompts):
    bad = {**prompts[0].record, "problem": "what is <|video_pad|> ?", "problem_id": 77}
    with pytest.raises(BadRecord, match="77"):
        tiny[1].prompt(bad, prompts[0].frames, 0.5)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|vision_start|>", "<|endoftext|>", "<unk>"])
@pytest.mark.parametrize("where", ["problem", "options", "whole_prompt"])
def test_a_question_with_a_special_token_is_refused(tiny, prompts, token, where):
    text = f"what{token}is it ?"
    value = [text, "b"] if where == "options" else text
    bad = {**prompts[0].record, "problem_id": 77, where: value}
    with pytest.raises(BadRecord, match=f"record 77 .*control token {re.escape(token)}"):
        tiny[1].prompt(bad, prompts[0].frames, 0.5)


def test_a_long_prompt_is_refused_not_cut(tiny, prompts):
    with pytest.raises(BadRecord, match="exceeds the limit of 20"):
        tiny[1].prompt(prompts[0].record, prompts[0].frames, 0.5, max_prompt=20)


def test_a_single_frame_is_doubled(tiny, prompts):
    one = tiny[1].prompt(prompts[0].record, prompts[0].frames[:1], 0.5)
    two = tiny[1].prompt(prompts[0].record, prompts[0].frames[:1].repeat(2, 1, 1, 1), 0.5)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(*(patches(p.frames, p.vision) for p in (one, two)))


def test_counterfactual_prompts(prompts):
    p = prompts[0]
    hidden = masked(p)
    assert torch.equal(hidden.ids, p.ids[~p.visual])
    assert torch.equal(hidden.positions, p.positions[:, ~p.visual])
    assert hidden.next_position == p.next_position
    assert masked(p, "moved").positions[2].tolist() == list(range(len(hidden.ids)))
    order = torch.arange(len(p.frames)).flip(0)
    shuffled = p.with_frames(p.frames[order])
    assert torch.equal(shuffled.frames, p.frames.flip(0))
    assert torch.equal(shuffled.positions, p.positions)

    keep = torch.arange(int(p.visual.sum())) % 2 == 0
    assert leave_out_tokens(p, keep).visual.sum() == keep.sum()


def test_processor_survives_a_round_trip(tiny, tmp_path):
    processor = tiny[1]
    tiny[0].config.save_pretrained(tmp_path)
    processor.save(tmp_path)
    again = type(processor).from_pretrained(str(tmp_path))
    assert again.vision == processor.vision
    assert again.tokenizer.chat_template == processor.tokenizer.chat_template
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == list(processor.vision.mean)


def test_the_protocol_is_one_token_in_the_toy_world(prompts):
    assert all(len(p.ids) < 70 for p in prompts)
    assert QUESTION_TRAIN.removeprefix("{Question}\n") in toy.new_tokenizer().get_vocab()
