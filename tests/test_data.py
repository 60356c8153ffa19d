import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from faulty import Faulty, abort
from PIL import Image, PngImagePlugin

import data
from data import (
    BadRecord, Limits, Prompts, Skipped, check_record, frame_indices, load_media, loader,
    read_image, read_json, read_records, read_video, useless)
from engine.workers import AHEAD
from lab import toy
from prompt import Prompt, Vision, name_of
from rewards import accuracy_reward

GOOD = {"problem_id": 7, "problem": "Which?", "data_type": "video",
        "problem_type": "multiple choice", "options": ["A. x", "B. y"],
        "solution": "<answer>B</answer>", "path": "./clips/a.y4m", "data_source": ""}
HALF = "\ud800"                                         # half a character: no UTF-8 can say it


# ------------------------------------------------------------------------------------------ records
@pytest.mark.parametrize("change, says", [
    ({"problem": ""}, "'problem'"), ({"problem": None}, "'problem'"),
    ({"solution": 3}, "'solution'"), ({"path": None}, "'path'"),
    ({"data_type": "audio"}, "audio"), ({"data_type": []}, "data_type"),
    ({"problem_type": "essay"}, "essay"), ({"problem_type": None}, "problem_type"),
    ({"options": "A. x"}, "options"), ({"options": [1, 2]}, "options"),
    ({"options": [["A. x"], ["B. y"]]}, "options"), ({"options": {"A": "x"}}, "options"),
    ({"options": []}, "with 0 options"), ({"options": ["A. x"]}, "with 1 options"),
    ({"options": None}, "with 0 options"), ({"options": ["x"] * 27}, "with 27 options"),
    ({"solution": "B"}, "<answer>"), ({"solution": "<answer></answer>"}, "<answer>"),
    ({"path": "../secret.mp4"}, "leaves"), ({"path": "./a/../../b.mp4"}, "leaves"),
    ({"path": "/etc/passwd"}, "leaves"), ({"path": "a\0b.mp4"}, "leaves"),
    ({"problem": HALF}, "surrogate"), ({"options": ["A. x", HALF]}, "surrogate"),
    ({"solution": f"<answer>{HALF}</answer>"}, "surrogate"), ({"path": HALF}, "surrogate"),
    ({"whole_prompt": 5}, "whole_prompt"),
])
def test_malformed_records_are_named(change, says):
    with pytest.raises(BadRecord, match=says) as error:
        check_record({**GOOD, **change}, 4)
    assert "record 7 (row 4)" in str(error.value)


@pytest.mark.parametrize("name", [["a"], {}, 0.5])
def test_a_problem_id_of_another_type_is_refused(name):
    with pytest.raises(BadRecord, match="problem_id"):
        check_record({**GOOD, "problem_id": name}, 4)


def test_names_fit_a_line():
    for name in ("a\nb", HALF, "x" * 500, "a\0"):
        shown = name_of({"problem_id": name, "row": 1})
        assert len(shown) < 100 and shown.isprintable()
    assert name_of({"problem_id": "何", "row": 1}) == "record 何 (row 1)"


@pytest.mark.parametrize("row", ["text", 3, None, ["a"]])
def test_rows_that_are_no_objects(row):
    with pytest.raises(BadRecord, match="row 2"):
        check_record(row, 2)


def test_untidy_but_usable_records():
    for change in ({"data_source": None}, {"process": "..."}, {"path": "clips//./a.y4m"},
                   {"problem_type": "numerical", "options": None}, {"problem": "何？"},
                   {"options": [f"{i}" for i in range(14)]}, {"path": "..a/b.y4m"},
                   {"path": "."}):
        record = check_record({**GOOD, **change}, 0)
        assert isinstance(record["options"], list) and record["row"] == 0
    for nameless in ({k: v for k, v in GOOD.items() if k != "problem_id"},
                     {**GOOD, "problem_id": None}):
        assert check_record(nameless, 5)["problem_id"] == 5


def answer(truth, kind="multiple choice", **more):
    return check_record({**GOOD, "problem_type": kind, "solution": f"<answer>{truth}</answer>",
                         **more}, 4)


