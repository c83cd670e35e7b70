"""Captions by a language model, asked over HTTP from a server on this machine's loopback."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from bootpig_jax.errors import UserError
from data_gen import llm_captions
from data_gen.captions import make_caption_source, parse_caption
from data_gen.chat_server import ChatServer, retry_after
from data_gen.config import DataGenConfig, LLMConfig
from data_gen.grammar import GrammarSource, OpenWorldGrammar
from data_gen.llm_captions import (
    DistinctCaptions,
    LLMCaptions,
    answer_lines,
    parse_line,
    prompt,
)
from data_gen.stages import Caption, picture_seed

ROOT = Path(__file__).parents[1]
URL = "/v1/chat/completions"
CANARY = 'sk-canary/0123"456\\789'


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No proxy, and another server's key where the client would look for one."""
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")


def chat(text, finish_reason="stop", status=200, **headers):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    body = json.dumps({"id": "1", "choices": [{**choice, "finish_reason": finish_reason}]})
    return Response(body, status, headers, content_type="application/json")


def caption_of(seed):
    """A sentence of the grammar for each seed: what the model of these tests answers."""
    return GrammarSource(OpenWorldGrammar(), seed=77).captions([seed])[0].text


class Model:
    """A language model: its answer follows from the request's seed alone.

    Attributes:
      asked: the seeds of the requests that were answered.
      requests: all requests.
    """

    def __init__(self, server: HTTPServer):
        self.asked = []
        self.requests = []
        self.faults = []  # responses to the first requests
        self.lock = threading.Lock()
        self.url = server.url_for("/v1")
        server.expect_request(URL, method="POST").respond_with_handler(self.respond)

    def respond(self, request: Request):
        with self.lock:
            body = json.loads(request.get_data())
            self.requests.append((request, body))
            if self.faults:
                fault = self.faults.pop(0)
                return fault if isinstance(fault, Response) else fault(request)
            self.asked.append(body["seed"])
        return self.answer(body)

    def answer(self, body):
        return chat(f"Caption: {caption_of(body['seed'])}")


@pytest.fixture
def model(httpserver):
    return Model(httpserver)


def make_config(model, **changes):
    return LLMConfig.model_validate(dict(model="m", base_url=model.url, **changes))


def make_source(model, folder, *, total=6, seed=0, waits=None, **changes):
    def wait(seconds):
        if waits is not None:
            waits.append(seconds)

    journal = folder / "captions.jsonl"
    return LLMCaptions(make_config(model, **changes), journal, seed=seed, total=total, wait=wait)


def all_captions(model, folder, **changes):
    with make_source(model, folder, **changes) as source:
        return source.captions(range(changes.get("total", 6)))


# --- what is asked


def test_the_prompt_is_the_papers():
    assert prompt(LLMConfig(model="m")) == (
        "Generate a caption for an image where there is one main object and possibly other "
        "secondary objects. The object needs to be finite and solid. The main object should not be "
        "things like lakes, fields, sky, etc.\n\nYou should only respond in the following format: "
        "Caption: A photo of a [object], [describe object positioning in scene] [describe scene]"
    )


def test_the_prompt_for_several_captions_and_short_ones():
    text = prompt(LLMConfig(model="m", captions_per_call=50, max_words=17))
    assert "Generate 50 captions" in text and "at most 17 words" in text
    assert "finite and solid" in text and "A photo of a [object]" in text


def test_a_request_holds_what_was_configured(model, tmp_path):
    all_captions(model, tmp_path, total=3, temperature=1.2, max_tokens=99)
    bodies = [body for _, body in model.requests]
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in bodies} == {("m", 1.2, 99)}
    assert {b["messages"][0]["content"] for b in bodies} == {prompt(LLMConfig(model="m"))}
    assert {b["response_format"]["type"] for b in bodies} == {"json_schema"}
    assert sorted(b["seed"] for b in bodies) == sorted(picture_seed(0, n) >> 32 for n in range(3))
    # The client must not send a key that was not named, such as OPENAI_API_KEY's.
    assert not any("Authorization" in request.headers for request, _ in model.requests)


