"""Somebody's own function or mapping, named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tdhook_train.errors import SettingsError, TdhookTrainError, UserCodeError, did_you_mean

__all__ = ["Named"]


@dataclass(frozen=True)
class Named:
    """What ``package.module:name`` or ``file.py:name`` names; loaded where it is asked for, in any process.

    Args:
        text: as it was given.
        option: of the command line, for messages.
        folder: that relative paths and modules are looked for in; the working directory by default.

    Raises:
        SettingsError: the text has another form.
    """

    text: str
    option: str
    folder: str = field(default_factory=os.getcwd)

    def __post_init__(self) -> None:
        where, _, name = self.text.rpartition(":")
        if not where or not name.isidentifier():
            raise SettingsError(f"{self.option} {self.text!r} is not of the form package.module:name or file.py:name")

    def load(self) -> Any:
        """Return what is named.

        Raises:
            SettingsError: there is no such module, file or name.
            UserCodeError: importing it raised something.
        """
        where, _, name = self.text.rpartition(":")
        _reach(self.folder)
        module = self._file(Path(self.folder, where)) if where.endswith(".py") else self._module(where)
        if not hasattr(module, name):
            known = [one for one in vars(module) if not one.startswith("_")]
            raise SettingsError(f"{self.option} {self.text!r}: {where} has no {name!r}{did_you_mean(name, known)}")
        return getattr(module, name)

    def __call__(self) -> Any:
        """Call it.

        Raises:
            SettingsError: it is no function.
            UserCodeError: it raised something.
        """
        function = self.load()
        if not callable(function):
            raise SettingsError(f"{self.option} {self.text!r} is a {type(function).__name__}, expected a function")
        try:
            return function()
        except TdhookTrainError:
            raise
        except Exception as error:
            raise self._raised("raised", error) from error

    def _file(self, path: Path) -> ModuleType:
        if not path.is_file():
            near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.py")])
            raise SettingsError(f"{self.option} {self.text!r}: {path} does not exist{near}")
        for module in list(sys.modules.values()):
            # not by getattr: some modules warn of whatever they are asked for
            if getattr(module, "__dict__", {}).get("__tdhook_train_file__") == str(path.resolve()):
                return module
        _reach(str(path.resolve().parent))
        name = path.stem if path.stem not in sys.modules else f"_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__tdhook_train_file__"] = str(path.resolve())
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, (Exception, SystemExit)):
                raise self._raised("could not be imported:", error) from error
            raise
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)  # other processes know of no module of that name
        return module

    def _module(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise SettingsError(f"{self.option} {self.text!r}: there is no module {error.name!r}") from error
            raise self._raised("could not be imported:", error) from error
        except (Exception, SystemExit) as error:
            raise self._raised("could not be imported:", error) from error

    def _raised(self, what: str, error: BaseException) -> UserCodeError:
        return UserCodeError(f"{self.option} {self.text!r} {what} {type(error).__name__}: {error} (--traceback: where)")


def _reach(folder: str) -> None:
    """Let modules beside the file be imported, as of a script that is run."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
