"""The walk through one step that the documents show is the one that the code takes."""

import re

import pytest
from conftest import ROOT
from PIL import Image, ImageChops

from lab.walkthrough import walk

NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_walk_is_made_again(tmp_path):
    walk(tmp_path)
    made, kept = ((folder / "walkthrough.md").read_text() for folder in (tmp_path, ROOT / "docs"))
    assert NUMBER.sub("#", made) == NUMBER.sub("#", kept)
    got, want = ([float(x) for x in NUMBER.findall(text)] for text in (made, kept))
    assert got == pytest.approx(want, abs=0.011)                # another machine's last digits
    pictures = [Image.open(folder / "walkthrough.png") for folder in (tmp_path, ROOT / "docs")]
    assert ImageChops.difference(*pictures).getbbox() is None


def test_its_numbers_hang_together():
    """Advantages by eq. 1, the loss by eq. 5, from what the page says."""
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    rows = re.findall(r"\| \d \| \w* \| (\d) \| (\d) \| (\d) \| ([+-][\d.]+) \|", page)
    rewards = [float(reward) for *_, reward, _ in rows]
    mean = sum(rewards) / 4
    deviation = (sum((x - mean) ** 2 for x in rewards) / 3) ** 0.5
    for accuracy, form, reward, advantage in rows:
        assert int(accuracy) + int(form) == int(reward)
        want = (int(reward) - mean) / (deviation + 1e-4)
        assert float(advantage) == pytest.approx(want, abs=1e-3)
    tokens = re.findall(r"^\| `(.+)` \|(.*)\| ([VTH ]*) \|$", page, flags=re.M)
    key, length = sum(bool(kept.strip()) for *_, kept in tokens), len(tokens)
    said = re.search(r"= 1/(\d+) x (\d+) x ([\d.-]+) = ([\d.-]+)", page)
    assert (int(said[1]), int(said[2])) == (length, key)
    assert float(said[4]) == pytest.approx(key * float(said[3]) / length, abs=1e-3)
