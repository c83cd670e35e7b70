"""The page to draw with, and models that draw nothing: `python -m tests.web_pages PORT`.

A server of its own, so that its functions are not wrapped by the tests' checks of shapes: Gradio
must see that the page's function is a generator. It prints what a job does, a line each:
`started PROMPT`, `cancelled PROMPT`. A job whose prompt begins with "wait" ends
when it is cancelled.
"""

import sys
import threading
from collections.abc import Iterator

from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.requests import Drawn, Progress
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.web.app import CSS, build_page
from bootpig_jax.web.drawing import DrawRequest, Models, OnStep, open_upload
from bootpig_jax.web.jobs import Cancelled
from bootpig_jax.web.server import private_folder, serve

STEP = 0.02  # seconds


def draw(request: DrawRequest, settings: SamplingSettings, on_step: OnStep) -> Iterator[Drawn]:
    first, *_ = [open_upload(path).convert("RGB") for path in request.references]
    print(f"started {request.prompt}", flush=True)
    step, steps = 0, settings.num_inference_steps
    try:
        while request.prompt.startswith("wait") or step < steps:
            step += 1
            on_step(Progress(1, 1, min(step, steps), steps))
            threading.Event().wait(STEP)
    except Cancelled:
        print(f"cancelled {request.prompt}", flush=True)
        raise
    for index in range(settings.num_images):
        picture = first.resize((32, 32)) if request.image is None else request.image
        yield Drawn(0, index, picture, Place(1, settings.num_images, index))


if __name__ == "__main__":
    with private_folder() as folder:
        page = build_page(
            draw, Models("model", "bootpig"), SamplingSettings(num_inference_steps=3), (), folder
        )
        serve(page, "127.0.0.1", int(sys.argv[1]), CSS)
