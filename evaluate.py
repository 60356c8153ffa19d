"""Evaluation: one command, every setting recorded, every answer kept, every ambiguous parse visible.

    python evaluate.py --model M --data eval_videomme.json --videos DIR --frames 32 --out results/videomme
    torchrun --nproc_per_node 8 evaluate.py ...                                 the same over the GPUs of a node
    python evaluate.py --rescore FILE [--benchmark mmvu]                        scores without a model
    python evaluate.py --model M --video clip.mp4 --question "What happens?"    one question

Reads lists in Video-R1's form and Video-Holmes' own annotation file. Each answer goes to OUT/predictions.jsonl as it
is made; starting again continues, with any number of processes, and refuses other settings. Strict and lenient
scores are defined at `rewards.grade`; a clip that cannot be read is counted apart, never as a wrong answer.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Limits, check_record, load_media, loader, read_json
from policy import load, sample
from prompt import QUESTION_EVAL, BadRecord, Processor, Prompt, name_of
from rewards import extract_answer, grade
from run.distributed import distributed, leave

# accuracy in percent at 16, 32, 64 frames: (cold start, Video-KTR), table 1 of the paper
PAPER = {
    "video-holmes": ((31.7, 33.9, 33.7), (40.7, 41.6, 42.7)), "videommmu": ((47.4, 49.4, 49.4), (51.3, 52.6, 53.1)),
    "mmvu": ((61.3, 63.5, 61.6), (65.7, 65.9, 66.6)), "tempcompass": ((69.2, 69.9, 70.0), (73.3, 73.4, 73.5)),
    "videomme": ((52.8, 55.4, 58.8), (57.3, 60.3, 62.5)), "mvbench": None, "vsibench": None,
}
SIZES = {"video-holmes": 1837, "videommmu": 900, "mmvu": 625, "tempcompass": 7540, "videomme": 2700, "mvbench": 4000,
         "vsibench": 5130}
HOLMES = ("Based on the given video, reason and answer the single-choice question. Provide your reasoning between the <think> "
          "and </think> tags, and then give your final answer between the <answer> and </answer> tags. The question is: "
          "{question}. The options are: {options}. Your answer:")
MMVU_DISCIPLINES = {
    "Science": "Astronomy Biology Chemistry Electromagnetism Geography Mechanics Modern_Physics Neurobiology Thermodynamics",
    "Healthcare": "Basic_Medicine Clinical_Medicine Dentistry Pharmacy Preventive_Medicine",
    "Humanities & Social Science": "Art Economics History Law Literature Management",
    "Engineering": "Biomedical_Engineering Civil_Engineering Computer_Science Electrical_Engineering "
                   "Electronics_and_Communication Materials_Science Mechanical_Engineering"}


# ----------------------------------------------------------------------------------------- benchmarks
def field(*names: str):
    """A split by the first of these fields that a record has."""
    return lambda record: next((str(record[name]) for name in names if record.get(name)), None)


def discipline(record: dict) -> str | None:
    subject = Path(record["path"]).parent.name
    return next((name for name, subjects in MMVU_DISCIPLINES.items() if subject in subjects.split()), None)


def mmmu_track(record: dict) -> str | None:
    return ("adaptation", "comprehension", "perception")[record["row"] // 300] if record["row"] < 900 else None


SPLITS = {
    "video-holmes": {"type": field("Question Type", "original_question_type")},
    "videomme": {"length": field("duration"), "domain": field("domain")},
    "videommmu": {"track": mmmu_track},
    "mmvu": {"discipline": discipline},
    "tempcompass": {"format": field("format", "question_format", "task_type", "original_question_type"),
                    "aspect": field("aspect", "dim", "temporal_aspect")},
    "vsibench": {"type": field("question_type", "original_question_type")},
    "mvbench": {"task": field("task", "task_type", "original_question_type")},
    "toy": {"kind": field("data_source")},
}


def benchmark_of(path: str) -> str:
    """The benchmark that a file's name speaks of; "custom" for any other."""
    name = Path(path).stem.lower().replace("-", "").replace("_", "")
    return next((b for b in SPLITS if b.replace("-", "") in name), "custom")


