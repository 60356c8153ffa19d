"""What a GRPO step costs at 7B on one GPU, ours and others' ways. Random weights;
bench/results/engine.json.

    python -m bench.engine [PHASE ..]      default: decode plain ours four lengths memory

    decode    a token for 8 and for 32 sequences, against the time that reading the weights takes
    plain     plain GRPO of one image of 1,008 tokens, no reference: the setting of bench.trl
    ours      the recipe's step with one prompt of 16 frames, optimizer left out; four: with four
    lengths   ours, with completions of 100 to 512 tokens (fixed seed) in place of 512 each
    memory    peaks for 80 GB cards: 16 and 64 frames, beside the gradients that DDP keeps and an
              eighth of the optimizer's state
    offload   real steps with the optimizer's state in host memory
    families  a step of Qwen2-VL-7B and of Qwen3-VL-8B
    usual     generate, then forwards with the prompt repeated and logits everywhere
    static    the same with transformers' compiled cache
"""

import statistics
import sys
import time
from functools import partial

import torch

from bench.common import (
    DATASHEET, DEVICE, ROOT, free, new_prompt, new_results, note, peak, seconds, usual_generate)
from lab import blank
from engine.prepare import recompute
from engine.sharded import ShardedAdamW
from ktr import add_rewards, learn, loss_divisor
from policy import load, plain_score, sample, score_groups
from rollout import Group, Rollout
from run.arguments import parse
from run.logs import Clock
from run.training import Scorer

PHASES = ("decode", "plain", "ours", "four", "lengths", "memory")        # the default
G, T = 8, 512
LONGEST = 768  # the recipe's limit
CLIP = 16, 252, 392, 128 * 784  # 1,008 video tokens
CLIP_OF_QWEN3 = 16, 288, 448, 128 * 1024  # as many, of 32 x 32 pixels in place of 28 x 28


