"""What an engine cannot do, decided before any process starts, and without the engine."""

from collections.abc import Iterator

from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.layouts import Layout, stages_per_rank
from pretrain.model.config import ModelConfig


def check_megatron(config: Config, layout: Layout) -> None:
    """Raise UserError with all that megatron-core cannot do, of a layout that is one of ours."""
    problems = [*_model_problems(config.model, layout), *_run_problems(config, layout)]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(f"megatron-core cannot train this:\n{listed}\nThe native engine can")


def _model_problems(model: ModelConfig, layout: Layout) -> Iterator[str]:
    moe, kinds, tp = model.moe, model.layer_kinds(), layout.tp
    if moe.n_experts and moe.balance != "batch" and (moe.balance == "bias" or moe.aux_loss):
        yield f"model.moe.balance = {moe.balance}: the router in its layers knows batch alone"
    if moe.n_experts and moe.capacity_factor is not None:
        yield (
            f"model.moe.capacity_factor = {moe.capacity_factor}: it drops by microbatch and rank; "
            "null drops nothing"
        )
    if moe.n_experts and tp > 1 and layout.ep == 1:
        yield (
            f"experts with parallel.tp = {tp} and parallel.ep = 1: megatron-core 0.16.1 leaves "
            "each rank of tp its own part of their gradient; set parallel.ep"
        )
    heads = {}
    if set(kinds) != {"linear"}:
        heads["model.attention.n_kv_heads"] = model.attention.n_kv_heads
    if "linear" in kinds:
        heads["model.linear.n_key_heads"] = model.linear.n_key_heads
    for field, size in heads.items():
        if size % tp:
            yield f"{field} = {size}: ranks of parallel.tp = {tp} have no copies of heads there"


def _run_problems(config: Config, layout: Layout) -> Iterator[str]:
    parallel, pipeline = config.parallel, config.parallel.pipeline
    if layout.pp > 1 and pipeline.schedule not in ("1f1b", "interleaved"):
        yield f"parallel.pipeline.schedule = {pipeline.schedule}: it has 1f1b and interleaved"
    microbatches = config.train.global_batch // (layout.data_ranks * config.train.microbatch)
    if layout.pp > 1 and pipeline.schedule == "interleaved" and microbatches % layout.pp:
        yield (
            f"parallel.pipeline.schedule = interleaved with {microbatches} microbatches on each "
            f"rank: it takes a multiple of parallel.pp = {layout.pp}; another train.global_batch, "
            "or 1f1b"
        )
    stages = layout.pp * stages_of_rank(config, layout)
    if config.model.n_layers % stages:
        yield f"{stages} stages do not divide model.n_layers = {config.model.n_layers}"
    if pipeline.layers_per_stage != "balanced":
        yield "parallel.pipeline.layers_per_stage: its stages have equally many; balanced"
    if layout.ulysses > 1:
        yield f"parallel.ulysses = {layout.ulysses}: its groups of ranks exchange keys only; 1"
    if layout.cp > 1 and config.data.seq_len % (2 * layout.cp):
        yield f"2 x parallel.cp = {2 * layout.cp} does not divide data.seq_len"
    if config.context.in_segments:
        yield "context.segments, or lanes: it computes rows whole"
    if config.eval.every:
        yield (
            f"eval.every = {config.eval.every}: the loop evaluates the native engine's model; 0, "
            "and `farspan eval RUN` for the checkpoints"
        )
    if parallel.recompute not in ("none", "full"):
        yield f"parallel.recompute = {parallel.recompute}: it recomputes whole layers; none or full"
    if parallel.offload != "none" or parallel.feed_forward_tile is not None:
        yield "parallel.offload and parallel.feed_forward_tile: it has no such thing"
    if parallel.dispatcher != "all_to_all":
        yield f"parallel.dispatcher = {parallel.dispatcher}: its experts have their own; all_to_all"
    if config.optim.in_backward or config.optim.state_dtype != "float32":
        yield "optim.in_backward and optim.state_dtype: its AdamW has neither; false and float32"


def note_of_megatron(config: Config, layout: Layout) -> str | None:
    """What megatron-core takes no notice of, though results are the same."""
    train = config.train
    tokens = train.microbatch * config.data.seq_len // layout.cp
    if tokens <= train.loss_chunk:
        return None
    return (
        f"train.loss_chunk = {train.loss_chunk} has no effect: megatron-core computes the logits "
        f"of all {tokens} tokens of a microbatch at once"
    )


def stages_of_rank(config: Config, layout: Layout) -> int:
    """Pipeline stages of each rank; 1 without a pipeline."""
    return stages_per_rank(config) if layout.pp > 1 else 1
