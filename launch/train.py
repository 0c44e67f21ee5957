"""One rank of a training run.

    torchrun --nproc-per-node 4 -m weft.launch.train configs/demo.yaml train.steps=100

`weft train` starts this on every device by itself.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

from weft.launch.checkpoints import Checkpoints, checkpoints_to_resume
from weft.launch.engine import Engine
from weft.launch.errors import UserError, show
from weft.launch.metrics import MetricsWriter, StepMetrics
from weft.launch.preflight import check_run
from weft.launch.progress import Progress
from weft.launch.saved_state import EngineState
from weft.launch.settings import Settings, dump_settings, load_settings, resolved
from weft.launch.signals import StopRequest, stop_request
from weft.launch.summary import conclude
from weft.launch.tokens import TokenisedCorpus, prepare
from weft.launch.trainer import Trainer
from weft.launch.units import seconds_of
from weft.launch.vocabulary import keep_vocabulary
from weft.launch.world import device_type
from weft.model.config import model_config
from weft.parallel import build_mesh


def main(config: str, overrides: Sequence[str]) -> None:
    """Train as the settings say, as the rank that the environment names.

    Raises:
        UserError: the settings are wrong, or the corpus or a checkpoint cannot be used.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = resolved(load_settings(config, overrides), world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        check_run(settings, world_size)
    with stop_request() as stop:
        if settings.train.stop_after != "never":
            stop.set_budget(seconds_of(settings.train.stop_after))
        mesh = build_training_mesh(settings)
        try:
            _train(settings, mesh, stop)
        finally:
            dist.destroy_process_group()


def build_training_mesh(settings: Settings) -> DeviceMesh:
    """The mesh of this rank of the job, with its device chosen; `parallel.data` must be a number."""
    kind = device_type(settings)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # ranks that share cores would wait for each other's threads
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parallel = settings.parallel
    assert parallel.data != "auto"
    return build_mesh(
        pipeline=parallel.pipeline,
        data=parallel.data,
        context=parallel.context,
        tensor=parallel.tensor,
        device_type=kind,
        timeout=timedelta(seconds=settings.train.timeout),
    )


def _train(settings: Settings, mesh: DeviceMesh, stop: StopRequest) -> None:
    tokens = _prepare(settings)
    engine = _build_engine(settings, mesh)
    checkpoints = Checkpoints(settings.checkpoint, EngineState(engine))
    trainer = Trainer(settings, engine, tokens, checkpoints, stop)
    resumed = trainer.resume()
    directory = Path(settings.report.directory)
    with ExitStack() as stack:
        watch = None
        if dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
            keep_vocabulary(tokens.tokenizer, settings.corpus.tokenizer, directory)
            watch = _Watch(settings, engine, directory, trainer.step)
            stack.enter_context(watch.writer)
            stack.enter_context(watch.progress)
            watch.greet(trainer.step, resumed)
            checkpoints.say = watch.progress.say
        for metrics in trainer.steps():
            if watch is not None:
                watch.step(metrics)
        if watch is not None and trainer.stopped and stop.requested is None:
            watch.progress.say(f"stopped after {settings.train.stop_after}, saved; the same command goes on")
    if not trainer.stopped:
        conclude(trainer)


def _build_engine(settings: Settings, mesh: DeviceMesh) -> Engine:
    resumed = bool(checkpoints_to_resume(settings.checkpoint))
    try:
        return Engine(model_config(settings.model), settings, mesh, resumed=resumed)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _prepare(settings: Settings) -> TokenisedCorpus:
    """Let rank 0 read and tokenise the corpus; the others find it in the cache, or do the same on another node."""

    def work() -> TokenisedCorpus:
        return prepare(
            settings.corpus.path,
            vocab_size=settings.model["vocab_size"],
            sequence_length=settings.corpus.sequence_length,
            tokenizer=settings.corpus.tokenizer,
        )

    tokens = work() if dist.get_rank() == 0 else None
    dist.barrier()
    return tokens or work()


class _Watch:
    """What rank 0 shows and writes while the run goes on."""

    def __init__(self, settings: Settings, engine: Engine, directory: Path, step: int) -> None:
        self.settings, self.engine = settings, engine
        self.writer = MetricsWriter(directory, first_step=step + 1 if step else 0)
        self.progress = Progress(total_steps=settings.train.steps, device=engine.device.type)

    def greet(self, step: int, resumed: Path | None) -> None:
        sizes = {axis: self.engine.mesh[axis].size() for axis in self.engine.mesh.mesh_dim_names or ()}
        layout = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one process"
        self.progress.say(f"{self.settings.name}: {self.engine.config.parameters:,} parameters on {layout}")
        if resumed is not None:
            whole = step >= self.settings.train.steps
            self.progress.say(f"{'already trained to the end in' if whole else 'going on from'} {resumed}")

    def step(self, metrics: StepMetrics) -> None:
        self.writer.write(metrics)
        self.progress.step(metrics)


if __name__ == "__main__":
    try:
        if len(sys.argv) < 2:
            raise UserError("no settings file is named; write torchrun … -m weft.launch.train CONFIG [KEY=VALUE …].")
        record(main)(sys.argv[1], sys.argv[2:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            show(error)
        sys.exit(error.exit_status)
