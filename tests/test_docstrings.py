"""Every example of a docstring runs, in a folder of its own, with the names below at hand."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer, Every, Observer, ProbeSet
from tdhook_train.callbacks import EditCallback
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tdhook_train"
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if re.search(r"^\s*>>> ", path.read_text(), re.M)]


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input))


class Fitted(pl.LightningModule):
    """The same, fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = (part for _, part in Net().named_children())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return (self(batch[0]).mean(1) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def rows(count: int = 60) -> TensorDict:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return TensorDict(input=x, y=x[:, 0], target=x[:, 0], batch_size=[count])


def recorded(folder: str) -> ArtifactBuffer:
    """A run of two steps."""
    methods = {"probe": RidgeProbe(target="y"), "health": EffectiveRank()}
    with Observer(methods, when=Every(optim_steps=1), into=folder, on=ProbeSet(rows(), groups="rows")) as observer:
        model = Net()
        for step in (1, 2):
            observer.step(model, rows(), step=step)
    return ArtifactBuffer.open(folder)


def fits() -> dict[str, Any]:
    td = rows()
    parts = TensorDataset(td["input"], td["y"], (td["y"] > 0).long())
    torch.save({"state_dict": Fitted().state_dict()}, "pretrained.ckpt")
    return {"images": td["input"], "labels": td["y"], "val_loader": DataLoader(parts, 20)}


def checkpoints() -> dict[str, Any]:
    Path("ckpt").mkdir()
    for step in (0, 1):
        torch.save(Net().state_dict(), f"ckpt/step_{step}.pt")
    return {"Net": Net, "td": rows()}


def runs() -> dict[str, Any]:
    found = {f"run{seed}": recorded(f"runs/{seed}") for seed in (0, 1)}
    merged = ArtifactBuffer.merge({"seed 0": "runs/0", "seed 3": "runs/1"}, into="runs/merged")
    return {**found, "buffer": found["run0"], "probe": found["run0"]["probe"], "merged": merged["probe"]}


def trainer() -> dict[str, Any]:
    observer = Observer({"health": EffectiveRank()}, when=Every(optim_steps=1), into="runs/hook", on="collected")
    return {"observer": observer, "trainer": importlib.import_module("tiny").make("dqn")}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "buffer.query": runs,
    "callbacks": fits,
    "checkpoints": checkpoints,
    "observer": lambda: {"model": Net(), "td": rows()},
    "plots": runs,
    "rl.observer_hook": trainer,
}
"""What the examples of a module, or of a package, are given besides the module's own names."""


def ends(given: dict[str, Any]) -> None:
    """What an example made is used, and let go of."""
    if (callback := given.get("callback")) is not None:
        quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
        td = rows()
        loader = DataLoader(TensorDataset(td["input"], td["y"]), 20)
        fit = pl.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=".", callbacks=[callback], **quiet)
        fit.fit(Fitted(), loader)
        assert ArtifactBuffer.open(f"tdhook/{callback.name}") or isinstance(callback, EditCallback)  # it wrote rows
    if (hooked := given.get("trainer")) is not None:
        hooked.train()
        given["observer"].close()
        assert len(ArtifactBuffer.open("runs/hook")["health"]) > 0


@pytest.mark.filterwarnings("ignore")  # of what Lightning and TorchRL say of a fit of six steps
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_examples_of_a_module_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests" / "rl")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    below = name.removeprefix("tdhook_train.")
    given = next((make for part, make in GIVEN.items() if below.startswith(part)), dict)()
    examples = [test for test in doctest.DocTestFinder(recurse=True).find(module, name) if test.examples]
    assert examples, f"{name} holds >>> outside of a docstring"
    for test in examples:
        test.globs.update({"torch": torch, "nn": nn, "TensorDict": TensorDict}, **given)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        said: list[str] = []
        runner.run(test, out=said.append, clear_globs=False)
        assert runner.failures == 0, "".join(said)
        ends(test.globs)


def test_what_is_called_an_example_is_one_and_none_is_skipped():
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "doctest: +SKIP" in text] == []
    assert [name for name, text in texts.items() if re.search(r"^ *Examples?:\n(?! *>>> )", text, re.M)] == []


def test_an_example_that_is_wrong_fails():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda _: None).failed == 1
