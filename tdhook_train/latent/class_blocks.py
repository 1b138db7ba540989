"""What probes of classes share: classes of targets, and blocks of features that are solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tdhook_train.ops.classification import classes_of

__all__ = ["NUMBERS", "ClassBlocks", "class_labels", "numbered"]

_MAX_COEFFICIENTS = 4096  # the Hessian of a fit takes their square
NUMBERS = 1 << 24  # held at a time, as Hessians or as logits


class ClassBlocks:
    """Blocks of features and targets of classes: those of like width and number of classes are solved in one batch.

    Args:
        blocks: features, each ``[n, width]``.
        y: number of each row's class, ``[n, target]``.
        classes: how many each target has, ``[target]``.

    Attributes:
        reason: why a block cannot be solved for a target, ``[block, target]``, int8: 0 where it can, 1 for one class,
            4 for features that are not finite, 5 for too many.
    """

    def __init__(self, blocks: Sequence[Tensor], y: Tensor, classes: Tensor) -> None:
        self.blocks, self.y, self.classes = blocks, y, classes
        finite = torch.stack([block.sum() for block in blocks]).isfinite().cpu()  # NaN and infinity survive a sum
        widths = torch.tensor([block.shape[1] for block in blocks])
        wide = (widths[:, None] + 1) * torch.where(classes > 2, classes, 1) > _MAX_COEFFICIENTS
        reason = torch.where(wide, 5, torch.where(finite, 0, 4)[:, None])
        reason[:, classes < 2] = 1
        self.reason = reason.to(torch.int8)

    def batches(self, fits: int) -> Iterator[tuple[int, Tensor, list[int]]]:
        """Yield how many classes, the targets that have as many, and blocks of like width, as many as memory takes.

        Args:
            fits: of each block and target.
        """
        for k in self.classes[self.classes > 1].unique().tolist():
            of_k = (self.classes == k).nonzero()[:, 0]
            alike: dict[int, list[int]] = {}
            for i in (self.reason[:, of_k] == 0).any(1).nonzero()[:, 0].tolist():
                alike.setdefault(max(64, 1 << (self.blocks[i].shape[1] - 1).bit_length()), []).append(i)
            for some in alike.values():
                width = 1 + max(self.blocks[i].shape[1] for i in some)
                at_once = max(1, NUMBERS // (fits * ((k if k > 2 else 1) * width) ** 2))
                yield from ((k, of_k, some[i : i + at_once]) for i in range(0, len(some), at_once))


def numbered(targets: Mapping[str, Tensor], whose: str) -> tuple[Tensor, list[Tensor]]:
    """Return the number of each row's class, ``[n, target]``, on the CPU, and the classes of each target.

    Args:
        targets: ``[n]`` each.
        whose: the probe that asks.

    Raises:
        TargetError: a target is no whole number or boolean, or has too many classes.
    """
    classes = [classes_of(name, value, whose).cpu() for name, value in targets.items()]
    y = [value.cpu().unique(return_inverse=True)[1] for value in targets.values()]
    return torch.stack(y, 1), classes


def class_labels(targets: Mapping[str, Tensor], whose: str) -> list[str]:
    """Return the classes of each target as one text, for labels; raises as :func:`numbered` does."""
    return [", ".join(map(str, own.tolist())) for own in numbered(targets, whose)[1]]
