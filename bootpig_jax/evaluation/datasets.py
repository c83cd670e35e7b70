"""Subjects, their real pictures and the prompts they are drawn with.

| name              | where from                                   | subjects x prompts         |
|-------------------|----------------------------------------------|----------------------------|
| `dreambooth`      | https://github.com/google/dreambooth         | 30 x 25                    |
| `dreambench_plus` | https://github.com/yuangpeng/dreambench_plus | 150 x 9, one real picture  |
| `toyland`         | this package's renderer                      | 24 x 10                    |
| `folder`          | yours                                        | `open_folder` says how     |

Prompts name the subject by its class word alone. DreamBooth's templates have a place for a unique
token before it; it stays empty, as the protocol wants it for CLIP-T.
"""

import ast
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from PIL import Image

from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.files import (
    PICTURE_ENDINGS,
    Source,
    list_folders,
    list_pictures,
    name_some,
    read_source,
    sha256,
)
from bootpig_jax.toyland.measures import Case, make_cases
from bootpig_jax.toyland.world import POSITIONS, SCENES

DatasetName = Literal["dreambooth", "dreambench_plus", "toyland", "folder"]
DATASETS: tuple[str, ...] = get_args(DatasetName)

LIVE_CLASSES = ("cat", "dog")  # DreamBooth's nine live subjects; its text file does not list them
TOYLAND_SUBJECTS = 24
TOYLAND_REFERENCES = 4
PROMPTS_FILE = "prompts_and_classes.txt"

_DREAMBOOTH = (
    f"expected DreamBooth's folder dataset/ with {PROMPTS_FILE} and one folder of .jpg for each "
    "subject, from https://github.com/google/dreambooth"
)
_DREAMBENCH_PLUS = (
    "expected DreamBench++'s folder data/ with images/CATEGORY/NN.jpg and "
    "captions/CATEGORY/NN.txt, from https://github.com/yuangpeng/dreambench_plus"
)
_FOLDER = "expected prompts.txt, one prompt a line, and one folder of pictures for each subject"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A real picture of a subject.

    Attributes:
        name: of its file.
        source: the file, or what it would hold.
    """

    name: str
    source: Source


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject.

    Attributes:
        name: also of its folder; no two subjects have the same.
        word: its class.
        references: its real pictures, by name.
        prompts: to draw it with, and to compare the pictures with.
    """

    name: str
    word: str
    references: tuple[Reference, ...]
    prompts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Subjects.

    Attributes:
        name: one of `DATASETS`.
        subjects: by name.
        toyland: for Toyland, what its measures compare with: subject's name -> one for each prompt.
    """

    name: str
    subjects: tuple[Subject, ...]
    toyland: Mapping[str, tuple[Case, ...]] = dataclasses.field(default_factory=dict)

    def limited(self, limit: int | None) -> Self:
        """The first `limit` subjects, each with its first `limit` prompts; `None`: all.

        Raises:
            UserError: `limit` is less than 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise UserError(f"--limit: must be at least 1, not {limit}")
        subjects = tuple(
            dataclasses.replace(subject, prompts=subject.prompts[:limit])
            for subject in self.subjects[:limit]
        )
        return dataclasses.replace(self, subjects=subjects)

    def fingerprint(self) -> str:
        """A hash of all names, prompts and real pictures.

        Raises:
            UserError: a picture cannot be read.
        """
        try:
            content = [
                (
                    subject.name,
                    subject.prompts,
                    [(r.name, sha256(read_source(r.source))) for r in subject.references],
                )
                for subject in self.subjects
            ]
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); get the dataset anew"
            ) from None
        return sha256(json.dumps([self.name, content]).encode())


def open_dataset(name: str, path: Path | None) -> Dataset:
    """Opens one of `DATASETS`.

    Args:
        name: which.
        path: where it lies; Toyland needs none.

    Raises:
        UserError: it is not there, or not laid out as it should be.
    """
    if name == "toyland":
        return open_toyland()
    openers: dict[str, tuple[Callable[[Path], Dataset], str]] = {
        "dreambooth": (open_dreambooth, _DREAMBOOTH),
        "dreambench_plus": (open_dreambench_plus, _DREAMBENCH_PLUS),
        "folder": (open_folder, _FOLDER),
    }
    if name not in openers:
        raise UserError(f"--dataset: {name!r} is not one of {', '.join(DATASETS)}")
    opener, expected = openers[name]
    if path is None:
        raise UserError(f"--data is missing: {expected}")
    if not path.is_dir():
        raise UserError(f"--data: {path} is no folder; {expected}")
    return opener(path)


# ---------------------------------------------------------------- DreamBooth


