"""Chains compiled as one kernel give what they give uncompiled; tests/test_layout_matrix.py trains with them."""

import pytest
import torch
from torch import Tensor

from tests.parallel.comparison import close
from weft.parallel import Dropout, DropoutKey, track_memory
from weft.parallel import fused as fused_file
from weft.parallel.fused import Fusing, fuse_chains

KEY = DropoutKey(1, torch.arange(7, 10))


def outcome(dropout: Dropout) -> tuple[Tensor, Tensor]:
    """The result for the second of two shards, and its gradient."""
    x = torch.linspace(1, 3, 3 * 4 * 40).view(3, 4, 40).requires_grad_()
    result: Tensor = dropout(x, KEY, offset=40, dim=2, full_size=80)
    return result, *torch.autograd.grad(result.square().sum(), x)


def test_the_same_elements_are_dropped() -> None:
    """The hash multiplies until int32 overflows, which compiled code must do alike."""
    dropout = Dropout(0.3, "layers.0.mlp")
    expected = outcome(dropout)
    fuse_chains(dropout)
    with track_memory():  # as in the first step of a run
        outcome(dropout)
    compiled_before = torch._dynamo.utils.counters["frames"]["ok"]
    seen = outcome(dropout)
    assert torch._dynamo.utils.counters["frames"]["ok"] == compiled_before + 1
    assert 0.2 < float((expected[0] == 0).float().mean()) < 0.4
    for one, other in zip(seen, expected, strict=True):
        assert torch.equal(one == 0, other == 0)
        close(one, other, "dropped")


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_chains_are_compiled_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_file, "_compiled", lambda chain: lambda x: chain(x) + 1)
    module, x = Fusing(), torch.ones(2)
    assert module.fused(double, x).tolist() == [2, 2]
    fuse_chains(module)
    assert module.fused(double, x).tolist() == [3, 3]
    with torch.no_grad():
        assert module.fused(double, x).tolist() == [2, 2]
