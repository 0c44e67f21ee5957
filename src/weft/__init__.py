"""weft: tensor, pipeline and data parallel training of language models, on any layout with the same result."""

__version__ = "0.1.0"
