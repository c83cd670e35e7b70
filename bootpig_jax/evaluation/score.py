"""Scores a folder of pictures, whoever drew them.

    FOLDER/<subject>/<number of the prompt, from 0>/<any name>.png
    FOLDER/about.json       optional: the method's name and which real pictures it was given

The result is a `MethodScores`: every picture's values, their means and intervals, what was left
out, and the protocol card.
"""

import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from jaxtyping import Float
from tqdm import tqdm

from bootpig_jax.data.pictures import PictureError
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation import metrics
from bootpig_jax.evaluation.datasets import Dataset, Reference, Subject
from bootpig_jax.evaluation.embedders import (
    MASKED,
    Broken,
    Embedder,
    EmbeddingCache,
    Variant,
    decode,
    embed_pictures,
    preprocess,
)
from bootpig_jax.evaluation.files import list_folders, list_pictures, name_some
from bootpig_jax.evaluation.lpips import Lpips
from bootpig_jax.evaluation.protocol import Card, Environment, read_platform, read_versions
from bootpig_jax.toyland.measures import nearest_scene, subject_rank
from bootpig_jax.toyland.render import SIZE
from bootpig_jax.toyland.world import SCENES
from bootpig_jax.yaml_config import ConfigModel

ABOUT = "about.json"
REAL = "the real pictures"
TEMPLATE = "{}"

Embedding = Float[np.ndarray, " d"]
Embeddings = dict[str, Embedding]  # by the key of a picture


class About(ConfigModel):
    """What a method's folder says of itself in `about.json`.

    Attributes:
        method: its name in tables.
        inputs: subject's name -> names of the real pictures that the method was given. Without it
            there are no scores against unseen pictures.
        details: anything: settings, model, command.
    """

    method: str | None = None
    inputs: dict[str, tuple[str, ...]] | None = None
    details: dict[str, Any] = {}


class PictureScore(ConfigModel):
    """A picture's values.

    Attributes:
        subject: whose it is.
        prompt: the prompt's number.
        file: its path in the method's folder.
        values: by measure.
        near_input: the name of the input that it is nearer to than any two real pictures of the
            subject are to each other.
    """

    subject: str
    prompt: int
    file: str
    values: dict[str, float]
    near_input: str | None = None


class LeftOut(ConfigModel):
    """A picture that was not scored, and why."""

    file: str
    reason: str


class Summary(ConfigModel):
    """A measure over all pictures.

    Attributes:
        mean: over subjects.
        interval: its 95 % bootstrap interval over subjects; None for a single subject.
        pictures: how many have the value.
        subjects: each subject's mean.
    """

    mean: float
    interval: tuple[float, float] | None
    pictures: int
    subjects: dict[str, float]


