"""A run, or several to compare, as one HTML page that opens from disk, and its curves as SVG and PNG.

    python report.py runs/toy                               writes report.html, .svg and .png into runs/toy
    python report.py runs/toy runs/other --out both.html    runs over each other; both.svg and both.png beside it

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

LIMIT, POINTS = 20_000_000, 2000                    # bytes of a page, points of a curve
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
    return isinstance(sample["completions"], list) and all(
        len(c["tokens"]) == len(scores) == len(c["chosen"][name]) for c in sample["completions"] for name, scores in c["signals"].items())


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
    Tokens that a signal does not apply to (temporal, in a still image) do not count as ones it left."""
    seen, taken, sets = Counter(), Counter(), Counter()             # seen and taken: (signal, word), (signal, tenth of the completion)
    for c in (c for s in samples for c in s["completions"]):
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
              for run in runs for title, *rest in (sample_tables(run["samples"]) if run["samples"] else [])]
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
    """The page around its content, in ASCII: its length is its size, and half a surrogate can be written."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return PAGE.replace("__DATA__", text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


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
            content["notes"].append(f"{kept} of {of} {what} are shown, to stay below {limit / 1e6:g} MB (the tables count all samples)")
    return render(content)


def plot(content: dict, page: Path) -> None:
    """The main curves beside the page, as SVG and PNG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curves as SVG and PNG, only in the page: pip install matplotlib")
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


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Video-KTR</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
[hidden] { display: none !important }
:root { color-scheme: light dark; --ink: #1d2024; --soft: #5f6670; --line: #dfe2e6; --paper: #fff; --card: #f6f7f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #9ba2ac; --line: #33383f; --paper: #16181b; --card: #1e2125 } svg path, i { filter: brightness(1.3) } }
body { margin: auto; padding: 1.5rem; max-width: 76rem; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem } p { margin: .3rem 0 }
h3, summary { font-size: .9rem; font-weight: 600; margin: 0 } .soft { color: var(--soft); font-size: .85rem; font-weight: 400 }
.bar, label, button { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem } .bar { gap: .5rem 1rem; margin: .5rem 0 }
select, button { font: inherit; color: inherit; max-width: 80vw; padding: .2rem .6rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px }
button[aria-pressed=false] { color: var(--soft); background: none; text-decoration: line-through }
i { width: .8em; height: .8em; border-radius: 3px; display: inline-block } #questions { width: 30rem }
#sample { display: grid; grid-template-columns: minmax(12rem, 18rem) minmax(0, 1fr); gap: 1.75rem; margin-top: 1.2rem }
@media (max-width: 46rem) { #sample { grid-template-columns: minmax(0, 1fr) } }
#frames { display: grid; grid-template-columns: repeat(auto-fit, minmax(5rem, 1fr)); gap: 4px; margin-bottom: .8rem }
img { width: 100%; max-width: 12rem; border-radius: 4px } #question, #notes { white-space: pre-wrap; overflow-wrap: anywhere }
article + article { border-top: 1px solid var(--line); padding-top: .7rem; margin-top: .9rem }
.text { line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto }
.text span { border-radius: 3px; padding: .15em 1px .25em; margin-right: 1px } .text .at { outline: 2px solid var(--ink) }
#tip { position: fixed; z-index: 1; pointer-events: none; background: var(--ink); color: var(--paper); border-radius: 6px;
  padding: .4rem .6rem; font: 12px/1.5 ui-monospace, monospace; white-space: pre }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .9rem 1.5rem; margin: .5rem 0 1.5rem }
figure { margin: 0 } figcaption { font-size: .85rem; display: flex; justify-content: space-between }
svg { width: 100%; display: block } svg text { font-size: 10px; fill: var(--soft) } svg path { fill: none; stroke-linecap: round }
#tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem 2rem }
details { overflow-x: auto } .wide { grid-column: 1 / -1 } table { border-collapse: collapse; font-size: .82rem; width: 100% }
th, td { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
</style>
<h1></h1><p id="about" class="soft"></p><ul id="notes" class="soft" aria-label="what is missing"></ul>
<h2>Tokens</h2>
<div class="bar"><label>run <select id="run"></select></label><label>question <select id="questions"></select></label>
<label>step <input type="range" id="at" min="0" value="0"><output id="step"></output></label></div>
<div class="bar" id="toggles" role="group" aria-label="what is coloured"></div>
<p class="soft">A token has a band for each signal, as strong as its score (the root of its part of the sample's highest), and
a line below in the colours of the signals that selected it. Hover for the numbers, or focus a text and use the arrow keys.</p>
<div id="sample"><div><div id="frames"></div><div id="question"></div></div><div id="texts"></div></div>
<h2>Curves</h2>
<div class="bar" id="legend"></div><div id="curves"></div><p id="constant" class="soft"></p>
<h2>Tables</h2>
<div id="tables"></div><div id="tip" role="status" hidden></div>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict"
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent)
const el = (tag, props, ...inside) => { const e = Object.assign(document.createElement(tag), props); e.append(...inside); return e }
const digits = x => x == null ? "–" : x && Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(4))
const colour = i => data.colours[i % data.colours.length], swatch = i => el("i", {style: "background:" + colour(i)})

