"""What can be wrong with a checkpoint; each message is one sentence that names the file or tensor and the remedy."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, hostile, incomplete or of another model."""


class OtherModelError(CheckpointError):
    """A whole checkpoint whose tensors are not those of this model."""


class SaveError(OSError):
    """A checkpoint that could not be written; those from before are untouched."""
