"""Training on one GPU beside a plain loop of transformers and torch: tokens per second, and share of the card's rate.

    python benchmarks/gpu.py                        # both models on the GPU, medians of 10 steps
    python benchmarks/gpu.py --models 1.3b --recompute full
    python benchmarks/gpu.py --compile              # weft with and without train.compile, beside transformers
    python benchmarks/gpu.py --tiny --steps 2       # a small model on the CPU: that everything runs, no figures to keep

1.3b         24 layers of hidden 2,048, vocabulary 32,000
8b-shaped    8 of the 32 layers of an 8 B Llama, hidden 4,096, vocabulary 128,256

A step is four microbatches of one sequence of 4,096 tokens in bfloat16, clipping and a fused AdamW on float32 weights;
transformers computes under autocast. Contenders run one after the other, each with the whole card to itself. MFU is by
the rate that a product of large square matrices reaches on the same card in the same run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from weft.launch.engine import Engine
from weft.launch.flops import flops_per_token
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
MODELS: dict[str, dict[str, Any]] = {
    "1.3b": LLAMA
    | HEADS
    | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24},
    "8b-shaped": LLAMA
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "hidden_size": 4096}
    | {"intermediate_size": 14336, "num_hidden_layers": 8},
}
TINY = LLAMA | HEADS | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
MICROBATCHES, RATE, CLIP, WARMUP = 4, 1e-4, 1.0, 3
Step = Callable[[], float]


def weft_steps(
    model: dict[str, Any], tokens: torch.Tensor, recompute: str, device: torch.device, *, compiled: bool = False
) -> Step:
    """weft's engine on one rank."""
    length = tokens.shape[1] - 1
    settings = build_settings(
        {
            "name": "gpu",
            "model": model | {"max_position_embeddings": length},
            "parallel": {"data": 1, "recompute": recompute},
            "batch": {"global_size": MICROBATCHES, "micro_size": 1},
            "train": {
                "precision": "bf16",
                "compile": compiled,
                "optimizer": {"learning_rate": RATE, "clip_grad_norm": CLIP},
                "schedule": {"warmup_steps": 0, "decay": "constant", "minimum_learning_rate": 0.0},
            },
            "corpus": {"sequence_length": length},
        }
    )
    engine = Engine(model_config(settings.model), settings, build_mesh(device_type=device.type))
    return lambda: engine.step(0, tokens[:, :-1], tokens[:, 1:]).loss


def transformers_steps(model: dict[str, Any], tokens: torch.Tensor, recompute: str, device: torch.device) -> Step:
    """The plain loop, of what is usual with a model of transformers on one device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: value for key, value in model.items() if key != "model_type"}
    config = LlamaConfig(**sizes, max_position_embeddings=tokens.shape[1] - 1, attn_implementation="sdpa")
    with device:
        net = LlamaForCausalLM(config)
    net.train()
    if recompute == "full":
        net.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for row in tokens.split(1):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = net(row[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), row[:, 1:].flatten()) / MICROBATCHES
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return float(total)

    return step


CONTENDERS = {
    "weft": weft_steps,
    "weft compiled": partial(weft_steps, compiled=True),
    "transformers": transformers_steps,
}


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, to the end of its work on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(size: int, device: torch.device) -> float:
    """FLOP/s of a product of two bfloat16 matrices `[size, size]`: the best of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    timed(lambda: left @ right, device)
    return 2 * size**3 / min(timed(lambda: left @ right, device) for _ in range(10))


def compare(name: str, model: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Run the contenders; print a line for each."""
    length = 64 if arguments.tiny else 4096
    config = model_config(model | {"max_position_embeddings": length})
    multiplied = config.parameters - config.vocab_size * config.hidden_size
    each = flops_per_token(
        parameters=multiplied, layers=config.num_hidden_layers, hidden_size=config.hidden_size, sequence_length=length
    )
    rate = matrix_rate(256 if arguments.tiny else 8192, device)
    print(f"{name}: {config.parameters:,} parameters; the device multiplies matrices at {rate / 1e12:.4g} TFLOP/s")
    print(
        f"FLOPs per token = 6·N + 12·L·h·s = 6·{multiplied} + 12·{config.num_hidden_layers}·{config.hidden_size}·"
        f"{length} = {each:.6g}; MFU = tokens/s · FLOPs per token / rate"
    )
    tokens = torch.randint(config.vocab_size, (MICROBATCHES, length + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    for who, build in CONTENDERS.items():
        if who == "weft compiled" and not arguments.compile:
            continue
        measured = measure(build(model, tokens, arguments.recompute, device), arguments.steps, device)
        print(f"  {who:<14}{line(measured, MICROBATCHES * length, each / rate)}", flush=True)
        gc.collect()


class Measured(NamedTuple):
    """Seconds of the steps that count, the losses of all, and the most bytes on the GPU."""

    seconds: list[float]
    losses: list[float]
    peak: int | None


def measure(step: Step, steps: int, device: torch.device) -> Measured:
    """Warm up, then time so many steps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    seconds = [timed(lambda: losses.append(step()), device) for _ in range(WARMUP + steps)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Measured(seconds[WARMUP:], losses, peak)


def line(measured: Measured, tokens: int, share_of_one: float) -> str:
    """What a contender did; `share_of_one`: of the card's rate that one token per second takes."""
    times, losses = measured.seconds, measured.losses
    speed = tokens / statistics.median(times)
    peak = "-" if measured.peak is None else f"{measured.peak / 1e9:.1f} GB"
    return (
        f"{speed:>12.1f} tokens/s   MFU {speed * share_of_one:>9.4g}   steps of {1e3 * min(times):.1f} … "
        f"{1e3 * max(times):.1f} ms   peak {peak}   loss {losses[0]:.3f} … {losses[-1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--compile", action="store_true", help="time weft with train.compile too")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --tiny runs a small model on the CPU")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    dist.init_process_group("gloo" if arguments.tiny else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, model in (
            {"tiny": TINY} if arguments.tiny else {name: MODELS[name] for name in arguments.models}
        ).items():
            compare(name, model, arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
