"""Scores: what a file of answers is worth. Tables, published figures, paired differences.

No model is needed: evaluate.py prints these after answering, and for `--rescore` and `--compare`.
FACTS is benchmarks.json: protocols, their prompts, benchmarks' sizes and splits, published figures.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

from data import read_json
from rewards import extract_answer, grade

FACTS = json.loads(Path(__file__).with_name("benchmarks.json").read_text("utf-8"))
PROTOCOLS, BENCHMARKS = FACTS["protocols"], FACTS["benchmarks"]


def benchmark_of(path: str) -> str:
    """The benchmark that a file's name speaks of; "custom" for any other."""
    name = Path(path).stem.lower().replace("-", "").replace("_", "")
    return next((b for b in BENCHMARKS if b.replace("-", "") in name), "custom")


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def graded(row: dict) -> tuple[float, float, bool]:
    """(strict, lenient, parsed) of a row of predictions."""
    return grade(row["output"], row["solution"], row["problem_type"], row.get("options") or [])


def summarise(rows: list[dict]) -> dict:
    """Counts, scores, the strict score's interval, and what always the commonest letter scores."""
    grades = [graded(row) for row in rows if "unreadable" not in row]
    n = len(grades)
    strict, lenient = (sum(g[i] for g in grades) / max(1, n) for i in (0, 1))
    choices = [row["solution"] for row in rows if row["problem_type"] == "multiple choice"]
    letters = Counter(extract_answer(solution) or solution for solution in choices)
    letter, most = letters.most_common(1)[0] if letters else (None, 0)
    return {"n": n, "strict": strict, "lenient": lenient, "interval": wilson(strict, n),
            "unparsed": sum(not g[2] for g in grades), "unreadable": len(rows) - n,
            "always": [letter, most / max(1, len(choices))]}


