"""Evaluation: every setting recorded, every answer kept, every doubtful parse visible.

    python evaluate.py --model M --benchmark mmvu --data eval_mmvu.json --videos DIR --frames 32
    torchrun --nproc_per_node 8 evaluate.py ...                     the same over a node's GPUs
    python evaluate.py --rescore A/predictions.jsonl                scores again, without a model
    python evaluate.py --compare A/predictions.jsonl B/predictions.jsonl      paired difference
    python evaluate.py --model M --video clip.mp4 --question "What happens?"

`--protocol` is a known way of measuring: benchmarks.json holds them, and the published figures.
Answers go to OUT/predictions.jsonl as they are made, below a line with the settings; starting again
continues, with any number of processes, and refuses other settings. `rewards.grade` defines the
strict and the lenient score. Answers of other programs in Video-R1's form are scored as well.
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

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import KNOWN, Limits, Prompts, Skipped, check_record, load_media, read_json
from engine.clips import is_picture
from engine.workers import loader
from policy import load, load_processor, sample
from prompt import QUESTION_EVAL, BadRecord, Prompt, name_of, question_text
from rewards import by_letter, extract_answer, grade
from run.distributed import distributed, leave

FACTS = json.loads(Path(__file__).with_name("benchmarks.json").read_text("utf-8"))
PROTOCOLS, BENCHMARKS = FACTS["protocols"], FACTS["benchmarks"]


# --------------------------------------------------------------------------------------- questions
def worded(record: dict, protocol: str, benchmark: str) -> dict:
    """The record with "whole_prompt": what the protocol asks, in its words for the benchmark."""
    by_benchmark = PROTOCOLS[protocol]["prompts"]
    name = by_benchmark.get(benchmark, by_benchmark["default"])
    if name == "prompt.py":
        return {**record, "whole_prompt": question_text(record, QUESTION_EVAL)}
    words = FACTS["prompts"][name]
    options = [words["option"].format(letter=letter, text=text)
               for letter, text in by_letter(record["options"]).items()]
    question = record["problem"].strip().removesuffix("Options:").strip()
    template = words["text"] if options else words.get("without_options", words["text"])
    prompt = template.format(question=question, options=words["between"].join(options))
    return {**record, "whole_prompt": prompt}


def read_questions(path: str, protocol: str, benchmark: str) -> list[dict]:
    """Every row of a list, checked and worded. BadRecord for a bad row: none may be left out."""
    return [worded(check_record(row, index), protocol, benchmark)
            for index, row in enumerate(read_json(path))]


class Clips(Prompts):
    """index -> [Prompt or Skipped]: all records of one clip (self.records[index]), decoded once."""

    def __getitem__(self, index: int) -> list[Prompt | Skipped]:
        media, made = None, []
        for record in self.records[index]:
            try:
                media = media or load_media(record, self.root, self.limits, self.vision)
                made.append(self.processor.prompt(record, *media, self.limits.max_prompt))
            except BadRecord as error:
                made.append(Skipped(record, str(error)))
        return made

    def lost(self, index: int, reason: str) -> list[Skipped]:
        """What stands for a clip whose decoding process died or hung."""
        return [Skipped(r, f"{name_of(r)}: {r['path']}: {reason}") for r in self.records[index]]


# --------------------------------------------------------------------------------------- answering
def answers(records: list[dict], a: argparse.Namespace, device: torch.device, rank: int,
            world: int) -> Iterator[list[dict]]:
    """This rank's records, `--batch` at a time, with "output", or "unreadable" and why. A question
    draws its random numbers by its row. A prompt above the limit of tokens counts as unreadable."""
    model, processor = load(a.model, device, getattr(torch, a.dtype))
    limits = Limits(a.frames, a.fps, a.max_pixels, max_prompt=32768, seconds=a.seconds)
    by_path = sorted(records, key=lambda record: record["path"])
    clips = [list(group) for _, group in groupby(by_path, lambda record: record["path"])]
    mine = range(rank, len(clips), world)
    made = loader(Clips(clips, a.videos, processor, limits), mine, a.workers)
    bar = tqdm(made, total=len(mine), unit="clip", disable=rank > 0)
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
    path = Path(a.videos, a.video)
    image = path.is_file() and is_picture(path)
    record = {"problem": a.question, "problem_type": "free-form", "options": [], "row": 0,
              "data_type": "image" if image else "video", "path": a.video}
    _, _, device = distributed()
    [[row]] = answers([worded(record, a.protocol, "custom")], a, device, rank=0, world=1)
    if "unreadable" in row:
        raise SystemExit(f"error: {row['unreadable']}")
    print(row["output"])


def settings_of(a: argparse.Namespace, records: list[dict]) -> dict:
    """What may not change while a file of answers grows."""
    asked = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    weights = sorted(Path(a.model).glob("*.safetensors"))
    named = ("model", "dtype", "benchmark", "protocol", *PROTOCOLS[a.protocol]["options"])
    return {**{name: getattr(a, name) for name in named}, "questions": asked[:16],
            "weights_written": [file.stat().st_mtime for file in weights],
            "score that counts": PROTOCOLS[a.protocol]["score"]}


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
    settings = settings_of(a, records)
    rank, world, device = distributed(timedelta(hours=24))      # for ranks with longer clips
    path = Path(a.out, "predictions.jsonl")
    done = [taken_up(path, settings) if rank == 0 else None]
    if world > 1:                               # one reading for all, before anyone writes
        dist.broadcast_object_list(done)
    todo = [record for record in records if record["row"] not in done[0]]
    for rows in answers(todo, a, device, rank, world) if todo else ():
        with open(path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)    # keeps the lines of several processes apart
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if world > 1:
        dist.barrier()
    if rank == 0:
        table = report(*read_predictions(path))
        scores = {"settings": settings, "scores": table}
        Path(a.out, "scores.json").write_text(json.dumps(scores, indent=1))
        return table


# ------------------------------------------------------------------------------------------ scores
def gradable(row: dict) -> bool:
    """Whether `grade` can take a row of predictions, with defaults for what others leave out."""
    if not (isinstance(row["options"], list) and isinstance(row["row"], int)):
        return False
    texts = [row.get("output", row.get("unreadable")), row.get("solution"), *row["options"]]
    return row["problem_type"] in KNOWN["problem_type"] and all(isinstance(t, str) for t in texts)


def read_predictions(path: str | Path) -> tuple[dict, list[dict]]:
    """(settings, rows with "grade") of a file that `run` wrote, or of others' in Video-R1's form,
    which do not say their settings ({}). BadRecord where there is nothing to grade."""
    rows, settings, latest = read_json(path), {}, {}
    if rows and isinstance(rows[0], dict) and "settings" in rows[0]:
        settings = rows.pop(0)["settings"]
    elif not rows:
        raise BadRecord(f"{path}: holds no predictions")
    for number, given in enumerate(rows):
        fields = given if isinstance(given, dict) else {}
        row = {"row": number, "path": number, "problem": "", "problem_type": "multiple choice",
               **fields, "options": fields.get("options") or []}
        if not gradable(row):
            raise BadRecord(f"{path}: row {number} is no prediction: its 'output' and 'solution' "
                            f"are texts, its options and problem_type as data.py knows them")
        if "output" in row:
            row["grade"] = grade(row["output"], row["solution"], row["problem_type"],
                                 row["options"])
        latest[row["row"]] = row                # a clip that could be read later replaces its note
    return settings, list(latest.values())


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
    score on all multiple choice questions. What is unreadable is not wrong."""
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


