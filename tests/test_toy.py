import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT

import policy
from lab import toy
from data import Limits, Prompts, read_records, read_video
from policy import sample
from rewards import accuracy_reward, extract_answer, format_reward


def test_videos_are_real_files(world):
    records, malformed = read_records(world / "train.json")
    assert not malformed and {r["data_type"] for r in records} == {"video", "image"}
    clip = next(r for r in records if r["data_type"] == "video")
    frames, seconds = read_video(world / clip["path"])
    assert frames.shape == (8, 56, 56, 3) and seconds == 0.5


def test_a_file_shows_what_was_drawn(tmp_path):
    frames = toy.render(toy.new_scene(random.Random(0), "video"))
    toy.write_y4m(tmp_path / "a.y4m", frames)
    assert np.abs(read_video(tmp_path / "a.y4m")[0].astype(int) - frames).max() <= 2


def test_train_and_test_differ_and_a_seed_repeats(world, tmp_path):
    toy.make(tmp_path, train=6, test=6)
    assert (tmp_path / "train" / "00001.y4m").read_bytes() != (tmp_path / "test" / "00001.y4m").read_bytes()
    again = [json.loads((folder / "train.json").read_text())[:6] for folder in (world, tmp_path)]
    assert again[0] == again[1]


def test_a_careful_teacher_is_always_right():
    rng = random.Random(1)
    for _ in range(300):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record, careless=False)
        assert accuracy_reward(said, record["solution"], record["problem_type"]) == 1.0 and format_reward(said) == 1.0


def test_a_careless_teacher_slips_as_often_as_the_table_says():
    rng, asked, right = random.Random(2), {}, {}
    for _ in range(6000):
        scene, record = toy.new_example(rng)
        said, truth = toy.teach(rng, scene, record), record["truth"]
        asked[truth] = asked.get(truth, 0) + 1
        right[truth] = right.get(truth, 0) + accuracy_reward(said, record["solution"], record["problem_type"])
        assert format_reward(said) == 1.0
    for truth, n in asked.items():
        assert right[truth] / n == pytest.approx(1 - toy.SLIPS[truth][1], abs=4 * 0.5 / n ** 0.5), truth


def test_the_answer_follows_what_was_named():
    rng = random.Random(3)
    for _ in range(200):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record)
        words = said.split()
        closing = max(i for i, word in enumerate(words) if word in toy.CLOSINGS)
        value, answer = words[closing + 2], extract_answer(said)
        assert answer == (chr(65 + [o[3:] for o in record["options"]].index(value)) if record["options"] else value)


def test_classes_of_words():
    said = "<think> hmm , let me see . i see a red circle upward . first circle . 2 flashes . so circle red A . </think> <answer> A </answer>"
    words = said.split()
    kinds = {i: toy.token_class(words, i) for i in range(len(words))}
    assert [words[i] for i, k in kinds.items() if k == "visual"] == ["red", "circle", "2"]
    assert [words[i] for i, k in kinds.items() if k == "temporal"] == ["upward", "circle"]
    assert [words[i] for i, k in kinds.items() if k == "answer"] == words[words.index("so") + 1:]
    assert kinds[1] == "filler"


def test_every_word_has_a_token():
    tokenizer, rng = toy.new_tokenizer(), random.Random(4)
    for _ in range(100):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record)
        ids = tokenizer(said).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == said


@pytest.fixture(scope="module")
def cold_start():
    return policy.load(str(ROOT / "cold_start"))


def test_the_shipped_cold_start_is_small_and_middling(cold_start, tmp_path):
    size = sum(p.stat().st_size for p in (ROOT / "cold_start").iterdir())
    assert size < 8e6
    toy.make(tmp_path, train=1, test=200)
    records, _ = read_records(tmp_path / "test.json")
    data = Prompts(records, tmp_path, cold_start[1], Limits())
    prompts, right = [data[i] for i in range(len(data))], 0.0
    for part in (prompts[:100], prompts[100:]):
        for prompt, group in zip(part, sample(cold_start[0], part, 1, 64, temperature=0)):
            text = cold_start[1].tokenizer.decode(group.ids[0, :group.lengths[0]], skip_special_tokens=True)
            right += accuracy_reward(text, prompt.record["solution"], prompt.record["problem_type"])
            assert format_reward(text) == 1.0
    assert 0.33 < right / 200 < 0.72                                        # 40 to 65% of many, with room for chance


def test_attribution_finds_what_it_should(cold_start, tmp_path):
    """The visual signal picks words that depend on the clip, the random control does not."""
    toy.make(tmp_path, train=1, test=40)
    table = toy.attribution_table(str(ROOT / "cold_start"), tmp_path, questions=24, G=2)
    seen = {name: row["share"]["visual"] + row["share"]["temporal"] for name, row in table.items() if name != "overlap"}
    assert seen["visual"] > seen["random"] + 0.25
    assert table["temporal"]["share"]["temporal"] > 1.5 * table["random"]["share"]["temporal"]
    assert abs(table["random"]["share"]["filler"] - table["all"]["share"]["filler"]) < 0.12


def test_training_the_cold_start_a_little(tmp_path):
    """A few steps of supervision lower the loss; the checkpoint loads."""
    torch.manual_seed(0)
    toy.cold_start(tmp_path, steps=3, batch=4)
    model, processor = policy.load(str(tmp_path))
    assert sum(p.numel() for p in model.parameters()) < 1.3e6 and processor.tokenizer.eos_token == "<|im_end|>"
