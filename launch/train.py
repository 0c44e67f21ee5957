"""One rank of a training run.

    torchrun --nproc-per-node 4 -m weft.launch.train configs/demo.yaml train.steps=100

`weft train` starts this on every device by itself.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

from weft.launch.checkpoints import Checkpoints, checkpoints_to_resume
from weft.launch.engine import Engine
from weft.launch.errors import RunError, UserError, show
from weft.launch.garbage import without_old_objects
from weft.launch.idle import release, stand_by
from weft.launch.layout import model_ranks
from weft.launch.metrics import MetricsWriter, StepMetrics
from weft.launch.preflight import check_restarts, check_run
from weft.launch.progress import Progress
from weft.launch.rank import run_to_end
from weft.launch.replan import replan
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
from weft.parallel import PipelineError, build_mesh
from weft.parallel.blame import blame, timed_out
from weft.parallel.records import RankRecord, open_record


def main(config: str, overrides: Sequence[str]) -> None:
    """Train as the settings say, as the rank that the environment names.

    Raises:
        UserError: the settings are wrong, or the corpus or a checkpoint cannot be used.
    """
    found, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    settings, world_size = _plan(config, overrides, found)
    if rank == 0:
        check_run(settings, world_size)
    os.environ["WORLD_SIZE"] = str(world_size)
    with stop_request() as stop, open_record(os.environ) as record:
        if settings.train.stop_after != "never":
            stop.set_budget(seconds_of(settings.train.stop_after))
        if rank >= world_size:
            record.enter("stand-by")
            stand_by(stop, timeout=settings.train.timeout)
            return
        record.enter("meeting of the ranks")
        try:
            with _explained(record):
                _train(settings, build_training_mesh(settings), stop, record)
            if rank == 0:
                release(found - world_size, timeout=settings.train.timeout)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _plan(config: str, overrides: Sequence[str], world_size: int) -> tuple[Settings, int]:
    """The settings as they are for the ranks that are there, and how many of those have work.

    Where ranks may be started again, as many nodes as are left are enough; otherwise the world is what was asked for.
    """
    settings = load_settings(config, overrides)
    restarts, nodes = (int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if not restarts:
        return resolved(settings, world_size), world_size
    settings = replan(settings, world_size, nodes=nodes)
    assert settings.parallel.data != "auto"
    ranks = model_ranks(settings) * settings.parallel.data
    check_restarts(settings, restarts, ranks=ranks, nodes=nodes)
    return resolved(settings, ranks), ranks


@contextmanager
def _explained(record: RankRecord) -> Iterator[None]:
    """Say of a communication that took too long which rank it is that holds the others up."""
    try:
        yield
    except PipelineError as error:
        words = str(error)
        raise RunError(words[0].upper() + words[1:]) from error
    except (RuntimeError, TimeoutError) as error:
        if not timed_out(error):
            raise
        here = record.read()
        raise RunError(f"Rank {here.rank} timed out {here}{blame(record)}") from error


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


def _train(settings: Settings, mesh: DeviceMesh, stop: StopRequest, record: RankRecord) -> None:
    record.enter("preparation of the corpus")
    tokens = _prepare(settings)
    record.enter("building of the model")
    engine = _build_engine(settings, mesh, record)
    checkpoints = Checkpoints(settings.checkpoint, EngineState(engine))
    trainer = Trainer(settings, engine, tokens, checkpoints, stop)
    resumed = trainer.resume()
    directory = Path(settings.report.directory)
    with ExitStack() as stack:
        watch = None
        if dist.get_rank() == 0:
            _keep_settings(settings, directory)
            keep_vocabulary(tokens.tokenizer, settings.corpus.tokenizer, directory)
            watch = _Watch(settings, engine, directory, trainer.step)
            stack.enter_context(watch.writer)
            stack.enter_context(watch.progress)
            watch.greet(trainer.step, resumed)
            checkpoints.say = watch.progress.say
        stack.enter_context(without_old_objects())
        for metrics in trainer.steps():
            if watch is not None:
                watch.step(metrics)
        if watch is not None and trainer.stopped and stop.requested is None:
            watch.progress.say(f"stopped after {settings.train.stop_after}, saved; the same command goes on")
    if not trainer.stopped:
        conclude(trainer)


def _build_engine(settings: Settings, mesh: DeviceMesh, record: RankRecord) -> Engine:
    resumed = bool(checkpoints_to_resume(settings.checkpoint))
    try:
        return Engine(model_config(settings.model), settings, mesh, resumed=resumed, record=record)
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


def _keep_settings(settings: Settings, directory: Path) -> None:
    """Write them beside and rename: the same command must find those of before whole, whenever this one ends."""
    directory.mkdir(parents=True, exist_ok=True)
    work = directory / "config.yaml.part"
    work.write_text(dump_settings(settings), encoding="utf-8")
    work.replace(directory / "config.yaml")


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


def start(arguments: Sequence[str]) -> int:
    """Be the rank that torchrun has started with CONFIG and KEY=VALUE …; returns the exit status.

    Only rank 0 speaks of what is wrong with the settings.
    """
    try:
        if not arguments:
            raise UserError("no settings file is named; write torchrun … -m weft.launch.train CONFIG [KEY=VALUE …].")
        record(main)(arguments[0], arguments[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            show(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    run_to_end(lambda: start(sys.argv[1:]))
