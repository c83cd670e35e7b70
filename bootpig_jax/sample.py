"""Draws a subject in new scenes.

    python -m bootpig_jax.sample --model FOLDER --bootpig FOLDER --references a.png b.png \
        --prompt "a dog in the snow" --prompt "a dog on a beach" --output out/

Without `--references` the pictures come from the text alone. `out/` gets one PNG for each picture,
`PROMPT_IMAGE.png` counted from 0, and `contact_sheet.png`.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.checkpoints.diffusers import find_model
from bootpig_jax.checkpoints.tokenizer import load_tokenizer, tokenize_with_warnings
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.pipeline import (
    BootPIGPipeline,
    SamplingSettings,
    check_prompts,
    check_reference_count,
)
from bootpig_jax.sampling.references import SEGMENTERS, open_reference


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    defaults = SamplingSettings()
    parser = _Parser(prog="python -m bootpig_jax.sample", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder in diffusers' layout, or hub id")
    parser.add_argument(
        "--bootpig", help="folder with base_unet/ and ref_unet/; untrained without it"
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--references", nargs="+", metavar="FILE", help="pictures of the subject")
    parser.add_argument("--output", required=True, type=Path, help="folder, new or empty")
    parser.add_argument("--strategy", default=defaults.strategy, help=", ".join(STRATEGIES))
    parser.add_argument("--steps", type=int, default=defaults.num_inference_steps)
    parser.add_argument("--image-guidance", type=float, default=defaults.image_guidance_scale)
    parser.add_argument("--guidance", type=float, default=defaults.guidance_scale)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--num-images", type=int, default=defaults.num_images, help="for each prompt"
    )
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--solver", default=defaults.solver, help="unipc, ddim")
    parser.add_argument("--segmenter", default=defaults.segmenter, help=", ".join(SEGMENTERS))
    parser.add_argument("--height", type=int, help="in pixels; the model's own by default")
    parser.add_argument("--width", type=int, help="in pixels; the model's own by default")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open .bin weights too; only tensors are read"
    )
    parser.add_argument(
        "--strict", action="store_true", help="a prompt that is too long is an error"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks everything that needs no model, then loads it, draws and writes.

    Raises:
        UserError: something in the arguments is wrong; nothing has been written then.
    """
    options = parse_arguments(arguments)
    settings = SamplingSettings(
        num_inference_steps=options.steps,
        image_guidance_scale=options.image_guidance,
        guidance_scale=options.guidance,
        strategy=options.strategy,
        num_images=options.num_images,
        seed=options.seed,
        solver=options.solver,
        segmenter=options.segmenter,
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    prompts = check_prompts(options.prompt)
    if options.bootpig and not options.references:
        raise UserError("references: --bootpig needs at least one; give --references FILE ...")
    references: list[Image.Image] | None = None
    if options.references:
        check_reference_count(len(options.references))
        references = [open_reference(path) for path in options.references]

    with new_folder(options.output) as folder, _warnings_as_lines():
        model = find_model(options.model, allow_pickle=options.allow_pickle)
        if options.strict:
            tokenize_with_warnings(load_tokenizer(model / "tokenizer"), prompts, strict=True)
        _say(f"loading {model}")
        pipeline = BootPIGPipeline.from_pretrained(
            model, options.bootpig, allow_pickle=options.allow_pickle
        )
        _say("drawing; the first batch compiles the program")
        images = pipeline.draw(prompts, references, settings, progress=True)
        rows = []
        for p, prompt in enumerate(prompts):
            drawn = images[p * settings.num_images : (p + 1) * settings.num_images]
            for j, image in enumerate(drawn):
                _save(image, folder / f"{p:03d}_{j:02d}.png")
            left = [references] if references else []
            rows.append(Row(prompt, [*left, *([image] for image in drawn)]))
        titles = ["references"] if references else []
        sheet = folder / "contact_sheet.png"
        _save(contact_sheet(rows, titles), sheet)
        print(sheet)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes sure that `path` is an empty folder that can be written to, before the work starts.

    If the work fails before it writes anything, folders made here are removed again.

    Raises:
        UserError: it exists and is not empty, is a file, or cannot be written to.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"output: {path} exists and is not empty; name another folder")
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


def _save(image: Image.Image, path: Path) -> None:
    try:
        image.save(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output: cannot write {path} ({reason}); make room and retry") from error


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints this package's warnings as `warning: ...`, without the line of code they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
