"""Whether an attribution goes by what the network has learnt, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdhook_train.explain import Found
from tdhook_train.explain.judged import Judged, in_one, repeatable
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.paths import module_at
from tdhook_train.hooks.weighted import with_weights
from tdhook_train.isolation import DrawnFrom, private_copy
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.likeness import spearman

__all__ = ["CascadingRandomisation"]

_SEEDS = 2**62


@dataclass(frozen=True)
class CascadingRandomisation(Judged):
    """How alike an attribution stays when the layers' weights become random, from the output downwards.

    An attribution that is still the same where nothing learnt is left explains the architecture or the input, not the
    network. Each layer's value is where it and all layers above it are random: what ``reset_parameters`` makes of it,
    or its own weights in a random order where it has none. The live network is never touched: all is done on a copy.

    Costs one further attribution for each layer.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        layers: which become random: paths, patterns, module classes or predicates. A pattern gives every module with
            parameters of its own; a module that is named by its path, all below it at once. A weight that two layers
            share is random for both.

    Writes:
        ``spearman`` [layer, batch, target]: rank correlation of the magnitudes of all shares with those of the network
        as it is, 0 by chance; NaN where all shares are of one size. In the order of the cascade. Of an attribution to
        layers ``("spearman", path)``.

    Source: Adebayo et al. 2018, arXiv:1810.03292.
    """

    layers: Selection = "**"

    writes: ClassVar[Mapping[str, str]] = {"spearman": "layer batch target"}

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network has such layers with weights, beside what the attribution asks."""
        return bool(with_weights(model, self.layers)) and self.of.concerns(model)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The layers, from the output downwards."""
        model.trace(seen.batch)
        paths = self._cascade(model)
        kinds = [type(module_at(model.module, path)).__name__ for path in paths]
        titles = [path or type(model.module).__name__ for path in paths]
        return {**super().labels(seen, model), "layer": titles, "layer_type": kinds}

    @torch.inference_mode(False)  # the copy's weights go into a graph, which those made in inference cannot
    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Explain the network, then its copy after each layer."""
        again = repeatable(seen)
        generator = seen.generator or torch.Generator().manual_seed(0)
        twin, blocks = private_copy(model.module), with_weights(model, self.layers)
        copied = model.on(twin)
        copied.trace(seen.batch)
        original, alike = self.shares(again(), model), list[Found]()
        for path in self._cascade(model):
            module = module_at(twin, path)
            for part in module.modules() if blocks[path] else [module]:
                _randomise(part, int(torch.randint(_SEEDS, (1,), generator=generator, device=generator.device)))
            with torch.no_grad():
                outputs = copied(seen.batch).select(*model.out_keys, strict=False)
            now = self.shares(replace(again(), batch=seen.batch.copy().update(outputs), values={}), copied)
            alike.append(
                {first: spearman(in_one(now, sites), in_one(original, sites)) for first, sites in self.places(now)}
            )
        found = TensorDict()
        for site in alike[0]:
            found.update(self.finished({"spearman": torch.stack([one[site] for one in alike])}, site))
        return found

    def _cascade(self, model: HookedModel) -> list[str]:
        """Return the paths in the order of the cascade: what ran last comes first, what never ran not at all."""
        last = {path: place for place, site in enumerate(model.traced) for path in site.paths}

        def ran(path: str) -> int:
            return max((at for one, at in last.items() if not path or f"{one}.".startswith(f"{path}.")), default=-1)

        places = {path: ran(path) for path in with_weights(model, self.layers)}
        return sorted((path for path, place in places.items() if place >= 0), key=places.__getitem__, reverse=True)


@torch.no_grad()
def _randomise(module: nn.Module, seed: int) -> None:
    """Make a module's own parameters as new, or put their numbers in a random order."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        with DrawnFrom(seed):
            reset()
        return
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters(recurse=False):
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
