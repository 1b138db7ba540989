"""The Lightning front door: callbacks that measure while a model is fitted."""

from tdhook_train.callbacks.activation_callback import ActivationCallback
from tdhook_train.callbacks.attribution_callback import AttributionCallback
from tdhook_train.callbacks.edit_callback import EditCallback
from tdhook_train.callbacks.health_callback import HealthCallback
from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.callbacks.patching_callback import PatchingCallback
from tdhook_train.callbacks.probe_callback import ProbeCallback
from tdhook_train.callbacks.similarity_callback import SimilarityCallback

__all__ = [
    "ActivationCallback",
    "AttributionCallback",
    "EditCallback",
    "HealthCallback",
    "ObserverCallback",
    "PatchingCallback",
    "ProbeCallback",
    "SimilarityCallback",
]
