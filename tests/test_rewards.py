import re
import signal
from contextlib import contextmanager, suppress
from random import Random

import pytest
import torch
from nltk import edit_distance

from data import BadRecord, check_record, read_json, useless
from lab.grading import grade
from lab.rules import soft_reward
from prompt import question_text
from rewards import accuracy_reward, extract_answer, format_reward, length_bonus, word_accuracy


def tagged(text):
    return f"<think>hm</think><answer>{text}</answer>"


@pytest.mark.parametrize("text, answer", [
    ("<think>x</think><answer>B</answer>", "B"),
    ("<answer>\n B \n</answer>", "B"),
    ("<answer>A</answer> or <answer>B</answer>", "A"),                      # the first counts
    ("<think>so <answer>A</answer>?</think><answer>B</answer>", "A"),  # also inside the reasoning
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("no tags: B", ""), ("<answer>B", ""), ("", ""),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("kind, answer, solution, reward", [
    ("multiple choice", "B", "B", 1.0), ("multiple choice", " B ", "B", 1.0),
    ("multiple choice", "B.", "B", 0.0),
    ("multiple choice", "b", "B", 0.0), ("multiple choice", "C", "B", 0.0),
    ("numerical", "3.50", "3.5", 1.0), ("numerical", "3", "3.0", 0.0), ("numerical", "3", "3", 1.0),
    ("numerical", "1,234", "1234.00", 1.0), ("numerical", "1234", "1,234", 0.0),
    ("numerical", "3.141", "3.142", 1.0),
    ("numerical", "3.15", "3.14", 0.0), ("numerical", "three", "3", 0.0),
    ("numerical", "nan", "3", 0.0),
    ("OCR", "the red car", "the red car", 1.0), ("OCR", "the blue car", "the red car", 2 / 3),
    ("OCR", "a b c d e f", "red", 0.0), ("OCR", "the car", "the red car", 2 / 3),
    ("free-form", "the cat sat", "the cat sat", 1.0), ("free-form", "dogs", "the cat sat", 0.0),
    ("regression", "9", "10", 0.9), ("regression", "10", "10", 1.0),
    ("regression", "25", "10", 0.0),
    ("regression", "1,000", "1000", 1.0), ("regression", "ten", "10", 0.0),
    ("regression", "0", "0", 1.0), ("regression", "0.0", "0", 1.0), ("regression", "-0", "0", 1.0),
    ("regression", "1e-9", "1e-9", 1.0), ("regression", "0.01", "0", 0.0),
    ("regression", "nan", "0", 0.0), ("regression", "", "0", 0.0),
])
def test_accuracy(kind, answer, solution, reward):
    got = accuracy_reward(tagged(answer), f"<answer>{solution}</answer>", kind)
    assert got == pytest.approx(reward, abs=1e-6)


def test_free_form_is_the_mean_of_three_rouge_scores():
    # "a b" against "a c": ROUGE-1 F1 1/2, ROUGE-2 F1 0, ROUGE-L F1 1/2
    got = accuracy_reward(tagged("alpha beta"), "<answer>alpha gamma</answer>", "free-form")
    assert got == pytest.approx(1 / 3)
    got = accuracy_reward(tagged("running cats"), "<answer>run cat</answer>", "free-form")
    assert got == pytest.approx(1.0)                            # stemming


def test_no_tags_earn_nothing_and_unknown_types_fail():
    for kind in ("multiple choice", "numerical", "OCR", "free-form", "regression"):
        assert accuracy_reward("B", "<answer>B</answer>", kind) == 0.0
    with pytest.raises(ValueError, match="essay"):
        accuracy_reward(tagged("B"), "<answer>B</answer>", "essay")


def test_word_error_rate_by_hand():
    assert word_accuracy("a b c", "a b c") == 1
    assert word_accuracy("a x c", "a b c d") == 0.5             # one substitution, one deletion
    assert word_accuracy("a b c", "a") == 0                     # an error rate of 2
    assert word_accuracy("a", "") == 0
    assert word_accuracy("a c d e", "a b c d") == 0.5           # b is missing, e is too many
    assert word_accuracy("x a b c y z", "a b c d") == 0.25      # x and z too many, y for d
    assert word_accuracy("a " * 5000, "a b") == 0               # nltk refuses more than 2,000 words
    rng = Random(1)
    for _ in range(300):
        said, right = (rng.choices("abc", k=rng.randint(1, 9)) for _ in range(2))
        wanted = max(0, 1 - edit_distance(said, right) / len(right))
        assert word_accuracy(" ".join(said), " ".join(right)) == wanted


@pytest.mark.parametrize("text, strict, released", [
    ("<think>a</think><answer>B</answer>", 1, 1),
    ("<think>a</think>\n <answer>B</answer>", 1, 1),
    ("<think>a\nb</think><answer></answer>", 1, 1),
    ("<think>a</think>B<answer>B</answer>", 0, 0),
    ("<answer>B</answer>", 0, 0), ("<think>a</think>", 0, 0), ("", 0, 0),
    ("x<think>a</think><answer>B</answer>", 0, 0),
    ("<think>a</think><answer>B</answer>x", 0, 0),
    ("<think>a</think><answer>B</answer><answer>C</answer>", 0, 1),  # .*? runs on to the last tag
    ("<think>a <answer>B</answer></think><answer>C</answer>", 0, 1),
    ("<think>a</think>b</think><answer>B</answer>", 0, 1),
])
def test_format(text, strict, released):
    assert format_reward(text) == format_reward(text, pattern="strict") == strict
    assert format_reward(text, pattern="released") == released


def test_an_unknown_format_pattern_fails():
    with pytest.raises(ValueError, match="loose.*known: strict, released"):
        format_reward("", pattern="loose")


def test_length_bonus():
    accuracy = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    lengths = torch.tensor([320, 512, 513, 400, 319])
    assert torch.allclose(length_bonus(accuracy, lengths), torch.tensor([0.2, 0.2, 0, 0, 0]))
    lone = length_bonus(torch.tensor([1.0, 0.0]), torch.tensor([400, 400]))
    assert (lone == 0).all()                                    # only one is correct
    graded = length_bonus(torch.tensor([0.6, 0.05, 0.3]), torch.tensor([400, 400, 100]))
    assert graded.tolist() == pytest.approx([0.2, 0, 0])


# ------------------------------------------------------------------------------------------- time
LONG = 20000
PIECES = ["<think>", "</think>", "<answer>", "</answer>", *" \n\t\xa0()[]{}.,:;-+*^%/", "\\boxed{",
          "\\text{", "The answer is", "option", "choice is", *"AIbz'_019−½", "1,234", "A, ", "A. ",
          "minus ", " wrong", " is", "1.5e3"]


@contextmanager
def cpu_limit(seconds):
    """Raises in whatever takes longer, a pattern too: they look for signals."""
    def stop(*a):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def parse_all(text, folder):
    """Every parser that a text of a model, or of a record, comes to."""
    def limited(parser, *a, seconds=0.1):
        with cpu_limit(seconds):
            return parser(*a)

    path, asked = folder / "a.json", "<answer>A, C</answer>"
    path.write_text(text)
    record = {"problem": text, "problem_type": "multiple choice", "options": [text, "b"],
              "solution": tagged(text), "path": "a", "data_type": "image", "row": 0}
    for completion in (text, tagged(text)):
        for pattern in ("strict", "released"):
            limited(format_reward, completion, pattern)
        for kind in ("multiple choice", "numerical", "OCR", "regression"):
            limited(accuracy_reward, completion, asked, kind)
            limited(grade, completion, asked, kind, [text, *"bcdefgh"])
    limited(accuracy_reward, tagged(text), asked, "free-form", seconds=1)     # stems words
    limited(question_text, record)
    for kind in ("multiple choice", "numerical", "free-form"):
        limited(useless, {**record, "problem_type": kind})
    limited(soft_reward.part_right, text, asked)
    for parser, *given in ((check_record, record, 0), (read_json, path)):
        with suppress(BadRecord):
            limited(parser, *given)


def test_a_pattern_can_be_stopped():
    with pytest.raises(TimeoutError), cpu_limit(0.1):
        re.search(r"<answer>\s*(.*?)\s*</answer>", "<answer>" + "\n" * 3000, re.DOTALL)


@pytest.mark.parametrize("head, unit", [
    ("<answer>", "\n"), ("\\boxed{", " "), ("\\boxed{\\text{", " "), ("The answer is", " "),
    ("The answer is", " ("), ("", "<answer>"), ("<think>", "</think>"), ("<think>", "</think> "),
    ("", "\\boxed{"), ("B", " "), ("A", "  A"), ("", "9"), ("1", ",234"), ("option C", " is"),
    ("the answer is C", " does"), ("5", " - "), ("It is option B", ")")])
def test_a_long_text_takes_no_time(head, unit, tmp_path):
    text = head + unit * (LONG // len(unit))
    for tail in ("", "9", "</answer>"):
        parse_all(text + tail, tmp_path)


def test_no_mixture_takes_time(tmp_path):
    """A few pieces, then one to three others again and again, then a few; or all in any order."""
    rng = Random(0)
    for i in range(40):
        head, unit, tail = (rng.choices(PIECES, k=rng.randint(1, 3)) for _ in range(3))
        if i % 4 == 0:
            unit = rng.choices(PIECES, k=LONG)
        middle = "".join(unit)
        text = "".join(head) + middle * max(1, LONG // len(middle))
        parse_all(text[:LONG] + "".join(tail), tmp_path)
