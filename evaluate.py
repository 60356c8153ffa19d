"""Evaluation: every setting recorded, every answer kept, every doubtful parse visible.

    python evaluate.py --model M --data eval_mmvu.json --videos DIR --frames 32 --out results/mmvu
    torchrun --nproc_per_node 8 evaluate.py ...                     the same over a node's GPUs
    python evaluate.py --rescore FILE                               scores again, without a model
    python evaluate.py --compare A/predictions.jsonl B/predictions.jsonl      paired difference
    python evaluate.py --model M --video clip.mp4 --question "What happens?"

`--protocol` is a known way of measuring: benchmarks.json holds them, with published figures and
sources. Answers go to OUT/predictions.jsonl as they are made; starting again continues, with any
number of processes, and refuses other settings. `rewards.grade` defines the strict and the lenient
score; a clip that cannot be read is counted apart, never as a wrong answer.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Limits, check_record, load_media, loader, read_json
from run.distributed import distributed, leave
from policy import load, sample
from prompt import QUESTION_EVAL, TYPE, BadRecord, Processor, Prompt, name_of
from scores import (BENCHMARKS, FACTS, PROTOCOLS, benchmark_of, compare, read_predictions,
                    report)

FOLDERS = ("", "videos", "videos_cropped")      # where releases keep their clips


# ------------------------------------------------------------------------------------- questions
def from_holmes(row: dict) -> dict:
    """A row of Video-Holmes' own annotation file in Video-R1's form."""
    options = [f"{letter}. {text}" for letter, text in row["Options"].items()]
    return {**row, "problem_id": f"{row['video ID']}/{row['Question ID']}", "data_type": "video",
            "problem": row["Question"], "problem_type": "multiple choice", "options": options,
            "solution": f"<answer>{row['Answer']}</answer>", "path": f"{row['video ID']}.mp4"}


def read_questions(path: str) -> list[dict]:
    """Every row of a list, checked. ValueError says what is wrong: no row may be left out."""
    rows = read_json(path)
    rows = [from_holmes(r) if isinstance(r, dict) and "video ID" in r else r for r in rows]
    return [check_record(row, index) for index, row in enumerate(rows)]


def worded(record: dict, protocol: str, benchmark: str) -> dict:
    """The record with the protocol's own words under "whole_prompt", where it has any."""
    chosen = PROTOCOLS[protocol]
    known = "video-holmes" if "video ID" in record else benchmark       # its own list, any name
    words = FACTS["prompts"][chosen["own_prompt"].get(known, chosen["prompt"])]
    if words["text"] is None:                   # QUESTION_EVAL and TYPE of prompt.py
        return record
    options = []
    for letter, option in zip(ascii_uppercase, record["options"]):
        text = re.sub(rf"^\s*\(?{letter}\s*[.):]\s*", "", option)
        options.append(words["option"].format(letter=letter, text=text))
    template = words["text"] if options else words.get("without_options", words["text"])
    question = record["problem"].strip().removesuffix("Options:").strip()
    text = template.format(question=question, options=words["between"].join(options))
    return {**record, "whole_prompt": text}


def locate(paths: list[str], root: str) -> tuple[dict[str, str], dict[str, str]]:
    """({path: its place under `root`}, {path: a place that may be another clip's}).

    Releases differ in the folders before a clip (./Evaluation/X/..): the longest end of a path that
    exists counts, but no end that two clips of the list share (as 34 names of MMVU's do).
    """
    wholes = {path: Path(os.path.normpath(path)) for path in paths}
    ends = {w: [Path(*w.parts[i:]) for i in range(len(w.parts))] for w in wholes.values()}
    shared = Counter(end for tails in ends.values() for end in tails)
    found, ambiguous = {}, {}
    for path, whole in wholes.items():
        tried = [(end, Path(folder, end)) for end in ends[whole] for folder in FOLDERS]
        there = [(end, place) for end, place in tried if os.path.isfile(Path(root, place))]
        for end, place in there[:1]:
            sure = place == whole or shared[end] == 1
            (found if sure else ambiguous)[path] = str(place)
    return found, ambiguous


