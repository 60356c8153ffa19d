"""The toy world: real video files, a tiny Qwen2.5-VL and questions whose every word has a known cause.

A clip shows two shapes, one after the other, each moving one way, while the background flashes 1 to 4 times.
Questions ask for looks (colour), motion (which way), order (which came first) and a count; some are about
still images. The reasoning names what it saw, so for every token the truth is known: `visual` words (colour,
shape, number), `temporal` words (way, which came first), `answer` (what follows from the words before) and
`filler` (chosen by chance).

The cold start learns to see from a careful teacher and then imitates a careless one, who misnames each
attribute at a rate of its own (SLIPS) and answers what it named. Where a slip is likelier than the truth,
greedy decoding is wrong although the right word has probability left: reinforcement learning has to find it.

    python -m lab.toy make DIR                       write clips, images, train.json, test.json
    python -m lab.toy cold_start DIR                 remake the shipped cold start
    python -m lab.toy attribution --model DIR --data WORLD      what does each signal select?
    python -m lab.toy table RUN                      accuracy before and after
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from attribution import Rollout, attribute, shift, top_tokens
from data import Prompts, read_records
from engine.prepare import prepare
from policy import Group, load, sample, score_groups
from prompt import QUESTION_EVAL, QUESTION_TRAIN, TYPE, Processor, Prompt, Vision, fit

SIDE, FRAMES, FPS = 56, 8, 2
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (60, 80, 230), "yellow": (230, 220, 50),
           "white": (245, 245, 245), "purple": (170, 60, 190)}
SHAPES = ("circle", "cross", "square", "triangle")
WAYS = {"leftward": (-1, 0), "rightward": (1, 0), "upward": (0, -1), "downward": (0, 1)}
NUMBERS = ("1", "2", "3", "4")
# truth: (what the careless teacher says instead, how often)
SLIPS = {
    "red": ("yellow", 0.10), "green": ("blue", 0.30), "blue": ("purple", 0.40),
    "yellow": ("white", 0.60), "white": ("green", 0.70), "purple": ("red", 0.80),
    "leftward": ("rightward", 0.20), "rightward": ("upward", 0.40), "upward": ("downward", 0.65), "downward": ("leftward", 0.80),
    "1": ("2", 0.20), "2": ("3", 0.40), "3": ("4", 0.65), "4": ("1", 0.80),
    "circle": ("the other", 0.15), "cross": ("the other", 0.35), "square": ("the other", 0.65), "triangle": ("the other", 0.80),
}
OPENINGS = ("let me think .", "hmm , let me see .", "ok , watch closely .", "wait , look again .", "this is a short clip .")
NOTICES = ("i see", "there is", "i notice")
CLOSINGS = ("so", "thus", "hence", "therefore")
KINDS = ("colour", "motion", "order", "count")


# ------------------------------------------------------------------------------------------- clips
def draw(scene: dict, t: int) -> np.ndarray:
    """Frame t of a scene, (SIDE, SIDE, 3) uint8."""
    image = Image.new("RGB", (SIDE, SIDE), (110, 110, 110) if t // 2 in scene["flashes"] else (25, 25, 25))
    pen = ImageDraw.Draw(image)
    for thing in scene["things"]:
        step = t - thing["start"]
        if not 0 <= step < 4:
            continue
        x, y = (c + d * 11 * (step - 1.5) for c, d in zip(thing["centre"], WAYS[thing["way"]]))
        colour, r = COLOURS[thing["colour"]], 8
        if thing["shape"] == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif thing["shape"] == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        elif thing["shape"] == "triangle":
            pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=colour)
        else:
            pen.rectangle((x - r, y - 3, x + r, y + 3), fill=colour)
            pen.rectangle((x - 3, y - r, x + 3, y + r), fill=colour)
    return np.array(image)


def new_scene(rng: random.Random, kind: str) -> dict:
    """What happens: `things` in the order of their names (never of time), and the flashing temporal patches."""
    count = 1 if kind == "image" else 2
    shapes, colours = sorted(rng.sample(SHAPES, count)), rng.sample(list(COLOURS), count)
    first = rng.randrange(2)
    things = [{"shape": s, "colour": c, "way": rng.choice(list(WAYS)), "start": 4 * (i != first) if count == 2 else 0,
               "centre": (rng.randint(24, 32), rng.randint(24, 32))} for i, (s, c) in enumerate(zip(shapes, colours))]
    flashes = [] if count == 1 else sorted(rng.sample(range(FRAMES // 2), rng.randint(1, 4)))
    return {"things": things, "flashes": flashes}


def render(scene: dict) -> np.ndarray:
    """(n, SIDE, SIDE, 3) uint8: FRAMES frames of a clip, or the one of an image."""
    return np.stack([draw(scene, t) for t in (range(FRAMES) if len(scene["things"]) == 2 else [1])])


def write_y4m(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """An uncompressed video that decord reads: a text header, then planes of Y, Cb, Cr (BT.601, 4:4:4)."""
    rgb = frames.astype(np.float64)
    y = 16 + rgb @ (65.481, 128.553, 24.966) / 255
    cb = 128 + rgb @ (-37.797, -74.203, 112.0) / 255
    cr = 128 + rgb @ (112.0, -93.786, -18.214) / 255
    planes = np.stack([y, cb, cr], 1).round().clip(0, 255).astype(np.uint8)            # (n, 3, H, W)
    n, _, height, width = planes.shape
    header = f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C444\n".encode()
    path.write_bytes(header + b"".join(b"FRAME\n" + frame.tobytes() for frame in planes))


# --------------------------------------------------------------------------------------- questions
def new_question(rng: random.Random, scene: dict, kind: str) -> dict:
    """The record of a question of this kind, without problem_id and path; "truth" is the right word."""
    still = len(scene["things"]) == 1
    thing = rng.choice(scene["things"])
    if kind == "colour":
        text, truth, words = f"What colour is the {thing['shape']}?", thing["colour"], list(COLOURS)
    elif kind == "motion":
        text, truth, words = f"Which way does the {thing['shape']} move?", thing["way"], list(WAYS)
    elif kind == "order":
        truth = min(scene["things"], key=lambda x: x["start"])["shape"]
        text, words = "Which shape comes first?", list(SHAPES)
    else:
        text, truth, words = "How many flashes are there?", str(len(scene["flashes"])), []
    answer = chr(65 + words.index(truth)) if words else truth
    return {"problem": text, "data_type": "image" if still else "video",
            "problem_type": "multiple choice" if words else "numerical",
            "options": [f"{chr(65 + i)}. {word}" for i, word in enumerate(words)],
            "solution": f"<answer>{answer}</answer>", "data_source": "image" if still else kind, "truth": truth}


def teach(rng: random.Random, scene: dict, record: dict, careless: bool = True) -> str:
    """What the teacher of the cold start says. A careless one slips, and answers what it said."""
    def say(truth: str, other: str | None = None) -> str:
        slip, rate = SLIPS[truth]
        return other or slip if careless and rng.random() < rate else truth

    things, kind, said, parts = scene["things"], record["data_source"], {}, []
    for thing in things:
        words = said[thing["shape"]] = {"colour": say(thing["colour"]), "motion": say(thing["way"])}
        words["image"] = words["colour"]
        moving = f" {words['motion']}" if len(things) == 2 else ""
        parts.append(f"{rng.choice(NOTICES)} a {words['colour']} {thing['shape']}{moving}")
    text = f"{rng.choice(OPENINGS)} " + f" {rng.choice(('and', 'also'))} ".join(parts) + " ."
    if len(things) == 2:
        first, second = (thing["shape"] for thing in sorted(things, key=lambda thing: thing["start"]))
        said |= {"order": say(first, second), "count": say(str(len(scene["flashes"])))}
        text += f" first {said['order']} . {said['count']} flashes ."
    asked = next((shape for shape in SHAPES if shape in record["problem"]), None)
    subject, value = (asked, said[asked][kind]) if asked else ({"order": "first", "count": "flashes"}[kind], said[kind])
    words = [option[3:] for option in record["options"]]
    answer = chr(65 + words.index(value)) if words else value
    letter = f" {answer}" if words else ""
    return f"<think> {text} {rng.choice(CLOSINGS)} {subject} {value}{letter} . </think> <answer> {answer} </answer>"


def new_example(rng: random.Random) -> tuple[dict, dict]:
    """A scene and a question about it; one in eight is about a still image."""
    if rng.random() < 1 / 8:
        scene = new_scene(rng, "image")
        return scene, new_question(rng, scene, "colour")
    scene = new_scene(rng, "video")
    return scene, new_question(rng, scene, rng.choice(KINDS))


def make(folder: Path, train: int = 1600, test: int = 600, seed: int = 0) -> None:
    """Write the world: one clip per question and record, train and test from different scenes."""
    for split, count in (("train", train), ("test", test)):
        rng = random.Random(f"{seed} {split}")
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = []
        for i in tqdm(range(count), desc=f"toy world: {split}", unit="clip"):
            scene, record = new_example(rng)
            path = folder / split / f"{i:05d}.{'png' if record['data_type'] == 'image' else 'y4m'}"
            if record["data_type"] == "image":
                Image.fromarray(render(scene)[0]).save(path)
            else:
                write_y4m(path, render(scene))
            records.append({"problem_id": i, **record, "path": f"./{split}/{path.name}"})
        partial = folder / f"{split}.json.part"
        partial.write_text(json.dumps(records, indent=0))
        partial.rename(folder / f"{split}.json")


# ------------------------------------------------------------------------------- tokens and their truth
def token_class(words: list[str], t: int) -> str:
    """`visual`, `temporal`, `answer` or `filler`: what decides word t of a completion."""
    word, before = words[t], words[t - 1] if t else ""
    if "</think>" in words[:t] or any(closing in words[:t] for closing in CLOSINGS):
        return "answer"
    if word in WAYS or (word in SHAPES and before == "first"):
        return "temporal"
    return "visual" if word in COLOURS or word in SHAPES or word in NUMBERS else "filler"


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. The protocol's long sentences are one token each, so that prompts stay short."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
               "<|image_pad|>", "<|video_pad|>", "<unk>"]
    sentences = [QUESTION_TRAIN.removeprefix("{Question}\n"), QUESTION_EVAL.removeprefix("{Question}\n"),
                 *sorted(x.strip() for x in set(TYPE.values()))]
    text = " ".join((*OPENINGS, *NOTICES, *CLOSINGS, *SHAPES, *COLOURS, *WAYS, *NUMBERS, "a and also first the . "
                     "flashes A B C D E F What colour is ? Which way does move shape comes How many are there Options : user assistant"))
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*special, *tags, *text.split())))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([*tags, *sentences])
    template = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
                "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
                "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", chat_template=template, clean_up_tokenization_spaces=False)


def new_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with 1.07 million parameters; every part of the 7B is there."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 8) * 8, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, window_size=112,
            fullatt_block_indexes=[1], tokens_per_second=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


# -------------------------------------------------------------------------------------- cold start
def example_prompt(rng: random.Random, processor: Processor, careless: bool = True) -> tuple[Prompt, str]:
    """A fresh prompt and what the teacher says, without a file in between."""
    scene, record = new_example(rng)
    return processor.prompt(record, fit(render(scene), SIDE * SIDE, processor.vision), 1 / FPS), teach(rng, scene, record, careless)


def cold_start(folder: Path, steps: int = 3000, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> None:
    """Supervised fine-tuning of a fresh tiny model, two thirds of it under the careful teacher; writes a checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = new_tokenizer()
    model = prepare(Qwen2_5_VLForConditionalGeneration(new_config(tokenizer)), device)
    processor = Processor(tokenizer, model.config, {
        "image_mean": Vision.mean, "image_std": Vision.std, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": Vision.min_pixels, "max_pixels": 12845056})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="cold start", unit="step")
    for step in bar:
        warm, done = min(1.0, step / 200), step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        prompts, groups = [], []
        for _ in range(batch):
            prompt, said = example_prompt(rng, processor, careless=step >= 2 * steps // 3)
            ids = torch.tensor([tokenizer(said).input_ids + [tokenizer.eos_token_id]], device=device)
            prompts.append(prompt)
            groups.append(Group(ids, torch.ones_like(ids, dtype=torch.bool), ids.float()))
        stats = score_groups(model, prompts, groups)
        loss = -torch.cat([logp[0] for logp, _ in stats]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save(folder)


# ------------------------------------------------------------------------------- attribution, the table
CLASSES = ("visual", "temporal", "answer", "filler")
LOOKS = {       # a signal and how it looks: (kind of shift, what the Rollout takes)
    "visual": ("abs", {}), "visual, zeroed": ("abs", {"masking": "zero"}), "visual, signed": ("signed", {}),
    "temporal": ("abs", {}), "temporal, reversed": ("abs", {"order": "reverse"}), "temporal, blocks": ("abs", {"order": "blocks"}),
    "temporal, signed": ("signed", {}), "entropy": ("abs", {}), "random": ("abs", {}), "all": ("abs", {}),
}


def attribution_table(model_name: str, world: Path, questions: int = 64, G: int = 4, ratio: float = 0.2) -> dict:
    """What each signal's top tokens are: {look: {"share": {class: ..}, "recall": {"visual": .., "temporal": ..}, "place": ..}}.

    share: of the chosen tokens, those of this class (for a signal's own class, its precision). recall: of the known words of
    this class, those that were chosen. place: where in the completion they stand on average, 0 first, 1 last. Also
    "overlap": the union's share of all tokens, and of the union what 1, 2 or 3 of the signals chose.
    """
    model, processor = load(model_name)
    records = [r for r in read_records(world / "test.json")[0] if r["data_type"] == "video"][:questions]
    data = Prompts(records, world, processor)
    prompts = [data[i] for i in range(len(data))]
    chosen, kinds, places = {look: [] for look in LOOKS}, [], []
    for i, (prompt, group) in enumerate(zip(prompts, sample(model, prompts, G, 64, seeds=range(len(prompts))))):
        with torch.no_grad():
            ((logp, entropy),) = score_groups(model, [prompt], [group])
            for look, (kind, changes) in LOOKS.items():
                def moved(_, changed):
                    return [shift(logp, score_groups(model, changed, [group])[0][0], kind)]
                signal = look.split(",")[0]
                r = Rollout(prompt, group.ids, group.valid, logp, entropy, torch.Generator().manual_seed(i), **changes)
                scores = attribute([r], [signal], moved)[0][signal]
                chosen[look].append(top_tokens(scores, group.valid, 1.0 if signal == "all" else ratio)[group.valid])
        for row, n in zip(group.ids.tolist(), group.lengths):
            words = [processor.tokenizer.decode([i]) for i in row[:n]]
            kinds += [CLASSES.index(token_class(words, t)) for t in range(n)]
            places += [t / max(1, n - 1) for t in range(n)]
    kinds, places = torch.tensor(kinds), torch.tensor(places)
    masks = {look: torch.cat(parts).cpu() for look, parts in chosen.items()}
    print(f"(place: 0 is the first token, 1 the last)\n{f'top {ratio:.0%} by':20} what they are: " + "".join(f"{name:>10}" for name in CLASSES)
          + "    words found: visual  temporal    place")
    table = {}
    for look, mask in masks.items():
        share = {name: (kinds[mask] == i).float().mean().item() for i, name in enumerate(CLASSES)}
        recall = {name: mask[kinds == CLASSES.index(name)].float().mean().item() for name in ("visual", "temporal")}
        table[look] = {"share": share, "recall": recall, "place": places[mask].mean().item()}
        print(f"{look:20} {'':15}" + "".join(f"{100 * x:9.1f}%" for x in share.values())
              + f"  {'':12}{100 * recall['visual']:7.1f}% {100 * recall['temporal']:8.1f}%   {table[look]['place']:.2f}")
    times = sum(masks[name].int() for name in ("visual", "temporal", "entropy"))
    union = (times > 0).float().mean().item()
    table["overlap"] = {"union": union, **{str(n): ((times == n).sum() / (times > 0).sum()).item() for n in (1, 2, 3)}}
    print(f"visual, temporal and entropy together choose {union:.1%} of the tokens; of these one signal alone chose "
          f"{table['overlap']['1']:.0%}, two {table['overlap']['2']:.0%}, all three {table['overlap']['3']:.0%}")
    return table


def print_table(out: Path) -> None:
    """What train.sh ends with: accuracy before and after by kind of question, and where everything is."""
    before, after = (json.loads((out / name / "scores.json").read_text())["scores"] for name in ("before", "after"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    print(f"\n{'test questions':16} {'n':>5}   before    after     gain   unparsed")
    for name in before:
        a, b = 100 * before[name]["strict"], 100 * after[name]["strict"]
        print(f"{name.removeprefix('kind: '):16} {after[name]['n']:5d}   {a:5.1f}%   {b:5.1f}%   {b - a:+5.1f}   {after[name]['unparsed']:8d}")
    print(f"{len(log)} steps in {sum(row['seconds'] for row in log):.0f} s; checkpoint {out / 'final'}, log {out / 'log.jsonl'}, "
          f"samples {out / 'samples.jsonl'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "cold_start", "attribution", "table"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("toy_world"), help="what to write, or the run of `table`")
    parser.add_argument("--model", default="cold_start")
    parser.add_argument("--data", type=Path, default=Path("toy_world"))
    arguments = parser.parse_args()
    if arguments.command == "attribution":
        attribution_table(arguments.model, arguments.data)
    else:
        {"make": make, "cold_start": cold_start, "table": print_table}[arguments.command](arguments.folder)
