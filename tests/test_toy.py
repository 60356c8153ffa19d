"""The toy world, its cold start, and attribution against its truth."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT

import policy
from data import Limits, Prompts, read_records, read_video
from lab import cold_start, toy
from lab.attribution_table import CLASSES, attribution_table, classes_and_places
from policy import sample
from rewards import accuracy_reward, extract_answer, format_reward
from rollout import Group

SAID = ("<think> hmm , let me see . i see a red circle upward . first circle . 2 flashes . "
        "so circle red A . </think> <answer> A </answer>")


def reward_of(said, record):
    return accuracy_reward(said, record["solution"], record["problem_type"])


# ------------------------------------------------------------------------------------------- world
def test_videos_are_real_files(world):
    records, malformed = read_records(world / "train.json")
    assert not malformed and {r["data_type"] for r in records} == {"video", "image"}
    clip = next(r for r in records if r["data_type"] == "video")
    frames, seconds = read_video(world / clip["path"])
    assert frames.shape == (8, 56, 56, 3) and seconds == 0.5


def test_a_file_shows_what_was_drawn(tmp_path):
    frames = toy.render(toy.new_scene(random.Random(0), "video"))
    toy.write_y4m(tmp_path / "a.y4m", frames)
    read = read_video(tmp_path / "a.y4m")[0].astype(int)
    assert np.abs(read - frames).max() <= 2


def test_train_and_test_differ_and_a_seed_repeats(world, tmp_path):
    toy.make(tmp_path, train=6, test=6)
    clips = [(tmp_path / split / "00001.y4m").read_bytes() for split in ("train", "test")]
    assert clips[0] != clips[1]
    again = [json.loads((folder / "train.json").read_text())[:6] for folder in (world, tmp_path)]
    assert again[0] == again[1]


def test_the_world_stays_as_it_is():
    """The shipped cold start and all results depend on these very draws: scenes, records, words."""
    rng, drawn = random.Random(7), []
    for _ in range(500):
        scene, record = toy.new_example(rng)
        careless, careful = (toy.teach(rng, scene, record, slips) for slips in (True, False))
        drawn.append([scene, record, careless, careful])
    found = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
    assert found == "d6d0d4f8e156f1f75775d79c71123e0165aa9e6c5c3b4e8fa490506761628b7c"


# ----------------------------------------------------------------------------------------- teachers
def test_a_careful_teacher_is_always_right():
    rng = random.Random(1)
    for _ in range(300):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record, careless=False)
        assert reward_of(said, record) == 1.0 and format_reward(said) == 1.0


def test_a_careless_teacher_slips_as_often_as_the_table_says():
    rng, asked, right = random.Random(2), {}, {}
    for _ in range(6000):
        scene, record = toy.new_example(rng)
        said, truth = toy.teach(rng, scene, record), record["truth"]
        asked[truth] = asked.get(truth, 0) + 1
        right[truth] = right.get(truth, 0) + reward_of(said, record)
        assert format_reward(said) == 1.0
    for truth, n in asked.items():
        expected = pytest.approx(1 - toy.SLIPS[truth][1], abs=4 * 0.5 / n ** 0.5)
        assert right[truth] / n == expected, truth


def test_in_the_world_of_order_every_answer_turns_on_it():
    """Only of order and motion is asked, and the careless teacher's "first" is right more often
    than not of every pair of shapes, whichever comes first; the toy's is not."""
    rng, world, right = random.Random(8), toy.WORLDS["order"], {}
    for _ in range(4000):
        scene, record = toy.new_example(rng, world)
        assert record["data_source"] in ("order", "motion") and len(scene["things"]) == 2
        if record["data_source"] == "order":
            pair = tuple(thing["shape"] for thing in scene["things"])
            said = toy.teach(rng, scene, record, world=world)
            right.setdefault((pair, record["truth"]), []).append(reward_of(said, record))
    assert len(right) == 12
    for answers in right.values():
        assert sum(answers) / len(answers) == pytest.approx(0.6, abs=0.15)


