"""Whether a probe's score is the layer's merit: how much better it does than on a target that means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError, TargetError
from tdhook_train.explain.of_another import OfAnother
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.layer_probe import LayerReader
from tdhook_train.method import Part, Parts, Seen
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.targets import Target, columns, label_of, named, read

__all__ = ["ControlTask"]


@dataclass(frozen=True)
class ControlTask(OfAnother):
    """How selective a probe is: its score less the score of the same probe on a control task.

    In a control task every type of row (every word, every state of a game) has one output, drawn at random from the
    outputs that the target has; nothing but memory of the types can do it. A probe that does as well at it may have
    learned its target by itself. One that does well at the target alone reads something that the layer holds: its
    selectivity is high.

    Costs no pass of its own; the fits of the probe on both targets. The same control at every step, as long as the
    rows are the same.

    Args:
        of: the probe, with its layers and targets, such as ``RidgeProbe(target="y")``, ``LogisticProbe(...)`` or
            ``MdlProbe(...)``.
        types: what type each row is of: a key of the batch, a key with a feature index, or a function of the batch;
            of several numbers a row, all together. Rows of a type should lie in several trajectories: an output that
            none of the rows fitted to has shown cannot be remembered.
        seed: of the outputs drawn.

    Writes:
        All that the probe writes, and for its main score (the first it shows: ``r2``, ``balanced_accuracy``,
        ``compression``) ``<score>_control`` [layer, target]: that on the control task; ``selectivity`` [layer, target]:
        the score less that; ``reason_control``: why a NaN, by the probe's legend.

    Raises:
        TargetError: ``types`` has not one value a row.

    Source: Hewitt and Liang 2019, arXiv:1909.03368.
    """

    of: LayerReader
    types: Target
    seed: int = 0

    by_trajectory: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.of, LayerReader):
            raise SettingsError(f"ControlTask needs a probe of layers, of=RidgeProbe() say; got of={self.of!r}")
        super().__post_init__()
        if isinstance(self.types, list | Mapping):
            raise SettingsError(f"ControlTask needs one key or function that gives types, got types={self.types!r}")
        named(self.types)

    @property
    def score(self) -> str:
        """The probe's main score."""
        return next(iter(self.of.shown or self.of.writes))

    @property
    def writes(self) -> Mapping[str, str]:  # type: ignore[override]  # it depends on the probe
        """What the probe writes, the control's score, and the difference."""
        own = (f"{self.score}_control", "selectivity", *(("reason_control",) if "reason" in self.of.writes else ()))
        return {**self.of.writes, **dict.fromkeys(own, self.of.writes[self.score])}

    @property
    def shown(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """What the probe shows, the control's score, and the difference."""
        return None if self.of.shown is None else (*self.of.shown, f"{self.score}_control", "selectivity")

    @property
    def legend(self) -> Mapping[str, Mapping[int, str]]:  # type: ignore[override]
        """The probe's."""
        own = self.of.legend
        return {**own, "reason_control": own["reason"]} if "reason" in own else own

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The probe's."""
        return self.of.labels(seen, model)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Probe one network for both."""
        return self._both({"": Part(seen, model)}).tensordict()

    def across(self, parts: Parts) -> Measured:
        """Probe all networks for both."""
        return self._both(self.applies_to(parts))

    def control(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Return the control task of each target: for every row the output of its type, ``[rows]`` each."""
        rows = len(batch)
        types = read(batch, self.types)
        if types.shape[:1] != (rows,):
            given, name = tuple(types.shape), label_of(self.types)
            raise TargetError(f"types {name!r} has {given}; its first dimension must be the {rows} rows")
        flat = types.reshape(rows, -1).cpu()
        kinds, kind = torch.unique(flat.long() if flat.dtype == torch.bool else flat, dim=0, return_inverse=True)
        targets = columns(batch, named(self.of.target), rows)
        # an output of the target's own distribution is that of a row drawn at random
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(rows, (len(targets), len(kinds)), generator=generator)
        return {
            name: value[own[kind].to(value.device)] for own, (name, value) in zip(drawn, targets.items(), strict=True)
        }

    def _both(self, parts: Parts) -> Measured:
        memo = next(iter(parts.values())).seen.memo  # what a probe remembers is of its target
        own = self.of.across({name: part.told(memo=memo.setdefault("target", {})) for name, part in parts.items()})
        control = self._control(parts).values
        values, score = dict(own.values), self.score
        values[f"{score}_control"] = control[score]
        values["selectivity"] = own.values[score] - control[score]
        if "reason" in control:
            values["reason_control"] = control["reason"]
        dims = {key: own.dims.get(key, own.dims[score]) for key in values}
        return Measured(values, dims, own.labels)

    def _control(self, parts: Parts) -> Measured:
        """Probe for the control task, as little beside its score as the probe lets leave out."""
        first = next(iter(parts.values())).seen
        outputs = {("_control", str(i)): value for i, value in enumerate(self.control(first.batch).values())}
        names = columns(first.batch, named(self.of.target), len(first.batch))
        fewer: dict[str, Any] = {"shifts": 0, "directions": False}
        spared = {name: least for name, least in fewer.items() if hasattr(self.of, name)}
        probe = replace(self.of, target=dict(zip(names, outputs, strict=True)), **spared)
        memo = first.memo.setdefault("control", {})
        told = {}
        for name, part in parts.items():
            batch = part.seen.batch.copy()
            for key, value in outputs.items():
                batch.set(key, value)
            told[name] = part.told(batch=batch, initial=None, memo=memo)
        return probe.across(told)
