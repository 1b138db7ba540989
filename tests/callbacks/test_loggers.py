"""What loggers wrote, read back by their own readers, is what the buffer holds."""

from __future__ import annotations

import csv
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from small import data, fitted, same
from tensordict import TensorDict

from tdhook_train import ArtifactBuffer, At, Every
from tdhook_train.callbacks import (
    ActivationCallback,
    AttributionCallback,
    EditCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
    SimilarityCallback,
)
from tdhook_train.callbacks.telling import Telling
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import Ablate, RidgeProbe

TARGETS = {"a:0": ("target", 0), "a_0": ("input", 1), "b[1], (c)": ("input", 2), "ü": ("input", 3), "x.y/z": "target"}
PLAIN = {"a:0": "a_0", "a_0": "a_0_2", "b[1], (c)": "b_1__ _c_", "ü": "_", "x.y/z": "x.y/z"}  # as MLflow takes them

Lines = dict[str, dict[int, float]]


def batch() -> TensorDict:
    x, y = (part[:30] for part in data().tensors)
    return TensorDict(input=x, target=y, batch_size=[30])


def callbacks(path: Path, **options: Any) -> list[Any]:
    """Two rows of one name, in two callbacks, due at other steps; targets with every kind of character."""
    options = {"batch": batch(), "report": True} | options
    first, second = (RidgeProbe("net.*", target=target, shifts=0) for target in (TARGETS, "target"))
    health = {"health": EffectiveRank("net.*")}
    return [
        ObserverCallback({"p": first}, every_n_train_steps=6, dirpath=path / "one", **options),
        ObserverCallback({"p": second}, name="two", when=At(0) | Every(optim_steps=4), dirpath=path / "two", **options),
        ObserverCallback(health, name="last", when=Every(optim_steps=12), dirpath=path / "last", **options),
    ]


def expected(path: Path) -> Lines:
    found: Lines = {}
    with ArtifactBuffer.open(path / "one") as buffer:
        rows = buffer["p"]
        means = rows.series("r2").nanmean(1)
        for i, target in enumerate(TARGETS):
            found[f"p/r2/{target}"] = dict(zip(rows.steps.tolist(), means[:, i].tolist(), strict=True))
    for name, row, key in (("two", "p", "r2"), ("last", "health", "effective_rank")):
        with ArtifactBuffer.open(path / name) as buffer:
            rows = buffer[row]
            means = rows.series(key).nanmean(1).flatten().tolist()
            ending = "/target" if name == "two" else ""
            found[f"{name}/{row}/{key}{ending}"] = dict(zip(rows.steps.tolist(), means, strict=True))
    return found


