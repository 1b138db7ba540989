"""One pass through a model, with what is read, set, differentiated and stopped in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import PathError, ResolveError, SetterError, TargetError
from tdhook_train.hooks.paths import Site, eager, is_pattern, module_at, parse, pick
from tdhook_train.hooks.tap import Call, Proxy, Setter, apply_setter, captured, put
from tdhook_train.undo import Undo

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["Run"]


class _Stopped(BaseException):  # a model that catches every Exception must not catch this one
    """Raised inside the model by :meth:`Run.stop`, caught by the run."""


class Run:
    """A pass that is described in a ``with`` block and runs when the block ends.

    Reads and settings of one site happen in the order in which they are written: a ``get`` after a ``set`` sees the
    new value. Captured values are copies taken at that moment, outside any graph. Nothing is left on the model,
    whichever way the block is left. Costs one forward pass, and one backward pass where a gradient is asked for.
    """

    def __init__(self, model: HookedModel, inputs: TensorDictBase) -> None:
        self._model = model
        self._inputs = inputs
        self._taps: dict[tuple[str, str], list[Proxy | Setter | None]] = {}  # (module path, what) -> taps; None stops
        self._objective: Callable[[TensorDictBase], Tensor] | None = None
        self._output: TensorDictBase | None = None
        self._copies: int | None = None

    # ------------------------------------------------------------------ what to do

    def get(self, path: str, *, call: Call = 0) -> Proxy:
        """Read what the module at ``path`` gives out, at one of its calls or at ``"all"``."""
        return self._read(path, "output", call)

    def get_input(self, path: str, *, call: Call = 0) -> Proxy:
        """Read the first argument of the module at ``path`` (``path:1`` the second)."""
        return self._read(path, "input", call)

    def get_grad(self, path: str, *, call: Call = 0) -> Proxy:
        """Read the gradient of what :meth:`backward` differentiates with respect to the module's output."""
        return self._read(path, "gradient", call)

    def set(self, path: str, value: Any, *, call: Call = 0, copies: int | None = None) -> None:
        """Replace what the module at ``path`` gives out.

        Args:
            path: the site.
            value: a tensor, a proxy of this pass or of an earlier run, or a function of the output.
            call: which of the module's calls, or ``"all"``.
            copies: the value carries this many copies of the batch in a new leading dimension, and the rest of the
                pass runs on all of them; the outputs then have that dimension too.

        Raises:
            PathError: the path names no module.
        """
        self._copies = copies if copies is not None else self._copies
        self._add(Setter(self._site(path), value, "output", call, copies), "output")

    def set_input(self, path: str, value: Any, *, call: Call = 0) -> None:
        """Replace the first argument of the module at ``path`` (``path:1`` the second)."""
        self._add(Setter(self._site(path), value, "input", call), "input")

    def set_grad(self, path: str, value: Callable[[Tensor], Tensor], *, call: Call = 0) -> None:
        """Replace the gradient on its way back through the module's output."""
        self._add(Setter(self._site(path), value, "gradient", call), "output")

    def stop(self, path: str) -> None:
        """Run nothing after the module at ``path``."""
        self._taps.setdefault((self._site(path).module, "output"), []).append(None)

    def backward(self, objective: Callable[[TensorDictBase], Tensor]) -> None:
        """Differentiate a scalar function of the outputs; parameters' ``.grad`` is not touched."""
        self._objective = objective

    @property
    def output(self) -> TensorDictBase:
        """The inputs and outputs of the pass, outside any graph."""
        if self._output is None:
            raise ResolveError("the pass has not run, or was stopped before the outputs: there is no output")
        return self._output

    # ------------------------------------------------------------------ doing it

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._execute()

    def _site(self, path: str) -> Site:
        if is_pattern(path):
            raise PathError(f"{path!r} names many modules; a run reads and sets one at a time: see HookedModel.sites")
        site = parse(path)
        module_at(self._model.module, site.module)
        return site

    def _read(self, path: str, what: str, call: Call) -> Proxy:
        proxy = Proxy(self._site(path), what, call)
        self._add(proxy, "input" if what == "input" else "output")
        return proxy

    def _add(self, tap: Proxy | Setter, place: str) -> None:
        self._taps.setdefault((tap.site.module, place), []).append(tap)

    def _all(self, kind: type) -> list[Any]:
        return [tap for taps in self._taps.values() for tap in taps if isinstance(tap, kind)]

    def _execute(self) -> None:
        proxies: list[Proxy] = self._all(Proxy)
        wants_grad = self._objective is not None
        inference = torch.is_inference_mode_enabled() and not wants_grad
        try:
            with Undo() as undo, torch.inference_mode(inference), torch.set_grad_enabled(wants_grad):
                undo.enter_context(eager(self._model.module))
                for (path, place), taps in self._taps.items():
                    self._place(undo, path, place, taps)
                try:
                    output = self._model.forward(self._inputs, batched=self._copies is None)
                except _Stopped:
                    output = None
                if wants_grad:
                    self._differentiate(output, [p for p in proxies if p.what == "gradient"])
            self._output = None if output is None else output.detach()
        finally:
            for proxy in proxies:
                proxy.state = "done"
                proxy.live.clear()
        self._refuse_ignored()

    def _place(self, undo: Undo, path: str, place: str, taps: list[Proxy | Setter | None]) -> None:
        module = module_at(self._model.module, path)
        if place == "input":
            undo.hook(module.register_forward_pre_hook(lambda _module, a, k: _into(taps, a, k), with_kwargs=True))
        else:
            taps = sorted(taps, key=lambda tap: tap is None)  # what is read where the pass stops is read before it does
            undo.hook(module.register_forward_hook(lambda _module, _args, output: _through(taps, output)))

    def _differentiate(self, output: TensorDictBase | None, wanted: list[Proxy]) -> None:
        if output is None or self._objective is None:
            raise TargetError("backward() needs the outputs, but the pass was stopped before them")
        total = self._objective(output)
        if total.numel() != 1:
            raise TargetError(f"backward() differentiates one number, got shape {tuple(total.shape)}; sum it")
        places = [(proxy, tensor) for proxy in wanted for tensor in proxy.live]
        if not places:
            return
        grads: tuple[Tensor | None, ...] = (None,) * len(places)
        if total.requires_grad:
            grads = torch.autograd.grad(total, [tensor for _, tensor in places], allow_unused=True)
        for (proxy, tensor), grad in zip(places, grads, strict=True):
            proxy.found.append(torch.zeros_like(tensor) if grad is None else grad.detach())

    def _refuse_ignored(self) -> None:
        for setter in self._all(Setter):
            if not setter.applied:
                raise SetterError(
                    f"the {setter.what} set at {str(setter.site)!r} was never used: {setter.why_ignored()}"
                )


