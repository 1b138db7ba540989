"""Gradients at the values as they are, at many sites from one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.explain.problem import Point, Problem, Rules
from tdhook_train.hooks.tap import Proxy

__all__ = ["gradients_at", "gradients_here", "gradients_in_place"]


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
    sites = [str(site) for site in problem.sites]
    at = ((), sites) if problem.place == "input" else (sites, ())
    found = {site: slope for part in gradients_at(problem, *at, rules=rules) for site, slope in part.items()}
    return {site: slope.movedim(0, 1) for site, slope in found.items()}


def gradients_at(
    problem: Problem,
    outputs: Sequence[str],
    inputs: Sequence[str] = (),
    *,
    rules: Rules | None = None,
    held: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Differentiate every target at what some modules give out and at what some take in: ``[target, *shape]`` each.

    Args:
        problem: what, in a pass over its inputs; its sites are not looked at.
        outputs: sites where what they give out counts.
        inputs: sites where their first argument counts.
        rules: the way back of some modules.
        held: sites that nothing goes back through, as if they always gave out what they give out here.
    """
    batch, found = TensorDict(problem.still, batch_size=[len(problem)]), dict[str, Tensor]()

    def total(result: TensorDictBase, name: str) -> Tensor:
        if not found:
            found.update(problem.read(result, batch))
        return found[name].sum()  # rows do not mix: each keeps a gradient of its own

    with problem.model.bent(rules=rules), problem.model.run(batch) as run:
        given = {site: run.get_grad(site) for site in outputs}
        taken = {site: run.get_input_grad(site) for site in inputs}
        for site in held:
            run.set(site, Tensor.detach, call="all")
        run.backward([lambda result, name=name: total(result, name) for name in problem.names])
    return _resolved(given), _resolved(taken)


def _resolved(proxies: Mapping[str, Proxy]) -> dict[str, Tensor]:
    return {site: proxy.resolve() for site, proxy in proxies.items()}
