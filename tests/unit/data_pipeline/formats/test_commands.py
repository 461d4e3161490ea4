"""The commands that make shards of other formats and the other way round, as a user types them."""

import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT
from tests.unit.data_pipeline.formats.corpus import (
    make_documents,
    make_tokenizer,
    tokens_of,
    write_jsonl,
)

FARSPAN = [sys.executable, "-m", "launch.cli", "data"]


def farspan(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FARSPAN, *command.split()],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_texts_go_in_and_out_by_the_command_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", make_documents(30))
    make_tokenizer(tmp_path / "bpe.json")
    for command, printed in (
        ("tokenize in.jsonl --tokenizer bpe.json --out own", "30 documents, "),
        ("tokenize in.jsonl --like own --out own", "own is finished already: same inputs, same"),
        ("export own --to megatron --out theirs --no-append-eod", "wrote 30 documents: theirs"),
        ("import theirs.idx --like own --out back", "import: 30 of 30\n30 documents, "),
        ("export back --to jsonl --out out.jsonl.gz", "wrote 30 documents: out.jsonl.gz"),
        ("export back --to parquet --out out.parquet", "wrote 30 documents: out.parquet"),
    ):
        done = farspan(tmp_path, command)
        assert done.returncode == 0, done.stderr
        assert printed in done.stdout
    assert tokens_of(tmp_path / "back") == tokens_of(tmp_path / "own")
    for command, message in (
        ("export own --to jsonl --out a.jsonl --append-eod", "belongs to --to megatron"),
        ("tokenize in.jsonl --out new", "name the tokenizer, by --tokenizer FILE"),
        ("tokenize in.jsonl --out own --tokenizer none.json", "none.json: no such file"),
        ("export none --to jsonl --out a.jsonl", "none/manifest.json: no such file"),
    ):
        done = farspan(tmp_path, command)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
