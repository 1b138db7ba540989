"""Relevance through what a forward does between its modules: sums, products, means, activations, softmax, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdhook_train.attribution.relevance.rules import stabilised
from tdhook_train.errors import NetworkError

__all__ = [
    "ACTIVATIONS",
    "BILINEAR",
    "DIVIDED",
    "MULTIPLIED",
    "Back",
    "Functions",
    "live_in",
    "plain",
    "way",
    "with_values",
    "writes",
]

Back = Callable[[Tensor], Tensor | Sequence[Tensor | None]]
"""What goes back into some values, from the relevance of what was made of them."""

ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "tanh"),
    *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softplus", "softsign", "softshrink", "tanhshrink"),
    *("threshold", "prelu", "rrelu"),
}
_ELEMENTWISE = ACTIVATIONS | {"neg", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}
_SUMS = {"add", "iadd", "radd", "sub", "isub", "rsub", "subtract", "sum", "mean"}
_SUMS |= {f"{kind}avg_pool{n}d" for n in (1, 2, 3) for kind in ("", "adaptive_")}
MULTIPLIED = {"mul", "imul", "rmul", "multiply"}
DIVIDED = {"div", "idiv", "truediv", "itruediv", "true_divide", "divide"}
BILINEAR = {"matmul", "rmatmul", "bmm", "mm", "mv", "einsum", "linear", "bilinear"}
BILINEAR |= {f"conv{kind}{n}d" for n in (1, 2, 3) for kind in ("", "_transpose")}


class _Way(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: Back, output: Tensor, *_values: Tensor) -> Tensor:
        ctx.back = back
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = ctx.back(relevance)
        return None, None, *([found] if isinstance(found, Tensor) else found)


def way(back: Back, output: Tensor, *values: Tensor) -> Tensor:
    """Return ``output`` as something made of ``values``, to which relevance goes ``back``."""
    result: Tensor = _Way.apply(back, output.detach(), *values)
    return result


class Functions(TorchFunctionMode):
    """While the block lasts, sends relevance back through torch's functions by rules instead of by the gradient.

    Sums, means and average pooling: in proportion to what each part adds. Activations and normalisations: as it is.
    Products of two activations: half to each; scaling by a constant: as it is. Matrix products: in proportion, half to
    each of two activations. Softmax: by its linearisation. All else (max pooling, indexing, reshaping): the gradient.
    What was made of parameters alone counts as constant.

    A function that works in place gives its result out; a forward that does not take it from there is not followed.

    Args:
        stabiliser: by which denominators are kept from zero.

    Source: Achtibat et al. 2024, arXiv:2402.05602.
    """

    own: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """What is done in place of a function, by its name without underscores: given itself, values in the graph, and
    arguments."""

    def __init__(self, stabiliser: float = 1e-6) -> None:
        super().__init__()
        self.stabiliser = stabiliser
        self.over = False
        """Whether the forward has come to its end: from then on, functions are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Meet one call of a function."""
        kwargs = kwargs or {}
        if self.over or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        live = live_in(args, kwargs)
        if live and name in self.own:
            return self.own[name](self, func, live, args, kwargs)
        found = func(*args, **kwargs)
        if not live and any(isinstance(value, nn.Parameter) for value in _tensors((args, kwargs))):
            made = {id(value): value.detach() for value in _tensors(found) if _is_live(value)}
            return with_values(found, made) if made else found
        return found

    # ------------------------------------------------------------------ the ways back

    def elementwise(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """R_i = R_i."""
        x, spare = live[0], [None] * (len(live) - 1)
        out = plain(func, args, kwargs)
        return way(lambda relevance: [relevance.sum_to_size(x.shape), *spare], out, *live)

    def scaled(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """A product of two activations: half to each; by a constant: all, but where the constant is zero."""
        out = plain(func, args, kwargs)
        divides = "div" in func.__name__
        by = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and not _is_live(value)]

        def back(relevance: Tensor) -> list[Tensor | None]:
            if by and not divides:
                relevance = torch.where(by[0] == 0, 0, relevance)
            if divides and len(live) > 1:  # an activation that divides, such as a deviation, counts as constant
                return [relevance.sum_to_size(live[0].shape), None]
            return [(relevance / len(live)).sum_to_size(value.shape) for value in live]

        return way(back, out, *live)

    def sums(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """R_i = x_i / z R: whatever else is added, a bias say, keeps its part."""
        return self._in_proportion(func, live, args, kwargs, 1)

    def bilinear(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """In proportion to each addend of a matrix product, half to each of two activations."""
        return self._in_proportion(func, live, args, kwargs, len(live))

    def softmax(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """R_i = x_i (R_i - s_i sum_j R_j)."""
        s, dim = plain(func, args, kwargs), _axis(args, kwargs)
        x = live[0].detach()

        def back(relevance: Tensor) -> Tensor:
            found = x * (relevance - s * relevance.sum(dim, keepdim=True))
            return torch.where(x.isinf(), 0, found)  # where it is masked

        return way(back, s, live[0])

    def attention(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Fused attention, as the products and the softmax that it is made of."""
        with self:
            return _attention(*args, **kwargs)

    def many_heads(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """What ``nn.MultiheadAttention`` calls, as the products and the softmax that it is made of."""
        names = ("query", "key", "value", "embed_dim", "heads", "in_weight", "in_bias", "bias_k", "bias_v", "zero")
        every = (*names, "dropout_p", "out_weight", "out_bias")
        with self:
            return _many_heads(dict(zip(every, args, strict=True)), kwargs)

    def _in_proportion(self, func: Any, live: list[Tensor], args: Any, kwargs: Any, among: int) -> Any:
        z = plain(func, args, kwargs)
        if func.__name__.strip("_") in {"add", "iadd", "radd"} and not kwargs:

            def added(relevance: Tensor) -> list[Tensor]:
                share = relevance / stabilised(z, self.stabiliser)
                return [(value.detach() * share).sum_to_size(value.shape) for value in live]

            return way(added, z, *live)

        def back(relevance: Tensor) -> list[Tensor | None]:
            known: dict[int, Tensor] = {id(v): v.detach().requires_grad_() for v in live}
            with torch.enable_grad():
                again = func(*with_values(args, known), **with_values(kwargs, known))
                share = relevance / stabilised(z, self.stabiliser)
                each = list(known.values())
                grads = iter(torch.autograd.grad(again, each, share / among))
            got = {key: leaf.detach() * grad for (key, leaf), grad in zip(known.items(), grads, strict=True)}
            return [got.pop(id(value), None) for value in live]  # a value given twice has it all at once

        return way(back, z, *live)


Functions.own = {
    **dict.fromkeys(_ELEMENTWISE, Functions.elementwise),
    **dict.fromkeys(_SUMS, Functions.sums),
    **dict.fromkeys(MULTIPLIED | DIVIDED, Functions.scaled),
    **dict.fromkeys(BILINEAR, Functions.bilinear),
    "softmax": Functions.softmax,
    "scaled_dot_product_attention": Functions.attention,
    "multi_head_attention_forward": Functions.many_heads,
}


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    given = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), rest, strict=False)) | named
    attn_mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("is_causal"):
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    return scores.softmax(-1) @ value


