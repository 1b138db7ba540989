"""The picture of a run goes to the loggers that take one, and lies on disk for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from small import data, fitted

from tdhook_train.callbacks import HealthCallback


def batch() -> list[Any]:
    return [part[:20] for part in data().tensors]


class Experiment:
    def __init__(self) -> None:
        self.given: list[Any] = []

    def log_artifact(self, run_id: str, path: str, artifact_path: str) -> None:
        self.given.append((run_id, Path(path).name, artifact_path))

    def add_image(self, name: str, image: Any, step: int, dataformats: str) -> None:
        self.given.append((name, image.ndim, image.dtype.name, step, dataformats))


class Stub(DummyLogger):
    """As MLflow's and W&B's loggers, as far as they are used here."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = Experiment()
        self.run_id = "r"

    @property
    def experiment(self) -> Any:
        return self.taken

    def log_image(self, key: str, images: list[str], step: int) -> None:
        self.taken.given.append((key, [Path(image).name for image in images], step))


def named(name: str) -> Stub:
    return type(name, (Stub,), {})()


def test_a_picture_goes_to_each_logger_in_its_own_way(tmp_path):
    loggers = {name: named(name) for name in ("MLFlowLogger", "WandbLogger", "TensorBoardLogger")}
    callback = HealthCallback(dirpath=tmp_path / "run", every_n_train_steps=6, batch=batch(), report=True)
    fitted(tmp_path, [callback], logger=[*loggers.values(), CSVLogger(tmp_path)])
    assert loggers["MLFlowLogger"].taken.given == [("r", "report.png", "health/12")]
    assert loggers["WandbLogger"].taken.given == [("health", ["report.png"], 12)]
    assert loggers["TensorBoardLogger"].taken.given == [("health", 3, "uint8", 12, "HWC")]
    assert (tmp_path / "run" / "report.html").is_file()


def test_tensorboard_itself_takes_it(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = HealthCallback(dirpath=tmp_path / "run", every_n_train_steps=6, batch=batch(), report=True)
    fitted(tmp_path, [callback], logger=TensorBoardLogger(tmp_path, name="tb"))
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    assert [event.step for event in events.Images("health")] == [12]
    assert [event.step for event in events.Scalars("health/effective_rank")] == [0, 6, 12]
