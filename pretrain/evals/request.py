"""What a long-context evaluation is asked for, and whether a run can answer; without torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.synthetic import TASKS, Task
from pretrain.config import Config, overridden
from pretrain.errors import UserError
from pretrain.eval_config import longest_position
from pretrain.evals.forms import FORMS
from pretrain.layouts import resolve_layout

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
# What is evaluated beside training need not fit another length or layout.
TRAINS_NOT = "eval.every=0"
# Of the document before a needle.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A long-context evaluation.

    Attributes:
        lengths: of the documents, in tokens; empty is the length of the training.
        tasks: names in TASKS.
        samples: documents of each task and length; of a needle, at each depth.
        seed: of the documents.
        pairs, values, gap: as in `Task`.
        form: `tokens` for models trained on reserved tokens, `text` for others; `auto` finds out
            from the tokenizer.
        shards: whose loss is taken by position; None leaves that out.
    """

    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 8
    seed: int = 0
    pairs: int = 4
    values: int = 3
    gap: int = 0
    form: str = "auto"
    shards: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"--form {self.form} is not known; allowed: {', '.join(FORMS)}")
        if not self.tasks and self.shards is None:
            raise UserError("--tasks is empty, and there are no --shards: nothing is asked for")
        for name in self.tasks:
            self.task(name)

    def completed(self, trained: Config) -> "Request":
        """With the length that a checkpoint of this configuration was trained with, if none."""
        return replace(self, lengths=self.lengths or (trained.data.seq_len,))

    def task(self, name: str) -> Task:
        """Raises DataError, with the nearest name, if there is none."""
        return Task(name=name, pairs=self.pairs, values=self.values, gap=self.gap)

    def depths(self, name: str) -> tuple[float | None, ...]:
        """Places of a needle, each with as many documents; other tasks draw theirs."""
        return DEPTHS if name == "needle" else (None,)


def parse_lengths(text: str) -> tuple[int, ...]:
    """`8k,32k,1m`, where k is 1024 and m its square, in increasing order. Raises UserError."""
    lengths = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)([km]?)", part.lower())
        if not found or not int(found[1]):
            raise UserError(
                f"--lengths {part}: must be a number of tokens, as in 8192, 8k or 1m "
                "(k is 1024, m is 1048576)"
            )
        lengths.add(int(found[1]) * UNITS[found[2]])
    if not lengths:
        raise UserError("--lengths is empty: give at least one, as in 8k,32k")
    return tuple(sorted(lengths))


def prepared(
    trained: Config, overrides: Sequence[str], lengths: Sequence[int], nproc: int
) -> Config:
    """The configuration to evaluate documents of these lengths with.

    A forward pass has as many tokens as one of the run's training, or one row. Segments are as long
    as in training, unless an override gives another number of them.

    Args:
        trained: the configuration of the checkpoint.

    Raises:
        UserError: a length that the layout or the segments do not divide, or that is beyond the
            positions the run was trained for; a layout that is impossible on `nproc` ranks.
    """
    config = overridden(trained, [TRAINS_NOT, *overrides])
    asked, train = config.parallel, config.train
    same = config.context.segments == trained.context.segments
    data = trained.data if same else config.data
    segment = data.seq_len // config.context.segments if config.context.segments > 1 else None
    for length in lengths:
        _check_length(config, length, segment)
    longest = max(lengths)
    data_ranks = max(1, nproc // (asked.pp * asked.cp * asked.tp))
    microbatch = max(1, train.microbatch * config.data.seq_len // longest)
    global_batch = data_ranks * microbatch * (2 * asked.pp if asked.pp > 1 else 1)
    batch = {"microbatch": microbatch, "global_batch": global_batch}
    segments = max(1, longest // segment) if segment else 1
    config = config.model_copy(
        update={
            "train": train.model_copy(update=batch),
            "data": config.data.model_copy(update={"seq_len": longest}),
            "context": config.context.model_copy(update={"segments": segments}),
        }
    )
    resolve_layout(config, nproc)
    return config


def _check_length(config: Config, length: int, segment: int | None) -> None:
    cp, tp = config.parallel.cp, config.parallel.tp
    unit, what = cp * tp, f"cp x tp = {cp} x {tp} does not divide it"
    if segment is not None and length > segment:
        unit, what = segment, f"it is no whole number of the run's segments of {segment} tokens"
    if length % unit:
        nearest = max(1, round(length / unit)) * unit
        raise UserError(f"--lengths {length}: {what}; the nearest that works is {nearest}")
    limit = longest_position(config)
    if limit is not None and length > limit:
        raise UserError(
            f"--lengths {length}: the run has softmax layers with rotary positions, trained for "
            f"{limit} tokens (data.seq_len, or model.attention.yarn). Take {limit} or less, extend "
            f"them by model.attention.yarn.factor and original_length, or see how they extrapolate "
            f"with data.seq_len={length}"
        )
