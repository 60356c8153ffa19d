"""bash train.sh data, against a small hub on this machine: what is loaded, and every fault that can
come between."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from hashlib import sha256

import numpy as np
import pytest
from conftest import ROOT
from hub import Hub, zip_of
from PIL import Image

from data import read_records
from lab import download

MEDIA, EVAL = "Video-R1/Video-R1-data", "Video-R1/Video-R1-eval"
LOAD = """import sys
from pathlib import Path
from lab.hub import load
folder, keep, *wanted = sys.argv[1:]
load("Video-R1/Video-R1-data", "", set(wanted), Path(folder), keep == "keep")"""


def picture(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(path, kind="image"):
    return {"problem": "What?", "data_type": kind, "problem_type": "multiple choice",
            "options": ["A. x", "B. y"], "solution": "<answer>A</answer>", "path": path}


def environment(hub):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def program(hub, *calls):
    """Outputs of lab.download, called in one process with each of `calls`: importing torch takes
    longer than all else."""
    code = """import json, sys
from lab.download import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print(end)
    print('=' * 9)"""
    words = json.dumps([[str(word) for word in call] for call in calls])
    made = subprocess.run([sys.executable, "-c", code, words], env=environment(hub), text=True,
                          capture_output=True, timeout=300)
    assert made.returncode == 0 and "Trying to resume" not in made.stderr, made.stderr
    return made.stdout.split("=" * 9)


def start(hub, folder, *wanted, keep="", **more):
    return subprocess.Popen([sys.executable, "-c", LOAD, folder, keep, *wanted], text=True,
                            env=environment(hub), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **more)


def load(hub, folder, *wanted, **more):
    """(exit code, stdout, the last line of stderr) of loading with nothing but lab.hub."""
    process = start(hub, folder, *wanted, **more)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, (err.strip().splitlines() or [""])[-1]


PIECE = 10 * 2 ** 20            # huggingface_hub writes in pieces of this size
BIG = np.random.default_rng(0).bytes(PIECE + 500_000)


@pytest.fixture
def hub():
    return Hub({MEDIA: {"STAR/STAR_part1.zip": zip_of({"a.bin": BIG, "deep/b.bin": b"b" * 50,
                                                       "other.bin": b"c"}),
                        "Math/Math_part1.zip": zip_of({"x.bin": b"x" * 9})}})


STAR, WANTED = "STAR/STAR_part1.zip", ("STAR/a.bin", "STAR/deep/b.bin")


def there(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file()}


# -------------------------------------------------------------------------------------- the command
RECORDS = [record(f"./Math/sub/{i % 3}.png") for i in range(6)]
RECORDS += [record("./STAR/0.png"), record("./videos_train/id.mp4", "video"),
            record("./Math/sub/0.png") | {"solution": "<answer>A, B</answer>"}]     # no one letter
MMVU = [f"videos/{field}/0.mp4" for field in ("Art", "Law")]


def rows(*paths):
    return json.dumps([record(path, "video") for path in paths]).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The command as it is, in a folder: the plan (the connection is lost within the list), the
    data, the benchmarks (the hub is ill within them), and twice again. Their clips lie on the hub
    as they are (MMVU), in folders that the list does not know (TempCompass, Video-MME), behind
    terms (Video-MMMU), or nowhere (Video-Holmes)."""
    text, folder = json.dumps(RECORDS).encode(), tmp_path_factory.mktemp("whole")
    holmes = {"video ID": "id", "Question ID": 1, "Question Type": "SR", "Question": "Who?",
              "Options": {"A": "x", "B": "y"}, "Answer": "B"}
    hub = Hub({
        "raw": {"list.json": text},
        MEDIA: {"README.md": b"a card", "STAR/STAR_part1.zip": zip_of({"1.png": picture(9)}),
                "Math/Math_part1.zip": zip_of({f"sub/{i}.png": picture(i) for i in range(9)}),
                "STAR/STAR_part2.zip": zip_of({"0.png": picture(0)}),
                "Chart/Chart_part1.zip": zip_of({"0.png": picture(1)})},
        EVAL: {"eval_mmvu.json": rows(*(f"./Evaluation/MMVU/{path}" for path in MMVU)),
               "eval_tempcompass.json": rows("./Evaluation/TempCompass/12.mp4"),
               "eval_videomme.json": rows("./Evaluation/VideoMME/a.mp4"),
               "eval_videommmu.json": rows("./Evaluation/VideoMMMU/dev_Art_1.mp4")},
        "yale-nlp/MMVU": {"README.md": b"", **{path: path.encode() for path in MMVU}},
        "lmms-lab/TempCompass": {"tempcompass_videos.zip": zip_of({"videos/12.mp4": b"12",
                                                                   "videos/13.mp4": b"13"})},
        "lmms-lab/Video-MME": {"videos_chunked_01.zip": zip_of({"data/a.mp4": b"a"}),
                               "videos_chunked_02.zip": zip_of({"data/b.mp4": b"b"})},
        "lmms-lab/VideoMMMU": {"Art.zip": zip_of({"Art/dev_Art_1.mp4": b"1"})},
        "TencentARC/Video-Holmes": {"test_Video-Holmes.json": json.dumps([holmes]).encode()}})
    hub.gated.add("lmms-lab/VideoMMMU")
    hub.cut["list.json"] = 9
    hub.ill.add("eval_mmvu.json")
    training = [folder, "--list", f"{hub.url}/list.json#sha256={sha256(text).hexdigest()}"]
    more = [folder, "--benchmarks"]
    said = program(hub, [*training, "--dry_run"], training, more, more, more)
    return folder, hub, said


