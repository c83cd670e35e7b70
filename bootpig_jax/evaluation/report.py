"""Puts results side by side: `report.html` (stands alone), `report.json` and `report.tex`.

`Report` is made of tables, curves and pictures and knows nothing of where they come from;
`describe_scores` makes one of what `score` has written. Names and prompts are text in the page,
never markup.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from bootpig_jax.data.pictures import PictureError, open_picture, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, Subject
from bootpig_jax.evaluation.files import read_source, write_whole
from bootpig_jax.evaluation.protocol import Card, differences
from bootpig_jax.evaluation.published import MEASURES, REAL_PICTURES, TABLE_1, TABLE_2
from bootpig_jax.evaluation.score import REAL, MethodScores, PictureScore, Summary
from bootpig_jax.yaml_config import ConfigModel

THUMBNAIL = 144  # pixels
EXTREMES = 6  # best and worst pictures that are shown
SHOWN_PROMPTS = 6  # of each subject
SHOWN_SUBJECTS = 12

# Measures that are shares or cosines are shown times 100.
_SCALE = 100
_COLUMNS = ("CLIP-T", "CLIP-I", "DINO", "subject@16", "scene@10")


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


# ---------------------------------------------------------------- from scores


def check_cards(scores: Sequence[MethodScores], *, force: bool = False) -> None:
    """Refuses results that were not measured in the same way.

    Raises:
        UserError: two cards differ and `force` is not set.
    """
    for other in scores[1:]:
        found = differences(scores[0].card, other.card)
        if found and not force:
            raise UserError(
                f"--scores: {scores[0].method} and {other.method} have different protocol cards "
                f"({', '.join(found)}); score them alike, or take --force"
            )


def describe_scores(
    scores: Sequence[MethodScores],
    dataset: Dataset | None = None,
    *,
    title: str = "",
    command: str = "",
    force: bool = False,
) -> Report:
    """Makes a report of what `score` has written.

    Args:
        scores: one for each method, in the order of the rows.
        dataset: its real pictures and prompts are shown beside the generated pictures; with None
            only the best and the worst are shown.
        title: of the page.
        command: that makes the report.
        force: whether results with different protocol cards may share a table.

    Raises:
        UserError: there are none, two have the same name, or their cards differ.
    """
    if not scores:
        raise UserError("--scores: name at least one file")
    names = [result.method for result in scores]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--scores: two results are of {name!r}; give one another name in its about.json "
                "and score it again"
            )
    check_cards(scores, force=force)
    first = scores[0].card
    measures = _measures(scores)
    warnings = [
        f"{other.method} was scored by another protocol than {scores[0].method}: "
        + ", ".join(differences(first, other.card))
        for other in scores[1:]
        if differences(first, other.card)
    ]
    for result in scores:
        if result.left_out:
            warnings.append(f"{result.method}: broken pictures left out: {len(result.left_out)}")
        if result.missing:
            warnings.append(f"{result.method}: prompts without a picture: {len(result.missing)}")
        if result.near_inputs:
            warnings.append(
                f"{result.method}: {result.near_inputs} of {len(result.pictures)} pictures are "
                "nearer to an input than any two real pictures of the subject are to each other: "
                "perhaps copied"
            )
    galleries = [] if dataset is None else [_side_by_side(scores, dataset)]
    galleries += _extremes(scores, measures)
    drawn = [r for r in scores if r.folder is not None]
    return Report(
        title=title or f"Evaluation on {first.dataset}",
        summary=f"{first.subjects} subjects, {first.prompts} prompts"
        + "".join(f", {len(result.pictures):,} pictures of {result.method}" for result in drawn),
        tables=(
            _main_table(scores, measures, published=first.dataset == "dreambooth"),
            *_ablation_tables(scores),
            *_further_tables(scores, measures),
            *_subject_tables(scores, measures),
            *_left_out_tables(scores),
        ),
        curves=_reference_curves(scores, measures),
        galleries=tuple(gallery for gallery in galleries if gallery.rows),
        commands=tuple(_commands(scores, command)),
        cards=tuple(_cards(scores)),
        warnings=tuple(warnings),
    )


def _measures(scores: Sequence[MethodScores]) -> list[str]:
    found = list(dict.fromkeys(name for result in scores for name in result.summary))
    return [name for name in _COLUMNS if name in found] + [n for n in found if n not in _COLUMNS]


def _cell(summary: Summary | None, best: float | None = None) -> Cell:
    if summary is None:
        return Cell(value=None)
    interval = summary.interval
    return Cell(
        value=_SCALE * summary.mean,
        interval=None if interval is None else (_SCALE * interval[0], _SCALE * interval[1]),
        best=best is not None and summary.mean == best,
    )


def _score_rows(scores: Sequence[MethodScores], columns: Sequence[str]) -> list[TableRow]:
    best: dict[str, float] = {}
    methods = [result for result in scores if result.method != REAL]
    for name in columns if len(methods) > 1 else ():
        values = [r.summary[name].mean for r in methods if name in r.summary]
        if values:
            best[name] = max(values)
    return [
        TableRow(
            name=result.method,
            cells=tuple(_cell(result.summary.get(name), best.get(name)) for name in columns),
        )
        for result in scores
    ]


def _main_table(
    scores: Sequence[MethodScores], measures: Sequence[str], *, published: bool
) -> Table:
    columns = [name for name in measures if name in _COLUMNS] or list(measures[:3])
    rows = _score_rows(scores, columns)
    note = (
        "Times 100, 95 % bootstrap intervals over subjects. A row's command is given below; the "
        "protocol card says which models and pictures."
    )
    if published:
        rows += [
            TableRow(
                name=name,
                cells=tuple(Cell(value=values.get(column)) for column in columns),
                published=True,
            )
            for name, values in TABLE_1
        ]
        note += f" The rows from {TABLE_1[0][0]} on are as the paper prints them."
        differing = _sanity_note(scores)
        note += f" {differing}" if differing else ""
    title = "Table 1 and 3" if published else "Scores"
    return Table(title=title, columns=tuple(columns), rows=tuple(rows), note=note)


def _sanity_note(scores: Sequence[MethodScores]) -> str:
    """How far the real pictures' score is from the published one."""
    parts = [
        f"{name} {_SCALE * result.summary[name].mean:.1f} (published {value})"
        for result in scores
        if result.method == REAL
        for name, value in REAL_PICTURES.items()
        if name in result.summary
    ]
    return f"The real pictures against themselves: {', '.join(parts)}." if parts else ""


