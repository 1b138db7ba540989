"""Gradients at the values as they are, at many sites from one pass."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.explain.problem import Point, Problem, Rules

__all__ = ["gradients_here", "gradients_in_place"]


def gradients_here(problem: Problem, rules: Rules | None = None) -> Point:
    """Differentiate every target at every site: ``[row, target, *feature]``; one pass, and one back for each target.

    Several layers are read where they are; a single one has the value that the problem gives it.

    Args:
        problem: where and what.
        rules: the way back of some modules, see :meth:`HookedModel.bent`.
    """
    if problem.place == "model" or len(problem.sites) == 1:
        each = list(problem.gradients(problem.point, rules=rules))
        return {site: torch.stack([one[site] for one in each], 1) for site in problem.sites}
    return gradients_in_place(problem, rules)


def gradients_in_place(problem: Problem, rules: Rules | None = None) -> Point:
    """Differentiate every target at every layer, with the values that a pass over the problem's inputs gives them.

    Args:
        problem: where and what; its values at the layers are not looked at.
        rules: the way back of some modules.
    """
    batch, found = TensorDict(problem.still, batch_size=[len(problem)]), dict[str, Tensor]()

    def total(outputs: TensorDictBase, name: str) -> Tensor:
        if not found:
            found.update(problem.read(outputs, batch))
        return found[name].sum()  # rows do not mix: each keeps a gradient of its own

    with problem.model.bent(rules=rules), problem.model.run(batch) as run:
        read = run.get_grad if problem.place == "output" else run.get_input_grad
        proxies = {site: read(str(site)) for site in problem.sites}
        run.backward([lambda outputs, name=name: total(outputs, name) for name in problem.names])
    return {site: proxy.resolve().movedim(0, 1) for site, proxy in proxies.items()}
