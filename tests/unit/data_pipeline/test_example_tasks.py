"""Example tasks for lm-evaluation-harness: what they ask has the answer that they say."""

import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import DataError
from data_pipeline.example_tasks import write_example_tasks


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_answers_are_right_and_data_is_where_the_task_looks_for_it(tmp_path: Path) -> None:
    assert write_example_tasks(tmp_path, seed=3, questions=20) == [
        "example_arithmetic",
        "example_copy",
        "example_reversal",
    ]
    for task in ("arithmetic", "copy", "reversal"):
        settings = yaml.safe_load((tmp_path / f"example_{task}.yaml").read_text())
        files = settings["dataset_kwargs"]["data_files"]
        assert len(lines(tmp_path / files["test"])) == 20
        assert len(lines(tmp_path / files["train"])) == 16
    for line in lines(tmp_path / "example_arithmetic" / "test.jsonl"):
        first, second = line["question"].removesuffix(" =").split(" + ")
        assert line["choices"][line["answer"]] == str(int(first) + int(second))
        assert len(set(line["choices"])) == 4
    for line in lines(tmp_path / "example_copy" / "test.jsonl"):
        letters, copied = line["text"].split(" copied is ")
        assert f"{copied} {line['letter']}" == letters
    for line in lines(tmp_path / "example_reversal" / "test.jsonl"):
        letters = line["question"].removesuffix(" reversed is").split()
        assert line["answer"].split() == letters[::-1]


def test_the_same_options_give_the_same_bytes_and_others_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_example_tasks(one, seed=3, questions=5)
    write_example_tasks(one, seed=3, questions=5)
    write_example_tasks(other, seed=4, questions=5)
    assert content(one).keys() == content(other).keys()
    assert content(one) != content(other)
    with pytest.raises(DataError, match=r"train\.jsonl is there already"):
        write_example_tasks(one, seed=4, questions=5)
    with pytest.raises(DataError, match="--questions 0"):
        write_example_tasks(tmp_path / "none", seed=0, questions=0)
