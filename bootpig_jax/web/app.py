"""The page to draw with.

    python -m bootpig_jax.app --model FOLDER --bootpig FOLDER

One job is drawn at a time, in the order in which they were asked for. A job ends when whoever asked
for it stops it or leaves. The pictures of a page that was closed are deleted after some hours; one
that was saved holds its settings, from which the page and `python -m bootpig_jax.sample --from-png`
draw it again.
"""

import asyncio
import dataclasses
import html
import secrets
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.checkpoints.diffusers import find_model
from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.diffusion.solvers import SIGMAS, SOLVERS
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import open_dataset
from bootpig_jax.evaluation.files import read_source
from bootpig_jax.files import local_name
from bootpig_jax.sampling.picture_settings import PictureSettings, read_picture_settings, write_png
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.references import SEGMENTERS
from bootpig_jax.sampling.requests import Drawn, Progress
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.web.drawing import (
    Draw,
    DrawRequest,
    Models,
    OnStep,
    Shown,
    Step,
    Tile,
    Used,
    describe,
    make_request,
    open_upload,
    write_files,
)
from bootpig_jax.web.jobs import Cancelled, Report, stream
from bootpig_jax.web.server import DELETE_UPLOADS, Parser, add_address, private_folder, serve

PORT = 7860
MAX_STEPS = 200
MAX_IMAGES = 8
NUM_EXAMPLES = 6
NUM_EXAMPLE_REFERENCES = 3
MAX_COLUMNS = 4
# For answers that need no place in the queue.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#progress progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
#progress p { margin: 0; min-height: 1.5em; }
#references .grid-wrap, #result .grid-wrap, #everything .grid-wrap { padding-top: 1.8rem; }
#examples .thumbnail-item { aspect-ratio: 1; }
#seed-row { align-items: end; }
#examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
"""


@dataclasses.dataclass(frozen=True)
class Example:
    """A subject to try: its pictures' files and a prompt."""

    references: tuple[str, ...]
    prompt: str


# ---------------------------------------------------------------- the page