# ------------------------------------------------------------------------------------- answering
class Clips:
    """index -> [(record, Prompt or why there is none)]: all questions about a clip, read once."""

    def __init__(self, records: list[dict], root: str, processor: Processor, limits: Limits):
        groups = defaultdict(list)
        for record in records:
            groups[record["path"]].append(record)
        self.groups, self.root = list(groups.values()), root
        self.processor, self.limits = processor, limits

    def __len__(self) -> int:
        return len(self.groups)

    def lost(self, index: int, reason: str) -> list[tuple[dict, str]]:
        """What stands for a clip whose decoding process died or hung."""
        return [(r, f"{name_of(r)}: {r['path']}: {reason}") for r in self.groups[index]]

    def __getitem__(self, index: int) -> list[tuple[dict, Prompt | str]]:
        records, limits, made = self.groups[index], self.limits, []
        try:
            media = load_media(records[0], self.root, limits, self.processor.vision)
        except BadRecord as error:
            return [(record, str(error)) for record in records]
        for record in records:
            try:
                prompt = self.processor.prompt(record, *media, limits.max_prompt, QUESTION_EVAL)
                made.append((record, prompt))
            except BadRecord as error:
                made.append((record, str(error)))
        return made


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(model: str) -> str:
    """Changes when the weights do: names, sizes and ends of the weight files, or a hub's name."""
    seen = [b"" if Path(model).is_dir() else model.encode()]
    for path in sorted(Path(model).glob("*.safetensors")):
        data = np.memmap(path, mode="r")
        seen += [f"{path.name} {len(data)}".encode(), data[:1 << 20].tobytes(),
                 data[-1 << 16:].tobytes()]
    return digest(b"".join(seen))


def taken_up(path: Path, settings: dict) -> set[int]:
    """Rows that `path` holds answers to; a file of other settings is refused (SystemExit), a line
    that a kill cut short is dropped, and a new file begins with its settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[:text.rfind("\n") + 1] or json.dumps({"settings": settings}) + "\n"
    old = json.loads(whole[:whole.index("\n")]).get("settings", {})
    changed = [f"{key}: {old.get(key)!r} there, {value!r} now"
               for key, value in settings.items() if old.get(key) != value]
    if changed:
        raise SystemExit(f"error: {path} holds answers under other settings "
                         f"({'; '.join(changed)}); choose another --out")
    if whole != text:
        part = path.with_suffix(".part")
        part.write_text(whole, "utf-8")
        part.rename(path)
    return {row["row"] for row in read_json(path)[1:] if "unreadable" not in row}


def append(path: Path, rows: list[dict]) -> None:
    """Add whole lines, in ASCII; the lock keeps those of several processes apart."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def answer(model, processor: Processor, prompts: list[Prompt], a: argparse.Namespace) -> list[str]:
    """One completion of each prompt, as text. A question's random numbers depend on its row."""
    groups = sample(model, prompts, 1, a.max_new_tokens, temperature=a.temperature, top_p=a.top_p,
                    seeds=[prompt.record["row"] for prompt in prompts])
    return [processor.tokenizer.decode(group.ids[0, :group.lengths[0]], skip_special_tokens=True)
            for group in groups]


def limits_of(a: argparse.Namespace) -> Limits:
    """How much of a clip these options look at; a longer prompt counts as unreadable."""
    return Limits(a.frames, a.fps, a.max_pixels, max_prompt=32768, seconds=a.seconds)


def one_question(a: argparse.Namespace) -> None:
    """Print the answer to `--question` about `--video`, a clip or a still image."""
    image = Path(a.video).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    record = {"problem": a.question, "options": a.options, "path": a.video, "row": 0,
              "problem_type": "multiple choice" if a.options else "free-form",
              "data_type": "image" if image else "video"}
    model, processor = load(a.model, distributed()[2], getattr(torch, a.dtype))
    clips = Clips([worded(record, a.protocol, "custom")], "", processor, limits_of(a))
    [(_, prompt)] = clips[0]
    if isinstance(prompt, str):
        raise SystemExit(f"error: {prompt}")
    print(*answer(model, processor, [prompt], a))