class MethodScores(ConfigModel):
    """How a method scored.

    Attributes:
        method: its name.
        folder: where its pictures are; None for the real pictures.
        about: what the folder says of itself.
        card: the protocol.
        environment: where it was computed.
        summary: by measure.
        pictures: one by one.
        left_out: broken pictures: in no figure.
        no_foreground: pictures that are in no masked figure.
        missing: prompts without a picture, `subject/number`.
    """

    method: str
    folder: str | None
    about: About
    card: Card
    environment: Environment
    summary: dict[str, Summary]
    pictures: tuple[PictureScore, ...]
    left_out: tuple[LeftOut, ...] = ()
    no_foreground: tuple[LeftOut, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def near_inputs(self) -> int:
        """How many pictures are suspected to be copied from an input."""
        return sum(picture.near_input is not None for picture in self.pictures)


@dataclass(frozen=True)
class Generated:
    """A generated picture.

    Attributes:
        subject: whose it is.
        prompt: the prompt's number.
        path: its file.
        key: its path in the method's folder.
    """

    subject: str
    prompt: int
    path: Path
    key: str


@dataclass(frozen=True)
class Settings:
    """How to score.

    Attributes:
        masked: whether foregrounds are scored too.
        template: what a prompt is put into, at `{}`, before CLIP reads it.
        batch_size: pictures that go through a model together.
        workers: threads that read pictures.
        allow_missing: whether prompts may lack pictures.
        progress: whether to show bars on standard error.
        command: to be recorded.

    Raises:
        UserError: a field is wrong.
    """

    masked: bool = False
    template: str = TEMPLATE
    batch_size: int = 32
    workers: int = 2
    allow_missing: bool = False
    progress: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.batch_size < 1 or self.workers < 1:
            raise UserError("--batch-size, --workers: must be at least 1")
        if self.template.count("{}") != 1:
            raise UserError(f"--template: needs {{}} once for the prompt, not {self.template!r}")


def read_about(folder: Path) -> About:
    """Reads a method folder's `about.json`, if there is one.

    Raises:
        UserError: it is damaged.
    """
    path = folder / ABOUT
    if not path.exists():
        return About()
    try:
        return About.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: is not as it should be: {_first_mistake(error)}") from None


def find_pictures(
    dataset: Dataset, folder: Path, *, known: Iterable[str] = (), allow_missing: bool = False
) -> tuple[list[Generated], tuple[str, ...]]:
    """All pictures of a method, by subject, prompt and name.

    Args:
        dataset: whose subjects and prompts they are of.
        folder: the method's.
        known: further subjects that the folder may hold, and that are left aside: those beyond a
            limit.
        allow_missing: whether prompts may lack pictures.

    Returns:
        The pictures, and the prompts without any, `subject/number`.

    Raises:
        UserError: no pictures; subjects or prompts that the dataset does not have; or prompts
            without pictures.
    """
    if not folder.is_dir():
        raise UserError(f"--pictures: {folder} is no folder")
    subjects = {subject.name: subject for subject in dataset.subjects}
    folders = {path.name: path for path in list_folders(folder)}
    unknown = sorted(folders.keys() - subjects.keys() - set(known))
    if unknown:
        raise UserError(
            f"{folder}: {dataset.name} has no subject {name_some(unknown)}; "
            f"its subjects are {name_some(subjects)}"
        )
    found: list[Generated] = []
    missing: list[str] = []
    for name, subject in subjects.items():
        prompts: dict[int, Path] = {}
        for path in list_folders(folders[name]) if name in folders else []:
            if not re.fullmatch(r"[0-9]{1,6}", path.name):
                raise UserError(f"{path}: a folder in a subject's is a prompt's number, from 0")
            if int(path.name) in prompts:
                raise UserError(f"{path}: is the same prompt as {prompts[int(path.name)].name}")
            prompts[int(path.name)] = path
        if not known and prompts and max(prompts) >= len(subject.prompts):
            raise UserError(
                f"{folders[name]}: has no prompt {max(prompts)}; "
                f"{name} has {len(subject.prompts)}, counted from 0"
            )
        for number in range(len(subject.prompts)):
            paths = list_pictures(prompts[number]) if number in prompts else []
            if not paths:
                missing.append(f"{name}/{number}")
            found += [
                Generated(name, number, path, path.relative_to(folder).as_posix()) for path in paths
            ]
    if not found:
        raise UserError(f"{folder}: holds no pictures as <subject>/<number of the prompt>/*.png")
    if missing and not allow_missing:
        raise UserError(
            f"{folder}: no pictures for {name_some(missing)}; draw them, or take --allow-missing"
        )
    return found, tuple(missing)


def score_folder(
    full: Dataset,
    folder: Path,
    embedders: Sequence[Embedder],
    *,
    limit: int | None = None,
    cache: EmbeddingCache,
    settings: Settings,
    lpips: Lpips | None = None,
) -> MethodScores:
    """Scores a method's folder.

    Args:
        full: the dataset.
        folder: the method's pictures.
        embedders: models; Toyland has measures of its own and needs none.
        limit: how many subjects and prompts of the dataset are scored.
        cache: where embeddings are kept.
        settings: how.
        lpips: the model of a further measure of diversity.

    Raises:
        UserError: the folder does not fit the dataset, or nothing can be scored.
    """
    dataset = full.limited(limit)
    if not embedders and not dataset.toyland:
        raise UserError("--embedder: name at least one; only Toyland has measures that need none")
    about = read_about(folder)
    known = () if limit is None else [subject.name for subject in full.subjects]
    generated, missing = find_pictures(
        dataset, folder, known=known, allow_missing=settings.allow_missing
    )
    inputs = _check_inputs(dataset, about, folder)
    per_prompt = Counter((picture.subject, picture.prompt) for picture in generated)
    card = _card(dataset, limit, embedders, settings, max(per_prompt.values()), lpips)
    tables = _Tables()
    if dataset.toyland:
        _score_toyland(dataset, generated, tables)
    for number, embedder in enumerate(embedders):
        _score_model(
            dataset, generated, inputs, embedder, cache, settings, tables, first=not number
        )
    if lpips is not None:
        _add_lpips(generated, lpips, settings, tables)
    good = [picture for picture in generated if picture.key not in tables.broken]
    empty = sorted({p.subject for p in generated} - {p.subject for p in good})
    if not good or (empty and not settings.allow_missing):
        raise UserError(f"{folder}: every picture of {name_some(empty)} is broken; draw them again")
    pictures = tuple(
        PictureScore(
            subject=picture.subject,
            prompt=picture.prompt,
            file=picture.key,
            values=tables.values[picture.key],
            near_input=tables.near_input.get(picture.key),
        )
        for picture in good
    )
    return MethodScores(
        method=about.method or folder.resolve().name,
        folder=str(folder),
        about=about,
        card=card,
        environment=_environment(settings),
        summary=summarise(pictures),
        pictures=pictures,
        left_out=_left_out(tables.broken),
        no_foreground=_left_out(tables.no_foreground, besides=tables.broken),
        missing=missing,
    )


def score_real(
    full: Dataset,
    embedders: Sequence[Embedder],
    *,
    limit: int | None = None,
    cache: EmbeddingCache,
    settings: Settings,
) -> MethodScores:
    """Scores the real pictures of each subject against its others: the sanity check.

    Beside the mean over pairs of different pictures stands, as "... (with itself)", the one over
    all pairs, in which each picture also meets itself; with `settings.masked` also those of the
    foregrounds.

    Raises:
        UserError: no subject has two pictures, or no model is named.
    """
    if not embedders:
        raise UserError("--embedder: the sanity check needs at least one")
    dataset = full.limited(limit)
    card = _card(dataset, limit, embedders, settings, 0)
    reasons: dict[Variant, dict[str, str]] = {"whole": {}}
    if settings.masked:
        reasons["masked"] = {}
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for embedder, variant in itertools.product(embedders, reasons):
        real = _embed_references(dataset, embedder, variant, cache, settings, reasons[variant])
        for subject in dataset.subjects:
            found = real[subject.name]
            if len(found) < 2:
                continue
            stacked = np.stack(list(found.values()))
            for with_itself in (False, True):
                label = embedder.spec.label + (" masked" if variant == "masked" else "")
                label += " (with itself)" if with_itself else ""
                for name, value in zip(
                    found, metrics.real_similarity(stacked, with_itself=with_itself), strict=True
                ):
                    values[f"{subject.name}/{name}"][label] = float(value)
    if not values:
        raise UserError("no subject has two pictures: the real ones can't be compared")
    pictures = tuple(
        PictureScore(subject=key.split("/")[0], prompt=0, file=key, values=values[key])
        for key in values
    )
    return MethodScores(
        method=REAL,
        folder=None,
        about=About(method=REAL),
        card=card,
        environment=_environment(settings),
        summary=summarise(pictures),
        pictures=pictures,
        left_out=_left_out(reasons["whole"]),
        no_foreground=_left_out(reasons.get("masked", {}), besides=reasons["whole"]),
    )


def summarise(pictures: Sequence[PictureScore]) -> dict[str, Summary]:
    """The mean of each measure over subjects, with its interval."""
    values: dict[str, dict[str, list[float]]] = {}
    for picture in pictures:
        for name, value in picture.values.items():
            values.setdefault(name, {}).setdefault(picture.subject, []).append(value)
    result = {}
    for name, by_subject in values.items():
        means = metrics.subject_means(by_subject)
        result[name] = Summary(
            mean=float(np.mean(list(means.values()))),
            interval=metrics.bootstrap_interval(list(means.values())),
            pictures=sum(map(len, by_subject.values())),
            subjects=means,
        )
    return result


# ---------------------------------------------------------------- the parts of a score


class _Tables:
    """What is found out about pictures, by their keys, model after model."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = defaultdict(dict)
        self.broken: dict[str, str] = {}
        self.no_foreground: dict[str, str] = {}
        self.near_input: dict[str, str] = {}

    def add(self, name: str, pictures: Sequence[Generated], values: Iterable[float]) -> None:
        for picture, value in zip(pictures, values, strict=True):
            self.values[picture.key][name] = float(value)


def _left_out(reasons: Mapping[str, str], besides: Collection[str] = ()) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(file=key, reason=reasons[key]) for key in sorted(reasons) if key not in besides
    )


def _score_model(
    dataset: Dataset,
    generated: Sequence[Generated],
    inputs: Mapping[str, Sequence[str]] | None,
    embedder: Embedder,
    cache: EmbeddingCache,
    settings: Settings,
    tables: _Tables,
    *,
    first: bool,
) -> None:
    """Adds a model's values; the first model also looks for copies."""
    label = embedder.spec.label
    found = _embed_generated(generated, embedder, "whole", cache, settings, tables.broken)
    real = _embed_references(dataset, embedder, "whole", cache, settings, tables.broken)
    empty = [name for name, embeddings in real.items() if not embeddings]
    if empty:
        raise UserError(f"{name_some(empty)}: every real picture is broken; get the dataset anew")
    by_subject = _group(generated, found)
    _add_similarity(label, by_subject, found, real, inputs, tables)
    if first:
        _look_for_copies(by_subject, found, real, inputs, tables)
    _add_diversity(label, generated, found, tables)
    _add_gallery(label, by_subject, found, real, tables)
    if embedder.spec.text_label:
        _add_texts(dataset, by_subject, found, embedder, settings, tables)
    if settings.masked:
        found = _embed_generated(
            [p for p in generated if p.key in found],
            embedder,
            "masked",
            cache,
            settings,
            tables.no_foreground,
        )
        real = _embed_references(dataset, embedder, "masked", cache, settings, tables.no_foreground)
        by_subject = _group(generated, found)
        _add_similarity(f"{label} masked", by_subject, found, real, inputs, tables)


def _add_similarity(
    label: str,
    by_subject: Mapping[str, Sequence[Generated]],
    found: Embeddings,
    real: Mapping[str, Embeddings],
    inputs: Mapping[str, Sequence[str]] | None,
    tables: _Tables,
) -> None:
    """The similarity to all real pictures, and to those that the method was not given."""
    for name, pictures in by_subject.items():
        compared = {label: list(real[name])}
        if inputs is not None:
            compared[f"{label} unseen"] = [key for key in real[name] if key not in inputs[name]]
        vectors = np.stack([found[picture.key] for picture in pictures])
        for measure, keys in compared.items():
            if keys:
                against = np.stack([real[name][key] for key in keys])
                tables.add(measure, pictures, metrics.image_similarity(vectors, against))


def _look_for_copies(
    by_subject: Mapping[str, Sequence[Generated]],
    found: Embeddings,
    real: Mapping[str, Embeddings],
    inputs: Mapping[str, Sequence[str]] | None,
    tables: _Tables,
) -> None:
    """Names the input that a picture is nearer to than two real pictures are to each other."""
    for name, pictures in by_subject.items():
        given = list(real[name]) if inputs is None else [k for k in inputs[name] if k in real[name]]
        if not given or len(real[name]) < 2:
            continue
        nearest, cosines, largest = metrics.nearest_input(
            np.stack([found[picture.key] for picture in pictures]),
            np.stack([real[name][key] for key in given]),
            np.stack(list(real[name].values())),
        )
        for picture, index, cosine in zip(pictures, nearest, cosines, strict=True):
            if cosine > largest:
                tables.near_input[picture.key] = given[index]


def _add_diversity(
    label: str, generated: Sequence[Generated], found: Embeddings, tables: _Tables
) -> None:
    for pictures in _group_by_prompt([p for p in generated if p.key in found]):
        vectors = np.stack([found[picture.key] for picture in pictures])
        tables.add(f"{label} diversity", pictures, metrics.diversity(vectors))


def _add_lpips(
    generated: Sequence[Generated], lpips: Lpips, settings: Settings, tables: _Tables
) -> None:
    """Each picture's mean LPIPS distance to the others of its prompt."""
    groups = _group_by_prompt([p for p in generated if p.key not in tables.broken])
    for pictures in tqdm(groups, desc="LPIPS", disable=not settings.progress, file=sys.stderr):
        decoded = [decode(picture.path.read_bytes(), "whole") for picture in pictures]
        pixels = np.stack([preprocess(rgb, lpips.card.preprocessing) for rgb in decoded])
        distances = lpips.distances(pixels).sum(axis=1) / (len(pictures) - 1)
        tables.add("LPIPS diversity", pictures, distances)


def _group_by_prompt(pictures: Sequence[Generated]) -> list[list[Generated]]:
    """The pictures of each prompt that has at least two."""
    prompts: dict[tuple[str, int], list[Generated]] = defaultdict(list)
    for picture in pictures:
        prompts[picture.subject, picture.prompt].append(picture)
    return [group for group in prompts.values() if len(group) > 1]


def _add_gallery(
    label: str,
    by_subject: Mapping[str, Sequence[Generated]],
    found: Embeddings,
    real: Mapping[str, Embeddings],
    tables: _Tables,
) -> None:
    """Whether each picture's own subject is the nearest among its look-alikes."""
    names = list(real)
    if len(names) < 2:
        return
    means = np.stack([metrics.unit(np.stack(list(real[n].values()))).mean(axis=0) for n in names])
    subjects = metrics.unit(means)
    galleries = metrics.look_alikes(subjects)
    measure = f"{label} subject@{galleries.shape[1]}"
    for name, pictures in by_subject.items():
        gallery = subjects[galleries[names.index(name)]]
        ranks = [metrics.gallery_rank(metrics.unit(found[p.key]), gallery) for p in pictures]
        tables.add(measure, pictures, [float(rank == 1) for rank in ranks])


def _add_texts(
    dataset: Dataset,
    by_subject: Mapping[str, Sequence[Generated]],
    found: Embeddings,
    embedder: Embedder,
    settings: Settings,
    tables: _Tables,
) -> None:
    prompts = {subject.name: subject.prompts for subject in dataset.subjects}
    texts = sorted({prompts[name][p.prompt] for name, group in by_subject.items() for p in group})
    filled = [settings.template.replace("{}", text) for text in texts]
    embedded = dict(zip(texts, embedder.embed_texts(filled), strict=True))
    for name, pictures in by_subject.items():
        vectors = np.stack([found[picture.key] for picture in pictures])
        wanted = np.stack([embedded[prompts[name][picture.prompt]] for picture in pictures])
        values = metrics.text_similarity(vectors, wanted)
        tables.add(str(embedder.spec.text_label), pictures, values)


def _score_toyland(dataset: Dataset, generated: Sequence[Generated], tables: _Tables) -> None:
    for picture in generated:
        case = dataset.toyland[picture.subject][picture.prompt]
        try:
            pixels = decode(picture.path.read_bytes(), "whole")
            if pixels.shape != (SIZE, SIZE, 3):
                raise UserError(f"is not of {SIZE}x{SIZE} pixels, as Toyland's pictures are")
        except (PictureError, UserError, OSError) as error:
            tables.broken[picture.key] = str(error)
            continue
        tables.values[picture.key] |= {
            "subject@16": float(subject_rank(pixels, case) == 1),
            "scene@10": float(nearest_scene(pixels) == SCENES.index(case.scene)),
        }


def _embed_generated(
    generated: Sequence[Generated],
    embedder: Embedder,
    variant: Variant,
    cache: EmbeddingCache,
    settings: Settings,
    broken: dict[str, str],
) -> Embeddings:
    found = embed_pictures(
        embedder,
        [picture.path for picture in generated],
        variant=variant,
        cache=cache,
        batch_size=settings.batch_size,
        workers=settings.workers,
        progress=settings.progress,
    )
    return _keep_good([picture.key for picture in generated], found, broken)


def _embed_references(
    dataset: Dataset,
    embedder: Embedder,
    variant: Variant,
    cache: EmbeddingCache,
    settings: Settings,
    broken: dict[str, str],
) -> dict[str, Embeddings]:
    """Each subject's embeddings by the names of its real pictures."""
    listed: list[tuple[Subject, Reference]] = [
        (subject, reference) for subject in dataset.subjects for reference in subject.references
    ]
    found = embed_pictures(
        embedder,
        [reference.source for _, reference in listed],
        variant=variant,
        cache=cache,
        batch_size=settings.batch_size,
        workers=settings.workers,
        progress=settings.progress,
    )
    keys = [f"real: {subject.name}/{reference.name}" for subject, reference in listed]
    good = _keep_good(keys, found, broken)
    result: dict[str, Embeddings] = {subject.name: {} for subject in dataset.subjects}
    for (subject, reference), key in zip(listed, keys, strict=True):
        if key in good:
            result[subject.name][reference.name] = good[key]
    return result


def _keep_good(
    keys: Sequence[str], found: Sequence[Embedding | Broken], broken: dict[str, str]
) -> Embeddings:
    good: Embeddings = {}
    for key, embedding in zip(keys, found, strict=True):
        if isinstance(embedding, Broken):
            broken[key] = embedding.reason
        else:
            good[key] = embedding
    return good


def _group(generated: Sequence[Generated], found: Embeddings) -> dict[str, list[Generated]]:
    groups: dict[str, list[Generated]] = {}
    for picture in generated:
        if picture.key in found:
            groups.setdefault(picture.subject, []).append(picture)
    return groups


def _check_inputs(
    dataset: Dataset, about: About, folder: Path
) -> Mapping[str, Sequence[str]] | None:
    """The names of the real pictures that the method was given; None where that isn't known."""
    if about.inputs is None:
        return None
    for subject in dataset.subjects:
        real = {reference.name for reference in subject.references}
        unknown = sorted(set(about.inputs.get(subject.name, ())) - real)
        if unknown:
            raise UserError(
                f"{folder / ABOUT}: inputs: {subject.name} has no picture {name_some(unknown)}"
            )
    missing = [s.name for s in dataset.subjects if s.name not in about.inputs]
    if missing:
        raise UserError(
            f"{folder / ABOUT}: inputs: says nothing of {name_some(missing)}; "
            "[] means that none were given"
        )
    return about.inputs


def _card(
    dataset: Dataset,
    limit: int | None,
    embedders: Sequence[Embedder],
    settings: Settings,
    per_prompt: int,
    lpips: Lpips | None = None,
) -> Card:
    return Card(
        dataset=dataset.name,
        dataset_sha256=dataset.fingerprint(),
        limit=limit,
        subjects=len(dataset.subjects),
        prompts=sum(len(subject.prompts) for subject in dataset.subjects),
        pictures_per_prompt=per_prompt,
        models={embedder.spec.label: embedder.card for embedder in embedders},
        masked=MASKED if settings.masked else None,
        template=settings.template,
        lpips=None if lpips is None else lpips.card,
    )


def _environment(settings: Settings) -> Environment:
    return Environment(versions=read_versions(), platform=read_platform(), command=settings.command)


def read_scores(path: Path) -> MethodScores:
    """Reads what `score` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return MethodScores.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--scores: {path} cannot be read ({error.strerror or error})") from None
    except pydantic.ValidationError as error:
        raise UserError(
            f"--scores: {path}: is no result of score: {_first_mistake(error)}"
        ) from None


def _first_mistake(error: pydantic.ValidationError) -> str:
    """The field and what is wrong with it, in one line."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def dump_scores(scores: MethodScores) -> str:
    """As JSON that `read_scores` reads back."""
    return json.dumps(scores.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
