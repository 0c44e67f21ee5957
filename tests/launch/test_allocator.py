"""A step of training on CPUs works in the memory that the step before has freed."""

import ctypes
import os
import platform
import resource
import statistics
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.pool import Pool
from weft.launch.allocator import keep_freed_memory
from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh

MODEL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
STEPS = 8


def fresh_pages() -> list[int]:
    """That the kernel had to find for each of some steps; a step uses 1,500 for logits and their gradient alone."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    content = {"name": "pages", "model": MODEL, "batch": {"global_size": 4, "micro_size": 4}}
    settings = build_settings(content | {"parallel": {"data": 1}})
    engine = Engine(model_config(settings.model), settings, build_mesh())
    tokens = torch.randint(4096, (4, 128))
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for step in range(STEPS):
        engine.step(step, tokens, tokens)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own allocators")
def test_later_steps_need_no_fresh_pages(pool: Pool) -> None:
    (found,) = pool.run(1, fresh_pages)
    assert statistics.median(found[STEPS // 2 :]) < 100, found


def test_who_has_tuned_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str | None) -> None:
        raise AssertionError("the C library was asked")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    keep_freed_memory()
