"""Text to mask by GroundingDINO, Segment Anything and SAM 3: the real classes, tiny and random."""

import builtins
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bootpig_jax.data.records import ShardReader, decode, decode_mask, decode_picture, read_split
from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig, MasksConfig, samples_hash
from data_gen.masks import make_segmenter
from data_gen.run import Command, run
from data_gen.stages import Rejected, Segmentation
from tests import tiny_segmenters
from tests.tiny_pipelines import save_stable_diffusion
from tests.tiny_segmenters import import_segment_anything

WORDS = ["red mug", "toy car", "a blue robot", "mug", "car", "red toy robot"]
SHAPES = [(64, 64)] * 5 + [(48, 80)]
SEGMENTERS = ["grounded_sam", "grounded_sam_hf", "sam3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    import_segment_anything()
    return {
        "detector": str(tiny_segmenters.save_grounding_dino(root / "grounding_dino")),
        "grounded_sam": str(tiny_segmenters.save_sam_checkpoint(root / "sam.pth")),
        "grounded_sam_hf": str(tiny_segmenters.save_transformers_sam(root / "sam")),
        "sam3": str(tiny_segmenters.save_sam3(root / "sam3")),
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small networks lose more by waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def tiny_vit_b(monkeypatch):
    """segment_anything builds the networks of three sizes only: one of them is made tiny."""
    registry = import_segment_anything().sam_model_registry
    monkeypatch.setitem(registry, "vit_b", tiny_segmenters.build_sam)


def config(models, segmenter, *, threshold=0.0, dtype="float32", batch_size=8, **grounded):
    grounded = {
        "detector": models["detector"],
        "sam": models.get(segmenter),
        "sam_type": "vit_b",
        "box_threshold": threshold,
        **grounded,
    }
    return MasksConfig(
        segmenter=segmenter,
        device="cpu",
        dtype=dtype,
        batch_size=batch_size,
        grounded_sam=grounded,
        sam3={"model": models["sam3"], "threshold": threshold},
    )


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in SHAPES]


def segment(settings):
    return make_segmenter(settings).segment(pictures(), WORDS, range(len(WORDS)))


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_words_and_a_picture_give_a_mask_of_the_pictures_size(models, segmenter, dtype):
    found = segment(config(models, segmenter, dtype=dtype))
    assert [one.mask.shape for one in found] == SHAPES
    assert all(one.mask.dtype == bool and 0 <= one.score <= 1 for one in found)
    assert all(0 < one.mask.mean() < 1 for one in found)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_masks_do_not_depend_on_the_batch(models, segmenter):
    square = slice(5)  # a picture of another size would be padded
    alone, together = (
        make_segmenter(config(models, segmenter, batch_size=size)).segment(
            pictures()[square], WORDS[square], range(5)
        )
        for size in (1, 8)
    )
    for one, other in zip(alone, together, strict=True):
        assert (one.mask != other.mask).mean() < 0.005
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_the_words_matter(models, segmenter):
    segmenter = make_segmenter(config(models, segmenter))
    (one,), (other,) = (segmenter.segment(pictures()[:1], [w], [0]) for w in ("red mug", "car"))
    assert one.score != other.score


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_words_that_are_not_found_are_rejected(models, segmenter):
    assert segment(config(models, segmenter, threshold=1.0)) == [Rejected("not_found")] * 6


def test_only_the_pictures_with_a_box_are_cut_out(models):
    """A threshold between the scores of the boxes: the answers keep their places."""
    from data_gen.grounded_sam import GroundingDino

    boxes = GroundingDino(config(models, "grounded_sam")).find(pictures(), WORDS)
    scores = sorted(box.score for box in boxes)
    threshold = (scores[2] + scores[3]) / 2
    kept = segment(config(models, "grounded_sam", threshold=threshold))
    everything = segment(config(models, "grounded_sam"))
    for box, one, other in zip(boxes, kept, everything, strict=True):
        assert isinstance(one, Segmentation) == (box.score > threshold)
        if isinstance(one, Segmentation):
            assert (one.mask != other.mask).mean() < 0.02


def test_a_score_is_the_boxs_times_the_predicted_iou_in_its_range(models, monkeypatch):
    from data_gen.grounded_sam import Box

    segmenter = make_segmenter(config(models, "grounded_sam"))
    boxes = [Box(np.array([0, 0, 9, 9], np.float32), 0.5)] * 3
    monkeypatch.setattr(segmenter._detector, "find", lambda pictures, objects: boxes)
    cut = [(np.ones((64, 64), bool), iou) for iou in (0.8, 1.2, -0.1)]
    monkeypatch.setattr(segmenter._cutter, "cut", lambda pictures, boxes: cut)
    found = segmenter.segment(pictures()[:3], WORDS[:3], range(3))
    assert [one.score for one in found] == [0.4, 0.5, 0.0]


@pytest.mark.parametrize("picture", pictures()[4:])
def test_segment_anything_cuts_as_its_own_predictor(models, picture):
    from segment_anything import SamPredictor

    from data_gen.grounded_sam import GroundingDino

    settings = config(models, "grounded_sam")
    (box,) = GroundingDino(settings).find([picture], ["red mug"])
    model = tiny_segmenters.build_sam()
    model.load_state_dict(torch.load(models["grounded_sam"], weights_only=True))
    predictor = SamPredictor(model.eval())
    predictor.set_image(picture)
    masks, ious, _ = predictor.predict(box=box.corners, multimask_output=False)
    (found,) = make_segmenter(settings).segment([picture], ["red mug"], [0])
    np.testing.assert_array_equal(found.mask, masks[0])
    assert found.score == pytest.approx(box.score * np.clip(ious[0], 0, 1))


def test_the_best_box_and_the_first_one(models):
    """What GroundingDINO's own post-processing gives, of which one is taken."""
    from data_gen.grounded_sam import GroundingDino

    best, first = (
        GroundingDino(config(models, "grounded_sam", box=which)) for which in ("best", "first")
    )
    pairs = list(zip(best.find(pictures(), WORDS), first.find(pictures(), WORDS), strict=True))
    assert all(one.score >= other.score for one, other in pairs)
    assert any(one.score > other.score for one, other in pairs)


def test_boxes_are_in_pixels_of_the_picture(models):
    """GroundingDINO's boxes are centres and sizes, as shares of the picture."""
    from data_gen.grounded_sam import GroundingDino

    detector = GroundingDino(config(models, "grounded_sam"))
    picture = pictures()[5]
    (box,) = detector.find([picture], ["mug"])
    inputs = detector._processor(images=[picture], text=["mug."], return_tensors="pt")
    with torch.inference_mode():
        outputs = detector._model(**inputs)
    scores = outputs.logits[0].sigmoid().amax(-1)
    x, y, w, h = outputs.pred_boxes[0, scores.argmax()].tolist()
    expected = [80 * (x - w / 2), 48 * (y - h / 2), 80 * (x + w / 2), 48 * (y + h / 2)]
    np.testing.assert_allclose(box.corners, expected, rtol=1e-4, atol=1e-3)
    assert box.score == pytest.approx(float(scores.max()))


def test_the_query_is_a_single_phrase():
    from data_gen.grounded_sam import as_query

    assert as_query("Red  Mug") == "red mug."
    assert as_query("St. Bernard dog?") == "st bernard dog."


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_very_long_words_do_no_harm(models, segmenter):
    segmenter = make_segmenter(config(models, segmenter))
    (found,) = segmenter.segment(pictures()[:1], ["red mug " * 1000], [0])
    assert isinstance(found, Segmentation)


def test_sam3_masks_are_those_of_the_best_query(models):
    from data_gen.sam3 import Sam3, as_input

    segmenter = Sam3(config(models, "sam3"))
    picture = pictures()[5]
    (found,) = segmenter.segment([picture], ["snow"], [0])
    text = segmenter._tokenizer(["snow"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.inference_mode():
        answer = segmenter._model(pixel_values=torch.from_numpy(as_input([picture], 56)), **text)
        scores = (answer.pred_logits.sigmoid() * answer.presence_logits.sigmoid())[0]
        masks = torch.nn.functional.interpolate(
            answer.pred_masks.sigmoid(), size=(48, 80), mode="bilinear"
        )
    np.testing.assert_array_equal(found.mask, masks[0, scores.argmax()] > 0.5)
    assert found.score == pytest.approx(float(scores.max()))


def test_sam3_pictures_are_scaled_to_minus_one_to_one():
    from data_gen.sam3 import as_input

    picture = np.full((20, 10, 3), 255, np.uint8)
    picture[..., 2] = 0
    scaled = as_input([picture], 8)
    assert scaled.shape == (1, 3, 8, 8) and scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled[0, :, 0, 0], [1, 1, -1])


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_the_hash_is_of_the_weights_wherever_they_lie(models, segmenter, tmp_path):
    before = make_segmenter(config(models, segmenter)).model_hash
    if segmenter == "grounded_sam":
        changed = tiny_segmenters.build_sam().state_dict()
        torch.save(changed, tmp_path / "same.pth")
        same = config(models, segmenter, sam=str(tmp_path / "same.pth"))
        assert make_segmenter(same).model_hash == before
        changed["mask_decoder.iou_token.weight"][0, 0] += 1
        torch.save(changed, tmp_path / "other.pth")
        other = config(models, segmenter, sam=str(tmp_path / "other.pth"))
        assert make_segmenter(other).model_hash != before
    else:
        assert make_segmenter(config(models, segmenter)).model_hash == before
        assert before


class Trap:
    """A pickle that touches a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(models, tmp_path):
    torch.save({"weights": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="trap.pth cannot be loaded") as error:
        make_segmenter(config(models, "grounded_sam", sam=str(tmp_path / "trap.pth")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("segmenter", "changes", "message"),
    [
        ("grounded_sam", {"detector": "nowhere"}, "masks.grounded_sam.detector: nowhere cannot"),
        ("grounded_sam", {"sam": "nowhere.pth"}, "masks.grounded_sam.sam: nowhere.pth cannot"),
        ("grounded_sam_hf", {"sam": "nowhere"}, "masks.grounded_sam.sam: nowhere cannot"),
        ("sam3", {}, "masks.sam3.model: nowhere cannot"),
    ],
)
def test_models_that_are_not_there_are_one_line_errors(models, segmenter, changes, message):
    with pytest.raises(UserError, match=message) as error:
        make_segmenter(config({**models, "sam3": "nowhere"}, segmenter, **changes))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    shutil.copytree(models["grounded_sam_hf"], tmp_path / "sam")
    tensors = load_file(tmp_path / "sam" / "model.safetensors")
    tensors.pop("mask_decoder.iou_token.weight")
    save_file(tensors, tmp_path / "sam" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 are missing, such as mask_decoder.iou_token") as error:
        make_segmenter(config(models, "grounded_sam_hf", sam=str(tmp_path / "sam")))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_size_is_a_one_line_error(models, tmp_path):
    state = tiny_segmenters.build_sam().state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "vit_x.pth")
    with pytest.raises(UserError, match="set masks.grounded_sam.sam_type") as error:
        make_segmenter(config(models, "grounded_sam", sam=str(tmp_path / "vit_x.pth")))
    assert "\n" not in str(error.value)


def test_segment_anything_missing_is_a_one_line_error(models, monkeypatch):
    importing = builtins.__import__

    def without(name, *rest):
        if name.startswith("segment_anything"):
            raise ModuleNotFoundError("No module named 'torchvision'")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="torchvision.*or use grounded_sam_hf") as error:
        make_segmenter(config(models, "grounded_sam"))
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_a_one_line_error(models):
    settings = config(models, "sam3").model_copy(update={"device": "cuda:77"})
    with pytest.raises(UserError, match=r"masks\.device: there is no cuda:77 here"):
        make_segmenter(settings)


def run_config(tmp_path, model, masks, **changes):
    return DataGenConfig.model_validate(
        {
            "output_dir": str(tmp_path / "out"),
            "candidates": 5,
            "candidates_per_shard": 3,
            "pictures": {
                "model": str(model),
                "scheduler": "unipc",
                "steps": 2,
                "image_size": 32,
                "batch_size": 2,
                "device": "cpu",
            },
            "masks": masks.model_dump()
            | {
                "filters": {
                    "min_area": 0.0,
                    "max_area": 1.0,
                    "border": 0.0,
                    "min_largest_component": 0.0,
                }
            },
            **changes,
        }
    )


def test_captions_pictures_boxes_masks_records(models, tmp_path):
    """The whole way through the real classes: grammar, diffusers, GroundingDINO, SAM, TFRecord."""
    model = save_stable_diffusion(tmp_path / "sd")
    settings = run_config(tmp_path, model, config(models, "grounded_sam"))
    assert run(Command(settings)) == 0
    readers = [ShardReader(path) for path in read_split(settings.output_dir).paths]
    records = [decode(reader[n]) for reader in readers for n in range(len(reader))]
    assert [record.id for record in records] == [f"train-{n:09d}" for n in range(5)]
    for record in records:
        assert record.object in record.caption
        picture = decode_picture(record.target, where=record.id)
        mask = decode_mask(record.mask, where=record.id)
        assert picture.shape == (32, 32, 3) and mask.shape == (32, 32)
        assert mask.any() and 0 <= record.score <= 1


def test_a_run_goes_on_with_the_models_elsewhere_and_in_other_batches(models, tmp_path):
    masks = config(models, "grounded_sam")
    before = run_config(tmp_path, "sd", masks)
    moved = {"device": "cpu", "batch_size": 2}
    moved["grounded_sam"] = masks.grounded_sam.model_copy(update={"sam": "x", "detector": "y"})
    after = run_config(tmp_path, "sd", masks.model_copy(update=moved))
    assert samples_hash(before, "model") == samples_hash(after, "model")
    finer = masks.grounded_sam.model_copy(update={"box_threshold": 0.4})
    other = run_config(tmp_path, "sd", masks.model_copy(update={"grounded_sam": finer}))
    assert samples_hash(before, "model") != samples_hash(other, "model")


def test_without_networks_torch_is_not_imported():
    code = (
        "import sys; from data_gen.config import MasksConfig; "
        "from data_gen.masks import make_segmenter; make_segmenter(MasksConfig()); "
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
