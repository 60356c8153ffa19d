"""The training loop as a user runs it: whole runs, 1 to 3 processes, kills, full disks, bad data."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from run import checkpoint
import ktr
from run.options import PRESETS, parse

SMALL = ["--dtype", "float32", "--max_new_tokens", "12", "--G", "4", "--workers", "0", "--lr", "1e-3", "--no_checkpointing"]


def arguments(checkpoint_folder, world, out, *more):
    return ["--model", str(checkpoint_folder), "--data", str(world / "train.json"), "--out", str(out), *SMALL, *map(str, more)]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()


TIMES = re.compile("seconds|per_second")


def same_logs(a, b):
    strip = [[{k: v for k, v in row.items() if not TIMES.search(k)} for row in log] for log in (a, b)]
    return strip[0] == strip[1]


def start(command, **environment):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
                            start_new_session=True)


def torchrun(processes, script="ktr.py"):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), script]


def finish(process, seconds=150):
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


@pytest.fixture(scope="module")
def whole_run(checkpoint_folder, world, tmp_path_factory):
    """Six steps of two prompts, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    ktr.main(parse(arguments(checkpoint_folder, world, out, "--prompts_per_step", 2, "--max_steps", 6, "--save_every", 2, "--keep", 2,
                             "--sample_every", 2)))
    return out


# ------------------------------------------------------------------------------------------ options
def test_presets_and_single_options():
    base = ["--model", "m", "--data", "d"]
    for name, values in PRESETS.items():
        o = parse([*base, "--preset", name])
        assert all(getattr(o, key) == value for key, value in values.items())
    assert set(PRESETS["paper"]) == set(PRESETS["released"])
    o = parse([*base, "--preset", "released", "--shift", "abs", "--signals", "visual", "random"])
    assert o.shift == "abs" and o.normalize == "selected" and o.signals == ["visual", "random"]
    assert parse(base).lr == 2e-6 and parse(base).ratio == 0.2 and parse(base).beta == 0.04


@pytest.mark.parametrize("bad", [["--ratoi", "0.1"], ["--shift", "relative"], ["--signals", "vision"], ["--preset", "theirs"],
                                 ["--rati", "0.1"], ["--lr", "fast"]])
def test_misspelt_options_fail(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--model", "m", "--data", "d", *bad])
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_every_run_has_its_own_chance():
    """torch's CPU generator heeds 32 bits of a seed: run seeds must not hide above them."""
    a, b = (parse(["--model", "m", "--data", "d", "--seed", str(seed)]) for seed in (0, 4))
    seeds = {ktr.seed_of(o, index) + more for o in (a, b) for index in range(-1, 200) for more in (0, 1)}
    assert len(seeds) == 2 * 2 * 201 and all(0 <= seed < 2 ** 32 for seed in seeds)
    first = [torch.rand(4, generator=torch.Generator().manual_seed(ktr.seed_of(o, 7))) for o in (a, b)]
    assert not torch.equal(*first)


def test_learning_rate_warms_up_and_falls():
    o = parse(["--model", "m", "--data", "d", "--lr", "1.0", "--warmup_steps", "4"])
    rates = [ktr.learning_rate(o, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[12] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02


# --------------------------------------------------------------------------------------- a whole run
def test_a_run_leaves_what_it_promises(whole_run):
    log = log_of(whole_run)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["key_share"] <= 0.6 and row["prompts"] == 2 and row["grad_norm"] >= 0 for row in log)
    assert all(row["share_visual"] >= 0.2 and abs(row["sampling_gap"]) < 1e-5 for row in log)
    assert sorted(p.name for p in whole_run.glob("checkpoint-*")) == ["checkpoint-000004", "checkpoint-000006"]    # --keep 2
    assert (whole_run / "final").resolve().name == "checkpoint-000006"
    assert json.loads((whole_run / "options.json").read_text())["signals"] == ["visual", "temporal", "entropy"]
    samples = [json.loads(line) for line in (whole_run / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["watched"]) for s in samples] == [(2, False), (2, True), (4, False), (4, True), (6, False), (6, True)]
    assert len({s["path"] for s in samples if s["watched"]}) == 1
    for completion in samples[0]["completions"]:
        n = len(completion["tokens"])
        assert all(len(x) == n for kind in ("signals", "chosen") for x in completion[kind].values())


def test_the_final_model_loads_anywhere(whole_run, checkpoint_folder):
    final = whole_run / "final"
    trained, base = weights_of(final), weights_of(checkpoint_folder)
    assert set(trained) == set(base) and any(not torch.equal(trained[k], base[k]) for k in base)
    assert AutoTokenizer.from_pretrained(final).chat_template
    assert json.loads((final / "preprocessor_config.json").read_text())["patch_size"] == 14
    card = (final / "README.md").read_text()
    assert "library_name: transformers" in card and '"signals"' in card and "6 of 6 steps" in card


def test_training_moves_towards_reward(checkpoint_folder, world, tmp_path, monkeypatch):
    """A reward that the random model can reach (short completions) rises within a few steps."""
    def judge(group, record, processor):
        return torch.tensor([1.0 / n for n in group.lengths]), torch.zeros(len(group.ids))
    monkeypatch.setattr(ktr, "judge", judge)
    more = ["--prompts_per_step", 4, "--max_steps", 12, "--beta", 0, "--signals", "all", "--G", 8, "--lr", "3e-3"]
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, *more)))
    rewards = [row["reward"] for row in log_of(tmp_path)]
    assert rewards[0] < 0.5 and rewards[-1] > 2 * rewards[0]


