"""The page to draw with: what it asks the models for, and the page itself in a browser."""

import asyncio
import contextlib
import io
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Page, TimeoutError, expect

from bootpig_jax.errors import UserError
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.web.app import list_others
from bootpig_jax.web.drawing import make_request, split_picture
from bootpig_jax.web.jobs import Cancelled, Report, stream
from tests.web_server import PATIENCE, Server, browser_page, running

FIELDS = {"seed": 5, "reference_scale": "", "num_inference_steps": 3}


def test_a_request_has_settings_for_each_pooling() -> None:
    request = make_request("a dog", [("a.png", None)], ["average", "softmax"], None, FIELDS)
    assert request.references == (Path("a.png"),) and request.image is None
    # In the order of the list of poolings, whatever the order of the clicks.
    assert [settings.strategy for settings in request.settings] == ["softmax", "average"]
    assert {settings.seed for settings in request.settings} == {5}
    scaled = make_request(
        "a dog", [("a.png", None)], ["concat"], None, FIELDS | {"reference_scale": "1.1"}
    )
    assert scaled.settings[0].reference_scale == 1.1
    with pytest.raises(UserError, match="references: give from 1 to"):
        make_request("a dog", None, ["softmax"], None, FIELDS)


def test_what_is_painted_becomes_the_mask() -> None:
    background = Image.new("RGBA", (6, 4), (10, 20, 30, 255))
    layer = Image.new("RGBA", (6, 4))
    assert split_picture(None) == (None, None)
    assert split_picture({"background": None, "layers": []}) == (None, None)
    assert split_picture({"background": Image.new("RGBA", (6, 4)), "layers": []}) == (None, None)
    image, mask = split_picture({"background": background, "layers": [layer]})
    assert image is not None and image.getpixel((0, 0)) == (10, 20, 30) and mask is None
    layer.putpixel((2, 1), (255, 0, 0, 40))  # the soft edge of a brush counts
    _, mask = split_picture({"background": background, "layers": [layer]})
    assert mask is not None and np.argwhere(np.asarray(mask)).tolist() == [[1, 2]]
    with pytest.raises(UserError, match="another size"):
        split_picture({"background": background, "layers": [layer.resize((3, 2))]})


def test_settings_without_a_control_are_named() -> None:
    settings = SamplingSettings(seed=3, spacing="trailing", strategy="concat", batch_size=1)
    assert list_others(settings, ["seed"]) == "spacing = trailing"
    assert list_others(SamplingSettings(), ["seed"]) == ""


def test_work_is_streamed_and_stops_when_nobody_waits() -> None:
    ended = threading.Event()

    def count(report: Report[int]) -> None:
        try:
            for number in range(10**9):
                report(number)
        except Cancelled:
            ended.set()
            raise

    def fail(report: Report[int]) -> None:
        report(1)
        raise UserError("no")

    async def check() -> None:
        events = stream(count, asyncio.Event())
        assert [await anext(events), await anext(events)] == [0, 1]
        await events.aclose()
        assert await asyncio.to_thread(ended.wait, PATIENCE)
        ended.clear()
        stop = asyncio.Event()
        with pytest.raises(Cancelled):
            async for event in stream(count, stop):
                if event == 3:
                    stop.set()
        assert await asyncio.to_thread(ended.wait, PATIENCE)
        seen = []
        with pytest.raises(UserError, match="no"):
            async for event in stream(fail, asyncio.Event()):
                seen.append(event)
        assert seen == [1]

    asyncio.run(check())


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "ball.png"
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 36, 36), "red", "blue", 3)
    image.save(path)
    return path


@pytest.fixture
def pretending() -> Iterator[Server]:
    """The page with models that draw nothing."""
    with running("tests.web_pages") as server:
        yield server


def give(page: Page, reference: Path, prompt: str) -> None:
    """Uploads a reference and writes the prompt."""
    page.locator("#references input[type=file]").set_input_files(reference)
    page.locator("#references .thumbnail-item img").wait_for()
    page.locator("#prompt textarea").fill(prompt)


