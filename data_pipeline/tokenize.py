"""Text to token ids: train a byte-level BPE, or use any Hugging Face tokenizer.json."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
MAX_VOCAB_SIZE = 1 << 20

MAX_TRAINING_WORD = 1_000

# What published tokenizers call the token that ends a document, the commonest first.
EOS_NAMES = (
    END_OF_DOCUMENT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer that never adds, and never reads, special tokens.

    Text that spells a special token (`<|endoftext|>` on a web page) is encoded as plain text, so a
    document cannot end early.

    Attributes:
        eos_id: the token that ends a document.
        vocab_size: one more than the largest id.
    """

    backend: tokenizers.Tokenizer
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self.decode_batch([list(ids)])[0]

    def decode_batch(self, sequences: Sequence[list[int]]) -> list[str]:
        texts: list[str] = self.backend.decode_batch(list(sequences), skip_special_tokens=True)
        return texts


def require_vocab_size(vocab_size: int) -> None:
    """Raise a DataError unless `train_tokenizer` can make a tokenizer of this size."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        size = "small" if vocab_size < MIN_VOCAB_SIZE else "large"
        raise DataError(
            f"tokenizer vocab_size={vocab_size} is too {size}: allowed are {MIN_VOCAB_SIZE} (the "
            f"256 bytes and {END_OF_DOCUMENT}) to {MAX_VOCAB_SIZE}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE of at most `vocab_size` tokens and save it as a tokenizer.json.

    The same texts in the same order give the same file. Token 0 is `<|endoftext|>`. Words are cut
    every MAX_TRAINING_WORD bytes: training takes time quadratic in the length of a word.
    """
    require_vocab_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.FixedLength(MAX_TRAINING_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a Hugging Face tokenizer.json, whoever made it.

    Raises:
        DataError: the file is missing, is no tokenizer.json, or has no end-of-document token.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a Hugging Face tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise DataError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
    # A published file may carry the limits of its model, which would cut documents silently.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    # Gemma's vocabulary has `<eos>`, and `</s>` as HTML's tag of what is struck through.
    known = (special, vocabulary)
    eos = next((name for names in known for name in EOS_NAMES if name in names), None)
    if eos is None:
        raise DataError(
            f"{path}: no end-of-document token among its {len(vocabulary)} tokens; looked for "
            f"{', '.join(EOS_NAMES)}. Add one of them to the tokenizer's added_tokens"
        )
    if eos not in special:
        # Else a text that spells it would be encoded as the end of a document.
        backend.add_special_tokens([eos])
    _cut_what_spells({*special, eos}, backend)
    return Tokenizer(backend, vocabulary[eos], vocab_size=max(vocabulary.values()) + 1)


def _cut_what_spells(special: Iterable[str], backend: tokenizers.Tokenizer) -> None:
    """Let a text that spells a special token be encoded in two parts, where the model would find
    the token among its own pieces, as those of Unigram do.
    """
    found = [
        name
        for name in sorted(special)
        if backend.token_to_id(name) in backend.encode(name, add_special_tokens=False).ids
    ]
    if not found:
        return
    second_parts = (f"(?<={re.escape(name[0])}){re.escape(name[1:])}" for name in found)
    cut = pre_tokenizers.Split(Regex("|".join(second_parts)), "isolated")
    own = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([own, cut] if own else [cut])
