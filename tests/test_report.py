"""The report page: tables by hand, damaged and missing files, the limit, and a headless browser."""

import html
import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from lab import report, toy
from lab.stats import quantile
from run.arguments import parse
from run.logs import METRICS, Clock, Log

EVIL = "</script x><script>window.hacked = 1; document.title = 'hacked'</script>\u2028&amp;"


def completion(tokens, signals, chosen, accuracy, advantage):
    return {"tokens": tokens, "signals": signals, "top_tokens": chosen, "accuracy": accuracy,
            "format": 1.0, "advantages": advantage, "reward": accuracy + 1.0}


def sample(step=1, path="./a.y4m", watched=False, problem="Which way?"):
    """As logs.sample_of writes it: a completion under a clip, one that temporal does not fit."""
    first = completion(
        ["so", "red", "up", "red"],
        {"visual": [0.1, 2.0, 0.5, 1.0], "temporal": [0.0, 1.5, 3.0, 0.2],
         "entropy": [1.25, 0.0, 0.0, 0.0]},
        {"visual": [0, 1, 0, 1], "temporal": [0, 1, 1, 0], "entropy": [1, 0, 0, 0]}, 1.0, 0.75)
    second = completion(
        ["so", EVIL], {"visual": [0.1, 0.2], "entropy": [1.0, 0.5]},
        {"visual": [0, 0], "entropy": [1, 0]}, 0.0, -0.75)
    return {"step": step, "watched": watched, "problem_id": path, "problem": problem,
            "options": ["A. up", "B. down"], "solution": "<answer>A</answer>", "path": path,
            "data_type": "video", "completions": [first, second]}


def write_run(folder, *more, steps=4, samples=()):
    """A run's folder, written by logs.py as ktr.py has it do, and two clips."""
    folder.mkdir(parents=True)
    o = parse(["--model", "m", "--data", "d.json", "--videos", str(folder), *more])
    log, clock = Log(folder, 0), Clock(torch.device("cpu"))
    (folder / "options.json").write_text(json.dumps(asdict(o)))
    names = [*METRICS, *(f"share_{name}" for name in o.signals)]
    clock("data")
    for step in range(1, steps + 1):
        totals = {**dict.fromkeys(names, step / 4), "prompts": 1.0, "leaving": 0.0}
        log.step(step, steps, totals, {"grad_norm": 1.0, "lr": o.lr, "skipped": 0}, clock)
    watched = [sample(step, "./b.y4m", True, EVIL) for step in (2, 3)]
    for row in samples or [sample(1), *watched]:
        log.append("samples.jsonl", row)
    rng = np.random.default_rng(0)
    for name in "ab":
        noise = rng.integers(0, 255, (8, 56, 56, 3)).astype(np.uint8)
        toy.write_y4m(folder / f"{name}.y4m", noise)
    return folder


def page_of(*folders, limit=report.LIMIT):
    content = report.content_of(report.named(list(folders)))
    return report.build(content, limit), content


# ------------------------------------------------------------------------------------------- tables
def test_words_by_hand():
    """Of the tokens that a signal applies to; the watched sample does not count."""
    words, temporal, entropy, *_ = report.sample_tables([sample(), sample(2, watched=True)])
    assert words[0] == "Words: visual"
    assert words[1].startswith("It selects 33.3% of 6 tokens.")
    assert words[3] == [["red", 2, 2, "100.0%", "3.0"]]                     # 1 / (2/6)
    assert temporal[0] == "Words: temporal"
    assert temporal[1].startswith("It selects 50.0% of 4 tokens.")          # not of 6
    assert temporal[3] == [["red", 2, 1, "50.0%", "1.0"], ["up", 1, 1, "100.0%", "2.0"]]
    assert entropy[0] == "Words: entropy" and entropy[3] == [["so", 2, 2, "100.0%", "3.0"]]


def test_overlap_and_positions_by_hand():
    *_, overlap, positions = report.sample_tables([sample(), sample(2, watched=True)])
    assert overlap[3] == [                              # by chance: each selects a third
        ["entropy", 2, "33.3%", "14.8%"], ["visual + temporal", 1, "16.7%", "7.4%"],
        ["temporal", 1, "16.7%", "14.8%"], ["visual", 1, "16.7%", "14.8%"],
        ["none", 1, "16.7%", "29.6%"]]
    rows = {name: row for name, *row in positions[3]}
    # four tokens stand in tenths 0, 2, 5 and 7, two in 0 and 5
    none, never, always = "–", "0.0%", "100.0%"
    assert rows["visual"] == [never, none, always, none, none, never, none, always, none, none]
    assert rows["entropy"][0] == always and rows["temporal"][5] == always


