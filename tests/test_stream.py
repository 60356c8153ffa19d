"""Which record is looked at when, what a run leaves out and remembers, and the files it writes."""

import json
from types import SimpleNamespace

import pytest
import torch

from data import Skipped
from options import Options
from run import preflight, stream
from run.logs import Log, lost_records, drop_later_rows, rows_of
from run.stream import Stream, plan, seed_of


# --------------------------------------------------------------------------------------------- plan
def test_every_epoch_is_another_permutation_cut_to_whole_steps():
    ahead, steps = plan(Options(epochs=2), 10, set(), prompts=3, first_step=0, first_place=0)
    assert steps == 6 and [place for place, _ in ahead] == list(range(18))
    one, two = [i for _, i in ahead[:9]], [i for _, i in ahead[9:]]
    assert len(set(one)) == len(set(two)) == 9 and one != two
    other, _ = plan(Options(seed=7), 10, set(), prompts=3, first_step=0, first_place=0)
    assert [i for _, i in other] != one


def test_a_run_that_goes_on_takes_the_rest_of_the_same_order():
    for o in (Options(epochs=2), Options(max_steps=8)):
        whole, steps = plan(o, 10, set(), prompts=2, first_step=0, first_place=0)
        rest, same = plan(o, 10, set(), prompts=2, first_step=3, first_place=6)
        wanted = (steps - 3) * 2
        assert same == steps and rest[:wanted] == whole[6:6 + wanted]


@pytest.mark.parametrize("o", [Options(epochs=2), Options(max_steps=9)])
def test_records_left_out_later_never_come_again(o):
    """Three steps are done; then some records are left out, of those to come and of those seen."""
    whole, _ = plan(o, 10, set(), prompts=2, first_step=0, first_place=0)
    left_out = {whole[1][1], whole[6][1], whole[9][1]}
    rest, steps = plan(o, 10, left_out, prompts=2, first_step=3, first_place=6)
    assert rest == [(place, i) for place, i in rest if i not in left_out]
    expected = [(place, i) for place, i in whole[6:] if i not in left_out]
    assert rest[:len(expected)] == expected
    if o.max_steps:                             # the number of steps stays, epochs fill it
        assert steps == 9 and len(rest) >= (9 - 3) * 2
    else:                                       # 10 - 6 - 2 of this epoch, 10 - 3 of the next
        assert len(rest) == 2 + 7 and steps == 3 + 9 // 2


def test_records_that_teach_nothing_are_counted_before_a_run(checkpoint_folder, world, tmp_path,
                                                             capsys):
    """They do not stop it: a rule that gives part credit learns from several right letters."""
    rows = json.loads((world / "train.json").read_text())[:6]
    for i in (1, 4):
        rows[i]["solution"] = "<answer>A, B</answer>"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    o = Options(model=str(checkpoint_folder), data=str(tmp_path / "data.json"), videos=str(world),
                out=str(tmp_path / "out"), workers=0)
    assert preflight.check_start(o)[1] == set()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing can be learnt from 2 of 6 records, the first: record ")
    assert "(row 1): the truth is not one letter" in line and "--leave_out" in line
    o.leave_out = str(tmp_path / "bad.json")
    listed = [{"path": rows[i]["path"], "row": i} for i in (1, 4)]
    (tmp_path / "bad.json").write_text(json.dumps(listed))
    assert preflight.check_start(o)[1] == {1, 4} and not capsys.readouterr().out


def test_too_few_records_for_a_step():
    with pytest.raises(SystemExit, match="2 records are too few for one step of 3 prompts"):
        plan(Options(), 4, {0, 1}, prompts=3, first_step=0, first_place=0)
    with pytest.raises(SystemExit, match="too few"):
        plan(Options(max_steps=5), 2, set(), prompts=3, first_step=0, first_place=0)
    for left_out in ({0, 1, 2}, set(range(9))):         # the only epoch of 6 lost one; all are lost
        with pytest.raises(SystemExit, match="too few"):
            plan(Options(), 9, left_out, prompts=6, first_step=0, first_place=0)


def test_every_run_has_its_own_chance():
    """torch's CPU generator heeds 32 bits of a seed: run seeds must not hide above them."""
    options, seeds = (Options(seed=0), Options(seed=4)), set()
    for o in options:
        for place in range(-1, 200):
            seeds |= {seed_of(o, place), seed_of(o, place) + 1}
    assert len(seeds) == 2 * 2 * 201 and all(0 <= seed < 2 ** 32 for seed in seeds)
    first = [torch.rand(4, generator=torch.Generator().manual_seed(seed_of(o, 7))) for o in options]
    assert not torch.equal(*first)


