"""What the rows of a run say when they are compared with one another."""

from tdhook_train.metrics.over_steps import attribution_stability, churn, direction_cosine, layer_similarity

__all__ = ["attribution_stability", "churn", "direction_cosine", "layer_similarity"]
