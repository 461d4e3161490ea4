"""What DeepSpeed cannot do: decided without it, before ranks meet."""

from collections.abc import Iterator

from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.layouts import Layout
from pretrain.parallel_config import ZeroConfig


def check_deepspeed(config: Config, layout: Layout) -> None:
    """Raise UserError with all that DeepSpeed cannot do, of a layout that is one of ours."""
    problems = [
        *_zero_problems(config.parallel.zero),
        *_layout_problems(layout),
        *_run_problems(config),
    ]
    if layout.ulysses > 1:
        problems += _ulysses_problems(config, layout)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(f"DeepSpeed cannot train this:\n{listed}\nThe native engine can")


def _zero_problems(zero: ZeroConfig) -> Iterator[str]:
    if zero.offload_parameters and zero.stage != 3:
        yield (
            f"parallel.zero.offload_parameters with parallel.zero.stage = {zero.stage}: weights "
            "are whole there; parallel.zero.stage=3"
        )
    default = ZeroConfig().persistence_threshold
    if zero.persistence_threshold != default and zero.stage != 3:
        yield (
            f"parallel.zero.persistence_threshold with parallel.zero.stage = {zero.stage}: every "
            f"weight is whole there; parallel.zero.stage=3, or leave it at {default}"
        )


def _layout_problems(layout: Layout) -> Iterator[str]:
    for axis in ("pp", "tp", "ep"):
        if (size := getattr(layout, axis)) > 1:
            yield f"parallel.{axis} = {size}: ZeRO shares out whole layers; parallel.{axis}=1"
    if layout.dp_replicate > 1:
        yield (
            f"parallel.dp_replicate = {layout.dp_replicate}: ZeRO shares out over all ranks; 1, "
            "and parallel.dp_shard=auto"
        )
    if layout.ulysses not in (1, layout.cp):
        yield (
            f"parallel.ulysses = {layout.ulysses} of parallel.cp = {layout.cp}: 1 is our ring, "
            f"{layout.cp} DeepSpeed's Ulysses, and nothing is between them"
        )


def _ulysses_problems(config: Config, layout: Layout) -> Iterator[str]:
    model, ranks = config.model, layout.ulysses
    if "linear" in model.layer_kinds():
        yield (
            f"linear layers with parallel.ulysses = {ranks}: DeepSpeed exchanges the heads of "
            "softmax attention, and has nothing for a recurrence; parallel.ulysses=1 is our own "
            "context parallelism"
        )
    if model.attention.n_kv_heads % ranks:
        yield (
            f"parallel.ulysses = {ranks} does not divide model.attention.n_kv_heads = "
            f"{model.attention.n_kv_heads}: DeepSpeed copies no key heads"
        )
    moe = model.moe
    if moe.n_experts and (moe.balance == "sequence" or moe.capacity_factor is not None):
        yield (
            f"model.moe.balance = {moe.balance} and model.moe.capacity_factor = "
            f"{moe.capacity_factor} with parallel.ulysses = {ranks}: where rows are cut into "
            "consecutive parts, routers do not see whole ones; batch or bias, and null"
        )


def _run_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if config.context.in_segments:
        yield "context.segments, or lanes: it computes rows whole"
    if parallel.offload != "none":
        yield (
            f"parallel.offload = {parallel.offload}: activations stay on the device; none, and "
            "parallel.zero.offload_optimizer or offload_parameters for the rest"
        )
    if parallel.dispatcher != "all_to_all":
        yield f"parallel.dispatcher = {parallel.dispatcher}: no token is sent; all_to_all"
    if config.eval.every:
        yield (
            f"eval.every = {config.eval.every}: nothing is evaluated while it trains; 0, and "
            "`farspan eval RUN` afterwards"
        )
    if config.optim.in_backward or config.optim.state_dtype != "float32":
        yield "optim.in_backward and optim.state_dtype: ZeRO has neither; false and float32"
