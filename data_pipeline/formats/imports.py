"""Megatron's tokenized datasets, made into shards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.formats.made import Made, make_shards, names_of
from data_pipeline.formats.megatron import files_of, open_dataset
from data_pipeline.shards import Manifest, write_token_shards
from data_pipeline.tokenize import load_tokenizer

DOCUMENTS_PER_REPORT = 512

Document = tuple[str, NDArray[Any]]
Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the documents of it that are done, and all its documents."""


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def import_megatron(
    prefixes: Sequence[Path], tokenizer: Path, out: Path, progress: Progress = _no_progress
) -> Made:
    """Make shards of the documents of Megatron's IndexedDatasets.

    The sequences of a document are joined, and it gets its end-of-document token where it has
    none. Documents are called PREFIX:NUMBER, as `names_of` names the prefix and counted from 0.
    A killed run that is repeated goes on after the last shard that was finished. In memory is one
    document, and the index and the ids of one shard.

    Args:
        prefixes: of a .bin and a .idx, or either of the files.
        tokenizer: the tokenizer.json that made the tokens.

    Raises:
        DataError: what `open_dataset` or `make_shards` refuses, or a token that the tokenizer does
            not have.
    """
    files = [file for prefix in prefixes for file in files_of(prefix)]
    total = sum(len(open_dataset(prefix).document_ends) for prefix in prefixes)
    coder = load_tokenizer(tokenizer)

    def write(plan: dict[str, Any]) -> Manifest:
        documents = _read_all(names_of(files), coder.vocab_size, coder.eos_id)
        reported = _report(documents, total, progress)
        return write_token_shards(reported, tokenizer, out, extra=plan)

    return make_shards("import", files, {}, tokenizer, out, write)


def _report(documents: Iterator[Document], total: int, progress: Progress) -> Iterator[Document]:
    for done, document in enumerate(documents):
        if done % DOCUMENTS_PER_REPORT == 0:
            progress("import", done, total)
        yield document
    progress("import", total, total)


def _read_all(files: Mapping[str, Path], vocab_size: int, eos_id: int) -> Iterator[Document]:
    for name, path in files.items():
        if path.suffix != ".idx":
            continue
        prefix = name.removesuffix(".idx")
        for number, tokens in enumerate(open_dataset(path).documents()):
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
                raise DataError(
                    f"document {number} (counted from 0) of {path.with_suffix('')}: token {wrong}, "
                    f"but the tokenizer has 0 to {vocab_size - 1}; name the one that made the "
                    "tokens by --tokenizer"
                )
            ends = len(tokens) and tokens[-1] == eos_id
            yield f"{prefix}:{number}", tokens if ends else np.append(tokens, eos_id)
