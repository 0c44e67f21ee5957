"""weft's own engine with one mistake each, made where several ranks share the work; one process is right."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.verify.config_model import ConfigModel, EngineRun
from weft.launch.verify.layout import Layout


class ForgetsData(ConfigModel):
    """Does not sum gradients over the data axis."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        replicas = run.engine.updates.replicas
        replicas.before_last_backward = lambda stage: None  # type: ignore[method-assign]
        replicas.finish = lambda: None  # type: ignore[method-assign]
        return run


class ForgetsTied(ConfigModel):
    """Does not sum the gradients of the embedding and of the head that is tied to it."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        run.engine.executor.reduce_shared_gradients = lambda gradients=None: None  # type: ignore[method-assign]
        return run


class ForgetsPartial(ConfigModel):
    """Does not sum the gradients of norms under sequence parallelism."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        for piece in run.engine.updates.replicas.pieces:
            if piece.sharding is not None:
                object.__setattr__(piece, "sharding", replace(piece.sharding, partial_gradient=False))
        return run


class LosesLayer(ConfigModel):
    """Drops the last layer where there are stages."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        layers: Any = run.modules[-1].get_submodule("layers")
        if mesh["pipeline"].size() > 1 and "1" in layers:
            del layers["1"]
        return run


class AddsUpWrongly(ConfigModel):
    """Counts the loss of every microbatch but an only one twice, on tensor ranks."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        engine = run.engine
        if mesh["tensor"].size() > 1 and engine.microbatches > 1:
            right = engine.executor._loss_function

            def twice(logits: Any, targets: Any) -> Tensor:
                return 2 * right(logits, targets)

            engine.executor._loss_function = twice
        return run


class LosesRange(ConfigModel):
    """The second data rank takes its part of every gradient for zero, where data ranks divide them."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        replicas = run.engine.updates.replicas
        if layout.zero and mesh["data"].get_local_rank() == 1:
            right = replicas.gradient
            replicas.gradient = lambda piece: right(piece).zero_()  # type: ignore[method-assign]
        return run


class UpdatesHalf(ConfigModel):
    """The second data rank does not update what it alone updates under ZeRO."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> EngineRun:
        run = super().build(layout, mesh, dtype, **options)
        if layout.zero and mesh["data"].get_local_rank() == 1:
            run.engine.optimizer.step = lambda *_: None  # type: ignore[method-assign,assignment]
        return run
