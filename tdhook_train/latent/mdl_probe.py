"""In how few bits a layer says what the classes are: how much of them it holds, and how easily that is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.class_blocks import NUMBERS, ClassBlocks, class_labels, numbered
from tdhook_train.latent.layer_probe import LayerReader
from tdhook_train.method import Parts, Seen
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.prequential import parts_of, prequential_bits
from tdhook_train.ops.targets import columns, named

__all__ = ["MdlProbe"]


@dataclass(frozen=True)
class MdlProbe(LayerReader):
    """In how few bits the classes of a target can be sent to somebody who has the layer, and learns on the way.

    The description length of a probe's labels, by the prequential (online) code: the rows are sent part by part, each
    coded by a logistic regression that is fitted, to convergence, to all parts before it; the first part uniformly. A
    score of held-out rows says how well a probe ends; this says how soon it gets there as well, so that a layer which
    holds a thing openly tells itself from one that merely can be fitted. Beside it stand the same code by the raw input
    and by the network at initialisation. Held against random labels by :class:`ControlTask`.

    Rows are sent whole trajectories at a time, in an order drawn from ``seed``, the same at every step: no row is
    predicted by its neighbours in time. For classes only: a quantity has no code length without a precision, see
    :class:`RidgeProbe` for those.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set). Its fits, exact and one
    a part, take some one and a half times as long as those of a :class:`LogisticProbe` without shifts.

    Args:
        layers: paths, patterns, module classes or predicates.
        target: as for :class:`LogisticProbe`.
        portions: percent of the rows that are sent by the end of each part, as in the paper; a part ends with the
            trajectory in which its portion is reached.
        C: weight of the summed loss against ½‖w‖²; the intercept is not penalised.
        seed: of the order of the trajectories.

    Writes:
        ``code_length`` [layer, target]: in bits, of all rows. ``compression``: the uniform code, rows × log₂ classes,
        over it: 1 where the layer says nothing (a little less, as it takes rows to learn that), more the sooner and
        the better it says it. A class that no row has shown yet is coded as Laplace's rule of succession says:
        1 / (rows so far + classes). ``_observation``, ``_initial`` of both: by the raw input and the initial network,
        NaN where their features are not finite, too many, or not known. ``classes``: how many the target has.
        ``reason``: why a NaN (see ``legend``).

    Labels: beside ``target``, ``target_classes``: the classes of each target at the first tick.

    Raises:
        TargetError: a target is no whole number or boolean, or has more than 64 classes.

    Source: Voita and Titov 2020, arXiv:2003.12298, with a logistic regression for its probe; the code: Rissanen 1984.
    """

    portions: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)
    C: float = 1.0
    seed: int = 0

    writes: ClassVar[Mapping[str, str]] = {
        **{
            key + kind: "layer target"
            for key in ("code_length", "compression")
            for kind in ("", "_observation", "_initial")
        },
        **dict.fromkeys(("classes", "reason"), "layer target"),
    }
    shown: ClassVar[tuple[str, ...]] = ("compression", "compression_observation", "compression_initial")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "coded",
            1: "the target has one class",
            3: "there is one part: one trajectory, or one that holds nearly all rows",
            4: "the activations are not finite",
            5: "the layer gives more features, for so many classes, than can be solved",
            6: "a fit did not converge",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "portions", tuple(float(portion) for portion in self.portions))
        rising = all(a < b for a, b in pairwise((0.0, *self.portions)))
        if len(self.portions) < 2 or not rising or self.portions[-1] != 100:
            raise SettingsError(f"MdlProbe needs portions in percent that rise to 100, got portions={self.portions}")
        if not 0 < self.C < float("inf"):
            raise SettingsError(f"MdlProbe needs a positive weight of the loss, got C={self.C}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers, targets and the classes of each target."""
        return super().labels(seen, model) | {"target_classes": class_labels(self._targets(seen), "MdlProbe")}

    def _targets(self, seen: Seen) -> dict[str, Tensor]:
        return columns(seen.batch, named(self.target), len(seen.batch))

    def _scores(self, parts: Parts) -> Measured:
        seen = next(iter(parts.values())).seen
        blocks = self._blocks(parts, len(seen.batch))
        y, of_targets = numbered(self._targets(seen), type(self).__name__)
        classes = torch.tensor([len(own) for own in of_targets])
        order = parts_of(self._groups(seen, len(y)), [portion / 100 for portion in self.portions], self.seed)
        bits, reason = self._bits(blocks, y, classes, order)
        baselines = self._remembered(parts, y, lambda baselines: self._bits(baselines, y, classes, order)[0])
        raw, initial = self._spread(baselines, parts)
        uniform = len(y) * classes.double().log2()
        values = {}
        for kind, length in (("", bits), ("_observation", raw), ("_initial", initial)):
            values["code_length" + kind] = length.clone()
            values["compression" + kind] = uniform / length
        values |= {"classes": classes.expand(len(blocks), -1).clone(), "reason": reason}
        return Measured(dict(values), {key: tuple(self.writes[key].split()) for key in values})

    def _bits(self, blocks: Sequence[Tensor], y: Tensor, classes: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return code lengths and why they are NaN, each ``[block, target]``."""
        found, count = ClassBlocks(blocks, y, classes), int(order.max()) + 1
        bits = torch.full(found.reason.shape, torch.nan, dtype=torch.float64)
        if count < 2:
            return bits, torch.full_like(found.reason, 3)
        for k, of_k, some in found.batches(count):
            at_once = max(1, NUMBERS // (len(some) * len(y) * k))
            for targets in of_k.split(at_once):
                each, sure = prequential_bits([blocks[i] for i in some], y[:, targets], k, order, self.C)
                place = torch.tensor(some)[:, None], targets
                bits[place] = torch.where(sure, each.sum(1), torch.nan)
                found.reason[place] = torch.where(sure, 0, 6).to(torch.int8)
        return bits, found.reason
