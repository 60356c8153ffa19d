"""A run, or several to compare, as one HTML page that opens from disk; its curves as SVG and PNG.

    python -m lab.report runs/toy                       report.html, .svg and .png in runs/toy
    python -m lab.report runs/toy runs/other --out both.html        runs over each other

The page shows completions token by token (what each signal saw, what it chose), the curves of
log.jsonl, and tables. It holds all it needs and may load nothing: its content security policy says
so. Text of models and data sets is JSON without <, > and & in the file, and textContent in the
document. The page stays below LIMIT: samples are thinned evenly until they fit, and frames fill
what room is left. It says what is left out or malformed.
"""

import argparse
import base64
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import BadRecord, Limits, load_media
from lab.stats import interval

LIMIT, POINTS = 20_000_000, 1000                    # bytes of a page, points of a curve
THUMBNAILS = Limits(max_frames=6, max_pixels=24 * 28 * 28, image_pixels=60 * 28 * 28)
SIGNALS = ("visual", "temporal", "entropy")         # always in the first three colours
# Okabe and Ito's, which the colour-blind can tell apart; where they run out, the lines differ
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
LINES = ("-", "--", ":", "-.")
Table = tuple[str, str, list, list]                 # title, note, head, rows


# ------------------------------------------------------------------------------------ reading a run
def number(x: str | float) -> float | None:
    """Four digits are enough; None where it is no finite number: a page's JSON knows no NaN."""
    return float(f"{float(x):.4g}") if math.isfinite(float(x)) else None


def smooth(ys: list[float | None]) -> list[float | None]:
    """Each value's mean with its neighbours: a fortieth of the run on either side."""
    k, means = len(ys) // 40, []
    for i in range(len(ys)):
        near = [y for y in ys[max(0, i - k):i + k + 1] if y is not None]
        means.append(number(sum(near) / len(near)) if near else None)
    return means


def whole(sample: dict) -> bool:
    """Whether each token of each completion has a score and a choice from each signal."""
    if not isinstance(sample["completions"], list):
        return False
    for c in sample["completions"]:
        for name, scores in c["signals"].items():
            if not len(c["tokens"]) == len(scores) == len(c["top_tokens"][name]):
                return False
    return True


def read_rows(path: Path, usable=lambda row: True) -> tuple[list[dict], list[str]]:
    """The rows of a JSON-lines file by step, and a note if there are lines that cannot be used."""
    if not path.is_file():
        return [], [f"{path}: no such file"]
    rows, n = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for n, line in enumerate(file, 1):          # str.splitlines would cut at U+2028 in a token
            try:
                row = json.loads(line, parse_float=number, parse_constant=number)
                if row["step"] >= 0 and usable(row):
                    rows.append(row)
            except (ValueError, TypeError, LookupError, AttributeError):
                continue
    rows.sort(key=lambda row: row["step"])
    bad = n - len(rows)
    return rows, [f"{path}: {bad} of {n} lines are malformed or half-written, and left out"][:bad]


def read_run(folder: Path) -> dict:
    """What a run wrote down, its log by column, and notes on what is missing."""
    if not (folder / "log.jsonl").is_file():
        raise SystemExit(f"error: {folder}: no log.jsonl; is it the folder of a run?")
    rows, notes = read_rows(folder / "log.jsonl")
    samples, more = read_rows(folder / "samples.jsonl", whole)
    notes += more
    for what, column, value in (("all groups were flat", "flat", 1),
                                ("no token carried gradient", "key_share", 0)):
        idle = sum(row.get(column) == value for row in rows)
        if idle >= 10:
            notes.append(f"{folder}: in {idle} of {len(rows)} steps {what}: nothing was learnt")
    every = len(rows) // POINTS + 1
    if every > 1:
        notes.append(f"{folder}: the curves show one of {every} steps")
    log = {"step": []}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = [row.get(name) for row in rows if row["step"] % every == 1 % every]
        log[name] = [y if isinstance(y, (int, float)) else None for y in column]
    options, path = {}, folder / "options.json"
    try:
        options = dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=number))
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"{path}: {error}")
    return {"steps": len(rows), "log": log, "smooth": {x: smooth(ys) for x, ys in log.items()},
            "samples": samples, "options": options, "notes": notes}


