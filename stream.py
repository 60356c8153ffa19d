"""The prompts of a run: checked before it starts, ordered, decoded ahead, handed out step by step.

    preflight   what must be there: files, records, weights, a clip that decodes, GPUs enough
    Stream      which record is looked at in which step, on which rank; records that cannot be used
"""

import json
import os
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from data import Limits, Prompts, Skipped, loader, read_records
from policy import load_processor, weight_count
from prompt import Processor, Prompt
from run.logs import Log
from run.options import Options

UNUSABLE = 0.05         # share of records that may be malformed or unreadable before a run stops


def preflight(o: Options) -> tuple[list[dict], set[int]]:
    """The well-formed records and the indices of those to leave out; SystemExit, in one line, if
    something is missing: files, records, weights, a clip that decodes, GPUs."""
    def fail(message: object):
        raise SystemExit(f"error: {message}")

    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here and os.environ.get("KTR_SHARE_GPU") != "1":
        fail(f"{here} processes on this machine but only {gpus} GPUs; lower NPROC")
    if not Path(o.data).is_file():
        fail(f"--data {o.data}: no such file")
    if not Path(o.videos).is_dir():
        fail(f"--videos {o.videos}: no such folder")
    if o.resume == "never" and (Path(o.out) / "log.jsonl").exists():
        fail(f"--out {o.out} holds a run already; choose another folder or --resume auto")
    try:
        records, malformed = read_records(o.data)
        usable = {record["row"] for record in read_records(o.data, o.leave_out or None)[0]}
    except (ValueError, OSError) as error:
        fail(error)
    try:
        processor = load_processor(o.model)
        weights_there(Path(o.model))
    except (ValueError, OSError, AttributeError, KeyError) as error:    # another architecture
        fail(f"--model {o.model}: no checkpoint to start from: "
             f"{str(error).strip().splitlines()[0]}")
    wanting = memory_wanting(o)
    if wanting:
        fail(wanting)
    rows = len(records) + len(malformed)
    if len(malformed) > UNUSABLE * rows and not o.leave_out:    # then the list has been seen
        fail(f"{len(malformed)} of {rows} records of {o.data} are malformed, the first: "
             f"{malformed[0]}")
    if not usable:
        fail(f"{o.data}: no usable records")
    paths = {record["path"] for record in records if record["row"] in usable}
    if o.masking == "replace" and len(paths) < 2:
        fail(f"--masking replace: {o.data} has no clip but {paths.pop()}")
    trial = [i for i, record in enumerate(records) if record["row"] in usable][:3]
    data = Prompts(records, o.videos, processor, limits_of(o))
    tried = list(loader(data, trial, workers=min(1, o.workers)))
    if not any(isinstance(item, Prompt) for item in tried):
        fail(f"the first records cannot be used: {tried[0].reason}")
    if int(os.environ.get("RANK", 0)) == 0:
        for line in malformed:
            print(f"left out: {line}")
    return records, {i for i, record in enumerate(records) if record["row"] not in usable}


def weights_there(folder: Path) -> None:
    """OSError if a checkpoint's folder lacks a file of its weights; hub names pass."""
    index = folder / "model.safetensors.index.json"
    needed = {"model.safetensors"}
    if index.is_file():
        needed = set(json.loads(index.read_text())["weight_map"].values())
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if folder.is_dir() and missing:
        raise OSError(f"{missing[0]} is missing")


def memory_wanting(o: Options) -> str | None:
    """Why the GPU cannot hold what lasts through a run, and what to do about it; None if it can.

    Bytes a weight: 2, and 2 of gradient, 2 of the reference (bf16), 12/N of N processes' optimizer.
    """
    if not torch.cuda.is_available():
        return None
    n, each = weight_count(o.model), torch.finfo(getattr(torch, o.dtype)).bits // 8
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * int(os.environ.get("NNODES", 1))
    world = int(os.environ.get("WORLD_SIZE", here))             # torchrun's; train.sh checks before
    state = 0 if o.offload else 12 / world
    needed = n * (each * (3 if o.beta > 0 else 2) + state) / 2 ** 30
    there = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    if needed < 0.97 * there:
        return None
    host = 12 * n / 1e9
    return (f"weights, gradients, reference and optimizer need {needed:.0f} GiB of each GPU, which "
            f"has {there:.0f}; take more GPUs, or --offload (the optimizer's {host:.0f} GB stay in "
            f"the host's memory), or --beta 0 (no reference)")


def limits_of(o: Options) -> Limits:
    return Limits(o.max_frames, o.sample_fps, o.max_pixels, o.image_pixels, o.max_prompt,
                  pixels=o.pixels, seconds=o.seconds)


