"""One self-contained HTML page of tables, plots and facts: it opens offline and asks nothing of the network.

A page is a title and sections; a section is a list of blocks. All text is escaped, images are embedded as PNG
data, and a content security policy forbids the browser to load anything else.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import pandas as pd

from genossm.atomic import atomic_write_text


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; parts between backquotes are set as code."""

    text: str

    def html(self) -> str:
        """The block as HTML."""
        return f"<p>{_inline(self.text)}</p>"


@dataclass(frozen=True, slots=True)
class Figures:
    """Large numbers side by side: (value, label, note) each."""

    figures: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        """The block as HTML."""
        cards = (
            f'<div class="card"><div class="value">{escape(value)}</div>'
            f'<div class="label">{_inline(label)}</div>'
            f'<div class="note">{_inline(note)}</div></div>'
            for value, label, note in self.figures
        )
        return f'<div class="cards">{"".join(cards)}</div>'


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A data frame; `formats` gives a format such as ".3f" by column, missing values are shown as a dash."""

    table: pd.DataFrame
    caption: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    emphasised_rows: Sequence[int] = ()

    def html(self) -> str:
        """The block as HTML."""
        numeric = {name: pd.api.types.is_numeric_dtype(self.table[name]) for name in self.table.columns}
        classes = {name: ' class="number"' if numeric[name] else "" for name in numeric}
        head = "".join(
            f"<th{classes[name]}>{escape(str(self.headings.get(str(name), name)))}</th>" for name in numeric
        )
        body = []
        for position, (_, row) in enumerate(self.table.iterrows()):
            cells = "".join(f"<td{classes[name]}>{self._cell(str(name), row[name])}</td>" for name in numeric)
            strong = ' class="strong"' if position in self.emphasised_rows else ""
            body.append(f"<tr{strong}>{cells}</tr>")
        caption = f"<figcaption>{_inline(self.caption)}</figcaption>" if self.caption else ""
        return (
            f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{caption}</figure>"
        )

    def _cell(self, name: str, value: object) -> str:
        if pd.isna(value):
            return '<span class="none">&ndash;</span>'
        return escape(format(value, self.formats.get(name, "")))


@dataclass(frozen=True, slots=True)
class Image:
    """A PNG with a caption; `description` says in words what it shows, for those who cannot see it."""

    png: bytes
    description: str
    caption: str = ""

    def html(self) -> str:
        """The block as HTML."""
        data = base64.b64encode(self.png).decode("ascii")
        caption = f"<figcaption>{_inline(self.caption)}</figcaption>" if self.caption else ""
        image = f'<img alt="{escape(self.description)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}{caption}</figure>"


@dataclass(frozen=True, slots=True)
class Row:
    """Blocks side by side, one below the other on a narrow screen."""

    blocks: Sequence[Text | Table | Image]

    def html(self) -> str:
        """The block as HTML."""
        return f'<div class="row">{"".join(block.html() for block in self.blocks)}</div>'


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, one pair a line."""

    facts: Mapping[str, str]

    def html(self) -> str:
        """The block as HTML."""
        pairs = (f"<dt>{escape(name)}</dt><dd>{_inline(value)}</dd>" for name, value in self.facts.items())
        return f"<dl>{''.join(pairs)}</dl>"


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines to copy into a shell."""

    lines: Sequence[str]

    def html(self) -> str:
        """The block as HTML."""
        return f"<pre>{escape(chr(10).join(self.lines))}</pre>"


Block = Text | Figures | Table | Image | Row | Facts | Commands


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    footer: str = "",
) -> None:
    """Write the page to `path`, complete or not at all.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    atomic_write_text(path, report_html(title=title, sections=sections, subtitle=subtitle, footer=footer))


def report_html(*, title: str, sections: Sequence[Section], subtitle: str = "", footer: str = "") -> str:
    """The page as one HTML text."""
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    parts = "".join(
        f'<section id="s{i}"><h2>{escape(section.title)}</h2>'
        f"{''.join(block.html() for block in section.blocks)}</section>"
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><header><div class="inner"><h1>{escape(title)}</h1><p>{_inline(subtitle)}</p>'
        f"<nav>{links}</nav></div></header>\n<main>{parts}</main>\n"
        f"<footer>{_inline(footer)}</footer></body></html>\n"
    )


def _inline(text: str) -> str:
    """Escaped text, with parts between backquotes as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


_STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --wash: #f5f7fa; --accent: #2563a8; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif; }
header { background: var(--wash); border-bottom: 1px solid var(--line); border-top: 4px solid var(--accent); }
.inner, main, footer { max-width: 1060px; margin: 0 auto; padding: 0 28px; }
header .inner { padding-top: 36px; padding-bottom: 18px; }
h1 { font-size: 31px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--soft); max-width: 46em; }
nav { margin-top: 18px; display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14.5px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding-top: 34px; }
h2 { font-size: 21px; margin: 0 0 10px; letter-spacing: -0.005em; }
p { margin: 0 0 14px; max-width: 48em; }
code { font: 0.88em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--wash); border-radius: 4px; padding: 1px 5px; }
pre { font: 14px/1.65 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--wash); border: 1px solid var(--line);
  border-radius: 8px; padding: 14px 18px; overflow-x: auto; margin: 0 0 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px;
  margin: 4px 0 20px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px 14px; }
.value { font-size: 32px; font-weight: 650; line-height: 1.15; color: var(--accent);
  font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.label { font-weight: 600; margin-top: 4px; }
.note { color: var(--soft); font-size: 14px; line-height: 1.45; margin-top: 2px; }
figure { margin: 6px 0 22px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 14.5px; line-height: 1.5; margin-top: 8px; max-width: 54em; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 28px;
  align-items: start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; min-width: 60%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13.5px; color: var(--soft);
  border-bottom: 2px solid var(--line); padding: 6px 18px 6px 0; vertical-align: bottom;
  white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: 7px 18px 7px 0; }
th.number, td.number { text-align: right; }
tr.strong td { font-weight: 650; border-bottom: 0; }
.none { color: #b6bfc9; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 22px; margin: 0 0 16px;
  font-size: 15px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13.5px; padding-top: 26px; padding-bottom: 40px; margin-top: 36px;
  border-top: 1px solid var(--line); }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
