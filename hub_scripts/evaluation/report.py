"""A report that is one HTML file: plain words, pictures and figures, readable on a phone, offline and in the dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

from hub_scripts.outputs import write_text

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1c1c1c; --quiet: #5c5c5c; --back: #ffffff; --line: #dddddd; --panel: #f6f6f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e8e8e8; --quiet: #a8a8a8; --back: #16181a; --line: #3a3d40; --panel: #202326; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
p {{ max-width: 42rem; }}
figure {{ margin: 1.2rem 0; }}
figure img {{ max-width: 100%; height: auto; border-radius: 6px; background: #fff; }}
figcaption, caption, summary {{ color: var(--quiet); font-size: .9rem; text-align: left; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
thead th {{ color: var(--quiet); font-weight: 600; }}
details {{ margin-top: 2.5rem; padding: .8rem 1rem; background: var(--panel); border-radius: 6px; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A plot in a report.

    Args:
        file (`str` or `Path`): the plot, a PNG file.
        alt (`str`): what it shows, for those who cannot see it.
        caption (`str`): a line below it.
    """

    file: str | Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A small table in a report.

    Args:
        columns (`Sequence[str]`): headings; the first column holds the rows' names.
        rows (`Sequence[Sequence[Any]]`): text or numbers, as many as columns.
        caption (`str`): a line above it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        heading (`str`): its title.
        text (`str`): plain words; an empty line begins a new paragraph.
        pictures (`Sequence[Picture]`): below the text.
        tables (`Sequence[Table]`): below the pictures.
    """

    heading: str
    text: str = ""
    pictures: Sequence[Picture] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], results: Mapping[str, Any] | None = None
) -> None:
    """Write a report as one HTML file that needs nothing else: pictures and style are inside, no script runs.

    Args:
        path (`str` or `Path`): the file; a reader sees all of it or what stood there before.
        title (`str`): of the report.
        sections (`Sequence[Section]`): its parts, in order.
        results (`Mapping[str, Any]`, *optional*): nested figures, listed at the end in a table that can be opened.

    Raises:
        ValueError: If a table has a row with more or fewer cells than columns.
    """
    body = [_section(section) for section in sections]
    if results:
        rows = [[name, value] for name, value in _flatten(results)]
        listing = _table(Table(("figure", "value"), rows))
        body.append(f"<details><summary>All figures of this run</summary>\n{listing}\n</details>")
    write_text(path, PAGE.format(title=escape(title), body="\n".join(body)))


def format_value(value: Any) -> str:
    """A value as a reader wants it: three significant digits or more, thousands grouped, n/a for what is missing."""
    if value is None or (isinstance(value, Real) and value != value):
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, Real):
        return ", ".join(map(format_value, value)) if isinstance(value, (list, tuple)) else str(value)
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.2g}"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text.strip())}</p>" for text in section.text.split("\n\n") if text.strip()]
    parts += [_picture(picture) for picture in section.pictures]
    parts += [_table(table) for table in section.tables]
    return f"<section>\n{chr(10).join(parts)}\n</section>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(Path(picture.file).read_bytes()).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">{caption}</figure>'


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"a row of the table has {len(row)} cells, expected {len(table.columns)}: {', '.join(table.columns)}."
            )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{escape(format_value(cell))}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _flatten(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested figures as pairs such as ("probe.epoch.sane.r2", 0.5)."""
    pairs = []
    for key, value in results.items():
        name = f"{prefix}{key}"
        pairs += _flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return pairs
