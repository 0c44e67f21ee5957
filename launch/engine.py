"""A model on a mesh: its stages, the pipeline that runs them, gradients over all axes, and the optimiser.

The engine knows nothing of files, text or processes: tests and the training loop drive it alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.allocator import keep_freed_memory
from weft.launch.batch_sizes import batch_sizes, samples_before
from weft.launch.objectives import IGNORED, content_key, prepare
from weft.launch.precision import parameter_dtype
from weft.launch.schedules import load_schedule
from weft.launch.sections import ParallelSettings, Settings
from weft.launch.updates import Updates
from weft.model.config import ModelConfig
from weft.model.decoder import DecoderStage, initial_distribution
from weft.model.generation.driver import Session
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling
from weft.model.generation.worker import Placement, Worker
from weft.model.hugging_face import load_pretrained
from weft.model.split import split_layers
from weft.model.stage import build_stage, shared_stages, without_sequence_parallelism
from weft.parallel import (
    DropoutKey,
    PipelineExecutor,
    PipelineStage,
    Schedule,
    defer_partial_gradients,
    initialize,
    vocab_parallel_cross_entropy,
)
from weft.parallel.exchange import start_all_reduce
from weft.parallel.fused import fuse_chains
from weft.parallel.pipeline.executor import StepResult
from weft.parallel.pipeline.payload import Nest
from weft.parallel.pipeline.timeline import Timeline
from weft.parallel.records import RankRecord


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did, the same on every rank, and the pipeline's own result.

    `step`: from 0. `loss`: mean over the valid tokens of the global batch, in nats. `gradient_norm`: of the whole
    model, before clipping; `gradient_norms`: of each stage and kind of layer. `skipped`: whether the optimiser has not
    moved. `finite`: whether loss and gradient are on all replicas, or would be but for the loss scale of float16.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    pipeline: StepResult
    skipped: bool
    finite: bool
    gradient_norms: Mapping[str, float]


class Engine:
    """One rank's part of a model in training.

    Args:
        config: the model.
        settings: layout, batch and optimiser; `parallel.data` may be "auto".
        mesh: with the axes of `weft.parallel.AXES`.
        dtype: of parameters, activations and their gradients; by default what `train.precision` says. Weights of less
            than float32 are updated, and their gradients summed, in float32.
        device: where they lie; the mesh's own device when None. On the meta device nothing is computed: see
            `weft.launch.dry_run`.
        resumed: a checkpoint will be loaded, so that the weights of `model.pretrained` need not be.
        record: where this rank notes what it does.

    Raises:
        ValueError: heads, features or layers do not divide over the mesh, the schedule does not exist, or the weights
            of `model.pretrained` are not those of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: Settings,
        mesh: DeviceMesh,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        resumed: bool = False,
        record: RankRecord | None = None,
    ) -> None:
        self.config, self.settings, self.mesh = config, settings, mesh
        self.record = record or RankRecord()
        self._weights_needed = not resumed
        self.tensor, self.data, self.pipeline = mesh["tensor"], mesh["data"], mesh["pipeline"]
        self.device = device or torch.device(mesh.device_type)
        if self.device.type == "cpu":
            keep_freed_memory()
        share = settings.batch.micro_size * self.data.size()
        self.microbatches = settings.batch.global_size // share
        self.schedule = load_schedule(settings.parallel, self.microbatches)
        dtype = dtype or parameter_dtype(settings.train)
        self.stages = self._build_stages(dtype)
        shapes = self._boundary_shapes(dtype)
        self._executors = {
            size // share: self._build_executor(load_schedule(settings.parallel, size // share), shapes)
            for size in batch_sizes(settings.batch)
        }
        self.executor = self._executors[self.microbatches]
        self.updates = Updates(
            self.stages, settings, mesh, layers=config.num_hidden_layers, all_stages=self.schedule.stages
        )
        self._loss_weight: Tensor | float = 1.0

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of this rank's stages, first stage first."""
        return [stage.module for stage in self.stages]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this rank, each once."""
        return list(dict.fromkeys(parameter for module in self.modules for parameter in module.parameters()))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What updates this rank's pieces of the parameters."""
        return self.updates.replicas.optimizer

    def describe_stages(self) -> list[str]:
        """This rank's stages in words: `stage 0: layers 0 to 7`."""
        return [f"stage {stage.index}: {_layers(list(stage.module.layers))}" for stage in self.stages]  # type: ignore[arg-type]

    def step(self, step: int, inputs: Nest, targets: Tensor) -> StepOutcome:
        """Train on this data rank's share of the global batch of the step numbered from 0.

        Shapes: inputs and targets `[size / data, sequence]`, the same on all ranks of the replica, `size` being one of
        `batch_sizes(settings.batch)`: windows of text and their next tokens, of which `weft.launch.objectives` makes
        what the model learns. Inputs that are a tuple, such as tokens, mask and the decoder's tokens, and their targets
        are taken as they are.
        """
        self._set_mode(training=True)
        samples = self._samples(samples_before(step, self.settings.batch), len(targets))
        if isinstance(inputs, Tensor):
            key = DropoutKey(self.settings.train.seed, samples)
            inputs, targets = (rows.to(self.device, non_blocking=True) for rows in (inputs, targets))
            inputs, targets = prepare(self.config, inputs, targets, key)
        self.updates.replicas.begin()
        scale = self.updates.loss_scale.scale
        self._loss_weight = scale / self._count_targets(targets).double()
        count = len(targets) // self.settings.batch.micro_size
        result = self._executors[count].step(
            self._cut(inputs, count), self._cut(targets, count), keywords=self._keywords(samples.chunk(count))
        )
        self.record.enter("gradient reduction")
        self.updates.replicas.finish()
        loss = self._over_data(result.loss) / scale
        updated = self.updates.apply(step, self.executor, loss)
        return StepOutcome(
            step,
            loss,
            updated.gradient_norm,
            updated.learning_rate,
            result,
            updated.skipped,
            updated.finite,
            updated.norms,
        )

    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum of the loss over all valid targets of all data ranks, in nats, and their number.

        Shapes: as for `step`.
        """
        self._set_mode(training=False)
        self._loss_weight = 1.0
        inputs, targets = self._fixed(inputs, targets)
        with self.updates.evaluated():
            result = self.executor.evaluate(self._cut(inputs, self.microbatches), self._cut(targets, self.microbatches))
        return self._over_data(result.loss), int(self._count_targets(targets))

    def outputs(self, inputs: Nest, targets: Tensor) -> list[Any] | None:
        """The logits of each microbatch, on the last stage; None on the others. Shapes: as for `step`."""
        self._set_mode(training=False)
        payload, _ = self._fixed(inputs, targets)
        return self.executor.forward(self._cut(payload, self.microbatches))

    def _fixed(self, inputs: Nest, targets: Tensor) -> tuple[Nest, Tensor]:
        if not isinstance(inputs, Tensor):
            return inputs, targets
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        return prepare(self.config, inputs, targets, content_key(inputs))

    def generate(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> list[int]:
        """Go on from a prompt with the weights as they are. A collective call of all ranks; rank 0 gets the tokens."""
        with self.updates.evaluated():
            session = Session(self._generation_worker(len(prompt) + new_tokens), self.mesh)
            if dist.get_rank() != 0:
                session.follow()
                return []
            request = Request(prompt, new_tokens, sampling)
            session.run([request])
            session.close()
            return [token.number for token in request.generated]

    def _generation_worker(self, capacity: int) -> Worker:
        modules = {stage.index: stage.module for stage in self.stages if isinstance(stage.module, DecoderStage)}
        weights = self.updates.replicas.whole_weights
        stages = {index: without_sequence_parallelism(module, weights(module)) for index, module in modules.items()}
        return Worker(
            Placement(stages, self.schedule, self.tensor, self.pipeline),
            vocab_size=self.config.vocab_size,
            slots=self.pipeline.size(),
            capacity=capacity,
            timeout=self.settings.train.timeout,
        )

    def gather_timeline(self, outcome: StepOutcome) -> Timeline:
        """The measured timeline of all ranks of this pipeline. A collective call of the pipeline axis."""
        return self._executors[len(outcome.pipeline.losses)].gather_timeline(outcome.pipeline)

    def _build_stages(self, dtype: torch.dtype) -> list[PipelineStage]:
        parallel, count = self.settings.parallel, self.schedule.stages
        layers = self._layers()
        stages = []
        for index in self.schedule.stages_of(self.pipeline.get_local_rank()):
            module = build_stage(
                self.config,
                layers[index],
                first=index == 0,
                last=index == count - 1,
                mesh=self.tensor,
                sequence_parallel=parallel.sequence_parallel,
                recompute=parallel.recompute,
                recomputed_modules=parallel.recompute_modules,
                recomputed_layers=recomputed_layers(parallel, self.config.num_hidden_layers),
                offload=parallel.offloads_activations,
                device="meta",
                dtype=dtype,
            )
            module.to_empty(device=self.device)
            module.tie()
            self._fill(module)
            defer_partial_gradients(module)
            if self.settings.train.compile and self.device.type != "meta":
                fuse_chains(module)
            stages.append(PipelineStage(module, index, shared=module.tied_parameters))
        return stages

    def _layers(self) -> list[range]:
        """The layers of every stage of the model."""
        split = self.settings.parallel.split
        given = None if split == "auto" else split
        return split_layers(self.config, self.schedule.stages, given, self.settings.corpus.sequence_length)

    def _fill(self, module: nn.Module) -> None:
        """The weights to begin with: those of the directory that `model.pretrained` names, or drawn from the seed."""
        directory = self.settings.model.get("pretrained")
        if directory is None or not self._weights_needed or self.device.type == "meta":
            initialize(module, self.settings.train.seed, initial_distribution(self.config))
        else:
            load_pretrained(module, directory, self.config)

    def _boundary_shapes(self, dtype: torch.dtype) -> Literal["agree"] | dict[int, Tensor]:
        """What each stage hands on for a microbatch, as a tensor without numbers, where that follows from settings."""
        if self.config.kind != "decoder":
            return "agree"
        length = self.settings.corpus.sequence_length
        if self.settings.parallel.sequence_parallel:
            length //= self.tensor.size()
        shape = (self.settings.batch.micro_size, length, self.config.hidden_size)
        output = torch.empty(shape, dtype=dtype, device="meta")  # [micro_size, sequence / tensor, hidden]
        return dict.fromkeys(range(self.schedule.stages), output)

    def _build_executor(
        self, schedule: Schedule, shapes: Literal["agree"] | Mapping[int, Tensor] = "agree"
    ) -> PipelineExecutor:
        return PipelineExecutor(
            schedule,
            self.stages,
            self.pipeline,
            self._loss,
            loss_reduction="sum",
            shapes=shapes,
            timeout=self.settings.train.timeout,
            reduce_shared_gradients=False,
            before_last_backward=lambda stage: self.updates.replicas.before_last_backward(stage),
            after_backward=lambda stage: self.updates.replicas.after_backward(stage),
            shared_stages=shared_stages(self.config, self._layers()),
            device=self.device,
            record=self.record,
        )

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        total = vocab_parallel_cross_entropy(logits, targets, mesh=self.tensor, ignore_index=IGNORED, reduction="sum")
        weight = self._loss_weight
        return total * (weight.to(total.dtype) if isinstance(weight, Tensor) else weight)

    def _set_mode(self, *, training: bool) -> None:
        for module in self.modules:
            module.train(training)

    def _cut(self, rows: Nest, count: int) -> Sequence[Nest]:
        if rows is None:
            return [None] * count
        if isinstance(rows, tuple):
            return list(zip(*(self._cut(part, count) for part in rows), strict=True))
        return list(rows.to(self.device, non_blocking=True).chunk(count))

    def _samples(self, first_sample: int, share: int) -> Tensor:
        """The numbers in the whole run of this replica's samples of a step."""
        first = first_sample + self.data.get_local_rank() * share
        return torch.arange(first, first + share, device=self.device)

    def _keywords(self, samples: Sequence[Tensor]) -> list[dict[str, Any]] | None:
        """The dropout keys of this replica's microbatches, when the model has any dropout."""
        config = self.config
        drops = (config.embedding_dropout, config.attention_dropout, config.residual_dropout, config.mlp_dropout)
        if not any(drops):
            return None
        return [{"dropout_key": DropoutKey(self.settings.train.seed, part)} for part in samples]

    def _count_targets(self, targets: Tensor) -> Tensor:
        """Of all data ranks, at least 1; a scalar on the device, so that the CPU need not wait for it."""
        count = (targets.to(self.device) != IGNORED).sum().reshape(1)
        if self.data.size() > 1:
            count = start_all_reduce(count, self.data, overwrite=True).wait()
        return count.clamp(min=1).squeeze()

    def _over_data(self, loss: Tensor) -> float:
        if self.data.size() > 1:
            loss = start_all_reduce(loss.to(self.device).reshape(1), self.data, overwrite=True).wait()
        return float(loss)


def recomputed_layers(parallel: ParallelSettings, layers: int) -> range | set[int]:
    """The numbers of the layers that `parallel.recompute_layers` chooses."""
    if parallel.recompute_layers == "all":
        return range(layers)
    chosen, every = map(int, parallel.recompute_layers.split(" of "))
    return {number for number in range(layers) if number % every < chosen}


def _layers(numbers: list[str]) -> str:
    if len(numbers) < 2:
        return f"layer {numbers[0]}" if numbers else "no layer"
    return f"layers {numbers[0]} to {numbers[-1]}"
