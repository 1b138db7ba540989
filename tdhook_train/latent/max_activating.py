"""What each unit responds to most: the rows of a batch, or of a whole data set, on which it is greatest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.keys import dotted, path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.ops.top import Top, at_their_best, together, top_of
from tdhook_train.ops.units import padded

__all__ = ["MaxActivating"]

_NOT_FINITE, _NO_ROWS = 1, 2


@dataclass(frozen=True)
class MaxActivating(Method):
    """On which rows of the batch each unit is greatest, and what the network was given there.

    In images and sequences a unit counts where it is greatest, and a row once. Of equal values the first rows are
    taken. Costs no pass of its own.

    More data than one batch holds go through :meth:`over`, with one set of weights.

    Args:
        layers: paths, patterns, module classes or predicates.
        k: how many rows of each unit.
        inputs: of how many of them, the greatest first, the inputs are kept as well; of all by default. Each row is
            kept once: at most layers × units × ``inputs`` rows, and never more than there are. On a probe set, which a
            run stores, the numbers say it all: ``inputs=0`` keeps none.

    Writes:
        ``value`` [layer, unit, rank]: in units of the activation, NaN beyond a layer's width or where fewer rows are
        finite. ``row`` [layer, unit, rank]: its number in the batch. ``position`` [layer, unit, rank]: where in the
        row, counted through the places of the layer in their order (row by row of an image); 0 in a layer without
        places. ``("top", key)`` [sample, *feature]: inputs, filled up with NaN (0 where they are whole numbers), and
        ``sample`` [layer, unit, rank]: which of them, so that those of a unit are
        ``row["top", key][row["sample"][layer, unit]]``. ``reason`` [layer]: see ``legend``.
        ``row``, ``position`` and ``sample`` are -1 where there is none, and mean nothing where ``value`` is NaN.

    Source: Erhan et al. 2009, "Visualizing higher-layer features of a deep network"; Zeiler and Fergus 2014,
    arXiv:1311.2901, section 4 (the strongest activations and their inputs).
    """

    layers: Selection = "**"
    k: int = 8
    inputs: int | None = None

    looks_back: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...] | None] = ()
    writes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("value", "row", "position", "sample"), "layer unit rank"),
        "reason": "layer",
        "top": "sample *feature",
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "every row counts, or no layer of this network",
            _NOT_FINITE: "some activations are not finite and were passed over",
            _NO_ROWS: "the layer does not give out a value for each row",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise SettingsError(f"MaxActivating needs k of 1 or more, got {self.k}")
        if self.inputs is not None and not (isinstance(self.inputs, int) and 0 <= self.inputs <= self.k):
            raise SettingsError(
                f"MaxActivating needs inputs=, the number of ranks whose inputs are kept, between 0 and k={self.k}, "
                f"got {self.inputs!r}"
            )

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Features of inputs of different shapes are told apart by the input's name."""
        names, path = super().dims(key, ndim), path_of(key)
        return tuple(f"{dotted(path[1:])}.{name}" if path[0] == "top" and name != "sample" else name for name in names)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Rank the rows for every unit."""
        tops, reasons = [], []
        for site in self.taps(model):
            top, reason = self._top(seen.values[site], site, model, len(seen.batch))
            tops.append(top)
            reasons.append(reason)
        if any(top.value.dtype == torch.float64 for top in tops):
            tops = [top._replace(value=top.value.double()) for top in tops]
        filled = [padded([getattr(top, name) for top in tops], fill) for name, fill in _EMPTY.items()]
        inputs = {key: value for key in model.in_keys if isinstance(value := seen.batch.get(key), Tensor)}
        rows = torch.arange(len(seen.batch))
        return self._written(Top(*filled), torch.tensor(reasons, dtype=torch.int8), inputs, rows, len(rows))

    def over(
        self,
        model: nn.Module,
        batches: Iterable[TensorDictBase],
        in_keys: Sequence[NestedKey] | Mapping[NestedKey, str] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        *,
        progress: bool = True,
    ) -> TensorDict:
        """Rank the rows of many batches, one after another: what :meth:`measure` gives of all of them at once.

        One pass over each batch; in memory lie one batch and one result.

        Args:
            model: as for :meth:`prepare`.
            batches: a loader of TensorDicts; their rows are numbered through.
            in_keys: as for :meth:`prepare`.
            out_keys: as for :meth:`prepare`.
            progress: whether a bar shows how far it is.

        Raises:
            NetworkError: the weights changed between two batches: ranks of different networks do not mix.
            SettingsError: there is no batch.
        """
        found: TensorDict | None = None
        rows, weights = 0, _weights(model)
        with self.prepare(model, in_keys, out_keys) as hooked:
            written = {*self.writes}
            for batch in tqdm(batches, desc="ranking", unit="batch", disable=not progress):
                if _weights(model) != weights:
                    raise NetworkError(f"MaxActivating: the weights changed after {rows} rows; rank them apart")
                td = hooked(batch).select(*written, strict=False)
                found = TensorDict(dict(td.items())) if found is None else self._after(found, td, rows, batch.numel())
                rows += batch.numel()
        if found is None:
            raise SettingsError("MaxActivating needs at least one batch, got none")
        return found

    def _top(self, value: Tensor, site: str, model: HookedModel, rows: int) -> tuple[Top, int]:
        axis = model.row_axis(site)
        if value.ndim <= axis or value.shape[axis] != rows:
            return top_of(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), self.k), _NO_ROWS
        value = value if value.dtype == torch.float64 else value.float()
        best, position = at_their_best(value, axis, model.unit_axis(site, value))
        top = Top(*(part.cpu() for part in top_of(best, position, self.k)))
        return top, 0 if value.isfinite().all() else _NOT_FINITE

    def _after(self, before: TensorDict, now: TensorDictBase, rows: int, more: int) -> TensorDict:
        """Rank the rows of a batch, ``more`` in number, among the ``rows`` of the batches before it."""
        one, other = (Top(*(td[name] for name in _EMPTY)) for td in (before, now))
        other = other._replace(row=torch.where(other.row < 0, -1, other.row + rows))
        kept = [_kept(top.row, td["sample"]) for top, td in ((one, before), (other, now))]
        tables = [td.get("top", TensorDict()) for td in (before, now)]
        inputs = {
            key: torch.cat([table.get(key)[: len(known)] for table, known in zip(tables, kept, strict=True)])
            for key in tables[0].keys(include_nested=True, leaves_only=True)
        }
        reason = torch.maximum(before["reason"], now["reason"])
        return self._written(together(one, other), reason, inputs, torch.cat(kept), rows + more)

    def _written(
        self, top: Top, reason: Tensor, inputs: Mapping[NestedKey, Tensor], known: Tensor, rows: int
    ) -> TensorDict:
        """Lay out the ranks, and the inputs of the rows that are kept.

        Args:
            top: ``[layer, unit, rank]`` each.
            reason: ``[layer]``.
            inputs: ``[known, *feature]``.
            known: the numbers of their rows, ascending.
            rows: how many there are in all.
        """
        first = top.row[..., : self.inputs]
        kept = first[first >= 0].unique()
        sample = torch.full_like(top.row, -1)
        sample[..., : self.inputs] = torch.where(first < 0, -1, torch.searchsorted(kept, first.contiguous()))
        found: dict[NestedKey, Tensor] = {**top._asdict(), "sample": sample, "reason": reason}
        for key, value in inputs.items() if self.inputs != 0 else ():
            table = value[torch.searchsorted(known, kept).to(value.device)].cpu()
            # of one size at every tick
            room = value.new_zeros(min(rows, first.numel()), *value.shape[1:], device="cpu")
            room = room.fill_(torch.nan) if value.is_floating_point() else room
            room[: len(table)] = table
            found["top", *path_of(key)] = room
        return TensorDict(found, batch_size=[])


_EMPTY = {"value": torch.nan, "row": -1, "position": -1}


def _kept(row: Tensor, sample: Tensor) -> Tensor:
    """Return the numbers of the rows whose inputs are kept, in the order in which they lie."""
    return row[sample >= 0].unique()


def _weights(model: nn.Module) -> int:
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return fingerprint(TensorDict(state, batch_size=[]))
