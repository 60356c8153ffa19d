"""A tiny random Qwen2.5-VL, a few clips, and the plain forward that everything is compared with."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)        # tiny models: two threads mostly wait for each other
if not torch.cuda.is_available():
    collect_ignore_glob = ["gpu/*"]         # bash test.sh --gpu

import policy  # noqa: E402
from attribution import mask_video  # noqa: E402
from lab import cold_start, toy  # noqa: E402
from options import Options  # noqa: E402
from prompt import patches  # noqa: E402
from rollout import Rollout  # noqa: E402
from run.arguments import REGISTRIES  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A checkpoint of random weights, large enough that its outputs depend on what it sees."""
    folder = tmp_path_factory.mktemp("tiny")
    cold_start.train(folder, steps=1, batch=2)
    model, processor = policy.load(str(folder))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(checkpoint_folder):
    """(model with this project's attention, processor)."""
    return policy.load(str(checkpoint_folder))


@pytest.fixture(scope="session")
def plain(checkpoint_folder):
    """The same weights in an untouched transformers model."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_folder).eval()


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    registries = [registry for several in REGISTRIES.values() for registry in several]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world on disk."""
    folder = tmp_path_factory.mktemp("world")
    toy.make(folder, train=48, test=24)
    return folder


@pytest.fixture(scope="session")
def prompts(tiny):
    """Four prompts: three clips and a still image."""
    rng, found = random.Random(5), []
    while len(found) < 3:
        prompt = toy.example_prompt(rng, tiny[1])[0]
        if prompt.kind == "video":
            found.append(prompt)
    while len(found) < 4:
        prompt = toy.example_prompt(rng, tiny[1])[0]
        if prompt.kind == "image":
            found.append(prompt)
    return found


def plain_inputs(prompt, completion=None):
    """What transformers' own forward takes for a prompt, with a completion after it."""
    ids = prompt.ids if completion is None else torch.cat([prompt.ids, completion])
    kinds = torch.zeros_like(ids)
    kinds[:len(prompt.ids)][prompt.visual] = 2 if prompt.kind == "video" else 1
    pixels, grid = patches(prompt.frames, prompt.vision), torch.tensor([prompt.grid])
    media = {"pixel_values": pixels, "image_grid_thw": grid}
    if prompt.kind == "video":
        media = {"pixel_values_videos": pixels, "video_grid_thw": grid,
                 "second_per_grid_ts": torch.tensor([prompt.seconds])}
    if completion is not None:                  # without one, transformers makes its own positions
        media["position_ids"] = positions_of(prompt, len(completion))
    return dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None],
                mm_token_type_ids=kinds[None], **media)


def positions_of(prompt, n):
    """(3, 1, P + n) of a prompt and a completion of n tokens."""
    following = (prompt.next_position + torch.arange(n)).expand(3, -1)
    return torch.cat([prompt.positions, following], 1)[:, None]


def masked(prompt, positions="unchanged"):
    """The prompt without its video."""
    return mask_video(Rollout(prompt, None, 0), Options(positions=positions))


def as_in_transformers_5(processor, prompt):
    """The same prompt with the text's positions as transformers 5 makes them, generate too."""
    apart = prompt.seconds / prompt.vision.temporal
    return processor.prompt(prompt.record, prompt.frames, apart, text_after="frame")