def over_seeds(runs: list[dict]) -> dict:
    """One run out of those of `read_run` that differ in their seed: curves are means at the steps
    that all have, "band" is {column: (lower, upper)}, the 95% interval around the smoothed ones of
    three seeds or more (two's would fill any picture). The rest is the first one's."""
    steps = sorted(set.intersection(*(set(run["log"]["step"]) for run in runs)))
    names = list(dict.fromkeys(name for run in runs for name in run["log"]))

    def spans(kind: str, name: str) -> list[tuple[float, float]]:
        columns = [dict(zip(run["log"]["step"], run[kind].get(name, []))) for run in runs]
        values = [[column.get(step) for column in columns] for step in steps]
        return [(math.nan, math.nan) if None in ys else interval(ys) for ys in values]

    log, means, band = {}, {}, {}
    for name in names:
        log[name] = [number(mean) for mean, _ in spans("log", name)]
        around = spans("smooth", name)
        means[name] = [number(mean) for mean, _ in around]
        wide = [(mean, half if len(runs) > 2 else math.nan) for mean, half in around]
        band[name] = ([number(mean - half) for mean, half in wide],
                      [number(mean + half) for mean, half in wide])
    log["step"] = steps
    others = [note for run in runs[1:] for note in run["notes"] if "no such file" not in note]
    notes = [*runs[0]["notes"], *others]
    if len(runs) > 1:
        notes.append("curves are means over seeds, shades their 95% intervals; samples and tables "
                     "are the first seed's")
    return {**runs[0], "steps": min(run["steps"] for run in runs), "log": log, "smooth": means,
            "band": band, "notes": notes}


# ------------------------------------------------------------------------------------------- tables
WORDS_HEAD = ["word", "occurs", "selected", "share", "lift"]
OVERLAP = ("Overlap", "Tokens that exactly these signals select. By chance: if they chose "
           "independently.", ["selected by", "tokens", "share", "by chance"])
POSITIONS = ("Positions", "Share of the tokens in each tenth of a completion that a signal "
             "selects.", ["signal", *(f"{10 * i}–{10 * i + 10}%" for i in range(10))])


def percent(part: float, of: float) -> str:
    return f"{100 * part / of:.1f}%" if of else "–"