def published(settings: dict) -> dict[str, float]:
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
    letter, share = table["all"]["always"]
    print(f"always answering {letter}: {share:.1%} of the multiple choice questions")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    size = benchmark["size"] or "no fixed number"
    print(f"{len(rows)} questions; the whole benchmark has {size}")
    figures = [f"{model} {score}" for model, score in published(settings).items()]
    print("published figures:", ", ".join(figures) or "none for these settings")
    return table


def compare(first: str, second: str) -> dict:
    """Print and return the difference of two files' scores over the questions that both answered,
    with a paired interval; and what else they differ in. BadRecord if these are of one clip."""
    (ours, a), (theirs, b) = read_predictions(first), read_predictions(second)
    others = {(row["row"], row["problem"]): row["grade"] for row in b if "grade" in row}
    pairs = [(row["grade"], others[row["row"], row["problem"]], row["path"]) for row in a
             if "grade" in row and (row["row"], row["problem"]) in others]
    if len({path for *_, path in pairs}) < 2:
        raise BadRecord(f"{first} and {second}: fewer than two clips that both answered")
    print(f"{len(pairs)} questions that both answered, of {len(a)} in A and {len(b)} in B")
    table = {"n": len(pairs)}
    for i, name in enumerate(("strict", "lenient")):
        differences = [(x[i] - y[i], path) for x, y, path in pairs]
        mean, half = paired(differences)
        table[name] = {"difference": mean, "interval": (mean - half, mean + half)}
        print(f"{name:8} A - B {mean:+.1%} +- {half:.1%}")
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            print(f"they differ in {name}: A {ours.get(name)}, B {theirs.get(name)}")
    return table


