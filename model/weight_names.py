"""Where the files of each family store a module's weights: a table from own names to Hugging Face's.

Own names split what files may fuse: `q_proj`, `k_proj` and `v_proj` are three modules in every family. `{}` stands for
the number of the layer; `.weight` and `.bias` are left out where a module has both in one place.
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
    special = (f"{template}.{leaf}", *(() if config.gated else (f"{template}:ungated",)))
    stored = next((weights[key] for key in special if key in weights), None) or weights[template]
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
BERT = (
    _plain(
        "bert.embeddings.",
        {
            "embed_tokens": "word_embeddings",
            "embed_positions": "position_embeddings",
            "embed_types": "token_type_embeddings",
            "embed_norm": "LayerNorm",
        },
    )
    | _layers(
        "bert.encoder.layer",
        {
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "attention_output_norm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "mlp_output_norm": "output.LayerNorm",
        },
    )
    | _plain("cls.predictions.", {"head_dense": "transform.dense", "head_norm": "transform.LayerNorm"})
    | {"lm_head": Stored("cls.predictions.decoder"), "lm_head.bias": Stored("cls.predictions")}
)


def _t5_stack(stack: str, mlp: int) -> dict[str, Stored]:
    names = {
        "self_attn": "layer.0.SelfAttention",
        "cross_attn": "layer.1.EncDecAttention",
    }
    places = {f"{own}.{letter}_proj": f"{stored}.{letter}" for own, stored in names.items() for letter in "qkvo"} | {
        "input_layernorm": "layer.0.layer_norm",
        "cross_attention_layernorm": "layer.1.layer_norm",
        "post_attention_layernorm": f"layer.{mlp}.layer_norm",
        "mlp.down_proj": f"layer.{mlp}.DenseReluDense.wo",
        "mlp.gate_proj": f"layer.{mlp}.DenseReluDense.wi_0",
        "mlp.up_proj": f"layer.{mlp}.DenseReluDense.wi_1",
        "mlp.up_proj:ungated": f"layer.{mlp}.DenseReluDense.wi",
    }
    blocks = {f"{stack}.{{}}.{own}": Stored(f"{stack}.block.{{}}.{stored}") for own, stored in places.items()}
    return blocks | {f"{stack}_bias": Stored(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias")}


T5 = (
    {"embed_tokens": Stored("shared"), "lm_head": Stored("lm_head")}
    | {"encoder_norm": Stored("encoder.final_layer_norm"), "norm": Stored("decoder.final_layer_norm")}
    | _t5_stack("encoder", 1)
    | _t5_stack("decoder", 2)
)
