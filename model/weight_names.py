"""Where the files of each family store a module's weights: a table from own names to Hugging Face's.

Own names split what files may fuse: `q_proj`, `k_proj` and `v_proj` are three modules in every family. `{}` stands for
the number of the layer; `.weight` and `.bias` are left out where a module has them under the same name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.model.config import ModelConfig

QKV = ("query", "key_value", "key_value")
HEADS = ("head_dim", "head_dim", "head_dim")


@dataclass(frozen=True)
class Stored:
    """The place of a module's weight and bias in the files.

    Attributes:
        name: of the stored module.
        part, parts: it is number `part` of the projections of these sizes (see `sizes`), fused along the output; where
            they are smaller than the weight, as those of one head are, their sequence repeats.
        transposed: the weight is stored as `[in, out]`.
    """

    name: str
    part: int = 0
    parts: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """The place of one tensor: its row r is the stored row `r // length · stride + start + r % length`.

    `transposed`: of the stored tensor transposed.
    """

    name: str
    start: int
    length: int
    stride: int
    transposed: bool = False


def sizes(config: "ModelConfig") -> dict[str, int]:
    """The sizes that `Stored` names."""
    return {
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_key_value_heads * config.head_dim,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate_size,
    }


def find_place(weights: Mapping[str, Stored], config: "ModelConfig", name: str, rows: int) -> Place:
    """Where the tensor of that own name, with `rows` rows, is stored.

    Raises:
        KeyError: the family has no such module.
    """
    module, _, leaf = name.rpartition(".")
    words = module.split(".")
    numbers = [word for word in words if word.isdecimal()]
    template = ".".join("{}" if word.isdecimal() else word for word in words)
    stored = weights[template]
    full_name = f"{stored.name}.{leaf}".replace("{}", "".join(numbers))
    transposed = stored.transposed and leaf == "weight"
    if not stored.parts:
        return Place(full_name, 0, rows, rows, transposed)
    known = sizes(config)
    lengths = [known[part] for part in stored.parts]
    return Place(full_name, sum(lengths[: stored.part]), lengths[stored.part], sum(lengths), transposed)


def _plain(prefix: str, names: Mapping[str, str]) -> dict[str, Stored]:
    return {own: Stored(f"{prefix}{stored}") for own, stored in names.items()}


def _fused(
    owns: tuple[str, ...], stored: str, parts: tuple[str, ...], *, transposed: bool = False
) -> dict[str, Stored]:
    return {own: Stored(stored, part, parts, transposed) for part, own in enumerate(owns)}


_OUTSIDE = {"embed_tokens": Stored("model.embed_tokens"), "norm": Stored("model.norm"), "lm_head": Stored("lm_head")}
_LLAMA_LAYER = {
    name: name
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
}
_QKV = ("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj")


def _layers(prefix: str, names: Mapping[str, str]) -> dict[str, Stored]:
    return {f"layers.{{}}.{own}": Stored(f"{prefix}.{{}}.{stored}") for own, stored in names.items()}


LLAMA = _OUTSIDE | _layers("model.layers", _LLAMA_LAYER)
_NORMED_AFTER = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
GEMMA3 = LLAMA | _layers("model.layers", _NORMED_AFTER | {"post_attention_layernorm": "pre_feedforward_layernorm"})
OLMO2 = LLAMA | _layers("model.layers", _NORMED_AFTER)
PHI3 = (
    LLAMA
    | _fused(_QKV, "model.layers.{}.self_attn.qkv_proj", QKV)
    | _fused(
        ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
        "model.layers.{}.mlp.gate_up_proj",
        ("intermediate", "intermediate"),
    )
)
_GPT2_TRANSPOSED = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
GPT2 = (
    _plain(
        "transformer.",
        {
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "layers.{}.input_layernorm": "h.{}.ln_1",
            "layers.{}.post_attention_layernorm": "h.{}.ln_2",
            "norm": "ln_f",
        },
    )
    | {
        f"layers.{{}}.{own}": Stored(f"transformer.h.{{}}.{stored}", transposed=True)
        for own, stored in _GPT2_TRANSPOSED.items()
    }
    | _fused(_QKV, "transformer.h.{}.attn.c_attn", QKV, transposed=True)
    | {"lm_head": Stored("lm_head")}
)
GPT_NEOX = (
    _plain("gpt_neox.", {"embed_tokens": "embed_in", "norm": "final_layer_norm"})
    | _layers(
        "gpt_neox.layers",
        {
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        },
    )
    | _fused(_QKV, "gpt_neox.layers.{}.attention.query_key_value", HEADS)
    | {"lm_head": Stored("embed_out")}
)
