"""Evaluation: every setting recorded, every answer kept, every doubtful parse visible.

    python evaluate.py --model M --benchmark mmvu --data eval_mmvu.json --videos DIR --frames 32
    torchrun --nproc_per_node 8 evaluate.py ...                     the same over a node's GPUs
    python evaluate.py --rescore A/predictions.jsonl                scores again, without a model
    python evaluate.py --compare A/predictions.jsonl B/predictions.jsonl      paired difference
    python evaluate.py --model M --video clip.mp4 --question "What happens?"

`--protocol` is a known way of measuring: benchmarks.json holds them, and the published figures.
Answers go to OUT/predictions.jsonl as they are made; starting again continues, with any number of
processes, and refuses other settings. `rewards.grade` defines the strict and the lenient score.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Limits, Prompts, Skipped, check_record, load_media, read_json
from engine.workers import loader
from policy import load, sample
from prompt import QUESTION_EVAL, BadRecord, Prompt, name_of, question_text
from rewards import by_letter, extract_answer, grade
from run.distributed import distributed, leave

FACTS = json.loads(Path(__file__).with_name("benchmarks.json").read_text("utf-8"))
PROTOCOLS, BENCHMARKS = FACTS["protocols"], FACTS["benchmarks"]


# --------------------------------------------------------------------------------------- questions
def worded(record: dict, protocol: str, benchmark: str) -> dict:
    """The record with "whole_prompt", where the protocol has its own words for the benchmark."""
    by_benchmark = PROTOCOLS[protocol]["prompts"]
    words = FACTS["prompts"].get(by_benchmark.get(benchmark, by_benchmark["default"]))
    if words is None:                           # QUESTION_EVAL and TYPE of prompt.py
        return record
    options = [words["option"].format(letter=letter, text=text)
               for letter, text in by_letter(record["options"]).items()]
    question = record["problem"].strip().removesuffix("Options:").strip()
    template = words["text"] if options else words.get("without_options", words["text"])
    prompt = template.format(question=question, options=words["between"].join(options))
    return {**record, "whole_prompt": prompt}


def read_questions(path: str, protocol: str, benchmark: str) -> list[dict]:
    """Every row of a list, checked and worded. ValueError for a bad row: none may be left out."""
    return [worded(check_record(row, index), protocol, benchmark)
            for index, row in enumerate(read_json(path))]


class Clips(Prompts):
    """index -> [Prompt or Skipped]: all records of one clip (self.records[index]), decoded once."""

    def __getitem__(self, index: int) -> list[Prompt | Skipped]:
        media, made, limits = None, [], self.limits
        for record in self.records[index]:
            try:
                media = media or load_media(record, self.root, limits, self.processor.vision)
                made.append(
                    self.processor.prompt(record, *media, limits.max_prompt, self.template))
            except BadRecord as error:
                made.append(Skipped(record, str(error)))
        return made

    def lost(self, index: int, reason: str) -> list[Skipped]:
        """What stands for a clip whose decoding process died or hung."""
        return [Skipped(r, f"{name_of(r)}: {r['path']}: {reason}") for r in self.records[index]]


# --------------------------------------------------------------------------------------- answering
def answers(records: list[dict], a: argparse.Namespace, device: torch.device, rank: int = 0,
            world: int = 1) -> Iterator[list[dict]]:
    """This rank's records, `--batch` at a time, with "output", or "unreadable" and why. A question
    draws its random numbers by its row. A prompt above the limit of tokens counts as unreadable."""
    model, processor = load(a.model, device, getattr(torch, a.dtype))
    limits = Limits(a.frames, a.fps, a.max_pixels, max_prompt=32768, seconds=a.seconds)
    clips = [list(group) for _, group in groupby(records, lambda record: record["path"])]
    clips = Clips(clips, a.videos, processor, limits, QUESTION_EVAL)
    mine = range(rank, len(clips), world)
    bar = tqdm(loader(clips, mine, a.workers), total=len(mine), unit="clip", disable=rank > 0)
    questions = (question for clip in bar for question in clip)
    while batch := list(islice(questions, a.batch)):
        prompts = [question for question in batch if isinstance(question, Prompt)]
        rows = [{**question.record, "unreadable": question.reason}
                for question in batch if isinstance(question, Skipped)]
        seeds = [prompt.record["row"] for prompt in prompts]
        groups = prompts and sample(model, prompts, 1, a.max_new_tokens, seeds=seeds,
                                    temperature=a.temperature, top_p=a.top_p)
        for prompt, group in zip(prompts, groups):
            ids = group.ids[0, :group.lengths[0]]
            output = processor.tokenizer.decode(ids, skip_special_tokens=True)
            rows.append({**prompt.record, "output": output})
        yield rows


def one_question(a: argparse.Namespace) -> None:
    """Print the answer to `--question` about `--video`, a clip or a still image."""
    image = Path(a.video).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    record = {"problem": a.question, "problem_type": "free-form", "options": [], "row": 0,
              "data_type": "image" if image else "video", "path": a.video}
    [[row]] = answers([worded(record, a.protocol, "custom")], a, distributed()[2])
    if "unreadable" in row:
        raise SystemExit(f"error: {row['unreadable']}")
    print(row["output"])


def taken_up(path: Path, settings: dict) -> set[int]:
    """Rows that `path` holds answers to. A file of other settings is refused (SystemExit), a line
    that a kill cut short is dropped, and a new file begins with its settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    if path.stat().st_size == 0:
        path.write_text(json.dumps({"settings": settings}) + "\n")
    old, rows = read_predictions(path)
    changed = ", ".join(name for name in settings if settings[name] != old.get(name))
    if changed:
        raise SystemExit(f"error: {path} has other settings ({changed}); choose another --out")
    return {row["row"] for row in rows if "output" in row}


