"""A run, or several to compare, as one HTML page that opens from disk, and its curves as SVG and PNG.

    python -m lab.report runs/toy                               writes report.html, .svg and .png into runs/toy
    python -m lab.report runs/toy runs/other --out both.html    runs over each other; both.svg and both.png beside it

The page shows completions token by token (what each signal saw, what it chose), the curves of log.jsonl, and tables.
It holds all it needs and may load nothing: its content security policy says so. Text of models and data sets is JSON
without <, > and & in the file, and textContent in the document. The page stays below LIMIT: samples are thinned evenly
until they fit, and frames fill what room is left. It says what is left out or malformed.
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

LIMIT, POINTS = 20_000_000, 1000                    # bytes of a page, points of a curve
THUMBNAILS = Limits(max_frames=6, max_pixels=24 * 28 * 28, image_pixels=60 * 28 * 28)
SIGNALS = ("visual", "temporal", "entropy")         # always in the first three colours; other names follow
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")     # Okabe and Ito's: colour-blind safe


# ------------------------------------------------------------------------------------ reading a run
def number(x: str | float) -> float | None:
    """Four digits are enough; None where it is no finite number, for a page's JSON knows no NaN."""
    return float(f"{float(x):.4g}") if math.isfinite(float(x)) else None


def smooth(ys: list[float | None]) -> list[float | None]:
    """Each value's mean with its neighbours: a fortieth of the run on either side."""
    k = len(ys) // 40
    near = [[y for y in ys[max(0, i - k):i + k + 1] if y is not None] for i in range(len(ys))]
    return [number(sum(some) / len(some)) if some else None for some in near]


def whole(sample: dict) -> bool:
    """Whether each token has a score and a choice from each signal."""
    return isinstance(sample["completions"], list) and all(isinstance(c["tokens"], list) and all(
        len(c["tokens"]) == len(scores) == len(c["chosen"][name]) for name, scores in c["signals"].items()) for c in sample["completions"])


def read_rows(path: Path, usable=lambda row: True) -> tuple[list[dict], list[str]]:
    """The rows of a JSON-lines file by step, and a note if there are lines that cannot be used."""
    if not path.is_file():
        return [], [f"{path}: no such file"]
    rows, n = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:     # str.splitlines would cut at U+2028, inside a token
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line, parse_float=number, parse_constant=number)
                rows += [row] if row["step"] >= 0 and usable(row) else []
            except (ValueError, TypeError, LookupError, AttributeError):
                continue
    notes = [f"{path}: {n - len(rows)} of {n} lines are malformed or half-written, and left out"] if len(rows) < n else []
    return sorted(rows, key=lambda row: row["step"]), notes


def read_run(folder: Path) -> dict:
    """What a run wrote down, its log by column, and notes on what is missing."""
    if not (folder / "log.jsonl").is_file():
        raise SystemExit(f"error: {folder}: no log.jsonl; is it the folder of a run?")
    (rows, notes), (samples, more) = read_rows(folder / "log.jsonl"), read_rows(folder / "samples.jsonl", whole)
    every, names = len(rows) // POINTS + 1, dict.fromkeys(["step", *(name for row in rows for name in row)])
    notes += more + [f"{folder}: the curves show one of {every} steps"] * (every > 1)
    log = {name: [y if isinstance(y := row.get(name), (int, float)) else None for row in rows[::every]] for name in names}
    try:
        options = dict(json.loads((folder / "options.json").read_text(encoding="utf-8"), parse_constant=number))
    except (OSError, ValueError, TypeError) as error:
        options, notes = {}, [*notes, f"{folder / 'options.json'}: {error}"]
    return {"steps": len(rows), "log": log, "smooth": {name: smooth(ys) for name, ys in log.items()}, "samples": samples,
            "options": options, "notes": notes}


# ------------------------------------------------------------------------------------------- tables
def percent(part: float, of: float) -> str:
    return f"{100 * part / of:.1f}%" if of else "–"


