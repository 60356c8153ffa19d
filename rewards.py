"""Answers and rewards: how a completion is parsed and what it earns.

R = accuracy + format + length bonus. The rules are those of Video-R1's reward functions (its
grpo.py), because the cold-start checkpoint and the paper's scores were made with them. Strings in,
floats out. Benchmarks are scored by the same rules, and by lenient ones (lab/grading.py).
"""

import math
import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor

SEAM = re.compile(r"</think>\s*<answer>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def answers(text: str) -> list[str]:
    """What stands in each `<answer>..</answer>`, stripped."""
    blocks = text.split("</answer>")[:-1]               # <answer>\s*(.*?)\s* takes cubic time
    return [block.split("<answer>", 1)[1].strip() for block in blocks if "<answer>" in block]


def extract_answer(text: str) -> str:
    """The text of the first `<answer>..</answer>`, even inside the reasoning (Video-R1), or ""."""
    return (answers(text) or [""])[0]


def parse_number(text: str) -> float:
    """'1,234.5' -> 1234.5; NaN, which equals nothing, where the whole text is not one number."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan


def same_number(answer: str, truth: str) -> bool:
    """Equal at 2 decimals, and both or neither written with a point or a comma."""
    alike = bool(re.search("[.,]", answer)) == bool(re.search("[.,]", truth))
    return alike and round(parse_number(answer), 2) == round(parse_number(truth), 2)


def word_accuracy(answer: str, truth: str) -> float:
    """1 - word error rate, at least 0: Levenshtein distance over the number of words in `truth`."""
    said, right = answer.split(), truth.split()
    if len(said) >= 2 * max(1, len(right)):             # each word too many is an error
        return 0.0
    errors = list(range(len(right) + 1))                # of no words, against the first j
    for word in said:
        diagonal, errors[0] = errors[0], errors[0] + 1
        for j, wanted in enumerate(right, 1):
            best = min(errors[j] + 1, errors[j - 1] + 1, diagonal + (word != wanted))
            diagonal, errors[j] = errors[j], best
    return max(0.0, 1 - errors[-1] / max(1, len(right)))


def rouge(answer: str, truth: str) -> float:
    """Mean F1 of ROUGE-1, -2 and -L, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, seldom needed
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return sum(score.fmeasure for score in scorer.score(truth, answer).values()) / 3


def closeness(answer: str, truth: str) -> float:
    """1 - relative error, at least 0."""
    a, b = parse_number(answer), parse_number(truth)
    if a == b:                                              # 0 and 0 too: 1e-9 / 1e-9 would be 1
        return 1.0
    error = (abs(a - b) + 1e-9) / (abs(b) + 1e-9)
    return 1.0 - error if error < 1 else 0.0                # also where it is NaN


ACCURACY = {"multiple choice": operator.eq, "numerical": same_number, "OCR": word_accuracy,
            "free-form": rouge, "regression": closeness}


def accuracy_reward(completion: str, solution: str, problem_type: str) -> float:
    """How right the answer is, in [0, 1], by the problem type's function of ACCURACY. A completion
    without answer tags earns 0. Raises ValueError for an unknown problem_type."""
    if problem_type not in ACCURACY:
        raise ValueError(f"unknown problem_type {problem_type!r}; known: {', '.join(ACCURACY)}")
    answer, truth = extract_answer(completion), extract_answer(solution) or solution.strip()
    return float(ACCURACY[problem_type](answer, truth)) if answer else 0.0


def format_reward(completion: str, pattern: str = "strict") -> float:
    """1 if the whole completion is `<think>..</think><answer>..</answer>`, else 0. strict: one
    block of each; released: the authors' pattern, which lets further blocks pass."""
    if pattern not in ("strict", "released"):
        raise ValueError(f"unknown format pattern {pattern!r}; known: strict, released")
    whole = completion.startswith("<think>") and completion.endswith("</answer>")
    single = all(completion.count(tag) == 1 for tag in TAGS)
    seam = SEAM.search(completion)
    return float(whole and seam is not None and (single or pattern == "released"))


def length_bonus(accuracy: Tensor, lengths: Tensor, low: int = 320, high: int = 512,
                 bonus: float = 0.2) -> Tensor:
    """(G,) bonus for correct completions of low..high tokens, if more than one is correct. Correct
    means an accuracy reward above 0.1, the released code's threshold (it matters only for graded
    answers). `lengths` (G,): each completion's tokens, its end token included."""
    correct = accuracy > 0.1
    earned = correct & (lengths >= low) & (lengths <= high) & (correct.sum() > 1)
    return bonus * earned.to(torch.float32)


# a rule's: (rollouts, o, model, texts(group) -> list) -> a reward (G,) for each rollout, on the CPU
EXTRA_REWARDS: dict[str, Callable] = {
    "none": lambda rollouts, o, model, texts: [torch.zeros_like(r.accuracy) for r in rollouts]}
