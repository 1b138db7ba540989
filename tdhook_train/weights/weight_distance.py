"""How far each layer's parameters have moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.weighted import with_weights
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.seen import row_before

__all__ = ["WeightDistance"]

_TO = ("initial", "previous")


@dataclass(frozen=True)
class WeightDistance(Method):
    """How far the parameters of each layer lie from where they were, as one vector; costs no pass.

    Args:
        layers: paths, patterns, module classes or predicates. A pattern gives every module with parameters of its own;
            a module that is named by its path, all parameters below it. Those without parameters are left out.
        to: the network at ``"initial"``-isation, and at the ``"previous"`` tick. For the latter every row holds the
            parameters: it takes their size on disk.

    Writes:
        ``l2_initial`` [layer]: ‖θ − θ₀‖. ``relative_initial``: that over ‖θ₀‖, NaN where it is 0.
        ``cosine_initial``: of the angle between θ and θ₀, NaN where one is 0. ``l2_previous`` and so on: likewise;
        NaN at the first tick. ``norm``: ‖θ‖. With ``"previous"`` also ``("parameters", layer)`` [weight].

    Source: distance from initialisation: Nagarajan and Kolter 2019, arXiv:1901.01672.
    """

    layers: Selection = "**"
    to: str | tuple[str, ...] = ("initial",)

    writes: ClassVar[Mapping[str, str]] = {
        "norm": "layer",
        **{f"{what}_{to}": "layer" for to in _TO for what in ("l2", "relative", "cosine")},
        "parameters": "weight",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        to = (self.to,) if isinstance(self.to, str) else tuple(self.to)
        if not to:
            raise SettingsError(f"WeightDistance needs something to compare with, of to={', '.join(map(repr, _TO))}")
        for one in to:
            if one not in _TO:
                raise SettingsError(f"to={one!r} is none of {', '.join(map(repr, _TO))}")
        object.__setattr__(self, "to", to)

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network has a layer with parameters that is asked for."""
        return bool(self._modules(model))

    def labels(self, seen: Seen, model: HookedModel) -> Labels:  # noqa: ARG002 - the same whatever is seen
        """The layers with parameters."""
        modules = self._modules(model)
        return {"layer": list(modules), "layer_type": [type(module).__name__ for module, _ in modules.values()]}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Weights of layers of different sizes are told apart by the layer's name."""
        names = super().dims(key, ndim)
        return (f"{key[-1]}.weight",) if names == ("weight",) else names

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare every layer."""
        now = self._vectors(model)
        found: dict[NestedKey, Tensor] = {"norm": _norms(now.values())}
        if "initial" in self.to:
            found |= _compared(now, None if seen.initial is None else self._vectors(seen.initial), "initial")
        if "previous" in self.to:
            row = row_before(seen, model)
            before = None if row is None else {layer: row.get(("parameters", layer), None) for layer in now}
            known = before is not None and all(value is not None for value in before.values())
            found |= _compared(now, before if known else None, "previous")
            found |= {("parameters", layer): value for layer, value in now.items()}
        return TensorDict(found, batch_size=[])

    def _modules(self, model: HookedModel) -> dict[str, tuple[nn.Module, bool]]:
        """Return the layers by label, and of each whether all that lies below it counts."""
        found = with_weights(model, self.layers)
        modules = {path: model.module_of(path) for path in found}
        return {path or type(model.module).__name__: (modules[path], below) for path, below in found.items()}

    def _vectors(self, model: HookedModel) -> dict[str, Tensor]:
        return {
            layer: torch.cat([p.detach().reshape(-1) for p in module.parameters(recurse=below)])
            for layer, (module, below) in self._modules(model).items()
        }


def _norms(vectors: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(value.double()).cpu() for value in vectors])


def _compared(now: Mapping[str, Tensor], then: Mapping[str, Tensor] | None, to: str) -> dict[NestedKey, Tensor]:
    if then is None:
        nan = torch.full((len(now),), torch.nan, dtype=torch.float64)
        return {f"{what}_{to}": nan.clone() for what in ("l2", "relative", "cosine")}
    pairs = [(value.double().cpu(), then[layer].double().cpu()) for layer, value in now.items()]
    length, own = _norms([b for _, b in pairs]), _norms([a for a, _ in pairs])
    l2 = _norms([a - b for a, b in pairs])
    inner = torch.stack([(a * b).sum() for a, b in pairs])
    return {
        f"l2_{to}": l2,
        f"relative_{to}": torch.where(length > 0, l2 / length, torch.nan),
        f"cosine_{to}": torch.where((length > 0) & (own > 0), inner / (length * own), torch.nan),
    }
