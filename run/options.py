"""The options of a run: every choice with its default and reason, the presets, and what must be there before it starts."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from run import checkpoint
from attribution import SIGNALS, WEIGHTINGS
from ablations import DISTANCES, MASKINGS, ORDERS
from data import Limits, Prompts, read_records
from policy import load_processor
from prompt import Prompt

UNUSABLE = 0.05         # share of records that may be malformed or unreadable before a run stops
MAY_CHANGE = ("videos", "out", "max_steps", "epochs", "workers", "save_every", "keep", "sample_every", "resume", "report_to", "check",
              "data", "leave_out")    # when a run is continued; the number of records stands for the data

PRESETS = {
    "paper": dict(shift="abs", masking="hide", positions="unchanged", pool="group", ties="exact", normalize="length",
                  kl_on="selected", length_of="response", scoring_seconds="true"),
    "released": dict(shift="signed", masking="hide", positions="moved", pool="group", ties="threshold", normalize="selected",
                     kl_on="selected", length_of="selected", scoring_seconds="fixed"),
}

def option(default, help: str, **extra):
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help, **extra})
    return field(default=default, metadata={"help": help, **extra})


def one_of(*choices: str, help: str):
    return option(choices[0], help, choices=list(choices))


@dataclass
class Options:
    """Defaults are the paper's 7B recipe."""
    model: str = option("", "checkpoint folder or hub name of a Qwen2.5-VL, or random:3b, random:7b (architecture only)")
    data: str = option("", "records: a JSON list or JSON lines in Video-R1's form")
    videos: str = option("", "folder that the records' paths start from (default: the data file's)")
    out: str = option("runs/ktr", "where checkpoints, log.jsonl and samples.jsonl go")
    leave_out: str = option("", "records to leave out: a list written by `python data.py check`")
    preset: str = one_of("paper", "released", help="sets every choice where the paper and the released code differ")
    # attribution
    signals: list[str] = option(["visual", "temporal", "entropy"], f"of: {', '.join(SIGNALS)} (all: plain GRPO)")
    ratio: float = option(0.2, "share of the tokens that each signal keeps (paper: 20%)")
    shift: str = one_of("abs", "signed", help="how a change of log-probability becomes a score")
    masking: str = one_of(*MASKINGS, help="masked video: tokens not attended to, features zeroed, half of the tokens, another clip")
    positions: str = one_of("unchanged", "moved", help="positions of the text when the video is hidden")
    order: str = one_of(*ORDERS, help="shuffled video: frames at random, backwards, or blocks of four")
    distance: str = one_of("logp", *DISTANCES, help="move of the sampled token's log-probability, or between distributions")
    weighting: str = one_of("binary", *WEIGHTINGS, help="a key mask, or weights from the scores")
    pool: str = one_of("group", "response", help="tokens that compete for the top r")
    ties: str = one_of("exact", "threshold", help="exactly ceil(r n) tokens, or all that reach the last one's score")
    scoring_seconds: str = one_of("true", "fixed", help="seconds between frames when scoring: the clip's, or 1")
    # GRPO
    G: int = option(8, "completions per prompt")
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(0.95, "nucleus of sampling")
    max_new_tokens: int = option(768, "longest completion")
    beta: float = option(0.04, "weight of the KL to the starting checkpoint; 0 loads no reference model")
    clip: float = option(0.2, "of the probability ratio")
    normalize: str = one_of("length", "selected", help="what a completion's sum over key tokens is divided by")
    kl_on: str = one_of("selected", "all", help="tokens that bear the KL")
    length_of: str = one_of("response", "selected", help="what the length bonus counts")
    ordered_bonus: float = option(0.0, "T-GRPO: bonus for correct completions where order helps (Video-R1: 0.3)")
    ordered_factor: float = option(1.0, "T-GRPO: order helps if accuracy >= this x accuracy on shuffled frames (released: 0.8)")
    length_low: int = option(320, "shortest completion that earns the length bonus")
    length_high: int = option(512, "longest completion that earns it")
    length_bonus: float = option(0.2, "the bonus")
    # optimisation
    lr: float = option(2e-6, "peak learning rate, one value for every variant")
    warmup_steps: int = option(0, "steps of linear warm-up before the cosine")
    weight_decay: float = option(0.01, "of AdamW, norms and biases excluded")
    max_grad_norm: float = option(5.0, "gradient clipping")
    epochs: int = option(1, "passes over the data")
    max_steps: int = option(0, "stop after this many steps; 0: the epochs decide")
    prompts_per_step: int = option(1, "prompts per process and step, sampled together and accumulated")
    seed: int = option(42, "order of the data, sampling, and everything else that is random")
    # what is looked at
    max_frames: int = option(16, "frames per clip at most")
    sample_fps: float = option(2.0, "frames per second of the clip")
    max_pixels: int = option(128 * 28 * 28, "pixels per frame at most")
    image_pixels: int = option(512 * 28 * 28, "pixels of a still image at most")
    max_prompt: int = option(16384, "tokens; a longer prompt is skipped and counted, never cut")
    workers: int = option(min(4, os.cpu_count() or 1), "decoding processes per rank")
    # running
    dtype: str = one_of("bfloat16", "float32", help="of the weights that compute; the optimizer's are fp32")
    checkpointing: bool = option(True, "recompute activations in the backward pass")
    save_every: int = option(250, "steps between checkpoints, 116 GB each for the 7B; 0: none at all, for dry runs")
    keep: int = option(2, "checkpoints kept")
    sample_every: int = option(0, "steps between samples written down; 0: a hundred samples a run")
    resume: str = option("auto", "auto: continue from the newest checkpoint in --out; never: refuse a used --out")
    report_to: str = one_of("none", "tensorboard", "wandb", help="besides log.jsonl")
    offload: bool = option(False, "keep the optimizer's fp32 state in host memory: 12 bytes a weight, 99.5 GB for the 7B")
    check: bool = option(False, "check model, data and machine, then stop")

    @property
    def ratios(self) -> dict[str, float]:
        """What each signal keeps."""
        return {name: 1.0 if name == "all" else self.ratio for name in self.signals}


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line: the preset's values first, then whatever is given explicitly."""
    parser = HfArgumentParser(Options, description="Video-KTR: GRPO in which only key tokens carry the gradient", allow_abbrev=False)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**PRESETS[preset])
    options = Options(**vars(parser.parse_args(arguments)))
    for name in options.signals:
        if name not in SIGNALS:
            parser.error(f"unknown signal {name!r}; known: {', '.join(SIGNALS)}")
    if not 0 <= options.ratio <= 1:
        parser.error(f"--ratio must lie in 0..1, not {options.ratio}")
    for name in ("model", "data"):
        if not getattr(options, name):
            parser.error(f"--{name} is needed")
    options.videos = options.videos or str(Path(options.data).parent)
    return options


