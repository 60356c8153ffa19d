"""Checkpoints that are complete or not there, and signals that ask for one.

A checkpoint is a folder in the Hugging Face layout (`from_pretrained` loads it) with a model card
and, under training_state/, one file per rank. It is written aside as NAME.part and renamed when
every rank has finished; older ones go only after that. So whatever kills a run, its newest
checkpoint is whole.
"""

import json
import os
import re
import shutil
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from options import Options
from run.distributed import all_reduce_sum

STOPS = (signal.SIGTERM, signal.SIGINT)
CARD = """---
base_model: {model}
library_name: transformers
pipeline_tag: video-text-to-text
tags: [grpo, video-ktr]
---

# Video-KTR: {model} after {step} steps

Trained with GRPO on key tokens (Video-KTR, arXiv 2601.19686), with these options:

```json
{options}
```
"""


def all_of(out: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    steps = {int(name[1]): path for path in out.glob("checkpoint-*") if path.is_dir()
             and (name := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [path for _, path in sorted(steps.items())]


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    return all_of(out)[-1] if all_of(out) else None


def sweep(out: Path) -> None:
    """Remove what a kill during a save has left. For rank 0, before the first step."""
    for part in out.glob("checkpoint-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def save(out: Path, model, processor, optimizer, state: dict, o: Options) -> None:
    """Write OUT/checkpoint-STEP (state["step"]), then drop all but the newest --keep.

    Every rank calls it. OSError on all ranks, naming the last good checkpoint, if any rank cannot
    write; nothing partial stays.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    final = out / f"checkpoint-{state['step']:06d}"
    part = final.with_suffix(".part")
    failure = None
    try:
        (part / "training_state").mkdir(parents=True, exist_ok=True)
        own = {"optimizer": optimizer.state_dict(), **state}
        torch.save(own, part / "training_state" / f"rank-{rank:04d}.pt")
        if rank == 0:
            model.save_pretrained(part)
            processor.save(part)
            options = json.dumps(asdict(o) | state["made_by"], indent=2)
            card = CARD.format(model=o.model, step=state["step"], options=options)
            (part / "README.md").write_text(card, "utf-8")
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
        for path in part.rglob("*"):        # on the disk, should the machine go down after the
            if path.is_file():              # rename
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in all_of(out)[:-o.keep]:
            shutil.rmtree(old, ignore_errors=True)              # somebody may be reading it
    all_reduce_sum({"ranks": 1}, model.device)          # none goes on before it is in place


def check_made_by(folder: Path, made_by: dict) -> None:
    """SystemExit where a checkpoint cannot be continued by a run that begins now: it was made by
    another number of processes, under other options or data, or is not whole."""
    files, ranks = sorted((folder / "training_state").glob("rank-*.pt")), made_by["processes"]
    there = made_by if not files else torch.load(       # any file says what made it
        files[0], map_location="cpu", weights_only=True, mmap=True)["made_by"]
    changed = [f"{name}: {there.get(name)!r} there, {value!r} now"
               for name, value in made_by.items() if there.get(name) != value]
    if changed:
        raise SystemExit(f"error: {folder} was made otherwise ({'; '.join(changed)}); to continue "
                         f"exactly, start as it was started, or begin a new run from its weights: "
                         f"--model {folder} --out ANOTHER")
    if len(files) != ranks:
        raise SystemExit(f"error: {folder}/training_state has {len(files)} of {ranks} files; copy "
                         f"it whole, or begin a new run from its weights: --model {folder} --out "
                         f"ANOTHER")


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
    """SIGTERM, and the first Ctrl-C, ask for a checkpoint at the end of the step.

    A process that waits in vain for another one (in a collective) cannot hear it. So a thread
    listens too, and ends the process when no step ends within `grace` seconds or three times the
    longest step so far, unless it is `saving`.
    """

    def __init__(self, grace: float = 45.0):
        self.asked, self.saving, self.heard = False, False, threading.Event()
        self.grace = grace
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)         # written even while the main thread waits
        for number in STOPS:
            signal.signal(number, self._ask)
        threading.Thread(target=self._end_if_stuck, args=(read,), daemon=True).start()

    def _ask(self, number: int, _) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)        # a second one ends it now

    def step_ended(self, seconds: float, ranks_asked: float) -> bool:
        """Whether to stop now, the same on every rank; ranks_asked: how many heard a signal."""
        self.grace = max(self.grace, 3 * seconds)
        if ranks_asked:
            self.heard.set()
        return ranks_asked > 0

    def _end_if_stuck(self, pipe: int) -> None:
        while os.read(pipe, 1)[0] not in STOPS:
            pass
        while not self.heard.wait(self.grace):
            if not self.saving:
                os.write(2, b"stopped: no step ended in time, so no checkpoint is saved\n")
                os._exit(1)
