"""Pictures for loggers, which have no common way to take one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger

__all__ = ["show"]


def show(logger: Logger, name: str, picture: Path, step: int) -> bool:
    """Give a logger a picture; return whether it takes any. The file stays where it is.

    Args:
        logger: of Lightning.
        name: of the picture.
        picture: a PNG file.
        step: of the training.
    """
    for kind in type(logger).__mro__:
        if (give := _WAYS.get(kind.__name__)) is not None:
            give(logger, name, picture, step)
            return True
    return False


def _tensorboard(logger: Any, name: str, picture: Path, step: int) -> None:
    from PIL import Image  # which matplotlib, that drew the picture, brings

    logger.experiment.add_image(name, np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC")


def _by_log_image(logger: Any, name: str, picture: Path, step: int) -> None:
    logger.log_image(key=name, images=[str(picture)], step=step)


def _mlflow(logger: Any, name: str, picture: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(picture), artifact_path=f"{name}/{step}")


def _comet(logger: Any, name: str, picture: Path, step: int) -> None:
    logger.experiment.log_image(str(picture), name=name, step=step)


def _neptune(logger: Any, name: str, picture: Path, step: int) -> None:  # noqa: ARG001 - it keeps no step
    logger.experiment[name].append(str(picture))


_WAYS: Mapping[str, Callable[[Any, str, Path, int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _by_log_image,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "NeptuneLogger": _neptune,
}
