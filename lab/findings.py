"""What the studies found: every number of them that docs/results.md and README quote.

    python -m lab.findings              print all blocks, from the files of bench/results
    python -m lab.findings --write      and renew them in the documents, and docs/study.png

In a document a block stands between <!-- NAME --> and <!-- end -->. Differences are paired by seed,
+- is a 95% interval over seeds, p is Student's paired t with Holm's correction for all lines of a
column (or of a question). The questions were written down before the runs, with the difference that
each could find, by the deviations of an earlier study's pairs (bench/results/before.json).
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from lab import attribution_table, report
from lab.stats import detectable, holm, interval, p_value

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("docs/results.md", "README.md")
MAIN = ("GRPO", "random 45%", "random 36%", "Video-KTR", "visual")
RULES = (*MAIN, "visual+temporal", "VPPO", "PAPO", "T-GRPO", "TW-GRPO", "PGPO", "ToR", "VEPO",
         "VGPO", "PEPO", "Dr. GRPO", "DAPO", "entropy 80/20")       # the others are ablations
LONG = ("GRPO", "random 45%", "Video-KTR", "visual+temporal", "VPPO", "TW-GRPO", "PGPO", "ToR",
        "VEPO", "VGPO", "PEPO")
Pair = tuple[str, str]                                  # a rule and its control


def minus_grpo(rules: tuple[str, ...]) -> list[Pair]:
    return [(rule, "GRPO") for rule in rules if rule != "GRPO"]


# question: (study, seeds of its smallest pair, pairs)
QUESTIONS = {
    "Is any rule different from GRPO?": ("toy", 9, minus_grpo(RULES)),
    "Does Video-KTR beat random tokens, at its own share and above?": (
        "toy", 20, [("Video-KTR", "random 36%"), ("Video-KTR", "random 45%")]),
    "What do rules add where most tokens are fillers?": ("long", 8, minus_grpo(LONG)),
    "Is Video-KTR behind GRPO in the demonstration's 200 steps?": (
        "demonstration", 10, [("Video-KTR", "GRPO")]),
}
LOOKED_AT = {           # by kind of question, and drawn
    "toy": minus_grpo(MAIN),
    "demonstration": [("random 45%", "GRPO"), ("Video-KTR", "GRPO"), ("KTR 50%", "GRPO"),
                      ("KTR 50%", "Video-KTR")],
    "order": [("random 20%", "GRPO"), ("temporal", "GRPO"), ("visual", "GRPO"),
              ("temporal", "random 20%"), ("temporal", "visual")],
    "long": minus_grpo(LONG[:3]),
}
CLAIMS = [              # the paper's points at 32 frames: claim, points, study, rule, control
    ("all three signals beat GRPO", 2.3, "toy", "Video-KTR", "GRPO"),
    ("visual alone beats GRPO", 1.4, "toy", "visual", "GRPO"),
    ("temporal alone beats GRPO", 1.5, "toy", "temporal", "GRPO"),
    ("the same in the order world", 1.5, "order", "temporal", "GRPO"),
    ("all three beat visual alone", 0.9, "toy", "Video-KTR", "visual"),
    ("TW-GRPO beats GRPO", 0.8, "toy", "TW-GRPO", "GRPO"),
    ("ratio 10% beats GRPO", 1.7, "toy", "KTR 10%", "GRPO"),
    ("reversed frames are worse than shuffled (order world, temporal alone)", -0.2, "order",
     "temporal reversed", "temporal"),
]
ABLATIONS = {           # the paper's points at 32 frames, minus Video-KTR
    "KTR 10%": -0.6, "KTR 30%": -1.4, "KTR 40%": -0.4, "KTR 50%": -1.1,
    "KTR softmax weights": -0.9, "KTR sigmoid weights": -1.5, "KTR linear weights": -1.6,
    "KTR exponential weights": -2.3, "KTR L1 distance": -0.3, "KTR JS distance": -0.4,
    "KTR cosine distance": -0.5, "KTR L2 distance": -0.6, "KTR KL distance": -0.8,
    "KTR Hellinger distance": -1.0, "KTR half masked": -0.1, "KTR another clip": -0.5,
    "KTR reversed frames": -0.2, "KTR blocks of frames": -0.6,
}
PAPER_GRADIENT = ["the paper's 7B", "Video-KTR", "4.50", "1.51", "0.862", "0.572", "0.444 (0.553)"]


# ------------------------------------------------------------------------------------------ numbers
def differences(runs: dict, pairs: list[Pair], get) -> dict[Pair, list[float]]:
    """`get` of a rule's run minus that of its control's, for the seeds that both have."""
    found = {}
    for rule, control in pairs:
        mine, others = runs.get(rule, {}), runs.get(control, {})
        if seeds := sorted(set(mine) & set(others), key=int):
            found[rule, control] = [get(mine[s]) - get(others[s]) for s in seeds]
    return found


def compare(runs: dict, pairs: list[Pair], measure: str = "accuracy") -> tuple[dict, str]:
    """{pair: mean, half (95%), p (Holm, over these pairs), pairs}, and what this could find."""
    found = differences(runs, pairs, lambda run: run[measure])
    corrected = holm({pair: p_value(values) for pair, values in found.items()})
    rows = {}
    for pair, values in found.items():
        mean, half = interval(values)
        rows[pair] = {"mean": mean, "half": half, "p": corrected[pair], "pairs": len(values)}
    several = [values for values in found.values() if len(values) > 1]
    if not several:
        return rows, ""
    n = statistics.median_low(map(len, several))
    return rows, could_find(several, n, len(found))


def could_find(values: list[list[float]], n: int, among: int) -> str:
    """The true difference that n pairs find, by the median deviation of these differences: alone,
    and at Bonferroni's level, which Holm's is at worst; and this by the largest deviation."""
    deviations = [statistics.stdev(one) for one in values]
    median, largest = statistics.median(deviations), max(deviations)
    if among == 1:
        return f"a pair deviates by {median:.1f}; {n} pairs find {detectable(median, n):.1f}"
    corrected = [detectable(deviation, n, 0.05 / among) for deviation in (median, largest)]
    return (f"a pair deviates by {median:.1f} (median; largest {largest:.1f}); {n} pairs find "
            f"{detectable(median, n):.1f} alone, {corrected[0]:.1f} among {among} "
            f"({corrected[1]:.1f} for the noisiest)")


def plus_minus(mean: float, half: float, sign: str = "+") -> str:
    return f"{mean:{sign}.1f} +- {half:.1f}"


def probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def difference(row: dict | None) -> list[str]:
    """Two cells of a table; empty where there is no pair."""
    return [plus_minus(row["mean"], row["half"]), probability(row["p"])] if row else ["", ""]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, wide)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in wide) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------- blocks
def table_of(study: dict, names: tuple[str, ...] = ()) -> str:
    """A line for each rule (default: all): means over seeds, then its paired differences from GRPO
    and from random tokens."""
    runs = study["runs"]
    names = [name for name in names or runs if name in runs]
    controls = [name for name in ("GRPO", "random 45%", "random 20%") if name in runs][:2]
    asked = [(control, measure) for measure in ("accuracy", "learning")
             for control in controls if measure == "accuracy" or control == "GRPO"]
    found = {(control, measure): compare(
        runs, [(name, control) for name in names if name != control], measure)
        for control, measure in asked}

    head, rows = ["rule", "seeds", "tokens", "accuracy"], []
    for control, measure in asked:
        head += [*(["learning"] if measure == "learning" else []), f"minus {control}", "p"]
    for name in names:
        of = list(runs[name].values())
        mean = {key: interval([run[key] for run in of])
                for key in ("accuracy", "learning", "share", "kl", "seconds")}
        row = [name, len(of), f"{mean['share'][0]:.0f}%", plus_minus(*mean["accuracy"], "")]
        for control, measure in asked:
            row += [plus_minus(*mean["learning"], "")] if measure == "learning" else []
            row += difference(found[control, measure][0].get((name, control)))
        kl = f"{mean['kl'][0]:.3f}" if mean["kl"][0] else ""       # beta 0: not measured
        rows.append([*row, kl, f"{mean['seconds'][0]:.0f}"])
    notes = [f"The start's accuracy is {study['start']['accuracy']:.1f}."]
    notes += [f"{measure} minus {control}: {note}."
              for (control, measure), (_, note) in found.items() if note]
    return markdown([*head, "KL", "seconds"], rows) + "\n\n" + " ".join(notes)


def ablations_table(study: dict) -> str:
    """What is no rule of its own, minus GRPO and Video-KTR, beside the paper's difference: of
    three seeds or more, since two tell nothing."""
    runs, rows = study["runs"], []
    names = [name for name in runs if name not in RULES and len(runs[name]) > 2]
    found = {control: compare(runs, [(name, control) for name in names])
             for control in ("GRPO", "Video-KTR")}
    for name in names:
        of = list(runs[name].values())
        row = [name, len(of), f"{statistics.mean(run['share'] for run in of):.0f}%",
               plus_minus(*interval([run["accuracy"] for run in of]), "")]
        for control, (by_pair, _) in found.items():
            row += difference(one := by_pair.get((name, control)))
        row += ["", ""] if not one or name not in ABLATIONS else [
            f"{ABLATIONS[name]:+.1f}", verdict(one["mean"], one["half"], ABLATIONS[name])]
        rows.append(row)
    head = ["rule", "seeds", "tokens", "accuracy", "minus GRPO", "p", "minus Video-KTR", "p",
            "published", "verdict"]
    notes = [f"accuracy minus {control}: {note}." for control, (_, note) in found.items() if note]
    return markdown(head, rows) + "\n\n" + " ".join(notes)


def kinds_table(study: dict, pairs: list[Pair]) -> str:
    """Accuracy by kind of question: the start's, GRPO's, then paired differences."""
    runs, start = study["runs"], study["start"]["kinds"]
    rows = [["the start", *(f"{start[kind]:.1f}" for kind in start)]]
    if kinds := [run["kinds"] for run in runs.get("GRPO", {}).values()]:
        means = [interval([of[kind] for of in kinds]) for kind in start]
        rows.append(["GRPO", *(plus_minus(*mean, "") for mean in means)])
    by_kind = [differences(runs, pairs, lambda run: run["kinds"][kind]) for kind in start]
    for rule, control in by_kind[0]:
        rows.append([f"{rule} minus {control}",
                     *(plus_minus(*interval(found[rule, control])) for found in by_kind)])
    return markdown(["accuracy", *start], rows)


def plan_table(before: dict) -> str:
    """What each question could find, by the earlier study's pairs; the toy's for what it lacked."""
    rows = []
    for question, (study, n, pairs) in QUESTIONS.items():
        known = differences(before["studies"].get(study, before["studies"]["toy"]), pairs,
                            lambda run: run["accuracy"])
        values = [found for found in known.values() if len(found) > 2]
        rows.append([question, study, len(pairs), could_find(values, n, len(pairs))])
    return markdown(["question", "study", "comparisons", "before the runs"], rows)


def answers_table(studies: dict) -> str:
    """Differences with p < 0.05, corrected for the question's comparisons; of one or two, all."""
    rows = []
    for question, (name, _, pairs) in QUESTIONS.items():
        found, note = compare(studies[name]["runs"], pairs) if name in studies else ({}, "")
        told = [f"{rule} minus {control} {plus_minus(row['mean'], row['half'])} "
                f"(p {probability(row['p'])}, {row['pairs']})"
                for (rule, control), row in found.items() if row["p"] < 0.05 or len(found) < 3]
        if len(told) < len(found):
            told.append(f"no difference seen: {len(found) - len(told)} of {len(found)}")
        rows.append([question, name, "; ".join(told) or "no runs yet", note])
    return markdown(["question", "study", "found (p, pairs)", "could find"], rows)


