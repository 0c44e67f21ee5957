"""A model as numbers: Hugging Face's config names read into one description that all families share.

What one block has that another lacks (norm kind and place, biases, gating, positions) is a number here, not a class;
`weft.model.families` says what the configs of each family leave unsaid.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from weft.model.config_values import checked, layers, mapping, number, shortened, shown, whole
from weft.model.families import FAMILIES, Family, Windows
from weft.model.rotary_config import Rotary, read_rotary
from weft.parallel.tensor.divide import check_features, check_heads


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer.

    Attributes:
        norm_offset: what is added to the stored weights of the norms.
        norm_before: attention and MLP take the normed residual stream.
        norm_after: "branch" norms what attention and MLP return, "sum" the residual stream after it was added.
        local_rotary: the rotary positions of the layers with a window; None: the same as of the others.
        sliding_window: how many positions the `sliding_layers` attend to, their own among them.
        attention_scale: of the scores; None: `1 / sqrt(head_dim)`.
        parallel_residual: attention and MLP both take the block's input.
        causal: positions attend to none after them.
        token_types: how many kinds of tokens have an embedding of their own, the first of which is added.
        transformed_head: the head has a dense layer with activation and norm before it.
        logits_scaled: the last hidden states are divided by `sqrt(hidden_size)`.
        encoder_layers: so many of the layers are an encoder's, whose output the others, a decoder's, attend to.
        relative_buckets, relative_distance: of relative positions (`weft.parallel.RelativePositionBias`).
        start_token: what the decoder behind an encoder begins with.
        mask_token: stands for a token that is to be found, where positions attend to those after them.
    """

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
    norm_offset: float = 0.0
    norm_before: bool = True
    norm_after: Literal["none", "branch", "sum"] = "none"
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated: bool = True
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    rotary: Rotary = field(default_factory=Rotary)
    local_rotary: Rotary | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    qk_norm: Literal["none", "head", "projection"] = "none"
    attention_scale: float | None = None
    parallel_residual: bool = False
    scaled_embedding: bool = False
    normed_embedding: bool = False
    final_norm: bool = True
    causal: bool = True
    token_types: int = 0
    transformed_head: bool = False
    head_bias: bool = False
    logits_scaled: bool = False
    encoder_layers: int = 0
    relative_buckets: int = 32
    relative_distance: int = 128
    start_token: int | None = None
    mask_token: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float = 0.0

    @property
    def kind(self) -> Literal["decoder", "encoder", "encoder-decoder"]:
        """What the model is for: to go on from a text, to look at one whole, or to answer one with another."""
        return "encoder-decoder" if self.encoder_layers else "decoder" if self.causal else "encoder"

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block, cross-attention not among them."""
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        if self.mlp_bias:
            mlp += self.hidden_size + (2 if self.gated else 1) * self.intermediate_size
        norms = 2 * self.norm_before + 2 * (self.norm_after != "none")
        return self.attention_parameters + mlp + norms * self.norm_parameters

    @property
    def attention_parameters(self) -> int:
        """Parameters of one attention."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
        if self.output_bias:
            attention += self.hidden_size
        if self.qk_norm == "head":
            attention += 2 * self.head_dim
        if self.qk_norm == "projection":
            attention += self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return attention

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied embedding counted once."""
        positions = self.max_position_embeddings if self.positions == "learned" else 0
        rows = self.vocab_size * (1 if self.tie_word_embeddings else 2) + positions + self.token_types
        norms = self.final_norm + self.normed_embedding + self.transformed_head
        outside = rows * self.hidden_size + norms * self.norm_parameters + self.vocab_size * self.head_bias
        if self.transformed_head:
            outside += self.hidden_size * (self.hidden_size + 1)
        if self.encoder_layers:
            crossing = self.num_hidden_layers - self.encoder_layers
            outside += crossing * (self.attention_parameters + self.norm_parameters) + self.norm_parameters
            outside += 2 * self.relative_buckets * self.num_attention_heads
        return outside + self.num_hidden_layers * self.layer_parameters

    @property
    def renewed_at(self) -> int | None:
        """The length from which on all positions of a text turn otherwise than in shorter ones; None: there is none."""
        return self.rotary.length + 1 if self.rotary.scaling == "longrope" else None

    @property
    def longest_text(self) -> int:
        """Tokens that a text may have: `dynamic` scaling is for more of them than the model has positions."""
        stretched = self.rotary.factor if self.rotary.scaling == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretched)

    def window(self, layer: int) -> int | None:
        """How many positions that layer attends to; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def rotary_of(self, layer: int) -> Rotary | None:
        """The rotary positions of that layer; None: it has none."""
        if self.positions != "rotary":
            return None
        return self.local_rotary if self.local_rotary and layer in self.sliding_layers else self.rotary


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
# Keys of a Hugging Face config.json that say nothing about the computation; `pretrained` is weft's own
_IGNORED = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "task_specific_params", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "pretraining_tp", "_name_or_path", "pretrained", "auto_map",
    "id2label", "label2id", "problem_type", "tokenizer_class", "output_attentions", "output_hidden_states",
    "return_dict", "use_return_dict", "torchscript", "finetuning_task", "_from_model_config",
    "_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "cache_implementation",
    "unsloth_version", "unsloth_fixed",
    "chunk_size_feed_forward", "prefix", "forced_eos_token_id", "forced_bos_token_id",
}  # fmt: skip
# Keys that change the computation in a way not covered, with the values that leave it as it is
_NEUTRAL: dict[str, tuple[Any, ...]] = {"quantization_config": (None,)}
_MAY_BE_ZERO = {"token_types", "start_token", "mask_token"}
_LAYERS = {"num_hidden_layers", "encoder_layers", "decoder_layers"}
_KINDS: dict[str, Any] = {known.name: known.type for known in fields(ModelConfig)} | {
    "activation": str, "feed_forward": str, "start_token": int, "mask_token": int,
}  # fmt: skip
_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROTARY = "rope_type and rope_theta"
_ROTARY_KEYS = {
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "original_max_position_embeddings", "rope_local_base_freq",
}  # fmt: skip
_WINDOW_KEYS = {
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern",
    "_sliding_window_pattern",
}  # fmt: skip


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Read a mapping of Hugging Face config names, such as a model's own `config.json`.

    Raises:
        ValueError: a key is unknown, missing, of the wrong type or out of range, or its value is not supported.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model.model_type is {shown(model_type)}; known are {', '.join(sorted(FAMILIES))}; "
            "weft.parallel.parallelize() splits models of other types in a script of your own"
        )
    family = FAMILIES[model_type]
    values = dict(family.defaults)
    for key, value in settings.items():
        names = _own_names(key, value, family)
        if value is not None:
            values |= {name: _checked(key, name, value) for name in names}
    if family.encoder_decoder:
        _read_encoder_decoder(values)
    _derive(values)
    _add_positions(values, settings, family)
    _add_windows(values, settings, family)
    return _fitting(ModelConfig(model_type=model_type, **values))