@pytest.mark.parametrize("kind, truths", [
    ("multiple choice", ["b", "B.", "(B)", "B. y", "y", "E", "C", "A, B", "AB", "A and B", "1",
                         "Ｂ"]),
    ("numerical", ["50%", "1/2", "nan", "inf", "-inf", "1e999", "5 m", "$5", "3-5", "five", "3,5",
                   "1,2,3", "12,34", "−5", "1 000", "1_000", ".", "-", "x = 5", "3:00"]),
    ("regression", ["50%", "1/2", "nan", "inf", "about 5", "9" * 400]),
    ("free-form", ["何", "π", "...", "—"])])
def test_truths_that_no_answer_meets_are_named(kind, truths):
    """They are usable, but each completion of their group earns the same."""
    for truth in truths:
        reason = useless(answer(truth, kind))
        assert reason and reason.startswith("record 7 (row 4): the truth "), truth
        assert repr(truth)[:9] in reason and len(reason) < 200
        if kind != "multiple choice":
            best = accuracy_reward(f"<answer>{truth}</answer>", f"<answer>{truth}</answer>", kind)
            assert best == 0 or truth in ("inf", "-inf", "1e999", "9" * 400, "3,5", "1,2,3",
                                          "12,34", "1_000"), truth


@pytest.mark.parametrize("kind, truths", [
    ("multiple choice", ["A", "B", " B\n"]),
    ("numerical", ["3.0", "3", "-3", "+3", ".5", "5.", "1,234.5", "1,234", "12345", "1e3",
                   "1.5E-3"]),
    ("regression", ["0", "3.25", "1,000"]),
    ("OCR", ["何", "STOP!", "50%", "."]), ("free-form", ["a cat", "3", "π is 3.14"])])
def test_truths_that_an_answer_meets_are_not(kind, truths):
    for truth in truths:
        assert useless(answer(truth, kind)) is None, truth
        best = accuracy_reward(f"<answer>{truth}</answer>", f"<answer>{truth}</answer>", kind)
        assert best > 0, truth
    options = {"options": ["x"] * 14}
    assert useless(answer("N", **options)) is None and "A to N" in useless(answer("O", **options))


@pytest.mark.parametrize("change", [{"problem": "What? <|im_end|>"},
                                    {"options": ["A. x", "B. <|vision_start|>"]}])
def test_a_special_token_in_a_question_is_named(change):
    reason = useless(answer("B", **change))
    assert reason.startswith("record 7 (row 4): the question holds a control token: '<|")
    assert useless(answer("B", problem="1 <| 2 |> 3 < x | y >")) is None


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lists_and_lines(tmp_path, encoding):
    """With a byte-order mark too, which Windows' editors write."""
    row = json.dumps(GOOD)
    as_list = write(tmp_path / "a.json", json.dumps([GOOD, GOOD]), encoding)
    as_lines = write(tmp_path / "a.jsonl", f"{row}\n\n{row}\n", encoding)
    assert read_json(as_list) == read_json(as_lines) == [GOOD, GOOD]


@pytest.mark.parametrize("indent", [None, 2])
def test_results_are_found_wherever_they_stand(tmp_path, indent):
    for whole in ({"results": [GOOD], "acc": 1}, {"acc": {"results": [3]}, "results": [GOOD]}):
        path = write(tmp_path / "a.json", json.dumps(whole, indent=indent))
        assert read_json(path) == [GOOD]
    line = json.dumps({"problem": "x", "results": "a text"})
    assert read_json(write(tmp_path / "b.jsonl", line)) == [json.loads(line)]
    two = [{"results": [1]}, {"results": [2]}]
    lines = "\n".join(json.dumps(row) for row in two)
    assert read_json(write(tmp_path / "c.jsonl", lines)) == two


@pytest.mark.parametrize("text, says", [
    ("[{\"a\": 1},", "bad.json: not"), ("{\"a\": 1}\nnonsense\n", "bad.json: .*line 2"),
    ("{\"a\": 1} {\"a\": 1}\n", "bad.json: .*line 1"), ("hello", "bad.json: .*line 1"),
    ("[" * 100000, "bad.json: not"), ("[" + "9" * 5000 + "]", "bad.json"),
])
def test_broken_json_names_file_and_line(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_json(write(tmp_path / "bad.json", text))


def test_other_encodings_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="bad.json"):
        read_json(write(tmp_path / "bad.json", '["é"]', "latin-1"))


