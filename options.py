"""The options of a run: the method's, then other papers', then how it is run. PRESETS sets all in
which the paper's text and the released code differ (docs/choices.md)."""

import math
import os
from dataclasses import dataclass, field

PRESETS = {
    "paper": {},                                # the defaults
    "released": dict(
        shift="signed", positions="moved", ties="threshold", normalize="selected",
        length_of="selected", top_k=50, pixels="released", format_pattern="released"),
}
PARTS = ("vision", "projector", "language")     # of the model, engine/weights.py
MAY_CHANGE = (      # when a run is continued
    "data", "videos", "out", "leave_out", "max_steps", "epochs", "workers", "save_every", "keep",
    "sample_every", "resume", "report_to", "check", "offload")
GONE = {            # options of older versions, and what does the same now
    "masking": "--rule lab/rules/masking.py --signals visual_zero ..",
    "order": "--rule lab/rules/frame_orders.py --signals temporal_reverse ..",
    "times": "--rule lab/rules/frame_orders.py --signals temporal_with_times ..",
    "distance": "--rule lab/rules/distances.py --signals visual_js ..",
    "bonus": "--extra_reward",
}
LIMITS = []         # of numbers: (field, minimum, maximum, above)


def option(default, help: str, **extra):
    shown = help + "%(default)s" * (default == "")          # or argparse adds "(default: )"
    metadata = {"help": shown, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(*choices: str, help: str):
    return option(choices[0], help, choices=list(choices))


def number(default, help: str, minimum: float = 0, maximum: float = math.inf, above: float = -1):
    """A finite number from minimum to maximum, and above `above`."""
    LIMITS.append((option(default, help), minimum, maximum, above))
    return LIMITS[-1][0]


@dataclass
class Options:
    """Defaults are the paper's 7B recipe."""
    model: str = option("", "starting checkpoint: a folder, a hub name, or random:7b and others")
    data: str = option("", "training records: a JSON list or JSON lines in Video-R1's form")
    videos: str = option("", "folder that the records' paths start from (default: the data's)")
    out: str = option("runs/ktr", "folder for checkpoints, log.jsonl and samples.jsonl")
    leave_out: str = option("", "list of records to pass over, as `python data.py check` writes it")
    preset: str = one_of("paper", "released", help="the defaults, or as the authors' code")
    rule: list[str] = option([], "Python files that register rules; your options beat theirs")
    # ---- the method: which tokens carry the gradient
    signals: list[str] = option(["visual", "temporal", "entropy"], "names of signals, separated by "
                                "spaces: visual, temporal, entropy, random, all, or a rule's")
    ratio: float = number(0.2, "share of tokens that each signal keeps (paper: 20%%)", maximum=1)
    shift: str = one_of("abs", "signed", "k3", help="score of a token under a counterfactual: "
                        "how far its log-probability moves, how far it falls, or the KL by k3")
    positions: str = one_of("unchanged", "moved", help="positions of the text when the video is "
                            "masked: unchanged, or moved up to close the gap")
    pool: str = one_of("group", "response", help="ranks tokens over the group, or each response")
    ties: str = one_of("exact", "threshold", help="of n tokens, keep ceil(ratio n), or all "
                       "that reach the (1 - ratio) quantile")
    # ---- the method: rewards
    format_pattern: str = one_of("strict", "released", help="pattern of the format reward; the "
                                 "released one lets further blocks pass")
    length_of: str = one_of("response", "selected", help="tokens that the length bonus counts")
    length_low: int = number(320, "shortest completion that earns the length bonus, in tokens")
    length_high: int = number(512, "longest completion that earns the length bonus, in tokens")
    length_bonus: float = number(0.2, "reward for a right answer of --length_low to --length_high")
    # ---- the method: GRPO
    G: int = number(8, "completions of each prompt", minimum=2)
    temperature: float = number(1.0, "sampling temperature", above=0)
    top_p: float = number(0.95, "probability mass that is sampled from", maximum=1, above=0)
    top_k: int = number(0, "number of likeliest tokens that may be sampled; 0: all")
    max_new_tokens: int = number(768, "longest completion, in tokens", above=0)
    beta: float = number(0.04, "weight of the KL to the starting checkpoint; 0: no KL term")
    clip: float = number(0.2, "how far from 1 the probability ratio counts", above=0)
    normalize: str = one_of("length", "selected", "tokens", "constant", help="what divides "
                            "the loss: each completion's by its length, or its key tokens; "
                            "or the sum of all by their tokens (DAPO), or a constant (Dr. GRPO)")
    kl_on: str = one_of("selected", "all", help="tokens that the KL counts: the key tokens, or all")
    # ---- other papers'
    clip_high: float = number(0.0, "how far above 1 probability ratios count (DAPO .28); 0: --clip")
    updates: int = number(1, "optimizer steps for each rollout", above=0)
    kl_estimator: str = one_of("k3", "k1", "k2", help="estimator of the KL, by Schulman's names")
    filter: str = one_of("none", "accuracy", "reward", help="leave a group out of the loss if all "
                         "its completions have the same accuracy, or the same reward (DAPO)")
    mask_cut: bool = option(False, "leave a completion out of the loss if it was cut (DAPO)")
    weighting: str = option("binary", "weights of the tokens: binary (eq. 5), or a rule's name")
    advantage: str = option("group", "how advantages are made: group (eq. 1), or a rule's name")
    penalty: str = option("none", "term that is added to the loss: none, or a rule's name")
    extra_reward: str = option("none", "reward that is added to the others: none, or a rule's name")
    freeze: list[str] = option([], "parts of the model that are not trained", choices=list(PARTS))
    # ---- optimisation
    lr: float = number(2e-6, "highest learning rate", above=0)
    warmup_steps: int = number(0, "steps of linear warm-up before the cosine")
    weight_decay: float = number(0.01, "AdamW's weight decay; norms and biases have none")
    max_grad_norm: float = number(5.0, "gradient norm to which a larger one is clipped", above=0)
    epochs: int = number(1, "passes over the data", above=0)
    max_steps: int = number(0, "number of steps; 0: the epochs decide")
    prompts_per_step: int = number(1, "prompts of each process in a step", above=0)
    seed: int = number(42, "seed of the order of the data, of sampling and of all that is random")
    # ---- what the model is shown
    max_frames: int = number(16, "most frames that are taken of a clip", minimum=2)
    sample_fps: float = number(2.0, "frames that are taken for each second of a clip", above=0)
    seconds: str = one_of("one", "true", help="seconds between temporal patches: 1.0, as the "
                          "recipe's checkpoint learnt it, or the clip's own (a stock Qwen2.5-VL)")
    text_after: str = one_of("clip", "frame", help="where the text's positions begin after a clip: "
                             "after its highest position, as Qwen2-VL and Qwen2.5-VL checkpoints "
                             "learnt it, or after the larger side of a frame (transformers 5)")
    pixels: str = one_of("paper", "released", help="how large frames and images may be: "
                         "--max_pixels and --image_pixels, or as in the released code")
    max_pixels: int = number(128 * 28 * 28, "most pixels of a frame", above=0)
    image_pixels: int = number(512 * 28 * 28, "most pixels of a still image", above=0)
    max_prompt: int = number(16384, "longest prompt, in tokens; longer ones are skipped", above=0)
    # ---- running
    workers: int = number(min(4, os.cpu_count() or 1), "processes of each rank that decode clips")
    dtype: str = one_of("bfloat16", "float32", help="type of weights and activations")
    checkpointing: bool = option(True, "compute activations again; --no_checkpointing keeps them")
    offload: bool = option(False, "keep the optimizer's state in the host's memory")
    save_every: int = number(250, "steps between checkpoints (7B: 116 GB each); 0: none at all")
    keep: int = number(2, "number of checkpoints that are kept", above=0)
    sample_every: int = number(0, "steps between samples in samples.jsonl; 0: about fifty in a run")
    resume: str = one_of("auto", "never", help="auto: continue from the newest checkpoint in "
                         "--out; never: stop if --out holds a run")
    report_to: str = one_of("none", "tensorboard", "wandb", help="where else the log is sent")
    check: bool = option(False, "check model, data and machine, then stop")

    @property
    def ratios(self) -> dict[str, float]:
        """What each signal keeps."""
        return {name: 1.0 if name == "all" else self.ratio for name in self.signals}
