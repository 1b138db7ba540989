"""What is read of a checkpoint is what the library that wrote it loads, bit for bit, with the step it is of."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from small import Net, loader, trainer_for
from tiny import BATCHES, PER_BATCH, TRAINERS, make
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointRotation, StateDictCheckpointAdapter

from tdhook_train.checkpoints import read
from tdhook_train.checkpoints.fitting import fit
from tdhook_train.checkpoints.listing import files
from tdhook_train.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:The '(optimizer|post_loss)' hook stage will be replaced:FutureWarning")


def same(found: Any, expected: Any) -> bool:
    """Whether two state dicts hold the same tensors, bit for bit, but for what is no tensor."""
    found, expected = (
        {key: value for key, value in state.items() if isinstance(value, torch.Tensor)} for state in (found, expected)
    )
    return found.keys() == expected.keys() and all(
        value.dtype == found[key].dtype and torch.equal(value, found[key]) for key, value in expected.items()
    )


# ---------------------------------------------------------------------- Lightning


class Noting(ModelCheckpoint):
    """Notes, beside each file, the weights, the steps of the optimizer and the epochs that were finished."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}", **options)
        self.noted: dict[str, Any] = {}
        self.stepped = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.stepped += 1

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        state = {key: value.clone() for key, value in trainer.lightning_module.state_dict().items()}
        self.noted[filepath] = state, self.stepped, trainer.current_epoch


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(self.head, backend="eager")


class Setting:
    """A hyper-parameter that is no plain value."""


class Set(Net):
    def __init__(self, setting: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def fitted(folder: Path, module: Any, *others: Any, **options: Any) -> dict[str, Any]:
    keeping = Noting(folder / "ckpt", **options)
    pl.seed_everything(0, verbose=False)
    trainer_for(folder, [keeping, *others]).fit(module, loader())
    assert len(keeping.noted) == 4
    return keeping.noted


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", [Net, Frozen])
def test_lightnings_files(kind, weights_only, tmp_path):
    for path, (state, stepped, epoch) in fitted(tmp_path, kind(), save_weights_only=weights_only).items():
        found = read(Path(path))
        assert same(found.state, state)
        assert same(found.state, kind.load_from_checkpoint(path, map_location="cpu").state_dict())
        assert (found.step, found.epoch) == (stepped, epoch)


def test_a_compiled_module_fits_one_that_is_not_and_back(tmp_path):
    for path, (state, *_) in fitted(tmp_path, Compiled()).items():
        found = read(Path(path))
        assert any("_orig_mod." in name for name in found.state)
        plain, compiled = Net(), Compiled()
        fit(plain, found.state, Path(path))
        assert same(plain.state_dict(), {name.replace("_orig_mod.", ""): value for name, value in state.items()})
        fit(compiled, plain.state_dict(), Path(path))
        assert same(compiled.state_dict(), state)


def test_live_and_averaged_weights(tmp_path):
    noted = fitted(tmp_path, Net(), EMAWeightAveraging(decay=0.5))
    for path, (state, stepped, _) in noted.items():
        live, average = read(Path(path)), read(Path(path), weights="average")
        raw = torch.load(path, weights_only=True)
        assert same(live.state, state)
        assert same(average.state, raw["state_dict"])
        assert not same(live.state, average.state)
        assert live.step == average.step == stepped


def test_averaged_weights_that_are_not_there(tmp_path):
    path, *_ = fitted(tmp_path, Net())
    with pytest.raises(CheckpointError, match=r"step=3.ckpt holds no averaged weights; Lightning's WeightAveraging"):
        read(Path(path), weights="average")


def test_hyper_parameters_that_need_a_pickle_are_refused_with_the_flag_that_allows_them(tmp_path):
    (path, (state, *_)), *_ = fitted(tmp_path, Set(Setting())).items()
    with pytest.raises(CheckpointError, match=r"step=3.ckpt asks for more than weights.*pass allow_pickle=True"):
        read(Path(path))
    assert same(read(Path(path), allow_pickle=True).state, state)


# ---------------------------------------------------------------------- TorchRL


def counted(trainer: Any) -> list[int]:
    """Count the steps of the optimizer that steps at every one."""
    stepper, steps = trainer.optimization_stepper, []
    optimizer = trainer.optimizer if stepper is None else stepper.optimizer_critic
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return steps


def noted(trainer: Any, save: Any) -> dict[Path, Any]:
    """Train, and save after each batch; return the weights, steps and frames of then."""
    steps, found = counted(trainer), {}

    def saved(*_: Any) -> None:
        weights = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in trainer.loss_module.state_dict().items()
        }
        found[save()] = weights, len(steps), trainer.collected_frames

    trainer.register_op("post_steps", saved)
    trainer.train()
    assert [frames for *_, frames in found.values()] == [PER_BATCH * (i + 1) for i in range(BATCHES)]
    return found


