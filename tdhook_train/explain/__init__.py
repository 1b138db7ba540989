"""What attributions and the metrics of them share: a model as a function of the values at some of its sites."""

from tdhook_train.explain.attribution import Attribution
from tdhook_train.explain.compared import Compared
from tdhook_train.explain.perturbed import Perturbed
from tdhook_train.explain.problem import Found, Point, Problem

__all__ = ["Attribution", "Compared", "Found", "Perturbed", "Point", "Problem"]
