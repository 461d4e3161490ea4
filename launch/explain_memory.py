"""`farspan train --explain-memory`: what a rank's memory is for, predicted and measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.shared import run_shared
from launch.sizes import size_text
from pretrain.config import Config, load_config, phases_of
from pretrain.engines.choice import check_is_native
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout


def print_memory(recipe: str, overrides: Sequence[str], nproc: int, rank: int) -> None:
    """Train a recipe on random tokens on `nproc` ranks of this machine, and explain one of them.

    Of a recipe with phases, that with the longest rows.
    """
    phases = (phase.config for phase in phases_of(load_config(recipe, overrides)))
    config = max(phases, key=lambda config: config.data.seq_len)
    check_is_native(config, "--explain-memory")
    layout = resolve_layout(config, nproc)
    if rank >= nproc:
        raise UserError(f"--rank {rank}: the {nproc} ranks are numbered from 0 to {nproc - 1}")
    measured = _measure(config, nproc)[rank]
    from pretrain.dry_run.plan import plan_rank

    on_gpus = measured["device"] == "cuda"
    predicted = plan_rank(config, nproc, rank, on_gpus=on_gpus).memory

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{recipe} on {nproc} ranks ({layout}), rank {rank}")
    console.print(
        f"microbatches of {config.train.microbatch} x {config.data.seq_len:,} tokens; "
        "when most is in use:\n"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("memory", min_width=24)
    for name in ("predicted", "measured"):
        table.add_column(name, justify="right", min_width=12)
    table.add_column("", no_wrap=True)
    for name, remark, parts in _rows(config, predicted.kept):
        sizes = [sum(of.get(p, 0) for p in parts) for of in (predicted.parts, measured["parts"])]
        if any(sizes):
            table.add_row(name, *map(size_text, sizes), remark)
    peaks = predicted.peak, measured["peak"]
    table.add_row("peak", *map(size_text, peaks), "of all tensors")
    table.add_row(*_of_process(measured, on_gpus))
    if measured["offloaded"]:
        where = f"in parallel.offload = {config.parallel.offload}, at most"
        table.add_row("elsewhere", "", size_text(measured["offloaded"]), where)
    console.print(table)


def _measure(config: Config, nproc: int) -> list[dict[str, Any]]:
    """What each rank measured, see `measure.MeasuredMemory`."""
    with TemporaryDirectory(prefix="farspan-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml())
        measured: Any = run_shared("pretrain.dry_run.measure", [str(path)], nproc)
    return list(measured)


def _rows(config: Config, kept: Mapping[str, int]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, remark and parts of each row."""
    from pretrain.dry_run import tracker
    from pretrain.dry_run.plan import MORE_MICROBATCHES, MORE_SEGMENTS

    yield tracker.WEIGHTS, "float32", [tracker.WEIGHTS]
    yield tracker.OPTIMIZER, f"{config.optim.state_dtype} moments", [tracker.OPTIMIZER]
    yield tracker.GRADIENTS, "of whole microbatches", [tracker.GRADIENTS]
    yield tracker.GATHERED, "of the layers at work", [tracker.GATHERED]
    yield tracker.COMMUNICATION, "weights and gradients on their way", [tracker.COMMUNICATION]
    yield tracker.EMBEDDING, "hidden states and angles", [tracker.EMBEDDING]
    for kind, numbers in _layers_by_kind(config, kept).items():
        each = round(sum(kept[number] for number in numbers) / len(numbers))
        name = f"{len(numbers)} {kind} layer{'s' * (len(numbers) > 1)}"
        remark = f"activations; each keeps {size_text(each)} after its forward pass"
        yield name, remark, [tracker.part_of_layer(number) for number in numbers]
    yield tracker.LOSS, f"{config.train.loss_chunk:,} tokens at a time", [tracker.LOSS]
    remark = "gradients of activations, and what is computed again"
    yield tracker.BACKWARD, remark, [tracker.BACKWARD]
    yield tracker.UPDATE, "the norm of the gradient, and the optimizer", [tracker.UPDATE]
    yield MORE_MICROBATCHES, "of the pipeline, than were planned", [MORE_MICROBATCHES]
    yield MORE_SEGMENTS, "what they hand on, and its gradient", [MORE_SEGMENTS]
    yield tracker.LANES, "what rows go on with in the next step", [tracker.LANES]
    yield tracker.OTHER, "tokens", [tracker.OTHER]


def _layers_by_kind(config: Config, layers: Mapping[str, int]) -> dict[str, list[str]]:
    kinds = config.model.layer_kinds()
    return {
        kind: [number for number in layers if kinds[int(number)] == kind]
        for kind in dict.fromkeys(kinds[int(number)] for number in layers)
    }


def _of_process(measured: Mapping[str, Any], on_gpus: bool) -> tuple[str, str, str, str]:
    if on_gpus:
        return "allocator", "", size_text(measured["process"]), "with what it caches"
    before = f"of which {size_text(measured['before'])} before there was a model"
    return "process", "", size_text(measured["process"]), before