@pytest.mark.parametrize("form", ["directory", "archive"])
@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoints_of_torchrls_trainers(name, form, tmp_path):
    trainer, fresh = make(name), make(name)

    def save() -> Path:
        path = tmp_path / f"{trainer.collected_frames}{'.zip' if form == 'archive' else ''}"
        trainer.checkpoint.save(path, format=form)
        return path

    for path, (weights, steps, frames) in noted(trainer, save).items():
        found = read(path)
        assert (found.step, found.frames) == (steps, frames)
        assert same(found.state, weights)
        Checkpoint(loss_module=fresh.loss_module).load(path, components=["loss_module"])
        assert same(found.state, fresh.loss_module.state_dict())


def test_a_ppo_trainer_counts_too_many_steps_itself(tmp_path):
    trainer = make("ppo", optim_steps_per_batch=5)
    found = noted(trainer, lambda: trainer.checkpoint.save(tmp_path / str(trainer.collected_frames)))
    (path, (_, steps, _)) = list(found.items())[-1]
    assert read(path).step == steps < trainer._optim_count


def test_a_rotation_names_folders_by_frames(tmp_path):
    rotation = CheckpointRotation(tmp_path / "kept", keep_last=2)
    trainer = make("sac", save_trainer_file=None)
    steps = counted(trainer)
    expected = {}

    def save(*_: Any) -> None:
        expected[trainer.collected_frames] = len(steps)
        rotation.save(trainer.checkpoint, step=trainer.collected_frames)

    trainer.register_op("post_steps", save)
    trainer.train()
    found = {one.frames: one.step for one in map(read, files(tmp_path / "kept"))}
    assert found == dict(list(expected.items())[-2:])


@pytest.mark.parametrize("name", TRAINERS)
def test_the_file_of_a_trainer_in_the_older_format(name, monkeypatch, tmp_path):
    monkeypatch.setenv("CKPT_BACKEND", "torch")
    trainer = make(name, checkpoint=None, save_trainer_file=tmp_path / "trainer.pt")

    def save() -> Path:
        trainer.save_trainer(force_save=True)
        return (tmp_path / "trainer.pt").rename(tmp_path / f"{trainer.collected_frames}.pt")

    for path, (weights, steps, frames) in noted(trainer, save).items():
        found = read(path)
        assert (found.step, found.frames) == (steps, frames)
        assert same(found.state, weights)


class Holds:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("form", ["directory", "archive"])
@pytest.mark.parametrize("payload", ["directory", "archive", "consolidated", "torch"])
def test_every_payload_of_torchrl(payload, form, tmp_path):
    state = nn.Linear(2, 3).state_dict()
    checkpoint = Checkpoint()
    checkpoint.register("model", Holds(state), adapter=StateDictCheckpointAdapter(payload_format=payload))
    checkpoint.save(tmp_path / "a", format=form)
    assert same(read(tmp_path / "a").state, state)


def test_a_pickle_inside_a_checkpoint_of_torchrl_is_refused_before_it_is_loaded(tmp_path):
    Checkpoint(model=Holds(nn.Linear(2, 3).state_dict())).save(tmp_path / "a")
    (folder,) = (tmp_path / "a" / "components").iterdir()
    (folder / "state" / "other.pickle").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"asks for more than weights.*allow_pickle=True.*other.pickle"):
        read(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        for file in (tmp_path / "a").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"asks for more than weights.*other.pickle"):
        read(tmp_path / "b")
    assert len(read(tmp_path / "a", allow_pickle=True).state) == 2


def test_a_torch_payload_of_torchrl_that_needs_a_pickle(tmp_path):
    state = {**nn.Linear(2, 3).state_dict(), "setting": Setting()}
    checkpoint = Checkpoint()
    checkpoint.register("model", Holds(state), adapter=StateDictCheckpointAdapter(payload_format="torch"))
    checkpoint.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a asks for more than weights.*allow_pickle=True"):
        read(tmp_path / "a")
    assert same(read(tmp_path / "a", allow_pickle=True).state, state)


