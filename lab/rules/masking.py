"""Other ways to mask the video (paper, ablation of the visual perturbation).

    visual_zero     its features zeroed in place
    visual_half     half of its tokens, picked by chance, left out
    visual_replace  the clip of another question, in as many frames of the same size
`--rule lab/rules/masking.py` takes the first; the others: `--signals visual_half temporal entropy`.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution import COUNTERFACTUALS
from data import Limits, load_media, read_records
from engine.workers import loader
from lab.rules.common import leave_out_tokens
from options import Options
from prompt import BadRecord, Prompt, Vision
from rollout import Rollout
from run.stream import limits_of

OPTIONS = "--signals visual_zero temporal entropy"


def zero(r: Rollout, o: Options) -> Prompt:
    return replace(r.prompt, zeroed=True)


def half(r: Rollout, o: Options) -> Prompt:
    count = int(r.prompt.visual.sum())
    stays = torch.zeros(count, dtype=torch.bool)
    stays[torch.randperm(count, generator=r.generator)[:count // 2]] = True
    return leave_out_tokens(r.prompt, stays)


@dataclass
class Media:
    """Map-style data set: index -> the frames of a record's clip, or None where it has none."""
    records: list[dict]
    root: str
    limits: Limits
    vision: Vision

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            return load_media(self.records[index], self.root, self.limits, self.vision)[0]
        except BadRecord:
            return None

    def lost(self, index: int, reason: str) -> None:
        """What stands for a clip whose decoding process died or hung."""


@cache
def records_in(data: str, leave_out: str) -> list[dict]:
    return read_records(data, leave_out or None)[0]


def another(r: Rollout, o: Options) -> Prompt:
    """Decoded now, in a process that may die; the next clip is tried where one cannot be read."""
    records, frames = records_in(o.data, o.leave_out), r.prompt.frames
    indices = torch.randperm(len(records), generator=r.generator).tolist()
    others = [i for i in indices if records[i]["path"] != r.prompt.record["path"]]
    media = loader(Media(records, o.videos, limits_of(o), r.prompt.vision), others, workers=1)
    with closing(media):
        other = next((clip for clip in media if clip is not None), None)
    if other is None:
        raise SystemExit(f"error: visual_replace: {o.data} has no other clip that decodes")
    index = torch.linspace(0, len(other) - 1, len(frames)).round().long()
    size = frames.shape[-2:]
    return r.prompt.with_frames(F.interpolate(other[index], size=size, mode="bicubic",
                                              antialias=True))


COUNTERFACTUALS |= {"visual_zero": zero, "visual_half": half, "visual_replace": another}
