"""A model that can be read, edited and differentiated anywhere, without being rewritten."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdhook_train.errors import KeyMissingError, PathError, SettingsError, did_you_mean
from tdhook_train.hooks.edited import edited
from tdhook_train.hooks.items import tensor_items
from tdhook_train.hooks.kernels import layer_by_layer, untouched
from tdhook_train.hooks.layout import laid_out_by, unit_axis
from tdhook_train.hooks.paths import Selection, Selector, chooser, is_pattern, module_at, parse, selectors, shown, walk
from tdhook_train.hooks.place import place, refuse_ignored, setters_at
from tdhook_train.hooks.reroute import Rule, rerouted
from tdhook_train.hooks.run import Run
from tdhook_train.hooks.sequences import refuse_part
from tdhook_train.hooks.trace import TracedSite, select, trace
from tdhook_train.hooks.unwrap import inputs_of, unwrapped
from tdhook_train.keys import dotted, path_of
from tdhook_train.undo import parts_of

__all__ = ["HookedModel"]


class HookedModel:
    """A torch model as a function of TensorDicts, with a get-set API inside.

    Args:
        model: any ``nn.Module``; a ``TensorDictModule`` brings its own keys. What a training puts around a model
            (torch.compile, DistributedDataParallel, Fabric) is looked through: paths are those of the model inside.
        in_keys: where the positional arguments of a plain module are read; ``["input"]`` by default. A mapping names
            keyword arguments: ``{"input": "input_ids", "mask": "attention_mask"}``.
        out_keys: where what it returns is written; ``["output"]`` by default. A mapping, a dataclass (a Hugging Face
            output) or a tuple inside a tuple is written item by item below its out key.
        name: of the network, where there are several: patterns may then begin with it, and those that match nothing
            in this network are no error, since they may mean another.

    Raises:
        NetworkError: the model is scripted or sharded, a TorchRL loss, or no torch module.

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
        in_keys: Sequence[NestedKey] | Mapping[NestedKey, str] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        *,
        name: str = "",
    ) -> None:
        self.module, self._call = unwrapped(model)
        self.name = name
        self._speaks_tensordict = isinstance(self.module, TensorDictModuleBase)
        own: tuple[Any, Any] = (["input"], ["output"])
        if isinstance(self.module, TensorDictModuleBase):
            own = (inputs_of(self.module), self.module.out_keys)
        self._keywords = dict(in_keys) if isinstance(in_keys, Mapping) else {}
        self.in_keys: list[NestedKey] = [in_keys] if isinstance(in_keys, str) else list(in_keys or own[0])
        self.out_keys: list[NestedKey] = [out_keys] if isinstance(out_keys, str) else list(out_keys or own[1])
        self.sequences: tuple[int, ...] | None = None
        """Shape of the batch whose rows come laid end to end, where the network handles time: ``[sequences, time]``."""
        self._trace: tuple[TracedSite, ...] | None = None
        self._selected: dict[tuple[Selector, ...], tuple[str, ...]] = {}
        self._layouts: dict[str, nn.Module] = {}  # by site, what lays its value out

    def __repr__(self) -> str:
        return f"HookedModel({type(self.module).__name__}, in_keys={self.in_keys}, out_keys={self.out_keys})"

    def __call__(self, inputs: TensorDictBase) -> TensorDictBase:
        """Run the model: the inputs, untouched, and beside them the outputs."""
        return self.forward(inputs)

    def on(self, module: nn.Module) -> HookedModel:
        """Return another module of the same structure as a function of the same TensorDicts."""
        twin = HookedModel(module, self._keywords or self.in_keys, self.out_keys, name=self.name)
        twin.sequences = self.sequences
        return twin

    def run(self, inputs: TensorDictBase) -> Run:
        """Describe one pass in a ``with`` block: see :class:`Run`."""
        return Run(self, inputs)

    def forward(self, inputs: TensorDictBase, *, batched: bool = True, lend: bool = False) -> TensorDictBase:
        """Run the model on a copy of its inputs: it may work in place on what it is given.

        Args:
            inputs: holds ``in_keys``.
            batched: False where the outputs will not have the batch size of the inputs.
            lend: copy an input only when the model writes to it; for passes that nothing is kept of.
        """
        self.refuse_bare(inputs)
        if self.sequences is not None and tuple(inputs.batch_size) != self.sequences:
            refuse_part(self.title, self.sequences, inputs.numel(), whole=batched)
            whole = self.forward(inputs.reshape(self.sequences), lend=lend)
            return whole.reshape(-1) if tuple(whole.batch_size) == self.sequences else whole
        copied = _lent if lend else _copied
        given = {key: copied(inputs.get(key, None)) for key in self.in_keys}
        self._refuse_missing(given, inputs)
        td = inputs.copy() if batched else _unbatched(inputs.copy())
        attends, recurs = self._fused
        with layer_by_layer(attends=attends, recurs=recurs) if attends or recurs else nullcontext():
            if not self._speaks_tensordict:
                positional = [given[key] for key in self.in_keys if key not in self._keywords]
                return self._write(td, self._call(*positional, **{n: given[k] for k, n in self._keywords.items()}))
            td = self._call(td.update(given))
        for key, value in given.items():
            if td.get(key, None) is value:  # what the module itself put there stays
                td.set(key, inputs.get(key))
        return td

    def refuse_bare(self, inputs: Any) -> None:
        """Refuse what is no TensorDict.

        Raises:
            SettingsError: says how to make one.
        """
        if not isinstance(inputs, TensorDictBase):
            example = f"TensorDict({self.in_keys[0]}=x, batch_size=[len(x)])"
            raise SettingsError(f"{self.title} takes a TensorDict, e.g. {example}; got {type(inputs).__name__}")

    def _refuse_missing(self, given: Mapping[NestedKey, Any], inputs: TensorDictBase) -> None:
        for key, value in given.items():
            if value is None:
                known = [str(key) for key in inputs.keys(include_nested=True, leaves_only=True)]
                near = self._how_to_get(key) or did_you_mean(str(key), known)
                raise KeyMissingError(f"input {key!r} of {self.title} is not in the batch{near}")

    def _how_to_get(self, key: NestedKey) -> str:
        """Say how the hidden state of one of TorchRL's recurrent modules comes into a batch."""
        for path, module in walk(self.module):
            if hasattr(module, "make_tensordict_primer") and key in list(getattr(module, "in_keys", ()))[1:]:
                way = "InitTracker()" if key == "is_init" else "<module>.make_tensordict_primer()"
                return f": {path!r} ({type(module).__name__}) reads it at each step; add env.append_transform({way})"
        return ""

    @cached_property
    def _fused(self) -> tuple[bool, bool]:
        """Whether there is attention, and whether there are recurrent layers."""
        parts = parts_of(self.module)
        kinds = ((nn.MultiheadAttention, nn.TransformerEncoder), nn.RNNBase)
        attends, recurs = (any(isinstance(part, kind) for part in parts) for kind in kinds)
        return attends, recurs

    def _write(self, td: TensorDictBase, output: Any) -> TensorDictBase:
        values = tuple(output) if type(output) in (tuple, list) else (output,)
        if len(values) < len(self.out_keys):
            raise SettingsError(f"{self.title} gave {len(values)} output(s) for out_keys={self.out_keys}")
        found = {
            (*path_of(key), *map(str, place)): tensor
            for key, value in zip(self.out_keys, values, strict=False)
            for place, tensor in tensor_items(value)
        }
        if any(tensor.shape[: td.batch_dims] != td.batch_size for tensor in found.values()):
            td = _unbatched(td)  # a loss, or states with time in front
        for key, value in found.items():
            td.set(key, value)
        return td

    @contextmanager
    def edited(
        self, edits: Mapping[Selector, Any], *, off: Callable[[], bool] | None = None, but: Collection[nn.Module] = ()
    ) -> Iterator[None]:
        """Keep settings on the model as long as the block lasts, for whoever calls it, by whatever way.

        Every call of the modules is changed. A compiled model runs eagerly meanwhile. Blocks may end in any order.

        Args:
            edits: a tensor or a function of the output, by path, pattern, class or predicate.
            off: asked at every call, whether to leave that one as it is.
            but: modules that are left alone.

        Raises:
            PathError: a selector names no module.
            SetterError: at the end of a block in which the model ran, an edit whose module never did.
        """
        with edited(self, edits, off=off, but=but, attends=self._fused[0]):
            yield

    @contextmanager
    def bent(
        self,
        values: Mapping[str, Tensor] | None = None,
        *,
        side: Literal["output", "input"] = "output",
        rules: Mapping[nn.Module, Rule] | None = None,
    ) -> Iterator[None]:
        """Let :meth:`forward` run with given values at some sites, and gradients go back by given rules, in a graph.

        For methods that differentiate: what :meth:`forward` returns keeps its graph, back to the values. Everything
        else is as in a run: eager, buffers and random states put back.

        Args:
            values: by site; each of its module's calls gives it out.
            side: whether the values are what modules give out, or their first argument.
            rules: by module, see :func:`.reroute.rerouted`.

        Raises:
            SetterError: at the end of the block, a value whose module never ran.
        """
        parts = parts_of(self.module)
        with untouched(parts, graph=torch.is_grad_enabled()) as undo:
            handles = undo.hooks()
            placed = {
                site: setters_at(self, site, value, what=side, call="all") for site, value in (values or {}).items()
            }
            for pairs in placed.values():
                for module, setter in pairs:
                    handles.append(place(module, side, [setter]))
            rerouted(rules or {}, undo)
            yield
            for site, pairs in placed.items():
                refuse_ignored(site, [setter for _, setter in pairs])

    # ------------------------------------------------------------------ names

    def trace(self, inputs: TensorDictBase) -> tuple[TracedSite, ...]:
        """List the sites in the order in which they run; one pass without gradients, the first time only."""
        if self._trace is None:
            self._trace = trace(self.module, lambda: self.forward(inputs), self.sequences or tuple(inputs.shape))
        return self._trace

    @property
    def traced(self) -> tuple[TracedSite, ...]:
        """The trace, once there is one."""
        if self._trace is None:
            raise PathError("the order in which the modules run is not known yet: call trace(inputs) first")
        return self._trace

    def sites(self, layers: Selection) -> tuple[str, ...]:
        """Resolve paths, patterns, module classes or predicates to sites, in the order in which the model runs them.

        Needs a trace. A shared module is found under any of its names.

        Raises:
            PathError: one that matches nothing, naming the nearest sites.
        """
        wanted = tuple(self._inside(layers))
        if wanted not in self._selected:
            self._selected[wanted] = select(self.traced, wanted, owner=self.title, strict=not self.name)
        return self._selected[wanted]

    def chosen(self, selector: Selector) -> list[tuple[str, nn.Module]]:
        """Resolve one selector to paths and modules, each module once, in the order of their registration.

        Raises:
            PathError: it names no module.
        """
        (selector,) = self._inside([selector])
        if isinstance(selector, str) and not is_pattern(selector):
            path = parse(selector).module
            return [(path, module_at(self.module, path))]
        wanted, found = chooser(selector), dict[nn.Module, str]()
        for path, module in walk(self.module):
            if module not in found and wanted(path, module):
                found[module] = path
        if not found:
            near = did_you_mean(selector, self.modules) if isinstance(selector, str) else ""
            raise PathError(f"{shown(selector)} names no module of {self.title}{near}")
        return [(path, module) for module, path in found.items()]

    def has(self, selector: Selector) -> bool:
        """Whether a selector names a module, run or not; needs no trace."""
        wanted = [chooser(one) for one in self._inside(selector)]
        return any(means(path, module) for path, module in walk(self.module) for means in wanted)

    @property
    def title(self) -> str:
        """What errors call this model."""
        return self.name or type(self.module).__name__

    @property
    def modules(self) -> list[str]:
        """The paths of all modules; the model itself is the empty path."""
        return [path for path, _ in walk(self.module)]

    def _inside(self, layers: Selection) -> list[Selector]:
        own = f"{self.name}." if self.name else ""
        return [one.removeprefix(own) if isinstance(one, str) else one for one in selectors(layers)]

    def module_of(self, site: str) -> nn.Module:
        """Return the module behind a site."""
        return module_at(self.module, parse(site).module)

    def input_site(self, key: NestedKey) -> str:
        """Return where an input enters the model, for :meth:`Run.get_input` and the like: ``":0"``, ``":mask"``."""
        if key not in self.in_keys:
            known = [dotted(k) for k in self.in_keys]
            raise KeyMissingError(f"{dotted(key)!r} is no input of {self.title}{did_you_mean(dotted(key), known)}")
        if self._speaks_tensordict:
            return ":" + ":".join(path_of(key))
        positional = [k for k in self.in_keys if k not in self._keywords]
        return f":{self._keywords[key] if key in self._keywords else positional.index(key)}"

    def kind(self, site: str) -> str:
        """Return the class name of the module behind a site."""
        return type(self.module_of(site)).__name__

    def row_axis(self, site: str) -> int:
        """Say along which dimension of a site's value the rows of the batch lie: hidden states have layers in front."""
        return int(isinstance(self.module_of(site), nn.RNNBase) and parse(site).items[:1] == (1,))

    def unit_axis(self, site: str, value: Tensor) -> int:
        """Say along which dimension of a site's value its units lie: see :func:`.layout.unit_axis`."""
        if site not in self._layouts:
            self._layouts[site] = laid_out_by(self.module, self.module_of(site))
        return unit_axis(value, self._layouts[site])

    def device(self) -> torch.device:
        """Return where the model's first parameter or buffer lies (the CPU where it has none)."""
        first = next(iter(self.module.parameters()), next(iter(self.module.buffers()), None))
        return torch.device("cpu") if first is None else first.device


def _unbatched(td: TensorDictBase) -> TensorDictBase:
    return TensorDict(dict(td.items()), batch_size=[])


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _lent(value: Any) -> Any:
    """Lend a value of the caller's to a model that may write to it: copied when it does, and only then.

    Not for a value of which something outlives the pass: the caller's tensor would be moved when written to next.
    """
    if not isinstance(value, Tensor):
        return _copied(value)
    try:
        return value._lazy_clone()
    except RuntimeError:  # memory that torch did not allocate: NumPy's, shared, mapped
        return value.clone()
