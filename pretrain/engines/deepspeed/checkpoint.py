"""Weights out of DeepSpeed's checkpoints, of any ZeRO stage and number of ranks.

They are pickles, which run whatever code they hold: read those of people you trust only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from pretrain.checkpoint.hf_weights import expert_by_expert, state_from_hf, state_to_hf
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer

SHOWN = 3
# What `torch.load` and DeepSpeed raise of files that are missing, cut off, or not known to them.
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, UnpicklingError)
# By which the weights of a model are known.
OURS, HUGGING_FACE = "embedding.weight", "model.embed_tokens.weight"


class Imported(NamedTuple):
    """What a model is made of.

    Attributes:
        weights: whole, in fp32 and under our names.
        selection_bias: [L, E] of the routers, where our engine saved it; else None.
    """

    weights: dict[str, Tensor]
    selection_bias: Tensor | None


def import_checkpoint(directory: Path, model: ModelConfig) -> Imported:
    """Read a ZeRO checkpoint, or a universal one, of our model or of transformers' same model.

    Args:
        directory: the folder with the file `latest`, or that of a step beside it.

    Raises:
        UserError: there is no checkpoint, or it is of another model; names what differs.
    """
    step = step_folder(directory)
    state = _universal(step) if is_universal(step) else _of_ranks(step)
    with torch.device("meta"):
        empty = Transformer(model).state_dict()
    if (prefix := _prefix_of(HUGGING_FACE, state)) is not None:
        single = expert_by_expert(model, state)
        theirs = _in_shape(single, prefix, state_to_hf(model, empty), step)
        return Imported(state_from_hf(model, theirs), None)
    if (prefix := _prefix_of(OURS, state)) is None:
        raise UserError(
            f"{step}: no weight is called {OURS} or {HUGGING_FACE}, by which our models and those "
            f"of transformers are known; there are {_some(state)}"
        )
    bias = _selection_bias(step)
    if bias is not None and bias.any() and model.moe.balance != "bias":
        raise UserError(
            f"{step}: its routers choose experts by a selection bias, of up to "
            f"{bias.abs().max().item():.3g}, which model.moe.balance = {model.moe.balance} leaves "
            "out: the model would choose others; model.moe.balance=bias"
        )
    return Imported(_in_shape(state, prefix, empty, step), bias)


def step_folder(directory: Path) -> Path:
    """The folder of a step, of itself or of the folder whose file `latest` names it.

    Raises:
        UserError: it is neither.
    """
    latest = directory / "latest"
    step = directory / latest.read_text().strip() if latest.is_file() else directory
    if is_universal(step) or any(step.glob("*_optim_states.pt")):
        return step
    if step != directory:
        raise UserError(
            f"{latest} names {step.name}, where neither *_optim_states.pt nor a folder `zero` is; "
            "copy all of it, or name the folder of another step"
        )
    raise UserError(
        f"{directory}: neither a file `latest`, nor *_optim_states.pt or a folder `zero`; "
        "name the folder that DeepSpeed's save_checkpoint was given, or the output of "
        "ds_to_universal"
    )


def is_universal(step: Path) -> bool:
    """Whether the folder of a step is what ds_to_universal has made."""
    return (step / "zero").is_dir()


def check_same_ranks(step: Path, ranks: int, stage: int) -> None:
    """Raise UserError where DeepSpeed cannot go on from the folder of a step.

    Each rank looks for the files of all, so that none waits for one that has ended.
    """
    found = {file.name for file in step.glob("*model_states.pt")}
    saved_by = ranks if is_universal(step) else len(list(step.glob("*_optim_states.pt")))
    # Without any file, nothing says that it is of another stage.
    of_stage_3 = any(name.startswith("zero_pp_rank_") for name in found) if found else stage == 3
    if saved_by != ranks or of_stage_3 != (stage == 3):
        saved = "stage 3" if of_stage_3 else "stage 1 or 2"
        raise UserError(
            f"{step}: saved by {saved_by} ranks with ZeRO {saved}, and here are {ranks} with stage "
            f"{stage}; go on with that stage, on other ranks from what ds_to_universal makes of "
            "it, or begin a run with its weights alone: `farspan import`"
        )
    if missing := sorted(_model_states(step, ranks, stage) - found):
        raise UserError(
            f"{step}: files are missing: {_some(missing)}; copy those of all ranks, or name the "
            "folder of another step"
        )


def _model_states(step: Path, ranks: int, stage: int) -> set[str]:
    """The files that DeepSpeed reads next to weights and moments."""
    if stage < 3:
        return {"mp_rank_00_model_states.pt"}
    readers = 1 if is_universal(step) else ranks
    return {f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(readers)}


def _of_ranks(step: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(step.parent), tag=step.name
        )
    except UNREADABLE as error:
        # What ZeRO 1 saves in bf16, among others.
        raise UserError(
            f"{step}: DeepSpeed cannot put the weights of its ranks together: {error}; copy the "
            "files of all ranks, or if they are there, take what `python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {step} --output_folder OUT` "
            "makes of it"
        ) from None
    return state


def _universal(step: Path) -> dict[str, Tensor]:
    """Where they come from stage 3 they are flat."""
    files = {file.parent.name: file for file in sorted((step / "zero").glob("*/fp32.pt"))}
    saved: dict[str, Any] = {name: _load(file) for name, file in files.items()}
    return {name: x["param"] if isinstance(x, dict) else x for name, x in saved.items()}


def _load(file: Path, *, weights_only: bool = True) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only)
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read: {error}; copy it again") from None


def _prefix_of(known: str, names: Iterable[str]) -> str | None:
    """What modules around the model have put before its names."""
    return next((name.removesuffix(known) for name in names if name.endswith(known)), None)


def _in_shape(
    state: Mapping[str, Tensor], prefix: str, like: Mapping[str, Tensor], step: Path
) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # Some write the tied copy of the embedding, too.
    extra = found.keys() - like.keys() - {"lm_head.weight"}
    for problem, names in (("are missing", like.keys() - found.keys()), ("are unknown", extra)):
        if names:
            raise UserError(
                f"{step}: weights {problem}: {_some(names)}; it is a checkpoint of another model, "
                "or not all of one"
            )
    for name, tensor in like.items():
        if found[name].numel() != tensor.numel():
            raise UserError(
                f"{step}: {name} has {found[name].numel()} elements, and {tuple(tensor.shape)} in "
                "this model; it is a checkpoint of another one"
            )
    return {name: found[name].float().reshape(x.shape).contiguous() for name, x in like.items()}


def _selection_bias(step: Path) -> Tensor | None:
    file = min(step.glob("*model_states.pt"), default=None)
    if file is None:
        raise UserError(f"{step}: no *model_states.pt, where the routers' part is; copy it, too")
    routers = _load(file, weights_only=False).get("routers")
    # A user may have saved something else of that name.
    bias = routers.get("selection_bias") if isinstance(routers, dict) else None
    return bias if isinstance(bias, Tensor) else None


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{', '.join(ordered[:SHOWN])} ({len(ordered)} in all)"
