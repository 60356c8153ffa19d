"""The prompts of a run: in which order, which in which step and on which rank, decoded ahead."""

from collections.abc import Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from random import Random

import torch

from data import Limits, Prompts, Skipped, loader
from options import Options
from prompt import Processor, Prompt
from run.logs import Log, lost_records


def limits_of(o: Options) -> Limits:
    return Limits(o.max_frames, o.sample_fps, o.max_pixels, o.image_pixels, o.max_prompt,
                  pixels=o.pixels, seconds=o.seconds, text_after=o.text_after)


def record_order(seed: int, records: int, per_epoch: int, left_out: set[int],
                 first_place: int) -> Iterator[tuple[int, int]]:
    """(place, index of its record), from first_place on, without end. Places count through the run;
    each epoch is another permutation of the records, cut to per_epoch of them. What is left out
    keeps its places, so that more may be left out when a run goes on."""
    for place in count(first_place):
        epoch, i = divmod(place, per_epoch)
        if i == 0 or place == first_place:
            generator = torch.Generator().manual_seed(seed + epoch)
            permuted = torch.randperm(records, generator=generator).tolist()
        if permuted[i] not in left_out:
            yield place, permuted[i]


def plan(o: Options, records: int, left_out: set[int], prompts: int, first_step: int,
         first_place: int) -> tuple[list[tuple[int, int]], int]:
    """The (place, index) of the prompts to come, `prompts` in each step; the whole run's steps."""
    per_epoch, usable = records // prompts * prompts, records - len(left_out)
    endless = iter(())
    if usable >= prompts:
        endless = record_order(o.seed, records, per_epoch, left_out, first_place)
    if o.max_steps:
        ahead = list(islice(endless, max(0, o.max_steps - first_step) * prompts))
    else:
        ahead = list(takewhile(lambda item: item[0] < o.epochs * per_epoch, endless))
    steps = first_step + len(ahead) // prompts
    if usable < prompts or not steps:
        raise SystemExit(f"error: {usable} records are too few for one step of {prompts} prompts")
    return ahead, steps


def seed_of(o: Options, place: int) -> int:
    """The even seed of the prompt at a place, for sampling; seed + 1 is for its signals. Below
    2**32: torch's CPU generator heeds no more of a seed."""
    return 2 * Random(f"{o.seed} {place}").getrandbits(31)


class Stream:
    """Hands out a rank's prompts, step by step, decoded in worker processes ahead of need."""

    def __init__(self, o: Options, records: list[dict], left_out: set[int], processor: Processor,
                 log: Log, rank: int, ranks: int, state: dict):
        self.o, self.records, self.log, self.rank = o, records, log, rank
        self.all_ranks_prompts = o.prompts_per_step * ranks                     # in a step
        self.first = state["step"]
        self.ahead, self.steps = plan(o, len(records), left_out, self.all_ranks_prompts, self.first,
                                      state["place"])
        self.lost = lost_records(Path(o.out)) if self.first else {}     # before this start
        self.data = Prompts(records, o.videos, processor, limits_of(o))
        self.data.avoided = self.lost
        steps = range(self.first, self.steps)
        own = [index for step in steps for _, index in self.places_of_rank(step)]
        self.items = loader(self.data, own, o.workers)

    def places_of_rank(self, step: int) -> list[tuple[int, int]]:
        """(place, record's index) of this rank's prompts in a step."""
        n = self.o.prompts_per_step
        start = (step - self.first) * self.all_ranks_prompts + self.rank * n
        return self.ahead[start:start + n]

    def place_after(self, step: int) -> int:
        """Where the run's order goes on when a step is done."""
        return self.ahead[(step - self.first + 1) * self.all_ranks_prompts - 1][0] + 1

    def prompts_of_step(self, step: int) -> list[tuple[Prompt, int]]:
        """(prompt, seed) of the step's records that can be used; the others are named in the log
        (once, also if the run is continued) and not replaced."""
        usable = []
        for place, _ in self.places_of_rank(step):
            item = next(self.items)
            if not isinstance(item, Skipped):
                usable.append((item, seed_of(self.o, place)))
            elif item.record["row"] not in self.lost:
                self.log.skip(item, step + 1)
        return usable

    def watched(self, left_out: set[int]) -> tuple[Prompt, int] | None:
        """(prompt, seed) of the run's first record, for a look at one question through the whole
        run; the same when a run goes on. None if that record cannot be used."""
        n = len(self.records)
        _, first = next(record_order(self.o.seed, n, n, left_out, 0))
        (item,) = loader(self.data, [first], min(1, self.o.workers))
        return None if isinstance(item, Skipped) else (item, seed_of(self.o, -1))
