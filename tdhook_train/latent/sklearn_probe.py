"""How much of a target an estimator of scikit-learn reads out of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdhook_train.errors import MissingPackageError, SettingsError, UserCodeError
from tdhook_train.latent.folded_probe import FoldedProbe, Split, written
from tdhook_train.ops.classification import SCORES
from tdhook_train.ops.held_out import Predicted
from tdhook_train.undo import kept_randomness

__all__ = ["SklearnProbe"]


@dataclass(frozen=True)
class SklearnProbe(FoldedProbe):
    """How much of each target an estimator of scikit-learn reads out of each layer, on trajectories held out.

    Any regressor or classifier, and any pipeline or search that ends in one: ``SklearnProbe(estimator=SVC())``. It
    is fitted anew for each layer, fold and target, and what was given stays unfitted. For ridge and logistic
    regression, :class:`RidgeProbe` and :class:`LogisticProbe` give the same in a small part of the time. A score says
    nothing alone: beside it stand the same estimator on the raw input, the same on the network at initialisation, and,
    where ``shifts`` are asked for, a null from circular shifts within trajectories.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set), and layers × folds ×
    targets fits on the CPU, as many again for each shift.

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike. Values of several dimensions are flattened to a row a sample.
        target: what is predicted: a key of the batch, a key with a feature index, a function of the batch, a list of
            these, or a mapping of names to these. Numbers for a regressor; for a classifier whole numbers or booleans,
            up to 64 classes each, which it is told by number: 0 for the least, and so on.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        shifts: circular shifts behind the null, each a fit of its own; 19 are the fewest that give a one-sided test
            at 5 %. None by default.
        estimator: unfitted. Settings compare by its class and parameters. Where a parameter ``random_state`` is None,
            at any depth, fits draw from the generator of the measurement.

    Writes:
        Of a regressor ``r2`` [layer, target]; of a classifier ``balanced_accuracy``, ``auc`` (mean over classes, each
        against the rest, by ``decision_function`` or ``predict_proba``) and ``log_loss`` (nats, by ``predict_proba``;
        less is better), NaN where the estimator has none. Of held-out rows, mean over folds. For each: ``_pooled``: of
        all held-out rows together. ``_observation``, ``_initial``: the baselines, NaN where their features are not
        finite or not known. ``_null``, ``_p`` (``p`` for R²): what shifts reach, and the share that score at least as
        well, itself counted. ``classes`` of a classifier. ``reason``, ``null_reason``: why a NaN (see ``legend``).

    Raises:
        TargetError: a classifier's target is no whole number or boolean, or has more than 64 classes.
        UserCodeError: the estimator failed; names the layer.

    Source: Alain and Bengio 2016, arXiv:1610.01644; why a score needs a control: Hewitt and Liang 2019,
    arXiv:1909.03368. Estimators: Pedregosa et al. 2011, arXiv:1201.0490.
    """

    shifts: int = 0
    estimator: Any = field(default=None, compare=False)
    _described: str = field(default="", init=False, repr=False)  # what settings compare and hash by

    writes: ClassVar[Mapping[str, str]] = written("r2", *SCORES)

    def __post_init__(self) -> None:
        super().__post_init__()
        given, sklearn = self.estimator, _sklearn()  # without which there is nothing to say of an estimator
        if isinstance(given, type) or not all(hasattr(given, name) for name in ("fit", "predict", "get_params")):
            raise SettingsError(f"SklearnProbe needs an estimator, such as estimator=Ridge(), got {given!r}")
        if _kind(given) not in ("classifier", "regressor"):
            raise SettingsError(f"SklearnProbe needs a regressor or a classifier, and {given!r} is neither")
        for name, value in given.get_params().items():
            if isinstance(value, np.random.RandomState | np.random.Generator):
                raise SettingsError(f"SklearnProbe needs {name} as a number or None, or no two fits are alike")
        object.__setattr__(self, "estimator", sklearn.clone(given))  # which nobody's later set_params changes
        object.__setattr__(self, "_described", _described(given))

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, the estimator by its class and parameters."""
        plain = super().settings()
        return {name: value for name, value in plain.items() if name != "_described"} | {"estimator": self._described}

    def _names(self) -> tuple[str, ...]:
        return ("r2",) if _kind(self.estimator) == "regressor" else SCORES

    def _seed(self, generator: torch.Generator) -> int:
        return int(torch.randint(2**31 - 1, (), generator=generator))

    def _held_out(self, name: str, x: Tensor, y: Tensor, split: Split) -> Predicted:
        try:
            with kept_randomness(split.seed):  # of estimators that draw from the global states all the same
                return super()._held_out(name, x.cpu().flatten(1), y, split)
        except Exception as error:
            whose, cause = type(self.estimator).__name__, f"{type(error).__name__}: {error}"
            raise UserCodeError(f"SklearnProbe: {whose} failed on {name}: {cause}") from error

    def _fit(self, x: Tensor, y: Tensor, split: Split) -> Callable[[Tensor], Predicted]:
        rows = x.numpy()
        fits = [self._fitted(rows, column.numpy(), split) for column in y.unbind(1)]

        def says(new: Tensor) -> Predicted:
            value, ranks, chances = zip(*(_says(one, new.numpy(), split.classes) for one in fits), strict=True)
            side_by_side = torch.as_tensor(np.stack(value, 1)).double()
            return Predicted(side_by_side, *(_stacked(parts) for parts in (ranks, chances)))

        return says

    def _fitted(self, x: NDArray[Any], y: NDArray[Any], split: Split) -> Any:
        one = _sklearn().clone(self.estimator)
        free = [name for name, value in one.get_params().items() if _is_state(name) and value is None]
        one.set_params(**dict.fromkeys(free, split.seed))
        return one.fit(x, y.astype(np.int64) if split.classes else y)


