"""The beginnings of documents, as people read them."""

from pathlib import Path

import numpy as np

from data_pipeline.stream import Source, TokenStream, load_tokenizer
from pretrain.metrics.samples import MAX_DOCUMENTS, MAX_TOKENS, Beginnings


def test_each_document_of_a_row_is_shown_from_where_it_begins(shards: Path) -> None:
    stream = TokenStream([Source(str(shards))], 600, seed=1)
    plan = stream.next_batch(3)
    batch = stream.read(plan, range(3))
    samples = Beginnings.of(stream, plan, 2).as_text(stream.tokenizer, ["words"])
    decode = load_tokenizer(stream.tokenizer).decode
    for row in range(2):
        of_row = [sample for sample in samples if sample.row == row]
        begins_at = [sample.begins_at for sample in of_row]
        assert begins_at == np.flatnonzero(batch.position[row] == 0).tolist()
        assert sum(sample.tokens for sample in of_row) == 600
        for sample in of_row:
            shown = slice(sample.begins_at, sample.begins_at + min(sample.tokens, MAX_TOKENS))
            assert sample.text == decode(batch.tokens[row, shown].tolist())
            assert sample.source == "words"
    assert {sample.row for sample in samples} == {0, 1}
    assert max(sample.tokens for sample in samples) > MAX_TOKENS
    assert any(sample.from_token for sample in samples)


def test_a_row_of_very_many_documents_shows_the_first(shards: Path) -> None:
    stream = TokenStream([Source(str(shards))], 20_000, seed=1)
    plan = stream.next_batch(1)
    assert plan.row_starts[1] > MAX_DOCUMENTS
    samples = Beginnings.of(stream, plan, 1).as_text(stream.tokenizer, ["words"])
    assert len(samples) == MAX_DOCUMENTS
