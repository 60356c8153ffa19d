"""Data: records, the frames of their clips, and prompts made in processes that may die.

Records have Video-R1's form (one JSON list, or one object a line). Only the frames that are needed
are decoded, ahead of the step. A record that cannot be used, or whose decoder crashes or hangs, is
never replaced by another one: it is handed on as `Skipped`, with its name and the reason.

    python data.py check DATA.json --videos DIR     report the records that cannot be used
"""

import argparse
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief

import numpy as np
import torch
from PIL import Image  # decord does not read still images
from tqdm import tqdm

from engine.workers import loader
from prompt import QUESTION_TRAIN, BadRecord, Processor, Prompt, Vision, fit, name_of, one_line
from rewards import PROBLEM_TYPES, extract_answer

FRAME_PIXELS, CLIP_PIXELS = 128 * 28 * 28, int(0.9 * 128000 * 28 * 28)      # the release's
# what Pillow raises on damaged files, beside OSError
DAMAGED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, SyntaxError,
           TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


# ------------------------------------------------------------------------------------------ records
def read_json(path: str | Path) -> list:
    """The rows of a JSON list or of a JSON-lines file; ValueError names the file and the line."""
    place = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")       # a byte-order mark is dropped
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):         # splitlines also cuts at U+2028
            place = f"{path}:{number}"
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON list, nor JSON objects in lines: {error}") from None


