"""The planner's formulas are those of the papers: their equations, tables and figures hold exactly."""

from dataclasses import replace

import pytest

from tests.launch.plan.shapes import LLAMA_405B, gpt
from weft.launch.plan.activations import kept_after_recompute, kept_of_block
from weft.launch.plan.flops import hardware_flops, matrix_parameters, model_flops, palm_flops
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.memory import memory_of_rank
from weft.launch.plan.parameters import rank_parameters
from weft.launch.plan.recipe import MEGATRON
from weft.launch.plan.shape import Experts, LatentAttention, ModelShape

PLAIN = replace(MEGATRON, attention="plain")
GPT_175B = gpt(96, 12288, 96)
GPT_1T = gpt(128, 25600, 160)


@pytest.mark.parametrize("shape", [gpt(24, 2304, 24), GPT_175B, GPT_1T])
def test_flops_of_a_step_are_those_of_the_papers(shape: ModelShape) -> None:
    batch, s, h, layers, vocab = 512, 2048, shape.hidden, shape.layers, shape.vocab
    tokens = batch * s
    # Narayanan et al. 2021, eq. 3: with full recompute
    assert tokens * hardware_flops(shape, s, "full") == pytest.approx(
        96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h)), rel=1e-12
    )
    # Korthikanti et al. 2022, eq. 7 and 8: of the model, and with selective recompute
    share = 72 * batch * layers * s * h**2
    assert tokens * model_flops(shape, s) == pytest.approx(
        share * (1 + s / (6 * h) + vocab / (12 * h * layers)), rel=1e-12
    )
    assert tokens * hardware_flops(shape, s, "selective") == pytest.approx(
        share * (1 + s / (3 * h) + vocab / (12 * h * layers)), rel=1e-12
    )


# Korthikanti et al. 2022, table 5: MFU and HFU in percent of the same runs
@pytest.mark.parametrize(
    ("shape", "mfu", "hfu"),
    [(gpt(48, 6144, 64), 41.5, 43.7), (GPT_175B, 51.4, 52.8), (gpt(105, 20480, 128), 56.0, 57.0), (GPT_1T, 56.3, 57.0)],
)
def test_hardware_flops_exceed_model_flops_by_the_published_share(shape: ModelShape, mfu: float, hfu: float) -> None:
    assert hardware_flops(shape, 2048, "selective") / model_flops(shape, 2048) == pytest.approx(hfu / mfu, rel=2e-3)


def test_flops_of_palm_count_six_per_parameter_and_twelve_per_pair() -> None:
    # Chowdhery et al. 2022, appendix B: 6N + 12LHQT
    shape = LLAMA_405B
    assert palm_flops(shape, 8192) == 6 * shape.parameters + 12 * 126 * 128 * 128 * 8192


# Korthikanti et al. 2022, table 2: bytes per layer in units of s·b·h
@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "bytes_per_feature"),
    [
        (False, "none", lambda t, scores: 10 + 24 / t + 5 * scores / t),
        (True, "none", lambda t, scores: 34 / t + 5 * scores / t),
        (False, "selective", lambda t, scores: 10 + 24 / t),
        (True, "selective", lambda t, scores: 34 / t),
    ],
)
@pytest.mark.parametrize("tensor", [2, 8])
def test_activations_of_a_layer_are_those_of_table_2(
    sequence_parallel: bool, recompute: str, bytes_per_feature: object, tensor: int
) -> None:
    s, b, h, a = 2048, 3, GPT_175B.hidden, GPT_175B.heads
    layout = Layout(
        tensor=tensor,
        micro_batch=b,
        recompute=recompute,
        sequence_parallel=sequence_parallel,  # type: ignore[arg-type]
    )
    kept = kept_after_recompute(GPT_175B, Job(b, s), layout, PLAIN)
    assert kept == pytest.approx(s * b * h * bytes_per_feature(tensor, a * s / h), rel=1e-12)  # type: ignore[operator]


def test_activations_of_one_device_and_of_full_recompute_are_those_of_table_2() -> None:
    s, h, a = 2048, GPT_175B.hidden, GPT_175B.heads
    assert kept_of_block(GPT_175B, Job(1, s), Layout(), PLAIN).total == s * h * (34 + 5 * a * s / h)
    full = Layout(tensor=8, recompute="full", sequence_parallel=False)
    assert kept_after_recompute(GPT_175B, Job(1, s), full, PLAIN) == 2 * s * h


# Rajbhandari et al. 2020, figure 1: 7.5 billion parameters over 64 devices, K = 12, in gigabytes
@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_model_states_are_those_of_figure_1(zero: int, gigabytes: float) -> None:
    shape = gpt(36, 4096, 32)
    scale = 7.5e9 / rank_parameters(shape, Layout(), [0]).total
    recipe = replace(MEGATRON, parameter=2, gradient=2, optimizer=12)
    memory = memory_of_rank(shape, Job(64, 1024), Layout(data=64, zero=zero), recipe)
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states * scale / 1e9 == pytest.approx(gigabytes, rel=3e-3)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        (LLAMA_405B, 405.9),  # Llama 3, arXiv:2407.21783: "405B"
        (gpt(96, 12288, 96), 174.6),  # Narayanan et al. 2021, eq. 2
        (ModelShape(32, 4096, 14336, 32, 8, 128, 128256), 8.03),
        # Mixtral 8x7B, arXiv:2401.04088: 46.7 billion in all
        (ModelShape(32, 4096, 14336, 32, 8, 128, 32000, experts=Experts(8, 2, 14336)), 46.7),
        # DeepSeek-V2, arXiv:2405.04434: 236 billion in all
        (
            ModelShape(
                60, 5120, 12288, 128, 128, 128, 102400,
                latent=LatentAttention(1536, 512, 64), experts=Experts(160, 6, 1536, 3072, 1),
            ),
            235.7,
        ),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_the_papers_say(shape: ModelShape, billions: float) -> None:
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_active_parameters_of_a_mixture_are_as_many_as_the_paper_says() -> None:
    # DeepSeek-V3, arXiv:2412.19437: 37 billion activated for each token
    shape = ModelShape(
        61, 7168, 18432, 128, 128, 128, 129280,
        latent=LatentAttention(1536, 512, 64), experts=Experts(256, 8, 2048, 2048, 3),
    )  # fmt: skip
    active = sum(matrix_parameters(shape, layer) for layer in range(61)) + shape.vocab * shape.hidden
    assert active / 1e9 == pytest.approx(37, rel=0.02)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("pipeline", "several"), [(1, 1), (4, 1), (2, 3)])
def test_ranks_together_hold_every_parameter(tensor: int, pipeline: int, several: int) -> None:
    """All ranks' parameters are the model's, norms counted once for each tensor rank."""
    shape = replace(LLAMA_405B, layers=12)
    layout = Layout(tensor=tensor, pipeline=pipeline, stages_per_rank=several, schedule="interleaved")
    held = sum(
        tensor * rank_parameters(shape, layout, list(range(rank, layout.stages, pipeline))).total
        for rank in range(pipeline)
    )
    norms = (2 * shape.layers + 1) * shape.norm_parameters
    assert held - (tensor - 1) * norms == shape.parameters
