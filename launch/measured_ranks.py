"""One rank of `weft memory --measure`: trains one step on random tokens and gathers what every rank held."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from weft.launch.engine import Engine
from weft.launch.ledger import beside_formula, fit_text, ledger_text
from weft.launch.measured import measured_step
from weft.launch.plan.breakdown import Memory
from weft.launch.settings import Settings, load_settings, resolved
from weft.launch.train import build_training_mesh
from weft.model.config import model_config


def main(config: str, overrides: Sequence[str]) -> None:
    """Run the step; rank 0 prints the tables."""
    settings = resolved(load_settings(config, overrides), int(os.environ["WORLD_SIZE"]))
    mesh = build_training_mesh(settings)
    try:
        engine = Engine(model_config(settings.model), settings, mesh)
        shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length)
        tokens = torch.randint(engine.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        _, memory = measured_step(engine, 0, tokens, tokens)
        every: list[tuple[int, str, Memory]] = [None] * dist.get_world_size()  # type: ignore[list-item]
        own = (mesh["pipeline"].get_local_rank(), "; ".join(engine.describe_stages()), memory)
        dist.all_gather_object(every, own)
        if dist.get_rank() == 0:
            print(_tables(settings, every))
    finally:
        dist.destroy_process_group()


def _tables(settings: Settings, every: Sequence[tuple[int, str, Memory]]) -> str:
    """For each pipeline rank, the most that one of its ranks held."""
    parts = []
    for pipeline_rank in range(settings.parallel.pipeline):
        of_rank = [(stages, memory) for place, stages, memory in every if place == pipeline_rank]
        stages, memory = max(of_rank, key=lambda entry: entry[1].total)
        title = f"pipeline rank {pipeline_rank} of {settings.parallel.pipeline}, {stages}"
        parts.append(f"{title}\n{ledger_text(beside_formula(settings, pipeline_rank, 'measured', memory))}")
    fit = fit_text(settings.cluster.device, max(memory.total for _, _, memory in every))
    return "\n\n".join([*parts, fit] if fit else parts)