def test_the_named_key_is_sent_and_the_seed_need_not_be(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "the-key-0123\n")
    model.answer = lambda body: chat(caption_of(1))
    model.faults = [lambda request: chat(caption_of(1))]
    all_captions(model, tmp_path, total=1, api_key_env="MY_KEY", send_seed=False, json_schema="off")
    ((request, body),) = model.requests
    assert request.headers["Authorization"] == "Bearer the-key-0123"
    assert "seed" not in body and "response_format" not in body and "max_tokens" not in body


def test_the_whole_configuration_makes_the_source(model, tmp_path):
    captions = dict(source="llm", llm=make_config(model).model_dump())
    config = DataGenConfig.model_validate(
        dict(output_dir=tmp_path, candidates=3, captions=captions, pictures=dict(model="unused"))
    )
    with make_caption_source(config) as source:
        texts = [caption.text for caption in source.captions(range(3))]
    assert texts == [caption_of(picture_seed(0, n) >> 32) for n in range(3)]


@pytest.mark.parametrize("value", [None, "", " ", "two words", "k\u00e9y-0123456"])
def test_a_missing_or_broken_key_is_an_error(model, tmp_path, monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    source = make_source(model, tmp_path, api_key_env="MY_KEY")
    with pytest.raises(UserError, match="captions.llm.api_key_env: .* MY_KEY") as error:
        source.__enter__()
    assert not value or value.strip() == "" or value not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# --- how answers are read


CUP = "A photo of a red cup, placed on a table in the sun"


@pytest.mark.parametrize(
    "line",
    [
        CUP,
        f"  {CUP}  ",
        f"Caption: {CUP}",
        f"caption 3: {CUP}",
        f"12. {CUP}",
        f"(7) {CUP}",
        f"3) Caption: {CUP}",
        f"- {CUP}",
        f"\u2022 \u201c{CUP}\u201d",
        f'"{CUP}",',
        f"**Caption:** *{CUP}*",
        f"1\ufe0f\u20e3 {CUP}",
    ],
)
def test_decorations_are_taken_off(line):
    assert parse_line(line) == Caption(CUP, "red cup")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Sure! Here are 50 captions:",
        f"Here is one: {CUP}",
        "A photograph of a cup, on a table",
        "A photo of a cup",
        "Caption: A photo of a [object], [describe object positioning in scene] [describe scene]",
        f"\0{CUP}",
        f"{CUP}\0",
        f"{CUP}\x1b[31m",
        CUP + "x" * 5000,
        "x" * 5000,
    ],
)
def test_lines_off_the_form_are_refused(line):
    with pytest.raises(ValueError):
        parse_line(line)


@pytest.mark.parametrize(
    "answer",
    [
        "one\ntwo",
        "one\r\n\r\n  \ntwo\n",
        '{"captions": ["one", "two"]}',
        '["one", 3, "two"]',
        '```json\n{"captions": ["one", "two"]}\n```',
        "```\none\ntwo\n```",
    ],
)
def test_answers_are_lists_or_lines(answer):
    assert answer_lines(answer) == ["one", "two"]


@pytest.mark.parametrize("answer", ["", "\n \n", "{}"])
def test_answers_of_nothing_hold_no_caption(answer):
    assert all(line == "{}" for line in answer_lines(answer))


def test_damaged_and_deep_json_are_lines():
    assert answer_lines('{"captions": ["one') == ['{"captions": ["one']
    assert len(answer_lines("[" * 100_000)) == 1


@pytest.mark.parametrize(
    ("other", "added"),
    [
        (CUP, False),
        (CUP + ".", False),
        ("A photo of a red cup, placed on the table in sun", False),
        ("A photo of a Red Cups, placed on a table, in the sun", False),
        ("A photo of a r\u00e9d cup, placed on a table in the warm sun", False),
        ("A photo of a blue cup, placed on a table in the sun", True),
        ("A photo of a red cup, floating on a lake in the rain", True),
    ],
)
def test_near_duplicates(other, added):
    distinct = DistinctCaptions()
    assert distinct.add(parse_caption(CUP))
    assert distinct.add(parse_caption(other)) is added
    assert len(distinct.captions) == 1 + added


