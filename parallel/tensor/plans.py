"""What a plan may say of a module, and plans for model families whose own library has none.

A plan maps name patterns to styles. A pattern is a qualified module name in which `*` stands for one component
(`layers.*.mlp.up_proj`). The names that Hugging Face gives its styles are known too.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from weft.parallel.elsewhere import Elsewhere

Kind = Literal["column", "row", "embedding", "embedding_column", "partial_gradient", "replicated"]


@dataclass(frozen=True)
class Style:
    """How one module is split.

    `kind`: "column" splits the output features of a linear layer, "row" its input features, "embedding" the rows of a
    table (the vocabulary), "embedding_column" its columns; "partial_gradient" leaves the parameters whole, but each
    rank applies them to a part of the features, so that their gradients are summed; "replicated" leaves all as it is.

    `whole_outside`: the split does not show: a column's output is gathered, a row's input is whole and is split first.

    `chunks`: how many equal projections are fused in a column layer's output, or their sizes (q, k, v); each is split
    by itself.
    """

    kind: Kind
    whole_outside: bool = False
    chunks: int | tuple[int, ...] = 1


_COLUMN, _ROW = Style("column"), Style("row")
_GATHERED, _SPLIT_FIRST = Style("column", whole_outside=True), Style("row", whole_outside=True)

STYLES = {
    "column": _COLUMN,
    "column_gather_output": _GATHERED,
    "column_fused_2": Style("column", chunks=2),
    "column_fused_3": Style("column", chunks=3),
    "row": _ROW,
    "row_split_input": _SPLIT_FIRST,
    "embedding": Style("embedding"),
    "embedding_column": Style("embedding_column"),
    "partial_gradient": Style("partial_gradient"),
    "replicated": Style("replicated"),
}

HUGGING_FACE_STYLES = {
    "colwise": _COLUMN,
    "colwise_gather_output": _GATHERED,
    "colwise_rep": _GATHERED,
    "packed_colwise": Style("column", chunks=2),
    "rowwise": _ROW,
    "rowwise_split_input": _SPLIT_FIRST,
    "rowwise_rep": _SPLIT_FIRST,
    "embedding_rowwise": Style("embedding"),
    "embedding_colwise": Style("embedding_column", whole_outside=True),
    "replicated_with_grad_allreduce": Style("partial_gradient"),
    "replicate": Style("replicated"),
}

Plan = Mapping[str, str | Style]

_ENCODER_DECODER_ATTENTION = {f"{name}_proj": "column" for name in "qkv"} | {"out_proj": "row"}

# Patterns below the base model; heads are in _HEADS.
_FAMILIES: dict[str, dict[str, str]] = {
    "gpt2": {
        "wte": "embedding",
        "h.*.attn.c_attn": "column_fused_3",
        "h.*.attn.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    "opt": {
        "decoder.embed_tokens": "embedding",
        **{f"decoder.layers.*.self_attn.{name}": style for name, style in _ENCODER_DECODER_ATTENTION.items()},
        "decoder.layers.*.fc1": "column",
        "decoder.layers.*.fc2": "row",
    },
    "bart": {
        "shared": "embedding",
        **{f"{half}.embed_tokens": "embedding" for half in ("encoder", "decoder")},
        **{
            f"{place}.{name}": style
            for place in ("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn")
            for name, style in _ENCODER_DECODER_ATTENTION.items()
        },
        **{f"{half}.layers.*.fc1": "column" for half in ("encoder", "decoder")},
        **{f"{half}.layers.*.fc2": "row" for half in ("encoder", "decoder")},
    },
    "t5": {
        "shared": "embedding",
        **{f"{half}.embed_tokens": "embedding" for half in ("encoder", "decoder")},
        **{
            f"{half}.block.*.layer.*.{attention}.{name}": style
            for half in ("encoder", "decoder")
            for attention in ("SelfAttention", "EncDecAttention")
            for name, style in {
                "q": "column",
                "k": "column",
                "v": "column",
                "o": "row",
                "relative_attention_bias": "embedding_column",
            }.items()
        },
        **{
            f"{half}.block.*.layer.*.DenseReluDense.{name}": "row" if name == "wo" else "column"
            for half in ("encoder", "decoder")
            for name in ("wi", "wi_0", "wi_1", "wo")
        },
    },
    "bert": {
        "embeddings.word_embeddings": "embedding",
        **{f"encoder.layer.*.attention.self.{name}": "column" for name in ("query", "key", "value")},
        "encoder.layer.*.attention.output.dense": "row",
        "encoder.layer.*.intermediate.dense": "column",
        "encoder.layer.*.output.dense": "row",
    },
}

# Output layers over the vocabulary, which share the embedding's weight.
_HEADS = {"lm_head": "column_gather_output", "cls.predictions.decoder": "column_gather_output"}


def find_plan(module: nn.Module) -> Plan:
    """The plan of a Hugging Face model: its own `_tp_plan`, or else weft's for its family.

    Raises:
        ValueError: there is neither.
    """
    own: Plan = getattr(module, "_tp_plan", None) or {}
    if own:
        return own
    family = getattr(getattr(module, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"{type(module).__name__} has no _tp_plan and weft has none for {family or 'it'}; "
            'pass one, such as {"layers.*.up_proj": "column", "layers.*.down_proj": "row"}'
        )
    base = getattr(module, "base_model_prefix", "")
    prefix = f"{base}." if hasattr(module, base) else ""
    return {f"{prefix}{pattern}": style for pattern, style in _FAMILIES[family].items()} | _HEADS


def matches(module: nn.Module, plan: Plan, *, complete: bool) -> Iterator[tuple[str, nn.Module, Style]]:
    """Each module that a pattern names, once, with its name and style; the first pattern that fits counts.

    `complete`: every pattern must fit something, unless other pipeline stages hold a part of the model.

    Raises:
        ValueError: a style is unknown, a pattern names a parameter, or it fits nothing.
    """
    names = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    seen: set[int] = set()
    complete = complete and not any(isinstance(child, Elsewhere) for child in names.values())
    for pattern, style in plan.items():
        fitting = [name for name in names if _fits(pattern, name)]
        if not fitting:
            _check_unfitting(pattern, style, module, names, complete=complete)
        for name in fitting:
            if id(names[name]) not in seen and not isinstance(names[name], Elsewhere):
                seen.add(id(names[name]))
                yield name, names[name], normalise(style, name)


def normalise(style: str | Style, name: str) -> Style:
    """The style of that name.

    Raises:
        ValueError: it is unknown; the message names the module.
    """
    if isinstance(style, Style):
        return style
    known = STYLES | HUGGING_FACE_STYLES
    if style not in known:
        raise ValueError(
            f"{name}: the plan asks for style {style!r}, which weft does not know; use one of {list(STYLES)}"
        )
    return known[style]


def _fits(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) == len(parts) and all(w in ("*", part) for w, part in zip(wanted, parts, strict=True))


def _check_unfitting(
    pattern: str, style: str | Style, module: nn.Module, names: Mapping[str, nn.Module], *, complete: bool
) -> None:
    """A library's own plan may name modules that this configuration lacks, but not parameters that weft would miss."""
    bare = [name for name, _ in module.named_parameters(remove_duplicate=False) if _fits(pattern, name)]
    if bare:
        raise ValueError(f"{bare[0]}: the plan asks for style {style!r} of a bare parameter, which weft does not know")
    if complete:
        raise ValueError(f"plan entry {pattern!r} fits no module; {_nearest(pattern, names)}")


def _nearest(pattern: str, names: Mapping[str, nn.Module]) -> str:
    generic = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
    near = difflib.get_close_matches(pattern, generic, 3, 0.0)
    return f"the nearest are {', '.join(near)}" if near else "the module has no submodules"
