"""The report stands alone, says what is missing, and survives odd runs."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import synthetic_run as runs
import torch
from matplotlib.image import imread

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots import heat_map, write_report
from tdhook_train.plots.sections import probe

NAN = float("nan")


class Page(HTMLParser):
    """What a page loads, says and leaves open."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.texts, self.scripts = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.loads += [(tag, value) for name, value in attrs if name in ("src", "href", "data") and value[:1] != "#"]
        self.scripts += tag == "script"
        if tag not in ("meta", "input", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_parses_and_loads_nothing(report):
    page = read(report)
    assert page.open == []
    assert page.loads == []
    source = report.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)\s*=", source)
    assert "@import" not in source[: source.index("<script>")]
    assert source.count('<div class="plot"') >= 10


def test_no_button_sends_a_figure_to_a_server(report):
    source = report.read_text(encoding="utf-8")
    assert source.count('"modeBarButtons": [["toImage", "resetScale2d"]]') == source.count("settings.config)") == 1
    assert '"plotlyServerURL": "http' not in source


def test_plotly_is_inlined_once(report):
    source = report.read_text(encoding="utf-8")
    assert len(re.findall(r"\* plotly\.js v\d", source)) == 1


def test_the_header_says_where_and_how_long(report, run):
    text = read(report).text
    assert str(run.path) in text
    assert "0 to 700" in text
    assert "ticks 6 " in text
    assert '"folds": 5' in text


def test_every_section_of_a_full_run_has_pictures(report):
    text = read(report).text
    for title in ("What the agent earned", "What each layer knows", "What the outputs rest on", "What observing cost"):
        assert title in text
    for target in runs.TARGETS:
        assert f"How well “{target}” can be read" in text
    assert "recorded:" not in text


def test_the_step_axis_of_every_figure_has_both_scales_with_step_0(run):
    figure = heat_map(probe.panels(run, "action"), unit="R²")
    scales = figure.layout.meta
    assert scales["log"]["xaxis.type"] == "log"
    assert scales["linear"]["xaxis2.type"] == "linear"
    assert scales["log"]["xaxis2.ticktext"][0] == "0"
    assert figure.layout.xaxis.type == "log"


def test_marks_stand_on_every_axis(run, report):
    assert "lr drop" in report.read_text(encoding="utf-8")
    figure = heat_map(probe.panels(run, "action"), unit="R²", marks=[probe_mark()])
    assert {shape.x0 for shape in figure.layout.shapes} == {51.0}
    assert {shape.xref for shape in figure.layout.shapes} == {"x", "x2"}


def probe_mark():
    from tdhook_train.plots import Mark

    return Mark(50, "lr drop")


def test_the_picture_has_its_size_and_is_not_blank(report):
    picture = imread(report.with_name("report.png"))
    assert picture.shape[:2] == (1000, 1600)
    parts = [picture[:400], picture[400:, :800], picture[400:, 1050:]]
    assert all(part.std() > 0.05 for part in parts)


def test_a_section_without_its_artifact_is_left_out_with_a_sentence(empty, tmp_path):
    empty.declare("health", dims={"dead": ("layer",)}, coords={"layer": ["0", "1"]})
    empty.append("health", {"dead": torch.zeros(2)}, step=0)
    empty.append("undeclared", {"r2": torch.zeros(2, 1)}, step=0)
    text = read(write_report(empty, tmp_path)).text
    for missing in ("No probe was recorded", "No attribution was recorded", "No patching was recorded"):
        assert missing in text
    assert "No training curve" in text
    assert "can be read from each layer" not in text


def test_without_a_probe_the_picture_is_filled_by_what_there_is(empty, tmp_path):
    empty.declare("health", dims={"dead": ("layer",)}, coords={"layer": ["0", "1"]})
    for step in (0, 10):
        empty.append("health", {"dead": torch.full((2,), 0.5)}, step=step)
    write_report(empty, tmp_path)
    picture = imread(tmp_path / "report.png")
    assert all(part.std() > 0.01 for part in (picture[200:850, 150:800], picture[200:850, 800:1400]))