def _own_names(key: Any, value: Any, family: Family) -> list[str]:
    if not isinstance(key, str):
        raise ValueError(f"model.{key!r} is not a known key; keys are words")
    if key in family.names:
        return family.names[key].split()
    if key == "model_type" or key in _IGNORED or key in family.ignored:
        return []
    if key in _ROTARY_KEYS and family.defaults.get("positions") is None:
        return []
    if key in _WINDOW_KEYS and (family.windows is not None or not value):
        return []
    neutral = {**_NEUTRAL, "is_encoder_decoder": (family.encoder_decoder,), **family.neutral}
    if key in neutral:
        if value in neutral[key]:
            return []
        raise ValueError(
            f"model.{key} is {shown(value)}, which is not supported; leave it out or set it to {neutral[key][0]}"
        )
    near = difflib.get_close_matches(key, [*family.names, *_IGNORED, *_ROTARY_KEYS], 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(family.names))}"
    raise ValueError(f"model.{shortened(key)} is not a known key; {hint}")


def _checked(key: str, name: str, value: Any) -> Any:
    """What `key` says of the number `name` of a `ModelConfig`."""
    if name in _LAYERS:
        return layers(key, value)
    if name == "query_scalar":
        return number(key, value, above=0)
    checked(key, value, _KINDS[name], least=name not in _MAY_BE_ZERO)
    if name == "activation" and value not in _ACTIVATIONS:
        raise ValueError(f"model.{key} is {shown(value)}; choose one of {', '.join(sorted(_ACTIVATIONS))}")
    if name.endswith("dropout") and value >= 1:
        raise ValueError(f"model.{key} is {shown(value)}; choose a number from 0 up to, not including, 1")
    return value


def _read_encoder_decoder(values: dict[str, Any]) -> None:
    """What configs of encoder-decoder models say in their own way."""
    encoder_layers = values.setdefault("encoder_layers", 6)
    decoder_layers = values.pop("decoder_layers", encoder_layers)
    values["num_hidden_layers"] = encoder_layers + decoder_layers
    gate, dash, activation = values.pop("feed_forward", "relu").rpartition("-")
    if gate not in ("", "gated") or activation not in _ACTIVATIONS:
        raise ValueError(f"model.feed_forward_proj is '{gate}{dash}{activation}'; choose relu or gated-gelu")
    # T5 says gated-gelu where it means the approximation of GELU by tanh
    values |= {"gated": bool(gate), "activation": "gelu_new" if gate and activation == "gelu" else activation}
    values.setdefault("logits_scaled", values.get("tie_word_embeddings", True))


