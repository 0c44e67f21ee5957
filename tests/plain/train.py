"""Training in one process, with torch only: the losses, gradient norms and weights that every layout must reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.plain.gpt2 import GPT2
from tests.plain.llama import Llama

Batch = tuple[Tensor, Tensor]


@dataclass
class PlainRun:
    """What `train_plain` saw: one entry a step, and the weights by name after the last."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of the layers, with its AdamW for the rest, of which only other matrices decay."""

    def __init__(self, model: nn.Module, betas: tuple[float, float], weight_decay: float) -> None:
        named = dict(model.named_parameters())
        hidden = [p for name, p in named.items() if p.dim() == 2 and name.startswith("layers.")]
        tables = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("layers.")]
        vectors = [{"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": tables, "weight_decay": weight_decay}, *vectors], betas=betas),
        ]
        super().__init__(list(named.values()), {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def build_plain(config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The model that `config` describes, in torch's default dtype or in that of the `weights` given."""
    model: nn.Module = {"llama": Llama, "gpt2": GPT2}[config["model_type"]](config)
    if weights is not None:
        model.to(next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
    return model


def train_plain(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    clip_grad_norm: float = 1.0,
    ignore_index: int = -100,
    optimizer_name: str = "adamw",
) -> PlainRun:
    """Take one step on each (tokens, targets), both `[batch, sequence]`; matrices decay, vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=betas),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adafactor": lambda: torch.optim.Adafactor(groups),
        "muon": lambda: MuonAndAdamW(model, betas, weight_decay),
    }[optimizer_name]()
    run = PlainRun()
    for (tokens, targets), learning_rate in zip(batches, learning_rates, strict=True):
        optimizer.zero_grad()
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        run.losses.append(loss.item())
        run.gradient_norms.append(norm.item())
    run.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return run
