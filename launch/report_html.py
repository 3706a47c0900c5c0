"""The HTML of a report: page frame, style sheet, tables, figures. No scripts, nothing external."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from launch.report_inputs import is_number

_STYLE = """
:root { --ink: #1d2329; --soft: #515b66; --line: #d5dbe1; --band: #f4f6f8; --accent: #0060a0; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 2.2rem 1.5rem 4rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; padding-top: .9rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
a { color: var(--accent); }
nav { color: var(--soft); font-size: .92rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--band); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.lead { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .7rem;
  margin: 1.6rem 0 0; padding: 0; list-style: none; }
.tiles li { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .7rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .82rem; line-height: 1.3; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .32rem 1.1rem .32rem 0;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
.num { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .3rem; max-width: 46rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.pair figure { margin: .4rem 0; }
.missing { border-left: 4px solid #8a939c; background: var(--band); padding: .55rem .9rem; }
.sentence { background: var(--band); padding: .7rem .9rem; border-radius: 6px; max-width: none;
  line-height: 2; }
.sentence span { display: inline-block; line-height: 1.5; border: 1px solid var(--line);
  background: #fff; border-radius: 4px;
  padding: .1rem .35rem; margin-right: .2rem; white-space: pre; }
.sentence sub { color: var(--soft); margin-left: .25rem; }
@media (max-width: 40rem) {
  figure { overflow-x: auto; }
  figure img { width: 42rem; max-width: none; }
  .pair figure img { width: 100%; }
}
@media print {
  @page { margin: 15mm; }
  .pair { grid-template-columns: 1fr 1fr; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  figure, table, .tiles { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""

Cell = str | float | int | None


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole document; each section is (anchor, heading, inner HTML). Headings are escaped."""
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections[1:])
    body = [sections[0][2]]
    body += [
        f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{inner}\n</section>'
        for anchor, name, inner in sections[1:]
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(subtitle)}</p>\n'
        f"<nav>{links}</nav>\n</header>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Text made safe for HTML, in content and in attributes."""
    return html.escape(str(text), quote=True)


def paragraph(text: str) -> str:
    """A paragraph; `code` in backticks."""
    parts = escape(text).split("`")
    marked = "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
    return f"<p>{marked}</p>"


def missing(what: str, why: str, remedy: str) -> str:
    """One sentence about an input that is not there, why, and the command that makes it."""
    text = f"{what} {why} {remedy}".replace("  ", " ")
    return paragraph(text).replace("<p>", '<p class="missing">', 1)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "", digits: int = 4
) -> str:
    """A table: the first column heads its row, columns of numbers are set to the right."""
    is_numeric = [_is_numeric([row[column] for row in rows]) for column in range(len(headers))]
    kinds = [' class="num"' if numeric else "" for numeric in is_numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(headers, kinds, strict=True)
    )
    body = ""
    for row in rows:
        first, *rest = (number(cell, digits) for cell in row)
        tail = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body += f'<tr><th scope="row"{kinds[0]}>{first}</th>{tail}</tr>\n'
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _is_numeric(column: Sequence[Cell]) -> bool:
    """Whether most cells that say anything are numbers."""
    said = [_is_figure(cell) for cell in column if cell not in ("", "–", None)]
    return 2 * sum(said) > len(said)


def _is_figure(cell: Cell) -> bool:
    """Whether a cell is a number, or text that is one with a unit sign."""
    if isinstance(cell, str):
        return re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?[\s\u00a0]*[%×]?", cell) is not None
    return is_number(cell)


def number(cell: Cell, digits: int = 4) -> str:
    """A cell as escaped text: `digits` significant digits, thousands separated, a dash for none."""
    if cell is None or (isinstance(cell, float) and not is_number(cell)):
        return "–" if cell is None or cell != cell else "∞"
    if isinstance(cell, str):
        return escape(cell)
    if isinstance(cell, int) or abs(cell) >= 10 ** (digits - 1):
        return f"{cell:,.0f}"
    if cell and abs(cell) < 1e-4:
        return f"{cell:.{digits - 1}e}"
    return f"{cell:#.{digits}g}" if cell else "0"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None or not is_number(value) else f"{100 * value:.{digits}f}\u00a0%"


def figure(image: str, caption: str) -> str:
    """An image with a caption."""
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Key figures: (value, what it is)."""
    cells = "".join(f"<li><b>{escape(v)}</b><span>{escape(w)}</span></li>" for v, w in items)
    return f'<ul class="tiles">{cells}</ul>' if items else ""
