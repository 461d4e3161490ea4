"""The commands that make shards of other formats and the other way round, as a user types them."""

from pathlib import Path

import pytest

from launch.cli import main
from tests.unit.data_pipeline.formats.corpus import (
    make_documents,
    make_tokenizer,
    tokens_of,
    write_jsonl,
)


def test_texts_go_in_and_out_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def farspan(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["farspan", "data", *command.split()])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

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
        code, out, err = farspan(command)
        assert code == 0, err
        assert printed in out
    assert tokens_of(tmp_path / "back") == tokens_of(tmp_path / "own")
    for command, message in (
        ("export own --to jsonl --out a.jsonl --append-eod", "belongs to --to megatron"),
        ("tokenize in.jsonl --out new", "name the tokenizer, by --tokenizer FILE"),
        ("tokenize in.jsonl --out own --tokenizer none.json", "none.json: no such file"),
        ("export none --to jsonl --out a.jsonl", "none/manifest.json: no such file"),
    ):
        code, out, err = farspan(command)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
