"""What is put in the place of a site's value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tdhook_train.errors import SetterError
from tdhook_train.hooks.agents import Surroundings, agent_of, one_of, with_one
from tdhook_train.hooks.items import pick, put
from tdhook_train.hooks.members import Members
from tdhook_train.hooks.sequences import end_to_end, in_sequences
from tdhook_train.hooks.tap import Counted, Proxy, Steps, Turn, version_of

__all__ = ["Setter"]


@dataclass
class Setter(Counted):
    """A pending change of one site's value."""

    turn: ClassVar[Turn] = Turn.SET

    value: Any = None
    copies: int | None = None
    applied: int = 0
    around: Surroundings | None = None  # where the setting outlives a pass: the batch is that of the present call

    def meets(self, value: Any, steps: Steps) -> Any:
        """Put the new value in the old one's place."""
        if not self.takes():
            return value
        return put(value, self.site.items, self.changed(pick(value, self.site)), steps.given)

    def changed(self, before: Tensor) -> Tensor:
        """Return the new value for ``before``, refusing whatever would be ignored or would not fit.

        Raises:
            SetterError: the function returned None (saying whether it changed the value in place), or the new value
                has another shape, dtype or device.
        """
        if agent_of(self.site.items) is None:
            return self._new(before)
        batch = self.batch if self.around is None else self.around.batch
        members = Members.of(before, batch)
        whole = before if members is None else members.seen(members.raw)
        outer = 0 if members is None or self.around is None else members.outside(self.around.level)
        new = with_one(whole, self._new(one_of(whole, self.site, batch, outer)), self.site, batch, outer)
        return new if members is None else members.hidden(new, behind=new.ndim - whole.ndim)

    def _new(self, before: Tensor) -> Tensor:
        value = self._given(before)
        if not isinstance(value, Tensor):
            raise SetterError(f"setting {self.where}: expected a tensor, got {type(value).__name__}")
        value = self._fitted(value, before)
        self.applied += 1
        return value

    def _given(self, before: Tensor) -> Any:
        if isinstance(self.value, Proxy):
            return self._of_proxy(self.value)
        if not callable(self.value):
            return self.value
        # a copy: the function may work in place, and the module may have given its own input on
        mine = end_to_end(before.clone(), self.sequences)
        version = version_of(mine)
        value = self.value(mine)
        if value is None:
            how = "changed it in place and returned None" if version_of(mine) != version else "returned None"
            raise SetterError(f"setting {self.where}: the function {how}; return the new value")
        return value

    def _of_proxy(self, proxy: Proxy) -> Tensor:
        values = proxy.live or proxy.found
        if not values and not proxy.done:
            raise SetterError(f"setting {self.where}: {proxy.where} does not exist yet, it comes later")
        if not proxy.done:
            return values[-1]
        if proxy.call == "all" and self.calls <= len(values):
            return values[self.calls - 1]  # call by call
        return proxy.resolve()

    def _fitted(self, value: Tensor, before: Tensor) -> Tensor:
        members = Members.of(before, self.batch)
        whole = before.shape if members is None else members.seen(members.raw).shape
        value = in_sequences(value, self.sequences, whole)
        if members is not None and value.shape == whole:  # all members at once
            value = members.hidden(value)
        wanted = before.shape if self.copies is None else (self.copies, *before.shape)
        for name, given, needed in (
            ("shape", tuple(value.shape), tuple(wanted)),
            ("dtype", value.dtype, before.dtype),
            ("device", value.device, before.device),
        ):
            if given != needed:
                raise SetterError(f"setting {self.where}: {name} {given} was given where the module has {needed}")
        return value.clone()  # what comes after may work in place, and the value may be somebody's

    def _takes_again(self) -> bool:
        """Do again what was done: backward must find the activations of the forward pass."""
        if self.call != "all" and self.calls > 1:
            raise SetterError(
                f"setting {self.where}: its module ran {self.calls} times and runs again on the way back (activation "
                'checkpointing), where its calls cannot be told apart; set call="all"'
            )
        return self.applied > 0

    def why_ignored(self) -> str:
        """Say why the value was never used."""
        return f"its module ran {self.calls} time(s), not call {self.call}" if self.calls else "its module never ran"

    def finish(self) -> None:
        """Let go of what only the pass needed."""
