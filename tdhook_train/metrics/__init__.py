"""Whether an attribution is right, tick by tick, and what the rows of a run say when they are compared."""

from tdhook_train.metrics.aopc import Aopc
from tdhook_train.metrics.cascading_randomisation import CascadingRandomisation
from tdhook_train.metrics.comprehensiveness import Comprehensiveness
from tdhook_train.metrics.deletion import Deletion
from tdhook_train.metrics.infidelity import Infidelity
from tdhook_train.metrics.insertion import Insertion
from tdhook_train.metrics.max_sensitivity import MaxSensitivity
from tdhook_train.metrics.over_steps import attribution_stability, churn, direction_cosine, layer_similarity
from tdhook_train.metrics.stability import Stability
from tdhook_train.metrics.sufficiency import Sufficiency
from tdhook_train.metrics.transfer import probe_transfer

__all__ = [
    "Aopc",
    "CascadingRandomisation",
    "Comprehensiveness",
    "Deletion",
    "Infidelity",
    "Insertion",
    "MaxSensitivity",
    "Stability",
    "Sufficiency",
    "attribution_stability",
    "churn",
    "direction_cosine",
    "layer_similarity",
    "probe_transfer",
]
