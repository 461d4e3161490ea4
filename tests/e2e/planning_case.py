"""One of 2 ranks plans another batch than the other; run by test_agreement.py.

Arguments: the shards, the folder for results.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.fsdp import local_tensor
from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.errors import AttemptError
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer


def main() -> None:
    shards, folder = sys.argv[1:]
    device = join_ranks(timedelta(minutes=2))
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}", "data.seq_len=64"])
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    trainer.step(False)
    weights = [local_tensor(weight).detach() for weight in trainer.engine.weights.parameters()]
    before = [weight.clone() for weight in weights]
    if dist.get_rank() == 1:
        trainer.stream.next_batch(1)
    try:
        trainer.step(False)
        message = ""
    except AttemptError as error:
        message = str(error)
    result = {
        "message": message,
        "step": trainer.progress.step,
        "unchanged": all(map(torch.equal, before, weights)),
    }
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
