"""What other libraries write as a checkpoint, brought to one form: named tensors, and the moment they are of."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from tdhook_train.errors import CheckpointError, MissingPackageError, did_you_mean

__all__ = ["Checkpoint", "Loading", "Which", "is_torchrl", "read"]

Which = Literal["live", "average"]

_MANIFEST = "manifest.json"  # of a checkpoint of TorchRL
_PICKLES = (".pickle", ".pkl")  # of TensorDict
_PARTS = ("state_dict", "loss_module", "model_state_dict", "model", "module", "policy", "net")  # that hold weights
_STEPS = ("global_step", "step", "iteration")
_LIVE_BESIDE = "current_model_state"  # where Lightning's averages lie under state_dict, the live weights lie here


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, as far as it matters here.

    Args:
        state: tensors by name.
        step: optimizer steps behind them; None where the file does not say.
        frames: environment frames; likewise.
        epoch: of the training; likewise.
    """

    state: Mapping[str, Any]
    step: int | None = None
    frames: int | None = None
    epoch: int | None = None


def read(path: Path, *, weights: Which = "live", part: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint: Lightning's, TorchRL's (folder, archive, trainer file), a state dict, or safetensors.

    Args:
        path: a file, or the folder of a checkpoint of TorchRL. The tensors of files are mapped, not copied.
        weights: those that were trained, or the running average that Lightning's ``WeightAveraging`` keeps.
        part: which entry holds the weights, where there are several and none has a usual name.
        allow_pickle: let a pickle run whatever it asks for: only for files that you trust.

    Raises:
        CheckpointError: it is not there, cannot be read, or holds no such weights.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if is_torchrl(path):
            found = _of_torchrl(path, part, allow_pickle=allow_pickle)
        elif path.suffix == ".safetensors":
            found = _safetensors(path)
        else:
            return _of_file(_unpickled(path, allow_pickle=allow_pickle), path, weights, part)
    except (CheckpointError, MissingPackageError):
        raise
    except Exception as error:  # whatever a format raises for a file that is cut short
        raise CheckpointError(f"{path} cannot be read; is it whole? {type(error).__name__}: {error}") from error
    if weights == "average":
        raise CheckpointError(_NO_AVERAGE.format(path))
    return found


@dataclass(frozen=True)
class Loading:
    """How checkpoints are read: see :func:`read`."""

    weights: Which = "live"
    part: str | None = None
    allow_pickle: bool = False

    def read(self, path: Path) -> Checkpoint:
        """Read one."""
        return read(path, weights=self.weights, part=self.part, allow_pickle=self.allow_pickle)


def is_torchrl(path: Path) -> bool:
    """Whether a path is a checkpoint of TorchRL: a folder or an archive with its manifest."""
    if path.is_dir():
        manifest = path / _MANIFEST
        return manifest.is_file() and json.loads(manifest.read_text()).get("format") == "torchrl.checkpoint"
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _MANIFEST in archive.namelist()


_PICKLE = (
    "{} asks for more than weights, which a pickle may run as code; if you trust it, pass allow_pickle=True "
    "(--allow-pickle on the command line)"
)
_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")  # in what torch says
_NO_AVERAGE = "{} holds no averaged weights; Lightning's WeightAveraging writes them"


def _unpickled(path: Path, *, allow_pickle: bool) -> Any:
    whole = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not whole and file.read(2) == b"PK":  # what torch writes is a zip file
            raise CheckpointError(f"{path} is cut short")
    try:
        return torch.load(path, mmap=whole, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        asked = _ASKED_FOR.search(str(error))
        raise CheckpointError(_PICKLE.format(path) + (f". It asks for {asked.group(1)}" if asked else "")) from error


def _of_file(content: Any, path: Path, weights: Which, part: str | None) -> Checkpoint:
    if not isinstance(content, Mapping):
        if isinstance(content, torch.nn.Module):
            return Checkpoint(content.state_dict())
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict")
    if weights == "average" and _LIVE_BESIDE not in content:
        raise CheckpointError(_NO_AVERAGE.format(path))
    if part is None and weights == "live" and _LIVE_BESIDE in content:
        part = _LIVE_BESIDE
    state = _part(content, path, part)
    if "loss_module" in content and isinstance(content.get("state"), Mapping):  # of a trainer of TorchRL
        return Checkpoint(state, *_of_trainer(content["state"], list(content.values())))
    step = next((content[key] for key in _STEPS if isinstance(content.get(key), int)), None)
    return Checkpoint(state, step, epoch=_epoch(content))


def _part(content: Mapping[str, Any], path: Path, part: str | None) -> Mapping[str, Any]:
    """Choose the entry that holds the weights; the whole, where it is a state dict itself."""
    if part is not None:
        if part not in content:
            raise CheckpointError(f"{path} has no part {part!r}{did_you_mean(part, list(map(str, content)))}")
        return content[part]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    for name in _PARTS:
        if isinstance(content.get(name), Mapping):
            return content[name]
    if any(isinstance(value, Tensor) for value in content.values()):  # a state dict with extra state
        return content
    known = ", ".join(map(repr, content)) or "nothing"
    raise CheckpointError(f"{path} holds {known}, none of which is known to hold weights; say which by part=")


def _epoch(content: Mapping[str, Any]) -> int | None:
    """Return the number of finished epochs, as a trainer of Lightning counts them while it fits."""
    epoch = content.get("epoch")
    try:
        return int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError):
        return epoch if isinstance(epoch, int) else None


class _Caught:
    """Takes what a checkpoint of TorchRL holds of a component."""

    def __init__(self) -> None:
        self.state: Any = {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is saved."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Take it."""
        self.state = state


def _of_torchrl(path: Path, part: str | None, *, allow_pickle: bool) -> Checkpoint:
    from torchrl import checkpoint as torchrl

    stored = torchrl.Checkpoint.manifest(path)["components"]
    known = [name for name, record in stored.items() if record["adapter"] == "torchrl.state_dict"]
    wanted = part or next((name for name in _PARTS if name in known), None)
    if wanted is None or wanted not in known:
        names = ", ".join(map(repr, known))
        raise CheckpointError(f"{path} holds {names}; say by part= which are the weights")
    beside = [name for name in known if name.startswith("trainer_module.") or name in ("trainer_state", "optimizer")]
    if not allow_pickle and (pickles := _pickles(path, [stored[name]["path"] for name in (wanted, *beside)])):
        raise CheckpointError(f"{_PICKLE.format(path)}. It holds {pickles[0]}")
    caught = {name: _Caught() for name in dict.fromkeys([wanted, *beside])}
    kwargs = {"weights_only": not allow_pickle}
    try:
        torchrl.Checkpoint(**caught).load(path, components=list(caught), map_location="cpu", tensor_load_kwargs=kwargs)
    except torchrl.CheckpointError as error:
        if "Weights only load failed" in str(error):
            raise CheckpointError(_PICKLE.format(path)) from error
        raise
    others = [caught[name].state for name in beside]
    progress = caught["trainer_state"].state if "trainer_state" in caught else {}
    return Checkpoint(caught[wanted].state, *_of_trainer(progress, others))


def _pickles(path: Path, folders: list[str]) -> list[str]:
    """Name the pickles in folders of a checkpoint of TorchRL: TensorDict loads them wherever it finds them."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return _pickles_among(names, folders, lambda name: (path / name).open("rb"))
    with zipfile.ZipFile(path) as archive:
        return _pickles_among(archive.namelist(), folders, archive.open)


def _pickles_among(names: list[str], folders: list[str], opened: Callable[[str], IO[bytes]]) -> list[str]:
    inside = [name for name in names if any(name.startswith(f"{folder}/") for folder in folders)]
    found = [name for name in inside if name.endswith(_PICKLES)]
    for name in inside:
        if name.endswith(".tdz"):
            with opened(name) as file, zipfile.ZipFile(file) as archive:
                found += [f"{name}/{part}" for part in archive.namelist() if part.endswith(_PICKLES)]
    return found


def _of_trainer(progress: Mapping[str, Any], parts: list[Any]) -> tuple[int | None, int | None]:
    """Say how many optimizer steps and frames a trainer of TorchRL had taken.

    Its own count of steps is too high where epochs end early, so that an observer's or the optimizer's goes first.
    """
    observers = [part["steps_taken"] for part in parts if isinstance(part, Mapping) and part.get("steps_taken")]
    step = next(iter([*observers, *_steps_of_optimizers(parts)]), progress.get("_optim_count"))
    return step, progress.get("collected_frames")


def _steps_of_optimizers(parts: list[Any]) -> Iterator[int]:
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get("state"), Mapping) and "param_groups" in part:
            taken = [int(of["step"]) for of in part["state"].values() if isinstance(of, Mapping) and "step" in of]
            if taken:
                yield max(taken)


def _safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingPackageError(f"reading {path} needs safetensors: pip install safetensors") from error
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
        step = next((int(said[key]) for key in _STEPS if str(said.get(key, "")).isdigit()), None)
        return Checkpoint({key: file.get_tensor(key) for key in file.keys()}, step)  # noqa: SIM118 - it is no mapping
