"""Checkpoints that are complete or not there, and signals that ask for one.

A checkpoint is a folder in the Hugging Face layout (`from_pretrained` loads it) with a model card
and, under training_state/, one file per rank. It is written aside as NAME.part and renamed when
every rank has finished: whatever kills a run, its newest checkpoint is whole.
"""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from options import Options
from run.distributed import all_reduce_sum

CARD = """---
base_model: {model}
pipeline_tag: video-text-to-text
---
# {model} after {step} steps of GRPO on key tokens (Video-KTR, arXiv 2601.19686)
```json
{options}
```
"""


def all_of(out: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    folders = [path for path in out.glob("checkpoint-*")
               if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    return next(reversed(all_of(out)), None)


def save(out: Path, model, processor, optimizer, state: dict, o: Options) -> None:
    """Write OUT/checkpoint-STEP (state["step"]), then drop all but the newest --keep.

    Every rank calls it. OSError on all ranks, naming the last good checkpoint, if any rank cannot
    write; nothing partial stays.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    final, failure = out / f"checkpoint-{state['step']:06d}", None
    part = final.with_suffix(".part")
    try:
        (part / "training_state").mkdir(parents=True, exist_ok=True)
        torch.save({"optimizer": optimizer.state_dict(), **state},
                   part / "training_state" / f"rank-{rank:04d}.pt")
        if rank == 0:
            model.save_pretrained(part)
            processor.save(part)
            options = json.dumps(asdict(o) | state["made_by"], indent=2)
            (part / "README.md").write_text(
                CARD.format(model=o.model, step=state["step"], options=options), "utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:   # torch.save: a full disk is a
        failure = error                                         # RuntimeError
    failed = all_reduce_sum({"ranks": failure is not None}, model.device)["ranks"]
    if failed:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written "
                      f"({failure or 'another rank failed'}); free some space and start again with "
                      f"--resume auto, which continues from {newest(out) or 'the beginning'}"
                      ) from failure
    if rank == 0:
        for path in filter(Path.is_file, part.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())     # on the disk before the rename
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in all_of(out)[:-o.keep]:
            shutil.rmtree(old, ignore_errors=True)              # another process may be reading it
    all_reduce_sum({"ranks": 1}, model.device)          # none goes on before it is in place


def check_made_by(folder: Path, made_by: dict) -> None:
    """SystemExit where a checkpoint cannot be continued by a run that begins now: it was made by
    another number of processes, under other options or data, or is not whole."""
    files, ranks = sorted((folder / "training_state").glob("rank-*.pt")), made_by["processes"]
    there = made_by if not files else torch.load(       # any file says what made it
        files[0], map_location="cpu", weights_only=True, mmap=True)["made_by"]
    faults = [f"{name}: {there.get(name)!r} there, {value!r} now"
              for name, value in made_by.items() if there.get(name) != value]
    if len(files) != ranks and not faults:
        faults = [f"its training_state has {len(files)} of {ranks} files"]
    if faults:
        raise SystemExit(f"error: {folder} cannot be continued ({'; '.join(faults)}); start as it "
                         f"was started, or begin a new run from its weights: --model {folder} "
                         f"--out ANOTHER")


def load_state(folder: Path, optimizer) -> dict:
    """Restore this rank's part of the optimizer; returns the rest of the training state."""
    file = folder / "training_state" / f"rank-{optimizer.rank:04d}.pt"
    state = torch.load(file, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


def point_to_newest(out: Path) -> Path:
    """OUT/final becomes, and is returned as, a link to the newest checkpoint."""
    final = out / "final"
    final.unlink(missing_ok=True)
    final.symlink_to(newest(out).name)
    return final


class Preemption:
    """SIGTERM, and the first Ctrl-C, ask for a checkpoint at the end of the step."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a second one ends it now