def _ablation_tables(scores: Sequence[MethodScores]) -> Iterable[Table]:
    """Table 2, where at least two methods have the names of its rows."""
    found = {r.method: r for r in scores if r.method in TABLE_2}
    if len(found) < 2:
        return
    rows = []
    for name, (row, values) in TABLE_2.items():
        cells: list[Cell | str] = []
        for measure in MEASURES:
            cells.append(_cell(found[name].summary.get(measure)) if name in found else "")
            cells.append(Cell(value=values.get(measure)))
        rows.append(TableRow(name=row, cells=tuple(cells)))
    yield Table(
        title="Table 2",
        columns=tuple(title for m in MEASURES for title in (m, f"{m}, paper")),
        rows=tuple(rows),
        note="What is trained of the Base / Reference UNet, and whether references are augmented. "
        "The paper's first row ran out of memory; its figures are of DreamBooth's dataset.",
    )


def _further_tables(scores: Sequence[MethodScores], measures: Sequence[str]) -> Iterable[Table]:
    rest = [name for name in measures if name not in _COLUMNS]
    if rest and any(name in _COLUMNS for name in measures):
        yield Table(
            title="Further measures",
            columns=tuple(result.method for result in scores),
            rows=tuple(
                TableRow(name=name, cells=tuple(_cell(r.summary.get(name)) for r in scores))
                for name in rest
            ),
            note="unseen: against the real pictures that the method was not given. masked: "
            "foregrounds alone. subject@k: share of pictures whose own subject is the nearest of "
            "k look-alikes. diversity: 1 - cosine between pictures of one prompt. All times 100.",
        )


def _subject_tables(scores: Sequence[MethodScores], measures: Sequence[str]) -> Iterable[Table]:
    """For each main measure, every subject's figure by every method."""
    for measure in [name for name in measures if name in _COLUMNS] or list(measures[:1]):
        found = {r.method: r.summary[measure].subjects for r in scores if measure in r.summary}
        names = sorted({name for subjects in found.values() for name in subjects})
        rows = []
        for name in names:
            values = [subjects.get(name) for subjects in found.values()]
            cells = tuple(Cell(value=None if v is None else _SCALE * v) for v in values)
            rows.append(TableRow(name=name, cells=cells))
        yield Table(
            title=f"Subjects: {measure}",
            columns=tuple(found),
            rows=tuple(rows),
            note="Each subject's mean over its pictures, times 100.",
        )


