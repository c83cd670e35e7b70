"""Text to mask: GroundingDINO finds the object's words, Segment Anything cuts out the box.

Segment Anything takes no text. GroundingDINO (Liu et al. 2023) gives boxes for it, each with a
score: the highest similarity, through a sigmoid, of the box with any of the text's tokens. One box
is the prompt of Segment Anything (Kirillov et al. 2023), which gives one mask for it and a
prediction of the mask's intersection over union with the truth.

The score of a mask is the product of the two, the box's score and the predicted IoU (clipped to
[0, 1]): low if the words were not found, and low if what they name could not be cut out well.

GroundingDINO's text threshold has no place here. It decides which of the text's phrases a box is
labelled with, and this text is a single phrase.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamModel,
    SamProcessor,
)

from bootpig_jax.errors import UserError
from data_gen.config import MasksConfig
from data_gen.networks import find_device, hash_weights, inference, load, read_model
from data_gen.stages import Rejected, Segmentation

Picture = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Box:
    """A rectangle and the detector's confidence that it holds the object.

    Attributes:
      corners: left, top, right, bottom, in pixels of the picture.
      score: in [0, 1].
    """

    corners: Float32[np.ndarray, " 4"]
    score: float


class BoxCutter(Protocol):
    """Cuts out what boxes hold: Segment Anything in one of its two implementations."""

    @property
    def model_hash(self) -> str:
        """Hash of the network's weights."""
        ...

    def cut(
        self, pictures: Sequence[Picture], boxes: Sequence[Box]
    ) -> list[tuple[Bool[np.ndarray, "h w"], float]]:
        """Returns, for one box in each picture, its mask and the predicted IoU of that."""
        ...


class GroundedSam:
    """GroundingDINO and Segment Anything as one segmenter.

    Rejects with `not_found` where no box has a score above the threshold.
    """

    def __init__(self, config: MasksConfig) -> None:
        """Loads the networks onto their device.

        Raises:
          UserError: one cannot be loaded, or segment_anything is missing, or there is no such
            device.
        """
        self._batch_size = config.batch_size
        self._detector = GroundingDino(config)
        self._cutter: BoxCutter
        if config.segmenter == "grounded_sam":
            self._cutter = SegmentAnything(config)
        else:
            self._cutter = TransformersSam(config)
        self.model_hash = self._detector.model_hash + self._cutter.model_hash

    def segment(
        self, pictures: Sequence[Picture], objects: Sequence[str], seeds: Sequence[int]
    ) -> list[Segmentation | Rejected]:
        """Returns the mask of the named object in each picture (see `stages.Segmenter`)."""
        found: list[Segmentation | Rejected] = []
        for start in range(0, len(pictures), self._batch_size):
            batch = slice(start, start + self._batch_size)
            found += self._segment_batch(pictures[batch], objects[batch])
        return found

    def _segment_batch(
        self, pictures: Sequence[Picture], objects: Sequence[str]
    ) -> list[Segmentation | Rejected]:
        boxes = {
            n: box
            for n, box in enumerate(self._detector.find(pictures, objects))
            if box is not None
        }
        found: list[Segmentation | Rejected] = [Rejected("not_found")] * len(pictures)
        if boxes:
            cut = self._cutter.cut([pictures[n] for n in boxes], list(boxes.values()))
            for (n, box), (mask, iou) in zip(boxes.items(), cut, strict=True):
                found[n] = Segmentation(mask, box.score * min(max(iou, 0.0), 1.0))
        return found


class GroundingDino:
    """GroundingDINO: boxes for words."""

    def __init__(self, config: MasksConfig) -> None:
        """Loads the network onto its device.

        Raises:
          UserError: it cannot be loaded, or there is no such device.
        """
        self._config = config
        name = str(config.grounded_sam.detector)
        field = "grounded_sam.detector"
        self._model = load(field, name, _read_detector).to(find_device(config.device)).eval()
        self._processor = load(field, name, _read_detector_processor)
        self.model_hash = hash_weights(self._model)

    def find(self, pictures: Sequence[Picture], objects: Sequence[str]) -> list[Box | None]:
        """Returns the box of the named object in each picture, None where there is none.

        Args:
          pictures: one batch.
          objects: for each, the words for its object.
        """
        with inference(self._config) as device:
            inputs = self._processor(
                images=list(pictures),
                text=[as_query(words) for words in objects],
                padding=True,
                truncation=True,
                max_length=self._model.config.max_text_len,
                return_tensors="pt",
            ).to(device)
            answers = self._processor.post_process_grounded_object_detection(
                self._model(**inputs),
                inputs.input_ids,
                threshold=self._config.grounded_sam.box_threshold,
                target_sizes=[picture.shape[:2] for picture in pictures],
            )
        return [self._chosen(answer["scores"], answer["boxes"]) for answer in answers]

    def _chosen(self, scores: torch.Tensor, boxes: torch.Tensor) -> Box | None:
        if not len(scores):
            return None
        number = 0 if self._config.grounded_sam.box == "first" else int(scores.argmax())
        return Box(boxes[number].float().cpu().numpy(), float(scores[number]))


