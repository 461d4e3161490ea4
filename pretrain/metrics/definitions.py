"""Every number that a run reports."""

from pretrain.metrics.data_definitions import DATA_DEFINITIONS
from pretrain.metrics.eval_definitions import EVAL_DEFINITIONS
from pretrain.metrics.metric import Metric

DEFINITIONS: tuple[Metric, ...] = (
    Metric(
        "train/step",
        "steps",
        "optimizer steps finished, the first is 1",
        "The horizontal axis of every chart; each logged step stands once in metrics.jsonl.",
        "equal",
        "pretrain/trainer.py",
    ),
    Metric(
        "train/loss",
        "nats/token",
        "sum of -ln p(token) over the loss tokens of the global batch / their global count",
        "Cross-entropy alone, without the balance loss. It should fall below the unigram "
        "entropy of the tokens within the first steps.",
        "sum",
        "pretrain/engines/sums.py",
    ),
    Metric(
        "train/aux_loss",
        "1",
        "mean over expert layers of E * sum_e f_e P_e",
        "Balance loss; the gradient is that of train/loss + model.moe.aux_loss * this + "
        "model.moe.z_loss * train/z_loss. f_e are the expert frequencies of the previous step "
        "(of each sequence with model.moe.balance=sequence), P_e this step's mean router "
        "probabilities. 1 is balanced, E is everything to one expert. With "
        "model.moe.balance=bias it is measured only, and has no gradient.",
        "sum",
        "pretrain/model/moe.py",
    ),
    Metric(
        "train/z_loss",
        "1",
        "mean over tokens and expert layers of logsumexp(router logits)^2",
        "How large the routers' logits are; model.moe.z_loss keeps it from growing.",
        "sum",
        "pretrain/model/moe.py",
    ),
    Metric(
        "train/tokens",
        "tokens",
        "tokens trained on since step 0, over all ranks",
        "Cumulative, across restarts.",
        "equal",
        "pretrain/trainer.py",
    ),
    Metric(
        "train/loss_tokens",
        "tokens",
        "tokens of the global batch that have a label",
        "What train/loss is a mean over: not the last token of a document, nor what its source "
        "never predicts.",
        "sum",
        "pretrain/engines/native.py",
    ),
    Metric(
        "train/loss_by_source",
        "nats/token",
        "{source: train/loss over the tokens of the batch that come from it}",
        "Weighted by train/loss_tokens_by_source they add up to train/loss. A source that stands "
        "out is harder, damaged, or learned by heart.",
        "sum",
        "pretrain/token_losses.py",
    ),
    Metric(
        "train/loss_tokens_by_source",
        "tokens",
        "{source: its part of train/loss_tokens}",
        "The mixture as it comes out, of the sources that this batch has tokens of.",
        "sum",
        "pretrain/token_losses.py",
    ),
    Metric(
        "train/loss_by_position",
        "nats/token",
        "[n]: train/loss over the tokens predicted from 2^n to 2^(n+1) - 1 others",
        "The others are those of its document that the row, or what it goes on from, has before "
        "it. NaN without such a token. It falls along the list as far as more context helps; "
        "eval/loss_by_position is that of one model.",
        "sum",
        "pretrain/token_losses.py",
    ),
    Metric(
        "train/loss_tokens_by_position",
        "tokens",
        "[n]: tokens of train/loss_tokens predicted from 2^n to 2^(n+1) - 1 others",
        "How long the documents of the batch are, as rows have cut them.",
        "sum",
        "pretrain/token_losses.py",
    ),
    Metric(
        "train/seq_len",
        "tokens",
        "data.seq_len",
        "Changes where a phase of the run sets another one.",
        "equal",
        "pretrain/config.py",
    ),
    Metric(
        "train/grad_norm",
        "1",
        "L2 norm of the gradient of all parameters, before clipping",
        "Spikes come before divergence; compare it with optim.clip.",
        "sum",
        "parallel/gradients.py",
    ),
    Metric(
        "train/grad_norm_by_layer",
        "1",
        "[embedding, each layer, what comes after them]: L2 norm of the gradient of its "
        "parameters, before clipping",
        "The squares add up to that of train/grad_norm, whatever the layout. It shows which layer "
        "a spike comes from.",
        "sum",
        "parallel/gradients.py",
    ),
    Metric(
        "train/weight_norm",
        "1",
        "L2 norm of all parameters",
        "Of every train.survey_every-th row, as the next three. It grows slowly; weight decay "
        "holds it.",
        "sum",
        "pretrain/update_norms.py",
    ),
    Metric(
        "train/weight_norm_by_layer",
        "1",
        "[embedding, each layer, what comes after them]: L2 norm of its parameters",
        "The squares add up to that of train/weight_norm.",
        "sum",
        "pretrain/update_norms.py",
    ),
    Metric(
        "train/update_ratio",
        "1",
        "L2 norm of the change of all parameters in this step / train/weight_norm",
        "About 1e-3 is usual early in a run; it falls with the learning rate. With moments in "
        "bfloat16 it is that of the rounded ones.",
        "sum",
        "pretrain/update_norms.py",
    ),
    Metric(
        "train/update_ratio_by_layer",
        "1",
        "[embedding, each layer, what comes after them]: the same of its parameters",
        "A layer that stands out learns too fast or hardly at all.",
        "sum",
        "pretrain/update_norms.py",
    ),
    Metric(
        "train/lr",
        "1",
        "learning rate of this step's update",
        "The schedule as it was applied.",
        "equal",
        "pretrain/schedule.py",
    ),
    Metric(
        "guard/skipped",
        "batches",
        "global batches of this attempt that left the weights as they were",
        "For a loss or a gradient that was not finite, or after a spike; the ledger and "
        "`farspan audit` name each of them, and why.",
        "equal",
        "pretrain/recorder.py",
    ),
    Metric(
        "guard/rollbacks",
        "1",
        "how often this attempt has gone back to a checkpoint because of a spike",
        "Rows of the steps that were undone are no longer there.",
        "equal",
        "pretrain/recorder.py",
    ),
    Metric(
        "perf/tokens_per_s",
        "tokens/s",
        "tokens of the global batch / perf/step_s",
        "Throughput of the whole run, not of one rank.",
        "rank 0",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/tokens_per_s_per_device",
        "tokens/s",
        "perf/tokens_per_s / devices",
        "Comparable between runs of different size.",
        "rank 0",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/step_s",
        "s",
        "wall-clock time of the step, waiting for data included",
        "A step that stands out is a slow rank or a stalled loader. Checkpoints are not in it.",
        "rank 0",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/data_wait_s",
        "s",
        "part of perf/step_s spent waiting for the next batch",
        "Near zero unless the loader is the bottleneck.",
        "mean",
        "pretrain/trainer.py",
    ),
    Metric(
        "perf/data_wait_share",
        "share",
        "perf/data_wait_s / perf/step_s",
        "What more workers, or a faster store, could save.",
        "mean",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/exposed_communication_s",
        "s",
        "time of the forward and backward passes in which nothing was computed, because a "
        "collective had not arrived",
        "Those of tp, ep, cp, FSDP and of copies of weights, not what a pipeline passes on. It is "
        "what faster links, or fewer stragglers, could save. On CPUs the time that calls block; on "
        "GPUs the time that the stream of the computation waits, without FSDP, whose waits are not "
        "seen from outside. Sums of FSDP over dp_replicate, and DeepEP, are not in it.",
        "mean",
        "parallel/stopwatch.py",
    ),
    Metric(
        "perf/exposed_communication_share",
        "share",
        "perf/exposed_communication_s / perf/step_s",
        "Near 0 where communication hides behind computation.",
        "mean",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/pipeline_bubble",
        "share",
        "1 - mean over ranks of (time in which the rank computed a stage / time of the forward and "
        "backward passes of all)",
        "With pp > 1: what is lost to stages that wait for each other, and to what they send. "
        "Waiting for collectives within a stage is computing here.",
        "mean",
        "parallel/pipeline/schedule.py",
    ),
    Metric(
        "perf/pipeline_bubble_predicted",
        "share",
        "the same of the schedule, if stages took equally long, a backward pass twice a forward "
        "pass, and sending no time",
        "(pp - 1) / (v m + pp - 1) for v stages of a rank and m microbatches; less with a schedule "
        "that splits the backward pass. perf/pipeline_bubble far above it means uneven stages "
        "(parallel.pipeline.layers_per_stage).",
        "equal",
        "parallel/pipeline/bubble.py",
    ),
    Metric(
        "perf/checkpoint_stall_s",
        "s",
        "time that training stood still for checkpoints since the row before",
        "With checkpoint.asynchronous it is the time of the copy; the rest is written behind.",
        "rank 0",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/evaluation_s",
        "s",
        "time that training stood still for evaluation on held-out text since the row before",
        "In rows with eval/heldout_loss; not part of perf/step_s.",
        "rank 0",
        "pretrain/evals/held_out.py",
    ),
    Metric(
        "perf/sent_bytes",
        "bytes",
        "what rank 0 sent to other ranks in the step; of reductions what the ring algorithm sends",
        "Collectives of tensor, expert and context parallelism and of FSDP, and what a pipeline "
        "passes on. Not counted are DeepEP, and gradients summed over the copies of a weight that "
        "ranks of tp or both ends of a pipeline hold.",
        "rank 0",
        "pretrain/metrics/step.py",
    ),
    Metric(
        "perf/sent_bytes_by_axis",
        "bytes",
        "{axis: {collective: bytes}} of perf/sent_bytes",
        "Which parallelism the network works for; axes are named in docs/layouts.md.",
        "rank 0",
        "parallel/fsdp_traffic.py",
    ),
    Metric(
        "perf/productive_s",
        "s",
        "time of the steps that stand, of all attempts, without waiting for data",
        "Without batches that were skipped and steps that were undone. After a restart it goes on "
        "from the last row that is left. With all of perf/lost_s it is the time since rank 0 of "
        "the first attempt was started.",
        "rank 0",
        "pretrain/metrics/goodput.py",
    ),
    Metric(
        "perf/goodput",
        "share",
        "perf/productive_s / (perf/productive_s + sum of perf/lost_s)",
        "Of all time since the run began; perf/lost_s tells what has become of the rest.",
        "rank 0",
        "pretrain/metrics/goodput.py",
    ),
    Metric(
        "perf/ettr",
        "share",
        "perf/productive_s / (perf/productive_s + sum of perf/lost_s without stopped)",
        "Effective training time ratio (Kokolis et al. 2024, arXiv:2410.21680): of the time in "
        "which the run was to train, waiting in a queue included.",
        "rank 0",
        "pretrain/metrics/goodput.py",
    ),
    Metric(
        "perf/lost_s",
        "s",
        "{cause: time since the run began that no step has used that stands}",
        "starting: from the start of rank 0 to an attempt's, or a phase's, first step; data wait: "
        "as perf/data_wait_s; skipped batches: computed, and not learned from; undone steps: by a "
        "rollback, with its loading, or trained again after a kill; evaluation; checkpoints; "
        "logging: rows, surveys of weights, and the end of W&B; between attempts: dead, ending, or "
        "waiting in a queue; stopped: from an end in order until somebody started it again.",
        "rank 0",
        "pretrain/metrics/goodput.py",
    ),
    Metric(
        "perf/memory_allocated",
        "bytes",
        "memory of a device that tensors take after the step",
        "Of the fullest device, of every train.survey_every-th row, as the next two. Not on CPUs.",
        "max",
        "pretrain/metrics/survey.py",
    ),
    Metric(
        "perf/memory_reserved",
        "bytes",
        "memory of a device that the allocator holds after the step",
        "Far more than perf/memory_peak is fragmentation.",
        "max",
        "pretrain/metrics/survey.py",
    ),
    Metric(
        "perf/memory_peak",
        "bytes",
        "the most memory of a device that tensors took since the attempt began",
        "On CPUs the most memory that a process had, its code included.",
        "max",
        "pretrain/metrics/survey.py",
    ),
    Metric(
        "perf/tflops_per_device",
        "TFLOP/s",
        "model FLOP of the step / (perf/step_s * devices)",
        "Model FLOP: 2 m k n for each product of [m, k] and [k, n], forward and backward: "
        "projections, router, the model.moe.top_k chosen experts of each token (less what was "
        "dropped), shared expert and output embedding, 6 for each active weight and token; "
        "attention, 12 * n_heads * head_dim for each pair of a query and a key that it sees, in "
        "the documents of this batch, each pair once; the gated delta net, the products of its "
        "chunks and of their gradients. Element-wise work and the embedding lookup are left out.",
        "rank 0",
        "pretrain/metrics/utilization.py",
    ),
    Metric(
        "perf/mfu",
        "share",
        "perf/tflops_per_device / the device's dense peak in train.dtype",
        "Model FLOPs utilization. The peak is that of the data sheet, for GPUs that are known by "
        "name, or train.peak_tflops; on other devices there is no such number. In float32 it is "
        "the peak without tensor cores.",
        "rank 0",
        "pretrain/metrics/utilization.py",
    ),
    Metric(
        "perf/hfu",
        "share",
        "(model FLOP + FLOP computed again) / (perf/step_s * devices * peak)",
        "Hardware FLOPs utilization: perf/mfu and what activation recompute, tiles, the first pass "
        "over segments, and the backward passes of attention and gated delta net compute again. "
        "Padding and the kernels of other libraries may compute more.",
        "rank 0",
        "pretrain/metrics/utilization.py",
    ),
    Metric(
        "perf/slowest_rank",
        "rank",
        "argmax over ranks of the time per step outside of collectives, since the last report",
        "The rank that waits least for the others, and so keeps them waiting. From heartbeats, "
        "every 10 s and 5 steps at least; on GPUs unless TORCH_NCCL_ENABLE_TIMING=0.",
        "max",
        "parallel/stragglers.py",
    ),
    Metric(
        "perf/slowest_over_median",
        "1",
        "the time of perf/slowest_rank / the median over ranks",
        "1 is even. Above 1.25 for the same rank in three reports in a row, the log warns, and "
        "names its host. Stages of a pipeline may differ by their layers.",
        "max",
        "parallel/stragglers.py",
    ),
    Metric(
        "moe/load",
        "share",
        "token-slots sent to the expert / token-slots of the layer, as [layers][experts]",
        "Each layer's shares add up to 1; balanced routing gives every expert 1 / E.",
        "sum",
        "pretrain/metrics/expert_load.py",
    ),
    Metric(
        "moe/max_violation",
        "1",
        "max over layers of (max_e load_e * E - 1)",
        "How much busier than balanced the busiest expert is: 0 is perfect, 1 is twice its share.",
        "sum",
        "pretrain/metrics/expert_load.py",
    ),
    Metric(
        "moe/dead_experts",
        "experts",
        "experts with no token in this step, over all layers",
        "Experts that stay dead are parameters that are not trained.",
        "sum",
        "pretrain/metrics/expert_load.py",
    ),
    Metric(
        "moe/dropped",
        "share",
        "token-slots over their expert's capacity / token-slots, over all layers",
        "0 without model.moe.capacity_factor; a token whose slots are all dropped passes the "
        "experts unchanged.",
        "sum",
        "pretrain/metrics/expert_load.py",
    ),
    Metric(
        "moe/router_entropy",
        "nats",
        "mean over tokens and expert layers of -sum_e p_e ln p_e",
        "Of the routers' probabilities p over all experts: ln E is undecided, 0 is sure. A fall "
        "to 0 early on is a collapse.",
        "sum",
        "pretrain/model/moe.py",
    ),
    Metric(
        "moe/selection_bias_range",
        "1",
        "max over layers of (max_e b_e - min_e b_e)",
        "With model.moe.balance=bias: how hard the bias b works. It should level off; a range "
        "near the probabilities routes by itself.",
        "equal",
        "pretrain/balancing.py",
    ),
    *EVAL_DEFINITIONS,
    *DATA_DEFINITIONS,
)
