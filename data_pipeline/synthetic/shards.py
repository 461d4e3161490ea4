"""Shards of synthetic documents: a source of training data like any other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, file_errors
from data_pipeline.formats.made import Made
from data_pipeline.run_folder import exclusive, record_plan
from data_pipeline.shards import load_manifest, write_token_shards
from data_pipeline.shards.manifest import PREDICTED_FROM, TOKENIZER
from data_pipeline.shards.writer import TOKENS_PER_SHARD, Tokens
from data_pipeline.synthetic.icl import check_icl_task, icl_random_numbers
from data_pipeline.synthetic.stories import Task, random_numbers
from data_pipeline.synthetic.tokens import Alphabet, write_document, write_examples

DOCUMENTS_PER_REPORT = 512

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the documents that are made, and all documents."""


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def make_synthetic(
    task: Task,
    out: Path,
    *,
    length: int,
    documents: int,
    vocab_size: int,
    seed: int,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Progress = _no_progress,
) -> Made:
    """Write documents of `length` tokens each, their end-of-document token among them.

    The same arguments give the same bytes, also when a killed call is repeated. Folders of one
    `vocab_size` share a tokenizer, and can be mixed. Training on them predicts the answers alone.

    Raises:
        DataError: too small a vocabulary, too short documents, or a folder that holds others.
    """
    alphabet = Alphabet(vocab_size)
    alphabet.check(task, length)
    plan = {"task": asdict(task), "length": length, "vocab_size": vocab_size, "seed": seed}

    def write(number: int) -> tuple[str, Tokens]:
        rng = random_numbers(seed, "training", task, length, number)
        return f"{task.name}-{number}", write_document(task, length, alphabet, rng).tokens

    return _make(write, plan, alphabet, out, documents, tokens_per_shard, progress)


def make_examples(
    tasks: Sequence[str],
    out: Path,
    *,
    length: int,
    documents: int,
    vocab_size: int,
    seed: int,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Progress = _no_progress,
) -> Made:
    """Write documents of examples, each of one of these tasks of ICL_TASKS; else as
    `make_synthetic`.
    """
    alphabet = Alphabet(vocab_size)
    alphabet.check_examples(length)
    for name in tasks:
        check_icl_task(name)
    plan = {"icl": list(tasks), "length": length, "vocab_size": vocab_size, "seed": seed}

    def write(number: int) -> tuple[str, Tokens]:
        rng = icl_random_numbers(seed, "training", " ".join(tasks), length, number)
        return f"icl-{number}", write_examples(tasks, length, alphabet, rng)

    return _make(write, plan, alphabet, out, documents, tokens_per_shard, progress)


def _make(
    write: Callable[[int], tuple[str, Tokens]],
    asked: dict[str, Any],
    alphabet: Alphabet,
    out: Path,
    documents: int,
    tokens_per_shard: int,
    progress: Progress,
) -> Made:
    """Write the documents of these numbers, from 0 on."""
    if documents < 1:
        raise DataError(f"documents = {documents}: must be at least 1")
    plan = {"command": "synthetic", **asked, "documents": documents}

    def write_all() -> Iterator[tuple[str, Tokens]]:
        for number in range(documents):
            yield write(number)
            if (number + 1) % DOCUMENTS_PER_REPORT == 0 or number + 1 == documents:
                progress("documents", number + 1, documents)

    with file_errors(), exclusive(out):
        record_plan(out, plan)
        if (out / "manifest.json").exists():
            return Made(load_manifest(out), is_new=False)
        tokenizer = out / TOKENIZER
        alphabet.save_tokenizer(tokenizer)
        extra = plan | {PREDICTED_FROM: alphabet.first_answer}
        manifest = write_token_shards(
            write_all(), tokenizer, out, tokens_per_shard=tokens_per_shard, extra=extra
        )
        return Made(manifest, is_new=True)
