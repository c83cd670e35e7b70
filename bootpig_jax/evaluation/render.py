"""Reports as pages: `report.html` (stands alone), `report.json` and `report.tex`.

A report is made of tables, curves and pictures, and knows nothing of where they come from. Names
and prompts are text in the page, never markup. Needs the extra `eval`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bootpig_jax.files import write_whole
from bootpig_jax.yaml_config import ConfigModel


class Cell(ConfigModel):
    """A figure, as it is shown.

    Attributes:
        value: the figure; None leaves the cell empty.
        interval: its 95 % interval.
        best: whether it is the best of its column.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    best: bool = False


class TableRow(ConfigModel):
    """A row.

    Attributes:
        name: its title.
        cells: one for each column; text is shown as it is.
        published: whether the figures were published elsewhere, not measured here.
    """

    name: str
    cells: tuple[Cell | str, ...]
    published: bool = False


class Table(ConfigModel):
    """A table.

    Attributes:
        title: above it.
        columns: without the first, which holds the rows' names.
        rows: from top to bottom.
        note: below it.
        command: that makes its figures, if it is one.
        digits: after the decimal point.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""
    command: str = ""
    digits: int = 1


class Line(ConfigModel):
    """A line of a curve: its name and points (x, y, interval of y)."""

    name: str
    points: tuple[tuple[float, float, tuple[float, float] | None], ...]


class Curve(ConfigModel):
    """A plot of lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    command: str = ""


class Picture(ConfigModel):
    """A picture with what is written below it.

    Attributes:
        jpeg: base64 of a small JPEG.
        caption: below it.
        detail: below that, smaller.
    """

    jpeg: str
    caption: str
    detail: str = ""


class Gallery(ConfigModel):
    """Rows of pictures, each row with a title."""

    title: str
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    note: str = ""


