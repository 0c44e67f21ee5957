"""The step time that a row tells, directly or by its tokens or FLOPs per second."""

import re

from weft.launch.plan.flops import hardware_flops, model_flops
from weft.launch.plan.validation.describe import Case


def observed_step(case: Case) -> float | None:
    """Seconds of one step, or None when the row does not tell.

    Of `step_time_s`, `tokens_per_s`, `tflops_per_gpu` and `mfu` the first that is there; TFLOP/s count what is computed
    twice when the notes say so (HFU), MFU never does.
    """
    row, job = case.row, case.job
    if seconds := row.number("step_time_s"):
        return seconds
    if rate := row.number("tokens_per_s"):
        return job.tokens / rate
    ranks = case.layout.ranks
    if tflops := row.number("tflops_per_gpu"):
        twice = re.search(r"flops_def=(HFU|Megatron SC'21)", row.text("notes"))
        flops = hardware_flops(case.shape, job.sequence, case.layout.recompute if twice else "none")
        return job.tokens * flops / (tflops * 1e12 * ranks)
    if share := row.number("mfu"):
        peak = case.cluster.peak("bf16" if case.recipe.precision.startswith("fp8") else case.recipe.precision)
        return job.tokens * model_flops(case.shape, job.sequence) / (share / 100 * peak * ranks)
    return None
