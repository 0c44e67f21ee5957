"""The optimiser, its parameter groups, and the learning rate of each step."""

from collections.abc import Iterable
from math import cos, pi

import torch
from torch import nn

from weft.launch.sections import OptimizerSettings, TrainSettings


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices only, not on biases and norms."""
    trained = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = not any(p.is_meta for p in trained)  # which torch has everywhere but on the meta device
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=fused,
        foreach=False,
    )


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of the step numbered from 0: linear warm-up, then half a cosine from the peak to the minimum."""
    peak, schedule = settings.optimizer.learning_rate, settings.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    left = max(1, settings.steps - schedule.warmup_steps - 1)
    progress = min(1.0, (step - schedule.warmup_steps) / left)
    return schedule.minimum_learning_rate + (peak - schedule.minimum_learning_rate) * (1 + cos(pi * progress)) / 2