def build_page(
    draw: Draw,
    models: Models,
    defaults: SamplingSettings,
    examples: Sequence[Example],
    folder: Path,
) -> gr.Blocks:
    """Makes the page.

    Args:
        draw: draws the pictures of a request with one of its settings.
        models: what it draws with.
        defaults: what the page's controls hold at first.
        examples: subjects to try.
        folder: where pictures are written to.
    """
    busy = threading.Lock()  # held by the one job that draws
    # By the page that asks, whether its job is to stop.
    stops: defaultdict[str | None, asyncio.Event] = defaultdict(asyncio.Event)
    with gr.Blocks(title="BootPIG", analytics_enabled=False, delete_cache=DELETE_UPLOADS) as page:
        gr.Markdown("# BootPIG\nOne thing in a few pictures, and a sentence: that thing, there.")
        shown, chosen = gr.State(Shown()), gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                references = _references()
                if examples:
                    gr.Markdown("or one of these:")
                    tried = _examples(examples)
                prompt = gr.Textbox(
                    label="Prompt",
                    elem_id="prompt",
                    lines=2,
                    max_length=1000,
                    placeholder="a dog in the snow",
                )
                strategies = gr.CheckboxGroup(
                    list(STRATEGIES),
                    value=[defaults.strategy],
                    label="Poolings of several references, side by side",
                    elem_id="strategies",
                )
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
                progress = gr.HTML(show_text(""), elem_id="progress")
                with gr.Accordion("Settings", open=True):
                    fields, new_seed = _fields(defaults)
                with gr.Accordion("Change a picture (inpainting)", open=False):
                    picture = _editor()
                    fields["strength"] = gr.Slider(
                        0.05,
                        1,
                        defaults.strength,
                        step=0.05,
                        label="Strength",
                        info="how much of what may change is drawn anew",
                    )
            with gr.Column(scale=3, min_width=400):
                result = _gallery("Drawn last", "result", MAX_COLUMNS, 360)
                everything = _gallery("All of this page, newest first", "everything", 6, 260)
                details = gr.JSON(
                    label="Settings of the chosen picture", elem_id="details", max_height=240
                )
                used = gr.File(
                    label="The picture and the mask that were used", visible=False, elem_id="used"
                )
                with gr.Row():
                    again = gr.Button("Use these settings", elem_id="again")
                    load = gr.UploadButton(
                        "Use those of a saved PNG", file_types=[".png"], elem_id="load"
                    )
        controls: list[Any] = [prompt, strategies, *fields.values()]

        # Gradio's own way to cancel a job lets its last steps, or an error, come after the end.
        async def on_press(asker: gr.Request) -> None:
            stops[asker.session_hash].clear()

        async def on_stop(asker: gr.Request) -> None:
            stops[asker.session_hash].set()

        async def on_leave(asker: gr.Request) -> None:
            stops.pop(asker.session_hash, asyncio.Event()).set()

        async def on_draw(
            asker: gr.Request,
            files: Any,
            edited: Any,
            before: Shown,
            text: str,
            names: list[str],
            *values: Any,
        ) -> AsyncIterator[dict[Any, Any]]:
            started = time.monotonic()
            now = Shown(before.pictures)
            try:
                given = dict(zip(fields, values, strict=True))
                request = make_request(text, files, names, edited, given)

                def work(report: Report[Step | Used | list[Tile]]) -> None:
                    with busy:
                        run_job(draw, request, models, folder, report)

                latest: dict[Any, Any] = {
                    result: [],
                    shown: now,
                    used: gr.File(None, visible=False),
                }
                yield {progress: show_text("Getting ready"), **latest}
                async for event in stream(work, stops[asker.session_hash]):
                    if isinstance(event, Step):
                        yield {progress: show_step(event)}
                        continue
                    if isinstance(event, Used):
                        latest[used] = gr.File(list(event.paths), visible=True)
                    else:
                        now = now.add(event)
                        columns = min(MAX_COLUMNS, max(len(event), len(names)))
                        latest |= {
                            shown: now,
                            result: gr.Gallery(captioned(now.last), columns=columns),
                            everything: captioned(now.pictures),
                        }
                    yield latest
            except Cancelled:
                yield {progress: show_text("Stopped")}
                return
            except UserError as error:
                yield {progress: show_text("")}
                raise gr.Error(str(error), title="Not drawn", print_exception=False) from None
            seconds = time.monotonic() - started
            # All of it again: the browser can lose one of two updates that come close together.
            yield {progress: show_text(f"{len(now.last)} drawn in {seconds:.1f} s"), **latest}

        def on_load(file: str) -> dict[Any, Any]:
            try:
                settings, _ = read_picture_settings(file)
            except UserError as error:
                # Not the name that the file has on the server.
                message = str(error).removeprefix(f"{file}: ")
                raise gr.Error(message, title="Not read", print_exception=False) from None
            return fill(settings)

        def fill(settings: PictureSettings | None) -> dict[Any, Any]:
            if settings is None:
                raise gr.Error("choose a picture first", print_exception=False)
            if missing := list_others(settings.settings, fields):
                gr.Warning(f"this page has no control for {missing}; see sample --from-png")
            return {
                prompt: settings.prompt,
                strategies: [settings.settings.strategy],
                chosen: settings,
                details: settings.model_dump(mode="json"),
                **{
                    # The one that may be None, in a text box.
                    control: "" if (value := getattr(settings.settings, name)) is None else value
                    for name, control in fields.items()
                },
            }

        def choose(pictures: Sequence[Tile], index: int) -> dict[Any, Any]:
            settings = pictures[index].settings
            return {chosen: settings, details: settings.model_dump(mode="json")}

        def choose_last(now: Shown, event: gr.SelectData) -> dict[Any, Any]:
            return choose(now.last, event.index)

        def choose_any(now: Shown, event: gr.SelectData) -> dict[Any, Any]:
            return choose(now.pictures, event.index)

        start.click(on_press, **QUICK).then(
            on_draw,
            [references, picture, shown, *controls],
            [progress, result, everything, shown, used],
            show_progress="hidden",
            trigger_mode="once",
            api_name="draw",
        )
        stop.click(on_stop, **QUICK)
        page.unload(on_leave)
        new_seed.click(lambda: secrets.randbelow(2**32), None, fields["seed"], **QUICK)
        result.select(choose_last, shown, [chosen, details], **QUICK)
        everything.select(choose_any, shown, [chosen, details], **QUICK)
        again.click(fill, chosen, [*controls, chosen, details], **QUICK)
        load.upload(on_load, load, [*controls, chosen, details], **QUICK)
        if examples:

            def try_example(event: gr.SelectData) -> dict[Any, Any]:
                example = examples[event.index]
                return {references: list(example.references), prompt: example.prompt}

            tried.select(try_example, None, [references, prompt], **QUICK)
    return page


