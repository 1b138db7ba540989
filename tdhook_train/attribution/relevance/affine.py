"""Linear and convolutional layers as functions of their weights, with a normalisation merged into them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AFFINE", "CONVOLUTIONS", "NORMALISED", "Affine", "merged_by"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AFFINE = (nn.Linear, *CONVOLUTIONS)
NORMALISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Affine:
    """A layer as a function of its input, its weight and its bias; the module itself is only read.

    Args:
        module: linear or convolutional.
        scale: of each output channel, by which a normalisation after the layer multiplies.
        shift: of each output channel, which it adds then.
    """

    def __init__(self, module: nn.Module, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        m: Any = module
        self.module = m
        self.spatial: int = 0 if isinstance(module, nn.Linear) else m.weight.ndim - 2
        self.transposed = isinstance(module, CONVOLUTIONS[3:])
        weight, bias = m.weight.detach(), m.bias
        bias = bias if bias is None else bias.detach()
        self.scale, self.shift = scale, shift
        if scale is not None and shift is not None:
            weight, bias = self._scaled(weight, scale), shift if bias is None else bias * scale + shift
        self.weight, self.bias = weight, bias

    @cached_property
    def plus(self) -> tuple[Tensor, Tensor | None]:
        """The positive parts of weight and bias."""
        return self.weight.clamp(min=0), self.bias if self.bias is None else self.bias.clamp(min=0)

    @cached_property
    def minus(self) -> tuple[Tensor, Tensor | None]:
        """The negative parts of weight and bias."""
        return self.weight.clamp(max=0), self.bias if self.bias is None else self.bias.clamp(max=0)

    def tilted(self, part: tuple[Tensor, Tensor | None], gamma: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with ``gamma`` times a part of them added."""
        weight, bias = part
        return self.weight + gamma * weight, bias if bias is None or self.bias is None else self.bias + gamma * bias

    def preactivation(self, output: Tensor) -> Tensor:
        """Return what the merged layer gives out, where the module gave ``output``."""
        if self.scale is None or self.shift is None:
            return output
        shape = [-1, *[1] * self.spatial]
        return output * self.scale.view(shape) + self.shift.view(shape)

    def out(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer with another weight and bias."""
        m = self.module
        if not self.spatial:
            return F.linear(x, weight, bias)
        if self.transposed:
            kernel: Any = _TRANSPOSED[self.spatial]
            return kernel(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
        return m._conv_forward(x, weight, bias)

    def back(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Return the transposed layer's output: ``gradient`` brought to the input."""
        m = self.module
        if not self.spatial:
            return gradient @ weight
        if m.padding_mode == "zeros" and not isinstance(m.padding, str) and x.ndim == self.spatial + 2:
            where = (m.stride, m.padding, m.dilation, self.transposed, m.output_padding, m.groups)
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *where, [True, False, False])[0]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.out(leaf, weight), leaf, gradient)[0]

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        if not self.transposed:
            return weight * scale.view(-1, *[1] * (weight.ndim - 1))
        groups = self.module.groups  # [in, out / groups, ...]: each group of inputs has outputs of its own
        each = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        return each.flatten(0, 1)


def merged_by(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a batch normalisation that goes by its running statistics; None, if by the batch."""
    n: Any = norm
    if n.training or n.running_mean is None:
        return None
    scale = (n.running_var + n.eps).rsqrt()
    scale = scale if n.weight is None else scale * n.weight.detach()
    return scale, (0.0 if n.bias is None else n.bias.detach()) - n.running_mean * scale
