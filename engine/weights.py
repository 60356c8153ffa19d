"""The weights of a checkpoint: all there and none left over; their number; which are trained."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from engine.families import family_of, read_config
from lab import blank


def from_pretrained(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model of a checkpoint. OSError where weights are missing or left over:
    transformers would fill in random ones and go on."""
    model, info = family_of(read_config(name)).model.from_pretrained(
        name, dtype=dtype, output_loading_info=True)
    compare_weights(name, info["missing_keys"], info["unexpected_keys"])
    return model


def check_weights(name: str) -> None:
    """The same for a folder, by names and shapes in its files, before loading. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        return
    files, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    there = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise OSError(f"{file} is missing")
        try:
            with safe_open(folder / file, "pt") as weights:
                there |= {new_name(key): weights.get_slice(key).get_shape()
                          for key in weights.keys()}
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from None
    config = read_config(name)
    with torch.device("meta"):
        weights = family_of(config).model(config).state_dict()
    wanted = {key: list(x.shape) for key, x in weights.items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    compare_weights(name, wanted.keys() - there.keys() - tied,
                    {key for key in there.keys() - wanted.keys() if not key.endswith("inv_freq")})
    for key in wanted.keys() & there.keys():
        if wanted[key] != there[key]:
            raise OSError(f"{key} has the shape {there[key]}, config.json wants {wanted[key]}")


def new_name(key: str) -> str:
    """A weight's name in transformers 5, from that or the older one of published checkpoints."""
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)


def compare_weights(name: str, missing: set[str], unexpected: set[str]) -> None:
    """OSError that names the first of each kind, if there are any."""
    faults = [f"{len(keys)} weights {what}: {', '.join(sorted(keys)[:3])}{' ..' * (len(keys) > 3)}"
              for keys, what in ((missing, "are missing"), (unexpected, "belong to another model"))
              if keys]
    if faults:
        raise OSError(f"{name}: {'; '.join(faults)}")


def config_of(name: str) -> PreTrainedConfig:
    """The config of a checkpoint's folder, hub name, or random:7b."""
    random = name.startswith("random:")
    return blank.config(name, blank.tokenizer()) if random else read_config(name)


def weight_count(name: str, frozen: Sequence[str] = ()) -> int:
    """How many weights the model of this name has beside its frozen parts, by its config alone."""
    config = config_of(name)
    with torch.device("meta"):
        parts = parts_of(family_of(config).model(config))
    return sum(p.numel() for part in parts.keys() - set(frozen) for p in parts[part])


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights of the vision tower, of the projector after it, and of the language model."""
    parts: dict[str, list[nn.Parameter]] = {"vision": [], "projector": [], "language": []}
    for name, p in model.named_parameters():
        inside = "projector" if "merger" in name else "vision"
        parts[inside if name.startswith("model.visual.") else "language"].append(p)
    return parts


def freeze(model: nn.Module, frozen: Sequence[str]) -> str:
    """Train all parts but the frozen ones (vision, projector, language); says which, in words."""
    said = []
    for name, weights in parts_of(model).items():
        for p in weights:
            p.requires_grad_(name not in frozen)
        size = sum(p.numel() for p in weights) / 1e6
        said.append(f"{name} {size:,.1f}M{' (frozen)' if name in frozen else ''}")
    return "trained: " + ", ".join(said)
