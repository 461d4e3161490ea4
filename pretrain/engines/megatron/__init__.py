"""farspan's layers inside megatron-core, for its users and as an engine of ours.

Context parallelism without Transformer Engine, with packed documents, and for hybrid models; see
docs/megatron.md.
"""

from pretrain.engines.extra import TESTED, check_extra

check_extra("megatron", TESTED["megatron"])

from pretrain.engines.megatron.attention import RingAttention, Rope  # noqa: E402
from pretrain.engines.megatron.documents import PackedDocuments, shard_batch  # noqa: E402
from pretrain.engines.megatron.gated_delta import GatedDeltaNet  # noqa: E402
from pretrain.engines.megatron.spec import with_gated_delta_net, with_ring_attention  # noqa: E402

__all__ = [
    "GatedDeltaNet",
    "PackedDocuments",
    "RingAttention",
    "Rope",
    "shard_batch",
    "with_gated_delta_net",
    "with_ring_attention",
]
