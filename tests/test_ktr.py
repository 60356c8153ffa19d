"""The loop as a user runs it: whole runs, one and more processes, kills, full disks, bad data."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import ktr
from attribution import COUNTERFACTUALS, SCORES
from lab.report import read_run
from options import Options
from rollout import Group, Rollout
from run import checkpoint, training
from run.arguments import parse
from run.logs import rows_of

SMALL = ["--dtype", "float32", "--max_new_tokens", "12", "--G", "4", "--workers", "0",
         "--lr", "1e-3", "--no_checkpointing", "--sample_every", "1000"]
WHOLE = ["--prompts_per_step", 2, "--max_steps", 6, "--save_every", 2, "--keep", 2,
         "--sample_every", 2]


def arguments(checkpoint_folder, world, out, *more):
    given = ["--model", checkpoint_folder, "--data", world / "train.json", "--videos", world,
             "--out", out, *SMALL, *more]
    return [str(x) for x in given]


@pytest.fixture(autouse=True)
def ends_on_sigterm():
    """A run in this process takes signals for itself; afterwards they end the tests as usual."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture
def run(checkpoint_folder, world):
    """run(out, *options): a run in this process."""
    def go(out, *more):
        ktr.main(parse(arguments(checkpoint_folder, world, out, *more)))
    return go


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out, *names):
    """The values of some metrics, step by step."""
    return [tuple(row[name] for name in names) for row in log_of(out)]


def weights_of(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()


TIMES = re.compile("seconds|per_second")


def without_times(log):
    return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in log]


def start(command, **environment):
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, **ours}, start_new_session=True)


def torchrun(processes, script="ktr.py"):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script]


def finish(process, seconds=200):
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


