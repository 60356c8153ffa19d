"""The prompts of a run: checked before it starts, ordered, decoded ahead, handed out step by step.

    preflight   what must be there: files, records, weights, a clip that decodes, GPUs enough
    Stream      which record is looked at in which step, on which rank; records that cannot be used
"""

import json
import os
from collections.abc import Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from random import Random

import torch

from data import Limits, Prompts, Skipped, loader, read_records, useless
from policy import load_processor, weight_count
from prompt import Processor, Prompt
from run.checkpoint import newest
from run.logs import Log, lost_records
from run.options import Options

UNUSABLE = 0.05         # share of records that may be malformed or unreadable before a run stops


def preflight(o: Options) -> tuple[list[dict], set[int]]:
    """The well-formed records and the indices of those to leave out; SystemExit, in one line, if
    something is missing: files, records, weights, a clip that decodes, GPUs."""
    def fail(message: object):
        raise SystemExit(f"error: {message}")

    here, gpus, out = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count(), o.out
    if 0 < gpus < here and os.environ.get("KTR_SHARE_GPU") != "1":
        fail(f"{here} processes on this machine but only {gpus} GPUs; lower NPROC")
    if o.resume == "never" and (Path(out) / "log.jsonl").exists():
        fail(f"--out {out} holds a run already; choose another folder or --resume auto")
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
    check_memory(o)
    rows = len(records) + len(malformed)
    if len(malformed) > UNUSABLE * rows and not o.leave_out:    # then the list has been seen
        fail(f"{len(malformed)} of {rows} records of {o.data} are malformed, the first: "
             f"{malformed[0]}")

    lost = lost_records(Path(out)) if newest(Path(out)) else {}
    left_out = {i for i, record in enumerate(records) if record["row"] not in usable}
    trial = [i for i, record in enumerate(records)
             if i not in left_out and record["row"] not in lost][:3]
    data = Prompts(records, o.videos, processor, limits_of(o))
    tried = list(loader(data, trial, workers=min(1, o.workers)))
    if not any(isinstance(item, Prompt) for item in tried):
        reason = tried[0].reason if tried else "all are left out"
        fail(f"{o.data}: the first records cannot be used: {reason}")
    if int(os.environ.get("RANK", 0)) == 0:
        for line in malformed:
            print(f"left out: {line}")
        vain = [why for r in records if r["row"] in usable and (why := useless(r))]
        if vain:
            print(f"nothing can be learnt from {len(vain)} of {rows} records, the first: {vain[0]} "
                  f"(`python data.py check` lists them for --leave_out)")
    return records, left_out


def weights_there(folder: Path) -> None:
    """OSError if a checkpoint's folder lacks a file of its weights; hub names pass."""
    index, needed = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        needed = set(json.loads(index.read_text())["weight_map"].values())
    for name in needed:
        if folder.is_dir() and not (folder / name).is_file():
            raise OSError(f"{name} is missing")


def check_memory(o: Options) -> None:
    """SystemExit, saying what to do, where a GPU cannot hold a run. Bytes a weight: 2, 2 of the
    reference (bf16); and unless it is frozen 2 of gradient, 12/N of N processes' optimizer."""
    if not torch.cuda.is_available():
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * int(os.environ.get("NNODES", 1))
    world = int(os.environ.get("WORLD_SIZE", here))             # torchrun's; train.sh checks before
    weights, trained = weight_count(o.model), weight_count(o.model, o.freeze)
    each = torch.finfo(getattr(torch, o.dtype)).bits // 8
    lasting = weights * each * (2 if o.beta > 0 else 1)
    state = 0 if o.offload else 12 * min(trained, weights / world)      # of the fullest shard
    needed = (lasting + trained * each + state) / 2 ** 30
    there = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    if needed > 0.9 * there:                                    # the rest is for activations
        raise SystemExit(
            f"error: each GPU needs {needed:.0f} GiB beside activations and has {there:.0f}; take "
            f"more GPUs, or --offload ({12 * trained / 1e9:.0f} GB go to the host's memory), or "
            f"--beta 0")


def limits_of(o: Options) -> Limits:
    return Limits(o.max_frames, o.sample_fps, o.max_pixels, o.image_pixels, o.max_prompt,
                  pixels=o.pixels, seconds=o.seconds)


