"""Attention that others wrote, when its projections are split: whole heads per rank, and attributes that say so."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.parallel.tensor.divide import check_heads

HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_head")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
FEATURES = ("embed_dim", "all_head_size", "inner_dim", "split_size", "hidden_size", "n_embd", "attn_hidden_size")
GROUPS = ("num_key_value_groups", "num_kv_groups", "n_rep")


class Heads:
    """The heads of one attention module, and how `ranks` ranks share them.

    Key-value heads that are fewer than ranks are replicated on neighbouring ranks.
    """

    def __init__(self, size: int, query: int, key_value: int, ranks: int) -> None:
        check_heads(query, key_value, ranks)
        self.size, self.query, self.key_value, self.ranks = size, query, key_value, ranks

    def replicas(self, features: int) -> int:
        """How many ranks hold the same shard of a projection onto that many features."""
        heads = features // self.size
        return self.ranks // heads if heads == self.key_value < self.ranks else 1

    def localise(self, attention: nn.Module) -> None:
        """Make the attributes that count heads and their features count this rank's."""
        query = self.query // self.ranks
        key_value = max(1, self.key_value // self.ranks)
        for names, full, local in (
            (HEADS, self.query, query),
            (KEY_VALUE_HEADS, self.key_value, key_value),
            (FEATURES, self.query * self.size, query * self.size),
            (GROUPS, self.query // self.key_value, query // key_value),
        ):
            for name in names:
                if vars(attention).get(name) == full:
                    setattr(attention, name, local)


def find_heads(attention: nn.Module, columns: Mapping[str, int], ranks: int) -> Heads | None:
    """The heads of a module whose projections `columns` (name and output features) are split; None: no attention.

    Known by an attribute that gives the size of a head (`head_dim`, …); the number of heads is another attribute
    (`num_heads`, …), that of the model's config, or what the widest projection holds.

    Raises:
        ValueError: the heads do not divide over the ranks.
    """
    size = _first(attention, HEAD_SIZE)
    heads = _first(attention, HEADS) or _first(getattr(attention, "config", None), HEADS)
    widest = max(columns.values())
    if size is None and heads is not None and _first(attention, HEADS) is not None and widest % heads == 0:
        size = widest // heads
    if size is None or any(features % size for features in columns.values()):
        return None
    heads = heads or widest // size
    return Heads(size, heads, min(heads, *(features // size for features in columns.values())), ranks)


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