def test_a_run_without_rows_is_refused_before_anything_is_written(empty, tmp_path):
    empty.declare("probe", dims={"r2": ("layer", "target")}, coords={})
    with pytest.raises(KeyMissingError, match="holds no row to report on"):
        write_report(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_are_escaped(empty, tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    scores(empty, torch.full((1, 1), 0.5), [evil], [evil])
    source = write_report(empty, tmp_path, title=evil, facts={evil: evil}).read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert Page(source).open == []


def test_labels_are_shown_as_they_are_by_both_libraries(empty, tmp_path):
    labels = ["<b>bold</b>", "$\\unknown{$"]
    scores(empty, torch.full((2, 1), 0.5), labels, ["$\\frac$ velocity"])
    figure = heat_map(probe.panels(empty, "$\\frac$ velocity"), unit="<i>")
    assert figure.layout.yaxis.ticktext[-2:] == ("&lt;b&gt;bold&lt;/b&gt;", "&#36;\\unknown{&#36;")
    assert figure.layout.coloraxis.colorbar.title.text == "&lt;i&gt;"
    write_report(empty, tmp_path, title="$\\alpha{$")
    assert (tmp_path / "report.png").exists()


def scores(buffer, r2, layers, targets, steps=(0,)):
    keys = ("r2", "r2_null", "r2_initial", "r2_observation", "r2_pooled", "p")
    coords = {"layer": layers, "target": targets}
    buffer.declare("probe", dims=dict.fromkeys(keys, ("layer", "target")), coords=coords)
    for step in steps:
        buffer.append("probe", {key: r2.double() * (key != "r2_null") for key in keys}, step=step)


def test_a_single_tick_of_a_bare_model(empty, tmp_path):
    scores(empty, torch.full((2, 1), 0.5), ["0", "2"], ["label"], steps=[700])
    assert "label" in read(write_report(empty, tmp_path)).text
    assert imread(tmp_path / "report.png").shape[:2] == (1000, 1600)


def test_numbers_that_are_all_missing(empty, tmp_path):
    runs.declare(empty, *runs.layers(1))
    generator = torch.Generator().manual_seed(0)
    names = runs.layers(1)[0]
    rows = {
        "probe": runs.probe(names, 0.5, generator),
        "patching": runs.patching(names, 0.5, generator),
        "health": runs.health(names, 0.5, generator),
        "attribution": runs.attribution(0.5),
    }
    for step in (0, 5):
        for name, row in rows.items():
            empty.append(name, missing(row), step=step, cost=NAN)
    training = runs.training_curve(3).assign(**{"return": NAN})
    path = write_report(empty, tmp_path, training=training)
    assert "no episode ended" in read(path).text


def missing(row):
    return {
        key: missing(value) if isinstance(value, dict) else value * NAN if value.is_floating_point() else value
        for key, value in row.items()
    }


def test_hundreds_of_layers_have_few_tick_labels(empty, tmp_path):
    layers = [f"blocks.{number}.mlp" for number in range(300)]
    scores(empty, torch.rand(300, 1), layers, ["token"], steps=[0, 10, 20])
    panels = probe.panels(empty, "token")
    figure = heat_map(panels, unit="R²")
    assert len(panels[0].rows) == 300
    assert len(figure.layout.yaxis.ticktext) <= 33
    assert figure.layout.height < 900
    write_report(empty, tmp_path)


def test_nothing_global_of_matplotlib_changes(written):
    _, before, after = written
    assert after == before


IMPORTS = """
import sys
before = set(sys.modules)
sys.modules["plotly"] = None
try:
    import tdhook_train.plots
except ImportError as error:
    print(type(error).__name__, error)
for name in set(sys.modules) - before:
    if name.startswith(("tdhook_train.plots", "plotly")):
        del sys.modules[name]
import tdhook_train.plots
print("matplotlib.pyplot" in sys.modules)
"""


def test_a_missing_package_comes_with_its_install_line_and_pyplot_is_never_loaded():
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    refused, pyplot = done.stdout.splitlines()
    assert refused.startswith("MissingPackageError")
    assert 'pip install "tdhook-train[plots]"' in refused
    assert pyplot == "False"


def test_observers_share_is_of_the_wall_time_so_far(run):
    from tdhook_train.plots.sections import cost

    training = runs.training_curve(5)
    figure = cost.section(run, training, ()).pictures[-1].figure
    expected = 100 * training["observer_seconds"] / training["seconds"]
    np.testing.assert_allclose(figure.data[0].y, expected)


def test_cost_stacks_the_methods_and_a_method_that_was_not_due_took_no_time(empty):
    from tdhook_train.plots.sections import cost

    for step in (0, 1, 2):
        empty.append("a", {"x": torch.zeros(1)}, step=step, cost=0.01)
    empty.append("b", {"x": torch.zeros(1)}, step=1, cost=0.02)
    figure = cost.section(empty, None, ()).pictures[0].figure
    assert [list(trace.y) for trace in figure.data] == [[10.0] * 3, [0.0, 20.0, 0.0]]
    assert {trace.stackgroup for trace in figure.data} == {"all"}
