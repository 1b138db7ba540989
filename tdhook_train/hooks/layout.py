"""Where the units of an activation lie: the channels of a convolution's, whatever stands before them, else the last."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ELEMENTWISE", "laid_out_by", "unit_axis"]

ELEMENTWISE = (
    nn.Tanh, nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.LeakyReLU, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink, nn.Identity,
)  # fmt: skip

_BEHIND_CHANNELS: dict[type[nn.Module], int] = {
    kind: places
    for places, kinds in enumerate(
        (
            (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
            (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
            (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d),
        ),
        start=1,
    )
    for kind in kinds
} | {
    nn.InstanceNorm1d: 1, nn.BatchNorm2d: 2, nn.InstanceNorm2d: 2, nn.BatchNorm3d: 3, nn.InstanceNorm3d: 3,
    nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3,
}  # fmt: skip
_CHANNELS_SECOND = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm)  # these always have rows in front


def unit_axis(value: Tensor, module: nn.Module | None = None) -> int:
    """Say along which dimension the units of an activation lie.

    Args:
        value: with or without rows in front.
        module: what laid it out, where that is known: see :func:`laid_out_by`. Of any but a convolution, pooling or
            normalisation, a value of four dimensions counts as an image with rows in front.
    """
    for kind, places in _BEHIND_CHANNELS.items():
        if isinstance(module, kind) and value.ndim > places:
            return value.ndim - 1 - places
    if isinstance(module, _CHANNELS_SECOND) and value.ndim > 1:
        return 1
    if isinstance(module, nn.Linear | nn.RNNBase | nn.LayerNorm):
        return max(value.ndim - 1, 0)
    return 1 if value.ndim == 4 else max(value.ndim - 1, 0)


def laid_out_by(model: nn.Module, module: nn.Module) -> nn.Module:
    """Return the module that decides the dimensions of what a module gives out.

    That is the module itself, but for an activation in an ``nn.Sequential``, which keeps those of the module before it.
    """
    while isinstance(module, ELEMENTWISE):
        before = _before(model, module)
        while isinstance(before, nn.Sequential):
            before = next(reversed(before._modules.values()), None)
        if before is None:
            return module
        module = before
    return module


def _before(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """Return what runs before a module in an ``nn.Sequential``; None where that may be several or is not known."""
    lines = [part for part in model.modules() if isinstance(part, nn.Sequential)]
    places = [(line, i) for line in lines for i, part in enumerate(line) if part is module]
    if len(places) != 1:
        return None
    line, i = places[0]
    return line[i - 1] if i else _before(model, line)