def part_of(row: dict, split: dict) -> str | None:
    """The part of a split (benchmarks.json) that a row belongs to; None if it does not say."""
    if "fields" in split:
        return next((str(row[name]) for name in split["fields"] if row.get(name)), None)
    if "folders" in split:
        folder = Path(row.get("path", "")).parent.name
        return next((part for part, names in split["folders"].items() if folder in names), None)
    return dict(enumerate(split["parts"])).get(row["row"] // split["rows_each"])


def published(benchmark: str, settings: dict) -> str:
    """What exactly this benchmark, protocol and number of frames should score, or why unknown."""
    if settings.get("protocol") not in PROTOCOLS:
        return "published: none, since the file does not say how it was made"
    if settings["benchmark"] != benchmark:
        return f"published: none, since these are answers to {settings['benchmark']}"
    defaults = PROTOCOLS[settings["protocol"]]["options"]
    changed = [key for key in defaults if key != "frames" and settings.get(key) != defaults[key]]
    if changed:
        return f"published: none, since the protocol has other {', '.join(changed)}"
    known = {row["model"]: "not known" for row in FACTS["published"]}
    for row in FACTS["published"]:
        if row["protocol"] == settings["protocol"] and row["frames"] == settings["frames"]:
            known[row["model"]] = row["accuracy"].get(benchmark, "not known")
    figures = ", ".join(f"{model} {figure}" for model, figure in known.items())
    return f"published at {settings['frames']} frames (to check first): {figures}"


def report(rows: list[dict], benchmark: str, settings: dict) -> dict:
    """Print the table of a benchmark, all and by its usual splits; returns it."""
    table, size = {"all": summarise(rows)}, BENCHMARKS[benchmark]["size"]
    for name, split in BENCHMARKS[benchmark]["splits"].items():
        parts = defaultdict(list)
        for row in rows:
            parts[part_of(row, split)].append(row)
        parts.pop(None, None)
        table |= {f"{name}: {part}": summarise(parts[part]) for part in sorted(parts)}
    width = max(len(name) for name in table)
    print(f"{'':{width}}      n  strict  (95% interval)  lenient  unparsed  unreadable")
    for name, s in table.items():
        strict, lenient, low, high = (100 * x for x in (s["strict"], s["lenient"], *s["interval"]))
        print(f"{name:{width}}  {s['n']:5d}  {strict:5.1f}%  ({low:4.1f} to {high:5.1f})"
              f"  {lenient:6.1f}%  {s['unparsed']:8d}  {s['unreadable']:10d}")
    letter, share = table["all"]["always"]
    if letter:
        print(f"always answering {letter}: {100 * share:.1f}% of the multiple choice questions")
    if settings.get("protocol") in PROTOCOLS:
        values = ", ".join(f"{key} {settings.get(key)}" for key in FACTS["options"])
        score = PROTOCOLS[settings["protocol"]]["score"]
        print(f"protocol {settings['protocol']}, which counts the {score} score: {values}")
    if size:
        print(published(benchmark, settings))
        print(f"{len(rows)} questions; the whole benchmark has {size}")
    return table


def read_predictions(path: str) -> tuple[dict, list[dict]]:
    """(settings, rows) of a file of ours, or of others' in Video-R1's form, which has no settings:
    a list, {"results": [..]}, or one object a line. ValueError where there is nothing to score."""
    file = Path(path, "predictions.jsonl") if Path(path).is_dir() else Path(path)
    try:
        rows = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError:
        rows = read_json(file)
    rows = rows.get("results", [rows]) if isinstance(rows, dict) else rows
    settings, answers, scores = {}, {}, file.with_name("scores.json")
    if file.name == "predictions.jsonl" and scores.is_file():
        settings = json.loads(scores.read_text("utf-8")).get("settings", {})
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if isinstance(row, dict) and "settings" in row:
            settings = row["settings"]
            continue
        text = row if isinstance(row, dict) else {}
        texts = [text.get("solution"), "" if "unreadable" in text else text.get("output")]
        if not all(isinstance(value, str) for value in texts):
            raise ValueError(f"{file}: row {i} has no text under 'output' and 'solution'")
        row = {"row": i, "problem_type": "multiple choice", **row}
        answers[row["row"]] = row               # a clip that could be read later replaces its note
    return settings, list(answers.values())


def compare(first: str, second: str) -> dict:
    """Print and return the scores of two files over the same questions, A - B, paired.

    d = score_A - score_B of a question. Questions about one clip are not independent, so the
    error is clustered: 1.96 sqrt(K/(K-1) sum over K clips of (sum of d - mean d)^2) / n.
    """
    (ours, a), (theirs, b) = read_predictions(first), read_predictions(second)
    others, pairs, table = {row["row"]: row for row in b}, [], {}
    for row in a:
        other = others.get(row["row"], {"unreadable": "not there"})
        known = [key for key in ("problem", "solution") if key in row and key in other]
        if any(row[key] != other[key] for key in known):
            raise ValueError(f"row {row['row']}: other questions in {first} than in {second}")
        if "unreadable" not in row and "unreadable" not in other:
            pairs.append((row.get("path", row["row"]), graded(row), graded(other)))
    n, K = len(pairs), len({clip for clip, *_ in pairs})
    if K < 2:
        raise ValueError(f"{first} and {second}: fewer than two clips that both answered")
    print(f"{n} questions about {K} clips that both answered, of {len(a)} in A and {len(b)} in B")
    for i, name in enumerate(("strict", "lenient")):
        mean, clips = sum(x[i] - y[i] for _, x, y in pairs) / n, defaultdict(float)
        for clip, x, y in pairs:
            clips[clip] += x[i] - y[i] - mean
        half = 1.96 * math.sqrt(K / (K - 1) * sum(d * d for d in clips.values())) / n
        table[name] = {"difference": mean, "interval": (mean - half, mean + half),
                       "a": sum(x[i] for _, x, _ in pairs) / n,
                       "b": sum(y[i] for _, _, y in pairs) / n}
        print(f"{name:8}A {table[name]['a']:.1%}, B {table[name]['b']:.1%}, A - B {mean:+.1%} "
              f"({mean - half:+.1%} to {mean + half:+.1%})")
    for key in sorted(ours | theirs):
        if ours.get(key) != theirs.get(key):
            print(f"they differ in {key}: A {ours.get(key)}, B {theirs.get(key)}")
    return {"n": n, **table}
