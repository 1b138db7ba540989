"""Batches of every shape: a number that is defined, or an error that says what is wrong."""

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.testing import assert_close

from tdhook_train import At, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import GroupsError, NetworkError, SettingsError
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank, ReDo
from tdhook_train.latent import ActivationPatching, RidgeProbe

METHODS = {
    "probe": RidgeProbe(target=("input", 0)),
    "patching": ActivationPatching(),
    "ig": IntegratedGradients(rows=None),
    "saliency": Saliency(),
    "dead": DeadUnits(),
    "dormant": DormantUnits(),
    "rank": EffectiveRank(),
    "redo": ReDo(),
}
PAIRED = {"patching": (SettingsError, "needs 2 or more, got 1")}
GROUPED = {"probe": (GroupsError, "at least 2 groups, got 1: collect more trajectories")}
ALONE = ("one trajectory", "two rows of one")  # of which a probe can hold out none, and says so


def batch(*shape, ends=()):
    td = TensorDict(input=torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1)), batch_size=shape)
    done = torch.zeros(td.numel(), 1, dtype=torch.bool)
    done[list(ends)] = True
    return td.set(("next", "done"), done.view(*shape, 1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


BATCHES = {
    "ragged trajectories": (batch(20, ends=(0, 1, 7, 15)), {}),
    "one trajectory": (batch(20), {}),
    "one environment": (batch(1, 20, ends=(4,)), {}),
    "two rows of one": (batch(2), {}),
    "one row": (batch(1), PAIRED | GROUPED),
    "one row of one environment": (batch(1, 1), PAIRED | GROUPED),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", BATCHES)
def test_an_observer_measures_or_says_what_is_wrong(given, name, net, tmp_path):
    td, refused = BATCHES[given]
    with Observer({"m": METHODS[name]}, when=At(0), into=tmp_path, on=ProbeSet(td)) as observer:
        if name in refused:
            kind, says = refused[name]
            with pytest.raises(kind, match=says):
                observer.step(net, step=0)
            return
        observer.step(net, step=0)
        row = observer.buffer["m"].at(0).clone()
    if name == "probe" and given in ALONE:
        assert (row["reason"] == 6).all()
        assert row["r2"].isnan().all()
        return
    ready = row["null_reason"] == 0 if name == "probe" else torch.tensor(True)
    assert ready.all()
    own = [key for key in row.keys(True, True) if key[0] not in ("meta", "r2_initial")]
    assert all(row[key].isfinite().any() for key in own if row[key].is_floating_point())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (4, 5), (2, 2, 5)], ids=str)
def test_by_hand_a_batch_of_environments_is_measured_row_by_row_as_by_an_observer(shape, name, net, tmp_path):
    td = batch(*shape)
    with METHODS[name].prepare(net) as hooked:
        whole = hooked(td, generator=torch.Generator().manual_seed(0))
        rows = hooked(td.reshape(-1), generator=torch.Generator().manual_seed(0))
    with Observer({"m": METHODS[name]}, when=At(0), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.step(net, step=0)
        row = observer.buffer["m"].at(0)
        keys = [key for key in row.keys(True, True) if key[0] != "meta" and key not in ("r2_initial", "reason")]
        keys = [key for key in keys if "null" not in key and key != "p"]  # by hand nothing is known of time
        for key in keys:
            assert_close(whole[key].reshape(row[key].shape), row[key], equal_nan=True, msg=str(key))
            assert_close(rows[key], row[key], equal_nan=True)
    assert whole["output"].shape == (*shape, 2)
    if name in ("ig", "saliency"):
        assert whole.batch_size == shape
        assert whole["attr", "input"].shape == (*shape, 2, 3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_without_rows_there_is_nothing_to_measure(shape, name, net, tmp_path):
    td = TensorDict(input=torch.randn(*shape, 3), batch_size=shape)
    with METHODS[name].prepare(net) as hooked, pytest.raises(SettingsError, match=r"measures rows, .*batch_size=\["):
        hooked(td)
    observer = Observer({"m": METHODS[name]}, when=At(0), into=tmp_path)
    with observer, pytest.raises(SettingsError, match=r"batch_size=\["):
        observer.step(net, td, step=0)


class Sums(nn.Module):
    """Adds up over time."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).cumsum(-2)


def test_by_hand_a_network_that_handles_time_is_run_on_its_sequences():
    torch.manual_seed(0)
    net, td = Sums(), batch(4, 5)
    with Saliency(targets=("output", 1)).prepare(net) as hooked:
        found = hooked(td)
        left = torch.arange(5.0, 0, -1)[None, :, None]
        assert_close(found["attr", "input"], (left * net.inner.weight[1]).expand(4, 5, 3).detach())
        assert_close(found["output"], net.inner(td["input"]).cumsum(1).detach())
    with ActivationPatching().prepare(net) as hooked, pytest.raises(NetworkError, match=r"handles time.* \[4, 5\]"):
        hooked(td)
