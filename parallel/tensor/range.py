"""Token numbers outside the vocabulary: no rank owns them, so they would pass in silence."""

from torch import Tensor


def check_range(numbers: Tensor, size: int, what: str, *, besides: int | None = None) -> None:
    """Refuse numbers outside 0 … size − 1, other than `besides`; as in torch, on a CPU only: a GPU would have to wait.

    Raises:
        IndexError: names the number and the range.
    """
    if numbers.device.type != "cpu" or not numbers.numel():
        return
    outside = (numbers < 0) | (numbers >= size)
    if besides is not None:
        outside &= numbers != besides
    if outside.any():
        raise IndexError(f"{what} {int(numbers[outside][0])} is outside the vocabulary 0 … {size - 1}")
