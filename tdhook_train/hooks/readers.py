"""Who reads what a module gives out, from the graph of one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_train.hooks.items import pick
from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.paths import module_at, parse
from tdhook_train.undo import Undo

__all__ = ["sole_readers"]

_Node = Any  # a node of the autograd graph


def sole_readers(model: HookedModel, inputs: TensorDictBase, sites: Sequence[str]) -> dict[str, str]:
    """Map each site whose value goes directly into one other of the sites, and nowhere else, to that site.

    Reads the graph of one pass over ``inputs``, so it sees what differentiates through the value; a comparison, say,
    is not seen. Sites outside any graph are left out.
    """
    made: dict[str, tuple[_Node, int]] = {}  # the node that made the site's value, and which of its results
    moving = {k: v.detach().clone() for k in model.in_keys if isinstance(v := inputs.get(k), torch.Tensor)}

    def note(text: str, output: Any) -> None:
        value = pick(output, parse(text))
        if value.grad_fn is not None:
            made[text] = (value.grad_fn, value.output_nr)

    with Undo() as undo, torch.inference_mode(False), torch.enable_grad():
        for value in moving.values():
            value.requires_grad_(value.is_floating_point())
        handles = undo.hooks()
        for text in sites:
            module = module_at(model.module, parse(text).module)
            handles.append(module.register_forward_hook(lambda _module, _args, output, text=text: note(text, output)))
        outputs = model.forward(inputs.copy().update(moving))
    results = outputs.select(*model.out_keys, strict=False).values(include_nested=True, leaves_only=True)
    readers = _readers(value.grad_fn for value in results if value.grad_fn is not None)
    by_node = {node: text for text, (node, _) in made.items()}
    alone = {text: readers[key][0] for text, key in made.items() if len(readers[key]) == 1}
    return {text: by_node[reader] for text, reader in alone.items() if reader in by_node}


def _readers(roots: Iterable[_Node]) -> dict[tuple[_Node, int], list[_Node]]:
    """List, for each result of each node below the roots, the nodes that take it."""
    found: dict[tuple[_Node, int], list[_Node]] = defaultdict(list)
    waiting = list(roots)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for source, which in node.next_functions:
            if source is None:
                continue
            found[source, which].append(node)
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return found
