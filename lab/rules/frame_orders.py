"""Other orders of the frames (paper, ablation of the temporal perturbation).

    temporal_reverse        the last frame first
    temporal_blocks         blocks of four frames in another order
    temporal_with_times     Qwen3-VL: temporal patches in another order, each after its own time in
                            words (others' prompts hold no times: frames in another order)
`--rule lab/rules/frame_orders.py` takes the first.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attribution import COUNTERFACTUALS, frame_order, shuffle_frames
from options import Options
from prompt import Prompt, rope_positions
from rollout import Rollout

OPTIONS = "--signals visual temporal_reverse entropy"


def reverse(r: Rollout, o: Options) -> Prompt:
    still = r.prompt.kind == "image" or len(r.prompt.frames) < 2
    return r.prompt if still else r.prompt.with_frames(r.prompt.frames.flip(0))


def blocks(r: Rollout, o: Options, size: int = 4) -> Prompt:
    """Where there is one block, its frames are shuffled."""
    parts = torch.arange(len(r.prompt.frames)).split(size)
    if len(parts) == 1:
        return shuffle_frames(r, o)
    order = torch.cat([parts[i] for i in frame_order(len(parts), r.generator)])
    return r.prompt.with_frames(r.prompt.frames[order])


def with_times(r: Rollout, o: Options) -> Prompt:
    if not r.prompt.vision.timestamps:
        return shuffle_frames(r, o)
    n = r.prompt.grid[0]
    if r.prompt.kind == "image" or n < 2:
        return r.prompt
    return rearranged(r.prompt, frame_order(n, r.generator))


def rearranged(p: Prompt, order: Tensor) -> Prompt:
    """The prompt with its temporal patches in this order (t,), each still after its own time."""
    ends = (p.visual[:-1] & ~p.visual[1:]).nonzero()[:, 0] + 2          # after each vision end
    opening = p.ids[ends[0]]                            # of "<1.5 seconds>", as of the first time
    first = (p.ids[:ends[0]] == opening).nonzero()[-1]
    before, *patches, after = torch.arange(len(p.ids)).tensor_split(torch.cat([first, ends]))
    index = torch.cat([before, *(patches[i] for i in order), after])
    visual, v = p.visual[index], p.vision
    positions = rope_positions(visual, p.grid, v.merge, ticks=1)
    frames = torch.cat([p.frames, p.frames[-1:].expand(-len(p.frames) % v.temporal, -1, -1, -1)])
    frames = frames.unflatten(0, (-1, v.temporal))[order].flatten(0, 1)
    return replace(p, ids=p.ids[index], visual=visual, positions=positions, frames=frames,
                   next_position=int(positions.max()) + 1)


COUNTERFACTUALS |= {"temporal_reverse": reverse, "temporal_blocks": blocks,
                    "temporal_with_times": with_times}