def problem_with(record: dict) -> str | None:
    """What is wrong with the fields of a record, or None."""
    for key in ("problem", "solution", "path"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            return f"{key!r} is missing or not text"
    for key, known in (("data_type", ("video", "image")), ("problem_type", PROBLEM_TYPES)):
        if record.get(key) not in known:
            return f"unknown {key} {brief(record.get(key))}; known: {', '.join(known)}"
    if not isinstance(record["problem_id"], str | int):
        return "problem_id is neither text nor a whole number"
    if not isinstance(record.get("whole_prompt", ""), str):
        return "whole_prompt is not text"
    options = record["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return "options are not a list of texts"
    if record["problem_type"] == "multiple choice" and not 2 <= len(options) <= 26:
        return f"a multiple choice question with {len(options)} options, not 2 to 26"
    if not extract_answer(record["solution"]):
        return "the solution holds no <answer>..</answer>"
    path = os.path.normpath(record["path"])
    if "\0" in path or os.path.isabs(path) or path.split(os.sep)[0] == "..":
        return f"path {brief(path)} leaves the data folder"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return "a text with half a character (a lone surrogate), or lists nested too deep"
    return None


def check_record(row: object, index: int) -> dict:
    """A copy of the row with "row" (0-based) and "options" (a list); BadRecord if unusable."""
    if not isinstance(row, dict):
        raise BadRecord(f"row {index}: not an object but {type(row).__name__}")
    record = {**row, "row": index, "options": row.get("options") or []}
    if record.get("problem_id") is None:
        record["problem_id"] = index
    wrong = problem_with(record)
    if wrong:
        raise BadRecord(f"{name_of(record)}: {wrong}")
    return record


def path_of(row: object) -> object:
    return row.get("path") if isinstance(row, dict) else None


def check_rows(rows: list, leave_out: set[int]) -> tuple[list[dict], dict[int, str]]:
    """The usable records but those left out, and what is wrong with each other row."""
    records, wrong = [], {}
    for index, row in enumerate(rows):
        try:
            if index not in leave_out:
                records.append(check_record(row, index))
        except BadRecord as error:
            wrong[index] = str(error)
    return records, wrong


def read_records(path: str | Path, leave_out: str | Path | None = None) -> tuple[list, list[str]]:
    """The usable records of a file, and one line for each that is not.

    leave_out: a list written by `data.py check`; its rows are dropped. ValueError where a file is
    not JSON, holds no rows, or the list to leave out belongs to another file.
    """
    rows = read_json(path)
    if not rows:
        raise ValueError(f"{path}: holds no records")
    skip = set()
    for bad in read_json(leave_out) if leave_out else []:
        if not isinstance(bad, dict) or type(bad.get("row")) is not int or "path" not in bad:
            raise ValueError(f"{leave_out}: not a list written by `python data.py check`")
        row = bad["row"]
        if not 0 <= row < len(rows) or path_of(rows[row]) != bad["path"]:
            raise ValueError(f"{leave_out}: row {row} is not that of {path}; of another file?")
        skip.add(row)
    records, wrong = check_rows(rows, skip)
    return records, list(wrong.values())


# ------------------------------------------------------------------------------------------- frames
def frame_indices(total: int, fps: float, max_frames: int = 16, sample_fps: float = 2.0,
                  min_frames: int = 4) -> list[int]:
    """An even number of indices spread from the first frame to the last (rounded linspace).

    sample_fps a second, at least min_frames, at most max_frames (qwen-vl-utils' smart_nframes). A
    clip of one frame gives [0] and is usable: `patches` doubles the frame.
    """
    n = min(max(total / fps * sample_fps, min_frames), max_frames, total)
    n = max(int(n) // 2 * 2, min(2, total))
    return torch.linspace(0, total - 1, n).round().long().tolist()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_video(path: str | Path, max_frames: int = 16,
               sample_fps: float = 2.0) -> tuple[np.ndarray, float]:
    """Frames (n, H, W, 3) uint8 and the seconds between them. BadRecord if decord refuses the file
    (on some it aborts the process instead, which `loader` outlives)."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), reader.get_avg_fps()
        if total < 1 or not 0 < fps < math.inf:
            raise BadRecord(f"{path}: no frames, or no frame rate")
        indices = frame_indices(total, fps, max_frames, sample_fps)
        frames = reader.get_batch(indices).asnumpy()
        del reader
    except (decord.DECORDError, RuntimeError, OSError, MemoryError) as error:
        raise BadRecord(f"{path}: cannot be decoded: {first_line(error)}") from None
    return frames, total / fps / len(indices)


def read_image(path: str | Path) -> np.ndarray:
    """(1, H, W, 3) uint8, what is transparent on white. BadRecord if the file is no image."""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))[None]
    except (OSError, *DAMAGED) as error:
        raise BadRecord(f"{path}: cannot be read as an image: {first_line(error)}") from None


@dataclass(frozen=True)
class Limits:
    """How much of a clip is looked at, and how it is laid out in time.

    pixels: "paper" is at most max_pixels a frame and image_pixels an image. "released" is
    qwen-vl-utils' rule: a frame grows to 128*28*28 pixels and shrinks to max_pixels, or its share
    of CLIP_PIXELS if less, or 1.05 * 128*28*28 if more; images shrink to 256*28*28. Certain: the
    rule. Not certain: the cap of a clip (versions differ; none binds below 190 frames), and how
    vLLM resized clips in the paper's evaluation.

    seconds between temporal patches: "one" is 1.0 for every clip, as in the release, where the
    frame rate never reached the model: what the recipe's checkpoint learnt in its supervised cold
    start, and was sampled and scored with (true seconds change a token's log-probability by up to
    1.14 nats). "true" is the clip's own, for checkpoints that learnt it, as Qwen2.5-VL itself.
    """
    max_frames: int = 16
    sample_fps: float = 2.0
    max_pixels: int = 128 * 28 * 28
    image_pixels: int = 512 * 28 * 28
    max_prompt: int = 16384
    pixels: str = "paper"
    seconds: str = "one"

    def area(self, kind: str, n: int) -> tuple[int, int]:
        """(least, most) pixels of each frame of a clip of n frames, or of an image."""
        if self.pixels == "paper":
            return 0, self.max_pixels if kind == "video" else self.image_pixels
        if kind == "image":
            return 0, 256 * 28 * 28
        share = min(self.max_pixels, CLIP_PIXELS / n * 2)
        return FRAME_PIXELS, max(share, int(1.05 * FRAME_PIXELS))


def load_media(record: dict, root: str | Path, limits: Limits,
               vision: Vision = Vision()) -> tuple[torch.Tensor, float]:
    """(n, 3, h, w) uint8 frames, resized, and the seconds between them, under the limits.

    BadRecord names the record and the file.
    """
    path = Path(root) / os.path.normpath(record["path"])
    try:
        if not os.path.isfile(path):                    # False also for a name that is too long
            raise BadRecord(f"{path}: no such file")
        if record["data_type"] == "image":
            frames, seconds = read_image(path), 1.0
        else:
            frames, seconds = read_video(path, limits.max_frames, limits.sample_fps)
        if limits.seconds == "one":
            seconds = 1.0 / vision.temporal
        least, most = limits.area(record["data_type"], len(frames))
        return fit(frames, most, vision, least), seconds
    except BadRecord as error:
        raise BadRecord(f"{name_of(record)}: {one_line(error)}") from None


@dataclass(frozen=True)
class Skipped:
    """Stands where a Prompt would, for a record that cannot be used."""
    record: dict
    reason: str


class Prompts:
    """Map-style data set: index -> Prompt, or Skipped where the record cannot be used."""

    def __init__(self, records: Sequence[dict], root: str | Path, processor: Processor,
                 limits: Limits = Limits(), template: str = QUESTION_TRAIN):
        self.records, self.root, self.processor = records, root, processor
        self.limits, self.template = limits, template

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Prompt | Skipped:
        record, limits = self.records[index], self.limits
        try:
            frames, seconds = load_media(record, self.root, limits, self.processor.vision)
            return self.processor.prompt(record, frames, seconds, limits.max_prompt, self.template)
        except BadRecord as error:
            return Skipped(record, str(error))

    def lost(self, index: int, reason: str) -> Skipped:
        """What stands for a record whose decoding process died or hung."""
        record = self.records[index]
        return Skipped(record, f"{name_of(record)}: {one_line(record['path'])}: {reason}")


# -------------------------------------------------------------------------------------------- check
class Check(Prompts):
    """index -> None, or Skipped where training would skip the clip or image for what it holds."""

    def __getitem__(self, index: int) -> Skipped | None:
        try:
            load_media(self.records[index], self.root, self.limits)
        except BadRecord as error:
            return Skipped(self.records[index], str(error))


def check(data: str, videos: str, out: str | None, workers: int) -> list[dict]:
    """Scan a data set in parallel; print and return what is wrong, and write it as a JSON list."""
    rows = read_json(data)
    records, wrong = check_rows(rows, set())
    found = loader(Check(records, videos, None), range(len(records)), workers)
    for skipped in tqdm(found, total=len(records), unit="clip"):
        if skipped:
            wrong[skipped.record["row"]] = skipped.reason
    bad = [{"row": row, "path": path_of(rows[row]), "reason": wrong[row]} for row in sorted(wrong)]
    for item in bad:
        print(item["reason"])
    out = out or str(Path(data).with_suffix(".bad.json"))
    Path(out).write_text(json.dumps(bad, indent=1))
    print(f"{len(bad)} of {len(rows)} records cannot be used; listed in {out} "
          f"(python ktr.py ... --leave_out {out})")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Report the records that cannot be used.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", help="records: a JSON list or JSON lines")
    parser.add_argument("--videos", required=True, help="the folder that paths start from")
    parser.add_argument("--out", help="where to write the list (default: beside the data)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    try:
        found = check(arguments.data, arguments.videos, arguments.out, arguments.workers)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if found else 0)