def run(a: argparse.Namespace) -> dict | None:
    """Answer what is not answered yet; rank 0 prints, keeps and returns the table."""
    records = read_questions(a.data, a.protocol, a.benchmark)
    if not any(os.path.isfile(Path(a.videos, record["path"])) for record in records):
        raise SystemExit(f"error: {a.videos} holds none of the clips that {a.data} names")
    asked = json.dumps([[r, question_text(r, QUESTION_EVAL)] for r in records]).encode()
    weights = sorted(Path(a.model).glob("*.safetensors"))
    settings = {"model": a.model, "weights_written": [file.stat().st_mtime for file in weights],
                "questions": hashlib.sha256(asked).hexdigest()[:16], "dtype": a.dtype,
                "benchmark": a.benchmark, "protocol": a.protocol,
                "score that counts": PROTOCOLS[a.protocol]["score"],
                **{name: getattr(a, name) for name in FACTS["options"]}}
    rank, world, device = distributed(timedelta(hours=24))      # for ranks with longer clips
    path = Path(a.out, "predictions.jsonl")
    done = [taken_up(path, settings) if rank == 0 else None]
    if world > 1:                               # one reading for all, before anyone writes
        dist.broadcast_object_list(done)
    todo = [record for record in records if record["row"] not in done[0]]
    todo.sort(key=lambda record: record["path"])
    for rows in answers(todo, a, device, rank, world) if todo else ():
        with open(path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)    # keeps the lines of several processes apart
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if world > 1:
        dist.barrier()
    if rank == 0:
        table = report(read_predictions(path)[1], a.benchmark, settings)
        scores = {"settings": settings, "scores": table}
        Path(a.out, "scores.json").write_text(json.dumps(scores, indent=1))
        return table


