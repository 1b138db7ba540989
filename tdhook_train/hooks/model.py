"""A model that can be read, edited and differentiated anywhere, without being rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdhook_train.errors import KeyMissingError, PathError, SettingsError, did_you_mean
from tdhook_train.hooks.paths import TracedSite, matches, module_at, select, trace
from tdhook_train.hooks.run import Run

__all__ = ["HookedModel"]


class HookedModel:
    """A torch model as a function of TensorDicts, with a get-set API inside.

    Args:
        model: any ``nn.Module``; a ``TensorDictModule`` brings its own keys.
        in_keys: where the positional arguments of a plain module are read; ``["input"]`` by default.
        out_keys: where what it returns is written; ``["output"]`` by default. A mapping (a Hugging Face output) is
            written key by key below its out key.
        name: of the network, where there are several: patterns may then begin with it, and those that match nothing
            in this network are no error, since they may mean another.

    Example:
        >>> hooked = HookedModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
        >>> with hooked.run(TensorDict(input=torch.zeros(2, 3), batch_size=[2])) as run:
        ...     pre = run.get("0")
        >>> pre.resolve().shape
        torch.Size([2, 4])

    Source: the get-set API of TDHook, arXiv:2509.25475, section 3.3.
    """

    def __init__(
        self,
        model: nn.Module,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        *,
        name: str = "",
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile: paths are those of what was compiled
        self.module: nn.Module = model
        self.name = name
        self._speaks_tensordict = isinstance(model, TensorDictModuleBase)
        own: tuple[Any, Any] = (["input"], ["output"])
        if isinstance(model, TensorDictModuleBase):
            own = (model.in_keys, model.out_keys)
        self.in_keys: list[NestedKey] = list(in_keys or own[0])
        self.out_keys: list[NestedKey] = list(out_keys or own[1])
        self._trace: tuple[TracedSite, ...] | None = None
        self._selected: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return f"HookedModel({type(self.module).__name__}, in_keys={self.in_keys}, out_keys={self.out_keys})"

    def __call__(self, inputs: TensorDictBase) -> TensorDictBase:
        """Run the model: the inputs, untouched, and beside them the outputs."""
        return self.forward(inputs)

    def run(self, inputs: TensorDictBase) -> Run:
        """Describe one pass in a ``with`` block: see :class:`Run`."""
        return Run(self, inputs)

    def forward(self, inputs: TensorDictBase, *, batched: bool = True) -> TensorDictBase:
        """Run the model on a copy of its inputs: it may work in place on what it is given.

        Args:
            inputs: holds ``in_keys``.
            batched: False where the outputs will not have the batch size of the inputs.
        """
        if not isinstance(inputs, TensorDictBase):
            example = f"TensorDict({self.in_keys[0]}=x, batch_size=[len(x)])"
            raise SettingsError(f"{self.title} takes a TensorDict, e.g. {example}; got {type(inputs).__name__}")
        missing = [key for key in self.in_keys if key not in inputs.keys(include_nested=True)]
        if missing:
            known = [str(key) for key in inputs.keys(include_nested=True, leaves_only=True)]
            raise KeyMissingError(
                f"input {missing[0]!r} of {type(self.module).__name__} is not in the batch"
                f"{did_you_mean(str(missing[0]), known)}"
            )
        td = inputs.copy() if batched else TensorDict(dict(inputs.copy().items()), batch_size=[])
        for key in self.in_keys:
            td.set(key, inputs.get(key).clone())
        if self._speaks_tensordict:
            return self.module(td)
        self._write(td, self.module(*(td.get(key) for key in self.in_keys)))
        return td

    def _write(self, td: TensorDictBase, output: Any) -> None:
        values = (output,) if isinstance(output, Tensor | Mapping) else tuple(output)
        for key, value in zip(self.out_keys, values, strict=False):
            if isinstance(value, Mapping):
                prefix = key if isinstance(key, tuple) else (key,)
                for name, item in value.items():
                    if isinstance(item, Tensor):
                        td.set((*prefix, name), item)
            elif isinstance(value, Tensor):
                td.set(key, value)

    # ------------------------------------------------------------------ names

    def trace(self, inputs: TensorDictBase) -> tuple[TracedSite, ...]:
        """List the sites in the order in which they run; one pass without gradients, the first time only."""
        if self._trace is None:
            self._trace = trace(self.module, lambda: self.forward(inputs))
        return self._trace

    @property
    def traced(self) -> tuple[TracedSite, ...]:
        """The trace, once there is one."""
        if self._trace is None:
            raise PathError("the order in which the modules run is not known yet: call trace(inputs) first")
        return self._trace

    def sites(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        """Resolve paths and patterns to sites, in the order in which the model runs them (needs a trace).

        Raises:
            PathError: a pattern that matches nothing, naming the nearest sites.
        """
        patterns = tuple(self._inside(layers))
        if patterns not in self._selected:
            self._selected[patterns] = select(self.traced, patterns, owner=self.title, strict=not self.name)
        return self._selected[patterns]

    def has(self, pattern: str) -> bool:
        """Whether a pattern names a module, run or not; needs no trace."""
        return any(matches(text, name) for text in self._inside(pattern) for name in self.modules)

    @property
    def title(self) -> str:
        """What errors call this model."""
        return self.name or type(self.module).__name__

    @property
    def modules(self) -> list[str]:
        """The paths of all modules; the model itself is the empty path."""
        return [name for name, _ in self.module.named_modules(remove_duplicate=False)]

    def _inside(self, layers: str | Sequence[str]) -> list[str]:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        return [text.removeprefix(f"{self.name}.") if self.name else text for text in patterns]

    def module_of(self, site: str) -> nn.Module:
        """Return the module behind a site."""
        return module_at(self.module, site.partition(":")[0])

    def device(self) -> torch.device:
        """Return where the model's first parameter or buffer lies (the CPU where it has none)."""
        first = next(iter(self.module.parameters()), next(iter(self.module.buffers()), None))
        return torch.device("cpu") if first is None else first.device