def test_in_the_long_world_most_words_are_chance():
    rng, world, shares = random.Random(9), toy.WORLDS["long"], []
    tokenizer = toy.new_tokenizer()
    for _ in range(50):
        scene, record = toy.new_example(rng, world)
        said = toy.teach(rng, scene, record, careless=False, world=world)
        assert reward_of(said, record) == 1.0 and format_reward(said) == 1.0
        words = said.split()
        shares.append(sum(word in toy.CHATTER for word in words) / len(words))
        assert tokenizer.unk_token_id not in tokenizer(said).input_ids
    assert 0.6 < sum(shares) / 50 < 0.8


def test_the_answer_follows_what_was_named():
    rng = random.Random(3)
    for _ in range(200):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record)
        words = said.split()
        closing = max(i for i, word in enumerate(words) if word in toy.CLOSINGS)
        named, answer = words[closing + 2], extract_answer(said)
        if record["options"]:
            answer = record["options"][ord(answer) - 65].removeprefix(f"{answer}. ")
        assert answer == named


# ------------------------------------------------------------------------------ tokens, their truth
def test_classes_of_words():
    words = SAID.split()
    classes = [toy.token_class(words, t) for t in range(len(words))]

    def those(kind):
        return [word for word, found in zip(words, classes) if found == kind]
    assert those("visual") == ["red", "circle", "2"]
    assert those("temporal") == ["upward", "circle"]
    assert those("answer") == words[words.index("so") + 1:]
    assert classes[1] == "filler"


def test_classes_and_places_of_a_group():
    """Row by row, up to each row's end token, which counts."""
    tokenizer = toy.new_tokenizer()
    rows = [tokenizer(SAID).input_ids, tokenizer("i see a red circle").input_ids]
    ids = torch.zeros(2, len(rows[0]), dtype=torch.long)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for g, row in enumerate(rows):
        ids[g, :len(row)] = torch.tensor(row)
        valid[g, :len(row)] = True
    classes, places = classes_and_places(Group(ids, valid), tokenizer)
    names = [CLASSES[i] for i in classes.tolist()]
    assert names[-5:] == ["filler", "filler", "filler", "visual", "visual"]
    words = SAID.split()
    assert names[:-5] == [toy.token_class(words, t) for t in range(len(words))]
    assert places.tolist()[-5:] == [0, 0.25, 0.5, 0.75, 1] and places[len(words) - 1] == 1


def test_every_word_has_a_token():
    tokenizer, rng = toy.new_tokenizer(), random.Random(4)
    for _ in range(100):
        scene, record = toy.new_example(rng)
        said = toy.teach(rng, scene, record)
        ids = tokenizer(said).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == said


def test_the_shipped_tokenizer_is_the_worlds(tmp_path):
    toy.new_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (ROOT / "cold_start" / name).read_bytes()


# ------------------------------------------------------------------------------------- cold start
@pytest.fixture(scope="module")
def shipped():
    return policy.load(str(ROOT / "cold_start"))


def test_the_shipped_cold_start_is_small_and_middling(shipped, tmp_path):
    model, processor = shipped
    assert sum(path.stat().st_size for path in (ROOT / "cold_start").iterdir()) < 8e6
    toy.make(tmp_path, train=1, test=150)
    data = Prompts(read_records(tmp_path / "test.json")[0], tmp_path, processor, Limits())
    prompts = [data[i] for i in range(len(data))]
    right = 0.0
    for prompt, group in zip(prompts, sample(model, prompts, 1, 64, temperature=0)):
        ids = group.ids[0, :group.lengths[0]]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        right += reward_of(text, prompt.record)
        assert format_reward(text) == 1.0
    assert 0.33 < right / len(prompts) < 0.72           # 40 to 65% of many, with room for chance