def run(a: argparse.Namespace) -> dict | None:
    """Answer what is not answered yet; rank 0 prints, keeps and returns the table."""
    benchmark = a.benchmark or benchmark_of(a.data)
    records = [worded(record, a.protocol, benchmark) for record in read_questions(a.data)]
    paths = list(dict.fromkeys(record["path"] for record in records))
    found, ambiguous = locate(paths, a.videos)
    missing = [path for path in paths if path not in found]
    if missing and (not found or not a.allow_missing):
        doubts = [f"{place} may be another clip than {path}" for path, place in ambiguous.items()]
        message = [f"error: {len(missing)} of {len(paths)} clips are not under {a.videos} "
                   f"({len(doubts)} in doubt), the first: {missing[0]}", *doubts[:3]]
        hint = ["--allow_missing counts them as unreadable"] if found else []
        raise SystemExit("; ".join(message + hint))
    records = [{**record, "path": found.get(record["path"], record["path"])} for record in records]
    wording = json.dumps([QUESTION_EVAL, TYPE, FACTS["prompts"]])
    settings = {"model": a.model, "weights": fingerprint(a.model), "benchmark": benchmark,
                "data": digest(Path(a.data).read_bytes()), "wording": digest(wording.encode()),
                "protocol": a.protocol, "dtype": a.dtype,
                **{key: getattr(a, key) for key in FACTS["options"]}}
    rank, world, device = distributed(timedelta(hours=24))      # for ranks with longer clips
    path = Path(a.out) / "predictions.jsonl"
    shared = [taken_up(path, settings) if rank == 0 else None]
    if world > 1:                               # one reading for all, before anyone writes
        dist.broadcast_object_list(shared)
    todo = [record for record in records if record["row"] not in shared[0]]
    if todo:
        model, processor = load(a.model, device, getattr(torch, a.dtype))
        clips, waiting = Clips(todo, a.videos, processor, limits_of(a)), []
        mine = range(rank, len(clips), world)
        bar = tqdm(loader(clips, mine, a.workers), total=len(mine), unit="clip", disable=rank > 0)
        for number, questions in enumerate(bar, 1):
            lost = [(record, why) for record, why in questions if isinstance(why, str)]
            append(path, [{**record, "unreadable": why} for record, why in lost])
            waiting += [pair for pair in questions if isinstance(pair[1], Prompt)]
            while len(waiting) >= a.batch or (waiting and number == len(mine)):
                part, waiting = waiting[:a.batch], waiting[a.batch:]
                outputs = answer(model, processor, [prompt for _, prompt in part], a)
                append(path, [{**record, "output": output}
                              for (record, _), output in zip(part, outputs)])
    if world > 1:
        dist.barrier()
    if rank == 0:
        table = report(read_predictions(str(path))[1], benchmark, settings)
        scores = json.dumps({"settings": settings, "scores": table}, indent=1)
        (Path(a.out) / "scores.json").write_text(scores)
        return table


def main(a: argparse.Namespace) -> dict | None:
    if a.compare:
        return compare(*a.compare)
    if a.rescore:
        settings, rows = read_predictions(a.rescore)
        name = a.benchmark or settings.get("benchmark") or benchmark_of(a.rescore)
        return report(rows, name, settings)
    return one_question(a) if a.video else run(a)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint folder, hub name, or random:7b")
    add("--data", help="the benchmark's list")
    add("--videos", default=".", help="the folder that holds its clips")
    add("--out", default="results", help="where predictions.jsonl and scores.json go")
    add("--benchmark", choices=BENCHMARKS, help="whose splits to print (default: by file name)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--protocol", choices=PROTOCOLS, help="how to measure (default: video-ktr)")
    way.add_argument("--direct", dest="protocol", action="store_const", const="direct")
    for name, about in FACTS["options"].items():
        kind = type(PROTOCOLS["video-ktr"]["options"][name])
        add(f"--{name}", type=kind, help=f"{about} (default: the protocol's)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--batch", type=int, default=32, help="questions decoded together")
    add("--workers", type=int, default=4, help="decoding processes per rank")
    add("--allow_missing", action="store_true", help="count missing clips as unreadable")
    add("--rescore", metavar="FILE", help="score these predictions; no model needed")
    add("--compare", nargs=2, metavar=("A", "B"), help="difference of two predictions files")
    add("--video", help="answer one question about this clip or image")
    add("--question")
    add("--options", nargs="*", default=[])
    a = parser.parse_args(arguments)
    if a.rescore or a.compare:
        given = [name for name in ("protocol", *FACTS["options"]) if getattr(a, name) is not None]
        if given:
            parser.error(f"--{given[0]} is what the file says")
        return a
    a.protocol = a.protocol or "video-ktr"
    for name, value in PROTOCOLS[a.protocol]["options"].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    for name in ("model", "question") if a.video else ("model", "data"):
        if not getattr(a, name):
            parser.error(f"--{name} is needed")
    if min(a.frames / 2, a.max_pixels, a.max_new_tokens, a.batch) < 1 or a.fps <= 0:
        parser.error("at least 2 frames, 1 pixel, 1 new token, 1 question; fps above 0")
    if a.temperature < 0 or not 0 < a.top_p <= 1 or a.seconds not in ("one", "true"):
        parser.error("temperature >= 0, 0 < top_p <= 1, seconds one or true")
    return a


if __name__ == "__main__":
    try:
        main(parse())
        leave()
    except (BadRecord, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