def open_dreambooth(path: Path) -> Dataset:
    """Opens DreamBooth's dataset as its authors publish it.

    Args:
        path: the folder `dataset/`, or the clone that holds it.

    Raises:
        UserError: a file or folder is missing, or the text file is not as published.
    """
    folder = path if (path / PROMPTS_FILE).exists() else path / "dataset"
    file = folder / PROMPTS_FILE
    classes, object_prompts, live_prompts = parse_prompts_and_classes(_read_text(file, _DREAMBOOTH))
    missing = [name for name in classes if not (folder / name).is_dir()]
    unknown = [f.name for f in list_folders(folder) if f.name not in classes]
    if missing:
        raise UserError(f"{folder}: no folder for {name_some(missing)}; {_DREAMBOOTH}")
    if unknown:
        raise UserError(f"{file}: has no class for the folder {name_some(unknown)}; add it there")
    subjects = [
        Subject(
            name,
            word,
            _references(folder / name),
            tuple(
                fill_template(template, word)
                for template in (live_prompts if word in LIVE_CLASSES else object_prompts)
            ),
        )
        for name, word in sorted(classes.items())
    ]
    return Dataset("dreambooth", tuple(subjects))


def parse_prompts_and_classes(
    text: str,
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Parses `prompts_and_classes.txt`.

    It holds a table under `subject_name,class`, then two Python assignments `prompt_list = [...]`
    under the headings "Object Prompts" and "Live Subject Prompts". An element is
    `'a {0} {1} in the snow'.format(unique_token, class_token)`. Nothing in it is executed.

    Returns:
        Subject's name -> class, the templates for objects, and those for live subjects.

    Raises:
        UserError: a part is missing or of another form.
    """
    lines = [line.strip() for line in text.splitlines()]
    if "subject_name,class" not in lines:
        raise UserError(f"{PROMPTS_FILE}: has no table subject_name,class; {_DREAMBOOTH}")
    classes: dict[str, str] = {}
    for line in lines[lines.index("subject_name,class") + 1 :]:
        if not line:
            break
        name, comma, word = (part.strip() for part in line.partition(","))
        if not comma or not word or not re.fullmatch(r"\w[\w.-]*", name) or name in classes:
            raise UserError(f"{PROMPTS_FILE}: {line!r} is no new line of the form subject,class")
        classes[name] = word
    lists: dict[bool, tuple[str, ...]] = {}
    end = 0
    for match in re.finditer(r"^\w+\s*=\s*\[.*?\]\s*$", text, re.MULTILINE | re.DOTALL):
        heading = text[end : match.start()].strip().splitlines()[-1:]
        live = bool(heading) and "live" in heading[0].lower()
        if live in lists:
            raise UserError(f"{PROMPTS_FILE}: has two lists of the same kind; {_DREAMBOOTH}")
        lists[live] = _parse_templates(match.group())
        end = match.end()
    if not classes or len(lists) != 2:
        raise UserError(
            f"{PROMPTS_FILE}: has {len(classes)} subjects and {len(lists)} lists of prompts "
            f"instead of some and two; {_DREAMBOOTH}"
        )
    return classes, lists[False], lists[True]


def _parse_templates(assignment: str) -> tuple[str, ...]:
    try:
        (statement,) = ast.parse(assignment).body
    # Python's parser has a stack of its own, and calls its overflow a lack of memory.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{PROMPTS_FILE}: a list of prompts is not valid Python") from None
    if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List)):
        raise UserError(f"{PROMPTS_FILE}: a list of prompts is not of the form NAME = [...]")
    templates = []
    for element in statement.value.elts:
        match element:
            case (
                ast.Constant(value=str(template))
                | ast.Call(
                    func=ast.Attribute(value=ast.Constant(value=str(template)), attr="format")
                )
            ):
                templates.append(template)
            case _:
                written = ast.get_source_segment(assignment, element) or ""
                raise UserError(
                    f"{PROMPTS_FILE}: {' '.join(written.split())[:80]} is no prompt of the form "
                    "'a {0} {1} ...'.format(unique_token, class_token)"
                )
    return tuple(templates)


def fill_template(template: str, word: str) -> str:
    """A prompt without the unique token: `{0}` becomes nothing, `{1}` the class word.

    Raises:
        UserError: there is no place for the word, or there are others.
    """
    # Not str.format: a template from a file could reach into objects.
    text = template.replace("{0}", "").replace("{1}", word)
    if "{1}" not in template or "{" in text:
        raise UserError(f"{PROMPTS_FILE}: the prompt {template!r} needs {{1}}, and {{0}} at most")
    return " ".join(text.split())


# ---------------------------------------------------------------- DreamBench++


def open_dreambench_plus(path: Path) -> Dataset:
    """Opens DreamBench++: one picture and nine prompts for each subject.

    A caption file's first line is the class word, the others are prompts. Subjects are called
    `CATEGORY_NN_WORD` as in the published results, "live_subject_" before animals and humans.

    Args:
        path: the folder that holds `images/` and `captions/`, or the one that holds `data/`.

    Raises:
        UserError: a picture or a caption file is missing or empty.
    """
    folder = path if (path / "images").is_dir() else path / "data"
    if not ((folder / "images").is_dir() and (folder / "captions").is_dir()):
        raise UserError(f"--data: {path} has no images/ and captions/; {_DREAMBENCH_PLUS}")
    images, captions = (
        {
            p.relative_to(folder / part).with_suffix(""): p
            for p in sorted((folder / part).rglob("*"))
            if p.suffix.lower() in endings and not p.name.startswith(".")
        }
        for part, endings in (("images", PICTURE_ENDINGS), ("captions", (".txt",)))
    )
    odd = sorted(map(str, images.keys() ^ captions.keys()))
    if odd or not images:
        what = f"{name_some(odd)}: a picture or its captions are missing" if odd else "is empty"
        raise UserError(f"{folder}: {what}; {_DREAMBENCH_PLUS}")
    subjects = {}
    for key, file in captions.items():
        lines = [line.strip() for line in _read_text(file, _DREAMBENCH_PLUS).splitlines()]
        lines = [line for line in lines if line]
        if len(lines) < 2:
            raise UserError(f"{file}: needs a class word and at least one prompt, a line each")
        category = key.parent.name
        if category in ("animal", "human"):
            category = f"live_subject_{category}"
        word = re.sub(r"[^\w.-]", "_", lines[0].lower().replace(" ", "_"))
        name = f"{category}_{key.name}_{word}"
        picture = images[key]
        references = (Reference(picture.name, picture),)
        subjects[name] = Subject(name, lines[0], references, tuple(lines[1:]))
    return Dataset("dreambench_plus", tuple(subjects[name] for name in sorted(subjects)))


# ---------------------------------------------------------------- a user's own


def open_folder(path: Path) -> Dataset:
    """Opens a folder of the user's own.

    `prompts.txt` holds a prompt a line, `{}` standing for the class word; a subject's folder may
    hold its own `prompts.txt`. The word is in the subject's `class.txt`, or else the folder's name
    without its number: "red_car2" is a "red car".

    Raises:
        UserError: there are no subjects, pictures or prompts.
    """
    folders = list_folders(path)
    if not folders:
        raise UserError(f"--data: {path} holds no folders; {_FOLDER}")
    subjects = []
    for folder in folders:
        own = folder / "prompts.txt"
        lines = _read_text(own if own.exists() else path / "prompts.txt", _FOLDER).splitlines()
        class_file = folder / "class.txt"
        if class_file.exists():
            word = _read_text(class_file, _FOLDER).strip()
        else:
            word = re.sub(r"[\s\d]+$", "", folder.name.replace("_", " ")) or folder.name
        prompts = tuple(line.strip().replace("{}", word) for line in lines if line.strip())
        if not prompts:
            raise UserError(f"{path / 'prompts.txt'}: is empty; {_FOLDER}")
        subjects.append(Subject(folder.name, word, _references(folder), prompts))
    return Dataset("folder", tuple(subjects))


def _references(folder: Path) -> tuple[Reference, ...]:
    pictures = list_pictures(folder)
    if not pictures:
        raise UserError(f"{folder}: holds no pictures ({', '.join(PICTURE_ENDINGS)})")
    return tuple(Reference(path.name, path) for path in pictures)


def _read_text(path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; {expected}") from None


# ---------------------------------------------------------------- Toyland


def open_toyland() -> Dataset:
    """Held-out subjects of Toyland, each in all ten scenes; its pictures are cut out on white."""
    subjects, everything = [], {}
    for number, case in enumerate(make_cases(0, TOYLAND_SUBJECTS, TOYLAND_REFERENCES)):
        name = f"{number:02d}_{case.category}"
        cases = tuple(
            dataclasses.replace(case, scene=scene, position=POSITIONS[(number + s) % 3])
            for s, scene in enumerate(SCENES)
        )
        references = tuple(
            Reference(f"{n:02d}.png", _png(reference.image))
            for n, reference in enumerate(case.references)
        )
        subjects.append(Subject(name, case.category, references, tuple(c.caption for c in cases)))
        everything[name] = cases
    return Dataset("toyland", tuple(subjects), everything)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