def test_lines_end_at_newlines_only(tmp_path):
    """str.splitlines also cuts at U+2028 and the like, which JSON leaves as they are in a text."""
    rows = [{"problem": "one\u2028two\u0085three"}, {"problem": "four"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    assert read_json(write(tmp_path / "a.jsonl", "".join(lines))) == rows


def test_a_list_to_leave_out_is_one_of_check(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    for nonsense in ([1], ["path"], [[]], [{"row": 0}]):
        leave = write(tmp_path / "bad.json", json.dumps(nonsense))
        with pytest.raises(ValueError, match="bad.json: not a list written by"):
            read_records(tmp_path / "a.json", leave)


def test_read_records_reports_what_it_leaves_out(tmp_path):
    rows = [GOOD, {**GOOD, "problem_type": "essay"}, "x", {**GOOD, "path": "b.mp4"}]
    path = write(tmp_path / "a.json", json.dumps(rows))
    records, malformed = read_records(path)
    assert [r["row"] for r in records] == [0, 3] and len(malformed) == 2
    assert "essay" in malformed[0]
    listed = [{"path": "b.mp4"}, {"path": None}, {"path": ["an odd one"]}]
    leave = write(tmp_path / "bad.json", json.dumps(listed))
    records, malformed = read_records(path, leave)
    assert [r["row"] for r in records] == [0] and len(malformed) == 2
    with pytest.raises(ValueError, match="no records"):
        read_records(write(tmp_path / "empty.json", "[]"))


def test_an_entry_with_a_row_leaves_out_this_record_only(tmp_path):
    """Several questions share a clip: one with a wrong truth costs no other."""
    data = write(tmp_path / "a.json", json.dumps([GOOD] * 4 + [{**GOOD, "path": "b.mp4"}]))
    listed = [{"path": GOOD["path"], "row": 1}, {"path": GOOD["path"], "row": 4},
              {"path": "b.mp4", "row": "none"}]         # of another list: the path does not fit
    leave = write(tmp_path / "bad.json", json.dumps(listed))
    assert [r["row"] for r in read_records(data, leave)[0]] == [0, 2, 3, 4]
    write(leave, json.dumps([{"path": GOOD["path"], "row": None}]))
    assert [r["row"] for r in read_records(data, leave)[0]] == [4]


# ------------------------------------------------------------------------------------------- frames
@pytest.mark.parametrize("total, fps, most, want", [
    (250, 25.0, 16, 16), (100, 25.0, 16, 8), (30, 30.0, 16, 4), (7, 25.0, 16, 4), (3, 25.0, 16, 2),
    (2, 25.0, 16, 2), (1, 25.0, 16, 1), (8, 2.0, 16, 8), (1000, 25.0, 32, 32), (45, 10.0, 16, 8),
])
def test_frame_indices(total, fps, most, want):
    indices = frame_indices(total, fps, most)
    assert len(indices) == want and indices == sorted(set(indices))
    assert indices[0] == 0 and indices[-1] == total - 1     # from the first frame to the last
    assert len(indices) % 2 == 0 or total == 1


def test_reading_a_real_file(tmp_path):
    frames = np.stack([np.full((56, 84, 3), 20 * i, np.uint8) for i in range(12)])
    toy.write_y4m(tmp_path / "a.y4m", frames, fps=4)
    got, seconds = read_video(tmp_path / "a.y4m")
    assert got.shape == (6, 56, 84, 3) and seconds == pytest.approx(12 / 4 / 6)
    want = [0, 40, 80, 140, 180, 220]                       # frames 0 2 4 7 9 11
    assert np.abs(got[:, 0, 0, 0].astype(int) - want).max() <= 2


def clip_of(folder, frames, fps=2, name="clips/a.y4m"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    toy.write_y4m(path, frames, fps=fps)
    return path


@pytest.mark.parametrize("content", [b"", b"this is no video", None, "truncated", "no rate"])
def test_unreadable_media_become_named_skips(tmp_path, tiny, content):
    clip = clip_of(tmp_path, np.zeros((4, 56, 56, 3), np.uint8))
    if content == "truncated":
        clip.write_bytes(clip.read_bytes()[:300])           # the header and less than a frame
    elif content == "no rate":
        clip.write_bytes(clip.read_bytes().replace(b"F2:1", b"F0:0", 1))
    elif content is None:
        clip.unlink()
    else:
        clip.write_bytes(content)
    if content != "no rate":                                # FFmpeg takes 25 a second then
        item = Prompts([check_record(GOOD, 0)], tmp_path, tiny[1])[0]
        assert isinstance(item, Skipped)
        assert "record 7" in item.reason and "a.y4m" in item.reason
    image = Prompts([check_record({**GOOD, "data_type": "image"}, 0)], tmp_path, tiny[1])[0]
    assert isinstance(image, Skipped) and "record 7" in image.reason


@pytest.mark.parametrize("path", ["x" * 256 + ".png", "clips/" + "何" * 100, "clips", "."])
def test_paths_that_can_be_no_file_become_named_skips(tmp_path, tiny, path):
    """A component of more than 255 bytes makes stat raise, and so ended the run."""
    (tmp_path / "clips").mkdir()
    for kind in ("image", "video"):
        record = check_record({**GOOD, "data_type": kind, "path": path}, 0)
        item = Prompts([record], tmp_path, tiny[1])[0]
        assert isinstance(item, Skipped) and "record 7" in item.reason
        assert "no such file" in item.reason


def test_a_clip_of_one_frame_is_used(tmp_path, tiny):
    clip_of(tmp_path, np.zeros((1, 56, 56, 3), np.uint8))
    prompt = Prompts([check_record(GOOD, 0)], tmp_path, tiny[1])[0]
    assert isinstance(prompt, Prompt) and prompt.grid == (1, 4, 4)


def image_record(name):
    return check_record({**GOOD, "data_type": "image", "path": name}, 0)


def test_images_of_any_mode(tmp_path):
    for mode in ("RGB", "L", "RGBA", "P", "LA", "I;16", "1"):
        Image.new(mode, (80, 60)).save(tmp_path / "a.png")
        frames, _ = load_media(image_record("a.png"), tmp_path, Limits())
        assert frames.shape == (1, 3, 56, 84)


@pytest.mark.parametrize("mode, black", [("RGBA", (0, 0, 0, 255)), ("LA", (0, 255)), ("P", 0)])
def test_what_is_transparent_is_white(tmp_path, mode, black):
    """On black, black words would be lost."""
    image = Image.new(mode, (80, 60), 1 if mode == "P" else 0)
    image.paste(black, (0, 0, 40, 60))                      # left: black ink; right: nothing
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "a.png", **({"transparency": 1} if mode == "P" else {}))
    pixels = read_image(tmp_path / "a.png")
    assert (pixels[0, :, :40] == 0).all() and (pixels[0, :, 40:] == 255).all()


def test_a_png_with_a_huge_text_is_skipped(tmp_path):
    """Pillow raises ValueError there, and an OSError only elsewhere."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (2 << 20), zip=True)
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(BadRecord, match="record 7.*a.png.*Decompressed data too large"):
        load_media(image_record("a.png"), tmp_path, Limits())


@pytest.mark.parametrize("error", [SyntaxError("s"), NotImplementedError(), OverflowError("o"),
                                   MemoryError(), Image.DecompressionBombError("b")])
def test_other_errors_of_the_image_library_are_named(tmp_path, monkeypatch, error):
    def broken(path):
        raise error

    write(tmp_path / "a.png", "")
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(BadRecord, match="record 7.*a.png: cannot be decoded: ."):
        load_media(image_record("a.png"), tmp_path, Limits())


def test_mistakes_in_the_program_are_not_taken_for_damage(tmp_path, monkeypatch):
    """Neither those outside the libraries, nor those of a kind that no library raises."""
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    for name, error in (("fit", RuntimeError), ("read_image", TypeError)):
        def broken(*a):
            raise error("a mistake")

        with monkeypatch.context() as patch:
            patch.setattr(data, name, broken)
            with pytest.raises(error, match="a mistake"):
                load_media(image_record("a.png"), tmp_path, Limits())


def test_a_shape_that_no_limits_allow_is_named(tmp_path):
    Image.new("RGB", (603, 3)).save(tmp_path / "a.png")
    with pytest.raises(BadRecord, match="record 7.*a.png: aspect ratio 201 exceeds 200"):
        load_media(image_record("a.png"), tmp_path, Limits())


def test_seconds(tmp_path, tiny):
    """One second between temporal patches, whatever the clip: as in the release. Or the clip's."""
    clip_of(tmp_path, np.zeros((12, 56, 56, 3), np.uint8), fps=3)       # 4 s: 8 frames, 4 patches
    prompts = {seconds: Prompts([check_record(GOOD, 0)], tmp_path, tiny[1],
                                Limits(seconds=seconds, sample_fps=1))[0]
               for seconds in ("one", "true")}                          # 4 frames, 2 patches
    assert prompts["one"].seconds == 1.0 and prompts["true"].seconds == 2.0
    times = {name: sorted(set(p.positions[0, p.visual].tolist())) for name, p in prompts.items()}
    first = times["one"][0]
    assert times == {"one": [first, first + 2], "true": [first, first + 4]}


@pytest.mark.parametrize("n, most, want", [
    (16, 128 * 784, (128 * 784, 105369)),                   # 1.05 times the least: 134.4 * 784
    (16, 256 * 784, (128 * 784, 256 * 784)),
    (64, 256 * 784, (128 * 784, 256 * 784)),
    (1000, 256 * 784, (128 * 784, 115200 * 784 / 1000 * 2)),
    (4000, 256 * 784, (128 * 784, 105369)),
])
def test_pixels_of_the_release(n, most, want):
    limits = Limits(max_pixels=most, pixels="released")
    assert limits.area("video", n) == pytest.approx(want)
    assert limits.area("image", 1) == (0, 256 * 784)
    assert Limits(max_pixels=most).area("video", n) == (0, most)


def test_a_tiny_clip_grows_under_the_release(tmp_path):
    clip_of(tmp_path, np.zeros((4, 56, 84, 3), np.uint8))
    frames, _ = load_media(check_record(GOOD, 0), tmp_path, Limits())
    assert frames.shape == (4, 3, 56, 84)
    frames, _ = load_media(check_record(GOOD, 0), tmp_path, Limits(pixels="released"), Vision())
    assert frames.shape == (4, 3, 280, 392)                 # 10 * 14 tokens a pair of frames


# ------------------------------------------------------------------------------------------- loader
def gone(pid, seconds=5.0):
    """Whether a process ends within some seconds (a zombie has ended)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_the_loader_keeps_the_order_and_the_items(world, tiny):
    records, _ = read_records(world / "train.json")
    prompts = Prompts(records, world, tiny[1])
    wanted = [5, 0, 9, 5, 30]
    here, there = (list(loader(prompts, wanted, workers)) for workers in (0, 2))
    assert [item.record["row"] for item in there] == wanted
    for a, b in zip(here, there):
        for field in ("ids", "positions", "frames"):
            assert torch.equal(getattr(a, field), getattr(b, field))
    assert not multiprocessing.active_children()


@pytest.fixture(autouse=True)
def start():
    """Sets how processes start: "fork" unless asked, since the others take seconds."""
    usual = multiprocessing.get_start_method()

    def use(method):
        multiprocessing.set_start_method(method, force=True)

    use("fork")
    yield use
    use(usual)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_an_item_that_ends_its_process_costs_no_other(method, start):
    start(method)
    faults, workers = {1: "abort"}, 1                       # the others start slowly
    if method == "fork":
        faults = {1: "abort", 2: "asked", 3: "killed", 4: "killed", 8: "endless", 9: "abort"}
        workers = 2
    items = list(loader(Faulty(faults), list(range(10)), workers, limit=0.5))
    assert [item[0] for item in items] == list(range(10))
    words = {"abort": "Aborted", "killed": "Killed", "endless": "more than 0.5 s"}
    for index, (_, said, _) in enumerate(items):
        if faults.get(index, "asked") == "asked":           # SIGTERM is for the parent to heed
            assert isinstance(said, int) and said != os.getpid()
        else:
            assert words[faults[index]] in said
    assert not multiprocessing.active_children()


class Surroundings:
    def __getitem__(self, index):
        return os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()


def test_a_worker_has_no_gpu_and_one_thread(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert list(loader(Surroundings(), [0], 1)) == [("", 1)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_items_hold_no_file_descriptors(world, tiny):
    """torch's own queues hold one for each tensor, or a part of /dev/shm."""
    records, _ = read_records(world / "train.json")
    stream = loader(Prompts(records, world, tiny[1]), range(40), 1)
    held = [next(stream)]
    before, shared = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    held += stream
    assert len(held) == 40 and len(os.listdir("/proc/self/fd")) <= before
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "torch" in name}


def test_a_lost_record_is_a_named_skip(world, tiny):
    records, _ = read_records(world / "train.json")
    item = Prompts(records, world, tiny[1]).lost(3, "decoding ended its process: Aborted")
    assert isinstance(item, Skipped) and item.record is records[3]
    assert item.reason == f"record 3 (row 3): {records[3]['path']}: decoding ended its process: " \
                          "Aborted"


def test_a_mistake_in_the_program_is_raised(capfd):
    with pytest.raises(RuntimeError, match="item 1"):
        list(loader(Faulty({1: "wrong"}), [0, 1, 2], 1))
    assert "KeyError: 'a mistake in the program, at 1'" in capfd.readouterr().err
    assert not multiprocessing.active_children()


HELD = """
import resource, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from pathlib import Path
from engine.workers import loader
from faulty import Faulty
held = list(loader(Faulty({{}}, Path({folder!r}), size=1 << 12), list(range(300)), 2))
print(len(held))
"""


def test_items_that_are_held_hold_no_files(tmp_path):
    """A batch of 300 under a limit of 48 open files; torch's DataLoader ran out of 1,024."""
    script = HELD.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.split() == ["300"], done.stderr


def test_items_are_made_ahead_and_not_more(tmp_path):
    """While items are used, each worker makes AHEAD, one that its thread holds, and one to send."""
    stream = loader(Faulty({}, tmp_path, size=5 << 20), list(range(40)), 2)
    most = 2 * (AHEAD + 2)
    for index in range(3):
        assert next(stream)[0] == index
        until = time.monotonic() + 10
        while len(list(tmp_path.iterdir())) < index + most and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        made = sorted(int(path.name) for path in tmp_path.iterdir())
        assert made == list(range(len(made))) and index + most <= len(made) <= index + most + 1
    stream.close()


@pytest.mark.parametrize("end", ["closed", "raised", "forgotten"])
def test_a_consumer_that_stops_leaves_no_process(end, tmp_path):
    def consume():
        for index, pid, _ in loader(items, list(range(9)), 2):
            pids.add(pid)
            if index == 2:
                raise ZeroDivisionError

    items, pids = Faulty({3: "endless"}, tmp_path), set()
    if end == "raised":
        with pytest.raises(ZeroDivisionError):
            consume()
    else:
        stream = loader(items, list(range(9)), 2)
        pids = {next(stream)[1] for _ in range(3)}
        if end == "closed":
            stream.close()
        del stream
    assert pids and all(gone(pid) for pid in pids)
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, sys, time, os, signal
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from engine.workers import loader
from faulty import Faulty, abort
if __name__ == "__main__":
    folder = Path({folder!r})
    multiprocessing.set_start_method({method!r})
    stream = loader(Faulty({{3: "endless"}}, folder), list(range(9)), 2)
    pids = {{next(stream)[1] for _ in range(3)}}
    while not (folder / "3").exists():
        time.sleep(0.01)
    print(*pids, (folder / "3").read_text(), flush=True)
    {end}
"""


@pytest.mark.parametrize("method, end", [
    ("fork", "sys.exit(3)"), ("fork", "os.kill(os.getpid(), signal.SIGKILL)"),
    ("spawn", "os.kill(os.getpid(), signal.SIGKILL)")])
def test_workers_end_with_their_parent(tmp_path, method, end):
    """Also those that hang, and when the parent has no time to say so."""
    (tmp_path / "items").mkdir()
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), end=end, method=method,
                           folder=str(tmp_path / "items"))
    done = subprocess.run([sys.executable, write(tmp_path / "run.py", script)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == (3 if "exit" in end else -signal.SIGKILL), done.stderr
    assert len(done.stdout.split()) >= 2
    assert all(gone(pid) for pid in done.stdout.split())


# -------------------------------------------------------------------------------------------- check
def test_check_command(world, tmp_path):
    """What training would skip, and nothing else: a clip of one frame is used."""
    rows = json.loads((world / "train.json").read_text())[:8]
    rows[1]["problem_id"] = HALF
    rows[2]["problem_type"] = "essay"
    rows[4]["path"] = "./train/missing.y4m"
    rows[5] |= {"path": "./train/broken.y4m", "data_type": "video"}
    (world / "train" / "broken.y4m").write_bytes(b"no video")
    rows[6] |= {"path": "./train/short.y4m", "data_type": "video"}
    rows[7] |= {"path": "./train/short.y4m", "data_type": "video", "solution": "<answer>b</answer>"}
    toy.write_y4m(world / "train" / "short.y4m", np.zeros((1, 56, 56, 3), np.uint8))
    listed = write(tmp_path / "data.json", json.dumps(rows))
    command = [sys.executable, "data.py", "check", str(listed), "--videos", str(world)]
    done = subprocess.run(command + ["--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    for words in ("surrogate", "essay", "missing.y4m: no such file",
                  "broken.y4m: cannot be decoded", "one letter from A", "5 of 8 records"):
        assert words in done.stdout, done.stdout + done.stderr
    assert "6/6" in done.stderr                             # the progress bar
    bad = json.loads((tmp_path / "data.bad.json").read_text())
    paths = [(item["path"], item.get("row")) for item in bad]
    assert paths[2:] == [(rows[4]["path"], None), (rows[5]["path"], None), (rows[7]["path"], 7)]
    assert paths[:2] == [(None, None)] * 2
    records, malformed = read_records(listed, tmp_path / "data.bad.json")
    assert [r["row"] for r in records] == [0, 3, 6] and len(malformed) == 2


def test_a_list_that_cannot_be_written_costs_no_result(world, tmp_path, monkeypatch, capsys):
    """A read-only folder used to end a scan of hours without a word of what it had found."""
    rows = json.loads((world / "train.json").read_text())[:3]
    rows[1]["path"] = "none.y4m"
    listed = write(tmp_path / "data.json", json.dumps(rows))
    (tmp_path / "data.bad.json").mkdir()                    # as root, permissions hold nothing up
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(listed), "--videos", str(world)])
    assert data.main() == 1
    reason, count, where = capsys.readouterr().out.splitlines()
    assert "none.y4m: no such file" in reason and "1 of 3 records" in count
    assert "cannot be written" in where and "data.bad.json" in where


def test_check_outlives_its_decoder(world, tmp_path, monkeypatch):
    rows = json.loads((world / "train.json").read_text())
    rows = [row for row in rows if row["data_type"] == "video"][:4]
    damaged = os.path.basename(rows[1]["path"])

    def read(path, *limits):
        return abort(path) if path.name == damaged else read_video(path, *limits)

    monkeypatch.setattr(data, "read_video", read)           # a fork inherits it
    listed = write(tmp_path / "data.json", json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(listed), "--videos", str(world)])
    assert data.main() == 1
    (bad,) = json.loads((tmp_path / "data.bad.json").read_text())
    assert bad["path"] == rows[1]["path"] and "(row 1)" in bad["reason"]
    assert "decoding ended its process: Aborted" in bad["reason"]


def test_check_of_a_missing_list_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "check", "none.json", "--videos", "."])
    with pytest.raises(SystemExit, match="^error: .*none.json"):
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