def count(completions: list[dict], name: str) -> tuple[Counter, Counter]:
    """How often each word, and each tenth of a completion (a number), occurs in completions that
    the signal applies to, and how often it is selected."""
    seen, selected = Counter(), Counter()
    for c in completions:
        if name not in c["signals"]:
            continue
        for t, token in enumerate(c["tokens"]):
            for key in (str(token).strip() or "(space)", 10 * t // len(c["tokens"])):
                seen[key] += 1
                selected[key] += bool(c["top_tokens"][name][t])
    return seen, selected


def sample_tables(samples: list[dict]) -> list[Table]:
    """The words each signal selects, where it does, and the overlap of the selected sets. The
    watched question, every other sample, would outweigh the rest and does not count; nor do, for a
    signal, tokens that it does not apply to (temporal, in a still image)."""
    completions = [c for s in samples if not s.get("watched") for c in s["completions"]]
    sets = Counter()                                # the names of the signals that select a token
    for c in completions:
        for t in range(len(c["tokens"])):
            sets[tuple(name for name in c["signals"] if c["top_tokens"][name][t])] += 1
    tables, positions, overlap, shares = [], [], [], {}
    for name in dict.fromkeys(name for c in completions for name in c["signals"]):
        seen, selected = count(completions, name)
        n, k = (sum(counter[i] for i in range(10)) for counter in (seen, selected))
        shares[name] = k / sets.total()
        positions.append([name, *(percent(selected[i], seen[i]) for i in range(10))])
        top = [(word, x) for word, x in selected.most_common() if isinstance(word, str) and x]
        rows = [[word, seen[word], x, percent(x, seen[word]), f"{x / seen[word] / (k / n):.1f}"]
                for word, x in top[:12]]
        note = f"It selects {percent(k, n)} of {n} tokens. Lift: how much likelier than that."
        tables.append((f"Words: {name}", note, WORDS_HEAD, rows))
    for names, n in sets.most_common(16):
        chance = math.prod(p if name in names else 1 - p for name, p in shares.items())
        share = percent(n, sets.total())
        overlap.append([" + ".join(names) or "none", n, share, percent(chance, 1)])
    return [*tables, (*OVERLAP, overlap), (*POSITIONS, positions)]


def option_tables(runs: list[dict]) -> list[Table]:
    """The options in which the runs differ, and all of them."""
    head, rows = ["option", *(run["name"] for run in runs)], []
    for name in dict.fromkeys(name for run in runs for name in run["options"]):
        values = [run["options"].get(name) for run in runs]
        rows.append([name, *(json.dumps(value, ensure_ascii=False) for value in values)])
    differ = [row for row in rows if len(set(row[1:])) > 1]
    return [("Options that differ", "", head, differ), ("All options", "", head, rows)]


# --------------------------------------------------------------------------------------------- page
def groups_of(names: list[str]) -> dict[str, list[str]]:
    """The columns of log.jsonl that are drawn, by heading."""
    shares, seconds = ([x for x in names if x.startswith(y)] for y in ("share_", "seconds_"))
    groups = {"Reward and its parts": ["reward", "accuracy", "format", "length_bonus",
                                       "extra_reward"],
              "Completions and steps": ["length", "kl", "grad_norm", "skipped"],
              "Share of selected tokens": ["key_share", *shares, "overlap"],
              "Seconds by phase": ["seconds", *seconds]}
    shown = {"step"}.union(*groups.values())
    groups["Everything else"] = [x for x in names if x not in shown]
    present = {title: [x for x in group if x in names] for title, group in groups.items()}
    return {title: group for title, group in present.items() if group}


def named(folders: list[Path]) -> list[dict]:
    """The runs of some folders, named by what their paths differ in."""
    base = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [{"name": os.path.relpath(x.resolve(), base), **read_run(x)} for x in folders]


def content_of(runs: list[dict]) -> dict:
    """All that a page of named runs could show, without the clips."""
    tables, notes, values = [], [], {}
    for run in runs:
        notes += run["notes"]
        for title, *rest in sample_tables(run["samples"]):
            tables.append((f"{title} ({run['name']})" if len(runs) > 1 else title, *rest))
        for name, ys in run["log"].items():
            values.setdefault(name, set()).update(y for y in ys if y is not None)
    constant = [f"{x} {min(ys)}" for x, ys in values.items() if len(ys) == 1 and x != "step"]
    return {"runs": runs, "signals": SIGNALS, "colours": COLOURS, "clips": {},
            "tables": tables + option_tables(runs), "constant": constant,
            "notes": list(dict.fromkeys(notes)),
            "groups": groups_of([name for name, ys in values.items() if len(ys) > 1])}


def evenly(samples: list[dict], share: float) -> list[dict]:
    """Evenly this share of the watched samples and of the others, first and last of each."""
    kept = []
    for watched in (True, False):
        some = [s for s in samples if bool(s.get("watched")) == watched]
        k = int(share * len(some))
        step = (len(some) - 1) / max(1, k - 1)
        kept += [some[round(i * step)] for i in range(k)]
    return kept


def thumbnails(sample: dict, videos: str) -> list[str]:
    """Some frames of its clip as JPEG data URIs; BadRecord says why there are none."""
    path = os.path.normpath(str(sample.get("path")))
    if os.path.isabs(path) or path.startswith(".."):
        raise BadRecord(f"{path} leaves the data folder")
    record, uris = {"data_type": "video", **sample, "path": path}, []
    for frame in load_media(record, videos, THUMBNAILS)[0]:             # (3, h, w) uint8
        image, file = Image.fromarray(frame.permute(1, 2, 0).numpy()), io.BytesIO()
        image.save(file, "JPEG", quality=75, subsampling=0)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


def render(content: dict) -> str:
    """The page around its content, which is ASCII: its length is its size, and half a surrogate
    can be written."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("__DATA__", text)


def build(content: dict, limit: int = LIMIT) -> str:
    """The page, of at most `limit` bytes: samples are thinned until they fit, frames fill what
    room is left."""
    everything = [run["samples"] for run in content["runs"]]
    room, size, share = 0.98 * limit, math.inf, 1.0             # 2% for notes
    while size > room and share > 1e-4:
        for run, samples in zip(content["runs"], everything):
            run["samples"] = evenly(samples, share)
        size = len(render(content))
        share *= 0.95 * room / size
    room -= size
    clips = {}
    for run in content["runs"]:
        videos = str(run["options"].get("videos"))
        clips.update({f"{videos}/{s.get('path')}": (s, videos) for s in run["samples"]})
    for clip, source in tqdm(clips.items(), desc="frames", unit="clip", disable=None):
        try:
            frames = thumbnails(*source)
        except (BadRecord, ValueError, OSError, ImportError) as error:
            frames = f"no frames: {error}"
        room -= len(json.dumps([clip, frames]))
        if room < 0:
            break
        content["clips"][clip] = frames
    shown = sum(len(run["samples"]) for run in content["runs"])
    counts = (("samples", shown, sum(map(len, everything))),
              ("samples' clips", len(content["clips"]), len(clips)))
    content["notes"] += [f"{kept} of {of} {what} are shown, to stay below {limit / 1e6:g} MB (the "
                         "tables count all)" for what, kept, of in counts if kept < of]
    return render(content)


def plot(runs: list[dict], names: list[str], page: Path) -> None:
    """A panel for each column, a line for each run, as SVG and PNG beside the page; needs
    matplotlib. runs: {"name", "log": {column: values}, "smooth": the same, and maybe the "band" of
    `over_seeds`}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("(for the curves as SVG and PNG too: pip install matplotlib)")
        return
    height = max(1, math.ceil(len(names) / 4))
    figure = Figure(figsize=(13, 2.1 * height), layout="constrained")
    axes = figure.subplots(height, 4, squeeze=False)
    for panel in axes.flat[len(names):]:
        panel.axis("off")
    for name, panel in zip(names, axes.flat):
        panel.set_title(name, fontsize=10, loc="left")
        for i, run in enumerate(runs):
            look = {"color": COLOURS[i % 7], "linestyle": LINES[i // 7 % 4]}
            raw, smoothed = ([math.nan if y is None else y for y in run[kind].get(name, [])]
                             for kind in ("log", "smooth"))
            steps = run["log"]["step"][:len(raw)]
            panel.plot(steps, raw, alpha=0.25, linewidth=0.8, **look)
            panel.plot(steps, smoothed, linewidth=1.6, label=run["name"], **look)
            if "band" in run:
                lower, upper = ([math.nan if y is None else y for y in edge]
                                for edge in run["band"].get(name, ([], [])))
                panel.fill_between(steps, lower, upper, color=look["color"], alpha=0.12)
    if len(runs) > 1:
        lines = axes[0, 0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4)
    for kind in (".svg", ".png"):
        figure.savefig(page.with_suffix(kind), dpi=110)
        print(page.with_suffix(kind))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs (--out of ktr.py)")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first)")
    a = parser.parse_args()
    out, content = a.out or a.runs[0] / "report.html", content_of(named(a.runs))
    out.write_text(build(content), encoding="utf-8")
    print(f"page: {out}")
    groups = [group for title, group in content["groups"].items() if title != "Everything else"]
    plot(content["runs"], sum(groups, []), out)


if __name__ == "__main__":
    main()
