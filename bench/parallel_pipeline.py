"""The bubble of each pipeline schedule on two ranks, against theory.

    python -m bench.parallel_pipeline

The bubble is the share of the ranks' time, from the first computation of a step to the last, in
which they do not compute. Each forward and backward of a stage is timed in two processes of one
thread, each on a core of its own. The bubble comes from replaying these times in the order of the
schedule: a rank computes as soon as what it needs is there. In theory it is
(p - 1) / (v m + p - 1) for p ranks, v stages per rank and m microbatches (Narayanan et al. 2021,
arXiv:2104.04473, section 2.2). Zero-bubble schedules are held to less than interleaved's. Exit
code 1: a bubble is off by more than is allowed.

The column "by the clock" has the bubble as it was, with sending and whatever else the machine did.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bench.gated_delta import cpu_model
from bench.ranks import run_on_ranks
from parallel.mesh import join_ranks
from parallel.pipeline.bubble import replayed_bubble
from parallel.pipeline.plan import Action, Schedule, consecutive, stages_of_rank
from parallel.pipeline.schedule import Pipeline, PipelineShape
from parallel.stage import Objective, Stage
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import chunked_cross_entropy
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Part, Transformer

PP, MICROBATCHES, SEQ_LEN, REPEATS = 2, 8, 1024, 7
# Stages of one linear and one softmax layer, or two of each; embedding and head are small.
MODEL = ModelConfig(
    vocab_size=64,
    d_model=256,
    n_layers=8,
    d_ff=1024,
    layer_pattern=("linear", "softmax"),
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=64),
    linear=LinearAttentionConfig(n_key_heads=4, n_value_heads=4, key_dim=64, value_dim=64),
    moe=MoEConfig(n_experts=0),
)
STAGES_PER_RANK: dict[Schedule, int] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zbv": 2,
    "dualpipev": 2,
}
ZERO_BUBBLE = ("zbv", "dualpipev")
ALLOWED_ERROR = 0.1


class Computation(NamedTuple):
    """One computation of a stage.

    Attributes:
        start, end: seconds of a clock that all processes share.
        cpu: seconds of CPU time.
    """

    action: Action
    start: float
    end: float
    cpu: float


Step = list[list[Computation]]  # of each rank


def main() -> int:
    print(f"{cpu_model()}; torch {torch.__version__}")
    print(f"p={PP}, m={MICROBATCHES}, T={SEQ_LEN}, float32, median of {REPEATS} steps\n")
    return run_on_ranks(PP, "bench.parallel_pipeline", "rank")


def run_rank() -> int:
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    device = join_ranks(timedelta(minutes=5))
    failed = False
    if rank == 0:
        columns = (
            "forward ms | backward ms | step s | by the clock | bubble | theory | ratio | allowed"
        )
        print(f"| schedule | {columns} |\n|---|{'---:|' * 8}", flush=True)
    for schedule in STAGES_PER_RANK:
        steps = measure(schedule, device)
        if rank == 0:
            failed |= not report(schedule, steps)
    dist.destroy_process_group()
    return int(failed)


def measure(schedule: Schedule, device: torch.device) -> list[Step]:
    """What each rank computed in each step, after one step that warms up."""
    stages = build_stages(schedule)
    pipeline, batch = build_pipeline(schedule, stages, device), random_batch()
    record = record_computations(pipeline)
    steps = []
    for _ in range(1 + REPEATS):
        record.clear()
        dist.barrier()
        for stage in stages:
            stage.begin(MICROBATCHES * SEQ_LEN, [Documents.whole_rows(1, SEQ_LEN)] * MICROBATCHES)
        pipeline.forward_backward(*batch)
        ranks: list[Any] = [None] * PP
        dist.all_gather_object(ranks, list(record))
        steps.append(ranks)
    return steps[1:]


def build_stages(schedule: Schedule) -> list[Stage]:
    """Those of this rank, of equally many layers each."""
    per_rank = STAGES_PER_RANK[schedule]
    n_stages = PP * per_rank
    layers = consecutive([MODEL.n_layers // n_stages] * n_stages)
    objective = Objective(
        cross_entropy=lambda hidden, weight, labels: chunked_cross_entropy(
            hidden, weight, labels, SEQ_LEN
        ),
        auxiliary_loss=lambda out: torch.zeros(()),
        measure=lambda out: torch.zeros(()),
    )
    stages = []
    for index in stages_of_rank(schedule, PP, dist.get_rank(), per_rank):
        part = Part(layers[index], embeds=index == 0, predicts=index == n_stages - 1)
        model = Transformer(MODEL, part)
        initialize(model, MODEL, seed=0)
        stages.append(Stage(model, objective, index))
    return stages


def build_pipeline(schedule: Schedule, stages: Sequence[Stage], device: torch.device) -> Pipeline:
    shape = PipelineShape(
        schedule=schedule,
        n_stages=PP * STAGES_PER_RANK[schedule],
        n_microbatches=MICROBATCHES,
        tokens=(1, SEQ_LEN),
        hidden=(1, SEQ_LEN, MODEL.d_model),
        dtype=torch.float32,
    )
    group = dist.group.WORLD
    assert group is not None
    return Pipeline(stages, group, shape, device)


def random_batch() -> list[Tensor]:
    """Tokens and labels: [m, T] each."""
    generator = torch.Generator().manual_seed(0)
    shape = (MICROBATCHES, SEQ_LEN)
    tokens, labels = (
        torch.randint(0, MODEL.vocab_size, shape, generator=generator) for _ in range(2)
    )
    return [tokens, labels]


def record_computations(pipeline: Pipeline) -> list[Computation]:
    """A list that fills up while the pipeline runs."""
    record: list[Computation] = []

    def timed(stage: Any, method: str, kind: Callable[[bool], Any]) -> None:
        compute = getattr(stage, method)

        def wrapper(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            action = Action(kind(kwargs.get("full_backward", True)), stage.stage_index, microbatch)
            start, cpu_start = time.monotonic(), time.thread_time()
            result = compute(microbatch, *args, **kwargs)
            cpu = time.thread_time() - cpu_start
            record.append(Computation(action, start, time.monotonic(), cpu))
            return result

        setattr(stage, method, wrapper)

    for stage in pipeline.stages:
        timed(stage, "forward_one_chunk", lambda _: "forward")
        timed(stage, "backward_one_chunk", lambda whole: "backward" if whole else "input")
        timed(stage, "backward_weight_one_chunk", lambda _: "weight")
    return record


def report(schedule: Schedule, steps: list[Step]) -> bool:
    """Print a row of the table; whether the bubble is as it has to be."""
    per_rank = STAGES_PER_RANK[schedule]
    by_clock = statistics.median(map(bubble_by_clock, steps))
    bubble = statistics.median(map(bubble_of_cpu_times, steps))
    theory = (PP - 1) / (per_rank * MICROBATCHES + PP - 1)
    ratio = bubble / theory
    zero_bubble = schedule in ZERO_BUBBLE
    allowed = "< 1" if zero_bubble else f"{1 - ALLOWED_ERROR:.1f} to {1 + ALLOWED_ERROR:.1f}"
    forward = milliseconds(steps, "forward")
    backward = [milliseconds(steps, kind) for kind in ("backward", "input", "weight")]
    # A backward is either whole or in its two halves.
    backward_times = " + ".join(f"{time:.1f}" for time in backward if time)
    wall = statistics.median(map(duration, steps))
    print(
        f"| {schedule}, v={per_rank} | {forward:.1f} | {backward_times} | {wall:.2f} | "
        f"{by_clock:.4f} | {bubble:.4f} | {theory:.4f} | {ratio:.2f} | {allowed} |",
        flush=True,
    )
    return ratio < 1 if zero_bubble else abs(ratio - 1) <= ALLOWED_ERROR


def duration(step: Step) -> float:
    computations = [computation for rank in step for computation in rank]
    return max(c.end for c in computations) - min(c.start for c in computations)


def bubble_by_clock(step: Step) -> float:
    busy = sum(c.end - c.start for rank in step for c in rank)
    return 1 - busy / (len(step) * duration(step))


def bubble_of_cpu_times(step: Step) -> float:
    return replayed_bubble([[(c.action, c.cpu) for c in rank] for rank in step])


def milliseconds(steps: list[Step], kind: str) -> float:
    """Median CPU time of a stage and microbatch; 0 if the schedule has no such computation."""
    times = [c.cpu for step in steps for rank in step for c in rank if c.action.kind == kind]
    return 1000 * statistics.median(times) if times else 0.0


if __name__ == "__main__":
    sys.exit(run_rank() if sys.argv[1:] == ["rank"] else main())
