"""Answers and rewards: how a completion is parsed and what it earns.

R = accuracy + format + length bonus. The rules are those of Video-R1's reward functions (its
grpo.py), because the cold-start checkpoint and the paper's scores were made with them. Strings in,
floats out; the evaluator shares this file, and its lenient parser stands at the end.
"""

import math
import re
from string import ascii_uppercase

import torch
from torch import Tensor

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(text: str) -> str:
    """The text of the first `<answer>..</answer>` (Video-R1: also inside the reasoning), or ""."""
    match = ANSWER.search(text)
    return match.group(1).strip() if match else ""


def parse_number(text: str) -> float | None:
    """'1,234.5' -> 1234.5; None where the whole text is not one finite number."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def equal(a: float | None, b: float | None) -> bool:
    """Two numbers, both there and equal at 2 decimals."""
    return a is not None and b is not None and round(a, 2) == round(b, 2)


def same_number(answer: str, truth: str) -> bool:
    """Video-R1's strict rule: `equal`, and both or neither written with a point or a comma."""
    alike = bool(re.search("[.,]", answer)) == bool(re.search("[.,]", truth))
    return alike and equal(parse_number(answer), parse_number(truth))


def word_error_rate(truth: str, answer: str) -> float:
    """Levenshtein distance between the word lists, over the number of words in `truth`."""
    reference, hypothesis = truth.split(), answer.split()
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            best = min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
            previous, row[j] = row[j], best
    return row[-1] / max(1, len(reference))


def accuracy_reward(completion: str, solution: str, problem_type: str) -> float:
    """How right the answer is, in [0, 1]. A completion without answer tags earns 0.

    multiple choice: the exact letter.  numerical: `same_number`.  OCR: 1 - word error rate.
    free-form: mean F1 of ROUGE-1, -2, -L with stemming.  regression: 1 - relative error.
    Raises ValueError for an unknown problem_type.
    """
    if problem_type not in PROBLEM_TYPES:
        known = ", ".join(PROBLEM_TYPES)
        raise ValueError(f"unknown problem_type {problem_type!r}; known: {known}")
    answer, truth = extract_answer(completion), extract_answer(solution) or solution.strip()
    if not answer:
        return 0.0
    if problem_type == "multiple choice":
        return float(answer == truth)
    if problem_type == "numerical":
        return float(same_number(answer, truth))
    if problem_type == "OCR":
        return max(0.0, 1.0 - word_error_rate(truth, answer))
    if problem_type == "free-form":
        from rouge_score.rouge_scorer import RougeScorer    # slow to import, seldom needed
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        return sum(score.fmeasure for score in scorer.score(truth, answer).values()) / 3
    a, b = parse_number(answer), parse_number(truth)
    if a is None or b is None:
        return 0.0
    return 1.0 - min(1.0, (abs(a - b) + 1e-9) / (abs(b) + 1e-9))


def format_reward(completion: str, pattern: str = "strict") -> float:
    """1 if the whole completion is `<think>..</think><answer>..</answer>`, else 0. strict: one
    block of each; released: the authors' pattern, which lets further blocks pass."""
    if pattern not in ("strict", "released"):
        raise ValueError(f"unknown format pattern {pattern!r}; known: strict, released")
    if FORMAT.fullmatch(completion) is None:
        return 0.0
    single = all(completion.count(tag) == 1 for tag in TAGS)
    return float(single or pattern == "released")


def length_bonus(accuracy: Tensor, lengths: Tensor, low: int = 320, high: int = 512,
                 bonus: float = 0.2) -> Tensor:
    """(G,) bonus for correct completions of low..high tokens, if more than one is correct. Correct
    means an accuracy reward above 0.1, the released code's threshold (it matters only for graded
    answers). `lengths` (G,) counts each completion's tokens, its end token included."""
    correct = accuracy > 0.1
    earned = correct & (lengths >= low) & (lengths <= high) & (correct.sum() > 1)
    return bonus * earned.to(torch.float32)


