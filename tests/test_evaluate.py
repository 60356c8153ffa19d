"""Evaluation: lists, protocols, published figures, comparisons; runs that are cut and resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, plain_inputs
from PIL import Image

import evaluate
from data import read_json
from engine.decoding import vision_tokens
from evaluate import main, parse, read_questions, with_prompt
from lab import toy
from lab.grading import grade, lenient_choice
from lab.holmes import converted
from lab.predictions import read_predictions
from lab.protocols import BENCHMARKS, FACTS, PROTOCOLS
from lab.scores import compare, paired, part_of, published_figures, report, summarise, wilson
from prompt import QUESTION_EVAL, BadRecord, by_letter, question_text

SHARED = Path(os.environ.get("BENCHMARK_LISTS", ROOT.parent / "shared" / "data"))
PAPER = SHARED.parent / "facts"
NEEDED = ["--model", "cold_start", "--benchmark", "mmvu", "--data", "d"]
QUICK = ["--max_new_tokens", "8", "--dtype", "float32", "--workers", "0", "--batch", "7",
         "--text_after", "frame"]               # positions as generate makes them


def arguments(checkpoint_folder, world, out, *more):
    return ["--model", str(checkpoint_folder), "--data", str(world / "test.json"),
            "--videos", str(world), "--out", str(out), "--benchmark", "toy", *QUICK,
            *map(str, more)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(out):
    return lines_of(out / "predictions.jsonl")


@pytest.fixture(scope="module")
def whole(checkpoint_folder, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    table = main(parse(arguments(checkpoint_folder, world, out)))
    return out, table


# ------------------------------------------------------------------------------------------- scores
def test_wilsons_interval_by_hand():
    # 8 of 10, z^2 = 3.8416: centre 0.99208, spread 1.96 sqrt(0.025604) = 0.31363, over 1.38416
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # all of n right: from 1 / (1 + z^2 / n)
    assert wilson(1.0, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)
    assert wilson(0.5, 0) == (0.0, 1.0)
    for n in range(1, 200):
        (nothing, little), (much, everything) = wilson(0.0, n), wilson(1.0, n)
        assert 0 <= nothing < 1e-9 < little and much < 1 - 1e-9 < everything <= 1


def test_a_clustered_interval_by_hand():
    # one question a clip, scores 1 1 0 0: mean 1/2, sd 0.57735, 1.96 * sd / 2 = 0.56580
    assert paired(list(zip([1, 1, 0, 0], "pqrs"))) == pytest.approx((0.5, 0.56580), abs=1e-5)
    # a hundred: close to 1.96 sqrt(p (1 - p) / n) = 0.0980
    hundred = [(i % 2, str(i)) for i in range(100)]
    assert paired(hundred) == pytest.approx((0.5, 0.0985), abs=1e-4)


def test_questions_about_a_clip_count_together():
    # scores 1 1 (clip p), 0 (q), -1 (r): mean 1/4; sums of score - 1/4: 1.5, -0.25, -1.25;
    # squares 3.875, times 3/2 = 5.8125, root 2.410913, over 4 = 0.602728, times 1.96 = 1.181347
    assert paired(list(zip([1, 1, 0, -1], "ppqr"))) == pytest.approx((0.25, 1.181347), abs=1e-6)


def row(output=None, solution="B", kind="multiple choice", **more):
    base = {"solution": f"<answer>{solution}</answer>", "problem_type": kind,
            "options": ["A. x", "B. y"], "row": 0, "path": "p"}
    row = base | more
    if output is None:
        return row | {"unreadable": "no file"}
    graded = grade(output, row["solution"], row["problem_type"], row["options"])
    return row | {"output": output, "grade": graded}


RIGHT, WRONG = "<answer>B</answer>", "<answer>A</answer>"


def test_counts_of_a_small_table():
    rows = [row(RIGHT), row("<answer>B.</answer>"), row(WRONG), row("who knows"), row(),
            row(RIGHT, solution="A")]
    s = summarise(rows)
    assert (s["n"], s["unparsed"], s["unreadable"]) == (5, 1, 1)
    assert s["strict"] == pytest.approx(1 / 5) and s["lenient"] == pytest.approx(2 / 5)
    assert s["always"] == ("B", pytest.approx(5 / 6))
    assert summarise([row("9", "9", "numerical")])["always"] == ("no letter", 0)


def test_an_unreadable_clip_is_no_wrong_answer():
    assert summarise([row(RIGHT), row()])["strict"] == 1.0
    alone = summarise([row()])
    assert (alone["n"], alone["unreadable"], alone["interval"]) == (0, 1, (0.0, 1.0))


def test_scores_are_printed_with_their_interval_and_none_where_nothing_was_read(capsys):
    right = [row(RIGHT, row=i, path="p", domain="A") for i in range(10)]
    report(settings_of("video-ktr", "videomme"), [*right, row(domain="B"), row(domain="B")])
    of_all, of_a, of_b = [" ".join(line.split())
                          for line in capsys.readouterr().out.splitlines()[:3]]
    scored = "10 answers: strict 100.0% ( 72.2% to 100.0%), lenient 100.0%, 0 unparsed;"
    assert of_all == f"all {scored} 2 unreadable" and of_a == f"domain: A {scored} 0 unreadable"
    assert of_b == "domain: B 0 answers; 2 unreadable"


def test_usual_splits():
    rows = [row([RIGHT, WRONG][i % 2], duration=length, domain="Knowledge")
            for i, length in enumerate(["short", "short", "long"])]
    table = report(settings_of("video-ktr", "videomme"), [*rows, row(RIGHT)])
    assert list(table) == ["all", "domain: Knowledge", "length: long", "length: short"]
    assert table["length: short"]["strict"] == 0.5 and table["all"]["n"] == 4
    assert table["length: long"]["n"] == 1 and table["domain: Knowledge"]["n"] == 3
    for field in ("Question Type", "original_question_type"):
        assert "type: SR" in report(settings_of("video-ktr", "video-holmes"),
                                    [row(RIGHT, **{field: "SR"})])
    chemistry = row(RIGHT, path="./E/MMVU/videos/Chemistry/0.mp4")
    law, elsewhere = row(RIGHT, path="Law/3.mp4"), row(RIGHT, path="elsewhere/3.mp4")
    table = report(settings_of("video-ktr", "mmvu"), [chemistry, law, elsewhere])
    assert list(table)[1:] == ["discipline: Humanities & Social Science", "discipline: Science"]
    [track] = BENCHMARKS["videommmu"]["splits"].values()
    parts = [part_of({"row": i, "path": "p"}, track) for i in (0, 299, 300, 600, 899, 900)]
    assert parts == ["adaptation"] * 2 + ["comprehension", "perception", "perception", None]
    sizes = [row("<answer>9</answer>", "10", "regression", original_question_type="object_size")]
    table = report(settings_of("video-ktr", "vsibench"), sizes)
    assert table["type: object_size"]["strict"] == pytest.approx(0.8)


def test_vsi_benchs_score_is_the_mean_of_two_types(capsys):
    """Three choices (2 right) and one number (error 0.1: 0.8): (2/3 + 0.8) / 2, not 2.8 / 4."""
    rows = [row(RIGHT), row(RIGHT), row(WRONG), row("<answer>9</answer>", "10", "regression")]
    table = report(settings_of("video-ktr", "vsibench"), rows)
    assert table["all"]["mean of types"] == pytest.approx([(2 / 3 + 0.8) / 2] * 2)
    assert table["all"]["strict"] == pytest.approx(0.7)
    assert "mean of the 2 types' means: strict 73.3%, lenient 73.3%" in capsys.readouterr().out
    unread = row(kind="regression")
    for benchmark, some in (("vsibench", rows[:3]), ("vsibench", [*rows[:3], unread]),
                            ("custom", rows)):
        assert "mean of types" not in report(settings_of("video-ktr", benchmark), some)["all"]
        assert "types' means" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- published
def settings_of(protocol, benchmark, **more):
    return {"protocol": protocol, "benchmark": benchmark, **PROTOCOLS[protocol]["options"], **more}


def test_figures_are_for_this_benchmark_protocol_and_frames_only(capsys):
    ours = settings_of("video-ktr", "videomme", frames=32)
    assert published_figures(ours) == {
        "cold start (Qwen2.5-VL-SFT 7B)": 55.4, "Video-KTR 7B": 60.3}
    for changed in [
            {"benchmark": "mmvu"}, {"protocol": "direct"}, {"protocol": "video-r1"},
            {"frames": 48}, {"max_pixels": 50000}, {"seconds": "true"},
            {"benchmark": "mvbench"}]:                                  # not in the table
        report(ours | changed, [row(RIGHT)])
        printed = capsys.readouterr().out
        figures = set(re.findall(r"\d\d\.\d", printed.split("published figures:")[1]))
        wanted = {"63.5", "65.9"} if changed == {"benchmark": "mmvu"} else set()
        assert figures == wanted, changed
        assert ("none for these settings" in printed) == (not wanted)


def test_the_protocol_is_printed_with_every_result(capsys):
    report(settings_of("direct", "mmvu", frames=64), [row(RIGHT)])
    printed = capsys.readouterr().out
    assert "protocol direct" in printed and "frames 64, fps 2.0" in printed
    assert "max_new_tokens 16, temperature 0.0, top_p 1.0, seconds true" in printed
    assert "1 questions; the whole benchmark has 625" in printed


def test_figures_and_sizes_are_those_of_the_paper():
    if not PAPER.exists():
        pytest.skip(f"{PAPER} is not here")
    paper = json.loads((PAPER / "paper_results.json").read_text())
    sizes = {name: b["size"] for name, b in BENCHMARKS.items() if b["size"]}
    assert sizes == paper["benchmark_sizes"]
    main_table, columns = paper["main"], paper["main"]["columns"]
    for frames, figures in PROTOCOLS["video-ktr"]["published"].items():
        for model in ("cold start (Qwen2.5-VL-SFT 7B)", "Video-KTR 7B"):
            ours = [figures[benchmark][model] for benchmark in columns]
            assert ours == main_table[model][frames], (model, frames)
    assert PROTOCOLS["video-ktr"]["published"].keys() == {"16", "32", "64"}
    prompts = json.loads((PAPER / "prompts.json").read_text())
    assert FACTS["prompts"]["video-holmes"]["text"] == prompts["video_holmes"]
    assert QUESTION_EVAL == prompts["question_eval"]


# -------------------------------------------------------------------------------------------- lists
@pytest.mark.parametrize("name, rows, clips", [
    ("mmvu", 625, 379), ("videommmu", 900, 300), ("videomme", 2700, 900)])
def test_real_lists_load_whole(name, rows, clips):
    path = SHARED / f"eval_{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not here; BENCHMARK_LISTS names the folder that holds it")
    records = read_questions(path, "video-ktr", name)
    assert len(records) == rows and len({record["path"] for record in records}) == clips
    assert BENCHMARKS[name]["splits"]
    for split in BENCHMARKS[name]["splits"].values():
        assert all(part_of(record, split) for record in records)
    for record in read_questions(path, "direct", name):
        text = question_text(record)
        end = "directly." if record["options"] else "word or phrase."
        assert text.endswith(end) and "<think>" not in text


@pytest.mark.parametrize("name", ["mmvu", "videommmu", "videomme"])
def test_every_option_of_the_real_lists_reads_as_itself(name):
    """By its text or with its letter, in tags, with a final point. A text that two options have, or
    that is a letter (a letter is what is asked for), says no more than that."""
    path = SHARED / f"eval_{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not here; BENCHMARK_LISTS names the folder that holds it")
    for record in read_json(path):
        texts = by_letter(record["options"] or [])
        for (letter, text), option in zip(texts.items(), record["options"] or []):
            said = [option, f"<answer>{option}</answer>", f"{option}."]
            if list(texts.values()).count(text) == 1 and not re.fullmatch(r"[A-Z]?\W*", text):
                said += [text, f"<think>?</think><answer>{text.rstrip('.')}.</answer>"]
            assert {lenient_choice(x, record["options"]) for x in said} == {letter}, said


HOLMES_ROW = {"video ID": "v1", "Question ID": 3, "Question Type": "MHR", "Question": "Why?",
              "Options": {"A": "x", "B": "y"}, "Answer": "B", "Explanation": "..."}


def test_holmes_own_annotations(tmp_path):
    given, path = tmp_path / "test_Video-Holmes.json", tmp_path / "list.json"
    given.write_text(json.dumps([HOLMES_ROW, {**HOLMES_ROW, "video ID": "v2"}]))
    command = [sys.executable, "-m", "lab.holmes", str(given), str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    first, second = read_questions(path, "video-r1", "video-holmes")
    assert (first["problem_id"], second["problem_id"]) == ("v1/3", "v2/3")
    assert first["solution"] == RIGHT and first["options"] == ["A. x", "B. y"]
    assert (first["path"], first["Question Type"]) == ("v1.mp4", "MHR")


def test_the_words_of_each_protocol():
    record = converted(HOLMES_ROW)
    own = question_text(with_prompt(record, "video-ktr", "video-holmes"))
    assert own.startswith("Based on the given video, reason and answer the single-choice question.")
    assert own.endswith("The question is: Why?. The options are: A: x, B: y. Your answer:")
    listed = {key: record[key] for key in ("problem", "problem_type", "options")}
    assert question_text(with_prompt(listed, "video-ktr", "video-holmes")) == own
    usual = question_text(listed, QUESTION_EVAL)
    for protocol, benchmark in [("video-r1", "video-holmes"), ("video-ktr", "mmvu")]:
        assert question_text(with_prompt(listed, protocol, benchmark), QUESTION_EVAL) == usual
    assert question_text(with_prompt(record, "video-r1", "video-holmes"), QUESTION_EVAL) == usual
    untidy = {"problem": "Why {x}?\nOptions:", "problem_type": "multiple choice",
              "options": ["A) one {y}", "two", "(C) three", "E. four"]}
    assert question_text(with_prompt(untidy, "direct", "mmvu")) == (
        "Why {x}?\nA. A) one {y}\nB. two\nC. (C) three\nD. E. four\n"
        "Answer with the option's letter from the given choices directly.")
    number = {"problem": "How many?", "problem_type": "numerical", "options": []}
    assert question_text(with_prompt(number, "direct", "mmvu")) == (
        "How many?\nAnswer the question using a single word or phrase.")


def test_a_malformed_benchmark_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"problem": "x"}]))
    with pytest.raises(ValueError, match="row 0"):
        read_questions(path, "video-ktr", "custom")


# ------------------------------------------------------------------------------------------ options
def test_a_protocol_sets_defaults_and_an_option_wins():
    usual = parse(NEEDED)
    assert (usual.protocol, usual.frames, usual.temperature) == ("video-ktr", 16, 0.0)
    assert (usual.max_new_tokens, usual.max_pixels, usual.seconds) == (1024, 256 * 28 * 28, "one")
    assert usual.text_after == "clip"
    authors = parse([*NEEDED, "--protocol", "video-r1", "--frames", "32"])
    assert (authors.temperature, authors.top_p, authors.frames) == (0.1, 0.001, 32)
    direct = parse([*NEEDED, "--direct", "--seconds", "one"])
    assert (direct.protocol, direct.max_new_tokens, direct.seconds) == ("direct", 16, "one")
    assert direct == parse([*NEEDED, "--protocol", "direct",
                            "--seconds", "one"])


@pytest.mark.parametrize("more, message", [
    (["--rescore", "f", "--frames", "32"], "the file of predictions holds it"),
    (["--frames", "0"], "at least --frames 2"),
    (["--max_new_tokens", "0"], "--max_new_tokens, --batch 1"),
    (["--seconds", "two"], "invalid choice"), (["--protocol", "mine"], "invalid choice"),
    (["--frame", "8"], "unrecognized"), (["--fps", "0"], "--fps must be above 0"),
    (["--temperature", "-1"], "temperature 0 or more"), (["--top_p", "0"], "top_p above 0"),
    (["--data", ""], "error: --data is needed"), (["--video", "v"], "error: --question is needed"),
])
def test_options_that_cannot_be_meant(more, message, capsys):
    with pytest.raises(SystemExit):
        parse([*NEEDED, *more])
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- runs
def test_every_answer_is_kept_with_its_settings(whole, world):
    out, table = whole
    head, *rows = rows_of(out)
    assert head["settings"]["temperature"] == 0.0 and head["settings"]["frames"] == 16
    assert head["settings"]["protocol"] == "video-ktr" and head["settings"]["benchmark"] == "toy"
    assert sorted(r["row"] for r in rows) == list(range(24))
    assert all(isinstance(r["output"], str) for r in rows)
    kinds = [s["n"] for name, s in table.items() if name.startswith("kind")]
    assert table["all"]["n"] == sum(kinds) == 24
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"]["all"]["n"] == 24 and scores["settings"] == head["settings"]


def test_answers_are_those_of_generate(whole, tiny, plain, world):
    _, *rows = rows_of(whole[0])
    processor = tiny[1]
    limits = evaluate.Limits(16, 2.0, 256 * 28 * 28)
    quiet = dict(max_new_tokens=8, do_sample=False, suppress_tokens=vision_tokens(plain.config))
    for r in rows[:6]:
        frames, seconds = evaluate.load_media(r, world, limits, processor.vision)
        prompt = processor.prompt(r, frames, seconds, text_after="frame")
        out = plain.generate(**plain_inputs(prompt), **quiet)[0, len(prompt.ids):]
        assert r["output"] == processor.tokenizer.decode(out, skip_special_tokens=True)


def test_a_finished_run_needs_no_model(whole, checkpoint_folder, world, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *a: pytest.fail("loaded a model"))
    assert main(parse(arguments(checkpoint_folder, world, whole[0]))) == whole[1]


def test_a_cut_file_is_continued_and_scored_whole(whole, checkpoint_folder, world, tmp_path):
    lines = (whole[0] / "predictions.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(lines[:10]) + lines[10][:25])                # killed inside a line
    assert main(parse(arguments(checkpoint_folder, world, tmp_path))) == whole[1]
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("change", [
    ["--frames", "32"], ["--max_new_tokens", "9"], ["--protocol", "video-r1"], ["--direct"],
    ["--max_pixels", "50000"], ["--seconds", "true"], ["--dtype", "bfloat16"]])
def test_other_settings_do_not_mix(whole, checkpoint_folder, world, change):
    before = (whole[0] / "predictions.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="other settings"):
        main(parse(arguments(checkpoint_folder, world, whole[0], *change)))
    assert (whole[0] / "predictions.jsonl").read_bytes() == before


def test_other_weights_do_not_mix(whole, checkpoint_folder, world):
    file, before = checkpoint_folder / "model.safetensors", (whole[0] / "predictions.jsonl")
    written, answers = file.stat(), before.read_bytes()
    os.utime(file, (1, 1))
    with pytest.raises(SystemExit, match="other settings .weights_written"):
        main(parse(arguments(checkpoint_folder, world, whole[0])))
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert before.read_bytes() == answers


LATE = """
import time, sys, torch.distributed as dist
import evaluate
from run.distributed import exit_process

