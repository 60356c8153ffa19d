import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, plain_inputs

import evaluate
from lab import toy
from engine.decoding import vision_tokens
from evaluate import benchmark_of, from_holmes, locate, main, parse, read_predictions, read_questions, report, summarise, wilson

SHARED = Path(os.environ.get("BENCHMARK_LISTS", ROOT.parent / "shared" / "data"))
QUICK = ["--max_new_tokens", "8", "--dtype", "float32", "--workers", "0", "--batch", "7"]


def arguments(checkpoint_folder, world, out, *more):
    return ["--model", str(checkpoint_folder), "--data", str(world / "test.json"), "--videos", str(world), "--out", str(out),
            "--benchmark", "toy", *QUICK, *map(str, more)]


def rows_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(checkpoint_folder, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    table = main(parse(arguments(checkpoint_folder, world, out)))
    return out, table


# ------------------------------------------------------------------------------------------- scores
def test_wilson_by_hand():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10)[0] == pytest.approx(0, abs=1e-9) and wilson(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-3)
    assert wilson(0.3, 0) == (0.0, 1.0)


def row(output=None, solution="B", kind="multiple choice", **more):
    base = {"solution": f"<answer>{solution}</answer>", "problem_type": kind, "options": ["A. x", "B. y"], "row": 0, "path": "p", **more}
    return base | ({"output": output} if output is not None else {"unreadable": "no file"})


def test_counts_of_a_small_table():
    rows = [row("<answer>B</answer>"), row("<answer>B.</answer>"), row("<answer>A</answer>"), row("who knows"), row(),
            row("<answer>B</answer>", solution="A")]
    s = summarise(rows)
    assert (s["n"], s["unparsed"], s["unreadable"]) == (5, 1, 1)
    assert s["strict"] == pytest.approx(1 / 5) and s["lenient"] == pytest.approx(2 / 5)
    assert s["always"] == ["B", pytest.approx(5 / 6)]


def test_an_unreadable_clip_is_no_wrong_answer():
    assert summarise([row("<answer>B</answer>"), row()])["strict"] == 1.0
    assert summarise([row()]) | {"always": 0} == {"n": 0, "strict": 0.0, "lenient": 0.0, "unparsed": 0, "unreadable": 1,
                                                  "interval": (0.0, 1.0), "always": 0}


def test_usual_splits(capsys):
    answers = ["<answer>B</answer>", "<answer>A</answer>"]
    table = report([row(answers[i % 2], duration=d, domain="Knowledge") for i, d in enumerate(["short", "short", "long"])], "videomme", 32)
    assert table["length: short"]["strict"] == 0.5 and table["length: long"]["n"] == 1 and table["domain: Knowledge"]["n"] == 3
    printed = capsys.readouterr().out
    assert "Video-KTR 60.3%" in printed and "the whole benchmark has 2700" in printed
    table = report([row(answers[0], **{"row": i}) for i in (0, 299, 300, 600, 899)], "videommmu", 16)
    assert [table[f"track: {name}"]["n"] for name in ("adaptation", "comprehension", "perception")] == [2, 1, 2]
    table = report([row(answers[0], path="./Evaluation/MMVU/videos/Chemistry/0.mp4"), row(answers[1], path="./E/MMVU/videos/Law/3.mp4")],
                   "mmvu", 16)
    assert table["discipline: Science"]["n"] == table["discipline: Humanities & Social Science"]["n"] == 1
    table = report([row(answers[0], **{"Question Type": "SR"}), row(answers[1], **{"Question Type": "TA"})], "video-holmes", 64)
    assert {"type: SR", "type: TA"} < set(table)
    table = report([row("<answer>9</answer>", solution="10", kind="regression", original_question_type="object_size")], "vsibench", None)
    assert table["type: object_size"]["strict"] == pytest.approx(0.8)


@pytest.mark.parametrize("name, benchmark", [
    ("eval_videomme.json", "videomme"), ("Video-Holmes/test_Video-Holmes.json", "video-holmes"), ("eval_mmvu.json", "mmvu"),
    ("eval_videommmu.json", "videommmu"), ("eval_vsibench.json", "vsibench"), ("eval_tempcompass.json", "tempcompass"),
    ("eval_mvbench.json", "mvbench"), ("toy_world/test.json", "custom"),
])
def test_benchmark_of(name, benchmark):
    assert benchmark_of(name) == benchmark


