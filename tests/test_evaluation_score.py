"""Scoring folders: figures against plain NumPy, what is left out, and what is refused."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax import evaluate
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, Reference, Subject, open_dataset
from bootpig_jax.evaluation.embedders import (
    EmbeddingCache,
    ModelCard,
    Preprocessing,
    Spec,
    preprocess,
)
from bootpig_jax.evaluation.files import read_source
from bootpig_jax.evaluation.protocol import differences
from bootpig_jax.evaluation.score import (
    MethodScores,
    Settings,
    dump_scores,
    find_pictures,
    read_scores,
    score_folder,
    score_real,
)
from bootpig_jax.toyland.measures import score as score_toyland_cases
from bootpig_jax.toyland.render import render
from tests.evaluation_folders import (
    CLASSES,
    picture,
    save_clip,
    save_dino,
    write_dreambooth,
    write_pictures,
)

SUBJECTS = list(CLASSES)
HOW = Preprocessing(resize=16, crop=16, mean=(0, 0, 0), std=(1, 1, 1))


class Projection:
    """A random linear map of pixels, and counts of letters: an embedder without torch."""

    def __init__(self, label: str = "CLIP-I", text_label: str | None = "CLIP-T") -> None:
        self.spec = Spec(label, text_label, "clip", "none")
        self.card = ModelCard(source="none", sha256=label, preprocessing=HOW)
        self.matrix = np.random.default_rng(0).normal(size=(3 * 16 * 16, 8)).astype(np.float32)
        self.count = 0

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        self.count += len(pixels)
        return pixels.reshape(len(pixels), -1) @ self.matrix

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        letters = [[text.count(chr(97 + i)) + 0.1 for i in range(8)] for text in texts]
        return np.asarray(letters, np.float32)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset("dreambooth", write_dreambooth(tmp_path / "dataset"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", SUBJECTS, prompts=3, images=2)


def score(
    dataset: Dataset,
    folder: Path,
    embedders: Sequence[Projection],
    cache: Path | None = None,
    limit: int | None = None,
    **settings: object,
) -> MethodScores:
    return score_folder(
        dataset,
        folder,
        embedders,
        limit=limit,
        cache=EmbeddingCache(cache),
        settings=Settings(**settings),  # type: ignore[arg-type]
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def embed(embedder: Projection, data: bytes) -> np.ndarray:
    """What an embedding is, step by step; of unit length."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    vector = embedder.embed_pixels(preprocess(pixels, HOW)[None])[0].astype(np.float64)
    return vector / np.linalg.norm(vector)


def test_figures_equal_plain_numpy(dataset: Dataset, pictures: Path, tmp_path: Path) -> None:
    about = {"method": "mine", "inputs": {name: ["00.jpg", "02.jpg"] for name in SUBJECTS}}
    (pictures / "about.json").write_text(json.dumps(about))
    embedder = Projection()
    found = score(dataset, pictures, [embedder], template="a photo of {}")
    assert found.method == "mine"
    image, unseen, text = [], [], []
    means = {}
    for subject in dataset.subjects:
        real = np.stack([embed(embedder, read_source(r.source)) for r in subject.references])
        means[subject.name] = real.mean(axis=0) / np.linalg.norm(real.mean(axis=0))
        of_image, of_unseen, of_text = [], [], []
        for number, prompt in enumerate(subject.prompts):
            words = embedder.embed_texts([f"a photo of {prompt}"])[0].astype(np.float64)
            for path in sorted((pictures / subject.name / f"{number:02d}").iterdir()):
                drawn = embed(embedder, path.read_bytes())
                of_image += [drawn @ r for r in real]
                of_unseen.append(drawn @ real[1])
                of_text.append(drawn @ words / np.linalg.norm(words))
        image.append(np.mean(of_image))
        unseen.append(np.mean(of_unseen))
        text.append(np.mean(of_text))
    summary = found.summary
    assert summary["CLIP-I"].mean == pytest.approx(np.mean(image), abs=1e-6)
    assert summary["CLIP-I unseen"].mean == pytest.approx(np.mean(unseen), abs=1e-6)
    assert summary["CLIP-T"].mean == pytest.approx(np.mean(text), abs=1e-6)
    assert summary["CLIP-I"].subjects == pytest.approx(
        dict(zip(SUBJECTS, image, strict=True)), abs=1e-6
    )
    assert summary["CLIP-I"].pictures == 24
    low, high = summary["CLIP-I"].interval or (0, 0)
    assert min(image) <= low <= summary["CLIP-I"].mean <= high <= max(image)
    # Diversity: the two pictures of each prompt, compared with each other alone.
    for one in found.pictures:
        folder = (pictures / one.file).parent
        first, second = (embed(embedder, path.read_bytes()) for path in sorted(folder.iterdir()))
        assert one.values["CLIP-I diversity"] == pytest.approx(1 - first @ second, abs=1e-6)
    # The gallery: all four subjects, as there are fewer than 16.
    right = []
    for one in found.pictures:
        drawn = embed(embedder, (pictures / one.file).read_bytes())
        nearest = max(means, key=lambda name: drawn @ means[name])  # noqa: B023 - used at once
        assert one.values["CLIP-I subject@4"] == float(nearest == one.subject)
        right.append(nearest == one.subject)
    assert summary["CLIP-I subject@4"].mean == pytest.approx(np.mean(right))
    # The file holds all of it.
    path = tmp_path / "scores.json"
    path.write_text(dump_scores(found))
    assert read_scores(path) == found


