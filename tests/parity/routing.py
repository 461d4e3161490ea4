"""Record which experts one rank chose, and make other layouts choose the same.

Rounding flips a choice now and then, and from there on two runs differ. With the choices of a
recording they stay equal for as long as they compute the same.
"""

from typing import Any

import torch
from torch import Tensor

from parallel.context.documents import SplitDocuments
from parallel.stage import Stage
from pretrain.config import Config
from pretrain.model.moe import MoE
from pretrain.model.transformer import Layer
from pretrain.trainer import Trainer

Recording = dict[tuple[int, str], Tensor]


class Routing:
    """The experts of each token of each global batch, by step and layer.

    Attributes:
        indices: (step, layer) -> [rows of the global batch, T, k]
        replays: whether they are given, or to be recorded on one rank.
    """

    def __init__(self, config: Config, recording: Recording | None) -> None:
        self.indices: Recording = recording or {}
        self.replays = recording is not None
        self.global_batch = config.train.global_batch
        self.microbatch = config.train.microbatch
        self.renormalise = config.model.moe.renormalise_top_k
        self.step = -1

    def follow(self, trainer: Trainer) -> None:
        """Learn which layers, rows and part of the sequence are on this rank."""
        self.tp = trainer.engine.mesh.tp
        self.first_row = (
            trainer.engine.mesh.data_rank * self.global_batch // trainer.engine.mesh.data_ranks
        )
        self.layer_of = {
            layer.moe: number
            for stage in trainer.engine.parallelised.stages
            for number, layer in stage.model.layers.items()
        }

    def next_step(self) -> None:
        self.step += 1

    def intercept(self) -> None:
        """Let every call of a layer, the first and a recomputed one, know its rows.

        Before the trainer is built: what recomputes a layer holds its `forward`.
        """
        begin, layer_forward, choose = Stage.begin, Layer.forward, MoE._choose

        def begin_with_rows(stage: Stage, loss_tokens: int, documents: Any) -> None:
            for number, of_microbatch in enumerate(documents):
                first = self.first_row + number * self.microbatch
                of_microbatch.position.rows = slice(first, first + self.microbatch)
            begin(stage, loss_tokens, documents)

        def forward_of_layer(layer: Layer, x: Tensor, documents: Any, rotation: Any) -> Any:
            self.documents = documents
            return layer_forward(layer, x, documents, rotation)

        def choose_as_recorded(moe: MoE, probability: Tensor) -> tuple[Tensor, Tensor]:
            key = self.step, self.layer_of[moe]
            if self.replays:
                indices = self.indices[key][self.documents.position.rows]
                if isinstance(self.documents, SplitDocuments):
                    indices = torch.stack(
                        [
                            row[layout.tokens_of(self.documents.rank)]
                            for row, layout in zip(indices, self.documents.layouts, strict=True)
                        ]
                    )
                indices = indices.chunk(self.tp.size(), dim=1)[self.tp.get_local_rank()]
                weights = probability.gather(-1, indices)
                if self.renormalise:
                    weights = weights / weights.sum(-1, keepdim=True)
                return indices, weights
            indices, weights = choose(moe, probability)
            empty = indices.new_empty(self.global_batch, *indices.shape[1:])
            self.indices.setdefault(key, empty)[self.documents.position.rows] = indices
            return indices, weights

        Stage.begin = begin_with_rows
        Layer.forward = forward_of_layer
        MoE._choose = choose_as_recorded