def verdict(mean: float, half: float, published: float) -> str:
    """By the 95% interval, not corrected. Points of a toy are not points of a benchmark: only the
    sign can be told."""
    if not abs(mean) > half:
        return "not seen"
    return "same sign" if mean * published > 0 else "opposite sign"


def claims_table(studies: dict) -> str:
    rows = []
    for claim, published, study, rule, control in CLAIMS:
        found, _ = compare(studies.get(study, {"runs": {}})["runs"], [(rule, control)])
        for row in found.values():
            ours = f"{plus_minus(row['mean'], row['half'])} ({row['pairs']})"
            rows.append([claim, f"{published:+.1f}", ours,
                         verdict(row["mean"], row["half"], published)])
    return markdown(["claim", "published", "ours (pairs)", "verdict"], rows)


def gradients_table(looks: dict) -> str:
    rows = []
    for world, found in looks["gradients"].items():
        variance = found["loss variance"]
        for rule in ("Video-KTR", "random 45%"):
            row = found["gradients"][rule]
            rows.append([world, rule, f"{row['key']:.2f}", f"{row['other']:.2f}",
                         f"{row['cosine key']:.3f}", f"{row['cosine other']:.3f}",
                         f"{variance[rule]:.3f} ({variance['GRPO']:.3f})"])
    return markdown(["at the start of", "rule", "norm: key tokens", "others",
                     "cosine with the whole: key", "others", "variance of the loss (GRPO's)"],
                    [*rows, PAPER_GRADIENT])