def test_the_plan_is_exact_and_loads_no_media(whole):
    _, hub, (plan, *_) = whole
    assert "9 records, 0 malformed; 9 are asked for" in plan and "apache-2.0" in plan
    assert "5 files are named, 1 of them are not on the hub" in plan
    assert "GB to load in 2 files; the disk needs" in plan and "next:" not in plan
    assert "1 records have no clip: 1 clips of Video-Holmes" in plan


def test_from_nothing_to_the_command_that_trains(whole):
    """The zips that hold what the list names, the check, the leave-out list."""
    folder, hub, (_, made, *_) = whole
    media = {"Math/sub/0.png", "Math/sub/1.png", "Math/sub/2.png", "STAR/0.png"}
    assert {name for name in there(folder) if "val" not in name and "Holmes" not in name} == {
        "list.json", "list.bad.json", *media}                           # and no zip
    assert all((folder / f"Math/sub/{i}.png").read_bytes() == picture(i) for i in range(3))
    assert "Chart/Chart_part1.zip" not in dict(hub.asked)               # the list names no chart
    assert [name for name, _ in hub.loads()][1:4] == [      # STAR_part1 holds nothing it names
        "list.json", "Math/Math_part1.zip", "STAR/STAR_part2.zip"]
    counts = {line.split()[0]: line.split()[1:] for line in made.splitlines() if line.strip()}
    assert counts["Math"] == ["6", "0", "1"] and counts["videos_train"] == ["0", "1", "0"]
    assert counts["all"] == ["7", "1", "1"]
    leave_out = folder / "list.bad.json"
    assert made.splitlines()[-1] == (f"next: DATA={folder}/list.json VIDEOS={folder} bash train.sh "
                                     f"7b --leave_out {leave_out}")
    assert len(read_records(folder / "list.json", leave_out)[0]) == 7


def test_the_benchmarks_and_a_data_set_that_is_gated(whole):
    folder, hub, (_, _, stopped, made, again, _) = whole
    assert "videommmu: GatedRepoError" in stopped and "next:" not in stopped
    assert "error: HfHubHTTPError: Server error '503" in stopped.splitlines()[-1]
    assert stopped.splitlines()[-1].endswith("; the same command continues")
    clips = {path: (folder / path).read_bytes() for path in there(folder) if "Eval" in path}
    assert clips == {"Evaluation/TempCompass/12.mp4": b"12", "Evaluation/VideoMME/a.mp4": b"a",
                     **{f"Evaluation/MMVU/{path}": path.encode() for path in MMVU}}
    (question,) = json.loads((folder / "eval_video-holmes.json").read_text())
    assert question["path"] == "./Evaluation/Video-Holmes/id.mp4"
    for said in (made, again):
        assert "videommmu: GatedRepoError" in said and "hf auth login" in said
        assert "video-holmes: its list is here, 1 of its 1 clips are not" in said
        assert f"next: bash train.sh table RUN [RUN ..] --data {folder}" in said
    names = [name for name, _ in hub.loads()][1:]           # the list was cut once
    assert len(names) == len(set(names))                    # nothing came twice


