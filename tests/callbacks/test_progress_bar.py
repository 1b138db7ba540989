"""The progress bar shows one value of each callback, while there is a bar and as long as the fit lasts."""

from __future__ import annotations

import io
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from small import data, fitted, same

from tdhook_train import ArtifactBuffer, Every
from tdhook_train.callbacks import HealthCallback, ObserverCallback, ProbeCallback
from tdhook_train.health import EffectiveRank


def batch() -> list[Any]:
    return [part[:30] for part in data().tensors]


def probe(path: Any, **options: Any) -> ProbeCallback:
    options = {"batch": batch(), "every_n_train_steps": 4} | options
    return ProbeCallback("net.*", dirpath=path / "probe", **options)


def health(path: Any, **options: Any) -> HealthCallback:
    return HealthCallback("net.*", batch=batch(), when=Every(optim_steps=5), dirpath=path / "health", **options)


class Looks(pl.Callback):
    """What a bar would show at the end of each batch, and what is left of it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.left: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(dict(trainer.progress_bar_metrics))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.left = dict(trainer.progress_bar_metrics)


def entry(path: Any, row: str, key: str, step: int, shown: str) -> str:
    with ArtifactBuffer.open(path / row) as buffer:
        (value,) = buffer[row].at(step)[key].nanmean(0).flatten()[:1].tolist()
    return f"{shown} {value:.3g} (step {step})"


def test_a_bar_of_tqdm_shows_it(tmp_path, capfd):
    fitted(tmp_path, [probe(tmp_path), health(tmp_path), TQDMProgressBar()], enable_progress_bar=True)
    written = capfd.readouterr().out
    for step in (0, 4, 8, 12):
        assert f"probe={entry(tmp_path, 'probe', 'r2', step, 'r2/target')}" in written
    for step in (5, 10):
        assert f"health={entry(tmp_path, 'health', 'dormant', step, 'dormant/0.0')}" in written


def test_a_bar_of_rich_shows_it(tmp_path):
    rich = pytest.importorskip("rich", reason="rich is not installed")
    written = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": written, "force_terminal": True, "width": 300})
    try:
        fitted(tmp_path, [probe(tmp_path), bar], enable_progress_bar=True)
    finally:
        rich.reconfigure()  # its console is one for the whole process
    assert f"probe: {entry(tmp_path, 'probe', 'r2', 12, 'r2/target')}" in written.getvalue()


def test_an_entry_stays_until_the_next_measurement_and_goes_with_the_fit(tmp_path, capfd):
    looks = Looks()
    fitted(tmp_path, [probe(tmp_path), health(tmp_path), looks], enable_progress_bar=True)
    steps = {
        name: [int(seen[name].split("step ")[1][:-1]) if name in seen else None for seen in looks.seen]
        for name in ("probe", "health")
    }
    assert steps == {
        "probe": [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12],
        "health": [None] * 4 + [5] * 5 + [10] * 3,
    }
    assert looks.left == {}


def test_an_entry_goes_with_a_fit_that_is_cut_short(tmp_path, capfd):
    looks: list[Any] = []

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            looks.append((trainer, dict(trainer.progress_bar_metrics)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, [probe(tmp_path), Stops()], enable_progress_bar=True)
    ((trainer, seen),) = looks
    assert list(seen) == ["probe"]
    assert trainer.progress_bar_metrics == {}


@pytest.mark.parametrize(
    ("bar", "options"), [(True, {"prog_bar": False}), (False, {}), (False, {"log_metrics": False})]
)
def test_nothing_is_shown_without_a_bar_or_where_that_is_not_wanted(bar, options, tmp_path, capfd):
    looks = Looks()
    fitted(tmp_path, [probe(tmp_path, **options), looks], enable_progress_bar=bar)
    assert looks.seen == [{}] * 12


def test_a_bar_does_not_need_loggers(tmp_path, capfd):
    looks = Looks()
    rows = {"rank": EffectiveRank("net.*")}
    own = ObserverCallback(
        rows, every_n_train_steps=12, batch=batch(), log_metrics=False, dirpath=tmp_path / "rank", name="mine"
    )
    fitted(tmp_path, [own, looks], enable_progress_bar=True)
    shown = entry(tmp_path, "rank", "effective_rank", 0, "rank/effective_rank")
    assert looks.seen[0] == {"mine": shown}


def test_a_bar_does_not_change_the_fit(tmp_path, capfd):
    bare = fitted(tmp_path / "bare", [], enable_progress_bar=True)
    watched = fitted(tmp_path / "watched", [probe(tmp_path), health(tmp_path)], enable_progress_bar=True)
    assert all(same(value, watched[part]) for part, value in bare.items())