def from_holmes(row: dict) -> dict:
    """A row of Video-Holmes' own annotation file in Video-R1's form, with the benchmark's own prompt."""
    options = row["Options"]
    listed = ", ".join(f"{letter}: {text}" for letter, text in options.items())
    return {**row, "problem_id": f"{row['video ID']}/{row['Question ID']}", "problem": row["Question"], "data_type": "video",
            "problem_type": "multiple choice", "options": [f"{letter}. {text}" for letter, text in options.items()],
            "solution": f"<answer>{row['Answer']}</answer>", "path": f"{row['video ID']}.mp4",
            "whole_prompt": HOLMES.format(question=row["Question"], options=listed)}


def read_questions(path: str) -> list[dict]:
    """Every row of a benchmark's list, checked. ValueError names what is wrong: a benchmark has no rows to leave out."""
    records = []
    for index, row in enumerate(read_json(path)):
        holmes = isinstance(row, dict) and "video ID" in row and "Question" in row
        records.append(check_record(from_holmes(row) if holmes else row, index))
    return records


def locate(path: str, root: str) -> str | None:
    """Where a clip is under `root`, relative to it: releases differ in the folders before it (./Evaluation/X/..)."""
    parts = Path(os.path.normpath(path)).parts
    for folder in ("", "videos", "videos_cropped"):
        for i in range(len(parts)):
            tried = Path(folder, *parts[i:])
            if (Path(root) / tried).is_file():
                return str(tried)
    return None


# ------------------------------------------------------------------------------------------- scores
def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def summarise(rows: list[dict]) -> dict:
    """n, strict and lenient scores, unparsed and unreadable answers, the 95% interval of the strict score."""
    read = [row for row in rows if "unreadable" not in row]
    grades = [grade(row["output"], row["solution"], row.get("problem_type", "multiple choice"), row.get("options") or [])
              for row in read]
    n = len(read)
    strict, lenient = (sum(g[i] for g in grades) / n if n else 0.0 for i in (0, 1))
    letters = Counter(extract_answer(row["solution"]) or row["solution"] for row in rows
                      if row.get("problem_type", "multiple choice") == "multiple choice")
    letter, most = letters.most_common(1)[0] if letters else (None, 0)
    return {"n": n, "strict": strict, "lenient": lenient, "unparsed": sum(not g[2] for g in grades),
            "unreadable": len(rows) - n, "interval": wilson(strict, n), "always": [letter, most / max(1, sum(letters.values()))]}


def report(rows: list[dict], benchmark: str, frames: int | None) -> dict:
    """Print the table of a benchmark, all and by its usual splits; returns it."""
    table = {"all": summarise(rows)}
    for split, of in SPLITS.get(benchmark, {}).items():
        parts = defaultdict(list)
        for row in rows:
            parts[of(row)].append(row)
        table |= {f"{split}: {name}": summarise(part) for name, part in sorted(parts.items(), key=str) if name is not None}
    width = max(len(name) for name in table)
    print(f"{'':{width}}      n  strict  (95% interval)  lenient  unparsed  unreadable")
    for name, s in table.items():
        low, high = s["interval"]
        print(f"{name:{width}}  {s['n']:5d}  {100 * s['strict']:5.1f}%  ({100 * low:4.1f} to {100 * high:5.1f})  {100 * s['lenient']:6.1f}%"
              f"  {s['unparsed']:8d}  {s['unreadable']:10d}")
    letter, share = table["all"]["always"]
    if letter:
        print(f"always answering {letter}: {100 * share:.1f}% of the multiple choice questions")
    if PAPER.get(benchmark) and frames in (16, 32, 64):
        before, after = (column[(16, 32, 64).index(frames)] for column in PAPER[benchmark])
        print(f"the paper, {frames} frames: cold start {before}%, Video-KTR {after}%")
    if benchmark in SIZES and len(rows) != SIZES[benchmark]:
        print(f"note: {len(rows)} questions, the whole benchmark has {SIZES[benchmark]}")
    return table


