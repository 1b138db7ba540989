"""What attention layers weigh: read where a layer gives it out, asked of it again where it does not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.hooks.items import floating_items
from tdhook_train.hooks.kernels import untouched
from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.paths import Selection, selectors
from tdhook_train.undo import parts_of

__all__ = ["attends", "attention_weights"]


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention layer, by its class or the name of that."""
    return isinstance(module, nn.MultiheadAttention) or "attention" in type(module).__name__.lower()


def attention_weights(model: HookedModel, inputs: TensorDictBase, layers: Selection) -> dict[str, Tensor]:
    """Run one pass and return what attention layers weigh, in the order in which they run.

    An ``nn.MultiheadAttention`` is run again on what it was given, masks and all, and asked for its weights. Any other
    module has them in what it gives out: a distribution over its last dimension. Of modules inside one another the
    innermost counts.

    Args:
        model: the network.
        inputs: its inputs.
        layers: which modules.

    Returns:
        ``[batch, head, query, key]`` by path; a further call of a module as ``path@1`` and so on.

    Raises:
        NetworkError: no module gives weights.
    """
    wanted = [one for one in selectors(layers) if model.has(one)]
    chosen = {module: path for one in wanted for path, module in model.chosen(one)}
    found: dict[str, Tensor] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        within = f"{path}." if path else ""
        if any(name.startswith(within) for name in found):
            return  # what a module inside it gave
        weights = _asked(module, args, kwargs) if _drops_them(module) else _among(output)
        if weights is None:
            return
        calls = sum(name.split("@")[0] == path for name in found)
        found[f"{path}@{calls}" if calls else path] = weights

    with untouched(parts_of(model.module), graph=False) as undo:
        handles = undo.hooks()
        for module, path in chosen.items():
            handles.append(module.register_forward_hook(partial(note, path), with_kwargs=True))
        model.forward(inputs)
    if not found:
        raise NetworkError(
            f"none of {', '.join(map(repr, chosen.values()))} in {model.title} gives out attention weights; models of "
            "Hugging Face do with attn_implementation='eager', other modules beside their output"
        )
    with torch.inference_mode(False):
        return {path: (value.unsqueeze(1) if value.ndim == 3 else value).clone() for path, value in found.items()}


def _drops_them(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def _asked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
    given.arguments |= {"need_weights": True, "average_attn_weights": False}
    weights: Tensor | None = nn.MultiheadAttention.forward(*given.args, **given.kwargs)[1]
    if weights is not None and weights.ndim == 3:  # no batch: heads come first
        return weights.unsqueeze(0)
    return weights


def _among(output: Any) -> Tensor | None:
    """Find the weights in what a module gives out."""
    return next(_distributions(output), None)


def _distributions(output: Any) -> Iterator[Tensor]:
    for place, value in floating_items(output):
        beside = place not in ((), (0,))  # of three dimensions, the output itself is no weights
        if (value.ndim == 4 or (value.ndim == 3 and beside)) and value.numel() and _sums_to_one(value):
            yield value


def _sums_to_one(value: Tensor) -> bool:
    total = value.float().sum(-1)
    known = ((total - 1).abs() < 1e-2) | (total == 0) | total.isnan()  # 0 or NaN where everything is masked
    return bool(known.all()) and not bool((value < 0).any()) and bool((total != 0).any())
