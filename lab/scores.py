"""What answers score: a benchmark's table, published figures, paired differences.

`grading.grade` defines the strict and the lenient score of an answer.
"""

import math
from collections import defaultdict
from pathlib import Path

from lab.predictions import read_predictions
from lab.protocols import BENCHMARKS, PROTOCOLS
from prompt import BadRecord
from rewards import extract_answer


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a mean p of n scores (Wilson 1927), inside [0, 1]; of none: all of it.
    Scores between 0 and 1 (regression) vary less than the p (1 - p) that it takes."""
    if n == 0:
        return 0.0, 1.0
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def paired(differences: list[tuple[float, str]]) -> tuple[float, float]:
    """(mean, half of its 95% interval) of (difference at a question, path of its clip).

    Questions about one clip are not independent, so the error of n questions is clustered:
    1.96 sqrt(K/(K-1) sum over K >= 2 clips of (sum of difference - mean)^2) / n.
    """
    n, of_clip = len(differences), defaultdict(float)
    mean = sum(difference for difference, _ in differences) / n
    for difference, path in differences:
        of_clip[path] += difference - mean
    K = len(of_clip)
    return mean, 1.96 * math.sqrt(K / (K - 1) * sum(x * x for x in of_clip.values())) / n


def summarise(rows: list[dict]) -> dict:
    """Counts, mean scores, the strict score's interval, and what the commonest letter alone would
    score on all multiple choice questions. An unreadable clip does not count as wrong."""
    answered = [row for row in rows if "grade" in row]
    n = len(answered)
    strict = sum(row["grade"][0] for row in answered) / max(1, n)
    lenient = sum(row["grade"][1] for row in answered) / max(1, n)
    unparsed = sum(not row["grade"][2] for row in answered)
    letters = [extract_answer(row["solution"]) or row["solution"].strip() for row in rows
               if row["problem_type"] == "multiple choice"]
    letter = max(sorted(set(letters)), key=letters.count, default="no letter")
    return {"n": n, "strict": strict, "interval": wilson(strict, n), "lenient": lenient,
            "unparsed": unparsed, "unreadable": len(rows) - n,
            "always": (letter, letters.count(letter) / max(1, len(letters)))}


def part_of(row: dict, split: dict) -> str | None:
    """The part of a split (benchmarks.json) that a row belongs to; None if it does not say."""
    folders, rows = split.get("folders", {}), split.get("rows", {})
    folder = Path(str(row["path"])).parent.name
    parts = [str(row[field]) for field in split.get("fields", ()) if row.get(field)]
    parts += [part for part, names in folders.items() if folder in names]
    parts += [part for part, (first, last) in rows.items() if first <= row["row"] <= last]
    return parts[0] if parts else None


def published_figures(settings: dict) -> dict[str, float]:
    """{model: its published score}; empty unless it was measured with exactly these settings."""
    protocol, frames = PROTOCOLS.get(settings.get("protocol")), settings.get("frames")
    if protocol is None:                        # of another program, or an older commit
        return {}
    needed = protocol["options"] | {"frames": frames}
    if any(settings.get(name) != value for name, value in needed.items()):
        return {}
    return protocol["published"].get(str(frames), {}).get(settings["benchmark"], {})


def report(settings: dict, rows: list[dict]) -> dict:
    """Print the table of a benchmark, all and by its usual splits; returns it."""
    benchmark, parts = BENCHMARKS[settings["benchmark"]], defaultdict(list)
    for row in rows:
        for name, split in benchmark["splits"].items():
            part = part_of(row, split)
            if part is not None:
                parts[f"{name}: {part}"].append(row)
    table = {"all": summarise(rows)} | {name: summarise(parts[name]) for name in sorted(parts)}
    for name, s in table.items():
        if s["n"] == 0:                         # nothing could be read: no score
            print(f"{name:40}     0 answers; {s['unreadable']} unreadable")
            continue
        low, high = s["interval"]
        print(f"{name:40} {s['n']:5d} answers: strict {s['strict']:6.1%} "
              f"({low:6.1%} to {high:6.1%}), lenient {s['lenient']:6.1%}, "
              f"{s['unparsed']} unparsed; {s['unreadable']} unreadable")
    split = benchmark.get("mean_of")            # the benchmark's custom
    types = [s for name, s in table.items() if name.startswith(f"{split}: ") and s["n"]]
    if len(types) > 1:
        strict, lenient = (sum(s[k] for s in types) / len(types) for k in ("strict", "lenient"))
        table["all"]["mean of types"] = [strict, lenient]
        print(f"mean of the {len(types)} types' means: strict {strict:.1%}, lenient {lenient:.1%}")
    letter, share = table["all"]["always"]
    print(f"always answering {letter}: {share:.1%} of the multiple choice questions")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    size = benchmark["size"] or "no fixed number"
    print(f"{len(rows)} questions; the whole benchmark has {size}")
    figures = [f"{model} {score}" for model, score in published_figures(settings).items()]
    print("published figures:", ", ".join(figures) or "none for these settings")
    return table


def difference(a: list[dict], b: list[dict]) -> dict | None:
    """A - B over the questions that both answered, {"n", score: {"difference", "interval"}}, with
    the paired interval; None if these are of fewer than two clips."""
    others = {(row["row"], row["problem"]): row["grade"] for row in b if "grade" in row}
    pairs = [(row["grade"], others[row["row"], row["problem"]], row["path"]) for row in a
             if "grade" in row and (row["row"], row["problem"]) in others]
    if len({path for *_, path in pairs}) < 2:
        return None
    table = {"n": len(pairs)}
    for i, name in enumerate(("strict", "lenient")):
        mean, half = paired([(x[i] - y[i], path) for x, y, path in pairs])
        table[name] = {"difference": mean, "interval": (mean - half, mean + half)}
    return table


def compare(first: str, second: str) -> dict:
    """Print and return the difference of two files' scores, and what else they differ in."""
    (ours, a), (theirs, b) = read_predictions(first), read_predictions(second)
    table = difference(a, b)
    if table is None:
        raise BadRecord(f"{first} and {second}: fewer than two clips that both answered")
    print(f"{table['n']} questions that both answered, of {len(a)} in A and {len(b)} in B")
    for name in ("strict", "lenient"):
        mean, (low, high) = table[name].values()
        print(f"{name:8} A - B {mean:+.1%} +- {(high - low) / 2:.1%}")
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            print(f"they differ in {name}: A {ours.get(name)}, B {theirs.get(name)}")
    return table
