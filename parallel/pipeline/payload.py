"""What travels between stages: a nest of tensors, taken apart into tensors and a description that fits in a header."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A nest is a tensor, None, or a tuple, list or dict (with string keys) of nests.
Nest = Any


class TensorSpec(NamedTuple):
    """What a receiver must know to make room for a tensor, and whether a gradient goes back for it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tensor.dtype, tuple(tensor.shape), tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class PayloadSpec:
    """A nest without its numbers: its structure (plain JSON, "T" for a tensor) and its tensors in order."""

    structure: Any
    tensors: tuple[TensorSpec, ...]

    def describe(self) -> str:
        tensors = [f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}" for spec in self.tensors]
        return " and ".join(tensors) or "no tensor"

    def encode(self, *, uniform: bool) -> bytes:
        """Write as a header; `uniform` says that the microbatches to come look the same."""
        tensors = [[str(spec.dtype).removeprefix("torch."), spec.shape, spec.requires_grad] for spec in self.tensors]
        return json.dumps({"structure": self.structure, "tensors": tensors, "uniform": uniform}).encode()

    @classmethod
    def decode(cls, header: bytes) -> tuple["PayloadSpec", bool]:
        """Read a header: the specification and whether it holds for the microbatches to come."""
        fields = json.loads(header)
        tensors = (TensorSpec(getattr(torch, dtype), tuple(shape), grad) for dtype, shape, grad in fields["tensors"])
        return cls(fields["structure"], tuple(tensors)), fields["uniform"]


def take_apart(nest: Nest) -> tuple[list[Tensor], PayloadSpec]:
    """The tensors of a nest, in order, and what is needed to put it together again.

    Raises:
        TypeError: the nest holds something that cannot travel between stages.
    """
    tensors: list[Tensor] = []
    structure = _structure(nest, tensors)
    return tensors, PayloadSpec(structure, tuple(map(TensorSpec.of, tensors)))


def put_together(structure: Any, tensors: list[Tensor]) -> Nest:
    """The nest of `structure` with `tensors` in their places."""
    return _nest(structure, iter(tensors))


def _structure(nest: Nest, tensors: list[Tensor]) -> Any:
    if isinstance(nest, Tensor):
        tensors.append(nest)
        return "T"
    if isinstance(nest, tuple):
        return {"tuple": [_structure(part, tensors) for part in nest]}
    if isinstance(nest, list):
        return {"list": [_structure(part, tensors) for part in nest]}
    if isinstance(nest, dict) and all(isinstance(key, str) for key in nest):
        return {"dict": {key: _structure(part, tensors) for key, part in nest.items()}}
    if nest is None:
        return None
    raise TypeError(
        f"a pipeline stage cannot hand on a {type(nest).__name__}; its inputs and outputs are tensors, None, and "
        "tuples, lists and dicts (with string keys) of these"
    )


def _nest(structure: Any, tensors: Iterator[Tensor]) -> Nest:
    if structure == "T":
        return next(tensors)
    if structure is None:
        return None
    ((kind, content),) = structure.items()
    if kind == "tuple":
        return tuple(_nest(part, tensors) for part in content)
    if kind == "list":
        return [_nest(part, tensors) for part in content]
    return {key: _nest(part, tensors) for key, part in content.items()}


def as_arguments(payload: Nest) -> tuple[Nest, ...]:
    """How a stage's module is called with a payload: a tuple or list becomes the arguments, all else is one."""
    return tuple(payload) if isinstance(payload, tuple | list) else (payload,)
