"""Video-Holmes' own annotation file in Video-R1's form, as evaluate.py reads it.

    python -m lab.holmes test_Video-Holmes.json eval_video-holmes.json
    python evaluate.py --benchmark video-holmes --data eval_video-holmes.json ...
"""

import json
import sys
from pathlib import Path


def converted(row: dict) -> dict:
    options = [f"{letter}. {text}" for letter, text in row["Options"].items()]
    return {**row, "problem_id": f"{row['video ID']}/{row['Question ID']}", "data_type": "video",
            "problem": row["Question"], "problem_type": "multiple choice", "options": options,
            "solution": f"<answer>{row['Answer']}</answer>", "path": f"{row['video ID']}.mp4"}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    rows = json.loads(Path(sys.argv[1]).read_text("utf-8-sig"))
    Path(sys.argv[2]).write_text(json.dumps([converted(row) for row in rows], indent=1))