def sample_tables(samples: list[dict]) -> list[tuple]:
    """(title, note, head, rows): the words each signal selects, where it does, and the overlap of the selected sets.
    The watched question, every other sample, would outweigh the rest and does not count; nor do, for a signal, tokens
    that it does not apply to (temporal, in a still image)."""
    seen, taken, sets = Counter(), Counter(), Counter()             # seen and taken: (signal, word), (signal, tenth of the completion)
    for c in (c for s in samples if not s.get("watched") for c in s["completions"]):
        for t, token in enumerate(c["tokens"]):
            sets[tuple(name for name in c["signals"] if c["chosen"][name][t])] += 1
            for name in c["signals"]:
                for key in ((name, str(token).strip() or "(space)"), (name, 10 * t // len(c["tokens"]))):
                    seen[key] += 1
                    taken[key] += bool(c["chosen"][name][t])
    tables, positions, shares = [], [], {}
    for name in dict.fromkeys(name for name, _ in seen):
        n, k = (sum(count[name, tenth] for tenth in range(10)) for count in (seen, taken))
        shares[name] = k / sets.total()
        positions.append([name, *(percent(taken[name, tenth], seen[name, tenth]) for tenth in range(10))])
        top = [(key, x) for key, x in taken.most_common() if key[0] == name and isinstance(key[1], str) and x][:12]
        tables.append((f"Words: {name}", f"It selects {percent(k, n)} of {n} tokens. Lift: how much likelier than that.",
                       ["word", "occurs", "selected", "share", "lift"],
                       [[key[1], seen[key], x, percent(x, seen[key]), f"{x / seen[key] / (k / n):.1f}"] for key, x in top]))
    overlap = [[" + ".join(names) or "none", n, percent(n, sets.total()),
                percent(math.prod(p if name in names else 1 - p for name, p in shares.items()), 1)] for names, n in sets.most_common(16)]
    return [*tables, ("Overlap", "Tokens that exactly these signals select. By chance: if they chose independently.",
                      ["selected by", "tokens", "share", "by chance"], overlap),
            ("Positions", "Share of the tokens in each tenth of a completion that a signal selects.",
             ["signal", *(f"{10 * i}–{10 * i + 10}%" for i in range(10))], positions)]


def option_tables(runs: list[dict]) -> list[tuple]:
    """(title, note, head, rows): the options in which the runs differ, and all of them."""
    head, names = ["option", *(run["name"] for run in runs)], dict.fromkeys(name for run in runs for name in run["options"])
    rows = [[name, *(json.dumps(run["options"].get(name), ensure_ascii=False) for run in runs)] for name in names]
    return [("Options that differ", "", head, [row for row in rows if len(set(row[1:])) > 1]), ("All options", "", head, rows)]


# --------------------------------------------------------------------------------------------- page
def groups_of(names: list[str]) -> dict[str, list[str]]:
    """The columns of log.jsonl that are drawn, by heading."""
    groups = {"Reward and its parts": ["reward", "accuracy", "format", "bonus"],
              "Completions and steps": ["length", "kl", "grad_norm", "skipped"],
              "Share of selected tokens": ["key_share", *(x for x in names if x.startswith("share_")), "overlap"],
              "Seconds by phase": ["seconds", *(x for x in names if x.startswith("seconds_"))]}
    groups["Everything else"] = [x for x in names if x not in ("step", *sum(groups.values(), []))]
    return {title: there for title, wanted in groups.items() if (there := [x for x in wanted if x in names])}


def content_of(folders: list[Path]) -> dict:
    """All that a page could show, without the clips."""
    base = os.path.commonpath([folder.resolve().parent for folder in folders])
    runs = [{"name": os.path.relpath(folder.resolve(), base), **read_run(folder)} for folder in folders]
    tables = [(f"{title} ({run['name']})" if len(runs) > 1 else title, *rest)
              for run in runs for title, *rest in sample_tables(run["samples"])]
    values = {name: {y for run in runs for y in run["log"].get(name, [])} - {None} for run in runs for name in run["log"]}
    return {"runs": runs, "signals": SIGNALS, "colours": COLOURS, "clips": {}, "tables": tables + option_tables(runs),
            "groups": groups_of([name for name, ys in values.items() if len(ys) > 1]),
            "constant": [f"{name} {ys.pop()}" for name, ys in values.items() if len(ys) == 1 and name != "step"],
            "notes": [note for run in runs for note in run["notes"]]}


def thinned(samples: list[dict], share: float) -> list[dict]:
    """Evenly this share of the watched samples and of the others, first and last of each among them."""
    parts = [[s for s in samples if bool(s.get("watched")) == watched] for watched in (True, False)]
    return [some[round(i * (len(some) - 1) / max(1, k - 1))] for some in parts for k in [int(share * len(some))] for i in range(k)]


def thumbnails(sample: dict, videos: str) -> list[str]:
    """Some frames of its clip as JPEG data URIs; BadRecord says why there are none."""
    path, uris = os.path.normpath(str(sample.get("path"))), []
    if os.path.isabs(path) or path.startswith(".."):
        raise BadRecord(f"{path} leaves the data folder")
    for frame in load_media({"data_type": "video", **sample, "path": path}, videos, THUMBNAILS)[0]:         # (3, h, w) uint8
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=75, subsampling=0)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


def render(content: dict) -> str:
    """The page around its content, which is ASCII: its length is its size, and half a surrogate can be written."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("__DATA__", text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def build(content: dict, limit: int = LIMIT) -> str:
    """The page, of at most `limit` bytes: samples are thinned until they fit, frames fill what room is left."""
    everything, share, page, room = [run["samples"] for run in content["runs"]], 1.0, None, 0.98 * limit        # 2% for notes
    while page is None or len(page) > room and share > 1e-4:
        share *= 0.95 * room / len(page) if page else 1
        for run, samples in zip(content["runs"], everything):
            run["samples"] = thinned(samples, share)
        page = render(content)
    clips = {f"{videos}/{s.get('path')}": (s, videos)
             for run in content["runs"] for videos in [str(run["options"].get("videos"))] for s in run["samples"]}
    room -= len(page)
    for clip, source in tqdm(clips.items(), desc="frames", unit="clip", disable=None):
        try:
            frames = thumbnails(*source)
        except (BadRecord, ValueError, OSError, ImportError) as error:
            frames = f"no frames: {error}"
        room -= len(json.dumps([clip, frames]))
        if room < 0:
            break
        content["clips"][clip] = frames
    for what, kept, of in (("samples", sum(len(run["samples"]) for run in content["runs"]), sum(map(len, everything))),
                           ("samples' clips", len(content["clips"]), len(clips))):
        if kept < of:
            content["notes"].append(f"{kept} of {of} {what} are shown, to stay below {limit / 1e6:g} MB (the tables count all)")
    return render(content)


def plot(content: dict, page: Path) -> None:
    """The main curves beside the page, as SVG and PNG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("(for the curves as SVG and PNG too: pip install matplotlib)")
    names = [name for title, group in content["groups"].items() if title != "Everything else" for name in group]
    height = max(1, math.ceil(len(names) / 4))
    figure = Figure(figsize=(13, 2.1 * height), layout="constrained")
    axes = figure.subplots(height, 4, squeeze=False)
    for name, panel in zip(names, axes.flat):
        panel.set_title(name, fontsize=10, loc="left")
        for run, colour in zip(content["runs"], COLOURS * len(content["runs"])):
            for kind, look in (("log", {"alpha": 0.25, "linewidth": 0.8}), ("smooth", {"linewidth": 1.6, "label": run["name"]})):
                ys = [math.nan if y is None else y for y in run[kind].get(name, [])]
                panel.plot(run["log"]["step"][:len(ys)], ys, color=colour, **look)
    for panel in axes.flat[len(names):]:
        panel.axis("off")
    if len(content["runs"]) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for kind in (".svg", ".png"):
        figure.savefig(page.with_suffix(kind), dpi=110)
        print(page.with_suffix(kind))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that ktr.py wrote")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    arguments = parser.parse_args()
    out, content = arguments.out or arguments.runs[0] / "report.html", content_of(arguments.runs)
    out.write_text(build(content), encoding="utf-8")
    print(f"page: {out}")
    plot(content, out)
