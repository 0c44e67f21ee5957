"""Learning rates against torch's own schedulers; which parameter is in which group."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from weft.launch.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from weft.launch.patience import Patience
from weft.launch.sections import LearningRateSettings, OptimizerSettings, TrainSettings
from weft.parallel.data.loss_scale import LossScale

STEPS, WARMUP, PEAK, LEAST = 50, 9, 2e-3, 1e-4


def rates(decay: str, **schedule: Any) -> list[float]:
    settings = TrainSettings(
        steps=STEPS,
        optimizer=OptimizerSettings(learning_rate=PEAK),
        schedule=LearningRateSettings(warmup_steps=WARMUP, decay=decay, minimum_learning_rate=LEAST, **schedule),
    )
    return [learning_rate(step, settings) for step in range(STEPS)]


def rates_of_torch(decay: Any) -> list[float]:
    """What torch's schedulers make of a warm-up followed by `decay(optimizer)`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    warm: LRScheduler = LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1)
    scheduler = SequentialLR(optimizer, [warm, decay(optimizer)], [WARMUP])
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


LEFT = STEPS - WARMUP - 1


@pytest.mark.parametrize(
    ("decay", "reference"),
    [
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, LEFT, LEAST)),
        ("linear", lambda optimizer: LinearLR(optimizer, 1.0, LEAST / PEAK, LEFT)),
        ("constant", lambda optimizer: LinearLR(optimizer, 1.0, 1.0, LEFT)),
    ],
)
def test_rates_are_those_of_torch(decay: str, reference: Any) -> None:
    assert rates(decay) == pytest.approx(rates_of_torch(reference), rel=1e-9)


def test_wsd_is_constant_and_then_linear() -> None:
    share = 0.25
    found = rates("wsd", decay_share=share)
    stable = WARMUP + int(LEFT * (1 - share))
    assert set(found[WARMUP : stable + 1]) == {PEAK}
    fallen = [before - after for before, after in zip(found[stable + 1 :], found[stable + 2 :], strict=False)]
    assert fallen == pytest.approx([fallen[0]] * len(fallen))
    assert found[-1] == pytest.approx(LEAST)


def factors_and_decays(**settings: Any) -> dict[str, tuple[float, float]]:
    """By the name of each parameter of a model of two layers: the factor of its rate and its weight decay."""
    shapes = {
        "embed_tokens.weight": (4, 2),
        "layers.0.mlp.up_proj.weight": (2, 2),
        "layers.0.mlp.up_proj.bias": (2,),
        "layers.1.input_layernorm.weight": (2,),
        "norm.weight": (2,),
        "lm_head.weight": (4, 2),
    }
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    groups = parameter_groups(named.items(), OptimizerSettings(weight_decay=0.1, **settings), layers=2)
    names = {id(parameter): name for name, parameter in named.items()}
    found = {
        names[id(parameter)]: (group["learning_rate_factor"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == named.keys()
    assert sum(len(group["params"]) for group in groups) == len(named)
    return found


def test_matrices_decay_and_vectors_do_not() -> None:
    assert {name: decay for name, (_, decay) in factors_and_decays().items()} == {
        "embed_tokens.weight": 0.1,
        "layers.0.mlp.up_proj.weight": 0.1,
        "layers.0.mlp.up_proj.bias": 0.0,
        "layers.1.input_layernorm.weight": 0.0,
        "norm.weight": 0.0,
        "lm_head.weight": 0.1,
    }


def test_the_first_rule_that_matches_counts() -> None:
    found = factors_and_decays(
        groups=[
            {"match": "embed_*", "weight_decay": 0.0},
            {"match": "layers.0.*", "learning_rate_factor": 0.5},
            {"match": "*.weight", "learning_rate_factor": 2.0, "weight_decay": 0.3},
        ]
    )
    assert found["embed_tokens.weight"] == (1.0, 0.0)
    assert found["layers.0.mlp.up_proj.weight"] == (0.5, 0.1)
    assert found["layers.0.mlp.up_proj.bias"] == (0.5, 0.0)
    assert found["norm.weight"] == (2.0, 0.3)


def test_layers_nearer_to_the_tokens_learn_more_slowly() -> None:
    factors = {name: factor for name, (factor, _) in factors_and_decays(layer_decay=0.5).items()}
    assert factors == {
        "embed_tokens.weight": 0.125,
        "layers.0.mlp.up_proj.weight": 0.25,
        "layers.0.mlp.up_proj.bias": 0.25,
        "layers.1.input_layernorm.weight": 0.5,
        "norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }


def test_groups_keep_their_factor_of_every_rate() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    settings = OptimizerSettings(name="sgd", layer_decay=0.5, weight_decay=0.0, momentum=0.0)
    optimizer = build_optimizer(parameter_groups([("layers.0.weight", weight)], settings, layers=1), settings)
    set_learning_rate(optimizer, 0.1)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 1 - 0.05))


def test_training_ends_when_the_held_out_loss_has_not_fallen_for_so_long() -> None:
    losses = [3.0, 2.0, 2.5, 1.5, 1.6, float("nan"), 1.5, 1.0]
    for limit, end in {0: None, 1: 2, 2: 5, 3: 6, 4: None}.items():
        patience = Patience(limit)
        ended = [patience.ends(loss) for loss in losses]
        assert (ended.index(True) if True in ended else None) == end


@pytest.mark.parametrize("overflows", [[], [0], [1, 2, 7]])
def test_loss_scale_halves_at_an_overflow_and_doubles_after_patience(overflows: list[int]) -> None:
    scale = LossScale(scale=8.0, patience=3)
    expected, good = 8.0, 0
    for step in range(10):
        scale.update(overflow=step in overflows)
        good = 0 if step in overflows else good + 1
        expected = expected / 2 if step in overflows else expected * 2 if good % 3 == 0 else expected
        assert scale.scale == expected
