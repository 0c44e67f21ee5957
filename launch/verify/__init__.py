"""`weft verify`: whether a model trained in parallel is the model trained in one process, and where it is not."""