class MeanColour(Projection):
    """A picture's mean colour."""

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.mean(axis=(2, 3))


def of_colour(*colour: int) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def test_a_subjects_place_in_a_gallery_is_a_direction(tmp_path: Path) -> None:
    """Pictures that differ have a short mean: as it is, it would lie far from all others."""
    colours = {
        "many": [(250, 0, 0), (0, 250, 0), (0, 0, 250)],
        "one": [(250, 100, 50), (250, 100, 50), (250, 100, 50)],
    }
    subjects = [
        Subject(
            name,
            "thing",
            tuple(Reference(f"{n}.png", png(of_colour(*one))) for n, one in enumerate(listed)),
            ("a thing",),
        )
        for name, listed in colours.items()
    ]
    for name in colours:
        (tmp_path / name / "0").mkdir(parents=True)
        of_colour(200, 200, 100).save(tmp_path / name / "0" / "a.png")  # cosines 0.96 and 0.91
    of_colour(200, 200, 100).save(tmp_path / "many" / "0" / "b.png")
    found = score(Dataset("folder", tuple(subjects)), tmp_path, [MeanColour(text_label=None)])
    right = {one.file: one.values["CLIP-I subject@2"] for one in found.pictures}
    assert right == {"many/0/a.png": 1.0, "many/0/b.png": 1.0, "one/0/a.png": 0.0}
    # However many pictures a subject has, it counts once.
    assert found.summary["CLIP-I subject@2"].mean == 0.5


def test_order_batches_and_workers_change_nothing(
    dataset: Dataset, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(dataset, pictures, [Projection()], batch_size=24, workers=1)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listing(path))))
    again = score(dataset, pictures, [Projection()], batch_size=5, workers=4)
    assert [one.file for one in again.pictures] == [one.file for one in first.pictures]
    for one, other in zip(first.pictures, again.pictures, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-6)
    assert first.card == again.card


def test_resumes_from_the_cache(dataset: Dataset, pictures: Path, tmp_path: Path) -> None:
    class Killed(Projection):
        def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
            if self.count >= 12:
                raise KeyboardInterrupt
            return super().embed_pixels(pixels)

    killed = Killed()
    with pytest.raises(KeyboardInterrupt):
        score(dataset, pictures, [killed], tmp_path / "cache", batch_size=4)
    second = Projection()
    found = score(dataset, pictures, [second], tmp_path / "cache", batch_size=4)
    assert killed.count + second.count == 24 + 12  # generated and real, each once
    third = Projection()
    assert score(dataset, pictures, [third], tmp_path / "cache") == found
    assert third.count == 0


