"""Describes finished shards: for TFDS and training, for programs, and for people.

`report.html` stands alone: no scripts, and pictures are part of it. Captions and other words that
a language model or a file has given are text in it, never markup.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TypeVar

import numpy as np

from bootpig_jax.data.records import (
    Record,
    ShardReader,
    decode,
    decode_mask,
    decode_picture,
    write_dataset_metadata,
)
from bootpig_jax.yaml_config import dump_config
from data_gen.captions import CaptionStatistics, caption_statistics
from data_gen.config import DataGenConfig
from data_gen.engines import Failure
from data_gen.shards import (
    RejectedSample,
    ShardReport,
    read_rejects,
    shard_path,
    total_rejects,
    write_text,
)
from data_gen.stages import CaptionSource
from data_gen.thumbnails import thumbnail

_Item = TypeVar("_Item")

_SHOWN_SAMPLES = 36
_SHOWN_REJECTS = 12  # of each reason


@dataclass(frozen=True)
class Summary:
    """What came out of a run.

    Attributes:
      candidates: of the run.
      drawn: candidates in the finished shards.
      samples: records in them.
      shards: how many there are to be.
      finished: how many are there.
      rejects: candidates rejected, by reason.
      caption_rejects: captions that the source was given and did not use, by reason.
      captions: statistics of the finished shards' captions.
      seconds: of all finished shards, by stage (`ShardReport.seconds`).
    """

    candidates: int
    drawn: int
    samples: int
    shards: int
    finished: int
    rejects: dict[str, int]
    caption_rejects: dict[str, int]
    captions: CaptionStatistics
    seconds: dict[str, float]


def describe(
    config: DataGenConfig,
    reports: Mapping[int, ShardReport],
    captions: CaptionSource,
    failures: Sequence[Failure],
) -> None:
    """Writes `report.html` and, where all shards are there, what describes the dataset.

    Args:
      config: the run's configuration.
      reports: of the finished shards, by number.
      captions: the run's captions.
      failures: the shards that were given up.

    Raises:
      UserError: something cannot be written.
    """
    summary = summarise(config, reports, captions)
    if len(reports) == config.num_shards and summary.samples:
        counts = {config.split: [reports[shard].count for shard in range(config.num_shards)]}
        write_dataset_metadata(config.output_dir, config.dataset, counts)
        entries = {
            **asdict(summary),
            "samples_hash": reports[0].samples_hash,
            "config": config.model_dump(mode="json"),
        }
        write_text(config.output_dir / "summary.json", json.dumps(entries, indent=2))
    samples = spread_records(config, reports, _SHOWN_SAMPLES)
    rejects = [one for shard in sorted(reports) for one in read_rejects(config, shard)]
    page = render(config, summary, failures, samples, rejects)
    write_text(config.output_dir / "report.html", page)


def summarise(
    config: DataGenConfig, reports: Mapping[int, ShardReport], captions: CaptionSource
) -> Summary:
    """Adds up the reports of the finished shards."""
    indices = [index for shard in sorted(reports) for index in config.shard_indices(shard)]
    seconds: dict[str, float] = {}
    for shard in sorted(reports):
        for stage, spent in reports[shard].seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return Summary(
        candidates=config.candidates,
        drawn=len(indices),
        samples=sum(report.count for report in reports.values()),
        shards=config.num_shards,
        finished=len(reports),
        rejects=dict(total_rejects(reports.values()).most_common()),
        caption_rejects=dict(captions.rejects),
        captions=caption_statistics(captions.captions(indices)),
        seconds=seconds,
    )


def spread_records(
    config: DataGenConfig, reports: Mapping[int, ShardReport], count: int
) -> list[Record]:
    """Returns up to `count` records, at equal distances over all finished shards."""
    places = [(shard, n) for shard in sorted(reports) for n in range(reports[shard].count)]
    count = min(count, len(places))
    chosen = [places[number * len(places) // count] for number in range(count)]
    readers = {shard: ShardReader(shard_path(config, shard)) for shard in {s for s, _ in chosen}}
    return [decode(readers[shard][n]) for shard, n in chosen]


def render(
    config: DataGenConfig,
    summary: Summary,
    failures: Sequence[Failure],
    samples: Sequence[Record],
    rejects: Sequence[RejectedSample],
) -> str:
    """Returns the page.

    Args:
      config: the run's configuration.
      summary: what came out.
      failures: the shards that were given up.
      samples: those to be shown.
      rejects: those of which up to twelve of each reason are shown.
    """
    return _PAGE.format(
        style=_STYLE,
        title=escape(f"{config.dataset}, {config.split}"),
        state=_state(summary, failures),
        outcomes=_outcomes(summary),
        speed=_speed(summary),
        captions=_captions(summary),
        samples=_figures(samples, _sample_figure),
        rejects="".join(
            f"<h3>{escape(reason)} ({count})</h3>"
            + _figures([r for r in rejects if r.reason == reason][:_SHOWN_REJECTS], _reject_figure)
            for reason, count in summary.rejects.items()
        ),
        config=escape(dump_config(config)),
    )


def _state(summary: Summary, failures: Sequence[Failure]) -> str:
    share = summary.samples / summary.drawn if summary.drawn else 0.0
    text = (
        f"<p class=big>{summary.samples:,} samples of {summary.drawn:,} candidates "
        f"({share:.1%})</p><p>{summary.finished:,} of {summary.shards:,} shards are finished; "
        f"the run is to have {summary.candidates:,} candidates.</p>"
    )
    if failures:
        rows = [(str(failure.shard), failure.error) for failure in failures]
        text += "<h2>Shards that failed</h2>" + _table(("shard", "last error"), rows)
    return text


def _outcomes(summary: Summary) -> str:
    outcomes = {"kept": summary.samples, **summary.rejects}
    rows = [
        (outcome, f"{count:,}", f"{count / summary.drawn:.2%}")
        for outcome, count in outcomes.items()
        if summary.drawn
    ]
    return _table(("outcome", "candidates", "share"), rows)


def _speed(summary: Summary) -> str:
    total = summary.seconds.get("total", 0.0)
    if not total:
        return "<p>No shard is finished.</p>"
    rows = [
        (_STAGE_NAMES.get(stage, stage), f"{spent:,.1f}", f"{spent / total:.1%}")
        for stage, spent in summary.seconds.items()
    ]
    rate = (
        f"<p>{summary.drawn / total:.2f} candidates a second in each process that makes shards; "
        "loading the models is not counted.</p>"
    )
    return rate + _table(("stage", "seconds", "of the total"), rows)


_STAGE_NAMES = {
    "pictures": "drawing pictures",
    "masks": "cutting out, beside the drawing",
    "encoding": "encoding, beside the drawing",
    "waiting": "waiting for masks and encoding",
}


def _captions(summary: Summary) -> str:
    statistics = summary.captions
    rows = [
        ("captions", f"{statistics.count:,}"),
        ("different ones", f"{statistics.distinct:,}"),
        ("different objects", f"{statistics.distinct_objects:,}"),
        (
            "words in a caption",
            f"{statistics.min_words} to {statistics.max_words}, mean {statistics.mean_words:.1f}",
        ),
        (
            "most frequent objects",
            ", ".join(f"{name} ({count:,})" for name, count in statistics.frequent_objects),
        ),
        *((f"not used: {reason}", f"{n:,}") for reason, n in summary.caption_rejects.items()),
    ]
    return _table(("", ""), rows)


def _sample_figure(record: Record) -> str:
    target = decode_picture(record.target, where=record.id)
    mask = decode_mask(record.mask, where=record.id)
    reference = np.where(mask[..., None], target, np.uint8(255))
    pictures = _picture(thumbnail(target)) + _picture(thumbnail(reference))
    return _figure(pictures, record.caption, record.id, wide=True)


def _reject_figure(sample: RejectedSample) -> str:
    return _figure(_picture(sample.picture), sample.caption, sample.id)


def _figure(pictures: str, caption: str, name: str, *, wide: bool = False) -> str:
    kind = " class=wide" if wide else ""
    text = f"<figcaption>{escape(caption)}<small>{escape(name)}</small></figcaption>"
    return f"<figure{kind}>{pictures}{text}</figure>"


def _figures(items: Iterable[_Item], figure: Callable[[_Item], str]) -> str:
    shown = "\n".join(figure(item) for item in items)
    return f"<div class=sheet>{shown}</div>" if shown else "<p>Nothing to show.</p>"


def _picture(jpeg: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if any(head):
        lines.insert(0, "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 77rem;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.big { font-size: 1.5rem; margin-bottom: 0; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem 1.5rem .2rem 0; vertical-align: top; }
td:nth-child(n+2) { font-variant-numeric: tabular-nums; }
th { color: #777; font-weight: normal; }
.sheet { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: 144px; }
figure.wide { width: 292px; }
figure.wide img + img { margin-left: 4px; }
img { max-width: 144px; max-height: 144px; vertical-align: bottom; background: #eee; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
small { display: block; color: #999; }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data generation: {title}</title>
<style>{style}</style>
</head>
<body>
<h1>Data generation: {title}</h1>
{state}
<h2>Outcomes</h2>
{outcomes}
<h2>Speed</h2>
{speed}
<h2>Captions</h2>
{captions}
<h2>Samples</h2>
<p>Target, what the mask cuts out of it, and caption; at equal distances over all shards.</p>
{samples}
<h2>Rejected candidates</h2>
<p>The first ones of each reason.</p>
{rejects}
<h2>Configuration</h2>
<pre>{config}</pre>
</body>
</html>"""
