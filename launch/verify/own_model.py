"""A model of the user's own: `build(mesh)` in a module of theirs, and what else that module says about it.

def build(mesh): ...                  # the model over the tensor ranks of `mesh`; where there is one, the plain model
def batch(): ...                      # optional: (args, kwargs) of the forward, batch in dim 0
def loss(output): ...                 # optional: a scalar, the mean over the rows
def gradient_norm(model, mesh): ...   # optional: the user's own, to be verified
def stages(model, count): ...         # optional: the model cut into that many pipeline stages, around its parameters
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.optimizer import build_optimizer, parameter_groups
from weft.launch.sections import OptimizerSettings
from weft.launch.verify.layout import Layout, Plan, grids, schedules
from weft.launch.verify.subject import UnfitError
from weft.launch.verify.trace import floating_tensors
from weft.parallel import counted_parameters, gradient_norm
from weft.parallel.sharding import Sharding, sharded_parameters

SEED = 1234

Batch = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class OwnModel:
    """The model that `module:function` builds; `batch` is what every layout is fed with.

    Attributes:
        folder: where the module is found, if it is not installed.
    """

    folder: str
    module: str
    function: str
    steps: int
    batch: Batch
    output_name: str = "output"

    @property
    def name(self) -> str:
        return f"{self.module}:{self.function}"

    @property
    def rows(self) -> int:
        """Size of the batch."""
        return next((value.shape[0] for value in _tensors(self.batch) if value.dim()), 1)

    def plan(self, processes: int) -> Plan:
        """Every data × tensor size, and pipeline × schedule when the module has `stages`."""
        plan = Plan()
        cut = hasattr(import_from(self.folder, self.module), "stages")
        for grid in grids(processes):
            if grid.pipeline > 1 and not cut:
                continue
            if self.rows % grid.data:
                plan.skip(grid.sizes, f"The batch of {self.rows} rows does not divide over data {grid.data}.")
            else:
                plan.layouts += schedules(grid, grid.schedule, 1, plan)
        return plan

    def build(
        self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, *, microbatches: int | None = None
    ) -> "OwnRun":
        own = import_from(self.folder, self.module)
        torch.manual_seed(SEED)
        try:
            # drawn in torch's default float32, so that every precision starts from the same weights
            model = getattr(own, self.function)(mesh["tensor"]).to(dtype)
            if layout.pipeline == 1:
                return OwnRun(own, model, mesh, dtype, self.batch)
            from weft.launch.verify.own_pipeline import OwnPipelineRun

            return OwnPipelineRun(own, model, mesh, dtype, self.batch, layout, microbatches)
        except ValueError as error:
            raise UnfitError(str(error)) from None


def import_from(folder: str, module: str) -> ModuleType:
    """The module, from the folder or from where Python finds it."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(module)


class OwnRun:
    """The user's model on one rank, trained by AdamW; losses and gradients are averaged over data ranks."""

    def __init__(self, own: ModuleType, model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, batch: Batch) -> None:
        self.own, self.model, self.dtype = own, model, dtype
        self.tensor, self.data = mesh["tensor"], mesh["data"]
        self.own_loss: float | None = None
        self.arguments, self.keywords = own_rows(batch, self.data, dtype)
        options = OptimizerSettings()
        self.optimizer = build_optimizer(parameter_groups(model.named_parameters(), options), options)

    @property
    def targets(self) -> tuple[int, ...]:
        tensors = _tensors((self.arguments, self.keywords))
        return tuple(int((tensor >= 0).sum()) for tensor in tensors if not tensor.is_floating_point())

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.model.named_modules()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, Sharding | None]]:
        return sharded_parameters(self.model)

    @torch.no_grad()
    def replace_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter, _ in self.parameters():
            if name in values:
                parameter.copy_(values[name])

    def output(self) -> Tensor | None:
        """The logits or the first floating-point tensor that the model returns."""
        self.model.eval()
        with torch.no_grad(), default_dtype(self.dtype):
            return shown(self.model(*self.arguments, **self.keywords))

    def step(self, number: int) -> tuple[float, float]:
        self.model.train()
        self.optimizer.zero_grad()
        with default_dtype(self.dtype):
            total = self.backward()
        self.own_loss = float(total) * self.data.size()
        if self.data.size() > 1:
            for tensor in (total, *(p.grad for p in self.model.parameters() if p.grad is not None)):
                dist.all_reduce(tensor, group=self.data.get_group())
        norm = self.gradient_norm()
        self.optimizer.step()
        return float(total), norm

    def gradients(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p, _ in self.parameters()}

    def backward(self) -> Tensor:
        """Backpropagate this rank's share of the loss, and return it."""
        share = self.loss(self.model(*self.arguments, **self.keywords))
        share.backward()  # type: ignore[no-untyped-call]
        return share.detach().clone()

    def loss(self, output: Any) -> Tensor:
        """This data rank's share of the loss: its mean over the rows by the number of data ranks."""
        own = getattr(self.own, "loss", None)
        result = getattr(output, "loss", None) if own is None else own(output)
        if result is None:
            first = shown(output)
            assert first is not None
            result = first if first.numel() == 1 else first.square().mean()
        return result / self.data.size()  # type: ignore[no-any-return]

    def gradient_norm(self) -> float:
        own = getattr(self.own, "gradient_norm", None)
        if own is not None and own is not gradient_norm:  # weft's own may be imported there
            return float(own(self.model, self.tensor))
        return float(gradient_norm(counted_parameters([self.model], self.tensor), [self.tensor]))


def shown(output: Any) -> Tensor | None:
    """What is compared of a model's output: its logits if it names them, else its first floating-point tensor."""
    logits = getattr(output, "logits", None)
    return next(iter(floating_tensors(output if logits is None else logits)), None)


def own_rows(batch: Batch, data: DeviceMesh, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """This data rank's rows of every tensor that has as many as the first, in the precision of the run."""
    arguments, keywords = batch
    rows = next((value.shape[0] for value in _tensors(batch) if value.dim()), 1)

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            value = value.to(dtype)
        return value.chunk(data.size())[data.get_local_rank()] if value.shape[:1] == (rows,) else value

    return [own(value) for value in arguments], {name: own(value) for name, value in keywords.items()}


def _tensors(batch: Batch) -> list[Tensor]:
    arguments, keywords = batch
    return [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