# ------------------------------------------------------------------------------------------- stream
class Decoder:
    """Stands for data.Prompts: prompts that say which record they are, some unusable."""

    def __init__(self, records, root, processor, limits):
        self.records = records

    def __getitem__(self, index):
        record = self.records[index]
        if record["row"] in getattr(self, "avoided", ()):       # the decoder is not tried again
            return Skipped(record, "lost before")
        if record["row"] in BAD:
            return Skipped(record, "broken")
        return SimpleNamespace(record=record)


BAD: set[int] = set()


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make(o, ...) -> a Stream over ten records, decoded by `Decoder`."""
    monkeypatch.setattr(stream, "Prompts", Decoder)
    monkeypatch.setattr(stream, "loader", lambda data, indices, workers: map(
        data.__getitem__, list(indices)))
    BAD.clear()

    def build(o, left_out=(), rank=0, world=1, step=0, place=0):
        records = [{"row": i, "problem_id": i, "path": f"./{i}"} for i in range(10)]
        log, state = Log(tmp_path, rank), {"step": step, "place": place}
        return Stream(o, records, set(left_out), None, log, rank, world, state)
    return build


def rows_taken(s, steps):
    return [[prompt.record["row"] for prompt, _ in s.prompts_of_step(step)] for step in steps]


def test_ranks_share_the_order(make):
    o = Options(prompts_per_step=2, max_steps=4)
    ranks = [rows_taken(make(o, rank=rank, world=2), range(4)) for rank in (0, 1)]
    alone = rows_taken(make(Options(prompts_per_step=4, max_steps=4)), range(4))
    assert [a + b for a, b in zip(*ranks)] == alone


def test_a_stream_that_goes_on_with_records_left_out(make):
    o = Options(max_steps=8)
    whole = make(o)
    rows, places = rows_taken(whole, range(8)), whole.place_after(2)
    gone = rows[4] + rows[0]
    rest = make(o, left_out=gone, step=3, place=places)
    expected = [row for row in rows[3:] if row[0] not in gone]
    taken = rows_taken(rest, range(3, 8))
    assert taken[:len(expected)] == expected
    assert all(row[0] not in gone for row in taken) and all(len(row) == 1 for row in taken)
    # a further resume, from what the second part saved, goes on where that stopped
    again = make(o, left_out=gone, step=5, place=rest.place_after(4))
    assert rows_taken(again, range(5, 8)) == taken[2:]


def test_seeds_belong_to_places_not_to_records_or_ranks(make):
    o = Options(max_steps=12)
    s = make(o)
    taken = [s.prompts_of_step(step)[0] for step in range(12)]
    assert [seed for _, seed in taken] == [seed_of(o, place) for place in range(12)]
    assert len({seed for _, seed in taken}) == 12                # in the second epoch others


def test_what_cannot_be_used_is_skipped_named_and_not_replaced(make, tmp_path):
    o = Options(prompts_per_step=2, max_steps=5)
    order = [row for rows in rows_taken(make(o), range(5)) for row in rows]
    BAD.update({order[1], order[4], order[5]})
    s = make(o)
    assert rows_taken(s, range(5)) == [order[:1], order[2:4], [], order[6:8], order[8:]]
    named = rows_of(tmp_path / "skipped.0.jsonl")
    assert [(row["step"], row["row"]) for row in named] == [
        (1, order[1]), (3, order[4]), (3, order[5])]
    assert {row["reason"] for row in named} == {"broken"}


def test_the_watched_prompt_is_the_runs_first(make):
    o = Options(max_steps=6)
    ((first,), (second,)) = rows_taken(make(o), [0, 1])
    for s in (make(o), make(o, step=4, place=4), make(o, world=2)):
        prompt, seed = s.watched(set())
        assert prompt.record["row"] == first and seed == seed_of(o, -1)
    prompt, _ = make(o, left_out={first}).watched({first})
    assert prompt.record["row"] == second
    BAD.add(first)
    assert make(o).watched(set()) is None


def test_a_lost_decoder_keeps_its_place_when_a_run_goes_on(make, tmp_path):
    """The steps after it hold the same prompts as in the run that met it, and it is named once."""
    o = Options(prompts_per_step=2, max_steps=5, out=str(tmp_path))
    order = [row for rows in rows_taken(make(o), range(5)) for row in rows]
    reason = "a: decoding took more than 120 s"
    make(o).log.skip(Skipped({"row": order[5], "path": "./x", "problem_id": 5}, reason, True), 3)
    rest = make(o, step=2, place=4)
    assert rows_taken(rest, range(2, 5)) == [[order[4]], order[6:8], order[8:]]
    assert [row["row"] for row in rows_of(tmp_path / "skipped.0.jsonl")] == [order[5]]


# ---------------------------------------------------------------------------------------------- log
def fill(out, steps):
    out.mkdir(exist_ok=True)
    for name in ("log.jsonl", "samples.jsonl"):
        lines = [json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)]
        (out / name).write_text("".join(lines))
    why = {1: "a: decoding ended its process", 3: "b: decoding took more than 1 s",
           4: "c: no such file"}
    rows = [{"step": step, "row": 10 + step, "path": f"./{step}", "reason": reason,
             "lost": step != 4} for step, reason in why.items()]
    (out / "skipped.0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_goes_on_drops_what_it_repeats(tmp_path):
    fill(tmp_path, steps=4)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "rew')                              # as a kill leaves it
    drop_later_rows(tmp_path, 2)
    assert [row["step"] for row in rows_of(tmp_path / "log.jsonl")] == [1, 2]
    assert [row["step"] for row in rows_of(tmp_path / "samples.jsonl")] == [1, 2]
    # lost decoders stay, also those of steps done again; a missing file may be there by now
    assert [row["row"] for row in rows_of(tmp_path / "skipped.0.jsonl")] == [11, 13]
    assert lost_records(tmp_path) == {11: "a: decoding ended its process",
                                      13: "b: decoding took more than 1 s"}
    Log(tmp_path, 0).skip(Skipped({"row": 14, "path": "./4", "problem_id": 5}, "r4"), 4)
    assert [row["row"] for row in rows_of(tmp_path / "skipped.0.jsonl")] == [11, 13, 14]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.jsonl", "samples.jsonl", "skipped.0.jsonl"]


def test_the_log_of_a_run_without_checkpoint_is_put_aside(tmp_path):
    fill(tmp_path, steps=4)
    (tmp_path / "samples.jsonl").write_text('{"step": 1')           # not one whole line
    drop_later_rows(tmp_path, 0)
    assert lost_records(tmp_path) == {}     # --videos may have been wrong: all are tried again
    assert not list(tmp_path.glob("*.jsonl"))
    (aside,) = tmp_path.glob("log.jsonl.before-*")
    assert [row["step"] for row in rows_of(aside)] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("skipped.0.jsonl.before-*"))) == 1


def test_a_log_is_whole_whatever_kills_its_rewriting(tmp_path, monkeypatch):
    fill(tmp_path, steps=4)
    before = (tmp_path / "log.jsonl").read_text()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_later_rows(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("ranks, options, needed", [
    (8, {}, None), (4, {}, None), (3, {}, 85), (3, {"beta": 0.0}, None), (1, {}, 146),
    (1, {"offload": True}, None), (1, {"freeze": ["language"]}, None),
    (2, {"freeze": ["vision", "projector"]}, 99),
    (8, {"max_frames": 64, "max_pixels": 256 * 784}, None),             # 71.1 GiB measured
    (4, {"max_frames": 64, "max_pixels": 256 * 784}, 84), (4, {"prompts_per_step": 4}, 82),
    (4, {"max_frames": 768, "max_prompt": 1024}, None)])                # longer ones are skipped
def test_a_run_that_no_gpu_holds_is_refused_before_it_starts(ranks, options, needed, monkeypatch):
    """The 7B on cards of 80 GB: 6 bytes a weight, 4 without a reference, and 12 over the ranks; 4
    for a frozen one; and 11 bytes for a token of 28 layers of 3,584: 7 GiB for 7,168, 15 for
    14,336."""
    card = SimpleNamespace(total_memory=int(79.2 * 2 ** 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    o = Options(model="random:7b", **options)
    if needed is None:
        return preflight.check_memory(o, ranks)
    with pytest.raises(SystemExit, match=f"a GPU needs {needed} GiB and has 79"):
        preflight.check_memory(o, ranks)
