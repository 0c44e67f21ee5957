"""The table of docs/memory.md: activations by formula and as the engine allocates them, in layouts of a small model.

python docs/memory_tables.py
"""

from math import prod
from typing import Any, NamedTuple

from weft.launch.dry_run import dry_run
from weft.launch.ledger import formula, states_and_activations
from weft.launch.settings import Settings, build_settings, resolved
from weft.launch.units import bytes_text

LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 2}
GPT2: dict[str, Any] = {"model_type": "gpt2"}
STILL: dict[str, Any] = GPT2 | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
AXES = ("pipeline", "data", "tensor")


class Case(NamedTuple):
    """A layout of a model."""

    name: str
    parallel: dict[str, Any]
    model: dict[str, Any] = LLAMA

    @property
    def ranks(self) -> int:
        return prod(self.parallel.get(axis, 1) for axis in AXES)

    @property
    def settings(self) -> Settings:
        values = {
            "name": "memory",
            "model": self.model | SIZES,
            "parallel": {"data": 1} | self.parallel,
            "batch": {"global_size": 8 * self.parallel.get("data", 1), "micro_size": 2},
            "corpus": {"sequence_length": 256},
            "cluster": {"device": "cpu"},
        }
        return resolved(build_settings(values), self.ranks)


CASES = (
    Case("one rank", {}),
    Case("tensor 2", {"tensor": 2}),
    Case("tensor 2, not sequence parallel", {"tensor": 2, "sequence_parallel": False}),
    Case("tensor 4", {"tensor": 4}),
    Case("tensor 2, selective recompute", {"tensor": 2, "recompute": "selective"}),
    Case("tensor 2, full recompute", {"tensor": 2, "recompute": "full"}),
    Case("data 4, tied", {"data": 4}, LLAMA | {"tie_word_embeddings": True}),
    Case("pipeline 2", {"pipeline": 2}),
    Case("pipeline 2, full recompute", {"pipeline": 2, "recompute": "full"}),
    Case("pipeline 4", {"pipeline": 4}),
    Case("pipeline 4, gpipe", {"pipeline": 4, "schedule": "gpipe"}),
    Case("pipeline 2, interleaved", {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}),
    Case("pipeline 2, zb-h1", {"pipeline": 2, "schedule": "zb-h1"}),
    Case("pipeline 4, zb-h1", {"pipeline": 4, "schedule": "zb-h1"}),
    Case("pipeline 2, zb-h1, full recompute", {"pipeline": 2, "schedule": "zb-h1", "recompute": "full"}),
    Case("pipeline 2, zb-v", {"pipeline": 2, "schedule": "zb-v"}),
    Case("pipeline 2 × data 2 × tensor 2", {"pipeline": 2, "data": 2, "tensor": 2}),
    Case("GPT-2, dropout", {}, GPT2),
    Case("GPT-2, dropout, tensor 2, selective recompute", {"tensor": 2, "recompute": "selective"}, GPT2),
    Case("GPT-2, dropout, pipeline 2, zb-h1", {"pipeline": 2, "schedule": "zb-h1"}, GPT2),
    Case("GPT-2, dropout, pipeline 2 × tensor 2, zb-h1", {"pipeline": 2, "tensor": 2, "schedule": "zb-h1"}, GPT2),
    Case("GPT-2, no dropout, tensor 2", {"tensor": 2}, STILL),
)


class Compared(NamedTuple):
    """One kind of memory of one pipeline rank, in bytes."""

    pipeline_rank: int
    kind: str
    formula: float
    allocated: float


def compare(case: Case) -> list[Compared]:
    """The first and the last pipeline rank."""
    settings, pipeline = case.settings, case.settings.parallel.pipeline
    result = []
    for rank in dict.fromkeys((0, pipeline - 1)):
        by_formula = states_and_activations(formula(settings, rank))
        by_engine = states_and_activations(dry_run(settings, case.ranks, rank * case.ranks // pipeline).memory)
        result += [Compared(rank, kind, size, dict(by_engine)[kind]) for kind, size in by_formula]
    return result


def table() -> str:
    """In Markdown, the activations of each case."""
    lines = ["| layout | pipeline rank | by formula | as allocated | difference |", "|---|---:|---:|---:|---:|"]
    for case in CASES:
        for rank, kind, by_formula, allocated in compare(case):
            if kind == "activations":
                sizes = f"{bytes_text(by_formula)} | {bytes_text(allocated)} | {by_formula / allocated - 1:+.1%}"
                lines.append(f"| {case.name} | {rank} | {sizes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
