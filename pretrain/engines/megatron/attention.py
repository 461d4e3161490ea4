"""Ring attention as the `core_attention` of megatron-core's self-attention."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.documents import SplitDocuments
from parallel.layout import zigzag
from pretrain.engines.megatron.documents import documents_of
from pretrain.errors import UserError
from pretrain.model.config import YarnConfig
from pretrain.model.kernels.attention import documents_attention
from pretrain.model.rope import NO_YARN, Rotation


@dataclass(frozen=True)
class Rope:
    """Rotary embedding by the position in the document, exact at any length.

    Attributes:
        fraction: of a head's dimensions that are rotated; 0 rotates none (NoPE).
    """

    base: float = 10_000.0
    fraction: float = 1.0
    yarn: YarnConfig = NO_YARN

    def __call__(self, x: Tensor, documents: SplitDocuments) -> Tensor:
        """x [B, H, t, D] -> the same shape."""
        if not self.fraction:
            return x
        rotary_dim = int(x.shape[-1] * self.fraction)
        rotation: Rotation = documents.plan(_rotation, rotary_dim, self.base, self.yarn)
        return rotation(x)


class RingAttention(nn.Module):
    """Causal attention within documents, of rows that the ranks of `cp` share.

    Keys and values go round a ring (Liu et al. 2023, arXiv:2310.01889). It needs no Transformer
    Engine, and heads may be fewer than ranks.

    Args:
        rope: to rotate queries and keys here; None where megatron-core has done so, or nobody is
            to. Its own rotation takes for granted that rows lie in zigzag, which is checked.

    Raises:
        UserError: megatron-core's configuration asks for what it cannot do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        _check(config, attn_mask_type, attention_type, cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.group: dist.ProcessGroup = pg_collection.cp
        self.rope = rope
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.window: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window = config.window_size[0] + 1
        self.core: Any = documents_attention
        if self.group.size() > 1:
            self.core = ContextAttention(Communicator(self.group, "cp"))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q [t, B, H, D], k and v [t, B, Hkv, D], of this rank's tokens -> [t, B, H * D]."""
        if attention_bias is not None:
            raise UserError("attention_bias: farspan's attention has none; pass None")
        if len(k) != len(q) or attn_mask_type not in (None, AttnMaskType.causal):
            raise UserError(
                f"{len(k)} keys for {len(q)} queries, attn_mask_type = {attn_mask_type}: farspan's "
                "attention is for training, and reads no cache of keys; export the model to infer "
                "with"
            )
        tokens, batch = q.shape[:2]
        documents = documents_of(
            packed_seq_params, attention_mask, batch, tokens, self.group, q.device
        )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        if self.rope is not None:
            q, k = self.rope(q, documents), self.rope(k, documents)
        else:
            documents.plan(_check_zigzag)
        out = self.core(q, k, v, documents, scale=self.scale, window=self.window)
        return out.permute(2, 0, 1, 3).flatten(2)


def _rotation(documents: SplitDocuments, *of_positions: Any) -> Rotation:
    return Rotation.of_positions(documents.position, *of_positions)


def _check(
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    attention_type: str,
    cp_comm_type: str | None,
) -> None:
    ranks = config.context_parallel_size
    hierarchical = ranks > 1 and cp_comm_type not in (None, "p2p")
    wrong = {
        f"attn_mask_type = {attn_mask_type.name}": attn_mask_type.name != "causal",
        f"attention_type = {attention_type}": attention_type != "self",
        f"attention_dropout = {config.attention_dropout}": config.attention_dropout > 0,
        f"softmax_type = {config.softmax_type}": config.softmax_type != "vanilla",
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        f"window_size = {config.window_size}": bool(config.window_size)
        and (config.window_size[0] < 0 or config.window_size[1] != 0),
        f"cp_comm_type = {cp_comm_type}": hierarchical,
    }
    if asked := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"farspan's attention cannot do {', '.join(asked)}: it is causal self-attention with a "
            "plain softmax and no dropout, a window (n, 0) or none, and keys that go round (p2p)"
        )


def _check_zigzag(documents: SplitDocuments) -> bool:
    """Raise UserError where megatron-core's rotary embedding would take other positions."""
    for layout in documents.layouts:
        if layout.blocks != zigzag(sum(layout.lengths), len(layout.blocks)):
            raise UserError(
                "megatron-core's rotary embedding is for rows in zigzag, and these are balanced by "
                'their documents: shard_batch(.., layout="zigzag"), or let farspan rotate with '
                'with_ring_attention(.., rope=Rope(..)) and position_embedding_type="none"'
            )
    return True
