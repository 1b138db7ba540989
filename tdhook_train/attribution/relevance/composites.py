"""Which rule stands at which module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from tdhook_train.attribution.relevance.affine import AFFINE, CONVOLUTIONS
from tdhook_train.attribution.relevance.rules import Epsilon, Flat, Gamma, RelevanceRule, ZBox, ZPlus
from tdhook_train.errors import SettingsError
from tdhook_train.hooks.paths import chooser

__all__ = ["COMPOSITES", "ByName", "ByType", "Composite", "EpsilonGammaBox", "EpsilonPlus", "EpsilonPlusFlat"]


class Composite(ABC):
    """Chooses rules for the modules of a network; linear layers without one go by :class:`Epsilon`."""

    def rules(self, modules: Mapping[str, nn.Module]) -> dict[nn.Module, RelevanceRule]:
        """Choose for modules by path, in the order in which they run."""
        found, left = dict[nn.Module, RelevanceRule](), True
        for path, module in modules.items():
            rule = self.first(module) if left else None
            left = left and rule is None
            rule = rule or self.rule(path, module)
            if rule is None and isinstance(module, AFFINE):
                rule = Epsilon()
            if rule is not None:
                found.setdefault(module, rule)
        return found

    def first(self, module: nn.Module) -> RelevanceRule | None:  # noqa: ARG002 - subclasses use it
        """Return the rule of the first module that has one by this, and of no other."""
        return None

    @abstractmethod
    def rule(self, path: str, module: nn.Module) -> RelevanceRule | None:
        """Return the rule of a module, if it has any."""


@dataclass(frozen=True)
class EpsilonPlus(Composite):
    """z+ for convolutions, epsilon for linear layers.

    Source: Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10; under this name, Anders et al. 2021,
    arXiv:2106.13200.
    """

    epsilon: float = 1e-6
    stabiliser: float = 1e-6

    def __post_init__(self) -> None:
        Epsilon(epsilon=self.epsilon, stabiliser=self.stabiliser)  # refuses what it does not take

    def rule(self, path: str, module: nn.Module) -> RelevanceRule | None:  # noqa: ARG002
        """Choose by type."""
        if isinstance(module, CONVOLUTIONS):
            return ZPlus(self.stabiliser)
        return Epsilon(epsilon=self.epsilon) if isinstance(module, nn.Linear) else None


@dataclass(frozen=True)
class EpsilonPlusFlat(EpsilonPlus):
    """As :class:`EpsilonPlus`, with the flat rule for the first layer.

    Source: Anders et al. 2021, arXiv:2106.13200.
    """

    def first(self, module: nn.Module) -> RelevanceRule | None:
        """Choose for the first layer."""
        return Flat(self.stabiliser) if isinstance(module, AFFINE) else None


@dataclass(frozen=True)
class EpsilonGammaBox(Composite):
    """z^B for the first convolution, gamma for the others, epsilon for linear layers.

    Args:
        low: least value of a pixel, or of each channel.
        high: greatest value.
        epsilon: of the epsilon rule.
        gamma: of the gamma rule.
        stabiliser: of the others.

    Source: Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10.
    """

    low: float | tuple[float, ...] = -3.0
    high: float | tuple[float, ...] = 3.0
    epsilon: float = 1e-6
    gamma: float = 0.25
    stabiliser: float = 1e-6

    def __post_init__(self) -> None:
        ZBox(self.stabiliser, self.low, self.high)  # each refuses what it does not take
        Gamma(self.stabiliser, self.gamma)
        Epsilon(epsilon=self.epsilon)

    def first(self, module: nn.Module) -> RelevanceRule | None:
        """Choose for the first convolution."""
        return ZBox(self.stabiliser, self.low, self.high) if isinstance(module, CONVOLUTIONS) else None

    def rule(self, path: str, module: nn.Module) -> RelevanceRule | None:  # noqa: ARG002
        """Choose by type."""
        if isinstance(module, CONVOLUTIONS):
            return Gamma(self.stabiliser, self.gamma)
        return Epsilon(epsilon=self.epsilon) if isinstance(module, nn.Linear) else None


@dataclass(frozen=True)
class ByType(Composite):
    """Rules by class of the module; the first class that fits.

    Args:
        types: rules by class.
        at_first: rules by class, for the first module in the order of the pass that is of one of them.
    """

    types: Mapping[type[nn.Module], RelevanceRule]
    at_first: Mapping[type[nn.Module], RelevanceRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_what_is_no_rule(self, [*self.types.values(), *self.at_first.values()])

    def first(self, module: nn.Module) -> RelevanceRule | None:
        """Choose for the first."""
        return next((rule for kind, rule in self.at_first.items() if isinstance(module, kind)), None)

    def rule(self, path: str, module: nn.Module) -> RelevanceRule | None:  # noqa: ARG002
        """Choose by type."""
        return next((rule for kind, rule in self.types.items() if isinstance(module, kind)), None)


@dataclass(frozen=True)
class ByName(Composite):
    """Rules by path or pattern, the first that fits; for all else another composite.

    Args:
        names: rules by path or pattern.
        otherwise: chooses for the other modules.
    """

    names: Mapping[str, RelevanceRule]
    otherwise: Composite = field(default_factory=EpsilonPlus)

    def __post_init__(self) -> None:
        _refuse_what_is_no_rule(self, self.names.values())

    def first(self, module: nn.Module) -> RelevanceRule | None:
        """Choose for the first, as the other composite does."""
        return self.otherwise.first(module)

    def rule(self, path: str, module: nn.Module) -> RelevanceRule | None:
        """Choose by name."""
        return self.named(path, module) or self.otherwise.rule(path, module)

    def named(self, path: str, module: nn.Module) -> RelevanceRule | None:
        """Return the rule that a path has by its name."""
        return next((rule for name, rule in self.names.items() if chooser(name)(path, module)), None)

    def rules(self, modules: Mapping[str, nn.Module]) -> dict[nn.Module, RelevanceRule]:
        """Choose; a name goes before being first."""
        named = {module: rule for path, module in modules.items() if (rule := self.named(path, module)) is not None}
        return super().rules(modules) | named


COMPOSITES: dict[str, Composite] = {
    "epsilon_plus": EpsilonPlus(),
    "epsilon_plus_flat": EpsilonPlusFlat(),
    "epsilon_gamma_box": EpsilonGammaBox(),
}


def _refuse_what_is_no_rule(composite: Composite, rules: Iterable[object]) -> None:
    wrong = [rule for rule in rules if not isinstance(rule, RelevanceRule)]
    if wrong:
        raise SettingsError(f"{type(composite).__name__} needs rules such as Epsilon(), got {wrong}")
