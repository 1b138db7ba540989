"""Pictures of training runs, by shape of data, and the report that gathers them.

plotly and matplotlib are imported here and nowhere else in the library.
"""

from tdhook_train.errors import MissingPackageError

try:
    import matplotlib as _matplotlib  # noqa: F401
    import pandas as _pandas  # noqa: F401
    import plotly as _plotly  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f'tdhook_train.plots needs {error.name}, which is not installed: pip install "tdhook-train[plots]"'
    ) from error

from tdhook_train.plots.by_key import heat, lines
from tdhook_train.plots.heat_map import heat_map
from tdhook_train.plots.line_chart import line_chart
from tdhook_train.plots.panels import HeatPanel, Line, LinePanel, Mark
from tdhook_train.plots.report import write_report
from tdhook_train.plots.tables import final_scores, score_table

__all__ = [
    "HeatPanel",
    "Line",
    "LinePanel",
    "Mark",
    "final_scores",
    "heat",
    "heat_map",
    "line_chart",
    "lines",
    "score_table",
    "write_report",
]