def test_what_is_given_is_judged_in_one_line(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(RECORDS))
    (tmp_path / "broken.json").write_text("[{")
    for given, says in ((["--list", "mine.json"], "--list mine.json: no such file; known: paper"),
                        (["--list", str(tmp_path / "broken.json")], "not valid JSON"),
                        (["--list", str(tmp_path / "list.json"), "--only", "STARS"],
                         "--only knows Math, STAR, image, video")):
        with pytest.raises(SystemExit, match=f"^error: .*{says}.*$"):
            download.main([str(tmp_path / "new"), *given])
    assert there(tmp_path) == {"list.json", "broken.json"}


def test_a_list_of_another_hash_is_not_kept(tmp_path):
    hub = Hub({"raw": {"list.json": b"[]"}})
    code = "import sys; from lab.hub import fetch, Path; fetch(sys.argv[1], Path('l'), sha256='ab')"
    for name, says in (("list.json", "not ab: deleted"), ("none.json", "404")):
        made = subprocess.run([sys.executable, "-c", code, f"{hub.url}/{name}"], cwd=tmp_path,
                              env=environment(hub), text=True, capture_output=True)
        assert made.returncode == 1 and says in made.stderr and not there(tmp_path)


# --------------------------------------------------------------------------------------- the faults
def test_a_lost_connection_goes_on_where_it_was_lost(hub, tmp_path):
    hub.cut |= {STAR: PIECE + 5, f"part of {STAR}": 1}     # within the zip, and its table
    assert load(hub, tmp_path, *WANTED)[0] == 0
    assert hub.loads() == [(STAR, None), (STAR, f"bytes={PIECE}-")]
    assert there(tmp_path) == set(WANTED) and (tmp_path / "STAR/a.bin").read_bytes() == BIG


def test_a_killed_download_goes_on_where_it_was(hub, tmp_path):
    hub.cut[STAR], hub.slow = PIECE + 5, threading.Event()
    process, part = start(hub, tmp_path, *WANTED), tmp_path / f"{STAR}.part"
    while not part.exists() or part.stat().st_size < PIECE:
        assert process.poll() is None
        time.sleep(0.02)
    code, _, line = load(hub, tmp_path, *WANTED)
    assert code == 1 and line == f"error: {tmp_path}: another process loads {MEDIA} into it"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.slow.set()
    assert load(hub, tmp_path, *WANTED)[0] == 0
    assert hub.loads() == [(STAR, None), (STAR, f"bytes={PIECE}-")]
    assert there(tmp_path) == set(WANTED) and (tmp_path / "STAR/a.bin").read_bytes() == BIG


def test_a_wrong_byte_is_found(hub, tmp_path):
    hub.wrong.add(STAR)
    code, _, line = load(hub, tmp_path, *WANTED)
    assert code == 1 and STAR in line and "its SHA-256 is" in line and not there(tmp_path)
    hub.wrong.clear()
    assert load(hub, tmp_path, *WANTED)[0] == 0 and there(tmp_path) == set(WANTED)


def test_a_full_disk_stops_it_and_it_goes_on(hub, tmp_path):
    """No file may grow beyond a size: writing fails as on a full disk."""
    most = (PIECE + 9, PIECE + 9)
    full = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most))
    code, _, line = load(hub, tmp_path, *WANTED, **full)
    assert code == 1 and line.startswith("OSError: [Errno 27]")
    assert there(tmp_path) == {f"{STAR}.part"}
    assert load(hub, tmp_path, *WANTED)[0] == 0 and there(tmp_path) == set(WANTED)
    assert hub.loads()[-1][1].startswith("bytes=")                      # went on, not anew


