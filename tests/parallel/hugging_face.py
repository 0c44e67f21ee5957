"""Tiny Hugging Face models with random weights, for the tests that split them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

VOCABULARY = 97  # divides over no number of ranks
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
ENCODER_DECODER = {
    **SPECIAL,
    **NO_DROPOUT,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}

# name: (prefix of the classes, keyword arguments of the config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **HEADS, **SPECIAL}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **HEADS, **SPECIAL, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, **HEADS, **SPECIAL, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, **HEADS, **SPECIAL}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **HEADS, **SPECIAL, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, **HEADS, **SPECIAL, "head_dim": 8, "sliding_window": 4}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**SIZES, **HEADS, **SPECIAL, "head_dim": 8, "sliding_window": 4},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**SIZES, **HEADS, **SPECIAL, "resid_pdrop": 0.0}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**SIZES, **SPECIAL, "num_attention_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**SIZES, **HEADS, **SPECIAL}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **SPECIAL,
            **NO_DROPOUT,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**ENCODER_DECODER, "scale_embedding": True}),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            **SIZES,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}

DECODERS = [name for name in MODELS if name not in ("t5", "bart", "bert")]


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """The model of that name, its weights random (biases and norms too) and equal on every rank."""
    import transformers

    logging.disable(logging.WARNING)
    model_class, config_class, arguments = MODELS[name]
    model: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments | changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.copy_(noise + (1.0 if parameter.dim() == 1 else 0.0))
    return model.to(dtype)


def batch(name: str) -> dict[str, Tensor]:
    """Tokens with padding at the end of one row, and labels."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    if name in ("t5", "bart"):
        labels = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


@contextmanager
def exact(dtype: torch.dtype) -> Iterator[None]:
    """Some models compute norms in float32 whatever their precision; in float64, let these be float64 too."""
    if dtype != torch.float64:
        yield
        return
    convert = Tensor.to

    def to(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return convert(x, *(dtype if wanted is torch.float32 else wanted for wanted in arguments), **keywords)

    with mock.patch.object(Tensor, "float", Tensor.double), mock.patch.object(Tensor, "to", to):
        yield


def run(model: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and loss of one forward and backward."""
    output = model(**inputs, use_cache=False) if "labels" in inputs else model(**inputs)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach()
