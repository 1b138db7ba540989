"""Write the table of ``bench/README.md`` from what the scripts kept.

python bench/_table.py
"""

from __future__ import annotations

import tomllib
from string import ascii_lowercase

from _results import RESULTS, Row, kept

README = RESULTS.parent / "README.md"
REASONS = RESULTS.parent / "reasons.toml"
BEGIN, END = "<!-- the table: make bench-table -->", "<!-- end of the table -->"


def scripts() -> list[str]:
    """Return the names of all scripts that measure."""
    return sorted(path.stem for path in RESULTS.parent.glob("[!_]*.py"))


def rendered(rows: dict[str, list[Row]], reasons: dict[str, list[dict[str, str]]]) -> str:
    """Return the table, what the letters and numbers in it say, and nothing else.

    Args:
        rows: of each script.
        reasons: of each script, what holds for rows in whose names ``of`` occurs.

    Raises:
        SystemExit: a row misses what was asked for, and nobody said why.
    """
    places: list[str] = []
    whys: list[str] = []
    lines = ["| script | what | beside | measured | asked for | on |", "|---|---|---|---|---|---|"]
    for script, found in rows.items():
        for row in found:
            asked = "" if row.asked is None else f"{'≤' if row.better == 'less' else '≥'} {row.asked:g}"
            if row.missed:
                why = _numbered(whys, _reason(script, row, reasons.get(script, [])))
                asked += f", **missed** [{why}]"
            on = ascii_lowercase[_numbered(places, row.where) - 1]
            measured = f"{row.value:.4g} {row.unit}"
            lines.append(f"| `{script}` | {row.what} | {row.against} | {measured} | {asked} | {on} |")
    missed = "\n".join(f"{number}. {why}" for number, why in enumerate(whys, 1))
    on = "\n".join(f"* **{letter}** {place}" for letter, place in zip(ascii_lowercase, places, strict=False))
    return "\n".join([*lines, "", "Missed, because:", "", missed, "", "Measured on:", "", on])


def _numbered(known: list[str], one: str) -> int:
    if one not in known:
        known.append(one)
    return known.index(one) + 1


def _reason(script: str, row: Row, reasons: list[dict[str, str]]) -> str:
    for reason in reasons:
        if reason["of"] in f"{row.what} | {row.against}":
            return reason["why"]
    raise SystemExit(
        f"{script}: {row.what!r} beside {row.against!r}: {row.value:.4g} {row.unit}, {row.asked:g} asked for: "
        f"say why in {REASONS.name}, [[{script}]] of = ..., why = ..."
    )


def with_table(text: str) -> str:
    """Return the README with the table of what is kept now."""
    before, rest = text.split(BEGIN)
    table = rendered({script: kept(script) for script in scripts()}, tomllib.loads(REASONS.read_text()))
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
    print(README)