def test_near_duplicates_are_those_of_comparing_every_pair():
    rng = random.Random(0)
    words = "ox lake stone tower bridge lantern of in the on green small".split()
    distinct, kept = DistinctCaptions(), []
    for _ in range(500):
        name = rng.choice(["cup", "red cup", "cups", "jar"])
        scene = " ".join(rng.choices(words, k=rng.randint(1, 9)))
        caption = parse_caption(f"A photo of a {name}, {scene}")
        mine = llm_captions._words(caption.text)
        same = [
            llm_captions._words(other.text)
            for other in kept
            if llm_captions._words(other.object) == llm_captions._words(caption.object)
        ]
        alike = any(len(mine & other) / len(mine | other) >= 0.75 for other in same)
        assert distinct.add(caption) is not alike
        kept += [] if alike else [caption]
    assert 100 < len(kept) == len(distinct.captions) < 450


# --- runs


def test_captions_are_in_the_order_of_the_calls(model, tmp_path):
    texts = [caption.text for caption in all_captions(model, tmp_path, concurrency=4)]
    assert texts == [caption_of(picture_seed(0, n) >> 32) for n in range(6)]


def test_a_rerun_asks_nothing(model, tmp_path):
    first = all_captions(model, tmp_path)
    before, asked = (tmp_path / "captions.jsonl").read_bytes(), list(model.asked)
    assert make_source(model, tmp_path).complete(6)
    assert all_captions(model, tmp_path) == first
    assert make_source(model, tmp_path).captions([3, 1]) == [first[3], first[1]]  # an array's job
    assert model.asked == asked and len(asked) == 6
    assert (tmp_path / "captions.jsonl").read_bytes() == before


def test_a_longer_run_asks_for_the_rest(model, tmp_path):
    first = all_captions(model, tmp_path, total=3)
    source = make_source(model, tmp_path, total=7)
    assert source.complete(3) and not source.complete(4)
    assert all_captions(model, tmp_path, total=7)[:3] == first
    assert len(model.asked) == len(set(model.asked)) == 7


def test_captions_do_not_depend_on_faults_or_on_the_calls_in_flight(model, tmp_path):
    calm = all_captions(model, tmp_path / "a", total=30, concurrency=1)
    model.faults = [Response("", 503), Response("{", 200), Response("", 429)] * 5
    assert all_captions(model, tmp_path / "b", total=30, concurrency=6) == calm
    assert all_captions(model, tmp_path / "c", total=30, seed=1) != calm


def test_several_captions_a_call(model, tmp_path):
    def answer(body):
        texts = [caption_of(body["seed"] + n) for n in range(5)]
        return chat(json.dumps({"captions": [*texts, texts[0], "nonsense"]}))

    model.answer = answer
    with make_source(model, tmp_path, total=12, captions_per_call=5, concurrency=1) as source:
        captions = source.captions(range(12))
        assert source.rejects == {"near_duplicate": 3, "off_form": 3}
    assert len({caption.text for caption in captions}) == 12
    assert len(model.asked) == 3


def test_the_background_runs_ahead_and_no_further(model, tmp_path):
    asked = threading.Event()
    original = model.answer

    def answer(body):
        if len(model.asked) == 5:
            asked.set()
        return original(body)

    model.answer = answer
    with make_source(model, tmp_path, total=100, ahead=3, concurrency=2) as source:
        source.captions(range(2))
        assert asked.wait(60)  # three more than the two that were wanted
    assert len(model.asked) == 5
    with make_source(model, tmp_path, total=100, ahead=3, concurrency=2) as source:
        assert len(source.captions(range(9))) == 9
    assert len(model.asked) == len(set(model.asked)) <= 12


def test_captions_that_were_never_asked_for_are_a_defect(model, tmp_path):
    with pytest.raises(RuntimeError, match="with"):
        make_source(model, tmp_path).captions([0])


def test_leaving_does_not_wait_for_a_hanging_call(model, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_captions, "_GRACE", 0.05)
    arrived, leave = threading.Event(), threading.Event()

    def hang(body):
        arrived.set()
        leave.wait(60)
        return chat(caption_of(1))

    model.answer = hang
    try:
        with make_source(model, tmp_path, concurrency=2) as source:
            assert arrived.wait(60)
        with pytest.raises(RuntimeError):
            source.captions([0])
    finally:
        leave.set()
    for thread in source._threads:
        thread.join(60)
        assert not thread.is_alive()
    assert (tmp_path / "captions.jsonl").read_bytes() == b""  # too late to be written


