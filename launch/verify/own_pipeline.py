"""A model of the user's own, cut into pipeline stages by their function `stages`."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.verify.layout import Layout
from weft.launch.verify.own_model import Batch, OwnRun, shown
from weft.parallel import PipelineExecutor, PipelineStage, build_schedule, counted_parameters, gradient_norm
from weft.parallel.elsewhere import Elsewhere
from weft.parallel.pipeline.split_stages import StageModule
from weft.parallel.sharding import Sharding

MICROBATCHES = 2


class OwnPipelineRun(OwnRun):
    """One rank's stages. Every rank builds the whole model and runs its own part of it."""

    def __init__(
        self,
        own: ModuleType,
        model: nn.Module,
        mesh: DeviceMesh,
        dtype: torch.dtype,
        batch: Batch,
        layout: Layout,
        microbatches: int | None,
    ) -> None:
        super().__init__(own, model, mesh, dtype, batch)
        rows = next(value.shape[0] for value in self.arguments if isinstance(value, Tensor))
        self.microbatches = microbatches or (1 if rows % MICROBATCHES else MICROBATCHES)
        self.pipeline = mesh["pipeline"]
        schedule = build_schedule(layout.schedule, layout.pipeline, self.microbatches, layout.stages_per_rank)
        parts: Sequence[nn.Module] = own.stages(model, schedule.stages)
        held = schedule.stages_of(self.pipeline.get_local_rank())
        self._parts = [parts[index] for index in held]
        # a parameter that several stages hold counts where the first of them is
        first_stage = {id(p): index for index in reversed(range(len(parts))) for p in parts[index].parameters()}
        self._counted = {key for key, index in first_stage.items() if index in held}
        stages = [PipelineStage(parts[index], index, shared=getattr(parts[index], "shared", None)) for index in held]
        self.executor = PipelineExecutor(schedule, stages, self.pipeline, lambda output, _: self.loss(output))

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that are whole on one stage; `split_stages` puts stand-ins where the parts of others were."""
        for part in self._parts:
            model = part.model if isinstance(part, StageModule) else part
            for name, module in model.named_modules():
                if name and not any(isinstance(child, Elsewhere) for child in module.modules()):
                    yield name, module

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, Sharding | None]]:
        """By their names in the whole model."""
        held = {id(parameter) for part in self._parts for parameter in part.parameters()}
        return (entry for entry in super().parameters() if id(entry[1]) in held)

    def output(self) -> Tensor | None:
        for part in self._parts:
            part.eval()
        parts = self.executor.forward(self._cut(), keywords=self._cut_keywords())
        return None if parts is None else torch.cat([tensor for part in parts if (tensor := shown(part)) is not None])

    def backward(self) -> Tensor:
        for part in self._parts:
            part.train()
        unused = [0] * self.microbatches  # the loss is a function of the output alone
        result = self.executor.step(self._cut(), unused, keywords=self._cut_keywords())
        return result.loss.to(self.dtype)

    def gradient_norm(self) -> float:
        counted = [p for p in counted_parameters([self.model], self.tensor) if id(p) in self._counted]
        return float(gradient_norm(counted, [self.tensor, self.pipeline]))

    def _cut(self) -> list[Any]:
        """The arguments of each microbatch."""
        return [tuple(self._part(value, number) for value in self.arguments) for number in range(self.microbatches)]

    def _cut_keywords(self) -> list[dict[str, Any]]:
        return [
            {name: self._part(value, number) for name, value in self.keywords.items()}
            for number in range(self.microbatches)
        ]

    def _part(self, value: Any, number: int) -> Any:
        return value.chunk(self.microbatches)[number] if isinstance(value, Tensor) and value.dim() else value