def _add_positions(values: dict[str, Any], settings: Mapping[str, Any], family: Family) -> None:
    """The rotary positions, from whichever of the keys that were in use over the years the config has."""
    theta = values.pop("rope_theta", 10000.0)
    if values.get("positions", "rotary") != "rotary":
        return
    key = next((name for name in ("rope_parameters", "rope_scaling") if settings.get(name)), "rope_theta")
    given = mapping(key, settings[key], _ROTARY) if key != "rope_theta" else {}
    flat = {
        "rope_theta": _first(settings, "rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": _first(settings, "partial_rotary_factor", "rotary_pct"),
        "original_max_position_embeddings": settings.get("original_max_position_embeddings"),
    }
    fallback = {"theta": theta, "fraction": family.rotary_fraction}
    positions = values["max_position_embeddings"]
    full = mapping(f"{key}.full_attention", given.get("full_attention", given), _ROTARY)
    values["rotary"] = read_rotary(key, flat | _stated(full), positions, **fallback)
    if family.local_theta is not None:
        local = mapping(f"{key}.sliding_attention", given.get("sliding_attention", {}), _ROTARY)
        base = number("rope_local_base_freq", settings.get("rope_local_base_freq") or family.local_theta, above=0)
        values["local_rotary"] = read_rotary(key, _stated(local), positions, **fallback | {"theta": base})


def _first(settings: Mapping[str, Any], *keys: str) -> Any:
    return next((settings[key] for key in keys if settings.get(key) is not None), None)


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _add_windows(values: dict[str, Any], settings: Mapping[str, Any], family: Family) -> None:
    """The window and the layers that have it."""
    windows = family.windows
    if windows is None:
        return
    window = settings.get("sliding_window", windows.default)
    if window is None or (windows.switched and not settings.get("use_sliding_window")):
        return
    values |= {
        "sliding_window": whole("sliding_window", window),
        "sliding_layers": _sliding_layers(range(values["num_hidden_layers"]), settings, windows),
    }


def _sliding_layers(all_layers: range, settings: Mapping[str, Any], windows: Windows) -> tuple[int, ...]:
    types = settings.get("layer_types")
    if types is not None:
        known = sorted(_LAYER_TYPES)
        if not isinstance(types, list) or len(types) != len(all_layers) or any(kind not in known for kind in types):
            raise ValueError(
                f"model.layer_types is {shown(types)}; give one of {' and '.join(known)} for each of the "
                f"{len(all_layers)} layers"
            )
        return tuple(layer for layer in all_layers if types[layer] == "sliding_attention")
    if windows.pattern:
        key = next((name for name in _PATTERN_KEYS if settings.get(name) is not None), None)
        pattern = whole(key, settings[key]) if key else windows.pattern
        return tuple(layer for layer in all_layers if (layer + 1) % pattern)
    first = whole("max_window_layers", settings.get("max_window_layers", 28), least=0) if windows.switched else 0
    return tuple(all_layers[first:])


def _derive(values: dict[str, Any]) -> None:
    """Fill what follows from other numbers."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if name not in values:
            raise ValueError(f"model.{name} is missing; give it a whole number")
    if not values.get("gated", True):
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
    if "intermediate_size" not in values:
        raise ValueError("model.intermediate_size is missing; give it a whole number")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if "head_dim" not in values:
        if values["hidden_size"] % values["num_attention_heads"]:
            raise ValueError(
                f"model.hidden_size {values['hidden_size']} does not divide into {values['num_attention_heads']} "
                "attention heads; change one of them or set model.head_dim"
            )
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values["activation"] = _ACTIVATIONS[values.get("activation", "silu")]
    if "query_scalar" in values:
        values["attention_scale"] = values.pop("query_scalar") ** -0.5


def _fitting(config: ModelConfig) -> ModelConfig:
    """The config, whose numbers go together."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"model: {config.num_attention_heads} attention heads do not divide over "
            f"{config.num_key_value_heads} key-value heads; change one of them"
        )
    if config.positions == "rotary" and (config.rotary.rotated(config.head_dim) % 2 or config.head_dim % 2):
        raise ValueError(f"model.head_dim is {config.head_dim}; rotary positions need an even number")
    return config


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """Check that `ranks` tensor ranks can share the model; its vocabulary always can, padded.

    Raises:
        ValueError: names the number, the rule and the choices.
    """
    check_heads(config.num_attention_heads, config.num_key_value_heads, ranks)
    check_features("model.intermediate_size", config.intermediate_size, ranks)
