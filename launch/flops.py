"""How much arithmetic training takes, and what share of the hardware's rate a run reaches.

Model FLOPs are what the model needs, whatever the run computes twice: recomputation and padding do not raise them.
"""

from weft.launch.plan.cluster import cluster_names, load_cluster


def flops_per_token(*, parameters: int, layers: int, hidden_size: int, sequence_length: int) -> float:
    """Floating-point operations of a forward and backward pass, per token: 6·N + 12·L·h·s.

    The convention of PaLM (Chowdhery et al., 2022, appendix B): 6 for each parameter of a matrix product (2 forward,
    4 backward), and 12·L·h·s for attention's two products with a sequence of s, counted in full, causal or not.

    Args:
        parameters: N, those that a token is multiplied by: all but the token and position embeddings that are only
            looked up. An embedding tied to the head counts once, for the head.
        layers: L, of the whole model.
        hidden_size: h, attention's heads × head dim.
        sequence_length: s.
    """
    return 6.0 * parameters + 12.0 * layers * hidden_size * sequence_length


def model_tflops(*, tokens_per_second: float, flops_per_token: float, devices: int) -> float:
    """Model FLOP/s of each device, in 10¹²."""
    return tokens_per_second * flops_per_token / devices / 1e12


def peak_tflops(device: str, precision: str) -> float | None:
    """The peak rate of a device by its name (`h100-sxm`, `NVIDIA H200`), or None when it is not known, as for CPUs.

    The rates are those of `launch/plan/clusters.yaml`, of the vendors' data sheets: dense, SXM or OAM form, and fp32
    without TF32, which is how torch multiplies fp32 matrices by default.
    """
    kinds = {name.partition("-")[0]: name for name in cluster_names() if name != "cpu"}
    found = [kind for kind in kinds if kind in device.lower()]
    if not found:
        return None
    return load_cluster(kinds[max(found, key=len)]).peak_tflops.get(precision)  # gb200 has b200 in it


def utilization(tflops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of `peak` that `tflops` is, or None without a peak."""
    return tflops / peak if peak else None
