"""The optimiser, its parameter groups, and the learning rate of each step."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import cos, pi
from re import match

import torch
from torch import Tensor, nn

from weft.launch.sections import OptimizerSettings, TrainSettings
from weft.parallel.data.muon import Muon
from weft.parallel.data.replicas import ParameterGroup
from weft.parallel.sharding import Sharding


def build_optimizer(
    groups: Sequence[ParameterGroup], settings: OptimizerSettings, shardings: Mapping[Tensor, Sharding] | None = None
) -> torch.optim.Optimizer:
    """torch's own: AdamW (Loshchilov and Hutter 2019), SGD with momentum, Adafactor (Shazeer and Stern 2018), or Muon.

    `shardings`: of the parameters that are split over the tensor axis, for Muon (Jordan et al. 2024).
    """
    # One kernel for all parameters, which torch has everywhere but on the meta device.
    fused = not any(parameter.is_meta for group in groups for parameter in group["params"])
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused, foreach=False)
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, fused=fused, foreach=False
        )
    if settings.name == "muon":
        return Muon(
            groups,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            betas=settings.betas,
            fused=fused,
            shardings=shardings,
        )
    return torch.optim.Adafactor(groups, lr=settings.learning_rate)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, *, layers: int = 0
) -> list[ParameterGroup]:
    """The trained parameters by weight decay and factor of the learning rate, `learning_rate_factor`.

    Without a rule for it, weight decay is on matrices only, not on biases and norms. `named`: each parameter by its
    name in the whole model, which has so many `layers`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decay, factor = settings.weight_decay if parameter.dim() >= 2 else 0.0, 1.0
        for rule in settings.groups:
            if fnmatchcase(name, rule.match):
                decay = decay if rule.weight_decay is None else rule.weight_decay
                factor = rule.learning_rate_factor
                break
        factor *= settings.layer_decay ** (layers + 1 - depth(name, layers))
        orthogonal = settings.name == "muon" and in_block(name) and parameter.dim() == 2
        groups.setdefault((decay, factor, orthogonal), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "learning_rate_factor": factor, "orthogonal": orthogonal}
        for (decay, factor, orthogonal), parameters in groups.items()
    ]


def in_block(name: str) -> bool:
    """Whether a parameter belongs to one of the blocks: it is neither of the embeddings nor of the head."""
    return match(r"(?:layers|encoder|decoder)\.\d+\.", name) is not None


def depth(name: str, layers: int) -> int:
    """How far from the tokens a parameter is in its stack: 0 for embeddings, `layers` + 1 for final norm and head."""
    layer = match(r"(?:layers|encoder|decoder)\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if name.startswith("embed_") else layers + 1


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of the step numbered from 0: linear warm-up to the peak, then the decay to the minimum."""
    peak, schedule = settings.optimizer.learning_rate, settings.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    left = max(1, settings.steps - schedule.warmup_steps - 1)
    progress = min(1.0, (step - schedule.warmup_steps) / left)
    if schedule.decay == "cosine":
        share = (1 + cos(pi * progress)) / 2
    elif schedule.decay == "linear":
        share = 1 - progress
    elif schedule.decay == "wsd":  # Hu et al. 2024, §4; the decay linear, as in Hägele et al. 2024
        share = min(1.0, (1 - progress) / schedule.decay_share)
    else:
        return peak
    return schedule.minimum_learning_rate + (peak - schedule.minimum_learning_rate) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its factor of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]
