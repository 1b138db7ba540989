"""Taps on modules: in which order they stand, how a value passes them, and what they must have done in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tdhook_train.errors import SetterError
from tdhook_train.hooks.arguments import Arguments
from tdhook_train.hooks.paths import Selector, Site, parse, shown
from tdhook_train.hooks.setter import Setter
from tdhook_train.hooks.tap import Steps, Stop, Tap, Turn

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["ForEach", "Held", "place", "refuse_ignored", "refuse_unreached", "setters_at"]


@dataclass(frozen=True)
class ForEach:
    """A setting that differs from module to module: ``make(site, module)`` gives the tensor or function of each."""

    make: Callable[[str, nn.Module], Any]


def place(module: nn.Module, where: str, taps: Sequence[Tap]) -> RemovableHandle:
    """Hook a module: its taps meet what it gives out, or takes in where ``where`` is ``"input"``."""
    if where == "input":
        return module.register_forward_pre_hook(partial(_into, _in_order(taps)), with_kwargs=True)
    if len(taps) == 1:
        return module.register_forward_hook(partial(_past, taps[0].meets))
    taps = _in_order(taps)
    return module.register_forward_hook(lambda _module, args, output: _through(taps, args, output))


class Held:
    """A hook that stays on somebody's module for a while; copies and pickles of that get one that does nothing.

    Args:
        tap: meets what the module gives out; or a function of module and arguments, told of each call.
    """

    def __init__(self, tap: Tap | Callable[[nn.Module, tuple[Any, ...]], object] | None) -> None:
        self._tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        """Do it."""
        if self._tap is None:
            return None
        if callable(self._tap):
            self._tap(module, args)
            return None
        return _past(self._tap.meets, module, args, output)

    def __reduce__(self) -> tuple[type[Held], tuple[None]]:
        """Return what copies get."""
        return Held, (None,)


def _in_order(taps: Sequence[Tap]) -> list[Tap]:
    """Keep the order in which taps were written, but for two things that it does not say.

    A value that is both read and differentiated is differentiated first, so that what is done with the reading counts
    towards its gradient; and what is read where the pass stops is read before it does.
    """
    versions = accumulate(tap.turn == Turn.SET for tap in taps)
    rows = [((tap.turn == Turn.STOP, version, tap.turn), tap) for version, tap in zip(versions, taps, strict=True)]
    return [tap for _, tap in sorted(rows, key=lambda row: row[0])]


def _into(taps: list[Tap], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given: Arguments | None = _through(taps, (), Arguments(module, args, kwargs))
    return given and (given.args, given.kwargs)


def setters_at(
    model: HookedModel, selector: Selector, value: Any, *, kind: type[Setter] = Setter, **how: Any
) -> list[tuple[nn.Module, Setter]]:
    """Return each module that a selector names, and a setter for it."""
    items = parse(selector).items if isinstance(selector, str) else ()
    sites = [(Site(path, items), module) for path, module in model.chosen(selector)]
    each = value.make if isinstance(value, ForEach) else lambda *_: value
    return [(module, kind(site, value=each(str(site), module), **how)) for site, module in sites]


def _past(meets: Callable[[Any, Steps], Any], _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    onward = meets(output, Steps(args))
    return None if onward is output else onward


def _through(taps: list[Tap], args: tuple[Any, ...], value: Any) -> Any:
    """Pass a module's value through its taps in order; return the new value, or None where nothing was set."""
    onward, steps = value, Steps(args)
    for tap in taps:
        onward = tap.meets(onward, steps)
    return None if onward is value else onward


def refuse_unreached(stops: list[Stop]) -> None:
    """Raise where a pass that should have stopped ran to its end.

    Raises:
        SetterError: the module never ran, or not that often.
    """
    for stop in stops:
        if not stop.reached:
            raise SetterError(
                f"the pass did not stop at {str(stop.site)!r}: its module ran {stop.calls} time(s), not call "
                f"{stop.call}"
            )


def refuse_ignored(selector: Selector, setters: list[Setter]) -> None:
    """Raise where a setting was never used.

    Raises:
        SetterError: says why; of the modules that a pattern names, one at least must have run.
    """
    if any(setter.applied for setter in setters):
        return
    first = setters[0]
    why = first.why_ignored() if len(setters) == 1 else f"none of the {len(setters)} modules it names did"
    raise SetterError(f"the {first.what} set at {shown(selector)} was never used: {why}")
