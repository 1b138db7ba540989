"""The Lightning front door: callbacks that measure while a model is fitted.

.. code-block:: python

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tdhook_train import ArtifactBuffer
    from tdhook_train.callbacks import HealthCallback, ProbeCallback

    trainer = Trainer(
        callbacks=[
            ProbeCallback("encoder.*", target="target", every_n_train_steps=100),
            HealthCallback(every_n_epochs=1, batch=(images, labels)),
            ModelCheckpoint(monitor="health/effective_rank", mode="max"),
        ]
    )
    trainer.fit(model, loader)
    buffer = ArtifactBuffer.open(f"{trainer.log_dir}/tdhook/probe")  # every layer, every step
    buffer["probe"].series("r2")  # [step, layer, target]

Each of them is an :class:`ObserverCallback`, whose arguments it takes too, and writes a run of its own: a row at step
0, one whenever it is due and one of the last weights. Loggers and ``trainer.callback_metrics`` are told one number a
key and target, ``<name>/<key>/<target>``, the mean over layers and units, and the progress bar the first of these; what
each layer and unit has lies in the run. The keys are listed with each callback; NaNs are not counted, and a key that is
NaN alone is not told. Two callbacks that would log the same key are refused: give one another ``name``.
"""

from tdhook_train.errors import MissingPackageError

try:
    import lightning as _lightning  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f'tdhook_train.callbacks needs {error.name}, which is not installed: pip install "tdhook-train[lightning]"'
    ) from error

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
