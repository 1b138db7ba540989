"""Loggers of TorchRL and Lightning are told what can be drawn as a line."""

import csv
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger as LightningCSV
from tensordict import TensorDict
from torch import nn
from torchrl.record import CSVLogger

from tdhook_train import At, Every, Method, Observer
from tdhook_train.errors import SettingsError
from tdhook_train.observer.scalars import scalars
from tdhook_train.ops.join import Measured


@dataclass(frozen=True)
class Weights(Method):
    """Numbers of each kind that a row may hold."""

    writes: ClassVar = {"mean": "layer", "each": "batch", "code": "", "nothing": ""}

    def measure(self, seen, model):
        bias = model.module.bias.detach()
        values = {"mean": torch.stack([bias.mean(), bias.mean() * torch.nan]), "each": torch.ones(len(seen.batch))}
        return TensorDict(values | {"code": torch.tensor(3, dtype=torch.int8), "nothing": torch.tensor(torch.nan)})

    def labels(self, model, seen):
        return {"layer": ["a", "b"]}


def observed(path, steps=5, **options):
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    with Observer({"w": Weights()}, when=At(0) | Every(optim_steps=2), into=path, **options) as observer:
        for step in range(steps):
            observer.step(model, TensorDict(input=torch.zeros(3, 2), batch_size=[3]), step=step)
            with torch.no_grad():
                model.bias += 1
        return observer


def test_torchrls_and_lightnings_loggers_get_the_mean_of_each_key(tmp_path):
    torchrl = CSVLogger("run", log_dir=str(tmp_path / "torchrl"))
    lightning = LightningCSV(str(tmp_path / "lightning"))
    observer = observed(tmp_path / "run", loggers=[torchrl, lightning])
    lightning.save()
    assert observer.scalars == {"w/mean": 4.0}
    file = next(path for path in (tmp_path / "torchrl").rglob("*.csv") if path.stem.endswith("mean"))
    with file.open() as opened:
        assert [[float(x) for x in line] for line in csv.reader(opened)] == [[0, 0], [2, 2], [4, 4]]
    with next((tmp_path / "lightning").rglob("metrics.csv")).open() as opened:
        rows = [(int(line["step"]), float(line["w/mean"])) for line in csv.DictReader(opened)]
    assert rows == [(0, 0.0), (2, 2.0), (4, 4.0)]


def test_one_logger_needs_no_list_and_what_is_none_is_refused(tmp_path):
    class Told:
        def log_metrics(self, metrics, step):
            self.last = metrics, step

    told = Told()
    observed(tmp_path / "one", loggers=told)
    assert told.last == ({"w/mean": 4.0}, 4)
    with pytest.raises(SettingsError, match=r"loggers='tensorboard' is no logger"):
        observed(tmp_path / "none", loggers="tensorboard")


def test_a_line_is_a_mean_over_what_is_a_number():
    values = {"a": torch.tensor([1.0, torch.nan, 3.0]), ("n", "b"): torch.tensor(2.0), "k": torch.tensor(1)}
    row = Measured(values | {"rows": torch.ones(3)}, {"a": ("layer",), "rows": ("batch",)})
    assert scalars("x", row) == {"x/a": 2.0, "x/n.b": 2.0}


def test_networks_and_targets_are_lines_of_their_own_and_layers_are_averaged():
    layers, targets = ["actor.0", "actor.1", "q.0.0"], ["speed", "angle"]
    r2 = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.9, torch.nan]])
    values = {"r2": r2, "alpha": r2 + 1, ("q.0", "gap"): torch.tensor([1.0, 3.0])}
    dims = {"r2": ("layer", "target"), "alpha": ("layer", "target"), ("q.0", "gap"): ("unit",)}
    row = Measured(values, dims, {"layer": layers, "target": targets, "unit": ["a", "b"]})
    found = scalars("probe", row, networks=["actor", "q.0"], shown=["r2", "gap"])
    expected = {"r2/actor/speed": 0.2, "r2/actor/angle": 0.3, "r2/q.0/speed": 0.9, "q.0.gap": 2.0}
    assert found == {f"probe/{key}": pytest.approx(value) for key, value in expected.items()}
    one = Measured({"r2": r2[:2]}, {"r2": ("layer", "target")}, {"layer": ["0", "1"], "target": targets})
    assert scalars("probe", one, networks=[""]) == {
        "probe/r2/speed": pytest.approx(0.2),
        "probe/r2/angle": pytest.approx(0.3),
    }


def test_rows_that_were_all_dropped_do_not_stop_a_run_that_goes_on(tmp_path):
    observer = observed(tmp_path)
    state = observer.state_dict() | {"clock": {"step": -1, "frames": 0, "epoch": 0, "batches": 0, "seconds": 0.0}}
    with Observer({"w": Weights()}, when=At(0), into=tmp_path, resume=True) as again:
        again.load_state_dict(state | {"measured_step": None})
        assert len(again.buffer["w"]) == 0
        assert again.step(nn.Linear(2, 2), TensorDict(input=torch.zeros(3, 2), batch_size=[3]), step=0)