def _left_out_tables(scores: Sequence[MethodScores]) -> Iterable[Table]:
    for result in scores:
        groups = {
            "Broken pictures, left out": result.left_out,
            "No foreground found, not in masked figures": result.no_foreground,
        }
        for title, entries in groups.items():
            if entries:
                yield Table(
                    title=f"{title}: {result.method}",
                    columns=("reason",),
                    rows=tuple(TableRow(name=e.file, cells=(e.reason,)) for e in entries),
                )


def _reference_curves(scores: Sequence[MethodScores], measures: Sequence[str]) -> tuple[Curve, ...]:
    """Fig. 7: results that differ in nothing but the number of references, over that number."""
    groups: dict[str, dict[int, MethodScores]] = {}
    for result in scores:
        count = result.about.details.get("references")
        if isinstance(count, int) and count > 0:
            others = {
                k: v for k, v in result.about.details.items() if k not in ("references", "command")
            }
            groups.setdefault(json.dumps(others, sort_keys=True), {})[count] = result
    curves = []
    for group in groups.values():
        if len(group) < 2:
            continue
        lines = []
        for name in (m for m in measures if m in _COLUMNS):
            found = [(k, group[k].summary[name]) for k in sorted(group) if name in group[k].summary]
            points = []
            for count, summary in found:
                cell = _cell(summary)
                points.append((float(count), _SCALE * summary.mean, cell.interval))
            lines.append(Line(name=name, points=tuple(points)))
        curves.append(
            Curve(
                title="Figure 7: more references",
                x_label="references",
                y_label="score",
                lines=tuple(lines),
                note="From one reference to all, the paper finds DINO +7.23 %, CLIP-I +1.74 %, "
                "CLIP-T -1.03 % (DreamBooth's dataset).",
            )
        )
    return tuple(curves)


def _commands(scores: Sequence[MethodScores], command: str) -> Iterable[tuple[str, str]]:
    for result in scores:
        drawn_by = result.about.details.get("command")
        if isinstance(drawn_by, str):
            yield f"{result.method}: pictures", drawn_by
        if result.environment.command:
            yield f"{result.method}: scores", result.environment.command
    if command:
        yield "this report", command


def _cards(scores: Sequence[MethodScores]) -> Iterable[tuple[str, dict[str, object]]]:
    cards: list[tuple[Card, list[MethodScores]]] = []
    for result in scores:
        for card, results in cards:
            if not differences(card, result.card):
                results.append(result)
                break
        else:
            cards.append((result.card, [result]))
    for card, results in cards:
        values = card.model_dump(mode="json")
        values["seeds"] = {r.method: list(r.environment.seeds) for r in results}
        values["versions"] = {r.method: r.environment.versions for r in results}
        values["platform"] = sorted({r.environment.platform for r in results})
        yield ", ".join(r.method for r in results), values


# ---------------------------------------------------------------- pictures


def _side_by_side(scores: Sequence[MethodScores], dataset: Dataset) -> Gallery:
    """For each subject and prompt the first picture of every method."""
    rows: list[tuple[str, tuple[Picture, ...]]] = []
    first = {
        result.method: {(p.subject, p.prompt): p for p in reversed(result.pictures)}
        for result in scores
        if result.folder is not None
    }
    for subject in dataset.subjects[:SHOWN_SUBJECTS]:
        drawn = [
            number
            for number in range(len(subject.prompts))
            if any((subject.name, number) in pictures for pictures in first.values())
        ]
        if not drawn:
            continue
        rows.append((f"{subject.name}: the real pictures", tuple(_real(subject))))
        for number in drawn[:SHOWN_PROMPTS]:
            pictures = [
                _generated(result, first[result.method][subject.name, number], result.method)
                for result in scores
                if (subject.name, number) in first.get(result.method, {})
            ]
            rows.append((subject.prompts[number], tuple(pictures)))
    return Gallery(
        title="Pictures",
        rows=tuple(rows),
        note=f"The first picture of each prompt; up to {SHOWN_SUBJECTS} subjects with "
        f"{SHOWN_PROMPTS} prompts each.",
    )


