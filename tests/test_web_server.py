"""What a page's server refuses, and that it goes on afterwards."""

import http.client
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from PIL import Image
from pytest_httpserver import HTTPServer

from bootpig_jax.web.server import MAX_FILE, MAX_JSON, MAX_QUEUE, MAX_UPLOAD, names_address
from tests.web_server import PATIENCE, Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("tests.web_pages") as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url + "/gradio_api", timeout=PATIENCE) as opened:
        yield opened


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def upload(client: httpx.Client, name: str, content: bytes) -> str:
    response = client.post("/upload", files={"files": (name, content)})
    assert response.status_code == 200, response.text
    return response.json()[0]


def body(path: str, prompt: str = "a ball") -> dict[str, Any]:
    """A request for a drawing with one reference."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    settings = ["", 0, 1, 3, 7.5, 5.0, "unipc", "default", "auto", "", 1.0]
    return {"data": [[{"image": file}], None, prompt, ["softmax"], *settings]}


def ask(client: httpx.Client, request: dict[str, Any]) -> httpx.Response:
    return client.post("/call/draw", json=request)


def finish(client: httpx.Client, asked: httpx.Response) -> tuple[str, str]:
    """How a job ends: `complete` or `error`, and with what."""
    assert asked.status_code == 200, asked.text
    answer = client.get(f"/call/draw/{asked.json()['event_id']}").text
    event, data = answer.strip().split("\n\n")[-1].split("\n")
    return event.removeprefix("event: "), data.removeprefix("data: ")


def assert_alive(client: httpx.Client) -> None:
    """The worker still draws."""
    event, data = finish(client, ask(client, body(upload(client, "good.png", png()))))
    assert event == "complete", data


def test_addresses_are_refused_and_never_asked(
    client: httpx.Client, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/a.png").respond_with_data(png(), content_type="image/png")
    address = httpserver.url_for("/a.png")
    for path in (address, address.replace("http://", "HTTP://"), "file:///etc/passwd"):
        refused = ask(client, body(path))
        assert refused.status_code == 400 and "by upload" in refused.text
    assert client.get(f"/file={address}").status_code == 403
    assert client.get(f"/proxy={address}").status_code == 403
    assert httpserver.log == []
    assert_alive(client)


def test_too_large_or_of_the_wrong_type(client: httpx.Client, server: Server) -> None:
    large = client.post("/upload", files={"files": ("a.png", bytes(50 * 10**6))})
    assert large.status_code == 413 and len(large.content) < 1000 and MAX_FILE < 50 * 10**6
    # Refused by its announced length, before any of it is sent.
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(MAX_UPLOAD + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert client.post("/call/draw", content=b" " * (MAX_JSON + 1)).status_code == 413

    for content in (b"no picture", png()[:40], b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        event, data = finish(client, ask(client, body(upload(client, "notes.png", content))))
        assert event == "error" and "reference notes.png: " in data, data
        assert "tmp" not in data and "Traceback" not in data
    event, data = finish(client, ask(client, body(upload(client, "notes.txt", b"text"))))
    assert event == "error" and "Invalid file type" in data
    assert client.post("/call/draw", content=b"{").status_code in (400, 422)
    assert_alive(client)


@pytest.mark.parametrize("name", ["../../../../tmp/evil.png", "/etc/evil.png", "..\\evil.png"])
def test_uploads_stay_in_the_servers_folder(client: httpx.Client, name: str) -> None:
    folder = Path(upload(client, "plain.png", png())).parents[1]
    path = Path(upload(client, name, png()))
    assert path.is_file() and path.parents[1] == folder
    assert path.resolve().is_relative_to(folder) and ".." not in path.parts


def test_files_outside_are_never_served(client: httpx.Client, server: Server) -> None:
    project = Path(__file__).parents[1]
    uploaded = upload(client, "plain.png", png())
    assert client.get(f"/file={uploaded}").content == png()
    outside = (
        "/etc/passwd",
        str(project / "pyproject.toml"),
        "pyproject.toml",
        f"{Path(uploaded).parent}/../../../etc/passwd",
        "../" * 12 + "etc/passwd",
        "file:///etc/passwd",
    )
    for path in outside:
        for written in (path, quote(path, safe=""), quote(path).replace(".", "%2e")):
            assert client.get(f"/file={written}").status_code in (403, 404), written
            assert client.get(f"/file/{written}").status_code in (403, 404), written
    for static in ("/static/", "/assets/"):
        leak = httpx.get(f"{server.url}{static}..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd")
        assert leak.status_code in (403, 404)
    event, data = finish(client, ask(client, body("/etc/passwd")))
    assert event == "error" and "root:" not in data
    assert_alive(client)


def test_who_leaves_has_the_job_cancelled_and_the_queue_is_bounded(
    client: httpx.Client, server: Server
) -> None:
    reference = upload(client, "good.png", png())
    with httpx.Client(base_url=server.url + "/gradio_api", timeout=PATIENCE) as leaving:
        asked = ask(leaving, body(reference, "wait for me"))
        with leaving.stream("GET", f"/call/draw/{asked.json()['event_id']}"):
            server.wait_for("started wait for me")
            statuses = [ask(client, body(reference)).status_code for _ in range(100)]
            assert statuses.count(200) == MAX_QUEUE
            assert statuses.count(503) == 100 - MAX_QUEUE
    server.wait_for("cancelled wait for me")
    for _ in range(MAX_QUEUE):
        server.wait_for("started a ball")
    assert_alive(client)


def test_a_bad_setting_is_one_line(client: httpx.Client) -> None:
    reference = upload(client, "good.png", png())
    for position, value, named in (
        (2, "  ", "prompt"),
        (3, [], "poolings"),
        (4, "a\0b", "negative_prompt"),
        (13, "big", "reference_scale"),
        (5, 2**40, ""),
        (7, 10**6, ""),
        (10, "magic", ""),
    ):
        request = body(reference)
        request["data"][position] = value
        event, data = finish(client, ask(client, request))
        assert event == "error" and named in data and "Traceback" not in data, (position, data)
    request = body(reference)
    request["data"][0] = []
    event, data = finish(client, ask(client, request))
    assert event == "error" and "references" in data
    assert_alive(client)


def test_addresses_are_found_wherever_they_are() -> None:
    deep = {"data": [{"image": {"path": "ftp://host/a"}}]}
    assert names_address(json.dumps(deep).encode())
    assert not names_address(
        json.dumps({"data": ["see http://host/a"], "url": "http://x"}).encode()
    )
    assert not names_address(b"[" * 100_000)
    assert not names_address(b"\xff")