# --------------------------------------------------------------------------------- evaluation only
LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:,]*")       # B  b  (B)  B.  [B]
LETTERED_TEXT = re.compile(                                      # B. its text  b) its text  B - ..
    r"(?!.*(?i:answer is))[(\[]?([A-Z](?=[)\].:]|\s+-\s)|[a-z](?=[)\]]))\W+\S.*", re.DOTALL)
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([^{}]*?)\s*\}")
STATED = re.compile(                                             # the answer is B
    r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\**[(\[]?([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")
QUANTITY = re.compile(
    r"(?<![A-Za-z_^])(?<!\^-)(?:[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+)")


def final_words(output: str) -> str:
    """What a lenient reader takes as the answer: the last block, or what follows the reasoning; of
    that what is boxed, if anything is."""
    blocks = ANSWER.findall(output) or output.split("</think>")
    return (BOXED.findall(blocks[-1]) or blocks)[-1].strip()


def plain(text: str) -> str:
    """Lower case, single spaces, without an option's letter before it or a point after it."""
    text = re.sub(r"^[(\[]?[A-Z][)\].:]\s*", "", text.strip())
    return re.sub(r"\s+", " ", text).strip(" .\"'").lower()


def lenient_choice(output: str, options: list[str]) -> str | None:
    """The letter that an output chooses, or None. In this order: a boxed answer; a letter alone, in
    any brackets; a letter with the text after it; the text of exactly one option; the last "answer
    is B". A letter inside a word never counts, nor the article "a"."""
    text, known = final_words(output).strip("*` "), ascii_uppercase[:len(options) or 26]
    first = LONE_LETTER.fullmatch(text) or LETTERED_TEXT.fullmatch(text)
    same = [letter for letter, option in zip(known, options) if plain(option) == plain(text) != ""]
    said = [first.group(1).upper()] if first else same if len(same) == 1 else STATED.findall(text)
    return said[-1] if said and said[-1] in known else None


def lenient_number(output: str) -> float | None:
    """The one number of the answer, without units and separators; None if none or several."""
    values = {float(x.replace(",", "")) for x in QUANTITY.findall(final_words(output))}
    return values.pop() if len(values) == 1 else None


def relative_accuracy(value: float | None, truth: float | None) -> float:
    """VSI-Bench's: the share of t = 0.50, 0.55 .. 0.95 with |value - truth| / |truth| < 1 - t."""
    if value is None or truth is None or value == truth:
        return float(value is not None and value == truth)
    error, size = 100 * abs(value - truth), abs(truth)
    return sum(error < percent * size for percent in range(50, 0, -5)) / 10


def grade(output: str, solution: str, problem_type: str,
          options: list[str]) -> tuple[float, float, bool]:
    """(strict, lenient, parsed) score of one output. Strict is Video-R1's evaluation: the text of
    the first `<answer>`, or the whole output if there is none, must equal the letter, or the number
    under `same_number`. Lenient reads what a person would. Regression is graded by
    `relative_accuracy`, OCR and free-form text as in training."""
    truth = extract_answer(solution) or solution.strip()
    said = extract_answer(output) or output.strip()
    if problem_type == "multiple choice":
        read = lenient_choice(output, options)
        strict, lenient = said == truth, read == truth
    elif problem_type == "numerical":
        read = lenient_number(output)
        strict, lenient = same_number(said, truth), equal(read, parse_number(truth))
    elif problem_type == "regression":
        read, right = lenient_number(output), parse_number(truth)
        strict = relative_accuracy(parse_number(said), right)
        lenient = relative_accuracy(read, right)
    else:
        read = final_words(output) or None
        strict = accuracy_reward(f"<answer>{said}</answer>", solution, problem_type)
        lenient = accuracy_reward(f"<answer>{read or ''}</answer>", solution, problem_type)
    return float(strict), float(lenient), read is not None