def _extremes(scores: Sequence[MethodScores], measures: Sequence[str]) -> Iterable[Gallery]:
    """The best and the worst pictures of each method by each of the main measures."""
    for result in scores:
        if result.folder is None:
            continue
        rows = []
        for name in (m for m in measures if m in _COLUMNS):
            ranked = sorted(
                (p for p in result.pictures if name in p.values),
                key=lambda p: (-p.values[name], p.file),
            )
            for title, chosen in (
                ("best", ranked[:EXTREMES]),
                ("worst", ranked[::-1][:EXTREMES]),
            ):
                pictures = [_generated(result, p, f"{_SCALE * p.values[name]:.1f}") for p in chosen]
                rows.append((f"{title} by {name}", tuple(pictures)))
        yield Gallery(title=f"Best and worst: {result.method}", rows=tuple(rows))


def _real(subject: Subject) -> Iterable[Picture]:
    for reference in subject.references:
        try:
            jpeg = thumbnail(read_source(reference.source))
        except (OSError, PictureError):
            continue
        yield Picture(jpeg=jpeg, caption=reference.name)


def _generated(result: MethodScores, picture: PictureScore, caption: str) -> Picture:
    path = Path(str(result.folder)) / picture.file
    try:
        jpeg = thumbnail(path.read_bytes())
    except (OSError, PictureError):
        raise UserError(
            f"--scores: {path} is gone or broken since it was scored; score the folder again"
        ) from None
    return Picture(jpeg=jpeg, caption=caption, detail=picture.file)


def thumbnail(data: bytes) -> str:
    """A picture file as base64 of a JPEG whose longer side is `THUMBNAIL` pixels.

    Raises:
        PictureError: it is no picture.
    """
    image = Image.fromarray(to_rgb(open_picture(io.BytesIO(data)))[0])
    scale = THUMBNAIL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # Enlarged pixels stay pixels.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize(size, method).save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()


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


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 620, 320, 60, 44, 130, 14
_COLOURS = ("#0b6e99", "#c4511d", "#3f7f3a", "#7a4fa3", "#a38a00", "#555555")


def _html_curve(curve: Curve) -> str:
    """The plot as SVG: a handful of lines needs no library."""
    points = [point for line in curve.lines for point in line.points]
    xs = sorted({x for x, _, _ in points})
    low, high = _range([v for _, y, span in points for v in (y, *(span or ()))])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - low) / (high - low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(xs[0], value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for x in xs:
        left, _ = place(x, low)
        parts.append(
            f'<text x="{left:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    label = escape(curve.x_label)
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{label}</text>')
    centre = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text x="14" y="{centre}" text-anchor="middle" transform="rotate(-90 14 {centre})">'
        f"{escape(curve.y_label)}</text>"
    )
    label_height = -math.inf
    ordered = sorted(curve.lines, key=lambda line: -line.points[-1][1])
    for number, line in enumerate(ordered):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(x, y) for x, y, _ in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, _, span), (left, top) in zip(line.points, placed, strict=True):
            parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.5" fill="{colour}"/>')
            if span is not None:
                (_, bottom), (_, upper) = place(x, span[0]), place(x, span[1])
                parts.append(
                    f'<path d="M{left:.1f} {bottom:.1f}V{upper:.1f}" stroke="{colour}" '
                    'opacity=".5"/>'
                )
        # Names at the lines' ends, pushed apart where lines meet.
        label_height = max(placed[-1][1] + 4, label_height + 15)
        parts.append(
            f'<text x="{placed[-1][0] + 10:.1f}" y="{label_height:.1f}" fill="{colour}">'
            f"{escape(line.name)}</text>"
        )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">'
        + "".join(parts)
        + "</svg>"
    )
    note = f"<p class=note>{escape(curve.note)}</p>" if curve.note else ""
    command = f"<pre>{escape(curve.command)}</pre>" if curve.command else ""
    return f"<h2>{escape(curve.title)}</h2>{svg}{note}{command}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis, a little beyond the values."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


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
figure { margin: 0; width: 144px; }
img { max-width: 144px; max-height: 144px; vertical-align: bottom; background: #eee; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
small { color: #999; }
figcaption small { display: block; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; }
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


# ---------------------------------------------------------------- LaTeX


def render_tex(report: Report) -> str:
    """The tables, to be put into a document that loads booktabs."""
    return "\n".join(_tex_table(table) for table in report.tables)


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
    return f"\\textbf{{{text}}}" if cell.best else text


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)
