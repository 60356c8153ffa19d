"""Checkpoints that are complete or not there.

A checkpoint is a folder in the Hugging Face layout (`from_pretrained` loads it) with a model card and, under
training_state/, one file per rank. It is written aside as NAME.part and renamed when every rank has finished;
older ones go only after that. So whatever kills the run, the newest NAME is whole. `Preemption` hears SIGTERM.
"""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from run.distributed import agree


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    found = sorted(p for p in out.glob("checkpoint-*") if p.is_dir() and p.suffix != ".part")
    return found[-1] if found else None


def save(out: Path, model, processor, optimizer, state: dict, options: dict, steps: int, keep: int) -> None:
    """Write OUT/checkpoint-STEP (state["step"]) and drop all but the newest `keep`. Every rank calls it.

    Raises OSError on all ranks, naming the last good checkpoint, if any rank cannot write; nothing partial stays.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    final = out / f"checkpoint-{state['step']:06d}"
    part = final.with_suffix(".part")
    failure = None
    try:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            (part / "training_state").mkdir(parents=True)
    except OSError as error:
        failure = error
    try:
        if agree(failure is None, model.device):        # the folder is there
            torch.save({"optimizer": optimizer.state_dict(), **state}, part / "training_state" / f"rank-{rank:04d}.pt")
            if rank == 0:
                model.save_pretrained(part)
                processor.save(part)
                (part / "README.md").write_text(model_card(options, state["step"], steps))
        elif failure is None:
            failure = OSError("rank 0 could not make the folder")
    except (OSError, RuntimeError, SafetensorError) as error:   # torch.save reports a full disk as RuntimeError
        failure = error
    if not agree(failure is None, model.device):
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        last = newest(out)
        raise OSError(f"checkpoint {final} could not be written ({failure or 'another rank failed'}); free some space "
                      f"and start again with --resume auto, which continues from {last or 'the beginning'}") from failure
    if rank == 0:
        for path in part.rglob("*"):                    # on the disk, should the machine go down after the rename
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        complete = sorted(p for p in out.glob("checkpoint-*") if p.suffix != ".part")
        for old in complete[:-keep]:
            shutil.rmtree(old, ignore_errors=True)      # somebody may be reading it
    agree(True, model.device)                           # nobody goes on before the checkpoint is in place


def load_state(folder: Path, optimizer) -> dict:
    """Restore this rank's optimizer shard; returns the rest of the training state."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = sorted((folder / "training_state").glob("rank-*.pt"))
    if len(files) != optimizer.world:
        raise SystemExit(f"error: {folder} was written by {len(files)} processes and this run has {optimizer.world}; "
                         f"start as many, or begin a new run from its weights with --model {folder}")
    state = torch.load(files[rank], map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


def model_card(options: dict, step: int, steps: int) -> str:
    """README.md of a checkpoint: what it is and the options that made it."""
    base = options["model"]
    front = f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: video-text-to-text\ntags: [grpo, video-ktr]\n---\n"
    return (f"{front}\n# Video-KTR: {base} after {step} of {steps} steps\n\nTrained with GRPO on key tokens (Video-KTR, "
            f"arXiv 2601.19686).\n\n```json\n{json.dumps(options, indent=2)}\n```\n")


class Preemption:
    """SIGTERM asks for a checkpoint at the next step boundary; a process stuck in a collective leaves by itself, unless it
    is `saving`, which may take long."""

    def __init__(self, grace: float = 45.0):
        self.asked, self.saving, self.heard = False, False, threading.Event()
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)             # written even while the main thread waits inside a collective
        signal.signal(signal.SIGTERM, self._ask)
        threading.Thread(target=self._watch, args=(read, grace), daemon=True).start()

    def _ask(self, *_):
        self.asked = True

    def _watch(self, pipe: int, grace: float):
        while os.read(pipe, 1) != bytes([signal.SIGTERM]):
            pass
        while not self.heard.wait(grace):
            if not self.saving:
                os.write(2, b"SIGTERM: no step ended in time, leaving without a checkpoint\n")
                os._exit(1)