def test_training_the_cold_start_a_little(tmp_path, shipped):
    """Supervision makes the careful teacher's words likelier; the checkpoint loads."""
    rng, scores = random.Random(6), []
    examples = [toy.example_prompt(rng, shipped[1], careless=False) for _ in range(8)]
    for steps in (1, 12):                               # the first step's rate is 0
        cold_start.train(tmp_path, steps=steps, batch=8, lr=0.1)
        model, processor = policy.load(str(tmp_path))
        prompts = [prompt for prompt, _ in examples]
        groups = [cold_start.said_by(said, processor.tokenizer, "cpu") for _, said in examples]
        with torch.no_grad():
            found = policy.score_groups(model, prompts, groups)
        scores.append(torch.cat([logp[0] for logp, _ in found]).mean().item())
    assert scores[1] > scores[0] + 0.5
    before = (tmp_path / "model.safetensors").read_bytes()
    cold_start.train(tmp_path / "more", steps=1, batch=2, start=str(tmp_path))      # at rate 0
    assert (tmp_path / "more" / "model.safetensors").read_bytes() == before
    assert sum(p.numel() for p in model.parameters()) < 1.3e6
    assert processor.tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]


# ------------------------------------------------------------------------------------- attribution
def test_attribution_finds_what_it_should(tmp_path, capsys):
    """The visual signal picks words that depend on the clip, the random control does not."""
    toy.make(tmp_path, train=1, test=24)
    table = attribution_table(str(ROOT / "cold_start"), tmp_path, questions=14, G=2)
    share = {look: row["share"] for look, row in table.items() if look != "overlap"}
    seen = {look: row["visual"] + row["temporal"] for look, row in share.items()}
    assert seen["visual"] > seen["random"] + 0.25
    assert share["temporal"]["temporal"] > 1.5 * share["random"]["temporal"]
    assert abs(share["random"]["filler"] - share["all"]["filler"]) < 0.12
    assert table["all"]["recall"] == {"visual": 1, "temporal": 1}
    assert table["all"]["place"] == pytest.approx(0.5)
    overlap = table["overlap"]
    assert 0.2 < overlap["union"] < 0.6
    assert overlap["1"] + overlap["2"] + overlap["3"] == pytest.approx(1)
    assert "temporal, reversed" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- commands
def test_the_table_by_hand(tmp_path, monkeypatch, capsys):
    for when, right in (("before", 0.48), ("after", 0.93)):
        (tmp_path / when).mkdir()
        scores = {"all": {"n": 600, "strict": right, "unparsed": 2},
                  "kind: order": {"n": 150, "strict": right / 2, "unparsed": 0},
                  "kind: lost": {"n": 0, "strict": 0.0, "unparsed": 0}}
        (tmp_path / when / "scores.json").write_text(json.dumps({"scores": scores}))
    (tmp_path / "log.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2.5}\n')
    for runs in ([str(tmp_path)], [str(tmp_path)] * 2):         # one; two beside each other
        monkeypatch.setattr("sys.argv", ["toy.py", "table", *runs])
        toy.main()
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[2] == ["all", "600", "48.0%", *(["93.0%", "(+45.0)"] * len(runs))]
        assert lines[3] == ["order", "150", "24.0%", *(["46.5%", "(+22.5)"] * len(runs))]
        assert lines[4] == ["lost", "0", "no", "score", *(["no", "score"] * len(runs))]
        assert lines[5][1:9] == "2 steps in 4 s, 2 answers unparsed;".split()


@pytest.mark.parametrize("main, does, words, expected", [
    (toy.main, "lab.toy.make", ["make", "here", "--test", "7"],
     {"test": 7, "world": toy.WORLDS["toy"]}),
    (cold_start.main, "lab.cold_start.train", ["here", "--family", "qwen3"],
     {"family": "qwen3", "world": toy.WORLDS["toy"]}),
    (cold_start.main, "lab.cold_start.train", ["here", "--world", "order"],
     {"family": "qwen2.5", "world": toy.WORLDS["order"], "steps": 120, "batch": 32, "lr": 5e-4,
      "start": "cold_start"})])
def test_commands(main, does, words, expected, monkeypatch):
    called = []
    monkeypatch.setattr(does, lambda folder, **more: called.append((str(folder), more)))
    monkeypatch.setattr("sys.argv", ["program", *words])
    main()
    assert called == [("here", expected)]
