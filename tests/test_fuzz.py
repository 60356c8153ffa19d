"""A short, seeded run of fuzz.py; `python -m tests.fuzz` is the long one, also on real clips."""

from collections import Counter
from random import Random

import fuzz
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_clips import write_clip

from data import BadRecord, loader
from lab import toy


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    noise = np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), np.uint8)
    clip, image = tmp_path / "whole.y4m", tmp_path / "whole.png"
    toy.write_y4m(clip, noise)
    Image.fromarray(noise[0]).convert("RGBA").save(image)
    others = [write_clip(tmp_path / name, n=6) for name in ("whole.mp4", "whole.ts")]
    return fuzz.Damaged([clip, image, *others], tmp_path, seed=3)


def test_what_is_untidy_or_damaged_is_used_or_refused_in_one_line(damaged):
    """Anything else ends the iterator with an error. Records in even places, files in odd ones."""
    fates = list(loader(damaged, range(1600), 1, limit=20.0))
    records, files = Counter(fates[::2]), Counter(fates[1::2])
    assert set(records) == {"used", "refused"} and min(records.values()) > 40
    assert files["used"] > 50 and files["refused"] > 200
    assert all(fate in ("used", "refused") or fate.startswith("decoding") for fate in files)


def test_the_fuzz_would_notice(damaged, monkeypatch):
    """An error that is not named ends it; so does a message that is not one clear line."""
    monkeypatch.setattr("data.load_media", lambda *a: {}["not caught"])
    with pytest.raises(KeyError, match="not caught"):
        damaged[1]
    for line in ("no name", "row 1: two\nlines", "row 1: " + "x" * 999):
        monkeypatch.setattr(fuzz, "check_record", lambda row, index: refuse(line))
        with pytest.raises(AssertionError):
            damaged[1]
    monkeypatch.setattr(fuzz, "check_record", lambda row, index: refuse("row 1: half \ud800"))
    with pytest.raises(UnicodeEncodeError):
        damaged[1]


def refuse(line):
    raise BadRecord(line)


def test_damage_is_seeded_and_real():
    content = bytes(range(256)) * 20
    files = [fuzz.damage(content, Random(seed)) for seed in range(50)]
    assert files == [fuzz.damage(content, Random(seed)) for seed in range(50)]
    assert sum(file != content for file in files) > 45
