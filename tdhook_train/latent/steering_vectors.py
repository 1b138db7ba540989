"""A model that is steered: a function of the user's at some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tdhook_train.edit import Edit
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection, Site
from tdhook_train.hooks.paths import Selector, parse, selectors

__all__ = ["SteeringVectors"]


@dataclass(frozen=True)
class SteeringVectors(Edit):
    """What a model does when the activations of some layers are changed, most often by adding a direction to them.

    No pass of its own: while it is prepared, every call of the model is steered, ``generate`` of a language model
    included; afterwards the model is as it was.

    Args:
        layers: paths, patterns, module classes or predicates of what is steered.
        steer_fn: given the layer's path and what it gives out, returns what goes on. It must return a tensor of the
            same shape; None is an error, since the steering would be ignored.

    Source: Rimsky et al. 2023, arXiv:2312.06681; Turner et al. 2023, arXiv:2308.10248.
    """

    layers: Selection = "**"
    steer_fn: Callable[[str, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.steer_fn):
            raise SettingsError(f"SteeringVectors needs steer_fn(layer, output), got {self.steer_fn!r}")

    def edits(self, model: HookedModel) -> Mapping[Selector, Any]:
        """Put the function at every layer, under its own path."""
        chosen: dict[tuple[nn.Module, Any], str] = {}  # a shared layer is steered once
        for selector in selectors(self.layers):
            items = parse(selector).items if isinstance(selector, str) else ()
            for path, module in model.chosen(selector):
                chosen.setdefault((module, items), str(Site(path, items)))
        return {site: partial(cast(Any, self.steer_fn), site) for site in chosen.values()}