def made_table(files: dict) -> str:
    keys = ("runs", "commit", "date", "machine", "python", "torch", "transformers")
    rows = [[name, *(made.get(key, "") for key in keys)]
            for name, found in files.items() for made in found["made"]]
    return markdown(["file", *keys], rows)


def read_results(folder: Path) -> dict[str, dict]:
    """{study: its file}, and "looks"."""
    paths = [*sorted(folder.glob("study_*.json")), *folder.glob("looks.json")]
    return {path.stem.removeprefix("study_"): json.loads(path.read_text()) for path in paths}


def blocks_of(folder: Path = RESULTS) -> dict[str, str]:
    """{name: text}, of the files that are there."""
    files = read_results(folder)
    studies = {name: files[name] for name in LOOKED_AT if name in files}
    before = json.loads((folder / "before.json").read_text())
    blocks = {"plan": plan_table(before), "answers": answers_table(studies)}
    for name, study in studies.items():
        blocks[name] = table_of(study, RULES if name == "toy" else ())
        blocks[f"{name} kinds"] = kinds_table(study, LOOKED_AT[name])
    if (toy := studies.get("toy")) and set(toy["runs"]) - set(RULES):
        blocks["ablations"] = ablations_table(toy)
    blocks |= {"claims": claims_table(studies), "made": made_table(files)}
    if looks := files.get("looks"):
        attribution = attribution_table.text_of(looks["attribution"], 0.2)
        blocks |= {"gradients": gradients_table(looks), "attribution": f"```\n{attribution}\n```"}
    return blocks


