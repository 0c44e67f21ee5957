"""The plain run's values beside the ranks', and the first that differs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose

from torch import Tensor

from weft.launch.verify.causes import Evidence, close, is_partial
from weft.launch.verify.cut import Place, aligned
from weft.launch.verify.measure import distance, largest
from weft.launch.verify.trace import BACKWARD, FORWARD, Key, Trace

NEAR = 4  # values of equal shape before a wrong one that may be a term of it


@dataclass(frozen=True)
class Part:
    """What a rank holds of a value, and what it should hold."""

    place: Place
    held: Tensor
    expected: Tensor


class Comparison:
    """One traced step of the plain model and of every rank of a layout.

    `tolerance`: what rounding may do, relative to the scale of a value.
    """

    def __init__(self, plain: Trace, ranks: Sequence[Trace], tolerance: float) -> None:
        self.plain, self.ranks, self.tolerance = plain, ranks, tolerance
        kinds = {key.what for key in plain.values}
        self._floors = {
            what: 1e-6 * max(largest(value.tensor) for key, value in plain.values.items() if key.what == what)
            for what in kinds
        }

    @cached_property
    def right(self) -> dict[Key, bool]:
        """Every value of the plain run, in its order, that ranks hold in a comparable shape."""
        judged = {key: self._is_right(key) for key in self.plain.values}
        return {key: right for key, right in judged.items() if right is not None}

    def first_wrong(self, whats: Sequence[str]) -> Key | None:
        """The first wrong value of these kinds of which the model is not right again later."""
        keys = [key for key in self.right if key.what in whats]
        for number, key in enumerate(keys):
            following = keys[number + 1] if number + 1 < len(keys) else None
            if not self.right[key] and not self._recovers(key, following):
                return key
        return None

    def agree(self, seen: float, expected: float) -> bool:
        """Whether two numbers are equal but for rounding."""
        return isclose(seen, expected, rel_tol=self.tolerance)

    def close(self, part: "Part") -> bool:
        """Whether a rank holds what it should."""
        return close(part.held, part.expected, self.tolerance)

    def wrong_group(self, parts: Sequence["Part"], group: Callable[[Place], object]) -> list["Part"]:
        """The parts of the first group in which one differs."""
        first = next((part for part in parts if not self.close(part)), parts[0])
        return [part for part in parts if group(part.place) == group(first.place)]

    def weigh(self, group: Sequence["Part"], full: Tensor, offsets: Iterable[Tensor] = ()) -> Evidence:
        """The evidence that a group of parts is."""
        held, expected = [part.held for part in group], [part.expected for part in group]
        return Evidence(held, expected, full, list(offsets), self.tolerance)

    def parts(self, key: Key) -> list[Part]:
        """What each rank that computes the value holds of it."""
        plain = self.plain.values[key]
        found = []
        for trace in self.ranks:
            value = trace.values.get(key)
            pair = value and aligned(plain.tensor, value.tensor, trace.place, value.columns)
            if pair:
                found.append(Part(trace.place, held=pair[1], expected=pair[0]))
        return found

    def evidence(self, key: Key) -> Evidence:
        """The value as the tensor ranks of the first replica that has it wrong hold it."""
        group = self.wrong_group(self.parts(key), lambda place: (place.data, place.pipeline))
        return self.weigh(group, self.plain.values[key].tensor, self._offsets(key, group[0]))

    def _is_right(self, key: Key) -> bool | None:
        parts = self.parts(key)
        if not parts:
            return None
        scale = max(largest(self.plain.values[key].tensor), self._floors[key.what])
        return all(distance(part.held, part.expected) <= self.tolerance * scale for part in parts)

    def _recovers(self, key: Key, following: Key | None) -> bool:
        """Whether a value that differs is meant to: a term of a sum that is made later, inside the enclosing layer."""
        closing = "output" if key.what in FORWARD else "gradient of input"
        for name in enclosing(key.module):
            ends = [right for other, right in self.right.items() if other.module == name and other.what == closing]
            if ends and all(ends):
                return True
        return following is not None and self.right[following] and is_partial(self.evidence(key))

    def _offsets(self, key: Key, part: Part) -> Iterator[Tensor]:
        """Biases of the layer, and right values before this one, cut as the rank should hold them."""
        near = key.module if key.what == "output" else next(enclosing(key.module), "")
        for name, parameter in self.plain.parameters.items():
            if parameter.initial.dim() == 1 and (not near or name.startswith(f"{near}.")):
                yield parameter.initial
        whats = FORWARD if key.what in FORWARD else BACKWARD
        order = [other for other in self.right if other.what in whats]
        before = order[: order.index(key)] if key in self.right else []
        shape = self.plain.values[key].tensor.shape
        values = [self.plain.values[other].tensor for other in before if self.right[other]]
        for value in [value for value in values if value.shape == shape][-NEAR:]:
            pair = aligned(value, part.held, part.place, None)
            if pair is not None:
                yield pair[0]


def enclosing(module: str) -> Iterator[str]:
    """The names of the modules around it, the nearest first, the whole model last."""
    while module:
        module = module.rpartition(".")[0]
        yield module
