"""`farspan eval`, `generate` and `export`: what is done with a trained model."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.environment import use_no_gpu
from launch.progress import show_progress
from launch.shared import run_shared
from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def evaluate_text(
    directory: Path, text: Path, context: int | None, nproc: int, as_json: bool
) -> None:
    """Print the mean cross-entropy of a text file under the model of a run.

    Args:
        nproc: processes that share each window.
    """
    run = RunDirectory(directory)
    read_run_config(run)  # or there is none, which is told before ranks are started
    content, limit = _read_text(text), () if context is None else (str(context),)
    result = (
        _evaluate_here(run, content, context)
        if nproc == 1
        else run_shared("pretrain.evals.shared", (str(run.root), str(text), *limit), nproc)
    )
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"{result['loss']:.4f} nats per token over {result['tokens']} predicted tokens, "
            f"context {result['context']}"
        )


def _evaluate_here(run: RunDirectory, text: str, context: int | None) -> dict[str, Any]:
    from data_pipeline.stream import load_tokenizer
    from pretrain.checkpoint.trained import load_trained
    from pretrain.evals.perplexity import perplexity

    config, model = load_trained(run)
    context = context or config.data.seq_len
    token_ids = load_tokenizer(run.tokenizer).encode(text)
    # The result alone goes to standard output.
    with show_progress(Console(stderr=True)) as show:
        progress = partial(show, "tokens predicted")
        return asdict(perplexity(model, token_ids, context, progress=progress))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None


def continue_prompt(
    directory: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> None:
    """Print a prompt and its continuation by the model of a run."""
    from data_pipeline.stream import load_tokenizer
    from pretrain.checkpoint.trained import load_trained
    from pretrain.evals.generate import generate

    run = RunDirectory(directory)
    _, model = load_trained(run)
    tokenizer = load_tokenizer(run.tokenizer)
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise UserError("--prompt is empty; give at least one word to continue")
    new_ids = generate(
        model,
        prompt_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=tokenizer.eos_id,
    )
    print(prompt + tokenizer.decode(new_ids))


def export_model(directory: Path, to: str, out: Path) -> None:
    """Write the newest checkpoint of a run in another format."""
    use_no_gpu()
    from parallel.mesh import alone
    from pretrain.checkpoint.export import export_newest
    from pretrain.checkpoint.formats import writer_of

    write = writer_of(to)
    with alone():
        export_newest(RunDirectory(directory), out, write)
    print(f"exported to {out}")
