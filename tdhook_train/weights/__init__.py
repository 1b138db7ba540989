"""What can be read from the weights alone."""

from tdhook_train.weights.weight_distance import WeightDistance

__all__ = ["WeightDistance"]
