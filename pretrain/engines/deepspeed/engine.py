"""A model of ours on DeepSpeed's ZeRO, trained as our Trainer does."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param
from torch import Tensor, nn

from data_pipeline.stream import Batch
from parallel.context.split import split_sequence
from parallel.expert.sequence import split_rows
from parallel.feed_forward import tile_feed_forwards
from parallel.recompute import recompute_layers
from pretrain.balancing import RouterState
from pretrain.build import build_mesh
from pretrain.config import Config, OptimConfig
from pretrain.engines.deepspeed.checkpoint import check_same_ranks, is_universal, step_folder
from pretrain.engines.deepspeed.config import deepspeed_config
from pretrain.engines.deepspeed.ulysses import ConsecutiveDocuments, exchange_heads
from pretrain.engines.metrics import StepMetrics
from pretrain.engines.zero_limits import ZeroConfig, check_deepspeed
from pretrain.layouts import Layout
from pretrain.model.init import initial_values
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from pretrain.objective import build_objective, measure_routers
from pretrain.optim import set_learning_rate
from pretrain.parts import recompute_modes
from pretrain.share import share_of_rank


class Loss(nn.Module):
    """What DeepSpeed calls: a microbatch's share of the loss of a global batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Transformer(config.model)
        self.objective = build_objective(config)

    def forward(
        self, tokens: Tensor, labels: Tensor, documents: Documents, loss_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens and labels [b, T] -> the loss to differentiate, the summed cross-entropy, and
        what `measure_routers` says.
        """

        def output(hidden: Tensor, weight: Tensor) -> Tensor:
            return self.objective.cross_entropy(hidden, weight, labels)

        out = self.model(tokens, documents, output)
        loss = out.value / loss_tokens + self.objective.auxiliary_loss(out)
        return loss, out.value.detach(), measure_routers(out)


class DeepSpeedEngine:
    """The model of `config` on the ranks of `layout`, with the weights it starts from. Collective.

    Ranks share out what ZeRO's stage says over all of them, those of `cp` too.

    Attributes:
        engine: DeepSpeed's own.
        model: our Transformer; with ZeRO 3 its weights are whole only while they are used.

    Raises:
        UserError: DeepSpeed cannot express the configuration; lists why.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        device: torch.device,
        zero: ZeroConfig = ZeroConfig(),  # noqa: B008  immutable
    ) -> None:
        check_deepspeed(config, layout, zero)
        self.config, self.layout, self.device, self.zero = config, layout, device, zero
        self.mesh = build_mesh(config, layout, device)
        if device.type == "cpu":
            # Collectives are gloo's: its own in shared memory would have to be compiled first.
            deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        deepspeed.init_distributed()
        theirs = deepspeed_config(config, zero, layout.data_ranks)
        loss = _build(config, theirs, zero, device)
        self.model: Transformer = loss.model
        self.layers: dict[str, Any] = dict(loss.model.layers.items())
        self._spread()
        optimizer = _build_optimizer(loss, config.optim)
        self._decay = [group["weight_decay"] for group in optimizer.param_groups]
        self.engine: Any
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=theirs
        )
        for name, buffer in self.model.named_buffers():
            # zero.Init makes them in bf16, which rounds biases that grow by 0.001.
            if name.endswith(("frequencies", "selection_bias")):
                buffer.data = buffer.float()
        self._write(self._initial_weight)
        self.routers = RouterState(config.model.n_layers, config.model.moe)
        self.routers.copy_to(self.layers)

    @property
    def data_rank(self) -> int:
        """This rank's place among those that take different rows of a global batch."""
        return self.mesh.data_rank

    @property
    def data_ranks(self) -> int:
        return self.layout.data_ranks

    def step(self, batch: Batch, lr: float) -> StepMetrics:
        """One optimizer step. Collective.

        Args:
            batch: the rows of this data rank.
        """
        loss, loss_tokens = self.backward(batch)
        return StepMetrics(loss, loss_tokens, self.update(lr))

    def backward(self, batch: Batch) -> tuple[float, int]:
        """Leave the gradient of a global batch in the engine.

        Returns:
            The mean loss, and of how many tokens.
        """
        columns = [torch.from_numpy(x) for x in (batch.tokens, batch.labels, batch.position)]
        size = self.config.train.microbatch
        microbatches = list(zip(*(x.split(size) for x in columns), strict=True))
        loss_tokens = (columns[1] != IGNORED).sum().to(self.device)
        dist.all_reduce(loss_tokens)
        # Ranks of cp have the same rows.
        count = max(1, int(loss_tokens) // self.layout.cp)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        measured: Tensor | float = 0.0
        for number, microbatch in enumerate(microbatches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(microbatches))
            loss, summed, of_routers = self.engine(*self._share(*microbatch), count)
            # It takes the mean over ranks of what is a sum over tokens.
            self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            total += summed
            measured = measured + of_routers
        dist.all_reduce(total)
        assert isinstance(measured, Tensor)
        dist.all_reduce(measured)
        self._expert_counts = measured[:, 4:]
        return total.item() / count, count

    def update(self, lr: float) -> float:
        """Clip, and step the optimizer; the gradient's norm before clipping."""
        set_learning_rate(self.optimizer, lr)
        self.engine.step()
        self.routers.update(self._expert_counts)
        self.routers.copy_to(self.layers)
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        """Whole weights under our names in fp32, on every rank. Collective."""
        return self._whole(safe_get_full_fp32_param)

    def gradients(self) -> dict[str, Tensor]:
        """After `backward`: whole gradients under our names, on every rank. Collective."""
        return self._whole(safe_get_full_grad)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights under our names, from a checkpoint or of a Hugging Face model.

        Collective.
        """
        self._write(weights.__getitem__)

    def save(self, directory: Path) -> None:
        """Save all that it takes to go on into a folder, in DeepSpeed's format. Collective."""
        # Without the latter ds_to_universal refuses ZeRO 1 and 2.
        version = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        state = {"routers": self.routers.state_dict(), UNIVERSAL_CHECKPOINT_INFO: version}
        self.engine.save_checkpoint(str(directory), client_state=state)

    def load(self, directory: Path) -> None:
        """Stand where `save` was called. Collective.

        Args:
            directory: that `save` was given, on as many ranks; or on any number a universal
                checkpoint, made of it by ds_to_universal. In both, of the same stage.

        Raises:
            UserError: there is no checkpoint, or ranks or stage are others.
        """
        step = step_folder(directory)
        check_same_ranks(step, dist.get_world_size(), self.zero.stage)
        # Asked for at a load only, and not known before.
        self.engine._config.load_universal_checkpoint = is_universal(step)
        _, state = self.engine.load_checkpoint(str(step.parent), tag=step.name)
        if is_universal(step):
            self._set_groups_apart()
        for name, tensor in self.routers.state_dict().items():
            tensor.copy_(state["routers"][name])
        self.routers.copy_to(self.layers)

    def close(self) -> None:
        """Give up what DeepSpeed has attached to the model, so that another engine can be built."""
        self.engine.destroy()

    def _spread(self) -> None:
        """What `parallel.apply` does on the axes that there are here, in its order."""
        layers, parallel = self.layers, self.config.parallel
        if self.layout.ulysses > 1:
            exchange_heads(layers.values(), self.mesh.cp.get_group())
        elif self.layout.cp > 1:
            cp = split_sequence(layers.values(), self.mesh)["cp"]
            split_rows([layer.moe for layer in layers.values() if layer.moe is not None], None, cp)
        if parallel.feed_forward_tile is not None:
            tile_feed_forwards(layers.values(), parallel.feed_forward_tile)
        recompute_layers(layers, recompute_modes(self.config))

    def _share(
        self, tokens: Tensor, labels: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Documents]:
        """This rank's part of a microbatch [b, T], on the device."""
        documents, rank = Documents.from_position(position), self.mesh.cp.get_local_rank()
        if (ranks := self.layout.ulysses) > 1:
            mine = ConsecutiveDocuments.of_rank(documents, rank, ranks)
            tokens, labels = (x.chunk(ranks, 1)[rank] for x in (tokens, labels))
            return tokens.to(self.device), labels.to(self.device), mine.to(self.device)
        share = share_of_rank(self.config, documents, rank)
        if share.tokens is not None:
            tokens, labels = (x.gather(1, share.tokens) for x in (tokens, labels))
        return tokens.to(self.device), labels.to(self.device), share.documents_on(self.device)

    def _initial_weight(self, name: str) -> Tensor:
        shape = _whole_shape(dict(self.model.named_parameters())[name])
        region = tuple(slice(0, size) for size in shape)
        seed = self.config.train.seed
        return initial_values(name, shape, region, self.config.model, seed, self.device)

    def _set_groups_apart(self) -> None:
        """With stage 3 DeepSpeed 0.19.8 gives all groups of weights the decay of the first, and one
        tensor that counts the steps of each.
        """
        theirs = self.optimizer.optimizer
        for group, decay in zip(theirs.param_groups, self._decay, strict=True):
            group["weight_decay"] = decay
        for state in theirs.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()
    def _write(self, value: Callable[[str], Tensor]) -> None:
        """Fill the weights, one whole weight in memory at a time."""
        for name, weight in self.model.named_parameters():
            whole = value(name).to(self.device, torch.float32)
            with self._gathered(weight):
                weight.copy_(whole)
            # The optimizer's own, in bf16 not rounded.
            safe_set_full_fp32_param(weight, whole)

    def _gathered(self, weight: nn.Parameter) -> Any:
        if self.zero.stage < 3:
            return nullcontext()
        # Writing counts on one rank, which sends it to all.
        return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)

    def _whole(self, tensor: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {name: tensor(w).detach().clone() for name, w in self.model.named_parameters()}


def _build(config: Config, theirs: dict[str, Any], zero: ZeroConfig, device: torch.device) -> Loss:
    """The model with weights that mean nothing; with ZeRO 3 no rank ever has all of them."""
    if zero.stage < 3:
        return Loss(config).to(device)
    with deepspeed.zero.Init(config_dict_or_path=theirs):
        return Loss(config)


def _build_optimizer(loss: Loss, config: OptimConfig) -> torch.optim.AdamW:
    """That of `pretrain.optim`, which cannot tell matrices by what ZeRO 3 leaves of them."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for weight in loss.parameters():
        groups[len(_whole_shape(weight)) >= 2].append(weight)
    decay = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay[kind]} for kind, weights in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def _whole_shape(weight: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))
