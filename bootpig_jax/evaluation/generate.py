"""Draws a dataset's subjects with its prompts, into the layout that `score` reads.

    OUTPUT/<subject>/<number of the prompt>/<number of the picture>.png
    OUTPUT/about.json

All pictures of one subject and prompt are drawn by one call from one seed, so that a picture does
not depend on what was drawn before it, and `python -m bootpig_jax.sample` draws the same with that
prompt, references, seed and number of pictures. What is there is not drawn again: a run that was
stopped goes on with the same command, and jobs side by side take shares of the work.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from PIL import Image
from tqdm import tqdm

from bootpig_jax.checkpoints.diffusers import find_model
from bootpig_jax.checkpoints.identity import hash_model
from bootpig_jax.data.pictures import PictureError, open_picture, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, Subject
from bootpig_jax.evaluation.files import name_some, read_source
from bootpig_jax.evaluation.score import ABOUT, About, read_about
from bootpig_jax.files import write_whole
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.settings import SamplingSettings, check_reference_count

Method = Literal["bootpig", "text", "untrained", "ip-adapter"]
METHODS: tuple[str, ...] = get_args(Method)
NAMES: dict[str, str] = {
    "bootpig": "BootPIG",
    "text": "text alone",
    "untrained": "BootPIG before training",
    "ip-adapter": "IP-Adapter",
}
IP_ADAPTER_FILE = "models/ip-adapter_sd15.safetensors"
# Where a model lies does not matter: its hash is compared.
_NOT_COMPARED = {"command", "model", "bootpig"}


class Drawer(Protocol):
    """A method that draws pictures of a subject."""

    @property
    def use_references(self) -> bool:
        """Whether it is given real pictures of the subject."""
        ...

    def draw(self, prompt: str, references: Sequence[Image.Image]) -> list[Image.Image]:
        """Draws as many pictures of the prompt as each prompt is to have."""
        ...


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """What is drawn, whatever the method.

    Attributes:
        references: how many of a subject's real pictures the method is given; 0: all.
        template: what a prompt is put into, at `{}`, before it is drawn.
        shard: (i, n): every n-th pair of subject and prompt, from the i-th on, counted from 0.

    Raises:
        UserError: a field is wrong.
    """

    references: int = 0
    template: str = "{}"
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.references < 0:
            raise UserError(f"--references: must be 0 (all) or more, not {self.references}")
        if self.template.count("{}") != 1:
            raise UserError(f"--template: needs {{}} once for the prompt, not {self.template!r}")
        index, count = self.shard
        if not 0 <= index < count:
            raise UserError(f"--shard: must be I/N with I from 0 to N-1, not {index}/{count}")


@dataclasses.dataclass(frozen=True)
class BootPIGDrawer:
    """BootPIG, trained or not, or its text-to-image model alone.

    Attributes:
        pipeline: the model.
        settings: how it draws.
        use_references: whether it is given the references.
    """

    pipeline: BootPIGPipeline
    settings: SamplingSettings
    use_references: bool = True

    def draw(self, prompt: str, references: Sequence[Image.Image]) -> list[Image.Image]:
        """Draws `settings.num_images` pictures."""
        given = list(references) if self.use_references else None
        return self.pipeline.draw([prompt], given, self.settings)


@dataclasses.dataclass(frozen=True)
class IPAdapterDrawer:
    """diffusers' Stable Diffusion with an IP-Adapter, which is given the pictures as they are.

    Attributes:
        pipeline: diffusers' StableDiffusionPipeline with the adapter.
        settings: steps, guidance, seed, number of pictures, size, pictures at a time.
        use_references: always.
    """

    pipeline: Any
    settings: SamplingSettings
    use_references: bool = True

    def draw(self, prompt: str, references: Sequence[Image.Image]) -> list[Image.Image]:
        """Draws `settings.num_images` pictures; picture j from the generator of seed + j."""
        import torch

        how, drawn = self.settings, []
        upright = [Image.fromarray(to_rgb(reference)[0]) for reference in references]
        for start in range(0, how.num_images, how.batch_size):
            count = min(how.batch_size, how.num_images - start)
            # Generators on the CPU: the same pictures on every device.
            generators = [
                torch.Generator("cpu").manual_seed(how.seed + start + j) for j in range(count)
            ]
            drawn += self.pipeline(
                prompt,
                ip_adapter_image=[upright],
                num_inference_steps=how.num_inference_steps,
                guidance_scale=how.guidance_scale,
                height=how.height,
                width=how.width,
                num_images_per_prompt=count,
                generator=generators,
            ).images
        return drawn


def load_drawer(
    method: str,
    model: str,
    settings: SamplingSettings,
    *,
    bootpig: str | None = None,
    ip_adapter: str | None = None,
    ip_adapter_file: str = IP_ADAPTER_FILE,
    ip_adapter_scale: float = 0.6,
    allow_pickle: bool = False,
) -> tuple[Drawer, dict[str, Any]]:
    """Loads a method.

    Args:
        method: one of `METHODS`.
        model: the text-to-image model, a folder in diffusers' layout or a hub id.
        settings: how it draws.
        bootpig: for "bootpig": what training exports.
        ip_adapter: for "ip-adapter": a folder or hub id.
        ip_adapter_file: the adapter's weights in it; `image_encoder/` lies beside them.
        ip_adapter_scale: its strength.
        allow_pickle: whether pickled weights are opened; only tensors are read from them.

    Returns:
        The method, and what identifies its weights.

    Raises:
        UserError: an argument is missing or wrong, or a model can't be loaded.
    """
    if method not in METHODS:
        raise UserError(f"--method: {method!r} is not one of {', '.join(METHODS)}")
    if (method == "bootpig") != (bootpig is not None):
        raise UserError("--bootpig: names what training exports, for --method bootpig and no other")
    if (method == "ip-adapter") != (ip_adapter is not None):
        raise UserError("--ip-adapter: names a folder or hub id, for --method ip-adapter only")
    folder = find_model(model, allow_pickle=allow_pickle)
    digest = hash_model(folder, allow_pickle=allow_pickle)
    identity: dict[str, Any] = {"model": model, "model_sha256": digest}
    if ip_adapter is not None:
        pipeline = _load_ip_adapter(folder, ip_adapter, ip_adapter_file, allow_pickle)
        pipeline.set_ip_adapter_scale(ip_adapter_scale)
        identity |= {
            "ip_adapter": ip_adapter,
            "ip_adapter_file": ip_adapter_file,
            "ip_adapter_scale": ip_adapter_scale,
        }
        return IPAdapterDrawer(pipeline, settings), identity
    if bootpig is not None:
        identity |= {"bootpig": bootpig}
    loaded = BootPIGPipeline.from_pretrained(folder, bootpig, allow_pickle=allow_pickle)
    if bootpig is not None:
        identity |= {"bootpig_sha256": hash_model(Path(bootpig), allow_pickle=allow_pickle)}
    return BootPIGDrawer(loaded, settings, use_references=method != "text"), identity


def _load_ip_adapter(folder: Path, adapter: str, file: str, allow_pickle: bool) -> Any:
    if not file.endswith(".safetensors") and not allow_pickle:
        raise UserError(f"--ip-adapter-file: {file} is pickled; --allow-pickle reads its tensors")
    subfolder, _, name = file.rpartition("/")
    if Path(adapter).is_dir() and not (Path(adapter) / file).is_file():
        raise UserError(f"--ip-adapter: {Path(adapter) / file} is missing; see --ip-adapter-file")
    try:
        import torch
        from diffusers import StableDiffusionPipeline
    except ImportError:
        raise UserError(
            "--method ip-adapter needs torch and diffusers; pip install 'bootpig_jax[data-gen]'"
        ) from None
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=None if allow_pickle else True,
        )
        pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.load_ip_adapter(adapter, subfolder=subfolder, weight_name=name)
    except Exception as error:  # diffusers and the hub raise all kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--ip-adapter: {adapter} can't be loaded: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    dataset: Dataset,
    drawer: Drawer,
    output: Path,
    about: About,
    *,
    num_images: int,
    settings: GenerateSettings,
    progress: bool = False,
) -> int:
    """Draws what is not there yet.

    Args:
        dataset: the subjects and prompts.
        drawer: the method.
        output: the method's folder; what is in it must have the same `about`.
        about: what is said of the method; its `inputs` are filled in here.
        num_images: pictures that the drawer draws of a prompt.
        settings: what is drawn.
        progress: whether to show a bar on standard error.

    Returns:
        How many pictures were drawn.

    Raises:
        UserError: the folder holds other pictures, a reference is broken, or something can't be
            written.
    """
    inputs = {
        subject.name: tuple(
            r.name
            for r in subject.references[: settings.references or None]
            if drawer.use_references
        )
        for subject in dataset.subjects
    }
    write_about(output, dataset, about.model_copy(update={"inputs": inputs}))
    index, count = settings.shard
    units = [
        (subject, number) for subject in dataset.subjects for number in range(len(subject.prompts))
    ][index::count]
    missing = [
        (subject, number, paths)
        for subject, number in units
        if (paths := _missing(output, subject, number, num_images))
    ]
    done = sum(num_images for _ in units) - sum(len(paths) for _, _, paths in missing)
    if done:
        print(f"{done} pictures are there already", file=sys.stderr)
    drawn = 0
    references: tuple[str, list[Image.Image]] = ("", [])
    for subject, number, paths in tqdm(
        missing, desc="drawing", unit="prompt", disable=not progress, file=sys.stderr
    ):
        if references[0] != subject.name:
            references = subject.name, list(open_references(subject, inputs[subject.name]))
        prompt = settings.template.replace("{}", subject.prompts[number])
        pictures = drawer.draw(prompt, references[1])
        for j, path in paths.items():
            write_whole(path, _png(pictures[j]))
            drawn += 1
    return drawn


def write_about(output: Path, dataset: Dataset, about: About) -> None:
    """Writes `about.json`, or checks that what is there was drawn in the same way.

    A folder may grow by subjects: a run with a limit is a part of one without.

    Raises:
        UserError: the folder holds pictures that were drawn otherwise, or unknown ones.
    """
    about = About.model_validate_json(about.model_dump_json())  # tuples are lists in a file
    try:
        # Hidden: drafts of jobs that start at the same moment.
        present = {p.name for p in output.iterdir() if not p.name.startswith(".")}
    except FileNotFoundError:
        present = set()
    except OSError as error:
        raise UserError(f"--output: {output} cannot be used ({error.strerror})") from None
    if present and ABOUT not in present:
        raise UserError(f"--output: {output} holds something else; name another folder")
    if ABOUT in present:
        before = read_about(output)
        names = {subject.name for subject in dataset.subjects}
        inputs = dict(before.inputs or {})
        changed = [
            name
            for name in sorted((before.details.keys() | about.details.keys()) - _NOT_COMPARED)
            if before.details.get(name) != about.details.get(name)
        ]
        changed += ["method"] if before.method != about.method else []
        changed += [
            f"references of {name}"
            for name in sorted(names & inputs.keys())
            if inputs[name] != (about.inputs or {}).get(name)
        ]
        if changed:
            raise UserError(
                f"--output: {output} was drawn with another {name_some(changed)}; "
                "name another folder"
            )
        # The command that came first stays: jobs side by side differ in their share.
        about = before.model_copy(update={"inputs": inputs | (about.inputs or {})})
        if about == before:
            return
    write_whole(output / ABOUT, about.model_dump_json(indent=2) + "\n")


def open_references(subject: Subject, names: Sequence[str]) -> Iterator[Image.Image]:
    """Opens a subject's real pictures of the given names.

    Raises:
        UserError: one is broken.
    """
    for reference in subject.references:
        if reference.name in names:
            try:
                yield open_picture(io.BytesIO(read_source(reference.source)))
            except (OSError, PictureError) as error:
                raise UserError(f"{subject.name}/{reference.name}: {error}") from None


def check_dataset_references(dataset: Dataset, settings: GenerateSettings) -> None:
    """Refuses subjects with more references than the pipeline takes, before a model is loaded.

    Raises:
        UserError: there are too many.
    """
    for subject in dataset.subjects:
        check_reference_count(len(subject.references[: settings.references or None]))


def _missing(output: Path, subject: Subject, number: int, num_images: int) -> dict[int, Path]:
    """The pictures of a prompt that are not there, by their numbers."""
    folder = output / subject.name / f"{number:02d}"
    paths = {j: folder / f"{j:02d}.png" for j in range(num_images)}
    return {j: path for j, path in paths.items() if not path.exists()}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(to_rgb(image)[0]).save(buffer, "PNG")
    return buffer.getvalue()
