"""Number formats of training: what the parameters are kept in."""

import torch

from weft.launch.sections import TrainSettings

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtype(settings: TrainSettings) -> torch.dtype:
    """What the model computes in; weights of less than float32 are updated in float32."""
    return FORMATS[settings.precision]
