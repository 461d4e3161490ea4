"""A model of ours on DeepSpeed's ZeRO, trained as the native engine does."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
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
from torch import Tensor

from data_pipeline.stream import Batch
from parallel.agreement import Copy
from parallel.context.split import split_sequence
from parallel.expert.sequence import split_rows
from parallel.feed_forward import tile_feed_forwards
from parallel.gradients import Norms
from parallel.mesh import limit_collectives
from parallel.recompute import recompute_layers
from pretrain.balancing import RouterState
from pretrain.build import build_mesh
from pretrain.checkpoint.contents import OPTIMIZER, of_routers
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.region import Region
from pretrain.config import Config
from pretrain.engines.deepspeed.checkpoint import check_same_ranks, is_universal, step_folder
from pretrain.engines.deepspeed.config import deepspeed_config
from pretrain.engines.deepspeed.microbatch import Microbatch, Rows
from pretrain.engines.deepspeed.model import build_loss, build_optimizer
from pretrain.engines.deepspeed.norm import gradient_norm, refused
from pretrain.engines.deepspeed.ranks import join_deepspeed
from pretrain.engines.deepspeed.state import ZeroState, stored, whole_shape
from pretrain.engines.deepspeed.ulysses import exchange_heads
from pretrain.engines.engine import GradientNorms, Measured
from pretrain.engines.sums import measured_by, sum_over_ranks
from pretrain.engines.zero_limits import check_deepspeed
from pretrain.layouts import Layout
from pretrain.model.init import initial_values
from pretrain.model.kernels.backends import make_deterministic
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.transformer import Transformer
from pretrain.optim import set_learning_rate
from pretrain.parts import recompute_modes
from pretrain.token_losses import LossGroups, TokenLosses


class DeepSpeedEngine:
    """The model of `config` on the ranks of `layout`; see `Engine`. Collective.

    Ranks share out what ZeRO's stage says over all of them, those of `cp` too.

    Attributes:
        engine: DeepSpeed's own.
        model: our Transformer; with ZeRO 3 its weights are whole only while they are used.

    Raises:
        UserError: DeepSpeed cannot express the configuration; lists why.
    """

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        check_deepspeed(config, layout)
        if config.train.deterministic:
            make_deterministic()
        self.config, self.layout, self.device = config, layout, device
        self.updates_in_clip = False
        self.mesh = build_mesh(config, layout, device)
        self.data_rank, self.data_ranks = self.mesh.data_rank, layout.data_ranks
        self._token_losses = TokenLosses(config.train.loss_chunk)
        self._loss_groups = LossGroups(len(config.data.sources()), config.data.seq_len)
        cp_rank = self.mesh.cp.get_local_rank()
        self._rows = Rows(config, layout, cp_rank, self._loss_groups, device)
        self._start()
        limit_collectives(timedelta(seconds=config.train.collective_timeout_s))
        self._state = ZeroState(self.optimizer, dict(self.model.named_parameters()), device)
        self.routers = RouterState(config.model.n_layers, config.model.moe)
        self._has_gradient = False

    def _start(self) -> None:
        """Give the model to DeepSpeed."""
        join_deepspeed(self.device)
        theirs = deepspeed_config(self.config, self.layout.data_ranks)
        loss = build_loss(self.config, self._token_losses, theirs, self.device)
        self.model: Transformer = loss.model
        self.layers: dict[str, Any] = dict(loss.model.layers.items())
        self._spread()
        optimizer = build_optimizer(loss, self.config.optim)
        self._decay = [group["weight_decay"] for group in optimizer.param_groups]
        self.engine: Any
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=theirs
        )
        for name, buffer in self.model.named_buffers():
            # zero.Init makes them in bf16, which rounds biases that grow by 0.001.
            if name.endswith(("frequencies", "selection_bias")):
                buffer.data = buffer.float()

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

    def initialize(self) -> None:
        """Stand before the first step, with the weights that `train.seed` says."""
        self._drop_gradient()
        self._state.initialize(self._initial_weight)
        self.routers.reset()
        self.routers.copy_to(self.layers)

    def backward(self, batch: Batch, lr: float, numbers: Sequence[float] = ()) -> Measured:
        """Leave the gradient of a global batch with DeepSpeed, in place of what there was."""
        self._drop_gradient()
        self._has_gradient = True
        set_learning_rate(self.optimizer, lr)
        microbatches = self._rows.microbatches(batch)
        loss_tokens = torch.stack([(x.labels != IGNORED).sum() for x in microbatches]).sum()
        dist.all_reduce(loss_tokens)
        count = max(1, int(loss_tokens))
        self._token_losses.begin()
        of_routers = []
        for number, (tokens, labels, documents, _) in enumerate(microbatches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(microbatches))
            loss, measured = self.engine(tokens, labels, documents, count)
            # It takes the mean over ranks of what is a sum over tokens.
            self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            of_routers.append(measured)
        summed = sum_over_ranks(
            self._losses_of(microbatches),
            torch.stack(of_routers).sum(0).flatten(),
            torch.tensor(numbers, dtype=torch.float64, device=self.device),
        )
        return measured_by(self.config, self._loss_groups, summed, count)

    def _losses_of(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """The sum over this rank's tokens, and the sums of their groups."""
        losses = torch.cat(self._token_losses.seen)
        labels, groups = (torch.cat([x[i] for x in microbatches]) for i in (1, 3))
        by_group = self._loss_groups.add_up(losses, labels, groups)
        return torch.cat([losses.double().sum().view(1), by_group])

    def clip(self) -> GradientNorms:
        """Take the norm; `update` takes it again, and scales by it."""
        return GradientNorms(gradient_norm(self.optimizer))

    def update(self, measured: Measured) -> None:
        """Clip, step the optimizer, let the routers learn, and forget the gradient."""
        self.engine.step()
        self._has_gradient = False
        self.routers.update(measured.expert_counts)
        self.routers.copy_to(self.layers)

    def discard(self) -> None:
        """Forget the gradient."""
        with refused(self.optimizer):
            self.engine.step()
        self._has_gradient = False

    def begin_rows_anew(self) -> None:
        """No row goes on with anything."""

    def tensors(self) -> Mapping[str, Tensor | Region]:
        """On the host, this rank's rows of each weight and moment; what routers learned, whole."""
        return {**self._state.tensors(), **of_routers(self.routers.state_dict())}

    def tensors_to_fill(self, index: Index) -> Mapping[str, Tensor | Region]:
        """Room for the same, whatever has written it."""
        room = self._state.to_fill(
            has_moments=any(name.startswith(OPTIMIZER) for name in index.by_name)
        )
        return {**room, **of_routers(self.routers.state_dict())}

    def take_over(self) -> None:
        """Go on with what `tensors_to_fill` gave, now that it is filled.

        Raises:
            UserError: weights have been updated different numbers of times.
        """
        self._drop_gradient()
        self._state.take_over()
        self.routers.copy_to(self.layers)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """With stage 3, this rank's range of each."""
        return ((name, stored(weight)) for name, weight in self.model.named_parameters())

    def copies(self) -> Iterator[Copy]:
        """With stages 1 and 2 every rank has all weights."""
        ranks = dist.group.WORLD
        assert ranks is not None
        if self.config.parallel.zero.stage < 3:
            for name, weight in self.model.named_parameters():
                yield name, weight.detach(), ranks

    def sent_bytes(self) -> Counter[tuple[str, str]] | None:
        """DeepSpeed's own collectives are not counted."""
        return None

    def weight_and_update_norms(self, lr: float) -> Norms | None:
        """Not taken."""
        return None

    def save(self, directory: Path) -> None:
        """Save all that it takes to go on into a folder, in DeepSpeed's format. Collective."""
        # Without the latter ds_to_universal refuses ZeRO 1 and 2.
        version = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        state = {"routers": self.routers.state_dict(), UNIVERSAL_CHECKPOINT_INFO: version}
        # It has counted refused steps as well, and none of those before this process.
        self.engine.global_steps = self._state.steps()
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
        check_same_ranks(step, dist.get_world_size(), self.config.parallel.zero.stage)
        # Asked for at a load only, and not known before.
        self.engine._config.load_universal_checkpoint = is_universal(step)
        _, state = self.engine.load_checkpoint(str(step.parent), tag=step.name)
        if is_universal(step):
            self._set_groups_apart()
        self._state.link()
        for name, tensor in self.routers.state_dict().items():
            tensor.copy_(state["routers"][name])
        self.routers.copy_to(self.layers)

    def close(self) -> None:
        """Give up what DeepSpeed has attached to the model, and its group of all ranks, so that
        another engine can be built.
        """
        self.engine.destroy()
        # It would hand the next one this group, also when it has been destroyed with all others.
        deepspeed.comm.destroy_process_group(self.engine.data_parallel_group)

    def _drop_gradient(self) -> None:
        if self._has_gradient:
            self.discard()

    def _initial_weight(self, name: str) -> Tensor:
        shape = whole_shape(self.model.get_parameter(name))
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