def test_leaving_cuts_a_wait_short(model, tmp_path):
    model.faults = [Response("", 503, {"Retry-After": "3000"})] * 2
    config = make_config(model, concurrency=1)
    source = LLMCaptions(config, tmp_path / "captions.jsonl", seed=0, total=1)  # real waits
    with source:
        while not model.requests:
            time.sleep(0.01)
    assert not any(thread.is_alive() for thread in source._threads)


# --- faults


def half_a_body(request):
    whole = chat(caption_of(1)).get_data()
    response = Response(whole[: len(whole) // 2], content_type="application/json")
    response.headers["Content-Length"] = str(len(whole))
    return response


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Response("over capacity", 500), "HTTP 500: over capacity"),
        (Response("<html>\n bad\n gateway", 502), "HTTP 502: <html> bad gateway"),
        (Response("{}", 429), "HTTP 429"),
        (Response("", 408), "HTTP 408: no explanation"),
        (Response('{"choices": [', content_type="application/json"), "not JSON"),
        (Response("\xff\xfe", content_type="application/json"), "not JSON"),
        (Response("[" * 100_000, content_type="application/json"), "not JSON"),
        (Response("hello", content_type="text/plain"), "not JSON"),
        (Response('{"choices": []}', content_type="application/json"), "not a chat completion"),
        (Response("[1, 2]", content_type="application/json"), "not a chat completion"),
        (Response("null", content_type="application/json"), "not a chat completion"),
        (chat(None), "without text"),
        (chat("x" * 300_000), "300000 characters"),
        (half_a_body, "(incomplete|closed)"),
        (Response(b"garbage", headers={"Content-Encoding": "gzip"}), "decompressing"),
    ],
)
def test_what_can_pass_is_tried_again(model, tmp_path, fault, reason):
    waits = []
    model.faults = [fault] * 3
    calm = dict(concurrency=1, total=1, attempts=4)
    (caption,) = all_captions(model, tmp_path, waits=waits, **calm)
    assert caption.text == caption_of(picture_seed(0, 0) >> 32)
    assert len(waits) == 3
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    # And given up after as many attempts as were configured.
    model.faults = [fault] * 4
    with pytest.raises(UserError, match=f"(?i){reason}.*gave up after 4 attempts") as error:
        all_captions(model, tmp_path / "other", **calm)
    assert "the same command goes on from there" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(model.requests) == 8


def test_waits_grow_to_a_minute_and_are_the_same_each_time(model, tmp_path):
    seen = []
    for name in "ab":
        model.faults = [Response("", 503)] * 9
        seen.append([])
        all_captions(model, tmp_path / name, waits=seen[-1], concurrency=1, total=1, attempts=10)
    assert seen[0] == seen[1]
    assert max(seen[0]) <= 60 and min(seen[0][-2:]) >= 30


def test_retry_after_is_honoured(model, tmp_path):
    waits = []
    model.faults = [
        Response("", 429, {"Retry-After": "7.5"}),
        Response("", 429, {"Retry-After": "soon"}),
    ]
    all_captions(model, tmp_path, waits=waits, concurrency=1, total=1)
    assert waits[0] == 7.5
    assert 1 <= waits[1] <= 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "inf"}, float("inf")),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT",
          "date": "Wed, 21 Oct 2015 07:27:00 GMT"}, 90),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT",
          "date": "Wed, 21 Oct 2015 07:27:00"}, 0),
    ],
)  # fmt: skip
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_wait_of_hours_ends_the_run(model, tmp_path):
    model.faults = [Response("quota", 429, {"Retry-After": "86400"})]
    with pytest.raises(UserError, match="HTTP 429: quota: it asks to wait 86400 s"):
        all_captions(model, tmp_path, concurrency=1)


