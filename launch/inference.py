"""A trained model, ready to generate, on the ranks of this job."""

import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.errors import UserError
from weft.launch.source import Source
from weft.launch.world import device_type
from weft.model.generation.driver import Session
from weft.model.generation.worker import Placement, Worker
from weft.model.hugging_face import load_pretrained
from weft.model.split import split_layers
from weft.model.stage import Stage, build_stage
from weft.parallel import build_mesh, build_schedule
from weft.parallel.checkpoint import Entry, load_checkpoint
from weft.parallel.sharding import sharded_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_inference_mesh(source: Source) -> DeviceMesh:
    """The ranks in the source's layout; of one process where no launcher has started more."""
    settings, parallel = source.settings, source.settings.parallel
    kind = device_type(settings)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif source.ranks > 1:
        # ranks that share cores would wait for each other's threads
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    assert parallel.data != "auto"
    return build_mesh(
        pipeline=parallel.pipeline,
        data=parallel.data,
        tensor=parallel.tensor,
        device_type=kind,
        timeout=timedelta(seconds=settings.train.timeout),
    )


def load_placement(source: Source, mesh: DeviceMesh) -> Placement:
    """This rank's stage with its weights. A collective call of all ranks.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    config, parallel = source.config, source.settings.parallel
    rank, count = mesh["pipeline"].get_local_rank(), mesh["pipeline"].size()
    layers = split_layers(config, count, None if parallel.split == "auto" else parallel.split)[rank]
    stage = build_stage(
        config,
        layers,
        first=rank == 0,
        last=rank == count - 1,
        mesh=mesh["tensor"],
        device="meta",
        dtype=DTYPES[source.settings.train.precision],
    )
    stage.to_empty(device=torch.device(mesh.device_type))
    stage.tie()
    try:
        if source.is_hugging_face:
            load_pretrained(stage, source.path, config)
        else:
            load_checkpoint(source.path, weight_entries(stage), only="model/")
    except ValueError as error:
        raise UserError(f"{error}.") from None
    return Placement({rank: stage.eval()}, build_schedule("gpipe", count, 1), mesh["tensor"], mesh["pipeline"])


def weight_entries(stage: Stage) -> Iterator[Entry]:
    """The stage's weights by their names in a checkpoint."""
    common = {id(parameter): key for key, parameter in stage.tied_parameters.items()}
    for name, parameter, sharding in sharded_parameters(stage):
        yield Entry(f"model/{common.get(id(parameter), name)}", parameter, sharding)


def open_session(source: Source, *, slots: int, capacity: int) -> Session:
    """The model with room for `slots` texts of `capacity` tokens on each replica. A collective call of all ranks.

    The slots are rounded up to a multiple of the pipeline ranks.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    mesh = build_inference_mesh(source)
    placement = load_placement(source, mesh)
    pipeline = mesh["pipeline"].size()
    worker = Worker(
        placement,
        vocab_size=source.config.vocab_size,
        slots=-(-slots // pipeline) * pipeline,
        capacity=capacity,
        timeout=source.settings.train.timeout,
        pack=True,
    )
    return Session(worker, mesh)
