"""train.sh 7b as a lab runs it, with a tiny model in place of the 7B: one node, two nodes, a dry
run, and what it refuses."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_ktr import log_of, weights_of

from run import launch
from run.arguments import parse
from run.preflight import check_start

TINY = ["--dtype", "float32", "--max_new_tokens", "8", "--G", "2", "--workers", "0", "--lr", "1e-3"]
FIND = "print(importlib.util.find_spec('data').origin)"
PYTHON = '''#!/bin/sh
[ "$1" != -c ] || exit 0
exec "{}" "$@"
'''


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """This Python, which has all packages without looking (-c ...)."""
    path = tmp_path_factory.mktemp("python") / "python"
    path.write_text(PYTHON.format(sys.executable))
    path.chmod(0o755)
    return path


def train(python, *arguments, **environment):
    ours = ("DATA", "VIDEOS", "MODEL", "OUT", "NPROC", "DEVICE", "NNODES")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    more = {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1,
            "PYTHON": python, **environment}
    kept |= {name: str(value) for name, value in more.items()}
    return subprocess.Popen(["bash", ROOT / "train.sh", *map(str, arguments)], cwd="/", text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=kept,
                            start_new_session=True)


def finish(process, seconds=200):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_two_nodes_train_together(python, checkpoint_folder, world, tmp_path):
    """Two launchers, as on two machines that share a file system: the same command, each
    with its NODE_RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    common = dict(MODEL=checkpoint_folder, DATA=world / "train.json", OUT=out, DEVICE="cpu",
                  NNODES=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = ["7b", *TINY, "--max_steps", 2, "--prompts_per_step", 2]
    nodes = [train(python, *command, NODE_RANK=rank, **common) for rank in (0, 1)]
    results = [finish(node) for node in nodes]
    assert [code for code, *_ in results] == [0, 0], results
    steps = [(row["step"], row["prompts"]) for row in log_of(out)]
    assert steps == [(1, 4), (2, 4)]                            # two of each node
    final = out / "final"
    assert final.resolve().name == "checkpoint-000002"
    assert len(list((final / "training_state").glob("rank-*.pt"))) == 2
    assert set(weights_of(final)) == set(weights_of(checkpoint_folder))
    saved = json.loads((out / "options.json").read_text())
    recipe = {"videos": str(world), "beta": 0.04, "temperature": 1.0, "top_p": 0.95}
    assert {name: saved[name] for name in recipe} == recipe
    assert "ready: 48 records" in results[0][1]
    assert "step" not in results[1][1]                          # only the first node reports


def test_a_dry_run_ends_with_its_table(python, checkpoint_folder, world, tmp_path):
    process = train(python, "7b", "--dry_run", *TINY, "--max_steps", 3, "--save_every", 3,
                    MODEL=checkpoint_folder, DATA=world / "train.json", OUT=tmp_path,
                    DEVICE="cpu", FRAMES=4)
    code, out, err = finish(process)
    assert code == 0, err
    assert [row["prompts"] for row in log_of(tmp_path)] == [1, 1, 1]
    assert (tmp_path / "final" / "config.json").exists()
    assert (f"{checkpoint_folder}: 1 prompts a step, G=2, up to 8 tokens, 4 frames; "
            "1 steps after 2 to warm up") in out
    assert "an epoch of 16916 prompts" in out


def test_the_script_refuses_in_one_line(python, checkpoint_folder, world, tmp_path):
    """No GPU; DATA not set; no model where MODEL says; a file of records cut short."""
    cut = tmp_path / "cut.json"
    cut.write_text((world / "train.json").read_text()[:-40])
    common = dict(MODEL=checkpoint_folder, DATA=world / "train.json", OUT=tmp_path / "out",
                  DEVICE="cpu")
    cases = [({"DEVICE": ""}, python, "no GPU found"),
             ({"DATA": "none.json"}, python, "DATA=none.json is no file"),
             ({"MODEL": "no/such"}, python, "no/such"),
             ({"DATA": cut, "VIDEOS": world}, python, "cut.json: not valid JSON")]
    started = [train(interpreter, "7b", *TINY, **{**common, **change})
               for change, interpreter, _ in cases]
    for process, (_, _, says) in zip(started, cases):
        code, out, err = finish(process)
        (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
        assert code == 1 and says in line and "Traceback" not in err, (says, out, err)
        assert not out, out
    assert not (tmp_path / "out").exists()                      # nothing was begun
    code, _, err = finish(train(python, "8b"))
    assert code == 2 and err.startswith("usage: ")


def test_data_and_table_run_where_you_are(tmp_path):
    """With this project's modules, not with those that lie there."""
    (tmp_path / "data.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "list.json").touch()
    for given, runs in ((["data", "DIR", "--list", "list.json"], "lab.download"),
                        (["table", "runs/7b"], "lab.table")):
        asked = f"import importlib.util, os, sys; print(os.getcwd(), sys.argv[1:]); {FIND}"
        stub = tmp_path / "python"
        stub.write_text(f"""#!/bin/sh
[ "$1" != -c ] || exit 0
[ "$1 $2 $3" = "-P -m {runs}" ] && shift 3 && exec {sys.executable} -P -c "{asked}" "$@"
""")
        stub.chmod(0o755)
        made = subprocess.run(["bash", ROOT / "train.sh", *given], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "PYTHON": str(stub)})
        said = made.stdout.split("\n")[:2]
        assert said == [f"{tmp_path} {given[1:]}", str(ROOT / "data.py")], made


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="a GPU is there")
def test_the_toy_trains_on_two_cores(tmp_path):
    """Each process with a half of a step's 8 prompts, whatever OMP_NUM_THREADS makes nproc say."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
[ "$1 $2 $3" != "-P -m run.launch" ] || echo "$NPROC processes: $*"
""")
    stub.chmod(0o755)
    code, out, err = finish(train(stub, "toy", WORLD=tmp_path, OUT=tmp_path / "out"))
    cores = min(2, len(os.sched_getaffinity(0)))
    assert code == 0 and out.startswith(f"{cores} processes: "), err
    assert f"--prompts_per_step {8 // cores} " in out


