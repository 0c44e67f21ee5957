"""Dynamic loss scaling, without which small float16 gradients become zero (Micikevicius et al. 2018, §3.2)."""

from dataclasses import dataclass

LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor of the loss: halved after a step whose gradients overflow, doubled after `patience` good ones.

    Ranks that are told the same keep the same scale; the norm over all axes tells them.

    Attributes:
        scale: the factor now.
        good_steps: since the scale last changed.
        patience: good steps until it is doubled; 0 leaves it as it is.
    """

    scale: float = 1.0
    good_steps: int = 0
    patience: int = 0

    def update(self, *, overflow: bool) -> None:
        """Take note of a step."""
        if not self.patience:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == self.patience:
            self.scale, self.good_steps = min(LARGEST, self.scale * 2), 0


def dynamic_loss_scale() -> LossScale:
    """For float16: 65,536 at first, and 2,000 good steps until it is doubled."""
    return LossScale(scale=2.0**16, patience=2000)
