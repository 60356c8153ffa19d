"""Loads and checks data: the training list and its media, the lists and clips of benchmarks.

    bash train.sh data DIR                      the paper's list and the media that it names
    bash train.sh data DIR --dry_run            what that takes, in GB; loads no media
    bash train.sh data DIR --only image STAR    a part: image, video, folders of the list's paths
    bash train.sh data DIR --list 260k          Video-R1's own list; or a file, or a URL#sha256=HEX
    bash train.sh data DIR --benchmarks         lists and clips of the paper's benchmarks

Only what a list names is unpacked (hub.py says how). After a stop of any kind the same command
continues. docs/reproduce.md says what comes before and after.
"""

import argparse
import hashlib
import json
import posixpath
import subprocess
import sys
from collections import Counter
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import logging

from data import BadRecord, read_json, read_records
from lab.holmes import converted
from lab.hub import fetch, load, part_of, size_of, url_of

MEDIA = "Video-R1/Video-R1-data"
PAPER = ("https://raw.githubusercontent.com/ziyue1999/Video-KTR/"
         "995a2970bb341680cb9cee3ad7070e8b2f16cd70/src/r1-v/video_ktr_data/Video-R1-Holmes-16k.json"
         "#sha256=19025cd0a08fb6b01b495668867f6888d79336caa23c2fe379652cb16af46a1f")
LICENCES = ("licences: the hub's card says apache-2.0; the media under it have licences of their "
            "own, some for research only; of the paper's list no licence is known")
BENCHMARKS = {      # what the lists of Video-R1/Video-R1-eval name: (hub data set, its place here)
    "videommmu": ("lmms-lab/VideoMMMU", "Evaluation/VideoMMMU"),
    "mmvu": ("yale-nlp/MMVU", "Evaluation/MMVU"),
    "tempcompass": ("lmms-lab/TempCompass", "Evaluation/TempCompass"),
    "videomme": ("lmms-lab/Video-MME", "Evaluation/VideoMME"),
}
HOLMES = ("they were taken off the hub for copyright; their authors name another place "
          "(github.com/TencentARC/Video-Holmes/issues/7; whether it has the training clips too is "
          "not known here)")


def list_of(name: str, folder: Path) -> Path:
    """A list's file: one that is there, or loaded into `folder` once."""
    if Path(name).is_file():
        return Path(name)
    known = {"paper": PAPER, "260k": url_of(MEDIA, "Video-R1-260k.json")}
    url, _, sha256 = known.get(name, name).partition("#sha256=")
    if "://" not in url:
        raise SystemExit(f"error: --list {name}: no such file; known: {', '.join(known)}, or a URL")
    path = folder / posixpath.basename(url)
    if not path.is_file():
        fetch(url, path, sha256=sha256 or None)
    elif sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"error: {path} is not the list at {url}: move it away")
    return path


def top(record: dict) -> str:
    return posixpath.normpath(record["path"]).split("/")[0]


def named_by(records: list[dict]) -> set[str]:
    return {posixpath.normpath(record["path"]) for record in records}


def training(a: argparse.Namespace) -> None:
    """The list, the media that it names, and which of its records can be used."""
    path = list_of(a.list, a.folder)
    records, malformed = read_records(path)
    known = {"image", "video", *map(top, records)}
    if not known.issuperset(a.only):
        raise SystemExit(f"error: --only knows {', '.join(sorted(known))}")
    asked = [r for r in records if not a.only or {r["data_type"], top(r)} & set(a.only)]
    print(f"{path}: {len(records)} records, {len(malformed)} malformed; {len(asked)} are asked for"
          f"\n{LICENCES}")
    load(MEDIA, "", named_by(asked), a.folder, a.keep_zips, a.dry_run)
    lost = [r for r in asked if top(r) == "videos_train" and size_of(a.folder / r["path"]) < 0]
    if lost:
        print(f"{len(lost)} records have no clip: {len(named_by(lost))} clips of Video-Holmes: "
              f"{HOLMES}. Put them at {a.folder}/videos_train/ID.mp4, and give this command again; "
              "without them training passes these records over")
    if not a.dry_run:
        check(path, records, a.folder)


