"""Fuzz: from untidy records and damaged files nothing comes out but a prompt or one clear line.

    python -m tests.fuzz DIR toy_world/train/*    files that end or hold up a decoder stay in DIR
"""

import argparse
from collections import Counter
from pathlib import Path
from random import Random

from data import BadRecord, Prompts, Skipped, check_record, loader
from prompt import Processor, Prompt

RECORD = {"problem_id": 7, "problem": "Which?", "problem_type": "multiple choice",
          "options": ["x", "y"], "solution": "<answer>B</answer>", "data_source": ""}
KIND = {".png": "image", ".jpg": "image"}
VALUES = [None, -1, float("nan"), "", " \n", "\0", "\ud800", "何", "\u2028", "x" * 70000, "../a",
          "/" * 300, "<|video_pad|>", "<answer></answer>", [], [None, "a"], ["a", "\udfff"],
          ["a"] * 99, {"a": [1]}, "image", "video", "OCR"]


def damage(content: bytes, rng: Random) -> bytes:
    """Bytes changed; or, in half of the copies, stretches changed, cut out or doubled. The first
    come further: decord aborts on about one in 1,000 such copies of a real clip."""
    out, gentle = bytearray(content), rng.random() < 0.5
    for _ in range(rng.choice((1, 3, 10, 40))):
        start = rng.randrange(len(out) + 1) // rng.choice((1, 1, 100))      # or near the head
        part = out[start:start + (1 if gentle else rng.choice((1, 50, 3000)))]
        noise = rng.randbytes(len(part))
        out[start:start + len(part)] = noise if gentle else rng.choice((noise, b"", part * 2))
    return bytes(out)


class Damaged:
    """index -> "used", "refused" or why it was lost. Even: damaged records; odd: damaged files."""

    def __init__(self, files: list[Path], out: Path, seed: int):
        self.files, self.out, self.seed = files, out, seed
        self.processor = Processor.from_pretrained("cold_start")

    def __getitem__(self, index: int) -> str:
        rng = Random(f"{self.seed} {index}")
        whole = rng.choice(self.files)
        content, copy = whole.read_bytes(), self.out / f"{index}{whole.suffix}"
        row = RECORD | {"path": copy.name, "data_type": KIND.get(whole.suffix, "video")}
        if index % 2 == 0:
            row |= {rng.choice(list(row)): rng.choice(VALUES) for _ in range(rng.randint(1, 2))}
        copy.write_bytes(damage(content, rng) if index % 2 else content)
        try:
            item = Prompts([check_record(row, index)], self.out, self.processor)[0]
        except BadRecord as error:
            item = Skipped(row, str(error))
        copy.unlink()
        if isinstance(item, Prompt):
            return "used"
        line = item.reason.encode().decode()
        assert f"row {index}" in line and len(line) < 1000 and len(line.splitlines()) == 1, line
        return "refused"

    def lost(self, index: int, reason: str) -> str:
        return reason


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("files", type=Path, nargs="+", help="clips, and still images (.png)")
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print(Counter(loader(Damaged(a.files, a.out, a.seed), range(a.items), workers=2)))