def test_too_small_a_disk_is_told_before_anything_is_loaded(hub, tmp_path):
    """A zip whose table says that a member takes a petabyte."""
    file = io.BytesIO(hub.files[MEDIA][STAR])
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("more", b"")
        archive.infolist()[0].file_size = 10 ** 15
    hub.files[MEDIA][STAR] = file.getvalue()
    code, out, line = load(hub, tmp_path, *WANTED)
    assert code == 1 and line == (f"error: {tmp_path}: the disk has too little room; --only takes "
                                  "a part")
    assert "the disk needs 1000000.01 GB" in out and not hub.loads()


def test_half_a_zip_that_was_unpacked_is_not_unpacked_twice(hub, tmp_path):
    """What is there with its size stays as it is, and what is not is written."""
    (tmp_path / "STAR/deep").mkdir(parents=True)
    (tmp_path / "STAR/deep/b.bin").write_bytes(b"B" * 50)               # as long as the zip's
    (tmp_path / "STAR/a.bin").write_bytes(BIG[:1000])
    (tmp_path / "STAR/a.bin.part").write_bytes(BIG[:2000])
    (tmp_path / STAR).write_bytes(hub.files[MEDIA][STAR])               # the zip was there too
    assert load(hub, tmp_path, *WANTED)[0] == 0 and not hub.loads()
    assert there(tmp_path) == set(WANTED) and (tmp_path / "STAR/a.bin").read_bytes() == BIG
    assert (tmp_path / "STAR/deep/b.bin").read_bytes() == b"B" * 50


@pytest.mark.parametrize("kind, says", [
    (zipfile.ZIP_STORED, "Bad CRC-32 for file 'a.bin'"),
    (zipfile.ZIP_DEFLATED, "Error -3 while decompressing data")])
def test_a_damaged_zip_goes_and_is_loaded_again(hub, tmp_path, kind, says):
    whole = {"a.bin": BIG[:100_000].hex().encode(), "deep/b.bin": b"b"}
    hub.files[MEDIA][STAR] = zip_of(whole, kind=kind)
    content = bytearray(hub.files[MEDIA][STAR])
    content[60:90] = b"\xff" * 30
    (tmp_path / "STAR").mkdir()
    (tmp_path / STAR).write_bytes(content)                              # of the right size
    code, _, line = load(hub, tmp_path, *WANTED)
    assert code == 1 and says in line and line.endswith(": deleted")
    assert load(hub, tmp_path, *WANTED)[0] == 0
    assert (tmp_path / "STAR/a.bin").read_bytes() == whole["a.bin"]


def test_zips_that_are_kept(hub, tmp_path):
    for _ in range(2):
        assert load(hub, tmp_path, *WANTED, keep="keep")[0] == 0
    assert hub.loads() == [(STAR, None)] and there(tmp_path) == {*WANTED, STAR}
    shutil.rmtree(tmp_path / "STAR/deep")
    assert load(hub, tmp_path, *WANTED, keep="keep")[0] == 0
    assert hub.loads() == [(STAR, None)] and there(tmp_path) == {*WANTED, STAR}


def test_members_that_leave_the_folder_are_refused(tmp_path):
    names = ("../out.bin", "/out.bin", "x/../../out.bin", "..\\out.bin", "link")
    hub = Hub({MEDIA: {f"{i}/z.zip": zip_of({"a.bin": b"a", name: b"/etc/passwd"}, ["link"])
                       for i, name in enumerate(names)}})
    code = LOAD.split("folder,")[0] + """
for i in range(5):
    try:
        load("Video-R1/Video-R1-data", "", {f"{i}/a.bin"}, Path("."))
    except OSError as error:
        print("error:", error)"""
    folder = tmp_path / "in" / "it"
    folder.mkdir(parents=True)
    made = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(hub), text=True,
                          capture_output=True)
    errors = [line for line in made.stdout.splitlines() if line.startswith("error: ")]
    for name, line in zip(names, errors, strict=True):
        assert repr(name) in line and "leaves the folder: the zip is refused" in line
    assert not there(tmp_path) and not hub.loads()
