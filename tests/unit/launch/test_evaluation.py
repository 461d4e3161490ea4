"""`farspan eval --suite`: what is refused before any rank starts, and what is printed."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from launch.evaluation_long import tables_of
from pretrain.config import load_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = load_config("tiny-hybrid-moe", ["data.seq_len=1024"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a --text or a --suite"),
        (["--suite", "long", "--text", "x"], "name either a --text or a --suite"),
        (["--suite", "longest"], "--suite longest is not known; allowed: long"),
        (["--suite", "long", "--context", "5"], "--context does not belong to --suite long"),
        (["--suite", "long", "--tasks", "overwrites"], "did you mean overwrite"),
        (["--suite", "long", "--lengths", "x"], "--lengths x: must be a number"),
        (["--suite", "long", "--lengths", "2k"], "trained for 1024 tokens"),
        (["--suite", "long", "--nproc", "2", "parallel.cp=4"], "layout refused"),
        (["--suite", "long", "parallel.cpp=2"], "parallel.cpp is not a setting"),
        (["--suite", "long", "--num-fewshot", "1"], "--num-fewshot does not belong to --suite"),
        (["--text", "x", "--num-fewshot", "1"], "--num-fewshot: settings belong to --suite"),
        (["--text", "x", "--seed", "2"], "--seed: settings belong to --suite"),
        (["--text", "x", "parallel.cp=2"], "parallel.cp=2: settings belong to --suite"),
    ],
)
def test_mistakes_are_told_before_any_rank_starts(
    run: Path, arguments: list[str], message: str
) -> None:
    settings = [argument for argument in arguments if "=" in argument]
    options = [argument for argument in arguments if "=" not in argument]
    error = CliRunner().invoke(app, ["eval", str(run), *settings, *options]).exception
    assert getattr(error, "exit_code", None) == 2
    assert message in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--suite lm-eval needs --tasks, as in"),
        (["--tasks", "x", "--num-fewshot", "0,few"], "--num-fewshot 0,few: must be numbers"),
        (["--tasks", "x", "--nproc", "2"], "--nproc 2: --suite lm-eval asks the exported model"),
        (["--tasks", "x", "--context", "2000"], "--context 2000: .* trained for 1024 tokens"),
    ],
)
def test_mistakes_in_what_the_harness_is_asked_are_told_before_it_is_read(
    run: Path, arguments: list[str], message: str
) -> None:
    command = ["eval", str(run), "--suite", "lm-eval", *arguments]
    error = CliRunner().invoke(app, command).exception
    assert getattr(error, "exit_code", None) == 2
    assert re.search(message, str(error))


def test_a_harness_that_is_not_installed_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.evals.lm_eval.find_spec", lambda name: None)
    command = ["eval", str(run), "--suite", "lm-eval", "--tasks", "x"]
    error = CliRunner().invoke(app, command).exception
    assert getattr(error, "exit_code", None) == 2
    assert "pip install 'farspan[eval]'" in str(error)


def cell(task: str, length: int, right: int, depth: float | None = None) -> dict[str, Any]:
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "questions": 8,
        "right": right,
        "accuracy": right / 8,
    }


def test_tables_have_a_row_per_task_and_depth_and_a_column_per_length() -> None:
    result = {
        "request": {"lengths": [64, 2048]},
        "cells": [
            *(cell("needle", 64, right, depth) for right, depth in ((8, 0.0), (4, 0.5))),
            *(cell("needle", 2048, right, depth) for right, depth in ((2, 0.0), (0, 0.5))),
            *(cell("overwrite", length, 5) for length in (64, 2048)),
        ],
        "loss_by_position": [{"first": 64, "last": 127, "loss": 1.5, "tokens": 1000}],
    }
    console = Console(file=io.StringIO(), width=100)
    for table in tables_of(result):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [
        ["questions", "answered", "64", "2,048"],
        ["needle", "75.0%", "12.5%"],
        ["overwrite", "62.5%", "62.5%"],
        ["needle", "at", "depth", "64", "2,048"],
        ["0%", "100.0%", "25.0%"],
        ["50%", "50.0%", "0.0%"],
        ["tokens", "before", "nats", "per", "token", "predicted"],
        ["64", "to", "127", "1.5000", "1,000"],
    ]