# ------------------------------------------------------------------------------------- the command
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
    add("--frames", type=int, help="of a clip at most (default of these seven: the protocol's)")
    add("--fps", type=float, help="frames of a second at most")
    add("--max_pixels", type=int, help="of a frame at most")
    add("--max_new_tokens", type=int, help="of an answer at most")
    add("--temperature", type=float, help="of sampling; 0: the likeliest answer")
    add("--top_p", type=float, help="nucleus of sampling")
    add("--seconds", choices=["one", "true"], help="between temporal patches: docs/tokens.md")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--batch", type=int, default=32, help="questions decoded together")
    add("--workers", type=int, default=4, help="decoding processes per rank")
    add("--rescore", metavar="FILE", help="score these predictions; no model needed")
    add("--compare", nargs=2, metavar=("A", "B"), help="difference of two predictions files")
    add("--video", help="answer one --question about this clip or image")
    add("--question")
    a = parser.parse_args(arguments)
    if a.rescore or a.compare:
        for name in ("protocol", *PROTOCOLS["video-ktr"]["options"]):
            if getattr(a, name) is not None:
                parser.error(f"--{name} is what the file says")
        return a
    asked = a.question if a.video else a.data and a.benchmark
    if not (a.model and asked):
        parser.error("--model is needed, and --data and --benchmark, or --video and --question")
    a.protocol = a.protocol or "video-ktr"
    for name, value in PROTOCOLS[a.protocol]["options"].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    if min(a.frames / 2, a.max_pixels, a.max_new_tokens, a.batch, a.workers + 1) < 1:
        parser.error("at least 2 frames, 1 pixel, 1 new token, 1 question together, 0 workers")
    if a.fps <= 0 or a.temperature < 0 or not 0 < a.top_p <= 1:
        parser.error("fps above 0, temperature 0 or more, top_p above 0 and at most 1")
    return a


def main(a: argparse.Namespace) -> dict | None:
    if a.compare:
        return compare(*a.compare)
    if a.rescore:
        settings, rows = read_predictions(a.rescore)
        if "benchmark" in settings and a.benchmark:
            raise SystemExit(f"error: --benchmark is what {a.rescore} says")
        return report({"benchmark": a.benchmark or "custom", **settings}, rows)
    try:
        load_processor(a.model)
    except ValueError as error:                 # a model of another family
        raise SystemExit(f"error: --model {a.model}: {error}") from None
    return one_question(a) if a.video else run(a)


if __name__ == "__main__":
    try:
        main(parse())
    except (BadRecord, OSError) as error:       # of the files that were named
        raise SystemExit(f"error: {error}") from None
    leave()