def _many_heads(given: dict[str, Any], rest: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    if given["bias_k"] is not None or given["zero"] or rest.get("static_k") is not None:
        raise NetworkError("no way back is known through attention with bias_k or add_zero_attn")
    parts = [given["query"], given["key"], given["value"]]
    single = parts[0].ndim == 2
    parts = [part.unsqueeze(1) for part in parts] if single else parts  # [time, row, feature]
    separate = [rest.get(f"{name}_proj_weight") for name in "qkv"]
    weights = separate if rest.get("use_separate_proj_weight") else given["in_weight"].chunk(3)
    biases = [None] * 3 if given["in_bias"] is None else given["in_bias"].chunk(3)
    heads = given["heads"]
    q, k, v = (
        F.linear(part, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for part, weight, bias in zip(parts, weights, biases, strict=True)
    )
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = _masked(scores, rest.get("attn_mask"), lambda m: m.unflatten(0, (-1, heads)) if m.ndim == 3 else m)
    scores = _masked(scores, rest.get("key_padding_mask"), lambda m: m.view(-1, 1, 1, m.shape[-1]))
    attention = scores.softmax(-1)
    mixed = (attention @ v).permute(2, 0, 1, 3).flatten(2)
    out = F.linear(mixed, given["out_weight"], given["out_bias"])
    out, shown = (out.squeeze(1), attention.squeeze(0)) if single else (out, attention)
    if not rest.get("need_weights", True):
        return out, None
    return out, shown.detach().mean(-3) if rest.get("average_attn_weights", True) else shown.detach()


def _masked(scores: Tensor, mask: Tensor | None, shaped: Callable[[Tensor], Tensor]) -> Tensor:
    if mask is None:
        return scores
    mask = shaped(mask)
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def live_in(*given: Any) -> list[Tensor]:
    """Return the values among some arguments that are in the graph; parameters are none."""
    return [value for value in _tensors(given) if _is_live(value)]


def plain(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return what a function gives out, outside the graph; one that works in place works on a copy."""
    copied = writes(func, kwargs)
    known = {id(v): v.detach().clone() if copied else v.detach() for v in _tensors((args, kwargs))}
    found: Tensor = func(*with_values(args, known), **with_values(kwargs, known))
    return found


def writes(func: Any, kwargs: Any) -> bool:
    """Whether a function works in place, on its first argument."""
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and name[-2] != "_") or bool(kwargs.get("inplace"))


def with_values(given: Any, known: dict[int, Tensor]) -> Any:
    """Put other values in the place of some tensors among arguments, by their ids."""
    if isinstance(given, Tensor):
        return known.get(id(given), given)
    if type(given) in (tuple, list):
        return type(given)(with_values(one, known) for one in given)
    return {key: with_values(one, known) for key, one in given.items()} if type(given) is dict else given


def _tensors(given: Any) -> Iterable[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif type(given) in (tuple, list):
        for one in given:
            yield from _tensors(one)
    elif type(given) is dict:
        yield from _tensors(list(given.values()))


def _is_live(value: Tensor) -> bool:
    return value.requires_grad and not isinstance(value, nn.Parameter)


def _axis(args: Any, kwargs: Any) -> int:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return -1 if dim is None else int(dim)
