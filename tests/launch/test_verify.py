"""`weft verify` finds every kind of broken layer, names the place and the cause, and finds nothing in right models."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.launch import broken_engines
from tests.launch.broken_layers import LAYERS, ROWS, SEQUENCE
from weft.launch.settings import build_settings
from weft.launch.verify.causes import Kind
from weft.launch.verify.config_model import ConfigModel, shrunk
from weft.launch.verify.find_model import find_model
from weft.launch.verify.layout import Choice
from weft.launch.verify.measure import QUANTITIES
from weft.launch.verify.pool import Pool
from weft.launch.verify.session import Result, verify

BROKEN = f"layers.{LAYERS - 1}"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with Pool(2, timeout=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Pool]:
    with Pool(4, timeout=60) as pool:
        yield pool


def verify_own(pool: Pool, model: str, *layouts: str) -> list[Result]:
    subject = find_model(f"tests.launch.{model}", steps=2, rows=ROWS, sequence=SEQUENCE)
    return verify(subject, pool, Choice(layouts)).results


def causes(results: list[Result]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.where) for result in results for finding in result.findings]


@pytest.mark.parametrize(
    ("model", "kind", "where"),
    [
        ("shard_replicated", Kind.SHARD_REPLICATED, f"{BROKEN}.mlp.up.weight"),
        ("seed_shared", Kind.SEED_SHARED, f"{BROKEN}.mlp.down.weight"),
        ("own_draws", Kind.INITIAL, f"{BROKEN}.mlp.up.weight"),
        ("chunks", Kind.CHUNKS, f"{BROKEN}.attention.out"),
        ("sum_missing", Kind.SUM_MISSING, f"{BROKEN}.mlp.down"),
        ("summed_twice", Kind.SUM_REPEATED, f"{BROKEN}.mlp.down"),
        ("averaged", Kind.AVERAGED, f"{BROKEN}.mlp.down"),
        ("bias_repeated", Kind.BIAS_REPEATED, f"{BROKEN}.mlp.down"),
        ("gathered_logits", Kind.GATHERED_LOGITS, ""),
        ("gradient_sum_missing", Kind.GRADIENT_SUM_MISSING, f"{BROKEN}.mlp.up"),
        ("gradient_summed_twice", Kind.GRADIENT_SUM_REPEATED, f"{BROKEN}.mlp.down"),
        ("replicated_gradient", Kind.REPLICATED_GRADIENT, f"{BROKEN}.mlp.up.scale"),
        ("undeclared", Kind.NORM_NEVER, f"{BROKEN}.mlp.up.weight"),
    ],
)
def test_a_broken_layer_is_found_and_named(ranks: Pool, model: str, kind: Kind, where: str) -> None:
    results = verify_own(ranks, f"broken_layers:build_{model}", "tensor=2")
    assert causes(results) == [(kind, where)]
    assert [result.verdict for result in results] == ["wrong"]


def test_the_weight_that_is_cut_wrongly_is_named(ranks: Pool) -> None:
    (result,) = verify_own(ranks, "broken_layers:build_chunks", "tensor=2")
    assert result.findings[0].detail == f"{BROKEN}.attention.qkv.weight is right when cut as 16 + 16 + 16."


def test_a_loss_summed_over_rows_is_scaled_under_data_parallelism(ranks: Pool) -> None:
    tensor, data = verify_own(ranks, "broken_layers:build_summed_loss")
    assert tensor.verdict == "right"
    assert causes([data]) == [(Kind.LOSS_SCALED, "")]


def test_a_loss_and_a_norm_that_each_rank_counts_by_itself(ranks: Pool) -> None:
    tensor, data = verify_own(ranks, "broken_training:build")
    assert causes([tensor]) == [(Kind.NORM_TWICE, "")]
    assert causes([data]) == [(Kind.LOSS_PER_RANK, "")]


@pytest.mark.parametrize("model", ["right", "scaled_right", "inner_linear"])
def test_a_right_model_is_right_in_every_layout(four_ranks: Pool, model: str) -> None:
    results = verify_own(four_ranks, f"broken_layers:build_{model}")
    assert {str(result.layout): result.verdict for result in results} == dict.fromkeys(
        ["tensor 2", "tensor 4", "data 2", "data 4", "data 2 × tensor 2"], "right"
    )


def test_a_sum_is_missed_among_four_ranks_too(four_ranks: Pool) -> None:
    results = verify_own(four_ranks, "broken_layers:build_bias_repeated", "tensor=4", "tensor=2,data=2")
    assert causes(results) == [(Kind.BIAS_REPEATED, f"{BROKEN}.mlp.down")] * 2


def test_a_rank_that_fails_or_leaves_the_others_waiting(ranks: Pool) -> None:
    (failed,) = verify_own(ranks, "broken_layers:build_failing", "tensor=2")
    assert failed.verdict == "failed"
    assert failed.message.startswith("Rank 1: RuntimeError: the layer has a hole (")
    alone, right = verify_own(ranks, "broken_layers:build_hanging")
    assert (alone.verdict, right.verdict) == ("failed", "right")  # the next layout runs on processes that were replaced
    assert "do all ranks call the same collectives in the same order?" in alone.message


def test_layouts_that_the_model_refuses_are_skipped(ranks: Pool) -> None:
    subject = find_model("tests.launch.broken_layers:build_seven_heads", steps=1, rows=ROWS, sequence=SEQUENCE)
    report = verify(subject, ranks, Choice([]))
    assert [(skipped.layout, skipped.reason) for skipped in report.skipped] == [
        ("tensor 2", "7 heads do not divide over tensor 2; choose 1 or 7")
    ]
    assert [str(result.layout) for result in report.results] == ["data 2"]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_stages_of_the_users_own_are_run_by_the_schedules(ranks: Pool, schedule: str) -> None:
    (result,) = verify_own(ranks, "staged_model:build", f"pipeline=2,schedule={schedule}")
    assert result.verdict == "right"
    assert result.readings["float64"]["gradient"].error < 1e-14


def test_the_wrong_layer_of_a_stage_is_found(ranks: Pool) -> None:
    (result,) = verify_own(ranks, "broken_stages:build", "pipeline=2,schedule=1f1b")
    assert (result.findings[0].where, result.findings[0].value) == ("layers.3", "output (forward)")


def test_a_model_that_computes_in_float32_is_held_to_that(ranks: Pool) -> None:
    subject = find_model("tests.launch.broken_layers:build_float32_inside", steps=2, rows=ROWS, sequence=SEQUENCE)
    report = verify(subject, ranks, Choice([]))
    assert report.computed_in == "float32"
    assert {result.verdict for result in report.results} == {"right"}
    assert max(result.readings["float64"]["gradient"].error for result in report.results) > 1e-10


def engine_subject(kind: type[ConfigModel], **parallel: Any) -> ConfigModel:
    settings = build_settings(
        {
            "name": "tiny",
            "model": {
                "model_type": "llama",
                "vocab_size": 61,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "max_position_embeddings": 16,
                "tie_word_embeddings": True,
            },
            "batch": {"global_size": 8, "micro_size": 2},
            "corpus": {"sequence_length": 16},
        }
    )
    return kind(settings, shrunk(settings, sequence=8, processes=2), steps=2)


@pytest.mark.parametrize(
    ("engine", "layout", "kind", "where"),
    [
        (broken_engines.ForgetsData, "data=2,zero=0", Kind.DATA_GRADIENT, "embed_tokens.weight"),
        (broken_engines.ForgetsTied, "pipeline=2,schedule=1f1b", Kind.TIED_GRADIENT, "embed_tokens.weight"),
        (
            broken_engines.ForgetsPartial,
            "tensor=2,sequence_parallel=true",
            Kind.REPLICATED_GRADIENT,
            "layers.0.input_layernorm.weight",
        ),
    ],
)
def test_a_broken_engine_is_found_and_named(
    ranks: Pool, engine: type[ConfigModel], layout: str, kind: Kind, where: str
) -> None:
    results = verify(engine_subject(engine), ranks, Choice([layout])).results
    assert causes(results) == [(kind, where)]


@pytest.mark.parametrize("zero", ["zero=1", "zero=2", "zero=3,zero_engine=fsdp2", "zero=3,zero_engine=deepspeed"])
def test_what_is_broken_under_zero_alone_is_found(ranks: Pool, zero: str) -> None:
    if "fsdp2" not in zero:
        pytest.importorskip("deepspeed")
    choice = Choice([f"data=2,tensor=1,{zero}"])
    (lost,) = verify(engine_subject(broken_engines.LosesRange), ranks, choice).results
    assert (lost.findings[0].kind, lost.findings[0].value) == (Kind.DIVISION, "gradient")
    (half,) = verify(engine_subject(broken_engines.UpdatesHalf), ranks, choice).results
    assert half.findings[0].kind == Kind.DIVISION
    assert half.findings[0].detail.startswith("One step on one microbatch agrees")


def test_what_zero_does_not_hide_is_named_under_it_too(four_ranks: Pool) -> None:
    subject = engine_subject(broken_engines.ForgetsPartial)
    (result,) = verify(subject, four_ranks, Choice(["data=2,tensor=2,zero=3,zero_engine=fsdp2"])).results
    assert causes([result]) == [(Kind.REPLICATED_GRADIENT, "layers.0.input_layernorm.weight")]


def test_a_layer_on_no_stage_is_missed(ranks: Pool) -> None:
    (result,) = verify(engine_subject(broken_engines.LosesLayer), ranks, Choice(["pipeline=2,schedule=gpipe"])).results
    assert result.findings[0].kind == Kind.MISSING
    assert result.findings[0].where.startswith("layers.1.")


def test_a_mistake_that_one_microbatch_does_not_show(ranks: Pool) -> None:
    subject = engine_subject(broken_engines.AddsUpWrongly)
    (result,) = verify(subject, ranks, Choice(["tensor=2,sequence_parallel=false"])).results
    assert causes([result]) == [(Kind.UNKNOWN, "")]
    assert result.findings[0].detail.startswith("One step on one microbatch agrees")


def test_the_engine_is_right_in_every_layout(ranks: Pool) -> None:
    report = verify(engine_subject(ConfigModel), ranks, Choice([]))
    assert {result.verdict for result in report.results} == {"right"}
    names = {str(result.layout) for result in report.results}
    assert names >= {"tensor 2", "tensor 2, sequence parallel", "data 2", "pipeline 2, 1f1b", "pipeline 2, gpipe"}
    zero = {result.layout.division: set(result.readings) for result in report.results if result.layout.zero}
    assert zero["ZeRO 3"] == {"float64", "float32"}
    if find_spec("deepspeed"):
        assert zero.keys() == {"ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3 by DeepSpeed"}
    compared = {what for result in report.results for readings in result.readings.values() for what in readings}
    assert compared == set(QUANTITIES)