def leveldb_log(given: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format, after 7 bytes of its own."""
    at, parts = 7, b""
    while at < len(given):
        if (left := 32768 - at % 32768) < 7:  # a block ends
            at += left
            continue
        size, kind = struct.unpack_from("<HB", given, at + 4)  # after a checksum
        parts += given[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


class Csv:
    missing = ""
    pictures = False

    def logger(self, path: Path) -> Any:
        return CSVLogger(path, name="csv")

    def lines(self, path: Path, logger: Any) -> Lines:
        with (path / "csv" / "version_0" / "metrics.csv").open() as opened:
            given = list(csv.DictReader(opened))
        return {
            key: {int(line["step"]): float(line[key]) for line in given if line[key]}
            for key in given[0]
            if key not in ("step", "epoch")
        }


class TensorBoard:
    missing = "tensorboard"
    pictures = True

    def logger(self, path: Path) -> Any:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(path, name="tb")

    def lines(self, path: Path, logger: Any) -> Lines:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.events = EventAccumulator(str(path / "tb" / "version_0")).Reload()
        return {
            tag: {event.step: event.value for event in self.events.Scalars(tag)}
            for tag in self.events.Tags()["scalars"]
            if tag not in ("epoch", "hp_metric")
        }

    def shown(self, path: Path, logger: Any) -> dict[str, int]:
        return {tag: self.events.Images(tag)[0].step for tag in self.events.Tags()["images"]}


class Wandb:
    missing = "wandb"
    pictures = True

    def logger(self, path: Path) -> Any:
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="tests", save_dir=path, offline=True)

    def history(self, path: Path) -> list[dict[str, Any]]:
        from wandb.proto.wandb_internal_pb2 import Record

        (file,) = path.glob("wandb/offline-run-*/*.wandb")
        found = []
        for payload in leveldb_log(file.read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        return found

    def lines(self, path: Path, logger: Any) -> Lines:
        import wandb

        logger.experiment.finish()
        wandb.teardown()  # the process that writes the file may not be done before
        self.given = self.history(path)
        assert [line["_step"] for line in self.given] == list(range(len(self.given)))  # nothing was thrown away
        found: Lines = {}
        for line in self.given:
            for key, value in line.items():
                if "/" in key and isinstance(value, float | int) and not key.startswith("trainer/"):
                    found.setdefault(key, {})[line["trainer/global_step"]] = value
        return found

    def shown(self, path: Path, logger: Any) -> dict[str, int]:
        ending = "/filenames"
        pictures = {key: line for line in self.given for key in line if key.endswith(ending)}
        for key, line in pictures.items():
            (name,) = line[key]
            (file,) = path.glob(f"wandb/offline-run-*/files/{name}")
            assert file.read_bytes().startswith(b"\x89PNG")
        return {key.removesuffix(ending): line["trainer/global_step"] for key, line in pictures.items()}


class Mlflow:
    missing = "mlflow"
    pictures = True

    def logger(self, path: Path) -> Any:
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger("tests", tracking_uri=f"file:{path / 'ml'}")

    def lines(self, path: Path, logger: Any) -> Lines:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"file:{path / 'ml'}")
        keys = client.get_run(logger.run_id).data.metrics.keys() - {"epoch"}
        found = {key: {m.step: m.value for m in client.get_metric_history(logger.run_id, key)} for key in keys}
        original = {f"p/r2/{plain}": f"p/r2/{name}" for name, plain in PLAIN.items()}
        return {original.get(key, key): line for key, line in found.items()}

    def shown(self, path: Path, logger: Any) -> dict[str, int]:
        return {file.parent.parent.name: int(file.parent.name) for file in path.glob("ml/*/*/artifacts/*/*/report.png")}


KINDS = {"csv": Csv, "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for a database otherwise


def kinds(*wanted: str) -> list[Any]:
    for name in wanted:
        if missing := KINDS[name].missing:
            pytest.importorskip(missing, reason=f"{missing} cannot be imported", exc_type=ImportError)
    return [KINDS[name]() for name in wanted]


def check(given: list[Any], path: Path) -> None:
    loggers = [kind.logger(path) for kind in given]
    fitted(path, callbacks(path / "runs"), logger=loggers)
    wanted = expected(path / "runs")
    for kind, logger in zip(given, loggers, strict=True):
        lines = kind.lines(path, logger)
        for key, line in wanted.items():
            assert lines[key] == pytest.approx(line, rel=1e-6), (type(kind).__name__, key)
        if kind.pictures:
            assert kind.shown(path, logger) == {"observer": 12, "two": 12, "last": 12}


@pytest.mark.parametrize("name", KINDS)
def test_a_logger_holds_what_the_buffer_holds(name, tmp_path, quiet):
    check(kinds(name), tmp_path)


def test_all_loggers_at_once(tmp_path, quiet):
    check(kinds(*KINDS), tmp_path)


def test_mlflow_is_told_names_that_it_takes(tmp_path):
    """Whether it is installed or not: what Lightning's logger would change, or MLflow refuse, is changed before."""

    class MLFlowLogger(DummyLogger):
        def log_metrics(self, metrics: Any, step: int) -> None:
            self.given = dict(metrics), step

    logger = MLFlowLogger()
    trainer = type("Fit", (), {"loggers": [logger], "progress_bar_callback": None, "callback_metrics": {}})()
    telling = Telling(trainer, "observer", log_metrics=True, prog_bar=True)
    metrics = {f"p/r2/{target}": float(i) for i, target in enumerate(TARGETS)}
    telling.log_metrics(metrics | {"p/../r2//": 7.0, "p/" + "n" * 300: 8.0, "p/" + "n" * 301: 9.0}, 3)
    told, step = logger.given
    assert step == 3
    assert list(told)[:5] == [f"p/r2/{plain}" for plain in PLAIN.values()]
    assert list(told.values()) == [*map(float, range(5)), 7.0, 8.0, 9.0]
    assert [len(key) for key in list(told)[5:]] == [len("p/_/r2/_/_"), 250, 244]
    telling.log_metrics({"p/r2/a_0": 5.0}, 4)
    assert logger.given == ({"p/r2/a_0_2": 5.0}, 4)  # a name is kept
    assert set(trainer.callback_metrics) >= metrics.keys()


def test_values_of_a_row_that_is_not_due_are_not_told_again(tmp_path):
    class Notes(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.given: list[Any] = []

        def log_metrics(self, metrics: Any, step: int) -> None:
            self.given += [(step, key) for key in metrics if key != "epoch"]

    notes = Notes()
    one, two = ({"often": EffectiveRank("net.0")}, {"seldom": EffectiveRank("net.4")})
    when = {"often": Every(optim_steps=4), "seldom": Every(optim_steps=8)}
    fitted(tmp_path, [ObserverCallback(one | two, when=when, batch=batch(), dirpath=tmp_path / "run")], logger=notes)
    means = [(step, key) for step, key in notes.given if key.endswith("/effective_rank")]
    often, seldom = "often/effective_rank", "seldom/effective_rank"
    assert means == [(4, often), (8, often), (8, seldom), (12, often), (12, seldom)]


def test_callbacks_that_would_overwrite_each_others_values_are_refused(tmp_path):
    probes = [
        ProbeCallback("net.*", batch=batch(), dirpath=tmp_path / "one"),
        ObserverCallback({"probe": EffectiveRank()}, batch=batch(), dirpath=tmp_path / "two"),
    ]
    with pytest.raises(MisconfigurationException, match=r"'probe' and 'observer' would both log 'probe/...'; give one"):
        fitted(tmp_path, probes)
    assert not list(tmp_path.iterdir())


NAMED = {
    "activations": lambda **o: ActivationCallback("net.*", **o),
    "attribution": lambda **o: AttributionCallback(**o),
    "edit": lambda **o: EditCallback(Ablate("net.4", 0), when=At(2), steps=2, dirpath=o["dirpath"]),
    "health": lambda **o: HealthCallback("net.*", **o),
    "patching": lambda **o: PatchingCallback("net.*", "output", 4, **o),
    "probe": lambda **o: ProbeCallback("net.*", **o),
    "similarity": lambda **o: SimilarityCallback("net.*", ("initial", "previous", "layers"), **o),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_a_callback_says_that_it_logs_is_what_it_logs(name, tmp_path):
    class Notes(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.keys = set(trainer.callback_metrics)

    notes = Notes()
    callback = NAMED[name](batch=batch(), every_n_train_steps=6, dirpath=tmp_path / "run")
    fitted(tmp_path, [callback, notes])
    said = set(re.findall(rf"``({name}/[^`]+)``", type(callback).__doc__ or ""))
    said = {key.replace("<target>", "target").replace("<metric>", "output") for key in said}
    said |= {key.replace("<tau>", tau) for key in said if "<tau>" in key for tau in ("0.0", "0.025", "0.1")}
    said |= {key.replace("<layer>", f"net.{i}") for key in said if "<layer>" in key for i in range(6)}
    absent = {"probe/r2_null/target", "similarity/cka_reference"}  # of independent rows, and without a reference
    assert {key for key in said if "<" not in key} - absent == notes.keys


def test_nothing_is_told_where_that_is_not_wanted(tmp_path):
    seen: list[set[str]] = []

    class Looks(HealthCallback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(set(trainer.callback_metrics))

    fitted(tmp_path, [Looks("net.*", batch=batch(), dirpath=tmp_path / "run", log_metrics=False)])
    assert seen == [set(), set()]


def test_a_logger_does_not_change_the_fit(tmp_path):
    bare = fitted(tmp_path / "bare", [])
    watched = fitted(tmp_path / "watched", callbacks(tmp_path, report=False), logger=CSVLogger(tmp_path))
    assert all(same(value, watched[part]) for part, value in bare.items())
    assert not torch.is_inference_mode_enabled()
