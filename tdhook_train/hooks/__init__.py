"""Read, set and differentiate inside any torch model: paths, sites and :class:`HookedModel`."""

from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.paths import Site, select
from tdhook_train.hooks.run import Run
from tdhook_train.hooks.tap import Proxy

__all__ = ["HookedModel", "Proxy", "Run", "Site", "select"]
