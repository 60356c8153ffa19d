"""The dry run's parts: clips that decode, and the table by hand."""

import json

import pytest

from data import Limits, load_media, read_records, read_video
from lab.dryrun import make_clips, table
from policy import load_processor
from prompt import Prompt


def test_clips_decode_and_make_prompts(tmp_path):
    make_clips(tmp_path / "new" / "clips", frames=6, records=5)
    records, malformed = read_records(tmp_path / "new" / "clips" / "data.json")
    assert len(records) == 5 and not malformed and {r["path"] for r in records} == {"./0.y4m", "./1.y4m"}
    frames, seconds = read_video(tmp_path / "new" / "clips" / "0.y4m", max_frames=6)
    assert frames.shape == (6, 360, 640, 3) and seconds == 0.5              # long enough for 6 frames at 2 a second
    assert read_video(tmp_path / "new" / "clips" / "0.y4m", max_frames=16)[0].shape[0] == 6
    assert (frames[0] != frames[1]).any() and frames[0].std() > 50          # noise that moves: nothing compresses away
    processor = load_processor("random:7b")
    media, seconds = load_media(records[1], tmp_path / "new" / "clips", Limits(max_frames=6))
    prompt = processor.prompt(records[1], media, seconds)
    assert isinstance(prompt, Prompt) and prompt.visual.sum() == 3 * 8 * 15     # 640x360 within 128 x 784 pixels: 420x224


def test_the_table_by_hand(tmp_path, capsys):
    """Two steps to warm up are left out, the others enter by their median."""
    steps = [90.0, 20.0, 8.0, 7.0, 30.0, 9.0]                               # median of the last four: 8.5
    rows = [{"step": i + 1, "prompts": 4.0, "seconds": s, "seconds_sample": s / 2, "seconds_backward": 1.0} for i, s in enumerate(steps)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "options.json").write_text(json.dumps({"model": "random:7b", "G": 8, "max_new_tokens": 768, "max_frames": 16}))
    got = table(tmp_path, epoch=16916)
    assert got["seconds"] == {"seconds": 8.5, "seconds_sample": 4.25, "seconds_backward": 1.0} and got["memory_gib"] == {}
    assert got["prompts_per_hour"] == pytest.approx(3600 * 4 / 8.5) and got["epoch_hours"] == pytest.approx(16916 / 4 * 8.5 / 3600)
    assert got["steps"] == 4 and got["all_steps_seconds"] == steps
    printed = capsys.readouterr().out
    assert "4 steps after 2 to warm up (90 s the first)" in printed and "sample 4.25, backward 1.00; a step 8.50" in printed
    assert "1694 prompts an hour; an epoch of 16916 prompts: 10.0 hours" in printed and "GiB" not in printed
    (tmp_path / "memory.json").write_text(json.dumps({"weights": 15.45, "peak": 70.0}))
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0]) + "\n")         # a run of one step: that one counts
    got = table(tmp_path, epoch=100)
    assert got["seconds"]["seconds"] == 90 and got["memory_gib"]["peak"] == 70 and "GiB on one GPU: weights 1" in capsys.readouterr().out
