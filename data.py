"""Data: the frames of records' clips, and prompts made in processes that may die.

A record (records.py) that cannot be used, or whose decoder crashes or hangs, is never replaced by
another: it becomes `Skipped`, with a reason.

    python data.py check DATA.json --videos DIR     names what cannot be used, or teaches nothing
"""

import argparse
import json
import os
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
from prompt import BadRecord, Processor, Prompt, Vision, fit, name_of, one_line
from records import check_record, read_json, read_records, useless  # noqa: F401

FRAME_PIXELS, CLIP_PIXELS = 128 * 28 * 28, int(0.9 * 128000 * 28 * 28)      # the release's
# stands where a Prompt would; lost: its decoding process died or hung
Skipped = namedtuple("Skipped", "record reason lost", defaults=[False])


def frame_indices(total: int, fps: float, max_frames=16, sample_fps=2.0) -> list[int]:
    """An even number of indices spread from the first frame to the last (rounded linspace):
    sample_fps a second, at least 4, at most max_frames (qwen-vl-utils' smart_nframes). A clip of
    one frame gives [0] and is usable: `patches` doubles the frame."""
    n = min(max(total / fps * sample_fps, 4), max_frames, total)
    n = max(int(n) // 2 * 2, min(2, total))
    return torch.linspace(0, total - 1, n).round().long().tolist()


def read_video(path: Path, max_frames=16, sample_fps=2.0, stamped: bool = False,
               resize: Callable = lambda frames, n: frames) -> tuple[np.ndarray, float | list]:
    """n frames (n, H, W, 3) uint8, each passed through resize(frames, n), and the seconds between
    them: the clip's length / n, as the Qwen2 families learnt it (`stamped`: a list of times)."""
    choose = partial(frame_indices, max_frames=max_frames, sample_fps=sample_fps)
    frames, times, duration = read_clip(path, choose, resize)
    return np.concatenate(frames), times if stamped else duration / len(times)


@dataclass(frozen=True)
class Limits:
    """How much of a clip is looked at, the seconds between temporal patches, and where text goes on
    after it: options.py and docs/tokens.md explain each."""
    max_frames: int = 16
    sample_fps: float = 2.0
    max_pixels: int = 128 * 28 * 28
    image_pixels: int = 512 * 28 * 28
    max_prompt: int = 16384
    pixels: str = "paper"
    seconds: str = "one"
    text_after: str = "clip"

    def area(self, kind: str, n: int) -> tuple[int, int]:
        """(fewest, most) pixels of each frame of a clip of n frames, or of an image."""
        if self.pixels == "paper":
            return 0, self.max_pixels if kind == "video" else self.image_pixels
        if kind == "image":
            return 0, 256 * 28 * 28
        share = min(self.max_pixels, CLIP_PIXELS / n * 2)
        return FRAME_PIXELS, max(share, int(1.05 * FRAME_PIXELS))


def load_media(record: dict, root: str | Path, limits: Limits,
               vision: Vision = Vision()) -> tuple[torch.Tensor, float | list[float]]:
    """(n, 3, h, w) uint8 frames, resized under the limits, and the seconds between them (for
    families whose prompts tell times, a list of each frame's). A still picture under "video" is a
    clip of one frame. BadRecord names the record and the file."""
    kind, path = record["data_type"], Path(root) / os.path.normpath(record["path"])
    name = f"{name_of(record)}: {one_line(path)}"

    def resize(frames: np.ndarray, n: int) -> np.ndarray:
        min_pixels, max_pixels = limits.area(kind, n)
        return fit(frames, max_pixels, vision, min_pixels).numpy()

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
    """index -> Prompt, or Skipped if the record cannot be used. Without a processor the media are
    only decoded: index -> None, or Skipped."""

    def __init__(self, records: list, root: str | Path, processor: Processor | None,
                 limits: Limits = Limits()):
        self.records, self.root, self.processor, self.limits = records, root, processor, limits
        self.avoided: dict[int, str] = {}               # {row: reason} of those not to try
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
        r = self.records[index]
        return Skipped(r, f"{name_of(r)}: {one_line(r['path'])}: {reason}", True)


def main() -> int:
    """Scan a data set; print what is wrong, and write it as a JSON list. The exit status."""
    parser = argparse.ArgumentParser(description="Names what cannot be used, or teaches nothing.")
    parser.add_argument("command", choices=["check"], help="look at every record")
    parser.add_argument("data", help="records: a JSON list or JSON lines")
    parser.add_argument("--videos", required=True, help="the folder that paths start from")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    a = parser.parse_args()
    records, malformed = read_records(a.data)
    bad = [{"path": None, "reason": reason} for reason in malformed]
    found = loader(Prompts(records, a.videos, None), range(len(records)), a.workers)
    for skipped, record in zip(tqdm(found, total=len(records), unit="clip"), records):
        if skipped:                                     # as are all others of this path
            bad.append({"path": record["path"], "reason": skipped.reason})
        elif reason := useless(record):
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
