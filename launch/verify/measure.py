"""How far a layout's run is from the plain one, quantity by quantity."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
ROUNDING_FACTOR = 4.0

INITIAL, OUTPUT, LOSS, NORM, GRADIENT, WEIGHTS = QUANTITIES = (
    "initial weights",
    "output",
    "loss",
    "gradient norm",
    "gradient",
    "weights",
)


@dataclass(frozen=True)
class Reading:
    """The largest error of one quantity relative to its scale, how large it may be, and whose it is."""

    error: float = 0.0
    allowed: float = 1.0
    parameter: str = ""

    @property
    def excess(self) -> float:
        """Above 1: over the tolerance."""
        return self.error / self.allowed if self.error < inf else inf

    @property
    def right(self) -> bool:
        return self.excess <= 1


@dataclass
class Reference:
    """What the plain model did in one process.

    Attributes:
        rounding: for each quantity or `quantity parameter`, how far this run is from the one in float64.
        computed_in: the coarsest precision that the model has used inside.
    """

    output: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    computed_in: str = "float64"

    def compare_with_exact(self, exact: "Reference") -> None:
        """Note how far rounding alone has taken this run: what a layout may differ by too."""
        if self.output is not None and exact.output is not None:
            self.rounding[OUTPUT] = distance(self.output, exact.output)
        self.rounding[LOSS] = distance(_exactly(self.losses), _exactly(exact.losses))
        self.rounding[NORM] = distance(_exactly(self.gradient_norms), _exactly(exact.gradient_norms))
        for what, own, other in ((GRADIENT, self.gradients, exact.gradients), (WEIGHTS, self.weights, exact.weights)):
            for name in own:
                self.rounding[f"{what} {name}"] = distance(own[name], other[name])


class Judge:
    """Compares with the reference of one precision."""

    def __init__(self, reference: Reference, precision: str) -> None:
        self.reference = reference
        self._tolerance = max(TOLERANCE[precision], TOLERANCE[reference.computed_in])
        self._scales: dict[str, float] = {
            INITIAL: _largest(reference.initial.values()),
            GRADIENT: _largest(reference.gradients.values()),
            WEIGHTS: _largest(reference.weights.values()),
        }

    def value(self, what: str, seen: Tensor, expected: Tensor) -> Reading:
        """Of one tensor."""
        return self._reading(what, distance(seen, expected), largest(expected), self.reference.rounding.get(what, 0.0))

    def numbers(self, what: str, seen: Sequence[float], expected: Sequence[float]) -> Reading:
        """Of one number per step."""
        return self.value(what, _exactly(seen), _exactly(expected))

    def parameters(self, what: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Reading:
        """Of the parameter that is worst, among pairs of seen and expected; relative to the largest of all."""
        readings = [
            self._reading(
                what, distance(*pair), self._scales[what], self.reference.rounding.get(f"{what} {name}", 0.0), name
            )
            for name, pair in pairs.items()
        ]
        return worst(readings)

    def _reading(self, what: str, error: float, scale: float, rounding: float, parameter: str = "") -> Reading:
        scale = scale or 1.0
        return Reading(error / scale, max(self._tolerance, ROUNDING_FACTOR * rounding / scale), parameter)


def worst(readings: Iterable[Reading]) -> Reading:
    """The one that is furthest over, or nearest to, its tolerance."""
    return max(readings, key=lambda reading: reading.excess, default=Reading())


def distance(seen: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite when one of them is not a number."""
    if not seen.numel():
        return 0.0
    seen, expected = seen.double(), expected.double()
    difference = torch.where(seen == expected, 0.0, (seen - expected).abs())  # infinities may agree
    return float(difference.nan_to_num(nan=inf).max())


def largest(tensor: Tensor) -> float:
    """Largest finite absolute value."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _exactly(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(map(largest, tensors), default=0.0)
