import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lab import toy
from data import (BadRecord, Limits, Prompts, Skipped, check_record, frame_indices, load_media, loader, read_json,
                  read_records, read_video)
from prompt import Prompt

GOOD = {"problem_id": 7, "problem": "Which?", "data_type": "video", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
        "solution": "<answer>B</answer>", "path": "./clips/a.y4m", "data_source": ""}


@pytest.mark.parametrize("change, says", [
    ({"problem": ""}, "'problem'"), ({"problem": None}, "'problem'"), ({"solution": 3}, "'solution'"), ({"path": None}, "'path'"),
    ({"data_type": "audio"}, "audio"), ({"problem_type": "essay"}, "essay"), ({"problem_type": None}, "problem_type"),
    ({"options": "A. x"}, "options"), ({"options": [1, 2]}, "options"), ({"options": []}, "fewer than two"),
    ({"options": ["A. x"]}, "fewer than two"), ({"options": None}, "fewer than two"),
    ({"solution": "B"}, "<answer>"), ({"solution": "<answer></answer>"}, "<answer>"),
    ({"path": "../secret.mp4"}, "leaves"), ({"path": "./a/../../b.mp4"}, "leaves"), ({"path": "/etc/passwd"}, "leaves"),
])
def test_malformed_records_are_named(change, says):
    with pytest.raises(BadRecord, match=says) as error:
        check_record({**GOOD, **change}, 4)
    assert "record 7 (row 4)" in str(error.value)


@pytest.mark.parametrize("row", ["text", 3, None, ["a"]])
def test_rows_that_are_no_objects(row):
    with pytest.raises(BadRecord, match="row 2"):
        check_record(row, 2)


