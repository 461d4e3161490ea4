"""Perplexity by ranks that share each window. Every rank runs `python -m pretrain.evals.shared`.

Arguments: the run directory, the text, and the context if it is not the length of the training.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data_pipeline.stream import load_tokenizer
from parallel.context.split import split_sequence
from parallel.mesh import Mesh, join_ranks
from pretrain.answer import answer
from pretrain.checkpoint.trained import load_trained, newest_trained
from pretrain.evals.perplexity import Perplexity, perplexity
from pretrain.run_dir import RunDirectory

TIMEOUT = timedelta(minutes=30)


def evaluate(run: RunDirectory, text: Path, context: int | None) -> Perplexity:
    """The perplexity of a text, in windows that all ranks share. Collective."""
    device = join_ranks(TIMEOUT)
    step, _ = newest_trained(run)
    config, model = load_trained(run, step)
    context = context or config.data.seq_len
    model.to(device)
    mesh = Mesh.build(device, cp=dist.get_world_size())
    traffic = split_sequence(model.layers.values(), mesh)
    token_ids = load_tokenizer(run.tokenizer).encode(text.read_text(encoding="utf-8"))
    return perplexity(model, token_ids, context, cp=traffic["cp"])


def main() -> Perplexity:
    directory, text, *context = sys.argv[1:]
    limit = int(context[0]) if context else None
    return evaluate(RunDirectory(Path(directory)), Path(text), limit)


if __name__ == "__main__":
    answer(main)
