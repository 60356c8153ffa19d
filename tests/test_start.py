"""What a run starts from: checkpoints that lack something, or hold it elsewhere."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import evaluate
import policy
from engine import weights
from lab import cold_start
from options import Options
from policy import load, load_processor
from prompt import Processor
from run.preflight import check_start


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ROOT / "cold_start", tmp_path / "start")


def rewrite(folder, change):
    """change: {name: tensor} -> the same of the checkpoint's new weights."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(part):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


@pytest.mark.parametrize("change, said", [
    (without("lm_head"), "1 weights are missing: lm_head.weight"),
    (without("layers.2."), "12 weights are missing: model.language_model.layers.2.input_layernorm"),
    (without("visual."), "weights are missing: model.visual.blocks.0.attn.proj.bias, "),
    (lambda w: {f"module.{name}": x for name, x in w.items()},
     "81 weights belong to another model: module.lm_head.weight, module.model.embed_tokens.weight"),
    (lambda w: w | {"extra.weight": torch.zeros(2)}, "1 weights belong to another model: ext"),
    (lambda w: w | {"lm_head.weight": torch.zeros(2, 3)}, "lm_head.weight has the shape [2, 3]"),
])
def test_weights_that_are_missing_or_left_over_are_refused(folder, world, change, said, capsys):
    """transformers fills in random ones, and a run would go on with them."""
    rewrite(folder, change)
    o = Options(model=str(folder), data=str(world / "train.json"), videos=str(world))
    with pytest.raises(SystemExit) as refused:
        check_start(o)
    told = str(refused.value)
    assert told.startswith(f"error: --model {folder}: ") and said in told and "\n" not in told
    with pytest.raises(OSError):                                    # evaluate.py's way
        evaluate.main(evaluate.parse([
            "--model", str(folder), "--benchmark", "toy", "--data", str(world / "test.json"),
            "--videos", str(world), "--out", str(folder / "out")]))
    assert not (folder / "out").exists()


def test_hub_names_are_judged_when_they_are_loaded(folder, monkeypatch):
    """Their files are not there before; what transformers says of its loading counts."""
    rewrite(folder, without("layers.2."))
    monkeypatch.setattr(weights, "check_weights", lambda name: None)
    with pytest.raises(OSError, match="12 weights are missing: model.language_model.layers.2"):
        load(str(folder))


def test_a_damaged_file_of_weights_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="model.safetensors is damaged"):
        load_processor(str(folder))
    file.unlink()
    with pytest.raises(OSError, match="model.safetensors is missing"):
        load_processor(str(folder))


def test_older_and_newer_names_of_weights_are_the_same_model(folder):
    want = load(str(folder))[0].state_dict()
    assert any(name.startswith("model.layers.") for name in load_file(folder / "model.safetensors"))
    rewrite(folder, lambda w: {weights.new_name(name): x for name, x in w.items()})
    got = load(str(folder))[0].state_dict()
    assert all(torch.equal(want[name], x) for name, x in got.items())


def test_a_tied_head_may_be_left_out(tmp_path):
    model, processor = cold_start.new_model("cpu", "qwen3")
    model.save_pretrained(tmp_path)
    processor.save(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(str(tmp_path))


# -------------------------------------------------------------------------------------- end tokens
IM_END, END_OF_TEXT = 2, 0


@pytest.mark.parametrize("generation, ends", [
    ({"eos_token_id": [IM_END, END_OF_TEXT]}, [END_OF_TEXT, IM_END]),
    ({"eos_token_id": IM_END}, [IM_END]),
    ({"eos_token_id": END_OF_TEXT}, [END_OF_TEXT, IM_END]),         # a base model's: the turn's too
    ({"temperature": 1e-6, "repetition_penalty": 1.05}, [IM_END]),  # none: the config's
    (None, [IM_END])])                                              # no file
def test_what_ends_a_completion(folder, generation, ends):
    file = folder / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    model, processor = load(str(folder))
    assert processor.ends == model.generation_config.eos_token_id == ends
    names = processor.tokenizer.convert_ids_to_tokens([IM_END, END_OF_TEXT])
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_the_tokenizers_end_counts_where_no_file_names_one(folder):
    (folder / "generation_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert load_processor(str(folder)).ends == [IM_END]
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "."))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="no file of it names an end token"):
        load_processor(str(folder))


def test_sampling_ends_at_the_end_of_a_turn(folder, prompts):
    """Of a checkpoint whose generation_config.json names only the end of a text."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TEXT}))
    model, _ = load(str(folder))
    (group,) = policy.sample(model, prompts[:1], 4, 64)
    assert group.ended.all() and (group.ids[group.completion_mask] == IM_END).sum() == 4


# ------------------------------------------------------------------------------- processor's files
def test_a_checkpoint_that_transformers_5s_processor_saved(folder):
    """processor_config.json holds what preprocessor_config.json does elsewhere."""
    old = Processor.from_pretrained(str(folder))
    file = folder / "preprocessor_config.json"
    constants = json.loads(file.read_text())
    size = {"shortest_edge": constants.pop("min_pixels"), "longest_edge": 1003520}
    images = constants | {"size": size, "image_processor_type": "Qwen2VLImageProcessor"}
    new = {"image_processor": images, "processor_class": "Qwen2_5_VLProcessor",
           "video_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}}}
    (folder / "processor_config.json").write_text(json.dumps(new))
    file.unlink()
    processor = Processor.from_pretrained(str(folder))
    assert processor.vision == old.vision
    processor.save(folder / "saved")
    assert (folder / "saved" / "preprocessor_config.json").exists()


def test_without_either_file_the_missing_one_is_named(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config.json"):
        load_processor(str(folder))