def test_smoothing_and_numbers():
    assert report.smooth([float(i) for i in range(80)])[:3] == [1.0, 1.5, 2.0]      # two neighbours
    assert report.smooth([None, 3.0]) == [None, 3.0]                        # on either side
    assert report.smooth([1.0, None] * 40)[40] == 1.0
    numbers = [report.number(x) for x in ("0.123456", "NaN", "-Infinity", "1e999")]
    assert numbers == [0.1235, None, None, None]


def test_options_that_differ(tmp_path):
    _, content = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", "--lr", "3e-5"))
    tables = {title: rows for title, _, _, rows in content["tables"]}
    differ = {name: values for name, *values in tables["Options that differ"]}
    assert differ.pop("videos") == [json.dumps(str(tmp_path / name)) for name in "ab"]
    assert differ == {"lr": ["2e-06", "3e-05"]}
    assert "Words: visual (a)" in tables and "Overlap (b)" in tables
    assert len(tables["All options"]) > 30


# ---------------------------------------------------------------------------------- what is missing
def test_damaged_lines_are_left_out_with_a_note(tmp_path):
    run = write_run(tmp_path / "run")
    good = json.dumps(sample())
    log = ['{"step": 2, "reward": NaN, "kl": Infinity}', '{"step": 1, "reward": 0.5, "kl": 0.25}',
           "no json", "[1]", '{"reward": 1}', '{"step": "3"}', '{"step": 3, "rew']
    (run / "log.jsonl").write_text("\n".join(log))
    short, odd = sample(2), {**sample(2), "completions": {}}
    short["completions"][0]["top_tokens"]["visual"].pop()
    nan = good.replace("2.0, 0.5", "NaN, 0.5")
    lines = "\n".join([good, json.dumps(short), json.dumps(odd), nan, good[:200]])
    (run / "samples.jsonl").write_bytes(lines.encode() + b"\xff\n")
    page, content = page_of(run)                        # NaN in it would be a ValueError
    (read,) = content["runs"]
    assert read["log"] == {"step": [1, 2], "reward": [0.5, None], "kl": [0.25, None]}
    assert read["steps"] == 2 and len(read["samples"]) == 2
    scores = read["samples"][1]["completions"][0]["signals"]["visual"]
    assert scores == [0.1, None, 0.5, 1.0]
    notes = " ".join(content["notes"])
    assert "log.jsonl: 5 of 7 lines are malformed" in notes
    assert "samples.jsonl: 3 of 5 lines are malformed" in notes
    assert "5 of 7 lines" in page


def test_missing_files_are_noted_and_a_folder_without_a_log_is_an_error(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("samples.jsonl", "options.json", "a.y4m"):
        (run / name).unlink()
        page, content = page_of(run)
        assert page.startswith("<!doctype html>")
        assert name == "a.y4m" or name in " ".join(content["notes"])
    (run / "log.jsonl").write_text("")
    (run / "options.json").write_text('{"lr": 0.1')     # killed while writing
    _, content = page_of(run)
    assert content["runs"][0]["steps"] == 0 and len(content["notes"]) == 2
    with pytest.raises(SystemExit, match="no log.jsonl; is it the folder of a run"):
        report.named([tmp_path])


def test_clips_that_cannot_be_shown_say_why(tmp_path):
    paths = ("./a.y4m", "./gone.y4m", "../secret.png", "/etc/passwd")
    samples = [sample(step, path) for step, path in enumerate(paths, 1)]
    _, content = page_of(write_run(tmp_path / "run", samples=samples))
    clips = {Path(name).name: frames for name, frames in content["clips"].items()}
    assert len(clips["a.y4m"]) == 6
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in clips["a.y4m"])
    assert "no such file" in clips["gone.y4m"]
    assert all("leaves the data folder" in clips[name] for name in ("secret.png", "passwd"))


