"""Files of predictions: evaluate.py's, which begin with the settings that made them, and others' in
Video-R1's form.
"""

import argparse
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from lab.grading import grade
from lab.protocols import PROTOCOLS
from prompt import BadRecord
from records import KNOWN, read_json


def gradable(row: dict) -> bool:
    """Whether `grade` can take a row of predictions, with defaults for what others leave out."""
    if not (isinstance(row["options"], list) and isinstance(row["row"], int)):
        return False
    texts = [row.get("output", row.get("unreadable")), row.get("solution"), *row["options"]]
    return row["problem_type"] in KNOWN["problem_type"] and all(isinstance(t, str) for t in texts)


def predictions_in(path: str | Path) -> Path:
    """The file of predictions that a folder of `--out` holds, or that is named itself."""
    return Path(path, "predictions.jsonl") if Path(path).is_dir() else Path(path)


def whole_lines(path: Path) -> list:
    """The lines of a file that are JSON; says how many are not."""
    rows, text = [], path.read_text("utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    print(f"{path}: {len(lines) - len(rows)} of {len(lines)} lines are torn and left out; their "
          "questions are asked again where the run is continued")
    return rows


def read_predictions(path: str | Path) -> tuple[dict, list[dict]]:
    """(settings, rows with "grade") of a file; others' files do not say their settings ({}).
    BadRecord where there is nothing to grade."""
    path = predictions_in(path)
    try:
        rows, settings, latest = read_json(path), {}, {}
    except BadRecord as error:                  # a line that two writers or a kill have torn
        rows, settings, latest = whole_lines(path), {}, {}
        if not (rows and isinstance(rows[0], dict) and "settings" in rows[0]):
            raise error from None
    if rows and isinstance(rows[0], dict) and "settings" in rows[0]:
        settings = rows.pop(0)["settings"]
        rows = [row for row in rows if isinstance(row, dict)]       # a torn line may be JSON
    elif not rows:
        raise BadRecord(f"{path}: holds no predictions")
    for number, given in enumerate(rows):
        fields = given if isinstance(given, dict) else {}
        row = {"row": number, "path": number, "problem": "", "problem_type": "multiple choice",
               **fields, "options": fields.get("options") or []}
        if not gradable(row):
            raise BadRecord(f"{path}: row {number} is no prediction: its 'output' and 'solution' "
                            f"are texts, its options and problem_type as data.py knows them")
        if "output" in row:
            row["grade"] = grade(row["output"], row["solution"], row["problem_type"],
                                 row["options"])
        latest[row["row"]] = row                # a clip that could be read later replaces its note
    return settings, list(latest.values())


def settings_of(a: argparse.Namespace, records: list[dict]) -> dict:
    """What may not change while a file of answers grows."""
    asked = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    weights = sorted(Path(a.model).glob("*.safetensors"))
    named = ("model", "dtype", "benchmark", "protocol", *PROTOCOLS[a.protocol]["options"])
    return {**{name: getattr(a, name) for name in named}, "questions": asked[:16],
            "weights_written": [file.stat().st_mtime for file in weights],
            "score that counts": PROTOCOLS[a.protocol]["score"]}


def answered_rows(path: Path, settings: dict) -> set[int]:
    """Rows that `path` holds answers to. A file of other settings is refused (SystemExit), a line
    that a kill cut short is dropped, and a new file begins with its settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    if path.stat().st_size == 0:
        path.write_text(json.dumps({"settings": settings}) + "\n")
    old, rows = read_predictions(path)
    changed = ", ".join(name for name in settings if settings[name] != old.get(name))
    if changed:
        raise SystemExit(f"error: {path} has other settings ({changed}); choose another --out")
    return {row["row"] for row in rows if "output" in row}
