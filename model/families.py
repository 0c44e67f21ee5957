"""The model families: how a config's keys are named, what holds where one is absent, and where its weights are stored.

A family is data. What one block has that another lacks (kind and place of norms, biases, gating, windows, rotary
positions) is a number of `ModelConfig`; here stands what a Hugging Face config leaves unsaid. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.model.weight_names import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, OLMO2, PHI3, T5, Stored


@dataclass(frozen=True)
class Windows:
    """Which layers attend to a window only.

    Attributes:
        default: the window where the config names none; None: no window.
        switched: the window holds only where `use_sliding_window` says so, from layer `max_window_layers` on.
        pattern: every layer has one, but each `pattern`-th; 0: all have.
    """

    default: int | None = None
    switched: bool = False
    pattern: int = 0


@dataclass(frozen=True)
class Family:
    """How the configs of a model type are read, and how its files name the weights.

    Attributes:
        names: own names, by Hugging Face's; several own names of one key are separated by spaces.
        defaults: what holds where a key is absent.
        weights: where the weights of each module are stored, by the module's own name.
        architecture: the class that transformers reads them with.
        rotary_fraction, local_theta: rotated share of a head, and the base in layers with a window (None: the same).
        neutral: keys that change the computation in a way not covered, with the values that leave it as it is.
        ignored: keys of this family that say nothing about the computation.
        encoder_decoder: an encoder and a decoder that attends to what it gives.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    weights: Mapping[str, Stored]
    architecture: str
    windows: Windows | None = None
    rotary_fraction: float = 1.0
    local_theta: float | None = None
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    encoder_decoder: bool = False


_COMMON_NAMES = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
        "attention_dropout",
    )
}
_LLAMA_NAMES = _COMMON_NAMES | {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
_BIASED = {"attention_bias": "qkv_bias output_bias"}
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
_GPT2_NEUTRAL = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
_GPT_NEOX_NAMES = _COMMON_NAMES | {
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "hidden_dropout": "embedding_dropout residual_dropout",
    "use_parallel_residual": "parallel_residual",
}
_GPT_NEOX_DEFAULTS = {
    "max_position_embeddings": 2048,
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "parallel_residual": True,
}
_GEMMA3_NAMES = {key: name for key, name in _LLAMA_NAMES.items() if key != "hidden_act"} | {
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_scalar",
}
_GEMMA3_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_scalar": 256,
    "norm_offset": 1.0,
    "norm_after": "branch",
    "qk_norm": "head",
    "activation": "gelu_pytorch_tanh",
    "scaled_embedding": True,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
}
_GEMMA3_NEUTRAL = {
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}

_BERT_NAMES = {
    key: name for key, name in _COMMON_NAMES.items() if key not in ("attention_dropout", "tie_word_embeddings")
} | {
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "hidden_dropout_prob": "embedding_dropout residual_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "type_vocab_size": "token_types",
    "mask_token_id": "mask_token",
}
_BERT_DEFAULTS = {
    "max_position_embeddings": 512,
    "norm": "layer",
    "norm_eps": 1e-12,
    "norm_before": False,
    "norm_after": "sum",
    "final_norm": False,
    "normed_embedding": True,
    "causal": False,
    "activation": "gelu",
    "gated": False,
    "positions": "learned",
    "token_types": 2,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "transformed_head": True,
    "head_bias": True,
    "tie_word_embeddings": True,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
}
_BERT_NEUTRAL = {
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
}
_T5_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "d_ff": "intermediate_size",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "num_attention_heads",
    "relative_attention_num_buckets": "relative_buckets",
    "relative_attention_max_distance": "relative_distance",
    "dropout_rate": "embedding_dropout attention_dropout residual_dropout mlp_dropout",
    "layer_norm_epsilon": "norm_eps",
    "feed_forward_proj": "feed_forward",
    "tie_word_embeddings": "tie_word_embeddings",
    "scale_decoder_outputs": "logits_scaled",
    "decoder_start_token_id": "start_token",
}
_T5_DEFAULTS = {
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
    "positions": "relative",
    "attention_scale": 1.0,
    "tie_word_embeddings": True,
    "start_token": 0,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "mlp_dropout": 0.1,
}
_T5_IGNORED = {"classifier_dropout", "dense_act_fn", "is_gated_act", "initializer_factor", "n_positions"}

FAMILIES = {
    "llama": Family(
        _LLAMA_NAMES | _BIASED | {"mlp_bias": "mlp_bias"}, {"max_position_embeddings": 2048}, LLAMA, "LlamaForCausalLM"
    ),
    "mistral": Family(
        _LLAMA_NAMES,
        {"max_position_embeddings": 131072, "num_key_value_heads": 8},
        LLAMA,
        "MistralForCausalLM",
        Windows(4096),
    ),
    "qwen2": Family(
        _LLAMA_NAMES,
        {"max_position_embeddings": 32768, "qkv_bias": True},
        LLAMA,
        "Qwen2ForCausalLM",
        Windows(4096, switched=True),
    ),
    "qwen3": Family(
        _LLAMA_NAMES | _BIASED,
        {"max_position_embeddings": 32768, "head_dim": 128, "qk_norm": "head"},
        LLAMA,
        "Qwen3ForCausalLM",
        Windows(4096, switched=True),
    ),
    "gemma3_text": Family(
        _GEMMA3_NAMES | _BIASED,
        _GEMMA3_DEFAULTS,
        GEMMA3,
        "Gemma3ForCausalLM",
        Windows(4096, pattern=6),
        local_theta=10000.0,
        neutral=_GEMMA3_NEUTRAL,
    ),
    "phi3": Family(
        _LLAMA_NAMES | {"resid_pdrop": "residual_dropout"},
        {"max_position_embeddings": 4096, "norm_eps": 1e-5},
        PHI3,
        "Phi3ForCausalLM",
        Windows(),
        ignored=frozenset({"embd_pdrop"}),
    ),
    "olmo2": Family(
        _LLAMA_NAMES | _BIASED,
        {
            "max_position_embeddings": 2048,
            "norm_eps": 1e-5,
            "norm_before": False,
            "norm_after": "branch",
            "qk_norm": "projection",
        },
        OLMO2,
        "Olmo2ForCausalLM",
    ),
    "gpt2": Family(_GPT2_NAMES, _GPT2_DEFAULTS, GPT2, "GPT2LMHeadModel", neutral=_GPT2_NEUTRAL),
    "gpt_neox": Family(
        _GPT_NEOX_NAMES | _BIASED,
        _GPT_NEOX_DEFAULTS,
        GPT_NEOX,
        "GPTNeoXForCausalLM",
        rotary_fraction=0.25,
        neutral={"is_decoder": (False,)},
        ignored=frozenset({"classifier_dropout"}),
    ),
    "bert": Family(
        _BERT_NAMES,
        _BERT_DEFAULTS,
        BERT,
        "BertForMaskedLM",
        neutral=_BERT_NEUTRAL,
        ignored=frozenset({"classifier_dropout", "gradient_checkpointing"}),
    ),
    "t5": Family(
        _T5_NAMES,
        _T5_DEFAULTS,
        T5,
        "T5ForConditionalGeneration",
        neutral={"is_decoder": (False,)},
        ignored=frozenset(_T5_IGNORED),
        encoder_decoder=True,
    ),
}