def start(page: Page, server: Server, prompt: str) -> None:
    """Writes the prompt and clicks until its job begins: the page has one job at a time."""
    page.locator("#prompt textarea").fill(prompt)
    for _ in range(PATIENCE // 5):
        page.locator("#draw").click()
        with contextlib.suppress(queue.Empty):
            server.wait_for(f"started {prompt}", patience=5)
            return
    pytest.fail(f"{prompt!r} never begins")


def put_picture(page: Page, path: Path) -> None:
    """Gives the editor a picture; one that comes before the editor is ready is lost."""
    for _ in range(PATIENCE // 5):
        with contextlib.suppress(TimeoutError):
            with page.expect_file_chooser(timeout=5000) as chooser:
                page.locator("#picture").get_by_label("Upload", exact=True).click(timeout=5000)
            chooser.value.set_files(path)
            page.locator("#picture").get_by_label("Color").wait_for(timeout=5000)
            return
    pytest.fail("the editor takes no picture")


def draw(page: Page, pictures: int) -> None:
    """Draws, and waits for as many pictures."""
    page.locator("#draw").click()
    ended = page.get_by_text("drawn in").or_(page.locator(".toast-body")).first
    ended.wait_for()
    assert f"{pictures} drawn in" in ended.inner_text()
    tiles = page.locator("#result .thumbnail-item")
    expect(tiles).to_have_count(pictures, timeout=PATIENCE * 1000)


@pytest.mark.long
def test_upload_draw_see_and_draw_again(
    model_folder: Path, bootpig_folder: Path, reference: Path, tmp_path: Path
) -> None:
    models = ["--model", str(model_folder), "--bootpig", str(bootpig_folder), "--steps", "2"]
    with running("bootpig_jax.app", *models, "--port") as server:
        with browser_page(server.url) as (page, asked):
            give(page, reference, "a ball")
            page.locator("#strategies").get_by_label("average").check()
            draw(page, pictures=2)
            saved = download(page, tmp_path / "first.png", number=1)
            settings = json.loads(Image.open(io.BytesIO(saved)).info["bootpig"])
            assert (
                settings["prompt"] == "a ball" and settings["references"][0]["path"] == "ball.png"
            )
            assert settings["settings"]["strategy"] == "average"

            # Another page, nothing known but the saved file and the reference.
            page.reload()
            give(page, reference, "something else")
            with page.expect_file_chooser() as chooser:
                page.locator("#load").click()
            chooser.value.set_files(tmp_path / "first.png")
            page.wait_for_function("document.querySelector('#prompt textarea').value === 'a ball'")
            draw(page, pictures=1)
            assert download(page, tmp_path / "again.png", number=0) == saved
            # Everything that a page needs comes from its server.
            assert all(address.startswith((server.url, "data:", "blob:")) for address in asked)
        server.stop()


def download(page: Page, path: Path, number: int) -> bytes:
    """Saves a picture of the last job with the page's own button."""
    page.locator("#result .thumbnail-item").nth(number).click()
    page.get_by_text("sha256").first.wait_for()
    with page.expect_download() as saved:
        page.locator("#result").get_by_label("Download").click()
    saved.value.save_as(path)
    return path.read_bytes()


@pytest.mark.long
def test_stop_paint_and_mistakes(pretending: Server, reference: Path, tmp_path: Path) -> None:
    with browser_page(pretending.url) as (page, _):
        page.locator("#draw").click()
        page.get_by_text("prompt: is empty").wait_for()
        page.locator(".toast-close").click()
        page.locator(".toast-body").wait_for(state="detached")
        give(page, reference, "wait for ever")
        start(page, pretending, "wait for ever")
        page.get_by_text("softmax: step 3 of 3").wait_for()
        page.locator("#stop").click()
        pretending.wait_for("cancelled wait for ever")
        page.get_by_text("Stopped").wait_for()

        # Inpainting: a picture, and a stroke of the brush.
        page.locator("#prompt textarea").fill("a ball")
        page.get_by_text("Change a picture").click()
        put_picture(page, reference)
        canvas = page.locator("#picture canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 5, y + 5, steps=4)
        page.mouse.up()
        draw(page, pictures=1)
        page.locator("#used").get_by_label("mask.png").wait_for()

        # A page that is closed takes its job with it.
        start(page, pretending, "wait until I leave")
    pretending.wait_for("cancelled wait until I leave")
