"""A walk through one step with the numbers in it: docs/walkthrough.md and its picture.

    OMP_NUM_THREADS=1 python -m lab.walkthrough [--out docs]

One question of the toy world, four completions by the shipped cold start, and all that algorithm 1
finds out about them. Each block names the function that makes it.
"""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image

from attribution import mask_video, shuffle_frames
from grpo import grpo_loss
from ktr import annotate, completion_texts, sample_rollouts
from lab import toy
from lab.gradients import gradient_of
from options import Options
from policy import load, score_groups
from prompt import fit, question_text
from rewards import extract_answer
from rollout import Rollout
from run.logs import Clock

ROOT = Path(__file__).resolve().parent.parent
G, SCALE = 4, 3                 # completions; how much larger the picture is than the clip
PAGE = """# A walk through one step

One question of the toy world, answered by its cold start, through the whole of algorithm 1 with its
numbers. `ktr.py` does this for eight questions in each step of `bash train.sh`. This page is made
by `OMP_NUM_THREADS=1 python -m lab.walkthrough`; a test makes it again.

## The question (`lab.toy.new_example`, `lab.toy.render`)

![the clip's {frames} frames](walkthrough.png)

{problem} Options: {options}. The right answer is **{truth}**.

`prompt.question_text` puts the question into the protocol's words:

```
{question}
```

`prompt.Processor.prompt` makes {P} tokens of it, of which {V} are the clip's: {frames} frames of
56 x 56 pixels are {t} temporal patches of 2 x 2 tokens.

## Sample (`policy.sample`)

{completions}

## Rewards and advantages, eq. 1 (`ktr.answer_rewards`, `ktr.add_rewards`, `grpo.group_advantages`)

| row | answer | accuracy | format | R | advantage (R - {mean:.2f}) / ({deviation:.2f} + 1e-4) |
|---|---|---|---|---|---|
{rewards}

No completion has 320 tokens, so the length bonus is 0.

## Attribution, eq. 2 to 5 (`attribution.attribute`)

The table shows completion {row}, token by token: log p and entropy (`policy.score_groups`); log p
with the video masked (`attribution.mask_video`: {masked} tokens of the prompt are left); log p with
the frames in the order {order} (`attribution.shuffle_frames`); how far it moves
(`attribution.shift`). Each signal keeps the top 20% of the group's {tokens} tokens, that is {kept}
(`attribution.top_tokens`): V visual, T temporal, H entropy. A token that any of them keeps is a key
token (`attribution.union`): {key} in the group, {row_key} of the {length} in completion {row}.

| token | log p | masked | change | shuffled | change | entropy | kept by |
|---|---|---|---|---|---|---|---|
{table}

## The loss, eq. 5 (`grpo.grpo_loss`)

The rollout is used once, so rho = exp(logp - old_logp) = 1 and the clip does not bind. In the first
step the policy is still the reference, so KL = 0. Completion {row} adds

    1/|o| sum_t m_t A = 1/{length} x {row_key} x {advantage:.4f} = {by_hand:.4f}

to the objective. `grpo_loss` of this row alone gives the loss {loss:.4f}, the negative of it.

## The gradient (`lab.gradients.gradient_of`)

Of the loss of all {G} completions, in the last layer of the language model:

| tokens | norm | cosine with the whole |
|---|---|---|
{gradients}

The optimizer follows the first (`engine.sharded.ShardedAdamW`). `ktr.main` is the loop around it.
"""