# ------------------------------------------------------------------------------------------ scores
def read_predictions(path: str | Path) -> tuple[dict, list[dict]]:
    """(settings, rows with "grade") of a file of ours, or of others' in Video-R1's form, which has
    no settings: a list, or one object a line. ValueError where there is nothing to score."""
    settings, latest = {}, {}
    for number, row in enumerate(read_json(path)):
        fields = row if isinstance(row, dict) else {}
        if "settings" in fields:
            settings = fields["settings"]
            continue
        texts = fields.get("output", fields.get("unreadable")), fields.get("solution")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: row {number} has no text under 'output' and 'solution'")
        row = {"row": number, "problem_type": "multiple choice", "options": [], **row}
        if "unreadable" not in row:
            row["grade"] = grade(row["output"], row["solution"], row["problem_type"],
                                 row["options"] or [])
        latest[row["row"]] = row                # a clip that could be read later replaces its note
    return settings, list(latest.values())


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def summarise(rows: list[dict]) -> dict:
    """Counts, scores, the strict score's interval, and what always the commonest letter scores."""
    grades = [row["grade"] for row in rows if "grade" in row]
    n = len(grades)
    strict, lenient, parsed = (sum(g[i] for g in grades) for i in range(3))
    letters = [extract_answer(row["solution"]) or row["solution"] for row in rows
               if row["problem_type"] == "multiple choice"]
    letter = max(sorted(set(letters)), key=letters.count, default=None)
    return {"n": n, "strict": strict / max(1, n), "lenient": lenient / max(1, n),
            "interval": wilson(strict / max(1, n), n), "unparsed": n - parsed,
            "unreadable": len(rows) - n,
            "always": [letter, letters.count(letter) / max(1, len(letters))]}


def part_of(row: dict, split: dict) -> str | None:
    """The part of a split (benchmarks.json) that a row belongs to; None if it does not say."""
    if "folders" in split:
        return split["folders"].get(Path(row.get("path", "")).parent.name)
    return next((str(row[name]) for name in split["fields"] if row.get(name)), None)


def published(benchmark: str, settings: dict) -> dict[str, float]:
    """{model: its published score}; empty unless it was measured with exactly these settings."""
    protocol = PROTOCOLS.get(settings.get("protocol"), {"options": {}})
    frames = settings.get("frames")
    needed = protocol["options"] | {"frames": frames, "benchmark": benchmark}
    if any(settings.get(name) != value for name, value in needed.items()):
        return {}
    return protocol.get("published", {}).get(str(frames), {}).get(benchmark, {})


def report(rows: list[dict], benchmark: str, settings: dict) -> dict:
    """Print the table of a benchmark, all and by its usual splits; returns it."""
    table = {"all": summarise(rows)}
    for name, split in BENCHMARKS[benchmark]["splits"].items():
        parts = defaultdict(list)
        for row in rows:
            parts[part_of(row, split)].append(row)
        parts.pop(None, None)
        table |= {f"{name}: {part}": summarise(parts[part]) for part in sorted(parts)}
    for name, s in table.items():
        if s["n"] == 0:                         # nothing could be read: no score
            print(f"{name:24}     0 answers; {s['unreadable']} unreadable")
            continue
        low, high = s["interval"]
        print(f"{name:24} {s['n']:5d} answers: strict {s['strict']:6.1%} "
              f"({low:6.1%} to {high:6.1%}), lenient {s['lenient']:6.1%}, "
              f"{s['unparsed']} unparsed; {s['unreadable']} unreadable")
    letter, share = table["all"]["always"]
    print(f"always answering {letter}: {share:.1%} of the multiple choice questions")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    size = BENCHMARKS[benchmark]["size"] or "no fixed number"
    print(f"{len(rows)} questions; the whole benchmark has {size}")
    figures = [f"{model} {score}" for model, score in published(benchmark, settings).items()]
    print("published figures:", ", ".join(figures) or "none for these settings")
    if benchmark in PROTOCOLS["video-ktr"]["stock"]:
        print("a stock Qwen2.5-VL 7B: none that says its frames and prompt (benchmarks.json)")
    return table


