"""What each part of each layer carries, to first order: all patches from one pass and one back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tdhook_train.explain import Problem
from tdhook_train.explain.here import gradients_in_place
from tdhook_train.latent.gradient_patching import GradientPatching
from tdhook_train.latent.paired import States

__all__ = ["AttributionPatching"]


@dataclass(frozen=True)
class AttributionPatching(GradientPatching):
    """How much an output changes when parts of a layer take the value they have in a paired state, to first order.

    ``∇_h M(base) · (h' - h)``, of all layers and parts from one forward pass, and one backward pass a metric. Exact
    where everything after the layer is linear. Of a saturating activation name the layer after it: on tanh networks
    the correlation with exact patching was .94 there and .67 before it.

    Args:
        layers: see :class:`.paired.Paired`, as are ``targets``, ``pairs``, ``side``, ``parts``, ``heads``, ``by``,
            ``way`` and ``max_bytes``.
        sample: how many parts of each layer, evenly spaced, are patched exactly as well (a pass a layer); 0 for none.
        verify: how many of the largest estimates of a network are patched exactly as well; 0 for none.

    Writes:
        ``effect``, ``unit_effect``, …, ``normalised``, …, ``gap``: the estimates of what
        :class:`ActivationPatching` writes by these names. ``agreement`` [layer, target] and ``agreement_overall``
        [target]: Pearson's correlation of estimated and exact changes over pairs and the sampled parts (of the last
        kind in ``parts``); NaN where nothing moves. ``top_layer``, ``top_part``, ``top_estimate``, ``top_exact``
        [rank, target]: of the largest effects the number of the layer among those of the network, of the part in it,
        the estimate and the exact effect.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv:2310.10348.
    """

    def slopes(self, problem: Problem, states: States) -> Mapping[str, Tensor]:  # noqa: ARG002 - others go by the states
        """Differentiate every metric at every site."""
        return {str(site): grad.movedim(1, 0) for site, grad in gradients_in_place(problem).items()}
