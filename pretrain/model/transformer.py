"""The decoder: embedding, layers, output embedding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.attention import Attention
from pretrain.model.config import LayerKind, ModelConfig
from pretrain.model.gated_delta import GatedDeltaNet
from pretrain.model.kernels.documents import Documents
from pretrain.model.mlp import SwiGLU
from pretrain.model.moe import MoE, Routing
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rotation


class TransformerOutput(NamedTuple):
    """What one call returns; L_moe is the number of layers with experts.

    Attributes:
        value: what `output` returned; by default the logits [B, T, V].
        balance: [L_moe] fp32 with gradient, see `Routing`; likewise the others.
        z: [L_moe] fp32 with gradient.
        entropy: [L_moe] fp32.
        expert_counts: [L_moe, E] int64.
        dropped: [L_moe] int64.
    """

    value: Any
    balance: Tensor
    z: Tensor
    entropy: Tensor
    expert_counts: Tensor
    dropped: Tensor


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)).

    The mixer is `attention` or `gated_delta`, the feed-forward `mlp` or `moe`; the others are None.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, rotates: bool) -> None:
        super().__init__()
        norm = (config.d_model, config.norm_eps, config.zero_centered_norm)
        self.mixer_norm = RMSNorm(*norm)
        is_linear = kind == "linear"
        self.attention = None if is_linear else Attention(config, config.window(kind), rotates)
        self.gated_delta = GatedDeltaNet(config) if is_linear else None
        self.feed_forward_norm = RMSNorm(*norm)
        sparse = config.moe.n_experts > 0
        self.mlp = None if sparse else SwiGLU(config.d_model, config.d_ff)
        self.moe = MoE(config.d_model, config.moe) if sparse else None

    def forward(
        self, x_btd: Tensor, documents: Documents, rotation: Rotation
    ) -> tuple[Tensor, Routing | None]:
        h_btd = self.mixer_norm(x_btd)
        if self.attention is not None:
            x_btd = x_btd + self.attention(h_btd, documents, rotation)
        if self.gated_delta is not None:
            x_btd = x_btd + self.gated_delta(h_btd, documents)
        h_btd = self.feed_forward_norm(x_btd)
        if self.mlp is not None:
            return x_btd + self.mlp(h_btd), None
        assert self.moe is not None
        out_btd, routing = self.moe(h_btd, documents)
        return x_btd + out_btd, routing


@dataclass(frozen=True)
class Part:
    """Consecutive layers of a decoder.

    Attributes:
        layers: their numbers.
        embeds: whether the token embedding comes before them.
        predicts: whether the last norm and the output embedding come after them.
    """

    layers: range
    embeds: bool
    predicts: bool


class Transformer(nn.Module):
    """A decoder-only language model, or a part of one, as a pipeline needs it.

    Its weights mean nothing until `initialize` or `load_state_dict` has filled them. `layers` is
    keyed by the layer's number: a weight has the same name in a part as in the whole. A part that
    predicts with tied embeddings has a copy of the embedding.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.part = part or Part(range(config.n_layers), embeds=True, predicts=True)
        embeds, predicts = self.part.embeds, self.part.predicts
        tied = config.tie_embeddings
        self.embedding = None
        if embeds or (predicts and tied):
            # Not drawn: that would import torch's compiler, for a second, even without memory.
            values = torch.empty(config.vocab_size, config.d_model)
            self.embedding = nn.Embedding.from_pretrained(values, freeze=False)
        kinds, rotates = config.layer_kinds(), config.rotates()
        self.layers = nn.ModuleDict(
            {str(i): Layer(config, kinds[i], rotates[i]) for i in self.part.layers}
        )
        self.norm = None
        self.lm_head = None
        if predicts:
            self.norm = RMSNorm(config.d_model, config.norm_eps, config.zero_centered_norm)
        if predicts and not tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        inputs: Tensor,
        documents: Documents | None = None,
        output: Callable[[Tensor, Tensor], Any] = F.linear,
    ) -> TransformerOutput:
        """Run the model on tokens [B, T] int64.

        Args:
            inputs: token ids; the hidden state [B, T, d] in a part that does not embed.
            documents: document boundaries; None is one document per row.
            output: applied to the final hidden state [B, T, d] and the output embedding [V, d]
                inside this call, while sharded weights are whole; by default gives logits. A part
                that does not predict gives its hidden state instead.
        """
        if documents is None:
            documents = Documents.whole_rows(inputs.shape[0], inputs.shape[1], inputs.device)
        attention = self.config.attention
        rotary_dim = int(attention.head_dim * attention.rope_fraction)
        rotation = Rotation.of_positions(
            documents.position, rotary_dim, attention.rope_base, attention.yarn
        )
        x_btd = inputs
        if self.part.embeds:
            assert self.embedding is not None
            x_btd = self.embedding(inputs)
        routings: list[Routing] = []
        for layer in self.layers.values():
            x_btd, routing = layer(x_btd, documents, rotation)
            if routing is not None:
                routings.append(routing)
        value = x_btd
        if self.norm is not None:
            output_embedding = self.embedding if self.lm_head is None else self.lm_head
            assert output_embedding is not None
            value = output(self.norm(x_btd), output_embedding.weight)
        return TransformerOutput(value, *self._stack(routings, inputs))

    def _stack(self, routings: list[Routing], tokens: Tensor) -> Routing:
        """Routings of the layers -> [L_moe, ...] each, where L_moe is 0 in a dense model."""
        if not routings:
            none = tokens.new_zeros(0)
            counts = none.view(0, self.config.moe.n_experts)
            return Routing(none.float(), none.float(), none.float(), counts, none)
        return Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True)))
