"""The toy world: real video files, questions whose every word has a known cause, tiny models.

A clip shows two shapes, one after the other, each moving one way, while the background flashes 1 to
4 times. Questions ask for looks (colour), motion (which way), order (which came first) and a count;
some are about still images. The reasoning names what it saw, so for every token the truth is known:
`visual` words (colour, shape, number), `temporal` words (way, which came first), `answer` (what
follows from the words before) and `filler` (chosen by chance).

A careless teacher misnames each attribute at a rate of its own (SLIPS) and answers what it named.
The cold start imitates it: where a slip is likelier than the truth, greedy decoding is wrong
although the right word has probability left, and reinforcement learning has to find it.

Besides `toy`, the world of the shipped cold start, there are others (WORLDS): in `order` every
question turns on the frames' order, in `long` most words are fillers chosen by chance.

    python -m lab.toy make DIR [--world order]  write clips, images, train.json, test.json
    python -m lab.toy table RUN [RUN ..]        accuracy before and after
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from lab import blank
from prompt import QUESTION_EVAL, QUESTION_TRAIN, TYPE, Processor, Prompt, fit

SIDE, FRAMES, FPS = 56, 8, 2
COLOURS = {
    "red": (220, 40, 40), "green": (40, 190, 60), "blue": (60, 80, 230),
    "yellow": (230, 220, 50), "white": (245, 245, 245), "purple": (170, 60, 190),
}
SHAPES = ("circle", "cross", "square", "triangle")
WAYS = {"leftward": (-1, 0), "rightward": (1, 0), "upward": (0, -1), "downward": (0, 1)}
NUMBERS = ("1", "2", "3", "4")
# truth: (what the careless teacher says instead, how often); a shape's slip is the other shape
SLIPS = {
    "red": ("yellow", 0.10), "green": ("blue", 0.30), "blue": ("purple", 0.40),
    "yellow": ("white", 0.60), "white": ("green", 0.70), "purple": ("red", 0.80),
    "leftward": ("rightward", 0.20), "rightward": ("upward", 0.40),
    "upward": ("downward", 0.65), "downward": ("leftward", 0.80),
    "1": ("2", 0.20), "2": ("3", 0.40), "3": ("4", 0.65), "4": ("1", 0.80),
    "circle": ("", 0.15), "cross": ("", 0.35), "square": ("", 0.65), "triangle": ("", 0.80),
}
OPENINGS = ("let me think .", "hmm , let me see .", "ok , watch closely .", "wait , look again .",
            "this is a short clip .")
NOTICES = ("i see", "there is", "i notice")
CLOSINGS = ("so", "thus", "hence", "therefore")
KINDS = ("colour", "motion", "order", "count")
OPTIONS = {"colour": list(COLOURS), "motion": list(WAYS), "order": list(SHAPES), "count": []}
CHATTER = ("let", "me", "think", "hmm", "see", "ok", "watch", "closely", "wait", "look", "again",
           "this", "is", "short", "clip")


@dataclass(frozen=True)
class World:
    """What is asked, and how the careless teacher speaks."""
    kinds: tuple[str, ...] = KINDS
    images: float = 1 / 8               # share of the questions that are about a still image
    order_slip: float | None = None     # how often "first .." is wrong; None: SLIPS of the shape
    chatter: int = 0                    # at most as many words by chance in place of an opening


WORLDS = {"toy": World(), "order": World(("order", "motion"), images=0, order_slip=0.4),
          "long": World(chatter=90)}
TOY = WORLDS["toy"]


# ------------------------------------------------------------------------------------------- clips
def draw(scene: dict, t: int) -> np.ndarray:
    """Frame t of a scene, (SIDE, SIDE, 3) uint8."""
    flash = t // 2 in scene["flashes"]
    image = Image.new("RGB", (SIDE, SIDE), (110, 110, 110) if flash else (25, 25, 25))
    pen = ImageDraw.Draw(image)
    for thing in scene["things"]:
        step = t - thing["start"]
        if not 0 <= step < 4:
            continue
        (x, y), (right, down) = thing["centre"], WAYS[thing["way"]]
        x, y = x + right * 11 * (step - 1.5), y + down * 11 * (step - 1.5)
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
    """What happens: two `things` (one in an "image") in the order of their names, never of time,
    and `flashes`, the temporal patches (two frames each) with a bright background."""
    count = 1 if kind == "image" else 2
    shapes = sorted(rng.sample(SHAPES, count))
    colours = rng.sample(list(COLOURS), count)
    first = rng.randrange(2)
    things = []
    for i, (shape, colour) in enumerate(zip(shapes, colours)):
        way, centre = rng.choice(list(WAYS)), (rng.randint(24, 32), rng.randint(24, 32))
        start = 4 if count == 2 and i != first else 0
        things.append(dict(shape=shape, colour=colour, way=way, start=start, centre=centre))
    flashes = rng.sample(range(FRAMES // 2), rng.randint(1, 4)) if count == 2 else []
    return {"things": things, "flashes": sorted(flashes)}


def render(scene: dict) -> np.ndarray:
    """(n, SIDE, SIDE, 3) uint8: FRAMES frames of a clip, or the one of an image."""
    times = range(FRAMES) if len(scene["things"]) == 2 else [1]
    return np.stack([draw(scene, t) for t in times])


def write_y4m(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """An uncompressed video of frames (n, H, W, 3) uint8 that decord reads: a text header, then
    planes of Y, Cb, Cr (BT.601, 4:4:4)."""
    rgb = frames.astype(np.float64)
    y = 16 + rgb @ (65.481, 128.553, 24.966) / 255
    cb = 128 + rgb @ (-37.797, -74.203, 112.0) / 255
    cr = 128 + rgb @ (112.0, -93.786, -18.214) / 255
    planes = np.stack([y, cb, cr], 1).round().clip(0, 255).astype(np.uint8)         # (n, 3, H, W)
    n, _, height, width = planes.shape
    header = f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C444\n".encode()
    path.write_bytes(header + b"".join(b"FRAME\n" + frame.tobytes() for frame in planes))


# --------------------------------------------------------------------------------------- questions
def by_time(scene: dict) -> list[dict]:
    return sorted(scene["things"], key=lambda thing: thing["start"])


def new_question(rng: random.Random, scene: dict, kind: str) -> dict:
    """The record of a question of this kind, without problem_id and path; "truth" is a word."""
    still = len(scene["things"]) == 1
    thing = rng.choice(scene["things"])
    if kind == "colour":
        text, truth = f"What colour is the {thing['shape']}?", thing["colour"]
    elif kind == "motion":
        text, truth = f"Which way does the {thing['shape']} move?", thing["way"]
    elif kind == "order":
        text, truth = "Which shape comes first?", by_time(scene)[0]["shape"]
    else:
        text, truth = "How many flashes are there?", str(len(scene["flashes"]))
    words = OPTIONS[kind]
    answer = chr(65 + words.index(truth)) if words else truth
    return {"problem": text, "data_type": "image" if still else "video",
            "problem_type": "multiple choice" if words else "numerical",
            "options": [f"{letter}. {word}" for letter, word in zip("ABCDEF", words)],
            "solution": f"<answer>{answer}</answer>",
            "data_source": "image" if still else kind, "truth": truth}


def teach(rng: random.Random, scene: dict, record: dict, careless: bool = True,
          world: World = TOY) -> str:
    """What the teacher of the cold start says. A careless one slips, and answers what it said."""
    def say(truth: str, other: str = "") -> str:
        slip, rate = SLIPS[truth]
        if other and world.order_slip is not None:
            rate = world.order_slip
        slips = careless and rng.random() < rate
        return (other or slip) if slips else truth

    things, video = scene["things"], len(scene["things"]) == 2
    named, parts = {}, []                               # named: shape -> (colour, way)
    for thing in things:
        colour, way = named[thing["shape"]] = say(thing["colour"]), say(thing["way"])
        moving = f" {way}" if video else ""
        parts.append(f"{rng.choice(NOTICES)} a {colour} {thing['shape']}{moving}")
    opening, joint = rng.choice(OPENINGS), rng.choice(("and", "also"))
    if world.chatter:
        count = rng.randint(world.chatter * 2 // 3, world.chatter)
        opening = " ".join(rng.choices(CHATTER, k=count)) + " ."
    text = f"{opening} " + f" {joint} ".join(parts) + " ."
    if video:
        first, second = (thing["shape"] for thing in by_time(scene))
        first, count = say(first, second), say(str(len(scene["flashes"])))
        text += f" first {first} . {count} flashes ."

    kind = record["data_source"]
    if kind == "order":
        subject, value = "first", first
    elif kind == "count":
        subject, value = "flashes", count
    else:
        subject = next(shape for shape in SHAPES if shape in record["problem"])
        value = named[subject][1 if kind == "motion" else 0]
    words = [option[3:] for option in record["options"]]
    answer = chr(65 + words.index(value)) if words else value
    letter = f" {answer}" if words else ""
    closing = f"{rng.choice(CLOSINGS)} {subject} {value}{letter} ."
    return f"<think> {text} {closing} </think> <answer> {answer} </answer>"


def new_example(rng: random.Random, world: World = TOY) -> tuple[dict, dict]:
    """A scene and a question about it."""
    if rng.random() < world.images:
        scene = new_scene(rng, "image")
        return scene, new_question(rng, scene, "colour")
    scene = new_scene(rng, "video")
    return scene, new_question(rng, scene, rng.choice(world.kinds))


def make(folder: Path, train: int = 1600, test: int = 600, seed: int = 0,
         world: World = TOY) -> None:
    """Write the world: one clip per question and record, train and test from different scenes."""
    for split, count in (("train", train), ("test", test)):
        rng = random.Random(f"{seed} {split}")
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = []
        for i in tqdm(range(count), desc=f"toy world: {split}", unit="clip"):
            scene, record = new_example(rng, world)
            frames, path = render(scene), folder / split / f"{i:05d}.y4m"
            if record["data_type"] == "video":
                write_y4m(path, frames)
            else:
                path = path.with_suffix(".png")
                Image.fromarray(frames[0]).save(path)
            records.append({"problem_id": i, **record, "path": f"./{split}/{path.name}"})
        partial = folder / f"{split}.json.part"         # the list appears once its clips are there
        partial.write_text(json.dumps(records, indent=0))
        partial.rename(folder / f"{split}.json")


# --------------------------------------------------------------------------- tokens and their truth
def token_class(words: list[str], t: int) -> str:
    """`visual`, `temporal`, `answer` or `filler`: what decides word t of a completion."""
    word, before = words[t], words[t - 1] if t else ""
    if not {"</think>", *CLOSINGS}.isdisjoint(words[:t]):
        return "answer"
    if word in WAYS or (word in SHAPES and before == "first"):
        return "temporal"
    if word in COLOURS or word in SHAPES or word in NUMBERS:
        return "visual"
    return "filler"


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = ("a and also first the . flashes A B C D E F What colour is ? Which way does move shape "
         "comes How many are there Options : user assistant")
STAMPS = " < > seconds 0 5 6 7 8 9"         # what Qwen3-VL's prompts say of times
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def new_tokenizer(more: str = "") -> PreTrainedTokenizerFast:
    """One token a word. The protocol's long sentences are one token each: prompts stay short."""
    sentences = [text.removeprefix("{Question}\n") for text in (QUESTION_TRAIN, QUESTION_EVAL)]
    sentences += sorted(text.strip() for text in set(TYPE.values()))
    words = (*OPENINGS, *NOTICES, *CLOSINGS, *SHAPES, *COLOURS, *WAYS, *NUMBERS, WORDS + more)
    text = " ".join(words)
    words = dict.fromkeys((*SPECIAL, *TAGS, *text.split()))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([*TAGS, *sentences])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
        eos_token="<|im_end|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False)


