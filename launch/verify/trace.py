"""What passes through the named modules of a model in one training step: values forward, gradients backward."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.launch.verify.cut import Cut, Place

FORWARD = ("input", "output")
BACKWARD = ("gradient of output", "gradient of input")


class Key(NamedTuple):
    """A value's place in the computation: which use of a module, and which of its tensors, counted from 0."""

    module: str
    what: str
    use: int
    number: int


@dataclass(frozen=True)
class Value:
    """One rank's tensor, and how its last dim is cut where the module has declared it."""

    tensor: Tensor
    columns: Cut | None = None


@dataclass(frozen=True)
class ParameterValue:
    """One rank's parameter: before training, its gradient, and how it is cut."""

    initial: Tensor
    gradient: Tensor
    cut: Cut


@dataclass
class Trace:
    """One rank's account of a training step on one microbatch.

    Attributes:
        values: in the order of their computation.
        parameters: by global name.
        loss, gradient_norm: as the run reports them.
        own_loss: this rank's loss, before any average over data ranks; None when not known.
        targets: for each integer tensor of this rank's batch, how many of its entries are not negative.
    """

    place: Place
    values: dict[Key, Value] = field(default_factory=dict)
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    loss: float = 0.0
    gradient_norm: float = 0.0
    own_loss: float | None = None
    targets: tuple[int, ...] = ()


@contextmanager
def tracing(modules: Iterable[tuple[str, nn.Module]], values: dict[Key, Value]) -> Iterator[None]:
    """Record what the named modules take and give into `values` while the body runs."""
    handles: list[Any] = []
    for name, module in modules:
        recorder = _Recorder(name, module, values)
        handles.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """The hooks of one module."""

    def __init__(self, name: str, module: nn.Module, values: dict[Key, Value]) -> None:
        self._name, self._values = name, values
        self._row, self._column = _declared_columns(module)
        self._uses: Counter[str] = Counter()

    def before(self, module: nn.Module, arguments: Any, keywords: Any) -> Any:
        use = self._count("input")
        own = _own_view(arguments), _own_view(keywords)
        for number, tensor in enumerate(floating_tensors(own)):
            self._record(Key(self._name, "input", use, number), tensor, self._row)
            self._watch(Key(self._name, "gradient of input", use, number), tensor, self._row)
        return own

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        use = self._count("output")
        for number, tensor in enumerate(floating_tensors(output)):
            self._record(Key(self._name, "output", use, number), tensor, self._column)
            self._watch(Key(self._name, "gradient of output", use, number), tensor, self._column)

    def _count(self, what: str) -> int:
        self._uses[what] += 1
        return self._uses[what] - 1

    def _record(self, key: Key, tensor: Tensor, columns: Cut | None) -> None:
        self._values[key] = Value(tensor.detach().clone(), columns)

    def _watch(self, key: Key, tensor: Tensor, columns: Cut | None) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._record(key, gradient, columns))


def _declared_columns(module: nn.Module) -> tuple[Cut | None, Cut | None]:
    """How a linear layer's declared weight cuts the last dim of its input and of its output."""
    sharding = getattr(module, "shardings", {}).get("weight")
    if sharding is None or sharding.dim is None or isinstance(module, nn.Embedding):
        return None, None
    cut = Cut(-1, tuple(sharding.slices()), sharding.replicas)
    return (cut, None) if sharding.dim == 1 else (None, cut)


def _own_view(nest: Any) -> Any:
    """The same nest with views in place of tensors, whose gradients are then those of this use alone."""
    if isinstance(nest, Tensor):
        return nest.view_as(nest) if nest.requires_grad else nest
    if type(nest) in (tuple, list):
        return type(nest)(map(_own_view, nest))
    if type(nest) is dict:
        return {key: _own_view(value) for key, value in nest.items()}
    return nest


def floating_tensors(nest: Any) -> list[Tensor]:
    """The floating-point tensors of a nest of sequences and mappings, in order."""
    if isinstance(nest, Tensor):
        return [nest] if torch.is_floating_point(nest) else []
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    if isinstance(nest, Sequence) and not isinstance(nest, str):
        return [tensor for part in nest for tensor in floating_tensors(part)]
    return []