def _references() -> gr.Gallery:
    return gr.Gallery(
        label="References: pictures of the thing",
        elem_id="references",
        interactive=True,
        file_types=["image"],
        sources=["upload", "clipboard"],
        columns=3,
        height=220,
        object_fit="contain",
        buttons=[],
    )


def _examples(examples: Sequence[Example]) -> gr.Gallery:
    return gr.Gallery(
        [example.references[0] for example in examples],
        label="Subjects to try",
        show_label=False,
        elem_id="examples",
        columns=len(examples),
        height=112,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )


def _gallery(label: str, name: str, columns: int, height: int) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        elem_id=name,
        columns=columns,
        fit_columns=False,
        height=height,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def _editor() -> gr.ImageEditor:
    return gr.ImageEditor(
        label="Give a picture and paint over what is to be drawn anew; unpainted, all of it is",
        elem_id="picture",
        type="pil",
        sources=["upload", "clipboard"],
        transforms=(),
        layers=False,
        brush=gr.Brush(colors=["#ff3d9a"], color_mode="fixed"),
        buttons=[],
        height=360,
    )


def _fields(defaults: SamplingSettings) -> tuple[dict[str, Any], gr.Button]:
    """The controls by the setting's name, and the button for a new seed."""
    fields: dict[str, Any] = {}
    fields["negative_prompt"] = gr.Textbox(
        defaults.negative_prompt,
        label="Negative prompt",
        placeholder="what the picture should not show",
        max_length=1000,
    )
    with gr.Row(elem_id="seed-row"):
        fields["seed"] = gr.Number(
            defaults.seed,
            label="Seed",
            elem_id="seed",
            precision=0,
            minimum=0,
            maximum=2**32 - 1,
            min_width=160,
        )
        new_seed = gr.Button("New seed", min_width=100)
    with gr.Row():
        fields["num_images"] = gr.Slider(
            1, MAX_IMAGES, defaults.num_images, step=1, label="Pictures each"
        )
        fields["num_inference_steps"] = gr.Slider(
            1, MAX_STEPS, defaults.num_inference_steps, step=1, label="Steps", elem_id="steps"
        )
    with gr.Row():
        fields["guidance_scale"] = gr.Slider(
            0, 20, defaults.guidance_scale, step=0.1, label="Text guidance"
        )
        fields["image_guidance_scale"] = gr.Slider(
            0, 20, defaults.image_guidance_scale, step=0.1, label="Image guidance"
        )
    with gr.Row():
        fields["solver"] = gr.Dropdown(list(SOLVERS), value=defaults.solver, label="Solver")
        fields["sigmas"] = gr.Dropdown(list(SIGMAS), value=defaults.sigmas, label="Noise levels")
    with gr.Row():
        fields["segmenter"] = gr.Dropdown(
            list(SEGMENTERS), value=defaults.segmenter, label="Cut-out of references"
        )
        fields["reference_scale"] = gr.Textbox(
            "", label="Reference scale", placeholder="as trained", max_length=10
        )
    return fields, new_seed


def show_text(text: str) -> str:
    """A line of text where progress is shown."""
    return f"<p>{html.escape(text)}</p>"


def show_step(step: Step) -> str:
    """A bar, and in words how far a job is."""
    bar = f'<progress value="{step.done}" max="{step.total}"></progress>'
    return show_text(f"{step.strategy}: step {step.done} of {step.total}") + bar


def captioned(pictures: Sequence[Tile]) -> list[tuple[str, str]]:
    """Pictures as a gallery takes them."""
    return [(picture.path, picture.caption) for picture in pictures]


def list_others(settings: SamplingSettings, names: Collection[str]) -> str:
    """The settings that are not the default and that the page, with controls `names`, lacks."""
    default, values = (dataclasses.asdict(each) for each in (SamplingSettings(), settings))
    # The last two change no picture.
    others = sorted(default.keys() - {*names, "strategy", "batch_size", "strict"})
    return ", ".join(f"{name} = {values[name]}" for name in others if values[name] != default[name])