# family: (model_type, its own of the text model and of the vision tower, sections of M-RoPE)
TOWER = dict(hidden_size=64, intermediate_size=128, out_hidden_size=128)
TINY = {
    "qwen2.5": ("qwen2_5_vl", {}, dict(**TOWER, window_size=112, fullatt_block_indexes=[1],
                                       tokens_per_second=2), [4, 6, 6]),
    "qwen2": ("qwen2_vl", {}, dict(embed_dim=64, hidden_size=128, mlp_ratio=2), [4, 6, 6]),
    "qwen3": ("qwen3_vl", dict(head_dim=48), dict(**TOWER, deepstack_visual_indexes=[0, 1],
                                                  num_position_embeddings=16), [8, 8, 8]),
}


def new_config(tokenizer: PreTrainedTokenizerFast, family: str = "qwen2.5") -> PreTrainedConfig:
    """A model of 1.1 million parameters; every part of the 7B is there."""
    kind, text, vision, sections = TINY[family]
    text = dict(vocab_size=-(-len(tokenizer) // 8) * 8, hidden_size=128, intermediate_size=384,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, **text)
    return blank.new_config(kind, tokenizer, text, dict(depth=2, num_heads=2, **vision),
                               sections, theta=10000.0, tied=family == "qwen3")


def example_prompt(rng: random.Random, processor: Processor, careless: bool = True,
                   world: World = TOY) -> tuple[Prompt, str]:
    """A fresh prompt and what the teacher says, without a file in between."""
    scene, record = new_example(rng, world)
    vision = processor.vision
    frames = fit(render(scene), (2 * vision.patch * vision.merge) ** 2, vision)
    prompt = processor.prompt(record, frames, 1 / FPS)
    return prompt, teach(rng, scene, record, careless, world)


# ---------------------------------------------------------------------------------------- commands
def print_table(runs: list[Path]) -> None:
    """What train.sh ends with: accuracy before and after, by kind of question; of several runs,
    which began alike, beside each other."""
    for run in runs:
        if not all((run / when / "scores.json").is_file() for when in ("before", "after")):
            raise SystemExit(f"error: {run} holds no scores of before and after; OUT={run} bash "
                             "train.sh makes them")
    before = json.loads((runs[0] / "before" / "scores.json").read_text())["scores"]
    after = [json.loads((run / "after" / "scores.json").read_text())["scores"] for run in runs]
    heads = ["after"] if len(runs) == 1 else [str(run) for run in runs]
    print(f"\n{'test questions':16} {'n':>5}   before", *(f"{head:>16}" for head in heads))
    for kind, row in before.items():
        cells = []
        for one in (scores[kind] for scores in after):
            gain = 100 * (one["strict"] - row["strict"])
            cells.append(f"{100 * one['strict']:7.1f}% ({gain:+5.1f})" if one["n"] else "no score")
        first = f"{100 * row['strict']:7.1f}%" if row["n"] else "no score"
        print(f"{kind.removeprefix('kind: '):16} {row['n']:5d} {first}",
              *(f"{cell:>16}" for cell in cells))
    for run, scores in zip(runs, after):
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        print(f"{run}: {len(log)} steps in {sum(row['seconds'] for row in log):.0f} s, "
              f"{scores['all']['unparsed']} answers unparsed; checkpoint {run / 'final'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["make", "table"])
    add("folders", type=Path, nargs="*", default=[Path("toy_world")],
        help="the folder that `make` fills, or the runs of `table`")
    add("--world", choices=WORLDS, default="toy", help="what the questions are about")
    add("--test", type=int, default=600, help="number of test questions")
    a = parser.parse_args()
    if a.command == "make":
        make(a.folders[0], test=a.test, world=WORLDS[a.world])
    else:
        print_table(a.folders)


if __name__ == "__main__":
    main()