def test_a_slow_server_times_out_and_is_asked_again(model, tmp_path):
    leave = threading.Event()

    def slow(request):
        leave.wait(60)
        return Response("", 500)

    model.faults = [slow]
    waits = []
    # Many attempts: on a busy machine a good answer, too, may come too late.
    config = dict(timeout_s=0.5, attempts=50, concurrency=1, total=1)
    try:
        with make_source(model, tmp_path, waits=waits, **config) as source:
            # The model answers one request at a time, and the first one holds its lock.
            while not waits:
                time.sleep(0.01)
            leave.set()
            assert len(source.captions([0])) == 1
    finally:
        leave.set()


def test_a_server_that_is_not_there(tmp_path):
    config = LLMConfig(model="m", base_url="http://127.0.0.1:1/v1", attempts=2)
    journal = tmp_path / "captions.jsonl"
    with LLMCaptions(config, journal, seed=0, total=1, wait=lambda s: None) as source:
        with pytest.raises(
            UserError, match=r"127.0.0.1:1/v1: .*refused.* gave up after 2 attempts"
        ):
            source.captions([0])


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "json_schema=off"), (401, "api_key_env"), (403, "api_key_env"), (404, "base_url"),
     (413, "the same command")],
)  # fmt: skip
def test_a_refusal_ends_the_run_at_once(model, tmp_path, status, hint):
    model.faults = [Response("no", status)] * 9
    with pytest.raises(UserError, match=rf"HTTP {status}: no\b.*{hint}"):
        all_captions(model, tmp_path, concurrency=1, json_schema="on")
    assert len(model.requests) == 1


def test_a_run_that_failed_goes_on_where_it_was(model, tmp_path):
    model.faults = [chat(caption_of(n)) for n in range(3)]
    model.faults += [Response("", 500)] * 2
    calm = dict(total=6, concurrency=1, attempts=2)
    with make_source(model, tmp_path, **calm) as source:
        assert len(source.captions(range(3))) == 3  # what is there is given out all the same
        with pytest.raises(UserError, match="captions.jsonl keeps the answers so far"):
            source.captions(range(6))
    before = len(model.requests)
    assert len(all_captions(model, tmp_path, **calm)) == 6
    assert len(model.requests) == before + 3


def test_without_json_schema_the_lines_are_read(model, tmp_path):
    def answer(body):
        if "response_format" in body:
            return Response('{"error": "response_format is not supported"}', 400)
        return chat("\n".join(f"{n}. {caption_of(body['seed'] + n)}" for n in range(5)))

    model.answer = answer
    waits = []
    captions = all_captions(
        model, tmp_path / "a", total=15, captions_per_call=5, concurrency=1, waits=waits
    )
    assert len(captions) == 15 and waits == []
    assert sum("response_format" in body for _, body in model.requests) == 1
    with pytest.raises(UserError, match="HTTP 400: .*response_format is not supported"):
        all_captions(model, tmp_path / "b", json_schema="on")


def test_an_answer_cut_at_its_length_loses_its_last_line(model, tmp_path):
    cut = caption_of(3)[:-4]
    model.answer = lambda body: chat(f"{caption_of(body['seed'])}\n{cut}", finish_reason="length")
    captions = all_captions(model, tmp_path, total=2, concurrency=1)
    assert cut not in [caption.text for caption in captions]


# --- what the model says is data


def test_hostile_answers_stay_data(model, tmp_path):
    hostile = [
        "A photo of a ../../etc/x, on a table",
        "A photo of a cup\0, on a table",
        "A photo of a cup, " + "on a table " * 500,
        "\x1b]0;title\x07A photo of a cup, on a table",
        '{"captions": ["A photo of a cup\\u0000, on it", 3, "A photo of a jar, on a shelf"]}',
        "$(touch pwned) `touch pwned`; DROP TABLE captions",
        '{"captions": {"a": 1}}',
        "",
    ]
    folder = tmp_path / "out"
    model.faults = [lambda request, text=text: chat(text) for text in hostile]
    with make_source(model, folder, total=4, concurrency=1) as source:
        captions = source.captions(range(4))
        rejects = source.rejects
    assert captions[0] == Caption("A photo of a ../../etc/x, on a table", "../../etc/x")
    assert captions[1].object == "jar"
    assert rejects["off_form"] >= 5
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "captions.jsonl"]
    assert make_source(model, folder, total=4).captions(range(4)) == captions
    assert all(line.isascii() for line in (folder / "captions.jsonl").read_text().splitlines())


