"""The gated delta rule by the Triton kernels of flash-linear-attention, for 16-bit numbers.

Its tensors are [B, T, H, ...]; packed documents are one long row, cut by `cu_seqlens`.
"""

from itertools import accumulate, chain

import torch
from torch import Tensor

from pretrain.model.kernels.documents import Documents


def rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Documents | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `gated_delta_rule`; q and k are rounded to the dtype of v."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    cuts = None
    if documents is not None and documents.is_packed:
        cuts = _Cuts(documents, v.device)
    inputs = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": g, "beta": beta}
    inputs = {name: x.transpose(1, 2) for name, x in inputs.items()}
    if cuts is not None:
        inputs = {name: x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
        if initial_state is not None:
            states = initial_state.new_zeros(cuts.n_documents, *initial_state.shape[1:])
            initial_state = states.index_copy(0, cuts.first, initial_state)
    out, state = chunk_gated_delta_rule(
        **inputs,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=None if cuts is None else cuts.cu_seqlens,
        cu_seqlens_cpu=None if cuts is None else cuts.cu_seqlens_cpu,
    )
    if cuts is not None:
        out, state = out.view(len(v), -1, *out.shape[2:]), state[cuts.last]
    return out.transpose(1, 2), state


class _Cuts:
    """Where the documents of all rows begin in one long row, and which are a row's first and last.

    Attributes:
        first, last: [B] int64, the number of the document.
        cu_seqlens: [documents + 1] int64; `cu_seqlens_cpu` spares the host waiting for it.
    """

    def __init__(self, documents: Documents, device: torch.device) -> None:
        counts = [len(row) for row in documents.lengths]
        ends = list(accumulate(counts))
        self.n_documents = ends[-1]
        self.first = torch.tensor([0, *ends[:-1]]).to(device, non_blocking=True)
        self.last = (torch.tensor(ends) - 1).to(device, non_blocking=True)
        lengths = chain.from_iterable(documents.lengths)
        self.cu_seqlens_cpu = torch.tensor(list(accumulate(lengths, initial=0)))
        self.cu_seqlens = self.cu_seqlens_cpu.to(device, non_blocking=True)