# -------------------------------------------------------------------------------------------- lists
@pytest.mark.parametrize("name, rows, clips", [("eval_mmvu.json", 625, 379), ("eval_videommmu.json", 900, 300), ("eval_videomme.json", 2700, 900)])
def test_real_lists_load_whole(name, rows, clips):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here; set BENCHMARK_LISTS to the folder that holds it")
    records = read_questions(str(SHARED / name))
    assert len(records) == rows and len({record["path"] for record in records}) == clips
    splits = evaluate.SPLITS[benchmark_of(name)]
    assert all(of(record) is not None for of in splits.values() for record in records)


HOLMES_ROW = {"video ID": "v1", "Question ID": 3, "Question Type": "MHR", "Question": "Why?", "Options": {"A": "x", "B": "y"},
              "Answer": "B", "Explanation": "..."}


def test_holmes_own_annotations(tmp_path):
    path = tmp_path / "test_Video-Holmes.json"
    path.write_text(json.dumps([HOLMES_ROW, {**HOLMES_ROW, "video ID": "v2"}]))
    first, second = read_questions(str(path))
    assert first["problem_id"] == "v1/3" and second["problem_id"] == "v2/3"         # keyed on video and question together
    assert first["whole_prompt"].endswith("The question is: Why?. The options are: A: x, B: y. Your answer:")
    assert first["solution"] == "<answer>B</answer>" and first["options"] == ["A. x", "B. y"]
    for folder in ("videos", "videos_cropped"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"v{1 + (folder != 'videos')}.mp4").write_bytes(b"")
    assert locate(first["path"], str(tmp_path)) == "videos/v1.mp4" and locate(second["path"], str(tmp_path)) == "videos_cropped/v2.mp4"


def test_locate_tries_the_prefixes_of_releases(tmp_path):
    (tmp_path / "videos" / "Art").mkdir(parents=True)
    (tmp_path / "videos" / "Art" / "1.mp4").write_bytes(b"")
    for path in ("./Evaluation/MMVU/videos/Art/1.mp4", "MMVU/videos/Art/1.mp4", "./videos/Art/1.mp4", "Art/1.mp4"):
        assert locate(path, str(tmp_path)) == "videos/Art/1.mp4"
    assert locate("./Evaluation/MMVU/videos/Art/2.mp4", str(tmp_path)) is None


def test_a_malformed_benchmark_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"problem": "x"}]))
    with pytest.raises(ValueError, match="row 0"):
        read_questions(str(path))


# --------------------------------------------------------------------------------------------- runs
def test_every_answer_is_kept_with_its_settings(whole, world):
    out, table = whole
    head, *rows = rows_of(out)
    assert head["settings"]["temperature"] == 0.0 and head["settings"]["limits"]["max_frames"] == 16
    assert sorted(r["row"] for r in rows) == list(range(24)) and all(isinstance(r["output"], str) for r in rows)
    assert table["all"]["n"] == 24 and sum(s["n"] for name, s in table.items() if name.startswith("kind")) == 24
    assert json.loads((out / "scores.json").read_text())["scores"]["all"]["n"] == 24


def test_answers_are_those_of_generate(whole, tiny, plain, world):
    _, *rows = rows_of(whole[0])
    model, processor = tiny
    for r in rows[:6]:
        record = {**r, "options": r["options"]}
        (frames, seconds) = evaluate.load_media(record, world, evaluate.Limits(max_pixels=256 * 784), processor.vision)
        prompt = processor.prompt(record, frames, seconds, template=evaluate.QUESTION_EVAL)
        out = plain.generate(**plain_inputs(prompt), max_new_tokens=8, do_sample=False, suppress_tokens=vision_tokens(plain.config))
        assert r["output"] == processor.tokenizer.decode(out[0, len(prompt.ids):], skip_special_tokens=True)


def test_a_finished_run_needs_no_model(whole, checkpoint_folder, world, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *a: pytest.fail("loaded a model"))
    assert main(parse(arguments(checkpoint_folder, world, whole[0]))) == whole[1]


def test_a_cut_file_is_continued_and_scored_whole(whole, checkpoint_folder, world, tmp_path):
    lines = (whole[0] / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:10]) + lines[10][:25])       # killed inside a line
    assert main(parse(arguments(checkpoint_folder, world, tmp_path))) == whole[1]
    same = sorted((whole[0] / "predictions.jsonl").read_text().splitlines())
    assert sorted((tmp_path / "predictions.jsonl").read_text().splitlines()) == same


@pytest.mark.parametrize("change", [["--frames", "32"], ["--max_new_tokens", "9"], ["--temperature", "0.5"], ["--max_pixels", "50000"]])
def test_other_settings_do_not_mix(whole, checkpoint_folder, world, change):
    with pytest.raises(SystemExit, match="other settings"):
        main(parse(arguments(checkpoint_folder, world, whole[0], *change)))


