import pytest

from lab.grading import grade, lenient_choice, lenient_number, relative_accuracy

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


TRICKY = ["A. Cats sleep", "B. Dogs run", "C. A man walks", "D. (c)(a)(b).", "E. C. elegans",
          "F. H+", "G. .5", "H. 5", "I. none", "J. None", "K. A: 1, B: 2"]


@pytest.mark.parametrize("text, letter", [
    # the text of an option, though it begins like another's letter
    ("A man walks", "C"), ("a man walks.", "C"), ("(c)(a)(b).", "D"), ("(c)(a)(b)", "D"),
    ("C. elegans", "E"), ("H+", "F"), (".5", "G"), ("5", "H"), ("5.", "H"), ("none", "I"),
    ("None.", "J"), ("A: 1, B: 2", "K"), ("Option C", "C"), ("A. Cats sleep", "A"),
    ("C. A man walks", "C"), ("E. C. elegans.", "E"), ("The answer is A man walks.", "C"),
    ("Answer: C. elegans", "E"), ("<answer>The answer: (c)(a)(b)</answer>", "D"),
    # what is stated, not what is said of others after it or before it
    ("B\n\nExplanation: because option C is wrong", "B"), ("**B**\nOption C isn't right", "B"),
    ("Dogs run\n\nExplanation: because option C is wrong", "B"),
    ("B. Dogs run. The other option C is wrong.", "B"), ("Option B. Option C shows a cat", "B"),
    ("The answer is B. Option C is wrong", "B"), ("The answer is B. The answer C is wrong", "B"),
    ("so the answer is A. Wait, the answer is B.", "B"), ("A\n\nWait, the answer is B", "B"),
    ("Answer: B\nThe answer C is tempting but wrong", "B"), ("The answer is B, not C.", "B"),
    ("The answer is option B, since option C is wrong", "B"), ("My choice: B", "B"),
    ("Option C is wrong. Option B is correct.", "B"), ("Option B is right, option C is not", "B"),
    ("B is the correct answer, because option C is not", "B"), ("It must be option B", "B"),
    ("I choose option B over option C", "B"), ("Is it option C? No, the answer is B", "B"),
    ("Hence, this is it. Therefore, option B.", "B"), ("Option B fits it best", "B"),
    ("The answer is B, and A is wrong", "B"),
    # no choice
    ("The answer is B or C", ""), ("Answer: B/C", ""), ("Answer: (B) and (C)", ""),
    ("I doubt this option C", ""), ("So option C can be ruled out", ""),
    ("Option C is wrong", ""), ("It can't be option C", ""), ("The answer C is incorrect", ""),
    ("(c)(a)(b) since it is so", ""), ("B because option C is wrong", ""),
    ("Unlike option C, it runs", ""), ("Option B is right, option C is correct", ""),
])
def test_what_is_said_last_and_whole_counts(text, letter):
    assert lenient_choice(text, TRICKY) == letter


def test_a_letter_is_a_letter_though_it_is_the_text_of_another():
    """As strict scoring has it: a letter is what was asked for. In lower case nothing was."""
    assert [lenient_choice(x, ["A. C", "B. a", "C. B"]) for x in "ABCa"] == ["A", "B", "C", "B"]


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
    # signs and exponents are read, or nothing is
    ("\u22125", -5), ("x = \u22125,000.5 m", -5000.5), ("\u20135 °C", -5), ("\uff0d5", -5),
    ("-$5", -5), ("+5", 5), ("1.5e3", 1500), ("1.5E+3 J", 1500), ("2e-3", 0.002),
    ("\u22121.5e\u22123", -0.0015), ("- 5", ""), ("\u2212 5", ""), ("minus 5", ""),
    ("negative 5", ""), ("±5", ""), ("1.5 × 10^3", ""), ("1.5x10^3", ""), (r"1.5\times10^3", ""),
    ("10^3", ""), ("10³", ""), ("10**3", ""), ("2^{10}", ""), (r"90^\circ", 90),
    # parts of something else
    ("1,5", ""), ("5,5", ""), ("1/2", ""), ("2/2", ""), (r"\frac{2}{2}", ""), ("2½", ""),
    ("3-5", ""), ("5\u20135", ""), ("5 - 5", ""), ("2x2", ""), ("3 + 3", ""), ("12:12", ""),
    ("1.2.3", ""), ("1.234,5", ""), ("1e3.5", ""), ("5-year", 5), ("5.", 5), ("x=5,y=5", 5),
])
def test_lenient_number(output, number):
    read = lenient_number(output)
    assert (read and float(read)) == number


def test_relative_accuracy_counts_thresholds():
    assert relative_accuracy("10", "10") == relative_accuracy("0", "0") == 1.0
    assert relative_accuracy("0.1", "0") == relative_accuracy("nan", "0") == 0.0
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
    ("<answer>0 m</answer>", "<answer>0</answer>", "regression", 0, 1, True),
    ("<answer>\u22125</answer>", "<answer>5</answer>", "numerical", 0, 0, True),
    ("<answer>1.5e3</answer>", "<answer>1.5</answer>", "regression", 0, 0, True),
    ("<answer>the red car</answer>", "<answer>the red car</answer>", "OCR", 1, 1, True),
])
def test_grade(output, solution, kind, strict, lenient, parsed):
    expected = (pytest.approx(strict), pytest.approx(lenient), parsed)
    assert grade(output, solution, kind, OPTIONS) == expected
