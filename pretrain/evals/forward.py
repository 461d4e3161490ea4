"""A forward pass over rows of any length, in the layout of a training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.offload import Store
from parallel.pipeline.forward import run_forward
from parallel.pipeline.plan import stages_of_rank
from parallel.segments.documents import cut_rows, tokens_of
from parallel.segments.memory import SegmentMemory
from parallel.stage import Stage
from pretrain.config import Config
from pretrain.layouts import Layout, stages_per_rank
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.parts import attention_cost
from pretrain.share import RankShare, share_of_rank


class ForwardPass:
    """Runs rows through the stages of a model that is spread over the ranks. Collective.

    Each rank keeps the part of a row that it would keep in training, and rows of a training in
    segments come in segments of the same length, whatever the length of the row.

    Attributes:
        stages: of this rank.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        mesh: Mesh,
        stages: Sequence[Stage],
        device: torch.device,
        store: Store | None = None,
    ) -> None:
        """
        Args:
            store: where what segments hand on waits; None leaves it on the device.
        """
        self.config, self.layout, self.mesh, self.device = config, layout, mesh, device
        self._store = store
        self.stages = {stage.index: stage for stage in stages}

    def rows_at_a_time(self, length: int) -> int:
        """Rows of `length` tokens that a data rank has the memory for: a microbatch's tokens."""
        return max(1, self.config.train.microbatch * self.config.data.seq_len // length)

    @torch.no_grad()
    def run(self, tokens: Tensor, labels: Tensor, documents: Documents) -> Tensor:
        """One pass over this data rank's rows [rows, T]; cp x tp divides T.

        Stages have seen it in one piece per segment, since one `begin`.

        Returns:
            The labels that this rank has, as places in the flattened rows, in the order in which
            they came.
        """
        share = self._share_of(documents)
        length = tokens.shape[1]
        if share.tokens is not None:
            tokens, labels = tokens.gather(1, share.tokens), labels.gather(1, share.tokens)
        in_row = torch.arange(length) if share.tokens is None else share.tokens
        places = torch.arange(len(tokens))[:, None] * length + in_row
        parts = share.documents if isinstance(share.documents, list) else [share.documents]
        for stage in self.stages.values():
            stage.begin(1, [part.to(self.device) for part in parts])
        if self.config.context.in_segments:
            parts[0].memory.store = self._store
        columns = (x.chunk(len(parts), dim=1) for x in (tokens, labels, places))
        seen = []
        for of_tokens, of_labels, of_places in zip(*columns, strict=True):
            seen.append(of_places[of_labels != IGNORED])
            self._forward(of_tokens.to(self.device), of_labels.to(self.device))
        return torch.cat(seen)

    def _share_of(self, documents: Documents) -> RankShare:
        """What this rank of cp has of rows of any length, in segments of the training's length."""
        config, rank = self.config, self.mesh.cp.get_local_rank()
        if not config.context.in_segments:
            return share_of_rank(config, documents, rank)
        length, segments = documents.position.shape[1], config.context.segments
        count = length * segments // config.data.seq_len
        # Rows of lanes come in one piece, of whatever length.
        if segments > 1 and count > 1:
            context = config.context.model_copy(update={"segments": count})
            return share_of_rank(config.model_copy(update={"context": context}), documents, rank)
        cost = attention_cost(config.model)
        whole = cut_rows(documents.lengths, 1, SegmentMemory(1), rank, self.layout.cp, cost)
        return RankShare(whole, tokens_of(whole))

    def _forward(self, tokens: Tensor, labels: Tensor) -> None:
        """All stages, once."""
        if self.layout.pp == 1:
            self.stages[0](tokens, labels)
            return
        schedule, per_rank = self.config.parallel.pipeline.schedule, stages_per_rank(self.config)
        owners = {
            stage: rank
            for rank in range(self.layout.pp)
            for stage in stages_of_rank(schedule, self.layout.pp, rank, per_rank)
        }
        hidden = torch.empty(
            len(tokens),
            tokens.shape[1] // self.layout.tp,
            self.config.model.d_model,
            dtype=getattr(torch, self.config.train.dtype),
            device=self.device,
        )
        in_order = [owners[stage] for stage in sorted(owners)]
        group = self.mesh.pp.get_group()
        run_forward(self.stages, in_order, group, tokens, labels, hidden)
