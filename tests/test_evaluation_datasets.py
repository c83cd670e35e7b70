"""The datasets: their real layouts parse, and odd ones are refused with what is expected."""

from pathlib import Path

import pytest

from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import fill_template, open_dataset, parse_prompts_and_classes
from bootpig_jax.evaluation.files import read_source
from tests.evaluation_folders import picture, prompts_and_classes, write_dreambooth


def test_dreambooth_as_published(tmp_path: Path) -> None:
    folder = write_dreambooth(tmp_path / "clone" / "dataset")
    dataset = open_dataset("dreambooth", folder)
    subjects = {subject.name: subject for subject in dataset.subjects}
    assert list(subjects) == ["backpack", "bear_plushie", "dog", "dog2"]
    assert subjects["bear_plushie"].prompts == (
        "a stuffed animal in the snow",
        "a stuffed animal on top of a purple rug",
        "a red stuffed animal",
    )
    assert subjects["dog2"].prompts == (
        "a dog in the snow",
        "a dog wearing a santa hat",
        "a wet dog",
    )
    assert [reference.name for reference in subjects["dog"].references] == [
        "00.jpg",
        "01.jpg",
        "02.jpg",
    ]
    # The clone that holds dataset/ does as well, and the fingerprint is of contents, not of paths.
    before = dataset.fingerprint()
    assert open_dataset("dreambooth", folder.parent).fingerprint() == before
    (folder / "dog" / "01.jpg").write_bytes((folder / "dog" / "00.jpg").read_bytes())
    assert open_dataset("dreambooth", folder).fingerprint() != before


def test_the_unique_token_stays_empty_wherever_it_stands() -> None:
    assert fill_template("a {0} {1} in the snow", "dog") == "a dog in the snow"
    assert fill_template("a {1} drawn as {0} art", "dog") == "a dog drawn as art"
    assert fill_template("a {1}", "stuffed animal") == "a stuffed animal"


def test_nothing_in_the_text_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    text = prompts_and_classes().replace("(unique_token, class_token)", f"({run})", 1)
    classes, prompts, live = parse_prompts_and_classes(text)
    assert len(classes) == 4 and len(prompts) == len(live) == 3
    with pytest.raises(UserError, match="is no prompt of the form"):
        parse_prompts_and_classes(text.replace("'a red {0} {1}'", run))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("subject_name,class", "subjects", "has no table"),
        ("dog2,dog", "dog2", "'dog2' is no new line"),
        ("dog2,dog", "dog,cat", "'dog,cat' is no new line"),
        ("dog2,dog", "../dog,dog", "is no new line"),
        ("Live Subject Prompts", "Prompts", "two lists of the same kind"),
        ("'a red {0} {1}'.format", "'a red {0} {1}.format", "not valid Python"),
        ("a red {0} {1}", "a red {0.__class__} {1}", "needs {1}, and {0} at most"),
        ("a red {0} {1}", "a red thing", "needs {1}"),
        ("dog2,dog", "dog2,dog\ndog3,dog", "no folder for dog3; expected DreamBooth's"),
        ("dog2,dog\n", "", "has no class for the folder dog2"),
    ],
)
def test_odd_dreambooth_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = write_dreambooth(tmp_path / "dataset", references=1)
    file = folder / "prompts_and_classes.txt"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("'", ".")) as error:
        open_dataset("dreambooth", folder)
    assert "\n" not in str(error.value)


def test_missing_datasets_say_where_they_come_from(tmp_path: Path) -> None:
    for name, source in (
        ("dreambooth", "github.com/google/dreambooth"),
        ("dreambench_plus", "github.com/yuangpeng/dreambench_plus"),
        ("folder", "prompts.txt"),
    ):
        for path in (None, tmp_path / "nowhere", tmp_path):
            with pytest.raises(UserError, match=source):
                open_dataset(name, path)
    with pytest.raises(UserError, match="'imagenet' is not one of dreambooth"):
        open_dataset("imagenet", tmp_path)
    folder = write_dreambooth(tmp_path / "dataset")
    (folder / "dog" / "09.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match="dog/09.jpg: cannot be read .*; get the dataset anew"):
        open_dataset("dreambooth", folder).fingerprint()
    for path in (folder / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="dog: holds no pictures"):
        open_dataset("dreambooth", folder)


def test_dreambench_plus(tmp_path: Path) -> None:
    for category, number, word in (("animal", "00", "kitten"), ("object", "03", "Red Mug")):
        for part in ("images", "captions"):
            (tmp_path / "data" / part / category).mkdir(parents=True)
        picture(0).save(tmp_path / "data" / "images" / category / f"{number}.jpg")
        captions = f"{word}\na {word} in the snow\n\na drawing of a {word}\n"
        (tmp_path / "data" / "captions" / category / f"{number}.txt").write_text(captions)
    dataset = open_dataset("dreambench_plus", tmp_path)
    assert [subject.name for subject in dataset.subjects] == [
        "live_subject_animal_00_kitten",
        "object_03_red_mug",
    ]
    mug = dataset.subjects[1]
    assert mug.word == "Red Mug"
    assert mug.prompts == ("a Red Mug in the snow", "a drawing of a Red Mug")
    assert [reference.name for reference in mug.references] == ["03.jpg"]
    (tmp_path / "data" / "captions" / "object" / "03.txt").unlink()
    with pytest.raises(UserError, match="object/03: a picture or its captions are missing"):
        open_dataset("dreambench_plus", tmp_path)


def test_own_folder(tmp_path: Path) -> None:
    for name in ("red_car2", "rex"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "b.png")
        picture(1).save(tmp_path / name / "a.jpeg")
    (tmp_path / "prompts.txt").write_text("a {} in the snow\n\n{} at sunset\n")
    (tmp_path / "rex" / "class.txt").write_text("dog\n")
    (tmp_path / "rex" / "prompts.txt").write_text("a {} asleep\n")
    car, rex = open_dataset("folder", tmp_path).subjects
    assert car.prompts == ("a red car in the snow", "red car at sunset")
    assert rex.prompts == ("a dog asleep",)
    assert [reference.name for reference in rex.references] == ["a.jpeg", "b.png"]
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(UserError, match="prompts.txt: is missing; expected"):
        open_dataset("folder", tmp_path)


def test_toyland_is_always_the_same() -> None:
    dataset = open_dataset("toyland", None)
    assert len(dataset.subjects) == 24
    for subject in dataset.subjects:
        assert len(subject.references) == 4 and len(subject.prompts) == 10
        cases = dataset.toyland[subject.name]
        assert tuple(case.caption for case in cases) == subject.prompts
        assert len({case.scene for case in cases}) == 10
    assert dataset.fingerprint() == open_dataset("toyland", None).fingerprint()
    taste = dataset.limited(2)
    assert [len(subject.prompts) for subject in taste.subjects] == [2, 2]
    assert taste.fingerprint() != dataset.fingerprint()
    assert read_source(taste.subjects[0].references[0].source).startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--limit"):
        dataset.limited(0)
