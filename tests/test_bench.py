"""bench.engine runs: its phases at toy size on the CPU, or a change of the loop would break
it unseen until somebody pays for a GPU."""

import json

import torch

from bench import common, engine
from lab import blank
from lab import toy
from policy import load


def test_phases_at_toy_size(monkeypatch, tmp_path):
    def toy_prompt(processor, frames, height, width, pixels, seed=0, kind="video"):
        count = 8 if kind == "video" else 1
        return common.new_prompt(processor, count, 56, 56, 56 * 56, seed, kind)

    monkeypatch.setattr(blank, "config", lambda name, tokenizer: toy.new_config(tokenizer))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("max_memory_allocated", "max_memory_reserved", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    for name, value in {
        "DEVICE": torch.device("cpu"), "ROOT": tmp_path, "T": 6, "LONGEST": 6,
        "new_prompt": toy_prompt,
        "load": lambda name, *_, seed=0: load(name, "cpu", torch.float32, seed),
        "drawn_lengths": lambda seed, rows=8: [1 + (seed + g) % 6 for g in range(rows)],
    }.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine.Bench, "reading_time", lambda self: 1.0)
    monkeypatch.setattr("sys.argv", ["engine", "memory", "ours", "plain", "lengths", "offload",
                                     "families"])
    engine.main()
    monkeypatch.setattr("sys.argv", ["engine", "plain"])
    engine.main()                                           # adds to what is there
    found = json.loads((tmp_path / "bench" / "results" / "engine.json").read_text())
    assert [len(command.split()) for command in found["commands"]] == [9, 4]
    assert found["commit"] and {
        "memory_16_frames", "ours_1", "plain_image", "lengths_1", "offload_4", "random:qwen3-8b",
    } <= set(found)
    phases = found["ours_1"]["phases"]
    parts = sum(s for name, s in phases.items() if name != "total")
    assert abs(parts - found["ours_1"]["step"]) < 1e-6 and min(phases.values()) > 0
    assert found["offload_1"]["host_bytes"] > 12e6          # 12 bytes for each of 1.07 million