def renewed(text: str, blocks: dict[str, str]) -> str:
    """A document with its blocks as they are now; one whose results are not there says so."""
    def block(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{blocks.get(match[1], 'No runs yet.')}\n<!-- end -->"
    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def draw(studies: dict[str, dict], page: Path) -> None:
    """Accuracy of training completions by step, a panel for each study, beside the page."""
    lines: dict[str, dict] = {}
    for study, pairs in LOOKED_AT.items():
        runs = studies.get(study, {"runs": {}})["runs"]
        for rule in (rule for rule in runs if any(rule in pair for pair in pairs)):
            curves = [run["curve"] for run in runs[rule].values()]
            steps = list(range(1, len(curves[0]) + 1))
            mean = report.over_seeds([
                {"log": {"step": steps, study: curve}, "smooth": {study: report.smooth(curve)},
                 "steps": len(steps), "notes": []} for curve in curves])
            line = lines.setdefault(rule, {
                "name": rule, "log": {"step": []}, "smooth": {}, "band": {}})
            line["log"]["step"] = max(line["log"]["step"], steps, key=len)
            for part in ("log", "smooth", "band"):
                line[part][study] = mean[part][study]
    report.plot(list(lines.values()), [name for name in LOOKED_AT if name in studies], page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the files")
    parser.add_argument("--write", action="store_true", help="renew the documents' blocks")
    a = parser.parse_args()
    blocks = blocks_of(a.results)
    for name, text in blocks.items():
        print(f"## {name}\n{text}\n")
    if a.write:
        for path in (ROOT / name for name in DOCUMENTS):
            path.write_text(renewed(path.read_text(), blocks))
        draw(read_results(a.results), ROOT / "docs" / "study.html")


if __name__ == "__main__":
    main()
