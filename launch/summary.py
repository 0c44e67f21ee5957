"""The end of a run: a sample of text, the report, and the result in a few lines."""

import socket
from pathlib import Path

import torch.distributed as dist

from weft.launch.ledger import formula, states_and_activations
from weft.launch.metrics import read_metrics
from weft.launch.report import RankReport, RunReport, Sample, write_report
from weft.launch.settings import dump_settings
from weft.launch.timelines import timeline_pictures
from weft.launch.trainer import Trainer, held_bytes
from weft.model.generation.sampling import Sampling

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 120


def conclude(trainer: Trainer) -> None:
    """Generate a sample, write the report and, on rank 0, print the result. A collective call of all ranks."""
    sample = _sample(trainer)
    ranks = _gather_ranks(trainer)
    if dist.get_rank() != 0:
        return
    settings, config = trainer.settings, trainer.engine.config
    mesh = trainer.engine.mesh
    report = RunReport(
        name=settings.name,
        settings=dump_settings(settings),
        axes={axis: mesh[axis].size() for axis in mesh.mesh_dim_names or ()},
        ranks=ranks,
        parameters=config.parameters,
        trained_tokens=trainer.trained_tokens,
        seconds=trainer.seconds,
        tokens=trainer.tokens.info,
        timelines=_timelines(trainer),
        sample=sample,
    )
    directory = Path(settings.report.directory)
    path = write_report(directory, report)
    _print_result(directory, sample, path)


def _sample(trainer: Trainer) -> Sample:
    """Text that goes on from the first held-out words, as far as the model was trained to see."""
    kind, length = trainer.engine.config.kind, trainer.settings.corpus.sequence_length
    if kind != "decoder":
        return Sample(prompt="", text=f"(no sample: the model is an {kind})")
    prompt = [int(token) for token in trainer.tokens.held_out[: min(PROMPT_TOKENS, -(-length // 2))]]
    sampling = Sampling(temperature=0.7, top_k=40, seed=trainer.settings.train.seed)
    tokens = trainer.engine.generate(prompt, min(SAMPLE_TOKENS, length - len(prompt)), sampling)
    decode = trainer.tokens.tokenizer.decode
    whole, start = decode(prompt + tokens), decode(prompt)
    return Sample(prompt=start, text=whole.removeprefix(start))


def _gather_ranks(trainer: Trainer) -> list[RankReport]:
    engine = trainer.engine
    own = RankReport(
        rank=dist.get_rank(),
        coordinates={axis: engine.mesh[axis].get_local_rank() for axis in engine.mesh.mesh_dim_names or ()},
        device=f"{socket.gethostname()} {engine.device}",
        holds=", ".join(engine.describe_stages()),
        memory_bytes=held_bytes(engine.device),
        tracked=_tracked(trainer),
    )
    every: list[RankReport | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return [rank for rank in every if rank is not None]


def _tracked(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """Bytes by kind of the first step of this rank, and what the formulas say."""
    if trainer.memory is None or trainer.engine.config.kind != "decoder":
        return {}
    by_formula = formula(trainer.settings, trainer.engine.pipeline.get_local_rank())
    rows = zip(states_and_activations(trainer.memory), states_and_activations(by_formula), strict=True)
    return {kind: (measured, expected) for (kind, measured), (_, expected) in rows}


def _timelines(trainer: Trainer) -> dict[str, str]:
    if trainer.timeline is None:
        return {}
    return timeline_pictures(trainer.timeline, trainer.engine.schedule)


def _print_result(directory: Path, sample: Sample, report: Path) -> None:
    evaluated = [entry for entry in read_metrics(directory) if entry.held_out_loss is not None]
    print(f"\n{sample.prompt}│{sample.text}\n")
    nats = " → ".join(f"{entry.held_out_loss:.3f}" for entry in (evaluated[0], evaluated[-1]))
    bits = " → ".join(f"{entry.bits_per_byte:.3f}" for entry in (evaluated[0], evaluated[-1]))
    print(f"held-out loss {nats} nats per token ({bits} bits per byte)")
    print(f"report: {report}", flush=True)