def compare(first: str, second: str) -> dict:
    """Print and return the scores of two files over the questions that both answered, paired.

    d = score_A - score_B of a question. Questions about one clip are not independent, so the
    error is clustered: 1.96 sqrt(K/(K-1) sum over K clips of (sum of d - mean d)^2) / n.
    """
    (ours, a), (theirs, b) = read_predictions(first), read_predictions(second)
    answered = [{(row["row"], row.get("problem")): row for row in rows if "grade" in row}
                for rows in (a, b)]
    pairs = [(row, answered[1][key]) for key, row in answered[0].items() if key in answered[1]]
    paths = [str(row.get("path", row["row"])) for row, _ in pairs]
    clips, of_clip = np.unique(paths, return_inverse=True)
    n, K, table = len(pairs), len(clips), {"n": len(pairs)}
    if K < 2:
        raise ValueError(f"{first} and {second}: fewer than two clips that both answered")
    print(f"{n} questions about {K} clips that both answered, of {len(a)} in A and {len(b)} in B")
    for i, name in enumerate(("strict", "lenient")):
        scores = np.array([(x["grade"][i], y["grade"][i]) for x, y in pairs])       # (n, 2)
        (mean_a, mean_b), d = scores.mean(0).tolist(), scores[:, 0] - scores[:, 1]
        sums = np.bincount(of_clip, d - d.mean())                                   # (K,)
        mean, half = d.mean(), 1.96 * math.sqrt(K / (K - 1) * (sums ** 2).sum()) / n
        table[name] = {"a": mean_a, "b": mean_b, "difference": mean,
                       "interval": (mean - half, mean + half)}
        print(f"{name:8}A {mean_a:.1%}, B {mean_b:.1%}, A - B {mean:+.1%} +- {half:.1%}")
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            print(f"they differ in {name}: A {ours.get(name)}, B {theirs.get(name)}")
    return table


# ------------------------------------------------------------------------------------- the command
def main(a: argparse.Namespace) -> dict | None:
    if a.compare:
        return compare(*a.compare)
    if a.rescore:
        settings, rows = read_predictions(a.rescore)
        return report(rows, a.benchmark or settings.get("benchmark", "custom"), settings)
    return one_question(a) if a.video else run(a)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint folder, hub name, or random:7b")
    add("--data", help="the benchmark's list")
    add("--videos", default=".", help="the folder that its paths start from")
    add("--out", default="results", help="where predictions.jsonl and scores.json go")
    add("--benchmark", choices=BENCHMARKS, help="whose words, splits, published figures")
    add("--protocol", choices=PROTOCOLS, help="how to measure (default: video-ktr)")
    add("--direct", dest="protocol", action="store_const", const="direct")
    for name, about in FACTS["options"].items():
        kind = type(PROTOCOLS["video-ktr"]["options"][name])
        add(f"--{name}", type=kind, help=f"{about} (default: the protocol's)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--batch", type=int, default=32, help="questions decoded together")
    add("--workers", type=int, default=4, help="decoding processes per rank")
    add("--rescore", metavar="FILE", help="score these predictions; no model needed")
    add("--compare", nargs=2, metavar=("A", "B"), help="difference of two predictions files")
    add("--video", help="answer one --question about this clip or image")
    add("--question")
    a = parser.parse_args(arguments)
    given = [name for name in ("protocol", *FACTS["options"]) if getattr(a, name) is not None]
    if a.rescore or a.compare:
        if given:
            parser.error(f"--{given[0]} is what the file says")
        return a
    if not a.model or not (a.data and a.benchmark or a.video and a.question):
        parser.error("--model is needed, and --data and --benchmark, or --video and --question")
    a.protocol = a.protocol or "video-ktr"
    for name, value in PROTOCOLS[a.protocol]["options"].items():
        if name not in given:
            setattr(a, name, value)
    if min(a.frames / 2, a.max_pixels, a.max_new_tokens, a.batch, a.workers + 1) < 1 or a.fps <= 0:
        parser.error("at least 2 frames, 1 pixel, 1 new token, 1 question, 0 workers; fps above 0")
    if a.temperature < 0 or not 0 < a.top_p <= 1 or a.seconds not in ("one", "true"):
        parser.error("temperature >= 0, 0 < top_p <= 1, seconds one or true")
    return a


if __name__ == "__main__":
    try:
        main(parse())
        leave()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
