"""What needs no training: the cost of a model."""