@pytest.fixture(scope="module")
def whole_run(checkpoint_folder, world, tmp_path_factory):
    """Six steps of two prompts, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    ktr.main(parse(arguments(checkpoint_folder, world, out, *WHOLE)))
    return out


def test_learning_rate_warms_up_and_falls():
    o = Options(lr=1.0, warmup_steps=4)
    rates = [ktr.learning_rate(o, step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[12] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02


# -------------------------------------------------------------------------------------- a whole run
def test_a_run_leaves_what_it_promises(whole_run):
    log = log_of(whole_run)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["key_share"] <= 0.6 and row["prompts"] == 2 for row in log)
    assert all(row["share_visual"] >= 0.2 and abs(row["sampling_gap"]) < 1e-5 for row in log)
    kept = sorted(p.name for p in whole_run.glob("checkpoint-*"))
    assert kept == ["checkpoint-000004", "checkpoint-000006"]               # --keep 2
    assert (whole_run / "final").resolve().name == "checkpoint-000006"
    options = json.loads((whole_run / "options.json").read_text())
    assert options["signals"] == ["visual", "temporal", "entropy"]
    samples = rows_of(whole_run / "samples.jsonl")
    expected = [(step, watched) for step in (2, 4, 6) for watched in (False, True)]
    assert [(s["step"], s["watched"]) for s in samples] == expected
    assert len({s["path"] for s in samples if s["watched"]}) == 1
    for completion in samples[0]["completions"] + samples[1]["completions"]:
        n = len(completion["tokens"])
        assert set(completion["signals"]) == set(completion["top_tokens"]) >= {"visual", "entropy"}
        rows = [*completion["signals"].values(), *completion["top_tokens"].values()]
        assert all(len(row) == n for row in rows)


def test_nothing_is_learnt_of_the_watched_question(whole_run, run, tmp_path):
    run(tmp_path, *WHOLE, "--sample_every", 1)
    assert len(rows_of(tmp_path / "samples.jsonl")) == 2 * 6
    assert without_times(log_of(whole_run)) == without_times(log_of(tmp_path))


def test_the_final_model_loads_anywhere(whole_run, checkpoint_folder):
    final = whole_run / "final"
    trained, base = weights_of(final), weights_of(checkpoint_folder)
    assert set(trained) == set(base)
    assert any(not torch.equal(trained[k], base[k]) for k in base)
    assert AutoTokenizer.from_pretrained(final).chat_template
    assert json.loads((final / "preprocessor_config.json").read_text())["patch_size"] == 14
    card = (final / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {checkpoint_folder}\npipeline_tag: ")
    assert "after 6 steps" in card
    used = json.loads(card.split("```json")[1].split("```")[0])
    assert used["signals"][0] == "visual" and used["lr"] == 1e-3 and used["processes"] == 1
    assert set(used) > {"data", "videos", "records", *Options.__dataclass_fields__}


def test_training_moves_towards_reward(run, tmp_path, monkeypatch):
    """A reward that the random model can reach (short completions) rises within a few steps."""
    def rewards(o, processor, group, record):
        return torch.tensor([1.0 / n for n in group.lengths]), torch.zeros(len(group.ids))
    monkeypatch.setattr(ktr, "answer_rewards", rewards)
    run(tmp_path, "--prompts_per_step", 4, "--max_steps", 12, "--beta", 0, "--signals", "all",
        "--G", 8, "--lr", "3e-3")
    rewards = [row["reward"] for row in log_of(tmp_path)]
    assert rewards[0] < 0.5 and rewards[-1] > 2 * rewards[0]


def ranked(o, processor, group, record):
    """Rewards that like later completions better, so that every token has an advantage."""
    return torch.arange(float(len(group.ids))), torch.zeros(len(group.ids))


def test_unselected_tokens_leave_no_gradient(run, checkpoint_folder, tmp_path, monkeypatch):
    """With no key token at all (ratio 0) and the KL on key tokens, nothing moves."""
    monkeypatch.setattr(ktr, "answer_rewards", ranked)
    run(tmp_path, "--max_steps", 2, "--ratio", 0, "--weight_decay", 0)
    assert logged(tmp_path, "grad_norm") == [(0,), (0,)]
    before, after = weights_of(checkpoint_folder), weights_of(tmp_path / "final")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_prompts_scored_together_and_in_parts_make_one_update(run, tmp_path, monkeypatch):
    """`scale` weighs each part's loss by the prompts of the step, not of the part."""
    monkeypatch.setattr(ktr, "answer_rewards", ranked)
    more = ["--prompts_per_step", 3, "--max_steps", 1, "--save_every", 0]
    run(tmp_path / "together", *more)
    monkeypatch.setattr(ktr, "ROW_TOKENS", 1)
    run(tmp_path / "apart", *more)
    (one,), (two,) = (logged(tmp_path / x, "grad_norm", "loss") for x in ("together", "apart"))
    assert one == pytest.approx(two, rel=1e-4, abs=1e-6) and one[0] > 0


def test_a_prompt_that_no_signal_applies_to(run, world, tmp_path):
    """A still image has no order: with the temporal signal alone it has no key token, and the run
    goes on."""
    records = json.loads((world / "train.json").read_text())
    images = [record for record in records if record["data_type"] == "image"]
    (tmp_path / "images.json").write_text(json.dumps(images))
    run(tmp_path, "--signals", "temporal", "--max_steps", 2, "--data", tmp_path / "images.json")
    assert logged(tmp_path, "key_share", "overlap", "grad_norm") == [(0, 0, 0)] * 2


@pytest.mark.parametrize("more", [
    ["--preset", "released", "--prompts_per_step", 2],
    ["--rule", "lab/rules/masking.py", "lab/rules/frame_orders.py", "lab/rules/soft_weights.py",
     "--signals", "visual", "visual_replace", "temporal_blocks"],
    ["--rule", "lab/rules/distances.py", "--signals", "visual", "visual_js", "temporal_js"],
])
def test_other_choices_run(run, tmp_path, more):
    run(tmp_path, "--max_steps", 2, "--save_every", 0, *more)
    assert all(row["share_visual"] > 0 for row in log_of(tmp_path)) and len(log_of(tmp_path)) == 2