def test_a_page_stays_below_its_limit_and_says_what_it_left_out(tmp_path):
    many = [sample(i, f"./{'ab'[i % 2]}.y4m", i % 2 == 1) for i in range(1, 401)]
    run = write_run(tmp_path / "run", samples=many)
    whole, _ = page_of(run)
    page, content = page_of(run, limit=120_000)
    assert len(whole) > 250_000 and 90_000 < len(page.encode()) <= 120_000
    steps = [s["step"] for s in content["runs"][0]["samples"]]
    assert 20 < len(steps) < 400
    assert {1, 2, 399, 400} <= set(steps)               # first and last, watched and others
    notes = " ".join(content["notes"])
    assert f"{len(steps)} of 400 samples are shown, to stay below 0.12 MB" in notes
    assert "samples' clips are shown" in notes and "400" in page


# -------------------------------------------------------------------------------------- the command
def test_the_command_writes_the_page_and_the_curves(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / name) for name in "ab"]

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, [*runs, *more])])
        runpy.run_path(str(ROOT / "lab" / "report.py"), run_name="__main__")
        return capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)     # as if it were not installed
    assert "pip install matplotlib" in call()
    page = (runs[0] / "report.html").read_text()
    assert not (runs[0] / "report.svg").exists()
    assert "<script>window" not in page and "Video-KTR" in page
    assert set(re.findall(r"https?://[^\"\s]+", page)) == {"http://www.w3.org/2000/svg"}
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib")
    written = [str(tmp_path / f"both.{kind}") for kind in ("html", "svg", "png")]
    assert call("--out", tmp_path / "both.html").split()[1:] == written
    assert (tmp_path / "both.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "both.svg").read_text()


# -------------------------------------------------------------------------------------- the browser
CHROMIUM = Path("/usr/bin/chromium")          # Debian's; a snap cannot read what is in /tmp
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --enable-logging=stderr "
         "--window-size=1000,800 --dump-dom").split()
