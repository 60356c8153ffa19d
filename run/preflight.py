"""What must be there before a run starts. All mistakes are told here, before anything is loaded."""

import os
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

from data import Prompts, loader, read_records, useless
from engine.weights import config_of, weight_count
from options import MAY_CHANGE, Options
from policy import load_processor
from prompt import Prompt
from run.arguments import check_names
from run.checkpoint import check_made_by, newest
from run.logs import lost_records
from run.stream import limits_of

UNUSABLE = 0.05         # share of records that may be malformed or unreadable before a run stops
ACTIVATIONS, FURTHER = 11, 2.4      # bytes; measured: 10.3 and 2.4 (docs/speed.md)


def check_start(o: Options) -> tuple[list[dict], set[int]]:
    """The well-formed records and the indices of those to leave out. SystemExit, in one line, if
    something is missing: files, records, weights, a clip that decodes, GPUs and their memory."""
    def fail(message: object):
        raise SystemExit(f"error: {message}")

    check_names(o)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here and os.environ.get("KTR_SHARE_GPU") != "1":
        fail(f"{here} processes on this machine but only {gpus} GPUs; lower NPROC")
    out = Path(o.out)
    previous = newest(out)
    if o.resume == "never" and (previous or (out / "log.jsonl").exists()):
        fail(f"--out {out} holds a run already; choose another folder or --resume auto")
    try:
        folder = next(path for path in (out, *out.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"--out {out} cannot be written: {error}")
    try:
        records, malformed = read_records(o.data)
        usable = {record["row"] for record in read_records(o.data, o.leave_out or None)[0]}
    except (ValueError, OSError) as error:
        fail(error)
    try:
        processor = load_processor(o.model)
    except (ValueError, OSError, AttributeError, KeyError) as error:    # another architecture
        fail(f"--model {o.model}: no checkpoint to start from: "
             f"{str(error).strip().splitlines()[0]}")
    ranks = int(os.environ.get("WORLD_SIZE", here * int(os.environ.get("NNODES", 1))))
    check_memory(o, ranks)
    rows = len(records) + len(malformed)
    if len(malformed) > UNUSABLE * rows and not o.leave_out:    # then the list has been seen
        fail(f"{len(malformed)} of {rows} records of {o.data} are malformed, the first: "
             f"{malformed[0]}")

    if previous:
        check_made_by(previous, made_by(o, ranks, records))
    candidates = usable - lost_records(out).keys() if previous else usable
    trial = [i for i, r in enumerate(records) if r["row"] in candidates][:3]
    data = Prompts(records, o.videos, processor, limits_of(o))
    tried = list(loader(data, trial, workers=min(1, o.workers)))
    if not any(isinstance(item, Prompt) for item in tried):
        reason = tried[0].reason if tried else "all are left out"
        fail(f"{o.data}: the first records cannot be used: {reason}")
    if int(os.environ.get("RANK", 0)) == 0:
        for line in malformed:
            print(f"left out: {line}")
        reasons = [why for r in records if r["row"] in usable and (why := useless(r))]
        if reasons:
            print(f"nothing can be learnt from {len(reasons)} of {rows} records, the first: "
                  f"{reasons[0]} (`python data.py check` lists them for --leave_out)")
    return records, {i for i, r in enumerate(records) if r["row"] not in usable}


def made_by(o: Options, ranks: int, records: list[dict]) -> dict:
    """The settings that a continued run must share with its start."""
    made = {name: value for name, value in asdict(o).items() if name not in (*MAY_CHANGE, "rule")}
    texts = [sha256(Path(file).read_bytes()).hexdigest()[:8] for file in o.rule]
    return made | {"text of rules": texts, "processes": ranks, "records": len(records)}


def check_memory(o: Options, ranks: int) -> None:
    """SystemExit, saying what to do, where a GPU cannot hold a run. Bytes a weight: 2, 2 of the
    reference (bf16); and unless it is frozen 2 of gradient, 12/N of the optimizer on N ranks.
    With checkpointing, ACTIVATIONS for each token, layer and hidden unit of a prompt's row, FURTHER
    for further prompts'; without it far more, which is not counted."""
    if not torch.cuda.is_available():
        return
    weights, trained = weight_count(o.model), weight_count(o.model, o.freeze)
    each = torch.finfo(getattr(torch, o.dtype)).bits // 8
    state = 0 if o.offload else 12 * min(trained, weights / ranks)      # of the fullest shard
    config = config_of(o.model)
    text, v = config.text_config, config.vision_config
    shown = max(o.max_frames * o.max_pixels / v.temporal_patch_size, o.image_pixels)
    tokens = shown / (v.patch_size * v.spatial_merge_size) ** 2
    row = (min(tokens, o.max_prompt) + o.G * o.max_new_tokens) * text.num_hidden_layers
    active = each / 2 * (ACTIVATIONS + FURTHER * (o.prompts_per_step - 1)) * row * text.hidden_size
    needed = weights * each * (2 if o.beta > 0 else 1) + trained * each + state + active
    room = torch.cuda.get_device_properties(0).total_memory
    if needed > room:
        raise SystemExit(
            f"error: a GPU needs {needed / 2**30:.0f} GiB and has {room / 2**30:.0f}; what helps: "
            f"more GPUs, --offload ({12 * trained / 1e9:.0f} GB of host), --beta 0, fewer frames")
