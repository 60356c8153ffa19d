"""Evaluation: every setting and every answer is kept, every doubtful parse is counted.

    python evaluate.py --model M --benchmark mmvu --data eval_mmvu.json --videos DIR --frames 32
    torchrun --nproc_per_node 8 evaluate.py ...                     the same over a node's GPUs
    python evaluate.py --rescore A/predictions.jsonl                scores again, without a model
    python evaluate.py --compare A/predictions.jsonl B/predictions.jsonl      paired difference
    python evaluate.py --model M --video clip.mp4 --question "What happens?"

`--protocol` is a known way of measuring: benchmarks.json holds them, and the published figures.
Answers go to OUT/predictions.jsonl as they are made, below a line with the settings. The same
command continues, with any number of processes; other settings are refused. Tables: lab/scores.py.
"""

import argparse
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Limits, Prompts, Skipped, load_media
from engine.clips import is_picture
from engine.workers import loader
from lab.predictions import answered_rows, read_predictions, settings_of
from lab.protocols import BENCHMARKS, PROTOCOLS, read_questions, with_prompt
from lab.scores import compare, report
from policy import load, load_processor, sample
from prompt import BadRecord, Prompt, name_of
from run.distributed import distributed, run_program


class Clips(Prompts):
    """index -> [Prompt or Skipped]: all records of one clip (self.records[index]), decoded once."""

    def __getitem__(self, index: int) -> list[Prompt | Skipped]:
        media, made = None, []
        for record in self.records[index]:
            try:
                media = media or load_media(record, self.root, self.limits, self.vision)
                made.append(self.processor.prompt(record, *media, self.limits.max_prompt,
                                                  self.limits.text_after))
            except BadRecord as error:
                made.append(Skipped(record, str(error)))
        return made

    def lost(self, index: int, reason: str) -> list[Skipped]:
        """What stands for a clip whose decoding process died or hung."""
        return [Skipped(r, f"{name_of(r)}: {r['path']}: {reason}") for r in self.records[index]]


def answers(records: list[dict], a: argparse.Namespace, device: torch.device, rank: int,
            world: int) -> Iterator[list[dict]]:
    """This rank's records, `--batch` at a time, with "output", or "unreadable" and why. A question
    draws its random numbers by its row. A prompt above the limit of tokens counts as unreadable."""
    model, processor = load(a.model, device, getattr(torch, a.dtype))
    limits = Limits(a.frames, a.fps, a.max_pixels, max_prompt=32768, seconds=a.seconds,
                    text_after=a.text_after)
    by_path = sorted(records, key=lambda record: record["path"])
    clips = [list(group) for _, group in groupby(by_path, lambda record: record["path"])]
    mine = range(rank, len(clips), world)
    made = loader(Clips(clips, a.videos, processor, limits), mine, a.workers)
    bar = tqdm(made, total=len(mine), unit="clip", disable=rank > 0)
    questions = (question for clip in bar for question in clip)
    while batch := list(islice(questions, a.batch)):
        prompts = [q for q in batch if isinstance(q, Prompt)]
        rows = [{**q.record, "unreadable": q.reason} for q in batch if isinstance(q, Skipped)]
        groups = prompts and sample(model, prompts, 1, a.max_new_tokens, top_p=a.top_p,
                                    temperature=a.temperature,
                                    seeds=[prompt.record["row"] for prompt in prompts])
        for prompt, group in zip(prompts, groups):
            output = processor.tokenizer.decode(group.ids[0, :group.lengths[0]],
                                                skip_special_tokens=True)
            rows.append({**prompt.record, "output": output})
        yield rows


def one_question(a: argparse.Namespace) -> None:
    """Print the answer to `--question` about `--video`, a clip or a still image."""
    path = Path(a.videos, a.video)
    image = path.is_file() and is_picture(path)
    record = {"problem": a.question, "problem_type": "free-form", "options": [], "row": 0,
              "data_type": "image" if image else "video", "path": a.video}
    _, _, device = distributed()
    [[row]] = answers([with_prompt(record, a.protocol, "custom")], a, device, rank=0, world=1)
    if "unreadable" in row:
        raise SystemExit(f"error: {row['unreadable']}")
    print(row["output"])


