"""What the keys of a config take: each value is held against it before anything is computed from it."""

from collections.abc import Mapping
from typing import Any

_LARGEST = 10**9  # so that products of two numbers fit 64 bits
_MOST_LAYERS = 100_000
_LARGEST_NUMBER = 1e30


def checked(key: str, value: Any, kind: Any, *, least: int = 1) -> Any:
    """The value, of the kind `bool`, `int`, `float` or `str`; a `str` is a word, and others are let through.

    Raises:
        ValueError: names the key, the value and what to give.
    """
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"model.{key} is {shown(value)}; choose true or false")
    if kind is int:
        return whole(key, value, least=least)
    if kind is float:
        return number(key, value)
    if kind is str and not isinstance(value, str):
        raise ValueError(f"model.{key} is {shown(value)}; give it a word")
    return value


def whole(key: str, value: Any, *, least: int = 1, most: int = _LARGEST) -> int:
    """The value, a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"model.{key} is {shown(value)}; give it a whole number of at least {least}")
    if value > most:
        raise ValueError(f"model.{key} is {shown(value)}; give it a whole number of at most {most}")
    return value


def layers(key: str, value: Any) -> int:
    """The value, a number of layers."""
    return whole(key, value, most=_MOST_LAYERS)


def number(key: str, value: Any, *, above: float | None = None) -> float:
    """The value, a finite number of at least 0, or above `above`."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 <= value <= _LARGEST_NUMBER or (above is not None and value <= above):
        bound = "of at least 0" if above is None else f"above {above:g}"
        raise ValueError(f"model.{key} is {shown(value)}; give it a number {bound}")
    return value  # type: ignore[no-any-return]


def mapping(key: str, value: Any, keys: str) -> Mapping[str, Any]:
    """The value, a mapping with the keys that `keys` names in words."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"model.{key} is {shown(value)}; give it a mapping with the keys {keys}")
    return value


def shown(value: Any) -> str:
    """The value as a sentence can hold it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits has no decimal form
        text = "a number of thousands of digits"
    return shortened(text)


def shortened(text: str) -> str:
    """The text, its end left out if it has more than 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}…"
