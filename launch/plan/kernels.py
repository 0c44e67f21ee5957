"""Seconds of what one device computes: matrix products, fused attention, and kernels that only read and write.

A matrix product takes the longer of its arithmetic at the share of the peak that large products reach and of its bytes
at the memory's rate, and a kernel's latency on top (the roofline of Williams et al. 2009). Against the 697 products
measured on an A100 and a B200 that SimuMax publishes this is off by 5 % and 13 % on average.

Widths that matrix units cannot load whole are slower, and so are small results: they are computed in tiles, one on each
multiprocessor at a time, and the last round of tiles leaves half of the multiprocessors idle on average ("wave
quantization"; NVIDIA, Matrix Multiplication Background User's Guide, §2.1 and §3).
"""

from dataclasses import dataclass

from weft.launch.plan.cluster import Cluster

ALIGNED_FEATURES = 64  # elements: 128 bytes in half precision, below which matrix units load part of a line
UNALIGNED_RATE = 0.75
UNIT_FEATURES = 8  # elements that a matrix unit of half precision takes at a time; else the plain units compute
PLAIN_UNITS_RATE = 0.125
TILE = 128 * 128  # elements of a result that a multiprocessor computes at a time
IDLE_ROUNDS = 0.5  # rounds of tiles lost at the end of a product


@dataclass(frozen=True)
class ProductTime:
    """Seconds of a linear layer's matrix products: of its result, its input's gradient and its weight's."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0

    def __add__(self, other: "ProductTime") -> "ProductTime":
        return ProductTime(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )

    def __rmul__(self, times: float) -> "ProductTime":
        return ProductTime(times * self.forward, times * self.input_gradient, times * self.weight_gradient)


def product_time(
    cluster: Cluster, precision: str, tokens: float, inputs: float, outputs: float, element: int
) -> ProductTime:
    """Of a weight `[outputs, inputs]` on `[tokens, inputs]`, elements of `element` bytes."""
    arithmetic = 2.0 * tokens * inputs * outputs / (cluster.peak(precision) * cluster.gemm_efficiency)
    if element <= 2 and (inputs % ALIGNED_FEATURES or outputs % ALIGNED_FEATURES):
        arithmetic /= UNALIGNED_RATE
    traffic = element * (tokens * inputs + inputs * outputs + tokens * outputs) / (cluster.memory_bandwidth * 1e9)

    def seconds(result: float) -> float:
        idle = IDLE_ROUNDS * TILE * (cluster.multiprocessors or 0) / result
        return max(arithmetic * (1 + idle), traffic) + cluster.kernel_latency * 1e-6

    return ProductTime(seconds(tokens * outputs), seconds(tokens * inputs), seconds(inputs * outputs))


def attention_seconds(cluster: Cluster, precision: str, flops: float) -> float:
    """One fused attention kernel (Dao et al. 2022, arXiv:2205.14135), which computes in half precision at least."""
    precision = "bf16" if precision.startswith(("fp8", "fp4")) else precision
    return flops / (cluster.peak(precision) * cluster.attention_efficiency) + cluster.kernel_latency * 1e-6


def plain_seconds(cluster: Cluster, traffic: float, kernels: int = 1) -> float:
    """Kernels that read and write `traffic` bytes in all."""
    return traffic / cluster.memory_rate + kernels * cluster.kernel_latency * 1e-6
