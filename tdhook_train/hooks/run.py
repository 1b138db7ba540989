"""One pass through a model, with what is read, set, differentiated and stopped in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import PathError, ResolveError
from tdhook_train.hooks.gradients import GradientProxy, GradientSetter, Objective, differentiate, proxies_of
from tdhook_train.hooks.kernels import untouched
from tdhook_train.hooks.paths import Selector, Site, is_pattern, parse, shown
from tdhook_train.hooks.place import place, refuse_ignored, refuse_unreached, setters_at
from tdhook_train.hooks.setter import Setter
from tdhook_train.hooks.several import Proxies
from tdhook_train.hooks.tap import COPY, Call, Keep, Proxy, Stop, Stopped, Tap, Turn, Where
from tdhook_train.undo import parts_of

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["Run"]


class Kept(TypedDict, total=False):
    """What every ``get`` takes beside its place: see :class:`Run`."""

    to: Where | None
    reduce: Callable[[Tensor], Tensor] | None
    detach: bool


class Run:
    """A pass that is described in a ``with`` block and runs when the block ends.

    Reads and settings of one site happen in the order in which they are written: a ``get`` after a ``set`` sees the
    new value. Captured values are copies taken at that moment, outside any graph. Nothing is left on the model,
    whichever way the block is left: hooks, buffers and random states are as before. Costs one forward pass, and one
    backward pass for each target where a gradient is asked for.

    What is read may be a path, or a pattern, a module class or a predicate: then the proxy resolves to a dictionary of
    values by site, in the order in which the model runs them.

    Every ``get`` takes:

    * ``call``: which of the module's calls, or ``"all"``: then the value is a list.
    * ``to``: a device or dtype for what is kept.
    * ``reduce``: a function of the value; only what it returns is kept.
    * ``detach``: False keeps the graph, so that the value can be differentiated, or differentiated with respect to.
    """

    def __init__(self, model: HookedModel, inputs: TensorDictBase) -> None:
        self._model: HookedModel | None = model
        self._inputs: TensorDictBase | None = inputs
        given = tuple(inputs.batch_size) if isinstance(inputs, TensorDictBase) else ()
        self._sequences = None if given == model.sequences else model.sequences  # given whole, they come out whole
        self._batch = self._sequences or given
        self._taps: dict[tuple[nn.Module, str], list[Tap]] = {}  # (module, "output" or "input") -> taps as written
        self._proxies: list[Proxy | Proxies] = []
        self._set: list[tuple[Selector, list[Setter]]] = []
        self._stops: list[Stop] = []
        self._objective: Objective = None
        self._keeps_graph = False
        self._output: TensorDictBase | None = None

    # ------------------------------------------------------------------ what to do

    def get(self, path: Selector, *, call: Call = 0, **keep: Unpack[Kept]) -> Proxy:
        """Read what the module at ``path`` gives out, at one of its calls or at ``"all"``."""
        return self._read(path, Proxy, "output", call, keep)

    def get_input(self, path: Selector, *, call: Call = 0, **keep: Unpack[Kept]) -> Proxy:
        """Read the first argument of the module at ``path`` (``path:1`` the second, ``path:name`` one by name)."""
        return self._read(path, Proxy, "input", call, keep)

    def get_grad(self, path: Selector, *, call: Call = 0, **keep: Unpack[Kept]) -> Proxy:
        """Read the gradient of what :meth:`backward` differentiates with respect to the module's output."""
        return self._read(path, GradientProxy, "output", call, keep)

    def get_input_grad(self, path: Selector, *, call: Call = 0, **keep: Unpack[Kept]) -> Proxy:
        """Read the gradient with respect to the module's first argument; the path ``""`` is the model itself."""
        return self._read(path, GradientProxy, "input", call, keep)

    def set(self, path: Selector, value: Any, *, call: Call = 0, copies: int | None = None) -> None:
        """Replace what the module at ``path`` gives out: in what it returns, or in the mapping that it was called with.

        A caller that drops what an in-place module returns, and goes on with the tensor it passed in, does not see it.

        Args:
            path: the site; with a pattern, class or predicate, every module that it names.
            value: a tensor, a proxy of this pass or of an earlier run, or a function of the output.
            call: which of the module's calls, or ``"all"``.
            copies: the value carries this many copies of the batch in a new leading dimension, and the rest of the
                pass runs on all of them; the outputs then have that dimension too.

        Raises:
            PathError: the path names no module.
        """
        self._write(path, Setter, "output", value, call, copies=copies)

    def set_input(self, path: Selector, value: Any, *, call: Call = 0, copies: int | None = None) -> None:
        """Replace the first argument of the module at ``path`` (``path:1`` the second, ``path:name`` one by name).

        Args are those of :meth:`set`.
        """
        self._write(path, Setter, "input", value, call, copies=copies)

    def set_grad(self, path: Selector, value: Any, *, call: Call = 0) -> None:
        """Replace the gradient on its way back through the module's output."""
        self._write(path, GradientSetter, "output", value, call)

    def set_input_grad(self, path: Selector, value: Any, *, call: Call = 0) -> None:
        """Replace the gradient on its way back through the module's first argument."""
        self._write(path, GradientSetter, "input", value, call)

    def stop(self, path: str, *, call: int = 0) -> None:
        """Run nothing after the module at ``path``."""
        if is_pattern(path):
            raise PathError(f"{shown(path)} names many modules; a pass stops at one")
        site = parse(path)
        stop = Stop(site, call=call)
        self._add(self._open.module_of(site.module), "output", stop)
        self._stops.append(stop)

    def backward(self, objective: Objective) -> None:
        """Differentiate; parameters' ``.grad`` is not touched.

        Args:
            objective: a function of the outputs that gives one number; an output key or ``("output", 3)``, summed over
                the rest; or a proxy of this pass that holds one number. A list or a mapping of these: each gradient
                gains a leading dimension of targets, in that order, all from one forward pass.
        """
        self._objective = objective

    @property
    def output(self) -> TensorDictBase:
        """The inputs and outputs of the pass, outside any graph."""
        if self._output is None:
            raise ResolveError("the pass has not run, or was stopped before the outputs: there is no output")
        return self._output

    # ------------------------------------------------------------------ noting it

    @property
    def _open(self) -> HookedModel:
        if self._model is None:
            raise ResolveError("this pass is over; describe another: with hooked.run(td) as run")
        return self._model

    def _add(self, module: nn.Module, where: str, tap: Tap) -> None:
        # by module, not by path: a shared module is one place, whichever of its names is used
        self._taps.setdefault((module, where), []).append(tap)

    def _read(self, path: Selector, kind: type[Proxy], where: str, call: Call, kept: Kept) -> Any:
        what, keep = _what(kind, where), Keep(**kept) if kept else COPY
        self._keeps_graph |= not keep.detach and kind is Proxy
        batch, sequences = self._batch, self._sequences

        def make(site: Site) -> Proxy:
            return kind(site, what, call, batch, sequences, keep=keep)

        chosen = self._open.chosen(path)
        if isinstance(path, str) and not is_pattern(path):
            proxy: Proxy | Proxies = make(Site(chosen[0][0], parse(path).items))
        else:
            proxy = Proxies(path, make, kind.turn)
        for name, module in chosen:
            self._add(module, where, proxy if isinstance(proxy, Proxy) else proxy.at(name))
        self._proxies.append(proxy)
        return proxy

    def _write(self, path: Selector, kind: type[Setter], where: str, value: Any, call: Call, **more: Any) -> None:
        how = {"what": _what(kind, where), "call": call, "batch": self._batch, "sequences": self._sequences} | more
        setters = setters_at(self._open, path, value, kind=kind, **how)
        for module, setter in setters:
            self._add(module, where, setter)
        self._set.append((path, [setter for _, setter in setters]))

    # ------------------------------------------------------------------ doing it

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._execute(self._open)
                for selector, setters in self._set:
                    refuse_ignored(selector, setters)
        finally:
            for tap in (*self._proxies, *self._setters()):
                tap.finish()
            self._model = self._inputs = self._objective = None  # a finished run keeps nothing alive
            self._taps, self._proxies, self._set, self._stops = {}, [], [], []

    def _execute(self, model: HookedModel) -> None:
        differentiates = self._objective is not None
        graph = differentiates or self._keeps_graph
        if graph:
            self._mark_what_feeds()
        parts = parts_of(model.module)
        with untouched(parts, graph=graph) as undo:
            handles = undo.hooks()
            for (module, where), taps in self._taps.items():
                handles.append(place(module, where, taps))
            batched = not any(setter.copies for setter in self._setters())
            try:
                output = model.forward(self._inputs, batched=batched, lend=not graph)
                refuse_unreached(self._stops)
            except Stopped:
                output = None
            if differentiates:
                self._differentiate(output)
            self._output = None if output is None else _outside(output, parts)

    def _differentiate(self, output: TensorDictBase | None) -> None:
        proxies = list(self._singly())
        for tap in (*proxies, *self._setters()):
            tap.again = True
        wanted = [proxy for proxy in proxies if isinstance(proxy, GradientProxy)]
        differentiate(self._objective, output, wanted, keep_graph=self._keeps_graph)

    def _singly(self) -> Iterator[Proxy]:
        for proxy in self._proxies:
            yield from (proxy,) if isinstance(proxy, Proxy) else proxy.found.values()

    def _setters(self) -> Iterator[Setter]:
        return (setter for _, setters in self._set for setter in setters)

    def _mark_what_feeds(self) -> None:
        for proxy in (*proxies_of(self._objective), *(setter.value for setter in self._setters())):
            if isinstance(proxy, Proxy) and not proxy.done:
                proxy.feeds = True


def _what(kind: type[Proxy] | type[Setter], where: str) -> str:
    return "gradient" if kind.turn is Turn.DIFFERENTIATE else where


def _outside(output: TensorDictBase, parts: list[nn.Module]) -> TensorDictBase:
    """Take the outputs out of the graph, and out of inference mode, where nothing could be done with them later.

    An output that is a buffer of the model, which is put back after the pass, is copied.
    """
    buffers = [b for part in parts if part._buffers for b in part._buffers.values() if b is not None]
    held = {buffer.data_ptr() for buffer in buffers if buffer.layout is torch.strided}
    if held:
        output = output.apply(lambda value: value.clone() if value.data_ptr() in held else value)
    if not torch.is_inference_mode_enabled():
        attached = any(value.requires_grad for value in output.values(include_nested=True, leaves_only=True))
        return output.detach() if attached else output
    with torch.inference_mode(False):
        return output.apply(lambda value: value.clone() if value.is_inference() else value)