def order(seed: int, records: int, per_epoch: int, left_out: set[int],
          begin: int) -> Iterator[tuple[int, int]]:
    """(place, index of its record) without end, from a place on. Every epoch is another permutation
    of the records, cut to per_epoch of them; records left out are passed over, and as they keep
    their places more of them may be left out when a run goes on."""
    for place in count(begin):
        epoch, i = divmod(place, per_epoch)
        if i == 0 or place == begin:
            generator = torch.Generator().manual_seed(seed + epoch)
            permuted = torch.randperm(records, generator=generator).tolist()
        if permuted[i] not in left_out:
            yield place, permuted[i]


def plan(o: Options, records: int, left_out: set[int], B: int, first: int,
         begin: int) -> tuple[list[tuple[int, int]], int]:
    """The (place, index) of the run's prompts from step `first` and place `begin` on, B a step; and
    the number of steps of the whole run."""
    per_epoch, usable = records // B * B, records - len(left_out)
    if usable < B:
        raise SystemExit(f"error: {usable} records are too few for one step of {B} prompts")
    endless = order(o.seed, records, per_epoch, left_out, begin)
    if o.max_steps:
        ahead = list(islice(endless, max(0, o.max_steps - first) * B))
    else:
        ahead = list(takewhile(lambda item: item[0] < o.epochs * per_epoch, endless))
    return ahead, first + len(ahead) // B


def seed_of(o: Options, place: int) -> int:
    """The even seed of the prompt at a place of the run, for sampling; the next one is for its
    signals. Below 2**32, since torch's CPU generator heeds no more of a seed."""
    return 2 * Random(f"{o.seed} {place}").getrandbits(31)


class Stream:
    """Hands out a rank's prompts, step by step, decoded in worker processes ahead of need."""

    def __init__(self, o: Options, records: list[dict], left_out: set[int], processor: Processor,
                 log: Log, rank: int, world: int, state: dict):
        """state: of the run, with the steps done and the place to go on from."""
        self.o, self.records, self.log, self.rank = o, records, log, rank
        self.A, self.B = o.prompts_per_step, o.prompts_per_step * world     # a rank's, of all ranks
        self.first = state["step"]
        self.ahead, self.steps = plan(o, len(records), left_out, self.B, self.first, state["place"])
        self.lost = lost_records(Path(o.out)) if self.first else {}     # before this start
        data = Prompts(records, o.videos, processor, limits_of(o))
        data.avoided = self.lost
        own = [index for step in range(self.first, self.steps) for _, index in self.own(step)]
        self.items = loader(data, own, o.workers)

    def own(self, step: int) -> list[tuple[int, int]]:
        """(place, record's index) of this rank's prompts in a step."""
        start = (step - self.first) * self.B + self.rank * self.A
        return self.ahead[start:start + self.A]

    def records_of(self, step: int) -> list[dict]:
        return [self.records[index] for _, index in self.own(step)]

    def place_after(self, step: int) -> int:
        """Where the run's order goes on when a step is done."""
        return self.ahead[(step - self.first + 1) * self.B - 1][0] + 1

    def take(self, step: int) -> list[tuple[Prompt, int]]:
        """(prompt, seed) of the step's records that can be used; the others are named in the log
        (once, also if the run is continued) and not replaced."""
        found = []
        for place, _ in self.own(step):
            item = next(self.items)
            if not isinstance(item, Skipped):
                found.append((item, seed_of(self.o, place)))
            elif item.record["row"] not in self.lost:
                self.log.skip(item.record, item.reason, step + 1)
        return found

    def watched(self, left_out: set[int], processor: Processor) -> tuple[Prompt, int] | None:
        """(prompt, seed) of the run's first record, for a look at one question through the whole
        run; the same when a run goes on. None if that record cannot be used."""
        n = len(self.records)
        _, first = next(order(self.o.seed, n, n, left_out, 0))
        data = Prompts(self.records, self.o.videos, processor, limits_of(self.o))
        data.avoided = self.lost
        (item,) = loader(data, [first], min(1, self.o.workers))
        return None if isinstance(item, Skipped) else (item, seed_of(self.o, -1))