# ---------------------------------------------------------------------------------------- preflight
@pytest.mark.parametrize("given, says", [
    (["--learning_rate", 1], "unrecognized arguments: --learning_rate 1"),
    (["--out", "x"], "OUT=DIR"), (["--signals", "vizual"], "unknown signal 'vizual'")])
def test_a_slip_is_told_before_the_toy_world_is_made(given, says, tmp_path):
    code, _, err = finish(train(sys.executable, "toy", *given, WORLD=tmp_path / "world"))
    assert code in (1, 2) and f"error: {says}" in err.replace("say ", "")
    assert not list(tmp_path.iterdir())


def refuse(folder, data, out, *more):
    given = ["--model", folder, "--data", data, "--out", out, "--workers", 0, *more]
    with pytest.raises(SystemExit) as stop:
        check_start(parse([str(x) for x in given]))
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("content, says", [
    ('[{"problem": "x"}, ', "not valid JSON"),
    ('{"problem": "x"}\n{"probl', "line 2 column 2"),
    ("[]", "holds no records"), ("", "holds no records"),
    ("not JSON at all", "line 1 column 2"),
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
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(records))
    message = refuse(checkpoint_folder, data, out)
    assert "the first records cannot be used: record 0 (row 0)" in message
    assert "0.y4m: cannot be decoded" in message
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    message = refuse(checkpoint_folder, data, out, "--videos", elsewhere)
    assert f"{elsewhere}/0.y4m: no such file" in message
    good = min(world.glob("train/*.y4m"))       # other tests leave damaged ones beside it
    shutil.copy(good, tmp_path / "2.y4m")
    given = ["--model", checkpoint_folder, "--data", data, "--out", out]
    usable, left_out = check_start(parse([str(x) for x in given]))
    assert len(usable) == 6 and left_out == set()


def test_fewer_gpus_than_processes(checkpoint_folder, world, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = refuse(checkpoint_folder, world / "train.json", tmp_path)
    assert "8 processes on this machine but only 2 GPUs" in message


def test_a_model_folder_that_is_not_there(world, tmp_path):
    for name in (tmp_path / "model", "nowhere", "runs/of/mine", "run1/final",
                 "run1/checkpoint-000250"):                             # none is asked of the hub
        message = refuse(name, world / "train.json", tmp_path)
        assert f"{name}: no such folder" in message


def test_a_size_that_is_not_there(world, tmp_path):
    message = refuse("random:4b", world / "train.json", tmp_path)
    assert "random:4b: no such size; known: 3b, 7b, 32b" in message


@pytest.mark.parametrize("gone", [
    "config.json", "preprocessor_config.json", "chat_template.jinja", "model.safetensors"])
def test_an_incomplete_model_folder(checkpoint_folder, world, tmp_path, gone):
    """As a broken download leaves it; without this, every rank would fail by itself."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder, ignore=shutil.ignore_patterns(gone))
    assert str(folder) in refuse(folder, world / "train.json", tmp_path / "out")


# --------------------------------------------------------------------------------------- the Python
def test_a_python_with_an_old_torch_is_passed_over(tmp_path):
    """For the one of .venv, here a stand-in that is content with everything."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_in = tmp_path / ".venv" / "bin" / "python"
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    old = tmp_path / "packages" / "torch-2.9.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    script = f"HERE={tmp_path}; . {ROOT}/run/env.sh; echo $PY"
    found = []
    for more in ({}, {"PYTHONPATH": str(old.parent)}):
        environment = {**os.environ, "PYTHON": sys.executable, **more}
        found.append(subprocess.check_output(["bash", "-ec", script], cwd=tmp_path, text=True,
                                              env=environment).strip())
    assert found == [sys.executable, str(stand_in)]


def test_a_process_that_fails_ends_its_run(tmp_path, monkeypatch, capfd):
    """The others get a moment to end by themselves; the code is that of the first that failed."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nrank = os.environ['RANK']\n"
                      "os.write(1, f'rank {rank} of {os.environ[\"WORLD_SIZE\"]}\\n'.encode())\n"
                      "how = sys.argv[1]\n"
                      "if rank == '1' and how == 'killed': os.kill(os.getpid(), 9)\n"
                      "if rank == '1': sys.exit(3)\n"
                      "time.sleep(60 if how != 'late' else 0.5)\n")
    monkeypatch.setattr(launch, "KTR", script)
    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    for how, code in ("killed", 137), ("failed", 3), ("late", 3):
        begun = time.time()
        assert launch.run(launch.environments(2), [how]) == code
        said = capfd.readouterr()
        assert sorted(said.out.split("\n"))[-2:] == ["rank 0 of 2", "rank 1 of 2"]
        assert ("was memory short?" in said.err) == (how == "killed")
        assert time.time() - begun < 20


def test_the_processes_of_a_second_node(monkeypatch):
    for name, value in {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    one, two = launch.environments(2)
    assert [one["RANK"], two["RANK"], two["LOCAL_RANK"], two["WORLD_SIZE"]] == ["2", "3", "1", "6"]
    assert (two["MASTER_ADDR"], two["MASTER_PORT"]) == ("node0", "29500")
    monkeypatch.delenv("NODE_RANK")
    with pytest.raises(SystemExit, match="NODE_RANK is not set"):
        launch.environments(2)