def test_unselected_tokens_leave_no_gradient(checkpoint_folder, world, tmp_path, monkeypatch):
    """With no key token at all (ratio 0) and the KL on key tokens, nothing moves."""
    monkeypatch.setattr(ktr, "judge", lambda group, *_: (torch.arange(float(len(group.ids))), torch.zeros(len(group.ids))))
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path / "none", "--max_steps", 2, "--ratio", 0, "--weight_decay", 0)))
    assert [row["grad_norm"] for row in log_of(tmp_path / "none")] == [0.0, 0.0]
    before, after = weights_of(checkpoint_folder), weights_of(tmp_path / "none" / "final")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_prompt_that_no_signal_applies_to(checkpoint_folder, world, tmp_path):
    """A still image has no order: with the temporal signal alone it has no key token, and the run goes on."""
    images = [r for r in json.loads((world / "train.json").read_text()) if r["data_type"] == "image"]
    (tmp_path / "images.json").write_text(json.dumps(images))
    ktr.main(parse([*arguments(checkpoint_folder, world, tmp_path, "--signals", "temporal", "--max_steps", 2),
                    "--data", str(tmp_path / "images.json"), "--videos", str(world)]))
    assert [(row["key_share"], row["overlap"], row["grad_norm"]) for row in log_of(tmp_path)] == [(0, 0, 0)] * 2


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_presets_run(checkpoint_folder, world, tmp_path, preset):
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, "--max_steps", 2, "--preset", preset, "--prompts_per_step", 2)))
    assert len(log_of(tmp_path)) == 2


