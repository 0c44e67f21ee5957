"""A Llama-style decoder in one process, with torch.nn only: what the parallel one is measured against.

Touvron et al. 2023; names of settings and the rotate-half rotary convention are Hugging Face's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.plain.attention import attend


class Llama(nn.Module):
    """Logits `[batch, sequence, vocabulary]` from tokens `[batch, sequence]`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden_size, epsilon = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(hidden_size, eps=epsilon)
        if not config.get("tie_word_embeddings", False):
            self.lm_head = nn.Linear(hidden_size, config["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens
        return self.norm(hidden) @ head.weight.t()


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden_size, epsilon = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=epsilon)
        self.mlp = SwiGLU(hidden_size, config["intermediate_size"])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden_size = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim", hidden_size // self.heads)
        self.theta = config.get("rope_theta", 10000.0)
        self.q_proj = nn.Linear(hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        result = attend(rotate(query, self.theta), rotate(key, self.theta), value)
        return self.o_proj(result.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al. 2021) of `x` `[…, sequence, head_dim]`; dim i turns with dim i + head_dim / 2."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
