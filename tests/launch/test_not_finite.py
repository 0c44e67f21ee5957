"""Numbers that are not finite, and copies that differ, are traced to the rank and the module or parameter."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from weft.launch.engine import Engine, StepOutcome
from weft.launch.errors import FinalError, RunError
from weft.launch.not_finite import Guard
from weft.launch.replicas import check_replicas
from weft.launch.settings import Settings, build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh

MODEL = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}


def settings(layout: dict[str, int], train: dict[str, Any]) -> Settings:
    return build_settings(
        {
            "name": "t",
            "model": MODEL,
            "parallel": layout,
            "batch": {"global_size": 8, "micro_size": 2},
            "train": {"schedule": {"warmup_steps": 0}} | train,
            "corpus": {"sequence_length": 8},
        }
    )


def batch(engine: Engine) -> torch.Tensor:
    rows = torch.randint(0, 40, (8, 8), generator=torch.Generator().manual_seed(1))
    return rows.chunk(engine.data.size())[engine.data.get_local_rank()]


def make(layout: dict[str, int], train: dict[str, Any] | None = None) -> Engine:
    given = settings(layout, train or {})
    return Engine(model_config(MODEL), given, build_mesh(**layout))


def weights(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.parameters]


def spoil(engine: Engine, rank: int, name: str) -> None:
    """Make one entry of a parameter of a rank infinite."""
    if dist.get_rank() == rank:
        with torch.no_grad():
            engine.modules[0].get_parameter(name).view(-1)[3] = float("inf")


def meet(engine: Engine, outcome: StepOutcome, said: list[str]) -> StepOutcome | str:
    guard = Guard(engine, engine.settings.train, said.append)
    try:
        return guard.retry(outcome, lambda: engine.step(0, batch(engine), batch(engine)))
    except FinalError as error:
        return str(error)


def broken_weight(layout: dict[str, int], rank: int, name: str, not_finite: str) -> tuple[str, bool]:
    """What is said of a parameter that is not finite, and whether the others stay as they are."""
    engine = make(layout, {"not_finite": not_finite})
    spoil(engine, rank, name)
    before = weights(engine)
    outcome = engine.step(0, batch(engine), batch(engine))
    assert not outcome.finite
    said: list[str] = []
    found = meet(engine, outcome, said)
    kept = all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    return (found if isinstance(found, str) else said[0]), kept


@pytest.mark.parametrize("not_finite", ["stop", "skip"])
def test_a_lasting_fault_is_named_by_rank_module_and_parameter(pool: Pool, not_finite: str) -> None:
    layout = {"pipeline": 2, "tensor": 2}  # ranks 2 and 3 hold the second stage
    results = pool.run(4, broken_weight, layout, 3, "layers.2.mlp.down_proj.weight", not_finite)
    sentences = {said for said, _ in results}
    assert len(sentences) == 1, sentences
    (sentence,) = sentences
    assert "first on rank 3, in the output of layers.2.mlp.down_proj (stage 1, microbatch 0)" in sentence
    assert "whose weight is not finite" in sentence
    assert "the same batch once more gives the same" in sentence
    assert ("train.not_finite=skip" in sentence) == (not_finite == "stop")
    assert all(kept for _, kept in results)


def passing_fault(layout: dict[str, int], rank: int) -> tuple[str, bool]:
    """What is said of a number that is not finite once, and whether the step is then as it would have been."""
    undisturbed = make(layout)
    undisturbed.step(0, batch(undisturbed), batch(undisturbed))
    engine = make(layout)
    handle = None
    if dist.get_rank() == rank:
        handle = engine.modules[0].register_forward_hook(lambda module, given, output: output * float("nan"))
    outcome = engine.step(0, batch(engine), batch(engine))
    if handle is not None:
        handle.remove()
    said: list[str] = []
    found = meet(engine, outcome, said)
    assert isinstance(found, StepOutcome)
    assert found.finite
    equal = all(torch.equal(a, b) for a, b in zip(weights(undisturbed), weights(engine), strict=True))
    return said[0], equal


def test_a_passing_fault_is_laid_to_the_hardware_and_the_step_is_made_good(pool: Pool) -> None:
    results = pool.run(4, passing_fault, {"pipeline": 2, "data": 2}, 1)  # ranks 1 and 3 are the second replica
    for said, equal in results:
        assert "is not finite (microbatch 0 of the replica of ranks 1, 3)" in said
        assert "a fault of the hardware, not of the data" in said
        assert equal


def broken_copy(layout: dict[str, int], rank: int, name: str) -> str:
    engine = make(layout)
    check_replicas(engine)  # all is well
    if dist.get_rank() == rank:
        with torch.no_grad():
            bits = engine.modules[0].get_parameter(name).view(torch.int32).view(-1)
            bits[5] ^= 1 << 7
    try:
        check_replicas(engine)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("ranks", "layout", "rank", "name", "words"),
    [
        (3, {"data": 3}, 2, "layers.0.mlp.down_proj.weight", "on rank 2 is no longer what it is on the others"),
        (
            4,
            {"pipeline": 2, "data": 2},
            3,
            "layers.2.mlp.down_proj.weight",
            "(stage 1) is no longer the same on ranks 2, 3",
        ),
        (
            2,
            {"tensor": 2},
            1,
            "layers.1.post_attention_layernorm.weight",
            "layers.1.post_attention_layernorm.weight (stage 0) is no longer the same on ranks 0, 1",
        ),
    ],
    ids=["data 3", "pipeline 2 × data 2", "tensor 2"],
)
def test_one_flipped_bit_in_one_copy_is_found_and_named(
    pool: Pool, ranks: int, layout: dict[str, int], rank: int, name: str, words: str
) -> None:
    sentences = set(pool.run(ranks, broken_copy, layout, rank, name))
    assert len(sentences) == 1
    assert words in sentences.pop()
