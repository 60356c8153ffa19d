import re
import signal
from contextlib import contextmanager, suppress
from random import Random

import pytest
import torch

from data import BadRecord, check_record, read_json
from lab.rules import tw_grpo
from prompt import question_text
from rewards import (accuracy_reward, extract_answer, format_reward, grade, length_bonus,
                     lenient_choice, lenient_number, relative_accuracy, word_accuracy)


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
          "\\text{", "The answer is", "option", "choice is", *"AIbz'_019", "1,234", "A, ", "A. "]


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
            limited(grade, completion, asked, kind, [text, "b"])
        limited(accuracy_reward, completion, asked, "free-form", seconds=1)     # stems each word
    limited(question_text, record)
    limited(tw_grpo.part_right, text, asked)
    limited(tw_grpo.SEVERAL.fullmatch, text)
    for parser, *given in ((check_record, record, 0), (read_json, path)):
        with suppress(BadRecord):
            limited(parser, *given)


def test_a_pattern_can_be_stopped():
    with pytest.raises(TimeoutError), cpu_limit(0.1):
        re.search(r"<answer>\s*(.*?)\s*</answer>", "<answer>" + "\n" * 3000, re.DOTALL)


@pytest.mark.parametrize("head, unit", [
    ("<answer>", "\n"), ("\\boxed{", " "), ("\\boxed{\\text{", " "), ("The answer is", " "),
    ("The answer is", " ("), ("", "<answer>"), ("<think>", "</think>"), ("<think>", "</think> "),
    ("", "\\boxed{"), ("B", " "), ("A", "  A")])
def test_a_long_text_takes_no_time(head, unit, tmp_path):
    text = head + unit * (LONG // len(unit))
    for tail in ("", "9", "</answer>"):
        parse_all(text + tail, tmp_path)


def test_no_mixture_takes_time(tmp_path):
    """A few pieces, then one to three others again and again, then a few; or all in any order."""
    rng = Random(0)
    for i in range(60):
        head, unit, tail = (rng.choices(PIECES, k=rng.randint(1, 3)) for _ in range(3))
        if i % 4 == 0:
            unit = rng.choices(PIECES, k=LONG)
        middle = "".join(unit)
        text = "".join(head) + middle * (LONG // len(middle)) + "".join(tail)
        parse_all(text[:LONG] + "".join(tail), tmp_path)


OPTIONS = ["A. Cats sleep", "B. Dogs run", "C. Fish swim", "D. a"]


@pytest.mark.parametrize("output, letter", [
    ("<answer>B</answer>", "B"), ("<answer>B.</answer>", "B"), ("<answer>(B)</answer>", "B"),
    ("<answer>b</answer>", "B"),
    ("<answer>[B]</answer>", "B"), ("<answer>B)</answer>", "B"), ("<answer>**B**</answer>", "B"),
    ("<answer> B </answer>", "B"),
    (r"<answer>\boxed{B}</answer>", "B"), (r"The result is \boxed{\text{B}}.", "B"),
    (r"\boxed{A} no, \boxed{B}", "B"),
    ("<answer>B. Dogs run</answer>", "B"), ("<answer>B: Dogs run</answer>", "B"),
    ("<answer>(B) Dogs run fast</answer>", "B"),
    ("<answer>Dogs run</answer>", "B"), ("<answer>dogs run.</answer>", "B"),
    ("The answer is B", "B"), ("the answer is (B).", "B"), ("Answer: B", "B"),
    ("I choose option B", "B"),
    ("b) Dogs run", "B"), ("B - Dogs run", "B"),
    ("A. is wrong because cats sleep; the answer is B", "B"),
    ("The answer is A. No, the answer is B.", "B"),
    ("<answer>The correct option is B</answer>", "B"),
    ("<answer>A</answer> wait, <answer>B</answer>", "B"), ("<think>perhaps A</think>B", "B"),
    ("<think><answer>A</answer>?</think><answer>B</answer>", "B"),
    ("<answer>Candles</answer>", ""), ("<answer>a dog</answer>", ""),
    ("The answer is a dog", ""),
    ("The answer is A dog", ""), ("<answer>E</answer>", ""), ("<answer></answer>", ""),
    ("", ""),
    ("<answer>A and B</answer>", ""), ("Because of this I think so", ""),
    ("<answer>Bees</answer>", ""),
    ("A man walks a dog", ""), ("<answer>12</answer>", ""), ("Band A played", ""),
])
def test_lenient_choice(output, letter):
    assert lenient_choice(output, OPTIONS) == letter


def test_lenient_choice_without_options_or_with_repeated_ones():
    assert lenient_choice("<answer>(g)</answer>", []) == "G"
    # the text does not decide
    assert lenient_choice("<answer>same</answer>", ["A. same", "B. same"]) == ""


@pytest.mark.parametrize("output, number", [
    ("<answer>3.50 m</answer>", 3.5), ("<answer>1,234</answer>", 1234),
    ("<answer>$1,234.50</answer>", 1234.5),
    ("<answer>-3</answer>", -3), ("<answer>50%</answer>", 50), ("<answer>.5</answer>", 0.5),
    ("It is 7", 7),
    ("<answer>5 m^2</answer>", 5), ("<answer>5 m2</answer>", 5), ("<answer>3 s^-1</answer>", 3),
    ("<answer>12 or 13</answer>", ""), ("<answer>twelve</answer>", ""),
    ("<answer>7 is 7.0</answer>", 7),
    (r"<answer>2 + 2 = \boxed{4}</answer>", 4), ("<think>1 2 3</think>4", 4),
])
def test_lenient_number(output, number):
    read = lenient_number(output)
    assert (read and float(read)) == number


def test_relative_accuracy_counts_thresholds():
    assert relative_accuracy("10", "10") == 1.0
    # error 0.1 < 0.5, 0.45 .. 0.15, not < 0.1, 0.05
    assert relative_accuracy("11", "10") == pytest.approx(0.8)
    assert relative_accuracy("16", "10") == 0.0 and relative_accuracy("", "10") == 0.0


@pytest.mark.parametrize("output, solution, kind, strict, lenient, parsed", [
    ("<answer>B</answer>", "<answer>B</answer>", "multiple choice", 1, 1, True),
    ("B", "<answer>B</answer>", "multiple choice", 1, 1, True),  # no tags: the whole output
    ("<answer>B.</answer>", "<answer>B</answer>", "multiple choice", 0, 1, True),
    ("<answer>A</answer><answer>B</answer>", "<answer>B</answer>", "multiple choice", 0, 1, True),
    ("<answer>A</answer><answer>B</answer>", "<answer>A</answer>", "multiple choice", 1, 0, True),
    ("no idea", "<answer>B</answer>", "multiple choice", 0, 0, False),
    ("<answer>3.5 m</answer>", "<answer>3.50</answer>", "numerical", 0, 1, True),
    ("<answer>3</answer>", "<answer>3.0</answer>", "numerical", 0, 1, True),
    ("<answer>9 m</answer>", "<answer>10</answer>", "regression", 0, 0.8, True),
    ("<answer>the red car</answer>", "<answer>the red car</answer>", "OCR", 1, 1, True),
])
def test_grade(output, solution, kind, strict, lenient, parsed):
    expected = (pytest.approx(strict), pytest.approx(lenient), parsed)
    assert grade(output, solution, kind, OPTIONS) == expected