def first_mixed_question(o: Options, model, processor) -> Rollout:
    """The first question about a clip whose completions do not all earn the same."""
    rng = random.Random(0)
    for seed in range(0, 200, 2):
        scene, record = toy.new_example(rng)
        record |= {"row": seed // 2, "problem_id": seed // 2, "path": ""}
        vision = processor.vision
        frames = fit(toy.render(scene), (2 * vision.patch * vision.merge) ** 2, vision)
        prompt = processor.prompt(record, frames, 1 / toy.FPS)
        (r,) = sample_rollouts(o, model, processor, [(prompt, seed)])
        if prompt.kind == "video" and r.rewards.std() > 0:
            return r
    raise SystemExit("error: the completions of all questions earn the same")


def token_rows(r: Rollout, row: int, masked, shuffled, tokenizer) -> list[str]:
    """The table of one completion's tokens."""
    letters, lines = {"visual": "V", "temporal": "T", "entropy": "H"}, []
    for t in range(r.group.lengths[row]):
        word = tokenizer.decode([int(r.group.ids[row, t])]).strip().replace("|", "\\|")
        kept = " ".join(letters[name] for name, top in r.top_tokens.items() if top[row, t])
        logp, without, other = (float(x[row, t]) for x in (r.logp, masked, shuffled))
        numbers = (logp, without, abs(logp - without), other, abs(logp - other),
                   float(r.entropy[row, t]))
        cells = " | ".join(f"{round(x, 2) + 0:.2f}" for x in numbers)           # + 0: no -0.00
        lines.append(f"| `{word}` | {cells} | {kept} |")
    return lines


def walk(folder: Path) -> None:
    o = Options(G=G, max_new_tokens=64)
    model, processor = load(str(ROOT / "cold_start"))
    r = first_mixed_question(o, model, processor)
    ((logp, r.entropy),) = score_groups(model, [r.prompt], [r.group])
    r.logp = logp.detach()
    with torch.no_grad():
        changed = [mask_video(r, o), shuffle_frames(r, o)]
        (masked, _), (shuffled, _) = score_groups(model, changed, [r.group] * 2)
    r.generator.manual_seed(r.seed + 1)                 # the same order again
    annotate(o, [r], model, None, Clock(torch.device("cpu")))
    shown = [int((frame[None] == r.prompt.frames).flatten(1).all(1).nonzero()[0])
             for frame in changed[1].frames]

    row = int(r.advantages.argmax())
    one = slice(row, row + 1)
    loss, _ = grpo_loss(r.logp[one], r.old_logp[one], None, r.advantages[one], r.loss_mask[one],
                        r.key_mask[one])
    length, row_key = r.group.lengths[row], int(r.key_mask[row].sum())
    mask = r.group.completion_mask
    gradient = gradient_of(-r.advantages[:, None] * logp / mask.sum(-1, keepdim=True) / G, model)
    whole, lines = gradient(mask), []
    for name, tokens in (("key tokens", r.key_mask), ("all other tokens", mask & ~r.key_mask),
                         ("all tokens: GRPO", mask)):
        part = gradient(tokens)
        cosine = torch.cosine_similarity(part, whole, dim=0).item()
        lines.append(f"| {name} | {part.norm():.4f} | {cosine:.3f} |")

    texts, record = completion_texts(processor, r.group), r.prompt.record
    rewards = [f"| {g} | {extract_answer(text)} | {r.accuracy[g]:.0f} | {r.format[g]:.0f} | "
               f"{r.rewards[g]:.0f} | {r.advantages[g]:+.4f} |" for g, text in enumerate(texts)]
    page = PAGE.format(
        frames=len(r.prompt.frames), problem=record["problem"], G=G, t=r.prompt.grid[0],
        options=", ".join(record["options"]) or "none",
        truth=extract_answer(record["solution"]), question=question_text(record),
        P=len(r.prompt.ids), V=int(r.prompt.visual.sum()), rewards="\n".join(rewards), row=row,
        completions="\n".join(f"{g}. `{text}`" for g, text in enumerate(texts)),
        mean=float(r.rewards.mean()), deviation=float(r.rewards.std()),
        masked=len(changed[0].ids), order=" ".join(map(str, shown)), tokens=int(mask.sum()),
        kept=int(r.top_tokens["visual"].sum()), key=int(r.key_mask.sum()), row_key=row_key,
        length=length, advantage=float(r.advantages[row]),
        by_hand=row_key * float(r.advantages[row]) / length, loss=float(loss),
        table="\n".join(token_rows(r, row, masked, shuffled, processor.tokenizer)),
        gradients="\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "walkthrough.md").write_text(page, "utf-8")
    strip = torch.cat(list(r.prompt.frames), dim=2).permute(1, 2, 0).numpy()        # (H, n W, 3)
    picture = Image.fromarray(strip)
    size = picture.width * SCALE // 2, picture.height * SCALE // 2
    picture.resize(size, Image.NEAREST).save(folder / "walkthrough.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for both files")
    walk(parser.parse_args().out)