def check(path: Path, records: list[dict], folder: Path) -> None:
    """`data.py check`: what it finds, by folder, and the command that comes next."""
    print("trying every record's clip or image ...", flush=True)
    program, bad = Path(__file__).resolve().parent.parent / "data.py", path.with_suffix(".bad.json")
    asked = subprocess.run([sys.executable, program, "check", path, "--videos", folder],
                           stdout=subprocess.PIPE)
    if asked.returncode not in (0, 1):
        raise SystemExit(f"error: {program} check: exit code {asked.returncode}")
    reasons = {(item["path"], item.get("row")): item["reason"] for item in read_json(bad)}
    counts = Counter()
    for record in records:
        reason = (reasons.get((record["path"], None)) or            # its clip's; its own
                  reasons.get((record["path"], record["row"]), "usable"))
        kind = {"usable": "usable", "no such file": "absent"}.get(reason.split(": ")[-1], "bad")
        counts.update((name, kind) for name in (top(record), "all"))
        if kind == "bad" and counts["all", "bad"] <= 10:
            print(reason)
    print(f"\n{'records of':24} {'usable':>8} {'no file':>8} {'unusable':>11}")
    for name in [*sorted(set(map(top, records))), "all"]:
        print(f"{name:24} {counts[name, 'usable']:8} {counts[name, 'absent']:8} "
              f"{counts[name, 'bad']:11}")
    print(f"next: DATA={path} VIDEOS={folder} bash train.sh 7b --leave_out {bad}")


def holmes_list(folder: Path) -> Path:
    """Where Video-Holmes' list in Video-R1's form is, made of its own if that alone is there."""
    path, own = folder / "eval_video-holmes.json", folder / "test_Video-Holmes.json"
    if own.is_file() and not path.is_file():
        rows = [converted(row) for row in json.loads(own.read_text("utf-8-sig"))]
        rows = [{**row, "path": f"./Evaluation/Video-Holmes/{row['path']}"} for row in rows]
        part_of(path).write_text(json.dumps(rows, indent=1))
        part_of(path).rename(path)
    return path


def benchmarks(a: argparse.Namespace) -> None:
    """Lists and clips of the paper's benchmarks; what the hub refuses is passed over."""
    for name, (repo, root) in BENCHMARKS.items():
        try:
            path = list_of(url_of("Video-R1/Video-R1-eval", f"eval_{name}.json"), a.folder)
            load(repo, root, named_by(read_records(path)[0]), a.folder, a.keep_zips, a.dry_run)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise                                   # the hub is ill, not unwilling
            print(f"{name}: {first_line(error)}; the rest goes on. Some data sets want their terms "
                  f"accepted (https://huggingface.co/datasets/{repo}) and `hf auth login`")
    list_of(url_of("TencentARC/Video-Holmes", "test_Video-Holmes.json"), a.folder)
    clips = named_by(read_records(holmes_list(a.folder))[0])
    if lost := [clip for clip in clips if not (a.folder / clip).is_file()]:
        print(f"video-holmes: its list is here, {len(lost)} of its {len(clips)} clips are not: "
              f"{HOLMES}. Put them at {a.folder}/Evaluation/Video-Holmes/ID.mp4")
    print(f"next: bash train.sh table RUN [RUN ..] --data {a.folder}")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train.sh data", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder for the data")
    add("--list", default="paper", help="list: paper, 260k, a file in Video-R1's form, or a URL")
    add("--only", nargs="+", default=[], metavar="PART", help="parts: image, video, or folders")
    add("--benchmarks", action="store_true", help="load the benchmarks, not the training data")
    add("--keep_zips", action="store_true", help="keep each zip after it is unpacked")
    add("--dry_run", action="store_true", help="tell what would be loaded, and stop")
    a = parser.parse_args(arguments)
    a.folder = a.folder.resolve()
    if a.benchmarks and (a.only or a.list != "paper"):
        parser.error("--list and --only choose training data; --benchmarks takes neither")
    logging.set_verbosity_error()               # its retries tell nothing that the end does not
    try:
        a.folder.mkdir(parents=True, exist_ok=True)
        (benchmarks if a.benchmarks else training)(a)
    except BadRecord as error:
        raise SystemExit(f"error: {error}") from None
    except (HTTPError, OSError, json.JSONDecodeError) as error:     # a mirror may answer in HTML
        raise SystemExit(f"error: {first_line(error)}; the same command continues") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None


if __name__ == "__main__":
    main()
