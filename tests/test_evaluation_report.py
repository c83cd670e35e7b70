"""Reports: tables, the refusal of different protocols, and a page that stands alone."""

import json
import re
from pathlib import Path

import pytest

from bootpig_jax import evaluate
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, open_dataset
from bootpig_jax.evaluation.embedders import EmbeddingCache
from bootpig_jax.evaluation.render import (
    Cell,
    Curve,
    Line,
    Report,
    Table,
    TableRow,
    render_html,
    render_markdown,
    render_tex,
    write_report,
)
from bootpig_jax.evaluation.report import describe_scores
from bootpig_jax.evaluation.score import (
    MethodScores,
    Settings,
    dump_scores,
    score_folder,
    score_real,
)
from tests.evaluation_folders import CLASSES, write_dreambooth, write_pictures
from tests.test_evaluation_score import Projection

EMBEDDERS = [Projection(), Projection("DINO", None)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("report") / "dataset"
    return open_dataset("dreambooth", write_dreambooth(folder))


def scored(folder: Path, dataset: Dataset, **about: object) -> MethodScores:
    if not folder.exists():
        write_pictures(folder, list(CLASSES), prompts=3, images=1)
    (folder / "about.json").write_text(json.dumps(about))
    return score_folder(
        dataset,
        folder,
        EMBEDDERS,
        cache=EmbeddingCache(None),
        settings=Settings(command=f"score {folder.name}"),
    )


def test_published_rows_beside_ours(dataset: Dataset, tmp_path: Path) -> None:
    details = {"command": "draw & <mine>", "seed": 3}
    mine = scored(tmp_path / "<b>mine", dataset, details=details)
    real = score_real(dataset, EMBEDDERS, cache=EmbeddingCache(None), settings=Settings())
    report = describe_scores([mine, real], dataset, command="report it")
    table = report.tables[0]
    assert table.title == "Table 1 and 3" and table.columns == ("CLIP-T", "CLIP-I", "DINO")
    rows = {row.name: row for row in table.rows}
    assert [cell.value for cell in rows["BootPIG"].cells] == [31.1, 79.7, 67.4]  # type: ignore[union-attr]
    assert rows["BootPIG"].published
    assert not rows["<b>mine"].published
    measured = rows["<b>mine"].cells[2]
    assert isinstance(measured, Cell) and measured.interval is not None
    assert measured.value == pytest.approx(100 * mine.summary["DINO"].mean)
    assert "(published 77.4)" in table.note
    paths = write_report(report, tmp_path / "report")
    assert [path.name for path in paths] == ["report.json", "report.tex", "report.html"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<b>mine" not in page and "&lt;b&gt;mine" in page
    assert "draw &amp; &lt;mine&gt;" in page and "report it" in page
    # It stands alone: no scripts, and nothing is loaded.
    assert "<script" not in page and "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    assert page.count("data:image/jpeg;base64,") >= 4 * (3 + 3)
    assert "a dog wearing a santa hat" in page
    assert "best by DINO" in page and "worst by CLIP-T" in page
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert values["tables"][0]["rows"][0]["name"] == "<b>mine"
    assert values["cards"][0][1]["models"]["DINO"]["sha256"] == "DINO"
    assert values["cards"][0][1]["drawn_with"]["<b>mine"] == {"seed": 3}
    tex = (tmp_path / "report" / "report.tex").read_text()
    assert r"BootPIG & 31.1 & 79.7 & 67.4 \\" in tex
    assert r"\textless{}b\textgreater{}mine & " in tex
    assert "% <b>mine: pictures\n% draw & <mine>\n" in tex


def test_different_protocols_share_no_table(dataset: Dataset, tmp_path: Path) -> None:
    one = scored(tmp_path / "one", dataset)
    card = one.card.model_copy(update={"template": "a photo of {}"})
    other = one.model_copy(update={"method": "other", "card": card})
    with pytest.raises(UserError, match=r"different protocol cards \(template\)"):
        describe_scores([one, other])
    report = describe_scores([one, other], force=True)
    assert "other was scored by another protocol than one: template" in report.warnings
    assert len(report.cards) == 2
    with pytest.raises(UserError, match="two results are of 'one'"):
        describe_scores([one, one])
    # Where a model was loaded from is no difference.
    models = {
        name: model.model_copy(update={"source": "elsewhere"})
        for name, model in one.card.models.items()
    }
    moved = one.card.model_copy(update={"models": models})
    describe_scores([one, one.model_copy(update={"method": "moved", "card": moved})])


def test_warnings(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "mine", list(CLASSES), prompts=3, images=2)
    (folder / "dog" / "00" / "00.png").write_bytes(b"")
    report = describe_scores([scored(folder, dataset)])
    assert "mine: broken pictures left out: 1" in report.warnings
    broken = next(table for table in report.tables if table.title.startswith("Broken"))
    assert broken.rows[0].name == "dog/00/00.png"


def test_ablation_and_curve(dataset: Dataset, tmp_path: Path) -> None:
    results = [
        scored(tmp_path / "a", dataset, method="BootPIG", details={"references": 1}),
        scored(tmp_path / "b", dataset, method="table2_none_all", details={"references": 3}),
    ]
    report = describe_scores(results)
    table = next(table for table in report.tables if table.title == "Table 2")
    rows = {row.name: row.cells for row in table.rows}
    assert len(rows) == 6
    assert rows["none / all, yes"][5] == Cell(value=43.8)
    assert rows["RSA / none, yes"][0] == ""
    (curve,) = report.curves
    assert curve.title == "Figure 7: more references (BootPIG to table2_none_all)"
    assert [line.name for line in curve.lines] == ["CLIP-T", "CLIP-I", "DINO"]
    assert [point[0] for point in curve.lines[0].points] == [1.0, 3.0]
    page = render_html(report)
    assert page == render_html(report), "nothing of the day or of chance in a plot"
    plot = page[page.index("<svg") : page.index("</svg>")]
    assert all(line.name in plot for line in curve.lines)


def test_a_report_of_ones_own() -> None:
    table = Table(
        title="50% & more",
        columns=("a_b", "words"),
        rows=(
            TableRow(name="x", cells=(Cell(value=1.25, interval=(1, 2), best=True), "some")),
            TableRow(name="y", cells=(Cell(value=None), "")),
        ),
        command="make it",
        digits=2,
    )
    curve = Curve(
        title="flat",
        x_label="n",
        y_label="v",
        lines=(Line(name="one point", points=((1.0, 5.0, None),)),),
    )
    report = Report(title="mine", tables=(table,), curves=(curve,))
    page = render_html(report)
    assert "<b>1.25</b> <small>1.00 to 2.00</small>" in page and "–" in page
    assert "nan" not in page and "make it" in page
    assert "| x | 1.25 | some |\n| y | – |  |" in render_markdown(table)
    tex = render_tex(report)
    assert r"x & \textbf{1.25} {\scriptsize 1.00 to 2.00} & some \\" in tex
    assert r"a\_b" in tex and r"50\% \& more" in tex


def test_command_line(dataset: Dataset, tmp_path: Path) -> None:
    result = scored(tmp_path / "mine", dataset)
    path = tmp_path / "scores.json"
    path.write_text(dump_scores(result))
    output = tmp_path / "report"
    source = dataset.subjects[0].references[0].source
    assert isinstance(source, Path)
    data = source.parents[1]
    how = ["report", "--scores", str(path), "--output", str(output)]
    assert evaluate.main(how) == 0
    assert evaluate.main([*how, "--data", str(data)]) == 0
    other = write_dreambooth(tmp_path / "other", references=1)
    with pytest.raises(UserError, match="is not the dataset that"):
        evaluate.main([*how, "--data", str(other)])
    path.write_text("{}")
    with pytest.raises(UserError, match="is no result of score"):
        evaluate.main(how)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.main(how)