def _sklearn() -> Any:
    try:
        from sklearn import base
    except ImportError as error:
        raise MissingPackageError('SklearnProbe needs scikit-learn: pip install "tdhook-train[probes]"') from error
    return base


def _kind(estimator: Any) -> str:
    base = _sklearn()
    return "classifier" if base.is_classifier(estimator) else "regressor" if base.is_regressor(estimator) else ""


def _is_state(name: str) -> bool:
    return name == "random_state" or name.endswith("__random_state")


def _says(one: Any, x: NDArray[Any], classes: int) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
    """Return the classes or quantities, what ranks the classes, and their probabilities, where there are such."""
    value = np.asarray(one.predict(x)).reshape(len(x))
    if not classes:
        return value, None, None
    chances = np.asarray(one.predict_proba(x)) if hasattr(one, "predict_proba") else None
    ranks = np.asarray(one.decision_function(x)) if hasattr(one, "decision_function") else None
    if classes == 2:
        ranks = chances[:, 1] if ranks is None and chances is not None else ranks
        return value, None if ranks is None else ranks.reshape(len(x), 1), chances
    # of several classes a decision may be one against one, for pairs
    fits = ranks is not None and ranks.shape == (len(x), classes)
    return value, chances if chances is not None else ranks if fits else None, chances


def _stacked(parts: Sequence[NDArray[Any] | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.as_tensor(np.stack(there, 1)).double() if there else None


def _described(value: Any) -> str:
    """Describe an estimator, or a parameter of one, by value."""
    if hasattr(value, "get_params") and not isinstance(value, type):
        given = ", ".join(f"{name}={_described(v)}" for name, v in sorted(value.get_params(deep=False).items()))
        return f"{type(value).__module__}.{type(value).__qualname__}({given})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_described(k)}: {_described(v)}' for k, v in value.items())}}}"
    if isinstance(value, np.ndarray):
        return f"array({value.tolist()}, {value.dtype})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
