"""Coefficients of relevance: what each value of a network is multiplied by to give its relevance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tdhook_train.attribution.relevance.functions import (
    ACTIVATIONS,
    BILINEAR,
    DIVIDED,
    MULTIPLIED,
    Back,
    Functions,
    live_in,
    plain,
    way,
    with_values,
    writes,
)
from tdhook_train.hooks.members import Members

__all__ = ["Coefficients"]

_NORMS: dict[str, tuple[str, ...]] = {  # places of their arguments
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
_FIRST = {"embedding", "embedding_bag", "linear", *(name for name in BILINEAR if name.startswith("conv"))}
_MIXING = ("Mm", "Bmm", "Baddbmm", "Addmm", "Mv", "Dot", "Convolution", "Sum", "Mean", "_Way")  # nodes of the graph


class Coefficients(Functions):
    """While the block lasts, sends back through torch's functions not relevance R_i but c_i, where R_i = x_i c_i.

    Sums and layers that are linear: the gradient, which is LRP-0. Activations: (f(x) - f(0)) / x, in which f(0) counts
    as a bias. Normalisations: the gradient with the deviation held constant. Products of activations: the gradient,
    half to each. What stands in a product with other values and came out of a softmax, or is the inverse of a
    deviation, is held constant, and so is what divides. All else (max pooling, indexing, a softmax that gives the
    network's output, recurrent layers): the gradient.

    Args:
        attention: whether the weights that come out of a softmax are held constant, or they and the matrix products
            around them go by the gradient.

    Source: Jafari et al. 2025, arXiv:2508.21258; of normalisations and attention, Ali et al. 2022, arXiv:2202.07304.
    """

    own: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    def __init__(self, attention: Literal["constant", "gradient"] = "constant") -> None:
        super().__init__()
        self.weights = attention
        self.marked: set[Any] = set()
        """Nodes of the graph that made weights: softmax, inverse deviations."""
        self.lost = False
        """Whether values went into ``torch.vmap``, where no rule follows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Meet one call of a function; what a layer makes of integers is where the graph begins."""
        if any(Members.are_in(value) for value in args if isinstance(value, Tensor)):
            self.lost = self.lost or not self.over
            return func(*args, **(kwargs or {}))
        found = super().__torch_function__(func, types, args, kwargs)
        begins = not self.over and torch.is_grad_enabled() and getattr(func, "__name__", "") in _FIRST
        if begins and args and not isinstance(args[0], nn.Parameter) and not found.requires_grad:
            return found.detach().requires_grad_().clone()  # no leaf: the next function may work in place
        return found

    # ------------------------------------------------------------------ the ways back

    def activation(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """c_i = (f(x_i) - f(0)) / x_i c_j."""
        x, spare = live[0], [None] * (len(live) - 1)
        out = plain(func, args, kwargs)
        slope = _secant(
            lambda value: func(*with_values(args, {id(x): value}), **with_values(kwargs, {id(x): value})), x
        )
        found = _bent(lambda c: [c * slope, *spare], out, *live)
        return x.copy_(found) if writes(func, kwargs) else found

    def power(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """As an activation; inverse powers are weights."""
        by = kwargs.get("exponent", args[1] if len(args) > 1 else None)
        if not isinstance(by, int | float) or by == 0:
            return func(*args, **kwargs)
        return (self.activation if by > 0 else self.weight)(func, live, args, kwargs)

    def normalised(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """c_i = sum_j c_j d/dx_i w_j (x_j - mean) / std, the deviation held constant."""
        name = func.__name__
        given = dict(zip(_NORMS[name], args, strict=False)) | kwargs
        x, weight, eps = given["input"], given.get("weight"), given.get("eps")
        if len(live) > 1 or not given.get("use_input_stats", True):  # by running statistics, it is linear
            return func(*args, **kwargs)
        by_channel, centred = name in {"group_norm", "instance_norm"}, name != "rms_norm"
        if by_channel:
            shape = (x.shape[0], given.get("num_groups", x.shape[1]), -1)
        else:
            shape = (*x.shape[: x.ndim - len(given["normalized_shape"])], -1)
        values = x.detach().reshape(shape)
        values = values - values.mean(-1, keepdim=True) if centred else values
        eps = torch.finfo(x.dtype).eps if eps is None and name == "rms_norm" else 1e-5 if eps is None else eps
        deviation = (values.square().mean(-1, keepdim=True) + eps).sqrt()

        def back(c: Tensor) -> Tensor:
            if weight is not None:
                c = c * (weight.view(-1, *[1] * (x.ndim - 2)) if by_channel else weight)
            c = c.reshape(shape) / deviation
            return (c - c.mean(-1, keepdim=True) if centred else c).reshape(x.shape)

        return _bent(back, plain(func, args, kwargs), x)

    def product(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """c_a = b c_j / 2, and none for weights: then all of it goes to the other."""
        held = {id(value): value.detach() for value in live if self._weighs(value)}
        left = [value for value in live if id(value) not in held]
        if not left:  # nothing else to go to
            held, left = {}, live
        if changes := writes(func, kwargs):
            func, held = torch.mul, {id(args[0]): args[0].clone()} | held
        found = func(*with_values(args, held), **with_values(kwargs, held))
        found = found if len(left) == 1 else _bent(lambda c: c / len(left), found, found)
        return args[0].copy_(found) if changes else found

    def matrix_product(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """As a product, unless attention goes by the gradient."""
        return (self.product if self.weights == "constant" else _gradient)(func, live, args, kwargs)

    def quotient(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """c_a = c_j / b: what divides is held constant."""
        over = args[0] if args else kwargs["input"]
        divides = {id(value): value.detach() for value in live if value is not over}
        if not (isinstance(over, Tensor) and live_in(over)):
            return func(*args, **kwargs)
        return func(*with_values(args, divides), **with_values(kwargs, divides))

    def gated(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:  # noqa: ARG002
        """The product that it is made of."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        with self:
            value, gate = live[0].chunk(2, dim)
            return value * gate.sigmoid()

    def softmax(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """Weights, unless attention goes by the gradient."""
        return (self.weight if self.weights == "constant" else _gradient)(func, live, args, kwargs)

    def weight(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Tensor:
        """By the gradient, and held constant in products."""
        found: Tensor = _gradient(func, live, args, kwargs)
        self.marked.add(found.grad_fn)
        return found

    def _weighs(self, value: Tensor) -> bool:
        """Whether a value is a weight, but for masks, dropout and its shape."""
        node = value.grad_fn
        while node is not None and node not in self.marked:
            before = [one for one, _ in node.next_functions if one is not None]
            if len(before) != 1 or node.name().startswith(_MIXING):
                return False
            node = before[0]
        return node is not None


def _gradient(func: Any, live: Sequence[Tensor], args: Any, kwargs: Any) -> Any:  # noqa: ARG001 - as every other way
    return func(*args, **kwargs)


def _bent(back: Back, output: Tensor, *values: Tensor) -> Tensor:
    return way(back, output, *values).clone()  # which the next function may write to


def _secant(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return (f(x) - f(0)) / x, and f'(x / 2) near zero, where a difference has no digits left."""
    at, near = x.detach(), x.detach().abs() < torch.finfo(x.dtype).eps ** (1 / 3)
    with torch.enable_grad():
        half = (at / 2).requires_grad_()
        (tangent,) = torch.autograd.grad(f(half.clone()).sum(), half)
    with torch.no_grad():
        rise = f(at.clone()) - f(torch.zeros_like(at))
    return torch.where(near, tangent, rise / torch.where(near, 1, at))


Coefficients.own = {
    **dict.fromkeys(ACTIVATIONS | {"square"}, Coefficients.activation),
    **dict.fromkeys(("pow", "ipow"), Coefficients.power),
    **dict.fromkeys(_NORMS, Coefficients.normalised),
    **dict.fromkeys(MULTIPLIED, Coefficients.product),
    **dict.fromkeys(DIVIDED, Coefficients.quotient),
    **dict.fromkeys(BILINEAR, Coefficients.matrix_product),
    **dict.fromkeys(("rsqrt", "reciprocal", "rtruediv", "rdiv"), Coefficients.weight),
    "softmax": Coefficients.softmax,
    "glu": Coefficients.gated,
    "scaled_dot_product_attention": Functions.attention,
    "multi_head_attention_forward": Functions.many_heads,
}
