"""A checkpoint of transformers on ranks that share each row; run by test_shared_rows.py.

Arguments: folders of exported models. Each gets a file `shared.pt`: logits and gradients.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.context.documents import SplitDocuments
from parallel.context.split import split_sequence
from parallel.layout import split_row
from parallel.mesh import Mesh, join_ranks
from pretrain.checkpoint import hf
from pretrain.model.transformer import Transformer


def run(folder: Path, device: torch.device) -> None:
    config, state = hf.load(folder)
    model = Transformer(config)
    model.load_state_dict(state)
    mesh = Mesh.build(device, cp=dist.get_world_size())
    cp = split_sequence(model.layers.values(), mesh)["cp"]

    tokens, d_logits = torch.load(folder / "inputs.pt")
    layout = split_row([tokens.shape[1]], cp.size)
    documents = SplitDocuments.of_rank([layout] * len(tokens), cp.rank)
    mine = torch.from_numpy(layout.tokens_of(cp.rank))
    part = model(tokens[:, mine], documents).value
    part.backward(d_logits[:, mine])

    logits = torch.zeros_like(d_logits)
    logits[:, mine] = part.detach()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for tensor in (logits, *gradients.values()):
        cp.all_reduce(tensor)
    if cp.rank == 0:
        torch.save((logits, gradients), folder / "shared.pt")


def main() -> None:
    device = join_ranks(timedelta(minutes=1))
    for folder in sys.argv[1:]:
        run(Path(folder), device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
