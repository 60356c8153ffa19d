"""What a GRPO step costs at 7B, ours and the usual way, in one run on one GPU. Random weights; writes bench/results/engine.json.

    python bench/engine.py [--skip PHASE ..]

The usual way: transformers' generate with num_return_sequences=8, then forwards of the policy, the masked, the shuffled
and the reference model with the prompt repeated for each completion and logits at every position, gradient
checkpointing, backward. Ours: policy.sample and ktr.learn, as in training. The optimizer is left out of both.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ktr  # noqa: E402
from lab import toy  # noqa: E402
from lab.dryrun import random_model  # noqa: E402
from run.logs import Clock  # noqa: E402
from run.options import parse as parse_options  # noqa: E402
from policy import evaluating, load, prepare, sample, score_groups  # noqa: E402
from prompt import Processor, Vision, fit, patches  # noqa: E402
from engine.packing import NAMES  # noqa: E402

DEVICE = torch.device("cuda")
RESULTS = {"command": " ".join(sys.argv), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
           "transformers": transformers.__version__, "python": platform.python_version(), "dtype": "bfloat16",
           "weights": "random, architecture of Qwen2.5-VL-7B"}
BEGUN = time.time()


def note(path: Path, **values) -> None:
    """Keep what was measured as soon as it is."""
    RESULTS.update(values)
    path.write_text(json.dumps(RESULTS, indent=1))
    print(f"[{time.time() - BEGUN:6.1f} s]", json.dumps(values), flush=True)


def seconds(function, repeat: int = 1, warm: int = 0) -> float:
    for _ in range(warm):
        function()
    found = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def new_prompt(processor, frames: int, height: int, width: int, pixels: int, seed: int = 0):
    """A clip of random frames and a question that makes about 200 text tokens."""
    rng = np.random.default_rng(seed)
    record = {"problem": "which way does the circle move " * 31, "data_type": "video", "problem_type": "numerical", "options": [],
              "solution": "<answer>1</answer>", "problem_id": seed, "row": seed, "path": ""}
    clip = fit(rng.integers(0, 255, (frames, height, width, 3), dtype=np.uint8), pixels, processor.vision)
    return processor.prompt(record, clip, 0.5)


def usual_inputs(prompt, G: int, completions=None):
    """What transformers' forward takes: the prompt repeated for each completion."""
    ids = prompt.ids[None].expand(G, -1).to(DEVICE)
    kinds = torch.zeros_like(ids)
    kinds[:, prompt.visual.to(DEVICE)] = 2
    if completions is not None:
        ids, kinds = torch.cat([ids, completions], 1), torch.cat([kinds, torch.zeros_like(completions)], 1)
    pixels = patches(prompt.frames.to(DEVICE), prompt.vision).to(torch.bfloat16)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, pixel_values_videos=pixels.repeat(G, 1),
                video_grid_thw=torch.tensor([prompt.grid] * G, device=DEVICE), second_per_grid_ts=torch.tensor([prompt.seconds] * G))


def usual_logp(model, prompt, completions, mask_video: bool = False):
    """Per-token log-probabilities with full logits, row by row, as the released trainers do it."""
    inputs = usual_inputs(prompt, len(completions), completions)
    if mask_video:
        inputs["attention_mask"] = (inputs["input_ids"] != model.config.video_token_id).long()
    logits = model(**inputs, use_cache=False).logits[:, len(prompt.ids) - 1:-1]
    return torch.stack([torch.gather(row.log_softmax(-1), 1, ids[:, None])[:, 0] for row, ids in zip(logits, completions)])


def usual_generate(model, prompt, G: int, T: int, **more):
    inputs = usual_inputs(prompt, 1)
    return model.generate(**inputs, do_sample=True, temperature=1.0, top_p=0.95, top_k=0, num_return_sequences=G, min_new_tokens=T,
                          max_new_tokens=T, pad_token_id=0, **more)[:, len(prompt.ids):]