def test_other_weights_do_not_mix(whole, checkpoint_folder, world, tmp_path):
    import shutil
    other = tmp_path / "other"
    shutil.copytree(checkpoint_folder, other)
    before = evaluate.fingerprint(str(other))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert evaluate.fingerprint(str(other)) != before


def test_kill_and_resume_with_other_processes(whole, checkpoint_folder, world, tmp_path):
    """SIGKILL, then two processes: every question answered once, the table that of an undisturbed run."""
    command = [sys.executable, "evaluate.py", *arguments(checkpoint_folder, world, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    path, deadline = tmp_path / "predictions.jsonl", time.time() + 90
    while not (path.exists() and len(path.read_text().splitlines()) > 1) and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    answered = len(path.read_text().splitlines())
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command[1:]], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)[1:]
    assert answered < 25 and sorted(r["row"] for r in rows) == list(range(24))
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["all"]["n"] == 24
    first = {r["row"]: r["output"] for r in rows_of(whole[0])[1:]}
    assert sum(first[r["row"]] != r["output"] for r in rows) <= 1            # batches differ, so a near tie may fall otherwise


def test_unreadable_and_missing_clips(checkpoint_folder, world, tmp_path):
    rows = json.loads((world / "test.json").read_text())[:6]
    rows[1]["path"] = "./test/none.y4m"
    (world / "test" / "bad.y4m").write_bytes(b"no video")
    rows[2] |= {"path": "./test/bad.y4m", "data_type": "video"}
    data = tmp_path / "some.json"
    data.write_text(json.dumps(rows))
    command = [*arguments(checkpoint_folder, world, tmp_path / "out"), "--data", str(data)]
    with pytest.raises(SystemExit, match="1 of 6 clips are not under .*none.y4m"):
        main(parse(command))
    assert not (tmp_path / "out").exists()                                   # said before anything is made or loaded
    table = main(parse([*command, "--allow_missing"]))
    assert (table["all"]["n"], table["all"]["unreadable"]) == (4, 2)
    frames = toy.render(toy.new_scene(__import__("random").Random(0), "video"))
    toy.write_y4m(world / "test" / "bad.y4m", frames)                        # repaired: a rerun answers it
    table = main(parse([*command, "--allow_missing"]))
    assert (table["all"]["n"], table["all"]["unreadable"]) == (5, 1)


def test_questions_about_a_clip_share_its_decoding(checkpoint_folder, world, tmp_path, monkeypatch):
    rows = json.loads((world / "test.json").read_text())
    data = tmp_path / "shared.json"
    data.write_text(json.dumps([rows[0], rows[1], {**rows[0], "problem": "Which shape comes first?"}]))
    calls, original = [], evaluate.load_media
    monkeypatch.setattr(evaluate, "load_media", lambda *a: calls.append(1) or original(*a))
    main(parse([*arguments(checkpoint_folder, world, tmp_path / "out"), "--data", str(data)]))
    assert len(calls) == 2 and len(rows_of(tmp_path / "out")) == 4


def test_one_question_from_the_shell(checkpoint_folder, world, capsys):
    main(parse(["--model", str(checkpoint_folder), "--video", str(world / "test" / "00001.y4m"), "--question", "What happens?", *QUICK]))
    assert capsys.readouterr().out.strip()


# ------------------------------------------------------------------------------------------- rescore
OTHERS = [{"output": "<answer>B</answer>", "solution": "<answer>B</answer>", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
           "prediction": "B", "reward": 1.0}, {"output": "B.", "solution": "<answer>B</answer>"}]


@pytest.mark.parametrize("text", [json.dumps(OTHERS), json.dumps({"results": OTHERS, "final_acc": []}),
                                  "\n".join(json.dumps(item) for item in OTHERS)])
def test_other_peoples_predictions(tmp_path, text, capsys):
    path = tmp_path / "eval_mmvu_theirs.json"
    path.write_text(text)
    table = main(parse(["--rescore", str(path), "--benchmark", "custom"]))
    assert (table["all"]["n"], table["all"]["strict"], table["all"]["lenient"]) == (2, 0.5, 1.0)


def test_rescoring_our_own_gives_the_same_table(whole):
    assert main(parse(["--rescore", str(whole[0] / "predictions.jsonl"), "--benchmark", "toy"])) == whole[1]


def test_predictions_without_output_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"solution": "<answer>B</answer>"}]))
    with pytest.raises(ValueError, match="row 0"):
        read_predictions(str(path))


def test_from_holmes_keeps_the_original_fields():
    assert from_holmes(HOLMES_ROW)["Question Type"] == "MHR"
