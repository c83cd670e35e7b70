"""Draws a subject in new scenes.

    python -m bootpig_jax.sample --model FOLDER --bootpig FOLDER --references a.png b.png \
        --prompt "a dog in the snow" --prompt "a dog on a beach" --output out/

Without `--references` the pictures come from the text alone. `out/` gets one PNG for each picture,
`PROMPT_IMAGE.png` counted from 0, and `contact_sheet.png`.

    python -m bootpig_jax.sample ... --image room.png --mask mask.png   (inpainting)
    python -m bootpig_jax.sample --model FOLDER --bootpig FOLDER --jobs jobs.jsonl --output out/
    python -m bootpig_jax.sample --from-png out/000_00.png --output again/
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from PIL import Image

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.checkpoints.diffusers import find_model, read_json
from bootpig_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.diffusion.solvers import SIGMAS, SOLVERS, SPACINGS
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import local_name, local_path
from bootpig_jax.models.unet import UNetConfig
from bootpig_jax.models.vae import VAEConfig
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.inpainting import open_original, read_original
from bootpig_jax.sampling.jobs import draw_jobs, named, plan_jobs, read_jobs
from bootpig_jax.sampling.picture_settings import (
    InputFile,
    PictureSettings,
    read_picture_settings,
    write_png,
)
from bootpig_jax.sampling.pipeline import BootPIGPipeline, check_texts, size_of, solver_of
from bootpig_jax.sampling.references import (
    SEGMENTERS,
    Segmenter,
    open_reference,
    reference_pictures,
)
from bootpig_jax.sampling.requests import Request
from bootpig_jax.sampling.settings import (
    SamplingSettings,
    check_original,
    check_prompts,
    check_reference_count,
    check_text,
)
from bootpig_jax.sampling.trained import BASE_UNET, check_bootpig

# What jobs say themselves, and what a picture's settings say once.
_NOT_WITH_JOBS = ("prompt", "references", "image", "mask", "save_references")
_NOT_WITH_FROM_PNG = ("num_images",)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line. Options that are not given are not in the result."""
    default = SamplingSettings()
    parser = _Parser(
        prog="python -m bootpig_jax.sample",
        usage="""
    %(prog)s --model FOLDER --bootpig FOLDER --references FILE ... --prompt TEXT --output DIR
    %(prog)s ... --image FILE --mask FILE                         (inpainting)
    %(prog)s --model FOLDER --bootpig FOLDER --jobs FILE --output DIR
    %(prog)s --from-png FILE --output DIR""",
        description="Draws a subject, shown by one to sixteen pictures, in new scenes.",
        epilog="Every PNG holds what it was drawn from; docs/sampling.md has examples.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--model",
        type=local_name,
        metavar="FOLDER",
        help="text-to-image model in diffusers' layout, or a hub id",
    )
    what.add_argument(
        "--bootpig",
        type=local_name,
        metavar="FOLDER",
        help="trained base_unet/ and ref_unet/; without it both are the model's",
    )
    what.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    what.add_argument(
        "--references", type=local_name, nargs="+", metavar="FILE", help="pictures of the subject"
    )
    what.add_argument(
        "--image",
        type=local_name,
        metavar="FILE",
        help="a picture to change, with --mask or --strength",
    )
    what.add_argument(
        "--mask",
        type=local_name,
        metavar="FILE",
        help="of its size: white is drawn anew, black stays",
    )
    what.add_argument(
        "--jobs",
        type=local_path,
        metavar="FILE",
        help="many subjects and prompts: one job a line, JSON",
    )
    what.add_argument(
        "--from-png",
        type=local_path,
        metavar="FILE",
        help="repeat a picture; other options override",
    )
    what.add_argument("--num-images", type=int, metavar="N", help="for each prompt; default 1")
    what.add_argument("--seed", type=int, metavar="N", help="of all noise; default 0")
    what.add_argument("--height", type=int, metavar="N", help="pixels; default: the model's own")
    what.add_argument("--width", type=int, metavar="N", help="likewise")

    out = parser.add_argument_group("where to")
    out.add_argument(
        "--output",
        required=True,
        type=local_path,
        metavar="DIR",
        help="new or empty; with --jobs also one to go on with",
    )
    out.add_argument(
        "--save-references",
        action="store_true",
        help="write references/NN.png too: what the model sees of them",
    )

    refs = parser.add_argument_group("references")
    refs.add_argument(
        "--segmenter",
        metavar="NAME",
        help=f"cuts the subject out: {', '.join(SEGMENTERS)}; default auto",
    )
    refs.add_argument(
        "--strategy",
        metavar="NAME",
        help=f"pools several: {', '.join(STRATEGIES)}; default {default.strategy}",
    )
    refs.add_argument(
        "--reference-scale",
        type=float,
        metavar="X",
        help="factor on their keys; default: as trained",
    )
    refs.add_argument(
        "--reference-caption",
        metavar="TEXT",
        help="text that is read with them: target (the prompt), first_clause, object, or words "
        "of your own; default: as trained",
    )
    refs.add_argument(
        "--reuse-features",
        type=int,
        metavar="N",
        help="see them anew at every Nth step only: faster, approximate; default 1",
    )

    how = parser.add_argument_group("how to draw")
    how.add_argument(
        "--steps",
        type=int,
        dest="num_inference_steps",
        metavar="N",
        help=f"default {default.num_inference_steps}",
    )
    how.add_argument(
        "--solver", metavar="NAME", help=f"{', '.join(SOLVERS)}; default {default.solver}"
    )
    how.add_argument(
        "--spacing",
        metavar="NAME",
        help=f"of the steps: {', '.join(SPACINGS)}; default: the model's",
    )
    how.add_argument(
        "--sigmas", metavar="NAME", help=f"noise levels: {', '.join(SIGMAS)}; default default"
    )
    how.add_argument(
        "--guidance",
        type=float,
        dest="guidance_scale",
        metavar="X",
        help=f"pull towards the prompt; default {default.guidance_scale}",
    )
    how.add_argument(
        "--image-guidance",
        type=float,
        dest="image_guidance_scale",
        metavar="X",
        help=f"pull towards the references; default {default.image_guidance_scale}",
    )
    how.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="part of the way from noise to picture that is guided; default 0 1",
    )
    how.add_argument(
        "--strength", type=float, metavar="X", help="part of --image drawn anew; default 1"
    )
    how.add_argument("--batch-size", type=int, metavar="N", help="drawn together; default 4")
    how.add_argument("--strict", action="store_true", help="a prompt that is too long is an error")
    how.add_argument(
        "--allow-pickle", action="store_true", help="open .bin weights too; only tensors are read"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks everything that needs no model, then loads it, draws and writes.

    Raises:
        UserError: something in the arguments is wrong; nothing has been written then.
    """
    given = vars(parse_arguments(arguments))
    for name in given.keys() & {"model", "bootpig"}:
        check_text(name, given[name])  # pictures record it
    use_compilation_cache()
    if "jobs" in given and "from_png" in given:
        raise UserError("jobs: does not go with --from-png; leave one out")
    with _warnings_as_lines():
        if "jobs" in given:
            run_jobs(given)
        elif "from_png" in given:
            repeat_picture(given)
        else:
            draw_prompts(given)


def draw_prompts(given: dict[str, Any]) -> None:
    """Draws every prompt with the same references."""
    _need(given, "model", "prompt")
    settings = _settings(SamplingSettings(), given)
    prompts = check_prompts(given["prompt"])
    inputs = _Inputs.of(given, settings)
    with new_folder(given["output"]) as folder:
        model = _Model.find(given)
        for text in prompts:
            model.check(text, settings)
        cut = inputs.cut_references(model, settings)
        pipeline = _load(model, given)
        if "save_references" in given:
            _save_references(cut, folder)
        record = PictureSettings(
            model=given["model"],
            bootpig=given.get("bootpig"),
            prompt=prompts[0],
            settings=settings,
            **inputs.files,
        )
        _say("drawing; the first batch compiles the program")
        pictures = {}
        for drawn in pipeline.draw_each(
            prompts,
            cut or None,
            _as_cut(settings),
            image=inputs.image,
            mask=inputs.mask,
            progress=True,
        ):
            p, j = drawn.prompt, drawn.image
            own = {"prompt": prompts[p], "prompt_index": p, "image_index": j, "place": drawn.place}
            path = folder / f"{p:03d}_{j:02d}.png"
            write_png(path, drawn.picture, record.model_copy(update=own))
            pictures[p, j] = drawn.picture
        left = {"references": inputs.references, "image": [inputs.image] if inputs.image else []}
        titles = [title for title, column in left.items() if column]
        rows = [
            Row(
                prompt,
                [left[title] for title in titles]
                + [[pictures[p, j]] for j in range(settings.num_images)],
            )
            for p, prompt in enumerate(prompts)
        ]
        sheet = folder / "contact_sheet.png"
        write_png(sheet, contact_sheet(rows, titles))
        print(sheet)


def repeat_picture(given: dict[str, Any]) -> None:
    """Draws the picture of a PNG again, with what is given on the command line changed."""
    for name in _NOT_WITH_FROM_PNG:
        if name in given:
            raise UserError(f"{name}: does not go with --from-png, which repeats one picture")
    if len(given.get("prompt", [""])) > 1:
        raise UserError("prompt: give one with --from-png, which repeats one picture")
    record, picture = read_picture_settings(given["from_png"])
    if "model" not in given and not Path(record.model).is_dir():
        # A picture from somebody else must not make this machine download things.
        raise UserError(
            f"model: {record.model!r}, which the picture was drawn with, is no folder here; "
            "give --model"
        )
    settings = _settings(record.settings, given)
    for name, files in (
        ("references", record.references),
        ("image", (record.image,)),
        ("mask", (record.mask,)),
    ):
        if name not in given:
            for file in files:
                if file is not None:
                    file.check(name)
    paths: dict[str, Any] = {"references": [file.path for file in record.references]}
    paths |= {
        name: file.path
        for name, file in (("image", record.image), ("mask", record.mask))
        if file is not None
    }
    given = {"model": record.model, "bootpig": record.bootpig} | paths | given
    inputs = _Inputs.of(given, settings)
    (prompt,) = check_prompts(given.get("prompt", [record.prompt]))
    place = Place(1, 1, 0) if "batch_size" in given else record.place
    with new_folder(given["output"]) as folder:
        model = _Model.find(given)
        model.check(prompt, settings)
        cut = inputs.cut_references(model, settings)
        pipeline = _load(model, given)
        if "save_references" in given:
            _save_references(cut, folder)
        request = inputs.request(pipeline, cut, prompt, settings, record.prompt_index)
        _say("drawing; the first batch compiles the program")
        drawn = pipeline.draw_batch(
            [request] * place.prompts,
            [record.image_index] * place.images,
            on_step=(lambda step, steps: None) if place.stepwise else None,
        )[place.row]
        fresh = PictureSettings(
            model=given["model"],
            bootpig=given["bootpig"],
            prompt=prompt,
            prompt_index=record.prompt_index,
            image_index=record.image_index,
            settings=settings,
            place=place,
            **inputs.files,
        )
        if fresh.draws_the_same_as(record) and place == record.place:
            same = np.array_equal(np.asarray(drawn), np.asarray(picture))
            _say(
                "the pixels are identical"
                if same
                else "warning: the pixels differ; the model, the machine or a version is another"
            )
        path = folder / f"{record.prompt_index:03d}_{record.image_index:02d}.png"
        write_png(path, drawn, fresh)
        print(path)


def run_jobs(given: dict[str, Any]) -> None:
    """Draws every job of a file; what is there already is not drawn again."""
    _need(given, "model")
    for name in _NOT_WITH_JOBS:
        if name in given:
            raise UserError(f"{name}: does not go with --jobs, whose lines say it")
    settings = _settings(SamplingSettings(), given)
    jobs = read_jobs(given["jobs"], settings)
    with existing_or_new_folder(given["output"]) as folder:
        planned = plan_jobs(jobs, folder, given["model"], given.get("bootpig"))
        left = [work.job for work in planned if not work.complete]
        _say(f"{len(jobs)} jobs, of which {len(jobs) - len(left)} are drawn already")
        if left:
            model = _Model.find(given)
            for job in left:
                with named(job):
                    model.check(job.prompt, job.settings)
            pipeline = _load(model, given)
            draw_jobs(pipeline, planned, folder, settings.batch_size)
        print(folder)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The pictures that were given, opened and hashed."""

    references: list[Image.Image]
    image: Image.Image | None
    mask: Image.Image | None
    files: dict[str, Any]

    @classmethod
    def of(cls, given: dict[str, Any], settings: SamplingSettings) -> "_Inputs":
        """Opens the files.

        Raises:
            UserError: one can't be used, or they do not go together.
        """
        check_original("image" in given, "mask" in given, settings)
        references = given.get("references", [])
        if given.get("bootpig") and not references:
            raise UserError("references: --bootpig needs at least one; give --references FILE ...")
        if references:
            check_reference_count(len(references))
        opened = [open_reference(path) for path in references]
        originals = {
            name: open_original(given[name], name) for name in ("image", "mask") if name in given
        }
        if "image" in originals:
            read_original(originals["image"], originals.get("mask"))
        files: dict[str, Any] = {name: InputFile.of(given[name]) for name in originals}
        return cls(
            references=opened,
            image=originals.get("image"),
            mask=originals.get("mask"),
            files={"references": tuple(map(InputFile.of, references)), **files},
        )

    def cut_references(self, model: "_Model", settings: SamplingSettings) -> list[Image.Image]:
        """What the model sees of the references.

        Raises:
            UserError: one can't be used; the message counts them from 1.
        """
        if not self.references:
            return []
        segmenter = cast(Segmenter, settings.segmenter)
        pixels = reference_pictures(self.references, *model.size(settings), segmenter)
        return [Image.fromarray(picture) for picture in pixels]

    def request(
        self,
        pipeline: BootPIGPipeline,
        cut: Sequence[Image.Image],
        prompt: str,
        settings: SamplingSettings,
        index: int,
    ) -> Request:
        """What a picture is drawn from; `cut` is from `cut_references`."""
        original = None
        if self.image is not None:
            original = pipeline.encode_original(self.image, self.mask, settings)
        latents = pipeline.encode_references(cut, _as_cut(settings)) if cut else None
        return Request(prompt, settings, index, latents, original)


def _need(given: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in given:
            raise UserError(f"{name}: missing; give --{name}, or --from-png")


def _settings(base: SamplingSettings, given: dict[str, Any]) -> SamplingSettings:
    names = {field.name for field in dataclasses.fields(SamplingSettings)}
    changed = {name: value for name, value in given.items() if name in names}
    if "guidance_interval" in changed:
        changed["guidance_interval"] = tuple(changed["guidance_interval"])
    return dataclasses.replace(base, **changed)


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a model says of itself in small files: mistakes show before the weights are loaded.

    Attributes:
        folder: in diffusers' layout.
        schedule: its noise schedule.
        tokenizer: its tokenizer.
        unet: of the UNet that draws.
        vae: of its VAE.
    """

    folder: Path
    schedule: NoiseSchedule
    tokenizer: Tokenizer
    unet: UNetConfig
    vae: VAEConfig

    @classmethod
    def find(cls, given: dict[str, Any]) -> "_Model":
        """Reads the files.

        Raises:
            UserError: there is no such model, or a file is missing or damaged.
        """
        folder = find_model(given["model"], allow_pickle="allow_pickle" in given)
        unet = folder / "unet"
        if given.get("bootpig"):
            check_bootpig(given["bootpig"])
            unet = Path(given["bootpig"]) / BASE_UNET
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return cls(
            folder=folder,
            schedule=NoiseSchedule.from_config(scheduler),
            tokenizer=load_tokenizer(folder / "tokenizer"),
            unet=UNetConfig.from_dict(read_json(unet / "config.json")),
            vae=VAEConfig.from_dict(read_json(folder / "vae" / "config.json")),
        )

    def size(self, settings: SamplingSettings) -> tuple[int, int]:
        """Height and width that are drawn; `UserError` if the model cannot."""
        return size_of(self.unet, self.vae, settings)

    def check(self, prompt: str, settings: SamplingSettings) -> None:
        """Raises `UserError` if a prompt or the settings do not suit the model."""
        solver_of(self.schedule, settings)
        self.size(settings)
        check_texts(self.tokenizer, [prompt], settings)


def _load(model: _Model, given: dict[str, Any]) -> BootPIGPipeline:
    _say(f"loading {model.folder}")
    return BootPIGPipeline.from_pretrained(
        model.folder, given.get("bootpig"), allow_pickle="allow_pickle" in given
    )


def _as_cut(settings: SamplingSettings) -> SamplingSettings:
    """The settings for references that are cut out already."""
    return dataclasses.replace(settings, segmenter="none")


def _save_references(cut: Sequence[Image.Image], folder: Path) -> None:
    """Writes what the model sees of the references, if there are any."""
    for number, picture in enumerate(cut):
        (folder / "references").mkdir(exist_ok=True)
        write_png(folder / "references" / f"{number:02d}.png", picture)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes sure that `path` is an empty folder that can be written to, before the work starts.

    If the work fails before it writes anything, folders made here are removed again.

    Raises:
        UserError: it exists and is not empty, is a file, or cannot be written to.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"output: {path} exists and is not empty; name another folder")
    except OSError as error:
        raise UserError(f"output: cannot read {path} ({error.strerror or error})") from None
    with existing_or_new_folder(path):
        yield path


@contextlib.contextmanager
def existing_or_new_folder(path: Path) -> Iterator[Path]:
    """Makes sure that `path` is a folder that can be written to, before the work starts.

    If the work fails before it writes anything, folders made here are removed again.

    Raises:
        UserError: it is a file or cannot be written to.
    """
    made = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        if path.exists() and not path.is_dir():
            raise UserError(f"output: {path} is a file; name a folder")
        path.mkdir(parents=True, exist_ok=True)
        # Only a write shows a read-only or full file system, also to root.
        probe = path / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output: cannot write to {path} ({reason}); name another") from None
    try:
        yield path
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints this package's warnings as `warning: ...`, each once, without the line of code."""
    said = set()

    def say_once(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:  # prompts are checked before the model is loaded, and after
            said.add(str(message))
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = say_once
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
