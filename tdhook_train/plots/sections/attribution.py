"""What the outputs rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tdhook_train.plots.charts import LineChart
from tdhook_train.plots.labels import network_name
from tdhook_train.plots.panels import Array, Line, LinePanel, Mark
from tdhook_train.plots.sections.saliency import is_image
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.source import Table, columns, read, recorded
from tdhook_train.plots.style import PALETTE

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["panels", "section"]

_TITLE = "What the outputs rest on"
_MOST_LINES = 64  # beyond, only the named features are drawn


@dataclass(frozen=True, eq=False)
class _Shares:
    """Attribution to one output of one network, averaged over the batch: ``[steps, features]``."""

    network: str
    target: str
    key: str
    steps: NDArray[np.int64]
    features: list[str]
    size: Array
    signed: Array

    @property
    def weight(self) -> Array:
        """How much each feature matters here, 1 for the first: largest size over training. ``[features]``."""
        largest = np.nan_to_num(self.size).max(0, initial=0.0)
        return largest / max(float(largest.max(initial=0.0)), 1e-300)


def panels(buffer: ArtifactBuffer) -> list[LinePanel]:
    """Return a panel per network and output: the mean size of the attribution to each input feature."""
    found = [shares for _, artifact in recorded(buffer) for shares in _all_shares(artifact)]
    colors = _colors(found)
    return [_panel(shares, colors) for shares in found]


def _all_shares(artifact: Artifact) -> Iterator[_Shares]:
    for key in columns(artifact):
        if "attr" in key[:-1] and not is_image(artifact, key):
            yield from _by_target(key, read(artifact, key))


def _by_target(key: tuple[str, ...], table: Table) -> Iterator[_Shares]:
    network, source = ".".join(key[: key.index("attr")]), key[-1]
    for target in table.labels["target"] if "target" in table.dims else [""]:
        one = table.pick("target", target)
        batch = 1 if "batch" in one.dims else ()
        size, signed = (_per_feature(one, values.mean(batch)) for values in (np.abs(one.values), one.values))
        yield _Shares(network, target, source, one.steps, _features(one, source, size.shape[1]), size, signed)


def _per_feature(table: Table, values: Array) -> Array:
    return values.reshape(len(table.steps), -1)


def _features(table: Table, source: str, count: int) -> list[str]:
    """Return the labels of the features; of an input with more than one dimension, the flat index."""
    dims = [dim for dim in table.dims if dim != "batch"]
    named = table.labels[dims[0]] if len(dims) == 1 else [str(number) for number in range(count)]
    return [f"{source} {label}" if label.isdecimal() else label for label in named]


def _colors(found: Sequence[_Shares]) -> dict[str, str]:
    """Give the features that matter most, over all outputs, a colour each; the others stay grey."""
    weights: dict[str, float] = {}
    for shares in found:
        for feature, weight in zip(shares.features, shares.weight, strict=True):
            weights[feature] = weights.get(feature, 0.0) + float(weight)
    first = sorted(weights, key=lambda feature: -weights[feature])
    return dict(zip(first, PALETTE, strict=False))


def _panel(shares: _Shares, colors: dict[str, str]) -> LinePanel:
    drawn = [
        Line(
            name=feature,
            x=shares.steps,
            y=shares.size[:, place],
            color=colors.get(feature, ""),
            weight="normal" if feature in colors else "faint",
            hover={"signed mean": shares.signed[:, place]},
        )
        for place, feature in enumerate(shares.features)
        if feature in colors or len(shares.features) <= _MOST_LINES
    ]
    order = list(colors)
    drawn.sort(key=lambda line: order.index(line.name) if line.name in colors else -1)  # grey lines lie underneath
    target = shares.target or "output"
    title = f"{target} · {network_name(shares.network)}" if shares.network else target
    return LinePanel(title, f"mean |attribution| (units of {target})", tuple(drawn))


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section:
    """Show the attribution to each input feature over training, a panel per output."""
    shown = panels(buffer)
    if not shown:
        return Section(_TITLE, missing="No attribution was recorded: no artifact of this run has a key ('attr', …).")
    caption = (
        f"Mean over the probe set of the absolute attribution to each feature, in units of the output it explains; "
        f"the {len(PALETTE)} features that matter most are named, the others grey. The absolute value hides direction: "
        "a signed mean near zero (hover) with a tall line means that the feature pushes both ways."
    )
    return Section(_TITLE, (Picture("Which input features move each output", caption, LineChart(shown, marks=marks)),))