# ------------------------------------------------------------------------------------ frozen parts
def moved(base, trained):
    """{name of a matrix: the largest change of its entries}."""
    return {k: (base[k] - trained[k]).abs().max().item() for k in base if base[k].ndim > 1}


def only_the_vision_tower_stays(checkpoint_folder, trained):
    base, after = weights_of(checkpoint_folder), weights_of(trained)
    tower = {k for k in base if "visual." in k and "visual.merger." not in k}
    assert len(tower) > 10 and any("visual.merger." in k for k in base)
    assert all(torch.equal(base[k], after[k]) for k in tower)
    changes = {k: x for k, x in moved(base, after).items() if k not in tower}
    assert min(changes.values()) > 1e-4, changes         # decay alone moves them by less than 1e-5


def test_frozen_parts_stay_and_the_others_are_trained(run, checkpoint_folder, tmp_path,
                                                      monkeypatch, capsys):
    monkeypatch.setattr(ktr, "answer_rewards", ranked)
    run(tmp_path, "--freeze", "vision", "--max_steps", 2)
    assert re.search(r"trained: vision [\d.]+M \(frozen\), projector [\d.]+M, language",
                     capsys.readouterr().out)
    only_the_vision_tower_stays(checkpoint_folder, tmp_path / "final")


# -------------------------------------------------------------------------------- several processes
WATCHED = '''
import sys
sys.path.insert(0, {root!r})
import ktr
from run import training
from run.arguments import parse
from run.distributed import exit_process
begin, step, places = training.Training, training.ShardedAdamW.step, []
def place(optimizer):
    return [p.grad.data_ptr() for p in optimizer.params]
def begun(*arguments):
    run = begin(*arguments)
    places.append(place(run.optimizer))
    return run
def stepped(optimizer, *arguments):
    assert place(optimizer) == places[0], "DDP has made new buckets beside the old ones"
    step(optimizer, *arguments)
ktr.Training, training.ShardedAdamW.step = begun, stepped
ktr.main(parse())
exit_process()
'''


