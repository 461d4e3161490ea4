"""Checkpoints of others: what their weights are as ours, and ours as theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.formats import deepspeed, hf, megatron
from pretrain.checkpoint.formats.weights import Weights
from pretrain.config import Config
from pretrain.errors import UserError

Write = Callable[[Config, Weights, Path, Path], None]


@dataclass(frozen=True)
class Format:
    """A format in which a folder has the weights of a model.

    What `read` and `write` need besides, they import themselves. Both are collective, on one rank.

    Attributes:
        known_by: how such a folder is known, in words.
        is_in: whether a folder is one.
        read: the weights of the model that a configuration has; raises UserError where the folder
            has other ones, or what is needed is not installed.
        write: into a folder that is empty: the configuration, the weights, a tokenizer.json, the
            folder. None where none is written.
    """

    known_by: str
    is_in: Callable[[Path], bool]
    read: Callable[[Path, Config], Weights]
    write: Write | None = None


FORMATS = {
    "hf": Format(hf.KNOWN_BY, hf.is_in, hf.read, hf.write),
    "megatron": Format(megatron.KNOWN_BY, megatron.is_in, megatron.read, megatron.write),
    "deepspeed": Format(deepspeed.KNOWN_BY, deepspeed.is_in, deepspeed.read),
}


def format_of(source: Path, name: str | None = None) -> str:
    """The format of a folder.

    Args:
        name: that it is said to have; None looks.

    Raises:
        UserError: there is no such folder or format, it has none, or several of which none is said.
    """
    if name is not None and name not in FORMATS:
        raise UserError(f"--from {name} is not a format; allowed: {', '.join(FORMATS)}")
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder on this machine; a model of the Hugging Face hub is fetched "
            "with `hf download NAME --local-dir DIR`"
        )
    if name is not None:
        return name
    found = [name for name, one in FORMATS.items() if one.is_in(source)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{source} has several formats; say which: --from {' or '.join(found)}")
    looked_for = "".join(f"\n  {name}: {one.known_by}" for name, one in FORMATS.items())
    raise UserError(f"{source} has no checkpoint that is known; looked for:{looked_for}")


def writer_of(name: str) -> Write:
    """Raises UserError: the format is not written."""
    written = {name: one.write for name, one in FORMATS.items() if one.write is not None}
    if name not in written:
        raise UserError(f"--to {name} is not a format; allowed: {', '.join(written)}")
    return written[name]
