"""How a training run stores numbers: what one parameter, gradient, moment, activation and logit takes.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, §3.1): mixed-precision Adam takes 2 + 2 + 12 bytes per parameter:
parameter and gradient in half precision; master copy, momentum and variance in single.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Bytes of everything that is held.

    Attributes:
        precision: number format of the matrix products, a key of the cluster's peak rates.
        parameter, gradient: bytes of one, as the model computes with it and as it is summed over microbatches.
        reduced_gradient: bytes of one gradient on its way between data ranks.
        optimizer: bytes per parameter of master copy and moments together.
        activation: bytes of one kept feature.
        attention: "fused" keeps no scores (FlashAttention), "plain" keeps them for every pair of tokens.
        gated_copies: intermediate-sized tensors kept of a gated MLP: gate, up and product when one kernel does all
            between the two matrix products, the activated gate besides when not.
        logit: bytes per logit at the worst moment of the loss.
        loss: bytes per logit that the loss reads and writes in its forward; its backward takes half of them.
        hidden_tensor: share of a backward's weight gradients under which its tensor collectives hide.
        overlaps_data: whether the data axis reduces gradients while the last backward still runs.
        scatters: whether ZeRO 1 leaves each data rank only its part of the summed gradients; DeepSpeed sums them whole
            on all.
        joined: whether all stages end a step together, as they must for a norm of the whole gradient; else each begins
            the next step when it has ended its own (the post-validation of Qi et al. 2023, §4).
        workspace: bytes that the libraries of a rank hold whatever it computes.
    """

    precision: str = "bf16"
    parameter: int = 2
    gradient: int = 4
    reduced_gradient: int = 4
    optimizer: int = 12
    activation: int = 2
    attention: Literal["fused", "plain"] = "fused"
    gated_copies: int = 3
    logit: int = 6
    loss: int = 6
    hidden_tensor: float = 0.0
    overlaps_data: bool = True
    scatters: bool = True
    joined: bool = True
    workspace: int = 0

    @property
    def state(self) -> int:
        """Bytes per parameter of everything that outlives a step, unsharded."""
        return self.parameter + self.gradient + self.optimizer


WEFT = Recipe(
    precision="fp32",
    parameter=4,
    gradient=4,
    optimizer=8,
    activation=4,
    gated_copies=4,
    logit=12,
    loss=32,  # eight passes in float32, see parallel/tensor/loss.py
    hidden_tensor=0.5,
    scatters=False,
)
MEGATRON = Recipe()


def recipe_of(precision: str, *, overlaps: bool = True) -> Recipe:
    """How this engine stores numbers when it trains in `precision`; `overlaps`: while it communicates."""
    half = replace(MEGATRON, precision=precision, loss=WEFT.loss + 6, hidden_tensor=0.5, scatters=False)
    recipe = WEFT if precision == "fp32" else half
    return recipe if overlaps else replace(recipe, overlaps_data=False, hidden_tensor=0.0)
