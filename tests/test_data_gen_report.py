"""What a run says of itself: the page, the plan and the progress."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_gen.captions import make_caption_source
from data_gen.engines import Failure
from data_gen.plan import make_plan
from data_gen.progress import Progress, Tally
from data_gen.report import describe, spread_records
from data_gen.run import Command, Part, run
from data_gen.shards import ShardReport, finished_shards, read_rejects
from tests import data_gen_stubs as stubs

ROOT = Path(__file__).parents[1]
TOYLAND = ROOT / "bootpig_jax/toyland/weights/sd"
HOSTILE = "A photo of a <script>alert(1)</script>\"&'{style}, on {0} %s tables"


class Page(HTMLParser):
    """Checks that tags are balanced; keeps the tags, the attributes and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with captions that would be markup."""
    folder = tmp_path_factory.mktemp("report")
    lines = [f"{HOSTILE} {number}" for number in range(40)]
    (folder / "captions.txt").write_text("\n".join(lines))
    captions = {"source": "file", "file": folder / "captions.txt"}
    config = stubs.make_config(folder / "out", candidates=40, captions=captions)
    assert run(Command(config), stubs.make_stages) == 0
    return config


def test_the_page_stands_alone_and_takes_captions_for_text(finished):
    page = Page((finished.output_dir / "report.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert f"{HOSTILE} 0" in page.text
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [value for name, value in page.attributes if name.startswith("on")]


def test_the_page_has_counts_speed_captions_and_pictures(finished):
    page = Page((finished.output_dir / "report.html").read_text())
    summary = json.loads((finished.output_dir / "summary.json").read_text())
    samples, rejects = summary["samples"], summary["rejects"]
    assert samples + sum(rejects.values()) == 40
    assert f"{samples} samples of 40 candidates" in page.text
    for reason, count in rejects.items():
        assert f"{reason} ({count})" in page.text
    assert "drawing pictures" in page.text and "waiting for masks" in page.text
    assert summary["captions"]["distinct"] == 40 and "different objects" in page.text
    # Two pictures a sample, and one a reject that was drawn.
    kept = sum(len(read_rejects(finished, shard)) for shard in range(finished.num_shards))
    assert page.tags.count("img") == 2 * samples + kept
    assert 0 < kept <= rejects["empty"]


def test_describing_again_writes_the_same(finished):
    before = {path: path.read_bytes() for path in finished.output_dir.glob("*") if path.is_file()}
    assert run(Command(finished, only="describe"), None) == 0
    assert before == {path: path.read_bytes() for path in before}


def test_a_few_rejects_of_each_reason_are_kept(tmp_path):
    config = stubs.make_config(tmp_path, candidates=60, candidates_per_shard=60)
    run(Command(config), stubs.make_stages)
    (report,) = finished_shards(config).values()
    shown = read_rejects(config, 0)
    assert report.rejects["empty"] > 4 and report.rejects["not_finite"] > 0
    assert [one.reason for one in shown] == ["empty"] * 4
    assert all(one.picture.startswith(b"\xff\xd8") for one in shown)


def test_shown_samples_are_spread_over_all_shards(finished):
    reports = finished_shards(finished)
    shown = [record.id for record in spread_records(finished, reports, 7)]
    assert len(set(shown)) == 7 and shown == sorted(shown)
    assert len(spread_records(finished, reports, 1000)) == sum(r.count for r in reports.values())
    assert spread_records(finished, {}, 7) == []


def test_an_unfinished_run_has_a_page_but_no_dataset(tmp_path):
    config = stubs.make_config(tmp_path)
    failures = [Failure(0, "OSError: <i>broken</i>")]
    describe(config, {}, make_caption_source(config), failures)
    page = Page((tmp_path / "report.html").read_text())
    assert "0 of 4 shards are finished" in page.text and "OSError: <i>broken</i>" in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# --- the plan


def test_the_plan_of_a_run_that_has_not_started(tmp_path):
    config = stubs.make_config(tmp_path / "none", candidates=1000, candidates_per_shard=100)
    plan = make_plan(config, range(10))
    assert (plan.shards, plan.shards_left, plan.pictures_left) == (10, 10, 1000)
    assert plan.calls is None and plan.seconds is None and plan.tflop is None
    assert "1,000 from open_world: no calls" in plan.text()
    assert "(estimated)" in plan.text()
    assert not config.output_dir.exists()


def test_the_plan_subtracts_what_is_there(finished, tmp_path):
    config = stubs.make_config(tmp_path)
    run(Command(config, Part(1, 2)), stubs.make_stages)
    reports = finished_shards(config).values()
    plan = make_plan(config, range(4))
    assert (plan.shards_left, plan.pictures_left) == (2, 22 - sum(r.candidates for r in reports))
    assert plan.bytes_measured and plan.seconds == pytest.approx(
        sum(r.seconds["total"] for r in reports) / sum(r.candidates for r in reports)
    )
    assert re.search(r"hours left \(measured", plan.text())
    assert make_plan(finished, range(finished.num_shards)).pictures_left == 0
    assert make_plan(config, Part(1, 2).shards(config)).shards_left == 0


def test_the_plan_counts_the_calls_that_are_left(tmp_path):
    llm = {"model": "any", "captions_per_call": 5}
    config = stubs.make_config(tmp_path / "x", captions={"source": "llm", "llm": llm})
    assert make_plan(config, range(4)).calls == 5
    assert "5 calls left" in make_plan(config, range(4)).text()


def test_the_plan_counts_the_work_of_the_model_without_its_weights(tmp_path):
    def tflop(**changes):
        pictures = {"model": str(TOYLAND), "image_size": 64, "steps": 10, **changes}
        return make_plan(stubs.make_config(tmp_path / "x", pictures=pictures), range(4)).tflop

    once = tflop(guidance_scale=1.0)
    assert 1e-4 < once < 1
    guided, longer = tflop(), tflop(guidance_scale=1.0, steps=20)
    assert guided == pytest.approx(longer)  # twice the passes through the UNet
    assert once < guided < 2 * once  # the picture is decoded once
    assert tflop(model="a/hub-id") is None


# --- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(shard, candidates, rejects):
    return ShardReport(f"shard-{shard}", candidates, 0, 0, "", "", "", rejects, {})


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_shows_rate_time_left_and_rejects(stream):
    with Progress(30, stream=stream) as progress:
        progress.start({0: report(0, 10, {"empty": 2})})
        tally = Tally()
        for reason in (None, "empty", "too_small", None):
            tally.note(reason)
            progress.show(1, tally)
        progress.show(2, Tally(10))
        progress.give_up(2)
    last = re.split(r"[\r\n]", stream.getvalue().strip())[-1]
    assert "14/30" in last and "picture/s" in last and "rejected: empty 3, too_small 1" in last
    assert re.search(r"\[\d\d:\d\d<", last)  # time taken and time left
    assert ("\r" in stream.getvalue()) == stream.isatty()


def test_in_a_file_progress_is_a_line_every_ten_seconds():
    stream = io.StringIO()
    with Progress(10**6, stream=stream) as progress:
        progress.start({})
        tally = Tally()
        for _ in range(1000):
            tally.note(None)
            progress.show(0, tally)
    assert 2 <= len(stream.getvalue().splitlines()) < 20  # at the start, at the end