// tokens: one question of one run at one step
const found = new Set(data.runs.flatMap(r => r.samples.flatMap(s => s.completions.flatMap(c => Object.keys(c.signals)))))
const signals = [...new Set([...data.signals, ...found])].map((name, i) => ({name, i, on: true})).filter(s => found.has(s.name))
let run, pointed, only = true
for (const r of data.runs) {
  r.questions = {}
  for (const s of r.samples) (r.questions[JSON.stringify([s.watched, s.problem_id, s.path, s.problem])] ??= []).push(s)
}

function paint(span) {
  const {c, t, top} = span, chose = s => c.chosen[s.name]?.[t]
  const bands = signals.filter(s => s.on && c.signals[s.name] && (chose(s) || !only)), lines = bands.filter(chose)
  const strength = s => Math.round(30 + 120 * Math.sqrt(Math.max(0, c.signals[s.name][t]) / (top[s.name] || 1))).toString(16)
  const stripes = (to, list, tone) => `linear-gradient(to ${to}, ${list.map((s, i) =>
    `${tone(s)} ${100 * i / list.length}% ${100 * (i + 1) / list.length}%`)})`
  span.style.background = [...lines.length ? [stripes("right", lines, s => colour(s.i)) + " bottom / 100% 3px no-repeat"] : [],
    ...bands.length ? [stripes("bottom", bands, s => colour(s.i) + strength(s))] : []].join()
}

function point(span) {
  const tip = $("tip")
  pointed?.classList.remove("at")
  tip.hidden = !(pointed = span)
  if (!span) return
  const {c, t} = span, box = span.getClientRects()[0]
  span.classList.add("at")
  tip.textContent = [`${JSON.stringify(c.tokens[t])}  ${t + 1} of ${c.tokens.length}`, ...signals.map(s =>
    `${s.name.padEnd(9)} ${digits(c.signals[s.name]?.[t]).padEnd(8)} ${c.chosen[s.name]?.[t] ? "selected" : ""}`)].join("\n")
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px"
  tip.style.top = box.bottom + 6 + (box.bottom + 6 + tip.offsetHeight < innerHeight ? 0 : -box.height - 12 - tip.offsetHeight) + "px"
}

function text(c, top) {
  const p = el("p", {className: "text", tabIndex: 0}), bare = !c.tokens.some(token => /\s/.test(token))     // the toy world's words
  c.tokens.forEach((token, t) => {
    p.append(el("span", {c, t, top}, String(token).replaceAll("\n", "↵\n")), bare ? " " : "")
    paint(p.children[t])
  })
  p.onpointerover = e => point(e.target.c ? e.target : null)
  p.onpointerleave = p.onscroll = p.onblur = () => point(null)
  p.onkeydown = e => {
    const by = {ArrowRight: 1, ArrowLeft: -1}[e.key], next = p.children[pointed?.parentNode === p ? pointed.t + by : 0]
    if (by && next) { e.preventDefault(); point(next) }
  }
  return p
}

function show() {
  const samples = run.questions[$("questions").value] ?? [], s = samples[$("at").value] ?? samples.at(-1)
  $("sample").hidden = !s
  if (!s) return
  const top = Object.fromEntries(signals.map(({name}) => [name, Math.max(...s.completions.flatMap(c => c.signals[name] ?? 0))]))
  const clip = data.clips[`${run.options.videos}/${s.path}`] ?? "no frames"
  point(null)
  $("at").max = samples.length - 1
  $("step").textContent = `${s.step} (${+$("at").value + 1} of ${samples.length})`
  $("frames").replaceChildren(...clip.map?.((src, i) => el("img", {src, alt: `frame ${i + 1} of ${clip.length}`})) ?? [clip])
  $("question").replaceChildren(el("h3", {}, String(s.problem)), [s.options ?? []].flat().join("\n"),
    el("p", {className: "soft"}, `answer: ${String(s.solution).replace(/<.?answer>/g, "")}\n${s.path}`))
  $("texts").replaceChildren(...s.completions.map((c, g) => el("article", {}, el("h3", {}, `completion ${g + 1} `, el("span", {className: "soft"},
    `reward ${digits(c.reward)} (accuracy ${digits(c.accuracy)}, format ${digits(c.format)}), advantage ${digits(c.advantages)}, ` +
    `${c.tokens.length} tokens, ${c.tokens.filter((_, t) => signals.some(s => c.chosen[s.name]?.[t])).length} selected`)), text(c, top))))
}

