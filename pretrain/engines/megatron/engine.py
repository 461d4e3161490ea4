"""A model in megatron-core, with its schedules and its optimizer, trained as our Trainer does."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
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
from pretrain.config import Config
from pretrain.engines.limits import check_megatron
from pretrain.engines.megatron.config import optimizer_config, transformer_config
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.engines.megatron.documents import PackedDocuments, shard_batch
from pretrain.engines.megatron.router import begin_step, finish_step, routers_of
from pretrain.engines.megatron.spec import block_spec
from pretrain.engines.megatron.weights import fill, mark_shares, stored_weight, whole
from pretrain.engines.metrics import StepMetrics
from pretrain.layouts import Layout
from pretrain.model.init import initial_values
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.transformer import Transformer
from pretrain.objective import tokens_per_step
from pretrain.parts import attention_cost


@dataclass(frozen=True)
class Microbatch:
    """This rank's part of one: each [b, T / cp] int64."""

    tokens: Tensor
    labels: Tensor
    position: Tensor
    documents: PackedDocuments


class MegatronEngine:
    """The model of `config` on the ranks of `layout`, with the weights it starts from. Collective.

    Attributes:
        models: this rank's stages, as plain GPTModels.
        stages: the same, as megatron-core trains them.

    Raises:
        UserError: megatron-core cannot express the configuration; lists why.
    """

    @on_any_device()
    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        check_megatron(config, layout)
        self.config, self.device = config, device
        theirs = transformer_config(config, layout)
        stages = theirs.virtual_pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=stages,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
        )
        if device.type == "cuda":
            # Recomputation and Transformer Engine look for its generators.
            model_parallel_cuda_manual_seed(config.train.seed)
        numbers = [None] if stages is None else list(range(stages))
        self.models = [_build_stage(config, theirs, number).to(device) for number in numbers]
        for gpt in self.models:
            mark_shares(gpt, config.model)
        self.stages = [_wrap(model, theirs) for model in self.models]
        of_optimizer = optimizer_config(config)
        # Without these everything decays, norms too.
        overrides = get_standard_config_overrides(of_optimizer)
        self.optimizer = get_megatron_optimizer(of_optimizer, self.stages, overrides)
        self.routers = routers_of(self.models)
        # Now that there are the optimizer's copies in fp32.
        self.initialize()

    @property
    def data_rank(self) -> int:
        """This rank's place among those that take different rows of a global batch."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_ranks(self) -> int:
        return int(parallel_state.get_data_parallel_world_size())

    def initialize(self) -> None:
        """The weights that our Trainer starts from, two whole ones in memory at a time."""
        model = self.config.model
        with torch.device("meta"):
            shapes = {name: w.shape for name, w in Transformer(model).named_parameters()}

        # A layer's experts are asked for one by one, and each of our two weights has all of them.
        @lru_cache(maxsize=2)
        def weight(name: str) -> Tensor:
            region = tuple(slice(0, size) for size in shapes[name])
            seed = self.config.train.seed
            return initial_values(name, tuple(shapes[name]), region, model, seed, self.device)

        for gpt in self.models:
            fill(gpt, model, weight)

    @on_any_device()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights under our names, from a checkpoint or of a Hugging Face model."""
        for gpt in self.models:
            fill(gpt, self.config.model, weights.__getitem__)

    @on_any_device()
    def weights(
        self, tensor: Callable[[nn.Parameter], Tensor] = stored_weight
    ) -> dict[str, Tensor]:
        """Whole weights under our names, or what `tensor` makes of each, on every rank.
        Collective.
        """
        return whole(self.models, self.config.model, tensor)

    def step(self, batch: Batch, lr: float) -> StepMetrics:
        """One optimizer step. Collective.

        Args:
            batch: the rows of this data rank.
        """
        loss, loss_tokens = self.backward(batch)
        return StepMetrics(loss, loss_tokens, self.update(lr))

    @on_any_device()
    def backward(self, batch: Batch) -> tuple[float, int]:
        """Leave the gradient of a global batch in the weights' `main_grad`.

        Returns:
            The mean loss, and of how many tokens.
        """
        rows = [torch.from_numpy(x) for x in (batch.tokens, batch.labels, batch.position)]
        loss_tokens = (rows[1] != IGNORED).sum().to(self.device)
        dist.all_reduce(loss_tokens, group=parallel_state.get_data_parallel_group())
        begin_step(self.routers, max(1, int(loss_tokens)), tokens_per_step(self.config))
        for stage in self.stages:
            stage.zero_grad_buffer()
        # In fp32 `grad` is an alias of `main_grad`, which would be added to itself.
        self.optimizer.zero_grad()
        size, theirs = self.config.train.microbatch, self.models[0].config
        microbatches = list(zip(*(x.split(size) for x in rows), strict=True))
        iterators = [self._share(microbatches) for _ in self.models]
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.stages if len(self.stages) > 1 else self.stages[0],
            num_microbatches=len(microbatches),
            seq_length=self.config.data.seq_len,
            micro_batch_size=size,
            forward_only=False,
        )
        # Only a last stage has losses, and each rank of tp the same ones.
        total = torch.stack([torch.zeros((), dtype=torch.float64, device=self.device), *losses])
        loss = total.sum() / theirs.tensor_model_parallel_size
        dist.all_reduce(loss)
        return loss.item() / max(1, int(loss_tokens)), int(loss_tokens)

    @on_any_device()
    def update(self, lr: float) -> float:
        """Clip, and step the optimizer; the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.config.optim.weight_decay * group["wd_mult"]
        _, grad_norm, _ = self.optimizer.step()
        finish_step(self.routers)
        return float(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on on the same layout."""
        return {
            "models": [gpt.state_dict() for gpt in self.models],
            "optimizer": self.optimizer.state_dict(),
            "routers": [router.previous for router in self.routers],
        }

    @on_any_device()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_dict` was called on this rank."""
        for gpt, of_model in zip(self.models, state["models"], strict=True):
            gpt.load_state_dict(of_model)
        self.optimizer.load_state_dict(state["optimizer"])
        for router, previous in zip(self.routers, state["routers"], strict=True):
            router.previous.copy_(previous)

    def close(self) -> None:
        """Give up the groups of ranks, so that another engine can be built."""
        parallel_state.destroy_model_parallel()

    def _share(self, microbatches: list[tuple[Tensor, ...]]) -> Iterator[Microbatch]:
        group = parallel_state.get_context_parallel_group()
        cost = attention_cost(self.config.model)
        for tokens, labels, position in microbatches:
            batch = {"tokens": tokens.to(self.device), "labels": labels.to(self.device)}
            mine, documents = shard_batch(batch, position, group, cost=cost)
            yield Microbatch(**mine, documents=documents)


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


def _forward_step(batches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    losses = model(
        batch.tokens,
        batch.position,
        None,
        labels=batch.labels.clamp_min(0),
        packed_seq_params=batch.documents,
    )
    return losses, partial(_loss_sum, batch.labels != IGNORED)


def _loss_sum(is_predicted: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the number of its tokens, and the loss for the record."""
    total = (losses.float() * is_predicted).sum()
    return total, is_predicted.sum().int(), total.detach().double()
