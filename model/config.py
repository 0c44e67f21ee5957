"""A model as numbers: Hugging Face's config names read into one description that all families share.

A family is a row of `FAMILIES`: what its config leaves unsaid. What one block has that another lacks (norm kind,
biases, gating, learned positions) is a number here, not a class.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from weft.parallel.tensor.divide import check_features, check_heads


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
        if self.output_bias:
            attention += self.hidden_size
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        if self.mlp_bias:
            mlp += self.hidden_size + (2 if self.gated else 1) * self.intermediate_size
        return attention + mlp + 2 * self.norm_parameters

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied embedding counted once."""
        positions = self.max_position_embeddings * self.hidden_size if self.positions == "learned" else 0
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return tables + positions + self.num_hidden_layers * self.layer_parameters + self.norm_parameters


# Names of this page, by the name that Hugging Face gives them. GPT-2 has names of its own.
_LLAMA_NAMES = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rope_theta",
        "tie_word_embeddings",
        "initializer_range",
        "attention_dropout",
        "mlp_bias",
    )
} | {"rms_norm_eps": "norm_eps", "hidden_act": "activation"}
_GPT2_NAMES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "activation_function": "activation",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "residual_dropout",
}
_GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu_new",
    "gated": False,
    "positions": "learned",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
}


@dataclass(frozen=True)
class Family:
    """How a model type's config is read: its key names, and what holds where a key is absent."""

    names: Mapping[str, str]
    defaults: Mapping[str, Any]


FAMILIES = {
    "llama": Family(_LLAMA_NAMES | {"attention_bias": "attention_bias"}, {"max_position_embeddings": 2048}),
    "mistral": Family(_LLAMA_NAMES, {"max_position_embeddings": 131072, "num_key_value_heads": 8}),
    "qwen2": Family(_LLAMA_NAMES, {"max_position_embeddings": 32768, "qkv_bias": True}),
    "gpt2": Family(_GPT2_NAMES, _GPT2_DEFAULTS),
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
# Keys of a Hugging Face config.json that say nothing about the computation
_IGNORED = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "task_specific_params", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "pretraining_tp", "_name_or_path", "max_window_layers",
}  # fmt: skip
# Keys that change the computation in a way not covered, with the values that leave it as it is
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Read a mapping of Hugging Face config names, such as a model's own `config.json`.

    Raises:
        ValueError: a key is unknown, missing, of the wrong type or out of range, or its value is not supported.
    """
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model.model_type is {model_type!r}; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    values = dict(family.defaults)
    for key, value in settings.items():
        name = _own_name(key, value, family)
        if name is not None and value is not None:
            values[name] = value
    if values.pop("attention_bias", False):
        values |= {"qkv_bias": True, "output_bias": True}
    _derive(values)
    return _checked(model_type, values)


def _own_name(key: str, value: Any, family: Family) -> str | None:
    if key in family.names:
        return family.names[key]
    if key == "model_type" or key in _IGNORED:
        return None
    if key in _NEUTRAL:
        if value in _NEUTRAL[key]:
            return None
        raise ValueError(
            f"model.{key} is {value!r}, which is not supported; leave it out or set it to {_NEUTRAL[key][0]}"
        )
    near = difflib.get_close_matches(key, [*family.names, *_IGNORED], 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(family.names))}"
    raise ValueError(f"model.{key} is not a known key; {hint}")


def _derive(values: dict[str, Any]) -> None:
    """Fill what follows from other numbers."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if name not in values:
            raise ValueError(f"model.{name} is missing; give it a whole number")
        if isinstance(values[name], bool) or not isinstance(values[name], int):
            raise ValueError(f"model.{name} is {values[name]!r}; give it a whole number")
    if not values.get("gated", True):
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
    if "intermediate_size" not in values:
        raise ValueError("model.intermediate_size is missing; give it a whole number")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if "head_dim" not in values:
        if values["num_attention_heads"] < 1 or values["hidden_size"] % values["num_attention_heads"]:
            raise ValueError(
                f"model.hidden_size {values['hidden_size']} does not divide into {values['num_attention_heads']} "
                "attention heads; change one of them or set model.head_dim"
            )
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    activation = values.get("activation", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"the model's activation is {activation!r}; choose one of {', '.join(sorted(_ACTIVATIONS))}")
    values["activation"] = _ACTIVATIONS[activation]


def _checked(model_type: str, values: dict[str, Any]) -> ModelConfig:
    for field in fields(ModelConfig):
        if field.name not in values or field.type is str:
            continue
        value = values[field.name]
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"model.{field.name} is {value!r}; choose true or false")
        if field.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"model.{field.name} is {value!r}; give it a whole number of at least 1")
        if field.type is float and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ValueError(f"model.{field.name} is {value!r}; give it a number of at least 0")
        if field.name.endswith("dropout") and value >= 1:
            raise ValueError(f"model.{field.name} is {value!r}; choose a number from 0 up to, not including, 1")
    config = ModelConfig(model_type=model_type, **values)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"model: {config.num_attention_heads} attention heads do not divide over "
            f"{config.num_key_value_heads} key-value heads; change one of them"
        )
    if config.positions == "rotary" and config.head_dim % 2:
        raise ValueError(f"model.head_dim is {config.head_dim}; rotary positions need an even number")
    return config


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """Check that `ranks` tensor ranks can share the model; its vocabulary always can, padded.

    Raises:
        ValueError: names the number, the rule and the choices.
    """
    check_heads(config.num_attention_heads, config.num_key_value_heads, ranks)
    check_features("model.intermediate_size", config.intermediate_size, ranks)