def preflight(o: Options) -> list[dict]:
    """The usable records, or a one-line error: files exist, records parse, a clip decodes, there are GPUs enough."""
    def fail(message: object):
        raise SystemExit(f"error: {message}")

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        fail(f"{here} processes on this machine but only {torch.cuda.device_count()} GPUs; lower NPROC")
    if not Path(o.data).is_file():
        fail(f"--data {o.data}: no such file")
    if not Path(o.videos).is_dir():
        fail(f"--videos {o.videos}: no such folder")
    if o.resume == "never" and (Path(o.out) / "log.jsonl").exists():
        fail(f"--out {o.out} holds a run already; choose another folder or --resume auto")
    try:
        records, malformed = read_records(o.data, o.leave_out or None)
    except (ValueError, OSError) as error:
        fail(error)
    try:
        processor = load_processor(o.model)
        weights_there(o.model)
    except (ValueError, OSError, AttributeError, KeyError) as error:        # another architecture lacks what is asked for
        fail(f"--model {o.model}: no complete Qwen2.5-VL checkpoint: {str(error).strip().splitlines()[0]}")
    if len(malformed) > UNUSABLE * (len(records) + len(malformed)):
        fail(f"{len(malformed)} of {len(records) + len(malformed)} records of {o.data} are malformed, the first: {malformed[0]}")
    if not records:
        fail(f"{o.data}: no usable records")
    first = Prompts(records, o.videos, processor, limits_of(o))
    tried = [first[i] for i in range(min(3, len(first)))]
    if not any(isinstance(item, Prompt) for item in tried):
        fail(f"the first records cannot be used: {tried[0].reason}")
    if int(os.environ.get("RANK", 0)) == 0:
        for line in malformed:
            print(f"left out: {line}")
    return records


def weights_there(model: str) -> None:
    """OSError if a checkpoint's folder lacks a file of its weights; hub names and random:7b pass."""
    folder = Path(model)
    index = folder / "model.safetensors.index.json"
    needed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if folder.is_dir() and missing:
        raise OSError(f"{missing[0]} is missing")


def limits_of(o: Options) -> Limits:
    return Limits(o.max_frames, o.sample_fps, o.max_pixels, o.image_pixels, o.max_prompt)
