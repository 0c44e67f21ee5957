"""How much arithmetic training takes, and what share of the hardware's rate a run reaches.

Model FLOPs are what the model needs, whatever the run computes twice: recomputation and padding do not raise them.
"""


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


# Dense peak rates in TFLOP/s from the vendors' data sheets (SXM or OAM form): bf16 and fp16 by matrix units, fp32
# without TF32, which is how torch multiplies fp32 matrices by default.
_PEAKS = {
    "a100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
    "h100": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    "h200": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    "b200": {"bf16": 2250.0, "fp16": 2250.0, "fp32": 75.0},
    "v100": {"fp16": 125.0, "fp32": 15.7},
    "mi300x": {"bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4},
}


def peak_tflops(device: str, precision: str) -> float | None:
    """The peak rate of a device by its name (`h100-sxm`, `NVIDIA H200`), or None when it is not known, as for CPUs."""
    rates = next((rates for name, rates in _PEAKS.items() if name in device.lower()), {})
    return rates.get(precision)


def utilization(tflops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of `peak` that `tflops` is, or None without a peak."""
    return tflops / peak if peak else None
