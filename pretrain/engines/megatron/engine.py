"""A model in megatron-core, with its schedules and its optimizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from data_pipeline.stream import Batch
from parallel.agreement import Copy
from parallel.gradients import Norms, part_of, sum_squares
from pretrain.balancing import RouterState
from pretrain.checkpoint.contents import MODEL, OPTIMIZER, of_routers
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.region import Region, held
from pretrain.checkpoint.store import together
from pretrain.config import Config
from pretrain.engines.engine import GradientNorms, Measured
from pretrain.engines.limits import check_megatron, stages_of_rank
from pretrain.engines.megatron import router
from pretrain.engines.megatron.config import optimizer_config, transformer_config
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.engines.megatron.moments import MOMENTS, Moments
from pretrain.engines.megatron.passes import forward_step, share_out
from pretrain.engines.megatron.spec import block_spec
from pretrain.engines.megatron.weights import (
    Piece,
    copy_groups,
    fill,
    follow_stored,
    mark_shares,
    pieces,
    stored_weight,
    whole,
)
from pretrain.engines.sums import measured_by, sum_over_ranks
from pretrain.layouts import Layout
from pretrain.model.init import initial_values
from pretrain.model.kernels.backends import make_deterministic
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.objective import tokens_per_step
from pretrain.token_losses import LossGroups


class MegatronEngine:
    """The model of `config` on the ranks of `layout`, see `pretrain.engines.engine.Engine`.
    Collective.

    Attributes:
        models: this rank's stages, as plain GPTModels.
        stages: the same, as megatron-core trains them.

    Raises:
        UserError: megatron-core cannot express the configuration; lists why.
    """

    updates_in_clip = False

    @on_any_device()
    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        check_megatron(config, layout)
        if config.train.deterministic:
            make_deterministic()
        self.config, self.layout, self.device = config, layout, device
        theirs = transformer_config(config, layout)
        _join_groups(config, layout)
        if device.type == "cuda":
            # Recomputation and Transformer Engine look for its generators.
            model_parallel_cuda_manual_seed(config.train.seed)
        self.data_rank = int(parallel_state.get_data_parallel_rank())
        self.data_ranks = int(parallel_state.get_data_parallel_world_size())
        stages = theirs.virtual_pipeline_model_parallel_size
        numbers = [None] if stages is None else list(range(stages))
        self.models = [_build_stage(config, theirs, number).to(device) for number in numbers]
        for gpt in self.models:
            mark_shares(gpt, config.model)
        self.stages = [_wrap(model, theirs) for model in self.models]
        of_optimizer = optimizer_config(config)
        # Without these everything decays, norms too.
        overrides = get_standard_config_overrides(of_optimizer)
        self.optimizer = get_megatron_optimizer(of_optimizer, self.stages, overrides)
        self.moments = Moments(self.optimizer)
        self.pieces = [piece for gpt in self.models for piece in pieces(gpt, config.model)]
        self.routers = RouterState(config.model.n_layers, config.model.moe)
        self._routers = router.routers_of(self.models)
        self._loss_groups = LossGroups(len(config.data.sources()), config.data.seq_len)
        self._to_fill: Mapping[str, Tensor | Region] = {}

    @on_any_device()
    def initialize(self) -> None:
        """Stand before the first step, with weights that follow from train.seed and their names."""
        model, seed = self.config.model, self.config.train.seed
        fill(
            self.pieces,
            lambda x: initial_values(x.name, x.shape, x.region, model, seed, self.device),
        )
        self.moments.forget()
        self.routers.reset()
        self._refresh()

    @on_any_device()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights under our names, from a checkpoint or of a Hugging Face model."""
        fill(self.pieces, lambda piece: weights[piece.name][piece.region])

    @on_any_device()
    def weights(self) -> dict[str, Tensor]:
        """Whole weights under our names, on every rank. Collective."""
        return whole(self.pieces, self.models[0].pg_collection)

    @on_any_device()
    def backward(self, batch: Batch, lr: float, numbers: Sequence[float] = ()) -> Measured:
        """Leave the gradient of a global batch in the weights' `main_grad`, see `Engine`."""
        self.discard()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.config.optim.weight_decay * group["wd_mult"]
        loss_tokens = torch.tensor(int((batch.labels != IGNORED).sum()), device=self.device)
        dist.all_reduce(loss_tokens, group=parallel_state.get_data_parallel_group())
        count = max(1, int(loss_tokens))
        router.begin_step(self._routers, count, tokens_per_step(self.config))
        recorded, model = self._run_schedule(batch), self.config.model
        of_routers = router.measured(self._routers, model.n_layers, model.moe)
        # The ranks of tp have each seen the loss of all their tokens.
        losses = torch.stack([of_routers.new_zeros(1 + self._loss_groups.size), *recorded]).sum(0)
        losses /= self.layout.tp
        summed = sum_over_ranks(losses, of_routers.flatten(), of_routers.new_tensor(numbers))
        return measured_by(self.config, self._loss_groups, summed, count)

    def _run_schedule(self, batch: Batch) -> list[Tensor]:
        """All passes; what each microbatch has recorded on a last stage."""
        train, groups = self.config.train, self._loss_groups
        group = parallel_state.get_context_parallel_group()
        microbatches = share_out(self.config, batch, groups, group, self.device)
        iterators = [iter(microbatches) for _ in self.models]
        recorded: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, groups),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.stages if len(self.stages) > 1 else self.stages[0],
            num_microbatches=len(microbatches),
            seq_length=self.config.data.seq_len,
            micro_batch_size=train.microbatch,
            forward_only=False,
        )
        return recorded

    @on_any_device()
    @torch.no_grad()
    def clip(self) -> GradientNorms:
        """Scale the gradient down to a norm of `optim.clip`.

        In the order and precision of `parallel.gradients.clip_gradients`: one sum over all ranks,
        so that all scale by the same bits, where megatron-core takes one of dense weights and one
        of experts.
        """
        self.optimizer.prepare_grads()
        n_layers, of_weight = self.config.model.n_layers, self._piece_of_weight()
        gradients: list[Any] = [stored_weight(weight).grad for weight in of_weight]
        # On a CPU torch's norms add up in long chains: off by 2e-3 for a weight of 32000 x 1024.
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).double()
        found = [
            (part_of(piece.name, n_layers), self._copies(piece)) for piece in of_weight.values()
        ]
        part, copies = torch.tensor(found, device=squares.device).unbind(1)
        parts = squares.new_zeros(n_layers + 2).index_add_(0, part, squares / copies)
        norms = sum_squares(parts)
        if self.config.optim.clip is not None:
            scale = torch.clamp(self.config.optim.clip / (norms.whole + 1e-6), max=1.0).float()
            torch._foreach_mul_(gradients, scale)
        norm, *of_parts = torch.cat([norms.whole[None], norms.parts]).tolist()
        return GradientNorms(norm, of_parts)

    def _piece_of_weight(self) -> dict[nn.Parameter, Piece]:
        """One of those that each weight has; they are all of one layer, and on the same ranks."""
        return {weight: piece for piece in self.pieces for weight in piece.weights}

    def _copies(self, piece: Piece) -> int:
        return prod(group.size() for group in copy_groups(piece, self.config.model))

    @on_any_device()
    def update(self, measured: Measured) -> None:
        """Step the optimizer, let the routers learn, and forget the gradient."""
        self.optimizer.step_with_ready_grads()
        self.routers.update(measured.expert_counts)
        self._refresh()
        self.discard()

    def _refresh(self) -> None:
        for number, of_layer in self._routers.items():
            of_layer.frequencies.copy_(self.routers.frequencies[number])

    @on_any_device()
    def discard(self) -> None:
        """Forget the gradient."""
        for stage in self.stages:
            stage.zero_grad_buffer()
        # In fp32 `grad` is an alias of `main_grad`, which would be added to itself.
        self.optimizer.zero_grad()

    def begin_rows_anew(self) -> None:
        """No row goes on with what one before it has left."""

    @on_any_device()
    def tensors(self) -> dict[str, Tensor | Region]:
        """This rank's part of weights, moments and routers' state under our names, see `Engine`.

        What does not lie in one piece here is copied to host memory, by the rank that saves it.
        """
        self.moments.begin()
        named: dict[str, Tensor | Region] = dict(of_routers(self.routers.state_dict()))
        for piece in self.pieces:
            for name, of in self._kept_of(piece):
                like = torch.empty(piece.sizes, device="meta")
                named[name] = Region(like, piece.shape, piece.offsets, partial(piece.take, of))
            named[_step_of(piece)] = self.moments.step(stored_weight(piece.weights[0]))
        return named

    def _kept_of(self, piece: Piece) -> Iterator[tuple[str, Callable[[nn.Parameter], Tensor]]]:
        """What a run keeps of a piece, but for the number of steps, and where it is."""
        yield f"{MODEL}{piece.name}", stored_weight
        for which in MOMENTS:
            yield f"{OPTIMIZER}{piece.name}.{which}", partial(self._moment, which)

    def _moment(self, which: str, weight: nn.Parameter) -> Tensor:
        return self.moments.moment(stored_weight(weight), which)

    def tensors_to_fill(self, index: Index) -> Mapping[str, Tensor | Region]:
        """Room for the same, of a checkpoint that any engine has written; where that has nothing of
        an optimizer, as before the first step.
        """
        room = self.tensors()
        if not any(name.startswith(OPTIMIZER) for name in index.by_name):
            self.moments.forget()
            room = {name: x for name, x in room.items() if not name.startswith(OPTIMIZER)}
        self._to_fill = {
            name: Region(held(x), x.shape, x.offsets) if isinstance(x, Region) else x
            for name, x in room.items()
        }
        return self._to_fill

    @on_any_device()
    def take_over(self) -> None:
        """Go on with what `tensors_to_fill` gave, now that it is filled.

        Raises:
            UserError: on all ranks; one counts weights together that took different numbers of
                steps.
        """
        filled, self._to_fill = self._to_fill, {}
        for piece in self.pieces:
            for name, of in self._kept_of(piece):
                if name in filled:
                    piece.put(held(filled[name]), of)
        steps = {
            stored_weight(weight): held(filled[_step_of(piece)])
            for piece in self.pieces
            if _step_of(piece) in filled
            for weight in piece.weights
        }
        together(lambda: self.moments.set_steps(steps))
        follow_stored(self.pieces)
        self._refresh()
        self.discard()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank stores of the weights, each expert by itself."""
        for piece in self.pieces:
            for number, view in enumerate(piece.views(stored_weight), piece.offsets[0]):
                yield f"{piece.name}[{number}]" if piece.is_stacked else piece.name, view

    def copies(self) -> Iterable[Copy]:
        """Weights of data parallel ranks, and those that ranks of tp or both ends of a pipeline
        have whole.
        """
        for piece in self.pieces:
            groups = copy_groups(piece, self.config.model)
            for number, view in enumerate(piece.views(stored_weight), piece.offsets[0]):
                for group in groups:
                    yield f"{piece.name}[{number}]" if piece.is_stacked else piece.name, view, group

    def sent_bytes(self) -> Counter[tuple[str, str]] | None:
        """They are not counted."""
        return None

    def weight_and_update_norms(self, lr: float) -> Norms | None:
        """They are not taken."""
        return None

    def close(self) -> None:
        """Give up the groups of ranks, so that another engine can be built."""
        parallel_state.destroy_model_parallel()


def _join_groups(config: Config, layout: Layout) -> None:
    stages = stages_of_rank(config, layout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=stages if stages > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        # Made a timedelta of: parts of a minute count.
        distributed_timeout_minutes=config.train.collective_timeout_s / 60,
    )


def _step_of(piece: Piece) -> str:
    return f"{OPTIMIZER}{piece.name}.step"


def _build_stage(config: Config, theirs: Any, vp_stage: int | None) -> Any:
    model = config.model
    return GPTModel(
        theirs,
        block_spec(model, theirs, vp_stage),
        model.vocab_size,
        config.data.seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
        share_embeddings_and_output_weights=model.tie_embeddings,
        # Our attention rotates: exact at far positions, which theirs in fp32 is not.
        position_embedding_type="none",
        vp_stage=vp_stage,
    )


def _wrap(gpt: Any, theirs: Any) -> Any:
    inner = Float16Module(theirs, gpt) if theirs.bf16 else gpt
    # Gradients are summed in fp32 whatever the model's dtype.
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(theirs, ddp, inner)
