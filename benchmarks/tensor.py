"""weft's tensor parallelism beside torch's DTensor on the same block, and the memory of the chunked loss.

    python benchmarks/tensor.py                  # five interleaved rounds on two ranks, medians
    python benchmarks/tensor.py --rounds 1

Two processes over gloo, one thread each. CPU time of the thread that runs the model, per block, forward and backward:
what other processes do on the machine, and gloo's own threads, count little. The block is a Llama's: RMSNorm,
grouped-query attention, gated MLP. "layers" is weft's own block, with the norms' gradients summed once per step under
sequence parallelism as weft's trainer does; "parallelize" is the plain block that `parallelize` splits.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from weft.model.config import model_config
from weft.model.decoder import Block as WeftBlock
from weft.parallel import (
    build_mesh,
    count_traffic,
    defer_partial_gradients,
    linear_cross_entropy,
    parallelize,
    reduce_partial_gradients,
)

RANKS = 2


class Size(NamedTuple):
    """What is computed; `blocks` one after the other."""

    hidden: int
    tokens: int
    blocks: int
    steps: int  # per timed round

    @property
    def heads(self) -> int:
        return max(4, self.hidden // 64)


SIZES = (Size(hidden=512, tokens=512, blocks=1, steps=8), Size(hidden=64, tokens=64, blocks=8, steps=10))


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.hidden // size.heads
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.hidden // 2, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.hidden // 2, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, 2 * size.hidden, bias=False)
        self.up_proj = nn.Linear(size.hidden, 2 * size.hidden, bias=False)
        self.down_proj = nn.Linear(2 * size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class PlainBlock(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(size.hidden), Attention(size)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(size.hidden), MLP(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class OwnBlock(WeftBlock):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, rotary=None)


COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def with_dtensor(block: nn.Module, mesh: DeviceMesh, sequence_parallel: bool) -> nn.Module:
    """torch's plan for a Llama block."""
    output = {"output_layouts": Shard(1)} if sequence_parallel else {}
    plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS}
    plan |= {name: RowwiseParallel(**output) for name in ROWS}
    if sequence_parallel:
        gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        plan |= {name: SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        plan |= {name: PrepareModuleInput(**gathered) for name in ("self_attn", "mlp")}
    return parallelize_module(block, mesh, plan)


def own_block(size: Size, mesh: DeviceMesh, sequence_parallel: bool) -> nn.Module:
    config = model_config(
        {
            "model_type": "llama",
            "vocab_size": 16,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads // 2,
            "max_position_embeddings": size.tokens,
        }
    )
    return OwnBlock(config, 0, mesh=mesh, sequence_parallel=sequence_parallel)


def contestants(size: Size, mesh: DeviceMesh, sequence_parallel: bool) -> dict[str, nn.Module]:
    """The same blocks, split in each way."""
    torch.manual_seed(0)
    plain = [PlainBlock(size) for _ in range(size.blocks)]
    result = {"DTensor": [with_dtensor(copy.deepcopy(block), mesh, sequence_parallel) for block in plain]}
    result["layers"] = [own_block(size, mesh, sequence_parallel) for _ in plain]
    for block in result["layers"]:
        defer_partial_gradients(block)
    if not sequence_parallel:
        plan = dict.fromkeys(COLUMNS, "column") | dict.fromkeys(ROWS, "row")
        result["parallelize"] = [parallelize(copy.deepcopy(block), plan, mesh) for block in plain]
    return {name: nn.Sequential(*blocks) for name, blocks in result.items()}


def cpu_time(model: nn.Module, x: Tensor, size: Size) -> float:
    """Seconds of this thread per block."""
    dist.barrier()
    start = time.thread_time()
    for _ in range(size.steps):
        step(model, x)
    return (time.thread_time() - start) / (size.steps * size.blocks)


def step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()
    reduce_partial_gradients(model)
    model.zero_grad()


def measure(rounds: int) -> list[tuple[Any, ...]]:
    """Rows of size, sequence parallelism, contestant, median CPU time, messages per block."""
    torch.set_num_threads(1)
    mesh = build_mesh(tensor=RANKS)["tensor"]
    rows = []
    for size in SIZES:
        for sequence_parallel in (False, True):
            models = contestants(size, mesh, sequence_parallel)
            x = torch.randn(1, size.tokens // (RANKS if sequence_parallel else 1), size.hidden, requires_grad=True)
            times: dict[str, list[float]] = {name: [] for name in models}
            for index in range(rounds + 1):
                for name, model in models.items():
                    seconds = cpu_time(model, x, size)
                    times[name] += [seconds] if index else []  # the first round warms up
            for name, model in models.items():
                with count_traffic() as traffic:
                    step(model, x)
                rows.append(
                    (
                        size.hidden,
                        size.tokens,
                        sequence_parallel,
                        name,
                        statistics.median(times[name]),
                        traffic.messages / size.blocks,
                        traffic.bytes / size.blocks,
                    )
                )
    dist.destroy_process_group()
    return rows


def print_blocks(rows: list[tuple[Any, ...]]) -> None:
    print(
        f"{'hidden':>6} {'tokens':>6} {'sequence':>8} {'':<12}{'CPU ms':>8} {'× DTensor':>10} {'messages':>9} {'KB':>8}"
    )
    reference = {row[:3]: row[4] for row in rows if row[3] == "DTensor"}
    for hidden, tokens, sequence_parallel, name, seconds, messages, sent in rows:
        ratio = seconds / reference[hidden, tokens, sequence_parallel]
        split = "split" if sequence_parallel else "whole"
        line = f"{hidden:6} {tokens:6} {split:>8} {name:<12}{seconds * 1e3:8.2f} {ratio:10.2f}"
        # DTensor communicates by operations of its own, which are not counted
        print(line if name == "DTensor" else f"{line} {messages:9.1f} {sent / 1024:8.0f}")


VOCABULARY, HIDDEN, TOKENS = 131_072, 256, 2048


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def chunked_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, mesh=build_mesh()["tensor"])


def peak_memory(loss: Callable[..., Tensor], results: Any) -> None:
    """Peak bytes above x and weight, and CPU seconds, in a fresh process."""
    torch.set_num_threads(1)
    x, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    loss(x[:2], weight[:64], targets[:2] % 64).backward()  # libraries and threads are there before
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loss(x, weight, targets).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put(((after - before) * 1024, time.process_time() - start))


def print_losses() -> None:
    context, results = get_context("spawn"), {}
    for name, loss in (("plain", plain_loss), ("chunked", chunked_loss)):
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(loss, queue))
        process.start()
        results[name] = queue.get()
        process.join()
    print(f"\nlinear and cross-entropy, vocabulary {VOCABULARY}, hidden {HIDDEN}, {TOKENS} tokens, float32")
    for name, (memory, seconds) in results.items():
        ratio = memory / results["plain"][0]
        print(f"{name:<12}peak {memory / 2**20:7.0f} MiB {ratio:5.2f} × plain, CPU {seconds:6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each contestant")
    rounds = parser.parse_args().rounds
    print_blocks(on_ranks(RANKS, measure, rounds)[0])
    print_losses()


if __name__ == "__main__":
    main()
