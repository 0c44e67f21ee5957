"""The layout never changes the result: five steps of every layout against the plain model in one process.

Each case trains a tiny model on a mesh and compares the loss and gradient norm of every step, and every gathered weight
before and after, with a model of torch.nn modules alone. Within a layout, cases cross family, tied embeddings, schedule
and sequence parallelism; microbatch counts, precisions, key-value heads and splits take turns.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.plain.train import PlainRun, build_plain, train_plain
from tests.pool import Pool
from weft.launch.engine import Engine
from weft.launch.objectives import IGNORED
from weft.launch.sections import Settings
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.model.decoder import initial_distribution
from weft.parallel import build_mesh, build_schedule, gather_full, initialize, write_schedule
from weft.parallel.sharding import sharded_parameters

STEPS, SEQUENCE, SEED = 5, 12, 7
LEARNING_RATE = 1e-3
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True)
class Layout:
    """How the ranks are arranged."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"data{self.data}-tensor{self.tensor}-pipeline{self.pipeline}"


@dataclass(frozen=True)
class Case:
    """One training run."""

    layout: Layout
    family: str = "llama"
    tied: bool = False
    kv_heads: int = 12
    vocabulary: int = 61  # divides over no number of ranks
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    sequence_parallel: bool = False
    microbatches: int = 3
    split: tuple[int, ...] | str = "auto"
    dtype: str = "float64"
    dropout: float = 0.0
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("core",)
    recompute_layers: str = "all"
    zero: int = 0
    zero_engine: str = "auto"
    offload: str = "none"
    optimizer: str = "adamw"
    compile: bool = False

    @property
    def global_size(self) -> int:
        """Sequences per step; a multiple of data × microbatches."""
        return 32 if self.microbatches == 8 and self.layout.data != 3 else 24

    def config(self) -> dict[str, Any]:
        """The model by Hugging Face's names."""
        common = {"model_type": self.family, "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied}
        if self.family == "llama":
            sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 12}
            return common | sizes | {"num_key_value_heads": self.kv_heads, "max_position_embeddings": SEQUENCE}
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        return common | {"n_embd": 48, "n_inner": 96, "n_layer": 4, "n_head": 12, "n_positions": SEQUENCE} | dropouts

    def settings(self) -> Settings:
        layout = self.layout
        return build_settings(
            {
                "name": "matrix",
                "model": self.config(),
                "parallel": {
                    "tensor": layout.tensor,
                    "pipeline": layout.pipeline,
                    "data": layout.data,
                    "sequence_parallel": self.sequence_parallel,
                    "schedule": self.schedule,
                    "stages_per_rank": self.stages_per_rank,
                    "split": self.split,
                    "recompute": self.recompute,
                    "recompute_modules": self.recompute_modules,
                    "recompute_layers": self.recompute_layers,
                    "zero": self.zero,
                    "zero_engine": self.zero_engine,
                    "offload": self.offload,
                },
                "batch": {
                    "global_size": self.global_size,
                    "micro_size": self.global_size // (layout.data * self.microbatches),
                },
                "train": {
                    "steps": STEPS,
                    "seed": SEED,
                    "compile": self.compile,
                    "optimizer": {"name": self.optimizer, "learning_rate": LEARNING_RATE, "clip_grad_norm": 0.5},
                    "schedule": {"warmup_steps": 2, "minimum_learning_rate": LEARNING_RATE},
                },
                "corpus": {"sequence_length": SEQUENCE},
            }
        )


