"""Where in an image the outputs look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tdhook_train.plots.charts import ImageChart
from tdhook_train.plots.labels import network_name
from tdhook_train.plots.panels import Array, ImagePanel
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.source import Key, columns, recorded

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["Maps", "is_image", "maps", "section"]

_TITLE = "Where the outputs look"
_TICKS = 4
_TARGETS = 4  # of one network


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of one output of one network: the first tick, some between, the last, and the image they lie over."""

    title: str
    target: str
    panels: tuple[ImagePanel, ...]


def is_image(artifact: Artifact, key: Key) -> bool:
    """Whether a column holds attributions to images."""
    return tuple(dim.rpartition(".")[2] for dim in artifact.dims(key)[-2:]) == ("height", "width")


def maps(buffer: ArtifactBuffer) -> list[Maps]:
    """Return the maps of every network and output that has any."""
    return [
        found
        for name, artifact in recorded(buffer)
        for key in columns(artifact)
        if "attr" in key[:-1] and is_image(artifact, key)
        for found in _of_key(buffer, name, key)
    ]


def _of_key(buffer: ArtifactBuffer, name: str, key: tuple[str, ...]) -> Iterator[Maps]:
    artifact, place = buffer[name], key.index("attr")
    steps = np.unique(np.asarray(artifact.steps))
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, _TICKS).round().astype(int))]
    dims = [dim.rpartition(".")[2] for dim in artifact.dims(key)]
    # one tick at a time: the maps of a whole run may not fit into memory
    ticks = {int(step): _size(artifact.at(int(step))[key].double().numpy(), dims) for step in chosen}
    mean = _mean_image(buffer, name, key[place + 1 :], int(artifact.at(int(chosen[-1]))["meta", "data"]))
    own = next((dim for dim in artifact.dims(key) if dim.rpartition(".")[2] == "target"), "")
    targets = [str(label) for label in artifact.coords.get(own, [])] or [""]
    network = ".".join(key[:place])
    for number, target in enumerate(targets[:_TARGETS]):
        panels = [ImagePanel(f"step {step:,}", tick[number]) for step, tick in ticks.items()]
        if mean is not None:
            panels.insert(0, ImagePanel("mean image", mean, is_map=False))
        shown = target or "output"
        title = f"{name}: {shown} · {network_name(network)}" if network else f"{name}: {shown}"
        yield Maps(title, shown, tuple(panels))


def _size(values: Array, dims: list[str]) -> Array:
    """Average the absolute attribution over rows and channels: ``[target, height, width]``."""
    over = tuple(axis for axis, dim in enumerate(dims) if dim in ("batch", "channel"))
    found = np.abs(values).mean(over)
    return found if "target" in dims else found[None]


def _mean_image(buffer: ArtifactBuffer, name: str, key: tuple[str, ...], data: int) -> Array | None:
    """Average the images of the probe set that a row was measured on; None where none is kept.

    Of a probe set that was refreshed, later versions lie under their content hash as well.
    """
    folder = Path(buffer.path) / "probe_sets"
    for stem in filter(None, (name.partition(".")[2], "probe_set")):
        version = folder / f"{stem}.{data % 2**64:016x}.pt"
        path = version if version.is_file() else folder / f"{stem}.pt"
        if path.is_file():
            found = torch.load(path, weights_only=True)["td"]
            for part in key:
                found = found.get(part, {})
            return found.double().mean((0, 1)).numpy() if isinstance(found, torch.Tensor) else None
    return None


def section(buffer: ArtifactBuffer) -> Section | None:
    """Show, for each output, where in the image it looks and how that came about; None where nothing is an image."""
    shown = maps(buffer)
    if not shown:
        return None
    caption = (
        "Mean over the rows and channels of the absolute attribution to each pixel, at the first tick, the last and "
        "some between, all on the same colours; before them the mean image that the last of them was measured on, "
        "where the run keeps its probe set."
    )
    pictures = [Picture(one.title, caption, ImageChart(one.panels, unit=f"units of {one.target}")) for one in shown]
    return Section(_TITLE, tuple(pictures))
