"""Answers and rewards: how a completion is parsed and what it earns.

R = accuracy + format + length bonus. The rules are those of Video-R1's reward functions (grpo.py there),
because the cold-start checkpoint and the paper's scores were made with them. Strings in, floats out; the
evaluator shares this file, and its lenient parser stands at the end.
"""

import re
from functools import lru_cache

import torch
from torch import Tensor

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(text: str) -> str:
    """The text of the first `<answer>..</answer>`, stripped; "" where there is none.

    In training the first block counts, also when it stands inside the reasoning (as in Video-R1).
    """
    match = ANSWER.search(text)
    return match.group(1).strip() if match else ""


def parse_number(text: str) -> float | None:
    """'1,234.5' -> 1234.5; None where the whole text is not one finite number."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if abs(value) != float("inf") and value == value else None


def same_number(answer: str, truth: str) -> bool:
    """Video-R1's strict rule: both or neither written with a point or comma, and equal at 2 decimals."""
    if any(c in answer for c in ".,") != any(c in truth for c in ".,"):
        return False
    a, b = parse_number(answer), parse_number(truth)
    return a is not None and b is not None and round(a, 2) == round(b, 2)


def word_error_rate(truth: str, answer: str) -> float:
    """Levenshtein distance between the word lists, over the number of words in `truth`."""
    reference, hypothesis = truth.split(), answer.split()
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1] / max(1, len(reference))


@lru_cache(maxsize=1)
def rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # the package behind the published free-form rewards
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def accuracy_reward(completion: str, solution: str, problem_type: str) -> float:
    """How right the answer is, in [0, 1]. A completion without answer tags earns 0.

    multiple choice: the exact letter.  numerical: `same_number`.  OCR: 1 - word error rate.
    free-form: mean F1 of ROUGE-1, -2, -L with stemming.  regression: 1 - relative error.
    Raises ValueError for an unknown problem_type.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
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
        return sum(score.fmeasure for score in rouge_scorer().score(truth, answer).values()) / 3
    a, b = parse_number(answer), parse_number(truth)
    if a is None or b is None:
        return 0.0
    return 1.0 - min(1.0, (abs(a - b) + 1e-9) / (abs(b) + 1e-9))


def format_reward(completion: str, pattern='strict') -> float:
    """1 if the whole completion is one `<think>..</think>` and then one `<answer>..</answer>`, else 0."""
    whole = FORMAT.fullmatch(completion) is not None
    return float(whole and all(completion.count(tag) == 1 for tag in TAGS))


def length_bonus(accuracy: Tensor, lengths: Tensor, low: int = 320, high: int = 512,
                 bonus: float = 0.2) -> Tensor:
    """(G,) bonus for correct completions of low..high tokens, if more than one of the group is correct.

    Correct means an accuracy reward above 0.1, the released code's threshold (it matters only for graded
    answers). `lengths` (G,) counts each completion's tokens up to and with its end token.
    """
    correct = accuracy > 0.1
    earned = correct & (lengths >= low) & (lengths <= high) & (correct.sum() > 1)
    return bonus * earned.to(torch.float32)


# --------------------------------------------------------------------------------- evaluation only
LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:,]*")                    # B  b  (B)  B.  [B]
LETTERED_TEXT = re.compile(r"[(\[]?([A-Z](?=[)\].:]|\s+-\s)|[a-z](?=[)\]]))\W+\S.*", re.DOTALL)       # B. the text of B, b) .., B - ..
ANSWER_IS = re.compile(r"(?i)answer is")
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([^{}]*?)\s*\}")
STATED = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\**[(\[]?([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")    # the answer is B
QUANTITY = re.compile(r"(?<![A-Za-z_^])(?<!\^-)(?:[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+)")


def final_words(output: str) -> str:
    """What a lenient reader takes as the answer: the last `<answer>` block, or all that follows the reasoning."""
    blocks = ANSWER.findall(output)
    return blocks[-1].strip() if blocks else output.split("</think>")[-1].strip()


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"^[(\[]?[A-Z][)\].:]\s*", "", text.strip())).strip(" .\"'").lower()


def lenient_choice(output: str, options: list[str]) -> str | None:
    """The letter that an output chooses, or None. In this order: a boxed answer; a letter alone, in any brackets; a letter
    with the text after it; the text of exactly one option; the last "answer is B". A letter inside a word never
    counts, nor the article "a"."""
    text = final_words(output)
    boxed = BOXED.findall(text)
    text = boxed[-1] if boxed else text.strip("*` ")
    known = [chr(65 + i) for i in range(len(options))] or [chr(65 + i) for i in range(26)]
    match = LONE_LETTER.fullmatch(text) or (None if ANSWER_IS.search(text) else LETTERED_TEXT.fullmatch(text))
    letter = match.group(1).upper() if match else None
    if letter is None:
        same = [known[i] for i, option in enumerate(options) if plain(option) and plain(option) == plain(text)]
        stated = STATED.findall(text)
        letter = same[0] if len(same) == 1 else stated[-1] if stated else None
    return letter if letter in known else None


def lenient_number(output: str) -> float | None:
    """The one number of the answer, without units and thousands separators; None if there is none or more than one."""
    text = final_words(output)
    found = QUANTITY.findall((BOXED.findall(text) or [text])[-1])
    values = {float(x.replace(",", "")) for x in found}
    return values.pop() if len(values) == 1 else None


def relative_accuracy(value: float | None, truth: float | None) -> float:
    """VSI-Bench's mean relative accuracy: the share of thresholds 0.50, 0.55 .. 0.95 with |value - truth| / |truth| < 1 - threshold."""
    if value is None or truth is None:
        return 0.0
    return 1.0 if value == truth else sum(100 * abs(value - truth) < percent * abs(truth) for percent in range(50, 0, -5)) / 10


def grade(output: str, solution: str, problem_type: str, options: list[str]) -> tuple[float, float, bool]:
    """(strict, lenient, parsed) score of one output.

    Strict is Video-R1's evaluation: the text of the first `<answer>`, or the whole output if there is none, must equal the
    letter, or the number under `same_number`. Lenient reads what a person would. Regression is graded by
    `relative_accuracy`, OCR and free-form text as in training.
    """
    truth = extract_answer(solution) or solution.strip()
    said = extract_answer(output) or output.strip()
    if problem_type == "multiple choice":
        letter = lenient_choice(output, options)
        return float(said == truth), float(letter == truth), letter is not None
    if problem_type in ("numerical", "regression"):
        value, right = lenient_number(output), parse_number(truth)
        if problem_type == "regression":
            return relative_accuracy(parse_number(said), right), relative_accuracy(value, right), value is not None
        lenient = value is not None and right is not None and round(value, 2) == round(right, 2)
        return float(same_number(said, truth)), float(lenient), value is not None
    first, last = (f"<answer>{text}</answer>" for text in (said, final_words(output)))
    return accuracy_reward(first, solution, problem_type), accuracy_reward(last, solution, problem_type), bool(final_words(output))
