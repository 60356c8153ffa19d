"""Grading: how a benchmark's answer is read, and what it scores.

Strict is Video-R1's evaluation: the rules of training (rewards.py). Lenient reads an answer as a
person would, and as nothing ("") where a person is not sure: a wrong reading may score by chance.
"""

import re
from itertools import product

from prompt import by_letter
from rewards import ACCURACY, answers, closeness, extract_answer

BOXED = re.compile(r"\\boxed\{(?:\s*\\text\{)?([^{}]*)\}")
ANSWER = r"(?i:answer(?:\s+is)?|(?:option|choice)(?:\s+is|\s*:))"
VERB = "(?:is|was|can|could|does|would|seems)"
LETTER = (r"\W*([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])"            # never the article, one of two, or
          r"(?![)\]*]*(?:\s*[/&]|\s+(?i:or|and)\W+[A-Z]\b|"          # what is said to be wrong
          rf"\s+(?i:{VERB}\s*(?:n[o'’]t|['’]t)\b|(?:{VERB}(?:\s+\w+){{0,2}}?\s+)?"
          r"(?:wrong|incorrect|false|unlikely|excluded|eliminated|ruled)\b)))")
STATED = re.compile(ANSWER + r"(?i:\W+option|\W+choice)?" + LETTER)     # answer is B  Answer: (B)
LEADING = re.compile(r"^\W*(?:(?i:option|choice)\W+)?([A-Za-z])"    # B  (b)  B. text  B - text
                     r"(?:[^\w\n]*(?:\n|$)|[)\].:](?!\w\.|\()|\s+-\s)")
CALLED = re.compile(r"(?<![\w'])([A-Z])[)\]*]*\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b")
PICKED = re.compile(r"(?:^\W*|\b(?i:choose|chose|select|pick|go with|is|must be|so|thus|therefore)"
                    r"\W+)(?i:the\s+)?(?i:option|choice)" + LETTER)     # I choose option B
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-"))
NUMBER = re.compile(r"""
    (?<![\w^])(?<!\^-)                                          # in no word; not the -1 of s^-1
    ((?:[-+±]|(?i:minus|negative)\b)\s*)?[$€£]?
    ((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?)
    (\s*(?:\*\*|\\times|\\cdot|[-+*/×÷·xX]|\^[{(]?[-+]?)\s*\d   # what makes it another: 3-5, 10^3,
     |[.,:]\d|\}\{\d|\s*[¼-¾⅐-⅞]|[⁰¹²³⁴-⁹])?                    # 1,5, \frac{1}{2}, 2½, 10³
    """, re.VERBOSE)


def final_words(output: str) -> str:
    """What a lenient reader takes as the answer: the last block, or what follows the reasoning; of
    that what is boxed, if anything is."""
    blocks = answers(output) or output.split("</think>")
    return (BOXED.findall(blocks[-1]) or blocks)[-1].strip()


def plain(text: str) -> str:
    return " ".join(text.split()).lstrip("*\"'").rstrip(" .*\"'")     # .5 is not 5


def whole(texts: dict[str, str], *parts: str) -> list[str]:
    """The letter of the first part that is nothing but one option's letter, or its text, with or
    without the letter; [] if none is. Texts may differ by case only: that counts if it must."""
    readings = (str.strip, plain, lambda text: plain(text.lower()))
    for part in parts:
        alone = re.fullmatch(r"\W*(?:(?i:option|choice)\W+)?([A-Z])[\s*.)\]]*", part)   # not H+
        if alone and alone[1] in texts:
            return [alone[1]]
        for form, read in product(("{1}", "{0}. {1}"), readings):
            said = read(part)
            same = [letter for letter, text in texts.items()
                    if read(form.format(letter, text)) == said != ""]
            if len(same) == 1:
                return same
    return []


def lenient_choice(output: str, options: list[str]) -> str:
    """The letter that an output chooses, or "". In this order: all of it is an option, or what
    follows its last "the answer is" is; the last letter so stated; the first line is an option, or
    begins with a letter; one letter is called the best, or picked."""
    text, texts = final_words(output), by_letter(options)
    said = re.split(ANSWER + r"[\s:]*", text)[-1]
    letters = (whole(texts, text, said, said.split("\n")[0]) or STATED.findall(text)[-1:]
               or whole(texts, text.split("\n")[0]) or LEADING.findall(text)
               or list(set(CALLED.findall(text) + PICKED.findall(text))))
    letter = letters[0].upper() if len(letters) == 1 else ""
    return letter if letter in texts or not options else ""


def lenient_number(output: str) -> str:
    """The one number of the answer, without units and separators; "" if none or several, if it is
    part of a range, product, power or fraction, or if "- 5" or "minus 5" leaves its sign open."""
    found = NUMBER.findall(final_words(output).translate(DASHES))
    if any(more or sign.strip("-+") for sign, _, more in found):
        return ""
    values = {float(sign + number.replace(",", "")) for sign, number, _ in found}
    return str(values.pop()) if len(values) == 1 else ""


def relative_accuracy(answer: str, truth: str) -> float:
    """VSI-Bench's: the share of t = 0.50, 0.55 .. 0.95 that 1 - relative error exceeds."""
    return sum(closeness(answer, truth) > percent / 100 for percent in range(50, 100, 5)) / 10


def grade(output: str, solution: str, problem_type: str,
          options: list[str]) -> tuple[float, float, bool]:
    """(strict, lenient, parsed) score of one output. Strict: the first `<answer>`, or the whole
    output if there is none, by the rules of training, except that `relative_accuracy` grades
    regression. Lenient: what `lenient_choice` and `lenient_number` read."""
    truth = extract_answer(solution) or solution.strip()
    said, read, right = extract_answer(output) or output.strip(), final_words(output), truth
    if problem_type == "multiple choice":
        read = lenient_choice(output, options)
    elif problem_type in ("numerical", "regression"):
        read, right = lenient_number(output), lenient_number(truth)
    score = relative_accuracy if problem_type == "regression" else ACCURACY[problem_type]
    return float(score(said, truth)), float(score(read, right)), read != ""