# ---------------------------------------------------------------- the work


def run_job(
    draw: Draw,
    request: DrawRequest,
    models: Models,
    folder: Path,
    report: Report[Step | Used | list[Tile]],
) -> None:
    """Draws all of a request, one pooling after the other; writes and reports the pictures.

    Raises:
        Cancelled: by `report`, when nobody waits any more.
    """
    folder = folder / "drawn" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    files = write_files(request, folder)
    if request.image is not None:
        report(Used(tuple(str(path) for path in sorted(folder.iterdir()))))
    for settings in request.settings:

        def on_step(now: Progress, name: str = settings.strategy) -> None:
            done = (now.batch - 1) * now.steps + now.step
            report(Step(name, done, now.batches * now.steps))

        tiles = []
        for drawn in draw(request, settings, on_step):
            caption = f"{settings.strategy}, seed {settings.seed}"
            if settings.num_images > 1:
                caption += f", picture {drawn.image + 1}"
            made_from = describe(request, settings, files, models, drawn)
            path = folder / f"{settings.strategy}_{settings.seed}_{drawn.image}.png"
            write_png(path, drawn.picture, made_from)
            tiles.append(Tile(str(path), caption, made_from))
        report(tiles)


def draw_with(pipeline: BootPIGPipeline) -> Draw:
    """Draws with a pipeline."""

    def draw(request: DrawRequest, settings: SamplingSettings, on_step: OnStep) -> Iterator[Drawn]:
        return pipeline.draw_each(
            request.prompt,
            [open_upload(path) for path in request.references],
            settings,
            image=request.image,
            mask=request.mask,
            callback=on_step,
        )

    return draw


# ---------------------------------------------------------------- the command line


def load_examples(name: str, folder: Path) -> list[Example]:
    """The first subjects of a dataset: `toyland`, or a folder as `evaluate` takes it.

    Args:
        name: "toyland" or the folder.
        folder: where pictures are written to that are in no file yet.

    Raises:
        UserError: the folder is not laid out as it should be.
    """
    dataset = (
        open_dataset("toyland", None) if name == "toyland" else open_dataset("folder", Path(name))
    )
    examples = []
    for subject in dataset.subjects[:NUM_EXAMPLES]:
        paths = []
        for reference in subject.references[:NUM_EXAMPLE_REFERENCES]:
            path = folder / "examples" / subject.name / reference.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_source(reference.source))
            paths.append(str(path))
        examples.append(Example(tuple(paths), subject.prompts[0]))
    return examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads the models and serves the page.

    Raises:
        UserError: an argument is wrong, or the models can't be loaded.
    """
    default = SamplingSettings()
    parser = Parser(prog="python -m bootpig_jax.app", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=local_name, required=True, help="folder in diffusers' layout, or hub id"
    )
    parser.add_argument(
        "--bootpig",
        type=local_name,
        help="folder with base_unet/ and ref_unet/; untrained without it",
    )
    parser.add_argument("--steps", type=int, default=default.num_inference_steps)
    parser.add_argument("--image-guidance", type=float, default=default.image_guidance_scale)
    parser.add_argument("--guidance", type=float, default=default.guidance_scale)
    parser.add_argument(
        "--examples", type=local_name, help='subjects to try: "toyland", or a folder of folders'
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open .bin weights too; only tensors are read"
    )
    add_address(parser, PORT)
    options = parser.parse_args(arguments)
    settings = SamplingSettings(
        num_inference_steps=options.steps,
        image_guidance_scale=options.image_guidance,
        guidance_scale=options.guidance,
    )
    use_compilation_cache()
    with private_folder() as folder:
        examples = load_examples(options.examples, folder) if options.examples else []
        model = find_model(options.model, allow_pickle=options.allow_pickle)
        pipeline = BootPIGPipeline.from_pretrained(
            model, options.bootpig, allow_pickle=options.allow_pickle
        )
        models = Models(options.model, options.bootpig)
        page = build_page(draw_with(pipeline), models, settings, examples, folder)
        serve(page, options.host, options.port, CSS)