def test_untidy_but_usable_records():
    for change in ({"data_source": None}, {"process": "..."}, {"problem_type": "numerical", "options": None},
                   {"options": [f"{i}" for i in range(14)]}, {"problem": "何？"}, {"path": "clips//./a.y4m"}):
        record = check_record({**GOOD, **change}, 0)
        assert isinstance(record["options"], list) and record["row"] == 0
    assert check_record({k: v for k, v in GOOD.items() if k != "problem_id"}, 5)["problem_id"] == 5


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lists_and_lines(tmp_path):
    as_list = write(tmp_path / "a.json", json.dumps([GOOD, GOOD]))
    as_lines = write(tmp_path / "a.jsonl", json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_json(as_list) == read_json(as_lines) == [GOOD, GOOD]


@pytest.mark.parametrize("text, says", [
    ("[{\"a\": 1},", "not valid JSON"), ("{\"a\": 1}\nnonsense\n", "bad.json:2"), ("hello", "bad.json:1"),
])
def test_broken_json_names_file_and_line(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_json(write(tmp_path / "bad.json", text))


def test_lines_end_at_newlines_only(tmp_path):
    """str.splitlines also cuts at U+2028 and the like, which JSON leaves as they are inside a text."""
    rows = [{"problem": "one\u2028two\u0085three"}, {"problem": "four"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_json(tmp_path / "a.jsonl") == rows


def test_rows_that_are_no_objects_can_be_left_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([7, {"problem": "no path"}]))
    (tmp_path / "bad.json").write_text(json.dumps([{"row": 0, "path": None}, {"row": 1, "path": None}]))
    assert read_records(tmp_path / "a.json", tmp_path / "bad.json") == ([], [])
    (tmp_path / "bad.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not a list written by"):
        read_records(tmp_path / "a.json", tmp_path / "bad.json")


def test_read_records_reports_what_it_leaves_out(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([GOOD, {**GOOD, "problem_type": "essay"}, "x", GOOD]))
    records, malformed = read_records(path)
    assert [r["row"] for r in records] == [0, 3] and len(malformed) == 2 and "essay" in malformed[0]
    leave = write(tmp_path / "bad.json", json.dumps([{"row": 3, "path": GOOD["path"], "reason": ""}]))
    assert [r["row"] for r in read_records(path, leave)[0]] == [0]
    other = write(tmp_path / "other.json", json.dumps([{"row": 3, "path": "./else.mp4", "reason": ""}]))
    with pytest.raises(ValueError, match="another file"):
        read_records(path, other)
    with pytest.raises(ValueError, match="no records"):
        read_records(write(tmp_path / "empty.json", "[]"))


@pytest.mark.parametrize("total, fps, most, want", [
    (250, 25.0, 16, 16), (100, 25.0, 16, 8), (30, 30.0, 16, 4), (7, 25.0, 16, 4), (3, 25.0, 16, 2), (2, 25.0, 16, 2), (1, 25.0, 16, 1),
    (8, 2.0, 16, 8), (1000, 25.0, 32, 32), (45, 10.0, 16, 8),
])
def test_frame_indices(total, fps, most, want):
    indices = frame_indices(total, fps, most)
    assert len(indices) == want and indices[0] == 0 and indices == sorted(set(indices)) and indices[-1] < total
    assert indices[-1] == total - 1                                         # from the first frame to the last
    assert len(indices) % 2 == 0 or total == 1


def test_reading_a_real_file(tmp_path):
    frames = np.stack([np.full((56, 84, 3), 20 * i, np.uint8) for i in range(12)])
    toy.write_y4m(tmp_path / "a.y4m", frames, fps=4)
    got, seconds = read_video(tmp_path / "a.y4m")
    assert got.shape == (6, 56, 84, 3) and seconds == pytest.approx(12 / 4 / 6)
    assert np.abs(got[:, 0, 0, 0].astype(int) - [0, 40, 80, 140, 180, 220]).max() <= 2     # frames 0 2 4 7 9 11


@pytest.mark.parametrize("content", [b"", b"this is no video", None, "truncated"])
def test_unreadable_media_become_named_skips(tmp_path, tiny, content):
    (tmp_path / "clips").mkdir()
    clip = tmp_path / "clips" / "a.y4m"
    if content == "truncated":
        toy.write_y4m(clip, np.zeros((4, 56, 56, 3), np.uint8))
        clip.write_bytes(clip.read_bytes()[:300])                           # the header and less than a frame
    elif content is not None:
        clip.write_bytes(content)
    item = Prompts([check_record(GOOD, 0)], tmp_path, tiny[1])[0]
    assert isinstance(item, Skipped) and "record 7" in item.reason and "a.y4m" in item.reason
    image = Prompts([check_record({**GOOD, "data_type": "image"}, 0)], tmp_path, tiny[1])[0]
    assert isinstance(image, Skipped) and "record 7" in image.reason


def test_a_clip_of_one_frame_is_used(tmp_path, tiny):
    (tmp_path / "clips").mkdir()
    toy.write_y4m(tmp_path / "clips" / "a.y4m", np.zeros((1, 56, 56, 3), np.uint8))
    prompt = Prompts([check_record(GOOD, 0)], tmp_path, tiny[1])[0]
    assert isinstance(prompt, Prompt) and prompt.grid == (1, 4, 4)


def test_images_of_any_mode(tmp_path):
    for mode in ("RGB", "L", "RGBA", "P"):
        Image.new(mode, (80, 60)).save(tmp_path / f"{mode}.png")
        frames, _ = load_media(check_record({**GOOD, "data_type": "image", "path": f"{mode}.png"}, 0), tmp_path, Limits())
        assert frames.shape == (1, 3, 56, 84)


def test_the_loader_keeps_the_order_of_the_indices(world, tiny):
    records, _ = read_records(world / "train.json")
    data = Prompts(records, world, tiny[1])
    wanted = [5, 0, 9, 5, 30]
    for workers in (0, 2):
        assert [item.record["row"] for item in loader(data, wanted, workers)] == wanted


def test_check_command(world, tmp_path):
    rows = json.loads((world / "train.json").read_text())[:8]
    rows[2]["problem_type"] = "essay"
    rows[4]["path"] = "./train/missing.y4m"
    (world / "train" / "broken.y4m").write_bytes(b"no video")
    rows[5] |= {"path": "./train/broken.y4m", "data_type": "video"}
    toy.write_y4m(world / "train" / "short.y4m", np.zeros((1, 56, 56, 3), np.uint8))
    rows[6] |= {"path": "./train/short.y4m", "data_type": "video"}
    data = write(tmp_path / "data.json", json.dumps(rows))
    done = subprocess.run([sys.executable, "data.py", "check", str(data), "--videos", str(world), "--workers", "2"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1
    for words in ("essay", "missing.y4m: no such file", "broken.y4m: cannot be decoded", "too short", "4 of 8 records"):
        assert words in done.stdout, done.stdout
    bad = json.loads((tmp_path / "data.bad.json").read_text())
    assert [item["row"] for item in bad] == [2, 4, 5, 6]
    records, malformed = read_records(data, tmp_path / "data.bad.json")
    assert [r["row"] for r in records] == [0, 1, 3, 7] and not malformed
