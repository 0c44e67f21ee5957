"""Seconds of what one device computes: matrix products, fused attention, and kernels that only read and write.

A matrix product takes the longer of its arithmetic at the share of the peak that large products reach and of its bytes
at the memory's rate, and a kernel's latency on top (the roofline of Williams et al. 2009). Against the 697 products
measured on an A100 and a B200 that SimuMax publishes this is off by 5 % and 10 % on average.

Widths that matrix units cannot load whole are slower (NVIDIA, Matrix Multiplication Background User's Guide).
"""

from weft.launch.plan.cluster import Cluster

ALIGNED_FEATURES = 64  # elements: 128 bytes in half precision, below which matrix units load part of a line
UNALIGNED_RATE = 0.75
UNIT_FEATURES = 8  # elements that a matrix unit of half precision takes at a time; else the plain units compute
PLAIN_UNITS_RATE = 0.125


def gemm_seconds(cluster: Cluster, precision: str, m: float, k: float, n: float, element: int) -> float:
    """`[m, k] × [k, n]`, elements of `element` bytes; k and n are features, m tokens."""
    arithmetic = 2.0 * m * k * n / (cluster.peak(precision) * cluster.gemm_efficiency)
    if element <= 2 and (k % ALIGNED_FEATURES or n % ALIGNED_FEATURES):
        arithmetic /= UNALIGNED_RATE
    traffic = element * (m * k + k * n + m * n) / (cluster.memory_bandwidth * 1e9)
    return max(arithmetic, traffic) + cluster.kernel_latency * 1e-6


def attention_seconds(cluster: Cluster, precision: str, flops: float) -> float:
    """One fused attention kernel (Dao et al. 2022, arXiv:2205.14135), which computes in half precision at least."""
    precision = "bf16" if precision.startswith(("fp8", "fp4")) else precision
    return flops / (cluster.peak(precision) * cluster.attention_efficiency) + cluster.kernel_latency * 1e-6


def plain_seconds(cluster: Cluster, traffic: float, kernels: int = 1) -> float:
    """Kernels that read and write `traffic` bytes in all."""
    return traffic / cluster.memory_rate + kernels * cluster.kernel_latency * 1e-6
