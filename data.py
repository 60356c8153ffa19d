"""Data: records, the frames of their clips, and prompts made in processes that may die.

Records have Video-R1's form (one JSON list, or one object a line). One that cannot be used, or
whose decoder crashes or hangs, is never replaced by another: it becomes `Skipped`, with a reason.

    python data.py check DATA.json --videos DIR     report what cannot be used, or teaches nothing
"""

import argparse
import json
import math
import os
import re
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.clips import is_picture, read_clip, read_image
from engine.workers import loader
from prompt import (
    BadRecord, Processor, Prompt, Vision, by_letter, fit, name_of, one_line, question_text)
from rewards import ACCURACY, extract_answer, parse_number

FIELDS = {"problem_id": str | int, "problem": str, "solution": str, "path": str, "options": list}
KNOWN = {"data_type": ("video", "image"), "problem_type": tuple(ACCURACY)}
NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?([eE][-+]?\d+)?")
CONTROL = re.compile(r"<\|\w+\|>")           # how special tokens look
FRAME_PIXELS, CLIP_PIXELS = 128 * 28 * 28, int(0.9 * 128000 * 28 * 28)      # the release's
# stands where a Prompt would; lost: its decoding process died or hung
Skipped = namedtuple("Skipped", "record reason lost", defaults=[False])


