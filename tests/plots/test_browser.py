"""The report in a real browser: `make test-browser`."""

import re
import shutil

import pytest
import synthetic_run as runs

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.plots import write_report

pytestmark = pytest.mark.browser

WHERE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MAP = ".plot .heatmaplayer image"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if WHERE is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=WHERE, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """A function that opens a page, and collects what the console says and what is asked of the network."""
    contexts = []

    def open_(path, **looks):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **looks)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda asked: page.asked.append(asked.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


def scrolled(page):
    """Scroll through the whole page until every figure is drawn."""
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
        page.wait_for_function("plot => plot.querySelector('.main-svg')", arg=plot)
    return page


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_every_figure_is_drawn_without_an_error_and_without_the_network(opened, report):
    page = scrolled(opened(report))
    assert page.locator(MAP).count() >= len(runs.TARGETS)
    assert page.locator(".plot:not(.js-plotly-plot)").count() == 0
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_hovering_over_a_cell_shows_its_layer_step_and_value(opened, report, run):
    page = opened(report)
    section = page.locator("section", has_text="What each layer knows").locator(".plot").first
    section.scroll_into_view_if_needed()
    page.wait_for_selector(MAP)
    box = section.locator(".heatmaplayer image").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] - 3)  # last step, first layer
    page.wait_for_selector(".hovertext")
    text = page.locator(".hovertext").first.text_content()
    names, _ = runs.layers(2)
    assert names[0] in text
    assert "step 700" in text
    assert f"{float(run['probe'].at(700)['r2'][0, 0]):.3f}" in text


def test_dark_and_light_differ_in_page_and_figures_also_when_it_changes(opened, report):
    page = opened(report, color_scheme="light")
    page.wait_for_selector(MAP)
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = background(page), page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => {ink} !== {light[1]!r}")
    assert background(page) != light[0]
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"() => {ink} === {light[1]!r}")
    dark = opened(report, color_scheme="dark")
    dark.wait_for_selector(MAP)
    assert (background(dark), dark.evaluate(ink)) != light
    assert page.said + dark.said == []


def test_a_narrow_window_has_its_panels_in_one_column_and_no_horizontal_scroll(opened, report):
    page = opened(report)
    page.wait_for_selector(MAP)
    page.set_viewport_size({"width": 400, "height": 800})
    page = scrolled(page)
    assert fits(page)
    left = "[...document.querySelectorAll('.plot')].map(p => new Set([...p.querySelectorAll('.heatmaplayer image')]"
    left += ".map(i => Math.round(i.getBoundingClientRect().x))).size)"
    page.wait_for_function(f"() => Math.max(...{left}) <= 1")
    assert page.said == []


def test_without_javascript_the_tables_are_there(opened, report, run):
    page = opened(report, java_script_enabled=False)
    assert page.locator(".plot").first.is_hidden()
    value = f"{float(run['probe'].at(700)['r2'][0, 0]):.3g}"
    row = page.locator("tr", has_text=runs.layers(2)[0][0]).first
    assert row.is_visible()
    assert re.search(rf"\b{re.escape(value)}\b", row.inner_text())
    assert page.locator("noscript p").is_visible()
    assert fits(page)


def test_print_draws_every_figure_light_and_on_the_page(opened, report):
    page = opened(report, color_scheme="dark")
    page.wait_for_selector(MAP)
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function("() => document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")
    assert background(page) == "rgb(255, 255, 255)"
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert max(widths) <= 700
    assert not page.locator("nav").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert page.said == []


def test_the_linear_axis_is_one_click_away(opened, report):
    page = opened(report)
    page.wait_for_selector(MAP)
    kind = "document.querySelector('.plot .heatmaplayer image').closest('.plot')._fullLayout.xaxis.type"
    assert page.evaluate(kind) == "log"
    page.get_by_text("linear", exact=True).click()
    page.wait_for_function(f"() => {kind} === 'linear'")
    assert page.said == []


def test_names_with_markup_and_templates_are_shown_and_do_nothing(opened, tmp_path):
    names = [f"{evil}{number}" for number, evil in enumerate(runs.EVIL)]
    with ArtifactBuffer(tmp_path / "run") as buffer:
        runs.fill_with(buffer, names)
        page = opened(write_report({names[0]: buffer}, tmp_path / "out", title=names[1], facts={names[2]: names[3]}))
    scrolled(page)
    assert page.said == []
    assert page.evaluate("window.evil === undefined")
    assert page.locator("h1").text_content() == names[1]
    for name in names:
        assert page.locator("h3", has_text=name).count() >= 1
    page.set_viewport_size({"width": 400, "height": 800})
    assert fits(scrolled(page))
