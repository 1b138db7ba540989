"""How alike the representations of two networks are, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.paths import selectors
from tdhook_train.isolation import private_copy
from tdhook_train.method import Method, Seen, look
from tdhook_train.ops.cka import NOT_FINITE, SAME, TOO_FEW, Representations, thinned
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import as_rows
from tdhook_train.ops.weights import Weights
from tdhook_train.seen import inputs_hash, row_before

__all__ = ["Cka"]

_TO = ("initial", "previous", "layers")
_OTHER_SAME, _OTHER_NOT_FINITE, _NO_OTHER, _OTHER_ROWS = 4, 5, 6, 7
_REASONS = {
    0: "compared, or no layer of this network",
    TOO_FEW: "there are fewer than 4 rows",
    SAME: "the layer gives out the same on all rows but one",
    NOT_FINITE: "the layer is not finite",
    _OTHER_SAME: "the other gives out the same on all rows but one",
    _OTHER_NOT_FINITE: "the other is not finite",
    _NO_OTHER: "there is nothing to compare with: not known, or not on this batch",
    _OTHER_ROWS: "the two layers have other rows",
}


@dataclass(frozen=True)
class Cka(Method):
    """How alike what a layer gives out now is to what it gives out elsewhere: 1 up to rotation, shift and scale.

    Linear centred kernel alignment of the same rows, ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``, with the unbiased
    HSIC: two layers that have nothing in common give about 0, however few rows there are (the biased estimate gives
    .8 for 256 units on 64 rows), and may give less. Below 8 rows a unit the value varies much; ``few_rows`` says so.

    Costs no pass of its own on the present network; one on the network at initialisation and one on the reference,
    once a probe set, or at every tick where there is none.

    The tick before is a matter of its weights, which a row cannot hold; so the row holds what this method needs of
    them, the chosen rows of every layer as they were: exact, in memory no more than the last row, and a resumed run
    finds it in the last row stored. It adds ``rows`` × units × 4 bytes a layer to each row of the run, 7 MB for 27
    layers of 32 units on 2048 rows; a smaller ``rows`` or ``ArtifactBuffer(max_bytes=...)`` bounds that.

    Args:
        layers: paths, patterns, module classes or predicates.
        to: what each layer is compared with: ``"initial"``, itself in the network at initialisation; ``"previous"``,
            itself at the tick before on the same batch, which only a probe set gives; ``"layers"``, every other layer
            of the network now. One or several.
        reference: weights of another network of the same architecture, to whose layers each is compared too: the path
            of a state dict, or a mapping of names to tensors; of several networks, one by the name of each, as in the
            ``initial/weights.pt`` of another run.
        rows: of each activation, spread evenly where there are more; the positions of an image are rows, its channels
            units.

    Writes:
        ``cka_initial``, ``cka_previous``, ``cka_reference`` [layer]. ``cka_layers`` [layer, other]: only layers with
        the same rows are compared. ``reason_initial`` and so on: why a NaN (see ``legend``). ``few_rows`` [layer]: 1
        below 8 rows a unit. With ``"previous"`` also ``("activation", layer)`` [batch, unit] and ``inputs``, a
        fingerprint, for the next tick.

    Raises:
        SettingsError: the reference is not of that architecture; said before anything has run.

    Source: Kornblith et al. 2019, arXiv:1905.00414; the unbiased HSIC: Song et al. 2012 (JMLR 13), eq. 5; the two
    together: Nguyen et al. 2021, arXiv:2010.15327.
    """

    layers: Selection = "**"
    to: str | tuple[str, ...] = ("initial",)
    reference: Any = None
    rows: int = 2048

    writes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (f"{what}_{to}" for what in ("cka", "reason") for to in ("initial", "previous", "reference")), "layer"
        ),
        "cka_layers": "layer other",
        "reason_layers": "layer other",
        "few_rows": "layer",
        "activation": "batch unit",
        "inputs": "",
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        **{f"reason_{to}": _REASONS for to in (*_TO, "reference")},
        "few_rows": {0: "at least 8 rows a unit", 1: "fewer than 8 rows a unit: the value varies with the batch"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        to = (self.to,) if isinstance(self.to, str) else tuple(self.to)
        for one in to:
            if one not in _TO:
                raise SettingsError(f"to={one!r} is none of {', '.join(map(repr, _TO))}")
        object.__setattr__(self, "to", to)
        if self.reference is not None and not isinstance(self.reference, Weights):
            object.__setattr__(self, "reference", Weights(self.reference))
        if not to and self.reference is None:
            raise SettingsError(f"Cka needs something to compare with, of to={', '.join(map(repr, _TO))} or reference=")
        if self.rows < 4:
            raise SettingsError(f"Cka needs at least 4 rows, got rows={self.rows}")

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; weights by their path or their fingerprint."""
        return super().settings() | {"reference": None if self.reference is None else repr(self.reference)}

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse a reference of another architecture as well."""
        super().check(models)
        for model in self.chosen(models).values():
            if self.reference is not None and any(model.has(layer) for layer in selectors(self.layers)):
                self.reference.fitting(model.module, model.name, model.title)

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The layers, and again where each is compared with each."""
        labels = super().labels(seen, model)
        return labels | {"other": list(labels["layer"])} if "layers" in self.to else labels

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare every layer, those of one width together."""
        kept, counts = self._kept(seen.values, model)
        now = Representations(list(kept.values()), counts)
        found: dict[NestedKey, Tensor] = {"few_rows": now.few}
        if "initial" in self.to:
            found |= self._compared(now, "initial", self._of("initial", seen, model))
        if self.reference is not None:
            found |= self._compared(now, "reference", self._of("reference", seen, model))
        if "previous" in self.to:
            inputs = inputs_hash(seen, model)
            before = self._before(seen, model, inputs, kept)
            found |= self._compared(now, "previous", None if before is None else Representations(before, counts))
            found |= {("activation", site): value for site, value in kept.items()} | {"inputs": inputs}
        if "layers" in self.to:
            value, of_like_rows = now.among()
            reasons = _reasons(now.reasons[:, None], now.reasons[None])
            found |= {"cka_layers": value, "reason_layers": torch.where(of_like_rows, reasons, _OTHER_ROWS)}
        return TensorDict(found, batch_size=[])

    def _kept(self, values: Mapping[str, Tensor], model: HookedModel) -> tuple[dict[str, Tensor], list[int]]:
        """Return the chosen rows of every layer, and how many each has in all."""
        given = {site: as_rows(values[site], model.unit_axis(site, values[site])) for site in self.taps(model)}
        return {site: thinned(rows, self.rows) for site, rows in given.items()}, [len(rows) for rows in given.values()]

    def _compared(self, now: Representations, to: str, other: Representations | None) -> dict[NestedKey, Tensor]:
        if other is None:
            value = torch.full((len(now),), torch.nan, dtype=torch.float64)
            reason = torch.where(now.reasons > 0, now.reasons, _NO_OTHER).to(torch.int8)
        else:
            value, reason = now.to(other), _reasons(now.reasons, other.reasons)
        return {f"cka_{to}": value, f"reason_{to}": reason}

    def _of(self, which: str, seen: Seen, model: HookedModel) -> Representations | None:
        """Run the network at initialisation or the reference on the batch; None where it is not known."""
        known = (which, model.name)
        if known not in seen.memo:
            other = seen.initial if which == "initial" else self._reference(model)
            if other is None:
                return None
            values, _ = look(other, seen.batch, self.taps(model))
            kept, counts = self._kept(values, model)
            seen.memo[known] = Representations(list(kept.values()), counts)
        return seen.memo[known]

    def _reference(self, model: HookedModel) -> HookedModel:
        twin = private_copy(model.module)
        self.reference.put_into(twin, model.name, model.title)
        return model.on(twin)

    def _before(
        self, seen: Seen, model: HookedModel, inputs: Tensor, kept: Mapping[str, Tensor]
    ) -> list[Tensor] | None:
        """Return what the layers gave out at the tick before; None where that was not on this batch."""
        row = row_before(seen, model)
        if row is None or "inputs" not in row or int(row["inputs"]) != int(inputs):
            return None
        before = [row.get(("activation", site), None) for site in kept]
        now = list(kept.values())
        if any(one is None or one.shape != other.shape for one, other in zip(before, now, strict=True)):
            return None
        return [one.to(other) for one, other in zip(before, now, strict=True)]


def _reasons(now: Tensor, other: Tensor) -> Tensor:
    """Say why two layers were not compared, the first one's reason first."""
    theirs = torch.where((other == SAME) | (other == NOT_FINITE), other + _OTHER_SAME - SAME, other)
    return torch.where(now > 0, now, theirs).to(torch.int8)
