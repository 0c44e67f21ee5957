"""Messages as planned against those that the engine counts while it runs: the same calls and bytes, to the byte."""

from math import prod
from typing import Any

import pytest

from tests.launch.plan.shapes import gpt
from weft.launch.dry_run import dry_run
from weft.launch.plan.ask import layout_as_set
from weft.launch.plan.candidates import Space
from weft.launch.plan.cluster import Link, load_cluster
from weft.launch.plan.exchanges import planned_exchanges
from weft.launch.plan.layout import Job, Layout, equal_shares
from weft.launch.plan.recipe import recipe_of
from weft.launch.plan.shape import shape_of
from weft.launch.plan.step import step_time
from weft.launch.settings import Settings, build_settings, resolved
from weft.model.config import model_config
from weft.model.split import split_layers
from weft.parallel import AXES

LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8}
FEW_KEYS = LLAMA | {"num_key_value_heads": 2}
TIED = LLAMA | {"tie_word_embeddings": True}
GPT2: dict[str, Any] = {"model_type": "gpt2"}
GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "num_key_value_heads": 4, "head_dim": 8}
NO_SEQUENCE = {"sequence_parallel": False}
TENSOR_ALONE = {"tensor", "recompute", "sequence_parallel"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor of eight": (LLAMA, {"tensor": 8}),
    "tensor of eight without sequence parallelism": (FEW_KEYS, {"tensor": 8} | NO_SEQUENCE),
    "keys on several ranks, recomputed": (FEW_KEYS, {"tensor": 4, "recompute": "full"}),
    "learned positions, tied": (GPT2, {"tensor": 8}),
    "learned positions and pipeline": (GPT2, {"tensor": 2, "pipeline": 2} | NO_SEQUENCE),
    "tied over two stages": (TIED, {"tensor": 8, "pipeline": 2}),
    "all axes, tied": (TIED, {"tensor": 2, "pipeline": 2, "data": 2}),
    "all axes, untied, bf16": (LLAMA, {"tensor": 2, "pipeline": 2, "data": 8}),
    "interleaved": (LLAMA, {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2, "data": 2}),
    "zb-v, tied": (TIED, {"pipeline": 2, "tensor": 2, "schedule": "zb-v"}),
    "zb-h1, selective": (LLAMA, {"pipeline": 4, "tensor": 2, "schedule": "zb-h1", "recompute": "selective"}),
    "more norms": (GEMMA, {"tensor": 8}),
}


def settings_of(name: str) -> Settings:
    model, parallel = LAYOUTS[name]
    sizes = {"vocab_size": 104, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    values = {
        "name": "messages",
        "model": model | sizes | {"num_attention_heads": 8, "max_position_embeddings": 16},
        "parallel": {"data": 1} | parallel,
        "batch": {"global_size": 8, "micro_size": 1},
        "corpus": {"sequence_length": 16},
        "train": {"precision": "bf16" if "bf16" in name else "fp32"},
        "cluster": {"device": "cpu"},
    }
    ranks = prod(size for axis, size in parallel.items() if axis in AXES)
    return resolved(build_settings(values), ranks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_messages_are_those_that_the_engine_counts(name: str) -> None:
    settings = settings_of(name)
    config, job = model_config(settings.model), Job(8, 16)
    ranks = prod(getattr(settings.parallel, axis) for axis in AXES)
    shape, recipe = shape_of(config), recipe_of(settings.train.precision)

    def split(stages: int) -> tuple[int, ...]:
        return tuple(map(len, split_layers(config, stages, None, job.sequence)))

    layout = layout_as_set(settings, Space(shape, job, recipe, ranks, ranks, split))
    assert layout is not None
    for rank in {0, layout.pipeline - 1}:
        counted = dry_run(settings, ranks, rank * ranks // layout.pipeline).exchanges
        planned = planned_exchanges(shape, job, layout, recipe, rank, on_cpu=True)
        assert {(p.axis, p.operation): (p.calls, p.bytes) for p in planned} == {
            (c.axis, c.operation): (c.calls, c.bytes) for c in counted
        }


@pytest.mark.parametrize("name", [name for name in LAYOUTS if set(LAYOUTS[name][1]) <= TENSOR_ALONE])
def test_time_is_planned_for_each_collective_of_a_microbatch(name: str) -> None:
    """On devices that do not compute meanwhile, where a collective takes a second and all else next to nothing."""
    settings = settings_of(name)
    job, recipe = Job(8, 16), recipe_of("fp32", overlaps=False)
    ranks = settings.parallel.tensor
    shape = shape_of(model_config(settings.model))
    space = Space(shape, job, recipe, ranks, ranks, lambda stages: equal_shares(shape.layers, stages))
    layout = layout_as_set(settings, space)
    assert layout is not None
    free = Link(bandwidth=1e12, efficiency=1.0, latency=0.0)
    cluster = load_cluster("cpu").model_copy(
        update={"node": free, "network": free, "collective_latency": 1e6, "devices_per_node": ranks}
    )
    calls = sum(planned.calls for planned in planned_exchanges(shape, job, layout, recipe))
    of_microbatches = calls - calls % 8  # what is left is told once a step, fewer than the microbatches
    assert step_time(shape, job, layout, recipe, cluster).tensor == pytest.approx(of_microbatches, abs=0.01)


def test_gemma_has_all_its_norms() -> None:
    config = model_config(settings_of("more norms").model)
    assert shape_of(config).parameters == config.parameters
    assert shape_of(config).block_norms == 4


def test_what_is_not_planned_is_said() -> None:
    for layout in (Layout(context=2), Layout(data=2, zero=1)):
        with pytest.raises(ValueError, match="not planned"):
            planned_exchanges(gpt(4, 64, 8), Job(8, 16), layout, recipe_of("fp32"))


def test_collectives_of_large_groups_are_not_taken_apart() -> None:
    layout = Layout(tensor=8, layers_of_stages=equal_shares(4, 1))
    shape, job = gpt(4, 64, 8), Job(8, 16)
    on_gpu, on_cpu = (planned_exchanges(shape, job, layout, recipe_of("fp32"), on_cpu=cpu) for cpu in (False, True))
    assert on_gpu == on_cpu
    small = Layout(tensor=4)
    assert {one.operation for one in planned_exchanges(shape, job, small, recipe_of("fp32"))} == {
        "all_gather", "all_reduce", "reduce_scatter"
    }  # fmt: skip
