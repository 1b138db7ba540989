"""What a policy earns without one of its layers or units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torch import Tensor
from torchrl.envs import EnvBase

from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError, did_you_mean
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.paths import Selector
from tdhook_train.isolation import accompanied, undrawn
from tdhook_train.keys import dotted, path_of
from tdhook_train.method import Method, Parts, Seen
from tdhook_train.ops.join import Measured, join
from tdhook_train.ops.units import as_rows, held, padded
from tdhook_train.undo import kept_randomness

__all__ = ["AblatedReturn"]

_CHOICES = {"by": ("zero", "mean"), "exploration": ("deterministic", "random")}


@dataclass(frozen=True)
class AblatedReturn(Method):
    """What return the policy reaches without a layer, or without one unit of it, beside the intact return.

    The isolated policy acts in an environment of its own, made for the measurement and closed after it. Every
    ablation plays the same episodes: the environment's seeds, and what is drawn while acting, are those of the intact
    rollouts. They follow from the generator, so they differ from tick to tick. Random states of Python, NumPy and
    torch are put back.

    Costs ``episodes × (1 + layers + units)`` episodes of at most ``max_steps`` environment steps; the steps taken are
    written. An environment with a batch size plays as many episodes at a time. Give it a row and a schedule of its own.

    Args:
        make_env: makes the environment, importable where the settings are to be pickled. Not one that is in use:
            it is seeded, stepped and closed. Everything that the policy needs is its to bring, such as
            ``InitTracker`` and primers for a recurrent one, or frozen statistics for a normalised observation.
        layers: paths, patterns, module classes or predicates; each is ablated whole.
        units: ``"each"`` ablates the units of these layers one by one as well, a tuple the units of these numbers;
            none by default. Units are features, and channels of an image activation.
        by: units are held at 0, or at their mean over the batch measured on.
        episodes: how many to play intact and with each ablation.
        max_steps: where an episode that has not ended is cut off.
        exploration: the policy acts by its mode, or draws its actions.
        networks: of the networks that give out the environment's action, the ones to measure; all by default, target
            networks included.

    Writes:
        Returns are undiscounted sums of rewards, over agents too. ``return_intact`` [episode]. ``return_ablated``
        [layer, episode]. ``drop`` [layer]: mean of intact minus ablated. ``unit_return_ablated`` [layer, unit, episode]
        and ``unit_drop`` [layer, unit], where ``units`` asks for them: NaN for units that were not ablated and beyond
        the layer's width. ``env_steps`` []: steps taken in the environment.

    Raises:
        SettingsError: what cannot be played; when measuring, ``make_env`` gave no TorchRL environment, or something
            draws from the process's random states beside another thread.
        NetworkError: no network gives out the environment's action.
        KeyMissingError: the policy reads what the environment does not give.

    Source: Meyes et al. 2019, arXiv:1901.08644 (ablation of units); Wang et al. 2022, arXiv:2211.00593 (mean).
    """

    make_env: Callable[[], EnvBase]
    layers: Selection = "**"
    units: Literal["each"] | tuple[int, ...] | None = None
    by: Literal["zero", "mean"] = "zero"
    episodes: int = 4
    max_steps: int = 1000
    exploration: Literal["deterministic", "random"] = "deterministic"

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "return_intact": "episode",
        "return_ablated": "layer episode",
        "drop": "layer",
        "unit_return_ablated": "layer unit episode",
        "unit_drop": "layer unit",
        "env_steps": "",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.units, list):
            object.__setattr__(self, "units", tuple(self.units))
        if isinstance(self.make_env, EnvBase) or not callable(self.make_env):
            given = type(self.make_env).__name__
            raise SettingsError(f"AblatedReturn needs a function that makes an environment, got make_env={given}")
        for name in ("episodes", "max_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"AblatedReturn needs 1 or more, got {name}={getattr(self, name)}")
        for name, known in _CHOICES.items():
            if (given := getattr(self, name)) not in known:
                raise SettingsError(f"{name}={given!r} is none of {', '.join(known)}{did_you_mean(str(given), known)}")
        numbers = () if self.units in (None, "each") else self.units
        if not isinstance(numbers, tuple) or not all(isinstance(unit, int) and unit >= 0 for unit in numbers):
            raise SettingsError(f'AblatedReturn needs units="each" or units by number, got units={self.units!r}')

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers: how wide they are, and what their means are."""
        return model.sites(self.layers)

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse a model without a policy for the environment; makes the environment once."""
        super().check(models)
        with self._environment() as env:
            self._policies(self.chosen(models), env)

    def across(self, parts: Parts) -> Measured:
        """Measure every policy among the networks, in one environment."""
        with self._environment() as env:
            policies = self._policies({name: part.model for name, part in self.chosen(parts).items()}, env)
            kept = {name: parts[name] for name, model in policies.items() if self.concerns(model)}
            if not kept:
                raise NetworkError(f"{self} has nothing to measure on {', '.join(map(repr, policies))}")
            return join({n: self.named(self._compared(part.seen, part.model, env), part) for n, part in kept.items()})

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Play with every ablation of one policy."""
        with self._environment() as env:
            self._policies({model.name: model}, env)
            return self._compared(seen, model, env)

    def _compared(self, seen: Seen, model: HookedModel, env: EnvBase) -> TensorDict:
        stage = _Stage(env, model, self._seeds(seen.generator, env), self)
        intact = stage.returns({})
        whole, single = [], []
        for site in self.taps(model):
            value = seen.values[site]
            axis = model.unit_axis(site, value) - value.ndim  # from the end: an environment may have fewer before it
            rows = as_rows(value, axis)
            to = rows.mean(0) if self.by == "mean" else torch.zeros_like(rows[0])
            width = len(to)
            whole.append(stage.returns({site: partial(held, units=range(width), to=to, axis=axis)}))
            returns = intact.new_full((width, self.episodes), torch.nan)
            for unit in range(width) if self.units == "each" else self.units or ():
                if unit < width:
                    returns[unit] = stage.returns({site: partial(held, units=[unit], to=to[unit], axis=axis)})
            single.append(returns)
        ablated = torch.stack(whole)
        found = {"return_intact": intact, "return_ablated": ablated, "drop": (intact - ablated).mean(-1)}
        if self.units is not None:
            units = padded(single)
            found |= {"unit_return_ablated": units, "unit_drop": (intact - units).mean(-1)}
        return TensorDict(found | {"env_steps": torch.tensor(stage.steps)}, batch_size=[])

    def _seeds(self, generator: torch.Generator | None, env: EnvBase) -> list[int]:
        """Draw one seed for each round of episodes played side by side."""
        rounds = -(-self.episodes // env.batch_size.numel())
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return torch.randint(2**31 - 1, (rounds,), generator=generator).tolist()

    @contextmanager
    def randomness(self, seed: int | None = None) -> Iterator[None]:
        """Run an environment, which may draw from the random states of the process, without a trace in these.

        Raises:
            SettingsError: it draws from them while other threads run, whose random numbers would change.
        """
        if not accompanied():
            with kept_randomness(seed):
                yield
            return
        refusal = SettingsError(
            f"{type(self).__name__} plays beside another thread, such as a collector's, and its environment or policy "
            "draws from the random states that they share; measure with Observer(background=True), or let make_env "
            'draw from a generator of its own, with exploration="deterministic"'
        )
        with undrawn(refusal):
            yield

    @contextmanager
    def _environment(self) -> Iterator[EnvBase]:
        with self.randomness():
            env = self.make_env()
            if not isinstance(env, EnvBase):
                raise SettingsError(f"make_env gave a {type(env).__name__}, which is no TorchRL environment")
            try:
                yield env
            finally:
                env.close(raise_if_closed=False)

    def _policies(self, models: Mapping[str, HookedModel], env: EnvBase) -> dict[str, HookedModel]:
        wanted = env.action_keys
        found = {name: model for name, model in models.items() if set(wanted) <= set(model.out_keys)}
        if not found:
            action = " and ".join(repr(dotted(key)) for key in wanted)
            given = {name or "the model": [dotted(key) for key in model.out_keys] for name, model in models.items()}
            raise NetworkError(f"no network gives out the environment's action, {action}; they give {given}")
        known = [key for spec in (env.observation_spec, env.state_spec, env.full_done_spec) for key in _keys(spec)]
        for model in found.values():
            for key in model.in_keys:
                if key not in known:
                    near = did_you_mean(dotted(key), [dotted(other) for other in known])
                    raise KeyMissingError(f"{model.title} reads {dotted(key)!r}, which the environment has not{near}")
        return found


def _keys(spec: Any) -> list[NestedKey]:
    return [] if spec is None else list(spec.keys(True, True))


@dataclass
class _Stage:
    """A policy in its environment: plays the same episodes again and again, and counts the steps."""

    env: EnvBase
    model: HookedModel
    seeds: Sequence[int]
    how: AblatedReturn
    steps: int = field(default=0, init=False)

    def returns(self, edits: Mapping[Selector, Any]) -> Tensor:
        """Play every episode with the policy edited; the return of each, ``[episode]``."""
        kind = InteractionType[self.how.exploration.upper()]
        with torch.no_grad(), set_interaction_type(kind), self.model.edited(edits):
            return torch.cat([self._played(seed) for seed in self.seeds])[: self.how.episodes]

    def _played(self, seed: int) -> Tensor:
        """Play one episode in each of the environment's lanes."""
        total = torch.zeros(self.env.batch_size.numel(), dtype=torch.float64)
        alive = torch.ones_like(total, dtype=torch.bool)
        with self.how.randomness(seed):
            self.env.set_seed(seed)
            td = self.env.reset()
            for _ in range(self.how.max_steps):
                done, td = self.env.step_and_maybe_reset(self._acted(td))
                total += torch.where(alive, self._each(done, self.env.reward_keys).double().sum(-1), 0.0)
                self.steps += int(alive.sum())
                alive &= ~self._each(done, self._ends).all(-1)
                if not alive.any():
                    break
        return total

    @property
    def _ends(self) -> Sequence[NestedKey]:
        """What says that an episode has ended: of the whole environment, else of every group of agents."""
        keys = [key for key in self.env.done_keys if path_of(key)[-1] == "done"]
        return ["done"] if "done" in keys else keys

    def _acted(self, td: TensorDictBase) -> TensorDictBase:
        device = self.model.device()
        # an environment without a device of its own leaves its tensors on the CPU
        if device == (self.env.device or torch.device("cpu")):
            return self.model.forward(td)
        return self.model.forward(td.to(device)).to(self.env.device or "cpu")

    def _each(self, td: TensorDictBase, keys: Sequence[NestedKey]) -> Tensor:
        """Lay what the environment gave under some keys side by side: ``[lane, value]``."""
        lanes = self.env.batch_size.numel()
        return torch.cat([td.get("next").get(key).reshape(lanes, -1) for key in keys], -1).cpu()
