"""A short, seeded run of lab/fuzz.py; `python -m lab.fuzz` is the long one, also on real clips."""

import random
from collections import Counter

import pytest

from data import loader
from lab.fuzz import Damaged, damaged_file, damaged_record, fate_of_record, originals, refused


def test_untidy_records_are_used_or_refused_in_one_line(tmp_path):
    rng = random.Random(1)
    fates = Counter(fate_of_record(damaged_record(rng), tmp_path) for _ in range(4000))
    assert set(fates) == {"refused"}                    # the clip they name is not there


def test_good_records_stay_usable_among_them(tmp_path):
    (tmp_path / "a.y4m").write_bytes(originals(tmp_path)[".y4m"])
    rng = random.Random(2)
    fates = Counter(fate_of_record(damaged_record(rng), tmp_path) for _ in range(300))
    assert 20 < fates["used"] < 200 and fates["used"] + fates["refused"] == 300


def test_damaged_files_are_used_or_refused_or_lost(tmp_path):
    """Anything else that decoding raises ends the iterator with an error."""
    damaged = Damaged(tmp_path, originals(tmp_path), seed=3)
    fates = Counter(loader(damaged, range(400), 1, limit=20.0, method="fork"))
    assert sum(fates.values()) == 400 and fates["used"] > 20 and fates["refused"] > 100
    assert all(fate in ("used", "refused") or fate.startswith("decoding") for fate in fates)


def test_the_fuzz_would_notice(tmp_path, monkeypatch, capfd):
    """An error that is not named ends it; so does a message that is not one clear line."""
    def broken(*a):
        raise KeyError("not caught")

    monkeypatch.setattr("lab.fuzz.load_media", broken)
    rng = random.Random(5)
    with pytest.raises(KeyError):
        for _ in range(100):
            fate_of_record(damaged_record(rng), tmp_path)
    with pytest.raises(AssertionError):
        refused("row 3: two\nlines")
    damaged = Damaged(tmp_path, originals(tmp_path), seed=3)
    with pytest.raises(RuntimeError, match="item 0"):
        list(loader(damaged, range(3), 1, method="fork"))
    assert "not caught" in capfd.readouterr().err


def test_damage_is_seeded_and_real():
    content = bytes(range(256)) * 20
    files = [damaged_file(random.Random(seed), content) for seed in range(50)]
    assert files == [damaged_file(random.Random(seed), content) for seed in range(50)]
    assert sum(file != content for file in files) > 45