def test_broken_pictures_are_named_and_left_out(dataset: Dataset, pictures: Path) -> None:
    whole = score(dataset, pictures, [Projection()])
    bad = pictures / "dog" / "01" / "00.png"
    bad.write_bytes(bad.read_bytes()[:60])
    assert isinstance(dataset.subjects[0].references[1].source, Path)
    dataset.subjects[0].references[1].source.write_bytes(b"gone")
    found = score(dataset, pictures, [Projection()])
    assert [entry.file for entry in found.left_out] == ["dog/01/00.png", "real: backpack/01.jpg"]
    assert len(found.pictures) == 23
    assert all(np.isfinite(list(one.values.values())).all() for one in found.pictures)
    before = whole.summary["CLIP-I"].subjects["dog2"]
    assert found.summary["CLIP-I"].subjects["dog2"] == pytest.approx(before, abs=1e-6)
    for number in range(3):
        for path in (pictures / "dog" / f"{number:02d}").iterdir():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="every picture of dog is broken"):
        score(dataset, pictures, [Projection()])
    partial = score(dataset, pictures, [Projection()], allow_missing=True)
    assert sorted(partial.summary["CLIP-I"].subjects) == ["backpack", "bear_plushie", "dog2"]
    for reference in dataset.subjects[0].references:
        assert isinstance(reference.source, Path)
        reference.source.write_bytes(b"")
    with pytest.raises(UserError, match="backpack: every real picture is broken"):
        score(dataset, pictures, [Projection()])


