"""What to take from a layer so that no linear read-out tells a concept any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional

from tdhook_train.errors import SettingsError, TargetError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.latent.erase import Erase
from tdhook_train.method import Method, Seen
from tdhook_train.ops.erasure import Eraser, leace
from tdhook_train.ops.targets import columns, named
from tdhook_train.ops.units import as_rows, by_row

__all__ = ["Leace"]

_MAX_CLASSES = 64


@dataclass(frozen=True)
class Leace(Method):
    """The smallest change of a layer after which no linear read-out of it tells a concept: LEACE, in closed form.

    Of all affine maps that leave no covariance between activations and concept, the one that moves activations least,
    in any norm that comes from an inner product. On the rows that it was fitted to, a linear probe by any convex loss
    does no better than a constant; on other rows, no better but for what the sample lacks. What is told otherwise than
    linearly stays. The map is oblique, so activations may vary more after it. No pass of its own; a singular value
    decomposition of each layer.

    To go on with the concept erased: ``with Leace.edit(row).prepare(model)``, on any inputs.

    Args:
        layers: paths, patterns, module classes or predicates. Every position of an image or a sequence counts as a
            row, with its row's concept.
        concept: what is erased: a key of the batch, a key with a feature index, a function of the batch, a list of
            these, or a mapping of names to these. Whole numbers are classes, up to 64, found from the data; booleans
            and other numbers are quantities.

    Writes:
        ``("projection", layer)`` [unit, other], ``("bias", layer)`` [unit]: the map x ↦ Px + b, in float64. ``rank``
        [layer]: how many directions it takes away. ``removed`` [layer]: share of the variance of the activations that
        goes with them. ``reason``: why there is nothing to erase, and the map changes nothing; or why it is NaN (see
        ``legend``).

    Raises:
        TargetError: a concept of more than 64 classes.
        GroupsError: a layer that does not give a value for each row.

    Source: Belrose et al. 2023, arXiv:2306.03819.
    """

    layers: Selection = "**"
    concept: Any = None

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "projection": "unit other",
        "bias": "unit",
        "rank": "layer",
        "removed": "layer",
        "reason": "layer",
    }
    shown: ClassVar[tuple[str, ...] | None] = ("rank", "removed")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "erased",
            1: "the concept does not vary: nothing to erase",
            2: "the activations are not finite",
            3: "no linear read-out tells the concept: nothing to erase",
            4: "the concept is not finite",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.concept is None:
            raise SettingsError("Leace needs a concept: what is erased")
        named(self.concept)

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Units of layers of different widths are told apart by the layer's name."""
        return tuple(f"{key[-1]}.{n}" if n in ("unit", "other") else n for n in super().dims(key, ndim))

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Fit every layer."""
        concept = self._concept(seen).to(model.device())
        out: dict[NestedKey, Tensor] = {}
        found: dict[str, list[Any]] = {"rank": [], "removed": [], "reason": []}
        for site in self.taps(model):
            x = self._rows(seen, model, site)
            z = concept.repeat_interleave(len(x) // len(concept), 0)
            eraser, reason = _fitted(x, z)
            out["projection", site], out["bias", site] = eraser.projection, eraser.bias
            centred = x - eraser.mean
            taken = (centred @ eraser.along.T) @ eraser.taken
            found["removed"].append(float(taken.square().sum() / centred.square().sum().clamp_min(1e-300)))
            found["rank"].append(len(eraser.along))
            found["reason"].append(reason)
        kinds = {"rank": torch.int64, "removed": torch.float64, "reason": torch.int8}
        return TensorDict(
            out | {key: torch.tensor(found[key], dtype=kind) for key, kind in kinds.items()}, batch_size=[]
        )

    @staticmethod
    def edit(found: TensorDictBase) -> Erase:
        """Return the edit that erases, from what was measured: by hand, or a row of an artifact.

        Raises:
            SettingsError: it holds no maps, or of some layer NaN.
        """
        return Erase.fitted(found)

    def _concept(self, seen: Seen) -> Tensor:
        out = []
        for name, value in columns(seen.batch, named(self.concept), len(seen.batch)).items():
            if value.is_floating_point() or value.dtype == torch.bool:
                out.append(value.double()[:, None])
                continue
            classes, number = value.unique(return_inverse=True)
            if len(classes) > _MAX_CLASSES:
                raise TargetError(
                    f"concept {name!r} has {len(classes)} classes, more than {_MAX_CLASSES}; as a quantity give it in "
                    "floating point"
                )
            out.append(functional.one_hot(number).double())
        return torch.cat(out, 1)

    def _rows(self, seen: Seen, model: HookedModel, site: str) -> Tensor:
        value = seen.values[site]
        axes = model.unit_axis(site, value), model.row_axis(site)
        return as_rows(by_row(value, seen.batch.batch_size, axes, f"Leace: {site!r}")).double()


def _fitted(x: Tensor, z: Tensor) -> tuple[Eraser, int]:
    """Return the eraser and the reason."""
    lost = x.new_full((1, x.shape[1]), torch.nan)
    none = x.new_zeros(0, x.shape[1])
    if not x.isfinite().all():
        return Eraser(lost, lost, lost[0]), 2
    if not z.isfinite().all():
        return Eraser(lost, lost, lost[0]), 4
    if (z == z[0]).all():
        return Eraser(none, none, x.mean(0)), 1
    if (x == x[0]).all():
        return Eraser(none, none, x.mean(0)), 3
    eraser = leace(x, z)
    return eraser, 0 if len(eraser.along) else 3
