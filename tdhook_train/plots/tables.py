"""Tables of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.source import holding, read, read_like

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["MARGIN", "final_scores", "score_table"]

MARGIN = 0.01  # of R²: a smaller lead over the initial network is within the scatter between ticks
_SCORES = {"r2": "r2", "raw observation": "r2_observation", "initial network": "r2_initial", "null": "r2_null"}


def final_scores(buffer: ArtifactBuffer) -> pd.DataFrame:
    """Return how well each target can be read from each layer at the last measured step, beside what to compare with.

    Args:
        buffer: a run with a probe artifact.

    Returns:
        A row per layer, by its full name; columns (target, score) with the scores ``r2``, ``raw observation`` (the
        same probe on the observation), ``initial network`` (on the same layer before training) and ``null`` (what
        targets shifted in time reach at best in 95 of 100 cases). NaN where the run did not record a score.

    Raises:
        KeyMissingError: no probe was recorded.
    """
    probe = holding(buffer, "r2")
    if probe is None:
        raise KeyMissingError(f"{buffer.path} holds no probe scores: no artifact with rows has a key 'r2' over layers")
    scores = read(probe, "r2")
    layers, targets = scores.labels["layer"], scores.labels["target"]
    last = {score: read_like(probe, key, scores)[-1] for score, key in _SCORES.items()}
    parts = {(target, score): last[score][:, place] for place, target in enumerate(targets) for score in _SCORES}
    header = pd.MultiIndex.from_tuples(parts, names=["target", "score"])
    return pd.DataFrame(parts, index=pd.Index(layers, name="layer")).set_axis(header, axis=1)


def score_table(buffer: ArtifactBuffer) -> str:
    """Write the final scores as a small text table: R² of each layer and target, marked where it is no evidence.

    ``~`` stands behind a score that the same layer had before training (within 0.01), ``-`` behind one that does not
    beat the null. The last row is the probe on the raw observation.

    Args:
        buffer: a run with a probe artifact.

    Raises:
        KeyMissingError: no probe was recorded.
    """
    scores = final_scores(buffer)
    table = pd.DataFrame(index=scores.index)
    for target in scores.columns.get_level_values("target").unique():
        each = scores[target]
        known = each["r2"] <= each["initial network"] + MARGIN
        chance = each["r2"] <= each["null"]
        marks = known.map({True: " ~", False: "  "}).where(~chance, " -")
        table[target] = each["r2"].map("{:.2f}".format) + marks
    raw = {target: f"{scores[target]['raw observation'].iloc[0]:.2f}  " for target in table.columns}
    table = pd.concat([table, pd.DataFrame(raw, index=["raw observation"])])
    legend = "R² of a linear probe at the end   ~ no more than before training   - no more than chance"
    return f"{table.to_string()}\n{legend}"