class Report(ConfigModel):
    """A page.

    Attributes:
        title: of the page.
        summary: the first words below the title.
        tables: first.
        curves: then.
        galleries: last.
        commands: that made the figures, one for each method.
        cards: the protocol cards that differ, each with the names of what has it.
        warnings: shown at the top.
    """

    title: str
    summary: str = ""
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    cards: tuple[tuple[str, dict[str, object]], ...] = ()
    warnings: tuple[str, ...] = ()


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes `report.html`, `report.json` (without the pictures) and `report.tex`.

    Raises:
        UserError: the folder cannot be written to.
    """
    values = report.model_dump(mode="json", exclude={"galleries"})
    contents = {
        "report.json": json.dumps(values, indent=1, allow_nan=False) + "\n",
        "report.tex": render_tex(report),
        "report.html": render_html(report),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


# ---------------------------------------------------------------- HTML


def render_html(report: Report) -> str:
    """The page, with everything in it."""
    parts = []
    if report.summary:
        parts.append(f"<p class=big>{escape(report.summary)}</p>")
    parts += [f"<p class=warning>{escape(warning)}</p>" for warning in report.warnings]
    parts += [_html_table(table) for table in report.tables]
    parts += [_html_curve(curve) for curve in report.curves]
    parts += [_html_gallery(gallery) for gallery in report.galleries]
    if report.commands:
        lines = "\n".join(f"# {name}\n{command}" for name, command in report.commands)
        parts.append(f"<h2>Commands</h2><pre>{escape(lines)}</pre>")
    for names, card in report.cards:
        text = escape(json.dumps(card, indent=1, ensure_ascii=False))
        parts.append(f"<h2>Protocol card</h2><p>{escape(names)}</p><pre>{text}</pre>")
    return _PAGE.format(style=_STYLE, title=escape(report.title), body="\n".join(parts))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *table.columns))
    rows = []
    for row in table.rows:
        cells = [f"<td>{escape(row.name)}</td>"]
        for cell in row.cells:
            cells.append(f"<td>{_html_cell(cell, table.digits)}</td>")
        kind = " class=published" if row.published else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    body = f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    command = f"<pre>{escape(table.command)}</pre>" if table.command else ""
    return f"<h2>{escape(table.title)}</h2>{body}{note}{command}"


def _html_cell(cell: Cell | str, digits: int) -> str:
    if isinstance(cell, str):
        return escape(cell)
    if cell.value is None:
        return "–"
    text = f"{cell.value:.{digits}f}"
    text = f"<b>{text}</b>" if cell.best else text
    if cell.interval is not None:
        low, high = cell.interval
        text += f" <small>{low:.{digits}f} to {high:.{digits}f}</small>"
    return text


def _html_gallery(gallery: Gallery) -> str:
    rows = []
    for title, pictures in gallery.rows:
        figures = "".join(
            f'<figure><img alt="" src="data:image/jpeg;base64,{picture.jpeg}">'
            f"<figcaption>{escape(picture.caption)}<small>{escape(picture.detail)}</small>"
            "</figcaption></figure>"
            for picture in pictures
        )
        rows.append(f"<h3>{escape(title)}</h3><div class=sheet>{figures}</div>")
    note = f"<p class=note>{escape(gallery.note)}</p>" if gallery.note else ""
    return f"<h2>{escape(gallery.title)}</h2>{note}" + "\n".join(rows)


def _html_curve(curve: Curve) -> str:
    figure = plot_curves([curve])
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.title}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    # Without the declaration that only a file of its own may have.
    drawing = svg.getvalue()[svg.getvalue().index("<svg") :]
    note = f"<p class=note>{escape(curve.note)}</p>" if curve.note else ""
    command = f"<pre>{escape(curve.command)}</pre>" if curve.command else ""
    return f"<h2>{escape(curve.title)}</h2>{drawing}{note}{command}"


def plot_curves(curves: Sequence[Curve]) -> Figure:
    """Plots, side by side; lines of the same number have the same colour in all of them."""
    size = (5.6 * len(curves), 3.4)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        for place, line in enumerate(curve.lines):
            x, y, spans = (np.array(each) for each in zip(*_with_spans(line), strict=True))
            # Set apart a little, so that the intervals do not hide each other.
            shift = 0.05 * (place - (len(curve.lines) - 1) / 2)
            below_and_above = np.abs(spans - y[:, None]).T
            panel.errorbar(
                x + shift, y, below_and_above, marker="o", ms=4, capsize=2, label=line.name
            )
        ticks = sorted({x for line in curve.lines for x, _, _ in line.points})
        panel.set(xlabel=curve.x_label, ylabel=curve.y_label, xticks=ticks)
        panel.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            panel.set_title(curve.title)
    panels[0].legend(frameon=False)
    return figure


def _with_spans(line: Line) -> list[tuple[float, float, tuple[float, float]]]:
    return [(x, y, span or (y, y)) for x, y, span in line.points]


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 77rem;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.big { font-size: 1.2rem; }
.warning { background: #fff3d6; padding: .4rem .8rem; }
.note { color: #666; max-width: 48rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem 1.5rem .2rem 0; vertical-align: top; }
td:nth-child(n+2) { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #777; font-weight: normal; }
tr.published td { color: #888; }
.sheet { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: min-content; max-width: 100%; }
img { max-width: min(75rem, 94vw); vertical-align: bottom; background: #eee; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
small { color: #999; }
figcaption small { display: block; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


# ---------------------------------------------------------------- Markdown


def render_markdown(table: Table) -> str:
    """A table in Markdown, without its title and note."""
    lines = [("", *table.columns), ("---",) * (1 + len(table.columns))]
    lines += [
        (row.name, *(_markdown_cell(c, table.digits) for c in row.cells)) for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell | str, digits: int) -> str:
    if isinstance(cell, str):
        return cell
    return "–" if cell.value is None else f"{cell.value:.{digits}f}"


# ---------------------------------------------------------------- LaTeX


def render_tex(report: Report) -> str:
    """The tables, to be put into a document that loads booktabs; the commands as comments."""
    commands = (f"{name}\n{command}" for name, command in report.commands)
    # Line by line: a name must not end the comment.
    comments = [f"% {line}\n" for text in commands for line in text.splitlines()]
    return "\n".join(_tex_table(table) for table in report.tables) + "".join(comments)


def _tex_table(table: Table) -> str:
    columns = "l" + "r" * len(table.columns)
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(_tex(name) for name in ("", *table.columns)) + r" \\",
        "\\midrule",
    ]
    before = False
    for row in table.rows:
        if row.published and not before:
            lines.append("\\midrule")
        before = row.published
        cells = [_tex(row.name), *(_tex_cell(cell, table.digits) for cell in row.cells)]
        lines.append(" & ".join(cells) + r" \\")
    note = f" {_tex(table.note)}" if table.note else ""
    lines += [
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{_tex(table.title)}.{note}}}",
        "\\end{table}",
        "",
    ]
    return "\n".join(lines)


def _tex_cell(cell: Cell | str, digits: int) -> str:
    if isinstance(cell, str):
        return _tex(cell)
    if cell.value is None:
        return "--"
    text = f"{cell.value:.{digits}f}"
    text = f"\\textbf{{{text}}}" if cell.best else text
    if cell.interval is not None:
        low, high = cell.interval
        text += f" {{\\scriptsize {low:.{digits}f} to {high:.{digits}f}}}"
    return text


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)
