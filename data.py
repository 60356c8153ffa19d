"""Data: records, the frames of their clips, and a data set that hands out prompts.

Records have Video-R1's form (one JSON list, or one object a line). Only the frames that are needed are
decoded, in DataLoader workers ahead of the step. A record that cannot be used is never replaced by another
one: it is handed on as `Skipped`, with its name and the reason, and counted.

    python data.py check DATA.json --videos DIR     report the records that cannot be used
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # decord does not read still images
from tqdm import tqdm

from prompt import QUESTION_TRAIN, BadRecord, Processor, Prompt, Vision, fit, name_of
from rewards import PROBLEM_TYPES, extract_answer


# ------------------------------------------------------------------------------------------- records
def read_json(path: str | Path) -> list:
    """The rows of a JSON list or of a JSON-lines file; ValueError names the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):             # splitlines would cut at U+2028, inside a text
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: neither a JSON list nor one JSON object a line: {error}") from None
    return rows


def check_record(row: object, index: int) -> dict:
    """A copy of the row with "row" (0-based) and "options" (a list) set; BadRecord says what is wrong with it."""
    if not isinstance(row, dict):
        raise BadRecord(f"row {index}: not an object but {type(row).__name__}")
    record = {"problem_id": index, **row, "row": index, "options": row.get("options") or []}
    wrong = None
    for key in ("problem", "solution", "path"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            wrong = wrong or f"{key!r} is missing or not text"
    options = record["options"]
    if wrong:
        pass
    elif record.get("data_type") not in ("video", "image"):
        wrong = f"data_type {record.get('data_type')!r} is neither 'video' nor 'image'"
    elif record.get("problem_type") not in PROBLEM_TYPES:
        wrong = f"unknown problem_type {record.get('problem_type')!r}; known: {', '.join(PROBLEM_TYPES)}"
    elif not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        wrong = "options are not a list of texts"
    elif record["problem_type"] == "multiple choice" and len(options) < 2:
        wrong = "a multiple choice question with fewer than two options"
    elif not extract_answer(record["solution"]):
        wrong = "the solution holds no <answer>..</answer>"
    elif os.path.isabs(record["path"]) or os.path.normpath(record["path"]).startswith(".."):
        wrong = f"path {record['path']!r} leaves the data folder"
    if wrong:
        raise BadRecord(f"{name_of(record)}: {wrong}")
    return record


def path_of(row: object) -> object:
    return row.get("path") if isinstance(row, dict) else None


def read_records(path: str | Path, leave_out: str | Path | None = None) -> tuple[list[dict], list[str]]:
    """The usable records of a file, and one line for each that is not.

    leave_out: a list written by `data.py check`; its rows are dropped. Raises ValueError where a file is not
    JSON, holds no rows, or the list to leave out belongs to another file.
    """
    rows = read_json(path)
    if not rows:
        raise ValueError(f"{path}: holds no records")
    skip = set()
    for bad in read_json(leave_out) if leave_out else []:
        if not isinstance(bad, dict) or not isinstance(bad.get("row"), int) or "path" not in bad:
            raise ValueError(f"{leave_out}: not a list written by `python data.py check`")
        if bad["row"] >= len(rows) or path_of(rows[bad["row"]]) != bad["path"]:
            raise ValueError(f"{leave_out}: row {bad['row']} is not that of {path}; was the list made for another file?")
        skip.add(bad["row"])
    records, malformed = [], []
    for index, row in enumerate(rows):
        try:
            records += [check_record(row, index)] if index not in skip else []
        except BadRecord as error:
            malformed.append(str(error))
    return records, malformed


# -------------------------------------------------------------------------------------------- frames
def frame_indices(total: int, fps: float, max_frames: int = 16, sample_fps: float = 2.0, min_frames: int = 4) -> list[int]:
    """An even number of indices spread from the first frame to the last (rounded linspace): sample_fps per second,
    at least min_frames, at most max_frames (qwen-vl-utils' smart_nframes). A clip of one frame gives [0]."""
    wanted = total / fps * sample_fps
    n = min(max(wanted, min_frames), max_frames, total)
    n = max(int(n) // 2 * 2, min(2, total))
    return torch.linspace(0, total - 1, n).round().long().tolist()


def read_video(path: str | Path, max_frames: int = 16, sample_fps: float = 2.0) -> tuple[np.ndarray, float]:
    """Frames (n, H, W, 3) uint8 and the seconds between them. BadRecord if the file cannot be decoded."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), reader.get_avg_fps()
        if total < 1 or not fps > 0:
            raise BadRecord(f"{path}: no frames")
        indices = frame_indices(total, fps, max_frames, sample_fps)
        frames = reader.get_batch(indices).asnumpy()
        del reader
    except (decord.DECORDError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadRecord(f"{path}: cannot be decoded: {reason}") from None
    return frames, total / fps / len(indices)


def read_image(path: str | Path) -> np.ndarray:
    """(1, H, W, 3) uint8. BadRecord if the file is no image."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))[None]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRecord(f"{path}: cannot be read as an image: {error}") from None


# ------------------------------------------------------------------------------------------- loading
@dataclass(frozen=True)
class Limits:
    """How much of a clip is looked at."""
    max_frames: int = 16
    sample_fps: float = 2.0
    max_pixels: int = 128 * 28 * 28
    image_pixels: int = 512 * 28 * 28
    max_prompt: int = 16384
    pixels: str = 'paper'
    seconds: str = 'one'


@dataclass(frozen=True)
class Skipped:
    """Stands where a Prompt would, for a record that cannot be used."""
    record: dict
    reason: str


def load_media(record: dict, root: str | Path, limits: Limits, vision: Vision = Vision()) -> tuple[torch.Tensor, float]:
    """(n, 3, h, w) uint8 frames, resized, and the seconds between them; BadRecord names the record and the file."""
    path = Path(root) / os.path.normpath(record["path"])
    if not path.is_file():
        raise BadRecord(f"{name_of(record)}: {path}: no such file")
    try:
        if record["data_type"] == "image":
            return fit(read_image(path), limits.image_pixels, vision), 1.0
        frames, seconds = read_video(path, limits.max_frames, limits.sample_fps)
        return fit(frames, limits.max_pixels, vision), seconds
    except BadRecord as error:
        raise BadRecord(f"{name_of(record)}: {error}") from None


class Prompts(torch.utils.data.Dataset):
    """Map-style data set: index -> Prompt, or Skipped where the record cannot be used."""

    def __init__(self, records: Sequence[dict], root: str | Path, processor: Processor, limits: Limits = Limits(),
                 template: str = QUESTION_TRAIN, known=None):
        self.records, self.root, self.processor = records, root, processor
        self.limits, self.template = limits, template

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Prompt | Skipped:
        record = self.records[index]
        try:
            frames, seconds = load_media(record, self.root, self.limits, self.processor.vision)
            return self.processor.prompt(record, frames, seconds, self.limits.max_prompt, self.template)
        except BadRecord as error:
            return Skipped(record, str(error))


def loader(dataset: torch.utils.data.Dataset, indices: Sequence[int], workers: int, ahead: int = 4) -> torch.utils.data.DataLoader:
    """Items of `dataset` in the order of `indices`, decoded in worker processes `ahead` items before they are needed."""
    return torch.utils.data.DataLoader(
        dataset, sampler=list(indices), batch_size=None, num_workers=workers, collate_fn=None if False else (lambda item: item),
        prefetch_factor=ahead if workers else None, persistent_workers=False)


# --------------------------------------------------------------------------------------------- check
def media_problem(record: dict, root: str, limits: Limits) -> str | None:
    """What is wrong with a record's media, or None."""
    try:
        frames, _ = load_media(record, root, limits)
    except BadRecord as error:
        return str(error)
    if record["data_type"] == "video" and len(frames) < 2:
        return f"{name_of(record)}: {record['path']}: too short: {len(frames)} frame"
    return None


def check(data: str, videos: str, out: str | None, workers: int, limits: Limits = Limits()) -> list[dict]:
    """Scan a data set in parallel; print and return what is wrong, and write it as a JSON list."""
    bad = []
    records = []
    rows = read_json(data)
    for index, row in enumerate(rows):
        try:
            records.append(check_record(row, index))
        except BadRecord as error:
            bad.append({"row": index, "path": path_of(row), "reason": str(error)})
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(partial(media_problem, root=videos, limits=limits), records, chunksize=8)
        for record, reason in zip(records, tqdm(found, total=len(records), unit="clip")):
            if reason:
                bad.append({"row": record["row"], "path": record["path"], "reason": reason})
    for item in bad:
        print(item["reason"])
    out = out or str(Path(data).with_suffix(".bad.json"))
    Path(out).write_text(json.dumps(bad, indent=1, ensure_ascii=False))
    print(f"{len(bad)} of {len(rows)} records cannot be used; listed in {out} (python ktr.py ... --leave_out {out})")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", help="records: a JSON list or JSON lines")
    parser.add_argument("--videos", required=True, help="the folder that the records' paths start from")
    parser.add_argument("--out", help="where to write the list (default: beside the data)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    sys.exit(1 if check(arguments.data, arguments.videos, arguments.out, arguments.workers) else 0)