function choose() {                     // another run: the same question, if it has it
  const before = $("questions").value
  run = data.runs[$("run").value]
  $("questions").replaceChildren(...Object.entries(run.questions).map(([value, [s, ...more]]) => el("option", {value},
    `${s.watched ? "watched" : "step " + s.step}: ${String(s.problem).slice(0, 90)}` + (more.length ? ` (${more.length + 1} steps)` : ""))))
  if (before in run.questions) $("questions").value = before
  show()
}
const toggle = (flip, ...inside) => el("button", {type: "button", ariaPressed: "true", onclick() {
  this.ariaPressed = String(flip())
  document.querySelectorAll(".text span").forEach(paint)
}}, ...inside)
$("toggles").append(...signals.map(s => toggle(() => s.on = !s.on, swatch(s.i), s.name)), toggle(() => only = !only, "selected only"))
$("run").append(...data.runs.map((r, value) => el("option", {value}, r.name)))
$("run").onchange = choose
$("questions").onchange = $("at").oninput = show
choose()

// curves: a panel for each column, a line for each run
const svg = (tag, attributes, ...inside) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const key in attributes) e.setAttribute(key, attributes[key])
  e.append(...inside)
  return e
}
const steps = data.runs.flatMap(r => r.log.step), first = Math.min(...steps), last = Math.max(...steps)
function range(names) {                 // without the highest and lowest 0.5%: a spike would flatten the rest
  const ys = names.flatMap(name => data.runs.flatMap(r => r.log[name] ?? [])).filter(y => y != null).sort((a, b) => a - b)
  const cut = Math.floor(ys.length / 200), low = ys[cut], high = ys[ys.length - 1 - cut]
  return low < high ? [low, high] : [low - 0.5, low + 0.5]
}
function chart(name, [low, high]) {
  const x = step => 38 + 254 * (step - first) / (last - first || 1), y = value => 106 - 98 * (value - low) / (high - low)
  const unit = 10 ** Math.floor(Math.log10((high - low) / 2)), tick = [5, 2, 1].map(m => m * unit).find(m => (high - low) / m >= 2)
  const picture = svg("svg", {viewBox: "0 0 300 124", role: "img", "aria-label": name})
  for (let at = Math.ceil(low / tick); at * tick <= high; at++) picture.append(
    svg("path", {d: `M38 ${y(at * tick)}h254`, stroke: "var(--line)"}),
    svg("text", {x: 33, y: y(at * tick) + 3, "text-anchor": "end"}, digits(at * tick)))
  picture.append(svg("text", {x: 38, y: 121}, first), svg("text", {x: 292, y: 121, "text-anchor": "end"}, `step ${last}`))
  data.runs.forEach((r, i) => [[r.log, {opacity: 0.3}], [r.smooth, {"stroke-width": 1.8}]].forEach(([{[name]: ys = []}, more]) =>
    picture.append(svg("path", {stroke: colour(i), ...more, d: ys.map((v, t) => v == null ? "" :
      `${ys[t - 1] == null ? "M" : "L"}${x(r.log.step[t]).toFixed(1)} ${y(v).toFixed(1)}h0`).join("")}))))
  return el("figure", {}, el("figcaption", {}, name, el("span", {className: "soft"},
    data.runs.map(r => digits(r.smooth[name]?.at(-1))).join(" · "))), picture)
}
$("legend").append(...data.runs.flatMap((r, i) => [swatch(i), r.name]))
$("curves").append(...Object.entries(data.groups).flatMap(([title, names]) => {
  const same = /^(Share|Seconds)/.test(title) && range(names)
  return [el("h3", {}, title), el("div", {className: "grid"}, ...names.map(name => chart(name, same || range([name]))))]
}))
$("constant").textContent = "Constant: " + data.constant.join(", ")

$("tables").append(...data.tables.filter(([, , , rows]) => rows.length).map(([title, note, head, rows]) => {
  const cells = (tag, row) => el("tr", {}, ...row.map(cell => el(tag, {}, String(cell))))
  return el("details", {open: title !== "All options", className: /ptions|Pos/.test(title) ? "wide" : ""}, el("summary", {}, title),
    el("p", {className: "soft"}, note), el("table", {}, cells("th", head), ...rows.map(row => cells("td", row))))
}))
document.title = document.querySelector("h1").textContent = `Video-KTR: ${data.runs.map(r => r.name).join(", ")}`
$("about").textContent = data.runs.map(r => `${r.name}: ${r.steps} steps, ${r.samples.length} samples`).join(" · ")
$("notes").append(...data.notes.map(note => el("li", {}, note)))
$("notes").hidden = !data.notes.length
</script>
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that ktr.py wrote")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    arguments = parser.parse_args()
    out, content = arguments.out or arguments.runs[0] / "report.html", content_of(arguments.runs)
    out.write_text(build(content))
    print(out)
    plot(content, out)