def run(a: argparse.Namespace) -> dict | None:
    """Answer what is not answered yet; rank 0 prints, keeps and returns the table."""
    records = read_questions(a.data, a.protocol, a.benchmark)
    if not any(os.path.isfile(Path(a.videos, record["path"])) for record in records):
        raise SystemExit(f"error: {a.videos} holds none of the clips that {a.data} names")
    settings = settings_of(a, records)
    rank, world, device = distributed(timedelta(hours=24))      # for ranks with longer clips
    path = Path(a.out, "predictions.jsonl")
    done = [answered_rows(path, settings) if rank == 0 else None]
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint: a folder, a hub name, or random:7b")
    add("--data", help="the benchmark's questions: a JSON list in Video-R1's form")
    add("--videos", default=".", help="the folder that the clips' paths start from")
    add("--out", default="results", help="the folder for predictions.jsonl and scores.json")
    add("--benchmark", choices=BENCHMARKS, help="the benchmark: its prompt, splits and figures")
    add("--protocol", choices=PROTOCOLS, help="how to measure (default: video-ktr)")
    add("--direct", dest="protocol", action="store_const", const="direct", help="--protocol direct")
    add("--frames", type=int, help="most frames of a clip (default here and below: the protocol's)")
    add("--fps", type=float, help="most frames for each second of a clip")
    add("--max_pixels", type=int, help="most pixels of a frame")
    add("--max_new_tokens", type=int, help="longest answer, in tokens")
    add("--temperature", type=float, help="sampling temperature; 0: greedy")
    add("--top_p", type=float, help="probability mass that is sampled from")
    add("--seconds", choices=["one", "true"], help="temporal patches: 1.0 s apart, or true time")
    add("--text_after", choices=["clip", "frame"], help="where the text's positions begin after "
        "a clip: after its highest, or after a frame's larger side (trained under transformers 5)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="type of weights")
    add("--batch", type=int, default=32, help="questions that are answered together")
    add("--workers", type=int, default=4, help="processes of each rank that decode clips")
    add("--rescore", metavar="FILE", help="score these predictions again; no model needed")
    add("--compare", nargs=2, metavar=("A", "B"),
        help="paired difference of two runs: their folders, or predictions.jsonl")
    add("--video", help="a clip or image to answer one --question about")
    add("--question", help="the question about --video")
    a = parser.parse_args(arguments)
    if a.rescore or a.compare:
        for name in ("protocol", *PROTOCOLS["video-ktr"]["options"]):
            if getattr(a, name) is not None:
                parser.error(f"--{name} cannot be given here: the file of predictions holds it")
        return a
    needed = ("model", "video", "question") if a.video or a.question else (
        "model", "data", "benchmark")
    missing = [f"--{name}" for name in needed if not getattr(a, name)]
    if missing:
        parser.error(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed"
                     + " (or --video and --question)" * (len(missing) == 3))
    a.protocol = a.protocol or "video-ktr"
    for name, value in PROTOCOLS[a.protocol]["options"].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    if min(a.frames / 2, a.max_pixels, a.max_new_tokens, a.batch, a.workers + 1) < 1:
        parser.error("at least --frames 2, --max_pixels, --max_new_tokens, --batch 1, --workers 0")
    if a.fps <= 0 or a.temperature < 0 or not 0 < a.top_p <= 1:
        parser.error("--fps must be above 0, --temperature 0 or more, --top_p above 0, at most 1")
    return a


def main(a: argparse.Namespace) -> dict | None:
    if a.compare:
        return compare(*a.compare)
    if a.rescore:
        settings, rows = read_predictions(a.rescore)
        if "benchmark" in settings and a.benchmark:
            raise SystemExit(f"error: --benchmark cannot be given: {a.rescore} holds it")
        return report({"benchmark": a.benchmark or "custom", **settings}, rows)
    try:
        load_processor(a.model)
    except (ValueError, LookupError, AttributeError) as error:      # of another architecture
        raise SystemExit(f"error: --model {a.model}: {error}") from None
    return one_question(a) if a.video else run(a)


def program() -> None:
    try:
        main(parse())
    except (BadRecord, OSError) as error:       # of the files that were named
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run_program(program)
