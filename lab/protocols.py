"""Protocols: known ways of measuring (benchmarks.json); a benchmark's questions in their words."""

import json
from pathlib import Path

from prompt import QUESTION_EVAL, by_letter, question_text
from records import check_record, read_json

FACTS = json.loads(Path(__file__).parent.with_name("benchmarks.json").read_text("utf-8"))
PROTOCOLS, BENCHMARKS = FACTS["protocols"], FACTS["benchmarks"]


def with_prompt(record: dict, protocol: str, benchmark: str) -> dict:
    """The record with "whole_prompt": what the protocol asks, in its words for the benchmark."""
    by_benchmark = PROTOCOLS[protocol]["prompts"]
    name = by_benchmark.get(benchmark, by_benchmark["default"])
    if name == "prompt.py":
        return {**record, "whole_prompt": question_text(record, QUESTION_EVAL)}
    words = FACTS["prompts"][name]
    options = [words["option"].format(letter=letter, text=text)
               for letter, text in by_letter(record["options"]).items()]
    question = record["problem"].strip().removesuffix("Options:").strip()
    template = words["text"] if options else words.get("without_options", words["text"])
    prompt = template.format(question=question, options=words["between"].join(options))
    return {**record, "whole_prompt": prompt}


def read_questions(path: str, protocol: str, benchmark: str) -> list[dict]:
    """The rows of a list, with their prompts. BadRecord for a bad row: none may be left out."""
    return [with_prompt(check_record(row, index), protocol, benchmark)
            for index, row in enumerate(read_json(path))]
