"""Records: the questions of a data set, read and checked.

They have Video-R1's form, as one JSON list or one object a line:

    {"problem_id": 1, "data_type": "video", "path": "a/b.mp4", "problem": "What ..?",
     "problem_type": "multiple choice", "options": ["A. a cat", "B. a dog"],
     "solution": "<answer>B</answer>"}
"""

import json
import math
import os
import re
from pathlib import Path

from prompt import BadRecord, by_letter, name_of, one_line, question_text
from rewards import ACCURACY, extract_answer, parse_number

FIELDS = {"problem_id": str | int, "problem": str, "solution": str, "path": str, "options": list}
KNOWN = {"data_type": ("video", "image"), "problem_type": tuple(ACCURACY)}
NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?([eE][-+]?\d+)?")
CONTROL = re.compile(r"<\|\w+\|>")           # how special tokens look


def read_json(path: str | Path) -> list:
    """The rows of a JSON list, of JSON lines or of one object with "results": [..], as Video-R1's
    evaluation writes it; BadRecord names the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()   # drops a byte-order mark
        if text.startswith("{"):
            first, end = json.JSONDecoder().raw_decode(text)
            if end == len(text) and isinstance(first.get("results"), list):
                return first["results"]
        if not text.startswith("["):
            text = "[" + re.sub(r"\n\s*", ",\n", text) + "]"
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: not valid JSON, as a list or in lines: {error}") from None


def check_record(row: object, index: int) -> dict:
    """A copy of the row with "row" (0-based) and "options" (a list); BadRecord if unusable."""
    if not isinstance(row, dict):
        raise BadRecord(f"row {index}: not an object but {type(row).__name__}")
    record = {**row, "row": index, "options": row.get("options") or []}
    if record.get("problem_id") is None:
        record["problem_id"] = index
    if fault := fault_of(record):
        raise BadRecord(f"{name_of(record)}: {fault}")
    return record


def fault_of(record: dict) -> str | None:
    """Why a record cannot be used; None if it can."""
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind) or not str(record[key]).strip():
            return f"{key!r} is missing, empty or of another type"
    for key, known in KNOWN.items():
        if record.get(key) not in known:
            return f"unknown {key} {one_line(record.get(key), 80)}; known: {', '.join(known)}"
    options, path = record["options"], os.path.normpath(record["path"])
    if not all(isinstance(option, str) for option in options):
        return "options are not all texts"
    if record["problem_type"] == "multiple choice" and not 2 <= len(options) <= 26:
        return f"a multiple choice question with {len(options)} options, not 2 to 26"
    if not extract_answer(record["solution"]):
        return "the solution holds no <answer>..</answer>"
    if "\0" in path or os.path.isabs(path) or path.split(os.sep)[0] == "..":
        return f"path {one_line(path, 80)} leaves the data folder"
    if not isinstance(record.get("whole_prompt", ""), str):
        return "whole_prompt is not text"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return "a text with half a character (a lone surrogate), or lists nested too deep"


def useless(record: dict) -> str | None:
    """Why training learns nothing from a record that can be read: its question holds what looks
    like a special token, or no answer in the form that is asked for can be right, so that all of a
    group earn the same. (From "A, B" a rule that gives part credit does learn.) None if it does."""
    value, kind, fault = extract_answer(record["solution"]), record["problem_type"], None
    letters, control = list(by_letter(record["options"])), CONTROL.search(question_text(record))
    number = NUMBER.fullmatch(value) and math.isfinite(parse_number(value))
    if control:
        fault, value = "the question holds a control token", control[0]
    elif kind == "multiple choice" and value not in letters:
        fault = f"the truth is not one letter from A to {letters[-1]}"
    elif kind in ("numerical", "regression") and not number:
        fault = "the truth is not one number"
    elif kind == "free-form" and not re.search("[a-z0-9]", value.lower()):
        fault = "the truth has no Latin letter or digit, and ROUGE counts no others"
    return fault and f"{name_of(record)}: {fault}: {one_line(repr(value), 80)}"


def read_records(path: str | Path, leave_out: str | Path | None = None) -> tuple[list, list[str]]:
    """The usable records of a file, and a line for each malformed one. leave_out is a list that
    `data.py check` wrote: an entry leaves out the row that it names, or all records of its path.
    BadRecord if a file is not JSON, or holds no rows."""
    rows, listed = read_json(path), read_json(leave_out) if leave_out else []
    if not rows:
        raise BadRecord(f"{path}: holds no records")
    if not all(isinstance(item, dict) and "path" in item for item in listed):
        raise BadRecord(f"{leave_out}: not a list written by `python data.py check`")
    listed = {(str(item.get("row")), str(item["path"])) for item in listed}
    records, wrong = [], []
    for index, row in enumerate(rows):
        try:
            record = check_record(row, index)
            if listed.isdisjoint({("None", record["path"]), (str(index), record["path"])}):
                records.append(record)
        except BadRecord as error:
            wrong.append(str(error))
    return records, wrong
