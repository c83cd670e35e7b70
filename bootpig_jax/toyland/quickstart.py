"""The whole of BootPIG in miniature: `python -m bootpig_jax.toyland.quickstart [key=value ...]`.

    data       a tiny Stable Diffusion draws captions, GrabCut finds the subjects   (data_gen)
    training   a Reference and a Base UNet, both copies of that model's UNet        (train)
    drawing    held-out subjects in new scenes, scored, and one picture             (evaluate)

Each stage writes to a folder of its name in `output_dir`. A stage whose folder is complete, and was
made from the same inputs, is not made again; one that was stopped goes on; one whose inputs have
changed starts over. `--fresh` starts all over.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import Field

from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.files import LocalPath
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.contact_sheet import Row, contact_sheet
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.toyland.evaluate import (
    SHIPPED_BOOTPIG,
    SHIPPED_MODEL,
    Method,
    Pictures,
    Report,
    draw_cases,
    format_table,
    sampling_settings,
    summarise,
)
from bootpig_jax.toyland.measures import Case, make_cases, score
from bootpig_jax.train import train
from bootpig_jax.yaml_config import ConfigModel, dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# What every subject of the picture is drawn with: (position, scene), in reading order.
PROMPTS = (
    ("on the left", "in the snow"),
    ("on the right", "on a sandy beach"),
    ("in the middle", "under the night sky"),
    ("in the middle", "in a kitchen"),
)

Count = Annotated[int, Field(ge=1)]


class QuickstartConfig(ConfigModel):
    """What `make quickstart` does. Every field can be overridden as `key=value`."""

    output_dir: LocalPath = Path("runs/quickstart")
    model: LocalPath = SHIPPED_MODEL
    """The text-to-image model that draws the data and that both UNets are copied from."""
    shipped: LocalPath = SHIPPED_BOOTPIG
    """A BootPIG that was trained at length on the same model, to compare with."""
    data_gen: LocalPath = CONFIGS / "data_gen_quickstart.yaml"
    train: LocalPath = CONFIGS / "quickstart.yaml"
    cases: Count = 96
    """Held-out cases that each way of drawing is scored on."""
    subjects: Annotated[int, Field(ge=1, le=24)] = 6
    """Held-out subjects in the picture."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    image_guidance_scale: Annotated[float, Field(ge=0, le=100)] = 3.0
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 3.0
    batch_size: Count = 24
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the cases and of the noise that they are drawn from."""


def quickstart(config: QuickstartConfig, *, fresh: bool = False) -> None:
    """Runs the stages that are not there yet, then prints the table and the picture's path.

    Args:
        config: where and how.
        fresh: whether to delete what an earlier run made.

    Raises:
        UserError: before the first stage, if a file is missing or a setting wrong; or from a stage.
    """
    # 1. What can be checked before minutes of work.
    settings = sampling_settings(
        steps=config.steps,
        image_guidance_scale=config.image_guidance_scale,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    model, shipped = hash_files(config.model), hash_files(config.shipped)
    folders = {name: config.output_dir / name for name in ("data", "training", "drawing")}
    generate = data_gen_command(config, folders["data"])
    data_inputs = run([*generate, "--print-config"]) + model
    train_config = load_config(
        TrainConfig,
        config.train,
        [
            f"model.base={json.dumps(str(config.model))}",
            f"data.dir={json.dumps(str(folders['data']))}",
            f"output_dir={json.dumps(str(folders['training']))}",
        ],
    )
    training_inputs = dump_config(train_config) + data_inputs
    drawing_inputs = config.model_dump_json() + shipped + training_inputs
    if fresh:
        for folder in folders.values():
            discard(folder)

    # 2. The stages.
    data_seconds = run_stage(
        folders["data"], data_inputs, "1/3 the data", lambda: run(generate, show=True)
    )
    training_seconds = run_stage(
        folders["training"], training_inputs, "2/3 training", lambda: run_training(train_config)
    )
    drawing_seconds = run_stage(
        folders["drawing"],
        drawing_inputs,
        "3/3 drawing and scoring",
        lambda: draw_and_score(config, settings, train_config, folders["drawing"]),
    )

    # 3. What came of it.
    report = Report.model_validate_json((folders["drawing"] / "report.json").read_text("utf-8"))
    print(f"\n{config.cases} held-out cases, 95 % intervals over cases\n")
    print(format_table(report.results))
    print(
        f"\ndata {data_seconds:.0f} s, training {training_seconds:.0f} s, "
        f"drawing and scoring {drawing_seconds:.0f} s; peak memory {peak_memory():.1f} GB"
    )
    print(f"the picture: {folders['drawing'] / 'picture.png'}")


def data_gen_command(config: QuickstartConfig, folder: Path) -> list[str]:
    """The command that makes the data: PyTorch, which must not share a process with JAX."""
    return [
        *(sys.executable, "-m", "data_gen.run", "--config", str(config.data_gen)),
        f"output_dir={json.dumps(str(folder))}",
        f"pictures.model={json.dumps(str(config.model))}",
    ]


def run(command: Sequence[str], *, show: bool = False) -> str:
    """Runs a command of ours, and returns what it prints unless `show` lets it through.

    Raises:
        UserError: it failed; it has said why on standard error.
    """
    done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{command[2]} failed with status {done.returncode}; see its message above")
    return done.stdout or ""


def run_training(config: TrainConfig) -> None:
    """Trains.

    Raises:
        UserError: it was asked to stop before its last update.
    """
    train(config)
    if not (config.output_dir / "ref_unet").is_dir():
        raise UserError("training: stopped before its end; the same command goes on from there")


def draw_and_score(
    config: QuickstartConfig, settings: SamplingSettings, trained: TrainConfig, folder: Path
) -> None:
    """Draws the cases in all four ways; writes `report.json` and `picture.png` to `folder`."""
    cases = make_cases(config.seed, config.cases)
    shown = picture_cases(config.seed + 1, config.subjects)
    after = BootPIGPipeline.from_pretrained(config.model, trained.output_dir)
    shipped = BootPIGPipeline.from_pretrained(config.model, config.shipped)
    before = untrained(config.model, after.conditioning)
    samples = trained.steps * trained.batch_size
    ways: list[tuple[str, str, BootPIGPipeline, Method]] = [
        ("text alone", "text alone", before, "text"),
        ("BootPIG before training", "before training", before, "bootpig"),
        (f"BootPIG after {samples:,} samples", "after these minutes", after, "bootpig"),
        ("BootPIG as shipped", "shipped", shipped, "bootpig"),
    ]
    results, columns = [], {}
    for name, title, pipeline, method in ways:
        say(name)
        started = time.monotonic()
        # Together: a batch of another size would be another program to compile.
        pictures = draw_cases(pipeline, [*cases, *shown], settings, method)
        seconds = time.monotonic() - started
        scores = score(pictures[: len(cases)], cases)
        count = 0 if method == "text" else 1
        results.append(summarise(name, scores, seconds, references=count))
        columns[title] = pictures[len(cases) :]
    folder.mkdir(parents=True, exist_ok=True)
    draw_picture(shown, columns).save(folder / "picture.png")
    report = Report(settings=settings, results=tuple(results))
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def untrained(model: Path, conditioning: Conditioning) -> BootPIGPipeline:
    """BootPIG before training, its references seen as they will be in training."""
    pipeline = BootPIGPipeline.from_pretrained(model)
    return BootPIGPipeline(pipeline.model, pipeline.reference_unet, conditioning)


def picture_cases(seed: int, subjects: int) -> list[Case]:
    """`PROMPTS` for each of some held-out subjects of different categories."""
    return [
        dataclasses.replace(case, position=position, scene=scene)
        for case in make_cases(seed, subjects)
        for position, scene in PROMPTS
    ]


def draw_picture(cases: Sequence[Case], columns: dict[str, Pictures]) -> Image.Image:
    """A row for each subject: its reference, then a tile for each prompt in every column.

    Args:
        cases: from `picture_cases`.
        columns: what was drawn of the cases, by title.
    """
    rows = []
    for first in range(0, len(cases), len(PROMPTS)):
        case = cases[first]
        cells = [
            [Image.fromarray(picture) for picture in pictures[first : first + len(PROMPTS)]]
            for pictures in columns.values()
        ]
        prompts = "; ".join(f"{position} {scene}" for position, scene in PROMPTS)
        reference = Image.fromarray(case.references[0].image)
        rows.append(Row(f"A photo of a {case.category}, {prompts}", [[reference], *cells]))
    return contact_sheet(rows, ["reference", *columns], cell=256)


# ---------------------------------------------------------------- stages


def run_stage(folder: Path, inputs: str, title: str, make: Callable[[], object]) -> float:
    """Makes a stage's folder unless it is there, complete and made from the same inputs.

    Args:
        folder: the stage's; `<folder>.stage.json` beside it says what it was made from.
        inputs: all that its content depends on.
        title: what is said of it.
        make: makes the content, or goes on where it was stopped.

    Returns:
        The seconds that making it took, over all runs that took part.
    """
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    stamp = read_stamp(folder)
    if stamp is not None and stamp.inputs != digest:
        say(f"{title}: its inputs have changed; starting over")
        discard(folder)
        stamp = None
    if stamp is not None and stamp.complete:
        say(f"{title}: already in {folder}")
        return stamp.seconds
    if stamp is None and folder.exists():
        raise UserError(
            f"output_dir: {folder} is there, but not from a quickstart; name another output_dir"
        )
    say(f"{title}{'' if stamp is None else ', going on'}: {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = 0.0 if stamp is None else stamp.seconds
    write_stamp(folder, Stamp(digest, complete=False, seconds=before))
    started, complete = time.monotonic(), False
    try:
        make()
        complete = True
    finally:
        seconds = before + time.monotonic() - started
        write_stamp(folder, Stamp(digest, complete, seconds))
    return seconds


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What is known of a stage's folder.

    Attributes:
        inputs: hash of what it is made from.
        complete: whether it is.
        seconds: that making it has taken so far.
    """

    inputs: str
    complete: bool
    seconds: float