# ----------------------------------------------------------------------------------- several processes
def test_two_processes_make_the_update_of_one(whole_run, checkpoint_folder, world, tmp_path):
    """The same prompts per step over two ranks: the same completions, losses and weights."""
    more = ["--prompts_per_step", 1, "--max_steps", 6, "--save_every", 2, "--sample_every", 2]
    code, out = finish(start([*torchrun(2), *arguments(checkpoint_folder, world, tmp_path, *more)]))
    assert code == 0, out
    for a, b in zip(log_of(whole_run), log_of(tmp_path), strict=True):
        for name in ("reward", "length", "loss", "kl", "key_share", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    one, two = weights_of(whole_run / "final"), weights_of(tmp_path / "final")
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def damaged(world, tmp_path, rows):
    """The training records, with some clips of each kind of damage: {row: content of its file}."""
    records = json.loads((world / "train.json").read_text())
    for row, content in rows.items():
        records[row] |= {"path": f"./train/damaged{row}.y4m", "data_type": "video"}
        (world / "train" / f"damaged{row}.y4m").write_bytes(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_with_different_data_never_hang(checkpoint_folder, world, tmp_path, processes):
    """Unreadable clips on some ranks, images on others, long and short completions: the same collectives everywhere."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(42)).tolist()
    data = damaged(world, tmp_path, {order[0]: b"no video", order[processes]: b"", order[processes + 1]: b"x"})
    command = [*arguments(checkpoint_folder, world, tmp_path, "--max_steps", 4), "--data", str(data), "--videos", str(world)]
    code, out = finish(start([*torchrun(processes), *command]))
    assert code == 0, out
    assert [row["prompts"] for row in log_of(tmp_path)] == [processes - 1, processes - 2, processes, processes]
    assert log_of(tmp_path)[-1]["skipped"] == 3 and out.count("cannot be decoded") == 3
    named = [json.loads(line) for p in tmp_path.glob("skipped.*.jsonl") for line in p.read_text().splitlines()]
    assert len(named) == 3 and all("damaged" in item["reason"] for item in named)


FAULTY = '''
import sys, os
sys.path.insert(0, {root!r})
import ktr
from run.options import parse
judge, calls = ktr.judge, []
def broken(group, record, processor):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("a fault in the reward")
    return judge(group, record, processor)
ktr.judge = broken
ktr.main(parse())
'''


def test_a_rank_that_raises_ends_the_job(checkpoint_folder, world, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    begun = time.time()
    code, out = finish(start([*torchrun(2, str(script)), *arguments(checkpoint_folder, world, tmp_path / "out", "--max_steps", 40)]))
    assert code != 0 and "a fault in the reward" in out
    assert re.search(r"on rank 1 in step 1, with the records \d+", out), out
    assert time.time() - begun < 75                                         # start-up included


# -------------------------------------------------------------------------------- kills and full disks
def kill_when(process, out, condition, number):
    deadline = time.time() + 120
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    return finish(process)


def test_sigkill_and_resume_repeat_the_run_bit_for_bit(whole_run, checkpoint_folder, world, tmp_path):
    command = ["ktr.py", *arguments(checkpoint_folder, world, tmp_path, "--prompts_per_step", 2, "--max_steps", 6, "--save_every", 2,
                                    "--keep", 2, "--sample_every", 2)]
    process = start(command, OMP_NUM_THREADS="2")
    kill_when(process, tmp_path, lambda: (tmp_path / "log.jsonl").exists() and len(log_of(tmp_path)) >= 3, signal.SIGKILL)
    assert len(log_of(tmp_path)) < 6 and checkpoint.newest(tmp_path).name == "checkpoint-000002"
    (tmp_path / "checkpoint-000099.part").mkdir()                           # as a kill during a save leaves it
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "rew')                                      # a line cut short
    code, out = finish(start(command, OMP_NUM_THREADS="2"))
    assert code == 0, out
    assert same_logs(log_of(whole_run), log_of(tmp_path))
    one, two = weights_of(whole_run / "final"), weights_of(tmp_path / "final")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (whole_run / "samples.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_leaves(checkpoint_folder, world, tmp_path, processes):
    command = arguments(checkpoint_folder, world, tmp_path, "--max_steps", 24, "--save_every", 1000)
    process = start(["ktr.py", *command] if processes == 1 else [*torchrun(2), *command])
    deadline = time.time() + 120
    while not ((tmp_path / "log.jsonl").exists() and len(log_of(tmp_path)) >= 2) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code != 0 and "start again with --resume auto" in out, out
    saved = checkpoint.newest(tmp_path)
    step = int(saved.name.split("-")[1])
    assert 2 <= step < 24 and len(log_of(tmp_path)) == step
    assert len(list((saved / "training_state").glob("*.pt"))) == processes
    weights_of(saved)


def test_a_process_that_saves_is_waited_for():
    code = ("import checkpoint, os, signal, time\np = checkpoint.Preemption(grace=0.5)\np.saving = True\n"
            "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(1.5)\np.heard.set()\nprint('saved')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "saved\n"


def test_a_stuck_process_leaves_after_the_grace():
    code = ("import checkpoint, os, signal, time, threading\ncheckpoint.Preemption(grace=1.0)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nthreading.Event().wait(30)\nprint('still here')")
    begun = time.time()
    code, out = finish(start(["-c", code]))
    assert code == 1 and "leaving without a checkpoint" in out and time.time() - begun < 25


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_full_disk_during_a_checkpoint(checkpoint_folder, world, tmp_path, monkeypatch, where):
    out = tmp_path / "out"
    common = arguments(checkpoint_folder, world, out, "--save_every", 1, "--keep", 1)
    ktr.main(parse([*common, "--max_steps", "1"]))

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    target = (Qwen2_5_VLForConditionalGeneration, "save_pretrained") if where == "weights" else (torch, "save")
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="No space left.*--resume auto.*checkpoint-000001"):
            ktr.main(parse([*common, "--max_steps", "2"]))
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-000001"]
    ktr.main(parse([*common, "--max_steps", "2"]))
    assert checkpoint.newest(out).name == "checkpoint-000002"


def test_resume_needs_what_made_the_checkpoint(whole_run, checkpoint_folder, world, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole_run, out, symlinks=True)
    with pytest.raises(SystemExit, match="prompts a step: 2 there, 4 now"):
        ktr.main(parse(arguments(checkpoint_folder, world, out, "--prompts_per_step", 4, "--max_steps", 8)))
    with pytest.raises(SystemExit, match="lr: 0.001 there, 0.5 now"):
        ktr.main(parse(arguments(checkpoint_folder, world, out, "--prompts_per_step", 2, "--lr", "0.5")))
    with pytest.raises(SystemExit, match="holds a run already"):
        ktr.main(parse(arguments(checkpoint_folder, world, out, "--resume", "never")))
    shutil.copy(out / "checkpoint-000006/training_state/rank-0000.pt", out / "checkpoint-000006/training_state/rank-0001.pt")
    with pytest.raises(SystemExit, match="written by 2 processes and this run has 1"):
        ktr.main(parse(arguments(checkpoint_folder, world, out, "--prompts_per_step", 2, "--max_steps", 8)))


# --------------------------------------------------------------------------------------------- guards
def test_a_model_that_breaks_stops_after_some_steps(checkpoint_folder, world, tmp_path):
    """NaN in the weights makes NaN of scores and losses alike: steps are skipped and counted, then the run stops."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder, broken)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(broken)
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        ktr.main(parse(arguments(broken, world, tmp_path / "out", "--max_steps", 9)))
    assert len(log_of(tmp_path / "out")) == 5


def test_gradients_that_are_not_finite(checkpoint_folder, world, tmp_path, monkeypatch):
    loss, calls = ktr.grpo_loss, []

    def sometimes(*a, **k):
        calls.append(1)
        one, metrics = loss(*a, **k)
        return one * (float("nan") if len(calls) in bad else 1.0), metrics
    monkeypatch.setattr(ktr, "grpo_loss", sometimes)
    bad = {2}
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path / "one", "--max_steps", 3)))
    log = log_of(tmp_path / "one")
    assert [row["grad_norm"] == row["grad_norm"] for row in log] == [True, False, True]
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "one" / "final").values())
    bad, calls[:] = set(range(1, 99)), []
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        ktr.main(parse(arguments(checkpoint_folder, world, tmp_path / "many", "--max_steps", 30)))
    assert len(log_of(tmp_path / "many")) == 5


