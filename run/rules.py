"""The registries that a rule may add to, by the option that names their entries (docs/rules.md)."""

from attribution import COUNTERFACTUALS, SCORES, WEIGHTS
from grpo import ADVANTAGES, PENALTIES
from options import Options
from rewards import EXTRA_REWARDS
from run.arguments import parse

REGISTRIES = {
    "signals": (COUNTERFACTUALS, SCORES), "weighting": (WEIGHTS,), "advantage": (ADVANTAGES,),
    "penalty": (PENALTIES,), "extra_reward": (EXTRA_REWARDS,)}


def check_names(o: Options) -> None:
    """SystemExit, in one line, where an option names what is not registered."""
    for option, registries in REGISTRIES.items():
        known, named = [name for registry in registries for name in registry], getattr(o, option)
        for name in [named] if isinstance(named, str) else named:
            if name not in known:
                raise SystemExit(f"error: unknown {option.removesuffix('s')} {name!r}; known: "
                                 f"{', '.join(known)}")


if __name__ == "__main__":              # train.sh: options that are wrong are told before its work
    check_names(parse())
