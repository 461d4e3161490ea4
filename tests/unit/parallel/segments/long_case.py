"""The gradient of a long row in segments, with full attention, against that of one piece.

Arguments: tokens of the row, segments, and the file for the largest error; run by test_segments.py.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch

from parallel.context.documents import SplitDocuments
from parallel.layout import split_row
from parallel.mesh import join_ranks
from parallel.segments.documents import cut_rows
from parallel.segments.memory import SegmentMemory
from tests.unit.parallel.segments.segment_cases import KINDS, Model, V, error


def main() -> None:
    tokens, segments = int(sys.argv[1]), int(sys.argv[2])
    join_ranks(timedelta(minutes=30))
    torch.set_default_dtype(torch.float64)
    # Of the longer document all segments but the first see all that came before.
    row = [tokens // 40, tokens - tokens // 40]
    generator = torch.Generator().manual_seed(3)
    of_row, labels = torch.randint(V, (2, 1, tokens), generator=generator)
    whole = [SplitDocuments.of_rank([split_row(row, 1)], 0)]
    cut = [cut_rows([row], segments, SegmentMemory(segments))]
    expected = Model(KINDS["hybrid"], False, microbatch=1).gradients(of_row, labels, whole)
    found = Model(KINDS["hybrid"], True, microbatch=1).gradients(of_row, labels, cut)
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    result = {"error": error(found, expected), "least norm": min(norms.values())}
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
