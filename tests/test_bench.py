"""The table of benchmarks is what was kept, and a figure that is missed says why."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules that keep results and render them."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("_results"), importlib.import_module("_table")
    sys.path.remove(str(BENCH))


def test_the_table_is_that_of_what_is_kept(bench):
    _, table = bench
    text = (BENCH / "README.md").read_text()
    assert table.with_table(text) == text, "make bench-table"


def test_every_script_has_results_and_a_note(bench):
    results, table = bench
    names = table.scripts()
    assert len(names) >= 10
    assert [name for name in names if not results.kept(name)] == []
    assert {path.stem for path in results.RESULTS.glob("*.json")} == set(names)
    assert [name for name in names if f"**`{name}`**" not in (BENCH / "README.md").read_text()] == []


@pytest.mark.parametrize(
    ("value", "asked", "better", "missed"),
    [
        (1.05, 1.05, "less", False),
        (1.06, 1.05, "less", True),
        (5.0, 5, "more", False),
        (4.9, 5, "more", True),
        (9.0, None, "less", False),
        (float("nan"), 5, "more", True),
        (float("nan"), 5, "less", True),
    ],
)
def test_what_is_missed(bench, value, asked, better, missed):
    results, _ = bench
    assert results.Row("this", "that", value, asked, better).missed is missed


def test_a_miss_is_shown_with_its_reason_and_refused_without(bench):
    results, table = bench
    rows = {"some": [results.Row("this", "that", 2.0, 1.5, where="here"), results.Row("it", "all", 1.0, where="there")]}
    text = table.rendered(rows, {"some": [{"of": "it | all", "why": "No."}, {"of": "this | that", "why": "So it is."}]})
    assert "| `some` | this | that | 2 × | ≤ 1.5, **missed** [1] | a |" in text
    assert "| `some` | it | all | 1 × |  | b |" in text
    assert "1. So it is." in text
    assert "No." not in text
    assert text.endswith("* **a** here\n* **b** there")
    with pytest.raises(SystemExit, match=r"some: 'this' beside 'that': 2 ×, 1\.5 asked for: say why in reasons\.toml"):
        table.rendered(rows, {"some": [{"of": "another", "why": "No."}]})


def test_rows_of_peers_that_are_missing_stay(bench, tmp_path, monkeypatch, capsys):
    results, _ = bench
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    old = [results.Row("a", "captum", 3.0, 2, "more", where="then"), results.Row("a", "hooks", 1.0, where="then")]
    results.write("some", old)
    assert results.kept("some") == old
    results.keep("bench/some.py", [results.Row("a", "hooks", 1.23456), results.Row("b", "hooks", 2.0)], threads=1)
    peer, again, new = results.kept("some")
    assert peer == old[0]
    assert (again.value, new.what) == (1.235, "b")
    assert again.where == new.where == results.where(1)
    assert "of an earlier run: 1" in capsys.readouterr().out
    assert len((tmp_path / "some.json").read_text().splitlines()) == 5  # a line a row, so that changes are seen
    assert json.loads((tmp_path / "some.json").read_text())[0]["against"] == "captum"