def usual_step(model, prompt, G: int, T: int, path: Path, static: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.generation_config.eos_token_id = None
    model.eval()
    if not static:
        usual_generate(model, prompt, G, 8)                                     # warm-up of the libraries
    torch.cuda.reset_peak_memory_stats()
    phases = {}
    with torch.no_grad():
        phases["sample"] = seconds(lambda: phases.update(ids=usual_generate(model, prompt, G, T)))
        ids = phases.pop("ids")
        shuffled = prompt.reordered(torch.randperm(len(prompt.frames)))
        usual_logp(model, prompt, ids[:1])
        phases["reference"] = seconds(lambda: usual_logp(model, prompt, ids))
        phases["masked"] = seconds(lambda: usual_logp(model, prompt, ids, mask_video=True))
        phases["shuffled"] = seconds(lambda: usual_logp(model, shuffled, ids))
    model.train()
    kept = {}
    phases["policy"] = seconds(lambda: kept.update(logp=usual_logp(model, prompt, ids)))
    phases["backward"] = seconds(lambda: (torch.exp(kept["logp"] - kept["logp"].detach()).mean()).backward())
    model.zero_grad(set_to_none=True)
    model.eval()
    total = sum(phases.values())
    note(path, usual={"phases": phases, "step": total, "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30})
    if static:
        try:
            compiled = dict(cache_implementation="static")
            first = seconds(lambda: usual_generate(model, prompt, G, T, **compiled))
            again = seconds(lambda: usual_generate(model, prompt, G, T, **compiled))
            note(path, usual_static={"first_sample": first, "sample": again, "step": total - phases["sample"] + again})
        except Exception as error:                                              # the rival's failure is a result, not ours
            note(path, usual_static={"error": f"{type(error).__name__}: {str(error)[:300]}"})


def our_step(o, scorer, reference, processor, prompts, T: int, generator_seed: int) -> dict:
    """One step as in ktr.main: sample, then learn prompt by prompt. Rewards are random, so that gradients are not zero."""
    clock = Clock(DEVICE)
    groups = sample(scorer.model, prompts, o.G, T, seeds=[generator_seed + i for i in range(len(prompts))], ends=())
    clock("sample")
    batch = [{"prompt": p, "group": g, "seed": i, "other": None, "ordered": 0.0, "format": torch.zeros(o.G),
              "accuracy": torch.rand(o.G, generator=torch.Generator().manual_seed(i))} for i, (p, g) in enumerate(zip(prompts, groups))]
    for item in batch:
        ktr.learn(o, scorer, reference, [item], 1.0, clock)
    scorer.zero_grad(set_to_none=True)
    clock("step")
    return {**clock.seconds, "total": sum(clock.seconds.values()), "groups": groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "engine.json")
    parser.add_argument("--T", type=int, default=512)
    parser.add_argument("--skip", nargs="*", default=[], choices=["usual", "static", "four", "memory", "fp32"])
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    G, T, path = 8, a.T, a.out

    x = torch.empty(2 ** 31, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    bandwidth = 2 * 2 ** 31 / seconds(lambda: y.copy_(x), 10, 3)
    del x, y
    torch.cuda.empty_cache()

    model, processor = load("random:7b", DEVICE, torch.bfloat16)
    language = sum(p.numel() for p in model.model.language_model.parameters()) - model.get_input_embeddings().weight.numel()
    floor = 2 * (language + model.lm_head.weight.numel()) / bandwidth
    prompt = new_prompt(processor, 16, 252, 392, 128 * 784)
    note(path, bandwidth_bytes_per_s=bandwidth, floor_s_per_token=floor,
         shapes={"G": G, "T": T, "frames": 16, "video_tokens": int(prompt.visual.sum()), "prompt": len(prompt.ids)})

    o = parse_options(["--model", "random:7b", "--data", "-"])
    plain = parse_options(["--model", "random:7b", "--data", "-", "--signals", "all"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    scorer, reference = ktr.Scorer(model), load("random:7b", DEVICE, torch.bfloat16, seed=1)[0].requires_grad_(False)
    weights_and_reference = torch.cuda.memory_allocated() / 2 ** 30

    def prompts_of(N: int) -> list:
        return [new_prompt(processor, 16, 252, 392, 128 * 784, seed) for seed in range(N)]

    def decode(N: int) -> None:
        """A token for 8 N sequences, and what the first call costs (it compiles and captures; T=768 serves T=512 too)."""
        prompts = prompts_of(N)
        first = seconds(lambda: sample(model, prompts, G, 768, ends=()))
        d = model.__dict__["_decoders"][G, 1.0, 0.95]
        with evaluating(model):
            d.start(torch.tensor([len(p.ids) for p in prompts], device=DEVICE), torch.tensor([p.next_position for p in prompts], device=DEVICE),
                    torch.rand(T, N, G, d.draws.shape[-1], device=DEVICE), ())
            per = statistics.mean(seconds(lambda: [d.advance() for _ in range(T // 8 - 1)]) / (T // 8 - 1) for _ in range(8))
        note(path, **{f"decode_{N * G}": {"s_per_token": per, "over_floor": per / floor, "first_call_s": first}})

    def ours(N: int, name: str) -> list:
        prompts = prompts_of(N)
        first = our_step(o, scorer, reference, processor, prompts, T, 0)["total"]   # compiles what scoring compiles
        torch.cuda.reset_peak_memory_stats()
        steps = sorted((our_step(o, scorer, reference, processor, prompts, T, i) for i in range(3)), key=lambda run: run["total"])
        peak, middle = torch.cuda.max_memory_allocated() / 2 ** 30, steps[1]
        grpo = sorted((our_step(plain, scorer, reference, processor, prompts, T, i) for i in range(3 if N == 1 else 1)),
                      key=lambda run: run["total"])
        grpo = grpo[len(grpo) // 2]
        groups = middle["groups"]
        [run.pop("groups") for run in (*steps, grpo) if "groups" in run]
        note(path, **{name: {"step": middle["total"], "per_prompt": middle["total"] / N, "phases": middle, "all_steps": [run["total"] for run in steps],
                             "first_step_s": first, "grpo_step": grpo["total"], "signals_share": 1 - grpo["total"] / middle["total"],
                             "peak_gib": peak, "weights_and_reference_gib": weights_and_reference}})
        return groups

    def memory(name: str, prompt, T: int, state: int = 0) -> None:
        """Peak of a step, with `state` bytes of optimizer state allocated beside it."""
        model.__dict__.pop("_decoders", None)
        torch.cuda.empty_cache()
        held = torch.zeros(state, dtype=torch.uint8, device=DEVICE)
        our_step(o, scorer, reference, processor, [prompt], T, 0)
        torch.cuda.reset_peak_memory_stats()
        run = our_step(o, scorer, reference, processor, [prompt], T, 1)
        run.pop("groups")
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        note(path, **{name: {"video_tokens": int(prompt.visual.sum()), "prompt": len(prompt.ids), "T": T, "step": run["total"], "phases": run,
                             "peak_gib": peak, "peak_without_reference_gib": peak - weights_and_reference / 2, "state_gib": held.numel() / 2 ** 30}})

    decode(1)
    groups = ours(1, "ours_1")
    with evaluating(model):
        gap = (score_groups(model, [prompt], groups)[0][0] - groups[0].logp).abs().flatten()
    note(path, sampling_gap_bf16={"mean": gap.mean().item(), "median": gap.median().item(), "p99": gap.quantile(0.99).item(), "max": gap.max().item()})
    if "four" not in a.skip:
        decode(4)
        ours(4, "ours_4")
    if "usual" not in a.skip:
        kept = model.__dict__.pop("_decoders")
        usual = random_model("random:7b", DEVICE, torch.bfloat16)
        assert usual.config.text_config._attn_implementation not in NAMES.values()
        usual_step(usual, prompt, G, T, path, static="static" not in a.skip)
        del usual, kept
        one, four = RESULTS["ours_1"], RESULTS.get("ours_4")
        ratios = {"one_prompt": RESULTS["usual"]["step"] / one["step"]}
        if four:
            ratios["four_prompts"] = RESULTS["usual"]["step"] / four["per_prompt"]
            ratios["decode_32_over_8"] = RESULTS["decode_32"]["s_per_token"] / RESULTS["decode_8"]["s_per_token"]
        if "step" in RESULTS.get("usual_static", {}):
            ratios["one_prompt_over_static"] = RESULTS["usual_static"]["step"] / one["step"]
        note(path, times_faster=ratios)
    if "memory" not in a.skip:                                                      # the state is that of one of 8 ranks
        state = 12 * sum(p.numel() for p in model.parameters()) // 8
        memory("memory_16_frames", prompt, 768)
        memory("memory_32_frames", new_prompt(processor, 32, 448, 448, 256 * 784), 768, state)
        memory("memory_64_frames", new_prompt(processor, 64, 448, 448, 256 * 784), 768, state)
    if "fp32" not in a.skip:
        tokenizer = toy.new_tokenizer()
        torch.manual_seed(0)
        tiny = prepare(transformers.Qwen2_5_VLForConditionalGeneration(toy.new_config(tokenizer)), DEVICE)
        clip = new_prompt(Processor(tokenizer, tiny.config, {"image_mean": Vision.mean, "image_std": Vision.std}), 8, 56, 56, 56 * 56)
        group = sample(tiny, [clip], G, 64, ends=())
        with evaluating(tiny):
            gap = (score_groups(tiny, [clip], group)[0][0] - group[0].logp).abs()
        note(path, sampling_gap_fp32={"max": gap.max().item(), "mean": gap.mean().item()})


if __name__ == "__main__":
    main()