def test_a_model_that_does_not_understand_ends_the_run(model, tmp_path):
    model.answer = lambda body: chat("I cannot\nhelp with that.")
    with pytest.raises(UserError, match="20 answers in a row hold no caption .*'I cannot") as error:
        all_captions(model, tmp_path, concurrency=1)
    assert "\n" not in str(error.value)
    assert len(model.asked) == 20
    with pytest.raises(UserError, match="20 answers in a row"):  # a rerun tries as often again
        all_captions(model, tmp_path, concurrency=1)
    assert len(model.asked) == len(set(model.asked)) == 40


def test_a_model_that_repeats_itself_ends_the_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_captions, "_REPEATING_CALLS", 10)
    model.answer = lambda body: chat(CUP)
    with pytest.raises(UserError, match="10 answers in a row hold no new caption after 1 of them"):
        all_captions(model, tmp_path, concurrency=1)
    assert len(model.asked) == 11


# --- the journal


def journal_lines(folder):
    return (folder / "captions.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("tail", ["cut", "garbage", "zeros", "half a character"])
def test_a_torn_last_line_is_asked_again(model, tmp_path, tail):
    first = all_captions(model, tmp_path, concurrency=1)
    lines = journal_lines(tmp_path)
    torn = {
        "cut": lines[-1][:-5],
        "garbage": b'{"call": 5\n',
        "zeros": b"\0" * 200,
        "half a character": lines[-1][:20] + b"\xc3",
    }[tail]
    (tmp_path / "captions.jsonl").write_bytes(b"".join(lines[:-1]) + torn)
    source = make_source(model, tmp_path)
    assert source.complete(5) and not source.complete(6)
    assert all_captions(model, tmp_path, concurrency=1) == first
    assert journal_lines(tmp_path) == lines
    assert len(model.asked) == 7


@pytest.mark.parametrize(
    "line", [b"", b"x", b"[]", b'{"call": true, "settings": "", "answer": ""}', b"[" * 99_999]
)
def test_a_damaged_line_is_an_error_with_its_place(model, tmp_path, line):
    all_captions(model, tmp_path)
    lines = journal_lines(tmp_path)
    lines[2] = line + b"\n"
    (tmp_path / "captions.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"captions.jsonl:3: the line is damaged: .*delete"):
        make_source(model, tmp_path)


def test_lines_may_stand_in_any_order_or_twice(model, tmp_path):
    first = all_captions(model, tmp_path)
    lines = journal_lines(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(b"".join(reversed(lines + lines)))
    assert make_source(model, tmp_path).captions(range(6)) == first


def test_of_two_answers_to_one_call_the_first_counts(model, tmp_path):
    first = all_captions(model, tmp_path)
    lines = journal_lines(tmp_path)
    again = json.loads(lines[0]) | {"answer": "A photo of a later answer, in the journal"}
    (tmp_path / "captions.jsonl").write_bytes(b"".join([*lines, json.dumps(again).encode(), b"\n"]))
    assert make_source(model, tmp_path).captions(range(6)) == first


def test_a_missing_call_is_asked_again(model, tmp_path):
    first = all_captions(model, tmp_path, concurrency=1)
    lines = journal_lines(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    assert all_captions(model, tmp_path) == first
    assert len(model.asked) == 7 and len(set(model.asked)) == 6


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_words": 17}])
def test_answers_to_another_question_are_refused(model, tmp_path, change):
    all_captions(model, tmp_path)
    with pytest.raises(UserError, match="captions.jsonl: holds answers to another model"):
        make_source(model, tmp_path, **change)


def test_the_journal_must_be_usable(model, tmp_path):
    (tmp_path / "a" / "captions.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="captions.jsonl: cannot be read"):
        make_source(model, tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(UserError, match="captions.jsonl: cannot be (read|written)"):
        all_captions(model, tmp_path / "b")


def test_two_runs_do_not_ask_at_once(model, tmp_path):
    with make_source(model, tmp_path):
        with pytest.raises(UserError, match="another run is asking"):
            make_source(model, tmp_path, total=100).__enter__()


def test_a_full_disk_is_an_error(model, tmp_path, monkeypatch):
    source = make_source(model, tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with source:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="captions.jsonl: cannot be written: No space left"):
            source.captions(range(6))
            all_captions(model, tmp_path / "other")


_CHILD = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from data_gen.config import LLMConfig
from data_gen.llm_captions import LLMCaptions
config = LLMConfig(model="m", base_url={url!r}, concurrency=3)
with LLMCaptions(config, Path({journal!r}), seed=0, total=40) as source:
    source.captions(range(40))
"""


def test_a_killed_run_loses_no_answer_that_was_written(model, tmp_path):
    calm = all_captions(model, tmp_path / "calm", total=40)
    model.asked.clear()
    journal = tmp_path / "killed" / "captions.jsonl"
    script = _CHILD.format(root=str(ROOT), url=model.url, journal=str(journal))
    reached = threading.Event()
    original = model.answer

    def answer(body):
        if len(model.asked) == 12:
            reached.set()
        return original(body)

    model.answer = answer
    child = subprocess.Popen([sys.executable, "-c", script])
    assert reached.wait(120)
    child.send_signal(signal.SIGKILL)
    assert child.wait() in (-signal.SIGKILL, 0)
    written = len(journal_lines(journal.parent))
    assert all_captions(model, journal.parent, total=40) == calm
    # Only what was in flight when it was killed can have been asked twice.
    assert 40 <= len(model.asked) <= 43 and written > 0
    assert len({json.loads(line)["call"] for line in journal_lines(journal.parent)}) == 40


# --- the key


def everything_said(error):
    """The texts of an exception and of all that it hangs on to."""
    seen = []
    while error is not None:
        seen += [str(error), repr(error), repr(getattr(error, "body", ""))]
        seen += traceback.format_exception(error)
        error = error.__cause__ or error.__context__
    return "\n".join(seen)


ECHOES = {
    "401": lambda text: Response(f"Incorrect API key provided: {text}", 401),
    "json": lambda text: Response(json.dumps({"error": {"message": text}}), 400),
    "500": lambda text: Response("x" * 190 + text, 500),
    "header": lambda text: Response("no", 403, {"X-Echo": text.encode("unicode_escape")}),
    "not a completion": lambda text: Response(json.dumps({"echo": text})),
    "without text": lambda text: Response(
        json.dumps({"choices": [{"message": {"content": None, "echo": text}}]})
    ),
    "answer": lambda text: chat(f"A photo of a cup, with {text} on it"),
    "not understood": lambda text: chat(f"your key is {text}"),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_the_key_is_found_nowhere(model, tmp_path, monkeypatch, capfd, caplog, echo):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "openai")
    monkeypatch.setenv("MY_KEY", CANARY)
    model.faults = [lambda request: ECHOES[echo](request.headers["Authorization"][7:])] * 50
    error = None
    try:
        all_captions(model, tmp_path, api_key_env="MY_KEY", concurrency=2, attempts=2)
    except UserError as caught:
        error = caught
    assert model.requests[0][0].headers["Authorization"] == f"Bearer {CANARY}"
    assert error is not None
    captured = capfd.readouterr()
    texts = {
        "error": everything_said(error),
        "output": captured.out + captured.err,
        "log": caplog.text + repr([record.__dict__ for record in caplog.records]),
        **{str(p): p.read_text() for p in tmp_path.rglob("*") if p.is_file()},
    }
    escaped = (CANARY, json.dumps(CANARY)[1:-1], "canary")
    assert not [name for name, text in texts.items() if any(form in text for form in escaped)]
    if echo not in ("header", "answer"):
        assert "[redacted]" in str(error)


def test_the_key_of_a_defect_is_not_in_the_traceback(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", CANARY)
    server = ChatServer(make_config(model, api_key_env="MY_KEY"), lambda seconds: None)
    assert server.redact(f"a {CANARY} b") == "a [redacted] b"
    assert "canary" not in repr(server) + str(vars(server).get("_config"))
    server.close()


def test_a_dummy_key_is_no_secret(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "cup")
    model.answer = lambda body: chat(CUP)
    (caption,) = all_captions(model, tmp_path, total=1, api_key_env="MY_KEY")
    assert caption.object == "red cup"