def read_predictions(path: str) -> list[dict]:
    """Rows with `output` and `solution`: ours, or others' in Video-R1's form (a list, {"results": [..]}, or one object a line)."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
        rows = whole["results"] if isinstance(whole, dict) and "results" in whole else whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        rows = read_json(path)
    rows = [row for row in rows if "settings" not in row]
    for i, row in enumerate(rows):
        if not isinstance(row.get("solution"), str) or not ("unreadable" in row or isinstance(row.get("output"), str)):
            raise ValueError(f"{path}: row {i} has no text under 'output' and 'solution'")
        row.setdefault("row", i)
    return list({row["row"]: row for row in rows}.values())         # a clip that could be read later replaces its note


# ------------------------------------------------------------------------------------------ answering
class Clips(torch.utils.data.Dataset):
    """index -> [(record, Prompt or the reason why there is none)] for all questions about one clip, decoded once."""

    def __init__(self, records: list[dict], root: str, processor: Processor, limits: Limits):
        groups = defaultdict(list)
        for record in records:
            groups[record["path"]].append(record)
        self.groups, self.root, self.processor, self.limits = list(groups.values()), root, processor, limits

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[tuple[dict, Prompt | str]]:
        records, out = self.groups[index], []
        try:
            frames, seconds = load_media(records[0], self.root, self.limits, self.processor.vision)
        except BadRecord as error:
            return [(record, str(error)) for record in records]
        for record in records:
            try:
                out.append((record, self.processor.prompt(record, frames, seconds, self.limits.max_prompt, QUESTION_EVAL)))
            except BadRecord as error:
                out.append((record, str(error)))
        return out


def fingerprint(model: str) -> str:
    """Changes when the weights do: names, sizes and ends of the weight files (the name, for a hub checkpoint)."""
    digest = hashlib.sha256(model.encode() if not Path(model).is_dir() else b"")
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(-min(len(head), 1 << 16), os.SEEK_END)
            digest.update(f"{path.name} {path.stat().st_size}".encode() + head + file.read())
    return digest.hexdigest()[:16]


def start_or_continue(path: Path, settings: dict, first: bool) -> set[int]:
    """Rows answered already. Rank 0 drops a line that a kill cut short, and refuses answers made under other settings."""
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.open(encoding="utf-8").readlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole:
            old = json.loads(whole[0])["settings"]
            changed = [f"{key}: {old.get(key)!r} there, {value!r} now" for key, value in settings.items() if old.get(key) != value]
            if changed:
                raise SystemExit(f"error: {path} holds answers under other settings ({'; '.join(changed)}); choose another --out")
        else:
            whole = [json.dumps({"settings": settings}) + "\n"]
        if lines != whole:
            part = path.with_suffix(".part")
            part.write_text("".join(whole), "utf-8")
            part.rename(path)
    if dist.is_initialized():
        dist.barrier()
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return {row["row"] for row in rows if "settings" not in row and "unreadable" not in row}


def append(path: Path, rows: list[dict]) -> None:
    """Add whole lines; the lock keeps those of several processes apart."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def answer(model, processor: Processor, prompts: list[Prompt], a: argparse.Namespace) -> list[str]:
    groups = sample(model, prompts, 1, a.max_new_tokens, temperature=a.temperature, top_p=a.top_p,
                    seeds=[p.record["row"] for p in prompts])
    return [processor.tokenizer.decode(group.ids[0, :group.lengths[0]], skip_special_tokens=True) for group in groups]


