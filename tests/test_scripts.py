"""train.sh 7b as a lab runs it, with a tiny model in place of the 7B: one node, two nodes, a dry run, and what it refuses."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from test_ktr import log_of, weights_of

from run import options
from run.options import parse, preflight

TINY = ["--dtype", "float32", "--max_new_tokens", "8", "--G", "2", "--workers", "0", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """This Python, which answers train.sh's questions about packages and GPUs (-c ...) at once: they take seconds."""
    path = tmp_path_factory.mktemp("python") / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" != -c ] || {{ echo 0; exit; }}\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def train(python, *arguments, **environment):
    ours = ("DATA", "VIDEOS", "MODEL", "OUT", "NPROC", "DEVICE", "NNODES")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.Popen(["bash", str(ROOT / "train.sh"), *map(str, arguments)], cwd="/", text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHON": str(python),
                                 **{name: str(value) for name, value in environment.items()}})


def finish(process, seconds=200):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_two_nodes_train_together(python, checkpoint_folder, world, tmp_path):
    """Two torchrun agents, as on two machines that share a file system: the same command, each with its NODE_RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [train(python, "7b", *TINY, "--max_steps", 2, "--prompts_per_step", 2, MODEL=checkpoint_folder, DATA=world / "train.json",
                   OUT=tmp_path / "out", DEVICE="cpu", NNODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
             for rank in (0, 1)]
    results = [finish(node) for node in nodes]
    assert [code for code, *_ in results] == [0, 0], results
    assert [(row["step"], row["prompts"]) for row in log_of(tmp_path / "out")] == [(1, 4), (2, 4)]      # two of each node
    final = tmp_path / "out" / "final"
    assert final.resolve().name == "checkpoint-000002" and len(list((final / "training_state").glob("rank-*.pt"))) == 2
    assert set(weights_of(final)) == set(weights_of(checkpoint_folder))
    saved = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (saved["videos"], saved["beta"], saved["temperature"], saved["top_p"]) == (str(world), 0.04, 1.0, 0.95)      # the recipe
    assert "ready: 48 records" in results[0][1] and "step" not in results[1][1]     # only the first node reports


def test_a_dry_run_on_two_processes_ends_with_its_table(python, checkpoint_folder, world, tmp_path):
    process = train(python, "7b", "--dry_run", *TINY, "--max_steps", 3, "--save_every", 3, MODEL=checkpoint_folder,
                    DATA=world / "train.json", OUT=tmp_path, DEVICE="cpu", NPROC=2, FRAMES=4)
    code, out, err = finish(process)
    assert code == 0, err
    assert [row["prompts"] for row in log_of(tmp_path)] == [2, 2, 2] and (tmp_path / "final" / "config.json").exists()
    assert f"{checkpoint_folder}: 2 prompts a step, G=2, up to 8 tokens, 4 frames; 1 steps after 2 to warm up" in out
    assert "an epoch of 16916 prompts" in out


def test_the_script_refuses_in_one_line(python, checkpoint_folder, world, tmp_path):
    """No GPU; DATA not set; no model where MODEL says; a file of records cut short."""
    (tmp_path / "cut.json").write_text((world / "train.json").read_text()[:-40])
    common = dict(MODEL=checkpoint_folder, DATA=world / "train.json", OUT=tmp_path / "out", DEVICE="cpu")
    cases = [({"DEVICE": ""}, sys.executable, "no GPU found"), ({"DATA": ""}, python, "DATA is not set"),
             ({"MODEL": "no/such"}, python, "no/such"),
             ({"DATA": tmp_path / "cut.json", "VIDEOS": world}, python, "cut.json: not valid JSON")]
    started = [train(interpreter, "7b", *TINY, **{**common, **change}) for change, interpreter, _ in cases]
    for process, (_, _, says) in zip(started, cases):
        code, out, err = finish(process)
        (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
        assert code == 1 and says in line and "Traceback" not in err and not out.replace("0\n", ""), (says, out, err)
    assert not (tmp_path / "out").exists()                                  # nothing was begun
    code, _, err = finish(train(python, "8b"))
    assert code == 2 and err.startswith("usage: ")


# ------------------------------------------------------------------------------------------- preflight
def refuse(folder, data, out, *more):
    with pytest.raises(SystemExit) as stop:
        preflight(parse(["--model", str(folder), "--data", str(data), "--out", str(out), *more]))
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("content, says", [
    ('[{"problem": "x"}, ', "not valid JSON"), ('{"problem": "x"}\n{"probl', "broken.json:2: "), ("[]", "holds no records"),
    ("", "holds no records"), ("not JSON at all", "broken.json:1: "),
    ('{"records": []}', "malformed, the first: record 0 (row 0): 'problem' is missing"),
])
def test_broken_records_are_one_line(checkpoint_folder, tmp_path, content, says):
    (tmp_path / "broken.json").write_text(content)
    message = refuse(checkpoint_folder, tmp_path / "broken.json", tmp_path / "out")
    assert says in message and "broken.json" in message


def test_clips_that_do_not_decode_are_found_before_the_start(checkpoint_folder, world, tmp_path):
    """The first three records are tried: one of them has to be usable."""
    records = json.loads((world / "train.json").read_text())[:6]
    for i, record in enumerate(records):
        record |= {"path": f"./{i}.y4m", "data_type": "video"}
        (tmp_path / f"{i}.y4m").write_bytes(b"no video")
    (tmp_path / "data.json").write_text(json.dumps(records))
    message = refuse(checkpoint_folder, tmp_path / "data.json", tmp_path / "out")
    assert "the first records cannot be used: record 0 (row 0)" in message and "0.y4m: cannot be decoded" in message
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    message = refuse(checkpoint_folder, tmp_path / "data.json", tmp_path / "out", "--videos", str(elsewhere))
    assert f"{elsewhere}/0.y4m: no such file" in message
    good = min(world.glob("train/*.y4m"))                                   # other tests leave damaged ones beside it
    shutil.copy(good, tmp_path / "2.y4m")
    o = parse(["--model", str(checkpoint_folder), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out")])
    assert len(preflight(o)) == 6


def test_fewer_gpus_than_processes(checkpoint_folder, world, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(options.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(options.torch.cuda, "device_count", lambda: 2)
    assert "8 processes on this machine but only 2 GPUs" in refuse(checkpoint_folder, world / "train.json", tmp_path)


def test_a_size_that_is_not_there(world, tmp_path):
    assert "random:4b: no such size; known: 3b, 7b, 32b" in refuse("random:4b", world / "train.json", tmp_path)


@pytest.mark.parametrize("gone", ["config.json", "preprocessor_config.json", "chat_template.jinja", "model.safetensors"])
def test_an_incomplete_model_folder(checkpoint_folder, world, tmp_path, gone):
    """As a broken download leaves it; without this, every rank would fail on its own after the start."""
    shutil.copytree(checkpoint_folder, tmp_path / "model", ignore=shutil.ignore_patterns(gone))
    assert str(tmp_path / "model") in refuse(tmp_path / "model", world / "train.json", tmp_path / "out")
