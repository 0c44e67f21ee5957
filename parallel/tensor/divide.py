"""Which sizes tensor ranks can share; imports no torch, so that settings are checked before any process starts."""

from collections.abc import Sequence


def check_features(name: str, size: int, ranks: int) -> None:
    """Refuse a number of features that `ranks` tensor ranks cannot share equally.

    Raises:
        ValueError: names the number, the rule and the choices.
    """
    if size % ranks:
        choices = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
        raise ValueError(f"{name} {size} does not divide over tensor {ranks}; choose {listed(choices)}")


def check_heads(num_heads: int, num_kv_heads: int, ranks: int) -> None:
    """Refuse head counts that `ranks` tensor ranks cannot share.

    Raises:
        ValueError: names the number, the rule and the choices.
    """
    fitting = [n for n in range(1, num_heads + 1) if not num_heads % n and not (num_kv_heads % n and n % num_kv_heads)]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} attention heads do not divide over {num_kv_heads} key-value heads; change one")
    if ranks in fitting:
        return
    what = f"{num_heads} attention heads" if num_heads % ranks else f"{num_kv_heads} key-value heads"
    raise ValueError(f"{what} do not divide over tensor {ranks}; choose {listed(fitting)}")


def listed(choices: Sequence[int]) -> str:
    """`1, 2, 3 or 6`."""
    *head, last = map(str, choices)
    return f"{', '.join(head)} or {last}" if head else last