PROBE = r"""<script>
onload = () => {
  const $ = id => document.getElementById(id), out = {}
  const all = selector => [...document.querySelectorAll(selector)]
  const spans = () => [...all(".text")[0].children]
  const looks = () => spans().map(span => getComputedStyle(span).backgroundImage)
  const fire = (e, type) => e.dispatchEvent(new Event(type, {bubbles: true}))
  const tip = () => $("tip").hidden ? null : $("tip").textContent
  const [visual, temporal, entropy, only] = $("toggles").children
  out.title = document.title
  out.notes = $("notes").textContent
  out.texts = all(".text").map(p => p.textContent.trim())
  out.rewards = all("article h3").map(h => h.textContent)
  out.question = $("question").textContent
  out.frames = [...document.images].map(image => image.naturalWidth)
  out.injected = [document.scripts.length, typeof hacked]
  out.looks = {first: looks()}
  visual.click()
  out.looks.less = looks(), out.pressed = visual.getAttribute("aria-pressed")
  visual.click()
  out.looks.again = looks()
  only.click()
  out.looks.all = looks()
  fire(spans()[1], "pointerover")
  out.tip = tip()
  fire(spans()[1].parentNode, "pointerleave")
  out.left = tip()
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
    spans()[0].parentNode.dispatchEvent(new KeyboardEvent("keydown", {key}))
    out[key] = tip()
  }
  out.questions = [...$("questions").options].map(o => o.textContent)
  out.steps = [$("step").textContent]
  $("at").value = 1, fire($("at"), "input")
  out.steps.push($("step").textContent)
  $("questions").selectedIndex = 1, fire($("questions"), "change")
  out.steps.push($("step").textContent)
  $("run").value = 1, fire($("run"), "change")
  out.kept = $("questions").selectedIndex
  out.curves = all("figure").map(
    f => [f.querySelector("svg").ariaLabel, f.querySelectorAll("path[opacity]").length])
  out.tables = all("#tables summary").map(s => s.textContent)
  document.body.textContent = JSON.stringify(out)
  console.log("probed")
}
</script>"""


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    with (runs[1] / "log.jsonl").open("a") as file:
        file.write('{"step": 5')
    (tmp_path / "page.html").write_text(page_of(*runs)[0] + PROBE)
    profile, page = f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()
    done = subprocess.run([CHROMIUM, *FLAGS, profile, page], capture_output=True, text=True,
                          timeout=60)
    console = re.findall(r"CONSOLE.*", done.stderr)
    assert len(console) == 1 and '"probed"' in console[0], console      # and errors would be seen
    body = re.search(r"<body[^>]*>(.*)</body>", done.stdout, re.DOTALL)[1]
    found = json.loads(html.unescape(body))
    assert found["title"] == "Video-KTR: a, b" and "1 of 5 lines" in found["notes"]

    assert found["texts"] == ["so red up red", f"so{EVIL}"]
    assert EVIL in found["question"] and "answer: A" in found["question"]
    assert found["injected"] == [3, "undefined"]        # the page's data and script, and the probe
    assert found["rewards"][0] == ("completion 1 reward 2 (accuracy 1, format 1), advantage 0.75, "
                                   "4 tokens, 4 selected")
    assert len(found["frames"]) == 6 and all(width > 0 for width in found["frames"])

    blue, orange, green = "rgb(0, 114, 178)", "rgb(230, 159, 0)", "rgb(0, 158, 115)"
    first, less, everything = (found["looks"][name] for name in ("first", "less", "all"))
    assert found["looks"]["again"] == first and found["pressed"] == "false"
    lines = [[colour in look for colour in (blue, orange, green)] for look in first]
    assert lines == [[False, False, True], [True, True, False],         # who selected each token
                     [False, True, False], [True, False, False]]
    assert less[0] == first[0] and blue not in less[1] and orange in less[1]
    assert less[3] == "none"
    assert "rgba(0, 114, 178" in everything[2]          # a band for its score, no line: it is
    assert blue not in everything[2]                    # not selected

    assert [line.split() for line in found["tip"].splitlines()] == [
        ['"red"', "2", "of", "4"], ["visual", "2", "selected"], ["temporal", "1.5", "selected"],
        ["entropy", "0"]]
    assert found["left"] is None
    assert found["ArrowLeft"].startswith('"so"') and found["ArrowRight"].startswith('"red"')

    assert found["questions"][0].startswith("watched: </script x><script>")
    assert found["questions"][1] == "step 1: Which way?"
    assert found["steps"] == ["2 (1 of 2)", "3 (2 of 2)", "1 (1 of 1)"] and found["kept"] == 1
    assert ["reward", 2] in found["curves"] and ["overlap", 2] in found["curves"]       # a raw line
    assert {"Words: visual (a)", "Overlap (b)", "All options"} <= set(found["tables"])  # each run


# ------------------------------------------------------------------------------------------- seeds
def test_seeds_are_averaged_step_by_step(tmp_path):
    """Where one lacks a step, a column or a value there is none; below three there is no band."""
    logs = [[{"step": 1, "kl": 1.0, "lr": 5.0}, {"step": 2, "kl": 2.0, "lr": 5.0},
             {"step": 3, "kl": 3.0, "lr": 5.0}],
            [{"step": 1, "kl": 3.0}, {"step": 3, "kl": None}],
            [{"step": 1, "kl": 2.0}, {"step": 2, "kl": 2.0}, {"step": 3, "kl": 1.0}]]
    runs = []
    for seed, rows in enumerate(logs):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(report.read_run(folder))
    three, two = report.over_seeds(runs), report.over_seeds(runs[::2])
    assert three["log"] == {"step": [1, 3], "kl": [2.0, None], "lr": [None, None]}
    assert three["steps"] == 2
    half = quantile(0.975, 2) / 3 ** 0.5                # deviation 1, over sqrt 3
    assert three["band"]["kl"] == ([report.number(2 - half), None], [report.number(2 + half), None])
    assert two["log"]["kl"] == [1.5, 2.0, 2.0] and two["band"]["kl"] == ([None] * 3, [None] * 3)


def test_a_long_run_is_thinned_by_its_steps(tmp_path):
    """Seeds keep the same steps even where one lacks a line."""
    runs = []
    for seed in (0, 1):
        rows = [{"step": step, "kl": 1.0} for step in range(1, 1201) if (seed, step) != (1, 10)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(report.read_run(folder))
    both = report.over_seeds(runs)
    assert both["log"]["step"] == list(range(1, 1201, 2)) and both["steps"] == 1199