def read_stamp(folder: Path) -> Stamp | None:
    """The stamp of a stage's folder, if it has one.

    Raises:
        UserError: the file is damaged.
    """
    path = stamp_path(folder)
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; delete it and {folder}") from None


def write_stamp(folder: Path, stamp: Stamp) -> None:
    """Writes the stamp: as a whole, however the process ends."""
    path = stamp_path(folder)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(dataclasses.asdict(stamp)) + "\n", encoding="utf-8")
    os.replace(draft, path)


def stamp_path(folder: Path) -> Path:
    """Where the stamp of a stage's folder lies."""
    return folder.with_name(f"{folder.name}.stage.json")


def discard(folder: Path) -> None:
    """Deletes a stage's folder, but never one that has no stamp: it would not be ours."""
    if stamp_path(folder).exists():
        shutil.rmtree(folder, ignore_errors=True)
        stamp_path(folder).unlink()


# ---------------------------------------------------------------- details


def hash_files(folder: Path) -> str:
    """Hashes the names and contents of all files under a model's folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: a folder with a model's weights should be there")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def peak_memory() -> float:
    """The most memory that this process or one of those it started has held, in GB."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e9


def say(message: str) -> None:
    """Prints a line of progress on standard error."""
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = QuickstartConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bootpig_jax.toyland.quickstart",
        usage="%(prog)s [--fresh] [key=value ...]",
        description="Makes data, trains BootPIG on it, draws and scores held-out subjects.",
        epilog="fields: " + ", ".join(f"{k}={v}" for k, v in defaults.model_dump().items()),
        allow_abbrev=False,
    )
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier run made")
    arguments, overrides = parser.parse_known_args(argv)
    quickstart(load_config(QuickstartConfig, None, overrides), fresh=arguments.fresh)


if __name__ == "__main__":
    run_cli(main)