def test_parts_of_a_checkpoint_of_torchrl(tmp_path):
    states = {name: nn.Linear(2, size).state_dict() for name, size in (("first", 3), ("second", 4))}
    Checkpoint(**{name: Holds(state) for name, state in states.items()}).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a holds 'first', 'second'; say by part= which are the weights"):
        read(tmp_path / "a")
    assert same(read(tmp_path / "a", part="second").state, states["second"])


# ---------------------------------------------------------------------- torch and safetensors


def test_a_state_dict(tmp_path):
    state = Net().state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert same(found.state, state)
    assert (found.step, found.frames, found.epoch) == (None, None, None)


def test_a_state_dict_in_the_older_format_of_torch(tmp_path):
    state = Net().state_dict()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "a.pt").state, state)


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "policy"])
def test_a_dict_of_several_parts(name, tmp_path):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    torch.save({name: net.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "epoch": 2}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert same(found.state, net.state_dict())
    assert (found.step, found.epoch) == (7, 2)


def test_parts_without_a_usual_name(tmp_path):
    states = {"actor": nn.Linear(2, 1).state_dict(), "critic": nn.Linear(2, 2).state_dict()}
    torch.save({**states, "iteration": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds 'actor', 'critic', 'iteration', none of which .* part="):
        read(tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt", part="critic").state, states["critic"])
    with pytest.raises(CheckpointError, match=r"has no part 'critik'; did you mean 'critic'"):
        read(tmp_path / "a.pt", part="critik")


def test_a_whole_module_is_a_pickle(tmp_path):
    net = nn.Linear(2, 3)
    torch.save(net, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="asks for more than weights"):
        read(tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt", allow_pickle=True).state, net.state_dict())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"step": "12"}])
def test_safetensors(metadata, tmp_path):
    state = Net().state_dict()
    save_file(state, tmp_path / "a.safetensors", metadata)
    found = read(tmp_path / "a.safetensors")
    assert same(found.state, state)
    assert found.step == (12 if metadata and "step" in metadata else None)


# ---------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "old.pt"])
def test_a_file_that_is_cut_short(name, share, tmp_path):
    path, state = tmp_path / name, Net().state_dict()
    if path.suffix == ".pt":
        torch.save(state, path, _use_new_zipfile_serialization=name == "a.pt")
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=rf"{name} (is cut short|cannot be read; is it whole\?)"):
        read(path)


def test_a_checkpoint_of_torchrl_that_is_cut_short(tmp_path):
    Checkpoint(model=Holds(nn.Linear(2, 3).state_dict())).save(tmp_path / "a")
    next((tmp_path / "a").rglob("*.memmap")).unlink()
    with pytest.raises(CheckpointError, match=r"a cannot be read; is it whole\?"):
        read(tmp_path / "a")


def test_what_is_not_there_or_no_state_dict(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*a\.pt"):
        read(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds a list, no state dict"):
        read(tmp_path / "a.pt")


# ---------------------------------------------------------------------- into a model


def test_a_part_of_what_was_saved(tmp_path):
    whole, part = Net(), Net().net
    fit(part, whole.state_dict(), Path("a"))
    assert same(part.state_dict(), whole.net.state_dict())


def test_two_parts_like_the_model_are_not_told_apart():
    whole = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2), "wide": nn.Linear(2, 3)})
    with pytest.raises(CheckpointError, match="several parts like what was built: 'one', 'other'; build what holds"):
        fit(nn.Linear(2, 2), whole.state_dict(), Path("a"))
    wide = nn.Linear(2, 3)
    fit(wide, whole.state_dict(), Path("a"))
    assert same(wide.state_dict(), whole["wide"].state_dict())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.Sequential(nn.Linear(2, 3)), r"a lacks '1.weight', '1.bias' of the Sequential that was built"),
        (
            nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))),
            r"a also holds '2.bias', '2.weight', which the Sequential that was built has not",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)),
            r"a holds '1.weight' of shape \(3, 2\), which is \(2, 2\) in the Sequential that was built",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()),
            r"a holds '1.weight' of torch.float16, which is torch.float32 in the Sequential that was built; build",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_none_taken(given, said):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        fit(model, given.state_dict(), Path("a"))
    assert same(model.state_dict(), before)


def test_a_model_takes_the_dtype_of_the_weights():
    model, double = nn.Linear(2, 2), nn.Linear(2, 2).double()
    fit(model, double.state_dict(), Path("a"))
    assert same(model.state_dict(), double.state_dict())