def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets of every step; the first sequences have few valid targets, one step's first has none."""
    result = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, case.vocabulary, (case.global_size, SEQUENCE + 1), generator=generator)
        targets = rows[:, 1:].clone()
        targets[: case.global_size // 3, step:] = IGNORED
        result.append((rows[:, :-1], targets))
    return result


@dataclass
class Outcome:
    """What one rank saw of a run."""

    losses: list[float]
    gradient_norms: list[float]
    initial: dict[str, Tensor]
    weights: dict[str, Tensor]


def run_layouts(cases: list[Case]) -> list[Outcome]:
    """Train each of `cases`, all of one layout, on this rank."""
    layout, outcomes = cases[0].layout, []
    mesh = build_mesh(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    for case in cases:
        engine = Engine(model_config(case.config()), case.settings(), mesh, dtype=getattr(torch, case.dtype))
        initial = gather_weights(engine)
        share, replica = case.global_size // layout.data, mesh["data"].get_local_rank()
        rows = slice(replica * share, (replica + 1) * share)
        steps = [engine.step(step, inputs[rows], targets[rows]) for step, (inputs, targets) in enumerate(batches(case))]
        outcomes.append(
            Outcome(
                [step.loss for step in steps], [step.gradient_norm for step in steps], initial, gather_weights(engine)
            )
        )
    return outcomes


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """The full parameters of this rank's stages; a tied head goes by the embedding's name."""
    result = {}
    for module in engine.modules:
        held = engine.updates.replicas.whole_weights(module)  # from all data ranks, where they are divided
        for name, _, sharding in sharded_parameters(module):
            full = gather_full(held[name], sharding)
            if full is not None:
                tied = engine.config.tie_word_embeddings and name == "lm_head.weight"
                result["embed_tokens.weight" if tied else name] = full.clone()
    return result


@cache
def run_plain(case: Case) -> tuple[dict[str, Tensor], PlainRun]:
    """Initial weights, and what the plain model makes of them."""
    dtype = getattr(torch, case.dtype)
    drawn: nn.Module = build_plain(case.config())
    drawn.to(dtype)
    initialize(drawn, SEED, initial_distribution(model_config(case.config())))
    initial = {name: weight.clone() for name, weight in drawn.state_dict().items()}
    rates = [LEARNING_RATE / 2] + [LEARNING_RATE] * (STEPS - 1)
    run = train_plain(
        build_plain(case.config(), initial),
        batches(case),
        learning_rates=rates,
        clip_grad_norm=0.5,
        optimizer_name=case.optimizer,
    )
    return initial, run


def differences(case: Case, outcomes: list[Outcome]) -> list[str]:
    """Everything in which a layout's run differs from the plain one, in words."""
    model_alone = Case(
        Layout(),
        case.family,
        case.tied,
        case.kv_heads,
        case.vocabulary,
        microbatches=8 if case.global_size == 32 else 1,
        dtype=case.dtype,
        optimizer=case.optimizer,
    )
    initial, plain = run_plain(model_alone)
    return compare(case, outcomes, Outcome(plain.losses, plain.gradient_norms, initial, plain.weights))


def compare(case: Case, outcomes: list[Outcome], expected: Outcome) -> list[str]:
    tolerance, found = TOLERANCE[case.dtype], []
    held = {name for outcome in outcomes for name in outcome.weights}
    if held != expected.weights.keys():
        found.append(f"parameters {sorted(held ^ expected.weights.keys())} are on one side only")
    for rank, outcome in enumerate(outcomes):
        for what, seen, wanted in [
            ("loss", outcome.losses, expected.losses),
            ("gradient norm", outcome.gradient_norms, expected.gradient_norms),
        ]:
            error = (torch.tensor(seen, dtype=torch.float64) - torch.tensor(wanted, dtype=torch.float64)).abs()
            if not error.max() <= tolerance:
                found.append(f"rank {rank}: {what} of steps 0 … {STEPS - 1} differs by {error.tolist()}")
        for name in outcome.weights.keys() & expected.weights.keys():
            if not torch.equal(outcome.initial[name], expected.initial[name]):
                found.append(f"rank {rank}: initial {name} differs")
            error = (outcome.weights[name] - expected.weights[name]).abs().max()
            if not error <= tolerance:
                found.append(f"rank {rank}: final {name} differs by {error:.1e}")
    return found


LAYOUTS = [
    Layout(data, tensor, pipeline)
    for data, tensor, pipeline in product(range(1, 5), repeat=3)
    if data * tensor * pipeline <= 4
]
SPLITS = {1: ["auto"], 2: ["auto", (1, 3), (3, 1)], 3: ["auto", (1, 2, 1), (1, 1, 2)], 4: ["auto"]}


def cases_of(layout: Layout) -> list[Case]:
    """Family × tied × schedule × sequence parallelism, as far as they make a difference; the rest takes turns."""
    microbatches = cycle((1, 3) if layout.tensor > 2 else (1, 3, 8))  # four busy ranks on two cores are slow
    splits = cycle(SPLITS[layout.pipeline])
    kv_heads = cycle((12, 1, 3) if layout.tensor == 3 else (1, 2, 12, 4))
    dtypes = cycle(("float64", "float64", "float32"))
    return [
        Case(
            layout,
            family,
            tied,
            kv_heads=next(kv_heads) if family == "llama" else 12,
            schedule=schedule,
            sequence_parallel=sequence_parallel,
            microbatches=next(microbatches),
            split=next(splits),
            dtype=next(dtypes),
        )
        for family, tied, schedule, sequence_parallel in product(
            ("llama", "gpt2"),
            (False, True),
            SCHEDULES if layout.pipeline > 1 else SCHEDULES[:1],
            (False, True) if layout.tensor > 1 else (False,),
        )
    ]


def check(pool: Pool, cases: list[Case]) -> None:
    results = pool.run(cases[0].layout.ranks, run_layouts, cases, timeout=200)
    found = {
        case: wrong
        for number, case in enumerate(cases)
        if (wrong := differences(case, [result[number] for result in results]))
    }
    assert not found, "\n".join("\n    ".join([str(case), *wrong[:8]]) for case, wrong in found.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_five_steps_equal_the_plain_model(pool: Pool, layout: Layout) -> None:
    check(pool, cases_of(layout))


def test_all_three_axes_at_once(pool: Pool) -> None:
    check(
        pool,
        [
            Case(Layout(2, 2, 2), "llama", tied=True, kv_heads=1, sequence_parallel=True, microbatches=3),
            Case(Layout(2, 2, 2), "gpt2", schedule="gpipe", microbatches=1, split=(1, 3)),
        ],
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_fewer_key_value_heads_than_ranks(pool: Pool, kv_heads: int, sequence_parallel: bool) -> None:
    case = Case(Layout(tensor=4), kv_heads=kv_heads, sequence_parallel=sequence_parallel)
    check(pool, [case, replace(case, tied=True, dtype="float32", microbatches=1)])


@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fewer_microbatches_than_stages_and_no_multiple(pool: Pool, schedule: str, microbatches: int) -> None:
    check(pool, [Case(Layout(pipeline=4), schedule=schedule, microbatches=microbatches, tied=True)])


EVERY_SCHEDULE = {
    "gpipe": 1,
    "1f1b": 1,
    "zb-h1": 1,
    "zb-h2": 1,
    "interleaved": 2,
    "looped-bfs": 2,
    "interleaved-zb": 2,
    "zb-v": 2,
    "v-half": 2,
    "dualpipe-v": 2,
}


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_every_schedule_with_and_without_recompute(pool: Pool, schedule: str) -> None:
    """Whole and split backwards; tied weights; stages in a loop and in a V; tensor ranks inside."""
    case = Case(Layout(pipeline=2), schedule=schedule, stages_per_rank=EVERY_SCHEDULE[schedule], tied=True, kv_heads=4)
    check(pool, [replace(case, recompute=recompute) for recompute in ("none", "selective", "full")])
    both = replace(case, layout=Layout(tensor=2, pipeline=2), sequence_parallel=True, family="gpt2", kv_heads=12)
    check(pool, [replace(both, tied=False, recompute="full"), replace(both, microbatches=1)])


def test_a_schedule_from_a_file(pool: Pool, tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    write_schedule(build_schedule("zb-v", 2, 3), table)
    check(pool, [Case(Layout(tensor=2, pipeline=2), schedule=str(table), tied=True, kv_heads=4)])


@pytest.mark.parametrize("vocabulary", [60, 61, 3])
def test_vocabularies_that_divide_and_that_do_not(pool: Pool, vocabulary: int) -> None:
    """With 3 tokens on 4 ranks, one rank holds padding alone."""
    case = Case(Layout(tensor=4), vocabulary=vocabulary, sequence_parallel=True, microbatches=1)
    check(pool, [case, replace(case, tied=True), replace(case, family="gpt2")])


def test_dropout_does_not_depend_on_the_layout(pool: Pool) -> None:
    alone = Case(Layout(), "gpt2", dropout=0.2)
    ((expected,),) = pool.run(1, run_layouts, [alone])
    ((plain,),) = pool.run(1, run_layouts, [replace(alone, dropout=0.0)])
    assert abs(plain.losses[0] - expected.losses[0]) > 1e-4, "nothing was dropped"
    for layout in [Layout(data=4), Layout(tensor=4), Layout(pipeline=2), Layout(2, 2, 1), Layout(1, 2, 2)]:
        for sequence_parallel in {False, layout.tensor > 1}:
            recompute = "full" if sequence_parallel else "selective"
            case = replace(
                alone, layout=layout, sequence_parallel=sequence_parallel, microbatches=1, recompute=recompute
            )
            outcomes = [outcome for (outcome,) in pool.run(layout.ranks, run_layouts, [case])]
            assert not compare(case, outcomes, expected), case


def test_compiled_chains_change_nothing(pool: Pool) -> None:
    """Under tensor ranks, split backwards, recomputation, activations on the host, and weights divided by FSDP2."""
    case = Case(Layout(1, 2, 2), sequence_parallel=True, microbatches=2, compile=True)  # all cases have the same shapes
    check(
        pool,
        [
            replace(case, schedule="zb-h1", recompute="full"),
            replace(case, schedule="zb-v", stages_per_rank=2, recompute="selective", recompute_modules=("core", "mlp")),
            replace(case, offload="activations"),
        ],
    )
    check(pool, [replace(case, layout=Layout(2, 2, 1), microbatches=1, zero=3)])
    assert min(pool.run(4, compiled_functions)) >= 3, "of norms, rotary positions and gated activations"


def compiled_functions() -> int:
    """How many functions torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["frames"]["ok"])
