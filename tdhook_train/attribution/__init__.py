"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.integrated_gradients import IntegratedGradients

__all__ = ["IntegratedGradients"]
