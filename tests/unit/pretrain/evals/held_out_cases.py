"""Two steps of training with an evaluation on held-out text between them, and without; run on ranks
by test_held_out.py.

Arguments: a run directory, the file for what rank 0 found; the overrides of each layout.
"""

import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.shards import TokenReader, load_manifest
from parallel.mesh import join_ranks
from pretrain.config import overridden, read_run_config
from pretrain.evals.held_out import LOSS, HeldOut
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer


def train(run: RunDirectory, overrides: list[str], device: torch.device) -> dict[str, Any]:
    config = overridden(read_run_config(run), overrides)
    found: dict[str, Any] = {}
    for evaluates in (False, True):
        trainer = Trainer(config, run, device)
        losses, norms = [], []
        for _ in range(2):
            result = trainer.step(stop_requested=False)
            losses.append(result.measured.loss)
            norms.append(result.norms.whole)
            if evaluates:
                held_out = HeldOut(config, trainer)
                # One rank is enough.
                is_asked = dist.get_rank() == dist.get_world_size() - 1
                assert held_out.evaluate(is_unwanted=lambda is_asked=is_asked: is_asked) is None
                evaluated = held_out.evaluate()
                assert evaluated
                found.setdefault("evaluated", []).append(evaluated[LOSS])
                assert trainer.engine.parallelised.take_waited_s() == 0.0
                assert all(
                    isinstance(w, torch.distributed.tensor.DTensor) for w in weights(trainer)
                )
        found["with" if evaluates else "without"] = losses, norms
    if dist.get_world_size() == 1 and not overrides:
        found["expected"] = whole_model_says(trainer)
    return found


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [weight for _, weight in trainer.engine.weights.named_parameters()]


def whole_model_says(trainer: Trainer) -> float:
    """The loss of a plain model, over rows that are cut here."""
    shards, length = trainer.config.eval.sources, trainer.config.data.seq_len
    assert isinstance(shards, str)
    reader = TokenReader(load_manifest(shards))
    of_documents = [reader.read(n, 0, 1 << 30).tolist() for n in range(len(reader.lengths))]
    tokens = [token for document in of_documents for token in document]
    labels = [label for document in of_documents for label in [*document[1:], IGNORED]]
    first = reader.manifest.predicted_from
    labels = [label if label >= first else IGNORED for label in labels]
    ends = [n + 1 for n, token in enumerate(tokens) if token == 0]
    model = Transformer(trainer.config.model).eval()
    model.load_state_dict(
        {n: w.full_tensor() for n, w in trainer.engine.weights.state_dict().items()}
    )
    total, count = 0.0, 0
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        cuts = [start, *(end for end in ends if start < end < stop), stop]
        lengths = [b - a for a, b in pairwise(cuts)]
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:stop]]), Documents.from_lengths([lengths]))
        of_row = torch.tensor(labels[start:stop])
        total += torch.nn.functional.cross_entropy(
            logits.value[0].double(), of_row, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((of_row != IGNORED).sum())
    return total / count


def main() -> None:
    directory, results, *layouts = sys.argv[1:]
    device = join_ranks(timedelta(minutes=10))
    found = {
        layout: train(RunDirectory(Path(directory)), layout.split(), device) for layout in layouts
    }
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
