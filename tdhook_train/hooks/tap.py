"""What is read or set at a site, and the proxy that stands for a value until the pass has run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import is_tensor_collection
from torch import Tensor

from tdhook_train.errors import ResolveError, SetterError
from tdhook_train.hooks.paths import Site, pick

__all__ = ["Call", "Proxy", "Setter", "Value", "apply_setter", "put"]

Call = int | Literal["all"]
Value = "Tensor | Proxy | Callable[[Tensor], Tensor]"


@dataclass
class Proxy:
    """A value of a pass: resolved after the pass has run, an error before."""

    site: Site
    what: str  # "output", "input" or "gradient"
    call: Call = 0
    state: str = "pending"  # "pending" until the pass ends, then "done"
    calls: int = 0
    found: list[Tensor] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)  # graph tensors, dropped when the pass ends

    def resolve(self) -> Any:
        """Return the value; with ``call="all"`` the list of values, one a call.

        Raises:
            ResolveError: the pass has not run yet, or never reached the site.
        """
        if self.found and self.call != "all":
            return self.found[0]
        if self.state == "pending":
            raise ResolveError(
                f"{self.what} of {str(self.site)!r} does not exist yet: the pass runs when its `with` block ends; "
                "call resolve() after the block"
            )
        if self.call == "all" and self.found:
            return list(self.found)
        if self.what == "gradient" and self.calls:
            raise ResolveError(f"gradient of {str(self.site)!r} was never asked for: call run.backward(...)")
        ran = f"ran {self.calls} time(s)" if self.calls else "never ran in this pass"
        raise ResolveError(f"{self.what} of {str(self.site)!r}, call {self.call}: its module {ran}")

    def takes(self) -> bool:
        """Count one call of the module and say whether this is the call that was asked for."""
        self.calls += 1
        return self.call in ("all", self.calls - 1)


@dataclass
class Setter:
    """A pending change of one site's value."""

    site: Site
    value: Any
    what: str = "output"
    call: Call = 0
    copies: int | None = None
    calls: int = 0
    applied: int = 0

    def takes(self) -> bool:
        """Count one call of the module and say whether this is the call that was asked for."""
        self.calls += 1
        return self.call in ("all", self.calls - 1)

    def why_ignored(self) -> str:
        """Say why the value was never used."""
        if not self.calls:
            return "its module never ran"
        if self.what == "gradient" and (self.call == "all" or self.call < self.calls):
            return "no gradient came back through it; read one with run.get_grad(...) and call run.backward(...)"
        return f"its module ran {self.calls} time(s), not call {self.call}"


def apply_setter(setter: Setter, before: Tensor) -> Tensor:
    """Return the new value for ``before``, refusing whatever would be ignored or would not fit.

    Raises:
        SetterError: the function returned None (saying whether it changed the value in place), or the new value has
            another shape, dtype or device.
    """
    where = f"setting the {setter.what} of {str(setter.site)!r}"
    value = setter.value
    if isinstance(value, Proxy):
        if not value.found and value.state == "pending":
            raise SetterError(f"{where}: the {value.what} of {str(value.site)!r} does not exist yet, it comes later")
        value = value.live[-1] if value.live else value.resolve()
    elif callable(value):
        version = _version(before)
        value = value(before)
        if value is None:
            how = "changed it in place and returned None" if _version(before) != version else "returned None"
            raise SetterError(f"{where}: the function {how}; return the new value")
    if not isinstance(value, Tensor):
        raise SetterError(f"{where}: expected a tensor, got {type(value).__name__}")
    wanted = before.shape if setter.copies is None else (setter.copies, *before.shape)
    for name, given, needed in (
        ("shape", tuple(value.shape), tuple(wanted)),
        ("dtype", value.dtype, before.dtype),
        ("device", value.device, before.device),
    ):
        if given != needed:
            raise SetterError(f"{where}: {name} {given} was given where the module has {needed}")
    setter.applied += 1
    # a copy: what comes after may work in place, and the value may be somebody's
    return value if value is before or setter.what == "gradient" else value.clone()


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version  # inference tensors count none


def put(output: Any, site: Site, value: Tensor) -> Any:
    """Return ``output`` with the tensor at ``site`` replaced."""
    if site.item is None:
        return value
    pick(output, site)  # raises where there is no such item
    if isinstance(output, tuple):
        items = list(output)
        items[int(site.item)] = value
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    changed = output.copy() if is_tensor_collection(output) else type(output)(output)
    changed[site.item] = value
    return changed


def captured(value: Tensor) -> Tensor:
    """Copy a value as it is at this moment, outside any graph."""
    with torch.no_grad():
        return value.detach().clone()
