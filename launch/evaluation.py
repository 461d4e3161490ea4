"""`farspan eval --suite`: which suites there are, and which options each of them has."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.evaluation_icl import evaluate_icl
from launch.evaluation_lm_eval import evaluate_lm_eval
from launch.evaluation_long import evaluate_long
from launch.suite import Asked
from pretrain.errors import UserError


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        options: of `farspan eval`, besides those that all suites have.
        evaluate: asks the newest checkpoint of a run, prints the answers, and keeps them in its
            directory.
    """

    options: tuple[str, ...]
    evaluate: Callable[[Asked], None]


SUITES = {
    "long": Suite(
        ("lengths", "tasks", "samples", "seed", "pairs", "values", "gap", "form", "shards"),
        evaluate_long,
    ),
    "icl": Suite(("tasks", "shots", "samples", "seed", "form"), evaluate_icl),
    "lm-eval": Suite(
        ("tasks", "num_fewshot", "tasks_dir", "limit", "context"),
        evaluate_lm_eval,
    ),
}


def evaluate_suite(name: str, asked: Asked) -> None:
    """Raises UserError: there is no such suite, it has no such option, or the run is not fit."""
    if name not in SUITES:
        raise UserError(f"--suite {name} is not known; allowed: {', '.join(SUITES)}")
    suite = SUITES[name]
    for option in asked.options:
        if option not in suite.options:
            raise UserError(
                f"{_flag(option)} does not belong to --suite {name}, which has "
                f"{', '.join(map(_flag, suite.options))}"
            )
    suite.evaluate(asked)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
