"""From a configuration to a model on its ranks."""

from dataclasses import asdict
from pathlib import Path

import torch

from parallel.apply import Parallelised, Spread, apply
from parallel.mesh import Mesh
from parallel.offload import Offload, Store
from parallel.pipeline.plan import stages_of_rank
from parallel.stage import Objective
from pretrain.config import Config
from pretrain.layouts import Layout, stages_per_rank
from pretrain.model.transformer import Transformer
from pretrain.objective import build_objective
from pretrain.parts import parts_of_rank, pipeline_shape, recompute_modes


def build_mesh(config: Config, layout: Layout, device: torch.device) -> Mesh:
    """The ranks of the job, arranged as `layout` says. Collective."""
    ends = stages_of_rank(config.parallel.pipeline.schedule, layout.pp, 0, stages_per_rank(config))
    meets_itself = layout.pp * stages_per_rank(config) - 1 in ends
    tied_apart = layout.pp > 1 and config.model.tie_embeddings and not meets_itself
    return Mesh.build(device, **asdict(layout), ends_share_a_weight=tied_apart)


def open_store(config: Config) -> Store | None:
    """Where what layers keep waits, if that is not the device.

    Raises:
        OffloadError: a folder cannot be written to.
    """
    asked = config.parallel
    if asked.offload == "none":
        return None
    folder = Path(asked.offload_dir) if asked.offload_dir else None
    limit = None if asked.offload_gib is None else int(asked.offload_gib * 2**30)
    return Offload(asked.offload, folder, limit).open()


def build_model(
    config: Config,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    objective: Objective | None = None,
    store: Store | None = None,
) -> Parallelised:
    """The stages of this rank, spread over its mesh, on the meta device. Collective.

    Args:
        device: where the stages will be moved.
        objective: what the output is for; None is training.
        store: where what layers keep waits for the backward pass; None leaves it on the device.
    """
    parts = parts_of_rank(config, layout, mesh.pp.get_local_rank())
    with torch.device("meta"):
        models = {stage: Transformer(config.model, part) for stage, part in parts.items()}
    how = Spread(
        getattr(torch, config.train.dtype),
        dispatcher=config.parallel.dispatcher,
        recompute=recompute_modes(config),
        feed_forward_tile=config.parallel.feed_forward_tile,
        store=store,
        microbatch=config.train.microbatch,
        in_segments=config.context.in_segments,
        pipeline=pipeline_shape(config, layout),
    )
    return apply(models, objective or build_objective(config), mesh, how, device)
