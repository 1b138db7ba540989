"""Read, set and differentiate inside any torch model: paths, sites and :class:`HookedModel`."""

from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.paths import Selection, Site
from tdhook_train.hooks.run import Run
from tdhook_train.hooks.several import Proxies
from tdhook_train.hooks.tap import Proxy

__all__ = ["HookedModel", "Proxies", "Proxy", "Run", "Selection", "Site"]
