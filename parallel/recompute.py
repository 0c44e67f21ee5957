"""Activations computed again in the backward instead of kept (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`, of which only the arguments are kept for the backward.

    The function must depend on its arguments alone: the state of torch's random generators is not put back, which
    weft's own dropout does not need. Its communication is repeated in the backward, in the same order on all ranks.
    """
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return result
