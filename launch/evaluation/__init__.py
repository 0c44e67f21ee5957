"""What a model is worth, in numbers with their standard errors."""
