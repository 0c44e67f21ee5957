"""What a config says of rotary positions: base, rotated share of a head, and how the angles are stretched.

Imports no torch, so that settings are read without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, Literal

from weft.model.config_values import checked, number, shown

Scaling = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
SCALINGS: tuple[Scaling, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) and their scaling to longer texts.

    Attributes:
        theta: base of the wavelengths.
        fraction: share of each head's dims that is rotated.
        scaling: "linear" (Chen et al. 2023), "dynamic" NTK (the base grows with texts beyond `length`), "yarn" (Peng et
            al. 2023), "llama3" (Grattafiori et al. 2024, as its code has it), "longrope" (Ding et al. 2024).
        factor: how much longer the texts become.
        length: positions of the training before the scaling.
        magnitude: what cosines and sines are multiplied by.
        low, high: "llama3": wavelengths between `length / high` and `length / low` are stretched in part; "yarn": so
            are dims that turn between `low` and `high` times in `length` positions.
        truncate: "yarn" rounds the bounds between those dims to whole dims.
        short_factors, long_factors: "longrope": the factor of each wavelength up to `length` and beyond.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling = "default"
    factor: float = 1.0
    length: int = 0
    magnitude: float = 1.0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.scaling in ("dynamic", "longrope")

    def kind_of_length(self, length: int) -> int:
        """A length that stands for all texts whose frequencies are those of a text of that length."""
        if not self.by_length or length <= self.length:
            return 0
        return length if self.scaling == "dynamic" else self.length + 1

    def rotated(self, head_dim: int) -> int:
        """How many dims of a head are rotated."""
        return int(head_dim * self.fraction)


def read_rotary(key: str, values: Mapping[str, Any], positions: int, *, theta: float, fraction: float) -> Rotary:
    """Rotary positions from the mapping under `rope_parameters` or `rope_scaling` of a Hugging Face config.

    `positions` is the config's `max_position_embeddings`; `theta` and `fraction` hold where the mapping has none.

    Raises:
        ValueError: an unknown kind, a missing number or one out of range; names `key`.
    """
    kind = values.get("rope_type", values.get("type")) or "default"
    if kind == "su" or (kind == "yarn" and "long_factor" in values):
        kind = "longrope"  # its names in the first Phi-3 configs
    if kind not in SCALINGS:
        raise ValueError(f"model.{key} is of the unsupported kind {shown(kind)}; choose one of {', '.join(SCALINGS)}")
    missing = [name for name in _NEEDED.get(kind, ()) if not values.get(name)]
    if missing:
        raise ValueError(f"model.{key} of the kind {kind} lacks {missing[0]}; add it")
    theta = _number(key, "rope_theta", values, theta)
    common: dict[str, Any] = {"theta": theta, "fraction": _fraction(key, values, fraction)}
    if kind == "default":
        return Rotary(**common)
    common |= {"length": positions, "factor": _number(key, "factor", values, 1.0)}
    if kind in ("linear", "dynamic"):
        return Rotary(**common, scaling=kind)
    common |= {"length": int(_number(key, "original_max_position_embeddings", values, positions))}
    if common["length"] < 1:
        raise ValueError(f"model.{key}: original_max_position_embeddings is below 1; give it a whole number")
    if kind == "llama3":
        low, high = (_number(key, f"{name}_freq_factor", values, 1.0) for name in ("low", "high"))
        if low >= high:
            raise ValueError(
                f"model.{key}: low_freq_factor is {low:g}; give it a number below high_freq_factor {high:g}"
            )
        return Rotary(**common, scaling="llama3", low=low, high=high)
    return _yarn(key, values, common) if kind == "yarn" else _longrope(key, values, common, positions)


def _yarn(key: str, values: Mapping[str, Any], common: dict[str, Any]) -> Rotary:
    factor = common["factor"]
    whole, part = (values.get(name) and _number(key, name, values, 1.0) for name in ("mscale", "mscale_all_dim"))
    growth = _growth(factor, whole) / _growth(factor, part) if whole and part else _growth(factor, 1.0)
    return Rotary(
        **common,
        scaling="yarn",
        magnitude=_number(key, "attention_factor", values, growth),
        low=_number(key, "beta_slow", values, 1.0),
        high=_number(key, "beta_fast", values, 32.0),
        truncate=checked(f"{key}: truncate", values.get("truncate", True), bool),
    )


def _growth(factor: float, weight: float) -> float:
    return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(key: str, values: Mapping[str, Any], common: dict[str, Any], positions: int) -> Rotary:
    factor, length = common["factor"] if values.get("factor") else positions / common["length"], common["length"]
    growth = sqrt(1 + log(factor) / log(length)) if factor > 1 and length > 1 else 1.0
    return Rotary(
        **common | {"factor": factor},
        scaling="longrope",
        magnitude=_number(key, "attention_factor", values, growth),
        short_factors=_factors(key, "short_factor", values),
        long_factors=_factors(key, "long_factor", values),
    )


def _factors(key: str, name: str, values: Mapping[str, Any]) -> tuple[float, ...]:
    given = values[name]
    if not isinstance(given, list):
        raise ValueError(f"model.{key}: {name} is {shown(given)}; give it a list of numbers above 0")
    return tuple(float(number(f"{key}: {name}", factor, above=0)) for factor in given)


def _fraction(key: str, values: Mapping[str, Any], default: float) -> float:
    fraction = _number(key, "partial_rotary_factor", values, default)
    if fraction > 1:
        raise ValueError(f"model.{key}: partial_rotary_factor is {fraction:g}; give it a number up to 1")
    return fraction


def _number(key: str, name: str, values: Mapping[str, Any], default: float) -> float:
    value = values.get(name)
    return default if value is None else float(number(f"{key}: {name}", value, above=0))