def test_too_many_unusable_records_stop_the_run(checkpoint_folder, world, tmp_path):
    data = damaged(world, tmp_path, {row: b"no video" for row in range(3, 20)})
    with pytest.raises(SystemExit, match="could not be used"):
        ktr.main(parse([*arguments(checkpoint_folder, world, tmp_path, "--epochs", 3), "--data", str(data), "--videos", str(world)]))
    records = json.loads(data.read_text())
    for row in range(10):
        records[row]["problem_type"] = "essay"
    data.write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="10 of 48 records .* malformed.*essay"):
        ktr.main(parse([*arguments(checkpoint_folder, world, tmp_path), "--data", str(data), "--videos", str(world)]))


def test_a_long_prompt_is_skipped_and_counted(checkpoint_folder, world, tmp_path, tiny):
    records = json.loads((world / "train.json").read_text())
    order = torch.randperm(48, generator=torch.Generator().manual_seed(42)).tolist()
    records[order[1]]["problem"] = "What colour is the circle ? " * 30
    data = tmp_path / "long.json"
    data.write_text(json.dumps(records))
    ktr.main(parse([*arguments(checkpoint_folder, world, tmp_path, "--max_steps", 3, "--max_prompt", 100), "--data", str(data),
                    "--videos", str(world)]))
    assert [row["skipped"] for row in log_of(tmp_path)] == [0, 1, 1]


@pytest.mark.parametrize("change, says", [
    ({"--data": "none.json"}, "none.json: no such file"), ({"--videos": "nowhere"}, "nowhere: no such folder"),
    ({"--model": "no/such/model"}, "model"),
])
def test_what_is_missing_is_one_clear_line(checkpoint_folder, world, tmp_path, change, says):
    command = arguments(checkpoint_folder, world, tmp_path)
    for name, value in change.items():
        command += [name, value]
    with pytest.raises(SystemExit) as stop:
        ktr.main(parse(command))
    assert str(stop.value).startswith("error: ") and says in str(stop.value) and "\n" not in str(stop.value)


def test_reporters_must_be_installed(checkpoint_folder, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, "--report_to", "wandb", "--max_steps", 1)))