def test_folders_that_do_not_fit(dataset: Dataset, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures as <subject>"):
        find_pictures(dataset, tmp_path / "empty")
    with pytest.raises(UserError, match="is no folder"):
        find_pictures(dataset, tmp_path / "nowhere")
    for path in (pictures / "dog" / "02").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no pictures for dog/2; draw them, or"):
        find_pictures(dataset, pictures)
    found, missing = find_pictures(dataset, pictures, allow_missing=True)
    assert len(found) == 22 and missing == ("dog/2",)
    (pictures / "zebra").mkdir()
    with pytest.raises(UserError, match="has no subject zebra; its subjects are backpack"):
        find_pictures(dataset, pictures)
    (pictures / "zebra").rmdir()
    (pictures / "dog" / "3").mkdir()
    with pytest.raises(UserError, match="has no prompt 3; dog has 3, counted from 0"):
        find_pictures(dataset, pictures)
    (pictures / "dog" / "3").rename(pictures / "dog" / "in the snow")
    with pytest.raises(UserError, match="is a prompt's number"):
        find_pictures(dataset, pictures)
    (pictures / "dog" / "in the snow").rename(pictures / "dog" / "1")
    with pytest.raises(UserError, match="is the same prompt as 0?1"):
        find_pictures(dataset, pictures)
    (pictures / "dog" / "1").rmdir()
    (pictures / "about.json").write_text('{"inputs": {"dog": ["07.jpg"]}}')
    with pytest.raises(UserError, match="dog has no picture 07.jpg"):
        score(dataset, pictures, [Projection()], allow_missing=True)
    (pictures / "about.json").write_text('{"inputs": {"dog": ["01.jpg"]}}')
    with pytest.raises(UserError, match="says nothing of backpack, bear_plushie, dog2"):
        score(dataset, pictures, [Projection()], allow_missing=True)
    for text, mistake in (
        ('{"input": {}}', "input: Extra inputs are not permitted"),
        ('{"inputs": {"dog": "01.jpg"}}', "inputs.dog: Input should be a valid array"),
        ('{"method":', "Invalid JSON: EOF"),
    ):
        (pictures / "about.json").write_text(text)
        with pytest.raises(UserError, match=f"about.json: is not as it should be: {mistake}"):
            score(dataset, pictures, [Projection()], allow_missing=True)
    with pytest.raises(UserError, match="name at least one"):
        score(dataset, pictures, [], allow_missing=True)
    with pytest.raises(UserError, match="--template"):
        Settings(template="a photo")


def test_a_limit_leaves_the_rest_aside(dataset: Dataset, pictures: Path) -> None:
    found = score(dataset, pictures, [Projection()], limit=2)
    assert len(found.pictures) == 2 * 2 * 2
    assert {one.subject for one in found.pictures} == {"backpack", "bear_plushie"}
    whole = score(dataset, pictures, [Projection()])
    assert set(differences(found.card, whole.card)) == {
        "dataset_sha256",
        "limit",
        "prompts",
        "subjects",
    }


def test_another_model_is_another_protocol(dataset: Dataset, pictures: Path) -> None:
    card = score(dataset, pictures, [Projection()]).card
    for change, different in (({"source": "y"}, []), ({"sha256": "x"}, ["models.CLIP-I.sha256"])):
        model = card.models["CLIP-I"].model_copy(update=change)
        assert differences(card, card.model_copy(update={"models": {"CLIP-I": model}})) == different


def test_copies_are_suspected(dataset: Dataset, pictures: Path) -> None:
    copied = pictures / "dog" / "00" / "01.png"
    source = dataset.subjects[2].references[2].source
    assert isinstance(source, Path)
    Image.open(source).save(copied)
    found = score(dataset, pictures, [Projection()])
    near = {one.file: one.near_input for one in found.pictures if one.near_input}
    assert near["dog/00/01.png"] == "02.jpg"
    assert found.near_inputs == len(near)
    # A method that was given other pictures did not copy this one.
    about = {"inputs": {name: ["00.jpg"] for name in SUBJECTS}}
    (pictures / "about.json").write_text(json.dumps(about))
    found = score(dataset, pictures, [Projection()])
    values = {one.file: one.near_input for one in found.pictures}
    assert values["dog/00/01.png"] != "02.jpg"


def test_foregrounds(dataset: Dataset, pictures: Path) -> None:
    Image.new("RGB", (40, 40), (30, 30, 30)).save(pictures / "dog" / "00" / "00.png")
    found = score(dataset, pictures, [Projection()], masked=True)
    assert [entry.file for entry in found.no_foreground] == ["dog/00/00.png"]
    assert not found.left_out
    assert found.summary["CLIP-I masked"].pictures == 23
    # With one real picture unseen, the mean over three is made of it and the two others.
    about = {name: ["00.jpg", "01.jpg"] for name in SUBJECTS}
    (pictures / "about.json").write_text(json.dumps({"inputs": about}))
    given = score(dataset, pictures, [Projection()], masked=True)
    about = {name: ["02.jpg"] for name in SUBJECTS}
    (pictures / "about.json").write_text(json.dumps({"inputs": about}))
    other = score(dataset, pictures, [Projection()], masked=True)
    (pictures / "about.json").unlink()
    unseen = [r.summary["CLIP-I masked unseen"].mean for r in (given, other)]
    whole = given.summary["CLIP-I masked"].mean
    assert whole == pytest.approx((unseen[0] + 2 * unseen[1]) / 3, abs=1e-6)
    assert unseen[0] != pytest.approx(whole, abs=1e-3)
    # The background and the place no longer count.
    shifted = Image.new("RGB", (60, 50), (200, 220, 250))
    shifted.paste(picture(10_000).crop((4, 4, 30, 32)), (20, 12))
    keyed = np.asarray(shifted).copy()
    keyed[(keyed == 250).all(axis=-1)] = (200, 220, 250)
    Image.fromarray(keyed).save(pictures / "backpack" / "00" / "00.png")
    moved = score(dataset, pictures, [Projection()], masked=True)
    before, after = (
        next(one for one in result.pictures if one.file == "backpack/00/00.png").values
        for result in (found, moved)
    )
    assert abs(after["CLIP-I masked"] - before["CLIP-I masked"]) < 0.02
    assert abs(after["CLIP-I"] - before["CLIP-I"]) > 0.02
    plain = score(dataset, pictures, [Projection()])
    assert differences(plain.card, moved.card) == ["masked"]


def test_the_real_pictures_against_themselves(dataset: Dataset) -> None:
    embedder = Projection()
    found = score_real(
        dataset, [embedder], cache=EmbeddingCache(None), settings=Settings(batch_size=3)
    )
    wanted = []
    for subject in dataset.subjects:
        real = np.stack([embed(embedder, read_source(r.source)) for r in subject.references])
        wanted.append(((real @ real.T).sum() - 3) / 6)
    assert found.summary["CLIP-I"].mean == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found.summary["CLIP-I (with itself)"].mean > found.summary["CLIP-I"].mean
    # A picture that is broken is not also one without a foreground.
    for number, content in enumerate((b"gone", png(Image.new("RGB", (40, 40), (30, 30, 30))))):
        source = dataset.subjects[0].references[number].source
        assert isinstance(source, Path)
        source.write_bytes(content)
    masked = score_real(
        dataset, [embedder], cache=EmbeddingCache(None), settings=Settings(masked=True)
    )
    assert [entry.file for entry in masked.left_out] == ["real: backpack/00.jpg"]
    assert [entry.file for entry in masked.no_foreground] == ["real: backpack/01.jpg"]
    assert sorted(masked.summary["CLIP-I masked"].subjects) == ["bear_plushie", "dog", "dog2"]
    assert differences(found.card, masked.card) == ["dataset_sha256", "masked"]
    single = Dataset(
        "dreambooth",
        tuple(
            type(subject)(subject.name, subject.word, subject.references[:1], subject.prompts)
            for subject in dataset.subjects
        ),
    )
    with pytest.raises(UserError, match="no subject has two pictures"):
        score_real(single, [embedder], cache=EmbeddingCache(None), settings=Settings())


def test_toyland_has_measures_of_its_own(tmp_path: Path) -> None:
    dataset = open_dataset("toyland", None)
    rng = np.random.default_rng(0)
    cases, drawn = [], []
    for subject in dataset.subjects[:3]:
        for number, case in enumerate(dataset.toyland[subject.name][:3]):
            pixels = render(case.subject, case.scene, case.position, rng).image
            path = tmp_path / "toy" / subject.name / str(number) / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
            cases.append(case)
            drawn.append(pixels)
    wanted = score_toyland_cases(np.stack(drawn), cases)
    found = score(dataset, tmp_path / "toy", [], limit=3)
    assert found.summary["subject@16"].mean == pytest.approx(wanted.subject_at_16)
    assert found.summary["scene@10"].mean == pytest.approx(wanted.scene_at_10)
    Image.new("RGB", (32, 32)).save(tmp_path / "toy" / dataset.subjects[0].name / "0" / "b.png")
    found = score(dataset, tmp_path / "toy", [], limit=3)
    assert "is not of 64x64 pixels" in found.left_out[0].reason


def test_command_line(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dreambooth(tmp_path / "data")
    clip, dino = save_clip(tmp_path / "clip"), save_dino(tmp_path / "dino")
    arguments = [
        *("score", "--dataset", "dreambooth", "--data", str(data), "--cache", str(tmp_path / "c")),
        *("--embedder", f"clip={clip}", "--embedder", f"dino={dino}"),
    ]
    output = tmp_path / "out" / "scores.json"
    how = [*arguments, "--pictures", str(pictures), "--output", str(output)]
    assert evaluate.main(how) == 0
    found = read_scores(output)
    assert {"CLIP-T", "CLIP-I", "DINO"} < found.summary.keys()
    assert found.card.models["DINO"].preprocessing.resize == 64
    assert found.environment.command.startswith("python -m bootpig_jax.evaluate score")
    (pictures / "dog" / "00" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert evaluate.main(how) == 1
    assert "left out: dog/00/00.png: cannot be read" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--sanity", "--output", str(tmp_path / "real.json")]) == 0
    assert read_scores(tmp_path / "real.json").folder is None
    for wrong, message in (
        (["--output", "scores.txt"], "must be a .json file"),
        (["--output", str(data / "prompts_and_classes.txt" / "a.json")], "is no folder that"),
        (["--embedder", f"dino={dino}"], "named twice"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--sanity"], "not allowed with"),
        (["--pictures", str(tmp_path / "nowhere")], "is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*how, *wrong])
