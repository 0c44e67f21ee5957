"""A GPT-2-style decoder in one process, with torch.nn only: what the parallel one is measured against.

Radford et al. 2019; names of settings are Hugging Face's, either GPT-2's own or the common ones. There is no dropout.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.plain.attention import attend

COMMON_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}


class GPT2(nn.Module):
    """Logits `[batch, sequence, vocabulary]` from tokens `[batch, sequence]`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        config = {COMMON_NAMES.get(name, name): value for name, value in config.items()}
        hidden_size, epsilon = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden_size)
        self.embed_positions = nn.Embedding(config["max_position_embeddings"], hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.LayerNorm(hidden_size, eps=epsilon)
        if not config.get("tie_word_embeddings", True):
            self.lm_head = nn.Linear(hidden_size, config["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens) + self.embed_positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden)
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens
        return self.norm(hidden) @ head.weight.t()


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden_size, epsilon = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.self_attn = Attention(hidden_size, config["num_attention_heads"])
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.mlp = MLP(hidden_size, config.get("intermediate_size") or 4 * hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden), approximate="tanh"))