def drawn_lengths(seed: int, rows: int = G) -> list[int]:
    """Lengths of completions as real ones are: evenly from 100 to 512."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, T + 1, (rows,), generator=generator).tolist()


def cut_short(group: Group, lengths: list[int]) -> Group:
    """The group as if its rows had ended after so many tokens."""
    mask = (
        torch.arange(group.ids.shape[1], device=DEVICE)
        < torch.tensor(lengths, device=DEVICE)[:, None]
    )
    return Group(group.ids, mask, group.logp, group.ended)


class Bench:
    """A policy and its reference, and what a step with them costs."""

    def __init__(self, path):
        self.results, self.path = new_results(path), path
        self.as_under_ddp = False  # its buckets hold the gradients for good
        self.note = partial(note, self.results, path)
        begun = time.perf_counter()
        self.take("random:7b")
        self.note(load_s=time.perf_counter() - begun)
        self.floor = self.reading_time()

    def take(self, name: str) -> None:
        """Load a policy and its reference."""
        self.model = self.reference = self.scorer = None
        free()
        self.model, self.processor = load(name, DEVICE, torch.bfloat16)
        recompute(self.model)
        self.scorer = Scorer(self.model)
        self.reference = load(name, DEVICE, torch.bfloat16, seed=1)[0].requires_grad_(False)

    def forget(self) -> None:
        """Drop decoders and their caches, so that a phase's peak is its own."""
        self.model.__dict__.pop("_decoders", None)
        for layer in self.model.model.language_model.layers:
            layer.self_attn.kv = None
        free()

    def prompts(self, N: int, kind: str = "video") -> list:
        shape = CLIP if kind == "video" else (1, 1008, 784, 1008 * 784)
        return [new_prompt(self.processor, *shape, seed, kind) for seed in range(N)]

    def reading_time(self) -> float:
        """Seconds to read the weights that a token needs, at the bandwidth of a copy."""
        x = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
        y = torch.empty_like(x)
        bandwidth = 2 * 2**31 / seconds(lambda: [y.copy_(x) for _ in range(10)], 3, 1) * 10
        model = self.model
        weights = (
            sum(p.numel() for p in model.model.language_model.layers.parameters())
            + model.lm_head.weight.numel()
        )
        self.note(
            bandwidth_bytes_per_s=bandwidth,
            weights_read_bytes=2 * weights,
            floor_s_per_token=2 * weights / bandwidth,
        )
        return 2 * weights / bandwidth

    def step(self, o, prompts, seed: int, lengths=None, optimizer=None) -> dict:
        """Seconds by phase of one step as in ktr.main. Rewards are random, so that gradients are
        not zero."""
        clock, limit = Clock(DEVICE), max(max(n) for n in lengths) if lengths else o.max_new_tokens
        groups = sample(
            self.model,
            prompts,
            o.G,
            limit,
            top_p=o.top_p,
            seeds=range(seed, seed + len(prompts)),
            ends=(),
        )
        if lengths:
            groups = [cut_short(group, n) for group, n in zip(groups, lengths)]
        clock("sample")
        for i, (prompt, group) in enumerate(zip(prompts, groups)):
            r = Rollout(prompt, group, seed + i)
            r.accuracy = torch.rand(o.G, generator=torch.Generator().manual_seed(i))
            r.format = r.extra_reward = torch.zeros(o.G)
            add_rewards(o, r, group.completion_mask)
            divisor = loss_divisor(o, [r], 1, DEVICE)
            learn(o, self.scorer, self.reference if o.beta else None, [r], divisor, clock)
        if optimizer:
            optimizer.grad_norm()
            optimizer.step(1e-6)
        self.scorer.zero_grad(set_to_none=not self.as_under_ddp)
        clock("step")
        return {**clock.seconds, "total": sum(clock.seconds.values())}

    def steps(self, o, prompts, repeat: int = 3, lengths=None, **more) -> dict:
        """The median of some steps after a first, which compiles; lengths: of completions that
        end, for each prompt."""
        first = self.step(o, prompts, 0, lengths, **more)["total"]
        free()
        found = [self.step(o, prompts, 10 + i, lengths, **more) for i in range(repeat)]
        found.sort(key=lambda phases: phases["total"])
        middle = found[len(found) // 2]
        return {
            "step": middle["total"],
            "per_prompt": middle["total"] / len(prompts),
            "phases": middle,
            "all_steps": [phases["total"] for phases in found],
            "first_step_s": first,
            "peak_gib": peak(),
        }

    def decode(self, N: int) -> None:
        """A token for 8 N sequences, and what the first call costs (it compiles and captures)."""
        self.forget()
        prompts = self.prompts(N)
        first = seconds(lambda: sample(self.model, prompts, G, T, ends=()))
        d = self.model.__dict__["_decoders"][G, 1.0, 0.95, 0]
        with torch.no_grad():
            d.start(
                [len(p.ids) for p in prompts], [p.next_position for p in prompts], range(N), T, ()
            )
            times = [
                seconds(lambda: [d.advance() for _ in range(T // 8 - 1)]) / (T // 8 - 1)
                for _ in range(8)
            ]
        per = statistics.mean(times)
        read = self.results["weights_read_bytes"]
        self.note(
            **{
                f"decode_{N * G}": {
                    "s_per_token": per,
                    "floor_s_per_token": self.floor,
                    "over_floor": per / self.floor,
                    "first_call_s": first,
                    "share_of_measured_bandwidth": self.floor / per,
                    "share_of_datasheet_bandwidth": read / per / DATASHEET,
                }
            }
        )

    def ours(self, N: int, name: str) -> None:
        self.forget()
        prompts = self.prompts(N)
        whole = self.steps(options(), prompts)
        without = self.steps(options("--signals", "all"), prompts, 1)["step"]
        self.note(
            **{
                name: {
                    **whole,
                    "without_signals": without,
                    "signals_share": 1 - without / whole["step"],
                }
            }
        )

    def gap(self) -> None:
        """How far sampling and scoring in bf16 are apart."""
        prompts = self.prompts(1)
        (group,) = sample(self.model, prompts, G, T, ends=())
        with torch.no_grad():
            gap = (score_groups(self.model, prompts, [group])[0][0] - group.logp).abs()
        self.note(sampling_gap_bf16={"mean": gap.mean().item(), "max": gap.max().item()})

    def families(self) -> None:
        """The recipe's step of other families, at as many video tokens."""
        for name, shape in {"random:qwen2-7b": CLIP, "random:qwen3-8b": CLIP_OF_QWEN3}.items():
            self.take(name)
            prompt = new_prompt(self.processor, *shape)
            found = self.steps(options("--model", name), [prompt])
            self.note(**{name: {**found, "video_tokens": int(prompt.visual.sum())}})
        self.take("random:7b")

    def memory(self, name: str, frames: int, pixels: int) -> None:
        """Peak of a step of 768 tokens beside the state and the gradients that one rank of eight
        holds."""
        self.forget()
        self.as_under_ddp = True
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        state = torch.zeros(
            12 * sum(p.numel() for p in self.model.parameters()) // 8,
            dtype=torch.uint8,
            device=DEVICE,
        )
        side = int(pixels**0.5)
        prompt = new_prompt(self.processor, frames, side, side, pixels)
        found = self.steps(options("--max_new_tokens", str(LONGEST)), [prompt], 1)
        reserved = torch.cuda.max_memory_reserved() / 2**30
        self.as_under_ddp = False
        self.scorer.zero_grad(set_to_none=True)
        self.note(
            **{
                name: {
                    **found,
                    "video_tokens": int(prompt.visual.sum()),
                    "T": LONGEST,
                    "reserved_gib": reserved,
                    "state_gib": state.numel() / 2**30,
                }
            }
        )

    def offload(self) -> None:
        """Real steps: the optimizer's whole state in pinned host memory."""
        self.forget()
        begun = time.perf_counter()
        optimizer = ShardedAdamW(self.model, 1e-6, 0.01, offload=True)
        pinned = time.perf_counter() - begun
        host = sum(x.numel() * 4 for part in optimizer.parts for x in part.state)
        for N in (1, 4):
            found = self.steps(options(), self.prompts(N), 1, optimizer=optimizer)
            self.note(**{f"offload_{N}": {**found, "pinning_s": pinned, "host_bytes": host}})

    def usual(self, static: bool) -> None:
        """transformers as it is: the same rollouts, signals and reference; static: with its
        compiled cache."""
        self.model = self.scorer = None                 # its own policy beside our reference
        free()
        model, (prompt,) = (
            blank.model("random:7b", blank.tokenizer(), DEVICE, torch.bfloat16).eval(),
            self.prompts(1),
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.generation_config.eos_token_id = None
        more = {"cache_implementation": "static"} if static else {}
        usual_generate(model, prompt, G, T if static else 8, **more)
        phases, kept = {}, {}
        with torch.no_grad():
            phases["sample"] = seconds(
                lambda: kept.update(ids=usual_generate(model, prompt, G, T, **more))
            )
            ids, shuffled = kept["ids"], prompt.with_frames(
                prompt.frames[torch.randperm(len(prompt.frames))])
            plain_score(model, prompt, ids[:1])
            phases["reference"] = seconds(lambda: plain_score(model, prompt, ids))
            # masked in the attention there, so that it takes as long as the whole prompt
            phases["masked"] = seconds(lambda: plain_score(model, prompt, ids))
            phases["shuffled"] = seconds(lambda: plain_score(model, shuffled, ids))
        model.train()
        phases["policy"] = seconds(lambda: kept.update(logp=plain_score(model, prompt, ids)[0]))
        phases["backward"] = seconds(
            lambda: (kept["logp"] - kept["logp"].detach()).exp().mean().backward()
        )
        self.note(
            **{
                "usual_static" if static else "usual": {
                    "phases": phases,
                    "step": sum(phases.values()),
                    "peak_gib": peak(),
                }
            }
        )


def options(*more: str):
    return parse(["--model", "random:7b", "--data", "-", "--max_new_tokens", str(T), *more])


def main() -> None:
    asked = sys.argv[1:] or PHASES
    unknown = [phase for phase in asked if phase not in __doc__]
    if unknown:
        words = ", ".join(unknown)
        raise SystemExit(f"error: no such phase: {words}; see python -m pydoc bench.engine")
    b = Bench(ROOT / "bench" / "results" / "engine.json")
    plain = options("--signals", "all", "--beta", "0")
    phases = {
        "decode": lambda: b.decode(1),
        "plain": lambda: b.note(plain_image=b.steps(plain, b.prompts(1, "image"))),
        "ours": lambda: (b.ours(1, "ours_1"), b.gap()),
        "four": lambda: (b.decode(4), b.ours(4, "ours_4")),
        "lengths": lambda: b.note(
            lengths_1=b.steps(options(), b.prompts(1), lengths=[drawn_lengths(0)]),
            lengths_plain_image=b.steps(
                plain, b.prompts(1, "image"), lengths=[drawn_lengths(0)]
            ),
        ),
        "memory": lambda: (
            b.memory("memory_16_frames", 16, 128 * 784),
            b.memory("memory_64_frames", 64, 256 * 784),
        ),
        "offload": b.offload,
        "families": b.families,
        "usual": lambda: b.usual(static=False),
        "static": lambda: b.usual(static=True),
    }
    for phase in asked:
        phases[phase]()


if __name__ == "__main__":
    main()
