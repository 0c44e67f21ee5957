"""Early stopping: training ends when the held-out loss has not fallen for some evaluations."""

from dataclasses import dataclass


@dataclass
class Patience:
    """Counts evaluations without a lower held-out loss.

    Attributes:
        limit: so many in a row end the training; 0: none do.
        best: the lowest loss so far; None before the first.
        waited: evaluations since then.
    """

    limit: int
    best: float | None = None
    waited: int = 0

    def ends(self, loss: float | None) -> bool:
        """Take note of an evaluation; whether training is to end after it."""
        if loss is not None and (self.best is None or loss < self.best):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether training has ended."""
        return 0 < self.limit <= self.waited
