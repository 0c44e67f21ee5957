"""The bytes that each rank of a layout sends in a training step, and those that it holds: the formulas of layouts.md.

    python docs/layout_costs.py configs/demo.yaml [key=value ...]

Prints the tables of docs/layouts.md for these settings. Every number is a closed form of the sizes; the tests compare
it with the bytes that the engine is seen to send.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from weft.launch.errors import UserError
from weft.launch.layout import data_size, microbatches
from weft.launch.settings import Settings, load_settings
from weft.launch.world import world_size
from weft.model.config import ModelConfig, model_config
from weft.model.split import split_layers

ELEMENT = 4  # bytes of a float32
KINDS = 6  # of layers, each with a gradient norm of its own per stage


@dataclass(frozen=True)
class Layout:
    """A layout with one stage per rank, and the sizes of a step."""

    config: ModelConfig
    pipeline: int
    data: int
    tensor: int
    sequence_parallel: bool
    micro_size: int
    microbatches: int
    sequence_length: int
    split: Sequence[int] | None = None
    recompute: str = "none"

    @property
    def activation(self) -> int:
        """Bytes of `[micro_size, sequence, hidden]`."""
        return self.micro_size * self.sequence_length * self.config.hidden_size * ELEMENT

    def layers(self, stage: int) -> int:
        return len(split_layers(self.config, self.pipeline, self.split, self.sequence_length)[stage])


def layout_of(settings: Settings, world: int) -> Layout:
    """The layout that the settings describe in a world of that many ranks."""
    parallel = settings.parallel
    if parallel.stages_per_rank > 1:
        raise UserError(f"parallel.stages_per_rank is {parallel.stages_per_rank}; these formulas are for 1.")
    return Layout(
        config=model_config(settings.model),
        pipeline=parallel.pipeline,
        data=data_size(settings, world),
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        micro_size=settings.batch.micro_size,
        microbatches=microbatches(settings, world),
        sequence_length=settings.corpus.sequence_length,
        split=None if parallel.split == "auto" else parallel.split,
        recompute=parallel.recompute,
    )


def ring(ranks: int) -> float:
    """What each rank of a ring sends of a tensor that is gathered or reduce-scattered; an all-reduce does both."""
    return (ranks - 1) / ranks


def sent_bytes(layout: Layout, stage: int) -> dict[str, float]:
    """Bytes that a rank of `stage` sends in one training step, by purpose."""
    c, tensor, per_step = layout.config, layout.tensor, layout.microbatches
    whole = ring(tensor) * layout.activation
    first, last = stage == 0, stage == layout.pipeline - 1
    learned = c.positions == "learned"
    embedding = (3 if learned else 2) * whole if layout.sequence_parallel else 2 * whole
    head = (3 if layout.sequence_parallel else 2) * whole
    layer = (10 if layout.sequence_parallel else 8) * whole
    if layout.recompute == "full":
        layer += 4 * whole  # the forward's collectives, once more
    loss = ring(tensor) * tensor * layout.micro_size * layout.sequence_length * 3 * ELEMENT
    return {
        "layers": per_step * layout.layers(stage) * layer,
        "embedding": per_step * embedding if first else 0.0,
        "head": per_step * head if last else 0.0,
        "loss": per_step * loss if last else 0.0,
        "pipeline": _pipeline_bytes(layout, stage),
        "tied embedding": _tied_bytes(layout) if (first or last) and layout.pipeline > 1 else 0.0,
        "partial gradients": 2 * ring(tensor) * partial_elements(layout, stage) * ELEMENT,
        "data": 2 * ring(layout.data) * (parameters(layout, stage) * ELEMENT + 16),
        "gradient norm": 2 * 8 * KINDS * layout.pipeline * (ring(tensor) + ring(layout.pipeline)),
    }


def _pipeline_bytes(layout: Layout, stage: int) -> float:
    """One activation forward and one gradient backward per microbatch and boundary; the losses to every rank."""
    boundary = layout.activation / (layout.tensor if layout.sequence_parallel else 1)
    if stage == layout.pipeline - 1:
        gradients = layout.microbatches * boundary if stage else 0.0
        return gradients + stage * 8 * (layout.microbatches + 1)
    return layout.microbatches * boundary * (2 if stage else 1)


def _tied_bytes(layout: Layout) -> float:
    """First and last stage exchange the gradients of the table that both hold."""
    return vocabulary_rows(layout) * layout.config.hidden_size * ELEMENT if layout.config.tie_word_embeddings else 0.0


def vocabulary_rows(layout: Layout) -> int:
    """Rows of the embedding that each rank holds, padding included."""
    return -(-layout.config.vocab_size // layout.tensor)


def replicated_elements(layout: Layout) -> int:
    """Parameters of a layer that every tensor rank holds whole: norms, and biases of the row-parallel products."""
    c = layout.config
    return 2 * c.norm_parameters + c.hidden_size * (c.output_bias + c.mlp_bias)


def kv_elements(layout: Layout) -> int:
    """Parameters of a layer's key and value projections."""
    c = layout.config
    return 2 * c.num_key_value_heads * c.head_dim * (c.hidden_size + c.qkv_bias)


def partial_elements(layout: Layout, stage: int) -> int:
    """Elements of the one message that sums what each tensor rank knows only a part of."""
    layers, c = layout.layers(stage), layout.config
    elements = 0
    if layout.sequence_parallel:
        elements += layers * replicated_elements(layout)
        elements += c.norm_parameters if stage == layout.pipeline - 1 else 0
    if layout.tensor > c.num_key_value_heads:
        elements += layers * kv_elements(layout)
    return elements


def parameters(layout: Layout, stage: int) -> int:
    """Parameters that each rank of `stage` holds."""
    c, tensor = layout.config, layout.tensor
    kv_shards = min(tensor, c.num_key_value_heads)
    split = c.layer_parameters - replicated_elements(layout) - kv_elements(layout)
    layer = replicated_elements(layout) + kv_elements(layout) // kv_shards + split // tensor
    table = vocabulary_rows(layout) * c.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    positions = c.max_position_embeddings * c.hidden_size if c.positions == "learned" else 0
    tables = 1 if first and last and c.tie_word_embeddings else first + last
    return layout.layers(stage) * layer + tables * table + first * positions + last * c.norm_parameters


def held_bytes(layout: Layout, stage: int) -> dict[str, int]:
    """Bytes that each rank of `stage` holds all the time."""
    size = parameters(layout, stage) * ELEMENT
    return {"parameters": size, "gradients": size, "AdamW": 2 * size}


def tables(layout: Layout) -> str:
    """Both tables in Markdown, a column for each stage; rows of zeros are left out."""
    stages = range(layout.pipeline)
    header = "".join(f" rank of stage {stage} |" for stage in stages) if layout.pipeline > 1 else " every rank |"
    parts = []
    for title, count in (("sent per step", sent_bytes), ("held", held_bytes)):
        columns = [count(layout, stage) for stage in stages]
        rows = [(name, [column[name] for column in columns]) for name in columns[0]]
        rows.append(("**sum**", [sum(column.values()) for column in columns]))
        lines = [f"| bytes {title} |{header}", "|---|" + "---:|" * layout.pipeline]
        lines += [f"| {name} |" + "".join(f" {n:,.0f} |" for n in numbers) for name, numbers in rows if any(numbers)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(config: str, *overrides: str) -> None:
    settings = load_settings(config, overrides)
    print(tables(layout_of(settings, world_size(settings))))


if __name__ == "__main__":
    main(*sys.argv[1:])
