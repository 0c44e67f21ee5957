"""The training loop of one rank: batches in, metrics, checkpoints and held-out losses out."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from weft import __version__
from weft.launch.batch_sizes import batch_size, samples_before
from weft.launch.batches import Batch, Batches, HeldOutBatches
from weft.launch.batches_ahead import BatchesAhead
from weft.launch.checkpoints import Checkpoints, say_on_rank_0
from weft.launch.engine import Engine, StepOutcome
from weft.launch.flops import flops_per_token, model_tflops, peak_tflops, utilization
from weft.launch.measured import measured_step
from weft.launch.metrics import StepMetrics
from weft.launch.not_finite import Guard
from weft.launch.patience import Patience
from weft.launch.plan.breakdown import Memory
from weft.launch.replicas import check_replicas
from weft.launch.sections import Settings
from weft.launch.signals import StopRequest
from weft.launch.tokens import TokenisedCorpus
from weft.parallel.pipeline.timeline import Timeline


@dataclass
class Trainer:
    """Drives the engine through the steps of a run; every rank has one and does the same.

    `steps` yields the metrics of each finished step, numbered from 1, and then saves it; with step 0 the held-out
    loss before training.
    `memory` is what this rank held in the first step that it trained.
    """

    settings: Settings
    engine: Engine
    tokens: TokenisedCorpus
    checkpoints: Checkpoints
    stop: StopRequest
    step: int = 0
    stopped: bool = False
    seconds: float = 0.0
    timeline: Timeline | None = None
    memory: Memory | None = None
    _saved: int = field(default=-1, init=False)
    _writing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        length = self.settings.corpus.sequence_length
        self._batches = Batches(self.tokens.train, length, self.settings.train.seed)
        self._ahead = BatchesAhead(self._batch_of, self.engine.device)
        self._held_out = HeldOutBatches(self.tokens.held_out, length)
        self._patience = Patience(self.settings.train.early_stopping)

    def resume(self) -> Path | None:
        """Go on from the checkpoint that the settings name, if there is one."""
        self.engine.record.enter("loading of a checkpoint")
        resumed = self.checkpoints.resume()
        if resumed is None:
            return None
        path, run = resumed
        self.step = self._saved = run.step
        self._patience.best, self._patience.waited = run.best_held_out_loss, run.evaluations_since
        return path

    def steps(self) -> Iterator[StepMetrics]:
        """Train to the end, or until the job is asked to stop; saves when due and at the end."""
        if self.step == 0:
            yield self._with_held_out_loss(StepMetrics(step=0))
        train = self.settings.train
        last = self._patience.ended
        while self.step < train.steps and not (self.stopped or last):
            metrics = self._train_step()
            last = self.step == train.steps
            if last or (train.evaluate_every and self.step % train.evaluate_every == 0):
                metrics = self._with_held_out_loss(metrics)
                last = last or self._patience.ends(metrics.held_out_loss)
            if train.check_replicas_every and self.step % train.check_replicas_every == 0:
                check_replicas(self.engine)
            yield metrics  # a run that is killed now trains the step again; behind its save, nobody would tell of it
            every = self.settings.checkpoint.every
            last = last or self.stopped
            if last or (every and self.step % every == 0):
                self.save(last=last)
            elif not self._writing:
                self.checkpoints.finish()

    def save(self, *, last: bool) -> None:
        """Save, unless this step is saved already; the `last` save of the process is on disk when this returns."""
        if self._saved != self.step:
            self.engine.record.begin_step(None)
            self.engine.record.enter("saving of a checkpoint")
            self.checkpoints.save(self.step, self._metadata(), last=last)
            self._saved = self.step

    def _metadata(self) -> dict[str, Any]:
        return {
            "samples": samples_before(self.step, self.settings.batch),
            "tokens": self.trained_tokens,
            "seed": self.settings.train.seed,
            "best_held_out_loss": self._patience.best,
            "evaluations_since": self._patience.waited,
            "versions": {"weft": __version__, "torch": torch.__version__},
            "settings": self.settings.model_dump(mode="json"),
        }

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps so far, resumed ones included."""
        return samples_before(self.step, self.settings.batch) * self.settings.corpus.sequence_length

    def _train_step(self) -> StepMetrics:
        start = time.perf_counter()
        self.engine.record.begin_step(self.step)
        batch = self._ahead.take(self.step, last=self.step + 1 == self.settings.train.steps)
        if self.memory is None:
            outcome, self.memory = measured_step(self.engine, self.step, batch.inputs, batch.targets)
        else:
            outcome = self.engine.step(self.step, batch.inputs, batch.targets)
        if not outcome.finite:
            guard = Guard(self.engine, self.settings.train, say_on_rank_0)
            outcome = guard.retry(outcome, lambda: self.engine.step(self.step, batch.inputs, batch.targets))
        seconds = time.perf_counter() - start
        self.step += 1
        self.seconds += seconds
        self.engine.record.enter("agreement after the step")
        memory = self._agree()
        return self._metrics(outcome, seconds, memory)

    def _agree(self) -> int:
        """What all ranks must know alike: whether to stop, whether some still save; and the most memory that one holds.

        A signal reaches the ranks at different moments; all must leave after the same step.
        """
        facts = torch.tensor(
            [self.stop.due, self.checkpoints.writing, held_bytes(self.engine.device)], device=self.engine.device
        )
        if dist.get_world_size() > 1:
            dist.all_reduce(facts, dist.ReduceOp.MAX)
        stopped, writing, memory = facts.tolist()
        self.stopped, self._writing = bool(stopped), bool(writing)
        return int(memory)

    def _metrics(self, outcome: StepOutcome, seconds: float, memory: int) -> StepMetrics:
        mesh = self.engine.mesh
        bubble = None
        if mesh["pipeline"].size() > 1 and mesh["data"].get_local_rank() == mesh["tensor"].get_local_rank() == 0:
            self.timeline = self.engine.gather_timeline(outcome)
            bubble = self.timeline.bubble
        sequences = batch_size(self.step - 1, self.settings.batch)
        speed = sequences * self.settings.corpus.sequence_length / seconds
        rate = self._tflops(speed)
        device = torch.cuda.get_device_name() if self.engine.device.type == "cuda" else "cpu"
        return StepMetrics(
            step=self.step,
            loss=outcome.loss,
            grad_norm=outcome.gradient_norm,
            grad_norms=outcome.gradient_norms,
            skipped=outcome.skipped,
            loss_scale=self.engine.updates.loss_scale.scale if self.settings.train.precision == "fp16" else None,
            learning_rate=outcome.learning_rate,
            step_seconds=seconds,
            tokens_per_second=speed,
            tflops=rate,
            mfu=utilization(rate, peak_tflops(device, self.settings.train.precision)),
            memory_bytes=memory,
            bubble=bubble,
        )

    def _tflops(self, tokens_per_second: float) -> float:
        config = self.engine.config
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        if config.positions == "learned":
            looked_up += config.max_position_embeddings * config.hidden_size
        flops = flops_per_token(
            parameters=config.parameters - looked_up,
            layers=config.num_hidden_layers,
            hidden_size=config.num_attention_heads * config.head_dim,
            sequence_length=self.settings.corpus.sequence_length,
        )
        return model_tflops(tokens_per_second=tokens_per_second, flops_per_token=flops, devices=dist.get_world_size())

    def _with_held_out_loss(self, metrics: StepMetrics) -> StepMetrics:
        """Evaluate the first `train.evaluate_sequences` held-out windows, each token counted once."""
        self.engine.record.begin_step(None)
        size = self.settings.batch.global_size
        wanted = min(self.settings.train.evaluate_sequences, self._held_out.windows)
        total, count = 0.0, 0
        for first in range(0, wanted, size):
            windows = np.arange(first, first + size)
            windows[windows >= wanted] = self._held_out.windows  # windows without a target fill up the batch
            batch = self._held_out.batch(self._own_share(windows))
            loss, targets = self.engine.evaluate(batch.inputs, batch.targets)
            total, count = total + loss, count + targets
        mean = total / count
        values: dict[str, Any] = vars(metrics) | {
            "held_out_loss": mean,
            "bits_per_byte": self.tokens.bits_per_byte(mean, targets=count),
        }
        return StepMetrics(**values)

    def _batch_of(self, step: int) -> Batch:
        """This data rank's samples of the step."""
        first, size = samples_before(step, self.settings.batch), batch_size(step, self.settings.batch)
        return self._batches.batch(self._own_share(np.arange(first, first + size)))

    def _own_share(self, numbers: np.ndarray) -> np.ndarray:
        return np.array_split(numbers, self.engine.data.size())[self.engine.data.get_local_rank()]


def held_bytes(device: torch.device) -> int:
    """The most memory that this rank has held so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
