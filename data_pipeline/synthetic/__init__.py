"""Documents that ask for what stands far back in them, drawn from a seed.

The tasks are those of RULER (Hsieh et al. 2024, arXiv:2404.06654): one needle, several keys,
several values of a key, variable tracking; and overwriting, where the last value of a key counts. A
story says what a document states and asks; here it is told in reserved tokens, of a vocabulary of
any size, to evaluate with, and by `data_pipeline.synthetic.shards` to train on. Tasks to learn in
the context, from examples, are in `data_pipeline.synthetic.icl`.
"""

from data_pipeline.synthetic.icl import (
    ICL_TASKS,
    Example,
    check_icl_task,
    draw_examples,
    icl_random_numbers,
)
from data_pipeline.synthetic.stories import (
    TASKS,
    Event,
    Question,
    Statement,
    Task,
    random_numbers,
    tell,
)
from data_pipeline.synthetic.tokens import Alphabet, Document, is_synthetic, write_document

__all__ = [
    "ICL_TASKS",
    "TASKS",
    "Alphabet",
    "Document",
    "Event",
    "Example",
    "Question",
    "Statement",
    "Task",
    "check_icl_task",
    "draw_examples",
    "icl_random_numbers",
    "is_synthetic",
    "random_numbers",
    "tell",
    "write_document",
]