def then_wait(function):
    def late(*a, **k):
        function(*a, **k)
        time.sleep(dist.get_rank())
    return late

dist.barrier = then_wait(dist.barrier)
dist.broadcast_object_list = then_wait(dist.broadcast_object_list)
evaluate.main(evaluate.parse(sys.argv[1:]))
exit_process()
"""


def test_kill_and_resume_with_other_processes(whole, checkpoint_folder, world, tmp_path):
    """SIGKILL, then two processes, one of them late: every question is answered once.

    The late one used to read the file of finished rows after the other had added to it, so that
    the two divided different lists, and questions fell between them.
    """
    command = [sys.executable, "evaluate.py", *arguments(checkpoint_folder, world, tmp_path)]
    quiet = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True, **quiet)
    path, deadline = tmp_path / "predictions.jsonl", time.time() + 90
    while time.time() < deadline:
        if path.exists() and len(path.read_text().splitlines()) > 1:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    answered = len(path.read_text().splitlines()) - 1
    (tmp_path / "late.py").write_text(LATE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2", str(tmp_path / "late.py"), *command[2:]]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=150, **quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)[1:]
    assert answered < 24 and sorted(r["row"] for r in rows) == list(range(24))
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["all"]["n"] == 24
    first = {r["row"]: r["output"] for r in rows_of(whole[0])[1:]}
    changed = sum(first[r["row"]] != r["output"] for r in rows)
    assert changed <= 1                     # batches differ, so a near tie may fall otherwise


def test_unreadable_and_missing_clips(checkpoint_folder, world, tmp_path):
    rows = json.loads((world / "test.json").read_text())[:6]
    rows[1]["path"] = "./test/none.y4m"
    (world / "test" / "bad.y4m").write_bytes(b"no video")
    rows[2] |= {"path": "./test/bad.y4m", "data_type": "video"}
    data = tmp_path / "some.json"
    data.write_text(json.dumps(rows))
    command = [*arguments(checkpoint_folder, world, tmp_path / "out"), "--data", str(data)]
    with pytest.raises(SystemExit, match="holds none of the clips"):
        main(parse([*command, "--videos", str(tmp_path)]))
    assert not (tmp_path / "out").exists()                  # said before anything is made or loaded
    table = main(parse(command))
    assert (table["all"]["n"], table["all"]["unreadable"]) == (4, 2)
    frames = toy.render(toy.new_scene(random.Random(0), "video"))
    toy.write_y4m(world / "test" / "bad.y4m", frames)       # repaired: a rerun answers it
    table = main(parse(command))
    assert (table["all"]["n"], table["all"]["unreadable"]) == (5, 1)


def test_a_clip_that_kills_its_decoder_costs_its_questions_only(tiny, world):
    first, second = read_questions(world / "test.json", "video-ktr", "toy")[:2]
    second["path"] = first["path"]
    clips = evaluate.Clips([[first, second]], world, tiny[1])
    one, other = clips[0]
    assert one.frames is other.frames                               # decoded once, encoded once
    lost = clips.lost(0, "its process died")
    assert [skipped.record for skipped in lost] == [first, second]
    assert "(row 0)" in lost[0].reason and first["path"] in lost[0].reason
    assert "its process died" in lost[1].reason


def test_seconds_between_temporal_patches_are_the_protocols(
        checkpoint_folder, world, tmp_path, monkeypatch):
    records = json.loads((world / "test.json").read_text())
    clip = next(record for record in records if record["data_type"] == "video")
    clip["path"] = "slow.y4m"
    frames = toy.render(toy.new_scene(random.Random(0), "video"))
    toy.write_y4m(tmp_path / "slow.y4m", frames, fps=1)     # two frames, so 2 s, to a patch
    data, seconds, original = tmp_path / "list.json", [], evaluate.sample
    data.write_text(json.dumps([clip]))
    monkeypatch.setattr(evaluate, "sample", lambda model, prompts, *a, **k: (
        seconds.append(prompts[0].seconds), original(model, prompts, *a, **k))[1])
    for i, more in enumerate((["--direct"], ["--direct", "--seconds", "one"], [])):
        command = arguments(checkpoint_folder, tmp_path, tmp_path / str(i), *more)
        main(parse([*command, "--data", str(data)]))
    assert seconds == [2.0, 1.0, 1.0]


def test_questions_about_a_clip_share_its_decoding(checkpoint_folder, world, tmp_path, monkeypatch):
    rows = json.loads((world / "test.json").read_text())
    data = tmp_path / "shared.json"
    data.write_text(json.dumps([*rows[:2], {**rows[0], "problem": "Which shape comes first?"}]))
    calls, original = [], evaluate.load_media
    monkeypatch.setattr(evaluate, "load_media", lambda *a: calls.append(1) or original(*a))
    command = arguments(checkpoint_folder, world, tmp_path / "out")
    main(parse([*command, "--data", str(data)]))
    assert len(calls) == 2 and len(rows_of(tmp_path / "out")) == 4


@pytest.mark.parametrize("more", [[], ["--direct"]])
def test_one_question_from_the_shell(checkpoint_folder, world, capsys, more):
    records = read_questions(world / "test.json", "video-ktr", "toy")
    kinds = {record["data_type"]: record["path"] for record in records}
    assert set(kinds) == {"video", "image"}
    for path in kinds.values():
        main(parse(["--model", str(checkpoint_folder), "--video", str(world / path),
                    "--question", "What happens?", *QUICK, *more]))
        assert capsys.readouterr().out.strip()
    with pytest.raises(SystemExit, match="none.y4m: no such file"):
        main(parse(["--model", str(checkpoint_folder), "--video", str(world / "none.y4m"),
                    "--question", "What happens?", *QUICK, *more]))


@pytest.mark.parametrize("name", ["a.bmp", "a.tiff", "a.gif", "a.jfif", "a.mp4", "moves.gif"])
def test_a_picture_is_known_by_its_content(tmp_path, monkeypatch, name):
    pictures, kinds = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")], []
    formats = {"a.tiff": "TIFF", "a.gif": "GIF", "a.jfif": "JPEG", "moves.gif": "GIF"}
    moves = {"save_all": True, "append_images": pictures[1:]} if name == "moves.gif" else {}
    pictures[0].save(tmp_path / name, formats.get(name, "BMP"), **moves)
    monkeypatch.setattr(evaluate, "answers", lambda records, *a, **k: (
        kinds.append(records[0]["data_type"]), [[{"output": "red"}]])[1])
    evaluate.one_question(parse(["--model", "m", "--videos", str(tmp_path), "--video", name,
                                 "--question", "What happens?"]))
    assert kinds == ["video" if moves else "image"]


# ------------------------------------------------------------------------------------------ rescore
OTHERS = [{"output": RIGHT, "solution": RIGHT, "problem_type": "multiple choice",
           "options": ["A. x", "B. y"], "prediction": "B", "reward": 1.0},
          {"output": "B.", "solution": RIGHT, "options": None}]


@pytest.mark.parametrize("text", [
    json.dumps(OTHERS), "\ufeff" + json.dumps(OTHERS),
    "\n".join(json.dumps(item) for item in OTHERS),
    json.dumps({"results": OTHERS, "final_acc": [{"mean_acc": 0.5}]}, indent=2),
    json.dumps({"final_acc": [{"mean_acc": 0.5}], "results": OTHERS})])
def test_other_peoples_predictions(tmp_path, text, capsys):
    path = tmp_path / "eval_mmvu_theirs.json"
    path.write_text(text, "utf-8")
    table = main(parse(["--rescore", str(path), "--benchmark", "mmvu"]))
    assert (table["all"]["n"], table["all"]["strict"], table["all"]["lenient"]) == (2, 0.5, 1.0)
    printed = capsys.readouterr().out                   # a stranger's file gets no figure
    assert "published figures: none" in printed and "61.3" not in printed
    assert "always answering B: 100.0%" in printed and "whole benchmark has 625" in printed
    assert main(parse(["--rescore", str(path)])) == table           # of no named benchmark
    assert "no fixed number" in capsys.readouterr().out


def test_our_answers_without_settings_are_others(whole, tmp_path, capsys):
    path, bare = whole[0] / "predictions.jsonl", tmp_path / "bare.jsonl"
    bare.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert main(parse(["--rescore", str(bare), "--benchmark", "toy"])) == whole[1]
    assert "protocol" not in capsys.readouterr().out
    result = compare(str(path), str(bare))
    assert result["n"] == 24 and result["strict"]["difference"] == 0
    assert "they differ in protocol: A video-ktr, B None" in capsys.readouterr().out


def test_rescoring_takes_what_the_file_says(whole, capsys):
    assert main(parse(["--rescore", str(whole[0] / "predictions.jsonl")])) == whole[1]
    assert "protocol video-ktr" in capsys.readouterr().out


def test_rescoring_says_the_files_frames(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    head = {"settings": settings_of("video-ktr", "mmvu", frames=64)}
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, row(RIGHT)]))
    main(parse(["--rescore", str(path)]))
    printed = capsys.readouterr().out
    assert "frames 64" in printed and "61.3" not in printed
    assert "61.6" in printed and "66.6" in printed
    with pytest.raises(SystemExit, match="--benchmark cannot be given: .*predictions.jsonl holds"):
        main(parse(["--rescore", str(path), "--benchmark", "videomme"]))


@pytest.mark.parametrize("missing", ["benchmark", "protocol", "frames", "seconds"])
def test_rescoring_an_older_commits_answers(tmp_path, missing, capsys):
    """Whose settings lack what was added later: no figure, unless the benchmark is told."""
    path, settings = tmp_path / "old.jsonl", settings_of("video-ktr", "mmvu", frames=64)
    del settings[missing]
    path.write_text(json.dumps({"settings": settings}) + "\n" + json.dumps(row(RIGHT)))
    assert main(parse(["--rescore", str(path)]))["all"]["n"] == 1
    assert "published figures: none" in capsys.readouterr().out
    if missing == "benchmark":
        main(parse(["--rescore", str(path), "--benchmark", "mmvu"]))
        printed = capsys.readouterr().out
        assert "61.6" in printed and "whole benchmark has 625" in printed


@pytest.mark.parametrize("bad", [
    {"solution": RIGHT}, {"output": RIGHT}, "text", 3, {"output": 3, "solution": RIGHT},
    {"output": RIGHT, "solution": RIGHT, "problem_type": "riddle"},
    {"output": RIGHT, "solution": RIGHT, "problem_type": ["OCR"]},
    {"output": RIGHT, "solution": RIGHT, "options": [1, 2]},
    {"output": RIGHT, "solution": RIGHT, "options": 2},
    {"output": RIGHT, "solution": RIGHT, "row": "last"}])
def test_what_is_no_prediction_is_refused(tmp_path, bad):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*OTHERS, bad]))
    with pytest.raises(BadRecord, match="a.json: row 2 is no prediction"):
        read_predictions(path)


@pytest.mark.parametrize("text", ["", "[]", '{"results": []}'])
def test_a_file_without_predictions_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadRecord, match="a.json: holds no predictions"):
        read_predictions(path)


# ------------------------------------------------------------------------------------------ compare
def two_files(folder, a, b, clips, changed=()):
    """Files of answers "A"/"B" (right: B), None for unreadable, to questions about these clips."""
    paths = []
    for name, letters in (("a", a), ("b", b)):
        rows = [row(letter and f"<answer>{letter}</answer>", row=i, path=clip, problem=f"q{i}")
                for i, (letter, clip) in enumerate(zip(letters, clips))]
        settings = settings_of("video-ktr", "mmvu")
        if name == "b":
            settings |= dict(changed)
        lines = [{"settings": settings}, *rows]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(path) for path in paths]


def test_a_paired_interval_by_hand(tmp_path):
    # d = 1 1 0 0, as in test_a_clustered_interval_by_hand
    result = compare(*two_files(tmp_path, "BBBA", "AABA", "pqrs"))
    assert result["n"] == 4 and result["strict"]["difference"] == 0.5
    assert result["strict"]["interval"] == pytest.approx((-0.06580, 1.06580), abs=1e-5)
    assert result["lenient"] == result["strict"]


def test_only_what_both_answered_is_compared(tmp_path, capsys):
    files = two_files(tmp_path, ["B", None, "A", "B"], ["A", "B", "A", None], "pqrs",
                      changed={"protocol": "direct", "seconds": "true"})
    result = main(parse(["--compare", *files]))
    assert result["n"] == 2 and result["strict"]["difference"] == 0.5       # unreadable: not wrong
    printed = capsys.readouterr().out
    assert "2 questions that both answered, of 4 in A and 4 in B" in printed
    assert "they differ in protocol: A video-ktr, B direct" in printed
    assert "they differ in seconds: A one, B true" in printed and "in frames" not in printed


def test_the_same_row_of_another_list_is_another_question(tmp_path):
    a, b = two_files(tmp_path, "BBB", "ABB", "pqr")
    Path(b).write_text(Path(b).read_text().replace("q1", "another"))
    assert compare(a, b)["n"] == 2


@pytest.mark.parametrize("b, clips", [
    ([None, None, "B"], "pqr"), (["B", "A", "B"], "ppp"), ([None] * 3, "pqr")])
def test_files_without_two_clips_in_common_are_not_compared(tmp_path, b, clips):
    files = two_files(tmp_path, "BAA", b, clips)
    with pytest.raises(BadRecord, match="a.jsonl and .*b.jsonl: fewer than two clips"):
        compare(*files)


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("command, says", [
    (["--rescore", "none.jsonl"], "none.jsonl"),
    ([*NEEDED[:-1], "README.md"], "README.md: not valid JSON"),
])
def test_a_file_that_cannot_be_used_is_one_line(command, says):
    done = subprocess.run([sys.executable, "evaluate.py", *command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_of_another_family_is_one_line(world, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    command = arguments(tmp_path, world, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: --model .*a model of type gpt2"):
        main(parse(command))
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_program_keeps_its_traceback(checkpoint_folder, world, tmp_path):
    """Only errors of the files that were named become one line."""
    script = ("import runpy, sys, policy\n"
              "def sample(*a, **k): raise ValueError('of a library')\n"
              "policy.sample = sample\n"
              "sys.argv = ['evaluate.py', *sys.argv[1:]]\n"
              "runpy.run_path('evaluate.py', run_name='__main__')\n")
    command = [sys.executable, "-c", script, *arguments(checkpoint_folder, world, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "Traceback" in done.stderr and "ValueError: of a library" in done.stderr


# ---------------------------------------------------------------------------------- torn, and meant
def test_a_line_torn_in_the_middle_costs_its_question(whole, checkpoint_folder, world, tmp_path,
                                                      capsys):
    """As two writers leave it, one of them killed: it is dropped, counted and asked again."""
    lines = (whole[0] / "predictions.jsonl").read_text().splitlines(keepends=True)
    torn = [*lines[:5], lines[5][:30] + lines[6], *lines[7:]]
    (tmp_path / "predictions.jsonl").write_text("".join(torn))
    main(parse(["--rescore", str(tmp_path)]))
    assert f"1 of {len(torn)} lines are torn and left out" in capsys.readouterr().out
    assert main(parse(arguments(checkpoint_folder, world, tmp_path))) == whole[1]
    _, rows = read_predictions(tmp_path)
    assert sorted(row["row"] for row in rows) == list(range(24))


def test_a_torn_first_line_is_no_file_of_predictions(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"settings": {"mod{"row": 1}\n{"row": 2}\n')
    with pytest.raises(BadRecord, match="not valid JSON"):
        read_predictions(tmp_path / "p.jsonl")


def test_folders_are_compared(whole, capsys):
    compare(whole[0], whole[0])
    assert "24 questions that both answered" in capsys.readouterr().out


@pytest.mark.parametrize("given, told", [
    (["--model", "m", "--data", "d"], "--benchmark is needed"),
    (["--model", "m"], "--data and --benchmark are needed"),
    (["--model", "m", "--video", "v"], "--question is needed"),
    ([], "--model and --data and --benchmark are needed (or --video and --question)")])
def test_the_options_that_are_missing_are_named(given, told, capsys):
    with pytest.raises(SystemExit):
        parse(given)
    assert told in capsys.readouterr().err
