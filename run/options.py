"""The options of a run: every choice with its default, its reason, and the values it may have.

PRESETS set all choices where the paper's text and the released code differ (README, docs/choices).
"""

import importlib.util
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

PRESETS = {
    "paper": {},                                # the defaults
    "released": dict(
        shift="signed", positions="moved", ties="threshold", normalize="selected",
        length_of="selected", top_k=50, pixels="released", format_pattern="released"),
}
PARTS = ("vision", "projector", "language")     # of the model, policy.parts
MAY_CHANGE = (      # when a run is continued
    "data", "videos", "out", "leave_out", "max_steps", "epochs", "workers", "save_every", "keep",
    "sample_every", "resume", "report_to", "check", "offload")


def option(default, help: str, **extra):
    metadata = {"help": help, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(*choices: str, help: str):
    return option(choices[0], help, choices=list(choices))


@dataclass
class Options:
    """Defaults are the paper's 7B recipe."""
    model: str = option("", "folder or hub name of a Qwen-VL, or random:7b, random:qwen3-8b, ..")
    data: str = option("", "records: a JSON list or JSON lines in Video-R1's form")
    videos: str = option("", "folder that the records' paths start from (default: the data's)")
    out: str = option("runs/ktr", "where checkpoints, log.jsonl and samples.jsonl go")
    leave_out: str = option("", "records to pass over: a list that `data.py check` wrote")
    preset: str = one_of("paper", "released", help="sets every choice where the two differ")
    rule: list[str] = option([], "files that register rules and may have OPTIONS (docs/rules.md)")
    freeze: list[str] = option([], "parts; default: train all weights", choices=list(PARTS))
    # attribution
    signals: list[str] = option(["visual", "temporal", "entropy"], "of attribution.SIGNALS")
    ratio: float = option(0.2, "share of the tokens that each signal keeps (paper: 20%%)")
    shift: str = one_of("abs", "signed", "k3", help="makes a score of a changed log-probability")
    masking: str = option("hide", "of ablations.MASKINGS: hide, zero, half, replace")
    positions: str = one_of("unchanged", "moved", help="of the text when the video is hidden")
    order: str = option("random", "of ablations.ORDERS: random, reverse, blocks")
    times: str = one_of("kept", "moved", help="Qwen3-VL's times in words when frames are shuffled: "
                        "in order, or along with their frames")
    distance: str = option("logp", "the token's log-probability's, or of ablations.DISTANCES")
    weighting: str = option("binary", "of attribution.WEIGHTS: a key mask, or soft weights")
    pool: str = one_of("group", "response", help="tokens that compete for the top r")
    ties: str = one_of("exact", "threshold", help="ceil(r n) tokens, or all from a quantile up")
    # GRPO
    G: int = option(8, "completions per prompt")
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(0.95, "nucleus of sampling")
    top_k: int = option(0, "likeliest tokens that may be sampled; 0: all")
    max_new_tokens: int = option(768, "longest completion")
    beta: float = option(0.04, "weight of the KL to the starting checkpoint; 0 loads none")
    clip: float = option(0.2, "of the probability ratio")
    clip_high: float = option(0.0, "of ratios above 1; 0: the same (DAPO: 0.28)")
    updates: int = option(1, "per rollout; from the second on the clip may bind")
    normalize: str = one_of("length", "selected", "tokens", "constant", help="divides the sums")
    advantage: str = option("group", "of attribution.ADVANTAGES")
    penalty: str = option("none", "of attribution.PENALTIES: a further term of the loss")
    bonus: str = option("none", "of attribution.BONUSES: a further reward")
    kl_on: str = one_of("selected", "all", help="tokens that bear the KL")
    kl_estimator: str = one_of("k3", "k1", "k2", help="of the KL, Schulman's names")
    filter: str = one_of("none", "accuracy", "reward", help="groups alike in it bear no loss")
    mask_cut: bool = option(False, "completions cut at the limit bear no loss")
    format_pattern: str = one_of("strict", "released", help="of the format reward")
    length_of: str = one_of("response", "selected", help="what the length bonus counts")
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
    prompts_per_step: int = option(1, "per process, sampled together and accumulated")
    seed: int = option(42, "order of the data, sampling, all else that is random")
    # what is looked at
    max_frames: int = option(16, "frames per clip at most")
    sample_fps: float = option(2.0, "frames per second of the clip")
    seconds: str = one_of("one", "true", help="between temporal patches: 1.0, as the recipe's "
                          "checkpoint learnt it, or the clip's own, for a stock Qwen2.5-VL")
    text_after: str = one_of("clip", "frame", help="where positions go on after a clip: after its "
                             "highest position, as Qwen2-VL and Qwen2.5-VL checkpoints learnt it, "
                             "or after the larger side of a frame, as transformers 5 has it")
    pixels: str = one_of("paper", "released", help="the next two, or the release's limits")
    max_pixels: int = option(128 * 28 * 28, "pixels per frame at most")
    image_pixels: int = option(512 * 28 * 28, "pixels of a still image at most")
    max_prompt: int = option(16384, "tokens; longer prompts are skipped, never cut")
    workers: int = option(min(4, os.cpu_count() or 1), "decoding processes per rank")
    # running
    dtype: str = one_of("bfloat16", "float32", help="of the computing weights, not the optimizer's")
    checkpointing: bool = option(True, "recomputation of activations in the backward pass")
    offload: bool = option(False, "optimizer's state in host memory: trains the 7B on one GPU")
    save_every: int = option(250, "steps between checkpoints (7B: 116 GB each); 0: none at all")
    keep: int = option(2, "checkpoints kept")
    sample_every: int = option(0, "steps between samples; 0: a hundred samples a run")
    resume: str = one_of("auto", "never", help="go on from the newest checkpoint in --out, or "
                         "refuse a used --out")
    report_to: str = one_of("none", "tensorboard", "wandb", help="besides log.jsonl, if installed")
    check: bool = option(False, "check model, data and machine, then stop")

    @property
    def ratios(self) -> dict[str, float]:
        """What each signal keeps."""
        return {name: 1.0 if name == "all" else self.ratio for name in self.signals}


LIMITS = {          # of numbers, which are all 0 or more: (whether it is kept, the options)
    "above 0": (lambda x: x > 0, "temperature top_p clip lr max_grad_norm sample_fps max_pixels "
                "image_pixels max_prompt max_new_tokens updates epochs prompts_per_step keep"),
    "2 or more": (lambda x: x >= 2, "G max_frames"),
    "at most 1": (lambda x: x <= 1, "ratio top_p"),
}


def load_rule(file: str) -> list[str]:
    """Run a file, which registers its rules; the words of its OPTIONS. SystemExit without it."""
    if not file.endswith(".py") or not Path(file).is_file():
        raise SystemExit(f"error: --rule {file}: no such Python file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    rule = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(rule)
    except (SyntaxError, ImportError, NameError, AttributeError) as error:
        raise SystemExit(f"error: --rule {file}: {type(error).__name__}: {error}") from None
    return shlex.split(getattr(rule, "OPTIONS", ""))


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line: the preset's values, then the rules', then what is given.

    An unknown option, or a value that is not allowed, ends the program with one line (exit code 2).
    """
    parser = HfArgumentParser(
        Options, description="Video-KTR: GRPO on key tokens", allow_abbrev=False,
        usage="ktr.py --model DIR --data FILE [--OPTION VALUE ...]   (--help names them all)")
    given = sys.argv[1:] if arguments is None else arguments
    if sum(word.split("=")[0] == "--rule" for word in given) > 1:
        parser.error("--rule stands once and takes several files")
    files = parser.parse_known_args(given)[0].rule
    of_rules = [word for file in files for word in load_rule(file)]
    first = parser.parse_known_args([*of_rules, *given])[0]
    if "--rule" in of_rules:
        parser.error("a rule's OPTIONS cannot name another --rule")
    parser.set_defaults(**PRESETS[first.preset])
    o = Options(**vars(parser.parse_args([*of_rules, *given])))
    for name, value in vars(o).items():
        if isinstance(value, float | int) and not 0 <= value < math.inf:
            parser.error(f"--{name} must be 0 or more, not {value}")
    for what, (kept, names) in LIMITS.items():
        for name in names.split():
            value = getattr(o, name)
            if not kept(value):
                parser.error(f"--{name} must be {what}, not {value}")
    if set(o.freeze) == set(PARTS):
        parser.error("--freeze leaves nothing to train")
    if o.length_low > o.length_high:
        parser.error(f"--length_low {o.length_low} exceeds --length_high {o.length_high}")
    for name in ("model", "data"):
        if not getattr(o, name):
            parser.error(f"--{name} is needed")
    o.videos = o.videos or str(Path(o.data).parent)
    return o