class SegmentAnything:
    """Segment Anything by its authors' package, `segment_anything`."""

    def __init__(self, config: MasksConfig) -> None:
        """Loads the checkpoint onto its device.

        Raises:
          UserError: the package is missing, the checkpoint cannot be loaded, or there is no such
            device.
        """
        resize, builders = _import_segment_anything()
        self._config = config
        device = find_device(config.device)
        self._model = builders[config.grounded_sam.sam_type]()
        tensors = load("grounded_sam.sam", str(config.grounded_sam.sam), _read_tensors)
        try:
            self._model.load_state_dict(tensors)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise UserError(
                f"masks.grounded_sam.sam: {config.grounded_sam.sam} does not hold the weights of a "
                f"{config.grounded_sam.sam_type}: set masks.grounded_sam.sam_type to its size"
            ) from error
        self._model.to(device).eval()
        self._resize = resize(self._model.image_encoder.img_size)
        self.model_hash = hash_weights(self._model)

    def cut(
        self, pictures: Sequence[Picture], boxes: Sequence[Box]
    ) -> list[tuple[Bool[np.ndarray, "h w"], float]]:
        """Returns each box's mask and predicted IoU (see `BoxCutter`)."""
        with inference(self._config) as device:
            batch = []
            for picture, box in zip(pictures, boxes, strict=True):
                size = picture.shape[:2]
                resized = torch.from_numpy(self._resize.apply_image(picture))
                corners = self._resize.apply_boxes(box.corners[None], size)
                batch.append(
                    {
                        "image": resized.permute(2, 0, 1).to(device),
                        "boxes": torch.as_tensor(corners, dtype=torch.float32, device=device),
                        "original_size": size,
                    }
                )
            # A box leaves little doubt about what is meant, so one mask is asked for, not three.
            answers = self._model(batch, multimask_output=False)
        return [
            (answer["masks"][0, 0].cpu().numpy(), float(answer["iou_predictions"][0, 0]))
            for answer in answers
        ]


class TransformersSam:
    """Segment Anything by `transformers`, which needs no torchvision."""

    def __init__(self, config: MasksConfig) -> None:
        """Loads the network onto its device.

        Raises:
          UserError: it cannot be loaded, or there is no such device.
        """
        self._config = config
        name = str(config.grounded_sam.sam)
        self._model = load("grounded_sam.sam", name, _read_sam).to(find_device(config.device))
        self._model.eval()
        self._processor = load("grounded_sam.sam", name, _read_sam_processor)
        self.model_hash = hash_weights(self._model)

    def cut(
        self, pictures: Sequence[Picture], boxes: Sequence[Box]
    ) -> list[tuple[Bool[np.ndarray, "h w"], float]]:
        """Returns each box's mask and predicted IoU (see `BoxCutter`)."""
        with inference(self._config) as device:
            inputs = self._processor(
                images=list(pictures),
                input_boxes=[[box.corners.tolist()] for box in boxes],
                return_tensors="pt",
            )
            answers = self._model(
                pixel_values=inputs["pixel_values"].to(device),
                input_boxes=inputs["input_boxes"].to(device, torch.float32),
                multimask_output=False,
            )
            masks = self._processor.image_processor.post_process_masks(
                answers.pred_masks.float(),
                inputs["original_sizes"],
                inputs["reshaped_input_sizes"],
            )
        return [
            (mask[0, 0].cpu().numpy(), float(iou[0, 0]))
            for mask, iou in zip(masks, answers.iou_scores, strict=True)
        ]


def as_query(words: str) -> str:
    """Returns an object's words as GroundingDINO was trained with them: `red mug.`, with a point.

    Points and question marks among the words would end the phrase.
    """
    phrase = " ".join(words.lower().replace(".", " ").replace("?", " ").split())
    return f"{phrase}."


def _read_detector(name: str) -> Any:
    return read_model(GroundingDinoForObjectDetection, name)


def _read_detector_processor(name: str) -> GroundingDinoProcessor:
    return GroundingDinoProcessor(_image_processor(name), AutoTokenizer.from_pretrained(name))


def _read_sam(name: str) -> Any:
    return read_model(SamModel, name)


def _read_sam_processor(name: str) -> SamProcessor:
    return SamProcessor(_image_processor(name))


def _image_processor(name: str) -> Any:
    # Of the two implementations the one that is always there, so that a mask does not depend on
    # whether torchvision is installed.
    return AutoImageProcessor.from_pretrained(name, backend="pil")


def _read_tensors(path: str) -> Any:
    # A .pth file is a pickle: whatever it says, nothing but tensors is built.
    return torch.load(path, map_location="cpu", weights_only=True)


def _import_segment_anything() -> tuple[Any, Any]:
    """Returns segment_anything's class for resizing and its table of builders."""
    try:
        from segment_anything import sam_model_registry
        from segment_anything.utils.transforms import ResizeLongestSide
    # A torchvision that was built for another torch fails with a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"masks.segmenter: grounded_sam needs segment_anything and torchvision ({error}): "
            "install the extra data-gen and the torchvision that matches your torch, or use "
            "grounded_sam_hf"
        ) from error
    return ResizeLongestSide, sam_model_registry
