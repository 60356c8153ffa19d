"""Attribution against the truth: what each signal's top tokens are, in a world where that is known.

A look is a signal with one way to score. For each look: the share of visual, temporal, answer and
filler words among its top tokens (toy.token_class; for the signal's own class this is its
precision), the share of the visual and temporal words that it found (recall), and where in the
completion its tokens stand. `random` and `all` are the controls.

    python -m lab.attribution_table --model DIR --data WORLD
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import lab.rules.frame_orders
import lab.rules.masking  # noqa: F401 (both register their signals)
from data import Prompts, read_records
from ktr import find_key_tokens
from lab.toy import token_class
from options import Options
from policy import load, sample, score_groups
from rollout import Rollout

CLASSES = ("visual", "temporal", "answer", "filler")
LOOKS = {       # its name: the signal, and how its shift becomes a score
    "visual": ("visual", "abs"), "visual, zeroed": ("visual_zero", "abs"),
    "visual, signed": ("visual", "signed"), "temporal": ("temporal", "abs"),
    "temporal, reversed": ("temporal_reverse", "abs"),
    "temporal, blocks": ("temporal_blocks", "abs"), "temporal, signed": ("temporal", "signed"),
    "entropy": ("entropy", "abs"), "random": ("random", "abs"), "all": ("all", "abs"),
}


def classes_and_places(group, tokenizer) -> tuple[Tensor, Tensor]:
    """(n,) number of the class in CLASSES and (n,) place, 0 the first token and 1 the last, of a
    group's n valid tokens, row by row."""
    classes, places = [], []
    for ids, n in zip(group.ids.tolist(), group.lengths):
        words = [tokenizer.decode([i]) for i in ids[:n]]
        for t in range(n):
            classes.append(CLASSES.index(token_class(words, t)))
            places.append(t / max(1, n - 1))
    return torch.tensor(classes), torch.tensor(places)


def share(mask: Tensor) -> float:
    return mask.float().mean().item()


def heavier(weights: Tensor, mask: Tensor) -> Tensor:
    """(G, T) bool: tokens of at least the mean weight, and above 0; a key mask stays as it is."""
    weights = weights.float() * mask
    return (weights > 0) & (weights >= weights.sum() / mask.sum().clamp(min=1))


def attribution_table(model_name: str, world: Path, questions: int = 64, G: int = 4,
                      ratio: float = 0.2, rules: dict[str, Options] | None = None) -> dict:
    """Print and return {look: {"share": {class: ..}, "recall": {"visual": .., "temporal": ..},
    "place": ..}}, and under "overlap" the union of visual, temporal and entropy as a share of all
    tokens, and of the union what 1, 2 or 3 of them chose. On clips of the world's test.json.
    rules: further looks; theirs are the tokens that `heavier` takes of their weights."""
    model, processor = load(model_name)
    records = [r for r in read_records(world / "test.json")[0] if r["data_type"] == "video"]
    data = Prompts(records[:questions], world, processor)
    prompts = [data[i] for i in range(len(data))]
    groups = sample(model, prompts, G, 64, seeds=range(len(prompts)))
    looks = {look: Options(signals=[signal], ratio=ratio, shift=shift)
             for look, (signal, shift) in LOOKS.items()} | (rules or {})
    found, parts = [], {look: [] for look in looks}
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        with torch.no_grad():
            ((logp, entropy),) = score_groups(model, [prompt], [group])
        for look, o in looks.items():
            r = Rollout(prompt, group, seed=i, logp=logp, entropy=entropy)
            find_key_tokens(o, [r], model)
            parts[look].append(heavier(r.key_mask, group.completion_mask)[group.completion_mask])
        found.append(classes_and_places(group, processor.tokenizer))
    classes, places = (torch.cat(x) for x in zip(*found))
    masks = {look: torch.cat(part) for look, part in parts.items()}

    table = {}
    for look, mask in masks.items():
        shares = {name: share(classes[mask] == i) for i, name in enumerate(CLASSES)}
        recall = {name: share(mask[classes == i]) for i, name in enumerate(CLASSES[:2])}
        table[look] = {"share": shares, "recall": recall, "place": places[mask].mean().item()}
    times = masks["visual"].int() + masks["temporal"].int() + masks["entropy"].int()
    union = times[times > 0]
    several = {str(n): share(union == n) for n in (1, 2, 3)}
    table["overlap"] = {"union": len(union) / len(times), **several}
    print(text_of(table, ratio))
    return table


def text_of(table: dict, ratio: float) -> str:
    heads = "".join(f"{name:>10}" for name in CLASSES)
    lines = [f"top {ratio:.0%} by; place: 0 is the first token, 1 the last",
             f"{'':20} what they are: {heads}    words found: visual  temporal    place"]
    for look, row in table.items():
        if look == "overlap":
            continue
        shares = "".join(f"{100 * x:9.1f}%" for x in row["share"].values())
        visual, temporal = (100 * x for x in row["recall"].values())
        recall = f"{visual:7.1f}% {temporal:8.1f}%"
        lines.append(f"{look:20} {'':15}{shares}  {'':12}{recall}   {row['place']:.2f}")
    union, *several = table["overlap"].values()
    one, two, three = (f"{part:.0%}" for part in several)
    return "\n".join([*lines, f"visual, temporal and entropy together choose {union:.1%} of the "
                      f"tokens; of these one signal alone chose {one}, two {two}, all three "
                      f"{three}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cold_start", help="checkpoint to look at")
    parser.add_argument("--data", type=Path, default=Path("toy_world"), help="the toy world")
    arguments = parser.parse_args()
    attribution_table(arguments.model, arguments.data)