def _into(taps: list[Proxy | Setter | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pass a module's arguments, by place or by name, through the taps."""
    changed = _through(taps, {**dict(enumerate(args)), **kwargs})
    return changed and (tuple(changed[i] for i in range(len(args))), {name: changed[name] for name in kwargs})


def _through(taps: list[Proxy | Setter | None], value: Any) -> Any:
    """Pass a module's value through its taps in order; return the new value, or None where nothing was set."""
    changed = False
    for tap in taps:
        if tap is None:
            raise _Stopped
        if not tap.takes():
            continue
        site = tap.site
        if tap.what == "input" and site.item is None:
            site = Site(site.module, next(iter(value), 0))
        tensor = pick(value, site)
        if isinstance(tap, Proxy) and tap.what != "gradient":
            _capture(tap, tensor)
        elif isinstance(tap, Setter) and tap.what != "gradient":
            value, changed = put(value, site, apply_setter(tap, tensor)), True
        elif torch.is_grad_enabled():
            value, changed = put(value, site, _watch_gradient(tap, tensor)), True
    return value if changed else None


def _capture(proxy: Proxy, tensor: Tensor) -> None:
    proxy.found.append(captured(tensor))
    if torch.is_grad_enabled():
        proxy.live.append(tensor.clone())  # what comes after may work in place


def _watch_gradient(tap: Proxy | Setter, tensor: Tensor) -> Tensor:
    """Read or bend the gradient of ``tensor``; return what goes on in its place.

    A copy goes on: a module that works in place would otherwise put its own output where the tensor was, and a frozen
    tensor may be the user's, who did not ask for a graph to begin there.
    """
    live = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    onward = live.clone()
    if isinstance(tap, Proxy):
        tap.live.append(live)
    else:
        onward.register_hook(partial(apply_setter, tap))
    return onward