def test_two_processes_make_the_update_of_one(whole_run, checkpoint_folder, world, tmp_path):
    """The same prompts per step over two ranks: the same completions, losses and weights. Gradients
    stay where they were when the run began."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED.format(root=str(ROOT)))
    more = [*WHOLE, "--prompts_per_step", 1]
    command = arguments(checkpoint_folder, world, tmp_path, *more)
    code, out = finish(start([*torchrun(2, script), *command]))
    assert code == 0, out
    for a, b in zip(log_of(whole_run), log_of(tmp_path), strict=True):
        for name in ("reward", "length", "loss", "kl", "key_share", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    one, two = weights_of(whole_run / "final"), weights_of(tmp_path / "final")
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def damaged(world, tmp_path, rows):
    """The training records, with some clips of each kind of damage: {row: its file's content}."""
    records = json.loads((world / "train.json").read_text())
    for row, content in rows.items():
        records[row] |= {"path": f"./train/damaged{row}.y4m", "data_type": "video"}
        (world / "train" / f"damaged{row}.y4m").write_bytes(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(records))
    return path


def order_of(seed=42, n=48):
    """The rows of the training records in the first epoch's order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def test_ranks_with_different_data_never_hang(checkpoint_folder, world, tmp_path):
    """Unreadable clips on one rank, then on both, images on others, long and short completions:
    the same collectives everywhere. A frozen part takes no part in them."""
    order = order_of()
    data = damaged(world, tmp_path, {order[0]: b"no video", order[2]: b"", order[3]: b"x"})
    command = arguments(checkpoint_folder, world, tmp_path, "--max_steps", 4, "--data", data,
                        "--freeze", "vision")
    code, out = finish(start([*torchrun(2), *command]))
    assert code == 0, out
    assert logged(tmp_path, "prompts") == [(1,), (0,), (2,), (2,)]
    assert log_of(tmp_path)[-1]["skipped"] == 3 and out.count("cannot be decoded") == 3
    named = [row for rank in (0, 1) for row in rows_of(tmp_path / f"skipped.{rank}.jsonl")]
    assert len(named) == 3 and all("damaged" in row["reason"] for row in named)
    only_the_vision_tower_stays(checkpoint_folder, tmp_path / "final")


FAULTY = '''
import sys, os
sys.path.insert(0, {root!r})
import ktr
from run.arguments import parse
rewards, calls = ktr.answer_rewards, []
def broken(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("a fault in the reward")
    return rewards(*arguments)
ktr.answer_rewards = broken
ktr.main(parse())
'''


def test_a_rank_that_raises_ends_the_job(checkpoint_folder, world, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    command = arguments(checkpoint_folder, world, tmp_path / "out", "--max_steps", 400)
    code, out = finish(start([*torchrun(2, script), *command]))
    assert code != 0 and "a fault in the reward" in out
    assert re.search(r"on rank 1 in step 2, with the records \d+", out), out
    assert len(log_of(tmp_path / "out")) == 1                   # the other rank did not go on


# ----------------------------------------------------------------------------- kills and full disks
def wait_for(process, condition, seconds=120):
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)


def steps_in(out):
    return len(log_of(out)) if (out / "log.jsonl").exists() else 0


def test_sigkill_and_resume_repeat_the_run_bit_for_bit(whole_run, run, checkpoint_folder, world,
                                                       tmp_path):
    command = ["ktr.py", *arguments(checkpoint_folder, world, tmp_path, *WHOLE)]
    process = start(command)
    wait_for(process, lambda: steps_in(tmp_path) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert steps_in(tmp_path) < 6 and checkpoint.newest(tmp_path).name == "checkpoint-000002"
    (tmp_path / "checkpoint-000099.part").mkdir()           # as a kill during a save leaves it
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "rew')                      # a line cut short
    run(tmp_path, *WHOLE)
    assert without_times(log_of(whole_run)) == without_times(log_of(tmp_path))
    one, two = weights_of(whole_run / "final"), weights_of(tmp_path / "final")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (whole_run / "samples.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()


def asks_to_stop(monkeypatch, call, number=signal.SIGTERM):
    """A signal reaches this process while the given call of `answer_rewards` runs."""
    rewards, calls = ktr.answer_rewards, []

    def asking(*given):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return rewards(*given)
    monkeypatch.setattr(ktr, "answer_rewards", asking)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(run, tmp_path, monkeypatch, capsys, number):
    """SIGTERM, or the first Ctrl-C."""
    asks_to_stop(monkeypatch, call=2, number=number)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max_steps", 4, "--save_every", 1000)
    assert stop.value.code == 143 and steps_in(tmp_path) == 2   # the step that runs is finished
    said = capsys.readouterr().out
    assert (f"stopped after step 2 of 4, saved {tmp_path}/checkpoint-000002; run the same command "
            "again to continue") in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(tmp_path, "--max_steps", 4, "--save_every", 1000)
    assert steps_in(tmp_path) == 4 and checkpoint.newest(tmp_path).name == "checkpoint-000004"


def test_sigterm_to_two_processes(checkpoint_folder, world, tmp_path):
    """run/launch.py hands it on; both save their part after the same step. (--signals is also the
    beginning of an option of torchrun's.)"""
    more = ["--max_steps", 400, "--save_every", 1000, "--signals", "all"]
    process = start(["-m", "run.launch", "no.such.module",
                     *map(str, arguments(checkpoint_folder, world, tmp_path, *more))],
                    DEVICE="cpu", NPROC="2")
    wait_for(process, lambda: steps_in(tmp_path) >= 2)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 143 and "run the same command again" in out and "Traceback" not in out, out
    saved = checkpoint.newest(tmp_path)
    step = int(saved.name.split("-")[1])
    assert 2 <= step < 400 and steps_in(tmp_path) == step
    assert len(list((saved / "training_state").glob("*.pt"))) == 2
    weights_of(saved)


def test_ctrl_c_before_the_first_step_is_one_line(checkpoint_folder, world, tmp_path):
    """Heard by run/launch.py while its check runs."""
    given = map(str, arguments(checkpoint_folder, world, tmp_path, "--max_steps", 400))
    process = start(["-m", "run.launch", "no.such.module", *given], DEVICE="cpu", NPROC="2")
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(process, lambda: started.read_text())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    code, out = finish(process)
    assert code == 143 and out == "stopped without saving; run the same command again\n"


def test_without_checkpoints_nothing_is_claimed_and_the_old_log_is_kept(run, tmp_path,
                                                                        monkeypatch, capsys):
    with monkeypatch.context() as patch:
        asks_to_stop(patch, call=2)
        with pytest.raises(SystemExit):
            run(tmp_path, "--max_steps", 4, "--save_every", 0)
    said = capsys.readouterr().out
    assert "stopped after step 2 of 4" in said and "nothing is saved" in said
    assert not list(tmp_path.glob("checkpoint-*"))
    before = (tmp_path / "log.jsonl").read_text()
    run(tmp_path, "--max_steps", 1, "--save_every", 0)          # nothing to resume from
    assert steps_in(tmp_path) == 1
    (aside,) = tmp_path.glob("log.jsonl.before-*")
    assert aside.read_text() == before and len(before.splitlines()) == 2


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_full_disk_during_a_checkpoint(run, tmp_path, monkeypatch, where):
    common = [tmp_path, "--save_every", 1, "--keep", 1, "--max_steps"]
    run(*common, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    weights = (Qwen2_5_VLForConditionalGeneration, "save_pretrained")
    with monkeypatch.context() as patch:
        patch.setattr(*(weights if where == "weights" else (torch, "save")), full)
        with pytest.raises(OSError, match="No space left.*--resume auto.*checkpoint-000001"):
            run(*common, 2)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]
    run(*common, 2)
    assert checkpoint.newest(tmp_path).name == "checkpoint-000002"


# ------------------------------------------------------------------------------------------- resume
def test_resume_needs_what_made_the_checkpoint(whole_run, run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole_run, out, symlinks=True)
    with pytest.raises(SystemExit, match="prompts_per_step: 2 there, 4 now"):
        run(out, *WHOLE, "--prompts_per_step", 4, "--max_steps", 8)
    with pytest.raises(SystemExit, match="lr: 0.001 there, 0.5 now"):
        run(out, *WHOLE, "--lr", "0.5")
    with pytest.raises(SystemExit, match=r"freeze: \[\] there, \['vision'\] now"):
        run(out, *WHOLE, "--freeze", "vision")
    with pytest.raises(SystemExit, match="holds a run already"):
        run(out, *WHOLE, "--resume", "never")
    file = out / "checkpoint-000006" / "training_state" / "rank-0000.pt"
    state = torch.load(file)
    state["made_by"]["processes"] = 2
    torch.save(state, file)
    with pytest.raises(SystemExit, match="processes: 2 there, 1 now"):
        run(out, *WHOLE, "--max_steps", 8)


def test_a_run_is_not_continued_under_another_text_of_its_rule(run, tmp_path):
    rule = tmp_path / "mine.py"
    for steps, text in ((1, "OPTIONS = '--ratio 0.3'"), (2, "OPTIONS = '--ratio 0.3'  # new")):
        rule.write_text(text)
        if steps == 1:
            run(tmp_path / "out", "--rule", rule, "--max_steps", 1)
        else:
            with pytest.raises(SystemExit, match=r"text of rules: \['\w{8}'\] there, \['\w{8}'\]"):
                run(tmp_path / "out", "--rule", rule, "--max_steps", 2)


def test_records_are_left_out_when_a_run_goes_on(run, world, tmp_path):
    """What was done stays, what is listed never comes, and the run goes on with what follows."""
    common = [tmp_path / "out", "--sample_every", 1, "--max_steps"]
    run(*common, 2)
    done = (tmp_path / "out" / "log.jsonl").read_text()
    order, records = order_of(), json.loads((world / "train.json").read_text())
    listed = [{"row": row, "path": records[row]["path"]} for row in (order[2], order[4], order[1])]
    (tmp_path / "bad.json").write_text(json.dumps(listed))
    run(*common, 5, "--leave_out", tmp_path / "bad.json")
    assert (tmp_path / "out" / "log.jsonl").read_text().startswith(done)
    samples = rows_of(tmp_path / "out" / "samples.jsonl")
    shown = [s["problem_id"] for s in samples if not s["watched"]]
    ids = [records[row].get("problem_id", row) for row in order]
    assert shown == [ids[0], ids[1], ids[3], ids[5], ids[6]]


def test_what_was_skipped_stands_once_when_a_run_goes_on(run, world, tmp_path):
    order = order_of()
    data = damaged(world, tmp_path, {order[1]: b"no video", order[3]: b"no video"})
    common = [tmp_path / "out", "--data", data, "--save_every", 3, "--max_steps"]
    run(*common, 4)
    shutil.rmtree(tmp_path / "out" / "checkpoint-000004")           # killed before it was saved
    run(*common, 5)
    rows = rows_of(tmp_path / "out" / "skipped.0.jsonl")
    assert [(row["step"], row["row"]) for row in rows] == [(2, order[1]), (4, order[3])]
    assert logged(tmp_path / "out", "step", "skipped") == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]


# ------------------------------------------------------------------------------------------- guards
def test_a_model_that_breaks_stops_after_some_steps(run, checkpoint_folder, tmp_path):
    """NaN in the weights makes NaN of scores and losses alike: steps are skipped and counted, then
    the run stops."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder, broken)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(broken)
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        run(tmp_path / "out", "--max_steps", 9, "--model", broken)
    assert steps_in(tmp_path / "out") == 5


def test_a_gradient_that_is_not_finite_skips_its_step(run, tmp_path, monkeypatch):
    loss, calls = ktr.grpo_loss, []

    def sometimes(*a, **k):
        calls.append(1)
        one, metrics = loss(*a, **k)
        return one * (float("nan") if len(calls) == 2 else 1.0), metrics
    monkeypatch.setattr(ktr, "grpo_loss", sometimes)
    run(tmp_path, "--max_steps", 3)
    assert [norm == norm for norm, in logged(tmp_path, "grad_norm")] == [True, False, True]
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "final").values())


def test_too_many_unusable_records_stop_the_run(run, world, tmp_path):
    data = damaged(world, tmp_path, {row: b"no video" for row in range(3, 20)})
    with pytest.raises(SystemExit, match="could not be used"):
        run(tmp_path, "--epochs", 3, "--data", data, "--save_every", 0, "--max_new_tokens", 4)
    records = json.loads(data.read_text())
    for row in range(10):
        records[row]["problem_type"] = "essay"
    data.write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="10 of 48 records .* malformed.*essay"):
        run(tmp_path, "--data", data)


def test_a_long_prompt_is_skipped_and_counted(run, world, tmp_path):
    records = json.loads((world / "train.json").read_text())
    records[order_of()[1]]["problem"] = "What colour is the circle ? " * 30
    data = tmp_path / "long.json"
    data.write_text(json.dumps(records))
    run(tmp_path, "--max_steps", 3, "--max_prompt", 100, "--data", data, "--save_every", 0)
    assert logged(tmp_path, "skipped") == [(0,), (1,), (1,)]


@pytest.mark.parametrize("change, says", [
    (["--data", "none.json"], "none.json"),
    (["--videos", "nowhere"], "nowhere/train/"),
    (["--model", "no/such/model"], "model"),
    (["--signals", "vision"], "unknown signal 'vision'; known: visual, temporal"),
    (["--weighting", "none"], "unknown weighting 'none'; known: binary"),
    (["--leave_out", "none.json"], "none.json"),
])
def test_what_is_missing_is_one_clear_line(run, tmp_path, change, says):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", *change)
    message = str(stop.value)
    assert message.startswith("error: ") and says in message and "\n" not in message
    assert not (tmp_path / "out").exists()                      # nothing was begun


# ---------------------------------------------------------------------------------------- reporters
@pytest.mark.parametrize("name, module", [("wandb", "wandb"),
                                          ("tensorboard", "torch.utils.tensorboard")])
def test_reporters_must_be_installed(run, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"pip install {name}, or leave --report_to out"):
        run(tmp_path, "--report_to", name, "--max_steps", 1)


def test_a_reporter_gets_every_row_and_is_ended(run, tmp_path, monkeypatch):
    """What TensorBoard and Weights & Biases would be told, by stand-ins of the same names."""
    heard, board, wandb = [], ModuleType("torch.utils.tensorboard"), ModuleType("wandb")

    class SummaryWriter:
        def __init__(self, folder):
            heard.append(folder)

        def add_scalar(self, name, value, step):
            heard.append((name, value, step))

        def close(self):
            heard.append("closed")

    board.SummaryWriter = SummaryWriter
    wandb.init = lambda project, name, config: SimpleNamespace(
        log=heard.append, finish=lambda: heard.append((project, name, config["G"])))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path / "a", "--report_to", "wandb", "--max_steps", 2)
    rows = log_of(tmp_path / "a")
    assert heard == [*rows, ("video-ktr", "a", 4)]
    heard.clear()
    run(tmp_path / "b", "--report_to", "tensorboard", "--max_steps", 2)
    rows = log_of(tmp_path / "b")
    told = [(name, value, row["step"]) for row in rows for name, value in row.items()]
    assert heard == [tmp_path / "b", *told, "closed"]


# ------------------------------------------------------------------------------------------- books
def test_another_run_is_not_begun_in_a_used_folder(run, tmp_path):
    """--resume never; a checkpoint is enough to tell."""
    run(tmp_path, "--max_steps", 1)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(SystemExit, match="holds a run already"):
        run(tmp_path, "--max_steps", 1, "--resume", "never")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in ("999999", "1000000", "000250"):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-1000001.part").mkdir()
    assert [path.name[11:] for path in checkpoint.all_of(tmp_path)] == [
        "000250", "999999", "1000000"]


def test_the_kl_is_that_of_groups_that_bear_the_loss(run, tmp_path, monkeypatch):
    """Dropped groups used to count as 0."""
    def every_other(o, processor, group, record):
        some = (torch.arange(len(group.ids)) % 2).float()
        return (some if record["problem_id"] % 2 else some * 0), some * 0
    monkeypatch.setattr(ktr, "answer_rewards", every_other)
    seen, original = [], ktr.grpo_loss

    def loss(*given, **more):
        found = original(*given, **more)
        seen.append((bool(given[4].any()), found[1]["kl"].item()))
        return found
    monkeypatch.setattr(ktr, "grpo_loss", loss)
    run(tmp_path, "--max_steps", 3, "--prompts_per_step", 4, "--filter", "accuracy", "--lr", "1e-2")
    for i, row in enumerate(log_of(tmp_path)):
        bearing = [kl for bears, kl in seen[4 * i:4 * i + 4] if bears]
        assert 0 < len(bearing) < 4 or row["dropped"] in (0, 1)
        assert row["kl"] == pytest.approx(sum(bearing) / max(1, len(bearing)), rel=1e-4, abs=1e-9)
    log = log_of(tmp_path)
    assert log[-1]["kl"] > 0 and any(0 < row["dropped"] < 1 for row in log)


def test_tokens_that_bear_no_loss_do_not_divide_it(tiny, prompts):
    """--normalize tokens: those of the group with unequal accuracies, of completions not cut."""
    o = Options(G=2, normalize="tokens", filter="accuracy", mask_cut=True, prompts_per_step=2)
    mask, rollouts = torch.tensor([[True, True, True], [True, False, False]]), []
    for accuracy in ([1.0, 0.0], [1.0, 1.0]):
        group = Group(torch.zeros(2, 3), mask, ended=torch.tensor([True, False]))
        rollouts.append(Rollout(prompts[0], group, 0, torch.tensor(accuracy), torch.zeros(2),
                                torch.zeros(2)))
        ktr.add_rewards(o, rollouts[-1], mask)
    assert ktr.loss_divisor(o, rollouts, 1, torch.device("cpu")) == 3 / 2


def test_another_number_of_steps_is_told(run, tmp_path, capsys):
    run(tmp_path, "--max_steps", 1)
    capsys.readouterr()
    run(tmp_path, "--max_steps", 2)
    said = capsys.readouterr().out
    assert "the run now has 2 steps, not 1: the lr follows another cosine" in said
    weights = sum(x.numel() for x in load_file(tmp_path / "final/model.safetensors").values())
    assert f"; 1 steps on 1 processes; a checkpoint takes {14e-9 * weights:.3g} GB\n" in said
    run(tmp_path, "--max_steps", 2)
    assert "the run now has" not in capsys.readouterr().out


@pytest.mark.parametrize("more, why", [
    ([], "in every group all completions earned the same (reward 0.00); "),
    (["--mask_cut", "--max_new_tokens", "1"],
     "--filter or --mask_cut left every group out of the loss"),
    (["--signals", "mine"], "no token carried gradient: none of --signals mine applied")])
def test_steps_without_anything_to_learn_are_told(run, tmp_path, monkeypatch, capsys, more, why):
    """On the console and on the page."""
    monkeypatch.setattr(training, "IDLE", 3)
    COUNTERFACTUALS["mine"] = lambda r, o: r.prompt
    if more:
        monkeypatch.setattr(ktr, "answer_rewards", ranked)
    run(tmp_path, "--max_steps", 4, "--save_every", 0, *more)
    said = capsys.readouterr().out
    assert said.count(f"nothing was learnt in 3 steps: {why}") == 1
    rows = log_of(tmp_path) * 3                                     # twelve of them
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = "no token carried gradient" if more else "all groups were flat"
    assert any(f"in 12 of 12 steps {what}" in note for note in read_run(tmp_path)["notes"])


def test_a_rule_may_read_the_reference_also_of_the_watched_question(run, tmp_path):
    SCORES["far"] = lambda r, o: (r.old_logp if r.old_logp is not None else r.logp.detach()
                                  ) - r.ref_logp
    run(tmp_path, "--max_steps", 2, "--signals", "far", "--sample_every", 1, "--save_every", 0)
    watched = [row["watched"] for row in rows_of(tmp_path / "samples.jsonl")]
    assert watched == [False, True] * 2


def test_what_only_a_start_can_refuse_is_refused_before(run, tmp_path):
    """Another G on a resume, an --out that is a file: before "ready", in one line."""
    run(tmp_path / "a", "--max_steps", 1)
    with pytest.raises(SystemExit, match="cannot be continued .G: 4 there, 3 now."):
        run(tmp_path / "a", "--max_steps", 2, "--G", 3, "--check")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: --out .*file cannot be written"):
        run(tmp_path / "file", "--max_steps", 1, "--check")


def test_a_runs_folder_is_not_its_model(run, tmp_path):
    run(tmp_path / "a", "--max_steps", 1)
    with pytest.raises(SystemExit, match="no config.json in it; the run's model is .*a/final"):
        run(tmp_path / "b", "--model", tmp_path / "a")
