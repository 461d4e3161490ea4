"""The gated delta net as the `self_attention` of megatron-core's layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from parallel.comm import Communicator
from parallel.context.convolution import ContextConvolution
from parallel.context.linear import ContextScan
from pretrain.engines.megatron.documents import documents_of
from pretrain.errors import UserError
from pretrain.model.config import LinearAttentionConfig, ModelConfig
from pretrain.model.gated_delta import GatedDeltaNet as Mixer
from pretrain.model.init import initialize

SEED_LIMIT = 2**62


class GatedDeltaNet(MegatronModule):
    """Yang et al. 2024, arXiv:2412.06464, with packed documents, and rows that the ranks of `cp`
    share without ever gathering one.

    Its sizes are megatron-core's own `linear_*` settings; each rank of `tp` has its share of the
    heads. Weights are those of farspan's layer, under their names.

    Raises:
        UserError: ranks of `tp` cannot share the heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        _check(config, self.tp_group.size())
        self.gated_delta = Mixer(_share_of_rank(config, self.tp_group.size()))
        if self.cp_group.size() > 1:
            mixer: Any = self.gated_delta
            comm = Communicator(self.cp_group, "cp")
            mixer.convolve, mixer.scan = ContextConvolution(comm), ContextScan(comm)
        on_cpu = config.use_cpu_initialization
        device = "cpu" if on_cpu else torch.cuda.current_device()
        self.gated_delta.to(device=device, dtype=config.params_dtype)
        if config.perform_initialization:
            self._initialize(config)
        self._mark(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[t / tp, B, d] -> the same shape, and no bias."""
        if inference_context is not None:
            raise UserError("the gated delta net is for training: export the model to infer with")
        x = hidden_states
        if self.tp_group.size() > 1:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        documents = documents_of(
            packed_seq_params, attention_mask, x.shape[1], x.shape[0], self.cp_group, x.device
        )
        out = self.gated_delta(x.transpose(0, 1), documents).transpose(0, 1).contiguous()
        if self.tp_group.size() > 1:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return out, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For megatron-core's distributed checkpoints."""
        axes = {
            name: weight.partition_dim
            for name, weight in self.named_parameters()
            if weight.tensor_model_parallel
        }
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded

    def _initialize(self, config: TransformerConfig) -> None:
        """Decay, step size, norm and convolutions as farspan's, projections as megatron-core's."""
        on_cpu = config.use_cpu_initialization
        with _fork_on_cpu(self.tp_group.rank()) if on_cpu else get_cuda_rng_tracker().fork():
            # On a GPU the tracker's generator is the device's.
            seed = int(torch.randint(SEED_LIMIT, (), device=self.gated_delta.A_log.device))
            share = _share_of_rank(config, self.tp_group.size())
            initialize(self.gated_delta, share, seed)
            for name, weight in self.gated_delta.named_parameters():
                if name.endswith("o_proj.weight"):
                    config.output_layer_init_method(weight)
                elif name.endswith("proj.weight"):
                    config.init_method(weight)
            torch.nn.init.ones_(self.gated_delta.norm.weight)

    def _mark(self, config: TransformerConfig) -> None:
        """Tell megatron-core what a rank has a share of, and what it has a copy of."""
        parameters: dict[str, Any] = dict(self.gated_delta.named_parameters())
        for name, weight in parameters.items():
            is_share = name != "norm.weight"
            dim = 1 if name == "o_proj.weight" else 0
            set_tensor_model_parallel_attributes(weight, is_share, dim, 1)
            # A copy sees this rank's heads only: its gradient is a part, to be summed.
            weight.sequence_parallel = config.sequence_parallel and not is_share


@contextmanager
def _fork_on_cpu(rank: int) -> Iterator[None]:
    """Draw other numbers on each rank of tp inside, and the same ones afterwards: what the tracker
    does, which forks the generators of GPUs alone.
    """
    seed = int(torch.randint(SEED_LIMIT, ()))
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the GPUs, too.
        torch.default_generator.manual_seed(seed + rank)
        yield


def _share_of_rank(config: TransformerConfig, ranks: int) -> ModelConfig:
    linear = LinearAttentionConfig(
        n_key_heads=config.linear_num_key_heads // ranks,
        n_value_heads=config.linear_num_value_heads // ranks,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
    )
    return ModelConfig(d_model=config.hidden_size, norm_eps=config.layernorm_epsilon, linear=linear)


def _check(config: TransformerConfig, ranks: int) -> None:
    for field in ("linear_num_key_heads", "linear_num_value_heads"):
        if getattr(config, field) % ranks:
            raise UserError(
                f"{field} = {getattr(config, field)}: {ranks} ranks of tensor parallelism cannot "
                "share them; give it a multiple of the ranks"
            )
    if ranks > 1 and not config.sequence_parallel:
        raise UserError(
            "the gated delta net under tensor parallelism needs sequence_parallel=True, or nobody "
            "sums the gradient of its norm"
        )
