"""bash train.sh table: answers that are there are taken up, the rest is asked, numbers by hand."""

import json
import shutil

import pytest
from conftest import ROOT
from huggingface_hub import constants
from test_evaluate import lines_of

import evaluate
from lab import table

START, GRPO, KTR = "start", "runs/grpo", "runs/ktr"


def question(i):
    return {"problem_id": i, "problem": f"What is {i}?", "data_type": "video", "solution":
            "<answer>B</answer>", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
            "path": f"./Evaluation/MMVU/videos/Art/{i}.mp4", "data_source": ""}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A start, two runs that have ended, and MMVU's list with four questions and three clips."""
    monkeypatch.chdir(tmp_path)
    for folder in (START, f"{GRPO}/final", f"{KTR}/final"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    clips = tmp_path / "data" / "Evaluation" / "MMVU" / "videos" / "Art"
    clips.mkdir(parents=True)
    for i in range(3):
        (clips / f"{i}.mp4").touch()
    (tmp_path / "data" / "eval_mmvu.json").write_text(json.dumps([question(i) for i in range(4)]))
    return tmp_path


def cell(model, frames=32, *more):
    a = table.parse([model, "--data", "data", "--out", "out", *more])
    (label,) = table.labels([model])
    return table.Cell(label, table.checkpoint_of(model), "mmvu", frames, a)


def answer(model, letters, frames=32, *more):
    """Predictions as evaluate.py writes them; None: the clip could not be read."""
    at = cell(model, frames, *more)
    records = evaluate.read_questions("data/eval_mmvu.json", at.settings["protocol"], "mmvu")
    rows = [{"settings": at.settings}]
    for r, letter in zip(records, letters):
        said = {"output": f"<think>t</think><answer>{letter}</answer>"}
        rows.append({**r, **(said if letter else {"unreadable": f"{r['path']}: no such file"})})
    at.out.mkdir(parents=True, exist_ok=True)
    (at.out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_by_hand(house, capsys):
    """Everything is answered: no model is run (there is none)."""
    for frames in (16, 32):
        answer(START, ["A", "B", "A", None], frames)            # 1 of 3
        answer(GRPO, ["B", "B", "A", None], frames)             # 2 of 3
        answer(KTR, ["B", "B", "B", None], frames)              # 3 of 3
    table.main([START, GRPO, KTR, "--data", "data", "--out", "out", "--frames", "16", "32",
                "--benchmarks", "mmvu", "videomme", "video-holmes"])
    said = capsys.readouterr().out
    assert "0 questions to answer, in 0 of 6 cells, on the CPU" in said
    assert "mmvu: 4 questions of 625, 1 without their clip; `bash train.sh data DIR" in said
    assert "videomme is left out:" in said and "video-holmes is left out:" in said
    assert "TencentARC/Video-Holmes/issues/7" in said
    text = (house / "out" / "table.md").read_text()
    assert text in said
    head, _, first, second = ([x.strip() for x in line.strip("|").split("|")]
                              for line in text.splitlines()[:4])
    assert head == ["benchmark", "frames", "start", "grpo", "ktr", "published: cold start",
                    "published: Video-KTR 7B", "published: GRPO 7B", "ktr - start", "ktr - grpo"]
    # Wilson for 3 of 3: from 1 / (1 + 1.96^2 / 3) = 43.8; differences 2/3 (1 1 0 -> sd 0.577, over
    # root 3, times 1.96: 65.3) and 1/3 (0 0 1: the same)
    assert first[:2] == ["mmvu", "16"] and second[:2] == ["mmvu", "32"]
    assert first[4] == second[4] == "100.0 (43.8 to 100.0)"
    assert first[5:] == ["61.3", "65.7", "-", "+66.7 +- 65.3", "+33.3 +- 65.3"]
    assert second[5:] == ["63.5", "65.9", "64.8", "+66.7 +- 65.3", "+33.3 +- 65.3"]
    assert "- mmvu, 32 frames, ktr: 1 unreadable, of 4 questions" in text
    kept = json.loads((house / "out" / "table.json").read_text())
    assert kept["models"]["ktr"] == str(house / KTR / "final")
    row = kept["table"][1]
    assert row["scores"]["grpo"]["score"] == pytest.approx(2 / 3)
    files = [f"out/{name}/mmvu-32/predictions.jsonl" for name in ("ktr", "grpo")]
    compared = evaluate.compare(*files)["strict"]
    assert row["differences"]["ktr - grpo"] == {
        "n": 3, "difference": compared["difference"], "interval": list(compared["interval"])}


def test_published_figures_stand_beside_sampled_answers_too(house):
    theirs = ("--temperature", "0.1", "--top_p", "0.001")
    answer(KTR, "BBBB", 32, *theirs)
    assert cell(KTR, 32, *theirs).result()["published"]["Video-KTR 7B"] == 65.9
    other = ("--protocol", "direct")
    answer(GRPO, "BBBB", 32, *other)
    assert cell(GRPO, 32, *other).result()["published"] == {}


def test_a_table_without_an_answer_is_an_error(house):
    answer(KTR, [None] * 4)
    path = house / "out" / "ktr" / "mmvu-32" / "predictions.jsonl"
    path.write_text(path.read_text().replace("no such file", "cannot be decoded"))
    with pytest.raises(SystemExit, match="^error: nothing is measured"):
        table.main([KTR, "--data", "data", "--out", "out", "--frames", "32"])


def test_what_is_left_to_ask(house):
    assert cell(KTR).left == 4
    answer(KTR, ["B", "A", None, None])     # the clip of the third is there now
    assert cell(KTR).left == 1
    path = house / "out" / "ktr" / "mmvu-32" / "predictions.jsonl"
    path.write_text(path.read_text()[:-9])  # a kill cut the last line
    assert cell(KTR).left == 2
    answer(KTR, "BBBB")
    assert cell(KTR).left == 0 and cell(KTR, 32, "--max_new_tokens", "9").left == 4


def test_models_are_told_apart_and_judged(house, monkeypatch):
    (house / "other" / "ktr" / "final").mkdir(parents=True)
    assert table.labels([KTR, "Video-R1/Qwen2.5-VL-7B-COT-SFT"]) == [
        "ktr", "Qwen2.5-VL-7B-COT-SFT"]
    assert table.labels([KTR, "other/ktr/final"]) == ["runs-ktr", "other-ktr-final"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(house / "hub"))
    cached = house / "hub" / "models--Video-KTR--Video-KTR-7B"
    for path, text in (("refs/main", "a1"), ("snapshots/a1/config.json", "{}")):
        (cached / path).parent.mkdir(parents=True)
        (cached / path).write_text(text)
    assert table.checkpoint_of("Video-KTR/Video-KTR-7B") == "Video-KTR/Video-KTR-7B"
    with pytest.raises(SystemExit, match="^error: runs/none: no run or checkpoint here, and not"):
        table.main([START, "runs/none"])                        # it looks like a hub name
    for name in ("other/ktr", "runs/none/final", "nothing"):
        with pytest.raises(SystemExit, match=f"^error: {name}: no run that has ended"):
            table.checkpoint_of(name)
    with pytest.raises(SystemExit, match="^error: nothing is measured"):
        table.main([KTR, "--data", "nowhere", "--out", "out"])


def test_the_toys_table_goes_on_after_a_fault(tmp_path, capfd):
    """Real models: half of the answers are there, the last line is cut; another model fails."""
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(ROOT / "cold_start", broken, ignore=shutil.ignore_patterns("*.safetensors"))
    table.toy.make(out / "world", train=0, test=12)
    arguments = ["--toy", str(broken), str(ROOT / "cold_start"), "--frames", "8", "--out", str(out)]
    a = table.parse(arguments)
    whole = table.Cell("cold_start", str(ROOT / "cold_start"), "toy", 8, a)
    evaluate.main(evaluate.parse(whole.arguments))
    predictions = whole.out / "predictions.jsonl"
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join(lines[:6]) + lines[6][:40])
    with pytest.raises(SystemExit, match="^error: 1 cells failed"):
        table.main(arguments)
    said = capfd.readouterr().out
    assert "19 questions to answer, in 2 of 2 cells, on the CPU" in said
    assert "toy, 8 frames, broken: evaluate.py ended with exit code 1; the rest goes on" in said
    rows = lines_of(predictions)
    assert rows[:6] == [json.loads(line) for line in lines[:6]]
    assert sorted(row["row"] for row in rows[1:]) == list(range(12))
    score = json.loads((whole.out / "scores.json").read_text())["scores"]["all"]["strict"]
    (row,) = json.loads((out / "table.json").read_text())["table"]
    assert row["scores"]["cold_start"]["score"] == score and row["scores"]["broken"] is None
    assert row["differences"] == {"cold_start - broken": None}
    assert f"| {100 * score:.1f} (" in said
    assert "answers: strict" in (whole.out / "report.txt").read_text()


def test_the_picture(house):
    pytest.importorskip("matplotlib")
    answer(KTR, "BBBB")
    table.main([KTR, "--data", "data", "--out", "out", "--frames", "32", "--benchmarks", "mmvu"])
    assert (house / "out" / "table.png").stat().st_size > 5000