def main(a: argparse.Namespace) -> dict | None:
    if a.rescore:
        return report(read_predictions(a.rescore), a.benchmark or benchmark_of(a.rescore), a.frames)
    limits = Limits(a.frames, a.fps, a.max_pixels, a.image_pixels, a.max_prompt)
    if a.video:
        record = {"problem": a.question, "options": a.options, "path": a.video, "row": 0, "problem_id": 0, "data_type": a.media,
                  "problem_type": "multiple choice" if a.options else "free-form"}
        model, processor = load(a.model, distributed()[2], getattr(torch, a.dtype))
        frames, seconds = load_media(record, "", limits, processor.vision)
        return print(*answer(model, processor, [processor.prompt(record, frames, seconds, a.max_prompt, QUESTION_EVAL)], a))

    records = read_questions(a.data)
    found = {path: locate(path, a.videos) for path in dict.fromkeys(record["path"] for record in records)}
    missing = [path for path, place in found.items() if place is None]
    if missing and (len(missing) == len(found) or not a.allow_missing):
        raise SystemExit(f"error: {len(missing)} of {len(found)} clips are not under {a.videos}, the first: {missing[0]}; "
                         f"--allow_missing counts them as unreadable")
    records = [{**record, "path": found[record["path"]] or record["path"]} for record in records]
    settings = {"model": a.model, "weights": fingerprint(a.model), "data": hashlib.sha256(Path(a.data).read_bytes()).hexdigest()[:16],
                "limits": asdict(limits), "max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_p": a.top_p,
                "dtype": a.dtype, "question": hashlib.sha256((QUESTION_EVAL + HOLMES).encode()).hexdigest()[:16]}
    rank, world, device = distributed(timedelta(hours=24))      # ranks with longer clips are waited for
    path = Path(a.out) / "predictions.jsonl"
    done = start_or_continue(path, settings, rank == 0)
    if len(done) < len(records):
        model, processor = load(a.model, device, getattr(torch, a.dtype))
        clips = Clips([record for record in records if record["row"] not in done], a.videos, processor, limits)
        mine = list(range(rank, len(clips), world))
        bar = tqdm(total=sum(len(clips.groups[i]) for i in mine), unit="question", disable=rank > 0, dynamic_ncols=True)
        waiting: list[tuple[dict, Prompt]] = []

        def flush(size: int) -> None:
            while len(waiting) >= size and waiting:
                part, waiting[:] = waiting[:a.batch], waiting[a.batch:]
                outputs = answer(model, processor, [prompt for _, prompt in part], a)
                append(path, [{**record, "output": output} for (record, _), output in zip(part, outputs)])
                bar.update(len(part))

        for questions in loader(clips, mine, a.workers):
            append(path, [{**record, "unreadable": why} for record, why in questions if isinstance(why, str)])
            bar.update(sum(isinstance(why, str) for _, why in questions))
            waiting += [(record, prompt) for record, prompt in questions if isinstance(prompt, Prompt)]
            flush(a.batch)
        flush(1)
        bar.close()
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        table = report(read_predictions(str(path)), a.benchmark or benchmark_of(a.data), a.frames)
        (Path(a.out) / "scores.json").write_text(json.dumps({"settings": settings, "scores": table}, indent=1))
        return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint folder, hub name, or random:7b")
    parser.add_argument("--data", help="the benchmark's list")
    parser.add_argument("--videos", default=".", help="the folder that holds its clips")
    parser.add_argument("--out", default="results", help="where predictions.jsonl and scores.json go")
    parser.add_argument("--benchmark", choices=[*SPLITS, "custom"], help="whose splits to print (default: by the file's name)")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip at most; the paper: 16, 32, 64")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second of the clip")
    parser.add_argument("--max_pixels", type=int, default=256 * 28 * 28, help="pixels per frame at most")
    parser.add_argument("--image_pixels", type=int, default=512 * 28 * 28, help="pixels of a still image at most")
    parser.add_argument("--max_prompt", type=int, default=32768, help="tokens; a longer prompt counts as unreadable")
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; the authors: 0.1 with top_p 0.001")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=32, help="questions decoded together")
    parser.add_argument("--workers", type=int, default=4, help="decoding processes per rank")
    parser.add_argument("--allow_missing", action="store_true", help="count clips that are not there as unreadable")
    parser.add_argument("--rescore", metavar="FILE", help="score these predictions; no model needed")
    parser.add_argument("--video", help="answer one question about this clip (or image, with --media image)")
    parser.add_argument("--media", choices=["video", "image"], default="video")
    parser.add_argument("--question")
    parser.add_argument("--options", nargs="*", default=[])
    a = parser.parse_args(arguments)
    needed = [] if a.rescore else ["model", "question"] if a.video else ["model", "data"]
    for name in needed:
        if not getattr(a, name):
            parser.error(f"--{name} is needed")
    return a


if __name__ == "__main__":
    try:
        main(parse())
        leave()
    except (BadRecord, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
