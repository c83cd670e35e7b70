"""Puts what `score` has written side by side: Tables 1-3, Fig. 7, the pictures."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from bootpig_jax.data.pictures import PictureError, open_picture, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, Subject
from bootpig_jax.evaluation.files import read_source
from bootpig_jax.evaluation.protocol import Card, differences
from bootpig_jax.evaluation.published import MEASURES, REAL_PICTURES, TABLE_1, TABLE_2
from bootpig_jax.evaluation.render import (
    Cell,
    Curve,
    Gallery,
    Line,
    Picture,
    Report,
    Table,
    TableRow,
)
from bootpig_jax.evaluation.score import REAL, MethodScores, PictureScore, Summary

THUMBNAIL = 144  # pixels
EXTREMES = 6  # best and worst pictures that are shown
SHOWN_PROMPTS = 6  # of each subject
SHOWN_SUBJECTS = 12

# Measures that are shares or cosines are shown times 100.
_SCALE = 100
_COLUMNS = ("CLIP-T", "CLIP-I", "DINO", "subject@16", "scene@10")


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
            "k look-alikes. diversity: 1 - cosine, or LPIPS, between pictures of one prompt. All "
            "times 100.",
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
                title="Figure 7: more references "
                f"({group[min(group)].method} to {group[max(group)].method})",
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
        values["drawn_with"] = {
            r.method: {k: v for k, v in r.about.details.items() if k != "command"} for r in results
        }
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
