"""The dry run's parts: clips that decode and make prompts, and the table by hand."""

import json

import pytest
from conftest import ROOT

from data import Limits, load_media, read_records, read_video
from lab.dryrun import make_clips, memory_parts, table
from prompt import Processor


def test_clips_decode_and_make_prompts(tmp_path):
    folder = tmp_path / "new" / "clips"
    make_clips(folder, frames=6, records=5)
    records, malformed = read_records(folder / "data.json")
    assert len(records) == 5 and not malformed
    assert {r["path"] for r in records} == {"./0.y4m", "./1.y4m"}
    frames, seconds = read_video(folder / "0.y4m", max_frames=6)
    assert frames.shape == (6, 360, 640, 3) and seconds == 0.5
    longest = read_video(folder / "0.y4m", max_frames=16)[0]
    assert len(longest) == 6                            # long enough for 6 frames at 2 a second
    assert (frames[0] != frames[1]).any() and frames[0].std() > 50      # noise that moves
    processor = Processor.from_pretrained(str(ROOT / "cold_start"))
    media, seconds = load_media(records[1], folder, Limits(max_frames=6))
    prompt = processor.prompt(records[1], media, seconds)
    assert prompt.visual.sum() == 3 * 8 * 15            # 640x360 within 128 x 784: 420x224


def test_the_table_by_hand(tmp_path, capsys):
    """Two steps to warm up are left out, the others enter by their median."""
    steps = [90.0, 20.0, 8.0, 7.0, 30.0, 9.0]           # median of the last four: 8.5
    rows = [{"step": i + 1, "prompts": 4.0, "seconds": s, "seconds_sample": s / 2,
             "seconds_backward": 1.0} for i, s in enumerate(steps)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": "random:7b", "G": 8, "max_new_tokens": 768, "max_frames": 16}
    (tmp_path / "options.json").write_text(json.dumps(options))
    got = table(tmp_path, epoch=16916)
    assert got["seconds"] == {"seconds": 8.5, "seconds_sample": 4.25, "seconds_backward": 1.0}
    assert got["memory_gib"] == {} and got["steps"] == 4 and got["all_steps_seconds"] == steps
    assert got["prompts_per_hour"] == pytest.approx(3600 * 4 / 8.5)
    assert got["epoch_hours"] == pytest.approx(16916 / 4 * 8.5 / 3600)
    printed = capsys.readouterr().out
    assert "4 steps after 2 to warm up (90 s the first)" in printed
    assert "sample 4.25, backward 1.00; a step 8.50" in printed
    assert "1694 prompts an hour; an epoch of 16916 prompts: 10.0 hours" in printed
    assert "GiB" not in printed


def test_the_table_of_one_step_and_its_memory(tmp_path, capsys):
    """The 7B has 8,292,166,656 weights: 15.4 GiB at 2 bytes, 92.7 at 12, a fourth of that by rank.
    """
    row = {"step": 1, "prompts": 8.0, "seconds": 90.0, "memory_gib": 75.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    options = {"model": "random:7b", "G": 8, "max_new_tokens": 768, "max_frames": 16,
               "dtype": "bfloat16", "prompts_per_step": 2, "beta": 0.04, "offload": False,
               "freeze": []}
    (tmp_path / "options.json").write_text(json.dumps(options))
    got = table(tmp_path, epoch=100)
    assert got["seconds"]["seconds"] == 90 and got["memory_gib"]["peak"] == 75
    printed = capsys.readouterr().out
    assert "GiB on one GPU: weights 15.4, gradients 15.4, reference 15.4, optimizer 23.2" in printed
    assert "activations 5.5, peak 75.0" in printed
    kept = {**options, "offload": True, "beta": 0}
    assert memory_parts(kept, 8, 40.0)["activations"] == pytest.approx(40 - 30.89, abs=0.01)
