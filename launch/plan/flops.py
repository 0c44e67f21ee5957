"""Arithmetic of a training step, by the field's three counts; each MFU says which of them it is by.

A multiplication and an addition are two operations; a backward costs two forwards.
"""

from weft.launch.plan.layout import Recompute
from weft.launch.plan.shape import ModelShape


def matrix_parameters(shape: ModelShape, layer: int) -> int:
    """Parameters of a block that each token is multiplied by: of a mixture, those of the experts it passes."""
    if not shape.has_experts(layer):
        return shape.attention_matrices + shape.mlp_matrices(shape.intermediate)
    assert shape.experts is not None
    experts = shape.experts
    passed = experts.per_token * experts.intermediate + experts.shared_intermediate
    return shape.attention_matrices + shape.mlp_matrices(passed) + experts.count * shape.hidden


def attention_forward(shape: ModelShape, sequence: int, *, causal: bool = False) -> float:
    """FLOPs of the scores and the weighted sum of one block, per token; `causal` counts the pairs that attend only."""
    width = float(shape.query_features)
    if shape.latent is not None:
        width += shape.heads * shape.latent.rotary_dim / 2
    return 4.0 * sequence * width * (0.5 if causal else 1.0)


def model_flops(shape: ModelShape, sequence: int, *, causal: bool = False) -> float:
    """FLOPs per token of forward and backward that the model itself needs; attention in full unless `causal`.

    Korthikanti et al. 2022 (arXiv:2205.05198), eq. 7: 72·B·L·s·h²·(1 + s/6h + v/12hL) per step.
    """
    blocks = sum(
        2 * matrix_parameters(shape, layer) + attention_forward(shape, sequence, causal=causal)
        for layer in range(shape.layers)
    )
    return 3.0 * (blocks + 2 * shape.vocab * shape.hidden)


def hardware_flops(shape: ModelShape, sequence: int, recompute: Recompute) -> float:
    """FLOPs per token with what is computed a second time.

    Full recompute repeats every block's forward (Narayanan et al. 2021, arXiv:2104.04473, eq. 3: 96·B·s·l·h²·(1 + s/6h
    + V/16lh)). Selective counts attention's core twice in forward and backward, as Korthikanti et al. 2022, eq. 8, do:
    72·B·L·s·h²·(1 + s/3h + v/12hL).
    """
    core = shape.layers * attention_forward(shape, sequence)
    products = float(sum(2 * matrix_parameters(shape, layer) for layer in range(shape.layers)))
    again = {"none": 0.0, "selective": 3 * core, "full": core + products}[recompute]
    return model_flops(shape, sequence) + again


def palm_flops(shape: ModelShape, sequence: int) -> float:
    """FLOPs per token as PaLM counts them: 6·N + 12·L·H·Q·T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    N: all parameters, those of the embedding too, unless it is the head's table.
    """
    outside = 0 if shape.experts is None else _experts_not_passed(shape)
    parameters = shape.parameters - outside
    return 6.0 * parameters + 12.0 * shape.layers * shape.query_features * sequence


def _experts_not_passed(shape: ModelShape) -> int:
    assert shape.experts is not None
    idle = shape.experts.count - shape.experts.per_token
    layers = sum(map(shape.has_experts, range(shape.layers)))
    return layers * idle * shape.mlp_parameters(shape.experts.intermediate)