def read_json(path: str | Path) -> list:
    """The rows of a JSON list, of JSON lines or of one object with "results": [..], as Video-R1's
    evaluation writes it; BadRecord names the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()   # drops a byte-order mark
        if text.startswith("{"):
            first, end = json.JSONDecoder().raw_decode(text)
            if end == len(text) and isinstance(first.get("results"), list):
                return first["results"]
        if not text.startswith("["):
            text = "[" + re.sub(r"\n\s*", ",\n", text) + "]"
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: not valid JSON, as a list or in lines: {error}") from None


def check_record(row: object, index: int) -> dict:
    """A copy of the row with "row" (0-based) and "options" (a list); BadRecord if unusable."""
    if not isinstance(row, dict):
        raise BadRecord(f"row {index}: not an object but {type(row).__name__}")
    record = {**row, "row": index, "options": row.get("options") or []}
    if record.get("problem_id") is None:
        record["problem_id"] = index
    fault = fault_of(record)
    if fault:
        raise BadRecord(f"{name_of(record)}: {fault}")
    return record


def fault_of(record: dict) -> str | None:
    """Why a record cannot be used; None if it can."""
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind) or not str(record[key]).strip():
            return f"{key!r} is missing, empty or of another type"
    for key, known in KNOWN.items():
        if record.get(key) not in known:
            return f"unknown {key} {one_line(record.get(key), 80)}; known: {', '.join(known)}"
    options, path = record["options"], os.path.normpath(record["path"])
    if not all(isinstance(option, str) for option in options):
        return "options are not all texts"
    if record["problem_type"] == "multiple choice" and not 2 <= len(options) <= 26:
        return f"a multiple choice question with {len(options)} options, not 2 to 26"
    if not extract_answer(record["solution"]):
        return "the solution holds no <answer>..</answer>"
    if "\0" in path or os.path.isabs(path) or path.split(os.sep)[0] == "..":
        return f"path {one_line(path, 80)} leaves the data folder"
    if not isinstance(record.get("whole_prompt", ""), str):
        return "whole_prompt is not text"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return "a text with half a character (a lone surrogate), or lists nested too deep"


def useless(record: dict) -> str | None:
    """Why training learns nothing from a record that can be read: its question holds what looks
    like a special token, or no answer in the form that is asked for is right, so that its group
    never differs. (From "A, B" a rule that gives part credit learns all the same.)"""
    value, kind, fault = extract_answer(record["solution"]), record["problem_type"], None
    letters, control = list(by_letter(record["options"])), CONTROL.search(question_text(record))
    number = NUMBER.fullmatch(value) and math.isfinite(parse_number(value))
    if control:
        fault, value = "the question holds a control token", control[0]
    elif kind == "multiple choice" and value not in letters:
        fault = f"the truth is not one letter from A to {letters[-1]}"
    elif kind in ("numerical", "regression") and not number:
        fault = "the truth is not one number"
    elif kind == "free-form" and not re.search("[a-z0-9]", value.lower()):
        fault = "the truth has no Latin letter or digit, and ROUGE counts no others"
    return fault and f"{name_of(record)}: {fault}: {one_line(repr(value), 80)}"


def read_records(path: str | Path, leave_out: str | Path | None = None) -> tuple[list, list[str]]:
    """The usable records of a file, and a line for each malformed one. Left out are those that
    `data.py check` listed in leave_out: all of a path or, where it names the row, this one.
    BadRecord where a file is not JSON, or holds no rows."""
    rows, listed = read_json(path), read_json(leave_out) if leave_out else []
    if not rows:
        raise BadRecord(f"{path}: holds no records")
    if not all(isinstance(item, dict) and "path" in item for item in listed):
        raise BadRecord(f"{leave_out}: not a list written by `python data.py check`")
    listed = {(str(item.get("row")), str(item["path"])) for item in listed}
    records, wrong = [], []
    for index, row in enumerate(rows):
        try:
            record = check_record(row, index)
            if listed.isdisjoint({("None", record["path"]), (str(index), record["path"])}):
                records.append(record)
        except BadRecord as error:
            wrong.append(str(error))
    return records, wrong


def frame_indices(total: int, fps: float, max_frames=16, sample_fps=2.0) -> list[int]:
    """An even number of indices spread from the first frame to the last (rounded linspace):
    sample_fps a second, at least 4, at most max_frames (qwen-vl-utils' smart_nframes). A clip of
    one frame gives [0] and is usable: `patches` doubles the frame."""
    n = min(max(total / fps * sample_fps, 4), max_frames, total)
    n = max(int(n) // 2 * 2, min(2, total))
    return torch.linspace(0, total - 1, n).round().long().tolist()


def read_video(path: Path, max_frames=16, sample_fps=2.0, stamped: bool = False,
               resize: Callable = lambda frames, n: frames) -> tuple[np.ndarray, float | list]:
    """n frames (n, H, W, 3) uint8, or what resize(some of them, n) makes as they come, and the
    seconds between them: the clip's length / n, as the Qwen2 families learnt it; or, `stamped`, a
    list of each one's seconds after the first."""
    choose = partial(frame_indices, max_frames=max_frames, sample_fps=sample_fps)
    frames, times, duration = read_clip(path, choose, resize)
    return np.concatenate(frames), times if stamped else duration / len(times)


@dataclass(frozen=True)
class Limits:
    """How much of a clip is looked at ("released": as qwen-vl-utils has it), the seconds between
    temporal patches ("one": 1.0 for every clip; "true": its own), and where text goes on after it
    (prompt.rope_positions). See docs/tokens.md."""
    max_frames: int = 16
    sample_fps: float = 2.0
    max_pixels: int = 128 * 28 * 28
    image_pixels: int = 512 * 28 * 28
    max_prompt: int = 16384
    pixels: str = "paper"
    seconds: str = "one"
    text_after: str = "clip"

    def area(self, kind: str, n: int) -> tuple[int, int]:
        """(least, most) pixels of each frame of a clip of n frames, or of an image."""
        if self.pixels == "paper":
            return 0, self.max_pixels if kind == "video" else self.image_pixels
        if kind == "image":
            return 0, 256 * 28 * 28
        share = min(self.max_pixels, CLIP_PIXELS / n * 2)
        return FRAME_PIXELS, max(share, int(1.05 * FRAME_PIXELS))


def load_media(record: dict, root: str | Path, limits: Limits,
               vision: Vision = Vision()) -> tuple[torch.Tensor, float | list[float]]:
    """(n, 3, h, w) uint8 frames, resized under the limits, and the seconds between them; of a clip,
    for families whose prompts say times, each frame's. A still picture under "video" is a clip of
    one frame. BadRecord names the record and the file."""
    kind, path = record["data_type"], Path(root) / os.path.normpath(record["path"])
    name = f"{name_of(record)}: {one_line(path)}"

    def resize(frames: np.ndarray, n: int) -> np.ndarray:
        least, most = limits.area(kind, n)
        return fit(frames, most, vision, least).numpy()

    if not os.path.isfile(path):                        # False also for a name that is too long
        raise BadRecord(f"{name}: no such file")
    try:
        if kind == "image" or is_picture(path):
            frames, seconds = resize(read_image(path), 1), 1.0
        else:
            frames, seconds = read_video(path, limits.max_frames, limits.sample_fps,
                                         vision.timestamps, resize)
    except BadRecord as error:                          # a shape that no limits allow
        raise BadRecord(f"{name}: {error}") from None
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadRecord(f"{name}: cannot be decoded: {one_line(reason)}") from None
    if limits.seconds == "one" and not vision.timestamps:
        seconds = 1.0 / vision.temporal
    return torch.from_numpy(frames), seconds


class Prompts:
    """Map-style data set: index -> Prompt, or Skipped where the record cannot be used. Without a
    processor media are only tried: index -> None, or Skipped."""

    def __init__(self, records: list, root: str | Path, processor: Processor | None,
                 limits: Limits = Limits()):
        self.records, self.root, self.processor, self.limits = records, root, processor, limits
        self.avoided: dict[int, str] = {}               # {row: reason} of those that are not tried
        self.vision = processor.vision if processor else Vision()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Prompt | Skipped | None:
        record = self.records[index]
        if record["row"] in self.avoided:
            return Skipped(record, self.avoided[record["row"]])
        try:
            media = load_media(record, self.root, self.limits, self.vision)
            if self.processor:
                return self.processor.prompt(record, *media, self.limits.max_prompt,
                                             self.limits.text_after)
        except BadRecord as error:
            return Skipped(record, str(error))

    def lost(self, index: int, reason: str) -> Skipped:
        """What stands for a record whose decoding process died or hung."""
        record = self.records[index]
        return Skipped(record, f"{name_of(record)}: {one_line(record['path'])}: {reason}", True)


def main() -> int:
    """Scan a data set; print what is wrong, and write it as a JSON list. The exit status."""
    parser = argparse.ArgumentParser(description="Report the records that cannot be used.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", help="records: a JSON list or JSON lines")
    parser.add_argument("--videos", required=True, help="the folder that paths start from")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    a = parser.parse_args()
    records, malformed = read_records(a.data)
    bad = [{"path": None, "reason": reason} for reason in malformed]
    found = loader(Prompts(records, a.videos, None), range(len(records)), a.workers)
    for skipped, record in zip(tqdm(found, total=len(records), unit="clip"), records):
        reason = useless(record)
        if skipped:                                     # as are all others of this path
            bad.append({"path": record["path"], "reason": skipped.reason})
        elif reason:
            bad.append({"path": record["path"], "row": record["row"], "reason": reason})
    out = Path(a.data).with_suffix(".bad.json")
    try:
        out.write_text(json.dumps(bad, indent=1))
        where = f"{out} lists them (python ktr.py ... --leave_out {out})"
    except OSError as error:
        where = f"their list cannot be written, {error}; check a copy of {a.data} elsewhere"
    print(*[item["reason"] for item in bad], sep="\n")
    rows = len(records) + len(malformed)
    print(f"{len(bad)} of {rows} records cannot be used, or teach nothing", where, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadRecord, OSError) as error:
        sys.exit(f"error: {error}")
