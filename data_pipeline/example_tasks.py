"""Small tasks for lm-evaluation-harness, drawn from a seed: files to try it with, and to copy from.

A task is a YAML file and its questions and examples, one JSON object a line.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from data_pipeline.errors import DataError, file_errors

CHOICES = 4
EXAMPLES = 16

Line = dict[str, Any]

ARITHMETIC = """\
# Choices: the likeliest of several answers counts.
task: example_arithmetic
tag: example
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
"""

COPY = """\
# One answer: how likely it is, and whether it is likelier than any other text. It begins with the
# space before it, as tokens do.
task: example_copy
tag: example
output_type: loglikelihood
doc_to_text: "{{text}}"
target_delimiter: ""
doc_to_target: " {{letter}}"
"""

REVERSAL = """\
# Generated: the model writes until the end of the line.
task: example_reversal
tag: example
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

# Paths are relative to the folder that `farspan eval --tasks-dir` names.
DATA = """\
dataset_path: json
dataset_kwargs:
  data_files:
    train: {name}/train.jsonl
    test: {name}/test.jsonl
training_split: train
fewshot_split: train
test_split: test
metadata:
  version: 1.0
"""


def write_example_tasks(out: Path, *, seed: int, questions: int) -> list[str]:
    """Write the files of three tasks into a folder. The same arguments give the same bytes.

    Returns:
        The names of the tasks.

    Raises:
        DataError: no question, or the folder holds other files, or cannot be written.
    """
    if questions < 1:
        raise DataError(f"--questions {questions}: must be at least 1")
    names = []
    with file_errors():
        out.mkdir(parents=True, exist_ok=True)
        for form, draw in FORMS:
            name = form.split("task: ")[1].split("\n")[0]
            _write(out / f"{name}.yaml", form + DATA.format(name=name))
            (out / name).mkdir(exist_ok=True)
            rng = random.Random(f"{seed} {name}")
            lines = [json.dumps(draw(rng)) + "\n" for _ in range(EXAMPLES + questions)]
            _write(out / name / "train.jsonl", "".join(lines[:EXAMPLES]))
            _write(out / name / "test.jsonl", "".join(lines[EXAMPLES:]))
            names.append(name)
    return names


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text() != text:
        raise DataError(
            f"{path} is there already, and is not what these options give: name another folder"
        )
    path.write_text(text)


def _arithmetic(rng: random.Random) -> Line:
    first, second = rng.randrange(10, 90), rng.randrange(1, 10)
    answers = [first + second, *rng.sample(_near(first + second), CHOICES - 1)]
    rng.shuffle(answers)
    return {
        "question": f"{first} + {second} =",
        "choices": [str(answer) for answer in answers],
        "answer": answers.index(first + second),
    }


def _near(number: int) -> list[int]:
    return [number + offset for offset in range(-10, 11) if offset]


def _copy(rng: random.Random) -> Line:
    letters = rng.sample(ascii_lowercase, 5)
    return {
        "text": f"{' '.join(letters)} copied is {' '.join(letters[:-1])}",
        "letter": letters[-1],
    }


def _reversal(rng: random.Random) -> Line:
    letters = rng.sample(ascii_lowercase, 4)
    return {
        "question": f"{' '.join(letters)} reversed is",
        "answer": " ".join(reversed(letters)),
    }


FORMS: tuple[tuple[str, Callable[[random.Random], Line]], ...] = (
    (ARITHMETIC, _arithmetic),
    (COPY, _copy),
    (REVERSAL, _reversal),
)
