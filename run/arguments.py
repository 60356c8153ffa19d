"""Options as a user gives them: the command line, a preset, and the OPTIONS of rules' files.

    python -m run.arguments ...         only checks them
"""

import difflib
import importlib.util
import math
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from itertools import chain
from pathlib import Path

from transformers import HfArgumentParser

from attribution import COUNTERFACTUALS, SCORES, WEIGHTS
from grpo import ADVANTAGES, PENALTIES
from options import GONE, LIMITS, PARTS, PRESETS, Options
from rewards import EXTRA_REWARDS

REGISTRIES = {          # that a rule may add to, by the option that names their entries
    "signals": (COUNTERFACTUALS, SCORES), "weighting": (WEIGHTS,), "advantage": (ADVANTAGES,),
    "penalty": (PENALTIES,), "extra_reward": (EXTRA_REWARDS,)}


class Parser(HfArgumentParser):
    """One line for every mistake, with what was probably meant; `where`: the words' origin."""
    where = ""

    def error(self, message: str):
        names = [f.name for f in fields(Options)]
        for word in re.findall(r"--(\w+)", message if "unrecognized" in message else ""):
            near = difflib.get_close_matches(word, names, n=1)
            if word in GONE:
                message += f"; --{word} is gone: {GONE[word]}"
            elif near:
                message += f"; did you mean --{near[0]}?"
        if re.search(r"unrecognized arguments: [\d.]", message):
            message += "; an option that takes one number got several (--ratio is one for all)"
        super().error(self.where + message)


def load_rule(file: str) -> list[str]:
    """Run a file, which registers its rules; the words of its OPTIONS. SystemExit without it."""
    if not file.endswith(".py") or not Path(file).is_file():
        raise SystemExit(f"error: --rule {file}: no such Python file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    rule = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(rule)
        return shlex.split(getattr(rule, "OPTIONS", ""))
    except (SyntaxError, ImportError, NameError, AttributeError, LookupError, TypeError,
            ValueError) as error:
        raise SystemExit(f"error: --rule {file}: {type(error).__name__}: {error}") from None


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line: the preset's values, then the rules', then what is given.

    An unknown option, or a value that is not allowed, ends the program with one line (exit code 2).
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = Parser(
        Options, description="Video-KTR: GRPO on key tokens", allow_abbrev=False,
        usage="ktr.py --model DIR --data FILE [--OPTION VALUE ...]   (--help names them all)")
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper")
    first.add_argument("--rule", nargs="+", action="extend", default=[])
    files = first.parse_known_args(given)[0].rule
    rules = [load_rule(file) for file in files]
    preset = first.parse_known_args([*chain(*rules), *given])[0].preset
    found = Namespace(**PRESETS.get(preset, {}))
    for file, words in zip(files, rules):
        parser.where = f"{file}: OPTIONS: "
        if any(word.split("=")[0] == "--rule" for word in words):
            parser.error("a rule cannot name another --rule")
        found = parser.parse_args(words, found)
    parser.where = ""
    o = Options(**vars(parser.parse_args(given, found)) | {"rule": files})
    check_values(o, parser)
    o.videos = o.videos or str(Path(o.data).parent)
    return o


def check_values(o: Options, parser: Parser) -> None:
    """End the program, in one line, where values are not allowed, alone or together."""
    for f, minimum, maximum, above in LIMITS:
        value = getattr(o, f.name)
        if not (minimum <= value <= maximum and above < value < math.inf):
            allowed = f"above {above}" if above >= 0 else f"{minimum} or more"
            allowed += f" and at most {maximum}" if maximum < math.inf else ""
            parser.error(f"--{f.name} must be {allowed}, not {value}")
    if any("," in name for name in o.signals):
        parser.error("--signals are separated by spaces, not by commas")
    if set(o.freeze) == set(PARTS):
        parser.error("--freeze leaves nothing to train")
    if o.length_low > o.length_high:
        parser.error(f"--length_low {o.length_low} exceeds --length_high {o.length_high}")
    if (o.filter, o.length_of, o.normalize) == ("reward", "selected", "tokens"):
        parser.error("--filter reward with --length_of selected is known too late for --normalize "
                     "tokens")
    if missing := [name for name in ("model", "data") if not getattr(o, name)]:
        parser.error(f"--{missing[0]} is needed")


def check_names(o: Options) -> None:
    """SystemExit, in one line, where an option names what is not registered."""
    for option, registries in REGISTRIES.items():
        known, named = [name for registry in registries for name in registry], getattr(o, option)
        for name in [named] if isinstance(named, str) else named:
            if name not in known:
                raise SystemExit(f"error: unknown {option.removesuffix('s')} {name!r}; known: "
                                 f"{', '.join(known)}")


if __name__ == "__main__":
    check_names(parse())