def plan(o: Options, records: list[dict], left_out: set[int], B: int, first: int,
         begin: int) -> tuple[list[tuple[int, int]], int]:
    """The prompts from step `first` on, B a step, and the number of steps of the whole run.

    A prompt is (its place in the run's order, its record's index). Every epoch is a permutation of
    the records, cut to whole steps; places from `begin` on are taken, and those of records left out
    are passed over, so that records may be left out when a run goes on.
    """
    per_epoch = len(records) // B * B
    if per_epoch == 0 or len(records) - len(left_out) < B:
        raise SystemExit(f"error: {len(records) - len(left_out)} records are too few for one step "
                         f"of {B} prompts")
    wanted = max(0, o.max_steps - first) * B
    ahead: list[tuple[int, int]] = []
    epoch = begin // per_epoch
    while len(ahead) < wanted if o.max_steps else epoch < o.epochs:
        generator = torch.Generator().manual_seed(o.seed + epoch)
        permuted = torch.randperm(len(records), generator=generator)[:per_epoch].tolist()
        for place, index in enumerate(permuted, epoch * per_epoch):
            if place >= begin and index not in left_out:
                ahead.append((place, index))
        epoch += 1
    return ahead, o.max_steps or first + len(ahead) // B


def seed_of(o: Options, place: int) -> int:
    """The even seed of the prompt at a place of the run, for sampling; the next one is for its
    signals. Below 2**32, since torch's CPU generator heeds no more of a seed."""
    return 2 * Random(f"{o.seed} {place}").getrandbits(31)


def another_clip(records: list[dict], left_out: set[int], index: int, seed: int) -> int:
    """The index of a record about another clip, picked by chance, for --masking replace."""
    random = Random(seed)
    while True:
        other = random.randrange(len(records))
        if other not in left_out and records[other]["path"] != records[index]["path"]:
            return other


class Stream:
    """Hands out a rank's prompts, step by step, decoded in worker processes ahead of need."""

    def __init__(self, o: Options, records: list[dict], left_out: set[int], processor: Processor,
                 log: Log, rank: int, world: int, state: dict):
        """state: of the run, with the steps done and the place to go on from."""
        A, B = o.prompts_per_step, o.prompts_per_step * world   # prompts of a rank, of all ranks
        self.o, self.log, self.records, self.left_out = o, log, records, left_out
        self.first, self.A, self.B, self.rank = state["step"], A, B, rank
        self.ahead, self.steps = plan(o, records, left_out, B, self.first, state["place"])
        self.data = Prompts(records, o.videos, processor, limits_of(o))
        wanted = []
        for step in range(self.first, self.steps):
            for place, index in self.own(step):
                indices = self.shown(place, index)
                wanted += [] if self.known(indices) else indices
        self.items = iter(loader(self.data, wanted, o.workers))

    def own(self, step: int) -> list[tuple[int, int]]:
        """(place, record's index) of this rank's prompts in a step."""
        start = (step - self.first) * self.B + self.rank * self.A
        return self.ahead[start:start + self.A]

    def records_of(self, step: int) -> list[dict]:
        return [self.records[index] for _, index in self.own(step)]

    def place_after(self, step: int) -> int:
        """Where the run's order goes on when a step is done."""
        return self.ahead[(step - self.first + 1) * self.B - 1][0] + 1

    def shown(self, place: int, index: int) -> list[int]:
        """The indices of a prompt's record, and of another clip's if asked for."""
        if self.o.masking != "replace":
            return [index]
        seed = seed_of(self.o, place)
        return [index, another_clip(self.records, self.left_out, index, seed)]

    def known(self, indices: list[int]) -> list[Skipped]:
        """Those whose decoder died or hung before a resume; they are not tried again."""
        found = []
        for record in (self.records[i] for i in indices):
            reason = self.log.known.get((record["row"], record["path"]))
            if reason:
                found.append(Skipped(record, reason))
        return found

    def take(self, step: int) -> list[tuple[Prompt, int, Tensor | None]]:
        """(prompt, seed, another clip's frames or None) of the step's records that can be used."""
        found = []
        for place, index in self.own(step):
            indices = self.shown(place, index)
            items = self.known(indices) or [next(self.items) for _ in indices]
            skipped = [item for item in items if isinstance(item, Skipped)]
            for item in skipped:
                self.log.skip(item.record, item.reason, step + 1)
            if not skipped:
                other = items[1].frames if len(items) > 1 else None
                found.append((items[0], seed_of(self.o, place), other))
        return found

    def watched(self) -> tuple[Prompt, int, Tensor | None] | None:
        """The run's first prompt, for a look at one question through the whole run."""
        order, _ = plan(self.o, self.records, self.left_out, self.B, 0, 0)
        items = list(loader(self.data, self.shown(-1, order[0][1]), min(1, self.o.workers)))
        if any(isinstance(item, Skipped) for item in items):
            return None
        return items[0], seed_of(self.o, -1), items[1].frames if len(items) > 1 else None
